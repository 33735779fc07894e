package rules

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"
)

// TestFailure is one thing that is not as it was expected.
type TestFailure struct {
	// File, Line and Col are the place of the expectation, or of the test for what
	// was not expected at all. Line and Col count from 1.
	File string `json:"file"`
	Line int    `json:"line"`
	Col  int    `json:"col"`
	// Message says what is wrong, in a line.
	Message string `json:"message"`
	// Differences are where something was sent, but not what was expected.
	Differences []Difference `json:"differences,omitempty"`
	// Reason is why the rule did not fire, if that is why something is missing.
	Reason string `json:"reason,omitempty"`

	missing string // the rule of which something was expected, and not sent
}

// Difference is one place at which what was sent is not what was wanted.
type Difference struct {
	// Path is body, or a place in it such as body.pos.lat or body.list[2], the first
	// element being 1; or another key of the expectation.
	Path string `json:"path"`
	// Wanted and Found are JSON, or "nothing"; text that is no JSON is quoted.
	Wanted string `json:"wanted"`
	Found  string `json:"found"`
}

// Run runs the test through the same code as the broker, at the time that it names
// itself or else that of the clock, and answers what is not as expected: nothing if it
// has passed.
func (t *Tests) Run(test *Test) []TestFailure {
	set := t.set
	now := time.Now
	if !test.now.IsZero() {
		now = func() time.Time { return test.now }
		set = t.set.at(now)
	}
	of, payload := test.input(now())
	chain := set.run(test.cands(set), of, payload, nil)
	var found []sent
	for i, m := range chain.Matches {
		for _, d := range m.Deliveries {
			found = append(found, sent{rule: m.Rule, Delivery: d, to: set.destination(d.Destination)})
		}
		for _, p := range chain.Published {
			if p.By == i && test.ofMessages() {
				found = append(found, sent{rule: m.Rule, message: p.Message})
			}
		}
	}
	failures := test.compare(found)
	if names := missing(failures); len(names) > 0 {
		x := t.set.explain(explained{of: of, payload: payload, cands: test.cands, now: now, only: names})
		for i := range failures {
			failures[i].Reason = x.reasonOf(failures[i].missing)
		}
	}
	return failures
}

// ofMessages is whether what rules republish is compared. A test that expects requests alone is about those;
// one that expects nothing means nothing at all.
func (t *Test) ofMessages() bool {
	return len(t.expect) == 0 || slices.ContainsFunc(t.expect, func(x expectation) bool { return x.republish })
}

// missing are the rules of which something was missing.
func missing(failures []TestFailure) (names []string) {
	for _, f := range failures {
		if f.missing != "" && !slices.Contains(names, f.missing) {
			names = append(names, f.missing)
		}
	}
	return names
}

// reasonOf is why the rule did not fire, "" if it did. A run on a message that was
// republished is of more interest than that it does not select from the origin.
func (x *Explanation) reasonOf(rule string) string {
	reason := ""
	for _, runs := range append([][]RuleExplanation{x.Rules}, x.republishedRules()...) {
		for _, r := range runs {
			switch {
			case r.Rule != rule:
			case r.Fired:
				return ""
			case reason == "" || r.Outcome != "":
				reason = r.Reason
			}
		}
	}
	return reason
}

func (x *Explanation) republishedRules() (all [][]RuleExplanation) {
	for _, r := range x.Republished {
		all = append(all, r.Rules)
	}
	return all
}

// at is the set with another clock.
func (s *Set) at(now func() time.Time) *Set {
	c := &Set{generation: s.generation, rules: s.rules, destinations: s.destinations, index: s.index, byEvent: s.byEvent}
	c.envs.New = func() any { return &env{now: now} }
	return c
}

func (s *Set) destination(name string) *Destination {
	for i := range s.destinations {
		if s.destinations[i].Name == name {
			return &s.destinations[i]
		}
	}
	return &Destination{Name: name}
}

// input is what the test runs on, at a time.
func (t *Test) input(now time.Time) (row, []byte) {
	switch of := t.origin.(type) {
	case *Message:
		m := *of
		if m.Timestamp.IsZero() {
			m.Timestamp = now
		}
		return &m, m.Payload
	case *Event:
		e := *of
		if e.Timestamp.IsZero() {
			e.Timestamp = now
		}
		if e.Message != nil {
			m := *e.Message
			if m.Timestamp.IsZero() {
				m.Timestamp = e.Timestamp
			}
			e.Message = &m
		}
		return &e, e.payload()
	}
	return t.origin, nil
}

// sent is one delivery that the rules made, or a message that one republished.
type sent struct {
	rule *Rule
	Delivery
	to      *Destination
	message *Message // nil: it is a delivery
}

func (s *sent) is(x *expectation) bool {
	return s.rule.Name == x.rule && s.Destination == x.http && (s.message != nil) == x.republish
}

func (s *sent) describe() string {
	return describeSent(s.rule.Name, s.Destination, s.message != nil)
}

func (x *expectation) describe() string { return describeSent(x.rule, x.http, x.republish) }

func describeSent(rule, destination string, republish bool) string {
	if republish {
		return "a message republished by rule " + quote(rule)
	}
	return fmt.Sprintf("a request of rule %s to %s", quote(rule), quote(destination))
}

// shown is what was sent as far as it helps to know what it is.
func (s *sent) shown() []Difference {
	if s.message != nil {
		return []Difference{{"topic", nothing, string(appendString(nil, s.message.Topic))}, {"payload", nothing, shownBody(s.message.Payload)}}
	}
	return []Difference{{"body", nothing, shownBody(s.Body)}}
}

// compare pairs what was expected with what was found, in order, and answers what
// is left over or differs.
func (t *Test) compare(found []sent) []TestFailure {
	pairs := t.pair(found)
	var failures []TestFailure
	fail := func(line, col int, d []Difference, format string, args ...any) {
		failures = append(failures, TestFailure{File: t.File, Line: line, Col: col, Message: fmt.Sprintf(format, args...), Differences: d})
	}
	paired := make([]bool, len(found))
	for i, x := range t.expect {
		j := pairs[i]
		if j < 0 {
			continue
		}
		paired[j] = true
		if d := x.differences(&found[j]); len(d) > 0 {
			fail(x.line, x.col, d, "%s is not as expected", x.describe())
		}
	}
	for i, x := range t.expect {
		if pairs[i] >= 0 {
			continue
		}
		j := slices.IndexFunc(found, func(s sent) bool { return s.is(&x) && len(x.differences(&s)) == 0 })
		if j >= 0 && !paired[j] {
			paired[j] = true
			fail(x.line, x.col, nil, "%s comes as number %d, expected as number %d", x.describe(), j+1, i+1)
			continue
		}
		fail(x.line, x.col, nil, "%s was expected, and not sent", x.describe())
		failures[len(failures)-1].missing = x.rule
	}
	for j, s := range found {
		if !paired[j] {
			fail(t.Line, t.Col, s.shown(), "%s was not expected", s.describe())
		}
	}
	slices.SortStableFunc(failures, func(a, b TestFailure) int { return a.Line - b.Line })
	return failures
}

// pair answers for each expectation the place of the delivery that it is about, or
// -1: the two lists aligned, as diff aligns lines, save that two of the same rule and
// destination may differ.
func (t *Test) pair(found []sent) []int {
	n, m := len(t.expect), len(found)
	worth := func(i, j int) int {
		switch {
		case i == n || j == m || !found[j].is(&t.expect[i]):
			return 0
		case len(t.expect[i].differences(&found[j])) == 0:
			return 3
		}
		return 2
	}
	pairs := make([]int, n)
	same := 0
	for worth(same, same) == 3 {
		pairs[same] = same
		same++
	}
	// best[i][j] is what the expectations from i on and the deliveries from j on are
	// worth, paired.
	best := make([][]int, n+1)
	best[n] = make([]int, m+1)
	for i := n - 1; i >= same; i-- {
		best[i] = make([]int, m+1)
		for j := m - 1; j >= same; j-- {
			best[i][j] = max(best[i+1][j], best[i][j+1])
			if w := worth(i, j); w > 0 {
				best[i][j] = max(best[i][j], w+best[i+1][j+1])
			}
		}
	}
	for i, j := same, same; i < n; {
		switch w := worth(i, j); {
		case w > 0 && best[i][j] == w+best[i+1][j+1]:
			pairs[i] = j
			i, j = i+1, j+1
		case j < m && best[i][j] == best[i][j+1]:
			j++
		default:
			pairs[i] = -1
			i++
		}
	}
	return pairs
}

// nothing is what stands in a Difference for what is not there.
const nothing = "nothing"

// differences are those between what was expected and what was sent.
func (x *expectation) differences(s *sent) []Difference {
	var d differences
	for _, c := range x.compared {
		switch c.name {
		case "body":
			if s.to.bodiless() {
				d.compare("body", c.wanted, value{})
				continue
			}
			d.body("body", c.wanted, s.Body, s.to.TraceBody)
		case "payload":
			d.body("payload", c.wanted, s.message.Payload, TraceBody{})
		case "query":
			query := s.query()
			if c.wanted.kind == kindObject {
				d.compare("query", c.wanted, parameters(query))
			} else {
				d.compare("query", c.wanted, str(query))
			}
		case "headers":
			for _, m := range c.wanted.object().members {
				d.compare("headers"+memberPath(m.key), m.val, s.header(m.key))
			}
		default:
			d.compare(c.name, c.wanted, s.field(c.name))
		}
	}
	return d
}

// field is what was sent for a plain key of an expectation.
func (s *sent) field(name string) value {
	switch name {
	case "id":
		return optional(s.ID)
	case "lane":
		if s.Ordered {
			return str(s.Lane)
		}
		return boolean(false)
	case "method":
		return str(s.to.Method)
	case "path":
		return str(s.path())
	case "topic":
		return str(s.message.Topic)
	case "qos":
		return integer(int64(s.message.QoS))
	case "retain":
		return boolean(s.message.Retain)
	case "user_properties":
		return s.message.properties().lookup("User-Property")
	}
	return value{}
}

// path is the whole path of the request, escaped, as the bridge joins it.
func (s *sent) path() string { return requestPath(s.to, &s.Delivery) }

func (s *sent) query() string { return requestQuery(s.to, &s.Delivery) }

// header is the first of that name, if the rule has made it: what a destination sends
// with every request is not, nor is what stands for a secret shown.
func (s *sent) header(name string) value {
	for _, h := range s.Headers {
		if strings.EqualFold(h.Name, name) {
			return str(strings.ReplaceAll(h.Value, "\x00", redacted))
		}
	}
	return value{}
}

// requestPath is the path of a delivery's request, escaped: that of the
// destination, and what the row adds to it.
func requestPath(to *Destination, d *Delivery) string {
	path := "/"
	if u, err := url.Parse(to.URL); err == nil && u.EscapedPath() != "" {
		path = u.EscapedPath()
	}
	if d.Path != "" {
		path = strings.TrimRight(path, "/") + d.Path
	}
	return path
}

// requestQuery is the query of a delivery's request, escaped.
func requestQuery(to *Destination, d *Delivery) string {
	query := ""
	if u, err := url.Parse(to.URL); err == nil {
		query = u.RawQuery
	}
	return joinQuery(query, d.Query)
}

// parameters is a query as a map; one that stands there several times is a list.
func parameters(query string) value {
	all, _ := url.ParseQuery(query) // what it can't read is left out, and missed then
	o := &object{}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if of := all[key]; len(of) == 1 {
			o.set(key, str(of[0]))
			continue
		}
		var elems []value
		for _, text := range all[key] {
			elems = append(elems, str(text))
		}
		o.set(key, listOf(elems))
	}
	return objectOf(o)
}

type differences []Difference

// body compares a body or payload. One that is wanted as text is compared as text,
// unless it is a JSON string; the trace context's fields are the broker's, whatever the
// rule has there.
func (d *differences) body(name string, wanted value, text []byte, trace TraceBody) {
	found, isJSON := decodeJSON(string(text))
	if wanted.kind == kindString && !(isJSON && found.kind == kindString) {
		if string(text) != wanted.s {
			*d = append(*d, Difference{name, string(appendString(nil, wanted.s)), string(appendString(nil, string(text)))})
		}
		return
	}
	if !isJSON {
		*d = append(*d, Difference{name, string(appendJSON(nil, wanted)), shownBody(text)})
		return
	}
	for _, path := range []string{trace.SW8, trace.Correlation} {
		if path != "" {
			keys := strings.Split(path, ".")
			wanted, found = without(wanted, keys), without(found, keys)
		}
	}
	d.compare(name, wanted, found)
}

// shownBody is a body as messages show it: what is no JSON is quoted.
func shownBody(body []byte) string {
	if validJSON(string(body)) {
		return string(body)
	}
	return string(appendString(nil, string(body)))
}

// without is v without the member at path, and without the maps that held nothing
// else.
func without(v value, path []string) value {
	if v.kind != kindObject || v.object().find(path[0]) < 0 {
		return v
	}
	inner := value{}
	if len(path) > 1 {
		old := v.object().lookup(path[0])
		if inner = without(old, path[1:]); inner.kind == kindObject && len(inner.object().members) == 0 && len(old.object().members) > 0 {
			inner = value{}
		}
	}
	o := &object{}
	for _, m := range v.object().members {
		if m.key != path[0] {
			o.set(m.key, m.val)
		} else if inner.defined() {
			o.set(m.key, inner)
		}
	}
	return objectOf(o)
}

// compare goes down into what both have. Numbers are compared as such, 1 and 1.0 are
// the same.
func (d *differences) compare(path string, wanted, found value) {
	switch {
	case wanted.kind == kindObject && found.kind == kindObject:
		w, f := wanted.object(), found.object()
		for _, m := range w.members {
			d.compare(path+memberPath(m.key), m.val, f.lookup(m.key))
		}
		for _, m := range f.members {
			if w.find(m.key) < 0 {
				d.compare(path+memberPath(m.key), value{}, m.val)
			}
		}
	case wanted.kind == kindList && found.kind == kindList:
		w, f := wanted.list(), found.list()
		for i := range max(len(w), len(f)) {
			var a, b value
			if i < len(w) {
				a = w[i]
			}
			if i < len(f) {
				b = f[i]
			}
			d.compare(fmt.Sprintf("%s[%d]", path, i+1), a, b)
		}
	case wanted.isNumber() && found.isNumber():
		if compareNumbers(wanted, found) != 0 {
			d.add(path, wanted, found)
		}
	case wanted.kind != found.kind || !identical(wanted, found):
		d.add(path, wanted, found)
	}
}

func (d *differences) add(path string, wanted, found value) {
	shown := func(v value) string {
		if !v.defined() {
			return nothing
		}
		return string(appendJSON(nil, v))
	}
	*d = append(*d, Difference{path, shown(wanted), shown(found)})
}

// memberPath is the step to a member, in quotes unless it is a plain word.
func memberPath(key string) string {
	if key == "" || strings.ContainsFunc(key, func(r rune) bool { return r > 127 || !isLetter(byte(r)) && !isDigit(byte(r)) && r != '_' && r != '-' }) {
		return "." + quote(key)
	}
	return "." + key
}
