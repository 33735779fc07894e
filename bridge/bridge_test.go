package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

func TestOrderPerLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var mu sync.Mutex
		flying := map[string]bool{}
		count, most := 0, 0
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			lane, n, _ := strings.Cut(s.id, "-")
			mu.Lock()
			if flying[lane] {
				t.Errorf("two records of lane %s in flight", lane)
			}
			flying[lane] = true
			count++
			most = max(most, count)
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			flying[lane] = false
			count--
			mu.Unlock()
			if n == "3" && s.attempt() == "1" {
				return bridge.Response{Status: 503}
			}
			return bridge.Response{Status: 200}
		})
		for n := range 6 {
			for lane := range 40 {
				r.add(fmt.Sprint(lane), fmt.Sprintf("%d-%d", lane, n))
			}
		}
		time.Sleep(time.Minute)

		if r.queue.queued() != 0 {
			t.Fatalf("%d records left", r.queue.queued())
		}
		if most != 16 {
			t.Errorf("%d attempts at a time, want the concurrency, 16", most)
		}
		for lane := range 40 {
			var got []string
			for _, s := range r.center.all() {
				if l, n, _ := strings.Cut(s.id, "-"); l == fmt.Sprint(lane) {
					got = append(got, n)
				}
			}
			if want := []string{"0", "1", "2", "3", "3", "4", "5"}; !slices.Equal(got, want) {
				t.Errorf("lane %d: sent %v, want %v", lane, got, want)
			}
		}
	})
}

// A failing head blocks its lane and no other; records without a lane block nobody.
func TestFailingLaneAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.id == "bad" {
				return bridge.Response{Err: errors.New("bad luck")}
			}
			return bridge.Response{Status: 200}
		})
		r.add("a", "bad", "behind")
		r.add("b", "beside")
		r.add("", "alone", "bad", "alone too")
		synctest.Wait()
		for id, want := range map[string]int{"bad": 2, "behind": 0, "beside": 1, "alone": 1, "alone too": 1} {
			if got := len(r.center.of(id)); got != want {
				t.Errorf("%q sent %d times, want %d", id, got, want)
			}
		}
	})
}

func TestRetrySchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		start := time.Now()
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.id == "bad" {
				return bridge.Response{Status: 500}
			}
			return bridge.Response{Status: 200}
		})
		r.add("a", "bad")
		for range 20 * 60 * 2 { // other lanes succeed all the while
			r.add("b", "good")
			time.Sleep(500 * time.Millisecond)
		}
		var got []time.Duration
		for i, s := range r.center.of("bad") {
			got = append(got, s.at.Sub(start).Round(time.Second/10))
			if s.attempt() != fmt.Sprint(i+1) {
				t.Errorf("attempt %d says it is %s", i+1, s.attempt())
			}
		}
		want := []time.Duration{0, 500 * time.Millisecond, 1500 * time.Millisecond, 3500 * time.Millisecond,
			8500 * time.Millisecond, 18500 * time.Millisecond, 48500 * time.Millisecond, 108500 * time.Millisecond,
			408500 * time.Millisecond, 708500 * time.Millisecond, 1008500 * time.Millisecond}
		if !slices.Equal(got, want) {
			t.Errorf("attempts at %v\nwant %v", got, want)
		}
		if rec := r.queue.record(1); rec.Attempts != len(want) || rec.LastError != "answered 500 Internal Server Error" || !rec.Next.After(time.Now()) {
			t.Errorf("stored state: %d attempts, next %v, %q", rec.Attempts, rec.Next, rec.LastError)
		}
	})
}

// However a destination fails, an outage costs few attempts, loses nothing, and
// ends within two seconds of its return. Only when every lane hangs in an
// attempt of its own must the first of them time out.
func TestOutage(t *testing.T) {
	hang := func(ctx context.Context, _ sent) bridge.Response {
		<-ctx.Done()
		return bridge.Response{Err: ctx.Err()}
	}
	reply := func(res bridge.Response) func(context.Context, sent) bridge.Response {
		return func(context.Context, sent) bridge.Response { return res }
	}
	for name, down := range map[string]func(context.Context, sent) bridge.Response{
		"503":     reply(bridge.Response{Status: 503}),
		"refused": reply(bridge.Response{Err: errors.New("connection refused")}),
		"hanging": hang,
	} {
		for _, lanes := range []int{1, 3, 1000} {
			t.Run(fmt.Sprintf("%s/%d lanes", name, lanes), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t)
					r.center.answers(down)
					for n := range 3 * lanes {
						r.add(fmt.Sprint(n%lanes), fmt.Sprint(n))
					}
					const outage = 20*time.Minute + 500*time.Millisecond // off the probes' beat
					time.Sleep(outage)
					if got, most := len(r.center.all()), 32+int(outage/(2*time.Second)); got > most {
						t.Errorf("%d attempts in the outage, want %d at most", got, most)
					}
					r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 1)

					recovery := 2 * time.Second
					if name == "hanging" && lanes < 10 {
						recovery = 10 * time.Second
					}
					back := time.Now()
					before := len(r.center.all())
					r.center.status(200)
					time.Sleep(recovery)
					if all := r.center.all(); len(all) == before || all[before].at.Sub(back) > recovery {
						t.Errorf("no attempt within %v of the return", recovery)
					}
					time.Sleep(10 * time.Second) // for attempts that still hang
					if n := r.queue.queued(); n != 0 {
						t.Errorf("%d records queued soon after the return", n)
					}
					if got := len(r.queue.buried()); got != 0 {
						t.Errorf("%d dead letters", got)
					}
					r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 0)
					if n := len(r.log.all); n > 10 {
						t.Errorf("%d log lines for one outage:\n%s", n, strings.Join(r.log.all, ""))
					}
				})
			})
		}
	}
}

// Four failures don't open the breaker; the return is noticed as soon all the same.
func TestShortOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.status(502)
		r.add("a", "1")
		for len(r.center.all()) < 4 {
			time.Sleep(10 * time.Millisecond)
		}
		r.center.status(200)
		time.Sleep(2 * time.Second)
		if n := r.queue.queued(); n != 0 {
			t.Error("not delivered two seconds after the return")
		}
	})
}

// Half of the last twenty open the breaker although there is no long row.
func TestBreakerHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		n := 0
		r.center.answers(func(context.Context, sent) bridge.Response {
			n++
			return bridge.Response{Status: []int{200, 200, 503, 503}[n%4]}
		})
		for i := range 30 {
			r.add("", fmt.Sprint(i))
			synctest.Wait()
		}
		if got := r.log.with("only probed"); len(got) != 1 {
			t.Errorf("the breaker opened %d times, want once", len(got))
		}
	})
}

func TestPoisonLeavesItsLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.id == "bad" {
				return bridge.Response{Status: 422, Body: []byte("no such vin")}
			}
			return bridge.Response{Status: 200}
		})
		r.add("a", "good", "bad", "behind")
		time.Sleep(10 * time.Second)

		if got := len(r.center.of("bad")); got != 3 {
			t.Errorf("poison sent %d times, want 3", got)
		}
		if got := len(r.center.of("behind")); got != 1 {
			t.Errorf("the record behind it sent %d times, want once", got)
		}
		dead := r.queue.buried()
		if len(dead) != 1 {
			t.Fatalf("%d dead letters, want 1", len(dead))
		}
		d := dead[0]
		if d.ID != "bad" || d.Reason != bridge.ReasonPoison || d.Status != 422 || string(d.Response) != "no such vin" ||
			d.Attempts != 3 || d.LastError != "answered 422 Unprocessable Entity" || string(d.Body) != `{"vin":"V7"}` || d.TraceID != "trace-of-bad" {
			t.Errorf("dead letter %+v", d)
		}
		r.wantMetric("throughline_delivery_dead_letters_total{destination=notification-center,reason=poison}", 1)
		line := strings.Join(r.log.with("dead letter"), "")
		for _, want := range []string{"trace_id=trace-of-bad", "rule=hard-brake", "webhook_id=bad", "destination=" + nc} {
			if !strings.Contains(line, want) {
				t.Errorf("log line without %s: %s", want, line)
			}
		}
	})
}

// Poison answers to what came in an outage count from the end of the outage, and so do the waits between them.
func TestPoisonAfterOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.status(503)
		r.add("a", "1")
		time.Sleep(time.Minute)
		r.center.answers(func(_ context.Context, s sent) bridge.Response { return bridge.Response{Status: 400} })
		before := len(r.center.all())
		time.Sleep(10 * time.Second)
		if got := len(r.center.all()) - before; got != 3 || len(r.queue.buried()) != 1 {
			t.Errorf("%d attempts and %d dead letters after the outage, want 3 and 1", got, len(r.queue.buried()))
		}
	})
}

// When everything is refused it is the deploy: nothing is dead-lettered, even
// if the destination is out of reach now and then.
func TestBadDeploy(t *testing.T) {
	for name, other := range map[string]int{"refused": 400, "and down at times": 503, "and gone at times": 410} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				var n atomic.Int64
				r.center.answers(func(context.Context, sent) bridge.Response {
					if n.Add(1)%20 == 0 {
						return bridge.Response{Status: other}
					}
					return bridge.Response{Status: 400}
				})
				for n := range 200 {
					r.add(fmt.Sprint(n%100), fmt.Sprint(n))
				}
				time.Sleep(30*time.Minute + 500*time.Millisecond)
				if got := len(r.queue.buried()); got != 0 {
					t.Errorf("%d dead letters", got)
				}
				if got := len(r.center.all()); got > 20+900 {
					t.Errorf("%d attempts, want a probe every two seconds", got)
				}
				r.center.status(200)
				time.Sleep(2 * time.Second)
				if n := r.queue.queued(); n != 0 {
					t.Errorf("%d records queued after the deploy was mended", n)
				}
			})
		})
	}
}

// Only poison answers in a row, over five lanes, are a bad deploy; the fifth
// record is then no dead letter, although it was refused for the third time.
func TestPoisonRow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if strings.HasPrefix(s.id, "good") {
				return bridge.Response{Status: 200}
			}
			return bridge.Response{Status: 400}
		})
		probing := "throughline_delivery_breaker_open{destination=notification-center}"
		r.add("e", "e") // refused now, after 0.5 s, and after 1.5 s
		time.Sleep(700 * time.Millisecond)
		r.add("", "good 1")
		synctest.Wait()
		for _, lane := range []string{"a", "b", "c", "d"} {
			r.add(lane, lane)
		}
		time.Sleep(100 * time.Millisecond)
		r.wantMetric(probing, 0)
		r.add("", "good 2")
		synctest.Wait()
		time.Sleep(600 * time.Millisecond) // the four again, since the success
		r.wantMetric(probing, 0)
		time.Sleep(200 * time.Millisecond) // and e
		r.wantMetric(probing, 1)
		if got := len(r.queue.buried()); got != 0 {
			t.Errorf("%d dead letters", got)
		}
	})
}

func TestConfigurationError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.status(401)
		for n := range 20 {
			r.add(fmt.Sprint(n), fmt.Sprint(n))
		}
		time.Sleep(time.Hour)
		if got := len(r.center.all()); got > 20+3600/30 {
			t.Errorf("%d attempts in an hour, want slow ones", got)
		}
		if got := r.log.with("level=ERROR"); len(got) == 0 || !strings.Contains(got[0], "401 Unauthorized") {
			t.Errorf("alarm %q", got)
		}
		if n := len(r.queue.buried()); n != 0 {
			t.Errorf("%d dead letters", n)
		}

		// A new token is tried at once.
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.Header.Get("Authorization") == "Bearer new" {
				return bridge.Response{Status: 204}
			}
			return bridge.Response{Status: 401}
		})
		d := to(nc)
		d.Headers = map[string]string{"Authorization": "Bearer new"}
		r.define(d)
		synctest.Wait()
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records queued after the new definition", n)
		}
	})
}

// What a destination fails of is told from the first failure on, and is the last one's.
func TestStatusOfFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		want := func(state bridge.State, why, failure string) {
			t.Helper()
			synctest.Wait()
			if s := r.status(); s.State != state || s.Why != why || s.Failure != failure {
				t.Errorf("status %+v, want %s %s %q", s, state, why, failure)
			}
		}
		r.center.status(401)
		r.add("a", "a")
		want(bridge.StateActive, "configuration", "answered 401 Unauthorized")
		r.add("b", "b", "b2")
		r.add("c", "c")
		r.add("d", "d")
		r.center.status(503)
		r.add("e", "e")
		want(bridge.StateFailing, "retry", "answered 503 Service Unavailable")
		r.center.status(502)
		time.Sleep(time.Minute)
		want(bridge.StateFailing, "retry", "answered 502 Bad Gateway")
		r.center.status(200)
		time.Sleep(time.Minute)
		want(bridge.StateActive, "", "")
		r.center.status(400) // of the record, not of the destination
		r.add("a", "p")
		want(bridge.StateActive, "", "")
	})
}

// An attempt that was under way when the definition changed says nothing about
// the new one.
func TestDefinitionChangesUnderWay(t *testing.T) {
	for _, status := range []int{404, 410, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				d := to(nc)
				d.URL = "http://127.0.0.1:9090/notify"
				r.center.answers(func(_ context.Context, s sent) bridge.Response {
					if s.URL == d.URL {
						return bridge.Response{Status: 200}
					}
					time.Sleep(5 * time.Second)
					return bridge.Response{Status: status}
				})
				for n := range 10 {
					r.add(fmt.Sprint(n), fmt.Sprint(n))
				}
				synctest.Wait()
				r.define(d)
				time.Sleep(5 * time.Second)
				synctest.Wait()
				if n, dead := r.queue.queued(), r.queue.buried(); n != 0 || len(dead) != 0 {
					t.Errorf("%d records queued, %d dead letters", n, len(dead))
				}
				r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 0)
			})
		})
	}
}

func TestRetryAfterHonoured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.attempt() == "1" {
				return bridge.Response{Status: 429, RetryAfter: 10 * time.Minute}
			}
			return bridge.Response{Status: 200}
		})
		r.add("a", "1")
		time.Sleep(10*time.Minute - time.Second)
		if got := len(r.center.all()); got != 1 {
			t.Errorf("%d attempts before the time asked for", got)
		}
		time.Sleep(2 * time.Second)
		if n := r.queue.queued(); n != 0 {
			t.Error("not delivered after the time asked for")
		}
	})
}

func TestMaxAge(t *testing.T) {
	for name, defined := range map[string]bool{"destination down": true, "destination not defined": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				r.center.status(503)
				d := to(nc)
				d.MaxAge = 10 * time.Minute
				r.define(d)
				for n := range 500 {
					r.add(fmt.Sprint(n%50), fmt.Sprint(n))
				}
				r.add("", "alone")
				if !defined { // any more
					synctest.Wait()
					r.define()
				}
				time.Sleep(9 * time.Minute)
				if n := len(r.queue.buried()); n != 0 {
					t.Fatalf("%d dead letters before the max age", n)
				}
				time.Sleep(2*time.Minute + time.Second)
				dead := r.queue.buried()
				if len(dead) != 501 || r.queue.queued() != 0 {
					t.Fatalf("%d dead letters, %d queued, want 501 and 0", len(dead), r.queue.queued())
				}
				for _, d := range dead {
					if d.Reason != bridge.ReasonExpired {
						t.Errorf("reason %q", d.Reason)
					}
				}
				if n := len(r.log.with("dead letter")); n > 5 {
					t.Errorf("%d log lines about dead letters", n)
				}
			})
		})
	}
}

func TestHeldUntilDefined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		r.add("a", "1", "2", "3")
		time.Sleep(time.Minute)
		if len(r.center.all()) != 0 || len(r.log.all) != 0 {
			t.Fatal("something happened before the destinations were set")
		}
		r.define(to("other"))
		r.add("a", "4")
		time.Sleep(time.Hour)
		r.wantMetric("throughline_delivery_held_records{destination=notification-center}", 4)
		if got := r.log.with("is not defined"); len(got) != 1 {
			t.Errorf("alarm %q, want one", got)
		}
		r.define(to(nc))
		synctest.Wait()
		var ids []string
		for _, s := range r.center.all() {
			ids = append(ids, s.id)
		}
		if want := []string{"1", "2", "3", "4"}; !slices.Equal(ids, want) {
			t.Errorf("sent %v, want %v", ids, want)
		}
		r.wantMetric("throughline_delivery_held_records{destination=notification-center}", 0)
	})
}

func TestBadDestinationHolds(t *testing.T) {
	for name, change := range map[string]func(*bridge.Destination){
		"scheme":  func(d *bridge.Destination) { d.URL = "ftp://127.0.0.1/" },
		"no host": func(d *bridge.Destination) { d.URL = "http:///notify" },
		"syntax":  func(d *bridge.Destination) { d.URL = "http://[::1/" },
		"method":  func(d *bridge.Destination) { d.Method = "PO ST" },
		"key":     func(d *bridge.Destination) { d.SigningKeys = [][]byte{[]byte("the secret is 24 bytes.."), {}} },
		"header":  func(d *bridge.Destination) { d.Headers = map[string]string{"Authorization": "Bearer secret\n"} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := to(nc)
				change(&d)
				r.define(d)
				r.add("a", "1")
				time.Sleep(time.Minute)
				if len(r.center.all()) != 0 || r.queue.queued() != 1 {
					t.Error("not held")
				}
				if len(r.log.with("can't be used")) != 1 || len(r.log.with("secret")) != 0 {
					t.Errorf("log %q", r.log.all)
				}
			})
		})
	}
}

func TestMetricsOfGoneDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.add("a", "1")
		synctest.Wait()
		r.wantMetric("throughline_delivery_attempts_total{class=success,destination=notification-center}", 1)
		r.wantMetric("throughline_delivery_attempts_total{class=poison,destination=notification-center}", 0)
		r.wantMetric("throughline_deliveries_total{carrier=body,destination=notification-center,rule=hard-brake}", 1)
		r.wantMetric("throughline_delivery_dead_letters_total{destination=notification-center,reason=expired}", 0)
		r.wantMetric("throughline_delivery_in_flight{destination=notification-center}", 0)
		r.wantMetric("throughline_delivery_latency_seconds{destination=notification-center}", 1)
		r.wantMetric("throughline_delivery_trace_field_replaced_total{destination=notification-center}", 0)
		r.wantMetric("throughline_delivery_trace_undecodable_total{destination=notification-center}", 0)
		r.define()
		families, err := r.reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			t.Errorf("%s is still there", f.GetName())
		}
	})
}

func TestStopWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(context.Context, sent) bridge.Response {
			time.Sleep(3 * time.Second)
			return bridge.Response{Status: 200}
		})
		r.add("a", "1", "2")
		r.add("b", "3")
		synctest.Wait()
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := r.Stop(ctx); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("stopped after %v, want when the attempts were done", took)
		}
		r.add("c", "4")
		time.Sleep(time.Hour)
		if got := len(r.center.all()); got != 2 || r.queue.queued() != 2 {
			t.Errorf("%d attempts and %d left, want 2 and 2", got, r.queue.queued())
		}
	})
}

func TestStopCutsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(ctx context.Context, _ sent) bridge.Response {
			<-ctx.Done()
			return bridge.Response{Err: ctx.Err()}
		})
		r.add("a", "1")
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if err := r.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Stop: %v, want the context's error", err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("stopped after %v", took)
		}
		if rec := r.queue.record(1); rec.ID != "1" || rec.Attempts != 0 {
			t.Errorf("stored: %+v, want it untouched", rec)
		}
	})
}

// After a restart records are due at once, and the attempts go on counting.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		_, err := r.Append([]bridge.Record{{
			ID: "1", Destination: nc, Lane: "a", Ordered: true, Attempts: 7, Next: time.Now().Add(5 * time.Minute),
		}})
		if err != nil {
			t.Fatal(err)
		}
		r.define(to(nc))
		synctest.Wait()
		if got := r.center.all(); len(got) != 1 || got[0].attempt() != "8" {
			t.Errorf("sent %v, want attempt 8", got)
		}
	})
}

func TestQueueFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.queue.failLoads(errors.New("disk is broken"))
		r.add("a", "1", "2")
		time.Sleep(time.Minute)
		if len(r.center.all()) != 0 || len(r.log.with("disk is broken")) != 1 || len(r.log.all) != 1 {
			t.Errorf("sent %d, log %q", len(r.center.all()), r.log.all)
		}
		r.queue.failLoads(nil)
		r.queue.Remove(1) // as an operator's purge does
		time.Sleep(6 * time.Second)
		if got := r.center.all(); len(got) != 1 || got[0].id != "2" || got[0].attempt() != "1" {
			t.Errorf("sent %v, want the second record's first attempt", got)
		}
	})
}

// A record that can't be made a dead letter yet stays where it is: both what
// is refused and what expires.
func TestBurialFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.status(422)
		r.queue.failBurials(errors.New("disk is broken"))
		r.add("a", "1", "2")
		time.Sleep(time.Minute)
		if len(r.queue.buried()) != 0 || len(r.center.of("1")) < 4 || len(r.center.of("2")) != 0 {
			t.Errorf("%d buried, the first sent %d times, the second %d", len(r.queue.buried()), len(r.center.of("1")), len(r.center.of("2")))
		}
		r.wantMetric("throughline_delivery_dead_letters_total{destination=notification-center,reason=poison}", 0)
		r.queue.failBurials(nil)
		time.Sleep(time.Minute)
		if got := r.queue.buried(); len(got) != 2 || got[0].ID != "1" || got[1].ID != "2" {
			t.Errorf("dead letters %+v", got)
		}
		r.center.status(503)
		r.queue.failBurials(errors.New("disk is broken"))
		r.add("b", "3")
		d := to(nc)
		d.MaxAge = 10 * time.Minute
		r.define(d)
		time.Sleep(12 * time.Minute)
		if got := len(r.queue.buried()); got != 2 {
			t.Errorf("%d buried", got)
		}
		r.queue.failBurials(nil)
		time.Sleep(5 * time.Minute)
		if got := r.queue.buried(); len(got) != 3 || got[2].Reason != bridge.ReasonExpired {
			t.Errorf("dead letters %+v", got)
		}
	})
}

// What waits costs no goroutine, and a hundred thousand lanes are all sent at
// once when the destination is back.
func TestManyLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.status(503)
		const lanes, records = 100_000, 110_000
		before := runtime.NumGoroutine()
		recs := make([]bridge.Record, 0, records)
		for n := range records {
			recs = append(recs, bridge.Record{Destination: nc, Lane: fmt.Sprint(n % lanes), Ordered: true})
		}
		if _, err := r.Append(recs); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute + time.Second) // off the probes' beat
		if got := runtime.NumGoroutine() - before; got > 16 {
			t.Errorf("%d goroutines more with %d lanes waiting", got, lanes)
		}
		r.center.status(200)
		time.Sleep(2 * time.Second)
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records left", n)
		}
	})
}

func TestNewNeedsParts(t *testing.T) {
	if _, err := bridge.New(bridge.Options{}); err == nil {
		t.Error("New without a queue succeeded")
	}
	r := newIdleRig(t)
	_, err := bridge.New(bridge.Options{Queue: r.queue, Tracer: r.tracer, Registerer: r.reg})
	if err == nil || !strings.Contains(err.Error(), "metrics") {
		t.Errorf("New with a registerer that has the metrics already: %v", err)
	}
}
