package hooks

import (
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/sessions"
)

// maxCachedTopic is how long a topic name may be that is remembered, in bytes.
const maxCachedTopic = 256

// maxCached bounds the topic names whose subscribers are remembered, and the subscribers of all of them, each counted once a
// topic, at some hundred bytes each.
const maxCached = 128 << 10

// subscriber is a client's session with what decides about a message to it.
type subscriber struct {
	who     auth.Client
	session *sessions.Session
}

// subscribers are those that there are, by client identifier, and who of them a topic name is for. It is
// safe for concurrent use.
type subscribers struct {
	index    *mqtt.TopicsIndex
	clients  *mqtt.Clients
	counters sessions.Counters
	observer func(*subscriber) sessions.Observer // of what is dropped later

	// version changes with whatever the subscribers of a topic name depend on, before the client that has changed it
	// is answered.
	version atomic.Uint64

	mu     sync.RWMutex
	byID   map[string]*subscriber
	topic  map[string]*targets
	cached int // see maxCached
}

func newSubscribers() *subscribers {
	return &subscribers{byID: make(map[string]*subscriber), topic: make(map[string]*targets)}
}

// targets are the subscribers of one topic name.
type targets struct {
	version uint64
	direct  []target
	shared  []*group // one member of each is chosen for each message
}

// group is a shared subscription.
type group struct {
	members []target

	mu   sync.Mutex
	next int // whose turn it is
}

// size is what the cache counts; nil has none.
func (t *targets) size() int {
	if t == nil {
		return 0
	}
	n := 1 + len(t.direct)
	for _, g := range t.shared {
		n += len(g.members)
	}
	return n
}

// target is a subscriber of a topic name.
type target struct {
	*subscriber
	options
	own *options // for what it has published itself, if that is another matter
}

// as are the options that count for the message.
func (t *target) as(m *sessions.Message) *options {
	if t.own != nil && m.Publisher == t.who.ID {
		return t.own
	}
	return &t.options
}

// options are those of a client's subscriptions that match a topic name, taken together.
type options struct {
	none              bool     // no subscription
	qos               byte     // the highest [MQTT-3.3.4-2]
	retainAsPublished bool     // of any
	ids               []uint32 // subscription identifiers, ascending [MQTT-3.3.4-4]
}

func (o *options) add(sub *packets.Subscription) {
	o.none = false
	o.qos = max(o.qos, sub.Qos)
	o.retainAsPublished = o.retainAsPublished || sub.RetainAsPublished
	if sub.Identifier > 0 {
		o.ids = append(o.ids, uint32(sub.Identifier))
		slices.Sort(o.ids)
	}
}

// newTarget takes the subscriptions of one client together. mochi does that too, but not so that the options can be told
// apart: with No Local on one it sends nothing for the others either.
func newTarget(who *subscriber, subs iter.Seq[packets.Subscription]) target {
	t := target{subscriber: who, options: options{none: true}}
	own, local := options{none: true}, false
	for sub := range subs {
		t.add(&sub)
		if sub.NoLocal { // [MQTT-3.8.3-3]
			local = true
		} else {
			own.add(&sub)
		}
	}
	if local {
		t.own = &own
	}
	return t
}

// open is the client's session from now on: the one that there is if it is resumed, else a new one.
func (s *subscribers) open(who auth.Client, resumed bool) *subscriber {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.byID[who.ID]
	if resumed && old != nil {
		if old.who.Listener == who.Listener && old.who.Username == who.Username {
			return old
		}
		// Another name or listener: the session goes on, for whom the ACL knows now.
		sub := &subscriber{who: who, session: old.session}
		sub.session.Observe(s.observer(sub))
		s.byID[who.ID] = sub
		s.version.Add(1)
		return sub
	}
	sub := &subscriber{who: who, session: sessions.New(&s.counters)}
	sub.session.Observe(s.observer(sub))
	s.byID[who.ID] = sub
	if old != nil {
		old.session.End()
		s.version.Add(1)
	} // else nothing can be for it yet
	return sub
}

// close ends a session.
func (s *subscribers) close(sub *subscriber) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub.session.End()
	if now := s.byID[sub.who.ID]; now != nil && now.session == sub.session {
		delete(s.byID, sub.who.ID) // to those who know it as a target still, it takes nothing more
	}
}

// changed says that somebody has subscribed or unsubscribed.
func (s *subscribers) changed() { s.version.Add(1) }

func (s *subscribers) get(id string) *subscriber {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.byID[id]
}

// of are the subscribers of a topic name.
func (s *subscribers) of(topic string) *targets {
	version := s.version.Load() // before the look: what changes meanwhile makes it stale
	s.mu.RLock()
	t := s.topic[topic]
	s.mu.RUnlock()
	if t != nil && t.version == version {
		return t
	}
	t = s.look(topic)
	t.version = version
	if len(topic) > maxCachedTopic {
		return t
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cached += t.size() - s.topic[topic].size()
	for old, was := range s.topic { // any will do
		if s.cached <= maxCached {
			break
		}
		if old != topic {
			delete(s.topic, old)
			s.cached -= was.size()
		}
	}
	s.topic[strings.Clone(topic)] = t // the packet that it is a part of must not stay
	return t
}

// look asks mochi's index.
func (s *subscribers) look(topic string) *targets {
	found := s.index.Subscribers(topic)
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := new(targets)
	for id := range found.Subscriptions {
		if who := s.byID[id]; who != nil {
			t.direct = append(t.direct, newTarget(who, s.matching(id, topic)))
		}
	}
	for _, subs := range found.Shared {
		var members []target
		for id, sub := range subs {
			if who := s.byID[id]; who != nil {
				members = append(members, newTarget(who, func(yield func(packets.Subscription) bool) { yield(sub) }))
			}
		}
		if len(members) > 0 {
			t.shared = append(t.shared, &group{members: members})
		}
	}
	return t
}

// matching are the client's subscriptions that match the topic name, shared ones apart.
func (s *subscribers) matching(id, topic string) iter.Seq[packets.Subscription] {
	return func(yield func(packets.Subscription) bool) {
		cl, ok := s.clients.Get(id)
		if !ok {
			return
		}
		for filter, sub := range cl.State.Subscriptions.GetAll() {
			if matches(filter, topic) && !yield(sub) {
				return
			}
		}
	}
}

// matches reports whether a topic filter that is not a shared one matches a topic name (MQTT 5, 4.7).
func matches(filter, topic string) bool {
	if strings.HasPrefix(topic, "$") && (strings.HasPrefix(filter, "+") || strings.HasPrefix(filter, "#")) {
		return false // [MQTT-4.7.2-1]
	}
	for {
		f, restOfFilter, moreFilter := strings.Cut(filter, "/")
		if f == "#" {
			return true
		}
		name, restOfTopic, moreTopic := strings.Cut(topic, "/")
		if f != "+" && f != name {
			return false
		}
		if !moreTopic {
			return !moreFilter || restOfFilter == "#" // 4.7.1.2
		}
		if !moreFilter {
			return false
		}
		filter, topic = restOfFilter, restOfTopic
	}
}

// choose is the member that gets the next message, of those that may: they take turns, and the sessions of those who are
// offline don't get what somebody could have now (MQTT 5, 4.8.2). It is nil if there is none.
func (g *group) choose(may func(*target) bool) *target {
	g.mu.Lock()
	defer g.mu.Unlock()
	var offline *target
	for i := range g.members {
		at := (g.next + i) % len(g.members)
		switch m := &g.members[at]; {
		case !may(m):
		case m.session.Online():
			g.next = (at + 1) % len(g.members)
			return m
		case offline == nil:
			offline = m
		}
	}
	g.next = (g.next + 1) % len(g.members)
	return offline
}
