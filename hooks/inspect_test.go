package hooks_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// These tests hold what the guard lets through against mochi's decoders: what passes must neither
// panic in them, since that panic would be in the broker's process, nor fail.

// decode reads a frame as mochi does when it comes from a client of that version.
func decode(version byte, frame []byte) (pk packets.Packet, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
		}
	}()
	pk.ProtocolVersion = version
	if err := pk.FixedHeader.Decode(frame[0]); err != nil {
		return pk, err
	}
	r := bytes.NewReader(frame[1:])
	if pk.FixedHeader.Remaining, _, err = packets.DecodeLength(r); err != nil {
		return pk, err
	}
	body := bytes.Clone(frame[len(frame)-r.Len():])
	invalid := packets.CodeSuccess
	switch pk.FixedHeader.Type {
	case packets.Connect:
		err = pk.ConnectDecode(body) // what ConnectValidate finds is answered with a CONNACK
	case packets.Publish:
		err = pk.PublishDecode(body)
		invalid = pk.PublishValidate(math.MaxUint16)
	case packets.Puback:
		err = pk.PubackDecode(body)
	case packets.Pubrec:
		err = pk.PubrecDecode(body)
	case packets.Pubrel:
		err = pk.PubrelDecode(body)
	case packets.Pubcomp:
		err = pk.PubcompDecode(body)
	case packets.Subscribe:
		err = pk.SubscribeDecode(body)
		invalid = pk.SubscribeValidate()
	case packets.Unsubscribe:
		err = pk.UnsubscribeDecode(body)
		invalid = pk.UnsubscribeValidate()
	case packets.Pingreq:
		err = pk.PingreqDecode(body)
	case packets.Disconnect:
		err = pk.DisconnectDecode(body)
	case packets.Auth:
		err = pk.AuthDecode(body)
		invalid = pk.AuthValidate()
	default:
		err = fmt.Errorf("a packet of type %d from a client", pk.FixedHeader.Type)
	}
	if err == nil && invalid != packets.CodeSuccess {
		err = invalid
	}
	return pk, err
}

// wantDecodes fails if the guard passes the frame but mochi can't read it. It reports whether the guard passed it.
func wantDecodes(t *testing.T, version byte, frame []byte) bool {
	t.Helper()
	if guard.Inspect(version, frame) != nil {
		return false
	}
	pk, err := decode(version, frame)
	if err == nil {
		return true
	}
	if pk.FixedHeader.Type == packets.Connect && !strings.HasPrefix(err.Error(), "panic") {
		switch fmt.Sprintf("%s %d", pk.Connect.ProtocolName, pk.ProtocolVersion) {
		case "MQIsdp 3", "MQTT 4", "MQTT 5":
		default:
			return true // what follows an unknown level is nobody's to know; mochi closes the connection
		}
	}
	t.Errorf("version %d, %x passes, but mochi: %v", version, frame, err)
	return true
}

// sent is a packet that a client of that version may send; version 0 for CONNECT.
type sent struct {
	name    string
	version byte
	first   byte
	body    string
}

var sentByClients = []sent{
	{"connect 3.1", 0, 0x10, "\x00\x06MQIsdp\x03\xee\x00\x3c\x00\x01c\x00\x01t\x00\x04gone\x00\x01u\x00\x01p"},
	{"connect 3.1.1", 0, 0x10, "\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c"},
	{"connect 3.1.1, all fields", 0, 0x10, "\x00\x04MQTT\x04\xf6\x00\x3c\x00\x01c\x00\x03t/x\x00\x04gone\x00\x01u\x00\x01p"},
	{"connect 5", 0, 0x10, "\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c"},
	{"connect 5, all fields", 0, 0x10, "\x00\x04MQTT\x05\xee\x00\x3c" +
		"\x28\x11\x00\x00\x00\x01\x21\x00\x01\x27\x00\x00\x01\x00\x22\x00\x01\x19\x01\x17\x01\x15\x00\x01m\x16\x00\x01d\x26\x00\x01k\x00\x01v\x26\x00\x00\x00\x00" + "\x00\x01c" +
		"\x25\x18\x00\x00\x00\x01\x01\x01\x02\x00\x00\x00\x01\x03\x00\x01x\x08\x00\x01r\x09\x00\x02xy\x26\x00\x01k\x00\x01v\x26\x00\x00" + "\x00\x00" +
		"\x00\x03t/x\x00\x04gone\x00\x01u\x00\x01p"},
	{"connect of another level", 0, 0x10, "\x00\x04MQTT\x06\xee\x00\x3c\x00\x00\x01c\x00\x03t/x\x00\x04gone\x00\x01u\x00\x01p"},
	{"publish 3.1", 3, 0x30, "\x00\x03t/xpayload"},
	{"publish 3.1.1", 4, 0x3b, "\x00\x03t/x\x00\x01payload"},
	{"publish 5", 5, 0x34, "\x00\x03t/x\x00\x01\x23\x01\x01\x02\x00\x00\x00\x01\x23\x00\x01\x08\x00\x01r\x09\x00\x02xy\x03\x00\x01x\x26\x00\x01k\x00\x01v\x26\x00\x00\x00\x00payload"},
	{"publish 5, alias alone", 5, 0x30, "\x00\x00\x03\x23\x00\x01payload"},
	{"puback 3.1", 3, 0x40, "\x00\x01"},
	{"puback 3.1.1", 4, 0x40, "\x00\x01"},
	{"puback 5", 5, 0x40, "\x00\x01\x10\x0b\x1f\x00\x01w\x26\x00\x01k\x00\x01v"},
	{"pubrec 3.1.1", 4, 0x50, "\x00\x01"},
	{"pubrec 5", 5, 0x50, "\x00\x01\x97\x0b\x1f\x00\x01w\x26\x00\x01k\x00\x01v"},
	{"pubrel 3.1.1", 4, 0x62, "\x00\x01"},
	{"pubrel 5", 5, 0x62, "\x00\x01\x92\x0b\x1f\x00\x01w\x26\x00\x01k\x00\x01v"},
	{"pubcomp 3.1.1", 4, 0x70, "\x00\x01"},
	{"pubcomp 5", 5, 0x70, "\x00\x01\x92\x0b\x1f\x00\x01w\x26\x00\x01k\x00\x01v"},
	{"subscribe 3.1", 3, 0x82, "\x00\x01\x00\x03a/#\x01\x00\x01b\x02"},
	{"subscribe 3.1.1", 4, 0x82, "\x00\x01\x00\x03a/#\x01\x00\x01b\x02"},
	{"subscribe 5", 5, 0x82, "\x00\x01\x0c\x0b\xff\xff\xff\x7f\x26\x00\x01k\x00\x01v\x00\x03a/#\x2e\x00\x01b\x01"},
	{"unsubscribe 3.1", 3, 0xa2, "\x00\x01\x00\x03a/#\x00\x01b"},
	{"unsubscribe 3.1.1", 4, 0xa2, "\x00\x01\x00\x03a/#\x00\x01b"},
	{"unsubscribe 5", 5, 0xa2, "\x00\x01\x07\x26\x00\x01k\x00\x01v\x00\x03a/#\x00\x01b"},
	{"pingreq 3.1.1", 4, 0xc0, ""},
	{"pingreq 5", 5, 0xc0, ""},
	{"disconnect 3.1.1", 4, 0xe0, ""},
	{"disconnect 5", 5, 0xe0, "\x04\x14\x11\x00\x00\x00\x01\x1f\x00\x01w\x26\x00\x01k\x00\x01v\x1c\x00\x01s"},
	{"auth", 5, 0xf0, "\x18\x13\x15\x00\x01m\x16\x00\x01d\x1f\x00\x01w\x26\x00\x01k\x00\x01v"},
}

// framed puts the body into a frame, with its length put right.
func framed(first byte, body string) []byte {
	return append(binary.AppendUvarint([]byte{first}, uint64(len(body))), body...)
}

func TestWhatIsAcceptedMochiDecodes(t *testing.T) {
	for _, c := range sentByClients {
		t.Run(c.name, func(t *testing.T) {
			if err := guard.Inspect(c.version, framed(c.first, c.body)); err != nil {
				t.Fatal(err)
			}
			for _, version := range []byte{0, 3, 4, 5} {
				wantDecodes(t, version, framed(c.first, c.body))
			}
		})
	}
}

// A truncated packet was enough to end a broker: every packet, cut at every byte and framed anew, and with
// every byte changed, is either refused or read by mochi.
func TestPacketsCutAndChanged(t *testing.T) {
	passed, panics := 0, 0
	for _, c := range sentByClients {
		t.Run(c.name, func(t *testing.T) {
			for n := range len(c.body) {
				for _, version := range []byte{c.version, 3, 4, 5} {
					frame := framed(c.first, c.body[:n])
					if wantDecodes(t, version, frame) {
						passed++
					} else if _, err := decode(version, frame); err != nil && strings.HasPrefix(err.Error(), "panic") {
						panics++
					}
				}
			}
			for i := range len(c.body) {
				changed := []byte(c.body)
				for b := range 256 {
					changed[i] = byte(b)
					wantDecodes(t, c.version, framed(c.first, string(changed)))
				}
			}
			for b := range 256 {
				wantDecodes(t, c.version, framed(byte(b), c.body))
			}
		})
	}
	if passed == 0 || panics == 0 {
		t.Errorf("%d cut packets passed and mochi panics on %d of the others: the test no longer tests anything", passed, panics)
	}
}

// refusedOfMochi says for mochi's own test vectors that it decodes why the guard refuses them.
var refusedOfMochi = map[string]string{
	"Publish: packet id must be 0 if qos is 0 (a)": "its length is wrong",
	"Disconnect: drop oversize properties partial": "its length is wrong",
	"Disconnect: takeover":                         "only servers send the reason code",
	"Disconnect: shutting down":                    "only servers send the reason code",
	"Auth: auth":                                   "only servers send the reason code",
}

// mochi ships the vectors of its own tests. What it can read of them passes, unless there is a reason.
func TestMochisOwnVectors(t *testing.T) {
	passed := 0
	for _, kind := range slices.Sorted(maps.Keys(packets.TPacketData)) {
		switch kind {
		case packets.Connack, packets.Suback, packets.Unsuback, packets.Pingresp:
			continue // only servers send them
		}
		for _, c := range packets.TPacketData[kind] {
			if len(c.RawBytes) < 2 {
				continue
			}
			version := byte(4)
			if c.Packet != nil && c.Packet.ProtocolVersion != 0 {
				version = c.Packet.ProtocolVersion
			}
			if kind == packets.Connect {
				version = 0
			}
			name := fmt.Sprintf("%s: %s", packets.PacketNames[kind], c.Desc)
			if wantDecodes(t, version, c.RawBytes) {
				passed++
				if refusedOfMochi[name] != "" {
					t.Errorf("%s passes", name)
				}
				continue
			}
			if c.FailFirst != nil || c.Expect != nil {
				continue
			}
			if _, err := decode(version, c.RawBytes); err == nil && refusedOfMochi[name] == "" {
				t.Errorf("%s: %v: %x", name, guard.Inspect(version, c.RawBytes), c.RawBytes)
			}
		}
	}
	if passed < 50 {
		t.Errorf("%d vectors passed", passed)
	}
}

// FuzzAcceptedFramesDecode: mochi reads, without a panic, whatever the guard lets through.
func FuzzAcceptedFramesDecode(f *testing.F) {
	for _, c := range sentByClients {
		f.Add(c.version, framed(c.first, c.body))
	}
	for _, kind := range slices.Sorted(maps.Keys(packets.TPacketData)) {
		for _, c := range packets.TPacketData[kind] {
			if kind == packets.Connect {
				f.Add(byte(0), c.RawBytes)
			} else if c.Packet != nil {
				f.Add(c.Packet.ProtocolVersion, c.RawBytes)
			}
		}
	}
	f.Add(byte(5), framed(packets.Subscribe<<4|2, "\x00\x01\x00\x00\x01a"))
	f.Fuzz(func(t *testing.T, version byte, frame []byte) {
		if version != 0 {
			version = 3 + version%3
		}
		wantDecodes(t, version, frame)
		if len(frame) > 1 && len(frame) < 1<<14 { // as if the length were right, so that more is inside to look at
			wantDecodes(t, version, framed(frame[0], string(frame[2:])))
		}
	})
}
