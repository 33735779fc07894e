package bridge_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// at returns when the requests came, counted from start.
func at(start time.Time, all []sent) []time.Duration {
	var times []time.Duration
	for _, s := range all {
		times = append(times, s.at.Sub(start).Round(time.Microsecond))
	}
	return times
}

// limited is to(nc) with a rate.
func limited(n int, per time.Duration) bridge.Destination {
	d := to(nc)
	d.Rate = bridge.Rate{N: n, Per: per}
	return d
}

// Slow rates are even; what was not used in a quiet time doesn't pile up.
func TestRateIsEven(t *testing.T) {
	tests := []struct {
		n     int
		per   time.Duration
		every time.Duration
	}{
		{1, time.Second, time.Second},
		{10, time.Second, 100 * time.Millisecond},
		{30, time.Minute, 2 * time.Second},
		{100, time.Hour, 36 * time.Second},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%d per %v", tt.n, tt.per), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				r.define(limited(tt.n, tt.per))
				for range 2 {
					time.Sleep(time.Hour)
					start, before := time.Now(), len(r.center.all())
					for n := range 5 {
						r.add(fmt.Sprint(n%2), fmt.Sprint(n))
					}
					time.Sleep(10 * tt.every)
					var want []time.Duration
					for n := range 5 {
						want = append(want, time.Duration(n)*tt.every)
					}
					if got := at(start, r.center.all()[before:]); !slices.Equal(got, want) {
						t.Errorf("attempts at %v, want %v", got, want)
					}
				}
				for _, s := range r.center.all() {
					if s.attempt() != "1" {
						t.Errorf("%s: attempt %s, want waiting to cost none", s.id, s.attempt())
					}
				}
			})
		})
	}
}

// A higher rate is kept to in every second but for a tenth of a second's worth,
// and used to the full; lanes keep their order.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		r.define(limited(200, time.Second))
		r.center.answers(func(context.Context, sent) bridge.Response {
			time.Sleep(30 * time.Millisecond)
			return bridge.Response{Status: 200}
		})
		start := time.Now()
		for n := range 1000 {
			r.add(fmt.Sprint("lane", n%50), fmt.Sprint(n))
		}
		time.Sleep(time.Minute)

		all := r.center.all()
		if len(all) != 1000 {
			t.Fatalf("%d attempts, want 1000", len(all))
		}
		times := at(start, all)
		if took := times[999]; took < 4800*time.Millisecond || took > 5100*time.Millisecond {
			t.Errorf("took %v, want some 4.9 s", took)
		}
		for i := range times {
			if j := i + 221; j < len(times) && times[j]-times[i] < time.Second {
				t.Fatalf("more than 220 attempts in the second from %v on", times[i])
			}
		}
		last := map[int]int{}
		for _, s := range all {
			var n int
			if _, err := fmt.Sscan(s.id, &n); err != nil {
				t.Fatal(err)
			}
			if n < last[n%50] {
				t.Errorf("%d sent after %d, of the same lane", n, last[n%50])
			}
			last[n%50] = n
		}
	})
}

// What waits for the rate has no goroutine, and a stop doesn't wait for it.
func TestStopIgnoresRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		r.define(limited(1, time.Hour))
		before := runtime.NumGoroutine()
		for n := range 1000 {
			r.add(fmt.Sprint(n), fmt.Sprint(n))
		}
		time.Sleep(time.Second)
		if got := runtime.NumGoroutine() - before; got > 0 {
			t.Errorf("%d goroutines more with 999 lanes waiting for the rate", got)
		}
		start := time.Now()
		if err := r.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("the stop took %v", took)
		}
		time.Sleep(5 * time.Hour)
		if got := len(r.center.all()); got != 1 || r.queue.queued() != 999 {
			t.Errorf("%d attempts, %d queued, want 1 and 999", got, r.queue.queued())
		}
		if rec := r.queue.record(500); rec.Attempts != 0 || rec.LastError != "" {
			t.Errorf("a record that waited for the rate: %d attempts, %q", rec.Attempts, rec.LastError)
		}
	})
}

// Probes and retries count, however they are due.
func TestRateOfProbes(t *testing.T) {
	for _, status := range []int{503, 401, 429} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := limited(1, time.Minute)
				r.define(d)
				r.center.status(status)
				start := time.Now()
				for n := range 20 {
					r.add(fmt.Sprint(n), fmt.Sprint(n))
				}
				time.Sleep(time.Hour)
				times := at(start, r.center.all())
				if len(times) < 55 || len(times) > 61 {
					t.Errorf("%d attempts in an hour at one a minute", len(times))
				}
				for i := range times[1:] {
					if times[i+1]-times[i] < time.Minute {
						t.Fatalf("attempts at %v and %v", times[i], times[i+1])
					}
				}
				r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 1)

				r.center.status(200)
				time.Sleep(21 * time.Minute)
				if n := r.queue.queued(); n != 0 {
					t.Errorf("%d records queued 21 minutes after the return", n)
				}
			})
		})
	}
}

// A reload changes the rate at once, and one that leaves it alone grants nothing.
func TestRateReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		r.define(limited(1, time.Hour))
		for n := range 50 {
			r.add(fmt.Sprint(n), fmt.Sprint(n))
		}
		time.Sleep(time.Minute)
		for n := range 10 {
			d := limited(1, time.Hour)
			d.Headers = map[string]string{"X-N": fmt.Sprint(n)}
			r.define(d)
		}
		synctest.Wait()
		if got := len(r.center.all()); got != 1 {
			t.Fatalf("%d attempts, want the first of the hour alone", got)
		}

		start := time.Now()
		r.define(limited(10, time.Second))
		time.Sleep(time.Second - time.Nanosecond)
		if got := at(start, r.center.all()[1:]); len(got) != 10 || got[0] != 0 {
			t.Errorf("after a higher rate attempts at %v, want 10 from 0 s on", got)
		}
		r.define(limited(1, time.Hour))
		time.Sleep(30 * time.Minute)
		if got := len(r.center.all()); got != 12 {
			t.Errorf("%d attempts after a lower rate, want 12", got)
		}
		r.define(to(nc))
		synctest.Wait()
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records queued without a rate", n)
		}
	})
}

// Records that expire while they wait for the rate take no turn.
func TestRateAndMaxAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := limited(1, time.Hour)
		d.MaxAge = 10 * time.Minute
		r.define(d)
		r.add("a", "1", "2")
		r.add("b", "3")
		r.add("", "4")
		time.Sleep(12 * time.Minute)
		if got, dead := len(r.center.all()), len(r.queue.buried()); got != 1 || dead != 3 {
			t.Fatalf("%d attempts and %d dead letters, want 1 and 3", got, dead)
		}
		time.Sleep(48 * time.Minute)
		r.add("a", "5")
		synctest.Wait()
		if got := len(r.center.of("5")); got != 1 {
			t.Error("the turn of the second hour was taken by a record that had expired")
		}
	})
}

// The rate never makes more attempts at a time than the concurrency allows.
func TestRateAndConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := limited(1000, time.Second)
		d.Concurrency = 2
		r.define(d)
		r.center.answers(func(context.Context, sent) bridge.Response {
			time.Sleep(time.Second)
			return bridge.Response{Status: 200}
		})
		start := time.Now()
		for n := range 6 {
			r.add("", fmt.Sprint(n))
		}
		time.Sleep(time.Minute)
		want := []time.Duration{0, 0, time.Second, time.Second, 2 * time.Second, 2 * time.Second}
		if got := at(start, r.center.all()); !slices.Equal(got, want) {
			t.Errorf("attempts at %v, want %v", got, want)
		}
	})
}
