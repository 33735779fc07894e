package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/history"
)

var (
	soakFor  = flag.Duration("soak", 5*time.Second, "how long TestSoakCrashes and TestSoakWebhook go on at least")
	soakSeed = flag.Uint64("soak-seed", 0, "their seed; 0: a random one, which is printed")
)

// soakRand prints a test's seed, with which what it chooses comes again; how processes and goroutines interleave does not.
func soakRand(t *testing.T) *rand.Rand {
	t.Helper()
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-soak %v -soak-seed %d", *soakFor, seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// stopped is no failpoint: the test stops the broker as an operator does. What was taken must not come again then.
const stopped = "stopped"

// crashPasses is how often a failpoint is passed at most before the broker dies of it: enough for all lanes to be busy.
const crashPasses = 150

// crashRules owe each matching publish two deliveries, stored together: one with an id of the broker's and one whose id the
// action sets, of a rule that is reached through republish. No attempt is to time out here, however busy the machine is.
const crashRules = `
destinations:
  center: {url: "http://WEBHOOK/center", timeout: 1m}
  named: {url: "http://WEBHOOK/named", timeout: 1m}
rules:
  - name: over-50
    sql: SELECT payload.marker AS marker, payload.value AS value FROM "fleet/+/telemetry" WHERE payload.value > 50
    actions:
      - http: center
      - republish: {topic: "alerts/${marker}", qos: 1}
  - name: reached
    sql: SELECT payload.marker AS marker, payload.value AS value FROM "alerts/#"
    actions:
      - {http: named, id: "id-${marker}"}
`

// crashes is a broker that is killed again and again, its clients and its webhook.
type crashes struct {
	t       *testing.T
	rng     *rand.Rand
	dir     string
	webhook *httptest.Server
	status  atomic.Int32 // of the webhook's answers
	run     int
	clients []*publisher
	acks    atomic.Int64  // until the broker is to be killed by the test
	kill    chan struct{} // gets that moment

	mu   sync.Mutex
	logs map[string]*history.Log // by destination
}

// TestSoakCrashes kills a broker at every point on the way of a publish, again and again on the same data directory, while
// clients publish and send again what was not acknowledged; then it is left alone until all that was acknowledged is there,
// but for some records that the webhook refuses for good.
func TestSoakCrashes(t *testing.T) {
	t.Parallel()
	c := &crashes{t: t, rng: soakRand(t)}
	c.webhook = httptest.NewServer(http.HandlerFunc(c.receive))
	defer c.webhook.Close()
	killed := map[string]int{}
	points := []string{beforeWrite, beforeFlush, beforeAck, afterAck, beforeRemove, afterRemove, beforeBury, afterBury, stopped}
	again := 0
	for end := time.Now().Add(*soakFor); len(killed) == 0 || time.Now().Before(end) && !t.Failed(); {
		c.begin()
		for range 2 {
			c.rng.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
			for _, point := range points {
				if c.round(point) {
					killed[point]++
				}
			}
		}
		again += c.settle()
	}
	t.Logf("%d runs, killed %v", c.run, killed)
	for _, point := range points {
		if killed[point] == 0 && (runtime.GOOS == "linux" || point != beforeWrite && point != beforeFlush) {
			t.Errorf("no broker was killed at the point %q", point)
		}
	}
	if again == 0 {
		t.Error("no record was taken twice, though brokers were killed before they removed it")
	}
}

// begin starts on an empty data directory, with new clients.
func (c *crashes) begin() {
	c.dir = c.t.TempDir()
	writeRules(c.t, c.dir, strings.TrimPrefix(c.webhook.URL, "http://"), crashRules)
	if err := os.WriteFile(filepath.Join(c.dir, "broker.yaml"), []byte(`
listeners: [{name: tcp, address: "127.0.0.1:0"}]
data_dir: data
rules: {dir: rules.d, watch: false}
trace: {collector: ""}
admin: {address: "127.0.0.1:0"}
`), 0o644); err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	c.logs = map[string]*history.Log{"center": {}, "named": {}}
	c.mu.Unlock()
	c.clients = nil
	for _, p := range []publisher{
		{version: 4, window: 8, qos: []byte{1}},
		{version: 4, window: 8, qos: []byte{2}},
		{version: 4, window: 8, qos: []byte{1, 2}},
		{version: 4, window: 1, qos: []byte{1}, poison: []int{1, 2, 60, 100, 130}},
		{version: 5, qos: []byte{1}},
		{version: 5, qos: []byte{2}},
	} {
		p.name, p.note, p.acknowledged = fmt.Sprintf("v%d-%d", c.run, len(c.clients)), c.note, c.acknowledged
		p.rng = rand.New(rand.NewPCG(c.rng.Uint64(), 0))
		c.clients = append(c.clients, &p)
	}
}

// note tells the histories of a PUBLISH.
func (c *crashes) note(m history.Message, trace string) []*history.Copy {
	named := m
	named.ID = "id-" + m.Marker
	return []*history.Copy{c.logs["center"].Publish(m, trace), c.logs["named"].Publish(named, trace)}
}

func (c *crashes) acknowledged() {
	if c.acks.Add(-1) == 0 {
		c.kill <- struct{}{}
	}
}

// receive is the webhook.
func (c *crashes) receive(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // killed in the middle of it
	}
	c.mu.Lock()
	log := c.logs[strings.TrimPrefix(r.URL.Path, "/")]
	c.mu.Unlock()
	d, err := delivery(r, body)
	if err != nil || log == nil {
		c.t.Errorf("request for %s with body %s: %v", r.URL, body, err)
		return
	}
	a := log.Receive(d)
	status := int(c.status.Load())
	answer := history.Taken
	switch {
	case status != http.StatusOK:
		answer = history.Failed
	case strings.HasSuffix(d.Marker, poisonMark):
		answer, status = history.Poison, http.StatusUnprocessableEntity
	}
	a.Answer(answer)
	w.WriteHeader(status)
}

// delivery is what a history has to know of a request. The run of the broker is the end of its instance's name.
func delivery(r *http.Request, body []byte) (history.Delivery, error) {
	sent, out := fieldsOfBody.FromJSON(body)
	if sent.IsZero() {
		return history.Delivery{}, fmt.Errorf("no trace context: %s", out.Reason)
	}
	var rest map[string]any
	if err := json.Unmarshal(body, &rest); err != nil {
		return history.Delivery{}, err
	}
	d := history.Delivery{ID: r.Header.Get("webhook-id"), Trace: sent.TraceID, SW8: sent.Carrier().SW8}
	delete(rest, "sw8")
	without, err := json.Marshal(rest)
	if err != nil {
		return d, err
	}
	d.Body = string(without)
	d.Marker, _ = rest["marker"].(string)
	if _, err := fmt.Sscan(r.Header.Get("X-Throughline-Attempt"), &d.Attempt); err != nil {
		return d, fmt.Errorf("X-Throughline-Attempt: %w", err)
	}
	if _, run, ok := strings.Cut(sent.Instance, "@"); ok {
		_, err = fmt.Sscan(run, &d.Run)
	}
	return d, err
}

// round runs a broker with a failpoint until it is dead, and reports whether it was killed there.
func (c *crashes) round(point string) bool {
	down := c.rng.IntN(3) == 0 && !slices.Contains([]string{beforeRemove, afterRemove, beforeBury, afterBury}, point)
	c.status.Store(http.StatusOK)
	if down {
		c.status.Store(http.StatusServiceUnavailable)
	}
	n := 1 + c.rng.IntN(crashPasses)
	spec := fmt.Sprintf("%s:%d", point, n)
	switch point {
	case afterAck, stopped:
		c.acks.Store(int64(n))
		spec = ""
	case beforeBury, afterBury: // there are few
		spec = fmt.Sprintf("%s:1", point)
	}
	c.kill = make(chan struct{}, 1)
	b := c.start(spec)
	ctx, stop := context.WithTimeout(c.t.Context(), 30*time.Second)
	defer stop()
	var publishing sync.WaitGroup
	select {
	case at := <-b.ready:
		for _, p := range c.clients {
			publishing.Go(func() { p.publish(ctx, at.mqtt, true) })
		}
	case <-b.dead:
	}
	how := syscall.SIGKILL
	if point == stopped {
		how = syscall.SIGTERM
	}
	select {
	case <-c.kill:
		b.cmd.Process.Signal(how)
	case <-b.dead:
	case <-ctx.Done():
		b.cmd.Process.Kill()
		c.t.Errorf("run %d: the point %q was not reached\n%s", c.run, point, b.log)
	}
	<-b.dead
	stop()
	publishing.Wait()
	c.acks.Store(0)
	if point == stopped {
		if !b.cmd.ProcessState.Success() {
			c.t.Errorf("run %d: SIGTERM: %v\n%s", c.run, b.cmd.ProcessState, b.log)
		}
		return true
	}
	for _, l := range c.logs {
		l.Crash(c.run)
	}
	status := b.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Exited() && runtime.GOOS != "linux" && strings.Contains(b.log.String(), errors.ErrUnsupported.Error()) {
		return false
	}
	if status.Signal() != syscall.SIGKILL {
		c.t.Errorf("run %d, failpoint %q: %v\n%s", c.run, spec, b.cmd.ProcessState, b.log)
		return false
	}
	return true
}

// settle lets the clients send what is left, waits for all that is owed, stops the broker and has the history checked. It
// returns how many records were taken twice.
func (c *crashes) settle() (again int) {
	c.status.Store(http.StatusOK)
	b := c.start("")
	ctx, stop := context.WithTimeout(c.t.Context(), time.Minute)
	defer stop()
	var at addresses
	select {
	case at = <-b.ready:
	case <-b.dead:
		c.t.Fatalf("run %d has ended: %v\n%s", c.run, b.cmd.ProcessState, b.log)
	}
	var publishing sync.WaitGroup
	for _, p := range c.clients {
		publishing.Go(func() { p.publish(ctx, at.mqtt, false) })
	}
	publishing.Wait()
	for _, p := range c.clients {
		if n := len(p.pending); n > 0 {
			c.t.Errorf("client %s: %d messages are not acknowledged", p.name, n)
		}
	}
	owed := func() (n int) {
		for name, log := range c.logs {
			for _, r := range list(c.t, at.admin, "state=dead&destination="+name) {
				if r.Reason != bridge.ReasonPoison || name == "named" && !strings.HasSuffix(r.ID, poisonMark) {
					c.t.Fatalf("dead letter that is none: %+v", r)
				}
				log.Bury(r.ID)
			}
			n += log.Owed()
		}
		return n
	}
	awaitDeliveries(owed)
	b.cmd.Process.Signal(syscall.SIGTERM)
	<-b.dead
	if !b.cmd.ProcessState.Success() {
		c.t.Errorf("SIGTERM: %v\n%s", b.cmd.ProcessState, b.log)
	}
	code, out, errs := run(c.t, "", "outbox", "ls", "-config", filepath.Join(c.dir, "broker.yaml"), "-json", "-state", "queued")
	if code != exitOK || !strings.Contains(out, `"records": []`) {
		c.t.Errorf("outbox ls: exit %d\n%s%s", code, out, errs)
	}
	for name, log := range c.logs {
		counts := log.Counts()
		c.t.Logf("%s: %+v", name, counts)
		again += counts.Again
		reportViolations(c.t, log)
		if counts.Records == 0 || counts.Acknowledged == 0 {
			c.t.Errorf("%s: nothing was tested", name)
		}
	}
	return again
}

// reportViolations fails the test with what is wrong with a history, within bounds.
func reportViolations(t *testing.T, log *history.Log) {
	t.Helper()
	found := log.Check()
	for i, v := range found {
		if i == 10 {
			t.Errorf("and %d more", len(found)-i)
			break
		}
		t.Error(v)
	}
}

// awaitDeliveries returns when nothing is owed any more, or nothing has come for longer than a record may wait for another
// attempt: how long a backlog takes to drain is the machine's affair.
func awaitDeliveries(owed func() int) {
	last := owed()
	for end := time.Now().Add(deliveryPatience); last > 0 && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if n := owed(); n != last {
			last, end = n, time.Now().Add(deliveryPatience)
		}
	}
}

// deliveryPatience is above the waits after the first five attempts together.
const deliveryPatience = 30 * time.Second

// list asks an admin API for records.
func list(t *testing.T, address, query string) []admin.Record {
	t.Helper()
	resp, err := http.Get("http://" + address + "/api/v1/outbox?limit=10000&" + query)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var l admin.Listing
	if err := json.NewDecoder(resp.Body).Decode(&l); err != nil || l.More {
		t.Fatalf("list %s: %v, more: %v", query, err, l.More)
	}
	return l.Records
}

// addresses are where a broker listens.
type addresses struct{ mqtt, admin string }

// A crashingBroker is another process.
type crashingBroker struct {
	cmd   *exec.Cmd
	log   *lockedBuffer
	ready chan addresses // gets them once
	dead  chan struct{}  // closed when it has ended
}

var readyLine = regexp.MustCompile(`msg="broker is ready" .*mqtt=\[(\S+?)\] admin=(\S+)`)

func (c *crashes) start(failpoint string) *crashingBroker {
	c.t.Helper()
	c.run++
	b := &crashingBroker{log: &lockedBuffer{}, ready: make(chan addresses, 1), dead: make(chan struct{})}
	b.cmd = exec.Command(os.Args[0], "serve", "-config", filepath.Join(c.dir, "broker.yaml"))
	b.cmd.Env = append(os.Environ(), runAsBroker+"=1", failpointVar+"="+failpoint, fmt.Sprintf("SW_AGENT_INSTANCE_NAME=broker@%d", c.run))
	stderr, err := b.cmd.StderrPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := b.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go func() {
		defer close(b.dead)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			fmt.Fprintln(b.log, s.Text())
			if m := readyLine.FindStringSubmatch(s.Text()); m != nil {
				b.ready <- addresses{m[1], m[2]}
			}
		}
		b.cmd.Wait()
	}()
	c.t.Cleanup(func() {
		b.cmd.Process.Kill()
		<-b.dead
	})
	return b
}
