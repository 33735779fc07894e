package bridge_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// A lower concurrency is in force once the attempts under way have ended, however
// much is due.
func TestConcurrencyReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(context.Context, sent) bridge.Response {
			time.Sleep(time.Second)
			return bridge.Response{Status: 200}
		})
		for range 100 {
			r.add("", "")
		}
		for _, want := range []int{16, 3, 1, 5} {
			d := to(nc)
			d.Concurrency = want
			r.define(d)
			time.Sleep(1300 * time.Millisecond) // between two answers
			if got := r.inFlight(); got != want {
				t.Errorf("%d attempts under way with a concurrency of %d", got, want)
			}
		}
	})
}
