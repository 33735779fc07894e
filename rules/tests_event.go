package rules

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// event reads an event: its name, and its columns under their own names, save that
// those of a message are named as in a publish.
func (f *testFile) event(t *Test, n *yaml.Node) {
	e := &Event{ClientID: testClientID, Node: testNode, Connection: &Connection{ProtoName: "MQTT", ProtoVer: 5}}
	var ok bool
	if e.Kind, ok = f.kind(n); !ok {
		return
	}
	known := []field{{"event", func(_, _ *yaml.Node) {}}}
	for _, c := range append(f.eventFields(e), f.connectionFields(e.Connection)...) {
		if slices.Contains(e.Kind.Columns(), c.name) || c.name == "trace_id" || c.name == "sw8" {
			known = append(known, c)
		}
	}
	what := "event " + e.Kind.String()
	if e.Kind == MessageDropped || e.Kind == DeliveryDropped {
		e.Message = &Message{ClientID: testClientID, ID: testID}
		f.message(n, what, e.Message, append(known,
			field{"topic", func(_, n *yaml.Node) { e.Message.Topic, _ = f.text(n, "topic") }},
			field{"from_clientid", func(_, n *yaml.Node) { e.Message.ClientID, _ = f.text(n, "from_clientid") }},
			field{"from_username", func(_, n *yaml.Node) { e.Message.Username, e.Message.HasUsername = f.text(n, "from_username") }},
			field{"publish_received_at", func(_, n *yaml.Node) { f.time(n, "publish_received_at", &e.Message.Timestamp) }},
		)...)
	} else {
		f.fields(n, what, append(known,
			field{"topic", func(_, n *yaml.Node) { e.Topic, _ = f.text(n, "topic") }},
			field{"qos", func(_, n *yaml.Node) { f.small(n, "qos", 2, &e.QoS) }},
			field{"peername", func(_, n *yaml.Node) { e.PeerName, _ = f.text(n, "peername") }},
			field{"peerhost", func(_, n *yaml.Node) { e.PeerName, _ = f.text(n, "peerhost") }},
		)...)
	}
	t.origin = e
	t.cands = func(s *Set) []*Rule { return s.EventCandidates(e.Kind) }
}

// kind is the event that the mapping n names.
func (f *testFile) kind(n *yaml.Node) (EventKind, bool) {
	if n.Kind != yaml.MappingNode {
		f.fail(n, "wrong-type", "", "event must be a mapping of keys, found %s", describeNode(n))
		return 0, false
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value != "event" {
			continue
		}
		name := n.Content[i+1]
		k, ok := parseEvent(name.Value)
		if !ok {
			known := suggestableEvents()
			for _, n := range eventNames {
				known = append(known, n.column)
			}
			f.fail(name, "unknown-event", didYouMean(name.Value, known), "unknown event %s", describeNode(name))
		}
		return k, ok
	}
	f.fail(n, "missing-key", "such as client.connected", "an event needs its name as %s", quote("event"))
	return 0, false
}

func (f *testFile) small(n *yaml.Node, what string, high int, into *byte) {
	var i int
	f.int(n, what, 0, high, &i)
	*into = byte(i)
}

// eventFields are the columns that an event has of itself.
func (f *testFile) eventFields(e *Event) []field {
	text := func(name string, into *string) field {
		return field{name, func(_, n *yaml.Node) { *into, _ = f.text(n, name) }}
	}
	properties := func(name string) field {
		return field{name, func(_, n *yaml.Node) { f.properties(n, name, &e.Properties) }}
	}
	return []field{
		text("clientid", &e.ClientID),
		{"username", func(_, n *yaml.Node) { e.Username, e.HasUsername = f.text(n, "username") }},
		text("reason", &e.Reason),
		text("reason_code", &e.Reason),
		text("action", &e.Action),
		text("authz_source", &e.Source),
		text("result", &e.Result),
		text("node", &e.Node),
		text("trace_id", &e.TraceID),
		text("sw8", &e.SW8),
		properties("conn_props"),
		properties("disconn_props"),
		properties("sub_props"),
		properties("unsub_props"),
		{"timestamp", func(_, n *yaml.Node) { f.time(n, "timestamp", &e.Timestamp) }},
	}
}

func (f *testFile) connectionFields(c *Connection) []field {
	number := func(n *yaml.Node, what string, high int) int {
		i := 0
		f.int(n, what, 0, high, &i)
		return i
	}
	return []field{
		{"sockname", func(_, n *yaml.Node) { c.SockName, _ = f.text(n, "sockname") }},
		{"proto_name", func(_, n *yaml.Node) { c.ProtoName, _ = f.text(n, "proto_name") }},
		{"proto_ver", func(_, n *yaml.Node) { f.small(n, "proto_ver", 5, &c.ProtoVer) }},
		{"keepalive", func(_, n *yaml.Node) { c.Keepalive = uint16(number(n, "keepalive", 1<<16-1)) }},
		{"clean_start", func(_, n *yaml.Node) { f.bool(n, "clean_start", &c.CleanStart) }},
		{"expiry_interval", func(_, n *yaml.Node) { c.Expiry = uint32(number(n, "expiry_interval", 1<<32-1)) }},
		{"connected_at", func(_, n *yaml.Node) { f.time(n, "connected_at", &c.At) }},
		{"disconnected_at", func(_, n *yaml.Node) { f.time(n, "disconnected_at", &c.Until) }},
	}
}

func (f *testFile) properties(n *yaml.Node, what string, p *Properties) {
	f.mapping(n, what, func(key, val *yaml.Node) {
		switch v := f.value(val, 0); {
		case key.Value == "User-Property" && v.kind == kindObject:
			for _, m := range v.object().members {
				p.User = append(p.User, [2]string{m.key, m.val.text()})
			}
		case v.kind == kindInt && v.int() >= 0 && v.int() < 1<<32:
			p.List = append(p.List, Property{Name: key.Value, Number: uint32(v.int())})
		case v.kind == kindString && v.s != "" && !strings.HasPrefix(key.Value, "User-Property"):
			p.List = append(p.List, Property{Name: key.Value, Text: v.s})
		default:
			f.fail(val, "wrong-value", "", "no MQTT property: %s", describeNode(val))
		}
	})
}
