package rules

import (
	"encoding/base64"
	"fmt"
	"time"
)

// Eval runs one statement on one event, both in a line of JSON:
//
//	{"sql": "SELECT payload.x AS x FROM \"t\"", "event": {"topic": "t", "payload": "{\"x\":1}"}}
//
// and answers a line of JSON, without the line break: {"matched":true,"rows":[{"x":1}]},
// {"matched":false}, {"error":"parse","message":"line:col: ..."} with the position
// in the statement, {"error":"runtime","message":"..."}, or {"error":"request",...}
// for a line that is no such request. A "template" beside sql is raw text with
// variables: then the answer has "rendered" too, a text for each row.
//
// The keys of the event are columns, save that payload_base64 is the payload's
// bytes and retain becomes flags.retain. A column that is not given is undefined.
// If a topic is given, the FROM clause must match it; if event is, an event's name as
// that column has it or as FROM does, $events/ or not, the FROM clause must select from it. now is the clock; nil is
// time.Now.
func Eval(line []byte, now func() time.Time) []byte {
	if now == nil {
		now = time.Now
	}
	asked, ok := decodeJSON(string(line))
	if !ok || asked.kind != kindObject {
		return answerError("request", "no JSON object")
	}
	sql, event, template := asked.object().lookup("sql"), asked.object().lookup("event"), asked.object().lookup("template")
	switch {
	case sql.kind != kindString:
		return answerError("request", "sql must be a string")
	case event.defined() && event.kind != kindObject:
		return answerError("request", "event must be an object")
	case template.defined() && template.kind != kindString:
		return answerError("request", "template must be a string")
	}
	p, failed := compileAlone(sql.s)
	if failed != "" {
		return answerError("parse", failed)
	}
	columns, payload, err := eventColumns(event)
	if err != nil {
		return answerError("request", err.Error())
	}
	return p.eval(columns, payload, template, now)
}

// compileAlone answers the first error of a statement as line:col: message.
func compileAlone(sql string) (p *program, failed string) {
	var first *diagnostic
	p = compile(sql, func(d diagnostic) {
		if d.severity == Error && (first == nil || d.start < first.start) {
			first = &d
		}
	})
	if first == nil {
		return p, ""
	}
	line, col := lineCol(sql, first.start)
	return nil, fmt.Sprintf("%d:%d: %s", line, col, first.message)
}

func (p *program) eval(columns *object, payload []byte, template value, now func() time.Time) []byte {
	no := objectOf(&object{members: []member{{"matched", boolean(false)}}})
	kind, isEvent, err := eventAsked(columns)
	if err != nil {
		return answerError("request", err.Error())
	}
	topic := columns.lookup("topic")
	if isEvent && !p.events.has(kind) || !isEvent && topic.kind == kindString && !p.selectsFrom(topic.s) {
		return appendJSON(nil, no)
	}
	e := &env{now: now}
	e.reset(eventRow{columns}, payload)
	var render bodyFn
	if template.defined() {
		render = rawBody(parseTemplate(template.s, func(diagnostic) {}))
	}
	rows, rendered, err := p.rows(e, render)
	switch {
	case err != nil:
		return answerError("runtime", err.Error())
	case len(rows) == 0:
		return appendJSON(nil, no)
	}
	answer := &object{members: []member{{"matched", boolean(true)}, {"rows", listOf(rows)}}}
	if render != nil {
		answer.set("rendered", listOf(rendered))
	}
	return appendJSON(nil, objectOf(answer))
}

// rows are all rows of the env's message, and what render makes of each, unless it is
// nil.
func (p *program) rows(e *env, render bodyFn) (rows, rendered []value, err error) {
	var ok bool
	for ok, err = p.first(e); ok && err == nil; ok, err = p.next(e) {
		if len(rows) == MaxRows {
			return nil, nil, tooManyRows(MaxRows)
		}
		rows = append(rows, objectOf(e.out.clone()))
		if render == nil {
			continue
		}
		text, _ := render(e, nil)
		if e.tooLong {
			return nil, nil, renderFailed("the template makes more than %d bytes", maxBody)
		}
		if e.spent += len(text); e.spent > maxBodies {
			return nil, nil, renderFailed("the templates of all rows make more than %d bytes", maxBodies)
		}
		rendered = append(rendered, str(string(text)))
	}
	return rows, rendered, err
}

func (p *program) selectsFrom(topic string) bool {
	for _, f := range p.filters {
		if matchFilter(f, topic) {
			return true
		}
	}
	return false
}

func answerError(name, message string) []byte {
	return appendJSON(nil, objectOf(&object{members: []member{{"error", str(name)}, {"message", str(message)}}}))
}

// eventRow is an event given as JSON.
type eventRow struct{ columns *object }

func (r eventRow) column(name string) value { return r.columns.lookup(name) }

func (r eventRow) each(fn func(string, value)) {
	for _, m := range r.columns.members {
		fn(m.key, m.val)
	}
}

func eventColumns(event value) (columns *object, payload []byte, err error) {
	columns = &object{}
	if !event.defined() {
		return columns, nil, nil
	}
	for _, m := range event.object().members {
		switch m.key {
		case "payload":
			if m.val.kind != kindString {
				return nil, nil, fmt.Errorf("payload must be a string")
			}
			payload = []byte(m.val.s)
			columns.set("payload", payloadValue(payload))
		case "payload_base64":
			if payload, err = base64.StdEncoding.DecodeString(m.val.s); err != nil || m.val.kind != kindString {
				return nil, nil, fmt.Errorf("payload_base64 must be a string in base64")
			}
			columns.set("payload", payloadValue(payload))
		case "retain":
			columns.set("flags", objectOf(&object{members: []member{{"retain", m.val}}}))
		default:
			columns.set(m.key, m.val)
		}
	}
	return columns, payload, nil
}
