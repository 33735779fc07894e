package bridge_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

const laneLeft = "throughline_delivery_lane_left_total{destination=notification-center}"

// allBut answers 503 to ids that begin with "bad", 200 to the others.
func allBut(_ context.Context, s sent) bridge.Response {
	if strings.HasPrefix(s.id, "bad") {
		return bridge.Response{Status: 503}
	}
	return bridge.Response{Status: 200}
}

// others makes another lane succeed every half second.
func (r *rig) others(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		r.add("others", "good")
	}
}

// A record that keeps failing leaves its lane on the second, and goes on alone;
// those behind it keep their order.
func TestLaneHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(allBut)
		time.Sleep(100 * time.Millisecond) // off the others' beat
		start := time.Now()
		r.add("a", "bad", "1", "2", "3")
		r.wantMetric(laneLeft, 0)
		r.others(59 * time.Second)
		if got := len(r.center.of("1")); got != 0 {
			t.Fatal("the lane went on within lane_hold")
		}
		r.others(61 * time.Second)
		r.add("a", "4")
		synctest.Wait()
		var got []string
		for _, s := range r.center.all() {
			if strings.Contains("1234", s.id) {
				got = append(got, fmt.Sprint(s.id, " at ", s.at.Sub(start)))
			}
		}
		if want := []string{"1 at 1m0s", "2 at 1m0s", "3 at 1m0s", "4 at 2m0s"}; !slices.Equal(got, want) {
			t.Errorf("sent %v, want %v", got, want)
		}
		r.wantMetric(laneLeft, 1)
		if log := r.log.with("leaves its lane"); len(log) != 1 || !strings.Contains(log[0], "lane=a seq=1 ") {
			t.Errorf("log %q", log)
		}

		r.others(20 * time.Minute)
		bad := r.center.of("bad")
		if n := len(bad); n != 12 || bad[n-1].attempt() != fmt.Sprint(n) {
			t.Errorf("%d attempts of the record that left, the last says %s; want the schedule's 12", n, bad[n-1].attempt())
		}
		r.center.status(200)
		r.others(5 * time.Minute)
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records queued after the return", n)
		}
	})
}

// What comes behind a record that has failed for long does not wait.
func TestLaneHoldBeforeOthersCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(allBut)
		r.add("a", "bad")
		r.others(2 * time.Minute)
		r.add("a", "1")
		synctest.Wait()
		if got := len(r.center.of("1")); got != 1 {
			t.Errorf("sent %d times, want at once", got)
		}
	})
}

// A record whose attempts hang leaves its lane in the middle of one.
func TestLaneHoldHanging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := to(nc)
		d.LaneHold = 5 * time.Second
		r.define(d)
		r.center.answers(func(ctx context.Context, s sent) bridge.Response {
			if s.id == "bad" {
				<-ctx.Done()
				return bridge.Response{Err: ctx.Err()}
			}
			return bridge.Response{Status: 200}
		})
		start := time.Now()
		r.add("a", "bad", "1")
		r.others(time.Minute)
		if got := r.center.of("1"); len(got) != 1 || got[0].at.Sub(start) != 15*time.Second {
			t.Errorf("sent at %v, want five seconds after the first attempt timed out", at(start, got))
		}
		r.wantMetric(laneLeft, 1)
	})
}

// While nothing else gets through, it may be the destination: the lane waits.
// Once others do, now and then at least, it doesn't for long.
func TestLaneHoldNeedsOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(allBut)
		r.add("a", "bad", "1")
		r.add("b", "bad too", "2")
		time.Sleep(time.Hour)
		r.wantMetric(laneLeft, 0)
		for range 15 {
			r.add("others", "good")
			time.Sleep(time.Minute)
		}
		r.wantMetric(laneLeft, 2)
		if len(r.center.of("1")) != 1 || len(r.center.of("2")) != 1 {
			t.Error("the lanes wait still, with one success a minute for a quarter of an hour")
		}
	})
}

// An outage, and a return that takes longer than lane_hold, keep every lane's order.
func TestLaneHoldOutage(t *testing.T) {
	for name, d := range map[string]struct {
		lanes, concurrency int
		each               time.Duration
	}{"quick return": {1000, 16, 0}, "slow return": {300, 2, time.Second}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				def := to(nc)
				def.Concurrency = d.concurrency
				r.define(def)
				r.add("before", "before")
				synctest.Wait()
				r.center.status(503)
				for n := range 3 * d.lanes {
					r.add(fmt.Sprint(n%d.lanes), fmt.Sprintf("%d-%d", n%d.lanes, n/d.lanes))
				}
				time.Sleep(20 * time.Minute)
				before := len(r.center.all())
				r.center.answers(func(context.Context, sent) bridge.Response {
					time.Sleep(d.each)
					return bridge.Response{Status: 200}
				})
				time.Sleep(10 * time.Minute)
				if n := r.queue.queued(); n != 0 {
					t.Fatalf("%d records queued", n)
				}
				next := map[string]int{}
				for _, s := range r.center.all()[before:] {
					lane, n, _ := strings.Cut(s.id, "-")
					if fmt.Sprint(next[lane]) != n {
						t.Fatalf("lane %s: %s sent when %d was due", lane, n, next[lane])
					}
					next[lane]++
				}
				r.wantMetric(laneLeft, 0)
			})
		})
	}
}

// A record that fails once more after an outage has its minute like any other.
func TestLaneHoldAfterOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.status(503)
		r.add("a", "bad", "1")
		time.Sleep(20 * time.Minute)
		r.center.answers(allBut)
		r.others(50 * time.Second)
		r.wantMetric(laneLeft, 0)
		r.others(20 * time.Second)
		r.wantMetric(laneLeft, 1)
	})
}

// What a record did at the destination as it was before doesn't count.
func TestLaneHoldDefinition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(allBut)
		r.add("a", "bad", "1")
		r.others(50 * time.Second)
		d := to(nc)
		d.LaneHold = 20 * time.Second
		r.define(d)
		r.others(19 * time.Second)
		r.wantMetric(laneLeft, 0)
		r.others(2 * time.Second)
		r.wantMetric(laneLeft, 1)
	})
}

// A record that has left expires like any other, and after a restart it is back
// at the head of its lane.
func TestLaneLeftExpiresAndRestarts(t *testing.T) {
	for name, restart := range map[string]bool{"expires": false, "restarts": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := to(nc)
				d.MaxAge = 10 * time.Minute
				r.define(d)
				r.center.answers(allBut)
				r.add("a", "bad", "1")
				r.others(2 * time.Minute)
				r.wantMetric(laneLeft, 1)
				if restart {
					again := r.restart()
					again.center.answers(allBut)
					again.add("a", "2")
					again.define(d)
					time.Sleep(time.Minute)
					if got := again.center.all(); len(got) == 0 || got[0].id != "bad" || len(again.center.of("2")) != 0 {
						t.Errorf("sent %v, want the record that had left, alone", got)
					}
					return
				}
				r.others(10 * time.Minute)
				if dead := r.queue.buried(); len(dead) != 1 || dead[0].ID != "bad" || dead[0].Reason != bridge.ReasonExpired {
					t.Errorf("dead letters %+v", dead)
				}
				if n := r.queue.queued(); n != 0 {
					t.Errorf("%d records queued", n)
				}
			})
		})
	}
}

// A record that can't be read doesn't silence its lane either.
func TestLaneHoldUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.add("others", "before")
		synctest.Wait()
		r.queue.failLoadOf(2)
		r.add("a", "damaged", "1")
		r.others(59 * time.Second)
		if got := len(r.center.of("1")); got != 0 {
			t.Error("the lane went on within lane_hold")
		}
		r.others(2 * time.Second)
		if got := len(r.center.of("1")); got != 1 {
			t.Errorf("what is behind it was sent %d times", got)
		}
	})
}
