package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

const (
	// RedriveRate is how many records a second Operator.Retry makes due, in all
	// and whoever asks: a destination that has just come back gets its dead
	// letters beside what is new, not before it.
	RedriveRate = 100
	// redriveBatch is how many of them become due at a time.
	redriveBatch = 50
	// purgeBatch is how many records one flush deletes: few enough that an
	// acknowledgement which shares the flush is not late for it.
	purgeBatch = 500
	// dryBatch is how many are looked at at a time when nothing is changed.
	dryBatch = 1000
	// changeTime is how long one call goes on, a batch aside: within what an
	// HTTP request may take.
	changeTime = 10 * time.Second
	// flushTime is how long a retry waits for room in the flush window, for
	// each record, before it takes the disk for too slow.
	flushTime = 10 * time.Second
)

// An Operator does to the queue what somebody in charge asks for. Its methods
// are safe for concurrent use; their batches take turns.
type Operator struct {
	queue  *outbox.Outbox
	bridge *Bridge       // nil: nothing is being sent
	turn   chan struct{} // holds a value while a batch is under way
	next   time.Time     // no batch of a retry before; of whose turn it is
	limit  time.Duration // changeTime
}

// NewOperator returns the operator of a queue that b sends from. b is nil for
// a queue at rest; then nothing becomes due, and so nothing is rate limited.
func NewOperator(queue *outbox.Outbox, b *Bridge) *Operator {
	return &Operator{queue: queue, bridge: b, turn: make(chan struct{}, 1), limit: changeTime}
}

// List calls each with what f selects, as outbox.Outbox.List does.
func (o *Operator) List(f Filter, each func(Entry) bool) error { return o.queue.List(f, each) }

// Stats counts what is queued and what is dead.
func (o *Operator) Stats() Stats { return o.queue.Stats() }

// Change says what to retry or purge.
type Change struct {
	Filter Filter // Limit is ignored
	DryRun bool   // count, and change nothing
	After  string // Changed.Next of the call that this one goes on after; "": from the start
}

// Changed is what a call has done, or would have.
type Changed struct {
	Destinations map[string]Count
	// Next is not "" if the call came to an end before it was through. With
	// ErrFull it may be there too: then the rest can be gone on with.
	Next string
}

// Count counts records by the state they were in.
type Count struct {
	Queued  int `json:"queued"`
	Dead    int `json:"dead"`
	Damaged int `json:"damaged,omitempty"` // dead letters that can't be read, and so stay
}

// ErrCursor is what the error is when Change.After is no Changed.Next.
var ErrCursor = errors.New("not what an earlier call has returned")

// Retry queues dead letters again, and makes queued records due that wait for
// another attempt. A dead letter keeps its id, publish time and trace context,
// and gets new attempts and a max age that counts from now; of its lane it is
// the last. RedriveRate bounds how fast that goes.
//
// What is changed is on disk when the call returns. It goes on for some ten
// seconds; then Next says that it is not through. What is appended meanwhile
// is left alone. With an error, Changed is what was done all the same: ErrFull
// means that caps of destinations left no room for some of their dead letters,
// while those of others were retried; ErrCursor is the caller's fault, and
// anything else is the store's or ctx's.
func (o *Operator) Retry(ctx context.Context, c Change) (Changed, error) {
	if c.DryRun {
		return o.change(ctx, c, dryBatch, wouldRetry)
	}
	r := retry{o: o, full: map[string]bool{}}
	done, err := o.change(ctx, c, redriveBatch, r.batch)
	if err == nil {
		err = r.fullError()
	}
	return done, err
}

// Purge deletes records and dead letters for good. One that is being sent may
// still arrive. How far a call goes, and its errors, are as with Retry; queued records whose flush
// has failed are purged all the same once the store works again, unless the broker is stopped before.
func (o *Operator) Purge(ctx context.Context, c Change) (Changed, error) {
	if c.DryRun {
		return o.change(ctx, c, dryBatch, wouldPurge)
	}
	return o.change(ctx, c, purgeBatch, o.purge)
}

// batchFunc changes entries, and counts what it has done.
type batchFunc func(ctx context.Context, entries []Entry, done *Changed) error

// change calls do with some of the entries at a time.
func (o *Operator) change(ctx context.Context, c Change, batch int, do batchFunc) (Changed, error) {
	done := Changed{Destinations: map[string]Count{}}
	at := o.queue.Begin()
	if c.After != "" {
		var err error
		if at, err = parseCursor(c.After); err != nil {
			return done, err
		}
	}
	for end := time.Now().Add(o.limit); ; {
		next, more, err := o.step(ctx, c.Filter, at, batch, &done, do)
		if err != nil || !more {
			return done, err
		}
		if at = next; time.Now().After(end) {
			done.Next = formatCursor(at)
			return done, nil
		}
	}
}

// step is one batch.
func (o *Operator) step(ctx context.Context, f Filter, at Cursor, batch int, done *Changed, do batchFunc) (next Cursor, more bool, err error) {
	select {
	case o.turn <- struct{}{}:
		defer func() { <-o.turn }()
	case <-ctx.Done():
		return at, false, ctx.Err()
	}
	if err := ctx.Err(); err != nil {
		return at, false, err
	}
	found, next, more, err := o.queue.Select(f, at, batch)
	if err != nil || len(found) == 0 {
		return next, more, err
	}
	return next, more, do(ctx, found, done)
}

// add counts an entry.
func (c *Changed) add(e Entry) {
	n := c.Destinations[e.Destination]
	if e.Dead {
		n.Dead++
	} else {
		n.Queued++
	}
	c.Destinations[e.Destination] = n
}

// skip counts a dead letter that is too damaged for what was asked.
func (c *Changed) skip(e Entry) {
	n := c.Destinations[e.Destination]
	n.Damaged++
	c.Destinations[e.Destination] = n
}

func wouldPurge(_ context.Context, found []Entry, done *Changed) error {
	for _, e := range found {
		if e.Dead && e.Err != nil && e.Destination == "" { // nobody could tell whose space it gives back
			done.skip(e)
		} else {
			done.add(e)
		}
	}
	return nil
}

func wouldRetry(_ context.Context, found []Entry, done *Changed) error {
	for _, e := range found {
		if e.Dead && e.Err != nil {
			done.skip(e)
		} else {
			done.add(e)
		}
	}
	return nil
}

// purge deletes a batch, and waits until that is on disk.
func (o *Operator) purge(ctx context.Context, found []Entry, done *Changed) error {
	commits := make([]*Commit, len(found))
	for i, e := range found {
		commits[i] = o.queue.Purge(e.Seq, e.Dead)
	}
	var queued []Entry
	var failed error
	for i, e := range found {
		switch err := commits[i].Wait(context.WithoutCancel(ctx)); {
		case errors.Is(err, outbox.ErrNotFound): // delivered, or purged by somebody else
		case errors.Is(err, outbox.ErrDamaged):
			done.skip(e)
		case err != nil:
			failed = err
		default:
			done.add(e)
			if !e.Dead {
				queued = append(queued, e)
			}
		}
	}
	if o.bridge != nil {
		o.bridge.forget(queued)
	}
	return failed
}

// retry is one call of Retry.
type retry struct {
	o     *Operator
	full  map[string]bool // destinations without room: the rest of their dead letters stay, or smaller ones would pass larger ones of their lane
	first error           // of the first of them
}

// fullError is nil if there was room for all.
func (r *retry) fullError() error {
	switch others := len(r.full) - 1; {
	case others <= 0:
		return r.first
	case others == 1:
		return fmt.Errorf("%w; another destination is full too", r.first)
	default:
		return fmt.Errorf("%w; %d other destinations are full too", r.first, others)
	}
}

// batch makes entries due, and waits until that is on disk.
func (r *retry) batch(ctx context.Context, found []Entry, done *Changed) error {
	if err := r.o.pace(ctx); err != nil {
		return err
	}
	commits := make([]*Commit, len(found))
	for i := range found {
		e := &found[i]
		if !e.Dead || e.Err != nil || r.full[e.Destination] {
			continue
		}
		c, err := r.o.requeue(ctx, e.Seq)
		switch full, _ := errors.AsType[*outbox.FullError](err); {
		case err == nil:
			commits[i] = c
		case errors.Is(err, outbox.ErrNotFound): // purged or redriven by somebody else
		case errors.Is(err, outbox.ErrDamaged):
			e.Err = err
		case full != nil && full.Destination != "":
			r.full[full.Destination] = true
			if r.first == nil {
				r.first = err
			}
		default:
			return errors.Join(err, r.o.settle(ctx, found[:i], commits, done))
		}
	}
	return r.o.settle(ctx, found, commits, done)
}

// requeue queues a dead letter again. It waits while too much waits for the disk already.
func (o *Operator) requeue(ctx context.Context, seq uint64) (*Commit, error) {
	for end := time.Now().Add(flushTime); ; {
		c, err := o.queue.Requeue(seq)
		full, _ := errors.AsType[*outbox.FullError](err)
		if full == nil || !full.Unflushed || time.Now().After(end) {
			return c, err
		}
		if err := o.queue.Flush().Wait(ctx); err != nil {
			return nil, err
		}
	}
}

// settle waits until what was queued again is on disk, makes due what was
// queued already, and counts both. The error is that of a commit.
func (o *Operator) settle(ctx context.Context, found []Entry, commits []*Commit, done *Changed) error {
	var failed error
	due := 0
	for i, e := range found {
		switch {
		case e.Dead && e.Err != nil:
			done.skip(e)
		case !e.Dead:
			done.add(e)
		case commits[i] != nil:
			if err := commits[i].Wait(context.WithoutCancel(ctx)); err != nil {
				failed = err
				continue
			}
			done.add(e)
			due++
		}
	}
	if o.bridge != nil {
		due += o.bridge.hurry(found)
		o.next = time.Now().Add(time.Duration(due) * time.Second / RedriveRate)
	}
	return failed
}

// pace waits until another batch may become due.
func (o *Operator) pace(ctx context.Context) error {
	wait := time.Until(o.next)
	if wait <= 0 {
		return nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ofForwarder is some of a destination's queued records.
type ofForwarder struct {
	seqs map[uint64]bool
	keys map[string]bool // their lanes
}

// perForwarder calls fn for each destination that entries are of.
func (b *Bridge) perForwarder(entries []Entry, fn func(*forwarder, ofForwarder)) {
	of := map[string]ofForwarder{}
	for _, e := range entries {
		s, ok := of[e.Destination]
		if !ok {
			s = ofForwarder{map[uint64]bool{}, map[string]bool{}}
			of[e.Destination] = s
		}
		if e.Dead {
			continue
		}
		s.seqs[e.Seq] = true
		if e.Ordered {
			s.keys[e.Lane] = true
		}
	}
	for name, s := range of {
		b.mu.Lock()
		f := b.forwarders[name]
		b.mu.Unlock()
		if f != nil {
			fn(f, s)
		}
	}
}

// forget tells the forwarders of records that were purged.
func (b *Bridge) forget(entries []Entry) {
	b.perForwarder(entries, func(f *forwarder, s ofForwarder) { f.forget(s.seqs, s.keys) })
}

// hurry makes due what waits of the entries, and says how many records that were.
func (b *Bridge) hurry(entries []Entry) (due int) {
	b.perForwarder(entries, func(f *forwarder, s ofForwarder) { due += f.hurry(s.seqs) })
	return due
}

// A cursor's text is its place, the Seqs that are left there, and its time in
// Unix milliseconds, as in "dead-17-240-1764068120000".
const (
	placeQueued = "queued"
	placeDead   = "dead"
)

func formatCursor(c Cursor) string {
	place := placeQueued
	if c.Dead {
		place = placeDead
	}
	return fmt.Sprintf("%s-%d-%d-%d", place, c.From, c.Until, c.At.UnixMilli())
}

func parseCursor(s string) (Cursor, error) {
	place, rest, _ := strings.Cut(s, "-")
	var n [3]uint64
	parts := strings.Split(rest, "-")
	if len(parts) != len(n) || !slices.Contains([]string{placeQueued, placeDead}, place) {
		return Cursor{}, fmt.Errorf("%q: %w", s, ErrCursor)
	}
	for i, p := range parts {
		var err error
		if n[i], err = strconv.ParseUint(p, 10, 63); err != nil {
			return Cursor{}, fmt.Errorf("%q: %w", s, ErrCursor)
		}
	}
	return Cursor{Dead: place == placeDead, From: n[0], Until: n[1], At: time.UnixMilli(int64(n[2]))}, nil
}
