package rules

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// bodiless reports whether requests have no body.
func (d *Destination) bodiless() bool {
	return d.Method == http.MethodGet || d.Method == http.MethodDelete
}

// path reads what is appended to the url's path.
func (d *destinationDecl) path(n *yaml.Node) {
	text, ok := d.file.text(n, "path")
	if !ok {
		return
	}
	wrong := false
	t := parseTemplate(text, func(p diagnostic) {
		wrong = true
		d.file.within(n, p)
	})
	if wrong {
		return
	}
	bad := func(where span, hint, format string, args ...any) {
		d.file.within(n, diagnostic{span: where, name: "bad-url", hint: hint, message: fmt.Sprintf(format, args...)})
	}
	segments := []segment{{}}
	for i := range t {
		p := &t[i]
		if p.isVar {
			s := &segments[len(segments)-1]
			s.template, s.plain = append(s.template, *p), append(s.plain, "")
			continue
		}
		if at := strings.IndexFunc(p.text, func(r rune) bool { return !isPathChar(r) }); at >= 0 {
			hint := "anything else is written percent-encoded, such as %20"
			if p.text[at] == '?' {
				hint = "what follows goes into query: of the destination"
			}
			bad(p.span, hint, "a path cannot hold %s", quote(string([]rune(p.text[at:])[0])))
			return
		}
		for j, text := range strings.Split(strings.TrimPrefix(p.text, map[bool]string{true: "/"}[i == 0]), "/") {
			if j > 0 {
				segments = append(segments, segment{})
			}
			plain, err := url.PathUnescape(text)
			if err != nil {
				bad(p.span, "", "no percent-encoding: %s", quote(text))
				return
			}
			if text != "" {
				s := &segments[len(segments)-1]
				s.template, s.plain = append(s.template, part{span: p.span, text: text}), append(s.plain, plain)
			}
		}
	}
	for _, s := range segments {
		if !s.template.hasVariables() && len(s.plain) > 0 && leadsElsewhere(strings.Join(s.plain, "")) {
			bad(span{0, len(text)}, "", "a path cannot climb: %s", quote(text))
			return
		}
	}
	if t.hasVariables() {
		d.request.path = segments
		d.variables(n, t)
		return
	}
	if fixed := t.text(); fixed != "" {
		d.fixedPath = "/" + strings.TrimPrefix(fixed, "/")
	}
}

// isPathChar is the grammar of a path, RFC 3986 section 3.3.
func isPathChar(r rune) bool {
	return r < 128 && (isLetter(byte(r)) || isDigit(byte(r)) || strings.ContainsRune("-._~!$&'()*+,;=:@%/", r))
}

// query reads what is appended to the url's query.
func (d *destinationDecl) query(n *yaml.Node) {
	d.file.mapping(n, "query", func(key, val *yaml.Node) {
		if strings.Contains(key.Value, "${") {
			d.file.fail(key, "bad-template", "", "the keys of a query cannot hold variables")
			return
		}
		text, ok := d.file.text(val, "a value of query")
		if !ok {
			return
		}
		t := parseTemplate(text, func(p diagnostic) { d.file.within(val, p) })
		name := url.QueryEscape(key.Value) + "="
		if t.hasVariables() {
			d.request.query = append(d.request.query, parameter{name, t})
			d.variables(val, t)
			return
		}
		d.fixedQuery = joinQuery(d.fixedQuery, name+url.QueryEscape(t.text()))
	})
}

func joinQuery(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "&" + b
}

// variables notes what a template of the destination reads.
func (d *destinationDecl) variables(n *yaml.Node, t template) {
	for i := range t {
		p := &t[i]
		if p.isVar && len(p.path) > 0 && !slices.Contains(d.reads, p.path[0].key) {
			d.reads = append(d.reads, p.path[0].key)
		}
	}
}

// appendFixed makes what holds for every request a part of the url.
func (d *destinationDecl) appendFixed() {
	u, err := url.Parse(d.URL)
	if err != nil || d.URL == "" || d.fixedPath+d.fixedQuery == "" {
		return
	}
	before, _, _ := strings.Cut(d.URL, "?")
	if d.fixedPath != "" {
		before = strings.TrimRight(before, "/") + d.fixedPath
	}
	if query := joinQuery(u.RawQuery, d.fixedQuery); query != "" {
		before += "?" + query
	}
	d.URL = before
}

// checkBody is about methods without a body and batches.
func (d *destinationDecl) checkBody(method, batch *yaml.Node) {
	f := d.file
	if d.Batch.Max > 1 {
		switch {
		case d.bodiless():
			f.fail(batch, "batch-not-possible", "", "a batch is a body, and %s sends none", d.Method)
		case d.request != nil:
			f.fail(batch, "batch-not-possible", "variables can stand in the bodies of rules",
				"the deliveries of a batch go in one request, so path, query and headers cannot hold variables")
		}
	}
	if !d.bodiless() || d.TraceBody.SW8 == "" {
		return
	}
	where := "so the trace context goes into the headers alone"
	if !d.TraceHeaders {
		where = "and trace.headers is false, so the traces end at the broker"
	}
	f.warn(method, "trace-not-in-body", "trace: {body: {}} says that this is meant", "%s sends no body, %s", d.Method, where)
}

// checkReads warns of what the destination's templates need and the statement does not
// select.
func (b *bodyReader) checkReads(at *yaml.Node, to *destinationDecl) {
	for _, name := range to.reads {
		if b.selects(name) {
			continue
		}
		b.file.warn(at, "not-selected", b.selectHint(name), "%s is always undefined: the statement does not select it, and path, query or headers of destination %s need it",
			quote(name), quote(to.Name))
	}
}

// selects reports whether the statement may have an output of that name.
func (b *bodyReader) selects(name string) bool {
	return b.program == nil || b.program.star || slices.Contains(b.program.roots, name)
}

func (b *bodyReader) selectHint(name string) string {
	if slices.Contains(b.program.columns(), name) {
		return fmt.Sprintf("add %s to SELECT", name)
	}
	return didYouMean(name, b.program.roots)
}
