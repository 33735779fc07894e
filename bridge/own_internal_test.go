package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"syscall"
	"testing"
)

// What is about this host is ours; what may be about the destination is not.
func TestIsOwn(t *testing.T) {
	dial := func(err error) error {
		return &url.Error{Op: "Post", URL: "http://center.example/", Err: &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)}}
	}
	for _, tt := range []struct {
		name string
		err  error
		want bool
	}{
		{"refused by the guard", dial(&ownError{text: "no"}), true},
		{"wrapped", fmt.Errorf("send: %w", &ownError{text: "no"}), true},
		{"no route", dial(syscall.ENETUNREACH), true},
		{"network down", dial(syscall.ENETDOWN), true},
		{"no port left", dial(syscall.EADDRNOTAVAIL), true},
		{"too many files", dial(syscall.EMFILE), true},
		{"connection refused", dial(syscall.ECONNREFUSED), false},
		{"host unreachable", dial(syscall.EHOSTUNREACH), false},
		{"no such host", &net.DNSError{Err: "no such host", Name: "center.example", IsNotFound: true}, false},
		{"after the dial", &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("write", syscall.ENETUNREACH)}, false},
		{"something else", errors.New("oops"), false},
		{"nothing", nil, false},
	} {
		if got := isOwn(tt.err); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
