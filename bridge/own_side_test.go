package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

func noRoute(context.Context, sent) bridge.Response {
	return bridge.Response{Own: true, Err: &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ENETUNREACH)}}
}

// What fails on our own side is no attempt, opens the breaker, and ends within
// two seconds of its end.
func TestOwnSide(t *testing.T) {
	for _, lanes := range []int{1, 20} {
		t.Run(fmt.Sprint(lanes, " lanes"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.center.status(503)
				r.add("0", "tried")
				synctest.Wait()
				r.center.answers(noRoute)
				for n := range lanes {
					r.add(fmt.Sprint(n), fmt.Sprint(n))
				}
				start := time.Now()
				time.Sleep(20*time.Minute + 500*time.Millisecond)
				all := r.center.all()
				if got, most := len(all), 40+20*30; got > most || got < 500 {
					t.Errorf("%d tries in 20 minutes, want a probe every two seconds", got)
				}
				for _, s := range all[1:] {
					want := "1"
					if s.id == "tried" {
						want = "2"
					}
					if s.attempt() != want {
						t.Fatalf("%s: attempt %s after %v, want still %s", s.id, s.attempt(), s.at.Sub(start), want)
					}
				}
				r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 1)
				r.wantMetric("throughline_delivery_attempts_total{class=own_side,destination=notification-center}", float64(len(all)-1))
				if rec := r.queue.record(1); rec.Attempts != 1 || rec.LastError != "connect: network is unreachable" {
					t.Errorf("stored: %d attempts, %q", rec.Attempts, rec.LastError)
				}
				if got := r.log.with("failed on our side"); len(got) == 0 || !strings.Contains(got[0], "network is unreachable") ||
					!strings.Contains(got[0], "level=ERROR") || len(got) > 3 {
					t.Errorf("log %q", got)
				}

				r.center.status(200)
				time.Sleep(2 * time.Second)
				if n, dead := r.queue.queued(), len(r.queue.buried()); n != 0 || dead != 0 {
					t.Errorf("%d records queued two seconds after the route was back, %d dead letters", n, dead)
				}
			})
		})
	}
}

// While others get through, a record that doesn't for reasons of our own is tried
// again at the pace of its last attempt, and ends by its max age alone.
func TestOwnSidePace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := to(nc)
		d.MaxAge = 10 * time.Minute
		r.define(d)
		r.center.answers(func(ctx context.Context, s sent) bridge.Response {
			switch {
			case s.id != "bad":
				return bridge.Response{Status: 200}
			case s.attempt() == "3":
				return noRoute(ctx, s)
			}
			return bridge.Response{Status: 500}
		})
		r.add("", "bad")
		for range 12 * 60 * 2 {
			r.add("", "good")
			time.Sleep(500 * time.Millisecond)
		}
		bad := r.center.of("bad")
		if n := len(bad); n < 500 || n > 610 { // a second each, the wait after the second attempt
			t.Errorf("tried %d times within ten minutes", n)
		}
		dead := r.queue.buried()
		if len(dead) != 1 || dead[0].Reason != bridge.ReasonExpired || dead[0].Attempts != 2 {
			t.Errorf("dead letters %+v, want one that has expired after two attempts", dead)
		}
	})
}

// What only waits while the breaker is open consumes no attempt.
func TestWaitingCostsNoAttempt(t *testing.T) {
	for name, down := range map[string]bridge.Response{
		"down": {Status: 503}, "moved": {Status: 404}, "no route": {Own: true, Err: errors.New("no route")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.center.answers(func(context.Context, sent) bridge.Response { return down })
				for n := range 5 {
					r.add("probed", fmt.Sprint(n))
				}
				for n := range 2000 {
					r.add(fmt.Sprint("lane", n), fmt.Sprint("waits", n))
				}
				time.Sleep(10*time.Minute + 500*time.Millisecond)
				tried := map[string]int{}
				for _, s := range r.center.all() {
					tried[s.id]++
				}
				if len(tried) > 400 {
					t.Fatalf("%d records were tried, want most of them left alone", len(tried))
				}
				for seq := range uint64(2005) {
					rec := r.queue.record(seq + 1)
					want := tried[rec.ID]
					if down.Own {
						want = 0
					}
					if rec.Attempts != want {
						t.Errorf("%s: %d attempts stored, sent %d times", rec.ID, rec.Attempts, tried[rec.ID])
					}
				}
				r.center.status(200)
				time.Sleep(30 * time.Second)
				if n := r.queue.queued(); n != 0 {
					t.Errorf("%d records queued after the return", n)
				}
				for _, s := range r.center.all() {
					if tried[s.id] == 0 && s.attempt() != "1" {
						t.Errorf("%s waited, and its first attempt says it is %s", s.id, s.attempt())
					}
				}
			})
		})
	}
}
