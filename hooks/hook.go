// Package hooks turns the events of the embedded MQTT server, mochi-mqtt, into our calls: it asks
// auth who may do what, matches publishes against the rules, continues their trace, and has their
// deliveries stored before mochi acknowledges them.
//
// Besides cmd/broker it is the only package that knows mochi. Of the rest it knows the
// interfaces alone: not how deliveries are stored or sent, nor how spans are reported.
//
// mochi's answers to an error of OnPublish are not what one would guess. The table of them is a
// test, TestOnPublishOutcomes, and publish.go keeps to it.
package hooks

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// hook is what mochi calls. A panic in one of its methods is recovered there: in some of
// mochi's goroutines nobody else could.
type hook struct {
	mqtt.HookBase
	o         Options
	log       *slog.Logger
	metrics   *metrics
	refusals  *refusals
	ids       messageIDs
	published atomic.Uint64
	server    *Server // set before anything is accepted

	turns *turns

	mu        sync.Mutex
	lastPanic string
}

func newHook(o Options) *hook {
	m := newMetrics(o.Registerer)
	return &hook{
		o: o, log: o.Logger, metrics: m,
		refusals: newRefusals(o.Logger, o.Space, m),
		ids:      messageIDs{run: rand.Uint64()},
		turns:    newTurns(),
	}
}

// guarded are the methods that recover their panics: all that Provides names.
var guarded = [...]string{
	"OnConnectAuthenticate", "OnACLCheck", "OnSessionEstablished",
	"OnSubscribe", "OnSubscribed", "OnPublish", "OnPublished", "OnQosPublish", "OnPacketEncode",
}

// ID is the hook's name in mochi's log.
func (h *hook) ID() string { return "throughline" }

// Provides tells mochi which methods to call.
func (h *hook) Provides(b byte) bool {
	switch b {
	case mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnSessionEstablished,
		mqtt.OnSubscribe, mqtt.OnSubscribed, mqtt.OnPublish, mqtt.OnPublished, mqtt.OnQosPublish, mqtt.OnPacketEncode:
		return true
	}
	return false
}

// panicked counts a recovered panic, and logs it with its stack when its text changes.
func (h *hook) panicked(method string, cl *mqtt.Client, cause any) {
	h.metrics.panics.WithLabelValues(method).Inc()
	text := fmt.Sprint(cause)
	h.mu.Lock()
	same := text == h.lastPanic
	h.lastPanic = text
	h.mu.Unlock()
	if !same {
		h.log.Error("panic in a hook", "hook", method, "panic", text, "client", cl.ID, "stack", string(debug.Stack()))
	}
}

// OnConnectAuthenticate says whether the client may connect. For one that may it returns once no other
// connection has the client's session, and lets the connection read on: nothing comes between this and mochi's
// taking the session over, and it is the last call that can keep mochi from that.
func (h *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) (ok bool) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnConnectAuthenticate", cl, cause)
			ok = false
		}
	}()
	who := identity(cl)
	who.Password = pk.Connect.Password
	if !h.o.Auth.Connect(who) {
		return false
	}
	c, ours := cl.Net.Conn.(*guard.Conn)
	if !ours {
		return true
	}
	c.Admit(cl.ID) // first: the end of the connection ends the turn by this id, whatever comes now
	return h.takeOver(cl, c)
}

// OnACLCheck says whether the client may publish to a topic name (write), or subscribe to a topic
// filter or be sent a message of a topic name.
func (h *hook) OnACLCheck(cl *mqtt.Client, topic string, write bool) (ok bool) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnACLCheck", cl, cause)
			ok = false
		}
	}()
	action := auth.Subscribe
	if write {
		action = auth.Publish
	}
	return h.o.Auth.Allow(identity(cl), action, topic)
}

func identity(cl *mqtt.Client) auth.Client {
	return auth.Client{Listener: cl.Net.Listener, ID: cl.ID, Username: string(cl.Properties.Username)}
}

// OnSessionEstablished ends the turn that OnConnectAuthenticate began.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnSessionEstablished", cl, cause)
		}
	}()
	if c, ok := cl.Net.Conn.(*guard.Conn); ok {
		h.turns.end(cl.ID, c)
	}
}

// OnQosPublish takes an acknowledgement out of the session again that mochi has stored after its commit has
// failed: a resumed session would send it. If the commit fails later, hold does that.
func (h *hook) OnQosPublish(cl *mqtt.Client, pk packets.Packet, _ int64, _ int) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnQosPublish", cl, cause)
		}
	}()
	if !acknowledges(pk) {
		return
	}
	if c, ok := cl.Net.Conn.(*guard.Conn); ok && c.CommitFailed() {
		h.forgetAck(cl, pk.PacketID)
	}
}

// acknowledges reports whether the packet acknowledges a publish of the client. mochi keeps a PUBREC in the session until
// the PUBREL comes, and a PUBACK if the connection was closed when it wrote it.
func acknowledges(pk packets.Packet) bool {
	return pk.FixedHeader.Type == packets.Puback || pk.FixedHeader.Type == packets.Pubrec
}

// forgetAck takes an acknowledgement out of the session. mochi keeps the ids of both directions in one map: under
// the same id there may be a message to the client.
func (h *hook) forgetAck(cl *mqtt.Client, id uint16) {
	pk, ok := cl.State.Inflight.Get(id)
	if ok && acknowledges(pk) && cl.State.Inflight.Delete(id) {
		atomic.AddInt64(&h.server.mochi.Info.Inflight, -1)
	}
}

// overLimit stands for a topic filter beyond MaxSubscriptions until OnSubscribed. mochi refuses
// it, since # may only be last [MQTT-4.7.1-1].
const overLimit = "#/beyond-max-subscriptions"

// yieldEvery is how many publishes go by before a publisher lets others run: far fewer than writesPending, and enough
// that frames still go out many at a time.
const yieldEvery = 16

// OnPublished lets those run, now and then, whose queues publishes go into. mochi drops a message, whatever its QoS,
// when a client's queue is full, and publishers that are never made to wait fill it faster than one goroutine
// empties it.
func (h *hook) OnPublished(*mqtt.Client, packets.Packet) {
	if h.published.Add(1)%yieldEvery == 0 {
		runtime.Gosched()
	}
}

// OnSubscribe marks the filters beyond MaxSubscriptions, so that mochi refuses them. A filter
// that the client has already is no further one [MQTT-3.8.4-3].
func (h *hook) OnSubscribe(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnSubscribe", cl, cause)
			out = pk // mochi answers this packet: an empty one would get a SUBACK without id and codes
		}
	}()
	if h.o.MaxSubscriptions <= 0 {
		return pk
	}
	room := h.o.MaxSubscriptions - cl.State.Subscriptions.Len()
	for i, sub := range pk.Filters {
		if _, has := cl.State.Subscriptions.Get(sub.Filter); has {
			continue
		}
		if room--; room < 0 {
			pk.Filters[i].Filter = overLimit
		}
	}
	return pk
}

// OnSubscribed gives the marked filters the reason code that fits them. mochi writes reasonCodes
// to the client after this.
func (h *hook) OnSubscribed(cl *mqtt.Client, pk packets.Packet, reasonCodes []byte) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnSubscribed", cl, cause)
		}
	}()
	if cl.Properties.ProtocolVersion < 5 {
		return // 0x80 is the only one there is
	}
	for i, sub := range pk.Filters {
		if sub.Filter == overLimit && reasonCodes[i] == packets.ErrTopicFilterInvalid.Code {
			reasonCodes[i] = packets.ErrQuotaExceeded.Code
		}
	}
}

// OnPacketEncode tells MQTT 5 clients the limit that guard holds them to: without it they
// have to take it that there is none (MQTT 5, 3.2.2.3.6), and a message beyond it would end their connection at
// every attempt. mochi's CONNACK leaves it out.
func (h *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnPacketEncode", cl, cause)
			out = pk
		}
	}()
	if pk.FixedHeader.Type == packets.Connack && pk.ProtocolVersion == 5 && h.o.MaxPacketSize > 0 {
		pk.Properties.MaximumPacketSize = uint32(h.o.MaxPacketSize)
	}
	return pk
}
