package hooks

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/sessions"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// stored is a commit that has ended well.
type stored struct{}

func (stored) Done() <-chan struct{} {
	done := make(chan struct{})
	close(done)
	return done
}
func (stored) Err() error           { return nil }
func (stored) Watch(fn func(error)) { fn(nil) }

// spanless fails if a span is started.
type spanless struct{ t testing.TB }

func (s spanless) StartEntry(tracectx.SpanOptions) tracectx.Span {
	s.t.Fatal("a span was started")
	return nil
}
func (s spanless) StartLocal(o tracectx.SpanOptions) tracectx.Span { return s.StartEntry(o) }

func newPublishing(t testing.TB, tracer tracectx.Tracer) (*hook, *mqtt.Client) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.yaml")
	const text = `
destinations: {center: {url: "http://127.0.0.1:1/"}}
rules:
  - name: hard-brake
    sql: SELECT payload.vin AS vin, payload.decel AS decel FROM "fleet/+/telemetry" WHERE payload.decel >= 6.5
    actions: [{http: center}]
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		t.Fatal(problems)
	}
	x, err := tracectx.NewExtractor(tracectx.Fields{SW8: "sw8"})
	if err != nil {
		t.Fatal(err)
	}
	h := newHook(Options{
		Rules:     func() *rules.Set { return set },
		Append:    func([]bridge.Record) (Commit, error) { return stored{}, nil },
		Extractor: x, Tracer: tracer, Auth: auth.NewPolicy(auth.Options{}),
		Logger: slog.New(slog.DiscardHandler),
	})
	s := mqtt.New(&mqtt.Options{Logger: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { _ = s.Close() })
	h.subscribers.index, h.subscribers.clients = s.Topics, s.Clients
	cl := s.NewClient(nil, "tcp", "v7", false)
	cl.Net.Remote = "192.0.2.7:40000"
	return h, cl
}

func publishPacket(topic, payload string) packets.Packet {
	return packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1},
		PacketID:    1, TopicName: topic, Payload: []byte(payload),
	}
}

func TestNoSpanWithoutMatchOrContext(t *testing.T) {
	h, cl := newPublishing(t, spanless{t})
	for _, pk := range []packets.Packet{
		publishPacket("other", `{"decel":7}`),
		publishPacket("fleet/v7/telemetry", `{"decel":1}`),
	} {
		if _, err := h.OnPublish(cl, pk); err != nil {
			t.Error(err)
		}
	}
	pk := publishPacket("other", "{}")
	if n := testing.AllocsPerRun(100, func() { _, _ = h.OnPublish(cl, pk) }); n > 0 {
		t.Errorf("a publish without candidates allocates %v times", n)
	}
}

func BenchmarkOnPublish(b *testing.B) {
	for _, c := range []struct{ name, topic, payload string }{
		{"no candidate", "other", `{"vin":"V7","decel":7.25}`},
		{"no match", "fleet/v7/telemetry", `{"vin":"V7","decel":1.25}`},
		{"match", "fleet/v7/telemetry", `{"vin":"V7","decel":7.25}`},
	} {
		b.Run(c.name, func(b *testing.B) {
			h, cl := newPublishing(b, tracectxtest.NewUnsampledRecorder("broker"))
			pk := publishPacket(c.topic, c.payload)
			pk.FixedHeader.Qos = 0 // there is no connection whose gate could hold an acknowledgement
			b.ReportAllocs()
			for b.Loop() {
				if _, err := h.OnPublish(cl, pk); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestOriginIsKeptForThoseWhoWantIt: what rules have seen of a publish takes several times what a small message does.
func TestOriginIsKeptForThoseWhoWantIt(t *testing.T) {
	h, cl := newPublishing(t, spanless{t})
	pk := publishPacket("fleet/v7/telemetry", `{"decel":1}`)
	pk.FixedHeader.Retain = true
	if _, err := h.OnPublish(cl, pk); err != nil {
		t.Fatal(err)
	}
	if m := h.retained.Get("fleet/v7/telemetry"); m == nil || m.Origin != nil {
		t.Errorf("retained %+v, want a message without its origin", m)
	}
}

// TestFullSessionIsLoggedSeldom: a client that takes one message now and then has its session full again after each.
func TestFullSessionIsLoggedSeldom(t *testing.T) {
	h, _ := newPublishing(t, spanless{t})
	var log bytes.Buffer
	h.log = slog.New(slog.NewTextHandler(&log, nil))
	slow, other := &subscriber{who: auth.Client{ID: "slow"}}, &subscriber{who: auth.Client{ID: "other"}}
	for range 1000 {
		h.saysFull(slow, &sessions.Message{Topic: "a"})
	}
	h.saysFull(other, &sessions.Message{Topic: "a"})
	if n, m := strings.Count(log.String(), "client=slow"), strings.Count(log.String(), "client=other"); n != logBurst || m != 1 {
		t.Errorf("%d lines of the one and %d of the other, want %d and 1", n, m, logBurst)
	}
}

// TestEventWithoutRuleAllocatesNothing: no columns are made that nobody reads.
func TestEventWithoutRuleAllocatesNothing(t *testing.T) {
	h, cl := newPublishing(t, spanless{t})
	c := &connection{server: &Server{hook: h}, client: cl}
	sub := &subscriber{session: sessions.New(&h.subscribers.counters)}
	m := &sessions.Message{Topic: "a"}
	connect, codes := &packets.Packet{}, []byte{0}
	subscribe := &packets.Packet{Filters: packets.Subscriptions{{Filter: "a"}}}
	if n := testing.AllocsPerRun(100, func() {
		c.answered(connect, packets.CodeSuccess)
		h.authorized(cl, "a", true, true)
		h.subscribed(cl, subscribe, codes)
		h.unsubscribed(cl, subscribe)
		var d drops
		d.add(sub, m, sessions.QoS0)
		h.undelivered(&d)
		c.gone(reasonNormal, nil)
	}); n > 0 {
		t.Errorf("events that nobody wants allocate %v times", n)
	}
}

func BenchmarkEvent(b *testing.B) {
	for _, c := range []struct{ name, from string }{{"no rule", "t"}, {"match", "$events/auth/check_authz_complete"}} {
		b.Run(c.name, func(b *testing.B) {
			h, cl := newPublishing(b, tracectxtest.NewUnsampledRecorder("broker"))
			set, problems := rules.Load([]string{writeRule(b, c.from)}, rules.LoadOptions{})
			if set == nil {
				b.Fatal(problems)
			}
			h.o.Rules = func() *rules.Set { return set }
			b.ReportAllocs()
			for b.Loop() {
				h.authorized(cl, "fleet/v7/telemetry", true, true)
			}
		})
	}
}

func writeRule(t testing.TB, from string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.yaml")
	text := "destinations: {center: {url: 'http://127.0.0.1:1/'}}\nrules: [{name: r, sql: 'SELECT * FROM \"" + from + "\"', actions: [{http: center}]}]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
