package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/rules"
)

// fakeOutbox answers with entries, as many as a filter's limit allows.
type fakeOutbox struct {
	entries []bridge.Entry
	asked   bridge.Filter
	err     error

	verb   string // of the last change
	change bridge.Change
	done   bridge.Changed

	destinations []bridge.Status
}

func (f *fakeOutbox) List(filter bridge.Filter, each func(bridge.Entry) bool) error {
	f.asked = filter
	n := 0
	for _, e := range f.entries {
		if filter.ID != "" && filter.ID != e.ID {
			continue
		}
		if n++; n > filter.Limit || !each(e) {
			break
		}
	}
	return f.err
}

func (f *fakeOutbox) Stats() bridge.Stats {
	return bridge.Stats{Usage: bridge.Usage{Records: len(f.entries), Limit: 10}, Destinations: map[string]bridge.Usage{"center": {Records: len(f.entries)}}}
}

func (f *fakeOutbox) Retry(_ context.Context, c bridge.Change) (bridge.Changed, error) {
	f.change, f.verb = c, "retry"
	return f.done, f.err
}

func (f *fakeOutbox) Purge(_ context.Context, c bridge.Change) (bridge.Changed, error) {
	f.change, f.verb = c, "purge"
	return f.done, f.err
}

func (f *fakeOutbox) Destinations() []bridge.Status { return f.destinations }

func (f *fakeOutbox) Pause(_ context.Context, name string) (bridge.Status, error) {
	f.verb = "pause"
	return bridge.Status{Name: name, State: bridge.StatePaused}, f.err
}

func (f *fakeOutbox) Resume(_ context.Context, name string) (bridge.Status, error) {
	f.verb = "resume"
	return bridge.Status{Name: name, State: bridge.StateActive}, f.err
}

type fakeRules struct {
	result rules.Reload
	set    *rules.Set
}

func (f *fakeRules) Current() *rules.Set  { return f.set }
func (f *fakeRules) Last() rules.Reload   { return f.result }
func (f *fakeRules) Reload() rules.Reload { return f.result }

func serve(t *testing.T, change func(*admin.Options)) *httptest.Server {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "throughline_test_total", Help: "A test."}))
	o := admin.Options{
		Ready:   func() error { return nil },
		Metrics: registry,
		Outbox:  &fakeOutbox{},
		Rules:   &fakeRules{result: rules.Reload{OK: true}},
		Logger:  slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	s := httptest.NewServer(admin.New(o))
	t.Cleanup(s.Close)
	return s
}

// ask returns the status and body of the answer to a request that change has prepared.
func ask(t *testing.T, method, target string, change func(*http.Request)) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(r)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode >= 400 && resp.StatusCode != http.StatusServiceUnavailable && resp.StatusCode != http.StatusUnprocessableEntity {
		var problem struct {
			Title  string
			Status int
		}
		if err := json.Unmarshal(body, &problem); (err != nil || problem.Status != resp.StatusCode || problem.Title == "") &&
			resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s %s: answer %q is no problem+json", method, target, body)
		}
	}
	return resp.StatusCode, string(body)
}

func TestHosts(t *testing.T) {
	s := serve(t, func(o *admin.Options) { o.Hosts = []string{"Broker.plant.example"} })
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]int{
		"localhost":                 200,
		"LOCALHOST:" + port:         200,
		"127.0.0.1:" + port:         200,
		"127.0.0.1":                 200,
		"broker.plant.example:443":  200,
		"evil.example":              421,
		"evil.example:" + port:      421,
		"localhost.evil.example":    421,
		"10.0.0.1":                  421,
		"[::1]:" + port:             421,
		"127.0.0.1.evil.example":    421,
		"broker.plant.example.evil": 421,
	} {
		for _, path := range []string{"/livez", "/metrics", "/api/v1/outbox"} {
			if code, _ := ask(t, "GET", s.URL+path, func(r *http.Request) { r.Host = host }); code != want {
				t.Errorf("GET %s with Host %s: %d, want %d", path, host, code, want)
			}
		}
	}
}

func TestCrossOriginChangesAreRefused(t *testing.T) {
	s := serve(t, nil)
	for name, c := range map[string]struct {
		header, value string
		want          int
	}{
		"not a browser":       {"", "", 200},
		"another site":        {"Sec-Fetch-Site", "cross-site", 403},
		"the same site":       {"Sec-Fetch-Site", "same-site", 403},
		"the same origin":     {"Sec-Fetch-Site", "same-origin", 200},
		"an old browser":      {"Origin", "https://evil.example", 403},
		"an opaque origin":    {"Origin", "null", 403},
		"a page of this host": {"Origin", s.URL, 200},
	} {
		code, _ := ask(t, "POST", s.URL+"/api/v1/rules/reload", func(r *http.Request) {
			if c.header != "" {
				r.Header.Set(c.header, c.value)
			}
		})
		if code != c.want {
			t.Errorf("POST from %s: %d, want %d", name, code, c.want)
		}
	}
	if code, _ := ask(t, "GET", s.URL+"/api/v1/rules/reload", nil); code != http.StatusMethodNotAllowed {
		t.Errorf("a change by GET: %d", code)
	}
}

func TestToken(t *testing.T) {
	s := serve(t, func(o *admin.Options) { o.Token = "s3cret" })
	for _, path := range []string{"/metrics", "/api/v1/outbox", "/api/v1/outbox/stats", "/api/v1/outbox/x", "/api/v1/rules"} {
		for value, want := range map[string]bool{"": false, "Bearer wrong": false, "Bearer ": false, "s3cret": false, "Basic s3cret": false, "Bearer s3cret": true} {
			code, body := ask(t, "GET", s.URL+path, func(r *http.Request) { r.Header.Set("Authorization", value) })
			if (code != http.StatusUnauthorized) != want {
				t.Errorf("GET %s with Authorization %q: %d", path, value, code)
			}
			if strings.Contains(body, "s3cret") {
				t.Errorf("GET %s: the token is in the answer %q", path, body)
			}
		}
	}
	for _, path := range []string{"/livez", "/readyz"} {
		if code, _ := ask(t, "GET", s.URL+path, nil); code != http.StatusOK {
			t.Errorf("GET %s without a token: %d", path, code)
		}
	}
}

func TestReadiness(t *testing.T) {
	var ready error
	s := serve(t, func(o *admin.Options) { o.Ready = func() error { return ready } })
	if code, body := ask(t, "GET", s.URL+"/readyz", nil); code != 200 || body != "ok\n" {
		t.Errorf("ready: %d %q", code, body)
	}
	ready = errors.New("stopping")
	if code, body := ask(t, "GET", s.URL+"/readyz", nil); code != 503 || body != "not ready: stopping\n" {
		t.Errorf("not ready: %d %q", code, body)
	}
	if code, _ := ask(t, "GET", s.URL+"/livez", nil); code != 200 {
		t.Errorf("alive though not ready: %d", code)
	}
}

func TestMetrics(t *testing.T) {
	s := serve(t, nil)
	if code, body := ask(t, "GET", s.URL+"/metrics", nil); code != 200 || !strings.Contains(body, "throughline_test_total 0") {
		t.Errorf("%d %q", code, body)
	}
}

func TestOutbox(t *testing.T) {
	published := time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC)
	queued := bridge.Entry{DeadLetter: bridge.DeadLetter{Record: bridge.Record{
		Seq: 1, ID: "a", Rule: "hard-brake", Destination: "center", Lane: "v7", Ordered: true, Body: []byte(`{"x":1}`),
		Topic: "t", ClientID: "v7", Published: published, TraceID: "trace",
		Path: "/v7", Query: "q=1", Headers: []bridge.Header{{Name: "X-Key", Value: "\x00 \xffV7"}},
	}}}
	dead := bridge.Entry{Dead: true, DeadLetter: bridge.DeadLetter{Record: bridge.Record{Seq: 2, ID: "b", Body: []byte{0xff}}, Reason: "poison", Status: 400}}
	f := &fakeOutbox{entries: []bridge.Entry{queued, dead}}
	s := serve(t, func(o *admin.Options) { o.Outbox = f })

	var l admin.Listing
	list := func(path string) {
		t.Helper()
		code, body := ask(t, "GET", s.URL+path, nil)
		if code != 200 {
			t.Fatalf("GET %s: %d %s", path, code, body)
		}
		l = admin.Listing{}
		if err := json.Unmarshal([]byte(body), &l); err != nil {
			t.Fatal(err)
		}
	}
	list("/api/v1/outbox")
	if len(l.Records) != 2 || l.More || l.Records[0].State != "queued" || l.Records[1].State != "dead" || l.Records[1].Status != 400 {
		t.Errorf("listing %+v", l)
	}
	if r := l.Records[0]; r.Body != "" || r.Bytes != 7 || *r.Lane != "v7" || !r.Published.Equal(published) || r.TraceID != "trace" ||
		r.Path != "/v7" || r.Query != "q=1" || !reflect.DeepEqual(r.Headers, []admin.Header{{Name: "X-Key"}}) {
		t.Errorf("record %+v", r)
	}
	list("/api/v1/outbox?limit=1")
	if len(l.Records) != 1 || !l.More {
		t.Errorf("listing with limit 1: %+v", l)
	}
	list("/api/v1/outbox/a")
	if len(l.Records) != 1 || l.Records[0].Body != `{"x":1}` || l.Records[0].Headers[0].Value != "[redacted] \uFFFDV7" {
		t.Errorf("shown: %+v", l)
	}
	list("/api/v1/outbox/b")
	if len(l.Records) != 1 || l.Records[0].Body != "" || string(l.Records[0].BodyBase64) != "\xff" {
		t.Errorf("shown: %+v", l)
	}
	if code, _ := ask(t, "GET", s.URL+"/api/v1/outbox/nosuch", nil); code != http.StatusNotFound {
		t.Errorf("a record that isn't there: %d", code)
	}
	list("/api/v1/outbox?rule=r&destination=d&state=dead&older_than=1h")
	if want := (bridge.Filter{Rule: "r", Destination: "d", Which: bridge.DeadOnly, OlderThan: time.Hour, Limit: 101}); !reflect.DeepEqual(f.asked, want) {
		t.Errorf("filter %+v, want %+v", f.asked, want)
	}
	if code, body := ask(t, "GET", s.URL+"/api/v1/outbox/stats", nil); code != 200 || !strings.Contains(body, `"destinations":{"center":{"records":2`) {
		t.Errorf("stats: %d %s", code, body)
	}
	f.err = errors.New("disk on fire")
	if code, body := ask(t, "GET", s.URL+"/api/v1/outbox", nil); code != 500 || !strings.Contains(body, "disk on fire") {
		t.Errorf("a store that can't be read: %d %s", code, body)
	}
}

func TestBadFilters(t *testing.T) {
	s := serve(t, nil)
	for _, q := range []string{"state=alive", "older_than=x", "older_than=-1s", "limit=0", "limit=10001", "limit=x", "destinatoin=x", "id=a&id=b"} {
		if code, body := ask(t, "GET", s.URL+"/api/v1/outbox?"+q, nil); code != http.StatusBadRequest {
			t.Errorf("?%s: %d %s", q, code, body)
		}
	}
	if _, err := admin.ParseFilter(url.Values{}); err != nil {
		t.Errorf("no filter: %v", err)
	}
}

func TestReload(t *testing.T) {
	f := &fakeRules{result: rules.Reload{OK: true, Problems: []rules.Problem{{Severity: rules.Warning, Name: "w", Message: "a warning"}}}}
	s := serve(t, func(o *admin.Options) { o.Rules = f })
	if code, body := ask(t, "POST", s.URL+"/api/v1/rules/reload", nil); code != 200 || !strings.Contains(body, "a warning") {
		t.Errorf("a reload that went well: %d %s", code, body)
	}
	f.result = rules.Reload{Problems: []rules.Problem{{File: "a.yaml", Line: 1, Col: 2, Name: "e", Message: "bad"}}}
	if code, body := ask(t, "POST", s.URL+"/api/v1/rules/reload", nil); code != 422 || !strings.Contains(body, `"file":"a.yaml"`) {
		t.Errorf("a reload of bad files: %d %s", code, body)
	}
}

// TestRules: the set in force with what its rules count, and how the last reload went.
func TestRules(t *testing.T) {
	file := filepath.Join(t.TempDir(), "fleet.yaml")
	text := `
destinations: {center: {url: "http://127.0.0.1/"}}
rules:
  - name: hard-brake
    description: brakes
    sql: SELECT * FROM "fleet/+/telemetry"
    actions: [{http: center}]
  - {name: asleep, enabled: false, sql: 'SELECT * FROM "$events/client/connected"', actions: [{http: center}]}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		t.Fatal(problems)
	}
	message := rules.Message{Topic: "fleet/v7/telemetry", Payload: []byte(`{}`)}
	set.Run(set.Candidates(nil, message.Topic), &message, nil)
	at := time.Date(2026, 11, 25, 16, 0, 0, 0, time.UTC)
	f := &fakeRules{set: set, result: rules.Reload{Time: at, Err: errors.New("disk full"), Problems: []rules.Problem{
		{File: "a.yaml", Line: 1, Col: 2, Width: 3, Name: "e", Message: "bad", Hint: "mend it", Source: "text"},
	}}}
	_, body := ask(t, "GET", serve(t, func(o *admin.Options) { o.Rules = f }).URL+"/api/v1/rules", nil)
	var got, want any
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	for _, r := range got.(map[string]any)["rules"].([]any) { // there may be more outcomes than matter here
		outcomes := r.(map[string]any)["outcomes"].(map[string]any)
		maps.DeleteFunc(outcomes, func(name string, _ any) bool { return name != "matched" && name != "no_match" })
	}
	if err := json.Unmarshal([]byte(`{"generation":"`+set.Generation()+`","destinations":["center"],"rules":[
		{"name":"asleep","enabled":false,"file":"`+file+`","line":8,"filters":[],"outcomes":{"matched":0,"no_match":0}},
		{"name":"hard-brake","description":"brakes","enabled":true,"file":"`+file+`","line":4,"filters":["fleet/+/telemetry"],"outcomes":{"matched":1,"no_match":0}}],
		"reload":{"time":"2026-11-25T16:00:00Z","ok":false,"error":"disk full","problems":[
			{"file":"a.yaml","line":1,"col":2,"width":3,"severity":"error","name":"e","message":"bad","hint":"mend it","source":"text"}]}}`), &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}
