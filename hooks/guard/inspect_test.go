package guard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

// aliases is the Topic Alias Maximum of these tests.
const aliases = 10

// packet is a frame with that first byte, around what the parts say.
func packet(first byte, parts ...string) []byte {
	body := strings.Join(parts, "")
	return append(append([]byte{first}, number(len(body))...), body...)
}

func number(n int) string {
	var p []byte
	for ; n >= 0x80; n >>= 7 {
		p = append(p, byte(n)|0x80)
	}
	return string(append(p, byte(n)))
}

func str(s string) string { return string(binary.BigEndian.AppendUint16(nil, uint16(len(s)))) + s }

func props(parts ...string) string {
	list := strings.Join(parts, "")
	return number(len(list)) + list
}

const (
	v31  = "\x00\x06MQIsdp\x03"
	v311 = "\x00\x04MQTT\x04"
	v5   = "\x00\x04MQTT\x05"
	id1  = "\x00\x01"
	keep = "\x00\x3c"
	user = "\x26\x00\x01k\x00\x01v"
	none = "\x00" // no properties
)

var longest = strings.Repeat("x", 65535)

type inspected struct {
	name    string
	version byte
	frame   []byte
}

// passing has valid frames of every type and version, and the corners of what is valid.
var passing = []inspected{
	{"connect 3.1", 0, packet(0x10, v31, "\x02", keep, str("c"))},
	{"connect 3.1, what a will has without a will", 0, packet(0x10, v31, "\x3a", keep, str("c"))},
	{"connect 3.1, will, user, password", 0, packet(0x10, v31, "\xf6", keep, str("c"), str("t"), str("gone"), str("u"), str("p"))},
	{"connect 3.1.1", 0, packet(0x10, v311, "\x02", keep, str("c"))},
	{"connect 3.1.1, not clean", 0, packet(0x10, v311, "\x00", keep, str("c"))},
	{"connect 3.1.1, no client identifier", 0, packet(0x10, v311, "\x02", keep, str(""))},
	{"connect 3.1.1, no client identifier and not clean", 0, packet(0x10, v311, "\x00", keep, str(""))},
	{"connect 3.1.1, padded length", 0, append([]byte{0x10, 0x8d, 0x80, 0x80, 0x00}, v311+"\x02"+keep+str("c")...)},
	{"connect 3.1.1, user", 0, packet(0x10, v311, "\x82", keep, str("c"), str("u"))},
	{"connect 3.1.1, empty user and password", 0, packet(0x10, v311, "\xc2", keep, str("c"), str(""), str(""))},
	{"connect 3.1.1, password of any bytes", 0, packet(0x10, v311, "\xc2", keep, str("c"), str("u"), str("\x00\xff"))},
	{"connect 3.1.1, will", 0, packet(0x10, v311, "\x06", keep, str("c"), str("t"), str("gone"))},
	{"connect 3.1.1, empty will", 0, packet(0x10, v311, "\x06", keep, str("c"), str("t"), str(""))},
	{"connect 3.1.1, will of any bytes, QoS 2, retain", 0, packet(0x10, v311, "\x36", keep, str("c"), str("t"), str("\xff\x00"))},
	{"connect 3.1.1, longest fields", 0, packet(0x10, v311, "\xc6", keep, str(longest), str(longest), str(longest), str(longest), str(longest))},
	{"connect 5", 0, packet(0x10, v5, "\x02", keep, none, str("c"))},
	{"connect 5, no client identifier", 0, packet(0x10, v5, "\x02", keep, none, str(""))},
	{"connect 5, password alone", 0, packet(0x10, v5, "\x42", keep, none, str("c"), str("p"))},
	{"connect 5, every property", 0, packet(0x10, v5, "\x02", keep, props("\x11\xff\xff\xff\xff", "\x21\x00\x01", "\x27\x00\x00\x00\x01",
		"\x22\x00\x00", "\x19\x00", "\x17\x01", user, user, "\x15", str("m"), "\x16", str("\x00\xff")), str("c"))},
	{"connect 5, empty authentication method and data", 0, packet(0x10, v5, "\x02", keep, props("\x16\x00\x00", "\x15\x00\x00"), str("c"))},
	{"connect 5, authentication method without data", 0, packet(0x10, v5, "\x02", keep, props("\x15", str("m")), str("c"))},
	{"connect 5, zeros that are allowed", 0, packet(0x10, v5, "\x02", "\x00\x00", props("\x11\x00\x00\x00\x00", "\x17\x00"), str("c"))},
	{"connect 5, will without properties", 0, packet(0x10, v5, "\x06", keep, none, str("c"), none, str("t"), str("gone"))},
	{"connect 5, empty will", 0, packet(0x10, v5, "\x06", keep, none, str("c"), none, str("t"), str(""))},
	{"connect 5, every property of a will", 0, packet(0x10, v5, "\xf6", keep, none, str("c"), props("\x18\x00\x00\x00\x00", "\x01\x01",
		"\x02\x00\x00\x00\x00", "\x03", str("text"), "\x08", str("r"), "\x09", str(""), user, user), str("t"), str("grüße\x00"), str("u"), str("p"))},
	{"connect 5, will of any bytes", 0, packet(0x10, v5, "\x06", keep, none, str("c"), props("\x01\x00"), str("t"), str("\xff"))},
	{"connect of an unknown protocol", 0, packet(0x10, str("MQTT5"), "\x05")},
	{"connect of an unknown level", 0, packet(0x10, str("MQTT"), "\x06", "\xff\xff")},
	{"connect of level 3 under the name of 4", 0, packet(0x10, str("MQTT"), "\x03", "\x02", keep, str("c"))},
	{"connect of level 4 under the name of 3", 0, packet(0x10, str("MQIsdp"), "\x04", "\x02", keep, str("c"))},
	{"connect of a bridge", 0, packet(0x10, str("MQTT"), "\x84", "\x02", keep, str("c"))},

	{"publish 3.1", 3, packet(0x30, str("t"), "x")},
	{"publish, retain", 4, packet(0x31, str("t"), "x")},
	{"publish, QoS 1", 4, packet(0x32, str("t"), id1, "x")},
	{"publish, QoS 1, dup", 4, packet(0x3a, str("t"), id1, "x")},
	{"publish, QoS 2, dup, retain", 4, packet(0x3d, str("t"), id1, "x")},
	{"publish, no payload", 4, packet(0x30, str("t"))},
	{"publish, QoS 1, no payload", 4, packet(0x32, str("t"), "\xff\xff")},
	{"publish, any bytes", 4, packet(0x30, str("t"), "\xff\x00")},
	{"publish, longest topic", 4, packet(0x30, str(longest))},
	{"publish, topic of odd characters", 4, packet(0x30, str("/ /\u0001\ufeff\uffff\U0010ffff"))},
	{"publish, padded length", 4, append([]byte{0x30, 0x83, 0x00}, str("t")...)},
	{"publish 5", 5, packet(0x30, str("t"), none)},
	{"publish 5, payload", 5, packet(0x33, str("t"), id1, none, "x")},
	{"publish 5, every property", 5, packet(0x32, str("t"), id1, props("\x01\x01", "\x02\x00\x00\x00\x00", "\x23\x00\x0a", "\x08", str("r"), "\x09", str("\xff"),
		user, user, "\x26\x00\x00\x00\x00", "\x03", str("")), "grüße\x00")},
	{"publish 5, alias alone", 5, packet(0x30, str(""), props("\x23\x00\x01"), "x")},
	{"publish 5, alias and topic", 5, packet(0x30, str("t"), props("\x23\x00\x01"), "x")},
	{"publish 5, bytes", 5, packet(0x30, str("t"), props("\x01\x00"), "\xff")},
	{"publish 5, no payload but text", 5, packet(0x30, str("t"), props("\x01\x01"))},
	{"publish 5, longest fields", 5, packet(0x30, str(longest), props("\x03", str(longest), "\x08", str(longest), "\x09", str(longest), "\x26", str(longest), str(longest)), longest)},
	{"publish 5, empty response topic and correlation data", 5, packet(0x30, str("t"), props("\x08", str(""), "\x09", str("")))},

	{"puback 3.1", 3, packet(0x40, id1)},
	{"puback", 4, packet(0x40, id1)},
	{"pubrec", 4, packet(0x50, id1)},
	{"pubrel", 4, packet(0x62, id1)},
	{"pubcomp", 4, packet(0x70, id1)},
	{"puback 5", 5, packet(0x40, id1)},
	{"puback 5, reason code", 5, packet(0x40, id1, "\x10")},
	{"puback 5, no properties", 5, packet(0x40, id1, "\x99", none)},
	{"puback 5, properties", 5, packet(0x40, id1, "\x00", props("\x1f", str("why"), user, user))},
	{"pubrec 5", 5, packet(0x50, id1)},
	{"pubrec 5, reason code", 5, packet(0x50, id1, "\x97")},
	{"pubrec 5, properties", 5, packet(0x50, id1, "\x91", props("\x1f", str("")))},
	{"pubrel 5", 5, packet(0x62, id1)},
	{"pubrel 5, reason code", 5, packet(0x62, id1, "\x92")},
	{"pubrel 5, properties", 5, packet(0x62, id1, "\x00", props(user))},
	{"pubcomp 5", 5, packet(0x70, id1)},
	{"pubcomp 5, reason code", 5, packet(0x70, id1, "\x92")},
	{"pubcomp 5, properties", 5, packet(0x70, id1, "\x00", props(user, "\x1f", str("x")))},

	{"subscribe 3.1", 3, packet(0x82, id1, str("a/#"), "\x01")},
	{"subscribe", 4, packet(0x82, id1, str("a/+"), "\x00", str("b"), "\x01", str("#"), "\x02")},
	{"subscribe, filter that the server refuses", 4, packet(0x82, id1, str("#/a"), "\x00", str(""), "\x00")},
	{"subscribe 5", 5, packet(0x82, id1, none, str("a/#"), "\x2e", str("b"), "\x1d")},
	{"subscribe 5, properties", 5, packet(0x82, id1, props("\x0b\xff\xff\xff\x7f", user, user), str("a"), "\x00")},
	{"subscribe 5, smallest identifier", 5, packet(0x82, id1, props("\x0b\x01"), str("a"), "\x00")},
	{"subscribe 5, shared", 5, packet(0x82, id1, none, str("$share/g/a"), "\x02")},
	{"subscribe 5, no local on what isn't shared", 5, packet(0x82, id1, none, str("$share"), "\x04", str("$shared/g/a"), "\x04")},
	{"subscribe 5, longest filter", 5, packet(0x82, id1, none, str(longest), "\x00")},
	{"unsubscribe 3.1", 3, packet(0xa2, id1, str("a"))},
	{"unsubscribe", 4, packet(0xa2, id1, str("a"), str("b/#"))},
	{"unsubscribe 5", 5, packet(0xa2, id1, none, str("a"))},
	{"unsubscribe 5, properties", 5, packet(0xa2, id1, props(user, user), str("a"), str("b"))},

	{"pingreq 3.1", 3, packet(0xc0)},
	{"pingreq", 4, packet(0xc0)},
	{"pingreq, padded length", 4, []byte{0xc0, 0x80, 0x80, 0x00}},
	{"pingreq 5", 5, packet(0xc0)},
	{"disconnect 3.1", 3, packet(0xe0)},
	{"disconnect", 4, packet(0xe0)},
	{"disconnect 5", 5, packet(0xe0)},
	{"disconnect 5, reason code", 5, packet(0xe0, "\x04")},
	{"disconnect 5, no properties", 5, packet(0xe0, "\x00", none)},
	{"disconnect 5, properties", 5, packet(0xe0, "\x04", props("\x11\x00\x00\x00\x00", "\x1f", str("x"), user, user, "\x1c", str("other")))},
	{"auth", 5, packet(0xf0, "\x18", props("\x15", str("m"), "\x16", str("\x00"), "\x1f", str("x"), user, user))},
	{"auth, without data", 5, packet(0xf0, "\x19", props("\x15", str("m")))},
}

func TestInspectPasses(t *testing.T) {
	for _, c := range passing {
		t.Run(c.name, func(t *testing.T) {
			before := bytes.Clone(c.frame)
			in := inspector{version: c.version, aliasMax: aliases}
			if err := in.inspect(c.frame); err != nil {
				t.Errorf("refused: %v", err)
			}
			if !bytes.Equal(before, c.frame) {
				t.Error("frame was changed")
			}
			if err := Inspect(c.version, c.frame); err != nil {
				t.Errorf("Inspect refused: %v", err)
			}
			if n := testing.AllocsPerRun(10, func() {
				again := inspector{version: c.version, aliasMax: aliases}
				again.inspect(c.frame)
			}); n != 0 {
				t.Errorf("%v allocations, want none", n)
			}
		})
	}
}

func TestInspectRefuses(t *testing.T) {
	type refusal struct {
		inspected
		reason Reason
		code   byte
	}
	var cases []refusal
	bad := func(name string, version byte, frame []byte, reason Reason, code byte) {
		cases = append(cases, refusal{inspected{name, version, frame}, reason, code})
	}
	malformed := func(name string, version byte, frame []byte) { bad(name, version, frame, Malformed, 0x81) }
	protocol := func(name string, version byte, frame []byte) { bad(name, version, frame, ProtocolError, 0x82) }
	both := func(f func(string, byte, []byte), name string, v3, v5 []byte) {
		f(name, 4, v3)
		f(name+", 5", 5, v5)
	}

	malformed("nothing", 4, nil)
	malformed("type alone", 4, []byte{0xc0})
	malformed("length cut off", 4, []byte{0x30, 0x80})
	malformed("length of five bytes", 4, []byte{0x30, 0x80, 0x80, 0x80, 0x80, 0x00})
	malformed("body cut off", 4, []byte{0x30, 4, 0, 1, 't'})
	malformed("body too long", 4, []byte{0x30, 3, 0, 1, 't', 'x'})
	malformed("padded length, 5", 5, []byte{0xc0, 0x80, 0x00})
	malformed("padded length of connect, 5", 0, append([]byte{0x10, 0x8e, 0x00}, v5+"\x02"+keep+none+str("c")...))
	bad("type 0", 4, packet(0x00), PacketType, 0x82)
	bad("connack", 4, packet(0x20, "\x00\x00"), PacketType, 0x82)
	bad("suback", 4, packet(0x90, id1, "\x00"), PacketType, 0x82)
	bad("unsuback", 5, packet(0xb0, id1, none, "\x00"), PacketType, 0x82)
	bad("pingresp", 5, packet(0xd0), PacketType, 0x82)
	bad("first packet is a publish", 0, packet(0x30, str("t")), NotConnect, 0x82)
	bad("first packet has type 0", 0, packet(0x00), NotConnect, 0x82)
	protocol("auth, 3.1", 3, packet(0xf0))
	protocol("auth, 3.1.1", 4, packet(0xf0, "\x18", props("\x15", str("m"))))
	for _, first := range []byte{0x11, 0x12, 0x14, 0x18} {
		malformed("flags of connect", 0, packet(first, v311, "\x02", keep, str("c")))
	}
	for _, first := range []byte{0x41, 0x42, 0x51, 0x58, 0x60, 0x63, 0x66, 0x6a, 0x72} {
		malformed("flags of an acknowledgement", 4, packet(first, id1))
	}
	for _, first := range []byte{0x80, 0x83, 0x86, 0x8a} {
		both(malformed, "flags of subscribe", packet(first, id1, str("a"), "\x00"), packet(first, id1, none, str("a"), "\x00"))
	}
	for _, first := range []byte{0xa0, 0xa3, 0xa6, 0xaa} {
		both(malformed, "flags of unsubscribe", packet(first, id1, str("a")), packet(first, id1, none, str("a")))
	}
	for _, first := range []byte{0xc1, 0xc2, 0xe1, 0xe8} {
		both(malformed, "flags of pingreq or disconnect", packet(first), packet(first))
	}
	malformed("flags of auth", 5, packet(0xf2, "\x18", props("\x15", str("m"))))
	both(malformed, "QoS 3", packet(0x36, str("t"), id1), packet(0x36, str("t"), id1, none))
	both(protocol, "dup with QoS 0", packet(0x38, str("t")), packet(0x38, str("t"), none))

	both(protocol, "second connect", packet(0x10, v311, "\x02", keep, str("c")), packet(0x10, v5, "\x02", keep, none, str("c")))
	malformed("connect, no level", 0, packet(0x10, str("MQTT")))
	malformed("connect, name cut off", 0, packet(0x10, "\x00\x05MQTT"))
	malformed("connect, empty", 0, packet(0x10))
	malformed("connect, reserved flag", 0, packet(0x10, v311, "\x03", keep, str("c")))
	malformed("connect, will of QoS 3", 0, packet(0x10, v311, "\x1e", keep, str("c"), str("t"), str("x")))
	protocol("connect, QoS without will", 0, packet(0x10, v311, "\x0a", keep, str("c")))
	protocol("connect, retain without will", 0, packet(0x10, v5, "\x22", keep, none, str("c")))
	protocol("connect 3.1, password without user", 0, packet(0x10, v31, "\x42", keep, str("c"), str("p")))
	protocol("connect 3.1.1, password without user", 0, packet(0x10, v311, "\x42", keep, str("c"), str("p")))
	malformed("connect, no client identifier field", 0, packet(0x10, v311, "\x02", keep))
	malformed("connect, client identifier not UTF-8", 0, packet(0x10, v311, "\x02", keep, str("\xff")))
	malformed("connect, client identifier with U+0000", 0, packet(0x10, v311, "\x02", keep, str("\x00")))
	malformed("connect, no will", 0, packet(0x10, v311, "\x06", keep, str("c")))
	malformed("connect, no will payload", 0, packet(0x10, v311, "\x06", keep, str("c"), str("t")))
	protocol("connect, topic of the will empty", 0, packet(0x10, v311, "\x06", keep, str("c"), str(""), str("x")))
	protocol("connect, topic of the will with a wildcard", 0, packet(0x10, v311, "\x06", keep, str("c"), str("a/#"), str("x")))
	malformed("connect, no user", 0, packet(0x10, v311, "\x82", keep, str("c")))
	malformed("connect, user not UTF-8", 0, packet(0x10, v311, "\x82", keep, str("c"), str("\xff")))
	malformed("connect, no password", 0, packet(0x10, v311, "\xc2", keep, str("c"), str("u")))
	malformed("connect, byte too many", 0, packet(0x10, v311, "\x02", keep, str("c"), "x"))
	malformed("connect, user without its flag", 0, packet(0x10, v5, "\x02", keep, none, str("c"), str("u")))
	malformed("connect 5, no properties field", 0, packet(0x10, v5, "\x02", keep))
	malformed("connect 5, no properties of the will", 0, packet(0x10, v5, "\x06", keep, none, str("c")))
	bad("connect 5, will not UTF-8", 0, packet(0x10, v5, "\x06", keep, none, str("c"), props("\x01\x01"), str("t"), str("\xff")), Malformed, 0x99)
	for name, p := range map[string]string{
		"authentication data without method": props("\x16", str("x")),
		"receive maximum 0":                  props("\x21\x00\x00"),
		"maximum packet size 0":              props("\x27\x00\x00\x00\x00"),
		"request problem information 2":      props("\x17\x02"),
		"request response information 2":     props("\x19\x02"),
		"session expiry twice":               props("\x11\x00\x00\x00\x00", "\x11\x00\x00\x00\x00"),
		"receive maximum twice":              props("\x21\x00\x01", "\x21\x00\x01"),
		"alias maximum twice":                props("\x22\x00\x00", "\x22\x00\x00"),
		"authentication method twice":        props("\x15", str("m"), "\x15", str("m")),
		"authentication data twice":          props("\x15", str("m"), "\x16", str(""), "\x16", str("")),
	} {
		protocol("connect 5, "+name, 0, packet(0x10, v5, "\x02", keep, p, str("c")))
	}
	for name, p := range map[string]string{
		"property of a will":        props("\x18\x00\x00\x00\x00"),
		"property of publish":       props("\x23\x00\x01"),
		"property of connack":       props("\x12", str("c")),
		"property unknown":          props("\x00"),
		"property beyond the table": props("\x2b"),
		"property of two bytes":     props("\xa6\x00\x00\x00\x00\x00"),
		"property cut off":          props("\x11\x00\x00"),
		"length cut off":            "\x80",
		"length beyond the frame":   "\x09",
		"length of five bytes":      "\x80\x80\x80\x80\x00",
		"padded length":             "\x80\x00",
	} {
		malformed("connect 5, "+name, 0, packet(0x10, v5, "\x02", keep, p, str("c")))
	}

	both(malformed, "publish, empty", packet(0x30), packet(0x30))
	both(malformed, "publish, topic cut off", packet(0x30, "\x00\x02t"), packet(0x30, "\x00\x02t"))
	both(malformed, "publish, topic not UTF-8", packet(0x30, str("\xed\xa0\x80")), packet(0x30, str("\xc0\x80"), none))
	both(malformed, "publish, topic with U+0000", packet(0x30, str("t\x00")), packet(0x30, str("\x00"), none))
	both(protocol, "publish, topic with #", packet(0x30, str("t/#")), packet(0x30, str("#"), none))
	both(protocol, "publish, topic with +", packet(0x30, str("t/+")), packet(0x30, str("+"), none))
	both(protocol, "publish, empty topic", packet(0x30, str("")), packet(0x30, str(""), none))
	both(malformed, "publish, no identifier", packet(0x32, str("t")), packet(0x32, str("t")))
	both(malformed, "publish, half an identifier", packet(0x32, str("t"), "\x00"), packet(0x32, str("t"), "\x01"))
	both(protocol, "publish, identifier 0", packet(0x32, str("t"), "\x00\x00"), packet(0x34, str("t"), "\x00\x00", none))
	malformed("publish 5, no properties field", 5, packet(0x30, str("t")))
	malformed("publish 5, properties beyond the frame", 5, packet(0x30, str("t"), "\x0a", user))
	malformed("publish 5, property reaches into the payload", 5, packet(0x30, str("t"), props("\x03\x00\x05te"), "xtra"))
	malformed("publish 5, property of connect", 5, packet(0x30, str("t"), props("\x11\x00\x00\x00\x01")))
	malformed("publish 5, reason string", 5, packet(0x30, str("t"), props("\x1f", str("x"))))
	malformed("publish 5, name of a user property not UTF-8", 5, packet(0x30, str("t"), props("\x26", str("\xff"), str(""))))
	malformed("publish 5, value of a user property with U+0000", 5, packet(0x30, str("t"), props("\x26", str(""), str("\x00"))))
	malformed("publish 5, user property without value", 5, packet(0x30, str("t"), props("\x26", str("k"))))
	bad("publish 5, alias 0", 5, packet(0x30, str("t"), props("\x23\x00\x00")), ProtocolError, 0x94)
	bad("publish 5, alias 0 and no topic", 5, packet(0x30, str(""), props("\x23\x00\x00")), ProtocolError, 0x94)
	bad("publish 5, alias beyond the maximum", 5, packet(0x30, str("t"), props("\x23\x00\x0b")), ProtocolError, 0x94)
	bad("publish 5, payload not UTF-8", 5, packet(0x30, str("t"), props("\x01\x01"), "\xff"), Malformed, 0x99)
	for name, p := range map[string]string{
		"subscription identifier":      props("\x0b\x01"),
		"payload format 2":             props("\x01\x02"),
		"payload format twice":         props("\x01\x01", "\x01\x00"),
		"expiry twice":                 props("\x02\x00\x00\x00\x01", "\x02\x00\x00\x00\x01"),
		"alias twice":                  props("\x23\x00\x01", "\x23\x00\x01"),
		"content type twice":           props("\x03", str(""), "\x03", str("")),
		"response topic twice":         props("\x08", str("r"), "\x08", str("r")),
		"response topic with wildcard": props("\x08", str("r/+")),
		"correlation data twice":       props("\x09", str(""), "\x09", str("")),
	} {
		protocol("publish 5, "+name, 5, packet(0x30, str("t"), p))
	}

	for _, first := range []byte{0x40, 0x50, 0x62, 0x70} {
		name := fmt.Sprintf("type %d, ", first>>4)
		both(malformed, name+"empty", packet(first), packet(first))
		both(malformed, name+"half an identifier", packet(first, "\x01"), packet(first, "\x01"))
		both(protocol, name+"identifier 0", packet(first, "\x00\x00"), packet(first, "\x00\x00"))
		malformed(name+"reason code in 3.1", 3, packet(first, id1, "\x00"))
		malformed(name+"reason code in 3.1.1", 4, packet(first, id1, "\x00"))
		protocol(name+"reason code of another packet", 5, packet(first, id1, "\x8e"))
		malformed(name+"properties cut off", 5, packet(first, id1, "\x00\x01"))
		malformed(name+"byte too many", 5, packet(first, id1, "\x00", none, "x"))
		malformed(name+"property of publish", 5, packet(first, id1, "\x00", props("\x01\x00")))
		protocol(name+"reason string twice", 5, packet(first, id1, "\x00", props("\x1f", str("x"), "\x1f", str("x"))))
	}
	protocol("puback 5, reason code of pubrel", 5, packet(0x40, id1, "\x92"))
	protocol("pubrel 5, reason code of puback", 5, packet(0x62, id1, "\x10"))

	both(malformed, "subscribe, empty", packet(0x82), packet(0x82))
	both(protocol, "subscribe, identifier 0", packet(0x82, "\x00\x00", str("a"), "\x00"), packet(0x82, "\x00\x00", none, str("a"), "\x00"))
	both(protocol, "subscribe, no filter", packet(0x82, id1), packet(0x82, id1, none))
	both(malformed, "subscribe, no options", packet(0x82, id1, str("abc")), packet(0x82, id1, none, str("a")))
	both(malformed, "subscribe, second filter cut off", packet(0x82, id1, str("a"), "\x00", "\x00"), packet(0x82, id1, none, str("a"), "\x00", "\x00\x02b"))
	both(malformed, "subscribe, filter not UTF-8", packet(0x82, id1, str("\xff"), "\x00"), packet(0x82, id1, none, str("\xff"), "\x00"))
	both(malformed, "subscribe, filter with U+0000", packet(0x82, id1, str("\x00"), "\x00"), packet(0x82, id1, none, str("\x00"), "\x00"))
	malformed("subscribe, QoS 3", 4, packet(0x82, id1, str("a"), "\x03"))
	malformed("subscribe, option of MQTT 5", 4, packet(0x82, id1, str("a"), "\x04"))
	malformed("subscribe, reserved option", 4, packet(0x82, id1, str("a"), "\x80"))
	protocol("subscribe 5, QoS 3", 5, packet(0x82, id1, none, str("a"), "\x03"))
	protocol("subscribe 5, retain handling 3", 5, packet(0x82, id1, none, str("a"), "\x30"))
	malformed("subscribe 5, reserved option", 5, packet(0x82, id1, none, str("a"), "\x40"))
	malformed("subscribe 5, other reserved option, second filter", 5, packet(0x82, id1, none, str("a"), "\x00", str("a"), "\x80"))
	protocol("subscribe 5, no local on a shared one", 5, packet(0x82, id1, none, str("$share/g/a"), "\x04"))
	malformed("subscribe 5, no properties field", 5, packet(0x82, id1))
	protocol("subscribe 5, subscription identifier 0", 5, packet(0x82, id1, props("\x0b\x00"), str("a"), "\x00"))
	protocol("subscribe 5, subscription identifier twice", 5, packet(0x82, id1, props("\x0b\x01", "\x0b\x02"), str("a"), "\x00"))
	malformed("subscribe 5, subscription identifier of five bytes", 5, packet(0x82, id1, props("\x0b\xff\xff\xff\xff\x01"), str("a"), "\x00"))
	malformed("subscribe 5, padded subscription identifier", 5, packet(0x82, id1, props("\x0b\x81\x00"), str("a"), "\x00"))
	malformed("subscribe 5, subscription identifier cut off", 5, packet(0x82, id1, props("\x0b\x81"), str("a"), "\x00"))
	malformed("subscribe 5, reason string", 5, packet(0x82, id1, props("\x1f", str("x")), str("a"), "\x00"))
	malformed("subscribe 5, last options missing", 5, []byte{0x82, 6, 0, 1, 0, 0, 1, 'a'})

	both(malformed, "unsubscribe, empty", packet(0xa2), packet(0xa2))
	both(protocol, "unsubscribe, identifier 0", packet(0xa2, "\x00\x00", str("a")), packet(0xa2, "\x00\x00", none, str("a")))
	both(protocol, "unsubscribe, no filter", packet(0xa2, id1), packet(0xa2, id1, none))
	both(malformed, "unsubscribe, filter cut off", packet(0xa2, id1, "\x00\x02a"), packet(0xa2, id1, none, "\x00\x02a"))
	both(malformed, "unsubscribe, filter not UTF-8", packet(0xa2, id1, str("\xff")), packet(0xa2, id1, none, str("\xff")))
	malformed("unsubscribe 5, property of subscribe", 5, packet(0xa2, id1, props("\x0b\x01"), str("a")))

	both(malformed, "pingreq, a byte", packet(0xc0, "x"), packet(0xc0, "\x00"))
	malformed("disconnect, reason code", 4, packet(0xe0, "\x00"))
	malformed("disconnect 3.1, reason code", 3, packet(0xe0, "\x00"))
	protocol("disconnect 5, reason code of servers", 5, packet(0xe0, "\x8d"))
	malformed("disconnect 5, properties cut off", 5, packet(0xe0, "\x00\x01"))
	malformed("disconnect 5, byte too many", 5, packet(0xe0, "\x00", none, "x"))
	malformed("disconnect 5, property of connect", 5, packet(0xe0, "\x00", props("\x21\x00\x01")))
	protocol("disconnect 5, session expiry twice", 5, packet(0xe0, "\x00", props("\x11\x00\x00\x00\x01", "\x11\x00\x00\x00\x01")))
	protocol("auth, no reason code", 5, packet(0xf0))
	protocol("auth, success", 5, packet(0xf0, "\x00", props("\x15", str("m"))))
	malformed("auth, no properties field", 5, packet(0xf0, "\x18"))
	protocol("auth, no method", 5, packet(0xf0, "\x18", none))
	malformed("auth, byte too many", 5, packet(0xf0, "\x18", props("\x15", str("m")), "x"))

	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			before := bytes.Clone(c.frame)
			in := inspector{version: c.version, aliasMax: aliases}
			err := in.inspect(c.frame)
			if err == nil {
				t.Fatalf("passed: %x", c.frame)
			}
			if err.Reason != c.reason || err.Code != c.code {
				t.Errorf("refused as %s, 0x%02x, want %s, 0x%02x: %v", err.Reason, err.Code, c.reason, c.code, err)
			}
			if len(c.frame) > 0 && err.Type != c.frame[0]>>4 {
				t.Errorf("type is %d", err.Type)
			}
			if listed := c.reason == Malformed || c.reason == ProtocolError; listed != (err.Detail != "") || !strings.Contains(err.Error(), err.Detail) {
				t.Errorf("detail is %q, error %q", err.Detail, err)
			}
			if strings.ContainsAny(err.Error(), "%\n") {
				t.Errorf("error has a formatting fault: %q", err)
			}
			if !bytes.Equal(before, c.frame) {
				t.Error("frame was changed")
			}
		})
	}
}

func TestInspectLearnsTheVersion(t *testing.T) {
	for _, c := range []struct {
		name    string
		connect []byte
		want    byte
	}{
		{"3.1", packet(0x10, v31, "\x02", keep, str("c")), 3},
		{"3.1.1", packet(0x10, v311, "\x02", keep, str("c")), 4},
		{"5", packet(0x10, v5, "\x02", keep, none, str("c")), 5},
		{"5, refused", packet(0x10, v5, "\x03", keep, none, str("c")), 5},
		{"unknown", packet(0x10, str("MQTT"), "\x06"), 0},
	} {
		in := inspector{aliasMax: aliases}
		in.inspect(c.connect)
		if in.version != c.want {
			t.Errorf("%s: version is %d, want %d", c.name, in.version, c.want)
		}
	}
}

func TestInspectReadsNumbers(t *testing.T) {
	for _, n := range []int{1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 268_435_455} {
		in := inspector{version: 5, aliasMax: aliases}
		if err := in.inspect(packet(0x82, id1, props("\x0b"+number(n)), str("a"), "\x00")); err != nil {
			t.Errorf("subscription identifier %d: %v", n, err)
		}
	}
}

// Every value of every byte of the fields that are sets of bits or codes.
func TestInspectTriesEveryByte(t *testing.T) {
	for _, c := range []struct {
		name    string
		version byte
		frame   func(b string) []byte
		pass    string
	}{
		{"options 3.1.1", 4, func(b string) []byte { return packet(0x82, id1, str("a"), b) }, "\x00\x01\x02"},
		{"options 5", 5, func(b string) []byte { return packet(0x82, id1, none, str("a"), b) },
			"\x00\x01\x02\x04\x05\x06\x08\x09\x0a\x0c\x0d\x0e\x10\x11\x12\x14\x15\x16\x18\x19\x1a\x1c\x1d\x1e\x20\x21\x22\x24\x25\x26\x28\x29\x2a\x2c\x2d\x2e"},
		{"puback", 5, func(b string) []byte { return packet(0x40, id1, b) }, "\x00\x10\x80\x83\x87\x90\x91\x97\x99"},
		{"pubrec", 5, func(b string) []byte { return packet(0x50, id1, b, none) }, "\x00\x10\x80\x83\x87\x90\x91\x97\x99"},
		{"pubrel", 5, func(b string) []byte { return packet(0x62, id1, b) }, "\x00\x92"},
		{"pubcomp", 5, func(b string) []byte { return packet(0x70, id1, b, none) }, "\x00\x92"},
		{"disconnect", 5, func(b string) []byte { return packet(0xe0, b) }, "\x00\x04\x80\x81\x82\x83\x90\x93\x94\x95\x96\x97\x98\x99"},
		{"auth", 5, func(b string) []byte { return packet(0xf0, b, props("\x15", str("m"))) }, "\x18\x19"},
		{"first byte of ping or disconnect", 4, func(b string) []byte { return packet(b[0]) }, "\xc0\xe0"},
		{"first byte of publish", 4, func(b string) []byte { return packet(b[0]&0x0f|0x30, str("t"), id1) },
			"\x00\x01\x02\x03\x04\x05\x0a\x0b\x0c\x0d"},
	} {
		for b := range 256 {
			in := inspector{version: c.version, aliasMax: aliases}
			err := in.inspect(c.frame(string([]byte{byte(b)})))
			want := strings.IndexByte(c.pass, byte(b)) >= 0
			if c.name == "first byte of publish" {
				want = strings.IndexByte(c.pass, byte(b)&0x0f) >= 0
			}
			if (err == nil) != want {
				t.Errorf("%s, 0x%02x: %v", c.name, b, err)
			}
		}
	}
}

// read is a packet read by the book, with nothing that keeps it inside: it panics where a field is not.
func read(version byte, frame []byte) (left int) {
	at := 0
	b := func() int { at++; return int(frame[at-1]) }
	u16 := func() int { return b()<<8 + b() }
	vbi := func() int {
		for n, m := 0, 1; ; m *= 128 {
			x := b()
			n += x % 128 * m
			if x < 128 {
				return n
			}
			if m > 128*128 {
				panic("five bytes")
			}
		}
	}
	str := func() string { n := u16(); at += n; return string(frame[at-n : at]) }
	text := func() {
		if s := str(); !utf8.ValidString(s) || strings.Contains(s, "\x00") {
			panic("not UTF-8")
		}
	}
	properties := func() {
		end := vbi()
		for end += at; at < end; {
			switch id := b(); id {
			case 1, 23, 25:
				b()
			case 33, 34, 35:
				u16()
			case 2, 17, 24, 39:
				u16()
				u16()
			case 11:
				vbi()
			case 9, 22:
				str()
			case 3, 8, 21, 28, 31:
				text()
			case 38:
				text()
				text()
			default:
				panic("property")
			}
		}
		if at != end {
			panic("properties end elsewhere")
		}
	}

	first := b()
	if n := vbi(); n != len(frame)-at {
		panic("remaining length")
	}
	more := func() bool { return at < len(frame) }
	switch first >> 4 {
	case 1:
		name, level := str(), b()
		if v := map[string]int{"MQIsdp3": 3, "MQTT4": 4, "MQTT5": 5}[name+fmt.Sprint(level)]; v == 0 {
			return 0
		}
		flags := b()
		u16()
		if level == 5 {
			properties()
		}
		text()
		if flags&4 != 0 {
			if level == 5 {
				properties()
			}
			text()
			str()
		}
		if flags&128 != 0 {
			text()
		}
		if flags&64 != 0 {
			str()
		}
	case 3:
		text()
		if first&6 != 0 {
			u16()
		}
		if version == 5 {
			properties()
		}
		at = len(frame)
	case 4, 5, 6, 7, 14, 15:
		if first>>4 < 8 {
			u16()
		}
		if version == 5 && more() {
			b()
			if more() {
				properties()
			}
		}
	case 8, 10:
		u16()
		if version == 5 {
			properties()
		}
		for ok := true; ok; ok = more() {
			text()
			if first>>4 == 8 {
				b()
			}
		}
	}
	return len(frame) - at
}

// FuzzInspect: no input panics, the same input has the same answer, and what passes can be read by
// a reader that has no bounds of its own, to the last byte.
func FuzzInspect(f *testing.F) {
	for _, c := range passing {
		if len(c.frame) < 300 {
			f.Add(c.version, c.frame)
		}
	}
	f.Add(byte(5), []byte{0x82, 6, 0, 1, 0, 0, 1, 'a'})
	f.Add(byte(5), packet(0x30, str("t"), "\xff\xff\xff\x7f"))
	f.Add(byte(5), packet(0x82, id1, props("\x0b\xff\xff\xff\xff\x01"), str("a"), "\x00"))
	f.Add(byte(0), packet(0x10, v5, "\xf6", keep, "\x05\x26\x00", str("c")))
	f.Fuzz(func(t *testing.T, version byte, frame []byte) {
		version = [...]byte{0, 3, 4, 5}[version%4]
		inspectTwice(t, version, frame)
		if len(frame) > 1 { // as if the length were right: few mutations leave it so
			inspectTwice(t, version, packet(frame[0], string(frame[2:])))
		}
	})
}

func inspectTwice(t *testing.T, version byte, frame []byte) {
	before := bytes.Clone(frame)
	a, b := inspector{version: version, aliasMax: aliases}, inspector{version: version, aliasMax: aliases}
	err, again := a.inspect(frame), b.inspect(frame)
	if (err == nil) != (again == nil) || err != nil && *err != *again || a != b {
		t.Fatalf("once %v, once %v", err, again)
	}
	if !bytes.Equal(before, frame) {
		t.Fatal("frame was changed")
	}
	if err != nil {
		if err.Code < 0x80 || err.Error() == "" {
			t.Fatalf("code 0x%02x, %q", err.Code, err)
		}
		return
	}
	defer func() {
		if cause := recover(); cause != nil {
			t.Fatalf("%x passed, but reading it: %v", frame, cause)
		}
	}()
	if left := read(version, frame); left != 0 {
		t.Fatalf("%x passed with %d bytes left over", frame, left)
	}
}

// dice makes choices from a fuzzer's bytes; when they are spent, the first choice.
type dice []byte

func (d *dice) roll(n int) int {
	if len(*d) == 0 {
		return 0
	}
	v := int((*d)[0]) % n
	*d = (*d)[1:]
	return v
}

func (d *dice) pick(of ...string) string { return of[d.roll(len(of))] }

func (d *dice) text() string {
	return str(d.pick("", "a", "a/b", "ü", "\u0001", "\ufeff\ufffe", "\U0010ffff", "$SYS/x", strings.Repeat("x", 130), longest))
}

func (d *dice) filter() string { return str(d.pick("#", "", "a/+", "$share/g/a", "a/#/b", "ü+")) }
func (d *dice) bytes() string  { return str(d.pick("", "\x00", "\xff\xfe", "a", longest)) }
func (d *dice) id() string     { return d.pick("\x00\x01", "\x01\x00", "\xff\xff") }

// some takes any of the properties once and in any order, user properties among them.
func (d *dice) some(of ...string) string {
	var list []string
	for range d.roll(len(of) + 3) {
		if len(of) == 0 || d.roll(4) == 0 {
			list = append(list, "\x26"+d.text()+d.text())
			continue
		}
		i := d.roll(len(of))
		list = append(list, of[i])
		of = append(of[:i:i], of[i+1:]...)
	}
	return props(list...)
}

func (d *dice) message() []string {
	return []string{
		"\x01\x00", "\x02" + d.pick("\x00\x00\x00\x00", "\xff\xff\xff\xff"), "\x03" + d.text(),
		"\x08" + str(d.pick("r", "", "a/b")), "\x09" + d.bytes(),
	}
}

// valid is some packet that a client may send, and the version that it is of.
func valid(d *dice) (version byte, frame []byte) {
	version = byte(3 + d.roll(3))
	five := version == 5
	only5 := func(s string) string {
		if five {
			return s
		}
		return ""
	}
	tail := func(codes []byte, of ...string) string {
		if !five || d.roll(3) == 0 {
			return ""
		}
		code := string(codes[d.roll(len(codes)):][:1])
		if d.roll(3) == 0 {
			return code
		}
		return code + d.some(of...)
	}
	reasonString := "\x1f" + d.text()
	switch d.roll(10) {
	case 0:
		qos := d.roll(3)
		first, id := byte(0x30|qos<<1|d.roll(2)), ""
		if qos > 0 {
			first |= byte(d.roll(2) << 3)
			id = d.id()
		}
		topic, p := str(d.pick("t", "/", "ü/x", longest)), ""
		if five {
			of := d.message()
			if d.roll(3) == 0 {
				topic, p = str(""), "\x23\x00\x0a"
			} else {
				of = append(of, "\x23\x00\x01")
			}
			if p != "" {
				list := d.some(of...)
				_, n := binary.Uvarint([]byte(list))
				p = props(p, list[n:])
			} else {
				p = d.some(of...)
			}
		}
		return version, packet(first, topic, id, p, d.pick("", "x", "\xff\x00"))
	case 1, 2:
		codes := []byte{0x00, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99}
		return version, packet(byte(0x40+d.roll(2)*16), d.id(), tail(codes, reasonString))
	case 3:
		return version, packet([]byte{0x62, 0x70}[d.roll(2)], d.id(), tail([]byte{0x00, 0x92}, reasonString))
	case 4:
		filters := ""
		for range d.roll(3) + 1 {
			qos := d.roll(3)
			filters += d.filter()
			if five {
				qos |= d.roll(3)<<4 | d.roll(2)<<3
			}
			filters += string([]byte{byte(qos)})
		}
		return version, packet(0x82, d.id(), only5(d.some("\x0b"+number(d.roll(250)*1_000_000+1))), filters)
	case 5:
		filters := d.filter()
		for range d.roll(3) {
			filters += d.filter()
		}
		return version, packet(0xa2, d.id(), only5(d.some()), filters)
	case 6:
		return version, packet(0xc0)
	case 7:
		codes := []byte{0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99}
		return version, packet(0xe0, tail(codes, "\x11\x00\x00\x00\x01", reasonString))
	case 8:
		if five {
			list := d.some("\x16"+d.bytes(), reasonString)
			_, n := binary.Uvarint([]byte(list))
			return 5, packet(0xf0, d.pick("\x18", "\x19"), props("\x15"+d.text(), list[n:]))
		}
	}
	flags := byte(d.roll(2) << 1)
	will, userName, password := d.roll(2) == 1, d.roll(2) == 1, d.roll(2) == 1
	rest := d.text()
	if will {
		flags |= byte(4 | d.roll(3)<<3 | d.roll(2)<<5)
		if five {
			rest += d.some(append(d.message(), "\x18\x00\x00\x00\x05")...)
		}
		rest += str(d.pick("t", "ü/x")) + d.bytes()
	}
	if userName {
		flags |= 0x80
		rest += d.text()
	}
	if password && (five || userName) {
		flags |= 0x40
		rest += d.bytes()
	}
	name := [...]string{v31, v311, v5}[version-3]
	return 0, packet(0x10, name, string([]byte{flags}), d.pick("\x00\x00", "\xff\xff"), only5(d.some(
		"\x11\x00\x00\x00\x00", "\x21\xff\xff", "\x27\xff\xff\xff\xff", "\x22\xff\xff", "\x19\x01", "\x17\x00", "\x15"+d.text())), rest)
}

// FuzzValidPasses: whatever a client may send passes. Refusing that is the worst an inspector can do.
func FuzzValidPasses(f *testing.F) {
	for i := range 60 {
		f.Add(bytes.Repeat([]byte{byte(i), byte(i * 7), byte(i / 3)}, 20))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		d := dice(in)
		version, frame := valid(&d)
		if err := Inspect(version, frame); err != nil {
			t.Fatalf("version %d: %v: %x", version, err, frame[:min(len(frame), 300)])
		}
		if left := read(version, frame); left != 0 {
			t.Fatalf("the test's own frame has %d bytes left", left)
		}
	})
}

func BenchmarkInspect(b *testing.B) {
	for _, c := range []struct {
		name    string
		version byte
		frame   []byte
	}{
		{"publish 3.1.1", 4, packet(0x32, str("fleet/v42/telemetry"), id1, strings.Repeat("x", 35))},
		{"publish 5, two user properties", 5, packet(0x32, str("fleet/v42/tel"), id1, props("\x26", str("sw8"), str("1-a-b"), "\x26", str("k"), str("v")), strings.Repeat("x", 20))},
		{"puback 3.1.1", 4, packet(0x40, id1)},
		{"publish 5, 64 KiB of text", 5, packet(0x32, str("t"), id1, props("\x01\x01"), longest)},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			in := inspector{version: c.version, aliasMax: aliases}
			for b.Loop() {
				if err := in.inspect(c.frame); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(int64(len(c.frame)))
		})
	}
}
