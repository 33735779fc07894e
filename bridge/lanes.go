package bridge

import (
	"cmp"
	"container/heap"
	"slices"
	"time"
)

// pending is all that is kept in memory of a record that waits.
type pending struct {
	seq      uint64
	queued   int64  // Unix milliseconds
	attempts uint32 // those made
	refused  uint8  // poison answers, forgotten at a restart; 3 at most
	alone    bool   // it goes in no batch (any more)
	purged   bool   // while it was in somebody's hands
}

// lane is the records of one lane key, or one record without a lane, or that has
// left its own. Its head is the only one that may be attempted, or with it, in the same request, those that
// follow it. A lane is in exactly one place: the
// ready ones, the waiting ones, the overdue ones, or in somebody's hands.
type lane struct {
	key     string
	ordered bool   // false: a record without a lane, in no map
	failing bool   // the head has failed, and holds the lane up
	tried   uint32 // when the head failed last: grace's returns then
	head    pending
	rest    fifo[pending]
	due     time.Time // while it waits
}

// lanes holds the records of one destination that are not done. It knows
// neither time nor policy, and is not safe for concurrent use.
type lanes struct {
	byKey   map[string]*lane
	fresh   fifo[pending] // records without a lane that have not failed since the start
	ready   fifo[*lane]
	waiting laneHeap // whose head failed, by due time
	overdue fifo[*lane]
	flying  map[*lane][]pending // in somebody's hands, and what follows the head there
	records int                 // all of them, those being attempted too
	held    fifo[held]          // heads that have failed, longest first; some are done with
	failing int                 // lanes with such a head
}

// fly notes that a lane, or none, was taken out.
func (ls *lanes) fly(l *lane) *lane {
	if l != nil {
		if ls.flying == nil {
			ls.flying = map[*lane][]pending{}
		}
		ls.flying[l] = nil
	}
	return l
}

// push takes a record in. Records must come in Seq order.
func (ls *lanes) push(key string, ordered bool, p pending) {
	ls.records++
	if !ordered {
		ls.fresh.push(p)
		return
	}
	if l, ok := ls.byKey[key]; ok {
		l.rest.push(p)
		return
	}
	l := &lane{key: key, ordered: true, head: p}
	if ls.byKey == nil {
		ls.byKey = map[string]*lane{}
	}
	ls.byKey[key] = l
	ls.ready.push(l)
}

// due reports whether next has a lane.
func (ls *lanes) due() bool { return ls.fresh.len() > 0 || ls.ready.len() > 0 }

// next takes a ready lane out, nil if there is none. Lanes take turns; between
// them and the records without a lane the older record is first.
func (ls *lanes) next() *lane {
	fresh, ready := ls.fresh.len() > 0, ls.ready.len() > 0
	switch {
	case ready && (!fresh || ls.ready.front().head.seq < ls.fresh.front().seq):
		return ls.fly(ls.ready.pop())
	case fresh:
		return ls.fly(&lane{head: ls.fresh.pop()})
	}
	return nil
}

// lone reports whether next would take out a record that goes alone.
func (ls *lanes) lone() bool {
	if ls.ready.len() == 0 {
		return false
	}
	h := ls.ready.front().head
	return h.alone && (ls.fresh.len() == 0 || h.seq < ls.fresh.front().seq)
}

// enough reports whether there is nothing to wait for: n records are due, heads
// and what follows them, or one that goes alone.
func (ls *lanes) enough(n int) bool {
	n -= ls.fresh.len()
	for _, l := range ls.ready.items[ls.ready.head:] {
		if n <= 0 || l.head.alone {
			return true
		}
		n--
		if !l.failing {
			n -= l.rest.len()
		}
	}
	return n <= 0
}

// gather takes out what can go in one request with the head of l, which is out
// already: n records in all at most. Those are the heads of other ready lanes
// and, where these leave room, by turns what follows each of them; of a lane
// whose head has failed the head alone, since that may leave it at any time. It
// returns l and the other lanes, and how many records that are. Heads that were
// queued before cutoff become overdue.
func (ls *lanes) gather(l *lane, n int, cutoff int64) (out []*lane, records int) {
	out = append(out, l)
	for len(out) < n && ls.due() && !ls.lone() {
		if l = ls.next(); l.head.queued < cutoff {
			delete(ls.flying, l)
			ls.overdue.push(l)
			continue
		}
		out = append(out, l)
	}
	records = len(out)
	for more := true; more && records < n; {
		more = false
		for _, l := range out {
			if l.failing || l.rest.len() == 0 {
				continue
			}
			if p := l.rest.front(); p.alone || p.queued < cutoff {
				continue
			}
			ls.flying[l] = append(ls.flying[l], l.rest.pop())
			more = true
			if records++; records == n {
				break
			}
		}
	}
	return out, records
}

// land puts a lane back that was taken out with what follows its head. Of those
// records kept are left, in order, the first one to be tried again at due; if due is
// zero at once, or overdue if it was queued before cutoff.
func (ls *lanes) land(l *lane, kept []pending, due time.Time, cutoff int64) {
	taken := 1 + len(ls.flying[l])
	if len(kept) == 0 {
		ls.records -= taken - 1
		ls.advance(l, cutoff)
		return
	}
	delete(ls.flying, l)
	ls.records -= taken - len(kept)
	if kept[0].seq != l.head.seq {
		ls.relent(l) // a 410 is held against the head that it is the end of
	}
	l.head = kept[0]
	l.rest.unshift(kept[1:]...)
	if due.IsZero() {
		ls.enqueue(l, cutoff)
	} else {
		ls.wait(l, due)
	}
}

// loosen puts back what follows the head of a lane that was taken out, but not
// the head.
func (ls *lanes) loosen(l *lane) {
	l.rest.unshift(slices.DeleteFunc(ls.flying[l], func(p pending) bool {
		if p.purged {
			ls.records--
		}
		return p.purged
	})...)
	ls.flying[l] = nil
}

// earliest takes out the lane that is due first among the waiting ones, due or
// not; nil if there is none.
func (ls *lanes) earliest() *lane {
	if len(ls.waiting) == 0 {
		return nil
	}
	return ls.fly(heap.Pop(&ls.waiting).(*lane))
}

// expired takes an overdue lane out; there must be one.
func (ls *lanes) expired() *lane { return ls.fly(ls.overdue.pop()) }

// idle reports whether there is nothing to take out.
func (ls *lanes) idle() bool {
	return ls.fresh.len()+ls.ready.len()+ls.overdue.len()+len(ls.waiting) == 0
}

// wait puts a lane back whose head is to be tried again at due.
func (ls *lanes) wait(l *lane, due time.Time) {
	delete(ls.flying, l)
	l.due = due
	heap.Push(&ls.waiting, l)
}

// wake makes the lanes ready that are due at now.
func (ls *lanes) wake(now time.Time) {
	for len(ls.waiting) > 0 && !ls.waiting[0].due.After(now) {
		ls.ready.push(heap.Pop(&ls.waiting).(*lane))
	}
}

// wakeAll makes all waiting lanes ready, the earliest due first.
func (ls *lanes) wakeAll() {
	for len(ls.waiting) > 0 {
		ls.ready.push(heap.Pop(&ls.waiting).(*lane))
	}
}

// advance puts a lane back whose head is done with: overdue if the next record
// was queued before cutoff, else ready. A lane without further records is
// forgotten.
func (ls *lanes) advance(l *lane, cutoff int64) {
	delete(ls.flying, l)
	ls.relent(l)
	ls.records--
	if l.rest.len() > 0 {
		l.head = l.rest.pop()
		ls.enqueue(l, cutoff)
		return
	}
	if l.ordered {
		delete(ls.byKey, l.key)
	}
}

// enqueue puts a lane with a new head in: overdue if that was queued before
// cutoff, else ready.
func (ls *lanes) enqueue(l *lane, cutoff int64) {
	if l.head.queued < cutoff {
		ls.overdue.push(l)
	} else {
		ls.ready.push(l)
	}
}

// wakeOnly makes the waiting lanes ready whose head is in seqs, the oldest
// first, and returns how many.
func (ls *lanes) wakeOnly(seqs map[uint64]bool) int {
	woken := ls.takeWaiting(func(l *lane) bool { return seqs[l.head.seq] })
	slices.SortFunc(woken, func(a, b *lane) int { return cmp.Compare(a.head.seq, b.head.seq) })
	for _, l := range woken {
		ls.ready.push(l)
	}
	return len(woken)
}

// takeWaiting takes out the waiting lanes for which out says so.
func (ls *lanes) takeWaiting(out func(*lane) bool) (taken []*lane) {
	ls.waiting = slices.DeleteFunc(ls.waiting, func(l *lane) bool {
		if !out(l) {
			return false
		}
		taken = append(taken, l)
		return true
	})
	heap.Init(&ls.waiting)
	return taken
}

// drop takes out the records in seqs, which are no more in the queue; ordered
// ones only if keys has their lane. What is in somebody's hands is marked.
func (ls *lanes) drop(seqs map[uint64]bool, keys map[string]bool, cutoff int64) {
	gone := func(p pending) bool { return seqs[p.seq] }
	before := ls.fresh.len()
	ls.fresh.drop(gone)
	ls.records -= before - ls.fresh.len()
	for key := range keys {
		if l, ok := ls.byKey[key]; ok { // what follows a head before the head, so that it can't become one
			before := l.rest.len()
			l.rest.drop(gone)
			ls.records -= before - l.rest.len()
		}
	}
	for l, more := range ls.flying {
		l.head.purged = l.head.purged || seqs[l.head.seq] // the rest of the head is its attempt's now
		for i := range more {
			more[i].purged = more[i].purged || seqs[more[i].seq]
		}
	}
	headless := ls.takeWaiting(func(l *lane) bool { return gone(l.head) })
	for _, f := range []*fifo[*lane]{&ls.ready, &ls.overdue} {
		f.drop(func(l *lane) bool {
			if !gone(l.head) {
				return false
			}
			headless = append(headless, l)
			return true
		})
	}
	for _, l := range headless {
		ls.advance(l, cutoff)
	}
}

// retire makes the lanes overdue whose head was queued before cutoff (Unix
// milliseconds).
func (ls *lanes) retire(cutoff int64) {
	for ls.fresh.len() > 0 && ls.fresh.front().queued < cutoff {
		ls.overdue.push(&lane{head: ls.fresh.pop()})
	}
	out := func(l *lane) bool {
		if l.head.queued >= cutoff {
			return false
		}
		ls.overdue.push(l)
		return true
	}
	ls.ready.drop(out)
	ls.takeWaiting(out)
}

// fifo is a first-in first-out queue.
type fifo[T any] struct {
	items []T
	head  int // items before it are gone
}

func (f *fifo[T]) len() int { return len(f.items) - f.head }

// front returns the first element; there must be one.
func (f *fifo[T]) front() T { return f.items[f.head] }

func (f *fifo[T]) push(v T) {
	if len(f.items) == cap(f.items) && f.head > len(f.items)/2 {
		kept := copy(f.items, f.items[f.head:])
		clear(f.items[kept:])
		f.items, f.head = f.items[:kept], 0
	}
	if n := len(f.items); n == cap(f.items) && n < 256 {
		// append would double it. Most lanes are short, and after an outage there are very many.
		f.items = append(make([]T, 0, n+n/4+1), f.items...)
	}
	f.items = append(f.items, v)
}

// pop takes the first element out; there must be one.
func (f *fifo[T]) pop() T {
	var zero T
	v := f.items[f.head]
	f.items[f.head] = zero // what it points to can be collected
	f.head++
	if f.head == len(f.items) {
		f.items, f.head = f.items[:0], 0
		if cap(f.items) > 4096 { // the room a backlog took is given back
			f.items = nil
		}
	}
	return v
}

// unshift puts elements back before the first one.
func (f *fifo[T]) unshift(vs ...T) {
	if f.head < len(vs) {
		f.items = slices.Insert(f.items, f.head, vs...)
		return
	}
	f.head -= len(vs)
	copy(f.items[f.head:], vs)
}

// drop takes out the elements for which it says so, in order.
func (f *fifo[T]) drop(out func(T) bool) {
	kept := f.items[:0]
	for _, v := range f.items[f.head:] {
		if !out(v) {
			kept = append(kept, v)
		}
	}
	clear(f.items[len(kept):])
	f.items, f.head = kept, 0
}

// laneHeap is a container/heap of lanes by due time; of those that failed
// together the older head is first.
type laneHeap []*lane

func (h laneHeap) Len() int { return len(h) }
func (h laneHeap) Less(i, j int) bool {
	if c := h[i].due.Compare(h[j].due); c != 0 {
		return c < 0
	}
	return h[i].head.seq < h[j].head.seq
}
func (h laneHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *laneHeap) Push(v any)   { *h = append(*h, v.(*lane)) }
func (h *laneHeap) Pop() any {
	old := *h
	l := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return l
}
