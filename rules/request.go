package rules

import (
	"net/url"
	"strings"
)

// Bounds of what is rendered of a request beside its body, in bytes. Servers take
// 8 kB of a request line and of a header; what is longer would come back as 414 or 431
// for good.
const (
	maxTarget = 8 << 10 // path and query, escaped
	maxHeader = 8 << 10
)

// request is what of a destination's requests depends on the row, beside the body.
type request struct {
	destination string
	path        []segment
	query       []parameter
	headers     []header
}

// segment is what a path has between two slashes.
type segment struct {
	template template // its text parts are escaped already
	plain    []string // what these stand for, "" for a variable
}

// parameter is a key of the query.
type parameter struct {
	key      string // escaped, with the equals sign
	template template
}

type header struct {
	name     string
	template template
}

// render adds to d what the row makes of the request, or answers the fault that it
// can't be made: it is too long, or would lead elsewhere.
func (r *request) render(e *env, d *Delivery) error {
	path, err := r.renderPath(e)
	if err != nil {
		return err
	}
	query := r.renderQuery(e)
	if len(path)+len(query) > maxTarget {
		return renderFailed("path and query for destination %s have more than %d bytes", quote(r.destination), maxTarget)
	}
	d.Path, d.Query = string(path), string(query)
	for i := range r.headers {
		h := &r.headers[i]
		value, end := h.template.render(e, nil, maxHeader, plain)
		switch {
		case end == lacking:
			e.missing = true
		case end == tooLong:
			return renderFailed("header %s for destination %s has more than %d bytes", h.name, quote(r.destination), maxHeader)
		case !h.sendable(value):
			e.leftOut = true
			d.LeftOut = append(d.LeftOut, h.name)
		default:
			d.Headers = append(d.Headers, RenderedHeader{Name: h.name, Value: string(value)})
		}
	}
	return nil
}

// sendable reports whether HTTP takes the value, RFC 9110 section 5.5: no control
// character but a tab, and so no second header either. NULs are the places of secrets,
// and one from the row must not pass for such a place.
func (h *header) sendable(value []byte) bool {
	secrets := 0
	for i := range h.template {
		if h.template[i].isSecret {
			secrets++
		}
	}
	for _, c := range value {
		switch {
		case c == 0:
			secrets--
		case c < ' ' && c != '\t', c == 0x7f:
			return false
		}
	}
	return secrets == 0
}

// renderPath answers as many segments as there are in the template. Escaping keeps a
// slash from making one more, but many servers take an escaped slash for one, all take
// %2e for a point, and an empty segment is none to those that merge slashes: what would
// climb or vanish there is a fault.
func (r *request) renderPath(e *env) ([]byte, error) {
	var path []byte
	for _, s := range r.path {
		path = append(path, '/')
		if !s.template.hasVariables() {
			path = append(path, s.template.text()...)
			continue
		}
		var meant []byte
		for i := range s.template {
			p := &s.template[i]
			if !p.isVar {
				path, meant = append(path, p.text...), append(meant, s.plain[i]...)
				continue
			}
			v := e.variable(p.path)
			e.missing = e.missing || !v.defined()
			text := v.text()
			if len(path)+len(text) > maxTarget { // it will not become shorter
				return nil, renderFailed("path and query for destination %s have more than %d bytes", quote(r.destination), maxTarget)
			}
			path, meant = append(path, url.PathEscape(text)...), append(meant, text...)
		}
		if leadsElsewhere(string(meant)) {
			return nil, renderFailed("a segment of the path for destination %s is empty or climbs", quote(r.destination))
		}
	}
	return path, nil
}

// leadsElsewhere reports whether a segment, as its server may read it, is none, the
// folder itself, or the one above.
func leadsElsewhere(segment string) bool {
	none := true
	for name := range strings.FieldsFuncSeq(segment, func(r rune) bool { return r == '/' || r == '\\' }) {
		name, _, _ = strings.Cut(name, ";") // RFC 3986 section 3.3: there are servers that take parameters off first
		if name == "." || name == ".." {
			return true
		}
		none = none && name == ""
	}
	return none
}

// renderQuery leaves out the keys whose value is undefined.
func (r *request) renderQuery(e *env) []byte {
	var query []byte
	for _, p := range r.query {
		value, end := p.template.render(e, nil, maxTarget, plain)
		if end == lacking {
			e.missing = true
			continue
		}
		if len(query) > 0 {
			query = append(query, '&')
		}
		query = append(query, p.key...)
		query = append(query, url.QueryEscape(string(value))...)
		if end == tooLong {
			break // as the length says
		}
	}
	return query
}

// text is that of a template without variables.
func (t template) text() string {
	var b strings.Builder
	for _, p := range t {
		b.WriteString(p.text)
	}
	return b.String()
}
