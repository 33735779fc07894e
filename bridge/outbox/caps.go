package outbox

import (
	"maps"
	"time"
)

// A Cap bounds the queued records of one destination, its dead letters aside.
type Cap struct {
	MaxBytes int64 // 0: none
	// Drop has records dropped for which there is no room: what is appended together with them is stored nevertheless.
	// Otherwise all of it is refused.
	Drop bool
}

// Caps are those of all destinations.
type Caps struct {
	Default Cap            // of those that Of doesn't have
	Of      map[string]Cap // by name; not changed once it was handed over
}

func (c Caps) of(destination string) Cap {
	if own, ok := c.Of[destination]; ok {
		return own
	}
	return c.Default
}

// SetCaps replaces all caps at once. If they have changed, and appends were refused since there was space last, those may be
// tried again: Space says so. What is stored stays, also beyond a lower cap.
func (o *Outbox) SetCaps(c Caps) {
	o.mu.Lock()
	defer o.unlock()
	old := o.caps
	o.caps = c
	o.met.define(old, c)
	if old.Default == c.Default && maps.Equal(old.Of, c.Of) {
		return
	}
	waiting := o.behind || o.disk.refused || o.total.refused
	o.behind, o.disk.refused, o.total.refused = false, false, false
	for _, a := range o.accounts {
		waiting = waiting || a.refused
		a.refused = false
		if a.dropping != "" && !c.of(a.name).Drop {
			o.dropsNoMore(a)
		}
	}
	if waiting {
		o.tick()
	}
	o.noticeSpace()
}

// dropLines is the least time between two lines in the log that say that records of a destination are dropped: at the edge
// of its cap that begins and ends with every record.
const dropLines = 10 * time.Second

// dropped counts a record of a destination that is not stored because of full, and says so when that begins.
func (o *Outbox) dropped(a *account, full *FullError) {
	o.met.drop(a.name)
	a.untold++
	a.dropping = full.cap()
	if now := o.o.Now(); !a.told && now.Sub(a.toldAt) >= dropLines {
		a.told, a.toldAt = true, now
		o.later(func() {
			o.o.Logger.Error("dropping records, their publishes are acknowledged", "destination", a.name, "error", full)
		})
	}
}

// dropsNoMore is called when there is room again for the records of a destination.
func (o *Outbox) dropsNoMore(a *account) {
	a.dropping = ""
	if !a.told { // there was no line about the beginning: the next ones count these drops too
		return
	}
	n := a.untold
	a.told, a.untold = false, 0
	o.later(func() {
		o.o.Logger.Info("storing records again", "destination", a.name, "dropped", n)
	})
}

// later has fn called once the outbox is unlocked: a log that is slow must hold up no more than its own caller.
func (o *Outbox) later(fn func()) { o.afterwards = append(o.afterwards, fn) }

// unlock unlocks the outbox, and then does what was put off until later.
func (o *Outbox) unlock() {
	todo := o.afterwards
	o.afterwards = nil
	o.mu.Unlock()
	for _, fn := range todo {
		fn()
	}
}
