package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/admin"
)

// TestPauseAndResume: of a running broker, over its restart, and in its data directory when none runs.
func TestPauseAndResume(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	file := writeConfig(t, fmt.Sprintf("data_dir: %q\nrules: {dir: %q}\nadmin: {address: %q}\n", f.config.DataDir, f.config.Rules.Dir, f.adminAddress()))
	do := func(wantCode int, want string, args ...string) string {
		t.Helper()
		code, out, errs := run(t, "", append([]string{"outbox", args[0], "-config", file}, args[1:]...)...)
		if code != wantCode || !strings.Contains(out+errs, want) {
			t.Errorf("%q: exit %d, want %d with %q\n%s%s", args, code, wantCode, want, out, errs)
		}
		return out
	}
	publish := func(n int) {
		t.Helper()
		c := dial3(t, f.mqttAddress(), fmt.Sprint("v5", n))
		publish3(t, c, fmt.Sprintf("fleet/v5%d/telemetry", n), fmt.Sprintf(`{"vin":"V5%d","decel":9}`, n))
	}

	if n := f.metric(t, "throughline_outbox_oldest_seconds", `destination="notification-center"`); n != 0 {
		t.Errorf("oldest is %v before the first record", n)
	}
	do(exitOK, "notification-center is paused; 0 queued\n", "pause", "notification-center")
	publish(0)
	do(exitOK, "notification-center is paused, by an operator, from ", "ls")
	var l admin.Listing
	if err := json.Unmarshal([]byte(do(exitOK, "", "ls", "-json")), &l); err != nil || len(l.Paused) != 1 || l.Paused[0].Name != "notification-center" || len(l.Records) != 1 {
		t.Errorf("ls -json: %+v, %v", l, err)
	}
	do(exitProblem, `error: neither the rules nor the outbox know a destination "notification"`, "pause", "notification")
	do(exitProblem, "neither the rules nor the outbox know", "resume", "notification")
	if n := f.metric(t, "throughline_delivery_paused", `destination="notification-center"`); n != 1 {
		t.Errorf("the metric is %v", n)
	}
	if api := f.get(t, "/api/v1/destinations"); !strings.Contains(api, `"name":"notification-center","url":"http://`+f.webhook.address+`/notify","state":"paused","why":"operator"`) {
		t.Errorf("destinations: %s", api)
	}

	f.stopApp(t)
	f.start(t)
	file = writeConfig(t, fmt.Sprintf("data_dir: %q\nrules: {dir: %q}\nadmin: {address: %q}\n", f.config.DataDir, f.config.Rules.Dir, f.adminAddress()))
	publish(1)
	if n := len(f.webhook.requests()); n != 0 {
		t.Fatalf("%d deliveries while it was paused", n)
	}
	var d admin.Destination
	if err := json.Unmarshal([]byte(do(exitOK, "", "resume", "notification-center", "-json")), &d); err != nil || d.Name != "notification-center" || d.State != "active" {
		t.Errorf("resume -json: %+v, %v", d, err)
	}
	f.webhook.await(2)
	for _, want := range []string{"destination paused through the admin API", "destination resumed through the admin API", `msg="destination is paused, its records are held"`} {
		if !strings.Contains(f.logged.String(), want) {
			t.Errorf("%s is not in the log", want)
		}
	}

	f.stopApp(t)
	do(exitProblem, `neither the rule files nor the outbox know a destination "nosuch"`, "pause", "nosuch")
	do(exitOK, "notification-center is paused; 0 queued\n", "pause", "notification-center")
	do(exitOK, "notification-center is paused, by an operator", "ls")
	f.start(t)
	publish(2)
	f.stopApp(t)
	do(exitOK, "notification-center is not paused; 1 queued\n", "resume", "notification-center")
	do(exitOK, "notification-center is not paused", "resume", "notification-center")
	f.start(t)
	f.webhook.await(3)
	f.stopApp(t)

	elsewhere := writeConfig(t, fmt.Sprintf("data_dir: %q\nrules: {dir: %q}\nadmin: {address: %q}\n",
		f.config.DataDir, filepath.Join(t.TempDir(), "none"), freeAddress(t)))
	if code, _, errs := run(t, "", "outbox", "pause", "-config", elsewhere, "notification-center"); code != exitProblem {
		t.Errorf("of a destination that is not to be found anywhere: exit %d\n%s", code, errs)
	}
}
