package outbox

import "time"

// spaceShare: after a refusal there is space again once a sixteenth of the cap is free, so that those who come back find
// room for more than one record.
const spaceShare = 16

// account counts what one destination, or the whole outbox, has stored.
type account struct {
	name    string
	index   uint16
	records int   // queued
	bytes   int64 // queued or about to be
	dead    int
	// deadBytes count against the cap of the whole, not against a destination's: that bounds an outage.
	deadBytes int64
	// Since the outbox was opened; not kept for the whole.
	appended, purged, purgedDead, redriven uint64

	refused bool // since there was space last

	dropping string    // the cap for which records are dropped, since there was space last; "": none
	untold   uint64    // dropped, and not in the log yet
	told     bool      // the log says that records are dropped
	toldAt   time.Time // since when

	// Of the append that is just being looked at.
	wanted int64      // its bytes
	drop   *FullError // why they are not stored; nil: they are

	order order // queued records; not kept for the whole
}

func (a *account) used() int64 { return a.bytes + a.deadBytes }

func (a *account) leave(size int64) {
	a.records--
	a.bytes -= size
}

func (a *account) bury(size int64) {
	a.dead++
	a.deadBytes += size
}

func (a *account) exhume(size int64) {
	a.dead--
	a.deadBytes -= size
}

// roomy reports whether used is far enough below limit. An empty queue can't get emptier.
func (a *account) roomy(used, limit int64) bool {
	return limit <= 0 || used <= limit-limit/spaceShare || a.records == 0
}

// Space returns a channel that gets a value when appends that were refused may be tried again: after a refusal, once a
// sixteenth of the cap that refused is free again, or its queue is empty; once enough is free on the disk; and after a failure of the store, once that takes
// writes again. It is the same channel in every call, and holds one value.
func (o *Outbox) Space() <-chan struct{} { return o.space }

func (o *Outbox) noticeSpace() {
	back := false
	if o.behind && o.room(capUnflushed, nil) {
		o.behind, back = false, true
	}
	if o.disk.refused && o.room(capDisk, nil) {
		o.disk.refused, back = false, true
	}
	if o.total.refused && o.room(capTotal, nil) {
		o.total.refused, back = false, true
	}
	for _, a := range o.accounts {
		if a.refused && o.room(capDestination, a) {
			a.refused, back = false, true
		}
		if a.dropping != "" && o.room(a.dropping, a) {
			o.dropsNoMore(a)
		}
	}
	if back {
		o.tick()
	}
}

// room reports whether there is space again under a cap, which was passed; a is whose if it is a destination's.
func (o *Outbox) room(which string, a *account) bool {
	switch which {
	case capUnflushed:
		return o.unflushed <= o.o.MaxUnflushed/2
	case capDisk:
		return o.disk.roomy()
	case capTotal:
		return o.total.roomy(o.total.used(), o.o.MaxBytes)
	default:
		return a.roomy(a.bytes, o.caps.of(a.name).MaxBytes)
	}
}

func (o *Outbox) tick() {
	select {
	case o.space <- struct{}{}:
	default:
	}
}

// order is a queue of Seqs, oldest first. Those that are no more alive stay in it until they come to its front, or make up
// more than half of it: dropping one costs the same whatever the length.
type order struct{ seqs []uint64 }

func (q *order) push(seq uint64) { q.seqs = append(q.seqs, seq) }

// first returns the oldest Seq that is alive.
func (q *order) first(alive func(uint64) bool) (seq uint64, ok bool) {
	for len(q.seqs) > 0 && !alive(q.seqs[0]) {
		q.seqs = q.seqs[1:]
	}
	if len(q.seqs) == 0 {
		return 0, false
	}
	return q.seqs[0], true
}

// trim gives memory back if too few of the Seqs are alive; there are n that are.
func (q *order) trim(n int, alive func(uint64) bool) {
	const slack = 64
	if len(q.seqs) <= 2*n+slack {
		return
	}
	seqs := make([]uint64, 0, n+slack)
	for _, seq := range q.seqs {
		if alive(seq) {
			seqs = append(seqs, seq)
		}
	}
	q.seqs = seqs
}

// cache keeps the newest records as they were encoded, since they are usually loaded right after they were appended.
type cache struct {
	max, bytes int64
	values     map[uint64][]byte
	order      order
}

func (c *cache) put(seq uint64, value []byte) {
	c.values[seq] = value
	c.bytes += int64(len(value))
	c.order.push(seq)
	for c.bytes > c.max {
		oldest, ok := c.order.first(c.has)
		if !ok {
			return
		}
		c.drop(oldest)
	}
}

func (c *cache) has(seq uint64) bool {
	_, ok := c.values[seq]
	return ok
}

func (c *cache) drop(seq uint64) {
	value, ok := c.values[seq]
	if !ok {
		return
	}
	delete(c.values, seq)
	c.bytes -= int64(len(value))
	c.order.trim(len(c.values), c.has)
}
