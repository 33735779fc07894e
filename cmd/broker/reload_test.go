package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// versioned is a set of rules that all say which version they are of, in several files: whatever a set is, all that one publish owes
// is of one version.
func versioned(version int) map[string]string {
	files := map[string]string{}
	for _, name := range []string{"a", "b", "c"} {
		files[name+".yaml"] = fmt.Sprintf(`
destinations: {to-%[1]s: {url: "http://WEBHOOK/notify"}}
rules:
  - {name: rule-%[1]s, sql: 'SELECT payload.n AS n FROM "fleet/+/telemetry"', actions: [{http: to-%[1]s, body: {n: "${n}", rule: %[1]s, version: %[2]d}}]}
`, name, version)
	}
	return files
}

// configMap is a folder as Kubernetes makes it: what is in it are links through ..data, which is swapped.
type configMap struct {
	t       *testing.T
	dir     string
	webhook string
	n       int
}

func (m *configMap) swap(files map[string]string) {
	m.t.Helper()
	m.n++
	name := fmt.Sprintf("..%d", m.n)
	if err := os.Mkdir(filepath.Join(m.dir, name), 0o755); err != nil {
		m.t.Fatal(err)
	}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(m.dir, name, file), []byte(strings.ReplaceAll(text, "WEBHOOK", m.webhook)), 0o600); err != nil {
			m.t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", file), filepath.Join(m.dir, file)); err != nil && !os.IsExist(err) {
			m.t.Fatal(err)
		}
	}
	data, next := filepath.Join(m.dir, "..data"), filepath.Join(m.dir, "..data_tmp")
	old, _ := os.Readlink(data)
	if err := os.Symlink(name, next); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(next, data); err != nil {
		m.t.Fatal(err)
	}
	if old != "" {
		if err := os.RemoveAll(filepath.Join(m.dir, old)); err != nil {
			m.t.Fatal(err)
		}
	}
}

// TestReloadUnderLoad swaps the rules again and again while vehicles publish: each publish is matched by one whole set, and nothing of it is lost.
func TestReloadUnderLoad(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	f.stopApp(t)
	if err := os.Remove(filepath.Join(f.config.Rules.Dir, "rules.yaml")); err != nil {
		t.Fatal(err)
	}
	m := &configMap{t: t, dir: f.config.Rules.Dir, webhook: f.webhook.address}
	m.swap(versioned(0))
	f.start(t)

	const vehicles, each, swaps = 4, 100, 12
	var sent atomic.Int64
	done := make(chan struct{}, vehicles)
	for v := range vehicles {
		c := dial3(t, f.mqttAddress(), fmt.Sprintf("v%d", v))
		go func() {
			defer func() { done <- struct{}{} }()
			for i := range each {
				token := c.Publish(fmt.Sprintf("fleet/v%d/telemetry", v), 1, false, fmt.Sprintf(`{"n":"%d-%d"}`, v, i))
				if token.Wait(); token.Error() != nil {
					t.Error(token.Error())
					return
				}
				sent.Add(1)
			}
		}()
	}
	for i := range swaps { // spread over the publishes, whatever they take
		waitFor(t, "publishes", func() bool { return sent.Load() >= int64(i*vehicles*each/swaps) })
		m.swap(versioned(i + 1))
		if i%2 == 0 {
			if resp, err := http.Post("http://"+f.adminAddress()+"/api/v1/rules/reload", "", nil); err != nil {
				t.Fatal(err)
			} else {
				resp.Body.Close()
			}
		}
	}
	for range vehicles {
		<-done
	}
	if sent.Load() != vehicles*each {
		t.Fatalf("%d publishes were acknowledged", sent.Load())
	}

	type owed struct {
		rules   map[string]int
		version string
	}
	got, versions := map[string]*owed{}, map[string]bool{}
	for _, r := range f.webhook.await(3 * vehicles * each) {
		b := decodeJSON(t, r.body)
		n, rule, version := fmt.Sprint(b["n"]), fmt.Sprint(b["rule"]), fmt.Sprint(b["version"])
		if got[n] == nil {
			got[n] = &owed{map[string]int{}, version}
		}
		if got[n].version != version {
			t.Errorf("publish %s was matched by versions %s and %s", n, got[n].version, version)
		}
		got[n].rules[rule]++
		versions[version] = true
	}
	for n, o := range got {
		if len(o.rules) != 3 {
			t.Errorf("publish %s: deliveries of %v", n, o.rules)
		}
	}
	if len(got) != vehicles*each || len(versions) < 2 {
		t.Errorf("%d publishes were delivered, by versions %v", len(got), versions)
	}
	waitFor(t, "the last set", func() bool { return f.lastVersion(t) == swaps })
}

// lastVersion publishes once more and answers the version that matched.
func (f *fleet) lastVersion(t *testing.T) int {
	t.Helper()
	before := len(f.webhook.requests())
	publish3(t, dial3(t, f.mqttAddress(), "probe"), "fleet/probe/telemetry", `{"n":"probe"}`)
	b := decodeJSON(t, f.webhook.await(before + 3)[before].body)
	n, err := b["version"].(json.Number).Int64()
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// TestReloadOfBadFiles: a bad file changes nothing but the alarm, and a repaired one ends it. A folder that is gone is a bad one.
func TestReloadOfBadFiles(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	file := filepath.Join(f.config.Rules.Dir, "rules.yaml")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	c := dial3(t, f.mqttAddress(), "v61")
	requests := 0
	fires := func(step string) {
		t.Helper()
		publish3(t, c, "fleet/v61/telemetry", `{"vin":"V61","decel":9}`)
		requests++
		if n := len(f.webhook.await(requests)); n != requests {
			t.Errorf("%s: %d requests, want %d", step, n, requests)
		}
	}
	reloaded := func(ok float64) func() bool {
		return func() bool { return f.metric(t, "throughline_rules_reload_ok") == ok }
	}
	status := func() (s struct {
		Generation string
		Rules      []struct{ File string }
		Reload     struct {
			OK       bool
			Problems []struct{ Name, File string }
		}
	}) {
		t.Helper()
		if err := json.Unmarshal([]byte(f.get(t, "/api/v1/rules")), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := status()
	if !before.Reload.OK || len(before.Rules) != 1 || before.Rules[0].File != file {
		t.Errorf("at the start: %+v", before)
	}
	fires("at the start")
	if n := f.metric(t, "throughline_rules_info", before.Generation); n != 1 {
		t.Errorf("throughline_rules_info of %s is %v", before.Generation, n)
	}

	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for step, spoil := range map[string]func(){
		"a bad file":  func() { write(strings.Replace(string(good), "SELECT", "SELCT", 1)) },
		"half a file": func() { write(string(good[:len(good)/2]) + "\n: [") },
		"no folder": func() {
			if err := os.RemoveAll(f.config.Rules.Dir); err != nil {
				t.Fatal(err)
			}
		},
	} {
		failed := f.metric(t, "throughline_rules_reloads_total", "failed")
		spoil()
		waitFor(t, step+" to be noticed", reloaded(0))
		if n := f.metric(t, "throughline_rules_reloads_total", "failed"); n <= failed {
			t.Errorf("%s: %v failed reloads counted, %v before", step, n, failed)
		}
		fires(step)
		s := status()
		if s.Reload.OK || s.Generation != before.Generation || len(s.Reload.Problems) == 0 || f.metric(t, "throughline_rules_info", before.Generation) != 1 {
			t.Errorf("%s: %+v", step, s)
		}
		resp, err := http.Post("http://"+f.adminAddress()+"/api/v1/rules/reload", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnprocessableEntity {
			t.Errorf("%s: the admin API answers %s", step, resp.Status)
		}
		if err := os.MkdirAll(f.config.Rules.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write(string(good))
		waitFor(t, "the end of "+step, reloaded(1))
		fires("after " + step)
	}
	if !strings.Contains(f.logged.String(), "the rule files are bad: the last good set stays in force") {
		t.Error("the log does not say that the old set stays")
	}
}

// TestReloadBySIGHUP: what a signal loads is told as any reload is. (That the signal arrives is TestSIGHUPWhileStopping's to show.)
func TestReloadBySIGHUP(t *testing.T) {
	f := startFleet(t, hardBrake, func(c *config) { c.Rules.Watch = false })
	ctx, cancel := context.WithCancel(t.Context())
	hup, ended := make(chan os.Signal), make(chan error, 1)
	go func() { ended <- f.run(ctx, hup) }()
	before := f.keeper.Current().Generation()
	writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, hardBrake+"# another content\n")
	hup <- syscall.SIGHUP
	waitFor(t, "the reload", func() bool { return f.keeper.Current().Generation() != before })
	writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, "rules: 1")
	hup <- syscall.SIGHUP
	waitFor(t, "the failed reload", func() bool { return f.metric(t, "throughline_rules_reload_ok") == 0 })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := f.metric(t, "throughline_rules_reloads_total"); n != 3 {
		t.Errorf("%v attempts counted, want those of the start and of two signals", n)
	}
}

// TestGenerationOfDeliveries: a delivery says in its record and in its trace which set it came from, also when that is in force no more.
func TestGenerationOfDeliveries(t *testing.T) {
	f := startFleet(t, hardBrake, func(c *config) { c.Rules.Watch = false })
	f.webhook.status.Store(http.StatusServiceUnavailable)
	old := f.keeper.Current().Generation()
	publish3(t, dial3(t, f.mqttAddress(), "v62"), "fleet/v62/telemetry", `{"vin":"V62","decel":9}`)
	id := f.webhook.await(1)[0].header.Get("webhook-id")
	writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, hardBrake+"# another content\n")
	if r := f.keeper.Reload(); !r.OK || r.Generation == old {
		t.Fatalf("reload: %+v", r)
	}
	file := writeConfig(t, fmt.Sprintf("data_dir: %q\nrules: {dir: %q}\nadmin: {address: %q}\n", f.config.DataDir, f.config.Rules.Dir, f.adminAddress()))
	code, out, errs := run(t, "", "outbox", "show", "-config", file, id)
	if code != exitOK || !strings.Contains(strings.Join(strings.Fields(out), " "), "rule set "+old) {
		t.Errorf("outbox show: exit %d\n%s%s", code, out, errs)
	}
	f.webhook.status.Store(http.StatusOK)
	waitFor(t, "the delivery", func() bool { return f.metric(t, "throughline_outbox_records") == 0 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := f.collector.Wait(ctx, func(all []*tracectxtest.Segment) bool {
		return slices.ContainsFunc(all, func(s *tracectxtest.Segment) bool {
			return s.Span(0).Tag("webhook.id") == id && s.Span(0).Tag("attempt") != "1" && s.Span(0).Tag("rules.generation") == old
		})
	}); err != nil {
		t.Errorf("no segment of a retry has the generation: %v", err)
	}
}
