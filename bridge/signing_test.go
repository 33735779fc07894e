package bridge_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// verifies tells whether a receiver that knows key takes the request: one of its
// signatures is over the id and timestamp of the headers and the body that came.
func verifies(key []byte, r sent) bool {
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", r.Header.Get("webhook-id"), r.Header.Get("webhook-timestamp"), r.Body)
	for part := range strings.SplitSeq(r.Header.Get("webhook-signature"), " ") {
		text, ok := strings.CutPrefix(part, "v1,")
		if got, err := base64.StdEncoding.DecodeString(text); ok && err == nil && hmac.Equal(got, mac.Sum(nil)) {
			return true
		}
	}
	return false
}

// Each attempt is signed as it is sent: its own time, and its own trace context
// in the body.
func TestSignsEachAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		first, second := []byte("a key of 24 bytes, first"), []byte("a key of 24 bytes, other")
		d := to(nc)
		d.SigningKeys = [][]byte{first, second}
		r.define(d)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.attempt() == "3" {
				return bridge.Response{Status: 200}
			}
			return bridge.Response{Status: 503}
		})
		r.add("a", "V7.17")
		time.Sleep(10 * time.Second)

		got := r.center.all()
		if len(got) != 3 || string(got[0].Body) == string(got[2].Body) {
			t.Fatalf("%d attempts, want 3 with different bodies", len(got))
		}
		for i, s := range got {
			if s.id != "V7%2E17" {
				t.Errorf("attempt %d: webhook-id %q", i+1, s.id)
			}
			if want := fmt.Sprint(s.at.Unix()); s.Header.Get("webhook-timestamp") != want {
				t.Errorf("attempt %d: webhook-timestamp %q, want %s", i+1, s.Header.Get("webhook-timestamp"), want)
			}
			if !verifies(first, s) || !verifies(second, s) || verifies([]byte("a key of 24 bytes, third"), s) {
				t.Errorf("attempt %d: webhook-signature %q", i+1, s.Header.Get("webhook-signature"))
			}
		}
		if n := len(r.log.with("24 bytes")); n != 0 {
			t.Errorf("a key is in the log: %q", r.log.all)
		}

		// A rotation is in force with the next attempt.
		d.SigningKeys = [][]byte{second}
		r.define(d)
		r.add("a", "next")
		synctest.Wait()
		if s := r.center.of("next")[0]; verifies(first, s) || !verifies(second, s) {
			t.Errorf("after the rotation: webhook-signature %q", s.Header.Get("webhook-signature"))
		}
	})
}

func TestUnsignedByDefault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.add("a", "V7.17")
		synctest.Wait()
		s := r.center.of("V7.17")
		if len(s) != 1 {
			t.Fatalf("sent %v", r.center.all())
		}
		for _, name := range []string{"webhook-signature", "Idempotency-Key"} {
			if v := s[0].Header.Values(name); v != nil {
				t.Errorf("%s: %q was sent", name, v)
			}
		}
	})
}

func TestIdempotencyKey(t *testing.T) {
	for id, want := range map[string]string{"V7-17": "V7-17", "Zoë": "Zo%C3%AB"} {
		t.Run(id, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := to(nc)
				d.IdempotencyKey = true
				d.Headers = map[string]string{"idempotency-key": "mine"}
				r.define(d)
				r.center.answers(func(_ context.Context, s sent) bridge.Response {
					return bridge.Response{Status: map[string]int{"1": 503, "2": 200}[s.attempt()]}
				})
				r.add("a", id)
				time.Sleep(time.Second)
				got := r.center.all()
				if len(got) != 2 {
					t.Fatalf("%d attempts, want 2", len(got))
				}
				for i, s := range got {
					if v := s.Header.Values("Idempotency-Key"); len(v) != 1 || v[0] != want || s.id != want {
						t.Errorf("attempt %d: Idempotency-Key %q, webhook-id %q, want both %q", i+1, v, s.id, want)
					}
				}
			})
		})
	}
}
