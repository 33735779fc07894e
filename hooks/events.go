package hooks

import (
	"errors"
	"log/slog"
	"math"
	"os"
	"slices"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/sessions"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// Events are what rules can select from beside publishes. They are raised, matched and appended to the outbox where they happen, by the
// goroutine that makes them happen: those of one client are in order that way, and a client pays for its own. Nobody waits for their commit.

// tooMany is the reason for which an event is dropped that is one of more than maxDrops.
const tooMany reason = "too_many"

// maxDrops bounds the events of dropped deliveries that one packet may raise: each costs about as much as a publish that matches, and
// one publish may be dropped for each of its subscribers.
const maxDrops = 256

// eventReasons are why events are dropped.
var eventReasons = [...]reason{outboxFull, appendFailed, commitFailed, panicked, tooMany}

// eventMetrics count the events for which there is a rule; nothing is known of others.
type eventMetrics struct {
	raised, matched [rules.EventKinds]prometheus.Counter
	dropped         [rules.EventKinds]map[reason]prometheus.Counter
}

func newEventMetrics(auto promauto.Factory) *eventMetrics {
	raised := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_events_raised_total", Help: "Events that a rule selects from, by event.",
	}, []string{"event"})
	matched := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_events_matched_total", Help: "Events that a rule matched, by event.",
	}, []string{"event"})
	dropped := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_events_dropped_total",
		Help: "Events that were lost, by event and reason: full (the outbox), append_failed, commit_failed (the disk), panic, " +
			"too_many (deliveries dropped at once). Nobody sends them again.",
	}, []string{"event", "reason"})
	m := new(eventMetrics)
	for k := range rules.EventKinds {
		m.raised[k] = raised.WithLabelValues(k.String())
		m.matched[k] = matched.WithLabelValues(k.String())
		m.dropped[k] = make(map[reason]prometheus.Counter)
		for _, why := range eventReasons {
			m.dropped[k][why] = dropped.WithLabelValues(k.String(), string(why))
		}
	}
	return m
}

// wanting is the set of rules if one of them selects from such events, else nil: then nothing is to be raised.
func (h *hook) wanting(k rules.EventKind) *rules.Set {
	if set := h.o.Rules(); set != nil && len(set.EventCandidates(k)) > 0 {
		return set
	}
	return nil
}

// raise has the rules match the event, and their deliveries stored. The set is what wanting has answered. parent is
// the trace that the event belongs to; zero: one of its own. Nothing waits for the disk, and what goes wrong is
// counted and logged.
func (h *hook) raise(set *rules.Set, ev *rules.Event, parent tracectx.Context) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("raise", nil, cause)
			h.metrics.events.dropped[ev.Kind][panicked].Inc()
		}
	}()
	h.metrics.events.raised[ev.Kind].Inc()
	if ev.Timestamp.IsZero() {
		ev.Timestamp = time.Now()
	}
	ev.Node = h.o.Node
	cands := set.EventCandidates(ev.Kind)
	var span tracectx.Span
	if slices.ContainsFunc(cands, (*rules.Rule).ReadsTrace) {
		span = h.startEvent(ev, parent)
		ctx := span.Context()
		ev.TraceID, ev.SW8 = ctx.TraceID, ctx.Carrier().SW8
	}
	matching := time.Now()
	chain := set.RunEvent(cands, ev, h.nextID)
	h.tellRefused(set, ev.ClientID, chain.Refused)
	if len(chain.Matches) == 0 {
		return // a span that has not ended is not reported
	}
	h.metrics.events.matched[ev.Kind].Inc()
	if span == nil {
		span = h.startEvent(ev, parent)
	}
	defer span.End()
	of := source{topic: ev.Kind.Topic(), clientID: ev.ClientID, at: ev.Timestamp, origin: "new"}
	if !parent.IsZero() {
		of.origin = "upstream"
	}
	records, spans := h.records(set, &chain, span, of, matching)
	if len(records) == 0 {
		h.republishAll(nil, &chain)
		return
	}
	commit, err := h.o.Append(records)
	tellDropped(chain.Matches, spans, records)
	if err != nil {
		span.Error("dropped: " + err.Error())
		why := appendFailed
		if errors.Is(err, bridge.ErrFull) {
			why = outboxFull
		}
		h.lost(ev.Kind, why, 1, err)
		return
	}
	h.republishAll(nil, &chain)
	kind := ev.Kind
	commit.Watch(func(err error) {
		if err != nil {
			h.lost(kind, commitFailed, 1, err)
		}
	})
}

// lost counts and logs events that nobody gets.
func (h *hook) lost(k rules.EventKind, why reason, n int, cause error) {
	h.metrics.events.dropped[k][why].Add(float64(n))
	suppressed, ok := h.eventLog.take(string(why), time.Now())
	if !ok {
		return
	}
	attrs := []any{slog.String("event", k.String()), slog.String("reason", string(why)), slog.Int("events", n)}
	if cause != nil {
		attrs = append(attrs, slog.Any("error", cause))
	}
	if suppressed > 0 {
		attrs = append(attrs, slog.Int("suppressed", suppressed))
	}
	h.log.Error("an event was dropped", attrs...)
}

// startEvent opens the event's span. Its name holds no client's: that would make an endpoint per vehicle.
func (h *hook) startEvent(ev *rules.Event, parent tracectx.Context) tracectx.Span {
	span := h.o.Tracer.StartEntry(tracectx.SpanOptions{
		Operation: "mqtt/event/" + ev.Kind.Topic()[len("$events/"):],
		Parent:    parent,
		Layer:     layer,
		Start:     ev.Timestamp,
	})
	if h.o.Broker != "" {
		span.Tag("mq.broker", h.o.Broker)
	}
	span.Tag("mqtt.clientid", ev.ClientID)
	return span
}

// eventOf is an event of the client's, as far as all have it alike.
func eventOf(k rules.EventKind, cl *mqtt.Client) *rules.Event {
	return &rules.Event{
		Kind:        k,
		Timestamp:   time.Now(),
		ClientID:    cl.ID,
		Username:    string(cl.Properties.Username),
		HasUsername: len(cl.Properties.Username) > 0,
		PeerName:    cl.Net.Remote,
	}
}

// connectionEvent is an event that tells of the connection. Of a CONNECT that was refused at is zero.
func (c *connection) connectionEvent(k rules.EventKind, at time.Time) *rules.Event {
	cl := c.client
	ev := eventOf(k, cl)
	ev.Connection = &rules.Connection{
		SockName:   c.conn.LocalAddr().String(),
		ProtoName:  "MQTT",
		ProtoVer:   cl.Properties.ProtocolVersion,
		Keepalive:  cl.State.Keepalive,
		CleanStart: cl.Properties.Clean,
		At:         at,
	}
	if cl.Properties.ProtocolVersion < 4 {
		ev.Connection.ProtoName = "MQIsdp"
	}
	return ev
}

// answered raises that a CONNECT was answered with the code, and, if that is success, that the client is connected. A
// client that was refused has said who it is, and nobody knows whether that is so.
func (c *connection) answered(connect *packets.Packet, code packets.Code) {
	h := c.server.hook
	if code == packets.CodeSuccess {
		c.presence.Lock()
		defer c.presence.Unlock()
		c.connected, c.present = time.Now(), true
	}
	for _, k := range [...]rules.EventKind{rules.ClientConnack, rules.ClientConnected} {
		set := h.wanting(k)
		if set == nil || k == rules.ClientConnected && code != packets.CodeSuccess {
			continue
		}
		ev := c.connectionEvent(k, c.connected)
		if code == packets.CodeSuccess {
			ev.Timestamp = c.connected
		}
		if k == rules.ClientConnack {
			ev.Reason = reasonName(code.Code)
		}
		ev.Connection.Expiry = expiryOf(connect)
		ev.Properties = connectProperties(&connect.Properties)
		h.raise(set, ev, tracectx.Context{})
	}
}

// gone raises, once, that the client is not connected any more. It may be called by the connection that takes
// over as well, if this one's end takes too long: then what comes of it is not told a second time.
func (c *connection) gone(why string, goodbye *packets.Properties) {
	c.presence.Lock()
	defer c.presence.Unlock()
	if !c.present {
		return
	}
	c.present = false
	h := c.server.hook
	set := h.wanting(rules.ClientDisconnected)
	if set == nil {
		return
	}
	ev := c.connectionEvent(rules.ClientDisconnected, c.connected)
	ev.Connection.Until = ev.Timestamp
	ev.Reason = why
	if goodbye != nil {
		ev.Properties = disconnectProperties(goodbye)
	}
	h.raise(set, ev, tracectx.Context{})
}

// Reasons of disconnects, as EMQX 5.8 names them. The others are reason codes' names.
const (
	reasonNormal    = "normal"
	reasonDiscarded = "discarded" // by a client with the same id that wants a new session
	reasonTakenOver = "takenover" // by one that wants the session
	reasonKeepalive = "keepalive_timeout"
	reasonGone      = "tcp_closed"
	reasonInternal  = "internal_error" // also what a client sent that was malformed
	reasonStalled   = "send_timeout"
)

// whyGone is why the connection has ended, as the column reason has it.
func (c *connection) whyGone() string {
	if c.panicked {
		return reasonInternal
	}
	code, refused := errors.AsType[packets.Code](c.err)
	if said, ok := c.conn.Disconnected(); ok && (c.err == nil || refused && code == packets.CodeDisconnectWillMessage) {
		if said == packets.CodeDisconnect.Code {
			return reasonNormal
		}
		return reasonName(said)
	}
	if frame, ok := errors.AsType[*guard.FrameError](c.err); ok {
		return reasonOfOurs(frame.Code)
	}
	if refused {
		return reasonOfOurs(code.Code)
	}
	if why := c.endedBy.Load(); why != nil {
		return *why
	}
	switch {
	case errors.Is(c.err, os.ErrDeadlineExceeded):
		return reasonKeepalive
	case c.conn.CommitFailed():
		return reasonInternal
	case c.conn.Stalled():
		return reasonStalled
	}
	return reasonGone
}

// reasonOfOurs names a reason code that the broker ended a connection for.
func reasonOfOurs(code byte) string {
	switch code {
	case packets.ErrUnspecifiedError.Code, packets.ErrMalformedPacket.Code:
		return reasonInternal
	}
	return reasonName(code)
}

// endedFor notes that somebody other than the connection's own goroutine ends it, and why; the first counts.
func (c *connection) endedFor(why string) { c.endedBy.CompareAndSwap(nil, &why) }

// subscribed raises that the client has the subscriptions of a SUBSCRIBE that were granted.
func (h *hook) subscribed(cl *mqtt.Client, pk *packets.Packet, reasonCodes []byte) {
	set := h.wanting(rules.SessionSubscribed)
	if set == nil {
		return
	}
	for i, sub := range pk.Filters {
		if reasonCodes[i] > packets.CodeGrantedQos2.Code {
			continue
		}
		ev := eventOf(rules.SessionSubscribed, cl)
		ev.Topic, ev.QoS = sub.Filter, reasonCodes[i]
		if sub.Identifier > 0 {
			ev.Properties.List = []rules.Property{{Name: "Subscription-Identifier", Number: uint32(sub.Identifier)}}
		}
		ev.Properties.User = userProperties(pk.Properties.User)
		h.raise(set, ev, tracectx.Context{})
	}
}

// leaving is a subscription that an UNSUBSCRIBE is about to end.
type leaving struct {
	filter string
	qos    byte
}

// unsubscribed raises that the client has ended subscriptions. Those that end with their session are not raised.
func (h *hook) unsubscribed(cl *mqtt.Client, pk *packets.Packet) {
	c := connectionOf(cl)
	if c == nil || c.leaving == nil {
		return
	}
	left := c.leaving
	c.leaving = nil
	set := h.wanting(rules.SessionUnsubscribed)
	if set == nil {
		return
	}
	for _, l := range left {
		if _, still := cl.State.Subscriptions.Get(l.filter); still {
			continue // the packet was refused
		}
		ev := eventOf(rules.SessionUnsubscribed, cl)
		ev.Topic, ev.QoS = l.filter, l.qos
		ev.Properties.User = userProperties(pk.Properties.User)
		h.raise(set, ev, tracectx.Context{})
	}
}

// authzDefault is what has decided what a client may do, as rules see it. There is no ACL yet that could be told apart.
const authzDefault = "default"

// authorized raises that it was decided what a client may do.
func (h *hook) authorized(cl *mqtt.Client, topic string, write, ok bool) {
	set := h.wanting(rules.AuthzChecked)
	if set == nil {
		return
	}
	ev := eventOf(rules.AuthzChecked, cl)
	ev.Topic, ev.Action, ev.Result, ev.Source = topic, "subscribe", "deny", authzDefault
	if write {
		ev.Action = "publish"
	}
	if ok {
		ev.Result = "allow"
	}
	h.raise(set, ev, tracectx.Context{})
}

// noSubscribers raises that nobody takes a publish.
func (h *hook) noSubscribers(cl *mqtt.Client, m *rules.Message, parent tracectx.Context) {
	set := h.wanting(rules.MessageDropped)
	if set == nil {
		return
	}
	ev := eventOf(rules.MessageDropped, cl)
	ev.Reason, ev.Message = "no_subscribers", m
	h.raise(set, ev, parent)
}

// noLocal is the reason of a delivery that a subscription has with No Local [MQTT-3.8.3-3]. The others are sessions'.
const noLocal sessions.Reason = "no_local"

// dropped is a delivery that was not made.
type dropped struct {
	to      *subscriber
	message *sessions.Message
	reason  sessions.Reason
}

// drops are those of one packet. Its zero is usable, and remembers none unless wanted.
type drops struct {
	wanted  bool
	list    []dropped
	further int // beyond maxDrops
}

func (d *drops) add(to *subscriber, m *sessions.Message, why sessions.Reason) {
	switch {
	case why == "" || !d.wanted:
	case len(d.list) == maxDrops:
		d.further++
	default:
		d.list = append(d.list, dropped{to, m, why})
	}
}

// undelivered raises what has become of deliveries that were not made.
func (h *hook) undelivered(d *drops) {
	if len(d.list) == 0 {
		return
	}
	set := h.wanting(rules.DeliveryDropped)
	if set == nil {
		return
	}
	for _, one := range d.list {
		ev := &rules.Event{
			Kind: rules.DeliveryDropped, Timestamp: time.Now(),
			ClientID: one.to.who.ID, Username: one.to.who.Username, HasUsername: one.to.who.Username != "",
			Reason: string(one.reason), Message: originOf(one.message),
		}
		h.raise(set, ev, tracectx.Context{})
	}
	if d.further > 0 {
		h.lost(rules.DeliveryDropped, tooMany, d.further, nil)
	}
}

// originOf is the message as it was published. One that came before a rule wanted to know has the columns that its
// subscribers get.
func originOf(m *sessions.Message) *rules.Message {
	if origin, ok := m.Origin.(*rules.Message); ok {
		return origin
	}
	return &rules.Message{ClientID: m.Publisher, Topic: m.Topic, Payload: m.Payload, QoS: m.QoS, Retain: m.Retain}
}

// observer tells of what a session drops by itself.
type observer struct {
	h *hook
	*subscriber
}

// Watching implements sessions.Observer.
func (o observer) Watching() bool { return o.h.wanting(rules.DeliveryDropped) != nil }

// Dropped implements sessions.Observer.
func (o observer) Dropped(list []sessions.Drop) {
	d := drops{wanted: true}
	for _, one := range list {
		d.add(o.subscriber, one.Message, one.Reason)
	}
	o.h.undelivered(&d)
}

// expiryOf is how long the session of a CONNECT lasts without a connection, in seconds, as MQTT 5 counts it (3.1.2.11.2): the
// greatest number is for ever.
func expiryOf(connect *packets.Packet) uint32 {
	switch {
	case connect.ProtocolVersion == 5:
		return connect.Properties.SessionExpiryInterval
	case connect.Connect.Clean:
		return 0
	}
	return math.MaxUint32
}

// propertyList collects properties that are there.
type propertyList []rules.Property

func (l *propertyList) number(name string, n uint32, there bool) {
	if there {
		*l = append(*l, rules.Property{Name: name, Number: n})
	}
}

func (l *propertyList) text(name, text string) {
	if text != "" {
		*l = append(*l, rules.Property{Name: name, Text: text})
	}
}

func connectProperties(p *packets.Properties) rules.Properties {
	var l propertyList
	l.number("Session-Expiry-Interval", p.SessionExpiryInterval, p.SessionExpiryIntervalFlag)
	l.number("Receive-Maximum", uint32(p.ReceiveMaximum), p.ReceiveMaximum > 0)
	l.number("Maximum-Packet-Size", p.MaximumPacketSize, p.MaximumPacketSize > 0)
	l.number("Topic-Alias-Maximum", uint32(p.TopicAliasMaximum), p.TopicAliasMaximum > 0)
	l.number("Request-Response-Information", uint32(p.RequestResponseInfo), p.RequestResponseInfo > 0)
	l.number("Request-Problem-Information", uint32(p.RequestProblemInfo), p.RequestProblemInfoFlag)
	l.text("Authentication-Method", p.AuthenticationMethod)
	return rules.Properties{List: l, User: userProperties(p.User)}
}

func disconnectProperties(p *packets.Properties) rules.Properties {
	var l propertyList
	l.number("Session-Expiry-Interval", p.SessionExpiryInterval, p.SessionExpiryIntervalFlag)
	l.text("Reason-String", p.ReasonString)
	return rules.Properties{List: l, User: userProperties(p.User)}
}

func userProperties(user []packets.UserProperty) (pairs [][2]string) {
	for _, u := range user {
		pairs = append(pairs, [2]string{u.Key, u.Val})
	}
	return pairs
}

// reasonNames are MQTT 5's reason codes that end a connection or answer a CONNECT (2.4), as rules know them.
var reasonNames = map[byte]string{
	0x00: "success", 0x04: "disconnect_with_will_message",
	0x80: "unspecified_error", 0x81: "malformed_packet", 0x82: "protocol_error", 0x83: "implementation_specific_error",
	0x84: "unsupported_protocol_version", 0x85: "client_identifier_not_valid", 0x86: "bad_username_or_password",
	0x87: "not_authorized", 0x88: "server_unavailable", 0x89: "server_busy", 0x8a: "banned", 0x8b: "server_shutting_down",
	0x8c: "bad_authentication_method", 0x8d: reasonKeepalive, 0x8e: reasonTakenOver, 0x8f: "topic_filter_invalid",
	0x90: "topic_name_invalid", 0x91: "packet_identifier_in_use", 0x92: "packet_identifier_not_found",
	0x93: "receive_maximum_exceeded", 0x94: "topic_alias_invalid", 0x95: "packet_too_large", 0x96: "message_rate_too_high",
	0x97: "quota_exceeded", 0x98: "administrative_action", 0x99: "payload_format_invalid", 0x9a: "retain_not_supported",
	0x9b: "qos_not_supported", 0x9c: "use_another_server", 0x9d: "server_moved", 0x9e: "shared_subscriptions_not_supported",
	0x9f: "connection_rate_exceeded", 0xa0: "maximum_connect_time", 0xa1: "subscription_identifiers_not_supported",
	0xa2: "wildcard_subscriptions_not_supported",
}

func reasonName(code byte) string {
	if name := reasonNames[code]; name != "" {
		return name
	}
	return reasonNames[0x80]
}
