package guard

// Properties that another rule asks about.
const (
	propSubscriptionIdentifier = 11
	propAuthenticationMethod   = 21
	propAuthenticationData     = 22
	propTopicAlias             = 35
	propUser                   = 38
)

// form says how the value of a property is read, and which values there are.
type form uint8

const (
	formNone form = iota // no such property
	formSwitch
	formFormat // payload format indicator
	formUint16
	formUint16Positive
	formUint32
	formUint32Positive
	formNumberPositive // variable byte integer
	formAlias
	formText
	formTopic
	formBinary
	formPair
)

// property is a row of table 2-4 of MQTT 5.
type property struct {
	name string
	form form
	in   uint16 // a bit for each packet type that may have it and that clients send; inWill too
}

const (
	ofPackets = 1<<typeConnect | 1<<inWill | 1<<typePublish | ofAcks | 1<<typeSubscribe | 1<<typeUnsubscribe | 1<<typeDisconnect | 1<<typeAuth
	ofAcks    = 1<<typePuback | 1<<typePubrec | 1<<typePubrel | 1<<typePubcomp
	ofMessage = 1<<typePublish | 1<<inWill
)

// known has the properties by their identifiers. Those that only servers send are not in it, but for
// the server reference: no clause keeps a client from sending that in DISCONNECT.
var known = [43]property{
	1:                          {"payload format indicator", formFormat, ofMessage},
	2:                          {"message expiry interval", formUint32, ofMessage},
	3:                          {"content type", formText, ofMessage}, // [MQTT-3.3.2-19]
	8:                          {"response topic", formTopic, ofMessage},
	9:                          {"correlation data", formBinary, ofMessage},
	propSubscriptionIdentifier: {"subscription identifier", formNumberPositive, 1<<typeSubscribe | 1<<typePublish},
	17:                         {"session expiry interval", formUint32, 1<<typeConnect | 1<<typeDisconnect},
	propAuthenticationMethod:   {"authentication method", formText, 1<<typeConnect | 1<<typeAuth},
	propAuthenticationData:     {"authentication data", formBinary, 1<<typeConnect | 1<<typeAuth},
	23:                         {"request problem information", formSwitch, 1 << typeConnect},
	24:                         {"will delay interval", formUint32, 1 << inWill},
	25:                         {"request response information", formSwitch, 1 << typeConnect},
	28:                         {"server reference", formText, 1 << typeDisconnect},
	31:                         {"reason string", formText, ofAcks | 1<<typeDisconnect | 1<<typeAuth},
	33:                         {"receive maximum", formUint16Positive, 1 << typeConnect},
	34:                         {"topic alias maximum", formUint16, 1 << typeConnect},
	propTopicAlias:             {"topic alias", formAlias, 1 << typePublish},
	propUser:                   {"user property", formPair, ofPackets}, // [MQTT-1.5.7-1]
	39:                         {"maximum packet size", formUint32Positive, 1 << typeConnect},
}

// properties is what another rule asks about them.
type properties struct {
	seen  uint64 // a bit for each identifier
	alias uint16
	utf8  bool // the payload format indicator is 1
}

func (p *properties) has(id byte) bool { return p.seen&(1<<id) != 0 }

// properties reads the property length and the properties of a packet of that type, or of a will.
func (r *fields) properties(kind byte) properties {
	var p properties
	list := fields{kind: r.kind}
	list.rest = r.take(r.shortest("property length"), "properties")
	for len(list.rest) > 0 {
		list.property(kind, &p)
	}
	if list.bad != nil && r.bad == nil {
		r.bad, r.rest = list.bad, nil
	}
	return p
}

func (r *fields) property(kind byte, p *properties) {
	// The identifier is a variable byte integer, but none needs a second byte (2.2.2.2).
	id := r.byte("property identifier")
	if int(id) >= len(known) || known[id].in&(1<<kind) == 0 {
		r.malformed("property 0x%02x is not for this packet", id) // 2.2.2.2
		return
	}
	k := &known[id]
	if kind == typePublish && id == propSubscriptionIdentifier {
		r.protocolError("subscription identifier in a client's PUBLISH") // [MQTT-3.3.4-6]
		return
	}
	if id != propUser && p.has(id) {
		r.protocolError("%s is there twice", k.name) // 2.2.2.2 leaves it to each property's section, and all have it
		return
	}
	p.seen |= 1 << id
	switch k.form {
	case formSwitch, formFormat:
		v := r.byte(k.name)
		if v > 1 {
			r.protocolError("%s is %d, want 0 or 1", k.name, v) // 3.1.2.11.6, 3.1.2.11.7, 3.3.2.3.2
		}
		p.utf8 = p.utf8 || k.form == formFormat && v == 1
	case formUint16, formUint16Positive, formAlias:
		v := r.uint16(k.name)
		if v == 0 && k.form == formUint16Positive {
			r.protocolError("%s is 0", k.name) // 3.1.2.11.3
		}
		if k.form == formAlias {
			p.alias = v
		}
	case formUint32, formUint32Positive:
		if v := r.uint32(k.name); v == 0 && k.form == formUint32Positive {
			r.protocolError("%s is 0", k.name) // 3.1.2.11.4
		}
	case formNumberPositive:
		if r.shortest(k.name) == 0 {
			r.protocolError("%s is 0", k.name) // 3.8.2.1.2
		}
	case formText:
		r.text(k.name)
	case formTopic:
		r.topic(k.name) // [MQTT-3.3.2-13] [MQTT-3.3.2-14]
	case formBinary:
		r.binary(k.name)
	case formPair:
		r.text("name of a user property")
		r.text("value of a user property")
	}
}
