package bridge_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"testing"

	"github.com/throughline-mqtt/throughline/bridge"
)

func TestClassifyStatus(t *testing.T) {
	retry := []int{408, 409, 423, 425, 429}
	configuration := []int{401, 403, 404, 405, 407}
	for status := 100; status <= 599; status++ {
		var want bridge.Class
		switch {
		case status >= 200 && status <= 299:
			want = bridge.Success
		case status < 200 || status >= 500 || slices.Contains(retry, status):
			want = bridge.Retry
		case status <= 399 || slices.Contains(configuration, status):
			want = bridge.Configuration
		case status == 410:
			want = bridge.Gone
		default: // 400, 413, 415, 422 and every other 4xx
			want = bridge.Poison
		}
		if got := bridge.Classify(status, nil); got != want {
			t.Errorf("Classify(%d) = %s, want %s", status, got, want)
		}
		if got := (bridge.Response{Status: status}).Class(); got != want {
			t.Errorf("an answer of %d is %s, want %s", status, got, want)
		}
	}
}

func TestClassifyError(t *testing.T) {
	for name, err := range map[string]error{
		"timeout":   context.DeadlineExceeded,
		"dns":       &net.DNSError{Err: "no such host", Name: "nc.invalid"},
		"refused":   &net.OpError{Op: "dial", Err: errors.New("connection refused")},
		"tls":       errors.New("remote error: tls: handshake failure"),
		"malformed": errors.New("malformed HTTP response"),
	} {
		if got := bridge.Classify(0, err); got != bridge.Retry {
			t.Errorf("%s: Classify = %s, want %s", name, got, bridge.Retry)
		}
		for own, want := range map[bool]bridge.Class{false: bridge.Retry, true: bridge.OwnSide} {
			if got := (bridge.Response{Err: err, Own: own}).Class(); got != want {
				t.Errorf("%s, our own side's %v: %s, want %s", name, own, got, want)
			}
		}
	}
}
