package rules

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Tests are the unit tests of a set of rules, read from *_test.yaml:
//
//	tests:
//	  - name: brakes hard
//	    publish: {topic: fleet/v7/telemetry, payload: {vin: V7, decel: 7.1}}
//	    expect:
//	      - {rule: hard-brake, http: notification-center, body: {vin: V7}}
type Tests struct {
	set   *Set
	tests []*Test
}

// All are the tests, sorted by file and in the order of each. The caller must not
// change the slice.
func (t *Tests) All() []*Test { return t.tests }

// Test is one message or event, and what it is expected to make the rules send.
type Test struct {
	Name      string
	File      string
	Line, Col int // where its name stands, from 1

	now    time.Time // zero: the clock's
	origin row
	cands  func(*Set) []*Rule
	expect []expectation
}

// expectation is one thing that is to be sent.
type expectation struct {
	line, col int
	rule      string
	http      string // the destination
	republish bool   // a message is expected, not a request
	compared  []comparedField
}

// comparedField is a further key of an expectation: what is not given is not compared.
type comparedField struct {
	name   string
	wanted value
}

// LoadTests reads rules as Load does, and the test files among paths: those named,
// and those in the folders named. If test files alone are named, the rules are those
// of their folders. The problems are those of rules and tests together, and the
// answer is nil if any is an error. No test at all is one, too: it would pass.
func LoadTests(paths []string, o LoadOptions) (*Tests, []Problem) {
	c := read(paths, true)
	set, problems := build(c.texts, o)
	problems = append(problems, c.problems...)
	if len(c.tests) == 0 && len(c.problems) == 0 {
		problems = append(problems, Problem{
			File: strings.Join(paths, ", "), Name: "no-tests", Message: "there is no test file",
			Hint: "tests stand beside the rules in files named *_test.yaml, see docs/rules.md#testing-rules",
		})
	}
	all := &Tests{set: set}
	for _, t := range c.tests {
		f := readTests(t, set)
		problems = append(problems, f.shown()...)
		all.tests = append(all.tests, f.tests...)
	}
	sortProblems(problems)
	if HasErrors(problems) {
		return nil, problems
	}
	return all, problems
}

// testFile is one test file while it is read.
type testFile struct {
	*file
	set   *Set // nil: the rules have errors, so that names are not looked up
	names map[string]int
	tests []*Test
}

func readTests(t fileText, set *Set) *testFile {
	f := &testFile{file: &file{path: t.Path}, set: set, names: make(map[string]int)}
	root := f.open(t.Text)
	if root != nil {
		f.fields(root, "a test file", field{"tests", func(_, n *yaml.Node) { f.elements(n, "tests", f.test) }})
	}
	if len(f.tests) == 0 && len(f.problems) == 0 {
		f.add(Problem{Line: 1, Col: 1, Width: 1, Name: "no-tests", Message: "the file has no test"})
	}
	return f
}

func (f *testFile) test(n *yaml.Node) {
	t := &Test{File: f.path}
	var name, publish, event, expect *yaml.Node
	ok := f.fields(n, "a test",
		field{"name", func(_, n *yaml.Node) {
			name = n
			t.Name, _ = f.text(n, "name")
			t.Line, t.Col = n.Line, n.Column
		}},
		field{"publish", func(key, n *yaml.Node) { publish = key; f.publish(t, n) }},
		field{"event", func(key, n *yaml.Node) { event = key; f.event(t, n) }},
		field{"now", func(_, n *yaml.Node) { f.time(n, "now", &t.now) }},
		field{"expect", func(_, n *yaml.Node) {
			expect = n
			f.elements(n, "expect", func(n *yaml.Node) { f.expectation(t, n) })
		}},
	)
	if !ok {
		return
	}
	switch {
	case name == nil:
		f.fail(n, "missing-key", "", "a test needs %s", quote("name"))
	case t.Name == "":
	default:
		if line, doubled := f.names[t.Name]; doubled {
			f.fail(name, "doubled-test", fmt.Sprintf("it is already on line %d", line), "doubled test %s", quote(t.Name))
		} else {
			f.names[t.Name] = name.Line
		}
	}
	switch {
	case publish == nil && event == nil:
		f.fail(n, "missing-key", "", "a test needs %s or %s", quote("publish"), quote("event"))
	case publish != nil && event != nil:
		f.fail(event, "several-inputs", "make it two tests", "a test has either %s or %s", quote("publish"), quote("event"))
	}
	if expect == nil {
		f.fail(n, "missing-key", "expect: [] says that nothing is sent", "a test needs %s", quote("expect"))
	}
	f.tests = append(f.tests, t)
}

// Of a publish that a test does not say.
const (
	testClientID = "test"
	testID       = "00000000000000000000000000000001"
	testNode     = "broker@test"
)

func (f *testFile) publish(t *Test, n *yaml.Node) {
	m := &Message{ClientID: testClientID, ID: testID, Node: testNode}
	hasTopic := false
	ok := f.message(n, "publish", m,
		field{"topic", func(_, n *yaml.Node) {
			hasTopic = true
			var ok bool
			if m.Topic, ok = f.text(n, "topic"); ok {
				f.topicName(n)
			}
		}},
		field{"clientid", func(_, n *yaml.Node) { m.ClientID, _ = f.text(n, "clientid") }},
		field{"username", func(_, n *yaml.Node) { m.Username, m.HasUsername = f.text(n, "username") }},
		field{"timestamp", func(_, n *yaml.Node) { f.time(n, "timestamp", &m.Timestamp) }},
		field{"node", func(_, n *yaml.Node) { m.Node, _ = f.text(n, "node") }},
		field{"trace_id", func(_, n *yaml.Node) { m.TraceID, _ = f.text(n, "trace_id") }},
		field{"sw8", func(_, n *yaml.Node) { m.SW8, _ = f.text(n, "sw8") }},
	)
	if ok && !hasTopic {
		f.fail(n, "missing-key", "", "publish needs %s", quote("topic"))
	}
	t.origin = m
	t.cands = func(s *Set) []*Rule { return s.Candidates(nil, m.Topic) }
}

// message reads what publishes have in common with the events that are about one.
func (f *testFile) message(n *yaml.Node, what string, m *Message, further ...field) bool {
	var payload *yaml.Node
	several := func(key *yaml.Node) {
		if payload != nil {
			f.fail(key, "several-inputs", "keep one of them", "both %s and %s", quote(payload.Value), quote(key.Value))
		}
		payload = key
	}
	return f.fields(n, what, append(further,
		field{"qos", func(_, n *yaml.Node) {
			var qos int
			f.int(n, "qos", 0, 2, &qos)
			m.QoS = byte(qos)
		}},
		field{"retain", func(_, n *yaml.Node) { f.bool(n, "retain", &m.Retain) }},
		field{"dup", func(_, n *yaml.Node) { f.bool(n, "dup", &m.Dup) }},
		field{"id", func(_, n *yaml.Node) { m.ID, _ = f.text(n, "id") }},
		field{"peerhost", func(_, n *yaml.Node) { m.PeerHost, _ = f.text(n, "peerhost") }},
		field{"peername", func(_, n *yaml.Node) { m.PeerName, _ = f.text(n, "peername") }},
		field{"payload", func(key, n *yaml.Node) {
			several(key)
			m.Payload = f.payload(n)
		}},
		field{"payload_base64", func(key, n *yaml.Node) {
			several(key)
			text, _ := f.text(n, "payload_base64")
			var err error
			if m.Payload, err = base64.StdEncoding.DecodeString(text); err != nil {
				f.fail(n, "wrong-value", "", "no base64: %s", describeNode(n))
			}
		}},
		field{"pub_props", func(_, n *yaml.Node) { f.pubProps(m, n) }},
	)...)
}

func (f *testFile) topicName(n *yaml.Node) {
	switch {
	case n.Value == "":
		f.fail(n, "wrong-value", "", "topic is empty")
	case strings.ContainsAny(n.Value, "+#\x00"):
		f.fail(n, "wrong-value", "a test publishes to one topic, such as fleet/v7/telemetry", "no topic to publish to: %s", describeNode(n))
	}
}

// time reads milliseconds since 1970, or RFC 3339.
func (f *testFile) time(n *yaml.Node, what string, into *time.Time) {
	if v, ok := parseInteger(n.Value); ok && n.Kind == yaml.ScalarNode && n.Tag == "!!int" && v.kind == kindInt {
		*into = time.UnixMilli(v.int())
		return
	}
	t, err := time.Parse(time.RFC3339, n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		f.fail(n, "wrong-value", "", "%s must be a time such as 2026-03-01T12:00:00Z, or milliseconds since 1970, found %s", what, describeNode(n))
		return
	}
	*into = t
}

// payload is the text that stands there, or the JSON of anything else.
func (f *testFile) payload(n *yaml.Node) []byte {
	v := f.value(n, 0)
	if v.kind == kindString {
		return []byte(v.s)
	}
	return appendJSON(nil, v)
}

// value is a YAML node as JSON has it.
func (f *testFile) value(n *yaml.Node, depth int) value {
	if depth == maxBodyDepth {
		f.fail(n, "nested-too-deeply", "", "a value nests at most %d deep", maxBodyDepth)
		return null
	}
	switch n.Kind {
	case yaml.MappingNode:
		o := &object{}
		f.mapping(n, "a value", func(key, val *yaml.Node) { o.set(key.Value, f.value(val, depth+1)) })
		return objectOf(o)
	case yaml.SequenceNode:
		elems := []value{}
		for _, e := range n.Content {
			elems = append(elems, f.value(e, depth+1))
		}
		return listOf(elems)
	}
	switch n.Tag {
	case "!!null":
		return null
	case "!!bool":
		return boolean(strings.EqualFold(n.Value, "true"))
	case "!!int", "!!float":
		return (&bodyReader{file: f.file}).number(n)
	}
	return str(n.Value)
}

func (f *testFile) pubProps(m *Message, n *yaml.Node) {
	f.fields(n, "pub_props",
		field{"Content-Type", func(_, n *yaml.Node) { m.ContentType, _ = f.text(n, "Content-Type") }},
		field{"Response-Topic", func(_, n *yaml.Node) { m.ResponseTopic, _ = f.text(n, "Response-Topic") }},
		field{"Correlation-Data", func(_, n *yaml.Node) {
			text, _ := f.text(n, "Correlation-Data")
			m.CorrelationData = []byte(text)
		}},
		field{"Message-Expiry-Interval", func(_, n *yaml.Node) {
			var seconds int
			f.int(n, "Message-Expiry-Interval", 0, 1<<32-1, &seconds)
			m.MessageExpiry = uint32(seconds)
		}},
		field{"Payload-Format-Indicator", func(_, n *yaml.Node) {
			var format int
			f.int(n, "Payload-Format-Indicator", 0, 1, &format)
			m.PayloadIsUTF8 = format == 1
		}},
		field{"User-Property", func(_, n *yaml.Node) {
			f.mapping(n, "User-Property", func(key, val *yaml.Node) {
				f.userProperty(m, key.Value, val)
			})
		}},
		field{"User-Property-Pairs", func(_, n *yaml.Node) {
			f.elements(n, "User-Property-Pairs", func(n *yaml.Node) {
				var name string
				var of *yaml.Node
				f.fields(n, "a pair",
					field{"key", func(_, n *yaml.Node) { name, _ = f.text(n, "key") }},
					field{"value", func(_, n *yaml.Node) { of = n }},
				)
				if of != nil {
					f.userProperty(m, name, of)
				}
			})
		}},
	)
}

func (f *testFile) userProperty(m *Message, name string, n *yaml.Node) {
	if text, ok := f.text(n, "a user property"); ok {
		m.UserProperties = append(m.UserProperties, [2]string{name, text})
	}
}

func (f *testFile) expectation(t *Test, n *yaml.Node) {
	x := expectation{line: n.Line, col: n.Column}
	var rule, http, republish, request *yaml.Node
	compare := func(key *yaml.Node, v value) { x.compared = append(x.compared, comparedField{key.Value, v}) }
	ofRequest := func(name string, read func(key, n *yaml.Node)) field {
		return field{name, func(key, n *yaml.Node) {
			request = key
			read(key, n)
		}}
	}
	text := func(key, n *yaml.Node) {
		if text, ok := f.text(n, key.Value); ok {
			compare(key, str(text))
		}
	}
	anything := func(key, n *yaml.Node) { compare(key, f.value(n, 0)) }
	ok := f.fields(n, "an expectation",
		field{"rule", func(_, n *yaml.Node) {
			rule = n
			x.rule, _ = f.text(n, "rule")
		}},
		field{"http", func(_, n *yaml.Node) {
			http = n
			x.http, _ = f.text(n, "http")
		}},
		ofRequest("body", anything),
		ofRequest("id", text),
		ofRequest("lane", func(key, n *yaml.Node) {
			if n.Kind == yaml.ScalarNode && n.Tag == "!!bool" && strings.EqualFold(n.Value, "false") {
				compare(key, boolean(false))
				return
			}
			text(key, n)
		}),
		ofRequest("method", text),
		ofRequest("path", text),
		ofRequest("query", func(key, n *yaml.Node) {
			if n.Kind == yaml.MappingNode {
				f.texts(key, n, compare)
				return
			}
			text(key, n)
		}),
		ofRequest("headers", func(key, n *yaml.Node) { f.texts(key, n, compare) }),
		field{"republish", func(key, n *yaml.Node) {
			republish, x.republish = key, true
			f.fields(n, "republish",
				field{"topic", text},
				field{"payload", anything},
				field{"qos", func(key, n *yaml.Node) {
					var qos byte
					f.small(n, "qos", 2, &qos)
					compare(key, integer(int64(qos)))
				}},
				field{"retain", func(key, n *yaml.Node) {
					var retain bool
					f.bool(n, "retain", &retain)
					compare(key, boolean(retain))
				}},
				field{"user_properties", func(key, n *yaml.Node) { f.texts(key, n, compare) }},
			)
		}},
	)
	if !ok {
		return
	}
	if rule == nil {
		f.fail(n, "missing-key", "", "an expectation needs %s", quote("rule"))
	}
	switch {
	case http == nil && republish == nil:
		f.fail(n, "missing-key", "", "an expectation needs %s or %s", quote("http"), quote("republish"))
	case republish != nil && (http != nil || request != nil):
		f.fail(republish, "several-inputs", "make it two expectations", "an expectation is about a request or about a message that is republished")
	}
	f.resolve(&x, rule, http, republish)
	t.expect = append(t.expect, x)
}

// texts reads a mapping of texts.
func (f *testFile) texts(key, n *yaml.Node, compare func(*yaml.Node, value)) {
	o := &object{}
	f.mapping(n, key.Value, func(name, n *yaml.Node) {
		if text, ok := f.text(n, name.Value); ok {
			o.set(name.Value, str(text))
		}
	})
	compare(key, objectOf(o))
}

// resolve looks up what the expectation names: what can never be sent is a mistake.
func (f *testFile) resolve(x *expectation, rule, http, republish *yaml.Node) {
	if f.set == nil || x.rule == "" {
		return
	}
	r := f.set.ruleNamed(x.rule)
	if r == nil {
		var names []string
		for _, r := range f.set.rules {
			names = append(names, r.Name)
		}
		hint := didYouMean(x.rule, names)
		if len(names) == 0 {
			hint = "there are no rules beside the test: name their files or folders too"
		}
		f.fail(rule, "unknown-rule", hint, "unknown rule %s", quote(x.rule))
		return
	}
	if x.republish && len(r.republishes) == 0 {
		f.fail(republish, "unknown-destination", "", "rule %s republishes nothing", quote(x.rule))
	}
	if x.http == "" {
		return
	}
	sends := make(map[string]bool)
	for _, a := range r.actions {
		sends[a.destination.Name] = true
	}
	if !sends[x.http] {
		to := slices.Sorted(maps.Keys(sends))
		hint := didYouMean(x.http, to)
		f.fail(http, "unknown-destination", cmp.Or(hint, "it sends to "+cmp.Or(strings.Join(to, ", "), "none")), "rule %s does not send to destination %s", quote(x.rule), quote(x.http))
	}
}
