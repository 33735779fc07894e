package bridge_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// A destination that refuses us is told of, once in 10 s, and what was refused goes
// out at once with what it is shown since.
func TestUnauthorized(t *testing.T) {
	for _, status := range []int{401, 407} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var calls []time.Time
			var r *rig
			token := "old"
			def := func(d bridge.Destination) bridge.Destination {
				d.Headers = map[string]string{"Authorization": token}
				return d
			}
			r = newIdleRig(t, func(o *bridge.Options) {
				o.Unauthorized = func(destination string) {
					mu.Lock()
					defer mu.Unlock()
					if destination != nc {
						t.Errorf("told of %q", destination)
					}
					calls = append(calls, time.Now())
					r.define(def(to(nc))) // as it is, or as it has become
				}
			})
			r.center.answers(func(_ context.Context, s sent) bridge.Response {
				if s.Header.Get("Authorization") == "new" {
					return bridge.Response{Status: 200}
				}
				return bridge.Response{Status: status}
			})
			r.define(def(to(nc)))
			for i := range 40 {
				r.add(fmt.Sprint("lane-", i), fmt.Sprint("id-", i))
			}
			time.Sleep(10 * time.Minute)
			mu.Lock()
			for i := 1; i < len(calls); i++ {
				if d := calls[i].Sub(calls[i-1]); d < 10*time.Second {
					t.Errorf("told again after %s", d)
				}
			}
			if len(calls) < 10 || r.queue.queued() != 40 {
				t.Errorf("told %d times, %d records queued", len(calls), r.queue.queued())
			}
			token = "new"
			mu.Unlock()
			time.Sleep(time.Minute)
			if n := r.queue.queued(); n != 0 {
				t.Errorf("%d records are queued a minute after the token was replaced", n)
			}
		})
	}
}

// Other answers are no reason to read secrets, and nobody needs to be told.
func TestUnauthorizedAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, status := range []int{200, 400, 403, 404, 503} {
			r := newRig(t, func(o *bridge.Options) {
				o.Unauthorized = func(string) { t.Errorf("told of a %d", status) }
			})
			r.center.status(status)
			r.add("", "id-1")
			time.Sleep(time.Minute)
		}
		r := newRig(t)
		r.center.status(401)
		r.add("", "id-1")
		time.Sleep(time.Minute)
	})
}
