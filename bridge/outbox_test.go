package bridge_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// process is a bridge on an outbox on disk, as a broker has it.
type process struct {
	*bridge.Bridge
	st     *store.Store
	outbox *outbox.Outbox
	tracer *tracectxtest.Recorder
}

func start(t testing.TB, file string, sched bridge.Schedule, ds ...bridge.Destination) *process {
	t.Helper()
	st, err := store.Open(file, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		t.Fatal(err)
	}
	p := &process{st: st, tracer: tracectxtest.NewRecorder("broker")}
	if p.outbox, err = outbox.Open(st, outbox.Options{}); err != nil {
		t.Fatal(err)
	}
	if p.Bridge, err = bridge.New(bridge.Options{Queue: p.outbox, Tracer: p.tracer, Schedule: sched}); err != nil {
		t.Fatal(err)
	}
	p.SetDestinations(ds)
	return p
}

func (p *process) stop(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := p.st.Close(ctx); err != nil {
		t.Error(err)
	}
}

// await waits until done says so.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

var quick = bridge.Schedule{Steps: []time.Duration{10 * time.Millisecond}, Min: 10 * time.Millisecond, Max: 50 * time.Millisecond}

// A record that could not be delivered before a restart is delivered after it:
// the same id, the attempts counted on, the same trace.
func TestRestartOnDisk(t *testing.T) {
	var mu sync.Mutex
	var got []*http.Request
	var bodies []string
	up := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		got = append(got, r)
		bodies = append(bodies, string(body))
		if !up {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer srv.Close()
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(got)
	}

	file := filepath.Join(t.TempDir(), "outbox.db")
	d := to(nc)
	d.URL = srv.URL + "/notify"
	p := start(t, file, quick, d)
	parent, carrier := stored()
	commit, err := p.Append([]bridge.Record{{
		Rule: "hard-brake", Destination: nc, Lane: "v7", Ordered: true, Body: []byte(`{"vin":"V7"}`),
		SW8: carrier.SW8, Correlation: carrier.Correlation, TraceID: parent.TraceID,
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := commit.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "two attempts", func() bool { return count() >= 2 })
	p.stop(t)
	before := count()
	segments := p.tracer.Segments()

	mu.Lock()
	up = true
	mu.Unlock()
	p = start(t, file, quick, d)
	await(t, "delivery after the restart", func() bool { return p.outbox.Stats().Destinations[nc].Records == 0 })
	p.stop(t)
	segments = append(segments, p.tracer.Segments()...)

	if n := count(); n != before+1 || len(segments) != n {
		t.Fatalf("%d requests before, %d in all, %d segments; want one more and one segment each", before, n, len(segments))
	}
	for i, r := range got {
		if a := r.Header.Get("X-Throughline-Attempt"); a != fmt.Sprint(i+1) {
			t.Errorf("request %d says it is attempt %s", i+1, a)
		}
		if id := r.Header.Get("webhook-id"); id == "" || id != got[0].Header.Get("webhook-id") {
			t.Errorf("request %d: webhook-id %q, the first had %q", i+1, id, got[0].Header.Get("webhook-id"))
		}
		var members map[string]string
		if err := json.Unmarshal([]byte(bodies[i]), &members); err != nil {
			t.Fatal(err)
		}
		ctx, err := tracectx.Decode(tracectx.Carrier{SW8: members["sw8"], Correlation: members["sw8-correlation"]})
		if err != nil {
			t.Fatal(err)
		}
		local, exit := segments[i].Spans[0], segments[i].Spans[1]
		if len(local.Refs) != 1 || local.Refs[0].SegmentID != parent.SegmentID || segments[i].TraceID != parent.TraceID {
			t.Errorf("segment %d is of trace %s with refs %+v", i+1, segments[i].TraceID, local.Refs)
		}
		if ctx.TraceID != parent.TraceID || ctx.Peer != exit.Peer || "http://"+ctx.Peer != srv.URL {
			t.Errorf("request %d carries %+v, the exit span's peer is %s", i+1, ctx, exit.Peer)
		}
		delete(members, "sw8")
		delete(members, "sw8-correlation")
		if len(members) != 1 || members["vin"] != "V7" {
			t.Errorf("request %d: body %s", i+1, bodies[i])
		}
	}
}

// A backlog that expires all at once is not read into memory while the disk
// can't take it, and is all dead letters in the end.
func TestExpiryWaitsForDisk(t *testing.T) {
	d := to(nc)
	d.MaxAge = time.Nanosecond
	d.Concurrency = 1
	p := start(t, filepath.Join(t.TempDir(), "outbox.db"), quick)
	defer p.stop(t)
	const records = 400
	var last *bridge.Commit
	for range records {
		c, err := p.Append([]bridge.Record{{Destination: nc, Body: make([]byte, 16<<10)}})
		if err != nil {
			t.Fatal(err)
		}
		last = c
	}
	held, release := make(chan struct{}), make(chan struct{})
	last.Watch(func(error) { close(held); <-release }) // the disk stands still
	<-held
	p.SetDestinations([]bridge.Destination{d})
	await(t, "the first to expire", func() bool { return inQueue(t, p) < records })
	for before := records; inQueue(t, p) < before; { // until no more are taken out
		before = inQueue(t, p)
		time.Sleep(100 * time.Millisecond)
	}
	if n := records - inQueue(t, p); n > records/2 {
		t.Errorf("%d of %d records were taken out while nothing is written", n, records)
	}
	close(release)
	await(t, "all dead letters", func() bool { return p.outbox.Stats().DeadLetters == records })
}

// inQueue counts the records that are not about to leave.
func inQueue(t *testing.T, p *process) int {
	n := 0
	if err := p.outbox.List(bridge.Filter{Which: bridge.QueuedOnly}, func(bridge.Entry) bool { n++; return true }); err != nil {
		t.Fatal(err)
	}
	return n
}

// Against a webhook that fails in bursts and every now and then breaks the
// connection, every record arrives, in order per lane.
func TestOrderOverHTTP(t *testing.T) {
	const lanes, each = 20, 15
	var mu sync.Mutex
	taken := map[string][]string{}
	requests := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		requests++
		burst := requests%100 < 3
		mu.Unlock()
		switch {
		case burst:
			w.WriteHeader(http.StatusBadGateway)
			return
		case rand.IntN(20) == 0:
			panic(http.ErrAbortHandler)
		}
		var m struct{ Lane, N string }
		if err := json.Unmarshal(body, &m); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if id := r.Header.Get("webhook-id"); id != m.Lane+"-"+m.N {
			t.Errorf("webhook-id %q with body %s", id, body)
		}
		if !slices.Contains(taken[m.Lane], m.N) { // as a receiver that knows what it has seen
			taken[m.Lane] = append(taken[m.Lane], m.N)
		}
	}))
	defer srv.Close()

	d := to(nc)
	d.URL = srv.URL
	p := start(t, filepath.Join(t.TempDir(), "outbox.db"), quick, d)
	defer p.stop(t)
	for n := range each {
		var recs []bridge.Record
		for l := range lanes {
			lane := fmt.Sprint(l)
			recs = append(recs, bridge.Record{
				ID: fmt.Sprintf("%s-%d", lane, n), Destination: nc, Lane: lane, Ordered: true,
				Body: fmt.Appendf(nil, `{"lane":%q,"n":"%d"}`, lane, n),
			})
		}
		if _, err := p.Append(recs); err != nil {
			t.Fatal(err)
		}
	}
	all := func() int {
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for _, ns := range taken {
			n += len(ns)
		}
		return n
	}
	await(t, "all records", func() bool { return all() == lanes*each && p.outbox.Stats().Records == 0 })
	mu.Lock()
	defer mu.Unlock()
	for lane, ns := range taken {
		for i, n := range ns {
			if n != fmt.Sprint(i) {
				t.Errorf("lane %s came as %s", lane, strings.Join(ns, " "))
				break
			}
		}
	}
}
