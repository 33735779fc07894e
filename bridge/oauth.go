package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// OAuth2 is what a destination's bearer tokens are asked for with: the client
// credentials grant, RFC 6749 section 4.4.
type OAuth2 struct {
	TokenURL               string // http or https
	ClientID, ClientSecret string
	Scopes                 []string // nil: what the token endpoint gives anyway
}

const (
	// tokenTimeout bounds a request for a token, whoever waits for it: an attempt
	// with a short timeout must not cut off what the next one needs.
	tokenTimeout = 10 * time.Second
	// tokenEarly, or a tenth of its time if that is less, is how long before its
	// end a token is replaced: it has to arrive, and clocks differ.
	tokenEarly = 30 * time.Second
	// tokenKept is how old a token must be before a 401 discards it. A younger one
	// was not refused for its age, so that another would fare no better: a
	// destination that refuses every token costs the endpoint one request in that time.
	tokenKept = 10 * time.Second
	// tokenRetryLeast and tokenRetryMost bound the wait after the token endpoint
	// has failed; it doubles from one to the other.
	tokenRetryLeast = time.Second
	tokenRetryMost  = time.Minute
)

// bearer is a token. Its zero is none.
type bearer struct {
	text    string
	got     time.Time
	renew   time.Time // zero: only after a 401
	expires time.Time // zero: nobody knows
}

func (b bearer) usable(now time.Time) bool {
	return b.text != "" && (b.expires.IsZero() || now.Before(b.expires))
}

func (b bearer) fresh(now time.Time) bool {
	return b.usable(now) && (b.renew.IsZero() || now.Before(b.renew))
}

// tokens has the token of one destination, and asks for a new one when it is
// needed, one request at a time. It is safe for concurrent use.
type tokens struct {
	ctx    context.Context // ends every request
	client *http.Client
	config clientcredentials.Config // AuthStyle aside not changed

	mu       sync.Mutex
	current  bearer
	asking   *tokenRequest // nil: none is under way
	proven   bool          // config.AuthStyle has worked
	failures int           // in a row
	failed   error         // the last of them
	again    time.Time     // no request before this
}

// tokenRequest is one request, for all who wait for it. Its fields are set once
// done is closed.
type tokenRequest struct {
	done  chan struct{}
	token bearer
	err   error
}

func newTokens(ctx context.Context, o OAuth2, client *http.Client) *tokens {
	return &tokens{ctx: ctx, client: client, config: clientcredentials.Config{
		ClientID: o.ClientID, ClientSecret: o.ClientSecret, TokenURL: o.TokenURL, Scopes: o.Scopes,
		// What every server must support, RFC 6749 section 2.3.1; see ask.
		AuthStyle: oauth2.AuthStyleInHeader,
	}}
}

// bearer returns a token that is good as far as anybody knows. It waits for one,
// until ctx ends at most, if there is none; one that is soon to end is used while
// the next is under way. The error is an *ownError.
func (t *tokens) bearer(ctx context.Context) (bearer, error) {
	t.mu.Lock()
	now := time.Now()
	current, r, failed := t.current, t.asking, t.failed
	if !current.fresh(now) && r == nil && !now.Before(t.again) {
		r = &tokenRequest{done: make(chan struct{})}
		t.asking = r
		go t.fulfil(r)
	}
	t.mu.Unlock()

	switch {
	case current.usable(now):
		return current, nil
	case r == nil:
		return bearer{}, failed
	}
	select {
	case <-r.done:
		return r.token, r.err
	case <-ctx.Done():
		return bearer{}, &ownError{text: "token endpoint: no token within the destination's timeout"}
	}
}

// refused is told of a token that the destination has answered with 401.
func (t *tokens) refused(b bearer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current.text == b.text && time.Since(t.current.got) >= tokenKept {
		t.current = bearer{}
	}
}

// fulfil makes the request r. It ends within tokenTimeout.
func (t *tokens) fulfil(r *tokenRequest) {
	ctx, cancel := context.WithTimeout(context.WithValue(t.ctx, oauth2.HTTPClient, t.client), tokenTimeout)
	defer cancel()
	token, wait, err := t.ask(ctx)

	t.mu.Lock()
	defer t.mu.Unlock()
	t.asking = nil
	if err != nil {
		t.failures++
		t.failed = err
		t.again = time.Now().Add(max(wait, min(tokenRetryMost, tokenRetryLeast<<min(t.failures-1, 10))))
	} else {
		t.failures, t.failed, t.again = 0, nil, time.Time{}
		t.current = token
	}
	r.token, r.err = token, err
	close(r.done)
}

// ask asks the endpoint for a token. If it fails, wait is what the endpoint has
// asked for. Only one call is under way at a time.
func (t *tokens) ask(ctx context.Context) (_ bearer, wait time.Duration, _ error) {
	got := time.Now()
	token, err := t.config.Token(ctx)
	if failed, ok := errors.AsType[*oauth2.RetrieveError](err); ok && !t.proven && refusesClient(failed) {
		// There are endpoints that only take the secret in the body. Which way is
		// right is found out once, by the one that works.
		style := t.config.AuthStyle
		t.config.AuthStyle = oauth2.AuthStyleInParams
		var other error
		if token, other = t.config.Token(ctx); other == nil {
			err = nil
		} else {
			t.config.AuthStyle = style
		}
	}
	if failed, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
		return bearer{}, retryAfter(failed.Response.Header, time.Now()), answeredError(failed)
	}
	if err != nil {
		return bearer{}, 0, &ownError{text: "token endpoint: " + failureText(Response{Err: err})}
	}
	t.proven = true
	if token.Type() != "Bearer" {
		return bearer{}, 0, &ownError{text: "token endpoint: its token is not of the type bearer"}
	}
	if strings.ContainsFunc(token.AccessToken, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return bearer{}, 0, &ownError{text: "token endpoint: its token can't be sent in a header"}
	}
	b := bearer{text: token.AccessToken, got: got, expires: token.Expiry}
	if !b.expires.IsZero() {
		b.renew = b.expires.Add(-min(tokenEarly, b.expires.Sub(got)/10))
	}
	return b, 0, nil
}

// refusesClient reports whether the endpoint may have missed who we are, RFC
// 6749 section 5.2.
func refusesClient(e *oauth2.RetrieveError) bool {
	return e.Response.StatusCode == http.StatusUnauthorized || e.ErrorCode == "invalid_client" || e.ErrorCode == "invalid_request"
}

// answeredError says what the endpoint answered. Its body is left out but for
// the error code: what else it says may differ each time, or repeat the secret.
func answeredError(e *oauth2.RetrieveError) *ownError {
	text := "token endpoint " + failureText(Response{Status: e.Response.StatusCode})
	const longest = 64
	if code := e.ErrorCode; code != "" && len(code) <= longest {
		text += ": " + strings.Trim(strconv.QuoteToASCII(code), `"`)
	}
	return &ownError{text: text, credentials: refusesClient(e)}
}

// drained is an http.RoundTripper whose answers are no longer than what is
// drained of a destination's.
type drained struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (d drained) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := d.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	res.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(res.Body, bodyDrained), res.Body}
	return res, nil
}

// check tells what is wrong with o.
func (o *OAuth2) check() error {
	if o == nil {
		return nil
	}
	if _, err := parseURL(o.TokenURL); err != nil {
		return fmt.Errorf("token_url: %w", err)
	}
	return nil
}
