package admin_test

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
)

func TestDestinations(t *testing.T) {
	since := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	f := &fakeOutbox{destinations: []bridge.Status{
		{Name: "a", URL: "http://127.0.0.1/", State: bridge.StateActive, InFlight: 3, Usage: bridge.Usage{Records: 2, Bytes: 10, Limit: 100, Oldest: time.Now().Add(-time.Minute), DeadLetters: 1}},
		{Name: "b", State: bridge.StateFailing, Why: "own_side", Failure: "network is unreachable", Since: since},
		{Name: "c", State: bridge.StatePaused, Why: "gone", Since: since},
	}}
	s := serve(t, func(o *admin.Options) { o.Outbox = f })
	code, text := ask(t, "GET", s.URL+"/api/v1/destinations", nil)
	var got admin.Destinations
	if err := json.Unmarshal([]byte(text), &got); err != nil || code != 200 || len(got.Destinations) != 3 {
		t.Fatalf("%d %s: %v", code, text, err)
	}
	a, b := got.Destinations[0], got.Destinations[1]
	if a.Name != "a" || a.State != "active" || a.InFlight != 3 || a.Records != 2 || a.Bytes != 10 || a.Limit != 100 || a.DeadLetters != 1 || a.OldestAge < 60 {
		t.Errorf("a: %+v", a)
	}
	if b.State != "failing" || b.Why != "own_side" || b.Failure != "network is unreachable" || !b.Since.Equal(since) || b.OldestAge != 0 {
		t.Errorf("b: %+v", b)
	}
	if strings.Contains(text, "0001-01-01") {
		t.Errorf("zero times are shown: %s", text)
	}
	_, text = ask(t, "GET", s.URL+"/api/v1/outbox", nil)
	var l admin.Listing
	if err := json.Unmarshal([]byte(text), &l); err != nil || !reflect.DeepEqual(l.Paused, []admin.PausedDestination{{Name: "c", Why: "gone", Since: since}}) {
		t.Errorf("listing %s: %v", text, err)
	}
}

func TestPauseAndResume(t *testing.T) {
	var log strings.Builder
	f := &fakeOutbox{}
	s := serve(t, func(o *admin.Options) { o.Outbox, o.Logger = f, slog.New(slog.NewTextHandler(&log, nil)) })
	for verb, want := range map[string]string{"pause": "paused", "resume": "resumed"} {
		f.err = nil
		code, text := ask(t, "POST", s.URL+"/api/v1/destinations/a%2Fb/"+verb, nil)
		var d admin.Destination
		if err := json.Unmarshal([]byte(text), &d); err != nil || code != 200 || d.Name != "a/b" || f.verb != verb {
			t.Errorf("%s: %d %s: did %q, %v", verb, code, text, f.verb, err)
		}
		if l := log.String(); !strings.Contains(l, "destination "+want+" through the admin API") || !strings.Contains(l, "remote=127.0.0.1:") || !strings.Contains(l, "destination=a/b") {
			t.Errorf("log:\n%s", l)
		}
		for err, want := range map[error]int{bridge.ErrNoDestination: 404, errors.New("disk is broken"): 500} {
			f.err = err
			if code, text := ask(t, "POST", s.URL+"/api/v1/destinations/a/"+verb, nil); code != want || !strings.Contains(text, `"status":`) {
				t.Errorf("%s, %v: %d %s", verb, err, code, text)
			}
		}
		if code, _ := ask(t, "GET", s.URL+"/api/v1/destinations/a/"+verb, nil); code != 405 {
			t.Errorf("GET of %s: %d", verb, code)
		}
	}
}

// TestPausesAreGuarded: as other changes are.
func TestPausesAreGuarded(t *testing.T) {
	f := &fakeOutbox{}
	s := serve(t, func(o *admin.Options) { o.Outbox, o.Token = f, "s3cret" })
	for _, path := range []string{"/api/v1/destinations/a/pause", "/api/v1/destinations/a/resume"} {
		for name, c := range map[string]struct {
			change func(*http.Request)
			want   int
		}{
			"no token":             {func(r *http.Request) { r.Header.Del("Authorization") }, 401},
			"another origin":       {func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }, 403},
			"another Host":         {func(r *http.Request) { r.Host = "evil.example" }, 421},
			"all that it asks for": {func(*http.Request) {}, 200},
		} {
			f.verb = ""
			code, _ := ask(t, "POST", s.URL+path, func(r *http.Request) {
				r.Header.Set("Authorization", "Bearer s3cret")
				c.change(r)
			})
			if code != c.want || (f.verb != "") != (c.want == 200) {
				t.Errorf("%s with %s: %d, want %d; did %q", path, name, code, c.want, f.verb)
			}
		}
	}
	if code, _ := ask(t, "GET", s.URL+"/api/v1/destinations", nil); code != 401 {
		t.Errorf("list without a token: %d", code)
	}
}
