package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const otherDestination = `
destinations:
  elsewhere: {url: "http://WEBHOOK/notify"}
rules:
  - {name: hard-brake, sql: 'SELECT * FROM "fleet/+/telemetry"', actions: [{http: elsewhere}]}
`

// TestGoneDestination: check says how many records a set of rules leaves without their destination, and a reload says it too.
func TestGoneDestination(t *testing.T) {
	f := startFleet(t, hardBrake, func(c *config) { c.Rules.Watch = false })
	f.webhook.status.Store(http.StatusServiceUnavailable)
	publish3(t, dial3(t, f.mqttAddress(), "v60"), "fleet/v60/telemetry", `{"vin":"V60","decel":9}`)
	f.webhook.await(1)
	other := writeRules(t, t.TempDir(), f.webhook.address, otherDestination)
	const told = `warning: 1 record waits for the destination "notification-center", which no rule file defines`
	const warned = told + "\nhint: define it again, or delete them: broker outbox purge -state queued -destination notification-center\n"

	check := func(rules, admin string, wantCode int, want, wantErrs string, flags ...string) {
		t.Helper()
		file := writeConfig(t, fmt.Sprintf("data_dir: %q\nrules: {dir: %q}\nadmin: {address: %q}\n", f.config.DataDir, rules, admin))
		code, out, errs := run(t, "", append([]string{"check", "-config", file}, flags...)...)
		if code != wantCode || out != want || !strings.Contains(errs, wantErrs) || wantErrs == "" && errs != "" {
			t.Errorf("exit %d, want %d\n%s%s", code, wantCode, out, errs)
		}
	}
	look := func(admin string) {
		t.Helper()
		check(other, admin, exitOK, warned, "")
		check(other, admin, exitProblem, warned, "", "-strict")
		check(f.config.Rules.Dir, admin, exitOK, "", "")
	}
	look(f.adminAddress())
	check(other, freeAddress(t), exitOK, "", "is not known: open store "+filepath.Join(f.config.DataDir, storeFile)+": another process has it open\nhint: a broker runs")
	foreign := httptest.NewServer(http.NotFoundHandler())
	defer foreign.Close()
	check(other, strings.TrimPrefix(foreign.URL, "http://"), exitOK, "", "is not known: ask the broker: 404 Not Found")

	old, err := os.ReadFile(filepath.Join(f.config.Rules.Dir, "rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	reload := func() string {
		t.Helper()
		resp, err := http.Post("http://"+f.adminAddress()+"/api/v1/rules/reload", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("reload: %s %s, %v", resp.Status, body, err)
		}
		return string(body)
	}
	inLog := func(times int) {
		t.Helper()
		if n := strings.Count(f.logged.String(), `msg="rule file" problem="`+strings.ReplaceAll(told, `"`, `\"`)); n != times {
			t.Errorf("the log has it %d times, want %d", n, times)
		}
	}
	writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, otherDestination)
	if answer := reload(); !strings.Contains(answer, `"name":"gone-destination"`) {
		t.Errorf("reload: %s", answer)
	}
	inLog(1)
	f.stopApp(t)
	f.start(t)
	inLog(2)
	writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, string(old))
	if answer := reload(); !strings.Contains(answer, `"problems":[]`) {
		t.Errorf("reload once it is defined again: %s", answer)
	}

	f.stopApp(t)
	look(freeAddress(t))
	f.start(t)
	f.webhook.status.Store(http.StatusOK)
	waitFor(t, "the record to be delivered", func() bool { return f.metric(t, "throughline_outbox_records") == 0 })
	check(other, f.adminAddress(), exitOK, "", "")
}
