package hooks

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/sessions"
)

// maxCachedTopics bounds the topic names whose subscribers are remembered, at some hundred bytes each.
const maxCachedTopics = 16 << 10

// subscriber is a client's session with what decides about a message to it.
type subscriber struct {
	who     auth.Client
	session *sessions.Session
}

// subscribers are those that there are, by client identifier, and who of them a topic name is for. It is
// safe for concurrent use.
type subscribers struct {
	index    *mqtt.TopicsIndex
	counters sessions.Counters

	// version changes with whatever the subscribers of a topic name depend on, before the client that has changed it
	// is answered.
	version atomic.Uint64

	mu    sync.RWMutex
	byID  map[string]*subscriber
	topic map[string]*targets
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
	turn    atomic.Uint64
}

// target is a subscriber of a topic name, with the options of its subscriptions that match, taken together.
type target struct {
	*subscriber
	qos               byte
	noLocal           bool
	retainAsPublished bool
	ids               []uint32 // subscription identifiers, ascending
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
		s.byID[who.ID] = sub
		s.version.Add(1)
		return sub
	}
	sub := &subscriber{who: who, session: sessions.New(&s.counters)}
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
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.topic) >= maxCachedTopics {
		for old := range s.topic { // any will do
			delete(s.topic, old)
			break
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
	for id, sub := range found.Subscriptions {
		if who := s.byID[id]; who != nil {
			target := target{subscriber: who, qos: sub.Qos, noLocal: sub.NoLocal, retainAsPublished: sub.RetainAsPublished}
			for _, identifier := range sub.Identifiers {
				target.identify(identifier)
			}
			slices.Sort(target.ids)
			t.direct = append(t.direct, target)
		}
	}
	for _, subs := range found.Shared {
		var members []target
		for id, sub := range subs {
			if who := s.byID[id]; who != nil {
				target := target{subscriber: who, qos: sub.Qos, retainAsPublished: sub.RetainAsPublished}
				target.identify(sub.Identifier)
				members = append(members, target)
			}
		}
		if len(members) > 0 {
			t.shared = append(t.shared, &group{members: members})
		}
	}
	return t
}

func (t *target) identify(subscription int) {
	if subscription > 0 {
		t.ids = append(t.ids, uint32(subscription))
	}
}

// choose is the member that gets the next message: they take turns, and the sessions of those who are offline
// don't get what somebody could have now (MQTT 5, 4.8.2).
func (g *group) choose() *target {
	n := len(g.members)
	turn := int(g.turn.Add(1) % uint64(n))
	for i := range n {
		if m := &g.members[(turn+i)%n]; m.session.Online() {
			return m
		}
	}
	return &g.members[turn]
}
