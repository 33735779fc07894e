package guard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"unicode/utf8"
)

// The packet types that clients send, as the fixed header's upper four bits hold them (MQTT 5,
// 2.1.2), beside those in frames.go and out.go.
const (
	typePublish     = 3
	typePubrel      = 6
	typePubcomp     = 7
	typeSubscribe   = 8
	typeUnsubscribe = 10
	typePingreq     = 12
	typeDisconnect  = 14
	typeAuth        = 15

	// inWill stands for the will's properties where a packet type is asked for: no packet has type 0.
	inWill = 0
)

// Inspect returns nil if a client that speaks the protocol level version, 3 to 5, may send the
// frame, and else a *FrameError. It wants the frame whole, its fixed header included. For
// version 0 that is a CONNECT packet, whatever its own level. Topic aliases pass up to the largest. Connections have inspectors of their
// own: this one is for tests of what a decoder makes of what they let through.
func Inspect(version byte, frame []byte) error {
	in := inspector{version: version, aliasMax: math.MaxUint16}
	if err := in.inspect(frame); err != nil {
		return err
	}
	return nil
}

// inspector checks what is inside the frames of one connection, in their order. A frame that passes
// has all its fields inside it, and nothing else. What it does not check: which topic aliases, packet
// identifiers and authentication exchanges are open (it remembers nothing but the version), the
// syntax of topic filters, and who may do what.
//
// Tags name the clauses of MQTT 5, also where MQTT 3.1.1 has the same rule under another number.
type inspector struct {
	version  byte   // protocol level from CONNECT: 3 (MQTT 3.1), 4 (3.1.1) or 5; 0 before, and after one that there is not
	aliasMax uint16 // Topic Alias Maximum that was announced to the client
}

// inspect returns nil if the frame, whole and with its fixed header, is well formed. It learns the
// version from CONNECT, also from one that it refuses if that can be told. It neither keeps nor changes
// the frame, and doesn't allocate unless it refuses.
func (in *inspector) inspect(frame []byte) *FrameError {
	r := fields{rest: frame}
	header := r.byte("fixed header")
	r.kind = header >> 4
	remaining := r.number("remaining length")
	if remaining != len(r.rest) {
		r.malformed("remaining length is %d, but %d bytes follow", remaining, len(r.rest))
	}
	if r.bad != nil {
		return r.bad
	}
	if in.version == 0 && r.kind != typeConnect {
		return &FrameError{Reason: NotConnect, Code: codeProtocolError, Type: r.kind} // [MQTT-3.1.0-1]
	}
	if fromClients&(1<<r.kind) == 0 {
		return &FrameError{Reason: PacketType, Code: codeProtocolError, Type: r.kind}
	}
	r.flags(header & 0x0f)
	switch r.kind {
	case typeConnect:
		in.connect(&r)
	case typePublish:
		in.publish(&r, header>>1&3)
	case typePuback, typePubrec, typePubrel, typePubcomp:
		in.ack(&r)
	case typeSubscribe:
		in.subscribe(&r)
	case typeUnsubscribe:
		in.unsubscribe(&r)
	case typePingreq:
		r.end()
	case typeDisconnect:
		in.disconnect(&r)
	case typeAuth:
		in.auth(&r)
	}
	// MQTT 3.1.1 says nothing of padded lengths; clients that reserve four bytes for them are about.
	if in.version == 5 && len(frame) != 1+sizeOf(remaining)+remaining {
		r.malformed("remaining length %d has %d bytes, want %d",
			remaining, len(frame)-remaining-1, sizeOf(remaining)) // [MQTT-1.5.5-1]
	}
	return r.bad
}

// flags checks the lower four bits of the first byte [MQTT-2.1.3-1].
func (r *fields) flags(flags byte) {
	var want byte
	switch r.kind {
	case typePublish:
		if flags>>1&3 == 3 {
			r.malformed("QoS is 3, want 0 to 2") // [MQTT-3.3.1-4]
		}
		if flags>>1&3 == 0 && flags&8 != 0 {
			r.protocolError("DUP is set with QoS 0") // [MQTT-3.3.1-2]
		}
		return
	case typePubrel, typeSubscribe, typeUnsubscribe:
		want = 2 // [MQTT-3.6.1-1] [MQTT-3.8.1-1] [MQTT-3.10.1-1]
	}
	if flags != want {
		r.malformed("flags are %04b, want %04b", flags, want) // [MQTT-3.14.1-1] [MQTT-3.15.1-1]
	}
}

func (in *inspector) connect(r *fields) {
	if in.version != 0 {
		r.protocolError("second CONNECT") // [MQTT-3.1.0-2]
		return
	}
	name := r.binary("protocol name")
	level := r.byte("protocol level")
	if r.bad != nil {
		return
	}
	switch {
	case string(name) == "MQTT" && (level == 4 || level == 5), string(name) == "MQIsdp" && level == 3:
		in.version = level
	default:
		return // what follows can't be known; the server answers it [MQTT-3.1.2-1] [MQTT-3.1.2-2]
	}

	flags := r.byte("connect flags")
	will, willQoS, willRetain := flags&4 != 0, flags>>3&3, flags&0x20 != 0
	password, user := flags&0x40 != 0, flags&0x80 != 0
	if flags&1 != 0 {
		r.malformed("reserved connect flag is set") // [MQTT-3.1.2-3]
	}
	if will && willQoS == 3 {
		r.malformed("QoS of the will is 3, want 0 to 2") // [MQTT-3.1.2-12]
	}
	if !will && in.version > 3 && (willQoS != 0 || willRetain) { // MQTT 3.1 has them ignored then
		r.protocolError("QoS or retain of a will is set without a will") // [MQTT-3.1.2-11] [MQTT-3.1.2-13]
	}
	if password && !user && in.version < 5 {
		r.protocolError("password without user name") // 3.1.1: [MQTT-3.1.2-22]
	}
	r.uint16("keep alive")
	if in.version == 5 {
		p := r.properties(typeConnect)
		if p.has(propAuthenticationData) && !p.has(propAuthenticationMethod) {
			r.protocolError("authentication data without authentication method") // 3.1.2.11.10
		}
	}
	r.text("client identifier") // [MQTT-3.1.3-3] [MQTT-3.1.3-4]
	if will {                   // [MQTT-3.1.2-9]
		var p properties
		if in.version == 5 {
			p = r.properties(inWill)
		}
		if topic := r.topic("topic of the will"); len(topic) == 0 { // [MQTT-3.1.3-11]
			r.protocolError("topic of the will is empty") // [MQTT-4.7.3-1]
		}
		r.format(p, r.binary("payload of the will"))
	}
	if user {
		r.text("user name") // [MQTT-3.1.2-17] [MQTT-3.1.3-12]
	}
	if password {
		r.binary("password") // [MQTT-3.1.2-19]
	}
	r.end() // [MQTT-3.1.2-16] [MQTT-3.1.2-18]
}

func (in *inspector) publish(r *fields, qos byte) {
	topic := r.topic("topic name") // [MQTT-3.3.2-1]
	if qos > 0 {
		r.packetIdentifier() // [MQTT-2.2.1-3]
	}
	var p properties
	if in.version == 5 {
		p = r.properties(typePublish)
		if p.has(propTopicAlias) && (p.alias == 0 || p.alias > in.aliasMax) {
			r.fail(ProtocolError, codeTopicAlias, "topic alias is %d, want 1 to %d", p.alias, in.aliasMax) // [MQTT-3.3.2-8] [MQTT-3.3.2-9]
		}
	}
	if len(topic) == 0 && !p.has(propTopicAlias) {
		r.protocolError("topic name is empty and there is no topic alias") // [MQTT-4.7.3-1], 3.3.2.1
	}
	r.format(p, r.rest)
}

// ack reads PUBACK, PUBREC, PUBREL or PUBCOMP. They are of one form.
func (in *inspector) ack(r *fields) {
	r.packetIdentifier()
	if in.version == 5 && len(r.rest) > 0 {
		r.reasonCode() // [MQTT-3.4.2-1] [MQTT-3.5.2-1] [MQTT-3.6.2-1] [MQTT-3.7.2-1]
		if len(r.rest) > 0 {
			r.properties(r.kind)
		}
	}
	r.end()
}

func (in *inspector) subscribe(r *fields) {
	r.packetIdentifier() // [MQTT-2.2.1-3]
	if in.version == 5 {
		r.properties(typeSubscribe)
	}
	if len(r.rest) == 0 {
		r.protocolError("there is no topic filter") // [MQTT-3.8.3-2]
	}
	for len(r.rest) > 0 {
		filter := r.filter() // [MQTT-3.8.3-1]
		options := r.byte("subscription options")
		switch {
		case in.version < 5 && options > 2: // 3.1.1: [MQTT-3-8.3-4]
			r.malformed("requested QoS is 0x%02x, want 0 to 2", options)
		case in.version < 5:
		case options&0xc0 != 0:
			r.malformed("subscription options are 0x%02x, want the upper two bits zero", options) // [MQTT-3.8.3-5]
		case options&3 == 3:
			r.protocolError("maximum QoS is 3, want 0 to 2") // 3.8.3.1
		case options&0x30 == 0x30:
			r.protocolError("retain handling is 3, want 0 to 2") // 3.8.3.1
		case options&4 != 0 && bytes.HasPrefix(filter, []byte("$share/")):
			r.protocolError("no local is set on a shared subscription") // [MQTT-3.8.3-4]
		}
	}
}

func (in *inspector) unsubscribe(r *fields) {
	r.packetIdentifier() // [MQTT-2.2.1-3]
	if in.version == 5 {
		r.properties(typeUnsubscribe)
	}
	if len(r.rest) == 0 {
		r.protocolError("there is no topic filter") // [MQTT-3.10.3-2]
	}
	for len(r.rest) > 0 {
		r.filter() // [MQTT-3.10.3-1]
	}
}

func (in *inspector) disconnect(r *fields) {
	if in.version == 5 && len(r.rest) > 0 {
		r.reasonCode() // [MQTT-3.14.2-1]
		if len(r.rest) > 0 {
			r.properties(typeDisconnect)
		}
	}
	r.end()
}

func (in *inspector) auth(r *fields) {
	if in.version != 5 {
		r.protocolError("AUTH is not in the client's version of MQTT")
		return
	}
	if len(r.rest) == 0 {
		r.protocolError("reason code is left out, want 0x18 or 0x19") // it means success, which only servers send
		return
	}
	r.reasonCode() // [MQTT-3.15.2-1]
	if p := r.properties(typeAuth); !p.has(propAuthenticationMethod) {
		r.protocolError("there is no authentication method") // 3.15.2.2.2
	}
	r.end()
}

// mayReport reports whether a client may send the reason code in a packet of that type (MQTT 5,
// tables 3-4 to 3-9, 3-13 and 3-15).
func mayReport(kind, code byte) bool {
	switch kind {
	case typePuback, typePubrec:
		switch code {
		case 0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99: // 0x10 is for servers, but harmless
			return true
		}
	case typePubrel, typePubcomp:
		return code == 0x00 || code == 0x92
	case typeDisconnect:
		switch code {
		case 0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99:
			return true
		}
	case typeAuth:
		return code == 0x18 || code == 0x19
	}
	return false
}

// fields reads a packet field by field. After the first that is wrong nothing is left to read,
// what is read is zero, and what fails from then on changes nothing: bad stays the first.
type fields struct {
	rest []byte // what has not been read
	kind byte   // packet type
	bad  *FrameError
}

func (r *fields) malformed(format string, args ...any) {
	r.fail(Malformed, codeMalformed, format, args...)
}

func (r *fields) protocolError(format string, args ...any) {
	r.fail(ProtocolError, codeProtocolError, format, args...)
}

func (r *fields) fail(reason Reason, code byte, format string, args ...any) {
	if r.bad == nil {
		r.bad = &FrameError{Reason: reason, Code: code, Type: r.kind, Detail: fmt.Sprintf(format, args...)}
	}
	r.rest = nil
}

// take reads n bytes.
func (r *fields) take(n int, what string) []byte {
	if n > len(r.rest) {
		r.malformed("%s: want %d bytes, found %d", what, n, len(r.rest))
		return nil
	}
	p := r.rest[:n]
	r.rest = r.rest[n:]
	return p
}

func (r *fields) byte(what string) byte {
	if p := r.take(1, what); p != nil {
		return p[0]
	}
	return 0
}

func (r *fields) uint16(what string) uint16 {
	if p := r.take(2, what); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (r *fields) uint32(what string) uint32 {
	if p := r.take(4, what); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// number reads a variable byte integer (MQTT 5, 1.5.5), perhaps a padded one.
func (r *fields) number(what string) int {
	n := 0
	for i := range 4 {
		if i == len(r.rest) {
			r.malformed("%s ends after %d bytes", what, i)
			return 0
		}
		b := r.rest[i]
		n |= int(b&0x7f) << (7 * i)
		if b < 0x80 {
			r.rest = r.rest[i+1:]
			return n
		}
	}
	r.malformed("%s has more than four bytes", what)
	return 0
}

// shortest reads a variable byte integer in its shortest form.
func (r *fields) shortest(what string) int {
	before := len(r.rest)
	n := r.number(what)
	if used := before - len(r.rest); used != sizeOf(n) {
		r.malformed("%s %d has %d bytes, want %d", what, n, used, sizeOf(n)) // [MQTT-1.5.5-1]
	}
	return n
}

// sizeOf is how many bytes the variable byte integer n needs.
func sizeOf(n int) int {
	switch {
	case n < 1<<7:
		return 1
	case n < 1<<14:
		return 2
	case n < 1<<21:
		return 3
	}
	return 4
}

// binary reads binary data (MQTT 5, 1.5.6).
func (r *fields) binary(what string) []byte {
	return r.take(int(r.uint16(what)), what)
}

// text reads a UTF-8 encoded string. Control characters pass: the standard leaves them to the receiver.
func (r *fields) text(what string) []byte {
	s := r.binary(what)
	if plain(s) {
		return s
	}
	if !utf8.Valid(s) {
		r.malformed("%s is not valid UTF-8", what) // [MQTT-1.5.4-1]
	}
	if bytes.IndexByte(s, 0) >= 0 {
		r.malformed("%s has a U+0000", what) // [MQTT-1.5.4-2]
	}
	return s
}

// plain reports whether s is short, ASCII and without U+0000. It is for speed: most strings are, and
// most of the time went to the calls that the others need.
func plain(s []byte) bool {
	if len(s) > 32 {
		return false
	}
	for _, b := range s {
		if b-1 > 0x7e { // 0 wraps around
			return false
		}
	}
	return true
}

// topic reads a topic name. An empty one passes.
func (r *fields) topic(what string) []byte {
	s := r.text(what)
	if bytes.IndexByte(s, '#') >= 0 || bytes.IndexByte(s, '+') >= 0 {
		r.protocolError("%s has a wildcard", what) // [MQTT-3.3.2-2] [MQTT-4.7.1-1]
	}
	r.levels(s, what, codeTopicName)
	return s
}

// filter reads a topic filter. Its syntax is the server's to look at: it answers in a SUBACK.
func (r *fields) filter() []byte {
	s := r.text("topic filter")
	r.levels(s, "topic filter", codeTopicFilter)
	return s
}

func (r *fields) levels(s []byte, what string, code byte) {
	if len(s) <= MaxTopicLevels-1 {
		return // for speed
	}
	if n := bytes.Count(s, []byte{'/'}) + 1; n > MaxTopicLevels {
		r.fail(ProtocolError, code, "%s has %d levels, at most %d are allowed", what, n, MaxTopicLevels)
	}
}

func (r *fields) packetIdentifier() {
	if r.uint16("packet identifier") == 0 {
		r.protocolError("packet identifier is 0, want 1 to 65535")
	}
}

func (r *fields) reasonCode() {
	if code := r.byte("reason code"); !mayReport(r.kind, code) {
		r.protocolError("reason code is 0x%02x, which a client can't send here", code)
	}
}

// format checks a payload whose payload format indicator says UTF-8. U+0000 may be in it.
func (r *fields) format(p properties, payload []byte) {
	if p.utf8 && !utf8.Valid(payload) {
		r.fail(Malformed, codePayloadFormat, "payload is not valid UTF-8, as its payload format indicator says") // 3.3.2.3.2, 3.1.3.2.3
	}
}

func (r *fields) end() {
	if n := len(r.rest); n > 0 {
		r.malformed("%d bytes are left after the last field", n)
	}
}
