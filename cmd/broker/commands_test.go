package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// run runs a command line in this process.
func run(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	c := &cli{stdin: strings.NewReader(stdin), stdout: &out, stderr: &errs, env: env(map[string]string{})}
	code = c.main(t.Context(), args)
	return code, out.String(), errs.String()
}

func TestOutboxOfRunningBrokerAndAtRest(t *testing.T) {
	f := startFleet(t, hardBrake, func(c *config) { c.Admin.Token = "s3cret" })
	f.webhook.status.Store(http.StatusServiceUnavailable)
	publish3(t, dial3(t, f.mqttAddress(), "v20"), "fleet/v20/telemetry", `{"vin":"V20","decel":9}`)
	id := f.webhook.await(1)[0].header.Get("webhook-id")

	file := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q, token: s3cret}\n", f.config.DataDir, f.adminAddress()))
	look := func(whose string) {
		t.Helper()
		code, out, errs := run(t, "", "outbox", "ls", "-config", file)
		if code != exitOK || !strings.Contains(out, id) || !strings.Contains(out, "hard-brake") || !strings.Contains(out, "503") {
			t.Errorf("%s: ls: exit %d\n%s%s", whose, code, out, errs)
		}
		code, out, errs = run(t, "", "outbox", "ls", "-config", file, "-json", "-state", "dead")
		if code != exitOK || !strings.Contains(out, `"records": []`) {
			t.Errorf("%s: ls -state dead: exit %d\n%s%s", whose, code, out, errs)
		}
		code, out, errs = run(t, "", "outbox", "show", "-config", file, id)
		if code != exitOK || !strings.Contains(out, `{"event":"hard-brake","vin":"V20"`) {
			t.Errorf("%s: show: exit %d\n%s%s", whose, code, out, errs)
		}
		code, out, errs = run(t, "", "outbox", "show", id, "-config", file, "-json")
		if code != exitOK || !strings.Contains(out, `"id": "`+id+`"`) {
			t.Errorf("%s: show with the flags last: exit %d\n%s%s", whose, code, out, errs)
		}
		code, _, errs = run(t, "", "outbox", "show", "-config", file, "nosuch")
		if code != exitProblem || !strings.Contains(errs, `no record or dead letter has the webhook-id "nosuch"`) {
			t.Errorf("%s: show nosuch: exit %d\n%s", whose, code, errs)
		}
	}
	waitFor(t, "the failed attempt to be stored", func() bool {
		_, out, _ := run(t, "", "outbox", "ls", "-config", file)
		return strings.Contains(out, "503")
	})
	look("running")

	wrong := writeConfig(t, fmt.Sprintf("admin: {address: %q, token: wrong}\n", f.adminAddress()))
	if code, _, errs := run(t, "", "outbox", "ls", "-config", wrong); code != exitProblem || errs != `error: ask the broker: 401 Unauthorized: send Authorization: Bearer and the admin token
hint: admin.token in the configuration must be the broker's
` {
		t.Errorf("with a wrong token: exit %d\n%s", code, errs)
	}
	elsewhere := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\n", f.config.DataDir, freeAddress(t)))
	if code, _, errs := run(t, "", "outbox", "ls", "-config", elsewhere); code != exitProblem || !strings.Contains(errs, "another process has it open") {
		t.Errorf("with the store open and no admin API: exit %d\n%s", code, errs)
	}

	none := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: \"\"}\n", f.config.DataDir))
	if code, _, errs := run(t, "", "outbox", "ls", "-config", none); code != exitProblem ||
		!strings.HasSuffix(errs, "\nhint: a broker runs on this data directory, but without an admin.address no broker can be asked\n") {
		t.Errorf("with the store open and no admin.address: exit %d\n%s", code, errs)
	}

	foreign := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no such page\n"+strings.Repeat("x", 1000), http.StatusNotFound)
	}))
	defer foreign.Close()
	stranger := writeConfig(t, fmt.Sprintf("admin: {address: %q}\n", strings.TrimPrefix(foreign.URL, "http://")))
	if code, out, errs := run(t, "", "outbox", "ls", "-config", stranger); code != exitProblem || !strings.HasPrefix(errs, "error: ask the broker: 404 Not Found: no such page xxx") || len(errs) > 500 {
		t.Errorf("with something else on the admin address: exit %d\n%s%s", code, out, errs)
	}

	f.stopApp(t)
	look("at rest")
	empty := writeConfig(t, fmt.Sprintf("admin: {address: %q}\n", freeAddress(t)))
	if code, _, errs := run(t, "", "outbox", "ls", "-config", empty); code != exitProblem || !strings.Contains(errs, "no broker answers") {
		t.Errorf("with nothing there: exit %d\n%s", code, errs)
	}
	for _, args := range [][]string{{"ls", "-state", "alive"}, {"ls", "x"}, {"show"}, {"show", "a", "b"}, {"mend"}} {
		if code, _, _ := run(t, "", append([]string{"outbox"}, args...)...); code != exitUsage {
			t.Errorf("outbox %q: exit %d, want %d", args, code, exitUsage)
		}
	}
}

// TestOutboxOfABrokerThatListensEverywhere: the address of the configuration is none that a request can name.
func TestOutboxOfABrokerThatListensEverywhere(t *testing.T) {
	f := startFleet(t, hardBrake, func(c *config) { c.Admin.Address, c.Admin.Token = "0.0.0.0:0", "s3cret" })
	_, port, err := net.SplitHostPort(f.adminAddress())
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"0.0.0.0:" + port, "[::]:" + port, ":" + port} {
		file := writeConfig(t, fmt.Sprintf("admin: {address: %q, token: s3cret}\n", address))
		if code, _, errs := run(t, "", "outbox", "ls", "-config", file); code != exitOK {
			t.Errorf("admin on %s: exit %d\n%s", address, code, errs)
		}
	}
}

func TestRulesAreReloadedAndTheLastGoodSetStays(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	c := dial3(t, f.mqttAddress(), "v21")
	file := filepath.Join(f.config.Rules.Dir, "rules.yaml")
	write := func(text string) {
		t.Helper()
		text = strings.ReplaceAll(text, "WEBHOOK", f.webhook.address)
		next := file + ".next" // as an editor does it
		if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, file); err != nil {
			t.Fatal(err)
		}
	}
	generation := func() string {
		t.Helper()
		return decodeJSON(t, []byte(f.get(t, "/api/v1/rules")))["generation"].(string)
	}

	first := generation()
	write(strings.Replace(hardBrake, ">= 6.5", ">= 1", 1))
	waitFor(t, "the new rules to be loaded", func() bool { return generation() != first })
	publish3(t, c, "fleet/v21/telemetry", `{"vin":"V21","decel":2}`)
	f.webhook.await(1)

	second := generation()
	write(strings.Replace(hardBrake, "WHERE", "WHEER", 1))
	waitFor(t, "the bad rules to be noticed", func() bool { return f.metric(t, "throughline_rules_reload_ok") == 0 })
	if now := generation(); now != second {
		t.Errorf("bad rules are in force: %s, before them %s", now, second)
	}
	publish3(t, c, "fleet/v21/telemetry", `{"vin":"V21","decel":2}`)
	f.webhook.await(2)

	// The files are still bad at the next start.
	c.Disconnect(100)
	f.stopApp(t)
	f.start(t)
	if now := generation(); now != second {
		t.Errorf("after the restart %s, before it %s", now, second)
	}
	if !strings.Contains(f.logged.String(), "running on the last good set") || f.metric(t, "throughline_rules_reload_ok") != 0 {
		t.Error("no alarm that the last good set is in force")
	}
	publish3(t, dial3(t, f.mqttAddress(), "v22"), "fleet/v21/telemetry", `{"vin":"V21","decel":2}`)
	f.webhook.await(3)

	// Without a last good set there is nothing to start with.
	f.stopApp(t)
	f.config.DataDir = t.TempDir()
	if a, err := startApp(t.Context(), f.config, discardLog); err == nil {
		a.stop()
		t.Error("started on bad rules")
	}
	write(hardBrake)
	f.start(t)
}

func TestStartFailsWhole(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	taken := f.config
	taken.DataDir = t.TempDir()
	taken.Listeners = []listenerConfig{{"tcp", f.mqttAddress()}}
	if a, err := startApp(t.Context(), taken, discardLog); err == nil {
		a.stop()
		t.Fatal("two brokers on one address")
	}
	second := writeConfig(t, fmt.Sprintf("data_dir: %q\n", f.config.DataDir))
	if code, _, errs := run(t, "", "serve", "-config", second); code != exitProblem ||
		!strings.Contains(errs, "another process has it open\nhint: another broker runs on this data_dir") {
		t.Errorf("a second broker on one data directory: exit %d\n%s", code, errs)
	}
	// What failed has let go of everything.
	taken.Listeners[0].Address = "127.0.0.1:0"
	a, err := startApp(t.Context(), taken, discardLog)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.stop(); err != nil {
		t.Error(err)
	}
}

func TestDemo(t *testing.T) {
	code, out, errs := run(t, "", "demo", "-for", "1s")
	if code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	for _, want := range []string{"agv-1", "agv-2", "agv-3", "unbroken", "mqtt/publish/fleet/+/telemetry", "notification-center  Entry  POST:/notify"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
	for _, args := range [][]string{{"demo", "x"}, {"demo", "-for", "-1s"}, {"demo", "-for", "soon"}} {
		if code, _, _ := run(t, "", args...); code != exitUsage {
			t.Errorf("%q: exit %d, want %d", args, code, exitUsage)
		}
	}
}

// TestDemoNoticesWhatIsBroken: the demo's own verdict can fail.
func TestDemoNoticesWhatIsBroken(t *testing.T) {
	newOne := func(t *testing.T) (*demo, *bytes.Buffer) {
		t.Helper()
		t.Parallel() // most of it is waiting in vain
		var out bytes.Buffer
		d, err := newDemo(t.Context(), &out, discardLog)
		if err != nil {
			t.Fatal(err)
		}
		d.drain = 300 * time.Millisecond
		t.Cleanup(d.close)
		return d, &out
	}

	t.Run("undelivered", func(t *testing.T) {
		d, out := newOne(t)
		d.center.close()
		if code := d.run(t.Context(), time.Millisecond); code != exitProblem || !strings.Contains(out.String(), "agv-1-0: accepted and not delivered") {
			t.Errorf("exit %d\n%s", code, out)
		}
	})
	t.Run("no collector", func(t *testing.T) {
		d, out := newOne(t)
		d.collector.Stop()
		if code := d.run(t.Context(), time.Millisecond); code != exitProblem || !strings.Contains(out.String(), "no way back to agv-1") {
			t.Errorf("exit %d\n%s", code, out)
		}
	})
	t.Run("a center that begins traces of its own", func(t *testing.T) {
		d, out := newOne(t)
		d.center.tracer = forgetful{d.center.tracer}
		if code := d.run(t.Context(), time.Millisecond); code != exitProblem || !strings.Contains(out.String(), "no way back to agv-1") {
			t.Errorf("exit %d\n%s", code, out)
		}
	})
}

// forgetful is a tracer that ignores who called it.
type forgetful struct{ tracectx.Tracer }

func (f forgetful) StartEntry(o tracectx.SpanOptions) tracectx.Span {
	o.Parent = tracectx.Context{}
	return f.Tracer.StartEntry(o)
}

func TestLeadsTo(t *testing.T) {
	segment := func(id, service, parent string) *tracectxtest.Segment {
		sp := &tracectxtest.Span{}
		if parent != "" {
			sp.Refs = []tracectxtest.Ref{{SegmentID: parent}}
		}
		return &tracectxtest.Segment{ID: id, Service: service, Spans: []*tracectxtest.Span{sp}}
	}
	chain := []*tracectxtest.Segment{segment("a", "vehicle", ""), segment("b", "broker", "a"), segment("c", "center", "b")}
	loop := []*tracectxtest.Segment{segment("a", "vehicle", "b"), segment("b", "vehicle", "a")}
	for name, c := range map[string]struct {
		segments []*tracectxtest.Segment
		root     string
		want     bool
	}{
		"whole":           {chain, "vehicle", true},
		"another root":    {chain, "broker", false},
		"a missing link":  {chain[1:], "vehicle", false},
		"nothing":         {nil, "vehicle", false},
		"round in a ring": {loop, "vehicle", false},
	} {
		last := ""
		if n := len(c.segments); n > 0 {
			last = c.segments[n-1].ID
		}
		if got := leadsTo(c.segments, last, c.root); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestEvalSkipsALineThatIsTooLong(t *testing.T) {
	long := strings.Repeat("x", maxEvalLine+10)
	code, out, errs := run(t, long+"\n"+`{"sql":"SELECT 1 AS a FROM t","event":{"topic":"t"}}`+"\n"+long, "eval")
	want := fmt.Sprintf("{\"error\":\"request\",\"message\":\"line longer than %d bytes\"}\n", maxEvalLine)
	want += "{\"matched\":true,\"rows\":[{\"a\":1}]}\n" + want
	if code != exitOK || out != want {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
}

// TestSignalEndsAFilter: a command that has nothing to stop ends with the first signal, though it waits for input.
func TestSignalEndsAFilter(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "eval")
	cmd.Env = append(os.Environ(), runAsBroker+"=1")
	in, out := must(cmd.StdinPipe()), must(cmd.StdoutPipe())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(in, "{}")
	if _, err := out.Read(make([]byte, 1)); err != nil { // it runs, and reads again
		t.Error(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); ctx.Err() != nil || err == nil || err.Error() != "signal: terminated" {
		t.Errorf("after SIGTERM: %v", err)
	}
}
