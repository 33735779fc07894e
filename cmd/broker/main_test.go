package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// runAsBroker makes the test program the broker itself, for tests that kill it.
const runAsBroker = "THROUGHLINE_TEST_RUN_AS_BROKER"

func TestMain(m *testing.M) {
	if os.Getenv(runAsBroker) != "" {
		c := &cli{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, env: os.LookupEnv}
		if err := c.failAt(os.Getenv(failpointVar)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exitUsage)
		}
		os.Exit(c.main(context.Background(), os.Args[1:]))
	}
	testscript.Main(m, map[string]func(){"broker": main})
}

var update = flag.Bool("update", false, "write what came out into the scripts of testdata/script")

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: filepath.Join("..", "..", "testdata", "script"), UpdateScripts: *update})
}

// waitFor polls until ok, or fails the test: for what another goroutine or process does.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}

// request is what arrived at a webhook.
type request struct {
	body    []byte
	header  http.Header
	context tracectx.Context // of the body's field sw8; zero if there is none that decodes
	line    string           // method and target, as they came
}

// webhook is a scripted notification center: it remembers what it got, and answers as it is told.
type webhook struct {
	t       *testing.T
	address string
	status  atomic.Int32

	mu     sync.Mutex
	server *http.Server
	got    []request
}

func newWebhook(t *testing.T) *webhook {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &webhook{t: t, address: l.Addr().String()}
	w.status.Store(http.StatusOK)
	w.serve(l)
	t.Cleanup(w.stop)
	return w
}

func (w *webhook) serve(l net.Listener) {
	s := &http.Server{Handler: w}
	w.mu.Lock()
	w.server = s
	w.mu.Unlock()
	go s.Serve(l)
}

// stop refuses connections from now on.
func (w *webhook) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.server.Close()
}

// start listens again where it did before.
func (w *webhook) start() {
	w.t.Helper()
	l, err := net.Listen("tcp", w.address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.serve(l)
}

var fieldsOfBody = must(tracectx.NewExtractor(tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"}))

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (w *webhook) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	ctx, _ := fieldsOfBody.FromJSON(body)
	w.mu.Lock()
	w.got = append(w.got, request{body, r.Header.Clone(), ctx, r.Method + " " + r.RequestURI})
	w.mu.Unlock()
	rw.WriteHeader(int(w.status.Load()))
}

func (w *webhook) requests() []request {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.got)
}

// await returns the requests once there are n.
func (w *webhook) await(n int) []request {
	w.t.Helper()
	waitFor(w.t, fmt.Sprintf("%d requests", n), func() bool { return len(w.requests()) >= n })
	return w.requests()
}

// fleet is a broker in this process with its webhook and collector.
type fleet struct {
	*app
	webhook   *webhook
	collector *tracectxtest.Collector
	logged    *lockedBuffer
	config    config
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// hardBrake is the rule of the design, with the webhook's address to be filled in.
const hardBrake = `
destinations:
  notification-center:
    url: http://WEBHOOK/notify
rules:
  - name: hard-brake
    sql: |
      SELECT payload.vin AS vin, payload.decel AS decel, payload.count AS count, clientid, timestamp
      FROM "fleet/+/telemetry"
      WHERE payload.decel >= 6.5
    actions:
      - http: notification-center
        body:
          event: hard-brake
          vin: ${vin}
          decel: ${decel}
          count: ${count}
          text: "${vin} braked at ${decel} m/s2"
`

// startFleet starts a broker on free loopback ports. change may be nil.
func startFleet(t *testing.T, ruleFile string, change func(*config)) *fleet {
	t.Helper()
	f := &fleet{webhook: newWebhook(t), logged: &lockedBuffer{}}
	var err error
	if f.collector, err = tracectxtest.NewCollector(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.collector.Stop)
	dir := t.TempDir()
	f.config = defaultConfig()
	f.config.Listeners = []listenerConfig{{Name: "tcp", Address: "127.0.0.1:0"}}
	f.config.Auth.Anonymous = true
	f.config.Admin.Address = "127.0.0.1:0"
	f.config.DataDir = filepath.Join(dir, "data")
	f.config.Rules.Dir = writeRules(t, dir, f.webhook.address, ruleFile)
	f.config.Trace.Collector = f.collector.Addr()
	f.config.Trace.Instance = "broker@test"
	if change != nil {
		change(&f.config)
	}
	f.start(t)
	t.Cleanup(func() { f.stopApp(t) })
	return f
}

func writeRules(t testing.TB, dir, webhook, ruleFile string) string {
	t.Helper()
	folder := filepath.Join(dir, "rules.d")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(ruleFile, "WEBHOOK", webhook)
	if err := os.WriteFile(filepath.Join(folder, "rules.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return folder
}

func (f *fleet) start(t *testing.T) {
	t.Helper()
	a, err := startApp(t.Context(), f.config, slog.New(slog.NewTextHandler(f.logged, nil)))
	if err != nil {
		t.Fatalf("start: %v\n%s", err, f.logged)
	}
	f.app = a
}

func (f *fleet) stopApp(t *testing.T) {
	t.Helper()
	if err := f.app.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
}

var discardLog = slog.New(slog.DiscardHandler)

// get asks the admin API.
func (f *fleet) get(t *testing.T, path string) string {
	t.Helper()
	resp, err := http.Get("http://" + f.adminAddress() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// metric sums a metric over all series whose text holds every one of labels.
func (f *fleet) metric(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	sum, found := 0.0, false
	s := bufio.NewScanner(strings.NewReader(f.get(t, "/metrics")))
	for s.Scan() {
		i := strings.LastIndexByte(s.Text(), ' ')
		series, value := s.Text()[:max(i, 0)], s.Text()[i+1:]
		if series != name && !strings.HasPrefix(series, name+"{") {
			continue
		}
		if slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(series, l) }) {
			continue
		}
		var v float64
		if _, err := fmt.Sscan(value, &v); err != nil {
			t.Fatalf("metric %s: %v", s.Text(), err)
		}
		sum, found = sum+v, true
	}
	if !found {
		t.Errorf("no metric %s with %q", name, labels)
	}
	return sum
}

func decodeJSON(t *testing.T, b []byte) map[string]any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v map[string]any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("body %q: %v", b, err)
	}
	return v
}

func jsonNumber(s string) json.Number { return json.Number(s) }

func dialTCP(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// freeAddress is a loopback address that nothing listens on at the moment.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
