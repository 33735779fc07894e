package store

import (
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
)

const (
	// lazyDelay bounds how long lazy writes wait for a flush that somebody else needs.
	lazyDelay = 50 * time.Millisecond

	// Before a flush, those that the last one has woken get the processor gatherYields times, and again whenever one of
	// them has written, for gatherTime at most. Without it some of them miss the flush: with 64 waiting writers that is a
	// fifth fewer writes a second, each for a third more CPU.
	gatherYields = 32
	gatherTime   = time.Millisecond

	// fillPercent leaves little room in a page that has become full. Most keys ascend, and bbolt's 50 % would leave
	// every page half empty for good.
	fillPercent = 0.9

	// keptOps is how many operations the buffer that is used for every flush may hold on to.
	keptOps = 1 << 14
)

// An Op puts a value, or deletes a key if Value is nil. Deleting what isn't there is no error. Key and Value belong to the
// store until the commit is done.
type Op struct {
	Bucket     string
	Key, Value []byte
}

// A Request is a set of operations that are flushed together.
type Request struct {
	Ops []Op
	// Lazy requests don't cause a flush of their own: they join one that is needed anyway, or one after 50 ms.
	Lazy bool
	// Applied, if set, is called once with the outcome, on the committer's goroutine, in the order of the requests,
	// before Commit.Done is closed. It must not block.
	Applied func(error)
}

// Write asks for ops to be flushed, all or none, and returns at once with the commit they joined. The order of calls is
// the order in which operations are applied. How much is waiting for a flush is not limited here. When a flush has
// failed, the commits of later writes fail at once, with the error of Err, until the file was opened anew.
func (s *Store) Write(ops []Op) *Commit { return s.Do(Request{Ops: ops}) }

// Do is Write with a say in how. A request that can't be carried out at all, because of an unknown bucket or the size of a
// key, or because the store is closed, fails alone; its Applied runs on a goroutine of its own then.
func (s *Store) Do(r Request) *Commit {
	if err := s.check(r.Ops); err != nil {
		return s.reject(r, err)
	}
	c := &s.committer
	c.mu.Lock()
	if c.stopping {
		c.mu.Unlock()
		return s.reject(r, ErrClosed)
	}
	b := c.next
	if len(b.requests) == 0 {
		b.first = time.Now()
	}
	b.requests = append(b.requests, r)
	if !r.Lazy {
		b.urgent++
	}
	commit := b.commit
	wake := len(b.requests) == 1 || b.urgent == 1 && !r.Lazy
	c.mu.Unlock()
	if wake {
		c.signal()
	}
	return commit
}

func (s *Store) reject(r Request, err error) *Commit {
	c := newCommit()
	go func() {
		if r.Applied != nil {
			r.Applied(err)
		}
		c.complete(err)
	}()
	return c
}

// Err is the reason for which nothing is written, nil if there is none. A flush that has failed is one: what the disk
// holds is known again only once the file has been opened anew. That is tried until it succeeds, first after
// Options.ReopenAfter. If it does, nothing of the failed flush is in the file, even if the disk has taken it; if it
// doesn't, the error says why.
func (s *Store) Err() error {
	if err := s.committer.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// A batch is what the next flush will hold.
type batch struct {
	commit   *Commit
	requests []Request
	first    time.Time // when the first of them came
	urgent   int       // those that aren't lazy
}

// OnReopen has fn called each time that writing goes on after a failed flush, once all that had failed was told so, and
// before anything that is written from then on is flushed. It runs on the committer's goroutine: it must not block, but may
// call Do. What failed is to be written again by whom it concerns. Call it before the first write.
func (s *Store) OnReopen(fn func()) { s.committer.onReopen = append(s.committer.onReopen, fn) }

// committer is the part of a Store that its one writing goroutine and those who queue for it share.
type committer struct {
	s    *Store
	wake chan struct{}

	mu       sync.Mutex
	next     *batch
	stopping bool

	failed   atomic.Pointer[error]
	stopped  chan struct{} // when stopping is set
	closed   chan struct{} // when the goroutine has ended and the file is closed
	closeErr error

	// Of the goroutine alone, or of reopen while that runs.
	onReopen  []func()
	spare     []Request     // for the batch after the next
	flushed   uint64        // the number of the newest flush that has succeeded
	wait      time.Duration // before the file is opened anew
	reopening sync.WaitGroup
	reopened  chan struct{} // gets a value when the file is open again
}

func (c *committer) start(s *Store) {
	c.s = s
	c.wake = make(chan struct{}, 1)
	c.wait = s.o.ReopenAfter
	c.reopened = make(chan struct{}, 1)
	c.stopped = make(chan struct{})
	c.closed = make(chan struct{})
	c.next = &batch{commit: newCommit()}
	go c.run()
}

func (c *committer) stop() {
	c.mu.Lock()
	if !c.stopping {
		c.stopping = true
		close(c.stopped)
	}
	c.mu.Unlock()
	c.signal()
}

func (c *committer) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *committer) run() {
	for b := c.take(); b != nil; b = c.take() {
		before := c.s.Err()
		err := c.commit(b)
		c.finish(b, err)
		if before == nil && err != nil {
			c.reopening.Go(c.reopen)
		}
	}
	c.reopening.Wait()
	c.closeErr = c.s.closeFile()
	close(c.closed)
}

// take waits until a flush is due and returns what goes into it, nil when the store stops and all is flushed.
func (c *committer) take() *batch {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait := time.Hour
		c.mu.Lock()
		switch n := len(c.next.requests); {
		case n == 0 && c.stopping:
			c.mu.Unlock()
			return nil
		case n > 0:
			wait = lazyDelay - time.Since(c.next.first)
			if c.next.urgent > 0 || c.stopping || wait <= 0 || c.s.Err() != nil {
				c.mu.Unlock()
				return c.gather()
			}
		}
		c.mu.Unlock()
		timer.Reset(wait)
		select {
		case <-c.wake:
		case <-timer.C:
		case <-c.reopened:
			c.resume()
		}
	}
}

// gather takes what is queued, once those who are about to write have done so.
func (c *committer) gather() *batch {
	end := time.Now().Add(gatherTime)
	for seen, quiet := c.urgent(), 0; quiet < gatherYields && time.Now().Before(end); quiet++ {
		runtime.Gosched()
		if n := c.urgent(); n != seen {
			seen, quiet = n, 0
		}
	}
	return c.cut()
}

// cut ends the batch that requests are queued in, and returns it.
func (c *committer) cut() *batch {
	next := &batch{commit: newCommit(), requests: c.spare}
	c.mu.Lock()
	b := c.next
	c.next = next
	c.mu.Unlock()
	c.spare = nil
	return b
}

// urgent is how many requests somebody waits for.
func (c *committer) urgent() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.next.urgent
}

// commit flushes a batch. It never uses the open file again after an error: what a failed write or flush has left there is
// unknown, and a second flush that succeeds would prove nothing about the first one's pages.
func (c *committer) commit(b *batch) error {
	if err := c.s.Err(); err != nil {
		return err
	}
	start := time.Now()
	if err := c.flush(b); err != nil {
		err = fmt.Errorf("write to store %s: %w", c.s.path, err)
		c.failed.Store(&err)
		c.s.log.Error("store has failed and takes no writes until it is open again", slog.String("path", c.s.path), slog.Any("error", err))
		return err
	}
	c.wait = c.s.o.ReopenAfter
	c.s.metrics.flushed(time.Since(start), len(b.requests))
	return nil
}

func (c *committer) flush(b *batch) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	var tx *bbolt.Tx
	defer func() {
		if r := recover(); r != nil {
			err = &CorruptError{Path: c.s.path, Reason: fmt.Sprint(r)}
			if tx != nil {
				_ = tx.Rollback() // gives up the lock that Close needs
			}
		}
	}()
	if tx, err = c.s.db.Load().Begin(true); err != nil {
		return err
	}
	number := uint64(tx.ID())
	if err := apply(tx, b.requests); err != nil {
		_ = tx.Rollback() // nothing was written: the reason is what counts
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	c.flushed = number
	return nil
}

func apply(tx *bbolt.Tx, requests []Request) error {
	var bucket *bbolt.Bucket
	var name string
	for _, r := range requests {
		for _, op := range r.Ops {
			if bucket == nil || name != op.Bucket {
				name = op.Bucket
				bucket = tx.Bucket([]byte(name))
				bucket.FillPercent = fillPercent
			}
			var err error
			if op.Value == nil {
				err = bucket.Delete(op.Key)
			} else {
				err = bucket.Put(op.Key, op.Value)
			}
			if err != nil {
				return fmt.Errorf("bucket %s: %w", name, err)
			}
		}
	}
	return nil
}

// finish tells everybody how a batch ended and keeps its buffer for the next but one.
func (c *committer) finish(b *batch, err error) {
	for _, r := range b.requests {
		if r.Applied != nil {
			r.Applied(err)
		}
	}
	b.commit.complete(err)
	if cap(b.requests) <= keptOps {
		clear(b.requests)
		c.spare = b.requests[:0]
	}
}
