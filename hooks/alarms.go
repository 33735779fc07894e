package hooks

import (
	"sync"
	"time"
)

// alarms are what is to be done for clients that are away, at a time of its own for each: at most one thing a client.
// It is safe for concurrent use.
type alarms struct {
	mu     sync.Mutex
	closed bool
	due    map[string]*alarm // by client identifier
}

type alarm struct {
	timer *time.Timer
	do    func()
}

func newAlarms() *alarms { return &alarms{due: make(map[string]*alarm)} }

// after calls do after the delay, in a goroutine of its own, unless take comes first.
func (a *alarms) after(delay time.Duration, id string, do func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	if old := a.due[id]; old != nil {
		old.timer.Stop()
	}
	set := &alarm{do: do}
	a.due[id] = set
	set.timer = time.AfterFunc(delay, func() {
		a.mu.Lock()
		mine := a.due[id] == set
		if mine {
			delete(a.due, id)
		}
		a.mu.Unlock()
		if mine {
			do()
		}
	})
}

// take cancels the client's alarm, and returns what was to be done; nil if there is none.
func (a *alarms) take(id string) (do func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	set := a.due[id]
	if set == nil {
		return nil
	}
	set.timer.Stop()
	delete(a.due, id)
	return set.do
}

// close cancels all, and those to come.
func (a *alarms) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	for _, set := range a.due {
		set.timer.Stop()
	}
	clear(a.due)
}
