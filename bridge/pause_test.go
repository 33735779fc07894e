package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

const paused = "throughline_delivery_paused{destination=notification-center}"

func (r *rig) pause() {
	r.t.Helper()
	if err := r.Pause(r.t.Context(), nc); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) resume() {
	r.t.Helper()
	if err := r.Resume(r.t.Context(), nc); err != nil {
		r.t.Fatal(err)
	}
}

// status returns the status of nc.
func (r *rig) status() bridge.Status {
	for _, s := range r.Destinations() {
		if s.Name == nc {
			return s
		}
	}
	return bridge.Status{}
}

// restart is another bridge on the same queue, without a destination.
func (r *rig) restart() *rig {
	r.t.Helper()
	if err := r.Stop(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	again := newIdleRig(r.t, func(o *bridge.Options) { o.Queue, r.queue.watch = r.queue, nil })
	again.queue = r.queue
	return again
}

// Nothing is sent while a destination is paused, whatever it did before, and
// everything is due when it is resumed; records are queued meanwhile, and in order.
func TestPause(t *testing.T) {
	for name, before := range map[string]int{"well": 200, "down": 503, "moved": 404, "refuses": 400} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.center.status(before)
				for n := range 10 {
					r.add(fmt.Sprint(n), fmt.Sprint(n, "-0"))
				}
				synctest.Wait()
				r.pause()
				r.pause() // again
				r.wantMetric(paused, 1)
				r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 0)
				was := len(r.center.all())
				since := time.Now()
				for n := range 10 {
					r.add(fmt.Sprint(n), fmt.Sprint(n, "-1"), fmt.Sprint(n, "-2"))
				}
				r.define(to(nc)) // a reload without a change
				d := to(nc)
				d.Headers = map[string]string{"X-New": "1"}
				r.define(d) // and one with
				time.Sleep(23 * time.Hour)
				if got := len(r.center.all()) - was; got != 0 {
					t.Fatalf("%d attempts while it was paused", got)
				}
				if s := r.status(); s.State != bridge.StatePaused || s.Why != bridge.PausedByOperator || !s.Since.Equal(since) || s.URL != "http://127.0.0.1:8080/notify" {
					t.Errorf("status %+v", s)
				}
				r.center.status(200)
				r.resume()
				r.resume()
				synctest.Wait()
				if n, dead := r.queue.queued(), len(r.queue.buried()); n != 0 || dead != 0 {
					t.Errorf("%d records queued after it was resumed, %d dead letters", n, dead)
				}
				r.wantMetric(paused, 0)
				next := map[string]string{}
				for _, s := range r.center.all()[was:] {
					lane, n, _ := strings.Cut(s.id, "-")
					if n <= next[lane] && n != "0" {
						t.Errorf("lane %s: %s after %s", lane, n, next[lane])
					}
					next[lane] = n
				}
				if s := r.status(); s.State != bridge.StateActive || s.Why != "" {
					t.Errorf("status %+v", s)
				}
			})
		})
	}
}

// A pause outlasts a restart, and the destination's absence.
func TestPauseOutlasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.pause()
		r.add("a", "1")
		r.define()
		r.define(to(nc))
		again := r.restart()
		again.define(to(nc))
		again.add("a", "2")
		time.Sleep(time.Hour)
		if got := len(r.center.all()) + len(again.center.all()); got != 0 {
			t.Fatalf("%d attempts", got)
		}
		again.wantMetric(paused, 1)
		if got := again.log.with("destination is paused"); len(got) != 1 {
			t.Errorf("log %q", got)
		}
		again.resume()
		synctest.Wait()
		if n := again.queue.queued(); n != 0 {
			t.Errorf("%d records queued", n)
		}
		last := again.restart()
		last.define(to(nc))
		last.wantMetric(paused, 0)
	})
}

// Max age goes on while a destination is paused.
func TestPauseAndMaxAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := to(nc)
		d.MaxAge = 10 * time.Minute
		r.define(d)
		r.pause()
		for n := range 100 {
			r.add(fmt.Sprint(n%10), fmt.Sprint(n))
		}
		time.Sleep(12 * time.Minute)
		dead := r.queue.buried()
		if len(dead) != 100 || dead[0].Reason != bridge.ReasonExpired || dead[0].Attempts != 0 || len(r.center.all()) != 0 {
			t.Errorf("%d dead letters, %d attempts, want all of them and none", len(dead), len(r.center.all()))
		}
	})
}

// Attempts under way when a destination is paused end as they would.
func TestPauseUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			time.Sleep(time.Second)
			if s.id == "bad" {
				return bridge.Response{Status: 503}
			}
			return bridge.Response{Status: 200}
		})
		r.add("a", "good", "behind")
		r.add("b", "bad")
		synctest.Wait()
		r.pause()
		if s := r.status(); s.InFlight != 2 {
			t.Errorf("%d in flight, want 2", s.InFlight)
		}
		time.Sleep(time.Hour)
		if len(r.center.all()) != 2 || r.queue.queued() != 2 || r.queue.record(3).Attempts != 1 {
			t.Errorf("%d attempts, %d queued, want 2 and 2", len(r.center.all()), r.queue.queued())
		}
	})
}

func TestPauseUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for _, do := range []func(context.Context, string) error{r.Pause, r.Resume} {
			if err := do(t.Context(), "nosuch"); !errors.Is(err, bridge.ErrNoDestination) {
				t.Errorf("error %v", err)
			}
		}
		// One that was paused and is no more in the rule files can be forgotten.
		r.pause()
		r.define()
		if s := r.status(); s.State != bridge.StatePaused || s.URL != "" {
			t.Errorf("status %+v", s)
		}
		r.resume()
		if all := r.Destinations(); len(all) != 0 {
			t.Errorf("destinations %+v", all)
		}
	})
}

// goneRig has a destination that answered 410 to the first of five records.
func goneRig(t *testing.T) *rig {
	r := newRig(t)
	r.center.status(410)
	for n := range 5 {
		r.add("a", fmt.Sprint(n))
	}
	time.Sleep(time.Hour)
	return r
}

func TestGone(t *testing.T) {
	moved := to(nc)
	moved.URL = "http://127.0.0.1:8080/new"
	header := to(nc)
	header.Headers = map[string]string{"X-New": "1"}
	for name, tt := range map[string]struct {
		back  func(r *rig) *rig
		still bool
	}{
		"is resumed":                      {back: func(r *rig) *rig { r.resume(); return r }},
		"moves":                           {back: func(r *rig) *rig { r.define(moved); return r }},
		"is defined otherwise":            {back: func(r *rig) *rig { r.define(header); return r }},
		"moves, with a restart":           {back: func(r *rig) *rig { r = r.restart(); r.define(moved); return r }},
		"is reloaded":                     {back: func(r *rig) *rig { r.define(to(nc)); return r }, still: true},
		"is restarted":                    {back: func(r *rig) *rig { r = r.restart(); r.define(to(nc)); return r }, still: true},
		"is away for a while":             {back: func(r *rig) *rig { r.define(); r.define(to(nc)); return r }, still: true},
		"is paused by an operator, moves": {back: func(r *rig) *rig { r.pause(); r.define(moved); return r }, still: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := goneRig(t)
				if dead := r.queue.buried(); len(dead) != 1 || dead[0].Reason != bridge.ReasonGone || dead[0].ID != "0" || dead[0].Status != 410 {
					t.Errorf("dead letters %+v, want the first record alone", dead)
				}
				if n := len(r.center.all()); n != 1 {
					t.Errorf("%d attempts, want no probe", n)
				}
				if s := r.status(); s.State != bridge.StatePaused || s.Why != bridge.PausedGone {
					t.Errorf("status %+v", s)
				}
				r.wantMetric(paused, 1)
				if got := r.log.with("says that it is gone"); len(got) != 1 || !strings.Contains(got[0], "level=ERROR") {
					t.Errorf("alarm %q", got)
				}
				r.center.status(200)
				r = tt.back(r)
				time.Sleep(time.Hour)
				want := 0
				if tt.still {
					want = 4
				}
				if n := r.queue.queued(); n != want {
					t.Errorf("%d records queued, want %d", n, want)
				}
				if got := len(r.queue.Pauses()); (got == 1) != tt.still {
					t.Errorf("%d pauses kept", got)
				}
			})
		})
	}
}

// Of several 410s that come together one makes a dead letter; so does that of a
// probe.
func TestGoneTogether(t *testing.T) {
	for name, status := range map[string]int{"at once": 410, "after an outage": 503} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.center.status(status)
				for n := range 50 {
					r.add(fmt.Sprint(n), fmt.Sprint(n))
				}
				time.Sleep(time.Minute)
				r.center.answers(func(context.Context, sent) bridge.Response {
					time.Sleep(time.Second)
					return bridge.Response{Status: 410}
				})
				r.resume()
				time.Sleep(time.Minute)
				want := 1
				if status == 410 { // the first time, and after it was resumed
					want = 2
				}
				if dead := r.queue.buried(); len(dead) != want || r.queue.queued() != 50-want {
					t.Errorf("%d dead letters, %d queued, want %d and the rest", len(dead), r.queue.queued(), want)
				}
				r.wantMetric(paused, 1)
				r.wantMetric("throughline_delivery_dead_letters_total{destination=notification-center,reason=gone}", float64(want))
			})
		})
	}
}

// Operators that pause and resume at once, and 410s, leave memory and disk agreed.
func TestPauseConcurrently(t *testing.T) {
	d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, bridge.Schedule{})
	d.center.status(410)
	done := make(chan error, 8)
	for i := range 8 {
		go func() {
			var err error
			for n := range 25 {
				d.fill(nc, fmt.Sprint(i), fmt.Sprint(i, n))
				if n%2 == i%2 {
					_, e := d.op.Pause(t.Context(), nc)
					err = errors.Join(err, e)
				} else {
					_, e := d.op.Resume(t.Context(), nc)
					err = errors.Join(err, e)
				}
			}
			done <- err
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if _, err := d.op.Pause(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	if p := d.outbox.Pauses()[nc]; p.Reason != bridge.PausedByOperator || d.status().Why != p.Reason {
		t.Errorf("kept: %+v, and the destination is %+v", p, d.status())
	}
	if s, err := d.op.Resume(t.Context(), nc); err != nil || s.State == "" {
		t.Errorf("status %+v, error %v", s, err)
	}
}
