package bridge

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// Batch is how many records go in one request.
type Batch struct {
	// Max is how many at most, up to MaxBatch. More than 1, and every body that is
	// JSON goes as an element of an array, be it the only one.
	Max int
	// Linger is how long a request waits for more records if there are fewer than
	// Max, from when the first of them was due.
	Linger time.Duration
}

// MaxBatch bounds Batch.Max, so that headerIDs has room for the ids that the queue
// makes.
const MaxBatch = 100

const (
	// batchBytes is about the longest body of several records: what a server
	// takes that nobody has asked to take more.
	batchBytes = 1 << 20
	// elementRoom is what an element takes beside its record's body.
	elementRoom = 1 << 10
	// idsBytes bounds headerIDs. Servers take 8 kB of a header, or of all headers.
	idsBytes = 4 << 10
	// togetherAttempts is after how many failed attempts at a record a batch that
	// fails is its last.
	togetherAttempts = 2
	// headerIDs lists the webhook-ids of an array's elements, in their order, as
	// strings of RFC 9651, section 3.3.3. It is there if and only if the body is an
	// array that was made here.
	headerIDs = "X-Throughline-Ids"
)

// batch is records that go in one request. While it is in somebody's hands,
// only these change it.
type batch struct {
	route    *route
	lanes    []*lane
	elements []element // in the order in which the records were appended
}

// element is one record of a batch.
type element struct {
	lane   int // its index
	p      *pending
	rec    Record
	size   int // of the stored body
	id     string
	spans  spans
	trace  tracectx.Context
	inBody bool // the trace context is
	sent   bool
	failed bool    // held against its lane
	out    outcome // zero: it goes back to its lane, due at once
}

// ripen notes since when something is due that may linger. The caller holds f.mu.
func (f *forwarder) ripen(now time.Time) {
	switch {
	case f.route == nil || f.route.batch.Linger == 0 || !f.lanes.due():
		f.first = time.Time{}
	case f.first.IsZero():
		f.first = now
	}
}

// lingers reports whether what is due waits for more. A destination that fails
// is not kept from showing that it is back. The caller holds f.mu.
func (f *forwarder) lingers(now time.Time) bool {
	f.ripen(now)
	return !f.first.IsZero() && now.Before(f.first.Add(f.route.batch.Linger)) && f.breaker.failures == 0 &&
		!f.lanes.enough(f.size)
}

// gather takes what goes out with the head of l, nil if nothing does. The caller
// holds f.mu.
func (f *forwarder) gather(l *lane, now time.Time) *batch {
	f.first = time.Time{}
	if l.head.alone {
		return nil
	}
	of, n := f.lanes.gather(l, f.size, f.cutoff(now))
	if n == 1 {
		return nil
	}
	b := &batch{route: f.route, lanes: of, elements: make([]element, 0, n)}
	for i, l := range of {
		b.elements = append(b.elements, element{lane: i, p: &l.head})
		more := f.lanes.flying[l]
		for k := range more {
			b.elements = append(b.elements, element{lane: i, p: &more[k]})
		}
	}
	slices.SortFunc(b.elements, func(a, b element) int { return cmp.Compare(a.p.seq, b.p.seq) })
	return b
}

// fit sets how many records the next batch has, after a request with n of them: one
// more after one that succeeded, half of it after a failure that may be due to
// its size. The caller holds f.mu.
func (f *forwarder) fit(r *route, n int, res Response) {
	if r != f.route {
		return
	}
	switch class := res.Class(); {
	case class == Success && n >= f.size:
		f.size = min(f.size+1, r.batch.Max)
	case class == Retry && (res.Status == 0 || res.Status == http.StatusRequestTimeout || res.Status >= 500),
		res.Status == http.StatusRequestEntityTooLarge:
		f.size = max(1, min(f.size, n/2))
	}
}

// joins reports whether a record can be in a batch with others: nothing but the
// body is its own, that is JSON, and its trace context, if it would else go in the
// headers, has its place in there. With one that is not UTF-8 strict parsers would
// refuse all.
func (r *route) joins(rec *Record) bool {
	body := rec.Body
	if isRendered(rec) || !utf8.Valid(body) {
		return false
	}
	if r.sw8 == nil || !r.def.TraceHeaders {
		return gjson.ValidBytes(body)
	}
	if !isObject(body) {
		return false
	}
	if len(r.sw8) == 1 {
		return true
	}
	_, place := setField(slices.Clone(body), r.sw8, "")
	return place != blocked
}

// sendBatch makes one attempt at j's batch, and puts the lanes back. If no more
// than one record can go, it sends nothing and reports true: j is then a job
// for that one.
func (f *forwarder) sendBatch(j *job) (single bool) {
	b := j.batch
	j.batch = nil
	n := f.fill(b)
	flies := make([]bool, len(b.lanes))
	var first *element
	for i := range b.elements {
		if e := &b.elements[i]; e.sent {
			flies[e.lane] = n > 1 || e.p == &b.lanes[e.lane].head
			if first == nil {
				first = e
			}
		}
	}

	f.mu.Lock()
	now := time.Now()
	f.land(b, now, func(lane int) bool { return !flies[lane] })
	if single = n == 1 && flies[first.lane]; single {
		j.lane = b.lanes[first.lane]
		f.lanes.loosen(j.lane)
	}
	f.dispatch(now)
	f.mu.Unlock()
	if n < 2 {
		return single
	}

	f.meters.inFlight.Inc()
	res, id := f.post(b, first, n)
	f.meters.inFlight.Dec()
	j.lane = b.lanes[first.lane]
	class := res.Class()
	if cut := res.Err != nil && f.bridge.ctx.Err() != nil; !cut { // else cut off by Stop: not an attempt
		f.meters.attempted(class, n)
		f.answered(b, class)
		if class != Success {
			f.batchFailed(b, first, *j, class, res, id, n)
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	if class == Success {
		f.judge(class, *j, Response{}, false)
	}
	f.fit(b.route, n, res)
	f.land(b, time.Now(), func(lane int) bool { return flies[lane] })
	return false
}

// fill loads the records, and returns how many go in the request. Where one of a
// lane doesn't, neither do those that follow it.
func (f *forwarder) fill(b *batch) (n int) {
	stays := make([]bool, len(b.lanes))
	size, ids := 0, 0
	for i := range b.elements {
		e := &b.elements[i]
		if stays[e.lane] {
			continue
		}
		var err error
		e.rec, err = f.bridge.queue.Load(e.p.seq)
		if errors.Is(err, outbox.ErrNotFound) { // somebody purged it
			e.out.done = true
			continue
		}
		if err != nil {
			f.tell(slog.LevelError, "read record: "+err.Error(), "record can't be read, it stays in the queue", "seq", e.p.seq, "error", err)
			e.out.due, e.failed, stays[e.lane] = time.Now().Add(ownFailureWait), true, true
			continue
		}
		e.rec.Attempts = int(e.p.attempts) // what is stored may lag behind
		e.size = len(e.rec.Body)
		e.id = b.route.webhookID(e.rec.ID)
		if e.p.alone = !b.route.joins(&e.rec); e.p.alone && n > 0 {
			stays[e.lane] = true
			e.rec = Record{} // its body is in no bound
			continue
		}
		size += e.size + elementRoom
		ids += len(quotedID(e.id)) + 1
		if n > 0 && (size > batchBytes || ids > idsBytes) {
			e.rec = Record{}
			break
		}
		e.sent = true
		if n++; e.p.alone {
			break
		}
	}
	return n
}

// land puts those of the batch's lanes back for which it says so. The caller
// holds f.mu.
func (f *forwarder) land(b *batch, now time.Time, which func(lane int) bool) {
	kept := make([][]pending, len(b.lanes))
	heads := make([]*element, len(b.lanes))
	for i := range b.elements {
		e := &b.elements[i]
		if e.out.done || e.p.purged || !which(e.lane) {
			continue
		}
		if heads[e.lane] == nil {
			heads[e.lane] = e
		}
		kept[e.lane] = append(kept[e.lane], *e.p)
	}
	stale := b.route != f.route // they failed at what the destination was before
	for i, l := range b.lanes {
		if !which(i) {
			continue
		}
		var due time.Time
		if e := heads[i]; e != nil && !stale {
			due = e.out.due
		}
		f.lanes.land(l, kept[i], due, f.cutoff(now))
		if e := heads[i]; e != nil && e.failed && !stale {
			f.fails(l, now)
		}
	}
}

// post sends n records of the batch, of which first is the first, under a trace
// segment for each, and returns the answer and the webhook-id.
func (f *forwarder) post(b *batch, first *element, n int) (res Response, id string) {
	r, now := b.route, time.Now()
	timestamp := strconv.FormatInt(now.Unix(), 10)
	attempts, ids := 0, make([]string, 0, n)
	for _, e := range b.elements {
		if e.sent {
			attempts = max(attempts, e.rec.Attempts)
			ids = append(ids, e.id)
		}
	}
	id = batchID(ids)

	count, size := strconv.Itoa(n), len("[]")
	for i := range b.elements {
		e := &b.elements[i]
		if !e.sent {
			continue
		}
		e.spans = f.startSpans(r, &e.rec, strconv.Itoa(e.rec.Attempts+1), now)
		defer e.spans.end()
		e.spans.local.Tag("batch.id", id)
		e.spans.local.Tag("batch.size", count)
		e.trace = e.spans.exit.Context()
		size += e.size + elementRoom
	}
	body := make([]byte, 0, size)
	for i := range b.elements {
		e := &b.elements[i]
		if !e.sent {
			continue
		}
		if body = f.appendElement(append(body, ','), r, e); e != first {
			e.rec.Body = nil // held once while it is sent; the first one's a 410 would keep
		}
	}
	body[0] = '['
	body = append(body, ']')

	header := r.headers(id, timestamp, strconv.Itoa(attempts+1))
	for i := range ids {
		ids[i] = quotedID(ids[i])
	}
	header.Set(headerIDs, strings.Join(ids, ","))
	f.meters.batch.Observe(float64(n))
	res = f.send(r, &Request{Method: r.method, URL: r.url, Header: header, Body: body}, id, timestamp)
	for _, e := range b.elements {
		if e.sent {
			e.spans.answered(res)
		}
	}
	return res, id
}

// appendElement appends the record's body with its trace context.
func (f *forwarder) appendElement(to []byte, r *route, e *element) []byte {
	start := len(to)
	to = append(to, e.rec.Body...)
	if r.sw8 == nil || bytes.TrimLeft(to[start:], " \t\r\n")[0] != '{' {
		return to
	}
	object, place := r.put(to[start:], e.trace.Carrier())
	e.inBody = place != blocked
	if place == replaced {
		f.meters.replaced.Inc()
	}
	return append(to[:start], object...) // where it is already, if there was room
}

// answered counts an attempt at each record, and takes them out of the queue if
// it was a success.
func (f *forwarder) answered(b *batch, class Class) {
	for i := range b.elements {
		e := &b.elements[i]
		if !e.sent {
			continue
		}
		if class != OwnSide {
			e.p.attempts++
			e.rec.Attempts++
		}
		if class != Success {
			continue
		}
		f.bridge.queue.Remove(e.p.seq)
		carrier := carrierNone
		if e.inBody {
			carrier = carrierBody
		}
		f.meters.delivered(e.rec.Rule, carrier, time.Since(e.rec.Published).Seconds())
		e.out.done = true
	}
}

// batchFailed decides what becomes of the records after an attempt that was no
// success. first is the first of those sent, and j a job for its lane.
func (f *forwarder) batchFailed(b *batch, first *element, j job, class Class, res Response, id string, n int) {
	text := failureText(res)
	level, message := slog.LevelWarn, "delivery failed"
	switch class {
	case Poison:
		message = "batch refused, its records are sent alone"
		if res.Status == http.StatusRequestEntityTooLarge {
			message = "batch too large, it is sent in smaller ones"
		}
	case OwnSide:
		level, message = slog.LevelError, "delivery failed on our side, nothing was sent"
	case Configuration:
		level, message = slog.LevelError, "delivery failed, the records of the batch are sent alone"
	}
	if class != Gone {
		f.tell(level, "batch: "+string(class)+": "+text, message,
			"class", string(class), "failure", text, "records", n, "webhook_id", id, "attempt", first.rec.Attempts,
			"rule", first.rec.Rule, "trace_id", first.trace.TraceID)
	}
	f.mu.Lock()
	stale := b.route != f.route
	f.mu.Unlock()
	switch class {
	case Poison: // it says nothing about any one of them, nor about the destination
	case Gone: // it costs the first record, as it would alone
		if first.p == &j.lane.head {
			first.rec.LastError = text
			first.out = f.failed(class, j, first.rec, attempted{res: res, traceID: first.trace.TraceID})
		}
	default:
		f.mu.Lock()
		f.judge(class, j, res, false) // what is in a batch has nothing but its body
		f.mu.Unlock()
	}

	largest := first
	for i := range b.elements {
		if e := &b.elements[i]; e.sent && e.size > largest.size {
			largest = e
		}
	}
	// What failed together, as often, comes back together.
	share := f.bridge.random()
	for i := range b.elements {
		e := &b.elements[i]
		if !e.sent || class == Gone && e == first {
			continue
		}
		due := time.Now()
		switch class {
		case Poison:
			e.p.alone = !stale && (res.Status != http.StatusRequestEntityTooLarge || e == largest)
		case Configuration: // a 404 may be for what one of them is about
			e.p.alone = !stale
		default:
			// It may be one of them that the destination fails at. The others must not fail with it
			// again and again, until all have left their lanes.
			e.p.alone = class == Retry && !stale && e.rec.Attempts >= togetherAttempts && res.Status != http.StatusTooManyRequests
			wait := f.bridge.schedule.wait(class, e.rec.Attempts, func() float64 { return share })
			if class == Retry && res.RetryAfter > 0 {
				wait = res.RetryAfter
			}
			due = due.Add(wait)
			e.out.due, e.failed = due, class != Gone
		}
		e.out.done = missing(f.bridge.queue.Reschedule(e.p.seq, e.rec.Attempts, due, text))
	}
}

// batchID is the webhook-id of a batch: the same for the same records.
func batchID(ids []string) string {
	sum := sha256.Sum256([]byte(strings.Join(ids, "\n"))) // which no id holds as it is sent
	return "batch-" + hex.EncodeToString(sum[:16])
}

// quotedID is an id as a string of RFC 9651, section 4.1.6. An id as it is sent has
// no other bytes than such a string may have.
func quotedID(id string) string {
	if !strings.ContainsAny(id, `"\`) {
		return `"` + id + `"`
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(id) + `"`
}
