package bridge

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestScheduleWait(t *testing.T) {
	const most = 0.999999
	tests := []struct {
		name    string
		class   Class
		attempt int
		random  float64
		want    time.Duration
	}{
		{"first, no jitter", Retry, 1, 0, 0},
		{"first", Retry, 1, most, 500 * time.Millisecond},
		{"half of the second", Retry, 2, 0.5, 500 * time.Millisecond},
		{"third", Retry, 3, most, 2 * time.Second},
		{"fourth", Poison, 4, most, 5 * time.Second},
		{"fifth", Retry, 5, most, 10 * time.Second},
		{"sixth", Gone, 6, most, 30 * time.Second},
		{"seventh", Retry, 7, most, time.Minute},
		{"then a minute at least", Retry, 8, 0, time.Minute},
		{"then five minutes at most", Retry, 1000, most, 5 * time.Minute},
		{"configuration is slow from the first", Configuration, 1, 0, time.Minute},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Schedule{}.orDefault().wait(tt.class, tt.attempt, func() float64 { return tt.random })
			if got.Round(time.Millisecond) != tt.want {
				t.Errorf("wait = %v, want %v", got, tt.want)
			}
		})
	}
}

func TestFailureText(t *testing.T) {
	in := func(err error) error { return &url.Error{Op: "Post", URL: "http://127.0.0.1:1/", Err: err} }
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 43210}
	tests := []struct {
		name string
		res  Response
		want string
	}{
		{"status", Response{Status: 503}, "answered 503 Service Unavailable"},
		{"unknown status", Response{Status: 599}, "answered 599"},
		{"refused", Response{Err: in(&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)})}, "connect: connection refused"},
		{"reset, without the ports", Response{Err: in(&net.OpError{Op: "read", Source: local, Err: os.NewSyscallError("read", syscall.ECONNRESET)})}, "read: connection reset by peer"},
		{"dial timeout", Response{Err: in(&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded})}, "dial timed out"},
		{"closed", Response{Err: in(io.EOF)}, "connection closed without an answer"},
		{"no such name", Response{Err: in(&net.OpError{Op: "dial", Err: &net.DNSError{
			Err: "no such host", Name: "nc.example", Server: "10.0.0.53:53", IsNotFound: true,
		}})}, "lookup nc.example on 10.0.0.53:53: no such host"},
		{"no name server, without the ports", Response{Err: in(&net.OpError{Op: "dial", Err: &net.DNSError{
			Err: "read udp 10.0.0.7:43210->10.0.0.53:53: read: connection refused", Name: "nc.example", Server: "10.0.0.53:53",
		}})}, "lookup nc.example on 10.0.0.53:53: connection refused"},
		{"no HTTP, and much of it", Response{Err: in(errors.New(strings.Repeat("é", 40_000)))}, strings.Repeat("é", 256) + "..."},
		{"other", Response{Err: in(errors.New("bad answer"))}, "bad answer"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := failureText(tt.res); got != tt.want {
				t.Errorf("failureText = %q, want %q", got, tt.want)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		text string
		want time.Duration
	}{
		{"", 0},
		{"0", time.Second},
		{"7", 7 * time.Second},
		{"3600", time.Hour},
		{"86400", time.Hour},
		{"99999999999999999999999999", time.Hour},
		{"-3", 0},
		{"-99999999999999999999999999", 0},
		{"soon", 0},
		{now.Add(90 * time.Second).Format(http.TimeFormat), 90 * time.Second},
		{now.Add(-time.Minute).Format(http.TimeFormat), time.Second},
		{now.AddDate(1, 0, 0).Format(http.TimeFormat), time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.text, func(t *testing.T) {
			if got := retryAfter(http.Header{"Retry-After": {tt.text}}, now); got != tt.want {
				t.Errorf("retryAfter = %v, want %v", got, tt.want)
			}
		})
	}
}

func TestNotices(t *testing.T) {
	var n notices
	now := time.Now()
	says := func(text string, wantUnsaid int, want bool) {
		t.Helper()
		if unsaid, ok := n.worth(text, now); unsaid != wantUnsaid || ok != want {
			t.Errorf("worth(%q) = %d, %v, want %d, %v", text, unsaid, ok, wantUnsaid, want)
		}
	}
	says("a", 0, true)
	says("a", 0, false)
	says("b", 0, true)
	says("a", 0, false) // going back and forth is no change
	now = now.Add(noticeAgain)
	says("a", 2, true)
	says("a", 0, false)

	lines := 0
	for i := range 10 * noticeTexts {
		if _, ok := n.worth(string(rune('α'+i)), now); ok {
			lines++
		}
	}
	if lines > noticeTexts {
		t.Errorf("%d lines for failures that never read the same, want %d at most", lines, noticeTexts)
	}
}
