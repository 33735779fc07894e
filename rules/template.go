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

// part is literal text, or a variable.
type part struct {
	span
	text  string
	isVar bool
	path  []step // of a variable; empty: ${.}, the whole row
}

// parseTemplate reads a template. A variable is made of letters, digits, _ and
// points; ${$} is a literal $. What is reported stays in the template as it
// stands, for those who do not mind.
func parseTemplate(text string, report func(diagnostic)) template {
	var t template
	for at := 0; at < len(text); {
		n := strings.Index(text[at:], "${")
		if n < 0 {
			return append(t, part{span: span{at, len(text)}, text: text[at:]})
		}
		if n > 0 {
			t = append(t, part{span: span{at, at + n}, text: text[at : at+n]})
			at += n
		}
		end := strings.IndexByte(text[at:], '}')
		if end < 0 {
			report(diagnostic{span: span{at, len(text)}, name: "bad-template", message: "${ is never closed", hint: "a literal ${ is written ${$}{"})
			return append(t, part{span: span{at, len(text)}, text: text[at:]})
		}
		where := span{at, at + end + 1}
		t = append(t, variable(where, text[at+2:at+end], report))
		at = where.end
	}
	return t
}

func variable(where span, name string, report func(diagnostic)) part {
	p := part{span: where}
	bad := func(hint, format string, args ...any) part {
		report(diagnostic{span: where, name: "bad-template", hint: hint, message: fmt.Sprintf(format, args...)})
		return part{span: where, text: "${" + name + "}"}
	}
	switch {
	case name == "$":
		p.text = "$"
		return p
	case strings.HasPrefix(name, "env:"), strings.HasPrefix(name, "file:"):
		return bad("secrets are allowed in headers, credentials and signing of destinations alone", "%s is a secret", quote(name))
	case name == ".":
		p.isVar = true
		return p
	}
	for key := range strings.SplitSeq(strings.TrimPrefix(name, "."), ".") {
		if key == "" || strings.ContainsFunc(key, func(r rune) bool { return r >= utf8.RuneSelf || !isLetter(byte(r)) && !isDigit(byte(r)) && r != '_' }) {
			return bad("a variable is made of letters, digits, _ and points; select anything else AS a name of its own", "bad variable %s", quote("${"+name+"}"))
		}
		p.path = append(p.path, step{kind: stepKey, key: key})
	}
	p.isVar = true
	return p
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

// render appends the template's text, each piece passed through escape. It is
// false if a variable is undefined.
func (t template) render(e *env, dst []byte, escape func([]byte, string) []byte) ([]byte, bool) {
	for i := range t {
		p := &t[i]
		text := p.text
		if p.isVar {
			v := e.variable(p.path)
			if !v.defined() {
				return dst, false
			}
			text = v.text()
		}
		dst = escape(dst, text)
	}
	return dst, true
}

func plain(dst []byte, s string) []byte { return append(dst, s...) }

// renderRaw appends the text as EMQX would: nothing is escaped, what is undefined
// reads undefined, and an empty template is the whole row.
func (t template) renderRaw(e *env, dst []byte) []byte {
	if len(t) == 0 {
		t = template{{isVar: true}}
	}
	for i := range t {
		if p := &t[i]; p.isVar {
			dst = append(dst, spelled(e.variable(p.path)).text()...)
		} else {
			dst = append(dst, p.text...)
		}
	}
	return dst
}

// spelled is v with the word for everything undefined in it.
func spelled(v value) value {
	switch v.kind {
	case kindUndefined:
		return str("undefined")
	case kindObject:
		o := v.object().clone()
		for i := range o.members {
			o.members[i].val = spelled(o.members[i].val)
		}
		return objectOf(o)
	case kindList:
		elems := slices.Clone(v.list())
		for i := range elems {
			elems[i] = spelled(elems[i])
		}
		return listOf(elems)
	}
	return v
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
	b, ok := t.render(e, nil, plain)
	id := strings.TrimSpace(string(b))
	if !ok || id == "" || len(id) > maxID || !utf8.ValidString(id) || strings.ContainsFunc(id, unicode.IsControl) {
		e.missing = true
		return ""
	}
	return id
}

// bodyFn renders a part of a structured body as JSON. It is false, and what it
// wrote to be dropped, if a variable is undefined.
type bodyFn func(e *env, dst []byte) ([]byte, bool)

// rowBody is the body of an action that defines none: the outputs.
func rowBody(e *env, dst []byte) ([]byte, bool) {
	for i := range e.out.members {
		e.missing = e.missing || !e.out.members[i].val.defined()
	}
	return appendJSON(dst, objectOf(&e.out)), true
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
			return appendJSON(dst, v), v.defined()
		}
	}
	return func(e *env, dst []byte) ([]byte, bool) {
		dst, ok := t.render(e, append(dst, '"'), appendEscaped)
		return append(dst, '"'), ok
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
			if dst, ok = members[i].body(e, append(dst, key...)); !ok {
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
			if dst, ok = elem(e, dst); !ok {
				e.missing = true
				dst = append(dst[:mark], "null"...)
			}
		}
		return append(dst, ']'), true
	}
}
