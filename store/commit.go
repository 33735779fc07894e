package store

import (
	"context"
	"sync"
)

// A Commit is one flush, shared by all whose writes joined it.
type Commit struct {
	done chan struct{}

	mu       sync.Mutex
	err      error
	watchers []func(error)
}

func newCommit() *Commit { return &Commit{done: make(chan struct{})} }

// Completed returns a commit that is done, for what has no need of a flush, or is refused before it gets to a store.
func Completed(err error) *Commit {
	c := newCommit()
	c.complete(err)
	return c
}

// Done is closed when the flush has ended, well or badly.
func (c *Commit) Done() <-chan struct{} { return c.done }

// Err says how the flush ended; it is valid once Done is closed, and nil before.
func (c *Commit) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Wait waits for the end of the flush and returns its error, or ctx's if that ends first. The flush goes on then.
func (c *Commit) Wait(ctx context.Context) error {
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Watch calls fn once with the flush's error: on the committer's goroutine right after Done has been closed, so that it
// must not block, or at once if that was before.
func (c *Commit) Watch(fn func(error)) {
	c.mu.Lock()
	select {
	case <-c.done:
		c.mu.Unlock()
		fn(c.err)
	default:
		c.watchers = append(c.watchers, fn)
		c.mu.Unlock()
	}
}

func (c *Commit) complete(err error) {
	c.mu.Lock()
	c.err = err
	close(c.done)
	watchers := c.watchers
	c.watchers = nil
	c.mu.Unlock()
	for _, fn := range watchers {
		fn(err)
	}
}
