package bridge_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// inBatches is to(nc) with batches.
func inBatches(most int, linger time.Duration) bridge.Destination {
	d := to(nc)
	d.Batch = bridge.Batch{Max: most, Linger: linger}
	return d
}

// batchRig is a rig whose nc takes batches of ten.
func batchRig(t *testing.T) *rig {
	t.Helper()
	r := newIdleRig(t)
	r.define(inBatches(10, 0))
	return r
}

// listed returns the ids of a request's elements as its header lists them: the
// lists of RFC 9651 that are sent are those of JSON but for the brackets.
func listed(t *testing.T, h http.Header) (ids []string) {
	t.Helper()
	values := h.Values("X-Throughline-Ids")
	if len(values) == 0 {
		return nil
	}
	if err := json.Unmarshal([]byte("["+values[0]+"]"), &ids); err != nil || len(values) > 1 {
		t.Fatalf("X-Throughline-Ids %q: %v", values, err)
	}
	return ids
}

// array returns the elements of a body.
func array(t *testing.T, body []byte) (elements []json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(body, &elements); err != nil {
		t.Fatalf("%s: %v", body, err)
	}
	return elements
}

// batches returns the ids of each request's elements, or its webhook-id where it
// lists none.
func (r *rig) batches() (all [][]string) {
	for _, s := range r.center.all() {
		ids := listed(r.t, s.Header)
		if ids == nil {
			ids = []string{"raw:" + s.id}
		} else if n := len(array(r.t, s.Body)); n != len(ids) {
			r.t.Errorf("%d ids for %d elements", len(ids), n)
		}
		all = append(all, ids)
	}
	return all
}

func (r *rig) wantBatches(want ...[]string) {
	r.t.Helper()
	if got := r.batches(); !slices.EqualFunc(got, want, slices.Equal) {
		r.t.Errorf("sent %q\nwant %q", got, want)
	}
}

// together appends records in one go, "lane/id" or "/id" without a lane.
func (r *rig) together(names ...string) {
	r.t.Helper()
	_, carrier := stored()
	var recs []bridge.Record
	for _, name := range names {
		lane, id, _ := strings.Cut(name, "/")
		recs = append(recs, bridge.Record{
			ID: id, Rule: "hard-brake", Destination: nc, Lane: lane, Ordered: lane != "", Topic: "fleet/v7/telemetry",
			Body: fmt.Appendf(nil, `{"id":%q}`, id), SW8: carrier.SW8, Correlation: carrier.Correlation, TraceID: "trace-1",
		})
	}
	if _, err := r.Append(recs); err != nil {
		r.t.Fatal(err)
	}
}

// has answers whether one of the elements is of that id.
func has(s sent, id string) bool {
	return strings.Contains(s.Header.Get("X-Throughline-Ids"), `"`+id+`"`)
}

// One request, its elements in the order of their append, each with the context
// of an exit span of its own that belongs to the record's trace.
func TestBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		key := []byte("a key of 24 bytes, first")
		d := inBatches(10, 0)
		d.SigningKeys, d.IdempotencyKey = [][]byte{key}, true
		r.define(d)
		r.together("a/1", "a/2", "b/3", "/4", "a/5")
		synctest.Wait()

		r.wantBatches([]string{"1", "2", "3", "4", "5"})
		s := r.center.all()[0]
		if !strings.HasPrefix(s.id, "batch-") || len(s.id) != len("batch-")+32 || s.Header.Get("Idempotency-Key") != s.id || s.attempt() != "1" || !verifies(key, s) {
			t.Errorf("headers %q", s.Header)
		}
		if s.Header.Get("sw8") != "" || s.Header.Get("sw8-correlation") != "" {
			t.Errorf("headers carry one context of five: %q", s.Header)
		}
		parent, _ := stored()
		segments := r.tracer.Segments()
		if len(segments) != 5 {
			t.Fatalf("%d segments, want one for each record", len(segments))
		}
		for i, e := range array(t, s.Body) {
			var members struct {
				ID          string `json:"id"`
				SW8         string `json:"sw8"`
				Correlation string `json:"sw8-correlation"`
			}
			if err := json.Unmarshal(e, &members); err != nil {
				t.Fatal(err)
			}
			ctx, err := tracectx.Decode(tracectx.Carrier{SW8: members.SW8, Correlation: members.Correlation})
			if err != nil || members.ID != fmt.Sprint(i+1) {
				t.Fatalf("element %s: %v", e, err)
			}
			k := slices.IndexFunc(r.tracer.Segments(), func(s *tracectxtest.Segment) bool { return s.ID == ctx.SegmentID })
			if k < 0 {
				t.Fatalf("element %d carries no segment of ours: %+v", i, ctx)
			}
			local, exit := segments[k].Spans[0], segments[k].Spans[1]
			if ctx.TraceID != parent.TraceID || ctx.SpanID != exit.ID || len(local.Refs) != 1 || local.Refs[0].SegmentID != parent.SegmentID {
				t.Errorf("element %d carries %+v, refs %+v", i, ctx, local.Refs)
			}
			for tag, want := range map[string]string{"webhook.id": members.ID, "attempt": "1", "batch.id": s.id, "batch.size": "5"} {
				if got := local.Tag(tag); got != want {
					t.Errorf("element %d: tag %s is %q, want %q", i, tag, got, want)
				}
			}
			if exit.Tag("status_code") != "200" || exit.Failed {
				t.Errorf("exit span %+v", exit)
			}
		}
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records left", n)
		}
		r.wantMetric("throughline_delivery_attempts_total{class=success,destination=notification-center}", 5)
		if n := r.Attempts()[bridge.Success]; n != 5 {
			t.Errorf("%d attempts in all, want 5", n)
		}
		r.wantMetric("throughline_deliveries_total{carrier=body,destination=notification-center,rule=hard-brake}", 5)
		r.wantMetric("throughline_delivery_batch_records{destination=notification-center}", 1)
		r.wantMetric("throughline_delivery_latency_seconds{destination=notification-center}", 5)
		r.wantMetric("throughline_delivery_in_flight{destination=notification-center}", 0)
	})
}

// A batch of one is an array too, and but for that a request like any other.
func TestBatchOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(10, 0)
		d.Headers = map[string]string{"x-throughline-ids": "mine"}
		r.define(d)
		r.together(`a/say "1", \2`)
		synctest.Wait()
		r.wantBatches([]string{`say "1", \2`})
		s := r.center.all()[0]
		if s.id != `say "1", \2` || s.Header.Get("sw8") == "" || !strings.Contains(string(s.Body), s.Header.Get("sw8")) {
			t.Errorf("headers %q, body %s", s.Header, s.Body)
		}
		r.wantMetric("throughline_delivery_batch_records{destination=notification-center}", 1)
	})
}

// Max 1 is no batch: body and headers are what they are without one.
func TestNoBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		r.define(inBatches(1, 0))
		r.together("a/1", "a/2")
		synctest.Wait()
		r.wantBatches([]string{"raw:1"}, []string{"raw:2"})
		for _, s := range r.center.all() {
			if s.Body[0] != '{' {
				t.Errorf("body %s", s.Body)
			}
		}
		r.wantMetric("throughline_delivery_batch_records{destination=notification-center}", 0)
	})
}

// What has no place for its trace context in an element goes alone, so that the
// headers carry it; what is no JSON goes alone as it is.
func TestBatchElements(t *testing.T) {
	alone := func(d *bridge.Destination) {}
	noHeaders := func(d *bridge.Destination) { d.TraceHeaders = false }
	noTrace := func(d *bridge.Destination) { d.TraceBody = bridge.TraceFields{} }
	nested := func(d *bridge.Destination) { d.TraceBody = bridge.TraceFields{SW8: "trace.sw8"} }
	tests := []struct {
		name   string
		body   string
		change func(*bridge.Destination)
		want   string
	}{
		{"text", "V7 braked", alone, "1 raw:2 3"},
		{"text without headers", "V7 braked", noHeaders, "1 raw:2 3"},
		{"nothing", "", alone, "1 raw:2 3"},
		{"half an object", `{"a":`, alone, "1 raw:2 3"},
		{"not UTF-8", "{\"a\":\"\xff\"}", alone, "1 2 3"},
		{"not UTF-8 without headers", "\"\xff\"", noHeaders, "1 2 3"},
		{"an array", `[1,2]`, alone, "1 2 3"},
		{"an array without headers", ` [1,2] `, noHeaders, "1,2,3"},
		{"a number, no field agreed on", `7.10`, noTrace, "1,2,3"},
		{"a nested field", `{"trace":{}}`, nested, "1,2,3"},
		{"a nested field that is there and no object", `{"trace":1}`, nested, "1 2 3"},
		{"an object with space around", " \n{ } ", alone, "1,2,3"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := inBatches(10, 0)
				d.Concurrency = 1
				tt.change(&d)
				r.define(d)
				var recs []bridge.Record
				for i, body := range []string{`{"n":1}`, tt.body, `{"n":3}`} {
					recs = append(recs, bridge.Record{ID: fmt.Sprint(i + 1), Destination: nc, Lane: "a", Ordered: true, Body: []byte(body)})
				}
				if _, err := r.Append(recs); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				var got []string
				for _, ids := range r.batches() {
					got = append(got, strings.Join(ids, ","))
				}
				if strings.Join(got, " ") != tt.want {
					t.Errorf("sent %q, want %s", got, tt.want)
				}
				for _, s := range r.center.all() {
					if s.id == "2" && s.Header.Get("X-Throughline-Ids") == "" && string(s.Body) != tt.body {
						t.Errorf("body %q, want %q", s.Body, tt.body)
					}
					if s.id == "2" && d.TraceHeaders && s.Header.Get("sw8") == "" {
						t.Error("no trace context in the headers")
					}
				}
				if n := r.queue.queued(); n != 0 {
					t.Errorf("%d records left", n)
				}
			})
		})
	}
}

// A batch ends where its body or the list of its ids becomes too long; what is
// longer by itself goes alone.
func TestBatchBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		var recs []bridge.Record
		add := func(id string, size int) {
			recs = append(recs, bridge.Record{ID: id, Destination: nc, Lane: "a", Ordered: true,
				Body: fmt.Appendf(nil, `{"text":%q}`, strings.Repeat("x", size))})
		}
		for i := range 5 {
			add(fmt.Sprint("mid", i), 300<<10)
		}
		add("large", 3<<20)
		add("small", 10)
		var long []string
		for i := range 9 {
			long = append(long, fmt.Sprint(i)+strings.Repeat("ü", 126)) // 757 bytes as it is sent
			add(long[i], 10)
		}
		if _, err := r.Append(recs); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		var got [][]string
		for _, s := range r.center.all() {
			ids := listed(t, s.Header)
			got = append(got, ids)
			if len(ids) > 1 && (len(s.Body) > 1<<20 || len(s.Header.Get("X-Throughline-Ids")) > 4<<10) {
				t.Errorf("%d bytes of body, %d of ids", len(s.Body), len(s.Header.Get("X-Throughline-Ids")))
			}
		}
		sizes := make([]int, len(got))
		for i := range got {
			sizes[i] = len(got[i])
		}
		if want := []int{3, 2, 1, 6, 4}; !slices.Equal(sizes, want) {
			t.Errorf("batches of %v, want %v", sizes, want)
		}
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records left", n)
		}
	})
}

// copying is a queue whose records have bodies of their own, as on disk.
type copying struct{ bridge.Queue }

func (q copying) Load(seq uint64) (bridge.Record, error) {
	r, err := q.Queue.Load(seq)
	r.Body = slices.Clone(r.Body)
	return r, err
}

// What does not go in a batch isn't kept in memory while that is under way.
func TestBatchMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t, func(o *bridge.Options) { o.Queue = copying{o.Queue} })
		d := inBatches(100, 0)
		d.Concurrency = 1
		r.define(d)
		const size = 512 << 10
		text := []byte(strings.Repeat("x", size))
		object := fmt.Appendf(nil, `{"text":"%s"}`, text)
		var recs []bridge.Record
		for n := range 100 {
			body := text
			if n < 2 {
				body = []byte(`{}`)
			} else if n > 90 {
				body = object
			}
			recs = append(recs, bridge.Record{ID: fmt.Sprint(n), Destination: nc, Lane: fmt.Sprint(n), Ordered: true, Body: body})
		}
		before := heap()
		first := true
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if ids := listed(t, s.Header); first && (len(ids) != 3 || heap()-before > 8*size) {
				t.Errorf("%d records in the request, %d bytes in use", len(ids), heap()-before)
			}
			first = false
			return bridge.Response{Status: 200}
		})
		if _, err := r.Append(recs); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records left", n)
		}
	})
}

// Whatever is answered, no record of a lane is sent while another of it is in
// another request, each is done with once, and in order.
func TestBatchOrder(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			r := newIdleRig(t)
			d := inBatches(1+rng.IntN(20), time.Duration(rng.IntN(2))*5*time.Millisecond)
			d.Batch.Max = max(d.Batch.Max, 2)
			d.Concurrency = 1 + rng.IntN(4)
			d.LaneHold = 24 * time.Hour
			r.define(d)
			var mu sync.Mutex
			fate := rand.New(rand.NewPCG(seed, 2)) // under mu
			flying := map[string]bool{}
			last := map[string]int{}
			done := map[string]int{}
			r.center.answers(func(_ context.Context, s sent) bridge.Response {
				ids := listed(t, s.Header)
				mu.Lock()
				lanes := map[string]int{}
				for _, id := range ids {
					lane, number, _ := strings.Cut(id, "-")
					var n int
					_, _ = fmt.Sscan(number, &n)
					if _, ours := lanes[lane]; flying[lane] && !ours {
						t.Errorf("lane %s is in two requests", lane)
					}
					if n <= lanes[lane] || n <= last[lane] {
						t.Errorf("%s after %d and %d", id, lanes[lane], last[lane])
					}
					flying[lane], lanes[lane] = true, n
				}
				status := []int{200, 200, 200, 503, 413, 500, 429}[fate.IntN(7)]
				if strings.Contains(s.Header.Get("X-Throughline-Ids"), "-13\"") {
					status = 422
				}
				took := time.Duration(fate.IntN(20)) * time.Millisecond
				mu.Unlock()
				time.Sleep(took)
				mu.Lock()
				defer mu.Unlock()
				for lane := range lanes {
					flying[lane] = false
				}
				if status == 200 {
					for _, id := range ids {
						done[id]++
					}
					for lane, n := range lanes {
						last[lane] = n
					}
				}
				return bridge.Response{Status: status}
			})
			const lanes, each = 8, 20
			for n := range each {
				for lane := range lanes {
					if rng.IntN(10) == 0 {
						time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
					}
					r.together(fmt.Sprintf("%d/%d-%d", lane, lane, n+1))
				}
			}
			time.Sleep(6 * time.Hour)
			if n := r.queue.queued(); n != 0 {
				t.Fatalf("seed %d: %d records left", seed, n)
			}
			dead := r.queue.buried()
			for _, d := range dead {
				if done[d.ID]++; d.Reason != bridge.ReasonPoison || d.Attempts < 3 {
					t.Errorf("dead letter %s: %s after %d attempts", d.ID, d.Reason, d.Attempts)
				}
			}
			for lane := range lanes {
				for n := range each {
					if id := fmt.Sprintf("%d-%d", lane, n+1); done[id] != 1 {
						t.Errorf("%s done %d times", id, done[id])
					}
				}
			}
			for lane := range lanes {
				if !slices.ContainsFunc(dead, func(d bridge.DeadLetter) bool { return d.ID == fmt.Sprintf("%d-13", lane) }) {
					t.Errorf("%d-13 is no dead letter", lane)
				}
			}
		})
	}
}

// A record that is refused is found, and takes no other with it.
func TestBatchPoison(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if has(s, "bad") {
				return bridge.Response{Status: 422}
			}
			return bridge.Response{Status: 200}
		})
		r.together("a/1", "b/2", "c/3", "d/4", "e/5", "f/6", "g/bad", "g/behind", "h/7")
		time.Sleep(10 * time.Second)

		dead := r.queue.buried()
		if len(dead) != 1 || dead[0].ID != "bad" || dead[0].Attempts != 4 || r.queue.queued() != 0 {
			t.Errorf("dead letters %+v, %d queued", dead, r.queue.queued())
		}
		got := r.batches()
		if len(got) != 1+7+3+1 || len(got[0]) != 9 || !slices.Equal(got[len(got)-1], []string{"behind"}) {
			t.Errorf("sent %q", got)
		}
		for _, ids := range got[1:] {
			if len(ids) != 1 {
				t.Errorf("sent together once more: %q", ids)
			}
		}
		if l := r.log.with("only probed"); len(l) != 0 {
			t.Errorf("the breaker opened: %q", l)
		}
		if l := r.log.with("batch refused"); len(l) != 1 || !strings.Contains(l[0], "records=9") {
			t.Errorf("log %q", l)
		}
		// New records are sent together as before.
		r.together("a/8", "b/9")
		synctest.Wait()
		if got := r.batches(); len(got[len(got)-1]) != 2 {
			t.Errorf("sent %q", got[len(got)-1])
		}
	})
}

// Everything refused is a bad deploy with batches too, and costs few requests.
func TestBatchBadDeploy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.status(400)
		var names []string
		for n := range 300 {
			names = append(names, fmt.Sprintf("%d/%d", n%100, n))
		}
		r.together(names...)
		time.Sleep(10*time.Minute + 500*time.Millisecond)
		if n := len(r.queue.buried()); n != 0 {
			t.Errorf("%d dead letters", n)
		}
		if n := len(r.center.all()); n > 16+16+300+20 {
			t.Errorf("%d requests", n)
		}
		r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 1)
		r.center.status(200)
		time.Sleep(2 * time.Second)
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d records queued after the deploy was mended", n)
		}
	})
}

// What is too large is divided until it passes.
func TestBatchTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(100, 0)
		d.Concurrency = 1
		r.define(d)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if ids := listed(t, s.Header); len(ids) > 7 || has(s, "13") && len(ids) > 1 {
				return bridge.Response{Status: 413}
			}
			return bridge.Response{Status: 200}
		})
		var names []string
		for n := range 200 {
			names = append(names, fmt.Sprintf("%d/%d", n%150, n))
		}
		r.together(names...)
		time.Sleep(time.Minute)
		if n, dead := r.queue.queued(), r.queue.buried(); n != 0 || len(dead) != 0 {
			t.Errorf("%d queued, dead letters %v", n, dead)
		}
		failed := 0
		for _, s := range r.center.all() {
			if n := len(listed(t, s.Header)); n > 7 {
				failed++
			}
		}
		if n := len(r.center.all()); n > 120 || failed > 20 {
			t.Errorf("%d requests, %d of them too large", n, failed)
		}
	})
}

// A record that is too large by itself is taken out of the first batch that it is
// in, behind others of its lane too.
func TestBatchLargeRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		tooLarge := 0
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if len(s.Body) < 100<<10 {
				return bridge.Response{Status: 200}
			}
			if len(listed(t, s.Header)) > 1 {
				tooLarge++
			}
			return bridge.Response{Status: 413}
		})
		var recs []bridge.Record
		for _, name := range []string{"a/1", "a/2", "a/large", "a/3", "b/4", "c/5"} {
			lane, id, _ := strings.Cut(name, "/")
			size := 10
			if id == "large" {
				size = 200 << 10
			}
			recs = append(recs, bridge.Record{ID: id, Destination: nc, Lane: lane, Ordered: true,
				Body: fmt.Appendf(nil, `{"text":%q}`, strings.Repeat("x", size))})
		}
		if _, err := r.Append(recs); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if dead := r.queue.buried(); len(dead) != 1 || dead[0].ID != "large" || r.queue.queued() != 0 {
			t.Errorf("dead letters %v, %d queued", dead, r.queue.queued())
		}
		if tooLarge != 1 {
			t.Errorf("%d requests of several records were too large, want the first", tooLarge)
		}
	})
}

// A record that the receiver fails at, in whatever way, takes no other with it
// for long, and none out of its lane.
func TestBatchOneFails(t *testing.T) {
	for name, answer := range map[string]bridge.Response{
		"500": {Status: 500}, "503": {Status: 503}, "409": {Status: 409}, "404": {Status: 404}, "403": {Status: 403},
		"no answer": {Err: errors.New("connection reset")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				r.define(inBatches(20, 0))
				r.center.answers(func(_ context.Context, s sent) bridge.Response {
					if has(s, "bad") {
						return answer
					}
					return bridge.Response{Status: 200}
				})
				var names []string
				for n := range 40 {
					names = append(names, fmt.Sprintf("%d/%d", n%20, n))
				}
				names[7], names[27] = "7/bad", "7/behind"
				r.together(names...)
				for n := range 180 { // enough for the batches to be full again
					for i := range 20 {
						r.together(fmt.Sprintf("other %d/%d-%d", i, n, i))
					}
					time.Sleep(time.Second / 2)
					if queued := r.queue.queued(); n == 10 && queued > 2 {
						t.Errorf("%d queued after 5 s, want the bad one and what is behind it", queued)
					}
				}
				synctest.Wait()
				if queued := r.queue.queued(); queued != 1 {
					t.Errorf("%d queued, want the bad one alone", queued)
				}
				r.wantMetric("throughline_delivery_lane_left_total{destination=notification-center}", 1)
				if l := r.log.with("only probed"); len(l) != 0 {
					t.Errorf("the breaker opened: %q", l)
				}
			})
		})
	}
}

// An address that is wrong for all costs few requests, and what failed at it few
// more once it is right.
func TestBatchWrongAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.status(404)
		var names []string
		for n := range 3000 {
			names = append(names, fmt.Sprintf("%d/%d", n%1000, n))
		}
		r.together(names...)
		time.Sleep(time.Minute)
		r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 1)
		if n := len(r.center.all()); n > 16+16+2 {
			t.Errorf("%d requests to a wrong address", n)
		}
		r.center.status(200)
		time.Sleep(time.Minute)
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d queued", n)
		}
		if n := len(r.center.all()); n > 34+160+400 {
			t.Errorf("%d requests in all", n)
		}
	})
}

// Bad records in five batches in a row are no bad deploy.
func TestBatchPoisonRow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(10, 0)
		d.Concurrency = 1
		r.define(d)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if strings.Contains(s.Header.Get("X-Throughline-Ids"), "bad") {
				return bridge.Response{Status: 400}
			}
			return bridge.Response{Status: 200}
		})
		var names []string
		for n := range 60 {
			name := fmt.Sprintf("%d/%d", n, n)
			if n%10 == 5 {
				name = fmt.Sprintf("%d/bad %d", n, n)
			}
			names = append(names, name)
		}
		r.together(names...)
		synctest.Wait() // the bad ones alone come again in a row, and that would be one
		if n := r.queue.queued(); n != 6 || len(r.center.all()) != 6+60 {
			t.Errorf("%d queued after %d requests", n, len(r.center.all()))
		}
		if l := r.log.with("only probed"); len(l) != 0 {
			t.Errorf("the breaker opened: %q", l)
		}
	})
}

// After a failure batches are smaller, and grow with what succeeds.
func TestBatchGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(4, 0)
		d.Concurrency = 1
		r.define(d)
		n := 0
		r.center.answers(func(context.Context, sent) bridge.Response {
			if n++; n == 1 {
				return bridge.Response{Status: 504}
			}
			return bridge.Response{Status: 200}
		})
		r.together("a/0", "b/1")
		synctest.Wait()
		var names []string
		for n := 2; n < 20; n++ {
			names = append(names, fmt.Sprintf("%d/%d", n, n))
		}
		r.together(names...)
		time.Sleep(time.Minute)
		var sizes []int
		for _, ids := range r.batches() {
			sizes = append(sizes, len(ids))
		}
		// What failed is due after half a second, when all else is through.
		if want := []int{2, 1, 2, 3, 4, 4, 4, 2}; !slices.Equal(sizes, want) {
			t.Errorf("batches of %v, want %v", sizes, want)
		}
	})
}

// A receiver that can't take so many in its time gets fewer, rather than all of
// them over and over.
func TestBatchSlowReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(100, 0)
		d.Timeout = 2 * time.Second
		d.Concurrency = 2
		r.define(d)
		r.center.answers(func(ctx context.Context, s sent) bridge.Response {
			select {
			case <-time.After(100 * time.Millisecond * time.Duration(len(listed(t, s.Header)))):
				return bridge.Response{Status: 200}
			case <-ctx.Done():
				return bridge.Response{Err: ctx.Err()}
			}
		})
		var names []string
		for n := range 2000 {
			names = append(names, fmt.Sprintf("%d/%d", n%500, n))
		}
		r.together(names...)
		time.Sleep(5 * time.Minute)
		if n, dead := r.queue.queued(), r.queue.buried(); n != 0 || len(dead) != 0 {
			t.Errorf("%d queued, %d dead letters", n, len(dead))
		}
	})
}

// What failed together comes back together: the same id, the next attempt.
func TestBatchRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(10, 0)
		d.Concurrency = 1
		r.define(d)
		n := 0
		r.center.answers(func(context.Context, sent) bridge.Response {
			if n++; n == 1 {
				return bridge.Response{Status: 503}
			}
			return bridge.Response{Status: 200}
		})
		r.together("a/1", "b/2", "c/3", "a/4")
		time.Sleep(10 * time.Millisecond)
		if rec := r.queue.record(4); rec.Attempts != 1 || rec.LastError != "answered 503 Service Unavailable" || !rec.Next.After(time.Now()) {
			t.Errorf("stored: %+v", rec)
		}
		time.Sleep(2 * time.Second)
		// Half as many, after a failure that may be due to the size.
		r.wantBatches([]string{"1", "2", "3", "4"}, []string{"1", "2"}, []string{"3", "4"})
		all := r.center.all()
		if all[1].attempt() != "2" || all[2].attempt() != "2" || string(all[0].Body) == string(all[1].Body) {
			t.Errorf("attempts %s and %s", all[1].attempt(), all[2].attempt())
		}
		r.wantMetric("throughline_delivery_attempts_total{class=retry,destination=notification-center}", 4)
		segments := r.tracer.Segments()
		failed := 0
		for _, s := range segments {
			if s.Spans[1].Failed {
				failed++
			}
		}
		if len(segments) != 8 || failed != 4 {
			t.Errorf("%d segments, %d failed", len(segments), failed)
		}
	})
}

// The same records have the same webhook-id, and a busy receiver gets no smaller
// batches, which would be more requests.
func TestBatchID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		n := 0
		r.center.answers(func(context.Context, sent) bridge.Response {
			if n++; n < 3 {
				return bridge.Response{Status: 429, RetryAfter: time.Minute}
			}
			return bridge.Response{Status: 200}
		})
		r.together("a/1", "b/2", "c/3")
		time.Sleep(10 * time.Minute)
		r.together("a/12", "b/3")
		synctest.Wait()
		same := []string{"1", "2", "3"}
		r.wantBatches(same, same, same, []string{"12", "3"})
		all := r.center.all()
		if all[0].id != all[1].id || all[1].id != all[2].id || all[2].id == all[3].id || all[2].attempt() != "3" {
			t.Errorf("ids %s %s %s %s, the third attempt is %s", all[0].id, all[1].id, all[2].id, all[3].id, all[2].attempt())
		}
	})
}

// In an outage single records are the probes, and it ends within two seconds.
func TestBatchOutage(t *testing.T) {
	for _, status := range []int{503, 429} {
		t.Run(fmt.Sprint(status), func(t *testing.T) { batchOutage(t, status) })
	}
}

func batchOutage(t *testing.T, status int) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		r.define(inBatches(100, 20*time.Millisecond))
		r.center.status(status)
		var names []string
		for n := range 5000 {
			names = append(names, fmt.Sprintf("%d/%d", n%1000, n))
		}
		r.together(names...)
		time.Sleep(time.Minute + 500*time.Millisecond)
		for _, s := range r.center.all() {
			if n := len(listed(t, s.Header)); s.at.Sub(r.center.all()[0].at) > 10*time.Second && n != 1 {
				t.Errorf("a probe of %d records", n)
			}
		}
		r.center.status(200)
		time.Sleep(3 * time.Second)
		if n, dead := r.queue.queued(), r.queue.buried(); n != 0 || len(dead) != 0 {
			t.Errorf("%d queued, %d dead letters", n, len(dead))
		}
		// One more in each, so a hundred requests until they are large again.
		if n := len(r.center.all()); n > 32+30+150 {
			t.Errorf("%d requests", n)
		}
	})
}

// A 410 costs the first record, and pauses the destination for the others.
func TestBatchGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.status(410)
		r.together("a/1", "b/2", "a/3")
		time.Sleep(time.Minute)
		dead := r.queue.buried()
		if len(dead) != 1 || dead[0].ID != "1" || dead[0].Reason != bridge.ReasonGone || string(dead[0].Body) != `{"id":"1"}` || dead[0].Status != 410 {
			t.Errorf("dead letters %+v", dead)
		}
		r.wantMetric(paused, 1)
		r.center.status(200)
		r.resume()
		synctest.Wait()
		r.wantBatches([]string{"1", "2", "3"}, []string{"2", "3"})
	})
}

// What was behind the record that a 410 has cost holds its lane up for its own
// time, and no longer.
func TestBatchLaneHoldAfterGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.status(410)
		r.together("a/1", "a/stuck", "a/3")
		synctest.Wait()
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if has(s, "stuck") {
				return bridge.Response{Status: 409}
			}
			return bridge.Response{Status: 200}
		})
		r.resume()
		for n := range 300 {
			time.Sleep(time.Second)
			r.together(fmt.Sprintf("b/other %d", n))
		}
		synctest.Wait()
		if n := r.queue.queued(); n != 1 {
			t.Errorf("%d queued, want the stuck one alone", n)
		}
		r.wantMetric("throughline_delivery_lane_left_total{destination=notification-center}", 1)
	})
}

// A request waits for more no longer than linger, and not at all when it is full.
func TestBatchLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		const linger = 50 * time.Millisecond
		r.define(inBatches(10, linger))
		start := time.Now()
		before := runtime.NumGoroutine()
		for n := range 13 { // a full one after 45 ms, and three until 95 ms
			r.together(fmt.Sprintf("a/%d", n))
			if got := runtime.NumGoroutine() - before; n < 9 && got > 0 {
				t.Errorf("%d goroutines more while it waits", got)
			}
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(time.Second)
		r.together("b/13")
		time.Sleep(time.Second)
		want := []time.Duration{45 * time.Millisecond, 100 * time.Millisecond, 1115 * time.Millisecond}
		if got := at(start, r.center.all()); !slices.Equal(got, want) {
			t.Errorf("requests at %v, want %v", got, want)
		}
		r.wantBatches(numbers(0, 10), numbers(10, 13), numbers(13, 14))
	})
}

// It counts from when the first record was due, also while every goroutine is busy.
func TestBatchLingerBehindOthers(t *testing.T) {
	for name, later := range map[string]time.Duration{"left over": 0, "came meanwhile": 100 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := inBatches(10, 500*time.Millisecond)
				d.Concurrency = 1
				r.define(d)
				r.center.answers(func(context.Context, sent) bridge.Response {
					time.Sleep(time.Second)
					return bridge.Response{Status: 200}
				})
				start := time.Now()
				var names []string
				for n := range 13 {
					names = append(names, fmt.Sprintf("%d/%d", n, n))
				}
				if later == 0 {
					r.together(names...)
				} else {
					r.together(names[:10]...)
					time.Sleep(later)
					r.together(names[10:]...)
				}
				time.Sleep(time.Minute)
				if got, want := at(start, r.center.all()), []time.Duration{0, time.Second}; !slices.Equal(got, want) {
					t.Errorf("requests at %v, want %v", got, want)
				}
			})
		})
	}
}

func numbers(from, to int) (ids []string) {
	for ; from < to; from++ {
		ids = append(ids, fmt.Sprint(from))
	}
	return ids
}

// Waiting for more delays neither a stop nor an expiry, and not what shows that a
// destination is back.
func TestBatchLingerDelaysNothingElse(t *testing.T) {
	t.Run("stop", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newIdleRig(t)
			r.define(inBatches(10, time.Hour))
			r.together("a/1")
			synctest.Wait()
			start := time.Now()
			if err := r.Stop(t.Context()); err != nil || time.Since(start) > 0 {
				t.Errorf("Stop took %v: %v", time.Since(start), err)
			}
			if n := len(r.center.all()); n != 0 || r.queue.queued() != 1 {
				t.Errorf("%d sent", n)
			}
		})
	})
	t.Run("expiry", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newIdleRig(t)
			d := inBatches(10, time.Hour)
			d.MaxAge = 10 * time.Minute
			r.define(d)
			r.together("a/1", "/2")
			time.Sleep(11*time.Minute + time.Second)
			if dead := r.queue.buried(); len(dead) != 2 || dead[0].Reason != bridge.ReasonExpired {
				t.Errorf("dead letters %+v", dead)
			}
		})
	})
	t.Run("failing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newIdleRig(t)
			r.define(inBatches(10, 10*time.Second))
			r.center.status(503)
			r.together("a/1")
			time.Sleep(10*time.Second + time.Millisecond)
			start := time.Now()
			r.center.status(200)
			r.together("b/2")
			synctest.Wait()
			if all := r.center.all(); len(all) != 2 || all[1].at != start {
				t.Errorf("%d requests, want the second one at once", len(all))
			}
		})
	})
}

// The rate counts requests.
func TestBatchRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(10, 0)
		d.Rate = bridge.Rate{N: 1, Per: time.Second}
		r.define(d)
		start := time.Now()
		for n := range 25 {
			r.together(fmt.Sprintf("%d/%d", n%2, n))
		}
		time.Sleep(time.Minute)
		want := []time.Duration{0, time.Second, 2 * time.Second, 3 * time.Second}
		if got := at(start, r.center.all()); !slices.Equal(got, want) {
			t.Errorf("requests at %v, want %v", got, want)
		}
		r.wantBatches(numbers(0, 1), numbers(1, 11), numbers(11, 21), numbers(21, 25))
	})
}

// The concurrency bounds requests, whatever is in them.
func TestBatchConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := inBatches(10, 0)
		d.Concurrency = 3
		r.define(d)
		var mu sync.Mutex
		flying, most := 0, 0
		r.center.answers(func(context.Context, sent) bridge.Response {
			mu.Lock()
			flying++
			most = max(most, flying)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			flying--
			mu.Unlock()
			return bridge.Response{Status: 200}
		})
		var names []string
		for n := range 300 {
			names = append(names, fmt.Sprintf("%d/%d", n%200, n))
		}
		r.together(names...)
		time.Sleep(500 * time.Millisecond)
		if s := r.status(); s.InFlight != 3 {
			t.Errorf("%d under way", s.InFlight)
		}
		r.wantMetric("throughline_delivery_in_flight{destination=notification-center}", 3)
		time.Sleep(10 * time.Second)
		if n := r.queue.queued(); n != 0 || most != 3 || len(r.center.all()) != 30 {
			t.Errorf("%d queued, %d requests, %d at a time", n, len(r.center.all()), most)
		}
	})
}

// An attempt at what the destination was before says nothing about any of the records.
func TestBatchDefinitionChanges(t *testing.T) {
	for _, status := range []int{200, 400, 404, 410, 413, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := batchRig(t)
				d := inBatches(20, 0)
				d.URL = "http://127.0.0.1:9090/notify"
				r.center.answers(func(_ context.Context, s sent) bridge.Response {
					if s.URL == d.URL {
						return bridge.Response{Status: 200}
					}
					time.Sleep(5 * time.Second)
					return bridge.Response{Status: status}
				})
				r.together("a/1", "a/2", "b/3")
				synctest.Wait()
				r.define(d)
				time.Sleep(5 * time.Second)
				synctest.Wait()
				if n, dead := r.queue.queued(), r.queue.buried(); n != 0 || len(dead) != 0 {
					t.Errorf("%d records queued, dead letters %v", n, dead)
				}
				same := []string{"1", "2", "3"}
				if status == 200 {
					r.wantBatches(same)
				} else {
					r.wantBatches(same, same)
				}
				r.wantMetric("throughline_delivery_breaker_open{destination=notification-center}", 0)
			})
		})
	}
}

// A pause lets a batch under way end, and holds what it failed to deliver.
func TestBatchPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.answers(func(context.Context, sent) bridge.Response {
			time.Sleep(time.Second)
			return bridge.Response{Status: 503}
		})
		r.together("a/1", "a/2", "b/3")
		synctest.Wait()
		r.pause()
		r.together("a/4")
		time.Sleep(time.Hour)
		r.wantBatches([]string{"1", "2", "3"})
		r.center.status(200)
		r.resume()
		time.Sleep(10 * time.Second)
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d queued after the pause", n)
		}
	})
}

// A stop that cuts a batch off leaves its records as they were.
func TestBatchStopCutsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.answers(func(ctx context.Context, _ sent) bridge.Response {
			<-ctx.Done()
			return bridge.Response{Err: ctx.Err()}
		})
		r.together("a/1", "a/2", "b/3")
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Stop: %v", err)
		}
		for seq := range uint64(3) {
			if rec := r.queue.record(seq + 1); rec.ID == "" || rec.Attempts != 0 || rec.LastError != "" {
				t.Errorf("stored: %+v", rec)
			}
		}
		r.wantMetric("throughline_delivery_attempts_total{class=retry,destination=notification-center}", 0)
	})
}

// What fails on our own side is no attempt at any of the records.
func TestBatchOwnSide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.answers(func(context.Context, sent) bridge.Response {
			return bridge.Response{Own: true, Err: errors.New("no route")}
		})
		r.together("a/1", "b/2", "a/3")
		time.Sleep(time.Minute)
		r.center.status(200)
		time.Sleep(3 * time.Second)
		for _, s := range r.center.all() {
			if s.attempt() != "1" {
				t.Errorf("attempt %s", s.attempt())
			}
		}
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d queued", n)
		}
	})
}

// A record that can't be read holds up its lane and no other of the batch.
func TestBatchUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.queue.failLoadOf(2)
		r.together("a/1", "b/2", "b/3", "c/4")
		synctest.Wait()
		r.wantBatches([]string{"1", "4"})
		r.queue.failLoadOf(0)
		r.queue.Remove(2) // as an operator's purge does
		time.Sleep(6 * time.Second)
		r.wantBatches([]string{"1", "4"}, []string{"3"})
		if n := r.queue.queued(); n != 0 {
			t.Errorf("%d queued", n)
		}
	})
}

// Records that go between the choice and the request are missed by nobody.
func TestBatchMissing(t *testing.T) {
	for _, missing := range [][]uint64{{1}, {2}, {1, 2}, {1, 3, 4}, {1, 2, 3, 4}, {2, 3, 4}} {
		t.Run(fmt.Sprint(missing), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := inBatches(10, time.Second)
				r.define(d)
				r.together("a/1", "a/2", "b/3", "a/4")
				for _, seq := range missing {
					r.queue.Remove(seq)
				}
				time.Sleep(10 * time.Second)
				var got, want []string
				for _, ids := range r.batches() {
					got = append(got, ids...)
				}
				for _, n := range []uint64{1, 2, 3, 4} {
					if !slices.Contains(missing, n) {
						want = append(want, fmt.Sprint(n))
					}
				}
				slices.Sort(got)
				if !slices.Equal(got, want) || r.queue.queued() != 0 {
					t.Errorf("sent %q, want %q; %d queued", got, want, r.queue.queued())
				}
				r.together("a/5")
				time.Sleep(2 * time.Second)
				if r.queue.queued() != 0 {
					t.Error("the lane has come to a halt")
				}
			})
		})
	}
}

// In a lane whose head keeps failing that one leaves after its time, and those
// behind it go on in batches.
func TestBatchLaneHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := batchRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if has(s, "stuck") || has(s, "stuck too") {
				return bridge.Response{Status: 409}
			}
			return bridge.Response{Status: 200}
		})
		r.together("a/stuck", "c/stuck too")
		synctest.Wait()
		r.together("a/1", "a/2", "c/3")
		for n := range 300 {
			time.Sleep(time.Second)
			r.together(fmt.Sprintf("b/other %d", n))
		}
		synctest.Wait()
		if n := r.queue.queued(); n != 2 {
			t.Errorf("%d queued, want the stuck ones alone", n)
		}
		r.wantMetric("throughline_delivery_lane_left_total{destination=notification-center}", 2)
	})
}

// A record that is purged while its batch is under way is gone, whatever the
// answer; the others fare as they would.
func TestBatchPurge(t *testing.T) {
	for name, answer := range map[string]bridge.Response{
		"taken": {Status: 200}, "failed": {Status: 503}, "refused": {Status: 400}, "gone": {Status: 410}, "too large": {Status: 413},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, quick)
			d.define(inBatches(10, 0))
			flying, land := make(chan struct{}), make(chan struct{})
			var once sync.Once
			d.center.answers(func(_ context.Context, s sent) bridge.Response {
				res := bridge.Response{Status: 200}
				once.Do(func() {
					close(flying)
					<-land
					res = answer
				})
				return res
			})
			d.fill(nc, "v7", "first", "doomed", "behind", "doomed-too")
			<-flying
			if got := d.batches(); len(got) != 1 || len(got[0]) != 4 {
				t.Fatalf("sent %q", got)
			}
			n := d.all(d.op.Purge, bridge.Change{Filter: bridge.Filter{IDs: []string{"doomed", "doomed-too"}}}, nc)
			if n.Queued != 2 {
				t.Errorf("purged %+v", n)
			}
			close(land)
			dead := 0
			if name == "gone" {
				dead = 1
				await(t, "the attempt's end", func() bool { v, _ := d.metric(paused); return v == 1 })
				d.resume()
			}
			await(t, "the others to be delivered", func() bool { s := d.outbox.Stats(); return s.Records == 0 && s.DeadLetters == dead })
			for _, ids := range d.batches()[1:] {
				if slices.Contains(ids, "doomed") || slices.Contains(ids, "doomed-too") {
					t.Errorf("sent %q after the purge", ids)
				}
			}
			for _, text := range []string{"no such record", "can't be read"} {
				if l := d.log.with(text); len(l) > 0 {
					t.Errorf("logged %q", l)
				}
			}
		})
	}
}

// Over HTTP and through the outbox on disk, with a restart in the middle: each
// record arrives, those of a lane in order, each with its own id and trace.
func TestBatchHTTP(t *testing.T) {
	var mu sync.Mutex
	up := false
	got := map[string][]string{} // by lane
	traces := map[string]string{}
	requests := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		if !up || err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		requests++
		ids := listed(t, r.Header)
		elements := array(t, body)
		if len(ids) != len(elements) {
			t.Errorf("%d ids for %d elements", len(ids), len(elements))
			return
		}
		for i, e := range elements {
			var members map[string]string
			if err := json.Unmarshal(e, &members); err != nil {
				t.Error(err)
				return
			}
			ctx, err := tracectx.Decode(tracectx.Carrier{SW8: members["sw8"], Correlation: members["sw8-correlation"]})
			if err != nil {
				t.Error(err)
				return
			}
			if want := members["lane"] + "-" + members["n"]; ids[i] != want {
				t.Errorf("id %s for %s", ids[i], want)
			}
			got[members["lane"]] = append(got[members["lane"]], members["n"])
			traces[ids[i]] = ctx.TraceID
		}
	}))
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "outbox.db")
	d := inBatches(100, 5*time.Millisecond)
	d.URL = srv.URL + "/notify"
	p := start(t, file, quick, d)
	const lanes, each = 20, 50
	parent, _ := stored()
	for n := range each {
		var recs []bridge.Record
		for lane := range lanes {
			c := parent
			c.TraceID = fmt.Sprintf("trace-%d-%d", lane, n)
			carrier := c.Carrier()
			recs = append(recs, bridge.Record{
				ID: fmt.Sprintf("%d-%d", lane, n), Rule: "hard-brake", Destination: nc, Lane: fmt.Sprint(lane), Ordered: true,
				Body: fmt.Appendf(nil, `{"lane":"%d","n":"%d"}`, lane, n), SW8: carrier.SW8, TraceID: c.TraceID,
			})
		}
		commit, err := p.Append(recs)
		if err != nil {
			t.Fatal(err)
		}
		if err := commit.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	p.stop(t)
	mu.Lock()
	up = true
	mu.Unlock()
	p = start(t, file, quick, d)
	await(t, "all to be delivered", func() bool { return p.outbox.Stats().Records == 0 })
	p.stop(t)

	mu.Lock()
	defer mu.Unlock()
	for lane := range lanes {
		if !slices.Equal(got[fmt.Sprint(lane)], numbers(0, each)) {
			t.Errorf("lane %d: %v", lane, got[fmt.Sprint(lane)])
		}
		for n := range each {
			if id := fmt.Sprintf("%d-%d", lane, n); traces[id] != "trace-"+id {
				t.Errorf("%s is of trace %q", id, traces[id])
			}
		}
	}
	if requests >= lanes*each/10 {
		t.Errorf("%d requests for %d records", requests, lanes*each)
	}
}
