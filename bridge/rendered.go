package bridge

import (
	"log/slog"
	"net/http"
	"strings"
)

// isRendered reports whether more than the body was rendered for rec.
func isRendered(rec *Record) bool {
	return rec.Path != "" || rec.Query != "" || len(rec.Headers) > 0
}

// refusesOne reports whether a refusal is about rec alone: what its request asks for is
// its own then, or lacks what it should have of its own, and says nothing about the others'.
// Who we are is the same for all.
func (r *route) refusesOne(rec *Record, res Response) bool {
	if !r.def.Rendered && !isRendered(rec) {
		return false
	}
	switch res.Class() {
	case Gone:
		return true
	case Configuration:
		return res.Status != http.StatusUnauthorized && res.Status != http.StatusProxyAuthRequired
	}
	return false
}

// urlOf is where rec goes: the destination's url as it is now, and what was rendered
// for rec. No path can change the host, whatever it holds, since it comes after a slash.
func (r *route) urlOf(rec *Record) string {
	if rec.Path == "" && rec.Query == "" {
		return r.url
	}
	u, sign := r.safeURLOf(rec), "?"
	for _, query := range []string{r.query, rec.Query} {
		if query != "" {
			u, sign = u+sign+query, "&"
		}
	}
	return u
}

// safeURLOf is urlOf as it is told to the trace.
func (r *route) safeURLOf(rec *Record) string {
	if rec.Path == "" {
		return r.safeURL
	}
	return r.base + slashed(rec.Path)
}

func slashed(path string) string {
	if path == "" || path[0] == '/' {
		return path
	}
	return "/" + path
}

// addRendered adds the headers of rec. They come before those of the definition, but
// not before what the bridge sets itself.
func (f *forwarder) addRendered(header http.Header, r *route, rec *Record) {
	for _, h := range rec.Headers {
		name := http.CanonicalHeaderKey(h.Name)
		if r.sets(name) {
			continue
		}
		value, ok := filled(h.Value, r.def.HeaderSecrets[name])
		if !ok {
			f.tell(slog.LevelWarn, "no secret for header "+name,
				"the definition has fewer secrets for a header than when records were stored; it isn't sent as it was rendered", "header", name)
			continue
		}
		header[name] = []string{trimmed(value)}
	}
}

// trimmed is a header's value without space around it, which is no part of it. HTTP/1.1 is
// written so anyway; in HTTP/2 it makes the whole request malformed, RFC 9113 section 8.2.1, and
// there are servers that refuse it as such: it would be sent again and again.
func trimmed(value string) string { return strings.Trim(value, " \t") }

// sets reports whether the bridge sets a header in each request, or makes it.
func (r *route) sets(name string) bool {
	switch name {
	case headerID, headerTimestamp, headerSignature, headerAttempt, headerIDs, headerSW8, headerCorrelation:
		return true
	case headerIdempotency:
		return r.def.IdempotencyKey
	case headerAuthorization:
		return r.def.Basic != nil || r.def.OAuth2 != nil
	}
	return false
}

// filled puts secrets into the places for them; false if there are too few.
func filled(value string, secrets []string) (string, bool) {
	parts := strings.Split(value, "\x00")
	if len(parts) == 1 {
		return value, true
	}
	if len(parts)-1 > len(secrets) {
		return "", false
	}
	var b strings.Builder
	for i, p := range parts {
		if i > 0 {
			b.WriteString(secrets[i-1])
		}
		b.WriteString(p)
	}
	return b.String(), true
}
