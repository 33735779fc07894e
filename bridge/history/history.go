// Package history judges a broker by what its clients and a webhook have seen of it: which publishes were sent and
// acknowledged, and which deliveries came, and how they were answered. What it checks is what DESIGN.md in bridge and the
// acknowledgement promise:
//
//   - Every acknowledged publish that matches is delivered, once at least.
//   - Nothing is delivered that was not published, or does not match, or was refused.
//   - A record keeps its webhook-id, its body and its trace over all attempts, and shares the id with no other record,
//     unless the action sets it. A client's resend is a record of its own.
//   - Records of a lane come in the order of their publishes, each only once the one before it is done with.
//   - A record that was taken comes again after a crash alone, and then with all that follow it in its lane, in order.
//
// It is for tests, and knows neither MQTT nor HTTP: a test tells a Log what happens, and asks at the end what was wrong.
package history

import (
	"fmt"
	"slices"
	"sync"
)

// A Message is something that a client has to say, however often it sends it.
type Message struct {
	Marker  string // no other message's; deliveries are recognised by it
	Lane    string // "": no order is owed
	Matches bool   // false: no delivery is owed, nor allowed
	// ID is the webhook-id that the action sets; "": the broker makes one. Copies of a message with an ID are told apart by
	// their traces alone, so each needs one.
	ID string
}

// A Delivery is a request that arrived at the webhook.
type Delivery struct {
	Marker  string
	ID      string // webhook-id
	Attempt int    // X-Throughline-Attempt
	Trace   string // the trace id of the sw8 in it
	SW8     string // the whole of it, which no other attempt may have
	Body    string // without the trace: the same in each attempt
	// Run is the run of the broker that sent it, from 1. It can't be told from the time of arrival: a request of a broker that
	// was killed may still be on its way when the next one runs.
	Run int
}

// Answer is what a webhook made of a delivery.
type Answer int

const (
	// None is no answer: the connection was cut, or it hung.
	None Answer = iota
	// Taken is a 2xx that the broker has got, unless it was killed.
	Taken
	// Doubtful is a 2xx that the broker may have got or not.
	Doubtful
	// Failed is an answer after which the record is tried again.
	Failed
	// Poison is one that makes the record a dead letter when it is the third.
	Poison
	// Gone is one that makes it a dead letter at once.
	Gone
)

// poisons is how many Poison answers may make a dead letter.
const poisons = 3

// A Log is what has happened so far. The zero value is ready; its methods, and those of what it returns, may be called
// concurrently.
type Log struct {
	mu       sync.Mutex
	now      int // ascends with each event
	messages map[string]*message
	lanes    map[string]*lane
	attempts []*Attempt
	crashed  map[int]bool // by run
	dead     map[string]bool
	tallies  map[origin]*tally
	came     map[string][]origin // by webhook-id
	owed     int
}

// origin is what copies and records are matched by: copies in one trace can't be told apart.
type origin struct{ marker, trace string }

// A tally is what Owed is the sum of.
type tally struct {
	acknowledged int
	done         map[string]bool // webhook-ids
}

// tally returns that of an origin, and a function to be called when it has changed.
func (l *Log) tally(o origin) (of *tally, changed func()) {
	if l.tallies == nil {
		l.tallies, l.came = make(map[origin]*tally), make(map[string][]origin)
	}
	of = l.tallies[o]
	if of == nil {
		of = &tally{done: make(map[string]bool)}
		l.tallies[o] = of
	}
	before := of.owed()
	return of, func() { l.owed += of.owed() - before }
}

func (t *tally) owed() int { return max(0, t.acknowledged-len(t.done)) }

type message struct {
	Message
	copies []*Copy
}

type lane struct {
	copies  []*Copy
	records []*record // in the order in which they came first; made by Check
}

// A Copy is one PUBLISH packet with a message.
type Copy struct {
	log          *Log
	message      *message
	trace        string
	acknowledged bool
	refused      bool
}

// An Attempt is a delivery and its answer.
type Attempt struct {
	Delivery
	log      *Log
	at       int // when it came
	answer   Answer
	answered int // when; 0: not yet
	// late says that the broker had given it up before it came: a later attempt of its record was here first.
	late bool
}

// Publish notes that a client is about to send a message, in a trace; the trace "" isn't checked. The calls for the
// messages of a lane are in the order of the packets. If it matches depends on its first copy.
func (l *Log) Publish(m Message, trace string) *Copy {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.messages == nil {
		l.messages, l.lanes = make(map[string]*message), make(map[string]*lane)
	}
	of := l.messages[m.Marker]
	if of == nil {
		of = &message{Message: m}
		l.messages[m.Marker] = of
	}
	c := &Copy{log: l, message: of, trace: trace}
	of.copies = append(of.copies, c)
	in := l.lanes[of.Lane]
	if in == nil {
		in = &lane{}
		l.lanes[of.Lane] = in
	}
	in.copies = append(in.copies, c)
	return c
}

// Acknowledge notes that the broker has answered the copy with success: for QoS 2, at the end of its handshake.
func (c *Copy) Acknowledge() {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	c.acknowledged = true
	if c.message.Matches {
		t, changed := c.log.tally(origin{c.message.Marker, c.trace})
		t.acknowledged++
		changed()
	}
}

// Refuse notes that the broker has said that it doesn't accept the copy. Of one that was neither acknowledged nor refused
// nothing is known: it may be delivered or not.
func (c *Copy) Refuse() {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	c.refused = true
}

// Receive notes that a delivery has come.
func (l *Log) Receive(d Delivery) *Attempt {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now++
	a := &Attempt{Delivery: d, log: l, at: l.now}
	l.attempts = append(l.attempts, a)
	l.done(a)
	return a
}

// Answer notes what is about to be answered; once, or not at all, which is None.
func (a *Attempt) Answer(with Answer) {
	a.log.mu.Lock()
	defer a.log.mu.Unlock()
	a.log.now++
	a.answer, a.answered = with, a.log.now
	a.log.done(a)
}

// done notes that what a delivery was owed for is done with, if so it is.
func (l *Log) done(a *Attempt) {
	m := l.messages[a.Marker]
	if m == nil {
		return
	}
	o := origin{marker: a.Marker}
	if m.traced() {
		o.trace = a.Trace
	}
	t, changed := l.tally(o)
	if !slices.Contains(l.came[a.ID], o) {
		l.came[a.ID] = append(l.came[a.ID], o)
	}
	if a.taken() || l.dead[a.ID] {
		t.done[a.ID] = true
	}
	changed()
}

// traced reports whether the message's copies can be told apart.
func (m *message) traced() bool {
	return slices.ContainsFunc(m.copies, func(c *Copy) bool { return c.trace != "" })
}

// Crash notes that a run of the broker was killed. Without it, what was taken in a run must not come again in a later one.
func (l *Log) Crash(run int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.crashed == nil {
		l.crashed = make(map[int]bool)
	}
	l.crashed[run] = true
}

// Bury notes that the record of that webhook-id is a dead letter, which is as good as delivered if the webhook has asked for it.
func (l *Log) Bury(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead == nil {
		l.dead = make(map[string]bool)
	}
	l.dead[id] = true
	for _, o := range l.came[id] {
		t, changed := l.tally(o)
		t.done[id] = true
		changed()
	}
}

// Owed is how many acknowledged copies still wait for their delivery, as far as can be told while they do: what is wrong with a
// delivery counts in Check alone. It is cheap, unlike Check.
func (l *Log) Owed() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.owed
}

// Counts say how much a history has in it, so that a test can see to it that it has tested something.
type Counts struct {
	Messages, Copies, Acknowledged int
	Attempts, Records              int
	// Again is how many records came again although they had been taken.
	Again int
}

// Counts counts what has happened so far.
func (l *Log) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := newCheck(l)
	c.identify()
	n := Counts{Messages: len(l.messages), Attempts: len(l.attempts), Records: len(c.records)}
	for _, m := range l.messages {
		n.Copies += len(m.copies)
		for _, cp := range m.copies {
			if cp.acknowledged {
				n.Acknowledged++
			}
		}
	}
	for _, r := range c.records {
		if i := slices.IndexFunc(r.attempts, func(a *Attempt) bool { return a.answer == Taken }); i >= 0 && i < len(r.attempts)-1 {
			n.Again++
		}
	}
	return n
}

// Rule is what a violation is against.
type Rule string

// The rules, in the order of the package's comment.
const (
	Lost         Rule = "lost"          // acknowledged, and not delivered
	NotPublished Rule = "not published" // delivered all the same
	NotMatching  Rule = "not matching"  // delivered all the same
	Refused      Rule = "refused"       // delivered all the same
	Identity     Rule = "identity"      // a webhook-id that is not one record's, or a record's that is not one
	Content      Rule = "content"       // a body, or the number of an attempt, that can't be
	Trace        Rule = "trace"         // not the publish's, or two attempts are the same span
	Order        Rule = "order"         // not that of the publishes, or before its turn
	Duplicate    Rule = "duplicate"     // came again without a cause
)

// A Violation is something that must not be.
type Violation struct {
	Rule Rule
	Text string
}

func (v Violation) String() string { return string(v.Rule) + ": " + v.Text }

// Check returns everything that is wrong with what happened so far; call it when all that is owed had its time to come.
func (l *Log) Check() []Violation {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := newCheck(l)
	c.identify()
	c.complete()
	for _, name := range sorted(l.lanes) {
		if name != "" {
			c.order(name, l.lanes[name])
			c.turns(name, l.lanes[name])
		}
	}
	return c.found
}

func (d Delivery) String() string {
	return fmt.Sprintf("%s, webhook-id %s, attempt %d of run %d", d.Marker, d.ID, d.Attempt, d.Run)
}
