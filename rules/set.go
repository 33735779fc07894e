package rules

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Set is the rules and destinations of a folder, compiled. It is immutable and
// safe for concurrent use.
type Set struct {
	generation   string
	rules        []*Rule
	destinations []Destination
	index        *topicIndex
	byEvent      [EventKinds][]*Rule
	secrets      map[secretRef]string
	envs         sync.Pool // of *env
	watch        *watch    // of an explanation; nil: nobody watches
}

func newSet(generation string, rules []*Rule, destinations []Destination) *Set {
	var enabled []*Rule
	for _, r := range rules {
		if r.Enabled {
			enabled = append(enabled, r)
		}
	}
	s := &Set{generation: generation, rules: rules, destinations: destinations, index: newTopicIndex(enabled), byEvent: rulesByEvent(enabled)}
	s.envs.New = func() any { return &env{now: time.Now} }
	return s
}

// Generation names the content of the files that the set was made of, in 12
// hexadecimal digits.
func (s *Set) Generation() string { return s.generation }

// Rules are all rules, sorted by name, disabled ones too. The caller must not
// change the slice.
func (s *Set) Rules() []*Rule { return s.rules }

// Destinations are all destinations, sorted by name. The caller must not change
// the slice.
func (s *Set) Destinations() []Destination { return s.destinations }

// Candidates appends to dst the enabled rules that have a filter matching topic:
// the rule with the most specific filter first, ties by name. What it costs does
// not depend on rules of other topics.
func (s *Set) Candidates(dst []*Rule, topic string) []*Rule {
	return s.index.find(dst, topic)
}

// Rule is one rule of a set.
type Rule struct {
	Name        string
	Description string
	Enabled     bool
	SQL         string
	// File is the path that the rule was loaded from, and Line where it begins there.
	File string
	Line int

	*program
	actions     []action
	republishes []republish
	outcomes    *Outcomes
	readsTrace  bool
}

// action is one thing that a rule does with its row.
type action struct {
	destination *Destination
	id          template // nil: the id is made when the delivery is stored
	body        bodyFn
	request     *request // nil: nothing but the body depends on the row
}

// Filter is the rule's most specific filter that matches topic, "" if none does.
func (r *Rule) Filter(topic string) string {
	best := ""
	for _, f := range r.filters {
		if matchFilter(f, topic) && (best == "" || moreSpecific(f, best) < 0) {
			best = f
		}
	}
	return best
}

// Filters are the topic filters of the rule's FROM clause. One that selects from
// events alone has none.
func (r *Rule) Filters() []string { return r.filters }

// Outcomes counts how the rule fared. A rule keeps its counters over a reload.
func (r *Rule) Outcomes() *Outcomes { return r.outcomes }

// ReadsTrace reports whether the columns trace_id and sw8 may be read by the rule,
// or by one that what it republishes may lead to.
func (r *Rule) ReadsTrace() bool { return r.readsTrace }

// markTraceReaders looks at statements alone: templates read what SELECT puts out.
func markTraceReaders(rules []*Rule) {
	any := false
	for _, r := range rules {
		r.readsTrace = strings.Contains(r.SQL, "trace_id") || strings.Contains(r.SQL, "sw8")
		any = any || r.readsTrace && r.Enabled
	}
	for _, r := range rules {
		r.readsTrace = r.readsTrace || any && len(r.republishes) > 0
	}
}

// Outcomes counts the messages that a rule was a candidate for. TypeMismatch,
// UndefinedInBody and HeaderLeftOut are counted beside the others, which exclude each other; all at most
// once a message, however many rows it has. NotRepublished is counted beside them too, once for
// each message that was not published.
type Outcomes struct {
	Matched, NoMatch, PayloadNotJSON, BadArgument, TooManyRows, RenderFailed  atomic.Uint64
	TypeMismatch, UndefinedInBody, HeaderLeftOut, LoopRefused, NotRepublished atomic.Uint64

	// Republished counts the messages that went out. It is no outcome, and for the
	// one who publishes them to count.
	Republished atomic.Uint64
}

// Each calls fn for every counter, always in the same order.
func (o *Outcomes) Each(fn func(Outcome, uint64)) {
	fn(Matched, o.Matched.Load())
	fn(NoMatch, o.NoMatch.Load())
	fn(PayloadNotJSON, o.PayloadNotJSON.Load())
	fn(BadArgument, o.BadArgument.Load())
	fn(TooManyRows, o.TooManyRows.Load())
	fn(RenderFailed, o.RenderFailed.Load())
	fn(TypeMismatch, o.TypeMismatch.Load())
	fn(UndefinedInBody, o.UndefinedInBody.Load())
	fn(HeaderLeftOut, o.HeaderLeftOut.Load())
	fn(LoopRefused, o.LoopRefused.Load())
	fn(NotRepublished, o.NotRepublished.Load())
}

func (o *Outcomes) count(fired bool, err error, e *env) {
	failed, _ := errors.AsType[*fault](err)
	switch {
	case failed != nil && failed.outcome == PayloadNotJSON:
		o.PayloadNotJSON.Add(1)
	case failed != nil && failed.outcome == TooManyRows:
		o.TooManyRows.Add(1)
	case failed != nil && failed.outcome == LoopRefused:
		o.LoopRefused.Add(1)
	case failed != nil && failed.outcome == RenderFailed:
		o.RenderFailed.Add(1)
	case failed != nil:
		o.BadArgument.Add(1)
	case fired:
		o.Matched.Add(1)
	default:
		o.NoMatch.Add(1)
	}
	if e.mismatch {
		o.TypeMismatch.Add(1)
	}
	if e.missing {
		o.UndefinedInBody.Add(1)
	}
	if e.leftOut {
		o.HeaderLeftOut.Add(1)
	}
}

// Destination is where deliveries of one name go.
type Destination struct {
	Name   string
	URL    string // http or https, no credentials
	Method string // POST, PUT, GET or DELETE
	// Headers are sent with every attempt, sorted by name. Their values may hold
	// secrets.
	Headers []Header
	// Rendered says that variables stand in the path, the query or a header.
	Rendered bool
	// TraceBody says where in a JSON body the trace context goes; TraceHeaders
	// whether it goes into headers too.
	TraceBody    TraceBody
	TraceHeaders bool
	// SigningKeys sign every attempt; empty: none does. They are the bytes of
	// the keys, not the text that stands for them.
	SigningKeys []Secret
	// IdempotencyKey sends the delivery's id as Idempotency-Key too.
	IdempotencyKey bool
	// Basic and OAuth2 make the header Authorization; nil: they don't. One of them
	// is set at most, and then Headers has no such header.
	Basic  *Basic
	OAuth2 *OAuth2
	// TLS names files; it is zero but for https.
	TLS TLS
	// Egress closes addresses, and opens what it has closed.
	Egress Egress
	// Ordered is the column whose value is the lane of a delivery; "": no lanes.
	Ordered     string
	Concurrency int
	Rate        Rate
	Timeout     time.Duration // of one attempt
	MaxAge      time.Duration // after which a delivery is given up
	LaneHold    time.Duration // after which one that keeps failing leaves its lane
	// OnFull is OnFullRefuse or OnFullAckAndCount; "": not given.
	OnFull   string
	MaxBytes int64 // cap of what is queued; 0: not given
	Batch    Batch
}

// What becomes of a publish for whose deliveries there is no room.
const (
	OnFullRefuse      = "refuse"        // nothing of it is stored, and it is not acknowledged
	OnFullAckAndCount = "ack_and_count" // the delivery is dropped
)

// Rate is N attempts in every Per; its zero is no bound.
type Rate struct {
	N   int
	Per time.Duration
}

// Basic is a name and a password; the name may come from where secrets do.
type Basic struct{ Username, Password Secret }

// OAuth2 is what tokens are asked for with, RFC 6749 section 4.4.
type OAuth2 struct {
	TokenURL     string // http or https, no credentials
	ClientID     Secret // may come from where secrets do
	ClientSecret Secret
	Scopes       []string // nil: none are asked for
}

// TLS holds the paths of PEM files, as the broker's working folder sees them;
// "" is none. CertFile and KeyFile go together.
type TLS struct{ CAFile, CertFile, KeyFile string }

// Egress holds masked prefixes; those of IPv4 are not in their IPv6 form. What
// Allow holds is open even if Deny holds it too.
type Egress struct{ Deny, Allow []netip.Prefix }

// Batch is how many deliveries go in one request as a JSON array, up to Max, and
// how long it waits for so many. With Max 1 there are no arrays.
type Batch struct {
	Max    int
	Linger time.Duration
}

// TraceBody holds dotted paths; "" is nowhere.
type TraceBody struct{ SW8, Correlation string }

// Header is one HTTP header of a destination.
type Header struct {
	Name  string
	Value Secret
	// Rendered: it holds variables, so that deliveries have its value and Value is
	// empty.
	Rendered bool
	// Secrets are those in it, in their order.
	Secrets []Secret
}

// RenderedHeader is a header of a delivery. A NUL in its value, which no header can
// have, is the place of a secret: the n-th of the n-th in Header.Secrets.
type RenderedHeader struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Delivery is one request to be made. It shares no memory with the message's
// payload.
type Delivery struct {
	Destination string
	ID          string // "": to be made when the delivery is stored
	Body        []byte // JSON, unless a body_template makes something else
	Lane        string // the key of its lane
	Ordered     bool   // false: it has no lane
	// Path and Query are to be appended to those of the destination's URL, escaped; ""
	// is nothing. Path begins with a slash.
	Path, Query string
	Headers     []RenderedHeader
	// LeftOut names the headers that are not sent, since HTTP can't carry their values.
	LeftOut []string
}

// beside is how many bytes were rendered beside the body.
func (d *Delivery) beside() int {
	n := len(d.Path) + len(d.Query)
	for _, h := range d.Headers {
		n += len(h.Name) + len(h.Value)
	}
	return n
}

// deliver adds what the row in e.out owes to ds, or answers the fault that one of the
// deliveries can't be made.
func (r *Rule) deliver(e *env, ds []Delivery) ([]Delivery, error) {
	if ds == nil && len(r.actions) > 0 {
		ds = make([]Delivery, 0, len(r.actions))
	}
	for _, a := range r.actions {
		body, ok := a.body(e, make([]byte, 0, bodySize))
		if !ok {
			e.missing = true
			body = append(body[:0], "null"...)
		}
		if e.tooLong {
			return nil, renderFailed("the body for destination %s has more than %d bytes", quote(a.destination.Name), maxBody)
		}
		if e.spent += len(body); e.spent > maxBodies {
			return nil, renderFailed("the bodies for one message have more than %d bytes", maxBodies)
		}
		d := Delivery{Destination: a.destination.Name, ID: a.id.renderID(e), Body: body}
		if lane := e.laneOf(a.destination); lane.defined() {
			d.Lane, d.Ordered = strings.Clone(lane.text()), true
		}
		if a.request != nil {
			if err := a.request.render(e, &d); err != nil {
				return nil, err
			}
			if e.spent += d.beside(); e.spent > maxBodies {
				return nil, renderFailed("the requests for one message have more than %d bytes", maxBodies)
			}
		}
		ds = append(ds, d)
	}
	return ds, nil
}

// bodySize is the capacity that a body starts with: most are smaller.
const bodySize = 256

func (e *env) laneOf(d *Destination) value {
	if d.Ordered == "" {
		return value{}
	}
	return e.column(d.Ordered)
}
