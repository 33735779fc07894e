package hooks

import (
	"encoding/binary"
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/sessions"
)

// mochi finds out who subscribes to what; messages go to the subscribers from here, past mochi. Its own way there
// drops what a queue has no room for, confuses the packet identifiers of the two directions, loses the order of what
// waits, and stops under a Receive Maximum (docs/decisions/0007).

// message is a publish on its way to subscribers. It shares the packet's memory, which mochi makes anew for each.
func message(publisher string, pk *packets.Packet, received time.Time) *sessions.Message {
	m := &sessions.Message{
		Topic:      pk.TopicName,
		Payload:    pk.Payload,
		QoS:        pk.FixedHeader.Qos,
		Retain:     pk.FixedHeader.Retain,
		Publisher:  publisher,
		Properties: passedOn(&pk.Properties),
	}
	if s := pk.Properties.MessageExpiryInterval; s > 0 {
		m.Expires = received.Add(time.Duration(s) * time.Second)
	}
	return m
}

// passedOn encodes the properties that subscribers get as they were sent [MQTT-3.3.2-4] [MQTT-3.3.2-15]
// [MQTT-3.3.2-16] [MQTT-3.3.2-17] [MQTT-3.3.2-18] [MQTT-3.3.2-20]. An empty content type is lost: mochi reads it as none.
func passedOn(p *packets.Properties) []byte {
	var b []byte
	if p.PayloadFormatFlag {
		b = append(b, packets.PropPayloadFormat, p.PayloadFormat)
	}
	if p.ContentType != "" {
		b = appendString(append(b, packets.PropContentType), p.ContentType)
	}
	if p.ResponseTopic != "" {
		b = appendString(append(b, packets.PropResponseTopic), p.ResponseTopic)
	}
	if p.CorrelationData != nil {
		b = appendString(append(b, packets.PropCorrelationData), string(p.CorrelationData))
	}
	for _, u := range p.User {
		b = appendString(appendString(append(b, packets.PropUser), u.Key), u.Val)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

// origin is where a message comes from, as far as it is told of when it is dropped. The zero is the broker itself. No event is raised
// for what it publishes: what a rule publishes on an event could raise that event again, and again.
type origin struct {
	client  bool
	message *rules.Message // nil: nobody wants to know
}

// attach notes it in the message.
func (from origin) attach(m *sessions.Message) *sessions.Message {
	m.Unwatched = !from.client
	if from.message != nil {
		m.Origin = from.message
	}
	return m
}

// deliver retains the message if it is to be, and gives it to its topic's subscribers. It doesn't block. The result is how long
// the publisher should wait for them to keep up.
func (h *hook) deliver(publisher string, pk *packets.Packet, received time.Time) (pause time.Duration) {
	pause, _ = h.deliverFrom(origin{}, publisher, pk, received)
	return pause
}

// deliverFrom is deliver for what a client publishes. taken is false if there is nobody to deliver it to, and nothing to retain.
func (h *hook) deliverFrom(from origin, publisher string, pk *packets.Packet, received time.Time) (pause time.Duration, taken bool) {
	d := drops{wanted: from.client && h.wanting(rules.DeliveryDropped) != nil}
	pause, taken = h.fanOut(from, publisher, pk, received, &d)
	h.undelivered(&d) // without the topic's lock
	return pause, taken
}

func (h *hook) fanOut(from origin, publisher string, pk *packets.Packet, received time.Time, d *drops) (pause time.Duration, taken bool) {
	var m *sessions.Message
	if pk.FixedHeader.Retain { // [MQTT-3.3.1-5]
		m = from.attach(message(publisher, pk, received))
		lock := h.topicLock(m.Topic)
		lock.Lock()
		defer lock.Unlock()
		h.retained.Set(m) // before the look at who subscribes: one who comes after that gets this one
	}
	t := h.subscribers.of(pk.TopicName)
	if len(t.direct)+len(t.shared) == 0 {
		return 0, m != nil
	}
	if m == nil {
		m = from.attach(message(publisher, pk, received))
	}
	e := sessions.NewEncoder(m)
	defer e.Release()
	sent := 0
	to := func(t *target) {
		ok, wait := h.deliverTo(t, m, e, d)
		if ok {
			sent++
		}
		pause = max(pause, wait)
	}
	for i := range t.direct {
		to(&t.direct[i])
	}
	for _, g := range t.shared {
		if t := g.choose(func(t *target) bool { return h.may(t, m) }); t != nil {
			to(t)
		}
	}
	h.sent(sent)
	return pause, true
}

func (h *hook) deliverTo(t *target, m *sessions.Message, e *sessions.Encoder, d *drops) (sent bool, pause time.Duration) {
	if !h.may(t, m) {
		if t.as(m) == t.own {
			d.add(t.subscriber, m, noLocal)
		}
		return false, 0
	}
	as := t.as(m)
	r := t.session.Deliver(sessions.Delivery{
		Message:         m,
		QoS:             min(m.QoS, as.qos),
		Retain:          m.Retain && as.retainAsPublished, // [MQTT-3.3.1-12] [MQTT-3.3.1-13]
		SubscriptionIDs: as.ids,
	}, e)
	if r.Full {
		h.saysFull(t.subscriber, m)
	}
	d.add(t.subscriber, m, r.Dropped)
	return r.Sent, r.Pause
}

// saysFull logs that a session has no room. One whose client takes a message now and then has room again after each.
func (h *hook) saysFull(s *subscriber, m *sessions.Message) {
	suppressed, ok := h.fullLog.take(s.who.ID, time.Now())
	if !ok {
		return
	}
	attrs := []any{slog.String("client", s.who.ID), slog.String("topic", m.Topic)}
	if suppressed > 0 {
		attrs = append(attrs, slog.Int("suppressed", suppressed))
	}
	h.log.Warn("messages to a client are dropped: too many wait for it", attrs...)
}

// may reports whether the message is for the target at all.
func (h *hook) may(t *target, m *sessions.Message) bool {
	return !t.as(m).none && h.o.Auth.Allow(t.who, auth.Subscribe, m.Topic)
}

// sent keeps the counters of mochi's that its $SYS topics show.
func (h *hook) sent(n int) {
	if n > 0 {
		atomic.AddInt64(&h.server.mochi.Info.MessagesSent, int64(n))
		atomic.AddInt64(&h.server.mochi.Info.PacketsSent, int64(n))
	}
}

// retainedFor is a subscription whose client gets the retained messages that match.
type retainedFor struct {
	filter string
	qos    byte
	ids    []uint32
}

// oweRetained notes the subscriptions of a SUBSCRIBE that retained messages are to be sent for.
func (c *connection) oweRetained(filters packets.Subscriptions, reasonCodes []byte) {
	c.retained = nil
	for i, sub := range filters {
		refused := reasonCodes[i] >= packets.ErrUnspecifiedError.Code
		if refused || mqtt.IsSharedFilter(sub.Filter) || // MQTT 5, 4.8.2
			sub.RetainHandling == 1 && c.existed[i] || sub.RetainHandling == 2 { // [MQTT-3.3.1-10] [MQTT-3.3.1-11]
			continue
		}
		r := retainedFor{filter: sub.Filter, qos: reasonCodes[i]}
		if sub.Identifier > 0 {
			r.ids = []uint32{uint32(sub.Identifier)}
		}
		c.retained = append(c.retained, r)
	}
}

// deliverRetained gives a client the retained messages that its SUBSCRIBE has earned.
func (h *hook) deliverRetained(c *connection) {
	due := c.retained
	c.retained = nil
	d := drops{wanted: h.wanting(rules.DeliveryDropped) != nil}
	for _, r := range due {
		for _, m := range h.retained.Match(r.filter) {
			if h.o.Auth.Allow(c.subscriber.who, auth.Subscribe, m.Topic) {
				h.deliverStored(c.subscriber, m.Topic, r, &d)
			}
		}
	}
	h.undelivered(&d)
}

// deliverStored gives a session the retained message that the topic has now. It is never older than what the session was
// given of the topic before.
func (h *hook) deliverStored(s *subscriber, topic string, r retainedFor, d *drops) {
	lock := h.topicLock(topic)
	lock.Lock()
	defer lock.Unlock()
	m := h.retained.Get(topic)
	if m == nil {
		return
	}
	e := sessions.NewEncoder(m)
	defer e.Release()
	delivery := sessions.Delivery{
		Message: m, QoS: min(m.QoS, r.qos), Retain: true, SubscriptionIDs: r.ids, Stored: true, // [MQTT-3.3.1-8]
	}
	result := s.session.Deliver(delivery, e)
	if result.Sent {
		h.sent(1)
	}
	if result.Full {
		h.saysFull(s, m)
	}
	if !m.Unwatched {
		d.add(s, m, result.Dropped)
	}
}

// topicLock keeps apart, for one topic, what sets its retained message and sends it to subscribers, and what sends it to a
// new one. Topics share locks.
func (h *hook) topicLock(topic string) *sync.Mutex {
	return &h.topicLocks[maphash.String(h.topicSeed, topic)%uint64(len(h.topicLocks))]
}
