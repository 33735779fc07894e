# Six targets, each one go command.
LINT = go tool -modfile=tools/golangci-lint/go.mod golangci-lint

.PHONY: build test race bench lint fuzz

build:
	go build -trimpath -o broker ./cmd/broker

test:
	go test ./...

race:
	go test -race ./...

bench:
	go test -run '^$$' -bench . -benchmem ./...

lint:
	$(LINT) run

fuzz:
	go test -run '^$$' -fuzz FuzzDecode -fuzztime 1m ./tracectx
