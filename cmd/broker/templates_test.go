package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/tracectx"
)

const templated = `
destinations:
  vehicles:
    url: http://WEBHOOK/api?version=2
    path: /vehicles/${vin}/events
    query: {decel: "${decel}", note: "${note}"}
    headers: {X-Vin: "vin ${vin}", X-Note: "${note}", X-Key: "${file:key}/${vin}"}
  queries:
    url: http://WEBHOOK/seen
    method: GET
    path: ${vin}
    trace: {body: {}}
rules:
  - name: hard-brake
    sql: SELECT payload.vin AS vin, payload.decel AS decel, payload.note AS note FROM "fleet/+/telemetry"
    actions:
      - http: vehicles
        body_template: '{"vin": "${vin}", "decel": ${decel}, "list": [${note}]}'
  - name: seen
    sql: SELECT payload.vin AS vin FROM "seen/#"
    actions: [{http: queries}]
`

// TestTemplatedDestination: what a webhook gets is what was rendered at the publish, after a restart too, appended to what the
// destination is by then.
func TestTemplatedDestination(t *testing.T) {
	f := startFleet(t, templated, func(c *config) { writeKey(t, c.Rules.Dir, "hunter2") })
	c := dial3(t, f.mqttAddress(), "v70")
	publish3(t, c, "fleet/v70/telemetry", `{"vin":"V/7 0","decel":7.125}`)
	got := f.webhook.await(1)[0]
	want := "POST /api/vehicles/V%2F7%200/events?version=2&decel=7.125 vin V/7 0,,hunter2/V/7 0"
	if line := shownRequest(got); line != want {
		t.Errorf("request %s\nwant    %s", line, want)
	}
	if body := string(got.body); !strings.HasPrefix(body, `{"vin": "V/7 0", "decel": 7.125, "list": [undefined]}`) {
		t.Errorf("body %s", body)
	}

	publish3(t, c, "seen/v70", `{"vin":"V70"}`)
	got = f.webhook.await(2)[1]
	if got.line != "GET /seen/V70" || len(got.body) != 0 || got.header.Get("Content-Type") != "" {
		t.Errorf("%s %v with body %q", got.line, got.header, got.body)
	}
	ctx, err := tracectx.Decode(tracectx.Carrier{SW8: got.header.Get("sw8")})
	if err != nil || ctx.IsZero() {
		t.Errorf("sw8 of a GET: %v, %v", ctx, err)
	}

	// What the vehicles send can't lead elsewhere, or be a header of their own.
	publish3(t, c, "fleet/v70/telemetry", `{"vin":"..","decel":7}`)
	for range 2 {
		publish3(t, c, "fleet/v70/telemetry", `{"vin":"V71","decel":7,"note":"x\r\nX-Evil: 1"}`)
	}
	got = f.webhook.await(4)[3]
	want = "POST /api/vehicles/V71/events?version=2&decel=7&note=x%0D%0AX-Evil%3A+1 vin V71,,hunter2/V71"
	if line := shownRequest(got); line != want || got.header.Get("X-Evil") != "" {
		t.Errorf("request %s\nwant    %s", line, want)
	}
	for outcome, n := range map[string]float64{"render_failed": 1, "header_left_out": 2, "undefined_in_body": 1} {
		if got := f.metric(t, "throughline_rule_outcomes_total", `rule="hard-brake"`, `outcome="`+outcome+`"`); got != n {
			t.Errorf("%s %v, want %v", outcome, got, n)
		}
	}
	if logged := f.logged.String(); strings.Count(logged, "header X-Note") != 1 || strings.Contains(logged, "X-Evil") {
		t.Errorf("log:\n%s", logged)
	}

	// It waits over a restart, in which the url and a secret change, and the path goes.
	f.webhook.status.Store(http.StatusServiceUnavailable)
	publish3(t, c, "fleet/v70/telemetry", `{"vin":"V72","decel":9,"note":"1"}`)
	got = f.webhook.await(5)[4]
	id := got.header.Get("webhook-id")
	file := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\n", f.config.DataDir, f.adminAddress()))
	for _, whose := range []string{"running", "at rest"} {
		code, out, errs := run(t, "", "outbox", "show", "-config", file, id)
		for _, part := range []string{"/vehicles/V72/events", "decel=9&note=1", "X-Vin: vin V72", "X-Key: [redacted]/V72"} {
			if code != exitOK || !strings.Contains(out, part) || strings.Contains(out, "hunter2") {
				t.Errorf("%s: show has no %s\n%s%s", whose, part, out, errs)
			}
		}
		if code, out, errs := run(t, "", "outbox", "ls", "-config", file); code != exitOK || !strings.Contains(out, "vehicles/vehicles/V72/events?decel=9&note=1") {
			t.Errorf("%s: ls\n%s%s", whose, out, errs)
		}
		if whose == "running" {
			c.Disconnect(100)
			f.stopApp(t)
		}
	}
	db, err := os.ReadFile(filepath.Join(f.config.DataDir, storeFile))
	if err != nil || strings.Contains(string(db), "hunter2") {
		t.Errorf("the secret is on disk: %v", err)
	}
	writeKey(t, f.config.Rules.Dir, "hunter3")
	changed := strings.NewReplacer("/api?version=2", "/notify?version=3", "    path: /vehicles/${vin}/events\n", "").Replace(templated)
	writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, changed)
	before := len(f.webhook.requests())
	f.webhook.status.Store(http.StatusOK)
	f.start(t)
	got = f.webhook.await(before + 1)[before]
	want = "POST /notify/vehicles/V72/events?version=3&decel=9&note=1 vin V72,1,hunter3/V72"
	if line := shownRequest(got); line != want || got.header.Get("webhook-id") != id {
		t.Errorf("request %s\nwant    %s", line, want)
	}
	checkDelivered(t, f, got, tracectx.Context{})
}

func shownRequest(r request) string {
	return r.line + " " + r.header.Get("X-Vin") + "," + r.header.Get("X-Note") + "," + r.header.Get("X-Key")
}

func writeKey(t *testing.T, dir, key string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "key"), []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}
