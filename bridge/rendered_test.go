package bridge_test

import (
	"cmp"
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// What was rendered for a record goes out with what its destination's definition
// is when it is sent.
func TestRendered(t *testing.T) {
	const body, host = `{"vin":"V7"}`, "http://127.0.0.1:8080"
	tests := []struct {
		name string
		def  bridge.Destination
		rec  bridge.Record
		url  string            // "": that of the definition
		want map[string]string // headers; "" isn't there
	}{
		{name: "nothing", def: bridge.Destination{URL: host + "/notify?key=1"}},
		{name: "path", def: bridge.Destination{URL: host + "/notify"}, rec: bridge.Record{Path: "/v7%2F/x"}, url: host + "/notify/v7%2F/x"},
		{name: "path behind a slash", def: bridge.Destination{URL: host + "/notify/"}, rec: bridge.Record{Path: "/v7"}, url: host + "/notify/v7"},
		{name: "path behind a host", def: bridge.Destination{URL: host}, rec: bridge.Record{Path: "/v7"}, url: host + "/v7"},
		{name: "path that would change the host", def: bridge.Destination{URL: host}, rec: bridge.Record{Path: ".evil.example:80@x"}, url: host + "/.evil.example:80@x"},
		{name: "path before a query", def: bridge.Destination{URL: host + "/a?key=1"}, rec: bridge.Record{Path: "/v7"}, url: host + "/a/v7?key=1"},
		{name: "query", def: bridge.Destination{URL: host + "/a/"}, rec: bridge.Record{Query: "q=1&r=2"}, url: host + "/a/?q=1&r=2"},
		{name: "query behind a query", def: bridge.Destination{URL: host + "/a?key=1"}, rec: bridge.Record{Query: "q=1"}, url: host + "/a?key=1&q=1"},
		{name: "path and query", def: bridge.Destination{URL: host + "/a?key=1"}, rec: bridge.Record{Path: "/b", Query: "q=1"}, url: host + "/a/b?key=1&q=1"},
		{name: "header", def: bridge.Destination{Headers: map[string]string{"X-Other": "o"}}, rec: bridge.Record{Headers: []bridge.Header{{Name: "X-Vin", Value: "V7"}}},
			want: map[string]string{"X-Vin": "V7", "X-Other": "o"}},
		{name: "header that the definition has by now", def: bridge.Destination{Headers: map[string]string{"X-Vin": "fixed"}},
			rec: bridge.Record{Headers: []bridge.Header{{Name: "x-vin", Value: "V7"}}}, want: map[string]string{"X-Vin": "V7"}},
		{name: "secrets are the definition's", def: bridge.Destination{HeaderSecrets: map[string][]string{"X-Key": {"one", "two", "three"}}},
			rec: bridge.Record{Headers: []bridge.Header{{Name: "X-Key", Value: "\x00, V7, \x00"}}}, want: map[string]string{"X-Key": "one, V7, two"}},
		{name: "secrets that are gone", def: bridge.Destination{Headers: map[string]string{"X-Key": "fixed"}, HeaderSecrets: map[string][]string{"X-Key": {"one"}}},
			rec: bridge.Record{Headers: []bridge.Header{{Name: "X-Key", Value: "\x00, V7, \x00"}}}, want: map[string]string{"X-Key": "fixed"}},
		{name: "headers that are the bridge's",
			def: bridge.Destination{Basic: &bridge.BasicAuth{Username: "u"}, IdempotencyKey: true},
			rec: bridge.Record{Headers: []bridge.Header{{Name: "Webhook-Id", Value: "x"}, {Name: "Sw8", Value: "x"}, {Name: "Sw8-Correlation", Value: "x"},
				{Name: "Authorization", Value: "x"}, {Name: "Idempotency-Key", Value: "x"}, {Name: "X-Throughline-Ids", Value: "x"},
				{Name: "X-Throughline-Attempt", Value: "x"}, {Name: "Webhook-Timestamp", Value: "x"}, {Name: "Webhook-Signature", Value: "x"}}},
			want: map[string]string{"Webhook-Id": "1", "Authorization": "Basic dTo=", "Idempotency-Key": "1", "X-Throughline-Ids": "", "X-Throughline-Attempt": "1",
				"Webhook-Signature": "", "Sw8": "", "Sw8-Correlation": ""}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				tt.def.Name, tt.def.URL = nc, cmp.Or(tt.def.URL, host)
				r.define(tt.def)
				tt.rec.ID, tt.rec.Destination, tt.rec.Body = "1", nc, []byte(body)
				if _, err := r.Append([]bridge.Record{tt.rec}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				all := r.center.all()
				if len(all) != 1 || r.queue.queued() != 0 {
					t.Fatalf("%d requests, %d left", len(all), r.queue.queued())
				}
				if want := cmp.Or(tt.url, tt.def.URL); all[0].URL != want {
					t.Errorf("url %s, want %s", all[0].URL, want)
				}
				for name, want := range tt.want {
					if got := strings.Join(all[0].Header[name], "|"); got != want {
						t.Errorf("%s: %q, want %q", name, got, want)
					}
				}
				shown, _, _ := strings.Cut(all[0].URL, "?")
				if exit := r.tracer.Segments()[0].Spans[1]; exit.Tag("url") != shown || strings.Contains(exit.Operation, "v7") {
					t.Errorf("span %q with url %s, want %s", exit.Operation, exit.Tag("url"), shown)
				}
			})
		})
	}
}

// A header whose secrets are gone is told once, by its name alone.
func TestRenderedSecretsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range 3 {
			if _, err := r.Append([]bridge.Record{{Destination: nc, Body: []byte(`{}`), Headers: []bridge.Header{{Name: "X-Key", Value: "\x00 V7"}}}}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if got := r.log.with("X-Key"); len(got) != 1 || strings.Contains(got[0], "V7") {
			t.Errorf("log %q", got)
		}
	})
}

// A record for which more than its body was rendered is in no batch with others.
func TestRenderedInBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := to(nc)
		d.Batch = bridge.Batch{Max: 10, Linger: time.Second}
		r.define(d)
		r.add("v7", "1", "2")
		if _, err := r.Append([]bridge.Record{{ID: "3", Destination: nc, Lane: "v7", Ordered: true, Body: []byte(`{"n":3}`), Path: "/v7"}}); err != nil {
			t.Fatal(err)
		}
		r.add("v7", "4")
		time.Sleep(5 * time.Second)
		var got []string
		for _, s := range r.center.all() {
			got = append(got, strings.TrimPrefix(s.URL, d.URL)+" "+s.Header.Get("X-Throughline-Ids"))
		}
		if want := ` "1","2";/v7 "3"; "4"`; strings.Join(got, ";") != want {
			t.Errorf("requests %q, want %q", strings.Join(got, ";"), want)
		}
	})
}

// GET and DELETE have no body, so that the trace goes into the headers alone. What was
// stored comes with the next definition that has a method for it.
func TestMethodsWithoutBody(t *testing.T) {
	got := make(chan *http.Request, 1)
	var answer atomic.Int32
	answer.Store(http.StatusMethodNotAllowed)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := make([]byte, 1)
		if n, _ := r.Body.Read(body); n > 0 != (r.Method == "PUT") {
			t.Errorf("%s with a body: %t", r.Method, n > 0)
		}
		w.WriteHeader(int(answer.Load()))
		got <- r
	}))
	defer srv.Close()
	d := to(nc)
	d.URL, d.SigningKeys = srv.URL+"/a", [][]byte{[]byte("0123456789abcdef01234567")}
	d.Method = "GET"
	p := start(t, filepath.Join(t.TempDir(), "outbox.db"), bridge.Schedule{}, d)
	defer p.stop(t)
	rec := records(1)[0]
	rec.Path, rec.Query, rec.Headers = "/v%2F7/..%2f", "q=a+b%26", []bridge.Header{{Name: "X-Vin", Value: "V7"}}
	if _, err := p.Append([]bridge.Record{rec}); err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{"GET", "DELETE", "PUT"} {
		if method == "PUT" {
			answer.Store(http.StatusOK)
		}
		if d.Method != method {
			d.Method = method
			p.SetDestinations([]bridge.Destination{d})
		}
		r := <-got
		for r.Method != method { // a probe of the definition before
			r = <-got
		}
		contentType := map[bool]string{true: "application/json"}[method == "PUT"]
		if r.RequestURI != "/a/v%2F7/..%2f?q=a+b%26" || r.Header.Get("X-Vin") != "V7" || r.Header.Get("Content-Type") != contentType ||
			r.Header.Get("Sw8") == "" || r.Header.Get("Webhook-Signature") == "" {
			t.Errorf("%s %s %v", r.Method, r.RequestURI, r.Header)
		}
		if has := r.ContentLength > 0; has != (method == "PUT") {
			t.Errorf("%s with %d bytes", method, r.ContentLength)
		}
	}
}

// vehicles is a rig whose destination has a path for each vehicle, and answers those of
// the bad ones otherwise.
func vehicles(t *testing.T, status int) *rig {
	t.Helper()
	r := newRig(t)
	r.center.answers(func(_ context.Context, s sent) bridge.Response {
		if strings.Contains(s.URL, "/bad") {
			return bridge.Response{Status: status}
		}
		return bridge.Response{Status: 200}
	})
	return r
}

// addOf appends a record with a path of its vehicle, which is its lane, for each id.
func (r *rig) addOf(vehicle string, ids ...string) {
	r.t.Helper()
	for _, id := range ids {
		rec := bridge.Record{ID: id, Destination: nc, Lane: vehicle, Ordered: true, Body: []byte(`{}`), Path: "/" + vehicle}
		if _, err := r.Append([]bridge.Record{rec}); err != nil {
			r.t.Fatal(err)
		}
	}
}

// What is answered to one vehicle's path holds up no other vehicle, however many there
// are of them.
func TestRefusedPaths(t *testing.T) {
	for _, status := range []int{301, 403, 404, 405} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := vehicles(t, status)
				for n := range 30 {
					r.addOf(fmt.Sprint("bad", n), fmt.Sprint("bad", n, "-1"))
				}
				for n := range 10 {
					start, id := time.Now(), fmt.Sprint("good", n)
					r.addOf("v7", id)
					time.Sleep(time.Second)
					if got := r.center.of(id); len(got) != 1 || !got[0].at.Equal(start) {
						t.Fatalf("%s sent %v, want at once", id, at(start, got))
					}
					r.addOf("bad0", "bad0-"+fmt.Sprint(n+2))
					synctest.Wait()
					if s := r.status(); s.State != bridge.StateActive {
						t.Errorf("status %+v", s)
					}
					time.Sleep(time.Minute)
				}
				r.wantMetric(`throughline_delivery_breaker_open{destination=notification-center}`, 0)
				if n := len(r.queue.buried()); n != 0 || r.queue.queued() != 40 {
					t.Errorf("%d dead letters, %d queued", n, r.queue.queued())
				}
				if got := len(r.center.of("bad1-1")); got < 3 || got > 11 {
					t.Errorf("a refused record was sent %d times in ten minutes", got)
				}
				if got := len(r.center.of("bad0-2")); got == 0 {
					t.Error("the second record of a refused vehicle was never sent")
				}
			})
		})
	}
}

// The last answer is told all the same.
func TestRefusedPathStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := vehicles(t, 404)
		r.addOf("bad", "1")
		synctest.Wait()
		if s := r.status(); s.State != bridge.StateActive || s.Why != string(bridge.Configuration) || s.Failure != "answered 404 Not Found" {
			t.Errorf("status %+v", s)
		}
		r.wantMetric("throughline_delivery_attempts_total{class=configuration,destination=notification-center}", 1)
		if got := r.log.with("answered 404"); len(got) != 1 || !strings.Contains(got[0], "level=ERROR") {
			t.Errorf("log %q", got)
		}
	})
}

// A 410 costs the record whose request it answers, and no other: neither its lane nor the
// destination.
func TestGonePath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := vehicles(t, 410)
		for n := range 10 {
			r.addOf(fmt.Sprint("bad", n), fmt.Sprint("bad", n, "-1"), fmt.Sprint("bad", n, "-2"))
		}
		r.addOf("v7", "good")
		synctest.Wait()
		if s := r.status(); s.State != bridge.StateActive {
			t.Errorf("status %+v", s)
		}
		if r.queue.queued() != 0 || len(r.center.of("good")) != 1 || len(r.center.all()) != 21 {
			t.Errorf("%d queued after %d requests", r.queue.queued(), len(r.center.all()))
		}
		dead := r.queue.buried()
		if len(dead) != 20 || dead[0].Reason != bridge.ReasonGone || dead[0].Status != 410 || dead[0].Path == "" {
			t.Errorf("dead letters %+v", dead)
		}
		r.wantMetric(paused, 0)
	})
}

// A record that lacks what its definition would have rendered can't speak for the others
// either.
func TestGoneWithoutRendered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := to(nc)
		d.Rendered = true
		r.define(d)
		r.center.status(410)
		r.add("v7", "1")
		synctest.Wait()
		if s := r.status(); s.State != bridge.StateActive || len(r.queue.buried()) != 1 {
			t.Errorf("status %+v, dead letters %+v", s, r.queue.buried())
		}
	})
}

// Credentials are those of all records: 401 and 407 open the breaker, as ever. An answer
// about one record closes it.
func TestRefusedCredentialsWithPaths(t *testing.T) {
	for _, status := range []int{401, 407, 503} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := vehicles(t, status)
				for n := range 10 {
					r.addOf(fmt.Sprint("bad", n), fmt.Sprint(n))
				}
				time.Sleep(time.Second)
				if s := r.status(); s.State != bridge.StateFailing {
					t.Errorf("status %+v", s)
				}
				r.center.status(404)
				time.Sleep(time.Minute)
				if s := r.status(); s.State != bridge.StateActive || s.Why != string(bridge.Configuration) {
					t.Errorf("then %+v", s)
				}
			})
		})
	}
}

// No header begins or ends with a space, wherever that comes from: HTTP/2 has no such
// values, and what a vehicle says must not make a request that is refused as malformed for ever.
func TestHeadersHTTP2(t *testing.T) {
	got := make(chan *http.Request, 1)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r }))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	d := to(nc)
	d.URL, d.TLS.CAFile = srv.URL, ca
	d.Headers, d.HeaderSecrets = map[string]string{"X-Fixed": " fixed\t"}, map[string][]string{"X-Key": {"secret "}}
	p := start(t, filepath.Join(t.TempDir(), "outbox.db"), bridge.Schedule{}, d)
	defer p.stop(t)
	rec := records(1)[0]
	rec.Headers = []bridge.Header{{Name: "X-Vin", Value: " V 7\t "}, {Name: "X-Key", Value: "k \x00"}, {Name: "X-Empty", Value: "  "}}
	if _, err := p.Append([]bridge.Record{rec}); err != nil {
		t.Fatal(err)
	}
	r := <-got
	if r.ProtoMajor != 2 {
		t.Errorf("came with %s", r.Proto)
	}
	for name, want := range map[string]string{"X-Fixed": "fixed", "X-Vin": "V 7", "X-Key": "k secret", "X-Empty": ""} {
		if v := r.Header[name]; len(v) != 1 || v[0] != want {
			t.Errorf("%s: %q, want %q", name, v, want)
		}
	}
}
