// Package hooks is the MQTT server. It leads the life of each connection (connection.go), has the embedded mochi-mqtt decode and
// answer packets, and turns mochi's events into our calls: it asks auth who may do what, matches publishes against the rules, continues
// their trace, has their deliveries stored before mochi acknowledges them, and gives them to the sessions of their
// subscribers (deliver.go).
//
// Besides cmd/broker it is the only package that knows mochi. Of the rest it knows the
// interfaces alone: not how deliveries are stored or sent, nor how spans are reported.
//
// mochi's answers to an error of OnPublish are not what one would guess. The table of them is a
// test, TestOnPublishOutcomes, and publish.go keeps to it.
package hooks

import (
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/sessions"
)

// hook is what mochi calls. A panic in one of its methods is recovered there, so that the answer to mochi is one that is safe.
type hook struct {
	mqtt.HookBase
	o        Options
	log      *slog.Logger
	metrics  *metrics
	refusals *refusals
	eventLog *logQuota // by reason
	fullLog  *logQuota // by client; beyond logKinds of them together
	refused  refusedChains
	ids      messageIDs
	nextID   func() string // ids.next, made once
	server   *Server       // set before anything is accepted

	turns       *turns
	subscribers *subscribers
	retained    sessions.Retained
	topicLocks  [64]sync.Mutex
	topicSeed   maphash.Seed
	wills       *alarms // delayed ones [MQTT-3.1.3-9]
	expiries    *alarms // of sessions

	mu        sync.Mutex
	lastPanic string
}

func newHook(o Options) *hook {
	m := newMetrics(o.Registerer)
	h := &hook{
		o: o, log: o.Logger, metrics: m,
		refusals:    newRefusals(o.Logger, o.Space, m),
		ids:         messageIDs{run: rand.Uint64()},
		turns:       newTurns(),
		eventLog:    newLogQuota(),
		fullLog:     newLogQuota(),
		subscribers: newSubscribers(),
		topicSeed:   maphash.MakeSeed(),
		wills:       newAlarms(),
		expiries:    newAlarms(),
	}
	h.nextID = h.ids.next
	h.subscribers.observer = func(s *subscriber) sessions.Observer { return observer{h, s} }
	return h
}

// guarded are the methods that recover their panics: all that Provides names, and what runs by the clock.
var guarded = [...]string{
	"OnACLCheck", "OnSubscribe", "OnSubscribed", "OnUnsubscribe", "OnUnsubscribed", "OnPublish", "OnPublished", "OnQosPublish",
	"OnPacketRead", "OnPacketProcessed", "OnPacketEncode", "publishWill", "publishSys", "expire", "raise", "republish",
}

// ID is the hook's name in mochi's log.
func (h *hook) ID() string { return "throughline" }

// Provides tells mochi which methods to call.
func (h *hook) Provides(b byte) bool {
	switch b {
	case mqtt.OnACLCheck, mqtt.OnSubscribe, mqtt.OnSubscribed, mqtt.OnUnsubscribe, mqtt.OnUnsubscribed, mqtt.OnPublish, mqtt.OnPublished, mqtt.OnQosPublish,
		mqtt.OnPacketRead, mqtt.OnPacketProcessed, mqtt.OnPacketEncode:
		return true
	}
	return false
}

// panicked counts a recovered panic, and logs it with its stack when its text changes. The client may be nil.
func (h *hook) panicked(method string, cl *mqtt.Client, cause any) {
	h.metrics.panics.WithLabelValues(method).Inc()
	text := fmt.Sprint(cause)
	h.mu.Lock()
	same := text == h.lastPanic
	h.lastPanic = text
	h.mu.Unlock()
	if same {
		return
	}
	client := ""
	if cl != nil {
		client = cl.ID
	}
	h.log.Error("panic in a hook", "hook", method, "panic", text, "client", client, "stack", string(debug.Stack()))
}

// authenticate says whether the client may connect.
func (h *hook) authenticate(cl *mqtt.Client, password []byte) bool {
	who := identity(cl)
	who.Password = password
	return h.o.Auth.Connect(who)
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
	ok = h.o.Auth.Allow(identity(cl), action, topic)
	h.authorized(cl, topic, write, ok)
	return ok
}

func identity(cl *mqtt.Client) auth.Client {
	return auth.Client{Listener: cl.Net.Listener, ID: cl.ID, Username: string(cl.Properties.Username)}
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

// forgetAck takes an acknowledgement out of the session.
func (h *hook) forgetAck(cl *mqtt.Client, id uint16) {
	pk, ok := cl.State.Inflight.Get(id)
	if ok && acknowledges(pk) && cl.State.Inflight.Delete(id) {
		atomic.AddInt64(&h.server.mochi.Info.Inflight, -1)
	}
}

// These stand for topic filters that are refused. mochi refuses them, since # may only be last [MQTT-4.7.1-1].
const (
	overLimit = "#/beyond-max-subscriptions" // until OnSubscribed
	invalid   = "#/invalid"                  // one that mochi would grant, though it is none
)

// validFilter reports whether a topic filter is one (MQTT 5, 4.7.1 and 4.8.2).
func validFilter(filter string) bool {
	if rest, shared := strings.CutPrefix(filter, "$share/"); shared {
		name, of, ok := strings.Cut(rest, "/")
		if !ok || name == "" || strings.ContainsAny(name, "+#") { // [MQTT-4.8.2-1] [MQTT-4.8.2-2]
			return false
		}
		filter = of
	} else if mqtt.IsSharedFilter(filter) { // to mochi, which doesn't look at the case
		return false
	}
	if filter == "" { // [MQTT-4.7.3-1]
		return false
	}
	for level := range strings.SplitSeq(filter, "/") {
		if len(level) > 1 && strings.ContainsAny(level, "+#") { // [MQTT-4.7.1-1] [MQTT-4.7.1-2]
			return false
		}
	}
	return !strings.Contains(filter, "#/")
}

// yieldEvery is how many publishes of one client are taken before others get a turn: few enough that a client with much to
// say delays nobody, and enough that frames go out many at a time.
const yieldEvery = 16

// OnPublished makes a client whose messages a subscriber can't keep up with wait a little. Its acknowledgement
// has been written.
func (h *hook) OnPublished(cl *mqtt.Client, _ packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnPublished", cl, cause)
		}
	}()
	c := connectionOf(cl)
	if c == nil {
		return
	}
	if c.pause > 0 && !c.conn.Closed() {
		time.Sleep(c.pause)
	}
	if c.published++; c.published%yieldEvery == 0 {
		runtime.Gosched()
	}
}

// OnSubscribe marks filters that are none, and those beyond MaxSubscriptions, so that mochi refuses them. A filter
// that the client has already is no further one [MQTT-3.8.4-3].
func (h *hook) OnSubscribe(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnSubscribe", cl, cause)
			out = pk // mochi answers this packet: an empty one would get a SUBACK without id and codes
		}
	}()
	existed, seen := make([]bool, len(pk.Filters)), make(map[string]bool)
	room := h.o.MaxSubscriptions - cl.State.Subscriptions.Len()
	for i, sub := range pk.Filters {
		if !validFilter(sub.Filter) {
			pk.Filters[i].Filter = invalid
			continue
		}
		_, existed[i] = cl.State.Subscriptions.Get(sub.Filter)
		existed[i] = existed[i] || seen[sub.Filter]
		seen[sub.Filter] = true
		if existed[i] || h.o.MaxSubscriptions <= 0 {
			continue
		}
		if room--; room < 0 {
			pk.Filters[i].Filter = overLimit
		}
	}
	for i := range pk.Filters {
		pk.Filters[i].Filter = strings.Clone(pk.Filters[i].Filter) // the packet that it is a part of must not stay
	}
	if c := connectionOf(cl); c != nil {
		c.existed = existed
	}
	return pk
}

// OnSubscribed has messages go to the new subscriptions from now on, and gives the marked filters the reason
// code that fits them. mochi writes reasonCodes to the client after this.
func (h *hook) OnSubscribed(cl *mqtt.Client, pk packets.Packet, reasonCodes []byte) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnSubscribed", cl, cause)
		}
	}()
	h.subscribers.changed()
	if c := connectionOf(cl); c != nil {
		c.oweRetained(pk.Filters, reasonCodes)
	}
	for i, sub := range pk.Filters {
		if cl.Properties.ProtocolVersion < 5 {
			if reasonCodes[i] > packets.CodeGrantedQos2.Code {
				reasonCodes[i] = packets.ErrUnspecifiedError.Code // the only one there is [MQTT-3.9.3-2 of 3.1.1]
			}
			continue
		}
		if sub.Filter == overLimit && reasonCodes[i] == packets.ErrTopicFilterInvalid.Code {
			reasonCodes[i] = packets.ErrQuotaExceeded.Code
		}
	}
	h.subscribed(cl, &pk, reasonCodes)
}

// OnUnsubscribe marks filters that the client has not subscribed to, or not any more at that place of the packet: mochi would say that
// it had if anybody has, and count one subscription less.
func (h *hook) OnUnsubscribe(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnUnsubscribe", cl, cause)
			out = pk
		}
	}()
	seen := make(map[string]bool)
	var going []leaving
	wanted := h.wanting(rules.SessionUnsubscribed) != nil
	for i, sub := range pk.Filters {
		has, ok := cl.State.Subscriptions.Get(sub.Filter)
		if !ok || seen[sub.Filter] {
			pk.Filters[i].Filter = invalid
			continue
		}
		seen[sub.Filter] = true
		if wanted {
			going = append(going, leaving{has.Filter, has.Qos})
		}
	}
	if c := connectionOf(cl); c != nil {
		c.leaving = going
	}
	return pk
}

// OnUnsubscribed has messages no longer go to what the client has unsubscribed from.
func (h *hook) OnUnsubscribed(cl *mqtt.Client, pk packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnUnsubscribed", cl, cause)
		}
	}()
	if len(pk.Filters) > 0 { // none: a client without subscriptions has left
		h.subscribers.changed()
	}
	h.unsubscribed(cl, &pk)
}

// OnPacketProcessed sends the retained messages that a SUBSCRIBE has earned, after its SUBACK.
func (h *hook) OnPacketProcessed(cl *mqtt.Client, pk packets.Packet, _ error) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnPacketProcessed", cl, cause)
		}
	}()
	if pk.FixedHeader.Type == packets.Subscribe {
		if c := connectionOf(cl); c != nil && len(c.retained) > 0 {
			h.deliverRetained(c)
		}
	}
}

// topicAliasMaximum is how many topic aliases a client may set: a vehicle publishes to a handful of topics.
const topicAliasMaximum = 16

// OnPacketRead puts the topic name in place of its alias. mochi would do that after it has asked whether the client may
// publish to the topic "".
func (h *hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (out packets.Packet, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnPacketRead", cl, cause)
			out, err = pk, packets.ErrUnspecifiedError
		}
	}()
	if pk.FixedHeader.Type != packets.Publish || !pk.Properties.TopicAliasFlag {
		return pk, nil
	}
	c := connectionOf(cl)
	alias := pk.Properties.TopicAlias // guard has seen that it is no larger than topicAliasMaximum
	if pk.TopicName != "" {
		if c.aliases == nil {
			c.aliases = make(map[uint16]string)
		}
		c.aliases[alias] = strings.Clone(pk.TopicName) // the packet that it is a part of must not stay
	} else if pk.TopicName = c.aliases[alias]; pk.TopicName == "" {
		h.server.disconnect(c.conn, packets.ErrProtocolViolation, time.Now().Add(farewell)) // MQTT 5, 3.3.2.3.4
		return pk, packets.ErrProtocolViolation
	}
	pk.Properties.TopicAlias, pk.Properties.TopicAliasFlag = 0, false
	return pk, nil
}

// OnPacketEncode puts right what mochi writes.
//
// CONNACK: MQTT 5 clients are told the packet size that guard holds them to: without it they have to take it that there
// is none (MQTT 5, 3.2.2.3.6), and a message beyond it would end their connection at every attempt. And how many topic
// aliases they may use, which mochi leaves out as well.
//
// PUBREC: to a message of QoS 2 that was sent again mochi says that its identifier is in use (0x91), which makes the client
// give it up. It was received, and that is the answer [MQTT-4.3.3-10].
func (h *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("OnPacketEncode", cl, cause)
			out = pk
		}
	}()
	switch pk.FixedHeader.Type {
	case packets.Connack:
		if pk.ProtocolVersion == 5 {
			if h.o.MaxPacketSize > 0 {
				pk.Properties.MaximumPacketSize = uint32(h.o.MaxPacketSize)
			}
			pk.Properties.TopicAliasMaximum = topicAliasMaximum
		}
	case packets.Pubrec:
		if pk.ReasonCode == packets.ErrPacketIdentifierInUse.Code {
			pk.ReasonCode = packets.CodeSuccess.Code
			pk.Properties.ReasonString = ""
		}
	}
	return pk
}
