package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// However a destination is when the bridge stops, the attempts under way are
// waited for, none is started, and what is left is as it would be after them.
func TestStopDrains(t *testing.T) {
	tests := map[string]struct {
		define func(*bridge.Destination)
		before func(r *rig) // leaves slow attempts under way
		flying int
	}{
		"rate": {
			define: func(d *bridge.Destination) { d.Rate = bridge.Rate{N: 1, Per: time.Minute} },
			before: func(*rig) {}, flying: 1,
		},
		"paused": {before: func(r *rig) { r.pause() }, flying: 16},
		"resumed": {before: func(r *rig) {
			r.pause()
			r.resume()
		}, flying: 16},
		"breaker open": {before: func(r *rig) {
			time.Sleep(time.Minute)
			r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 1)
			r.awaitAttempt()
		}, flying: 1},
		"lane left": {
			define: func(d *bridge.Destination) { d.LaneHold = time.Second },
			before: func(r *rig) {
				r.others(10 * time.Second)
				r.wantMetric(laneLeft, 1)
				r.awaitAttempt()
			}, flying: 1,
		},
		"defined anew": {before: func(r *rig) {
			d := to(nc)
			d.LaneHold = time.Hour
			r.define(d)
		}, flying: 16},
		"defined no more": {before: func(r *rig) { r.define() }, flying: 16},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := to(nc)
				if tt.define != nil {
					tt.define(&d)
				}
				r.define(d)
				const takes = 3 * time.Second
				r.center.answers(func(_ context.Context, s sent) bridge.Response {
					if name == "lane left" && s.id != "0" {
						return bridge.Response{Status: 200}
					}
					time.Sleep(takes)
					if name == "breaker open" || name == "lane left" {
						return bridge.Response{Status: 503}
					}
					return bridge.Response{Status: 200}
				})
				for n := range 100 {
					r.add(fmt.Sprint(n%50), fmt.Sprint(n))
				}
				synctest.Wait()
				tt.before(r)
				synctest.Wait()
				if got := r.inFlight(); got != tt.flying {
					t.Fatalf("%d attempts under way, want %d", got, tt.flying)
				}
				sent := len(r.center.all())
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				if err := r.Stop(ctx); err != nil {
					t.Error(err)
				}
				if took := time.Since(start); took > takes {
					t.Errorf("the stop took %v", took)
				}
				if got := r.inFlight(); got != 0 {
					t.Errorf("%d attempts under way after the stop", got)
				}
				// Nothing starts again, whatever is asked for.
				r.add("late", "late")
				_ = r.Pause(t.Context(), nc)
				_ = r.Resume(t.Context(), nc)
				r.define(d)
				time.Sleep(time.Hour)
				if got := len(r.center.all()); got != sent {
					t.Errorf("%d attempts after the stop", got-sent)
				}
			})
		})
	}
}

// inFlight is how many attempts the center has not answered yet.
func (r *rig) inFlight() int {
	v, _ := r.metric("throughline_delivery_in_flight{destination=" + nc + "}")
	return int(v)
}

// awaitAttempt waits until one is under way.
func (r *rig) awaitAttempt() {
	for range 3000 {
		if r.inFlight() > 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.t.Fatal("no attempt within five minutes")
}

// A stop is over when its bound and the cut off are, even if every attempt hangs
// and the sender doesn't notice that it was cut off.
func TestStopIsBounded(t *testing.T) {
	for name, deaf := range map[string]bool{"cut off": false, "deaf": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				late := make(chan struct{})
				r.center.answers(func(ctx context.Context, _ sent) bridge.Response {
					if !deaf {
						<-ctx.Done()
						return bridge.Response{Err: ctx.Err()}
					}
					<-late
					return bridge.Response{Err: errors.New("late")}
				})
				for n := range 100 {
					r.add(fmt.Sprint(n), fmt.Sprint(n))
				}
				synctest.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
				defer cancel()
				start := time.Now()
				err := r.Stop(ctx)
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Stop: %v", err)
				}
				most := 4 * time.Second
				if deaf {
					most += time.Second
				}
				if took := time.Since(start); took != most {
					t.Errorf("stopped after %v, want %v", took, most)
				}
				close(late)
				synctest.Wait()
				for seq := range uint64(100) {
					if rec := r.queue.record(seq + 1); rec.ID == "" || rec.Attempts != 0 {
						t.Fatalf("record %d: %+v, want it queued, untouched", seq+1, rec)
					}
				}
			})
		})
	}
}
