package rules

import (
	"cmp"
	"fmt"
	"net/textproto"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// Defaults and bounds of a destination.
const (
	defaultConcurrency = 16
	maxConcurrency     = 10_000
	defaultTimeout     = 10 * time.Second
	maxTimeout         = 10 * time.Minute
	defaultMaxAge      = 24 * time.Hour
	maxMaxAge          = 90 * 24 * time.Hour
	defaultLaneHold    = time.Minute
	// maxBatch is how many of the ids that the broker makes up a request header has room for.
	maxBatch = 100
	// maxLinger is little against what an alarm may take.
	maxLinger = time.Second
)

// laneColumns are the columns that can name a lane: those that are short text or
// a number.
var laneColumns = []string{"clientid", "username", "topic", "peerhost", "peername", "qos", "node", "id"}

func (l *loader) destination(f *file, key, n *yaml.Node) {
	if !checkName(f, key, "destination") {
		return
	}
	d := &destinationDecl{file: f, key: key, Destination: Destination{
		Name: key.Value, Method: "POST", TraceBody: TraceBody{SW8: "sw8", Correlation: "sw8-correlation"}, TraceHeaders: true,
		Ordered: "clientid", Concurrency: defaultConcurrency, Timeout: defaultTimeout, MaxAge: defaultMaxAge, LaneHold: defaultLaneHold,
		Batch: Batch{Max: 1},
	}}
	if first, ok := l.destinations[d.Name]; ok {
		f.fail(key, "doubled-destination", fmt.Sprintf("it is already at %s:%d", first.file.path, first.key.Line), "doubled destination %s", quote(d.Name))
		return
	}
	d.request = &request{destination: d.Name}
	l.destinations[d.Name] = d
	l.reading = d.Name
	var urls []reached
	hasURL := false
	var tlsKey, batchKey, methodNode *yaml.Node
	var shown credentials
	ok := f.fields(n, "a destination",
		field{"url", func(_, n *yaml.Node) {
			hasURL = true
			d.URL = f.url(n, `write them under basic: {username: ..., password: "${file:...}"}`)
			urls = append(urls, reached{d.URL, n})
		}},
		field{"method", func(_, n *yaml.Node) {
			methodNode = n
			f.oneOf(n, "method", &d.Method, "POST", "PUT", "GET", "DELETE")
		}},
		field{"path", func(_, n *yaml.Node) { d.path(n) }},
		field{"query", func(_, n *yaml.Node) { d.query(n) }},
		field{"headers", func(_, n *yaml.Node) { l.headers(d, n, &shown) }},
		field{"trace", func(_, n *yaml.Node) { d.trace(n) }},
		field{"ordered", func(_, n *yaml.Node) { d.ordered(n) }},
		field{"concurrency", func(_, n *yaml.Node) { f.int(n, "concurrency", 1, maxConcurrency, &d.Concurrency) }},
		field{"rate", func(_, n *yaml.Node) { f.rate(n, &d.Rate) }},
		field{"timeout", func(_, n *yaml.Node) { f.duration(n, "timeout", time.Millisecond, maxTimeout, &d.Timeout) }},
		field{"retry", func(_, n *yaml.Node) {
			f.fields(n, "retry",
				field{"max_age", func(_, n *yaml.Node) { f.duration(n, "max_age", time.Second, maxMaxAge, &d.MaxAge) }},
				// As long as max_age: it never leaves.
				field{"lane_hold", func(_, n *yaml.Node) { f.duration(n, "lane_hold", time.Second, maxMaxAge, &d.LaneHold) }})
		}},
		field{"signing", func(key, n *yaml.Node) { d.SigningKeys = l.signing(f, key, n) }},
		field{"idempotency_key", func(_, n *yaml.Node) { f.bool(n, "idempotency_key", &d.IdempotencyKey) }},
		field{"basic", func(key, n *yaml.Node) {
			shown.take(f, key, "basic")
			d.Basic = l.basic(f, key, n)
		}},
		field{"oauth2", func(key, n *yaml.Node) {
			shown.take(f, key, "oauth2")
			var at reached
			d.OAuth2, at = l.oauth2(f, key, n)
			urls = append(urls, at)
		}},
		field{"tls", func(key, n *yaml.Node) {
			tlsKey = key
			d.TLS = l.tls(f, key, n)
		}},
		field{"on_full", func(_, n *yaml.Node) { f.oneOf(n, "on_full", &d.OnFull, OnFullRefuse, OnFullAckAndCount) }},
		field{"max_bytes", func(_, n *yaml.Node) { l.maxBytes(f, n, &d.MaxBytes) }},
		field{"batch", func(key, n *yaml.Node) {
			batchKey = key
			d.batch(n)
		}},
		field{"egress", func(_, n *yaml.Node) { d.Egress = f.egress(n) }},
	)
	if ok && !hasURL {
		f.fail(key, "missing-key", "url: http://127.0.0.1:8080/notify", "destination %s needs %s", quote(d.Name), quote("url"))
	}
	for _, u := range urls {
		l.open(f, u, d.Egress)
	}
	if len(d.request.path)+len(d.request.query)+len(d.request.headers) == 0 {
		d.request = nil
	}
	d.Rendered = d.request != nil
	d.checkBody(methodNode, batchKey)
	if tlsKey != nil && strings.HasPrefix(d.URL, "http:") {
		f.fail(tlsKey, "tls-without-https", "write https://, or remove tls: nothing would be encrypted", "tls needs a url that begins with https://, found %s", quote(d.URL))
	}
	if d.Batch.Max > 1 && !d.bodiless() && d.TraceHeaders && d.TraceBody.SW8 == "" {
		f.warn(batchKey, "batch-without-trace", "set trace.body.sw8, or trace.headers: false if the traces are to end here",
			"requests with several deliveries have no trace headers, and trace.body has no %s", quote("sw8"))
	}
	d.appendFixed()
}

func (d *destinationDecl) batch(n *yaml.Node) {
	f := d.file
	var lingers *yaml.Node
	f.fields(n, "batch",
		field{"max", func(_, n *yaml.Node) { f.int(n, "max", 1, maxBatch, &d.Batch.Max) }},
		field{"linger", func(key, n *yaml.Node) {
			lingers = key
			f.duration(n, "linger", 0, maxLinger, &d.Batch.Linger)
		}})
	if d.Batch.Linger > 0 && d.Batch.Max == 1 {
		f.fail(lingers, "batch-of-one", "set max, such as max: 100, or remove linger", "linger waits for nothing unless max is more than 1")
	}
}

// maxRate bounds the number of a rate; more is no bound that means anything.
const maxRate = 1_000_000

var rateUnits = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}

// rate reads 200/s, 12000/m or 5/h. None in any time is no bound.
func (f *file) rate(n *yaml.Node, into *Rate) {
	number, unit, _ := strings.Cut(n.Value, "/")
	count, err := strconv.ParseUint(number, 10, 32)
	per, ok := rateUnits[unit]
	if n.Kind != yaml.ScalarNode || err != nil || !ok || count > maxRate {
		f.fail(n, "out-of-range", "", "rate must be a number from 0 to %d and /s, /m or /h, such as 200/s, found %s", maxRate, describeNode(n))
		return
	}
	*into = Rate{}
	if count > 0 {
		*into = Rate{N: int(count), Per: per}
	}
}

// maxBytes reads a destination's cap. One that the whole outbox reaches first
// keeps no room for the others, which is what it is for.
func (l *loader) maxBytes(f *file, n *yaml.Node, into *int64) {
	size, ok := ParseSize(n.Value)
	if n.Kind != yaml.ScalarNode || !ok || size < MinCap || size > MaxCap {
		f.fail(n, "out-of-range", "", "max_bytes must be a size such as 4GiB, from %s to %s, found %s", FormatSize(MinCap), FormatSize(MaxCap), describeNode(n))
		return
	}
	if all := l.options.OutboxBytes; all > 0 && size > all {
		f.warn(n, "cap-above-outbox", "", "max_bytes is more than the whole outbox may have, %s (outbox.max_bytes)", FormatSize(all))
	}
	*into = size
}

func (f *file) oneOf(n *yaml.Node, what string, into *string, allowed ...string) {
	if n.Kind != yaml.ScalarNode || !slices.Contains(allowed, n.Value) {
		f.fail(n, "wrong-value", "", "%s must be %s, found %s", what, strings.Join(allowed, " or "), describeNode(n))
		return
	}
	*into = n.Value
}

// url takes an absolute http or https address without credentials or variables.
// hint says where credentials belong.
func (f *file) url(n *yaml.Node, hint string) string {
	text, ok := f.text(n, "url")
	if !ok {
		return ""
	}
	bad := func(hint, format string, args ...any) string {
		f.fail(n, "bad-url", hint, format, args...)
		return ""
	}
	f.hideUserinfo(text)
	if at := strings.Index(text, "${"); at >= 0 {
		f.within(n, diagnostic{span: span{at, len(text)}, name: "variable-in-url", message: "a url cannot hold variables: where deliveries go must not depend on messages",
			hint: "what depends on them goes into path and query of the destination, which are appended to its url"})
		return ""
	}
	u, err := url.Parse(text)
	switch {
	case err != nil || strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || r == ' ' }):
		return bad("", "no url: %s", quote(text))
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("", "a url begins with http:// or https://, found %s", quote(text))
	case u.Hostname() == "":
		return bad("", "the url has no host: %s", quote(text))
	case u.Port() != "" && !isPort(u.Port()):
		return bad("", "the url has no such port: %s", quote(text))
	case u.User != nil:
		return bad(hint, "credentials do not belong into a url")
	case u.Fragment != "":
		return bad("", "a url to send to has no fragment: %s", quote("#"+u.Fragment))
	}
	return text
}

// hideUserinfo keeps credentials in what was to be a url out of problems. They end
// at the last @ before the host's end; where that can't be told, since they hold what ends a
// host, or what ought to be escaped, at the last one of all.
func (f *file) hideUserinfo(text string) {
	scheme, rest, ok := strings.Cut(text, "//")
	if !ok {
		rest = scheme
	}
	host := rest
	if end := strings.IndexAny(rest, "/?#"); end >= 0 {
		host = rest[:end]
	}
	if _, err := url.Parse(text); err != nil {
		host = rest
	}
	if at := strings.LastIndexByte(host, '@'); at > 0 {
		f.hidden = append(f.hidden, host[:at], strings.Trim(quote(host[:at]), `"`))
	}
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func (d *destinationDecl) trace(n *yaml.Node) {
	f := d.file
	f.fields(n, "trace",
		field{"headers", func(_, n *yaml.Node) { f.bool(n, "headers", &d.TraceHeaders) }},
		field{"body", func(_, n *yaml.Node) {
			d.TraceBody = TraceBody{}
			f.fields(n, "body",
				field{"sw8", func(_, n *yaml.Node) { d.TraceBody.SW8 = f.jsonPath(n) }},
				field{"sw8-correlation", func(_, n *yaml.Node) { d.TraceBody.Correlation = f.jsonPath(n) }})
			a, b := d.TraceBody.SW8, d.TraceBody.Correlation
			if a != "" && b != "" && (strings.HasPrefix(a+".", b+".") || strings.HasPrefix(b+".", a+".")) {
				f.fail(n, "trace-field-collision", "", "%s and %s are one field, or one within the other", quote(a), quote(b))
			}
		}})
}

// jsonPath is a dotted path to a field of a JSON body.
func (f *file) jsonPath(n *yaml.Node) string {
	path, ok := f.text(n, "the path of a field")
	if !ok {
		return ""
	}
	for key := range strings.SplitSeq(path, ".") {
		if key == "" || strings.ContainsFunc(key, func(r rune) bool { return !unicode.IsPrint(r) || strings.ContainsRune(`*?|#@\"'{}[]()!:`, r) }) {
			f.fail(n, "bad-path", "a path is made of names joined by points: trace.sw8", "no path of a field: %s", describeNode(n))
			return ""
		}
	}
	return path
}

// ordered is a column, or false.
func (d *destinationDecl) ordered(n *yaml.Node) {
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!bool" && strings.EqualFold(n.Value, "false"):
		d.Ordered = ""
	case n.Kind == yaml.ScalarNode && slices.Contains(laneColumns, n.Value):
		d.Ordered = n.Value
	default:
		hint := didYouMean(n.Value, laneColumns)
		if n.Kind == yaml.ScalarNode && strings.EqualFold(n.Value, "false") {
			hint = unquotedHint("false")
		}
		d.file.fail(n, "wrong-value", hint, "ordered must be false or one of %s, found %s", strings.Join(laneColumns, ", "), describeNode(n))
	}
}

// ownHeaders are set by the broker or by HTTP itself.
var ownHeaders = []string{
	"Host", "Content-Length", "Transfer-Encoding", "Connection", "Trailer", "Upgrade", "Te", "Expect",
	"Webhook-Id", "Webhook-Timestamp", "Webhook-Signature", "X-Throughline-Attempt", "X-Throughline-Ids", "Idempotency-Key", "Sw8", "Sw8-Correlation", "Sw8-X",
}

func (l *loader) headers(d *destinationDecl, n *yaml.Node, shown *credentials) {
	f := d.file
	f.mapping(n, "headers", func(key, val *yaml.Node) {
		name := textproto.CanonicalMIMEHeaderKey(key.Value)
		if isCredential(name) {
			f.hideCredential(val)
		}
		switch {
		case !isToken(key.Value):
			f.fail(key, "bad-header", "a name has letters, digits and -", "no name of a header: %s", quote(key.Value))
			return
		case slices.Contains(ownHeaders, name):
			f.fail(key, "bad-header", "remove it", "the broker sets header %s itself", quote(key.Value))
			return
		case slices.ContainsFunc(d.Headers, func(h Header) bool { return h.Name == name }):
			f.fail(key, "doubled-key", "", "doubled header %s", quote(key.Value))
			return
		}
		if name == "Authorization" {
			shown.take(f, key, "headers.Authorization")
		}
		if text, ok := f.text(val, "a header"); ok {
			l.header(d, name, val, text)
		}
	})
	slices.SortFunc(d.Headers, func(a, b Header) int { return cmp.Compare(a.Name, b.Name) })
}

// header reads the value of a header, in which secrets and variables may stand.
func (l *loader) header(d *destinationDecl, name string, n *yaml.Node, text string) {
	h := Header{Name: name}
	t := templateReader{
		report: func(p diagnostic) { d.file.within(n, p) },
		secret: func(where span, name string) {
			h.Secrets = append(h.Secrets, Secret{l.secretPart(d.file, n, where, name)})
		},
	}.read(text)
	var fixed strings.Builder
	secrets := h.Secrets
	for i := range t {
		p := &t[i]
		if p.isSecret {
			fixed.WriteString(secrets[0].text)
			secrets = secrets[1:]
			continue
		}
		fixed.WriteString(p.text)
	}
	d.file.checkHeaderValue(n, fixed.String())
	if h.Rendered = t.hasVariables(); h.Rendered {
		d.request.headers = append(d.request.headers, header{name: name, template: t})
		d.variables(n, t)
	} else {
		h.Value = Secret{fixed.String()}
	}
	d.Headers = append(d.Headers, h)
}

func (f *file) checkHeaderValue(n *yaml.Node, text string) {
	if strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }) {
		f.fail(n, "bad-header", "a secret must be one line", "a header or a credential cannot hold line breaks or control characters")
	}
}

// isToken is the grammar of header names, RFC 9110 section 5.6.2.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r > 127 || !isLetter(byte(r)) && !isDigit(byte(r)) && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}

// secret fills in ${env:NAME} and ${file:PATH}.
func (l *loader) secret(f *file, n *yaml.Node, text string) Secret {
	var b strings.Builder
	for at := 0; at < len(text); {
		open := strings.Index(text[at:], "${")
		if open < 0 {
			b.WriteString(text[at:])
			break
		}
		b.WriteString(text[at : at+open])
		at += open
		length := strings.IndexByte(text[at:], '}') + 1
		if length == 0 {
			f.within(n, diagnostic{span: span{at, len(text)}, name: "bad-template", message: "${ is never closed"})
			break
		}
		b.WriteString(l.secretPart(f, n, span{at, at + length}, text[at+2:at+length-1]))
		at += length
	}
	f.checkHeaderValue(n, b.String())
	return Secret{b.String()}
}

func (l *loader) secretPart(f *file, n *yaml.Node, where span, name string) string {
	text, known, err := l.findSecret(name, filepath.Dir(f.path))
	if !known {
		f.within(n, diagnostic{span: where, name: "bad-template", message: "a credential cannot hold variables", hint: "secrets are written ${env:NAME} or ${file:PATH}"})
	}
	if err != nil {
		d := diagnostic{span: where, severity: Warning, name: "missing-secret", message: err.Error(), hint: "check as the broker's user, with its environment"}
		if l.options.RequireSecrets {
			d.severity = Error
		}
		f.within(n, d)
	}
	return text
}
