package rules

import "time"

// Message is one PUBLISH as rules see it. The payload must not change while the
// message is matched.
type Message struct {
	ID          string
	ClientID    string
	Username    string
	HasUsername bool // false: the column username is undefined
	Topic       string
	Payload     []byte
	QoS         byte
	Retain, Dup bool
	Timestamp   time.Time // when the broker received it; zero: that is not known, and the column undefined
	PeerHost    string    // the client's address
	PeerName    string    // the client's address and port
	Node        string

	// MQTT 5 properties. The zero of each but UserProperties is absence.
	UserProperties  [][2]string // in the order received
	ContentType     string
	ResponseTopic   string
	CorrelationData []byte
	MessageExpiry   uint32 // seconds
	PayloadIsUTF8   bool   // payload format indicator 1

	// TraceID and SW8 are those of the EntrySpan. They resolve by name, and are
	// not part of *.
	TraceID, SW8 string
}

// publishColumns are the columns of a publish in the order of *, metadata
// excluded, which is the rule's.
var publishColumns = []string{
	"id", "clientid", "username", "payload", "peerhost", "peername", "topic", "qos", "flags", "pub_props",
	"publish_received_at", "client_attrs", "event", "timestamp", "node",
}

// knownColumns are all names that resolve on a publish.
var knownColumns = append([]string{"metadata", "trace_id", "sw8"}, publishColumns...)

func (m *Message) each(fn func(string, value)) {
	for _, name := range publishColumns {
		if v := m.column(name); v.defined() {
			fn(name, v)
		}
	}
}

func (m *Message) column(name string) value {
	switch name {
	case "id":
		return str(m.ID)
	case "clientid":
		return str(m.ClientID)
	case "username":
		if m.HasUsername {
			return str(m.Username)
		}
	case "payload":
		return payloadValue(m.Payload)
	case "peerhost":
		return optional(m.PeerHost)
	case "peername":
		return optional(m.PeerName)
	case "topic":
		return str(m.Topic)
	case "qos":
		return integer(int64(m.QoS))
	case "flags":
		return objectOf(&object{members: []member{{"dup", boolean(m.Dup)}, {"retain", boolean(m.Retain)}}})
	case "pub_props":
		return objectOf(m.properties())
	case "publish_received_at", "timestamp":
		return milliseconds(m.Timestamp)
	case "client_attrs":
		return objectOf(&object{})
	case "event":
		return str("message.publish")
	case "node":
		return str(m.Node)
	case "trace_id":
		return optional(m.TraceID)
	case "sw8":
		return optional(m.SW8)
	}
	return value{}
}

// optional is undefined for the empty text.
func optional(s string) value {
	if s == "" {
		return value{}
	}
	return str(s)
}

// properties are the MQTT 5 properties under the names that rules know. Of user
// properties with one name the last wins in User-Property; the pairs keep all.
func (m *Message) properties() *object {
	o := &object{}
	if m.PayloadIsUTF8 {
		o.set("Payload-Format-Indicator", integer(1))
	}
	if m.MessageExpiry > 0 {
		o.set("Message-Expiry-Interval", integer(int64(m.MessageExpiry)))
	}
	if m.ContentType != "" {
		o.set("Content-Type", str(m.ContentType))
	}
	if m.ResponseTopic != "" {
		o.set("Response-Topic", str(m.ResponseTopic))
	}
	if len(m.CorrelationData) > 0 {
		o.set("Correlation-Data", str(string(m.CorrelationData)))
	}
	setUserProperties(o, m.UserProperties)
	return o
}

// setUserProperties adds User-Property, and User-Property-Pairs if there are any.
func setUserProperties(o *object, all [][2]string) {
	user, pairs := &object{}, []value{}
	for _, p := range all {
		user.set(p[0], str(p[1]))
		pairs = append(pairs, objectOf(&object{members: []member{{"key", str(p[0])}, {"value", str(p[1])}}}))
	}
	o.set("User-Property", objectOf(user))
	if len(pairs) > 0 {
		o.set("User-Property-Pairs", listOf(pairs))
	}
}
