package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// memQueue is a Queue in memory whose commits are done at once.
type memQueue struct {
	mu      sync.Mutex
	last    uint64
	records map[uint64]bridge.Record
	order   []uint64
	dead    []bridge.DeadLetter
	watch   func([]bridge.Ref)
	loadErr error
	paused  map[string]bridge.Pause
	damaged uint64 // the Seq of a record that can't be read
	buryErr error
}

func (q *memQueue) Append(recs []bridge.Record) (*bridge.Commit, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var refs []bridge.Ref
	for _, r := range recs {
		q.last++
		r.Seq = q.last
		if r.ID == "" {
			r.ID = fmt.Sprintf("id-%d", r.Seq)
		}
		if r.Published.IsZero() {
			r.Published = time.Now()
		}
		r.Queued = time.Now()
		if q.records == nil {
			q.records = map[uint64]bridge.Record{}
		}
		q.records[r.Seq] = r
		q.order = append(q.order, r.Seq)
		refs = append(refs, ref(r))
	}
	if q.watch != nil {
		q.watch(refs)
	}
	return nil, nil
}

func ref(r bridge.Record) bridge.Ref {
	return bridge.Ref{
		Seq: r.Seq, Destination: r.Destination, Lane: r.Lane, Ordered: r.Ordered,
		Published: r.Published, Queued: r.Queued, Next: r.Next, Attempts: r.Attempts, Size: int64(len(r.Body)),
	}
}

func (q *memQueue) Watch(fn func([]bridge.Ref)) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.watch = fn
	var refs []bridge.Ref
	for _, seq := range q.order {
		if r, ok := q.records[seq]; ok {
			refs = append(refs, ref(r))
		}
	}
	fn(refs)
	return nil
}

func (q *memQueue) Load(seq uint64) (bridge.Record, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r, ok := q.records[seq]
	switch {
	case seq == q.damaged:
		return bridge.Record{}, errors.New("damaged")
	case q.loadErr != nil:
		return bridge.Record{}, q.loadErr
	case !ok:
		return bridge.Record{}, outbox.ErrNotFound
	}
	return r, nil
}

func (q *memQueue) Remove(seq uint64) *bridge.Commit {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.records, seq)
	return nil
}

func (q *memQueue) Reschedule(seq uint64, attempts int, next time.Time, lastError string) *bridge.Commit {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.records[seq]
	r.Attempts, r.Next, r.LastError = attempts, next, lastError
	q.records[seq] = r
	return nil
}

func (q *memQueue) Bury(seq uint64, d bridge.DeadLetter) *bridge.Commit {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.buryErr != nil {
		return store.Completed(q.buryErr)
	}
	delete(q.records, seq)
	q.dead = append(q.dead, d)
	return store.Completed(nil)
}

func (q *memQueue) Pauses() map[string]bridge.Pause {
	q.mu.Lock()
	defer q.mu.Unlock()
	return maps.Clone(q.paused)
}

func (q *memQueue) Pause(destination string, p bridge.Pause) *bridge.Commit {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.paused == nil {
		q.paused = map[string]bridge.Pause{}
	}
	q.paused[destination] = p
	return store.Completed(nil)
}

func (q *memQueue) Resume(destination string) *bridge.Commit {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.paused, destination)
	return store.Completed(nil)
}

func (q *memQueue) queued() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.records)
}

func (q *memQueue) record(seq uint64) bridge.Record {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.records[seq]
}

func (q *memQueue) buried() []bridge.DeadLetter {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.dead)
}

func (q *memQueue) failLoads(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.loadErr = err
}

func (q *memQueue) failLoadOf(seq uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.damaged = seq
}

func (q *memQueue) failBurials(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.buryErr = err
}

// sent is a request that center got.
type sent struct {
	at time.Time
	id string
	*bridge.Request
}

func (s sent) attempt() string { return s.Header.Get("X-Throughline-Attempt") }

// center is a Sender whose answers a test sets.
type center struct {
	mu     sync.Mutex
	answer func(ctx context.Context, r sent) bridge.Response
	got    []sent
}

func (c *center) Send(ctx context.Context, r *bridge.Request) bridge.Response {
	s := sent{at: time.Now(), id: r.Header.Get("webhook-id"), Request: r}
	c.mu.Lock()
	c.got = append(c.got, s)
	answer := c.answer
	c.mu.Unlock()
	return answer(ctx, s)
}

func (c *center) answers(f func(ctx context.Context, r sent) bridge.Response) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = f
}

// status makes it answer the same to everything.
func (c *center) status(code int) {
	c.answers(func(context.Context, sent) bridge.Response { return bridge.Response{Status: code} })
}

func (c *center) all() []sent {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.got)
}

// of returns what came for one id.
func (c *center) of(id string) []sent {
	return slices.DeleteFunc(c.all(), func(s sent) bool { return s.id != id })
}

// rig is a bridge between a memQueue and a center.
type rig struct {
	*bridge.Bridge
	t      *testing.T
	queue  *memQueue
	center *center
	reg    *prometheus.Registry
	tracer *tracectxtest.Recorder
	log    *lines
}

const nc = "notification-center"

// newRig starts a bridge with one destination, nc, that answers 200.
func newRig(t *testing.T, change ...func(*bridge.Options)) *rig {
	t.Helper()
	r := newIdleRig(t, change...)
	r.define(to(nc))
	return r
}

// define sets the destinations.
func (r *rig) define(ds ...bridge.Destination) { r.SetDestinations(ds) }

// newIdleRig is newRig without the destination.
func newIdleRig(t *testing.T, change ...func(*bridge.Options)) *rig {
	t.Helper()
	r := &rig{
		t: t, queue: &memQueue{}, center: &center{}, reg: prometheus.NewRegistry(),
		tracer: tracectxtest.NewRecorder("broker"), log: &lines{},
	}
	r.center.status(200)
	o := bridge.Options{
		Queue: r.queue, Sender: r.center, Tracer: r.tracer, Registerer: r.reg,
		Logger: slog.New(slog.NewTextHandler(r.log, nil)),
		Rand:   func() float64 { return 1 - 1e-9 },
	}
	for _, c := range change {
		c(&o)
	}
	var err error
	if r.Bridge, err = bridge.New(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = r.Stop(ctx)
	})
	return r
}

func to(name string) bridge.Destination {
	return bridge.Destination{
		Name: name, URL: "http://127.0.0.1:8080/notify",
		TraceBody:    bridge.TraceFields{SW8: "sw8", Correlation: "sw8-correlation"},
		TraceHeaders: true,
	}
}

// add appends one record to nc for each id, all in one lane; lane "": none.
func (r *rig) add(lane string, ids ...string) {
	r.t.Helper()
	var recs []bridge.Record
	for _, id := range ids {
		recs = append(recs, bridge.Record{
			ID: id, Rule: "hard-brake", Destination: nc, Lane: lane, Ordered: lane != "",
			Topic: "fleet/v7/telemetry", Body: []byte(`{"vin":"V7"}`), TraceID: "trace-of-" + id,
		})
	}
	if _, err := r.Append(recs); err != nil {
		r.t.Fatal(err)
	}
}

// metric returns the value of the series, as "name{label=value,...}" with the
// labels sorted; of a histogram its count. ok is false if it isn't there.
func (r *rig) metric(series string) (value float64, ok bool) {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			if f.GetName()+"{"+strings.Join(labels, ",")+"}" == series {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount()), true
			}
		}
	}
	return 0, false
}

// wantMetric checks a series.
func (r *rig) wantMetric(series string, want float64) {
	r.t.Helper()
	if got, ok := r.metric(series); !ok || got != want {
		r.t.Errorf("%s is %v (there: %v), want %v", series, got, ok, want)
	}
}

// lines collects log lines.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(p))
	return len(p), nil
}

func (l *lines) with(text string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.all), func(s string) bool { return !strings.Contains(s, text) })
}

// stored returns a carrier as the publish stores it.
func stored() (tracectx.Context, tracectx.Carrier) {
	c := tracectx.Context{
		Sampled: true, TraceID: "trace-1", SegmentID: "publish-segment", SpanID: 0,
		Service: "broker", Instance: "broker@test", Endpoint: "mqtt/publish/fleet/+/telemetry", Peer: "127.0.0.1:1883",
		Correlation: tracectx.Correlation{{Key: "vin", Value: "V7"}},
	}
	return c, c.Carrier()
}
