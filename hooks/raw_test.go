package hooks_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// patience bounds what a test waits for; nothing is asserted about speed.
const patience = 20 * time.Second

// rawClient sends what it is told to and shows what comes back, packet by packet.
type rawClient struct {
	t       *testing.T
	conn    net.Conn
	r       *bufio.Reader
	version byte
	wait    time.Duration  // bounds one read, if it is set
	connack packets.Packet // kept by subject.client
}

func dial(t *testing.T, address string, version byte) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &rawClient{t: t, conn: conn, r: bufio.NewReader(conn), version: version}
}

// connected dials and connects with a clean session.
func connected(t *testing.T, address string, version byte, id string) *rawClient {
	t.Helper()
	c := dial(t, address, version)
	c.connect(id)
	if got := c.read(); got.FixedHeader.Type != packets.Connack || got.ReasonCode != 0 {
		t.Fatalf("connect as %q: got %s", id, show(got))
	}
	return c
}

func (c *rawClient) connect(id string) {
	c.t.Helper()
	c.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect: packets.ConnectParams{
			ProtocolName: []byte("MQTT"), ClientIdentifier: id, Clean: true, Keepalive: 60,
		},
	})
}

func (c *rawClient) publish(topic string, qos byte, id uint16, payload string, user ...packets.UserProperty) {
	c.t.Helper()
	c.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos},
		TopicName:   topic, PacketID: id, Payload: []byte(payload),
		Properties: packets.Properties{User: user},
	})
}

func (c *rawClient) subscribe(filters ...string) packets.Packet {
	c.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 60_000}
	for _, f := range filters {
		pk.Filters = append(pk.Filters, packets.Subscription{Filter: f, Qos: 1})
	}
	c.send(pk)
	got := c.read()
	if got.FixedHeader.Type != packets.Suback {
		c.t.Fatalf("subscribe: got %s", show(got))
	}
	return got
}

// next sends a PINGREQ and returns what came before its PINGRESP: mochi takes a client's packets one by one,
// so that everything due to those before has been written by then.
func (c *rawClient) next() []packets.Packet {
	c.t.Helper()
	c.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	var out []packets.Packet
	for {
		pk := c.read()
		if pk.FixedHeader.Type == packets.Pingresp {
			return out
		}
		out = append(out, pk)
	}
}

func (c *rawClient) send(pk packets.Packet) {
	c.t.Helper()
	if err := c.trySend(pk); err != nil {
		c.t.Fatal(err)
	}
}

// trySend is send for goroutines that aren't the test's, and for connections that may be gone.
func (c *rawClient) trySend(pk packets.Packet) error {
	pk.ProtocolVersion = c.version
	pk.Mods.AllowResponseInfo = true // else the encoder leaves response topics out
	var b bytes.Buffer
	var err error
	switch pk.FixedHeader.Type {
	case packets.Connect:
		err = pk.ConnectEncode(&b)
	case packets.Publish:
		err = pk.PublishEncode(&b)
	case packets.Subscribe:
		err = pk.SubscribeEncode(&b)
	case packets.Unsubscribe:
		err = pk.UnsubscribeEncode(&b)
	case packets.Pingreq:
		err = pk.PingreqEncode(&b)
	case packets.Puback:
		err = pk.PubackEncode(&b)
	case packets.Pubrec:
		err = pk.PubrecEncode(&b)
	case packets.Pubrel:
		pk.FixedHeader.Qos = 1 // its reserved flags [MQTT-3.6.1-1]
		err = pk.PubrelEncode(&b)
	case packets.Pubcomp:
		err = pk.PubcompEncode(&b)
	case packets.Disconnect:
		err = pk.DisconnectEncode(&b)
	default:
		err = fmt.Errorf("send: packet type %d", pk.FixedHeader.Type)
	}
	if err != nil {
		return err
	}
	_, err = c.conn.Write(b.Bytes())
	return err
}

func (c *rawClient) bytes(p ...byte) {
	c.t.Helper()
	if _, err := c.conn.Write(p); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rawClient) read() packets.Packet {
	c.t.Helper()
	pk, err := c.tryRead()
	if err != nil {
		c.t.Fatalf("read packet: %v", err)
	}
	return pk
}

func (c *rawClient) tryRead() (packets.Packet, error) {
	pk := packets.Packet{ProtocolVersion: c.version}
	if c.wait > 0 {
		if err := c.conn.SetReadDeadline(time.Now().Add(c.wait)); err != nil {
			return pk, err
		}
	}
	b, err := c.r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(b); err != nil {
		return pk, err
	}
	if pk.FixedHeader.Remaining, _, err = packets.DecodeLength(c.r); err != nil {
		return pk, err
	}
	body := make([]byte, pk.FixedHeader.Remaining)
	if _, err := io.ReadFull(c.r, body); err != nil {
		return pk, err
	}
	switch pk.FixedHeader.Type {
	case packets.Connack:
		err = pk.ConnackDecode(body)
	case packets.Publish:
		err = pk.PublishDecode(body)
	case packets.Puback:
		err = pk.PubackDecode(body)
	case packets.Pubrec:
		err = pk.PubrecDecode(body)
	case packets.Pubrel:
		err = pk.PubrelDecode(body)
	case packets.Pubcomp:
		err = pk.PubcompDecode(body)
	case packets.Suback:
		err = pk.SubackDecode(body)
	case packets.Unsuback:
		err = pk.UnsubackDecode(body)
	case packets.Disconnect:
		err = pk.DisconnectDecode(body)
	case packets.Pingresp:
	default:
		err = fmt.Errorf("unexpected packet type %d", pk.FixedHeader.Type)
	}
	return pk, err
}

// wantClosed fails unless the server closes the connection without another packet.
func (c *rawClient) wantClosed() {
	c.t.Helper()
	pk, err := c.tryRead()
	var timeout net.Error
	if err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		c.t.Errorf("got %s, %v; want the connection closed", show(pk), err)
	}
}

// show writes a packet as the tests' tables do.
func show(pks ...packets.Packet) string {
	var b bytes.Buffer
	for i, pk := range pks {
		if i > 0 {
			b.WriteString(", ")
		}
		name := packets.PacketNames[pk.FixedHeader.Type]
		switch pk.FixedHeader.Type {
		case packets.Publish:
			fmt.Fprintf(&b, "%s %s", name, pk.TopicName)
		default:
			fmt.Fprintf(&b, "%s %#02x", name, pk.ReasonCode)
		}
	}
	return b.String()
}
