package bridge

import (
	"encoding/base64"
	"testing"
)

func decoded(t testing.TB, text string) []byte {
	t.Helper()
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// The first is the example that the reference libraries of Standard Webhooks
// are tested with; the other key's signature was made with openssl.
func TestSignature(t *testing.T) {
	published := decoded(t, "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	other := []byte("another key of 24 bytes.")
	const id, timestamp, body = "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", `{"test": 2432232314}`
	const (
		byPublished = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
		byOther     = "v1,APbQNxKUn2e5lYvK3YGInvJ4DssWaDZYx4CfHqloctk="
	)
	tests := []struct {
		name string
		keys [][]byte
		want string
	}{
		{"the published example", [][]byte{published}, byPublished},
		{"the new key first, then the old one", [][]byte{other, published}, byOther + " " + byPublished},
		{"the old key first", [][]byte{published, other}, byPublished + " " + byOther},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := signature(tt.keys, id, timestamp, []byte(body)); got != tt.want {
				t.Errorf("signature = %q, want %q", got, tt.want)
			}
		})
	}
}

// No id can be read as another id with a time of its own, and no two become one.
func TestSignedID(t *testing.T) {
	tests := []struct{ id, want string }{
		{"01M831CZFTB5RKQF54PG7WMT7R", "01M831CZFTB5RKQF54PG7WMT7R"},
		{"V7-1700000000000", "V7-1700000000000"},
		{"a b/c", "a b/c"},
		{"V7.1700000000.{}", "V7%2E1700000000%2E%7B%7D"},
		{"V7%2E17", "V7%252E17"},
		{"Zoë", "Zo%C3%AB"},
	}
	for _, tt := range tests {
		if got := signedID(tt.id); got != tt.want {
			t.Errorf("signedID(%q) = %q, want %q", tt.id, got, tt.want)
		}
	}
}
