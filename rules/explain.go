package rules

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Explanation says for each rule why it fired on a message, or did not. It is what
// explain -json writes.
type Explanation struct {
	// PayloadProblem is why the payload is no JSON, and at which byte; "" if it is.
	// That is no fault unless a rule reads into it.
	PayloadProblem string `json:"payload_problem,omitempty"`
	// Rules are those that fired on the message, those that failed, those that ran
	// and did not fire, and those that did not run; each kind sorted by name.
	Rules []RuleExplanation `json:"rules"`
	// Republished are the messages that the rules would publish, in the order in
	// which they are made.
	Republished []RepublishExplanation `json:"republished,omitempty"`
}

// RuleExplanation is about one rule and one message.
type RuleExplanation struct {
	Rule string `json:"rule"`
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	// Outcome is the one that counts the run; "" for a rule that did not run, since it
	// is disabled or selects from other topics.
	Outcome Outcome `json:"outcome,omitempty"`
	Fired   bool    `json:"fired"`
	// Reason is why it did not fire, in a line: the first part of it that was decisive.
	Reason string `json:"reason,omitempty"`
	// Sources are the names of the FROM clause.
	Sources []SourceExplanation `json:"sources"`
	// Where is the condition; absent if there is none, or if it was not reached.
	Where *Term `json:"where,omitempty"`
	// Elements are those of FOREACH with an INCASE, the first 20 of them.
	Elements         []ElementExplanation `json:"elements,omitempty"`
	ElementsNotShown int                  `json:"elements_not_shown,omitempty"`
	// Undefined names what was read and is not there, with the reason; Converted what
	// was compared as something else than it is.
	Undefined []string `json:"undefined,omitempty"`
	Converted []string `json:"converted,omitempty"`
	// Rows are the outputs of the statement, the first 20 of them.
	Rows         []json.RawMessage    `json:"rows,omitempty"`
	RowsNotShown int                  `json:"rows_not_shown,omitempty"`
	Requests     []RequestExplanation `json:"requests,omitempty"`
	// Messages is how many it republishes; they are in Explanation.Republished.
	Messages int `json:"messages,omitempty"`
	// NotRepublished are the reasons of messages that could not be made.
	NotRepublished []string `json:"not_republished,omitempty"`
}

// SourceExplanation is about one name of a FROM clause.
type SourceExplanation struct {
	Name    string `json:"name"`
	Matched bool   `json:"matched"`
	Why     string `json:"why,omitempty"` // where it differs
}

// ElementExplanation is about one element of FOREACH.
type ElementExplanation struct {
	Value  json.RawMessage `json:"value"`
	Incase Term            `json:"incase"`
}

// RequestExplanation is one request that the broker would make.
type RequestExplanation struct {
	Destination string `json:"destination"`
	Method      string `json:"method"`
	URL         string `json:"url"`
	ID          string `json:"id,omitempty"`   // "": made up when it is stored
	Lane        string `json:"lane,omitempty"` // the key of its lane
	Ordered     bool   `json:"ordered"`        // false: it has no lane
	// Headers are those that the rule has made, secrets not shown; LeftOut those whose
	// values HTTP can't carry.
	Headers []RenderedHeader `json:"headers,omitempty"`
	LeftOut []string         `json:"headers_left_out,omitempty"`
	Body    string           `json:"body,omitempty"` // without the trace context; "" where the method sends none
}

// RepublishExplanation is one message that a rule would publish, and what it leads to.
type RepublishExplanation struct {
	By      string            `json:"by"`
	Topic   string            `json:"topic"`
	QoS     byte              `json:"qos"`
	Retain  bool              `json:"retain"`
	Payload string            `json:"payload"`
	Rules   []RuleExplanation `json:"rules"` // those that ran on it
}

// Results of a Term.
const (
	TermTrue         = "true"
	TermFalse        = "false"
	TermFailed       = "failed"
	TermNotEvaluated = "not evaluated" // what stands before it was decisive
)

// Term is a condition or a part of one.
type Term struct {
	Text   string `json:"text"` // as it stands in the statement
	Result string `json:"result"`
	// Op is AND, OR or NOT over Terms; "" for a single comparison or the like.
	Op    string `json:"op,omitempty"`
	Terms []Term `json:"terms,omitempty"`
	// Values are those of what is compared, constants left out.
	Values []TermValue `json:"values,omitempty"`
	Note   string      `json:"note,omitempty"` // what may surprise
}

// TermValue is what an expression came to.
type TermValue struct {
	Text  string          `json:"text"`
	Value json.RawMessage `json:"value,omitempty"` // absent: undefined
}

func (v TermValue) String() string {
	if v.Value == nil {
		return v.Text + " is undefined"
	}
	return v.Text + " = " + string(v.Value)
}

// Bounds of what an explanation shows.
const (
	maxShownRows   = 20
	maxShownValues = 8
)

// Explain runs the rules on a message through the code that Run uses, and says what
// they did. Nothing is counted. It compiles the rules anew.
func (s *Set) Explain(m *Message) Explanation {
	return s.explain(explained{of: m, payload: m.Payload, cands: func(s *Set) []*Rule { return s.Candidates(nil, m.Topic) }, now: time.Now})
}

// explained is what there is to explain.
type explained struct {
	of      row
	payload []byte
	cands   func(*Set) []*Rule
	now     func() time.Time
	only    []string // the rules that are watched; nil: all
}

func (s *Set) explain(x explained) Explanation {
	w := &watch{statements: make(map[*Rule]termReader)}
	rules := make([]*Rule, len(s.rules))
	for i, r := range s.rules {
		c := *r
		c.outcomes = &Outcomes{}
		if x.only == nil || slices.Contains(x.only, r.Name) {
			w.compile(&c)
		}
		rules[i] = &c
	}
	set := newSet(s.generation, rules, s.destinations)
	set.watch, set.envs.New = w, func() any { return &env{now: x.now} }
	cands := x.cands(set)
	chain := set.run(cands, x.of, x.payload, nil)
	answer := Explanation{PayloadProblem: payloadProblem(x.payload)}
	for i := range w.runs {
		w.runs[i].owe(set, &chain)
		if on := w.runs[i].on; on < 0 {
			answer.Rules = append(answer.Rules, w.runs[i].RuleExplanation)
		}
	}
	for _, r := range rules {
		if _, watched := w.statements[r]; watched && !slices.Contains(cands, r) {
			answer.Rules = append(answer.Rules, r.notRun(x.of))
		}
	}
	slices.SortStableFunc(answer.Rules, func(a, b RuleExplanation) int {
		return cmp.Or(a.interest()-b.interest(), cmp.Compare(a.Rule, b.Rule))
	})
	for i, m := range chain.Published {
		p := RepublishExplanation{By: chain.Matches[m.By].Rule.Name, Topic: m.Topic, QoS: m.QoS, Retain: m.Retain, Payload: string(m.Payload), Rules: []RuleExplanation{}}
		for _, run := range w.runs {
			if run.on == i {
				p.Rules = append(p.Rules, run.RuleExplanation)
			}
		}
		answer.Republished = append(answer.Republished, p)
	}
	return answer
}

// interest is the less the more a rule is worth reading of.
func (r *RuleExplanation) interest() int {
	switch {
	case r.Fired:
		return 0
	case r.Outcome != "" && r.Outcome != NoMatch:
		return 1
	case r.Outcome == NoMatch:
		return 2
	}
	return 3
}

// notRun explains a rule that is no candidate.
func (r *Rule) notRun(of row) RuleExplanation {
	x := RuleExplanation{Rule: r.Name, File: r.File, Line: r.Line}
	x.Sources = r.sources(of)
	if r.Enabled {
		x.Reason = "FROM does not select " + describeOrigin(of)
		if len(x.Sources) == 1 {
			x.Reason += ": " + x.Sources[0].Why
		}
	} else {
		x.Reason = "it is disabled"
	}
	return x
}

func describeOrigin(of row) string {
	if e, ok := of.(*Event); ok {
		return "event " + e.Kind.Topic()
	}
	return "topic " + quote(of.column("topic").text())
}

// sources explains the FROM clause.
func (r *Rule) sources(of row) []SourceExplanation {
	var all []SourceExplanation
	e, isEvent := of.(*Event)
	for _, f := range r.filters {
		x := SourceExplanation{Name: f}
		if isEvent {
			x.Why = quote(f) + " is for topics"
		} else {
			topic := of.column("topic").text()
			if x.Matched = matchFilter(f, topic); !x.Matched {
				x.Why = filterDiffers(f, topic)
			}
		}
		all = append(all, x)
	}
	r.events.each(func(k EventKind) {
		x := SourceExplanation{Name: k.Topic(), Matched: isEvent && e.Kind == k}
		if !x.Matched {
			x.Why = quote(x.Name) + " is another event"
			if !isEvent {
				x.Why = quote(x.Name) + " is an event"
			}
		}
		all = append(all, x)
	})
	return all
}

// filterDiffers says at which level a filter that does not match differs.
func filterDiffers(filter, topic string) string {
	if strings.HasPrefix(topic, "$") && (filter[0] == '+' || filter[0] == '#') {
		return fmt.Sprintf("%s takes no topic that begins with $", quote(filter))
	}
	wanted, found := strings.Split(filter, "/"), strings.Split(topic, "/")
	for i, level := range wanted {
		switch {
		case i == len(found):
			return fmt.Sprintf("%s wants %s as level %d, and the topic ends before", quote(filter), quote(level), i+1)
		case level != "+" && level != "#" && level != found[i]:
			return fmt.Sprintf("%s wants %s as level %d, found %s", quote(filter), quote(level), i+1, quote(found[i]))
		}
	}
	return fmt.Sprintf("%s ends before level %d of the topic, %s", quote(filter), len(wanted)+1, quote(found[min(len(wanted), len(found)-1)]))
}

// payloadProblem is why a payload is no JSON, "" if it is.
func payloadProblem(payload []byte) string {
	if validJSON(string(payload)) {
		return ""
	}
	if len(payload) == 0 {
		return "it is empty"
	}
	var raw json.RawMessage
	if err := json.Unmarshal(payload, &raw); err != nil {
		if at, ok := errors.AsType[*json.SyntaxError](err); ok {
			return fmt.Sprintf("at byte %d: %s", at.Offset, at.Error())
		}
		return err.Error()
	}
	return fmt.Sprintf("it nests more than %d deep", maxDepth)
}

// owe adds what the run's rule owes, and why it didn't get further than it did.
func (r *watchedRun) owe(s *Set, c *Chain) {
	for i, m := range c.Matches {
		if m.Rule != r.rule || m.On != r.on {
			continue
		}
		for _, p := range c.Published {
			if p.By == i {
				r.Messages++
			}
		}
		for _, d := range m.Deliveries {
			r.Requests = append(r.Requests, explainRequest(s.destination(d.Destination), &d))
		}
	}
	for _, f := range c.Refused {
		if f.Rule == r.rule && f.Why == NotRepublished && r.Fired {
			r.NotRepublished = append(r.NotRepublished, f.Text)
		}
	}
}

func explainRequest(to *Destination, d *Delivery) RequestExplanation {
	x := RequestExplanation{Destination: d.Destination, Method: to.Method, ID: d.ID, Lane: d.Lane, Ordered: d.Ordered, LeftOut: d.LeftOut}
	if u, err := url.Parse(to.URL); err == nil {
		x.URL = u.Scheme + "://" + u.Host + requestPath(to, d)
		if query := requestQuery(to, d); query != "" {
			x.URL += "?" + query
		}
	}
	for _, h := range d.Headers {
		x.Headers = append(x.Headers, RenderedHeader{h.Name, strings.ReplaceAll(h.Value, "\x00", redacted)})
	}
	if !to.bodiless() {
		x.Body = string(d.Body)
	}
	return x
}
