package bridge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// rawServer accepts connections and gives each to serve, with its number from 0.
func rawServer(t *testing.T, serve func(n int, c *net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				serve(n, c.(*net.TCPConn))
			}()
		}
	}()
	return "http://" + l.Addr().String() + "/notify"
}

// readRequest reads one request and returns it with its body read.
func readRequest(r *bufio.Reader) (*http.Request, string, error) {
	req, err := http.ReadRequest(r)
	if err != nil {
		return nil, "", err
	}
	body, err := io.ReadAll(req.Body)
	return req, string(body), err
}

// endlessBody answers with a body that has no end.
func endlessBody(_ int, c *net.TCPConn) {
	_, _, _ = readRequest(bufio.NewReader(c))
	_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
	for {
		if _, err := fmt.Fprintf(c, "%01000d", 1); err != nil {
			return
		}
	}
}

// trickle answers with first, and then with next over and over, a little at a time.
func trickle(first, next string) func(int, *net.TCPConn) {
	return func(_ int, c *net.TCPConn) {
		_, _, _ = readRequest(bufio.NewReader(c))
		_, err := io.WriteString(c, first)
		for err == nil {
			time.Sleep(5 * time.Millisecond)
			_, err = io.WriteString(c, next)
		}
	}
}

func send(t *testing.T, s Sender, url string, timeout time.Duration) Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	return s.Send(ctx, &Request{
		Method: http.MethodPost, URL: url,
		Header: http.Header{"Content-Type": {"application/json"}, "Webhook-Id": {"id-1"}},
		Body:   []byte(`{"vin":"V7"}`),
	})
}

func newSender(t *testing.T) *httpSender {
	s := newHTTPSender(senderOptions{concurrency: 4})
	t.Cleanup(s.close)
	return s
}

// What a webhook can do wrong, and what comes of it.
func TestSendToBadWebhook(t *testing.T) {
	closed := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return "http://" + l.Addr().String()
	}()
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	answer := func(text string) string {
		return rawServer(t, func(_ int, c *net.TCPConn) {
			_, _, _ = readRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, text)
		})
	}
	tests := []struct {
		name    string
		url     string
		timeout time.Duration
		class   Class
		failure string // "": whatever
	}{
		{"refusing", closed, time.Minute, Retry, "connect: connection refused"},
		{"hanging", rawServer(t, func(int, *net.TCPConn) { <-hang }), 100 * time.Millisecond, Retry, "timed out"},
		{"closing at once", rawServer(t, func(_ int, c *net.TCPConn) { _ = c.SetLinger(0) }), time.Minute, Retry, ""},
		{"half-closed", rawServer(t, func(_ int, c *net.TCPConn) {
			_ = c.CloseWrite()
			_, _ = io.Copy(io.Discard, c)
		}), time.Minute, Retry, ""},
		{"closing within the header", answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"), time.Minute, Retry, "connection closed without an answer"},
		{"slow within the header", rawServer(t, func(_ int, c *net.TCPConn) {
			_, _, _ = readRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nX-A: ")
			<-hang
		}), 100 * time.Millisecond, Retry, "timed out"},
		{"closing within the body", answer("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok"), time.Minute, Success, ""},
		{"slow within the body", rawServer(t, func(_ int, c *net.TCPConn) {
			_, _, _ = readRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok")
			<-hang
		}), 100 * time.Millisecond, Success, ""},
		{"endless body", rawServer(t, endlessBody), time.Minute, Success, ""},
		{"trickling body", rawServer(t, trickle("HTTP/1.1 200 OK\r\n\r\n", "x")), 200 * time.Millisecond, Success, ""},
		{"trickling chunks", rawServer(t, trickle("HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n")), 200 * time.Millisecond, Retry, "answered 503 Service Unavailable"},
		{"trickling header", rawServer(t, trickle("HTTP/1.1 200 OK\r\nX-A: ", "x")), 200 * time.Millisecond, Retry, "timed out"},
		{"informational answers without end", rawServer(t, trickle("", "HTTP/1.1 103 Early Hints\r\n\r\n")), time.Minute, Retry, ""},
		{"no HTTP", answer("220 smtp.example ESMTP\r\n"), time.Minute, Retry, ""},
		{"header without end", rawServer(t, func(_ int, c *net.TCPConn) {
			_, _, _ = readRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			for {
				if _, err := fmt.Fprintf(c, "X-A: %0100d\r\n", 1); err != nil {
					return
				}
			}
		}), time.Minute, Retry, ""},
		{"internal error", answer("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"), time.Minute, Retry, "answered 500 Internal Server Error"},
		{"redirect", answer("HTTP/1.1 307 Moved\r\nLocation: " + closed + "\r\nContent-Length: 0\r\n\r\n"), time.Minute, Configuration, "answered 307 Temporary Redirect"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := send(t, newSender(t), tt.url, tt.timeout)
			if got := Classify(res.Status, res.Err); got != tt.class {
				t.Errorf("class %s, want %s: %+v", got, tt.class, res)
			}
			if got := failureText(res); tt.failure != "" && got != tt.failure {
				t.Errorf("failure %q, want %q", got, tt.failure)
			}
		})
	}
}

func TestSendRequest(t *testing.T) {
	var got *http.Request
	var body string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got, body = r, string(b)
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "1"})
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusAccepted)
		_, _ = io.WriteString(w, "taken")
	}))
	defer srv.Close()
	s := newSender(t)
	if s.conns.current.Load().Proxy != nil { // the environment's doesn't show on loopback
		t.Error("there is a proxy")
	}
	for range 2 {
		res := send(t, s, srv.URL+"/notify", time.Minute)
		if res.Err != nil || res.Status != 202 || res.RetryAfter != 7*time.Second {
			t.Fatalf("answer %+v", res)
		}
	}
	if got.Method != http.MethodPost || got.URL.Path != "/notify" || body != `{"vin":"V7"}` || got.ContentLength != int64(len(body)) {
		t.Errorf("request %s %s %q (%d)", got.Method, got.URL, body, got.ContentLength)
	}
	for _, name := range []string{"Cookie", "X-Idempotency-Key", "Idempotency-Key", "Accept-Encoding"} {
		if v, ok := got.Header[name]; ok {
			t.Errorf("%s: %q was sent", name, v)
		}
	}
	if id := got.Header.Get("webhook-id"); id != "id-1" {
		t.Errorf("webhook-id %q", id)
	}
}

// An answer is drained up to 64 kB, and then its connection is used again. Of one
// that is no success the beginning is kept.
func TestSendOversizeAnswer(t *testing.T) {
	tests := []struct {
		status, size, connections, kept int
	}{
		{200, 0, 1, 0}, {200, 1, 1, 0}, {200, bodyDrained - 1, 1, 0}, {200, 10 << 20, 3, 0},
		{500, 0, 1, 0}, {500, 1, 1, 1}, {500, bodyKept, 1, bodyKept}, {500, bodyDrained - 1, 1, bodyKept}, {500, 10 << 20, 3, bodyKept},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.status, "/", tt.size), func(t *testing.T) {
			var connections atomic.Int32
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				_, _ = w.Write(bytes.Repeat([]byte("x"), tt.size))
			}))
			srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
				if s == http.StateNew {
					connections.Add(1)
				}
			}
			srv.Start()
			defer srv.Close()
			s := newSender(t)
			for range 3 {
				res := send(t, s, srv.URL, time.Minute)
				if res.Status != tt.status || len(res.Body) != tt.kept {
					t.Fatalf("status %d, %d bytes kept, %v", res.Status, len(res.Body), res.Err)
				}
			}
			if got := int(connections.Load()); got != tt.connections {
				t.Errorf("%d connections for 3 requests, want %d", got, tt.connections)
			}
		})
	}
}

// A server that closes a keep-alive connection just when it is used again costs
// no attempt: the request is repeated on another connection.
func TestSendOnStaleConnection(t *testing.T) {
	var bodies []string
	url := rawServer(t, func(n int, c *net.TCPConn) {
		r := bufio.NewReader(c)
		for i := 0; ; i++ {
			_, body, err := readRequest(r)
			if err != nil || n == 0 && i == 1 {
				return // with the second request taken and unanswered
			}
			bodies = append(bodies, body)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	s := newSender(t)
	for n := range 2 {
		if res := send(t, s, url, time.Minute); res.Status != 200 {
			t.Errorf("request %d: %+v", n, res)
		}
	}
	if want := strings.Repeat(`{"vin":"V7"}`, 2); strings.Join(bodies, "") != want {
		t.Errorf("bodies %q", bodies)
	}
}

// A certificate that nobody vouches for is refused; its handshake failure is retried.
func TestSendVerifiesTLS(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	res := send(t, newSender(t), srv.URL, time.Minute)
	var unverified *tls.CertificateVerificationError
	if !errors.As(res.Err, &unverified) || Classify(res.Status, res.Err) != Retry {
		t.Errorf("answer %+v, want a refused certificate", res)
	}
}

// BenchmarkSend is a request over a loopback connection, the server's part
// included.
func BenchmarkSend(b *testing.B) {
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
	}))
	defer srv.Close()
	s := newHTTPSender(senderOptions{concurrency: 64})
	defer s.close()
	header := http.Header{"Content-Type": {"application/json"}, "User-Agent": {"throughline"}, "Webhook-Id": {"id-1"}}
	body := bytes.Repeat([]byte("x"), 600)
	b.SetParallelism(32)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			res := s.Send(b.Context(), &Request{Method: http.MethodPost, URL: srv.URL, Header: header.Clone(), Body: body})
			if res.Status != 200 {
				b.Error(res)
			}
		}
	})
}
