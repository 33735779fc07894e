package bridge_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// desk is a bridge and an operator on an outbox on disk, with a center that a test sets.
type desk struct {
	*rig
	op     *bridge.Operator
	outbox *outbox.Outbox
}

func newDesk(t *testing.T, o outbox.Options) *desk {
	t.Helper()
	return newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), o, bridge.Schedule{})
}

func newDeskOn(t *testing.T, file string, o outbox.Options, sched bridge.Schedule) *desk {
	t.Helper()
	st, err := store.Open(file, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{rig: &rig{t: t, center: &center{}, reg: prometheus.NewRegistry(), tracer: tracectxtest.NewRecorder("broker"), log: &lines{}}}
	d.center.status(200)
	if d.outbox, err = outbox.Open(st, o); err != nil {
		t.Fatal(err)
	}
	if d.Bridge, err = bridge.New(bridge.Options{
		Queue: d.outbox, Sender: d.center, Tracer: d.tracer, Registerer: d.reg, Schedule: sched,
		Logger: slog.New(slog.NewTextHandler(d.log, nil)),
		Rand:   func() float64 { return 1 - 1e-9 },
	}); err != nil {
		t.Fatal(err)
	}
	d.op = bridge.NewOperator(d.outbox, d.Bridge)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = d.Stop(ctx)
		if err := st.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	d.define(to(nc))
	return d
}

// fill appends records to a destination and waits for the disk.
func (d *desk) fill(destination, lane string, ids ...string) {
	d.t.Helper()
	var recs []bridge.Record
	for _, id := range ids {
		recs = append(recs, bridge.Record{
			ID: id, Rule: "hard-brake", Destination: destination, Lane: lane, Ordered: lane != "", Body: []byte(`{"vin":"V7"}`),
		})
	}
	c, err := d.Append(recs)
	if err == nil {
		err = c.Wait(d.t.Context())
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

func numbered(prefix string, n int) []string {
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("%s-%03d", prefix, i))
	}
	return ids
}

// all calls do until it is through, and sums up what was done at destination.
func (d *desk) all(do func(context.Context, bridge.Change) (bridge.Changed, error), c bridge.Change, destination string) (sum bridge.Count) {
	d.t.Helper()
	for {
		done, err := do(d.t.Context(), c)
		if err != nil {
			d.t.Fatal(err)
		}
		n := done.Destinations[destination]
		sum.Queued, sum.Dead, sum.Damaged = sum.Queued+n.Queued, sum.Dead+n.Dead, sum.Damaged+n.Damaged
		if done.Next == "" {
			return sum
		}
		c.After = done.Next
	}
}

func (d *desk) sentIDs() (ids []string) {
	for _, s := range d.center.all() {
		ids = append(ids, s.id)
	}
	return ids
}

func (d *desk) delivered() bool { s := d.outbox.Stats(); return s.Records == 0 && s.DeadLetters == 0 }

// poison answers 400 to the ids that start with bad, else 200.
func (d *desk) poison() {
	d.center.answers(func(_ context.Context, s sent) bridge.Response {
		if strings.HasPrefix(s.id, "bad") {
			return bridge.Response{Status: 400}
		}
		return bridge.Response{Status: 200}
	})
}

// bury makes dead letters of records with these ids, which start with bad.
func (d *desk) bury(lane string, ids ...string) {
	d.t.Helper()
	d.poison()
	before := d.outbox.Stats().DeadLetters
	d.fill(nc, lane, ids...)
	await(d.t, "dead letters", func() bool { return d.outbox.Stats().DeadLetters == before+len(ids) })
}

// Dead letters are delivered once they are retried: with their id, publish time and trace, as first attempt, in their order,
// and behind what their lane has.
func TestRetryDeadLetters(t *testing.T) {
	d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, quick)
	parent, carrier := stored()
	published := time.Now().Add(-48 * time.Hour).UTC() // past max_age if that counted from here
	d.poison()
	c, err := d.Append([]bridge.Record{{
		ID: "bad-traced", Destination: nc, Lane: "v7", Ordered: true, Body: []byte(`{}`), Published: published,
		SW8: carrier.SW8, Correlation: carrier.Correlation, TraceID: parent.TraceID,
	}})
	if err != nil || c.Wait(t.Context()) != nil {
		t.Fatal(err)
	}
	await(t, "the dead letter", func() bool { return d.outbox.Stats().DeadLetters == 1 })
	d.bury("v7", "bad-1", "bad-2")
	before := len(d.tracer.Segments())

	// The lane has a record in flight and one behind it.
	flying, land := make(chan struct{}), make(chan struct{})
	var once sync.Once
	d.center.answers(func(_ context.Context, s sent) bridge.Response {
		if s.id == "first" {
			once.Do(func() { close(flying) })
			<-land
		}
		return bridge.Response{Status: 200}
	})
	d.fill(nc, "v7", "first", "second")
	<-flying
	sentBefore := len(d.center.all())

	if n := d.all(d.op.Retry, bridge.Change{DryRun: true, Filter: bridge.Filter{Which: bridge.DeadOnly}}, nc); n != (bridge.Count{Dead: 3}) {
		t.Errorf("dry run: %+v", n)
	}
	if n := d.outbox.Stats().DeadLetters; n != 3 {
		t.Fatalf("%d dead letters after the dry run, want 3", n)
	}
	if n := d.all(d.op.Retry, bridge.Change{Filter: bridge.Filter{Which: bridge.DeadOnly}}, nc); n != (bridge.Count{Dead: 3}) {
		t.Errorf("retried %+v", n)
	}
	if n := d.all(d.op.Retry, bridge.Change{Filter: bridge.Filter{Which: bridge.DeadOnly}}, nc); n != (bridge.Count{}) {
		t.Errorf("retried again: %+v", n)
	}
	var again []bridge.Entry
	if err := d.outbox.List(bridge.Filter{IDs: []string{"bad-traced"}}, func(e bridge.Entry) bool { again = append(again, e); return true }); err != nil {
		t.Fatal(err)
	}
	if len(again) != 1 || again[0].Dead || !again[0].Published.Equal(published) || again[0].SW8 != carrier.SW8 ||
		again[0].Correlation != carrier.Correlation || again[0].TraceID != parent.TraceID || again[0].Attempts != 0 || time.Since(again[0].Queued) > time.Minute {
		t.Errorf("queued again: %+v", again)
	}
	close(land)
	await(t, "all to be delivered", d.delivered)
	if got, want := d.sentIDs()[sentBefore:], []string{"second", "bad-traced", "bad-1", "bad-2"}; !slices.Equal(got, want) {
		t.Errorf("sent %v, want %v", got, want)
	}
	for _, s := range d.center.all()[sentBefore:] {
		if s.attempt() != "1" {
			t.Errorf("%s is sent as attempt %s", s.id, s.attempt())
		}
	}
	found := false
	for _, s := range d.tracer.Segments()[before:] {
		for _, r := range s.Spans[0].Refs {
			found = found || r.SegmentID == parent.SegmentID && s.TraceID == parent.TraceID
		}
	}
	if !found {
		t.Error("the retried record's segment does not refer to the publish")
	}
	if s := d.outbox.Stats(); s.Bytes != 0 || s.DeadBytes != 0 {
		t.Errorf("stats %+v", s)
	}
}

// A dead letter that was retried and fails again is a dead letter again after max_age from the retry, not at once.
func TestRetryExpired(t *testing.T) {
	d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, quick)
	dest := to(nc)
	dest.MaxAge = 1500 * time.Millisecond
	d.define(dest)
	d.center.status(503)
	d.fill(nc, "v7", "old")
	await(t, "it to expire", func() bool { return d.outbox.Stats().DeadLetters == 1 })
	time.Sleep(500 * time.Millisecond)
	before, retried := len(d.center.all()), time.Now()
	if n := d.all(d.op.Retry, bridge.Change{Filter: bridge.Filter{IDs: []string{"old"}}}, nc); n != (bridge.Count{Dead: 1}) {
		t.Fatalf("retried %+v", n)
	}
	await(t, "it to expire again", func() bool { return d.outbox.Stats().DeadLetters == 1 })
	if took := time.Since(retried); took < dest.MaxAge || len(d.center.all()) == before {
		t.Errorf("expired again after %v and %d attempts, max_age is %v", took, len(d.center.all())-before, dest.MaxAge)
	}
}

// What waits for another attempt is due at once, though the schedule and the breaker say otherwise; an attempt under way and
// the order of the lane stay as they are.
func TestRetryQueued(t *testing.T) {
	d := newDesk(t, outbox.Options{})
	d.center.status(401) // the slowest schedule: a minute at least, a probe every 30 s
	d.fill(nc, "v7", "a", "b", "c")
	d.fill(nc, "", "alone")
	await(t, "attempts", func() bool { return len(d.center.all()) >= 2 })
	time.Sleep(1200 * time.Millisecond)
	if n := len(d.center.all()); n > 3 {
		t.Fatalf("%d attempts by themselves", n)
	}
	d.center.status(200)
	if n := d.all(d.op.Retry, bridge.Change{Filter: bridge.Filter{Destination: "elsewhere"}}, nc); n != (bridge.Count{}) {
		t.Errorf("another destination's: %+v", n)
	}
	began := time.Now()
	if n := d.all(d.op.Retry, bridge.Change{Filter: bridge.Filter{Destination: nc}}, nc); n != (bridge.Count{Queued: 4}) {
		t.Errorf("retried %+v", n)
	}
	await(t, "all to be delivered", d.delivered)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("delivered after %v", took)
	}
	var lane []string
	for _, s := range d.center.all() {
		if s.id != "alone" {
			lane = append(lane, s.id)
		}
	}
	if got := slices.Compact(lane); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("the lane was sent as %v", got)
	}
}

// Retries make due what the rate allows, however many ask at the same time.
func TestRetryIsRateLimited(t *testing.T) {
	d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, quick)
	const records = 250
	d.fill("held", "", numbered("old", records)...)
	held := to("held")
	held.MaxAge = time.Nanosecond
	d.define(to(nc), held)
	await(t, "all to expire", func() bool { return d.outbox.Stats().DeadLetters == records })
	d.define(to(nc), to("held"))
	began := time.Now()
	var wg sync.WaitGroup
	var mu sync.Mutex
	total := 0
	for range 3 {
		wg.Go(func() {
			n := d.all(d.op.Retry, bridge.Change{}, "held")
			mu.Lock()
			defer mu.Unlock()
			total += n.Dead
		})
	}
	var early int
	for time.Since(began) < 900*time.Millisecond {
		early = len(d.center.all())
		time.Sleep(5 * time.Millisecond)
	}
	wg.Wait()
	await(t, "all to be delivered", d.delivered)
	if total != records {
		t.Errorf("%d retried in all, want %d", total, records)
	}
	// 50 at once, and then 50 every half second.
	if took := time.Since(began); took < 1900*time.Millisecond {
		t.Errorf("%d became due within %v", records, took)
	}
	if early > 150 {
		t.Errorf("%d were sent within the first second, want about %d", early, bridge.RedriveRate)
	}
	sent := d.sentIDs()
	slices.Sort(sent)
	if n := len(slices.Compact(sent)); n != records || len(sent) != records {
		t.Errorf("%d requests of %d records", len(sent), n)
	}
}

// A full destination takes no more: the retry says so, and what was left is still a dead letter.
func TestRetryStopsWhenFull(t *testing.T) {
	d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, quick)
	d.bury("v7", "bad-1", "bad-2", "bad-3", "bad-4")
	d.define() // held from here on
	d.outbox.SetCaps(outbox.Caps{Default: outbox.Cap{MaxBytes: d.outbox.Stats().DeadBytes / 2}})
	done, err := d.op.Retry(t.Context(), bridge.Change{})
	n := done.Destinations[nc].Dead
	if !errors.Is(err, bridge.ErrFull) || n == 0 || n == 4 {
		t.Errorf("%d retried, error %v", n, err)
	}
	if s := d.outbox.Stats(); s.Records != n || s.DeadLetters != 4-n {
		t.Errorf("%d queued and %d dead of 4 with %d retried", s.Records, s.DeadLetters, n)
	}
}

// atRest is an operator on an outbox that nothing is sent from.
func atRest(t *testing.T, o outbox.Options) (*store.Store, *outbox.Outbox, *bridge.Operator) {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "outbox.db"), store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close(context.Background()) })
	ob, err := outbox.Open(st, o)
	if err != nil {
		t.Fatal(err)
	}
	return st, ob, bridge.NewOperator(ob, nil)
}

// buryAll makes dead letters of records, in their order.
func buryAll(t *testing.T, ob *outbox.Outbox, recs []bridge.Record) {
	t.Helper()
	c, err := ob.Append(recs)
	if err == nil {
		err = c.Wait(t.Context())
	}
	for _, r := range recs {
		c = ob.Bury(r.Seq, outbox.DeadLetter{Reason: "poison"})
	}
	if err == nil {
		err = c.Wait(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A full destination keeps its dead letters; those of others behind them are retried, in later batches too, and the error
// names it.
func TestRetryPassesOverFullDestinations(t *testing.T) {
	const each = 60 // more than a batch
	for name, limit := range map[string]time.Duration{"in one call": time.Minute, "in calls of one batch": 0} {
		t.Run(name, func(t *testing.T) {
			_, ob, op := atRest(t, outbox.Options{})
			var recs []bridge.Record
			bridge.LimitCall(op, limit)
			for range each {
				for _, name := range []string{"full", "open", "full-too"} {
					recs = append(recs, bridge.Record{Destination: name, Body: make([]byte, 1<<10)})
				}
			}
			buryAll(t, ob, recs)
			full := outbox.Cap{MaxBytes: 4 << 10, Drop: true} // room for three; what is dead is never dropped
			ob.SetCaps(outbox.Caps{Of: map[string]outbox.Cap{"full": full, "full-too": full}})
			retried, errs, c := map[string]int{}, []error(nil), bridge.Change{}
			for {
				done, err := op.Retry(t.Context(), c)
				for name, n := range done.Destinations {
					retried[name] += n.Dead
				}
				if err != nil {
					errs = append(errs, err)
				}
				if c.After = done.Next; c.After == "" {
					break
				}
			}
			if retried["open"] != each || retried["full"] != 3 || retried["full-too"] != 3 {
				t.Errorf("retried %v, want all %d of the open one and 3 of the full ones", retried, each)
			}
			if len(errs) == 0 || !errors.Is(errs[0], bridge.ErrFull) || !strings.Contains(errs[0].Error(), `"full"`) || !strings.Contains(errs[0].Error(), "another destination is full too") {
				t.Errorf("errors %v", errs)
			}
			if s := ob.Stats(); s.Records != each+6 || s.DeadLetters != 2*each-6 {
				t.Errorf("%d queued and %d dead", s.Records, s.DeadLetters)
			}
		})
	}
}

// When too much waits for the disk a retry waits too, and does not take that for a full destination.
func TestRetryWaitsForTheDisk(t *testing.T) {
	reg := prometheus.NewRegistry()
	_, ob, op := atRest(t, outbox.Options{MaxUnflushed: 16 << 10, Registerer: reg})
	for range 3 {
		buryAll(t, ob, []bridge.Record{{Destination: nc, Body: make([]byte, 6<<10)}})
	}
	slow, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	if err := ob.Watch(func([]bridge.Ref) { once.Do(func() { close(slow); <-goOn }) }); err != nil { // holds up the committer
		t.Fatal(err)
	}
	if _, err := ob.Append([]bridge.Record{{Destination: nc}}); err != nil {
		t.Fatal(err)
	}
	<-slow
	if _, err := ob.Append([]bridge.Record{{Destination: nc, Body: make([]byte, 15<<10)}}); err != nil {
		t.Fatal(err)
	}
	type result struct {
		done bridge.Changed
		err  error
	}
	results := make(chan result, 1)
	go func() {
		done, err := op.Retry(t.Context(), bridge.Change{Filter: bridge.Filter{Which: bridge.DeadOnly}})
		results <- result{done, err}
	}()
	refused := func() bool {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "throughline_outbox_refused_total" && m.GetLabel()[0].GetValue() == "unflushed" {
					return m.GetCounter().GetValue() > 0
				}
			}
		}
		return false
	}
	await(t, "the flush window to be full", refused)
	close(goOn)
	if r := <-results; r.err != nil || r.done.Destinations[nc].Dead != 3 {
		t.Errorf("retried %+v, error %v", r.done.Destinations, r.err)
	}
}

// A dead letter that is damaged while the broker runs is counted, and the others are purged or retried all the same.
func TestDamagedDeadLetters(t *testing.T) {
	for name, do := range map[string]func(*bridge.Operator) func(context.Context, bridge.Change) (bridge.Changed, error){
		"purge": func(o *bridge.Operator) func(context.Context, bridge.Change) (bridge.Changed, error) { return o.Purge },
		"retry": func(o *bridge.Operator) func(context.Context, bridge.Change) (bridge.Changed, error) { return o.Retry },
	} {
		t.Run(name, func(t *testing.T) {
			st, ob, op := atRest(t, outbox.Options{})
			const n = 600 // more than a batch of either
			recs := make([]bridge.Record, n)
			for i := range recs {
				recs[i].Destination = nc
			}
			buryAll(t, ob, recs)
			damage := store.Op{Bucket: "outbox.dead", Key: binary.BigEndian.AppendUint64(nil, recs[n/3].Seq), Value: []byte("no dead letter at all")}
			if err := st.Write([]store.Op{damage}).Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, dry := range []bool{true, false} {
				done, err := do(op)(t.Context(), bridge.Change{DryRun: dry})
				if err != nil || done.Next != "" || done.Destinations[nc] != (bridge.Count{Dead: n - 1}) || done.Destinations[""] != (bridge.Count{Damaged: 1}) {
					t.Errorf("dry run %v: %+v, error %v", dry, done, err)
				}
			}
			if s := ob.Stats(); s.DeadLetters != 1 {
				t.Errorf("%d dead letters are left, want the damaged one", s.DeadLetters)
			}
		})
	}
}

// Whatever place a record is in, a purge takes it out, and its lane goes on at once.
func TestPurgeUnblocksLanes(t *testing.T) {
	for name, answer := range map[string]bridge.Response{
		"closed breaker":        {Status: 503},
		"a configuration error": {Status: 401}, // opens the breaker in the end: probes every 30 s
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, outbox.Options{})
			d.center.answers(func(_ context.Context, s sent) bridge.Response {
				if strings.HasPrefix(s.id, "bad") {
					return answer
				}
				return bridge.Response{Status: 200}
			})
			for lane := range 8 {
				d.fill(nc, fmt.Sprint(lane), numbered(fmt.Sprint("bad-", lane), 30)...)
			}
			d.fill(nc, "", numbered("bad-alone", 30)...)
			await(t, "attempts", func() bool { return len(d.center.all()) >= 3 })
			d.fill(nc, "3", "good-behind")
			d.fill(nc, "", "good-alone")
			d.fill(nc, "9", "good-beside")
			began := time.Now()
			n := d.all(d.op.Purge, bridge.Change{Filter: bridge.Filter{IDs: slices.DeleteFunc(d.queuedIDs(), func(id string) bool { return strings.HasPrefix(id, "good") })}}, nc)
			if n.Queued < 9*30-3 || n.Dead != 0 {
				t.Errorf("purged %+v", n)
			}
			// By themselves a probe would come after up to 30 s, and the lane's next attempt after a minute.
			await(t, "the others to be delivered", d.delivered)
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("delivered after %v", took)
			}
			for _, id := range []string{"good-behind", "good-alone", "good-beside"} {
				if len(d.center.of(id)) == 0 {
					t.Errorf("%s was not sent", id)
				}
			}
			if s := d.outbox.Stats(); s.Bytes != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func (d *desk) queuedIDs() (ids []string) {
	d.t.Helper()
	if err := d.outbox.List(bridge.Filter{Which: bridge.QueuedOnly}, func(e bridge.Entry) bool { ids = append(ids, e.ID); return true }); err != nil {
		d.t.Fatal(err)
	}
	return ids
}

// A record that is purged while it is sent is gone whatever the answer: no dead letter, no error, no space held, and its lane
// goes on at once.
func TestPurgeInFlight(t *testing.T) {
	for name, answer := range map[string]bridge.Response{
		"taken":   {Status: 200},
		"failed":  {Status: 401},
		"broken":  {Err: errors.New("connection reset")},
		"gone":    {Status: 410},
		"refused": {Status: 400},
	} {
		for _, lane := range []string{"v7", ""} {
			t.Run(name+"/lane "+lane, func(t *testing.T) {
				d := newDesk(t, outbox.Options{})
				flying, land := make(chan struct{}), make(chan struct{})
				d.center.answers(func(_ context.Context, s sent) bridge.Response {
					if s.id != "doomed" {
						return bridge.Response{Status: 200}
					}
					close(flying)
					<-land
					return answer
				})
				d.fill(nc, lane, "doomed", "doomed-too", "behind")
				<-flying
				if lane != "" && len(d.center.all()) != 1 {
					t.Fatalf("sent %v", d.sentIDs())
				}
				n := d.all(d.op.Purge, bridge.Change{Filter: bridge.Filter{IDs: []string{"doomed", "doomed-too"}}}, nc)
				if n.Dead != 0 || n.Queued == 0 || lane != "" && n.Queued != 2 {
					t.Errorf("purged %+v", n)
				}
				close(land)
				if name == "gone" { // the destination is, for what else there is
					await(t, "the attempt's end", func() bool { v, _ := d.metric(paused); return v == 1 })
					d.resume()
				}
				await(t, "the one behind to be delivered", func() bool { return d.outbox.Stats().Records == 0 && len(d.center.of("behind")) == 1 })
				await(t, "the attempts to end", func() bool { return len(d.tracer.Segments()) == len(d.center.all()) })
				if got := len(d.center.of("doomed")); got != 1 {
					t.Errorf("sent %d times", got)
				}
				if s := d.outbox.Stats(); s.Bytes != 0 || s.DeadLetters != 0 || s.DeadBytes != 0 {
					t.Errorf("stats %+v", s)
				}
				for _, text := range []string{"dead letter", "no such record", "can't be read"} {
					if l := d.log.with(text); len(l) > 0 {
						t.Errorf("logged %q", l)
					}
				}
				for _, reason := range []string{"poison", "gone", "expired"} {
					d.wantMetric("throughline_delivery_dead_letters_total{destination=notification-center,reason="+reason+"}", 0)
				}
				await(t, "a segment of each attempt", func() bool { return len(d.tracer.Segments()) == len(d.center.all()) })
			})
		}
	}
}

// Records that are held for a destination without definition can be purged, and are held no more.
func TestPurgeHeld(t *testing.T) {
	d := newDesk(t, outbox.Options{})
	d.define()
	d.fill("gone", "v7", numbered("old", 3)...)
	d.fill("gone", "", "other")
	d.wantMetric("throughline_delivery_held_records{destination=gone}", 4)
	if n := d.all(d.op.Purge, bridge.Change{Filter: bridge.Filter{IDs: numbered("old", 3)}}, "gone"); n != (bridge.Count{Queued: 3}) {
		t.Errorf("purged %+v", n)
	}
	d.wantMetric("throughline_delivery_held_records{destination=gone}", 1)
}

// What is retried is delivered after a restart that comes before its delivery.
func TestRetryOutlastsRestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "outbox.db")
	t.Run("before", func(t *testing.T) {
		d := newDeskOn(t, file, outbox.Options{}, quick)
		d.bury("v7", "bad-1", "bad-2")
		d.center.status(503)
		if n := d.all(d.op.Retry, bridge.Change{}, nc); n.Dead != 2 {
			t.Fatalf("retried %+v", n)
		}
	})
	t.Run("after", func(t *testing.T) {
		d := newDeskOn(t, file, outbox.Options{}, quick)
		await(t, "delivery", d.delivered)
		if got := d.sentIDs(); !slices.Equal(got, []string{"bad-1", "bad-2"}) {
			t.Errorf("sent %v", got)
		}
	})
}

// A call ends within its time and says where to go on; a cursor that is none is refused.
func TestChangeGoesOn(t *testing.T) {
	d := newDesk(t, outbox.Options{})
	d.define()
	d.fill("held", "", numbered("r", 400)...)
	bridge.LimitCall(d.op, 0)
	calls, purged, c := 0, 0, bridge.Change{}
	for {
		done, err := d.op.Purge(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		calls, purged = calls+1, purged+done.Destinations["held"].Queued
		if calls == 1 {
			d.fill("held", "", "late")
		}
		if done.Next == "" {
			break
		}
		c.After = done.Next
	}
	if s := d.outbox.Stats(); calls < 2 || purged != 400 || s.Records != 1 {
		t.Errorf("%d purged in %d calls, %d left", purged, calls, s.Records)
	}
	for _, after := range []string{"x", "queued", "queued-1-2", "queued-1-2-3-4", "queued--1-2-3", "lost-1-2-3", "dead-1-2-x", "dead-99999999999999999999-2-3"} {
		if _, err := d.op.Purge(t.Context(), bridge.Change{After: after}); !errors.Is(err, bridge.ErrCursor) {
			t.Errorf("after %q: %v", after, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.op.Purge(ctx, bridge.Change{}); !errors.Is(err, context.Canceled) || d.outbox.Stats().Records != 1 {
		t.Errorf("a call that nobody waits for: %v", err)
	}
}

// While 50,000 records are purged, appends are on disk about as soon as otherwise.
func TestAppendsGoOnDuringPurge(t *testing.T) {
	d := newDesk(t, outbox.Options{})
	const records = 50_000
	for lane := range records / 1000 {
		d.fill("held", fmt.Sprint(lane), numbered(fmt.Sprint(lane), 1000)...)
	}
	done := make(chan bridge.Count)
	began := time.Now()
	go func() { done <- d.all(d.op.Purge, bridge.Change{Filter: bridge.Filter{Destination: "held"}}, "held") }()
	var waits []time.Duration
	var purged bridge.Count
	for over := false; !over; {
		at := time.Now()
		d.fill(nc, fmt.Sprint(len(waits)%100), fmt.Sprint("new-", len(waits)))
		waits = append(waits, time.Since(at))
		select {
		case purged = <-done:
			over = true
		default:
		}
	}
	took := time.Since(began)
	slices.Sort(waits)
	median, worst := waits[len(waits)/2], waits[len(waits)-1]
	t.Logf("%d records purged in %v; %d appends meanwhile, one after the other: median %v, worst %v", purged.Queued, took, len(waits), median, worst)
	if purged.Queued != records {
		t.Errorf("%d purged, want %d", purged.Queued, records)
	}
	if len(waits) < 20 || median > 250*time.Millisecond || worst > 2*time.Second {
		t.Errorf("%d appends in %v: median %v, worst %v", len(waits), took, median, worst)
	}
	await(t, "all to be delivered", d.delivered)
	if got := len(d.center.all()); got != len(waits) {
		t.Errorf("%d sent of %d", got, len(waits))
	}
}
