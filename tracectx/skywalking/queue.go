package skywalking

import (
	"context"
	"sync"
)

// DropReason says why a segment was not reported: a fixed set, fit for a metric label.
type DropReason string

// Why segments are dropped.
const (
	DropQueueFull DropReason = "queue_full" // no room in MaxSegments or MaxBytes
	DropTooLarge  DropReason = "too_large"  // a segment of more than 1 MiB
	DropInvalid   DropReason = "invalid"    // cannot be encoded
	DropRejected  DropReason = "rejected"   // the collector says that it will never take it
	DropClosed    DropReason = "closed"     // before Boot, after Close, or unconfirmed when Close gave up

	// DropUnsupported is a meter or a log, which are not reported.
	DropUnsupported DropReason = "unsupported"
)

// DropReasons lists every reason.
func DropReasons() []DropReason {
	return []DropReason{DropQueueFull, DropTooLarge, DropInvalid, DropRejected, DropClosed, DropUnsupported}
}

// Stats are the reporter's accounts. At any moment
// Offered = Sent + the sum of Dropped + Queued.
type Stats struct {
	Offered     uint64 // segments handed to SendTracing
	Sent        uint64 // confirmed by the collector
	Dropped     map[DropReason]uint64
	Queued      int   // waiting, or sent and not confirmed yet
	QueuedBytes int64 // encoded size of those
}

// frame is an encoded segment.
type frame []byte

// queue holds the frames that the collector has not confirmed, oldest first, and
// keeps the accounts. Any number of goroutines put; one takes.
type queue struct {
	maxFrames int
	maxBytes  int64
	ready     chan struct{} // has a token when there may be something to take

	mu      sync.Mutex
	moved   sync.Cond // a frame left, or a waiter's context ended
	frames  []frame
	bytes   int64
	left    uint64 // frames that were in the queue and left it
	closed  bool
	offered uint64
	sent    uint64
	dropped map[DropReason]uint64
}

func newQueue(maxFrames int, maxBytes int64) *queue {
	q := &queue{
		maxFrames: maxFrames,
		maxBytes:  maxBytes,
		ready:     make(chan struct{}, 1),
		dropped:   make(map[DropReason]uint64),
	}
	q.moved.L = &q.mu
	return q
}

// put appends f, or counts why it doesn't. It never waits for room.
func (q *queue) put(f frame) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.offered++
	if why := q.refusal(len(f)); why != "" {
		q.dropped[why]++
		return
	}
	q.frames = append(q.frames, f)
	q.bytes += int64(len(f))
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

// turnAway reports whether no frame at all can come in now, and then counts one as
// dropped: a segment needn't be encoded to be dropped.
func (q *queue) turnAway() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	why := q.refusal(1)
	if why == "" {
		return false
	}
	q.offered++
	q.dropped[why]++
	return true
}

func (q *queue) refusal(size int) DropReason {
	switch {
	case q.closed:
		return DropClosed
	case len(q.frames) >= q.maxFrames || q.bytes+int64(size) > q.maxBytes:
		return DropQueueFull
	default:
		return ""
	}
}

// refuse counts a segment that never comes into the queue.
func (q *queue) refuse(why DropReason) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.offered++
	q.dropped[why]++
}

// head returns the oldest frames, at least one if there is any, up to so many and so
// many bytes. They stay in the queue until confirm or drop, and may be read until then.
func (q *queue) head(frames, bytes int) []frame {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for size := 0; n < min(frames, len(q.frames)); n++ {
		if size += len(q.frames[n]); size > bytes && n > 0 {
			break
		}
	}
	return q.frames[:n:n]
}

// confirm takes the n oldest frames away as sent.
func (q *queue) confirm(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.sent += uint64(n)
	q.remove(n)
}

// drop takes the n oldest frames away unsent.
func (q *queue) drop(n int, why DropReason) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dropped[why] += uint64(n)
	q.remove(n)
}

func (q *queue) remove(n int) {
	for _, f := range q.frames[:n] {
		q.bytes -= int64(len(f))
	}
	clear(q.frames[:n]) // the array lives on under the rest
	q.frames = q.frames[n:]
	q.left += uint64(n)
	q.moved.Broadcast()
}

// close makes put refuse.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
}

// wait blocks until every frame that is in the queue now has left it, or ctx ends;
// it returns how many of them are still there.
func (q *queue) wait(ctx context.Context) uint64 {
	stop := context.AfterFunc(ctx, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.moved.Broadcast()
	})
	defer stop()
	q.mu.Lock()
	defer q.mu.Unlock()
	last := q.left + uint64(len(q.frames))
	for q.left < last && ctx.Err() == nil {
		q.moved.Wait()
	}
	return last - min(q.left, last)
}

func (q *queue) stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := Stats{
		Offered:     q.offered,
		Sent:        q.sent,
		Dropped:     make(map[DropReason]uint64, len(q.dropped)),
		Queued:      len(q.frames),
		QueuedBytes: q.bytes,
	}
	for _, why := range DropReasons() {
		s.Dropped[why] = q.dropped[why]
	}
	return s
}
