package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"github.com/eclipse/paho.golang/paho"
	mqtt3 "github.com/eclipse/paho.mqtt.golang"

	"github.com/throughline-mqtt/throughline/bridge/history"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// A publisher is a client, and so a lane, that outlives its connections. It sends in the order of its messages, and after a
// reconnect what was not acknowledged first, each time with a trace of its own. Three in four of its messages match a rule
// whose condition is value > 50.
type publisher struct {
	name    string
	version byte   // of MQTT: 4 or 5
	window  int    // messages in flight, MQTT 3.1.1 alone: the other client waits for each
	qos     []byte // of its messages, in turn
	rng     *rand.Rand
	pace    time.Duration // between new messages; 0: none
	poison  []int         // the numbers of those messages that match, and whose marker ends with poisonMark

	note         func(m history.Message, trace string) []*history.Copy // is told of each PUBLISH
	acknowledged func()                                                // is told of each acknowledgement; may be nil

	made, copies int
	pending      []*publication // not acknowledged, in order
}

// poisonMark ends the markers that a webhook is to refuse for good.
const poisonMark = "/poison"

// A publication is owed its acknowledgement.
type publication struct {
	history.Message
	qos    byte
	value  int
	copies []*history.Copy // of the last PUBLISH
	token  mqtt3.Token     // of the last one; nil: not sent in this connection
}

func (p *publisher) next(ctx context.Context) *publication {
	if p.pace > 0 {
		select {
		case <-time.After(p.pace):
		case <-ctx.Done():
		}
	}
	m := &publication{qos: p.qos[p.made%len(p.qos)], value: 25}
	m.Marker, m.Lane = fmt.Sprintf("%s/%d", p.name, p.made), p.name
	m.Matches = p.rng.IntN(4) > 0
	if slices.Contains(p.poison, p.made) {
		m.Marker, m.Matches = m.Marker+poisonMark, true
	}
	if m.Matches {
		m.value = 75
	}
	p.made++
	return m
}

// send notes a new copy and returns what it carries.
func (p *publisher) send(m *publication) tracectx.Context {
	p.copies++
	ctx := tracectx.Context{
		Sampled: true, TraceID: fmt.Sprintf("%s.trace.%d", p.name, p.copies), SegmentID: fmt.Sprintf("%s.segment.%d", p.name, p.copies),
		Service: "vehicle", Instance: p.name, Endpoint: "drive", Peer: "broker",
	}
	m.copies = p.note(m.Message, ctx.TraceID)
	return ctx
}

// done takes a message off the pending ones.
func (p *publisher) done(m *publication) {
	for _, c := range m.copies {
		c.Acknowledge()
	}
	i := slices.Index(p.pending, m)
	p.pending = slices.Delete(p.pending, i, i+1)
	if p.acknowledged != nil {
		p.acknowledged()
	}
}

// publish connects, sends what is pending, and goes on with new messages if more is true, until ctx or the connection ends.
func (p *publisher) publish(ctx context.Context, address string, more bool) {
	if p.version == 5 {
		p.publish5(ctx, address, more)
		return
	}
	p.publish3(ctx, address, more)
}

func (p *publisher) topic() string { return "fleet/" + p.name + "/telemetry" }

func (p *publisher) publish3(ctx context.Context, address string, more bool) {
	lost := make(chan struct{})
	c := mqtt3.NewClient(mqtt3.NewClientOptions().AddBroker("tcp://" + address).SetClientID(p.name).SetProtocolVersion(4).
		SetAutoReconnect(false).SetWriteTimeout(time.Second).SetConnectTimeout(10 * time.Second).
		SetConnectionLostHandler(func(mqtt3.Client, error) { close(lost) }))
	defer c.Disconnect(0)
	if token := c.Connect(); !token.WaitTimeout(10*time.Second) || token.Error() != nil {
		return
	}
	for _, m := range p.pending {
		m.token = nil
	}
	// What is in flight is always the first of what is pending.
	flying := 0
	for ctx.Err() == nil {
		if flying == len(p.pending) && more {
			p.pending = append(p.pending, p.next(ctx))
		}
		if flying < min(p.window, len(p.pending)) {
			m := p.pending[flying]
			m.token = c.Publish(p.topic(), m.qos, false, fmt.Sprintf(`{"marker":%q,"value":%d,"sw8":%q}`, m.Marker, m.value, p.send(m).Carrier().SW8))
			flying++
			continue
		}
		if flying == 0 {
			return
		}
		select {
		case <-p.pending[0].token.Done():
		case <-lost:
			p.collect(flying)
			return
		case <-ctx.Done():
		}
		flying -= p.collect(flying)
		if p.failed() {
			return
		}
	}
}

// collect takes what was acknowledged of those in flight off the pending ones, and returns how many it were.
func (p *publisher) collect(flying int) (n int) {
	for _, m := range slices.Clone(p.pending[:flying]) {
		select {
		case <-m.token.Done():
			if m.token.Error() == nil {
				p.done(m)
				n++
			}
		default:
		}
	}
	return n
}

// failed reports whether the first message in flight is known not to get its acknowledgement.
func (p *publisher) failed() bool {
	if len(p.pending) == 0 || p.pending[0].token == nil {
		return false
	}
	select {
	case <-p.pending[0].token.Done():
		return p.pending[0].token.Error() != nil
	default:
		return false
	}
}

func (p *publisher) publish5(ctx context.Context, address string, more bool) {
	conn, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return
	}
	defer conn.Close()
	c := paho.NewClient(paho.ClientConfig{Conn: conn, ClientID: p.name})
	connecting, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := c.Connect(connecting, &paho.Connect{ClientID: p.name, CleanStart: true, KeepAlive: 30}); err != nil {
		return
	}
	defer c.Disconnect(&paho.Disconnect{})
	publishing, end := context.WithCancel(ctx)
	defer end()
	go func() {
		select {
		case <-c.Done():
			end()
		case <-publishing.Done():
		}
	}()
	for publishing.Err() == nil {
		if len(p.pending) == 0 {
			if !more {
				return
			}
			p.pending = append(p.pending, p.next(ctx))
		}
		m := p.pending[0]
		props := &paho.PublishProperties{}
		props.User.Add("sw8", p.send(m).Carrier().SW8)
		ack, err := c.Publish(publishing, &paho.Publish{
			QoS: m.qos, Topic: p.topic(), Payload: fmt.Appendf(nil, `{"marker":%q,"value":%d}`, m.Marker, m.value), Properties: props,
		})
		switch {
		case ack != nil && ack.ReasonCode >= 0x80:
			for _, cp := range m.copies {
				cp.Refuse()
			}
		case err != nil:
			return
		default:
			p.done(m)
		}
	}
}
