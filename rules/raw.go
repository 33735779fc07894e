package rules

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// raw reads a body_template. What would be an error in a structured body stays as it
// stands, as it does in EMQX, with a warning.
func (b *bodyReader) raw(n *yaml.Node, text string) template {
	t := templateReader{lenient: true, report: func(d diagnostic) { b.file.within(n, d) }}.read(text)
	b.checkSelected(n, t)
	if !strings.HasPrefix(strings.TrimLeft(text, jsonSpace), "{") {
		return t
	}
	for _, i := range outlineOf(t).quoted {
		if p := &t[i]; len(p.path) == 0 || !b.isNumber(p.path) {
			b.file.within(n, diagnostic{
				span: p.span, severity: Warning, name: "unescaped-in-quotes",
				message: fmt.Sprintf("%s stands in quotes and is not escaped: a quote or a line break in it breaks the JSON", quote(text[p.start:p.end])),
				hint:    "text under body: is escaped",
			})
		}
	}
	return t
}

// isNumber reports whether a variable is surely a number.
func (b *bodyReader) isNumber(path []step) bool {
	return len(path) == 1 && b.program != nil && slices.Contains(b.program.numbers, path[0].key)
}

const jsonSpace = " \t\r\n"

// outline is a raw template as JSON, as far as that can be told.
type outline struct {
	quoted []int  // the variables that stand within quotes, as indexes
	json   string // the text with a stand-in for each variable
}

// outlineOf puts a value where the template seems to have one, and a member where it
// seems to have members.
func outlineOf(t template) outline {
	var o outline
	var b strings.Builder
	var open []byte // the brackets that are open
	inString, escaped := false, false
	last := byte(0) // outside of strings, spaces left out
	for i := range t {
		if t[i].isVar {
			switch inObject := len(open) > 0 && open[len(open)-1] == '{'; {
			case inString:
				o.quoted = append(o.quoted, i)
				b.WriteByte('x')
			case inObject && (last == '{' || last == ','):
				b.WriteString(`"x":1`)
			default:
				b.WriteByte('1')
			}
			if !inString {
				last = 'x'
			}
			continue
		}
		for j := range len(t[i].text) {
			c := t[i].text[j]
			b.WriteByte(c)
			switch {
			case escaped:
				escaped = false
			case inString:
				escaped = c == '\\'
				inString = c != '"'
			case c == '"':
				inString = true
			case c == '{' || c == '[':
				open = append(open, c)
			case (c == '}' || c == ']') && len(open) > 0:
				open = open[:len(open)-1]
			}
			if !inString && strings.IndexByte(jsonSpace, c) < 0 {
				last = c
			}
		}
	}
	o.json = b.String()
	return o
}

// checkRawTraceFields warns of a body_template that can be no JSON object although the
// trace context is to go into it.
func (b *bodyReader) checkRawTraceFields(n *yaml.Node, t template, to TraceBody) {
	if to == (TraceBody{}) || len(t) == 0 || len(t) == 1 && t[0].isVar {
		return
	}
	json := strings.Trim(outlineOf(t).json, jsonSpace)
	if !strings.HasPrefix(json, "{") && !t[0].isVar || !validJSON(json) {
		b.file.warn(n, "body-not-object", "make the body a mapping, or set trace: {body: {}} in the destination", "the body can be no JSON object, so the trace context cannot go into its field %s", quote(cmp.Or(to.SW8, to.Correlation)))
	}
}

// numberColumns are the columns that are never text.
var numberColumns = []string{"timestamp", "qos", "publish_received_at", "connected_at", "disconnected_at", "keepalive", "proto_ver", "expiry_interval"}

// numberCalls are the functions that answer nothing but numbers, of those that messages
// to people have.
var numberCalls = []string{"abs", "ceil", "float", "floor", "int", "length", "now_timestamp", "qos", "round", "strlen"}

// isNumeric reports whether x is surely a number where it is defined.
func isNumeric(x expr) bool {
	switch x := x.(type) {
	case *literal:
		return x.val.isNumber()
	case *unary:
		return true
	case *binary:
		return x.op == tokenMinus || x.op == tokenStar || x.op == tokenSlash || x.op == keywordDiv || x.op == keywordMod
	case *call:
		return slices.Contains(numberCalls, x.name)
	case *ref:
		return len(x.steps) == 1 && slices.Contains(numberColumns, x.root().key)
	}
	return false
}
