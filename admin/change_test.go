package admin_test

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
)

// send posts body as curl does.
func send(t *testing.T, target, body string) (int, string) {
	t.Helper()
	return ask(t, "POST", target, func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader(body)) })
}

func TestChangeOutbox(t *testing.T) {
	var log strings.Builder
	f := &fakeOutbox{done: bridge.Changed{Destinations: map[string]bridge.Count{"a": {Queued: 1, Dead: 2}, "b": {Dead: 3, Damaged: 1}}, Next: "dead-1-2-3"}}
	s := serve(t, func(o *admin.Options) { o.Outbox, o.Logger = f, slog.New(slog.NewTextHandler(&log, nil)) })
	for verb, path := range map[string]string{"retry": "/api/v1/outbox/retry", "purge": "/api/v1/outbox/purge"} {
		for body, want := range map[string]bridge.Change{
			`{"ids":["x","y"]}`:                         {Filter: bridge.Filter{IDs: []string{"x", "y"}}},
			`{"rule":"r","destination":"d"}`:            {Filter: bridge.Filter{Rule: "r", Destination: "d"}},
			`{"state":"dead","older_than":"1h"}`:        {Filter: bridge.Filter{Which: bridge.DeadOnly, OlderThan: time.Hour}},
			`{"state":"queued","dry_run":true}`:         {Filter: bridge.Filter{Which: bridge.QueuedOnly}, DryRun: true},
			`{"all":true,"after":"queued-1-2-3"}`:       {After: "queued-1-2-3"},
			` {"all":true,"dry_run":true}` + "\n":       {DryRun: true},
			`{"rule":"r","all":false,"dry_run":false} `: {Filter: bridge.Filter{Rule: "r"}},
		} {
			code, answer := send(t, s.URL+path, body)
			if code != 200 || f.verb != verb || !reflect.DeepEqual(f.change, want) {
				t.Errorf("%s %s: %d %s: did %s %+v", verb, body, code, answer, f.verb, f.change)
			}
			var got admin.Changed
			if err := json.Unmarshal([]byte(answer), &got); err != nil {
				t.Fatal(err)
			}
			if got.Queued != 1 || got.Dead != 5 || got.Damaged != 1 || got.Next != "dead-1-2-3" || got.DryRun != want.DryRun || got.Destinations["b"].Dead != 3 {
				t.Errorf("answer %s", answer)
			}
		}
		if l := log.String(); !strings.Contains(l, "outbox "+verb+" through the admin API") || !strings.Contains(l, "remote=127.0.0.1:") ||
			!strings.Contains(l, `filter="{\"state\":\"dead\",\"older_than\":\"1h\"}" dry_run=false queued=1 dead=5 more=true`) {
			t.Errorf("log:\n%s", l)
		}
	}
}

// TestChangesThatSayTooLittle: what is unclear changes nothing.
func TestChangesThatSayTooLittle(t *testing.T) {
	f := &fakeOutbox{}
	s := serve(t, func(o *admin.Options) { o.Outbox = f })
	many := make([]string, 1001)
	for i := range many {
		many[i] = fmt.Sprint("id-", i)
	}
	tooMany, _ := json.Marshal(map[string]any{"ids": many})
	for body, want := range map[string]int{
		``:                                    400,
		`{`:                                   400,
		`null`:                                400,
		`[]`:                                  400,
		`{}`:                                  400,
		`{"dry_run":true}`:                    400,
		`{"all":false}`:                       400,
		`{"all":true}{"all":true}`:            400,
		`{"all":true,"state":"dead"}`:         400,
		`{"destinatoin":"x"}`:                 400,
		`{"state":"dead","destinatoin":"x"}`:  400,
		`{"state":"dead","destination":""}`:   400,
		`{"state":"dead","destination":null}`: 400,
		`{"state":"dead","ids":[]}`:           400,
		`{"ids":[""]}`:                        400,
		`{"ids":"x"}`:                         400,
		`{"state":"alive"}`:                   400,
		`{"older_than":"x"}`:                  400,
		`{"older_than":"0s"}`:                 400,
		`{"older_than":"-1h"}`:                400,
		`{"all":"yes"}`:                       400,
		string(tooMany):                       400,
		`{"rule":"` + strings.Repeat("r", 300_000): 413,
	} {
		for _, verb := range []string{"retry", "purge"} {
			if code, answer := send(t, s.URL+"/api/v1/outbox/"+verb, body); code != want || f.verb != "" {
				t.Errorf("%s %.60s: %d %s", verb, body, code, answer)
			}
		}
	}
	f.err = fmt.Errorf("%q: %w", "x", bridge.ErrCursor)
	if code, answer := send(t, s.URL+"/api/v1/outbox/purge", `{"all":true,"after":"x"}`); code != 400 || !strings.Contains(answer, "after:") {
		t.Errorf("a bad cursor: %d %s", code, answer)
	}
}

// TestChangeFails: the answer says what was done before, too.
func TestChangeFails(t *testing.T) {
	f := &fakeOutbox{done: bridge.Changed{Destinations: map[string]bridge.Count{"a": {Dead: 2}}}}
	s := serve(t, func(o *admin.Options) { o.Outbox = f })
	for _, c := range []struct {
		err  error
		want int
	}{{fmt.Errorf("write: %w", io.ErrShortWrite), 500}, {fmt.Errorf("a: %w", bridge.ErrFull), 507}} {
		f.err = c.err
		code, answer := send(t, s.URL+"/api/v1/outbox/retry", `{"all":true}`)
		var got admin.FailedChange
		if err := json.Unmarshal([]byte(answer), &got); err != nil {
			t.Fatal(err)
		}
		if code != c.want || got.Status != c.want || got.Detail != c.err.Error() || got.Done == nil || got.Done.Dead != 2 {
			t.Errorf("%v: %d %s", c.err, code, answer)
		}
	}
}

// TestChangesAreGuarded: as a reload is.
func TestChangesAreGuarded(t *testing.T) {
	f := &fakeOutbox{}
	s := serve(t, func(o *admin.Options) { o.Outbox, o.Token = f, "s3cret" })
	for _, path := range []string{"/api/v1/outbox/retry", "/api/v1/outbox/purge"} {
		for name, c := range map[string]struct {
			change func(*http.Request)
			want   int
		}{
			"no token":       {func(r *http.Request) { r.Header.Del("Authorization") }, 401},
			"a wrong token":  {func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }, 401},
			"another origin": {func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }, 403},
			"another Host":   {func(r *http.Request) { r.Host = "evil.example" }, 421},
		} {
			code, _ := ask(t, "POST", s.URL+path, func(r *http.Request) {
				r.Body = io.NopCloser(strings.NewReader(`{"all":true}`))
				r.Header.Set("Authorization", "Bearer s3cret")
				c.change(r)
			})
			if code != c.want || f.verb != "" {
				t.Errorf("%s with %s: %d, want %d; did %q", path, name, code, c.want, f.verb)
			}
		}
		code, _ := ask(t, "POST", s.URL+path, func(r *http.Request) {
			r.Body = io.NopCloser(strings.NewReader(`{"all":true}`))
			r.Header.Set("Authorization", "Bearer s3cret")
		})
		if code != 200 || f.verb == "" {
			t.Errorf("%s with all that it asks for: %d", path, code)
		}
		f.verb = ""
	}
}
