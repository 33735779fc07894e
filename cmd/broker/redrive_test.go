package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/throughline-mqtt/throughline/admin"
)

// withDeadLetter starts a broker with n messages for a webhook that was gone and now is down: the first, whose webhook-id it
// returns, is a dead letter, and the others wait.
func withDeadLetter(t *testing.T, n int) (f *fleet, id string) {
	t.Helper()
	f = startFleet(t, hardBrake, nil)
	f.webhook.status.Store(http.StatusGone)
	c := dial3(t, f.mqttAddress(), "v40")
	for i := range n {
		publish3(t, c, "fleet/v40/telemetry", fmt.Sprintf(`{"vin":"V40","decel":9,"count":%d}`, i))
	}
	id = f.webhook.await(1)[0].header.Get("webhook-id")
	waitFor(t, "the dead letter", func() bool { return f.metric(t, "throughline_outbox_dead_letters") == 1 })
	f.webhook.status.Store(http.StatusServiceUnavailable)
	resp, err := http.Post("http://"+f.adminAddress()+"/api/v1/destinations/notification-center/resume", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("resume: %s", resp.Status)
	}
	return f, id
}

// TestRetryAndPurge: of a running broker, through its admin API, and of its data directory when none runs.
func TestRetryAndPurge(t *testing.T) {
	f, id := withDeadLetter(t, 4)
	file := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\n", f.config.DataDir, f.adminAddress()))
	change := func(wantCode int, want string, args ...string) string {
		t.Helper()
		code, out, errs := run(t, "", append([]string{"outbox", args[0], "-config", file}, args[1:]...)...)
		if code != wantCode || !strings.Contains(out+errs, want) {
			t.Errorf("%q: exit %d, want %d with %q\n%s%s", args, code, wantCode, want, out, errs)
		}
		return out
	}
	waitFor(t, "the dead letter", func() bool {
		_, out, _ := run(t, "", "outbox", "ls", "-config", file, "-state", "dead")
		return strings.Contains(out, id)
	})

	change(exitUsage, "nothing says which records", "purge")
	change(exitUsage, "nothing says which records", "retry", "-json")
	change(exitUsage, "flag provided but not defined", "purge", id, "-dry")
	change(exitOK, "would purge 3 queued and 1 dead of notification-center\n", "purge", "-all", "-dry-run")
	change(exitOK, "would purge 0 queued and 1 dead of notification-center\n", "purge", id, "-dry-run")
	change(exitOK, "would retry 3 queued and 0 dead of notification-center\n", "retry", "-state", "queued", "-dry-run")
	change(exitOK, "nothing matches, nothing is purged\n", "purge", "-rule", "soft-brake")
	change(exitOK, "nothing matches, nothing is purged\n", "purge", "-older-than", "1h")
	change(exitOK, "nothing matches, nothing is retried\n", "retry", "nosuch")

	f.webhook.status.Store(http.StatusServiceUnavailable)
	change(exitOK, "retried 0 queued and 1 dead of notification-center\n", "retry", "-state", "dead")
	var total admin.Changed
	if err := json.Unmarshal([]byte(change(exitOK, "", "purge", "-json", "-dry-run", "-all")), &total); err != nil {
		t.Fatal(err)
	}
	if total.Queued != 4 || total.Dead != 0 || !total.DryRun || total.Destinations["notification-center"].Queued != 4 {
		t.Errorf("-json: %+v", total)
	}
	change(exitOK, "purged 1 queued and 0 dead", "purge", id)
	change(exitOK, "nothing matches", "purge", id)
	if n := f.metric(t, "throughline_outbox_purged_total", `state="queued"`); n != 1 {
		t.Errorf("%v purges counted", n)
	}

	elsewhere := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\n", f.config.DataDir, freeAddress(t)))
	if code, _, errs := run(t, "", "outbox", "purge", "-config", elsewhere, "-all"); code != exitProblem ||
		!strings.Contains(errs, "another process has it open") || !strings.Contains(errs, "a broker runs on this data directory, but none answers") {
		t.Errorf("with the store open and no admin API: exit %d\n%s", code, errs)
	}
	for _, want := range []string{"outbox retry through the admin API", "outbox purge through the admin API", `filter="{\"ids\":[\"` + id + `\"]}"`} {
		if !strings.Contains(f.logged.String(), want) {
			t.Errorf("%s is not in the log", want)
		}
	}

	f.stopApp(t)
	change(exitOK, "would retry 3 queued and 0 dead", "retry", "-all", "-dry-run")
	change(exitOK, "retried 3 queued and 0 dead", "retry", "-destination", "notification-center")
	change(exitOK, "purged 3 queued and 0 dead", "purge", "-destination", "notification-center", "-rule", "hard-brake")
	change(exitOK, "nothing matches", "purge", "-all")
	f.start(t)
	if stats := f.get(t, "/api/v1/outbox/stats"); !strings.HasPrefix(stats, `{"records":0,`) {
		t.Errorf("after the restart: %s", stats)
	}
}

// TestRetryAtRest: a dead letter that is retried while no broker runs is delivered by the next one.
func TestRetryAtRest(t *testing.T) {
	f, id := withDeadLetter(t, 1)
	waitFor(t, "the dead letter", func() bool { return f.metric(t, "throughline_outbox_dead_letters") == 1 })
	f.stopApp(t)
	file := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\n", f.config.DataDir, freeAddress(t)))
	if code, out, errs := run(t, "", "outbox", "retry", "-config", file, id); code != exitOK || out != "retried 0 queued and 1 dead of notification-center\n" {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	before := len(f.webhook.requests())
	f.webhook.status.Store(http.StatusOK)
	f.start(t)
	got := f.webhook.await(before + 1)[before]
	if again := got.header.Get("webhook-id"); again != id || got.header.Get("X-Throughline-Attempt") != "1" {
		t.Errorf("webhook-id %s, attempt %s; want %s as first attempt", again, got.header.Get("X-Throughline-Attempt"), id)
	}
}

// TestSIGKILLAfterRetry kills the broker, another process, between a retry and its delivery.
func TestSIGKILLAfterRetry(t *testing.T) {
	webhook := newWebhook(t)
	dir := t.TempDir()
	writeRules(t, dir, webhook.address, hardBrake)
	config := filepath.Join(dir, "broker.yaml")
	mqttAddress, adminAddress := freeAddress(t), freeAddress(t)
	if err := os.WriteFile(config, fmt.Appendf(nil, `
listeners: [{name: tcp, address: %q}]
data_dir: data
rules: {dir: rules.d}
trace: {collector: ""}
admin: {address: %q}
`, mqttAddress, adminAddress), 0o644); err != nil {
		t.Fatal(err)
	}
	webhook.status.Store(http.StatusGone)
	broker := runBroker(t, config, adminAddress)
	publish3(t, dial3(t, mqttAddress, "v41"), "fleet/v41/telemetry", `{"vin":"V41","decel":9}`)
	first := webhook.await(1)[0]
	waitFor(t, "the dead letter", func() bool {
		_, out, _ := run(t, "", "outbox", "ls", "-config", config, "-state", "dead")
		return strings.Contains(out, first.header.Get("webhook-id"))
	})
	webhook.status.Store(http.StatusServiceUnavailable)
	if code, _, errs := run(t, "", "outbox", "resume", "-config", config, "notification-center"); code != exitOK {
		t.Fatalf("exit %d\n%s", code, errs)
	}
	if code, out, errs := run(t, "", "outbox", "retry", "-config", config, "-state", "dead"); code != exitOK || !strings.Contains(out, "1 dead") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	if err := broker.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = broker.Wait()
	before := len(webhook.requests())
	webhook.status.Store(http.StatusOK)
	runBroker(t, config, adminAddress)
	got := webhook.await(before + 1)[before]
	if a, b := got.header.Get("webhook-id"), first.header.Get("webhook-id"); a != b {
		t.Errorf("webhook-id %s after the kill, %s before it", a, b)
	}
}
