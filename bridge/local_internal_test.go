package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"testing"
)

func TestLocalFault(t *testing.T) {
	away := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 80}
	failed := func(op, call string, errno syscall.Errno) error {
		return &url.Error{Op: "Post", URL: "http://192.0.2.1/", Err: &net.OpError{
			Op: op, Net: "tcp", Addr: away, Err: os.NewSyscallError(call, errno),
		}}
	}
	tests := map[string]struct {
		err    error
		routed bool
		want   bool
	}{
		"no route":                {failed("dial", "connect", syscall.ENETUNREACH), true, true},
		"interface down":          {failed("dial", "connect", syscall.ENETDOWN), true, true},
		"no port left":            {failed("dial", "connect", syscall.EADDRNOTAVAIL), true, true},
		"too many open files":     {failed("dial", "socket", syscall.EMFILE), true, true},
		"too many in the system":  {failed("dial", "socket", syscall.ENFILE), true, true},
		"no buffers":              {failed("dial", "connect", syscall.ENOBUFS), true, true},
		"local firewall":          {failed("dial", "connect", syscall.EPERM), true, true},
		"no route to the host":    {failed("dial", "connect", syscall.EHOSTUNREACH), false, true},
		"host away":               {failed("dial", "connect", syscall.EHOSTUNREACH), true, false},
		"refused":                 {failed("dial", "connect", syscall.ECONNREFUSED), true, false},
		"timed out":               {failed("dial", "connect", syscall.ETIMEDOUT), true, false},
		"route lost while sent":   {failed("write", "write", syscall.ENETUNREACH), true, false},
		"no such name":            {&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host"}}, true, false},
		"host away, no address":   {&net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}, false, false},
		"something else entirely": {fmt.Errorf("read answer: %w", syscall.EMFILE), true, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := localFault(tt.err, func(net.Addr) bool { return tt.routed }); got != tt.want {
				t.Errorf("localFault(%v) = %v, want %v", tt.err, got, tt.want)
			}
		})
	}
}

// The system itself refuses to connect to the broadcast address, so that this is
// how a missing route really looks; the port of a closed listener is none of our
// faults.
func TestLocalFaultReal(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr()
	if !routed(closed) {
		t.Error("no route to loopback")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s := newHTTPSender(senderOptions{concurrency: 1})
	for address, want := range map[string]bool{"255.255.255.255:9": true, closed.String(): false} {
		res := s.Send(t.Context(), &Request{Method: http.MethodPost, URL: "http://" + address + "/", Header: http.Header{}})
		if res.Err == nil || res.Own != want {
			t.Errorf("%s: %v, our own side's: %v, want %v", address, res.Err, res.Own, want)
		}
		if _, ok := errors.AsType[*net.OpError](res.Err); !ok {
			t.Errorf("%s: %v is not of a dial", address, res.Err)
		}
	}
}
