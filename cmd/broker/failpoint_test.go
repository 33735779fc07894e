package main

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"github.com/throughline-mqtt/throughline/bridge"
)

// failpointVar names the variable that tells a broker of the test program where to kill itself: POINT:N, at the Nth time.
const failpointVar = "THROUGHLINE_TEST_FAILPOINT"

// The points on the way of a publish at which a broker can be killed.
const (
	beforeWrite  = "before the write"
	beforeFlush  = "written, not flushed"
	beforeAck    = "flushed, not acknowledged"
	afterAck     = "acknowledged" // what a client has read: the test kills the broker itself
	beforeRemove = "answered, not removed"
	afterRemove  = "removed"
	beforeBury   = "refused for good, no dead letter yet"
	afterBury    = "dead letter"
)

// failpoint is where a broker kills itself.
type failpoint struct {
	point string
	left  atomic.Int64
	self  *os.Process
}

// failAt arms the failpoint that spec is about; none if it is empty.
func (c *cli) failAt(spec string) error {
	if spec == "" {
		return nil
	}
	var n int64
	point, count, _ := strings.Cut(spec, ":")
	if _, err := fmt.Sscan(count, &n); err != nil || n < 1 {
		return fmt.Errorf("failpoint %q: no count", spec)
	}
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		return fmt.Errorf("failpoint %q: %w", spec, err)
	}
	f := &failpoint{point: point, self: self}
	f.left.Store(n)
	switch point {
	case beforeWrite, beforeFlush:
		return watchDisk(func(flush bool) {
			if flush == (point == beforeFlush) {
				f.pass()
			}
		})
	case beforeAck, beforeRemove, afterRemove, beforeBury, afterBury:
		c.around = func(q bridge.Queue) bridge.Queue { return &failingQueue{q, f} }
		return nil
	}
	return fmt.Errorf("failpoint %q: unknown", spec)
}

// pass kills the process if it is the last time.
func (f *failpoint) pass() {
	if f.left.Add(-1) == 0 {
		f.self.Kill()
		select {} // the signal comes when it comes, and nothing happens here until it does
	}
}

// failingQueue is an outbox with a failpoint.
type failingQueue struct {
	bridge.Queue
	f *failpoint
}

func (q *failingQueue) Append(recs []bridge.Record) (*bridge.Commit, error) {
	c, err := q.Queue.Append(recs)
	if err != nil {
		return c, err
	}
	return q.after(beforeAck, c), nil // the ack gate comes to watch after us, so it is told after us
}

func (q *failingQueue) Remove(seq uint64) *bridge.Commit {
	q.before(beforeRemove)
	return q.after(afterRemove, q.Queue.Remove(seq))
}

func (q *failingQueue) Bury(seq uint64, d bridge.DeadLetter) *bridge.Commit {
	q.before(beforeBury)
	return q.after(afterBury, q.Queue.Bury(seq, d))
}

func (q *failingQueue) before(point string) {
	if q.f.point == point {
		q.f.pass()
	}
}

// after passes the point when c is on disk.
func (q *failingQueue) after(point string, c *bridge.Commit) *bridge.Commit {
	if q.f.point == point {
		c.Watch(func(err error) {
			if err == nil {
				q.f.pass()
			}
		})
	}
	return c
}
