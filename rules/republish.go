package rules

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// republish is an action that publishes a message.
type republish struct {
	topic       template
	qos, retain option
	payload     func(*env) []byte
	user        func(*env) [][2]string
	at          *yaml.Node // of the topic, while the set is made
}

// option is a number that stands in the file or in one variable.
type option struct {
	constant byte
	variable template // empty: constant counts
}

// message makes the message of the row at hand; wrong says why there is none. size
// is what was made in any case, in bytes.
func (r *republish) message(e *env) (m *Message, size int, wrong string) {
	topic := string(r.topic.renderRaw(e, nil))
	e.tooLong = false // checkTopic bounds it more closely
	if wrong := checkTopic(topic); wrong != "" {
		return nil, len(topic), wrong
	}
	qos, ok := r.qos.of(e, 2)
	if !ok {
		return nil, len(topic), "qos is none: " + quote(e.variable(r.qos.variable[0].path).text())
	}
	retain, ok := r.retain.of(e, 1)
	if !ok {
		return nil, len(topic), "retain is neither true nor false: " + quote(e.variable(r.retain.variable[0].path).text())
	}
	m = &Message{Topic: topic, QoS: qos, Retain: retain == 1, Payload: r.payload(e), UserProperties: r.user(e)}
	if e.tooLong {
		e.tooLong = false
		return nil, len(topic) + maxBody, payloadTooLong
	}
	return m, m.size(), ""
}

var payloadTooLong = fmt.Sprintf("the payload has more than %d bytes", maxBody)

// of is the option's number, at most high; true and false are 1 and 0. Undefined is
// the default, 0.
func (o *option) of(e *env, high byte) (byte, bool) {
	if len(o.variable) == 0 {
		return o.constant, true
	}
	v := e.variable(o.variable[0].path)
	if !v.defined() {
		e.missing = true
		return 0, true
	}
	switch text := v.text(); {
	case high == 1 && text == "false":
		return 0, true
	case high == 1 && text == "true":
		return 1, true
	default:
		n, err := strconv.ParseUint(text, 10, 8)
		return byte(n), err == nil && byte(n) <= high
	}
}

// maxTopic bounds a topic name in bytes [MQTT-1.5.4]; maxLevels is the bound that
// the broker's clients are held to.
const (
	maxTopic  = 65535
	maxLevels = 128
)

// checkTopic says what keeps a topic name from being published to, "" if nothing
// does. MQTT 5 section 4.7; names that begin with $ are the broker's own.
func checkTopic(topic string) string {
	switch {
	case topic == "":
		return "the topic is empty"
	case len(topic) > maxTopic:
		return "the topic has more than 65,535 bytes"
	case strings.Count(topic, "/") >= maxLevels:
		return "the topic has more than 128 levels: " + quote(topic)
	case !utf8.ValidString(topic):
		return "the topic is not UTF-8: " + quote(topic)
	}
	if wrong := checkTopicText(topic); wrong != "" {
		return wrong + ": " + quote(topic)
	}
	if topic[0] == '$' {
		return "the topic begins with $: " + quote(topic)
	}
	return ""
}

// checkTopicText is checkTopic for a part of a topic.
func checkTopicText(text string) string {
	switch {
	case strings.ContainsAny(text, "+#"):
		return "the topic holds a wildcard"
	case strings.ContainsRune(text, 0):
		return "the topic holds the NUL character"
	}
	return ""
}

// republish reads the action of that name.
func (l *loader) republish(f *file, d *ruleDecl, n *yaml.Node) {
	b := &bodyReader{file: f, program: d.program}
	r := republish{payload: asPayload(rowBody), user: selectedUserProperties}
	var payload, raw *yaml.Node
	ok := f.fields(n, "republish",
		field{"topic", func(_, n *yaml.Node) {
			r.at = n
			if text, ok := f.text(n, "topic"); ok {
				r.topic = b.topic(n, text)
			}
		}},
		field{"qos", func(_, n *yaml.Node) {
			if r.qos.variable = b.only(n); r.qos.variable == nil {
				var qos int
				f.int(n, "qos", 0, 2, &qos)
				r.qos.constant = byte(qos)
			}
		}},
		field{"retain", func(_, n *yaml.Node) {
			if r.retain.variable = b.only(n); r.retain.variable == nil {
				var retain bool
				f.bool(n, "retain", &retain)
				if retain {
					r.retain.constant = 1
				}
			}
		}},
		field{"payload", func(key, n *yaml.Node) {
			payload = key
			b.checkStringPayload(n)
			r.payload = asPayload(b.read(n))
		}},
		field{"payload_template", func(key, n *yaml.Node) {
			raw = key
			if text, ok := f.text(n, "payload_template"); ok {
				t := b.raw(n, text)
				r.payload = func(e *env) []byte { return t.renderRaw(e, nil) }
			}
		}},
		field{"user_properties", func(_, n *yaml.Node) { r.user = b.userProperties(n) }},
	)
	if !ok {
		return
	}
	if r.at == nil {
		f.fail(n, "missing-key", "", "republish needs %s", quote("topic"))
		return
	}
	if payload != nil && raw != nil {
		f.fail(raw, "two-payloads", "keep one of them", "both payload and payload_template")
	}
	d.Rule.republishes = append(d.Rule.republishes, r)
}

func asPayload(body bodyFn) func(*env) []byte {
	return func(e *env) []byte {
		b, ok := body(e, make([]byte, 0, bodySize))
		if !ok {
			e.missing = true
			b = append(b[:0], "null"...)
		}
		return b
	}
}

// topic reads the template of a topic. What stands in it as text is checked.
func (b *bodyReader) topic(n *yaml.Node, text string) template {
	t := b.template(n, text)
	bad := func(at span, wrong string) {
		b.file.within(n, diagnostic{span: at, name: "bad-topic", message: wrong})
	}
	size := 0
	for i, p := range t {
		if p.isVar {
			continue
		}
		size += len(p.text)
		if wrong := checkTopicText(p.text); wrong != "" {
			bad(p.span, wrong)
		} else if i == 0 && strings.HasPrefix(p.text, "$") {
			bad(p.span, "the topic begins with $")
		}
	}
	switch {
	case text == "":
		b.file.fail(n, "bad-topic", "", "the topic is empty")
	case size > maxTopic:
		b.file.fail(n, "bad-topic", "", "the topic has more than 65,535 bytes")
	}
	return t
}

// checkStringPayload warns of a payload that is JSON for a string, quotes and all:
// whoever moves a rule over from EMQX means the text.
func (b *bodyReader) checkStringPayload(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		return
	}
	if t := parseTemplate(n.Value, func(diagnostic) {}); len(t) == 1 && t[0].isVar && (len(t[0].path) != 1 || t[0].path[0].key != "payload") {
		return // of a type that is not known
	}
	b.file.warn(n, "string-payload", "payload_template publishes the text as it stands", "the payload is a JSON string, in quotes")
}

// only is the template that n holds if that is one variable, else nil.
func (b *bodyReader) only(n *yaml.Node) template {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || !isVariable(n.Value) {
		return nil
	}
	return b.template(n, n.Value)
}

// originalUserProperties is what EMQX takes for the user properties of the message
// that the rule has fired on, though it is no variable elsewhere.
const originalUserProperties = "${pub_props.'User-Property'}"

// selectedUserProperties are those of an action that names none: as in EMQX, the
// output of this name, if it is a map.
func selectedUserProperties(e *env) [][2]string {
	if v := e.out.lookup("user_properties"); v.isObject() {
		return e.pairs(v)
	}
	return nil
}

// userProperties reads what the message's user properties are: a mapping, or a
// variable that is a map.
func (b *bodyReader) userProperties(n *yaml.Node) func(*env) [][2]string {
	if n.Kind == yaml.ScalarNode && n.Value == originalUserProperties {
		return func(e *env) [][2]string {
			if m, ok := e.row.(*Message); ok {
				return slices.Clone(m.UserProperties)
			}
			return nil
		}
	}
	if t := b.only(n); t != nil {
		return func(e *env) [][2]string { return e.pairs(e.variable(t[0].path)) }
	}
	type property struct {
		name  string
		value template
	}
	var all []property
	b.file.mapping(n, "user_properties", func(key, val *yaml.Node) {
		text, ok := b.file.text(val, "a user property")
		if wrong := checkPropertyText(key.Value); wrong != "" {
			b.file.fail(key, "bad-user-property", "", "the name of a user property %s", wrong)
		} else if wrong := checkPropertyText(text); wrong != "" {
			b.file.fail(val, "bad-user-property", "", "the value of a user property %s", wrong)
		}
		if strings.Contains(key.Value, "${") {
			b.file.fail(key, "bad-template", "", "the names of user properties cannot hold variables")
		}
		if ok {
			all = append(all, property{key.Value, b.template(val, text)})
		}
	})
	return func(e *env) [][2]string {
		pairs := make([][2]string, 0, len(all))
		for _, p := range all {
			text, end := p.value.render(e, nil, maxPropertyText, plain)
			if end != whole || checkPropertyText(string(text)) != "" {
				e.missing = true
				continue
			}
			pairs = append(pairs, [2]string{p.name, string(text)})
		}
		return pairs
	}
}

// pairs are the members of a map as user properties. Those that are lists have
// several of one name.
func (e *env) pairs(v value) (pairs [][2]string) {
	v = v.decoded()
	if v.kind == kindString {
		v = e.opened(v).decoded()
	}
	if v.kind != kindObject {
		e.missing = true
		return nil
	}
	add := func(name string, v value) {
		text := v.text()
		if !v.defined() || checkPropertyText(name) != "" || checkPropertyText(text) != "" {
			e.missing = true
			return
		}
		pairs = append(pairs, [2]string{strings.Clone(name), strings.Clone(text)})
	}
	for _, m := range v.object().members {
		if of := m.val.decoded(); of.kind == kindList {
			for _, elem := range of.list() {
				add(m.key, elem)
			}
			continue
		}
		add(m.key, m.val)
	}
	return pairs
}

const maxPropertyText = 65535

// checkPropertyText says what keeps a text from being the name or the value of a
// user property [MQTT-1.5.4], "" if nothing does.
func checkPropertyText(text string) string {
	switch {
	case len(text) > maxPropertyText:
		return "has more than 65,535 bytes"
	case !utf8.ValidString(text):
		return "is not UTF-8"
	case strings.ContainsRune(text, 0):
		return "holds the NUL character"
	}
	return ""
}
