package rules

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// template is text with ${...} in it, in parts.
type template []part

// part is literal text, a variable, or the place of a secret, which a NUL marks.
type part struct {
	span
	text     string
	isVar    bool
	isSecret bool
	path     []step // of a variable; empty: ${.}, the whole row
}

// templateReader says how a template is read.
type templateReader struct {
	// report is told what is wrong. That stays in the template as it stands, for those
	// who do not mind.
	report func(diagnostic)
	// secret is told of ${env:NAME} and ${file:PATH}; nil: they are wrong.
	secret func(where span, name string)
	// lenient: what is no variable is text, with a warning.
	lenient bool
}

// parseTemplate reads a template without secrets.
func parseTemplate(text string, report func(diagnostic)) template {
	return templateReader{report: report}.read(text)
}

// read reads a template. A variable is made of letters, digits, _ and points; ${$}
// is a literal $.
func (r templateReader) read(text string) template {
	var t template
	literal := func(where span, text string) {
		if n := len(t); n > 0 && !t[n-1].isVar && !t[n-1].isSecret {
			t[n-1].end, t[n-1].text = where.end, t[n-1].text+text
			return
		}
		t = append(t, part{span: where, text: text})
	}
	for at := 0; at < len(text); {
		n := strings.Index(text[at:], "${")
		if n < 0 {
			n = len(text) - at
		}
		if n > 0 {
			literal(span{at, at + n}, text[at:at+n])
			at += n
			continue
		}
		end := strings.IndexByte(text[at:], '}')
		if end < 0 {
			r.report(diagnostic{span: span{at, len(text)}, severity: r.severity(), name: "bad-template", message: "${ is never closed", hint: "a literal ${ is written ${$}{"})
			literal(span{at, len(text)}, text[at:])
			break
		}
		where, name := span{at, at + end + 1}, text[at+2:at+end]
		switch path, ok := r.variable(where, name); {
		case name == "$":
			literal(where, "$")
		case r.secret != nil && isSecretName(name):
			r.secret(where, name)
			t = append(t, part{span: where, isSecret: true, text: "\x00"})
		case ok:
			t = append(t, part{span: where, isVar: true, path: path})
		default: // what comes behind may be a variable all the same
			where.end = at + len("${")
			literal(where, "${")
		}
		at = where.end
	}
	return t
}

// variable is the path that a variable names; nil for the whole row.
func (r templateReader) variable(where span, name string) (path []step, ok bool) {
	bad := func(s Severity, hint, format string, args ...any) ([]step, bool) {
		r.report(diagnostic{span: where, severity: s, name: "bad-template", hint: hint, message: fmt.Sprintf(format, args...)})
		return nil, false
	}
	switch {
	case name == "$", r.secret != nil && isSecretName(name):
		return nil, false
	case isSecretName(name):
		return bad(Error, "secrets are allowed in headers, credentials and signing of destinations alone", "%s is a secret", quote(name))
	case name == ".":
		return nil, true
	}
	for key := range strings.SplitSeq(strings.TrimPrefix(name, "."), ".") {
		if key == "" || strings.ContainsFunc(key, func(r rune) bool { return r >= utf8.RuneSelf || !isLetter(byte(r)) && !isDigit(byte(r)) && r != '_' }) {
			return bad(r.severity(), "a variable is made of letters, digits, _ and points; select anything else AS a name of its own", "bad variable %s", quote("${"+name+"}"))
		}
		path = append(path, step{kind: stepKey, key: key})
	}
	return path, true
}

func (r templateReader) severity() Severity {
	if r.lenient {
		return Warning
	}
	return Error
}

func isSecretName(name string) bool {
	return strings.HasPrefix(name, "env:") || strings.HasPrefix(name, "file:")
}

// hasVariables reports whether the template's text depends on the row.
func (t template) hasVariables() bool {
	return slices.ContainsFunc(t, func(p part) bool { return p.isVar })
}

// variable is what ${path} stands for: an output, or a field of one. A string is
// read into as JSON, but not a string within that.
func (e *env) variable(path []step) value {
	if len(path) == 0 {
		return objectOf(&e.out)
	}
	v, opened := e.out.lookup(path[0].key), false
	for i := range path[1:] {
		if v.kind == kindString {
			if opened {
				return value{}
			}
			opened = true
		}
		v = e.field(v, &path[1+i])
	}
	return v
}

// rendered is how the rendering of a text ended.
type rendered int

const (
	whole   rendered = iota
	lacking          // a variable is undefined
	tooLong
)

// render appends the template's text, each piece passed through escape, until dst is
// longer than most bytes.
func (t template) render(e *env, dst []byte, most int, escape func([]byte, string) []byte) ([]byte, rendered) {
	for i := range t {
		p := &t[i]
		text := p.text
		if p.isVar {
			v := e.variable(p.path)
			if !v.defined() {
				return dst, lacking
			}
			text = v.text()
		}
		if dst = escape(dst, text); len(dst) > most {
			return dst, tooLong
		}
	}
	return dst, whole
}

func plain(dst []byte, s string) []byte { return append(dst, s...) }

// renderRaw appends the text as EMQX would, unless it becomes too long: nothing is
// escaped, what is undefined reads undefined, and an empty template is the whole row.
func (t template) renderRaw(e *env, dst []byte) []byte {
	if len(t) == 0 {
		t = template{{isVar: true}}
	}
	for i := range t {
		if p := &t[i]; p.isVar {
			dst = append(dst, e.spelled(e.variable(p.path)).text()...)
		} else {
			dst = append(dst, p.text...)
		}
		if len(dst) > maxBody {
			e.tooLong = true
			return dst
		}
	}
	return dst
}

// spelled is v with the word for everything undefined in it.
func (e *env) spelled(v value) value {
	if isWhole(v) {
		return v
	}
	e.missing = true
	switch v.kind {
	case kindObject:
		o := v.object().clone()
		for i := range o.members {
			o.members[i].val = e.spelled(o.members[i].val)
		}
		return objectOf(o)
	case kindList:
		elems := slices.Clone(v.list())
		for i := range elems {
			elems[i] = e.spelled(elems[i])
		}
		return listOf(elems)
	}
	return str("undefined")
}

// isWhole reports whether nothing in v is undefined.
func isWhole(v value) bool {
	switch v.kind {
	case kindObject:
		return !slices.ContainsFunc(v.object().members, func(m member) bool { return !isWhole(m.val) })
	case kindList:
		return !slices.ContainsFunc(v.list(), func(e value) bool { return !isWhole(e) })
	}
	return v.defined()
}

// maxID bounds a webhook-id, in bytes: it is a header and part of a key in the
// receiver's database.
const maxID = 255

// renderID is the delivery's id: "" where a variable is undefined, or where the
// text is too long for an id or holds control characters.
func (t template) renderID(e *env) string {
	if len(t) == 0 {
		return ""
	}
	b, end := t.render(e, nil, maxBody, plain)
	id := strings.TrimSpace(string(b))
	if end != whole || id == "" || len(id) > maxID || !utf8.ValidString(id) || strings.ContainsFunc(id, unicode.IsControl) {
		e.missing = true
		return ""
	}
	return id
}

// maxBody bounds what is rendered of a body, in bytes. It is above what the largest
// packet that is taken by default (1 MiB) becomes where each of its bytes is escaped.
const maxBody = 8 << 20

// maxBodies bounds them for all that one message owes, with what else is rendered of its requests, whatever rows there are: they are
// in memory together, and no more than that may wait there for the outbox's flush.
const maxBodies = 64 << 20

// bodyFn renders a part of a structured body as JSON. It is false, and what it
// wrote to be dropped, if a variable is undefined. What becomes longer than maxBody ends
// early, and e.tooLong is set.
type bodyFn func(e *env, dst []byte) ([]byte, bool)

// rowBody is the body of an action that defines none: the outputs. What is undefined
// in them is left out as in any structured body; an empty body_template spells it, as
// EMQX does.
func rowBody(e *env, dst []byte) ([]byte, bool) {
	row := objectOf(&e.out)
	e.missing = e.missing || !isWhole(row)
	return e.bounded(appendJSON(dst, row)), true
}

// rawBody is a body_template.
func rawBody(t template) bodyFn {
	return func(e *env, dst []byte) ([]byte, bool) { return t.renderRaw(e, dst), true }
}

// bounded notes whether a body is too long.
func (e *env) bounded(dst []byte) []byte {
	e.tooLong = e.tooLong || len(dst) > maxBody
	return dst
}

func constantBody(v value) bodyFn {
	text := appendJSON(nil, v)
	return func(_ *env, dst []byte) ([]byte, bool) { return append(dst, text...), true }
}

// textBody is a string with variables. A variable alone keeps its type.
func textBody(t template) bodyFn {
	if len(t) == 1 && t[0].isVar {
		path := t[0].path
		return func(e *env, dst []byte) ([]byte, bool) {
			v := e.variable(path)
			return e.bounded(appendJSON(dst, v)), v.defined()
		}
	}
	return func(e *env, dst []byte) ([]byte, bool) {
		dst, end := t.render(e, append(dst, '"'), maxBody, appendEscaped)
		e.tooLong = e.tooLong || end == tooLong
		return append(dst, '"'), end != lacking
	}
}

// bodyMember is one key of a structured body.
type bodyMember struct {
	key  string
	body bodyFn
}

// mapBody leaves out the keys whose value is undefined.
func mapBody(members []bodyMember) bodyFn {
	keys := make([][]byte, len(members))
	for i, m := range members {
		keys[i] = append(appendString([]byte{','}, m.key), ':')
	}
	return func(e *env, dst []byte) ([]byte, bool) {
		open := len(dst)
		dst = append(dst, '{')
		for i := range members {
			mark := len(dst)
			key := keys[i]
			if mark == open+1 {
				key = key[1:] // no comma before the first
			}
			var ok bool
			dst, ok = members[i].body(e, append(dst, key...))
			if e.bounded(dst); e.tooLong {
				return dst, true
			}
			if !ok {
				e.missing = true
				dst = dst[:mark]
			}
		}
		return append(dst, '}'), true
	}
}

// listBody puts null for an element that is undefined, so that the others keep
// their places.
func listBody(elems []bodyFn) bodyFn {
	return func(e *env, dst []byte) ([]byte, bool) {
		dst = append(dst, '[')
		for i, elem := range elems {
			if i > 0 {
				dst = append(dst, ',')
			}
			mark := len(dst)
			var ok bool
			dst, ok = elem(e, dst)
			if e.bounded(dst); e.tooLong {
				return dst, true
			}
			if !ok {
				e.missing = true
				dst = append(dst[:mark], "null"...)
			}
		}
		return append(dst, ']'), true
	}
}
