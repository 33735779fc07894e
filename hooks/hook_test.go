package hooks

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// Some of mochi's goroutines are its own: a panic there would end the process.
func TestEveryHookRecovers(t *testing.T) {
	filters := packets.Packet{Filters: packets.Subscriptions{{Filter: overLimit}}, PacketID: 7}
	methods := []struct {
		name string
		id   byte
		call func(h *hook, cl *mqtt.Client) (ok bool) // ok: what mochi is told is right
	}{
		{"OnACLCheck", mqtt.OnACLCheck, func(h *hook, cl *mqtt.Client) bool {
			return !h.OnACLCheck(cl, "a", true)
		}},
		{"expire", 0, func(h *hook, cl *mqtt.Client) bool {
			(&Server{hook: h}).expire(cl)
			return true
		}},
		{"publishWill", 0, func(h *hook, cl *mqtt.Client) bool {
			h.o.Auth = auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Address: "127.0.0.1:0"}}})
			h.o.Rules = func() *rules.Set { return nil }
			h.subscribers = nil
			cl.Properties.Props.SessionExpiryInterval = 1
			h.publishWill(cl, &will{packet: packets.Packet{TopicName: "a"}, delay: time.Nanosecond})
			for testutil.ToFloat64(h.metrics.panics.WithLabelValues("publishWill")) == 0 {
				runtime.Gosched() // until the timer has gone off
			}
			return true
		}},
		{"raise", 0, func(h *hook, _ *mqtt.Client) bool {
			h.raise(nil, &rules.Event{Kind: rules.ClientConnack}, tracectx.Context{})
			return testutil.ToFloat64(h.metrics.events.dropped[rules.ClientConnack][panicked]) == 1
		}},
		{"republish", 0, func(h *hook, cl *mqtt.Client) bool {
			return h.republish(cl, &rules.Rule{Name: "r"}, &rules.Message{Topic: "a"}) == 0 // a rule of no set
		}},
		{"publishSys", 0, func(h *hook, _ *mqtt.Client) bool {
			(&Server{hook: h}).publishSysOnce()
			return true
		}},
		{"OnUnsubscribe", mqtt.OnUnsubscribe, func(h *hook, cl *mqtt.Client) bool {
			return h.OnUnsubscribe(cl, filters).PacketID == 7
		}},
		{"OnUnsubscribed", mqtt.OnUnsubscribed, func(h *hook, cl *mqtt.Client) bool {
			h.subscribers = nil
			h.OnUnsubscribed(cl, filters)
			return true
		}},
		{"OnPublished", mqtt.OnPublished, func(h *hook, cl *mqtt.Client) bool {
			h.OnPublished(cl, packets.Packet{})
			return true
		}},
		{"OnPacketRead", mqtt.OnPacketRead, func(h *hook, cl *mqtt.Client) bool {
			pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Publish}}
			pk.Properties.TopicAliasFlag = true
			_, err := h.OnPacketRead(cl, pk)
			return err != nil
		}},
		{"OnPacketProcessed", mqtt.OnPacketProcessed, func(h *hook, cl *mqtt.Client) bool {
			h.OnPacketProcessed(cl, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}}, nil)
			return true
		}},
		{"OnQosPublish", mqtt.OnQosPublish, func(h *hook, cl *mqtt.Client) bool {
			h.OnQosPublish(cl, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrec}}, 0, 0)
			return true
		}},
		{"OnSubscribe", mqtt.OnSubscribe, func(h *hook, cl *mqtt.Client) bool {
			pk := h.OnSubscribe(cl, filters)
			return pk.PacketID == 7 && len(pk.Filters) == 1
		}},
		{"OnSubscribed", mqtt.OnSubscribed, func(h *hook, cl *mqtt.Client) bool {
			h.OnSubscribed(cl, filters, nil)
			return true
		}},
		{"OnPublish", mqtt.OnPublish, func(h *hook, cl *mqtt.Client) bool {
			_, err := h.OnPublish(cl, packets.Packet{})
			return err == error(packets.ErrRejectPacket)
		}},
	}
	// This has nothing in it that a test could make panic.
	names, ids := []string{"OnPacketEncode"}, []byte{mqtt.OnPacketEncode}
	for _, m := range methods {
		t.Run(m.name, func(t *testing.T) {
			h := newHook(Options{MaxSubscriptions: 1, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
			cl := &mqtt.Client{} // without what mochi fills in, and the hook without its parts
			cl.Properties.ProtocolVersion = 5
			cl.Net.Conn = (*guard.Conn)(nil)
			if !m.call(h, cl) {
				t.Error("mochi is told the wrong thing")
			}
			if n := testutil.ToFloat64(h.metrics.panics.WithLabelValues(m.name)); n != 1 {
				t.Errorf("counted %v panics, want 1", n)
			}
		})
		names = append(names, m.name)
		if m.id != 0 { // mochi calls it
			ids = append(ids, m.id)
		}
	}
	slices.Sort(names)
	if want := slices.Sorted(slices.Values(guarded[:])); !slices.Equal(names, want) {
		t.Errorf("tested are %v, want all of %v", names, want)
	}
	for b := range byte(255) {
		if want := slices.Contains(ids, b); (&hook{}).Provides(b) != want {
			t.Errorf("Provides(%d) is %v: it has to name the hooks that are tested here", b, !want)
		}
	}
}

// TestPanicDuringTakeoverGivesTheTurnBack: else the client could never connect again. Nor does the panic end
// anything but the connection.
func TestPanicDuringTakeoverGivesTheTurnBack(t *testing.T) {
	s, err := New(Options{
		Listeners: []ListenerOptions{{Name: "tcp", Address: "127.0.0.1:0"}},
		Auth:      auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}}),
		Rules:     func() *rules.Set { return nil },
		Append:    func([]bridge.Record) (Commit, error) { return nil, nil },
		Extractor: new(tracectx.Extractor), Tracer: tracectxtest.NewRecorder("broker"),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.mochi.Clients.Add(&mqtt.Client{ID: "v7"}) // with a session that has no parts: to inherit from it panics
	s.Start()
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	connect := func() (answer []byte) {
		peer, err := net.Dial("tcp", s.Addresses()[0])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { peer.Close() })
		_ = peer.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = peer.Write([]byte{0x10, 14, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 2, 'v', '7'})
		answer = make([]byte, 4)
		n, _ := io.ReadFull(peer, answer)
		return answer[:n]
	}
	if got := connect(); len(got) != 0 {
		t.Errorf("got % x in spite of a panic", got)
	}
	s.mochi.Clients.Delete("v7")
	if got := connect(); !bytes.Equal(got, []byte{0x20, 2, 0, 0}) {
		t.Errorf("the client got % x at its next attempt, want a CONNACK", got)
	}
}

// TestPanicInRepublishKeepsTheAcknowledgement: what the publish owes is stored by then. Sent again, it would panic again.
func TestPanicInRepublishKeepsTheAcknowledgement(t *testing.T) {
	h, cl := newPublishing(t, tracectxtest.NewRecorder("broker"))
	file := filepath.Join(t.TempDir(), "rules.yaml")
	const text = `rules: [{name: r, sql: 'SELECT 1 AS x FROM "in"', actions: [{republish: {topic: broken}}, {republish: {topic: whole}}]}]`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		t.Fatal(problems)
	}
	h.o.Rules = func() *rules.Set { return set }
	h.o.Auth = auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}})
	sub := packets.Subscription{Filter: "broken"}
	h.subscribers.clients.Add(cl)
	h.subscribers.index.Subscribe(cl.ID, sub)
	cl.State.Subscriptions.Add(sub.Filter, sub)
	h.subscribers.byID[cl.ID] = &subscriber{who: auth.Client{Listener: "tcp", ID: cl.ID}} // without a session: to deliver to it panics
	if _, err := h.OnPublish(cl, publishPacket("in", "x")); err != nil {
		t.Errorf("the publish was refused: %v", err)
	}
	if n := testutil.ToFloat64(h.metrics.panics.WithLabelValues("republish")); n != 1 {
		t.Errorf("counted %v panics, want 1", n)
	}
	if n := set.Rules()[0].Outcomes().Republished.Load(); n != 2 {
		t.Errorf("%d messages were published, want both", n)
	}
}
