package bridge

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/go-resty/resty/v2"
)

// Sender makes one HTTP request. It is called from several goroutines at once.
type Sender interface {
	// Send sends r and waits for the answer, until ctx ends at most. It retries
	// nothing that the destination may have taken on purpose, follows no redirect,
	// and keeps nothing of r.
	Send(ctx context.Context, r *Request) Response
}

// Request is one attempt as it goes on the wire.
type Request struct {
	Method, URL string
	Header      http.Header // the sender's from here on
	Body        []byte      // not changed by the sender; nil: there is none
}

// Response is what came back.
type Response struct {
	Status     int           // 0: no answer
	Body       []byte        // its first 4 kB, unless Status is a success
	RetryAfter time.Duration // what the answer asked for; 0: nothing
	Err        error         // why there is no answer
	// Own: Err arose on our side before anything was sent; it counts as no
	// attempt.
	Own bool
}

const (
	connectTimeout = 2 * time.Second
	tlsTimeout     = 3 * time.Second
	// bodyKept is what of an answer is worth keeping in a dead letter.
	bodyKept = 4 << 10
	// bodyDrained bounds what is read so that the connection can be used
	// again; a longer answer costs the connection.
	bodyDrained = 64 << 10
)

// httpSender is the Sender of one destination, with connections of its own.
type httpSender struct {
	requests sync.Pool // of *resty.Request, each of which is a dozen allocations
	conns    *connections
	tokens   *tokens // nil: none are needed
}

// senderOptions are what an httpSender is made of. Their zero is plain HTTP with
// no connection kept.
type senderOptions struct {
	ctx         context.Context // ends what no caller waits for; nil: never
	concurrency int             // so many idle connections are kept
	tls         TLS
	oauth       *OAuth2
	egress      Egress
	own         []netip.AddrPort // as in Options.OwnAddresses
	resolver    *net.Resolver    // nil: the system's
	log         *slog.Logger     // nil: no log
}

// newHTTPSender returns a sender that reads no file and asks nobody before the
// first request. The time for a whole request is the caller's context.
func newHTTPSender(o senderOptions) *httpSender {
	if o.log == nil {
		o.log = slog.New(slog.DiscardHandler)
	}
	if o.ctx == nil {
		o.ctx = context.Background()
	}
	dialer := &net.Dialer{Timeout: connectTimeout, KeepAlive: 30 * time.Second, Resolver: o.resolver, Control: o.egress.guard(o.own)}
	conns := newConnections(o.tls, o.log, func(c *tls.Config) *http.Transport {
		return &http.Transport{
			Proxy:               nil, // never from the environment
			DialContext:         dialer.DialContext,
			TLSClientConfig:     c,
			TLSHandshakeTimeout: tlsTimeout,
			ForceAttemptHTTP2:   true, // a DialContext of our own turns it off otherwise
			// A connection that leads nowhere any more is given up, not used again
			// by every attempt until TCP notices.
			HTTP2:                  &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second},
			MaxIdleConns:           o.concurrency,
			MaxIdleConnsPerHost:    o.concurrency,
			IdleConnTimeout:        90 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			DisableCompression:     true, // the answer is drained, not read
		}
	})
	// A client of our own: resty's brings a cookie jar.
	client := &http.Client{Transport: conns, CheckRedirect: asItIs}
	of := resty.NewWithClient(client)
	s := &httpSender{conns: conns}
	s.requests.New = func() any { return of.R().SetDoNotParseResponse(true) }
	if o.oauth != nil {
		s.tokens = newTokens(o.ctx, *o.oauth, &http.Client{Transport: drained{conns}, CheckRedirect: asItIs})
	}
	return s
}

// asItIs makes a redirect an answer like any other.
func asItIs(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// Send implements Sender. A token that was good before and is answered with 401
// has been revoked: then the request goes out once more, with a new one.
func (s *httpSender) Send(ctx context.Context, r *Request) Response {
	if s.tokens == nil {
		return s.send(ctx, r)
	}
	token, err := s.tokens.bearer(ctx)
	if err != nil {
		return Response{Err: err, Own: true}
	}
	header := r.Header
	r.Header = header.Clone()
	r.Header.Set("Authorization", "Bearer "+token.text)
	res := s.send(ctx, r)
	if res.Status != http.StatusUnauthorized {
		return res
	}
	s.tokens.refused(token)
	next, err := s.tokens.bearer(ctx)
	if err != nil || next.text == token.text {
		return res
	}
	r.Header = header
	r.Header.Set("Authorization", "Bearer "+next.text)
	return s.send(ctx, r)
}

func (s *httpSender) send(ctx context.Context, r *Request) Response {
	// The key with a nil value is not sent. It tells the transport that the
	// request may be repeated, so that a keep-alive connection which the
	// server has just closed costs nothing: the same request goes out on
	// another one within this attempt. See DESIGN.md on duplicates.
	const repeatable = "X-Idempotency-Key"
	if _, set := r.Header[repeatable]; !set {
		r.Header[repeatable] = nil
	}

	req := s.requests.Get().(*resty.Request)
	req.Header = r.Header
	if r.Body != nil {
		req.SetBody(bytes.NewReader(r.Body))
	}
	res, err := req.SetContext(ctx).Execute(r.Method, r.URL)
	req.SetContext(context.Background()).SetBody(nil) // keeps alive nothing of this one
	req.Header, req.RawRequest = nil, nil
	s.requests.Put(req)
	if err != nil {
		return Response{Err: err, Own: isOwn(err)}
	}
	answer := res.RawResponse
	defer answer.Body.Close()
	out := Response{Status: answer.StatusCode, RetryAfter: retryAfter(answer.Header, time.Now())}
	// The status is the answer: a body that breaks off takes nothing from it.
	if Classify(out.Status, nil) != Success { // else nobody asks what it says
		out.Body, _ = io.ReadAll(io.LimitReader(answer.Body, bodyKept))
	}
	_, _ = io.CopyN(io.Discard, answer.Body, int64(bodyDrained-len(out.Body)))
	return out
}

func (s *httpSender) close() { s.conns.CloseIdleConnections() }

// retryAfter reads the Retry-After header in either form (RFC 9110 section
// 10.2.3), within 1 s and 1 h; 0 if it isn't there or makes no sense.
func retryAfter(h http.Header, now time.Time) time.Duration {
	text := h.Get("Retry-After")
	if text == "" {
		return 0
	}
	const least, most = time.Second, time.Hour
	seconds, err := strconv.ParseInt(text, 10, 64)
	switch {
	case err == nil && seconds >= 0:
		return max(least, time.Duration(min(seconds, int64(most/time.Second)))*time.Second)
	case errors.Is(err, strconv.ErrRange) && text[0] != '-':
		return most
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	return min(max(least, at.Sub(now)), most)
}
