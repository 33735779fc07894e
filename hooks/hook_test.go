package hooks

import (
	"context"
	"log/slog"
	"slices"
	"testing"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// Some of mochi's goroutines are its own: a panic there would end the process.
func TestEveryHookRecovers(t *testing.T) {
	filters := packets.Packet{Filters: packets.Subscriptions{{Filter: overLimit}}, PacketID: 7}
	methods := []struct {
		name string
		id   byte
		call func(h *hook, cl *mqtt.Client) (ok bool) // ok: what mochi is told is right
	}{
		{"OnConnectAuthenticate", mqtt.OnConnectAuthenticate, func(h *hook, cl *mqtt.Client) bool {
			return !h.OnConnectAuthenticate(cl, packets.Packet{})
		}},
		{"OnACLCheck", mqtt.OnACLCheck, func(h *hook, cl *mqtt.Client) bool {
			return !h.OnACLCheck(cl, "a", true)
		}},
		{"OnSessionEstablished", mqtt.OnSessionEstablished, func(h *hook, cl *mqtt.Client) bool {
			h.turns = nil
			h.OnSessionEstablished(cl, packets.Packet{})
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
	// These have nothing in them that a test could make panic.
	names := []string{"OnPacketEncode", "OnPublished"}
	var ids []byte
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
		names, ids = append(names, m.name), append(ids, m.id)
	}
	slices.Sort(names)
	if want := slices.Sorted(slices.Values(guarded[:])); !slices.Equal(names, want) {
		t.Errorf("tested are %v, want all of %v", names, want)
	}
	for b := range byte(255) {
		if want := slices.Contains(ids, b) || b == mqtt.OnPacketEncode || b == mqtt.OnPublished; (&hook{}).Provides(b) != want {
			t.Errorf("Provides(%d) is %v: it has to name the hooks that are tested here", b, !want)
		}
	}
}

// mochi's own way of closing a listener's clients deadlocks with a client that leaves meanwhile.
func TestListenerClosesItsConnectionsItself(t *testing.T) {
	g := guard.New(guard.Options{})
	listener{g.Listener("tcp", "127.0.0.1:0"), nil}.Close(func(string) {
		t.Error("mochi was asked to close the clients")
	})
}

// TestPanicDuringTakeoverGivesTheTurnBack: else the client could never connect again.
func TestPanicDuringTakeoverGivesTheTurnBack(t *testing.T) {
	h := newHook(Options{
		Auth:       auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}}),
		Logger:     slog.New(slog.DiscardHandler),
		Registerer: prometheus.NewRegistry(),
	}) // without a server: looking for the old connection panics
	c := new(guard.Conn)
	cl := &mqtt.Client{ID: "v7"}
	cl.Net.Conn, cl.Net.Listener = c, "tcp"
	if h.OnConnectAuthenticate(cl, packets.Packet{}) {
		t.Error("the client may connect")
	}
	if n := testutil.ToFloat64(h.metrics.panics.WithLabelValues("OnConnectAuthenticate")); n != 1 {
		t.Fatalf("counted %v panics, want 1", n)
	}
	h.turns.endAll(c) // as when the connection ends
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.turns.begin(ctx, "v7", new(guard.Conn)); err != nil {
		t.Error("the turn was not given back")
	}
}
