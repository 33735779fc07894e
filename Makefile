# Seven targets, each one go command.
LINT = go tool -modfile=tools/golangci-lint/go.mod golangci-lint

.PHONY: build test race soak bench lint fuzz

build:
	go build -trimpath -o broker ./cmd/broker

test:
	go test ./...

race:
	go test -race ./...

# The packages come first: what follows a flag that go does not know is the test's.
soak:
	go test -race -p 1 -run '^TestSoak' -timeout 15m ./hooks ./cmd/broker -soak 10m

bench:
	go test -run '^$$' -bench . -benchmem ./...

lint:
	$(LINT) run

fuzz:
	go test -run '^$$' -fuzz FuzzDecode -fuzztime 1m ./tracectx
