package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/paho"
	mqtt3 "github.com/eclipse/paho.mqtt.golang"

	"github.com/throughline-mqtt/throughline/bridge/history"
	"github.com/throughline-mqtt/throughline/tracectx"
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

// crashPasses is how often a failpoint is passed at most before the broker dies of it: enough for all lanes to be busy.
const crashPasses = 150

// crashRules owe each matching publish two deliveries, stored together: one with an id of the broker's and one whose id the
// action sets. No attempt is to time out here, however busy the machine is.
const crashRules = `
destinations:
  center: {url: "http://WEBHOOK/center", timeout: 1m}
  named: {url: "http://WEBHOOK/named", timeout: 1m}
rules:
  - name: over-50
    sql: SELECT payload.marker AS marker, payload.value AS value FROM "fleet/+/telemetry" WHERE payload.value > 50
    actions:
      - http: center
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
	lanes   []*crashLane
	acks    atomic.Int64 // until the broker is to be killed by the test
	kill    chan struct{}

	mu   sync.Mutex
	logs map[string]*history.Log // by destination
}

// TestSoakCrashes kills a broker at every point on the way of a publish, again and again on the same data directory, while
// clients publish and send again what was not acknowledged; then it is left alone until all that was acknowledged is there.
func TestSoakCrashes(t *testing.T) {
	t.Parallel()
	c := &crashes{t: t, rng: soakRand(t)}
	c.webhook = httptest.NewServer(http.HandlerFunc(c.receive))
	defer c.webhook.Close()
	killed := map[string]int{}
	points := []string{beforeWrite, beforeFlush, beforeAck, afterAck, beforeRemove, afterRemove}
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
	c.lanes = nil
	for _, l := range []crashLane{
		{version: 4, window: 8, qos: []byte{1}},
		{version: 4, window: 8, qos: []byte{2}},
		{version: 4, window: 8, qos: []byte{1, 2}},
		{version: 4, window: 1, qos: []byte{1}},
		{version: 5, qos: []byte{1}},
		{version: 5, qos: []byte{2}},
	} {
		l.crashes, l.name = c, fmt.Sprintf("v%d-%d", c.run, len(c.lanes))
		l.rng = rand.New(rand.NewPCG(c.rng.Uint64(), 0))
		c.lanes = append(c.lanes, &l)
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
	if status != http.StatusOK {
		answer = history.Failed
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
	down := c.rng.IntN(3) == 0 && point != beforeRemove && point != afterRemove
	c.status.Store(http.StatusOK)
	if down {
		c.status.Store(http.StatusServiceUnavailable)
	}
	n := 1 + c.rng.IntN(crashPasses)
	spec := fmt.Sprintf("%s:%d", point, n)
	if point == afterAck {
		c.acks.Store(int64(n))
		spec = ""
	}
	c.kill = make(chan struct{}, 1)
	b := c.start(spec)
	ctx, stop := context.WithTimeout(c.t.Context(), 30*time.Second)
	defer stop()
	var clients sync.WaitGroup
	select {
	case address := <-b.ready:
		for _, l := range c.lanes {
			clients.Go(func() { l.publish(ctx, address, true) })
		}
	case <-b.dead:
	}
	select {
	case <-c.kill:
		b.cmd.Process.Kill()
	case <-b.dead:
	case <-ctx.Done():
		b.cmd.Process.Kill()
		c.t.Errorf("run %d: failpoint %q was not reached\n%s", c.run, spec, b.log)
	}
	<-b.dead
	stop()
	clients.Wait()
	c.acks.Store(0)
	for _, l := range c.logs {
		l.Crash(c.run)
	}
	status := b.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Exited() && runtime.GOOS != "linux" && strings.Contains(b.log.String(), "unsupported") {
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
	select {
	case address := <-b.ready:
		var clients sync.WaitGroup
		for _, l := range c.lanes {
			clients.Go(func() { l.publish(ctx, address, false) })
		}
		clients.Wait()
	case <-b.dead:
		c.t.Fatalf("run %d has ended: %v\n%s", c.run, b.cmd.ProcessState, b.log)
	}
	for _, l := range c.lanes {
		if n := len(l.pending); n > 0 {
			c.t.Errorf("client %s: %d messages are not acknowledged", l.name, n)
		}
	}
	owed := func() int { return c.logs["center"].Owed() + c.logs["named"].Owed() }
	for end := time.Now().Add(20 * time.Second); owed() > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	b.cmd.Process.Signal(syscall.SIGTERM)
	<-b.dead
	if !b.cmd.ProcessState.Success() {
		c.t.Errorf("SIGTERM: %v\n%s", b.cmd.ProcessState, b.log)
	}
	code, out, errs := run(c.t, "", "outbox", "ls", "-config", filepath.Join(c.dir, "broker.yaml"), "-json")
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

// A crashingBroker is another process.
type crashingBroker struct {
	cmd   *exec.Cmd
	log   *lockedBuffer
	ready chan string   // gets the address for MQTT, once
	dead  chan struct{} // closed when it has ended
}

var readyLine = regexp.MustCompile(`msg="broker is ready" .*mqtt=\[(\S+?)\]`)

func (c *crashes) start(failpoint string) *crashingBroker {
	c.t.Helper()
	c.run++
	b := &crashingBroker{log: &lockedBuffer{}, ready: make(chan string, 1), dead: make(chan struct{})}
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
				b.ready <- m[1]
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

// A crashLane is a client, and so a lane, whose connection changes. It sends in the order of its messages, and after a
// reconnect what was not acknowledged first, each time with a trace of its own.
type crashLane struct {
	crashes *crashes
	name    string
	version byte
	window  int // messages in flight, MQTT 3.1.1 alone: the other client waits for each
	qos     []byte
	rng     *rand.Rand
	made    int
	copies  int
	pending []*crashMessage // not acknowledged, in order
}

// A crashMessage is owed its acknowledgement.
type crashMessage struct {
	history.Message
	qos    byte
	value  int
	copies [2]*history.Copy // the last ones
	token  mqtt3.Token      // of the last one; nil: not sent in this connection
}

func (l *crashLane) next() *crashMessage {
	m := &crashMessage{qos: l.qos[l.made%len(l.qos)], value: 25}
	m.Marker, m.Lane = fmt.Sprintf("%s/%d", l.name, l.made), l.name
	if m.Matches = l.rng.IntN(4) > 0; m.Matches {
		m.value = 75
	}
	l.made++
	return m
}

// send notes a new copy and returns what it carries.
func (l *crashLane) send(m *crashMessage) tracectx.Context {
	l.copies++
	ctx := tracectx.Context{
		Sampled: true, TraceID: fmt.Sprintf("%s.trace.%d", l.name, l.copies), SegmentID: fmt.Sprintf("%s.segment.%d", l.name, l.copies),
		Service: "vehicle", Instance: l.name, Endpoint: "drive", Peer: "broker",
	}
	named := m.Message
	named.ID = "id-" + m.Marker
	m.copies = [2]*history.Copy{
		l.crashes.logs["center"].Publish(m.Message, ctx.TraceID), l.crashes.logs["named"].Publish(named, ctx.TraceID),
	}
	return ctx
}

// acknowledged takes a message off the pending ones.
func (l *crashLane) acknowledged(m *crashMessage) {
	for _, c := range m.copies {
		c.Acknowledge()
	}
	for i, p := range l.pending {
		if p == m {
			l.pending = append(l.pending[:i], l.pending[i+1:]...)
			break
		}
	}
	if l.crashes.acks.Add(-1) == 0 {
		l.crashes.kill <- struct{}{}
	}
}

// publish connects, sends what is pending, and goes on with new messages if more is true, until ctx or the connection ends.
func (l *crashLane) publish(ctx context.Context, address string, more bool) {
	if l.version == 5 {
		l.publish5(ctx, address, more)
		return
	}
	l.publish3(ctx, address, more)
}

func (l *crashLane) topic() string { return "fleet/" + l.name + "/telemetry" }

func (l *crashLane) publish3(ctx context.Context, address string, more bool) {
	lost := make(chan struct{})
	c := mqtt3.NewClient(mqtt3.NewClientOptions().AddBroker("tcp://" + address).SetClientID(l.name).SetProtocolVersion(4).
		SetAutoReconnect(false).SetWriteTimeout(time.Second).SetConnectTimeout(10 * time.Second).
		SetConnectionLostHandler(func(mqtt3.Client, error) { close(lost) }))
	defer c.Disconnect(0)
	if token := c.Connect(); !token.WaitTimeout(10*time.Second) || token.Error() != nil {
		return
	}
	for _, m := range l.pending {
		m.token = nil
	}
	// What is in flight is always the first of what is pending.
	flying := 0
	for ctx.Err() == nil {
		if flying == len(l.pending) && more {
			l.pending = append(l.pending, l.next())
		}
		if flying < min(l.window, len(l.pending)) {
			m := l.pending[flying]
			m.token = c.Publish(l.topic(), m.qos, false, fmt.Sprintf(`{"marker":%q,"value":%d,"sw8":%q}`, m.Marker, m.value, l.send(m).Carrier().SW8))
			flying++
			continue
		}
		if flying == 0 {
			return
		}
		select {
		case <-l.pending[0].token.Done():
		case <-lost:
			l.collect(flying)
			return
		case <-ctx.Done():
		}
		flying -= l.collect(flying)
		if l.failed() {
			return
		}
	}
}

// collect takes what was acknowledged of those in flight off the pending ones, and returns how many it were.
func (l *crashLane) collect(flying int) (n int) {
	for _, m := range append([]*crashMessage(nil), l.pending[:flying]...) {
		select {
		case <-m.token.Done():
			if m.token.Error() == nil {
				l.acknowledged(m)
				n++
			}
		default:
		}
	}
	return n
}

// failed reports whether the first message in flight is known not to get its acknowledgement.
func (l *crashLane) failed() bool {
	if len(l.pending) == 0 || l.pending[0].token == nil {
		return false
	}
	select {
	case <-l.pending[0].token.Done():
		return l.pending[0].token.Error() != nil
	default:
		return false
	}
}

func (l *crashLane) publish5(ctx context.Context, address string, more bool) {
	conn, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return
	}
	defer conn.Close()
	c := paho.NewClient(paho.ClientConfig{Conn: conn, ClientID: l.name})
	connecting, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := c.Connect(connecting, &paho.Connect{ClientID: l.name, CleanStart: true, KeepAlive: 30}); err != nil {
		return
	}
	defer c.Disconnect(&paho.Disconnect{})
	publishing, end := context.WithCancel(ctx)
	defer end()
	go func() {
		select {
		case <-c.Done():
			end()
		case <-publishing.Done():
		}
	}()
	for publishing.Err() == nil {
		if len(l.pending) == 0 {
			if !more {
				return
			}
			l.pending = append(l.pending, l.next())
		}
		m := l.pending[0]
		props := &paho.PublishProperties{}
		props.User.Add("sw8", l.send(m).Carrier().SW8)
		ack, err := c.Publish(publishing, &paho.Publish{
			QoS: m.qos, Topic: l.topic(), Payload: fmt.Appendf(nil, `{"marker":%q,"value":%d}`, m.Marker, m.value), Properties: props,
		})
		switch {
		case ack != nil && ack.ReasonCode >= 0x80:
			for _, cp := range m.copies {
				cp.Refuse()
			}
		case err != nil:
			return
		default:
			l.acknowledged(m)
		}
	}
}
