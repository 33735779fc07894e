package sessions

import (
	"maps"
	"strings"
	"sync"
	"time"
)

// Retained holds the broker's retained messages, one a topic name (MQTT 5, 3.3.1.3). The zero value is
// empty. It is safe for concurrent use.
type Retained struct {
	mu   sync.RWMutex
	root level
	n    int
}

// level is a level of a topic name, with those below it.
type level struct {
	message *Message
	below   map[string]*level
}

// Set makes m the message of its topic; one with an empty payload removes what there is [MQTT-3.3.1-6].
func (r *Retained) Set(m *Message) {
	if len(m.Payload) == 0 {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.remove(&r.root, strings.Split(m.Topic, "/"))
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	at := &r.root
	for name := range strings.SplitSeq(m.Topic, "/") {
		next := at.below[name]
		if next == nil {
			next = new(level)
			if at.below == nil {
				at.below = make(map[string]*level, 1)
			}
			at.below[strings.Clone(name)] = next // the packet that it is a part of must not stay
		}
		at = next
	}
	if at.message == nil {
		r.n++
	}
	at.message = m
}

// remove removes the message of the topic name below at, with the levels that nothing else needs.
func (r *Retained) remove(at *level, names []string) {
	if len(names) == 0 {
		if at.message != nil {
			at.message = nil
			r.n--
		}
		return
	}
	next := at.below[names[0]]
	if next == nil {
		return
	}
	r.remove(next, names[1:])
	if next.message == nil && len(next.below) == 0 {
		delete(at.below, names[0])
	}
}

// Len is how many there are, expired ones included until Sweep.
func (r *Retained) Len() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.n
}

// Match returns the messages of the topic names that the filter matches, in no order. The filter must be valid and not a
// shared one.
func (r *Retained) Match(filter string) []*Message {
	now := time.Now()
	var found []*Message
	take := func(at *level) {
		if at.message != nil && !at.message.Expired(now) {
			found = append(found, at.message)
		}
	}
	var match func(at *level, names []string)
	match = func(at *level, names []string) {
		switch {
		case len(names) == 0:
			take(at)
		case names[0] == "#":
			var all func(at *level)
			all = func(at *level) {
				take(at) // the level above # as well (MQTT 5, 4.7.1.2)
				for _, next := range at.below {
					all(next)
				}
			}
			all(at)
		case names[0] == "+":
			for _, next := range at.below {
				match(next, names[1:])
			}
		default:
			if next := at.below[names[0]]; next != nil {
				match(next, names[1:])
			}
		}
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	names := strings.Split(filter, "/")
	if names[0] != "#" && names[0] != "+" {
		match(&r.root, names)
		return found
	}
	for name, next := range r.root.below {
		switch {
		case strings.HasPrefix(name, "$"): // not for a filter that begins with a wildcard [MQTT-4.7.2-1]
		case names[0] == "#":
			match(next, names)
		default:
			match(next, names[1:])
		}
	}
	return found
}

// Get returns the message of a topic name, nil if there is none.
func (r *Retained) Get(topic string) *Message {
	r.mu.RLock()
	defer r.mu.RUnlock()
	at := &r.root
	for name := range strings.SplitSeq(topic, "/") {
		if at = at.below[name]; at == nil {
			return nil
		}
	}
	return at.message
}

// Sweep removes expired messages [MQTT-3.3.2-5] and returns how many.
func (r *Retained) Sweep(now time.Time) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.n
	var sweep func(at *level)
	sweep = func(at *level) {
		if at.message != nil && at.message.Expired(now) {
			at.message = nil
			r.n--
		}
		maps.DeleteFunc(at.below, func(_ string, next *level) bool {
			sweep(next)
			return next.message == nil && len(next.below) == 0
		})
	}
	sweep(&r.root)
	return before - r.n
}
