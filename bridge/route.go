package bridge

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// route is a destination made ready for sending. It is immutable.
type route struct {
	def         Destination
	sender      Sender
	method      string
	url         string // as called
	safeURL     string // as told to the trace: no credentials, no query
	base, query string // of the url; base has no slash at its end
	bodiless    bool   // the method has no body
	peer        string // host:port, the port always there
	operation   string // of the exit span
	header      http.Header
	sw8         []string // path in the body; nil: nowhere
	correlation []string
	limit       int // attempts at a time
	rate        Rate
	timeout     time.Duration
	maxAge      time.Duration
	hold        time.Duration
	batch       Batch
}

// batches reports whether bodies are arrays.
func (r *route) batches() bool { return r.batch.Max > 1 }

// newRoute checks d. The sender is still to be set.
func newRoute(d Destination) (*route, error) {
	u, err := parseURL(d.URL)
	if err != nil {
		return nil, err
	}
	method := orDefault(d.Method, http.MethodPost)
	if _, err := http.NewRequestWithContext(context.Background(), method, d.URL, http.NoBody); err != nil {
		return nil, err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	r := &route{
		def:         d,
		method:      method,
		url:         d.URL,
		query:       u.RawQuery,
		bodiless:    method == http.MethodGet || method == http.MethodDelete,
		safeURL:     (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String(),
		peer:        net.JoinHostPort(u.Hostname(), port),
		header:      http.Header{},
		sw8:         fieldPath(d.TraceBody.SW8),
		correlation: fieldPath(d.TraceBody.Correlation),
		limit:       orDefault(d.Concurrency, defaultConcurrency),
		rate:        d.Rate,
		timeout:     orDefault(d.Timeout, defaultTimeout),
		maxAge:      orDefault(d.MaxAge, defaultMaxAge),
		hold:        orDefault(d.LaneHold, defaultLaneHold),
		batch:       d.Batch,
	}
	if d.Batch.Max < 0 || d.Batch.Max > MaxBatch {
		return nil, fmt.Errorf("a batch has %d records at most, not %d", MaxBatch, d.Batch.Max)
	}
	if r.bodiless && d.Batch.Max > 1 {
		return nil, fmt.Errorf("a batch needs a body, and %s has none", method)
	}
	r.base = strings.TrimRight(r.safeURL, "/")
	r.operation = r.method + ":" + orDefault(u.EscapedPath(), "/")
	if !r.bodiless {
		r.header.Set("Content-Type", "application/json")
	}
	r.header.Set("User-Agent", "throughline")
	r.header.Set("Accept", "application/json") // what resty would say, after a look at Content-Type in each request
	if slices.ContainsFunc(d.SigningKeys, func(k []byte) bool { return len(k) == 0 }) {
		return nil, errors.New("a signing key is empty")
	}
	if d.TLS != (TLS{}) && u.Scheme != "https" {
		return nil, errors.New("tls is for https alone")
	}
	for name, value := range d.Headers {
		if strings.ContainsAny(name, " :\r\n\x00") || name == "" || strings.ContainsAny(value, "\r\n\x00") {
			return nil, fmt.Errorf("header %q can't be sent", name) // its value may be a secret
		}
		r.header.Set(name, trimmed(value))
	}
	for _, own := range []string{headerIDs, headerSW8, headerCorrelation} {
		r.header.Del(own)
	}
	if err := d.OAuth2.check(); err != nil {
		return nil, err
	}
	if d.Basic != nil {
		if strings.Contains(d.Basic.Username, ":") {
			return nil, errors.New("a username for basic has no colon")
		}
		r.header.Set(headerAuthorization, "Basic "+base64.StdEncoding.EncodeToString([]byte(d.Basic.Username+":"+d.Basic.Password)))
	}
	return r, nil
}

// parseURL takes an absolute http or https address.
func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("url scheme %q is neither http nor https", u.Scheme)
	}
	if u.Hostname() == "" {
		return nil, errors.New("url has no host")
	}
	return u, nil
}

func orDefault[T comparable](v, standard T) T {
	var zero T
	if v == zero {
		return standard
	}
	return v
}

func fieldPath(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(text, ".")
}
