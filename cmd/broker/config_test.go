package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
)

func writeConfig(t testing.TB, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "broker.yaml")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func env(of map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := of[name]; return v, ok }
}

func TestConfigWithoutAFile(t *testing.T) {
	t.Chdir(t.TempDir())
	got, problems := loadConfig("", loadOptions{RequireSecrets: true})
	if len(problems) != 0 {
		t.Errorf("problems: %v", problems)
	}
	want := defaultConfig()
	want.Auth.Anonymous = true
	want.Trace.Instance = defaultInstance()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := os.Mkdir("rules.d", 0o755); err != nil {
		t.Fatal(err)
	}
	if got, _ := loadConfig("", loadOptions{}); got.Rules.Dir != "rules.d" {
		t.Errorf("rules.d is here, rules.dir is %q", got.Rules.Dir)
	}
}

func TestConfigFile(t *testing.T) {
	file := writeConfig(t, `
listeners:
  - {name: a, address: "127.0.0.1:1"}
  - {name: b, address: "[::1]:2"}
auth: {anonymous: true}
data_dir: d
outbox: {max_bytes: 1.5GiB, max_bytes_per_destination: 100MB, min_free: 2GiB, on_full: ack_and_count}
trace:
  service: s
  instance: i
  collector: oap:11800
  sample: 0.25
  payload_fields: {sw8: trace.sw8, sw8-correlation: trace.baggage}
admin: {address: "0.0.0.0:3", token: "x${env:TOKEN}", hosts: [h1, h2]}
limits: {max_packet_size: 64KiB, connect_timeout: 1500ms, max_connections: 7, max_subscriptions_per_client: 8}
log: {level: debug, format: json}
`)
	dir := filepath.Dir(file)
	got, problems := loadConfig(file, loadOptions{Env: env(map[string]string{"TOKEN": "y"}), RequireSecrets: true})
	if len(problems) != 0 {
		t.Errorf("problems: %v", problems)
	}
	want := config{
		Listeners: []listenerConfig{{"a", "127.0.0.1:1"}, {"b", "[::1]:2"}},
		Auth:      authConfig{Anonymous: true},
		DataDir:   filepath.Join(dir, "d"),
		Rules:     rulesConfig{Watch: true},
		Outbox:    outboxConfig{MaxBytes: 3 << 29, MaxBytesPerDestination: 100_000_000, MinFree: 2 << 30, OnFull: "ack_and_count"},
		Trace: traceConfig{Service: "s", Instance: "i", Collector: "oap:11800", Sample: 0.25,
			PayloadFields: tracectx.Fields{SW8: "trace.sw8", Correlation: "trace.baggage"}},
		Admin:  adminConfig{Address: "0.0.0.0:3", Token: "xy", Hosts: []string{"h1", "h2"}},
		Limits: limitsConfig{64 << 10, 1500 * time.Millisecond, 7, 8},
		Log:    logConfig{slog.LevelDebug, "json"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestEnvironmentWins(t *testing.T) {
	file := writeConfig(t, "trace: {service: file, collector: \"file:1\", sample: 1}\n")
	got, problems := loadConfig(file, loadOptions{Env: env(map[string]string{
		"SW_AGENT_NAME":                           "env",
		"SW_AGENT_INSTANCE_NAME":                  "i",
		"SW_AGENT_REPORTER_GRPC_BACKEND_SERVICE":  "oap:11800",
		"SW_AGENT_REPORTER_GRPC_AUTHENTICATION":   "token",
		"SW_AGENT_REPORTER_GRPC_TLS_ENABLE":       "true",
		"SW_AGENT_SAMPLE":                         "0.5",
		"SW_AGENT_REPORTER_GRPC_MAX_SEND_QUEUE_X": "ignored",
	})})
	if len(problems) != 0 {
		t.Errorf("problems: %v", problems)
	}
	if tr := got.Trace; tr.Service != "env" || tr.Instance != "i" || tr.Collector != "oap:11800" || tr.Token != "token" || tr.TLS == nil || tr.Sample != 0.5 {
		t.Errorf("trace %+v", tr)
	}
	for name, value := range map[string]string{
		"SW_AGENT_SAMPLE": "2", "SW_AGENT_REPORTER_GRPC_TLS_ENABLE": "maybe", "SW_AGENT_REPORTER_GRPC_BACKEND_SERVICE": "nowhere",
	} {
		for _, file := range []string{file, ""} {
			_, problems := loadConfig(file, loadOptions{Env: env(map[string]string{name: value})})
			if want := fmt.Sprintf("environment: %s=%q: ", name, value); !rules.HasErrors(problems) || !strings.HasPrefix(problems[0].String(), want) {
				t.Errorf("%s=%s with file %q: %v, want %s", name, value, file, problems, want)
			}
		}
	}
}

// TestTokenThatIsMissingIsSet: for check, a secret that is elsewhere is no reason to say that none is configured.
func TestTokenThatIsMissingIsSet(t *testing.T) {
	file := writeConfig(t, `admin: {address: "0.0.0.0:1", token: "${env:NO_SUCH_TOKEN}"}`)
	_, problems := loadConfig(file, loadOptions{Env: env(nil)})
	if len(problems) != 1 || problems[0].Severity != rules.Warning || problems[0].Name != "secret-missing" {
		t.Errorf("%v, want one warning about the secret", problems)
	}
}

func TestAnonymousIsForLoopback(t *testing.T) {
	for text, want := range map[string]struct {
		anonymous bool
		warning   string
	}{
		`listeners: [{name: a, address: "127.0.0.1:1"}]`:                                  {true, ""},
		`listeners: [{name: a, address: "localhost:1"}]`:                                  {true, ""},
		`listeners: [{name: a, address: ":1"}]`:                                           {false, "nobody-may-connect"},
		`listeners: [{name: a, address: "127.0.0.1:1"}, {name: b, address: "0.0.0.0:1"}]`: {false, "nobody-may-connect"},
		"listeners: [{name: a, address: \":1\"}]\nauth: {anonymous: true}":                {true, "anonymous-beyond-loopback"},
		"auth: {anonymous: false}":                                                        {false, "nobody-may-connect"},
	} {
		got, problems := loadConfig(writeConfig(t, text), loadOptions{})
		name := ""
		if len(problems) > 0 {
			name = problems[0].Name
		}
		if got.Auth.Anonymous != want.anonymous || name != want.warning || rules.HasErrors(problems) {
			t.Errorf("%s: anonymous %v, problems %v", text, got.Auth.Anonymous, problems)
		}
	}
}

// TestConfigProblems: what is wrong is said with its place, and never taken.
func TestConfigProblems(t *testing.T) {
	for text, want := range map[string]string{
		"listeners: []":  "1:12: no listener is configured",
		"listeners: x":   `1:12: expected a list, found "x"`,
		"listeners: [~]": "1:13: expected an object, found nothing",
		"listeners: [{address: \"127.0.0.1:1\"}]":                             "1:13: a listener has no name",
		"listeners: [{name: a}]":                                              `1:13: the address of listener "a" is missing`,
		"listeners: [{name: a, address: \"127.0.0.1:66000\"}]":                "has no port from 0 to 65535",
		"listeners: [{name: a, address: \"a:1\", transport: carrier-pigeon}]": "expected one of tcp, websocket, unix",
		"outbox: {max_bytes: NaN}":                                            "expected a size",
		"outbox: {on_full: drop}":                                             "expected one of refuse, ack_and_count",
		"outbox: {min_free: 5%}":                                              "expected a size",
		"outbox: {max_bytes: -1GiB}":                                          "expected a size",
		"outbox: {max_bytes: 1e300TiB}":                                       "expected a size",
		"limits: {max_connections: 0}":                                        "expected a whole number from 1",
		"limits: {max_connections: 1.5}":                                      "expected a whole number",
		"trace: {sample: NaN}":                                                "expected a number from 0 to 1",
		"trace: {service: \"\"}":                                              "1:18: trace.service is empty",
		"trace: {collector: nowhere}":                                         "1:20: trace.collector is no host:port",
		"trace: {payload_fields: {sw8: \"a..b\"}}":                            "trace.payload_fields",
		"admin: {token: \"${oops}\"}":                                         "is no secret",
		"admin: {token: \"${env:X\"}":                                         "never closed",
		"rules: {dir: nosuch}":                                                "no such folder",
		"a: &x {}\nb: *x":                                                     "2:4: anchors and aliases are not allowed",
		"log: &x {level: info}":                                               "anchors and aliases are not allowed",
		"trace:\n\t- x":                                                       "2:2: ",
		"[1, 2]":                                                              "expected an object, found a list",
		"data_dir: [a]":                                                       "expected a text, found a list",
		"rules: {watch: perhaps}":                                             "expected true or false",
		"dta_dir: x":                                                          "did you mean data_dir?",
		"log: {}\n---\ndta_dir: x":                                            "2:1: a second document in one file",
		"data_dir: ${env:HOME}":                                               "1:11: ${env:NAME} and ${file:PATH} are for secrets",
		"data_dir: \"\"":                                                      `1:11: expected a path, found ""`,
		"rules: {dir: \"\"}":                                                  `1:14: expected a path, found ""`,
		"admin: {token: \"\"}":                                                "1:16: the secret is empty",
		"admin: {token: \"${file:/dev/null}\"}":                               "1:16: ",
		"auth: {anonymous: maybe}":                                            `expected true or false, found "maybe"`,
	} {
		_, problems := loadConfig(writeConfig(t, text), loadOptions{Env: env(nil), RequireSecrets: true})
		var all strings.Builder
		if err := rules.Print(&all, problems); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(all.String(), want) || !rules.HasErrors(problems) {
			t.Errorf("%s:\n%swant %q", text, all.String(), want)
		}
	}
}

func TestConfigFileThatIsNone(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(big, []byte(strings.Repeat("#", 1<<20+1)), 0o644); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		dir:                               "expected a file, found a folder",
		big:                               "expected at most 1048576 bytes, found 1048577",
		filepath.Join(dir, "nosuch.yaml"): "no such file",
	} {
		if _, problems := loadConfig(file, loadOptions{}); len(problems) == 0 || !strings.Contains(problems[0].Message, want) {
			t.Errorf("%s: %v, want %q", file, problems, want)
		}
	}
}

// TestHostileConfig: a configuration that is none ends in an error, soon, and pipes are not waited for.
func TestHostileConfig(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe.yaml")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, problems := loadConfig(pipe, loadOptions{}); len(problems) == 0 || problems[0].Message != "read configuration: expected a file, found a pipe" {
		t.Errorf("a pipe: %v", problems)
	}
	const fits = 1<<20 - 10
	for text, want := range map[string]string{
		"\xff\xfel\x00o\x00g\x00":                  "1:1: expected UTF-8, found UTF-16",
		"log: {}\n# caf\xe9":                       "2:6: expected UTF-8, found the byte 0xE9",
		"log: \x00":                                "1:6: expected text, found the control character U+0000",
		"a: &a [x]\nb: &b [*a, *a]":                "1:4: anchors and aliases are not allowed",
		"log:\n\tlevel: info":                      "hint: indent with spaces, not tabs",
		"<<: {log: {}}":                            `1:1: unknown key "<<"`,
		strings.Repeat("[", fits):                  "exceeded max depth of 10000",
		strings.Repeat("a: 1\n", fits/5):           "too many problems: ",
		"{" + strings.Repeat("a,", fits/2-1) + "}": "too many problems: ",
		"admin: {token: hunter2-hunter2, tokn: x}": "admin: {token: ***************, tokn: x}",
	} {
		_, problems := loadConfig(writeConfig(t, text), loadOptions{Env: env(nil)})
		var b strings.Builder
		if err := rules.Print(&b, problems); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(b.String(), want) || !rules.HasErrors(problems) || len(problems) > 210 || strings.Contains(b.String(), "hunter2") {
			t.Errorf("%.40q: %d problems\n%.1000s\nwant %q", text, len(problems), b.String(), want)
		}
	}
	for _, text := range []string{"\ufefflog: {level: info}", "log:\r\n  level: info\r\n"} {
		if _, problems := loadConfig(writeConfig(t, text), loadOptions{Env: env(nil)}); rules.HasErrors(problems) {
			t.Errorf("%q: %v", text, problems)
		}
	}
}

// FuzzConfig: whatever the file holds, loading it ends with a config or with problems inside the file.
func FuzzConfig(f *testing.F) {
	for _, seed := range []string{
		"listeners: [{name: a, address: \"127.0.0.1:1\"}]", "log: {level: loud}", "a: &a [*a]", "trace: {sample: 2}",
		"? [a]\n: b", "outbox: {max_bytes: 1KiB}\noutbox: {}", "\xff", "---\n---\n", "admin: {token: \"${file:/}\"}",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, problems := loadConfig(writeConfig(t, text), loadOptions{Env: env(nil)})
		lines := strings.Count(strings.NewReplacer("\r\n", "\n", "\r", "\n", "\u0085", "\n", "\u2028", "\n", "\u2029", "\n").Replace(text), "\n") + 1
		for _, p := range problems {
			if p.Line < 0 || p.Line > lines || p.Message == "" || p.Name == "" {
				t.Errorf("problem %+v in a file of %d lines", p, lines)
			}
		}
		if !rules.HasErrors(problems) && (len(c.Listeners) == 0 || c.Trace.Service == "" || c.Limits.MaxPacketSize <= 0) {
			t.Errorf("no error, and config %+v", c)
		}
	})
}
