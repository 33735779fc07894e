package rules

import (
	"fmt"
	"math/bits"
	"net"
	"slices"
	"strings"
	"time"
)

// EventKind is one of the things that happen in a broker and that a FROM clause
// can name, beside publishes.
type EventKind uint8

// The events that are raised. Their columns are those of section 7 of the
// language, see Columns.
const (
	ClientConnected EventKind = iota
	ClientDisconnected
	ClientConnack
	SessionSubscribed
	SessionUnsubscribed
	MessageDropped  // on its way in: it has no subscriber
	DeliveryDropped // on its way to one subscriber
	AuthzChecked
	EventKinds // how many there are
)

// eventNames are the names of each kind: as the column event has it, and in FROM,
// new and legacy, after $events/.
var eventNames = [EventKinds]struct{ column, topic, legacy string }{
	ClientConnected:     {"client.connected", "client/connected", "client_connected"},
	ClientDisconnected:  {"client.disconnected", "client/disconnected", "client_disconnected"},
	ClientConnack:       {"client.connack", "client/connack", "client_connack"},
	SessionSubscribed:   {"session.subscribed", "session/subscribed", "session_subscribed"},
	SessionUnsubscribed: {"session.unsubscribed", "session/unsubscribed", "session_unsubscribed"},
	MessageDropped:      {"message.dropped", "message/dropped", "message_dropped"},
	DeliveryDropped:     {"delivery.dropped", "message/delivery_dropped", "delivery_dropped"},
	AuthzChecked:        {"client.check_authz_complete", "auth/check_authz_complete", "client_check_authz_complete"},
}

// unraised are the other events that EMQX has, as the names after $events/.
var unraised = []string{
	"client/ping", "message/delivered", "message/acked", "auth/check_authn_complete",
	"sys/alarm_activated", "sys/alarm_deactivated", "schema_validation/failed", "message_transformation/failed",
	"client_check_authn_complete", "message_delivered", "message_acked", "alarm_activated", "alarm_deactivated",
	"schema_validation_failed", "message_transformation_failed",
}

const eventPrefix = "$events/"

// String is the event as the column of that name has it: client.connected.
func (k EventKind) String() string { return eventNames[k].column }

// Topic is the event as FROM names it: $events/client/connected.
func (k EventKind) Topic() string { return eventPrefix + eventNames[k].topic }

// Columns are the names of the columns that an event of the kind can have, in
// the order of *, without metadata, which is the rule's.
func (k EventKind) Columns() []string {
	var names []string
	for _, c := range columnsOfKind[k] {
		names = append(names, c.name)
	}
	return names
}

// eventSet is a set of kinds.
type eventSet uint16

func (s eventSet) has(k EventKind) bool { return s&(1<<k) != 0 }

// each calls fn for the kinds of the set.
func (s eventSet) each(fn func(EventKind)) {
	for ; s != 0; s &= s - 1 {
		fn(EventKind(bits.TrailingZeros16(uint16(s))))
	}
}

// eventsOf are the events that a name of FROM selects, which begins with $events/
// and is a topic filter. known is false for one that no broker of this kind has.
func eventsOf(filter string) (s eventSet, known bool) {
	for k, n := range eventNames {
		if matchFilter(filter, eventPrefix+n.topic) || matchFilter(filter, eventPrefix+n.legacy) || matchFilter(filter, eventPrefix+underscored(n.topic)) {
			s |= 1 << k
		}
	}
	known = s != 0 || slices.ContainsFunc(unraised, func(name string) bool { return matchFilter(filter, eventPrefix+name) })
	return s, known
}

// suggestableEvents are the names that FROM takes.
func suggestableEvents() (names []string) {
	for _, n := range eventNames {
		names = append(names, eventPrefix+n.topic, eventPrefix+n.legacy)
	}
	return names
}

// parseEvent is the kind that a text names: client.connected, client/connected or
// client_connected, after $events/ or not. It takes more than FROM does, since nobody
// remembers which of its names an event has as a column.
func parseEvent(text string) (EventKind, bool) {
	name := underscored(strings.TrimPrefix(text, eventPrefix))
	for k, n := range eventNames {
		if name == underscored(n.column) || name == underscored(n.topic) || name == n.legacy {
			return EventKind(k), true
		}
	}
	return 0, false
}

var separators = strings.NewReplacer("/", "_", ".", "_")

// underscored is a name in the legacy style, also of the two events whose legacy name
// is another one.
func underscored(name string) string { return separators.Replace(name) }

// Event is something that happened, as rules see it. Which fields count depends
// on Kind; the zero of a text is absence, save where it is said otherwise. What it
// points to must not change while the event is matched.
type Event struct {
	Kind      EventKind
	Timestamp time.Time // when it happened
	Node      string

	ClientID    string // of DeliveryDropped the receiver's
	Username    string
	HasUsername bool   // false: the column username is undefined
	PeerName    string // the client's address and port

	// Connection is for ClientConnected, ClientDisconnected and ClientConnack.
	Connection *Connection
	// Reason is why a client was disconnected or a message dropped, or the name of
	// the reason code of a CONNACK.
	Reason string
	// Topic, of a session or authorization event, is the filter or the topic name.
	Topic string
	QoS   byte // of the subscription
	// Action is publish or subscribe; Result allow or deny; Source what has decided.
	Action, Result, Source string
	// Properties are those of the packet that was it: CONNECT, DISCONNECT, SUBSCRIBE
	// or UNSUBSCRIBE.
	Properties Properties
	// Message is what was dropped.
	Message *Message

	// TraceID and SW8 are those of the event's span. They resolve by name, and are
	// not part of *.
	TraceID, SW8 string
}

// Connection is what a CONNECT packet said, and where it came in.
type Connection struct {
	SockName  string // the broker's address and port
	ProtoName string // MQTT or MQIsdp
	ProtoVer  byte   // 3 to 5
	Keepalive uint16 // seconds
	// CleanStart is the flag, whatever MQTT 3.1.1 calls it.
	CleanStart bool
	// Expiry is how long the session lasts without a connection, in seconds.
	Expiry uint32
	// At and Until are when CONNACK was sent and when the connection ended; zero:
	// not.
	At, Until time.Time
}

// Properties are MQTT 5 properties under the names that rules know.
type Properties struct {
	List []Property
	User [][2]string // in the order received
}

// Property is one that has a number, or a text if it is not empty.
type Property struct {
	Name   string
	Number uint32
	Text   string
}

func (p *Properties) value() value {
	o := &object{}
	for _, l := range p.List {
		if l.Text != "" {
			o.set(l.Name, str(l.Text))
		} else {
			o.set(l.Name, integer(int64(l.Number)))
		}
	}
	setUserProperties(o, p.User)
	return objectOf(o)
}

// eventColumn is one column of an event.
type eventColumn struct {
	name string
	of   func(*Event) value
}

// Columns that more than one event has.
var (
	colClientID = eventColumn{"clientid", func(e *Event) value { return str(e.ClientID) }}
	colUsername = eventColumn{"username", func(e *Event) value {
		if !e.HasUsername {
			return value{}
		}
		return str(e.Username)
	}}
	colPeerName = eventColumn{"peername", func(e *Event) value { return optional(e.PeerName) }}
	colPeerHost = eventColumn{"peerhost", func(e *Event) value {
		host, _, err := net.SplitHostPort(e.PeerName)
		if err != nil {
			host = e.PeerName
		}
		return optional(host)
	}}
	colReason    = eventColumn{"reason", func(e *Event) value { return optional(e.Reason) }}
	colTopic     = eventColumn{"topic", func(e *Event) value { return str(e.Topic) }}
	colQoS       = eventColumn{"qos", func(e *Event) value { return integer(int64(e.QoS)) }}
	colAttrs     = eventColumn{"client_attrs", func(*Event) value { return objectOf(&object{}) }}
	colEvent     = eventColumn{"event", func(e *Event) value { return str(e.Kind.String()) }}
	colTimestamp = eventColumn{"timestamp", func(e *Event) value { return integer(e.Timestamp.UnixMilli()) }}
	colNode      = eventColumn{"node", func(e *Event) value { return str(e.Node) }}

	colSockName = ofConnection("sockname", func(c *Connection) value { return optional(c.SockName) })
	colProtoN   = ofConnection("proto_name", func(c *Connection) value { return str(c.ProtoName) })
	colProtoV   = ofConnection("proto_ver", func(c *Connection) value { return integer(int64(c.ProtoVer)) })
	colKeep     = ofConnection("keepalive", func(c *Connection) value { return integer(int64(c.Keepalive)) })
	colClean    = ofConnection("clean_start", func(c *Connection) value { return boolean(c.CleanStart) })
	colExpiry   = ofConnection("expiry_interval", func(c *Connection) value { return integer(int64(c.Expiry)) })
	colSince    = ofConnection("connected_at", func(c *Connection) value { return milliseconds(c.At) })
	colUntil    = ofConnection("disconnected_at", func(c *Connection) value { return milliseconds(c.Until) })
)

func ofConnection(name string, of func(*Connection) value) eventColumn {
	return eventColumn{name, func(e *Event) value {
		if e.Connection == nil {
			return value{}
		}
		return of(e.Connection)
	}}
}

// ofMessage is a column of the message that was dropped, under a name of its own.
func ofMessage(name, column string) eventColumn {
	return eventColumn{name, func(e *Event) value {
		if e.Message == nil {
			return value{}
		}
		return e.Message.column(column)
	}}
}

// colMessageID is undefined if the message is not known as its publisher has sent it.
var colMessageID = eventColumn{"id", func(e *Event) value {
	if e.Message == nil {
		return value{}
	}
	return optional(e.Message.ID)
}}

func properties(name string) eventColumn {
	return eventColumn{name, func(e *Event) value { return e.Properties.value() }}
}

func constant(name string, v value) eventColumn {
	return eventColumn{name, func(*Event) value { return v }}
}

// milliseconds is undefined for the zero time.
func milliseconds(t time.Time) value {
	if t.IsZero() {
		return value{}
	}
	return integer(t.UnixMilli())
}

// columnsOfKind are the columns of each kind, in the order of *.
var columnsOfKind = [EventKinds][]eventColumn{
	ClientConnected: {
		colClientID, colUsername, constant("mountpoint", value{}), colPeerName, colSockName, colProtoN, colProtoV,
		colKeep, colClean, colExpiry, constant("is_bridge", boolean(false)), properties("conn_props"), colSince, colAttrs,
		colEvent, colTimestamp, colNode,
	},
	ClientDisconnected: {
		colReason, colClientID, colUsername, colPeerName, colSockName, colProtoN, colProtoV, properties("disconn_props"), colSince, colUntil, colAttrs,
		colEvent, colTimestamp, colNode,
	},
	ClientConnack: {
		{"reason_code", func(e *Event) value { return optional(e.Reason) }}, colClientID, colUsername, colPeerName, colSockName, colProtoN, colProtoV,
		colKeep, colClean, colExpiry, colSince, properties("conn_props"),
		colEvent, colTimestamp, colNode,
	},
	SessionSubscribed: {
		colClientID, colUsername, colPeerHost, colPeerName, colTopic, colQoS, properties("sub_props"), colAttrs,
		colEvent, colTimestamp, colNode,
	},
	SessionUnsubscribed: {
		colClientID, colUsername, colPeerHost, colPeerName, colTopic, colQoS, properties("unsub_props"), colAttrs,
		colEvent, colTimestamp, colNode,
	},
	MessageDropped: {
		colReason, colMessageID, colClientID, colUsername, ofMessage("payload", "payload"), ofMessage("peerhost", "peerhost"),
		ofMessage("peername", "peername"), ofMessage("topic", "topic"), ofMessage("qos", "qos"), ofMessage("flags", "flags"),
		ofMessage("pub_props", "pub_props"), ofMessage("publish_received_at", "publish_received_at"), colAttrs,
		colEvent, colTimestamp, colNode,
	},
	DeliveryDropped: {
		colReason, colMessageID, ofMessage("from_clientid", "clientid"), ofMessage("from_username", "username"), colClientID, colUsername,
		ofMessage("payload", "payload"), ofMessage("peerhost", "peerhost"), ofMessage("peername", "peername"), ofMessage("topic", "topic"),
		ofMessage("qos", "qos"), ofMessage("flags", "flags"), ofMessage("pub_props", "pub_props"), ofMessage("publish_received_at", "publish_received_at"),
		colEvent, colTimestamp, colNode,
	},
	AuthzChecked: {
		colClientID, colUsername, colPeerHost, colPeerName, colTopic, {"action", func(e *Event) value { return optional(e.Action) }},
		{"authz_source", func(e *Event) value { return optional(e.Source) }}, {"result", func(e *Event) value { return optional(e.Result) }}, colAttrs,
		colEvent, colTimestamp, colNode,
	},
}

func (e *Event) column(name string) value {
	for _, c := range columnsOfKind[e.Kind] {
		if c.name == name {
			return c.of(e)
		}
	}
	switch name {
	case "trace_id":
		return optional(e.TraceID)
	case "sw8":
		return optional(e.SW8)
	}
	return value{}
}

func (e *Event) each(fn func(string, value)) {
	for _, c := range columnsOfKind[e.Kind] {
		if v := c.of(e); v.defined() {
			fn(c.name, v)
		}
	}
}

func (e *Event) payload() []byte {
	if e.Message == nil {
		return nil
	}
	return e.Message.Payload
}

// EventCandidates are the enabled rules that select from events of the kind,
// sorted by name. It costs nothing. The caller must not change the slice.
func (s *Set) EventCandidates(k EventKind) []*Rule { return s.byEvent[k] }

func rulesByEvent(enabled []*Rule) (by [EventKinds][]*Rule) {
	for _, r := range enabled {
		r.events.each(func(k EventKind) { by[k] = append(by[k], r) })
	}
	return by
}

// fromEvent adds the events of one name of the FROM clause, which begins with
// $events/.
func (c *compiler) fromEvent(s source) {
	if s.name == "$events/message_publish" {
		c.fail(s.span, "unknown-event", `name the topic instead: FROM "fleet/#"`, "%s cannot be selected from", quote(s.name))
		return
	}
	if wrong := checkFilter(s.name); wrong != "" {
		c.fail(s.span, "bad-topic-filter", "", "%s: %s", quote(s.name), wrong)
		return
	}
	kinds, known := eventsOf(s.name)
	switch {
	case kinds != 0:
		c.events |= kinds
	case known:
		c.fail(s.span, "unsupported-source", "see docs/rules.md#events for those that there are", "event %s is not supported", quote(s.name))
	default:
		hint := didYouMean(s.name, suggestableEvents())
		if hint == "" {
			hint = "see docs/rules.md#events for those that there are"
		}
		c.fail(s.span, "unknown-event", hint, "unknown event %s", quote(s.name))
	}
}

// columns are all names that resolve for some source of the FROM clause.
func (p *program) columns() []string {
	if p.events == 0 {
		return knownColumns // also for a clause that has no valid source
	}
	names := []string{"metadata", "trace_id", "sw8"}
	if len(p.filters) > 0 {
		names = slices.Clone(knownColumns)
	}
	p.events.each(func(k EventKind) { names = append(names, k.Columns()...) })
	slices.Sort(names)
	return slices.Compact(names)
}

// eventAsked is the event that a request of Eval has, as a kind; false if it is a
// publish.
func eventAsked(columns *object) (k EventKind, isEvent bool, err error) {
	name := columns.lookup("event")
	switch {
	case !name.defined(), name.kind == kindString && name.s == "message.publish":
		return 0, false, nil
	case name.kind != kindString:
		return 0, false, fmt.Errorf("the event's name must be a string")
	}
	if k, isEvent = parseEvent(name.s); isEvent {
		columns.set("event", str(k.String()))
		return k, true, nil
	}
	known := suggestableEvents()
	for _, n := range eventNames {
		known = append(known, n.column)
	}
	err = fmt.Errorf("unknown event %s", quote(name.s))
	if s := Suggest(name.s, known); s != "" {
		err = fmt.Errorf("%w: did you mean %s?", err, s)
	}
	return 0, false, err
}
