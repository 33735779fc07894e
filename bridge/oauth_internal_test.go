package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func answers(status int, body string, header ...string) *http.Response {
	h := http.Header{"Content-Type": {"application/json"}}
	for i := 0; i+1 < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader(body))}
}

// endpoint is a token endpoint whose nth request, from 1, is answered by answer
// after delay.
type endpoint struct {
	mu     sync.Mutex
	asked  []time.Time
	delay  time.Duration
	answer func(n int) (*http.Response, error)
}

func (e *endpoint) RoundTrip(r *http.Request) (*http.Response, error) {
	e.mu.Lock()
	e.asked = append(e.asked, time.Now())
	n, delay, answer := len(e.asked), e.delay, e.answer
	e.mu.Unlock()
	select {
	case <-time.After(delay):
		return answer(n)
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

func (e *endpoint) requests() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.asked)
}

func (e *endpoint) set(answer func(n int) (*http.Response, error)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answer = answer
}

// gives answers the nth request with token-n, for so many seconds.
func gives(seconds int) func(int) (*http.Response, error) {
	return func(n int) (*http.Response, error) {
		return answers(200, fmt.Sprintf(`{"access_token":"token-%d","token_type":"Bearer","expires_in":%d}`, n, seconds)), nil
	}
}

func newEndpoint(t *testing.T, answer func(n int) (*http.Response, error)) (*endpoint, *tokens) {
	e := &endpoint{answer: answer}
	return e, newTokens(t.Context(), OAuth2{TokenURL: "https://idp.example/token", ClientID: "broker", ClientSecret: "hush"},
		&http.Client{Transport: e, CheckRedirect: asItIs})
}

func (t *tokens) want(tt *testing.T, want string) {
	tt.Helper()
	got, err := t.bearer(tt.Context())
	if err != nil || got.text != want {
		tt.Errorf("token %q, %v, want %q", got.text, err, want)
	}
}

// A token is asked for once, however many wait, and again shortly before its end:
// then nobody waits.
func TestTokenIsCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, tokens := newEndpoint(t, gives(3600))
		e.delay = time.Second
		var waits sync.WaitGroup
		for range 100 {
			waits.Go(func() { tokens.want(t, "token-1") })
		}
		waits.Wait()
		time.Sleep(time.Hour - tokenEarly - 2*time.Second)
		tokens.want(t, "token-1")
		if n := e.requests(); n != 1 {
			t.Fatalf("%d requests for a token, want 1", n)
		}
		time.Sleep(2 * time.Second)
		for range 10 {
			waits.Go(func() { tokens.want(t, "token-1") })
		}
		waits.Wait()
		time.Sleep(2 * time.Second)
		tokens.want(t, "token-2")
		if n := e.requests(); n != 2 {
			t.Errorf("%d requests for a token, want 2", n)
		}
	})
}

// While a successor can't be had, a token is used to its end, and not beyond.
func TestTokenIsUsedToItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, tokens := newEndpoint(t, gives(600))
		tokens.want(t, "token-1")
		e.set(func(int) (*http.Response, error) { return answers(503, ""), nil })
		time.Sleep(10*time.Minute - tokenEarly)
		for range 29 {
			tokens.want(t, "token-1")
			time.Sleep(time.Second)
		}
		if n := e.requests() - 1; n < 2 || n > 6 {
			t.Errorf("%d requests in half a minute while the endpoint fails", n)
		}
		time.Sleep(time.Second)
		if b, err := tokens.bearer(t.Context()); !isOwn(err) {
			t.Errorf("after its end: %q, %v", b.text, err)
		}
	})
}

// Who waits does so for the time of an attempt at most, and what it waits for
// goes on without it.
func TestTokenWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, tokens := newEndpoint(t, gives(3600))
		e.delay = 5 * time.Second
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			began := time.Now()
			if b, err := tokens.bearer(ctx); !isOwn(err) || time.Since(began) != time.Second {
				t.Errorf("after %s: token %q, %v", time.Since(began), b.text, err)
			}
			cancel()
		}
		time.Sleep(3 * time.Second)
		tokens.want(t, "token-1")

		e, tokens = newEndpoint(t, gives(3600))
		e.delay = time.Hour
		began := time.Now()
		if _, err := tokens.bearer(t.Context()); !isOwn(err) || err.Error() != "token endpoint: timed out" || time.Since(began) != tokenTimeout {
			t.Errorf("an endpoint that hangs: %v after %s", err, time.Since(began))
		}
	})
}

// An endpoint that fails is asked less and less often, whoever wants a token.
func TestTokenEndpointFails(t *testing.T) {
	for _, tt := range []struct {
		name        string
		answer      func(int) (*http.Response, error)
		says        string
		credentials bool
		firstWait   time.Duration
	}{
		{"out of reach", func(int) (*http.Response, error) { return nil, errors.New("no way") }, "token endpoint: no way", false, time.Second},
		{"fails", func(int) (*http.Response, error) { return answers(503, "oops"), nil }, "token endpoint answered 503 Service Unavailable", false, time.Second},
		{"asks for time", func(int) (*http.Response, error) { return answers(429, "", "Retry-After", "20"), nil },
			"token endpoint answered 429 Too Many Requests", false, 20 * time.Second},
		{"redirects", func(int) (*http.Response, error) { return answers(302, "", "Location", "https://evil.example/"), nil },
			"token endpoint answered 302 Found", false, time.Second},
		{"refuses the scope", func(int) (*http.Response, error) { return answers(400, `{"error":"invalid_scope"}`), nil },
			"token endpoint answered 400 Bad Request: invalid_scope", false, time.Second},
		{"refuses the client", func(int) (*http.Response, error) {
			return answers(401, `{"error":"invalid_client","error_description":"not hush"}`), nil
		}, "token endpoint answered 401 Unauthorized: invalid_client", true, time.Second},
		{"no JSON", func(int) (*http.Response, error) { return answers(200, "<html>"), nil }, "token endpoint: oauth2: cannot parse json", false, time.Second},
		{"no token", func(int) (*http.Response, error) { return answers(200, "{}"), nil }, "token endpoint: oauth2: server response missing access_token", false, time.Second},
		{"another kind", func(int) (*http.Response, error) {
			return answers(200, `{"access_token":"a","token_type":"mac"}`), nil
		}, "token endpoint: its token is not of the type bearer", false, time.Second},
		{"no header", func(int) (*http.Response, error) {
			return answers(200, `{"access_token":"a\r\nX-B: c","token_type":"bearer"}`), nil
		}, "token endpoint: its token can't be sent in a header", false, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, tokens := newEndpoint(t, tt.answer)
				var failed error
				for range 4 * 60 * 60 {
					_, err := tokens.bearer(t.Context())
					own, ok := errors.AsType[*ownError](err)
					if !ok || !strings.HasPrefix(err.Error(), tt.says) || strings.Contains(err.Error(), "hush") || own.credentials != tt.credentials {
						t.Fatalf("error %v, want %q", err, tt.says)
					}
					failed = err
					time.Sleep(250 * time.Millisecond)
				}
				distinct := e.asked[:1]
				for _, at := range e.asked {
					if at != distinct[len(distinct)-1] { // two styles are tried at once
						distinct = append(distinct, at)
					}
				}
				if wait := distinct[1].Sub(distinct[0]); wait != tt.firstWait {
					t.Errorf("asked again after %s, want %s", wait, tt.firstWait)
				}
				if n := len(distinct); n < 30 || n > 66 {
					t.Errorf("asked %d times in an hour", n)
				}
				e.set(gives(60))
				time.Sleep(time.Minute)
				if b, err := tokens.bearer(t.Context()); err != nil || b.text == "" {
					t.Errorf("a minute after the endpoint was mended: %v, before %v", err, failed)
				}
			})
		})
	}
}

// idp is a token endpoint, and a webhook that takes its last token.
type idp struct {
	*httptest.Server
	tokens   atomic.Int32 // given
	posts    atomic.Int32
	revoked  atomic.Bool // none is taken
	inParams bool
	form     atomic.Pointer[url.Values]
}

func newIDP(t *testing.T, inParams bool) *idp {
	p := &idp{inParams: inParams}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		p.form.Store(&r.PostForm)
		id, secret, _ := r.BasicAuth()
		if p.inParams {
			id, secret = r.PostForm.Get("client_id"), r.PostForm.Get("client_secret")
		} else {
			secret, _ = url.QueryUnescape(secret) // RFC 6749 section 2.3.1
		}
		w.Header().Set("Content-Type", "application/json")
		if id != "broker" || secret != "h:u sh%" {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"error":"invalid_client"}`)
			return
		}
		fmt.Fprintf(w, `{"access_token":"t%d","token_type":"bearer","expires_in":3600}`, p.tokens.Add(1))
	})
	mux.HandleFunc("POST /notify", func(w http.ResponseWriter, r *http.Request) {
		p.posts.Add(1)
		if p.revoked.Load() || r.Header.Get("Authorization") != fmt.Sprintf("Bearer t%d", p.tokens.Load()) {
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	p.Server = httptest.NewServer(mux)
	t.Cleanup(p.Close)
	return p
}

func (p *idp) sender(t *testing.T) *httpSender {
	s := newHTTPSender(senderOptions{concurrency: 4, oauth: &OAuth2{
		TokenURL: p.URL + "/token", ClientID: "broker", ClientSecret: "h:u sh%", Scopes: []string{"notify", "read"},
	}})
	t.Cleanup(s.close)
	return s
}

// The secret goes into a header, or into the body where only that is taken.
func TestSendWithToken(t *testing.T) {
	for _, inParams := range []bool{false, true} {
		p := newIDP(t, inParams)
		s := p.sender(t)
		for range 3 {
			if res := send(t, s, p.URL+"/notify", time.Minute); res.Status != 200 {
				t.Fatalf("secret in the body: %v: %+v", inParams, res)
			}
		}
		form := *p.form.Load()
		if n := p.tokens.Load(); n != 1 || form.Get("grant_type") != "client_credentials" || form.Get("scope") != "notify read" || form.Has("client_secret") != inParams {
			t.Errorf("%d tokens, asked for with %v", n, form)
		}
		// A request for the next one doesn't try again which way is right.
		s.tokens.current = bearer{}
		if res := send(t, s, p.URL+"/notify", time.Minute); res.Status != 200 || p.tokens.Load() != 2 {
			t.Errorf("second token: %+v", res)
		}
	}
}

// A revoked token costs nothing; a destination that takes none costs the
// endpoint one request in 10 s.
func TestSendWithRevokedToken(t *testing.T) {
	p := newIDP(t, false)
	s := p.sender(t)
	age := func() {
		s.tokens.mu.Lock()
		defer s.tokens.mu.Unlock()
		s.tokens.current.got = s.tokens.current.got.Add(-tokenKept)
	}
	if res := send(t, s, p.URL+"/notify", time.Minute); res.Status != 200 {
		t.Fatal(res)
	}
	age()
	p.tokens.Add(1) // the last one is another's
	if res := send(t, s, p.URL+"/notify", time.Minute); res.Status != 200 || p.posts.Load() != 3 || p.tokens.Load() != 3 {
		t.Fatalf("revoked: %+v, %d posts, %d tokens", res, p.posts.Load(), p.tokens.Load())
	}

	p.revoked.Store(true)
	age()
	for range 10 {
		if res := send(t, s, p.URL+"/notify", time.Minute); res.Status != 401 || res.Own {
			t.Errorf("no token is taken: %+v", res)
		}
	}
	if posts, tokens := p.posts.Load()-3, p.tokens.Load()-3; posts != 11 || tokens != 1 {
		t.Errorf("%d posts and %d tokens for 10 attempts, want 11 and 1", posts, tokens)
	}
}

// What the token endpoint fails at is our own side's, and nothing is sent.
func TestSendWithoutToken(t *testing.T) {
	p := newIDP(t, false)
	s := newHTTPSender(senderOptions{oauth: &OAuth2{TokenURL: p.URL + "/token", ClientID: "broker", ClientSecret: "wrong"}})
	defer s.close()
	res := send(t, s, p.URL+"/notify", time.Minute)
	if !res.Own || res.Status != 0 || failureText(res) != "token endpoint answered 401 Unauthorized: invalid_client" || p.posts.Load() != 0 {
		t.Errorf("wrong secret: %+v, %d posts", res, p.posts.Load())
	}

	endless := rawServer(t, endlessBody)
	s = newHTTPSender(senderOptions{oauth: &OAuth2{TokenURL: endless, ClientID: "broker", ClientSecret: "x"}})
	defer s.close()
	if res := send(t, s, p.URL+"/notify", time.Minute); !res.Own || p.posts.Load() != 0 {
		t.Errorf("endless answer: %+v", res)
	}
}
