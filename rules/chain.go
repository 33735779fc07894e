package rules

import (
	"errors"
	"fmt"
	"strings"
)

// Bounds of a chain, beside MaxRows. What is beyond them is refused, which is
// counted: a rule that a vehicle can make multiply must not take the broker's memory.
const (
	maxPublished      = 1000     // messages
	maxPublishedBytes = 16 << 20 // of those messages, the texts of their properties included
	maxRepublishes    = 8        // behind a message, for rules to run on it
	maxRefused        = 1000     // that are told, not only counted

	// maxWasted bounds what comes of rules that fail late, on each of many messages: it takes
	// about a second.
	maxWasted = 4 * maxBodies
)

// Chain is all that one publish or event has set off: the rules that select from
// it, those that select from what these republish, and so on.
type Chain struct {
	// Matches are the rules that fired, in the order in which they ran: those of
	// the publish itself, most specific filter first, then those of each of Published.
	Matches []Match
	// Published are the messages to be published, in the order in which they were
	// made. Rules have run on them already.
	Published []Published
	// Refused is what the rules were kept from, the first 1,000 of it.
	Refused []Refusal
}

// Match is a rule that fired, and what it owes: a delivery for each row and action,
// the rows in their order, and the actions in theirs within a row.
type Match struct {
	Rule       *Rule
	Rows       int // of SELECT one, of FOREACH at least one
	Deliveries []Delivery
	// On is the place in Chain.Published of the message that the rule fired on; -1
	// for the publish or event itself.
	On int
}

// Published is a message that a rule republishes. It shares no memory with the
// publish. Its publisher is that of the publish, as far as rules see it.
type Published struct {
	*Message
	By int // the place in Chain.Matches of the rule that made it
}

// Refusal is something that a rule was kept from. The rule's outcomes count it.
type Refusal struct {
	Rule *Rule
	Why  Outcome // LoopRefused, NotRepublished, TooManyRows, RenderFailed or HeaderLeftOut
	Text string  // for people
}

// Run runs the candidates on a message, and the rules that what they republish
// leads to. A rule that fails is counted and has not fired, whatever rows it had
// before; so has one that does not fit into MaxRows with those before it. newID makes
// the ids of messages that are republished; nil: they have none.
func (s *Set) Run(cands []*Rule, m *Message, newID func() string) Chain {
	return s.run(cands, m, m.Payload, newID)
}

// RunEvent is Run for an event and its candidates.
func (s *Set) RunEvent(cands []*Rule, ev *Event, newID func() string) Chain {
	return s.run(cands, ev, ev.payload(), newID)
}

func (s *Set) run(cands []*Rule, of row, payload []byte, newID func() string) Chain {
	if len(cands) == 0 {
		return Chain{}
	}
	c := chain{env: s.envs.Get().(*env), origin: of, newID: newID, room: MaxRows, watch: s.watch}
	c.env.spent = 0
	c.on(-1, cands, of, payload)
	for i := 0; i < len(c.Published); i++ { // which grows meanwhile
		var room [8]*Rule
		m := c.Published[i].Message
		c.on(i, s.Candidates(room[:0], m.Topic), m, m.Payload)
	}
	c.env.start("")
	c.env.reset(nil, nil)
	s.envs.Put(c.env)
	return c.Chain
}

// chain is one that is being made.
type chain struct {
	Chain
	env    *env
	origin row
	newID  func() string
	room   int    // for rows
	bytes  int    // of the messages that were made, published or not
	wasted int    // bytes that rules had made of republished messages and then failed
	lost   uint64 // messages that the rule at hand could not publish
	watch  *watch // nil: nobody watches
}

// on runs the candidates on one message: that at i of Published, or the origin.
func (c *chain) on(i int, cands []*Rule, of row, payload []byte) {
	e := c.env
	e.reset(of, payload)
	for _, r := range cands {
		e.start(r.Name)
		rows, err := c.fire(r, i)
		r.outcomes.count(rows > 0, err, e)
		if c.watch != nil {
			c.watch.ran(r, i, rows, err, e)
		}
		if f, _ := errors.AsType[*fault](err); f != nil && (f.outcome == LoopRefused || f.outcome == TooManyRows || f.outcome == RenderFailed) {
			c.refuse(r, f.outcome, f.message)
		}
	}
}

// fire runs one rule, and answers how many rows it has. If it fails, nothing of it
// stays in the chain.
func (c *chain) fire(r *Rule, i int) (rows int, err error) {
	e, published, refused, bytes, spent := c.env, len(c.Published), len(c.Refused), c.bytes, c.env.spent
	c.lost = 0
	m := Match{Rule: r, On: i}
	var ok bool
	for ok, err = r.first(e); ok && err == nil; ok, err = r.next(e) {
		if rows == 0 && i >= 0 {
			if err = c.comesFrom(r, i); err != nil {
				break
			}
		}
		if rows++; rows > c.room {
			err = tooManyRows(c.room)
			break
		}
		if c.watch != nil {
			c.watch.row(e)
		}
		if i >= 0 && c.wasted > maxWasted {
			err = renderFailed("rules that failed before it have made more than %d bytes of what one publish leads to", maxWasted)
			break
		}
		if m.Deliveries, err = r.deliver(e, m.Deliveries); err != nil {
			break
		}
		c.republish(r)
	}
	if err != nil {
		if i >= 0 {
			c.wasted += e.spent - spent + c.bytes - bytes
		}
		e.missing, e.leftOut, e.spent = false, false, spent // nothing is sent that could lack it
		c.Published, c.Refused, c.bytes = c.Published[:published], c.Refused[:refused], bytes
		return 0, err
	}
	if rows > 0 {
		m.Rows = rows
		c.Matches = append(c.Matches, m)
		c.tellLeftOut(&m)
		c.room -= rows
		r.outcomes.NotRepublished.Add(c.lost)
	}
	return rows, nil
}

func (c *chain) tellLeftOut(m *Match) {
	for i := range m.Deliveries {
		d := &m.Deliveries[i]
		for _, name := range d.LeftOut {
			c.refuse(m.Rule, HeaderLeftOut, fmt.Sprintf("header %s for destination %s holds a line break or another control character", name, quote(d.Destination)))
		}
	}
}

func (c *chain) refuse(r *Rule, why Outcome, text string) {
	if len(c.Refused) < maxRefused {
		c.Refused = append(c.Refused, Refusal{Rule: r, Why: why, Text: text})
	}
}

// comesFrom is a fault if the message at i was led to by the rule itself, or has too
// many republishes behind it.
func (c *chain) comesFrom(r *Rule, i int) error {
	var way []string
	loop := false
	for at := i; at >= 0; {
		by := &c.Matches[c.Published[at].By]
		loop = loop || by.Rule == r
		way = append(way, by.Rule.Name)
		at = by.On
	}
	switch {
	case loop:
		return &fault{LoopRefused, "the message comes from the rule itself, by way of " + path(way)}
	case len(way) > maxRepublishes:
		return &fault{LoopRefused, fmt.Sprintf("more than %d republishes, by way of %s", maxRepublishes, path(way))}
	}
	return nil
}

// path is the way of a message through rules, whose names are given last first.
func path(names []string) string {
	var b strings.Builder
	for i := len(names) - 1; i >= 0; i-- {
		fmt.Fprintf(&b, "%s -> ", names[i])
	}
	return strings.TrimSuffix(b.String(), " -> ")
}

// republish makes the messages of the row that the rule has just put out. The rule's
// match is the next of Matches.
func (c *chain) republish(r *Rule) {
	for i := range r.republishes {
		m, wrong := c.message(&r.republishes[i])
		if wrong != "" {
			c.lost++
			c.refuse(r, NotRepublished, wrong)
			continue
		}
		c.publisher(m)
		c.Published = append(c.Published, Published{Message: m, By: len(c.Matches)})
	}
}

// message makes a message for which there is room; wrong says why there is none.
// After one that was too much none is made: a thousand of 8 MiB each would take
// minutes to be thrown away.
func (c *chain) message(r *republish) (m *Message, wrong string) {
	switch {
	case len(c.Published) == maxPublished:
		return nil, tooManyMessages
	case c.bytes > maxPublishedBytes:
		return nil, tooManyBytes
	}
	m, size, wrong := r.message(c.env)
	if c.bytes += size; wrong == "" && c.bytes > maxPublishedBytes {
		return nil, tooManyBytes
	}
	return m, wrong
}

// What is said of messages beyond the bounds.
var (
	tooManyMessages = fmt.Sprintf("more than %d messages of one publish", maxPublished)
	tooManyBytes    = fmt.Sprintf("more than %d bytes of messages of one publish", maxPublishedBytes)
)

// publisher completes a message with what is not the rule's. Lanes go by it, so
// that what a vehicle has set off stays in its order.
func (c *chain) publisher(m *Message) {
	switch o := c.origin.(type) {
	case *Message:
		m.ClientID, m.Username, m.HasUsername = o.ClientID, o.Username, o.HasUsername
		m.PeerHost, m.PeerName, m.Node = o.PeerHost, o.PeerName, o.Node
		m.TraceID, m.SW8 = o.TraceID, o.SW8
	case *Event:
		m.ClientID, m.Username, m.HasUsername = o.ClientID, o.Username, o.HasUsername
		m.PeerHost, m.PeerName, m.Node = colPeerHost.of(o).s, o.PeerName, o.Node
		m.TraceID, m.SW8 = o.TraceID, o.SW8
	}
	if c.newID != nil {
		m.ID = c.newID()
	}
	m.Timestamp = c.env.now()
}

// size is what the message takes, roughly.
func (m *Message) size() int {
	n := len(m.Topic) + len(m.Payload)
	for _, p := range m.UserProperties {
		n += len(p[0]) + len(p[1])
	}
	return n
}
