package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/history"
)

// faultyRules have a timeout that hanging webhooks are noticed by, and a header by which the definition can be changed.
const faultyRules = `
destinations:
  center: {url: "http://FAULTY/center", timeout: 3s, headers: {X-Mended: "MENDED"}}
rules:
  - name: over-50
    sql: SELECT payload.marker AS marker, payload.value AS value FROM "fleet/+/telemetry" WHERE payload.value > 50
    actions:
      - http: center
`

// A fault is what a webhook does with a request instead of taking it.
type fault struct {
	name string
	// serve answers, or doesn't. until is closed when the fault is over.
	serve func(rw http.ResponseWriter, a *history.Attempt, until <-chan struct{})
	// mend: the broker takes it for a wrong configuration and tries again in minutes, so somebody has to change that.
	mend bool
	// all: every request has it, not one in three, so that the broker gives the destination up.
	all bool
}

func answers(with history.Answer, status int, header ...string) func(http.ResponseWriter, *history.Attempt, <-chan struct{}) {
	return func(rw http.ResponseWriter, a *history.Attempt, _ <-chan struct{}) {
		for i := 0; i < len(header); i += 2 {
			rw.Header().Set(header[i], header[i+1])
		}
		a.Answer(with)
		rw.WriteHeader(status)
	}
}

// raw answers with bytes and closes the connection; if half, its write side, and the rest a second later or with the peer.
func raw(with history.Answer, text string, half bool) func(http.ResponseWriter, *history.Attempt, <-chan struct{}) {
	return func(rw http.ResponseWriter, a *history.Attempt, until <-chan struct{}) {
		conn, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		a.Answer(with)
		io.WriteString(conn, text)
		if half {
			conn.(*net.TCPConn).CloseWrite()
			conn.SetReadDeadline(time.Now().Add(time.Second))
			io.Copy(io.Discard, conn)
		}
	}
}

func hang(rw http.ResponseWriter, _ *history.Attempt, until <-chan struct{}) {
	<-until
	conn, _, err := http.NewResponseController(rw).Hijack()
	if err == nil {
		conn.Close()
	}
}

var faults = []fault{
	{name: "refusing", all: true}, // is done by closing the listener
	{name: "hanging", serve: hang},
	{name: "all hanging", serve: hang, all: true},
	{name: "slow", serve: func(rw http.ResponseWriter, a *history.Attempt, _ <-chan struct{}) {
		time.Sleep(200 * time.Millisecond)
		a.Answer(history.Doubtful) // nobody knows how much slower it was
	}},
	{name: "500", serve: answers(history.Failed, http.StatusInternalServerError)},
	{name: "all 503", serve: answers(history.Failed, http.StatusServiceUnavailable), all: true},
	{name: "429 with Retry-After", serve: answers(history.Failed, http.StatusTooManyRequests, "Retry-After", "1")},
	{name: "half-closed without an answer", serve: raw(history.None, "", true)},
	{name: "half-closed after the answer", serve: raw(history.Doubtful, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", true)},
	{name: "closing without an answer", serve: raw(history.None, "", false)},
	{name: "closing in the status line", serve: raw(history.None, "HTTP/1.1 2", false)},
	{name: "closing in the headers", serve: raw(history.None, "HTTP/1.1 200 OK\r\nContent-Le", false)},
	{name: "closing in the body of a 200", serve: raw(history.Doubtful, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", false)},
	{name: "closing in the body of a 503", serve: raw(history.Failed, "HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nhalf", false)},
	{name: "no HTTP", serve: raw(history.None, "220 mail.example.org ESMTP\r\n", false)},
	{name: "oversize headers", serve: raw(history.None, "HTTP/1.1 200 OK\r\nX-Large: "+strings.Repeat("x", 128<<10)+"\r\nContent-Length: 0\r\n\r\n", false)},
	{name: "oversize body", serve: func(rw http.ResponseWriter, a *history.Attempt, _ <-chan struct{}) {
		a.Answer(history.Taken)
		for range 32 {
			if _, err := rw.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}},
	{name: "redirect", serve: answers(history.Failed, http.StatusTemporaryRedirect, "Location", "/elsewhere"), mend: true},
	{name: "all redirect", serve: answers(history.Failed, http.StatusFound, "Location", "/elsewhere"), mend: true, all: true},
	{name: "401", serve: answers(history.Failed, http.StatusUnauthorized), mend: true},
}

const (
	// faultHits is how many requests a fault has at most before it is over.
	faultHits = 12
	// faultTime bounds a fault that few requests come to: a broker that has given a destination up tries it every 2 s.
	faultTime = 2500 * time.Millisecond
	// mendedHits is for faults after each of which a lane stands still until the configuration is changed.
	mendedHits = 3
)

// A faultyWebhook takes requests, or has a fault.
type faultyWebhook struct {
	t       *testing.T
	address string
	log     *history.Log

	mu     sync.Mutex
	rng    *rand.Rand
	server *http.Server
	fault  *fault
	until  chan struct{}
	left   int           // requests until the fault has had enough
	first  chan struct{} // closed when it has had one
	enough chan struct{} // closed when it has had them all
	hits   map[string]int
	poison map[string]string // webhook-id -> marker
}

func (w *faultyWebhook) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	began := time.Now()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if r.URL.Path != "/center" {
		w.t.Errorf("a redirect was followed to %s", r.URL)
		return
	}
	d, err := delivery(r, body)
	if err != nil {
		w.t.Errorf("request with body %s: %v", body, err)
		return
	}
	a := w.log.Receive(d)
	if f, until := w.meet(); f != nil {
		f.serve(rw, a, until)
		return
	}
	if strings.HasSuffix(d.Marker, poisonMark) {
		w.mu.Lock()
		w.poison[d.ID] = d.Marker
		w.mu.Unlock()
		answers(history.Poison, http.StatusUnprocessableEntity)(rw, a, nil)
		return
	}
	if time.Since(began) > time.Second { // it may be that the broker has given up by now
		a.Answer(history.Doubtful)
		return
	}
	a.Answer(history.Taken)
}

// meet returns the fault that a request meets, nil if none.
func (w *faultyWebhook) meet() (*fault, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.fault
	if f == nil || f.serve == nil || w.left == 0 && !f.all || !f.all && w.rng.IntN(3) > 0 {
		return nil, nil
	}
	w.hits[f.name]++
	select {
	case <-w.first:
	default:
		close(w.first)
	}
	if w.left--; w.left == 0 {
		close(w.enough)
	}
	return f, w.until
}

// have has a fault for a while.
func (w *faultyWebhook) have(f fault) {
	w.mu.Lock()
	hits := 1 + w.rng.IntN(faultHits)
	if f.mend {
		hits = min(hits, mendedHits)
	}
	w.fault, w.until, w.left = &f, make(chan struct{}), hits
	w.first, w.enough = make(chan struct{}), make(chan struct{})
	first, enough := w.first, w.enough
	w.mu.Unlock()
	if f.serve == nil {
		w.stop()
		time.Sleep(time.Duration(hits) * 50 * time.Millisecond)
		w.start()
	} else {
		select {
		case <-enough:
		case <-time.After(faultTime):
			select {
			case <-first:
			case <-time.After(deliveryPatience):
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = nil
	close(w.until)
	if f.serve == nil {
		w.hits[f.name]++ // how many connections were refused nobody knows
	}
}

// start listens, again where it did before.
func (w *faultyWebhook) start() {
	var l net.Listener
	waitFor(w.t, "the webhook's port", func() (ok bool) { // somebody's connection may have it for a moment
		var err error
		l, err = net.Listen("tcp", w.address)
		return err == nil
	})
	w.address = l.Addr().String()
	w.server = &http.Server{Handler: w}
	go w.server.Serve(l)
}

// stop refuses connections, once those that have got a request have answered it.
func (w *faultyWebhook) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := w.server.Shutdown(ctx); err != nil {
		w.t.Errorf("stop the webhook: %v", err)
	}
}

// TestSoakWebhook has a webhook with one fault after the other while clients publish. When it is fine again all that was
// acknowledged arrives, in order, but for what it refuses for good, which are the dead letters.
func TestSoakWebhook(t *testing.T) {
	t.Parallel()
	rng := soakRand(t)
	hits := map[string]int{}
	for end := time.Now().Add(*soakFor); len(hits) == 0 || time.Now().Before(end) && !t.Failed(); {
		faultyCycle(t, rng, hits)
	}
	t.Logf("requests by fault: %v", hits)
	for _, f := range faults {
		if hits[f.name] == 0 {
			t.Errorf("no request met the fault %q", f.name)
		}
	}
}

// faultyCycle has each fault once, with a broker of its own.
func faultyCycle(t *testing.T, rng *rand.Rand, hits map[string]int) {
	w := &faultyWebhook{
		t: t, address: "127.0.0.1:0", log: &history.Log{}, rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), hits: hits, poison: map[string]string{},
	}
	w.start()
	defer func() { w.server.Close() }()
	file := strings.ReplaceAll(faultyRules, "FAULTY", w.address)
	f := startFleet(t, file, func(c *config) {
		c.Trace.Collector, c.Trace.Instance, c.Rules.Watch = "", "broker@1", false
	})
	var clients []*publisher
	for _, p := range []publisher{
		{version: 4, window: 4, qos: []byte{1}, poison: []int{3, 40, 41, 150, 300}},
		{version: 4, window: 4, qos: []byte{2}},
		{version: 4, window: 4, qos: []byte{1, 2}},
		{version: 5, qos: []byte{1}, poison: []int{0, 50, 100, 200}},
		{version: 5, qos: []byte{2}},
		{version: 5, qos: []byte{2, 1}},
	} {
		p.name, p.pace = fmt.Sprint("v", len(clients)), 10*time.Millisecond
		p.rng = rand.New(rand.NewPCG(rng.Uint64(), 0))
		p.note = func(m history.Message, trace string) []*history.Copy { return []*history.Copy{w.log.Publish(m, trace)} }
		clients = append(clients, &p)
	}
	publish := func(ctx context.Context, more bool) *sync.WaitGroup {
		var all sync.WaitGroup
		for _, p := range clients {
			all.Go(func() { p.publish(ctx, f.mqttAddress(), more) })
		}
		return &all
	}

	ctx, stop := context.WithCancel(t.Context())
	publishing := publish(ctx, true)
	order := make([]fault, len(faults))
	for i, j := range rng.Perm(len(faults)) {
		order[i] = faults[j]
	}
	for i, fault := range order {
		w.have(fault)
		if fault.mend {
			writeRules(t, strings.TrimSuffix(f.config.Rules.Dir, "rules.d"), "", strings.ReplaceAll(file, "MENDED", fmt.Sprint(i)))
			if r := f.keeper.Reload(); !r.OK {
				t.Fatalf("reload: %v", r.Problems)
			}
		}
		time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
	}
	stop()
	publishing.Wait()
	ctx, stop = context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	publish(ctx, false).Wait()
	for _, p := range clients {
		if len(p.pending) > 0 {
			t.Errorf("client %s: %d messages are not acknowledged", p.name, len(p.pending))
		}
	}

	var dead []admin.Record
	awaitDeliveries(func() int {
		dead = list(t, f.adminAddress(), "state=dead")
		for _, r := range dead {
			w.log.Bury(r.ID)
		}
		return w.log.Owed()
	})
	w.mu.Lock()
	for _, r := range dead {
		if w.poison[r.ID] == "" || r.Reason != bridge.ReasonPoison || r.Status != http.StatusUnprocessableEntity {
			t.Errorf("dead letter that is none: %+v", r)
		}
	}
	w.mu.Unlock()
	counts := w.log.Counts()
	t.Logf("%+v, %d dead letters", counts, len(dead))
	reportViolations(t, w.log)
	waitFor(t, "an empty queue", func() bool { return len(list(t, f.adminAddress(), "state=queued")) == 0 })
	f.stopApp(t)
	if len(dead) == 0 || counts.Attempts <= counts.Records {
		t.Error("nothing was tested")
	}
}
