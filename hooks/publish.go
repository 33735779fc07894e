package hooks

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// reason says why a publish was refused; it is a metric label.
type reason string

const (
	outboxFull   reason = "full"
	appendFailed reason = "append_failed"
	commitFailed reason = "commit_failed"
	panicked     reason = "panic"
)

var reasons = [...]reason{outboxFull, appendFailed, commitFailed, panicked}

// layer makes SkyWalking link the vehicle and the broker directly. MQ would make it draw a
// virtual queue between them; HTTP would count the endpoint as a web request. MQTT, where a packet is
// acknowledged by the peer it was sent to, is a remote call of its own protocol.
const layer = tracectx.LayerRPCFramework

// OnPublish matches a publish, stores what it owes, and gives it to its subscribers. What it returns keeps to the table in
// TestOnPublishOutcomes: nil acknowledges; a packets.Code by itself answers an MQTT 5 QoS 1 publish
// with that code; ErrRejectPacket drops the publish without an answer.
//
// Wills don't come here (see publishWill), nor do $SYS topics, which mochi lets nobody publish to.
func (h *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (_ packets.Packet, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			// The client gets no answer and keeps its connection: sent again, the same message would
			// panic again.
			h.panicked("OnPublish", cl, cause)
			h.metrics.refused(pk.FixedHeader.Qos, panicked)
			err = packets.ErrRejectPacket
		}
	}()
	if cl.Net.Inline {
		return pk, nil
	}
	h.metrics.publishes[pk.FixedHeader.Qos].Inc()
	p := publish{h: h, cl: cl, topic: pk.TopicName, qos: pk.FixedHeader.Qos, received: time.Now()}
	defer p.end()
	why, cause := p.accept(&pk)
	p.settled = true
	if why != "" {
		return pk, p.refuse(why, cause)
	}
	pause := p.give(&pk)
	if c := connectionOf(cl); c != nil {
		c.pause = pause
	}
	pk.Ignore = true // mochi acknowledges it, and does nothing else with it
	return pk, nil
}

// give hands the publish, and what it has had rules publish, to subscribers. The result is how long the publisher should wait for
// them to keep up.
func (p *publish) give(pk *packets.Packet) (pause time.Duration) {
	from := origin{client: true}
	if p.h.wantsOrigin() { // else it would stay for as long as the message waits, or is retained
		if from.message = p.matched; from.message == nil {
			from.message = p.h.messageOf(p.cl, pk, p.received)
		}
	}
	pause, taken := p.h.deliverFrom(from, p.cl.ID, pk, p.received)
	if !taken && from.message != nil {
		p.h.noSubscribers(p.cl, from.message, p.parent)
	}
	return max(pause, p.h.republishAll(p.cl, &p.chain))
}

// publish is one PUBLISH packet, or a will, on its way through the rules. It doesn't hold the packet, which
// would have to be allocated then for every publish, matching or not.
type publish struct {
	h        *hook
	cl       *mqtt.Client
	topic    string
	qos      byte
	received time.Time
	will     bool // nobody waits for an acknowledgement

	parent  tracectx.Context
	outcome tracectx.Outcome
	matched *rules.Message // nil if there was no rule to match
	chain   rules.Chain    // what it has set off
	entry   tracectx.Span  // nil until it is needed
	report  bool           // false: the entry was needed for its ids alone
	settled bool           // accept has returned, and not panicked
	owed    string         // the destinations of its records, if they were refused for want of room
	full    string         // whose cap it was; "": one of the whole outbox
}

// refuse counts a refusal and returns what makes mochi answer it: never with success.
func (p *publish) refuse(why reason, cause error) error {
	p.h.metrics.refused(p.qos, why)
	f := refusal{reason: why, cause: cause, owed: p.owed, full: p.full, received: p.received}
	answer := packets.ErrRejectPacket
	switch {
	case p.qos == 1 && p.cl.Properties.ProtocolVersion == 5:
		answer = packets.ErrQuotaExceeded // PUBACK 0x97; unwrapped, or mochi panics
	case p.qos > 0:
		f.conn, _ = p.cl.Net.Conn.(*guard.Conn)
	}
	p.h.refusals.refused(f)
	return answer
}

// accept stores what the publish owes; a reason if that can't be, and it must not be acknowledged.
func (p *publish) accept(pk *packets.Packet) (reason, error) {
	var candidates []*rules.Rule
	set := p.h.o.Rules()
	if set != nil {
		var room [8]*rules.Rule
		candidates = set.Candidates(room[:0], p.topic)
	}
	p.extract(pk)
	switch {
	case !p.parent.IsZero():
		p.start(candidates)
		p.report = true
	case slices.ContainsFunc(candidates, (*rules.Rule).ReadsTrace):
		p.start(candidates)
	}
	if len(candidates) == 0 {
		return "", nil
	}
	matching := time.Now()
	p.matched = p.message(pk)
	p.chain = set.Run(candidates, p.matched, p.h.nextID)
	p.h.tellRefused(set, p.cl.ID, p.chain.Refused)
	if len(p.chain.Matches) == 0 {
		return "", nil
	}
	p.start(candidates)
	p.report = true
	of := source{topic: p.topic, clientID: p.cl.ID, at: p.received, origin: p.origin()}
	records, spans := p.h.records(set, &p.chain, p.entry, of, matching)
	if len(records) == 0 {
		return "", nil
	}
	commit, err := p.h.o.Append(records)
	tellDropped(p.chain.Matches, spans, records)
	if err != nil {
		why := appendFailed
		if errors.Is(err, bridge.ErrFull) {
			why, p.owed = outboxFull, destinations(records)
			if full, ok := errors.AsType[*bridge.FullError](err); ok {
				p.full = full.Destination
			}
		}
		p.entry.Error("refused: " + err.Error())
		return why, err
	}
	switch {
	case p.will:
		h, cl := p.h, p.cl // p would have to be allocated else
		commit.Watch(func(err error) {
			if err != nil {
				h.lostWill(cl, commitFailed, err)
			}
		})
	case p.qos > 0:
		p.h.hold(p.cl, pk, commit)
	}
	return "", nil
}

// hold makes the acknowledgement that mochi is about to write wait for the commit.
func (h *hook) hold(cl *mqtt.Client, pk *packets.Packet, commit Commit) {
	c := cl.Net.Conn.(*guard.Conn) // all listeners are ours
	begin, id := time.Now(), pk.PacketID
	c.Join(commit, func(err error) {
		h.metrics.commitWait.Observe(time.Since(begin).Seconds())
		if err == nil {
			return
		}
		h.metrics.refusals[commitFailed].Inc()
		h.refusals.refused(refusal{reason: commitFailed, cause: err, received: begin})
		h.forgetAck(cl, id)
	})
}

// extract finds the publisher's trace context: MQTT 5 user properties, else payload fields.
func (p *publish) extract(pk *packets.Packet) {
	var props tracectx.Carrier
	for _, u := range pk.Properties.User {
		switch u.Key {
		case tracectx.HeaderSW8:
			props.SW8 = u.Val
		case tracectx.HeaderCorrelation:
			props.Correlation = u.Val
		}
	}
	p.parent, p.outcome = p.h.o.Extractor.Extract(props, pk.Payload)
	if why := p.outcome.Reason; why != "" {
		p.h.metrics.malformed[why].Inc()
	}
	if why := p.outcome.Correlation; why != "" {
		p.h.metrics.malformedBag[why].Inc()
	}
}

// start opens the EntrySpan, unless that was done. Its name holds the most specific candidate's filter, never
// the topic: that would make an endpoint per vehicle.
func (p *publish) start(candidates []*rules.Rule) {
	if p.entry != nil {
		return
	}
	operation := "mqtt/publish"
	if len(candidates) > 0 {
		operation += "/" + candidates[0].Filter(p.topic)
	}
	p.entry = p.h.o.Tracer.StartEntry(tracectx.SpanOptions{
		Operation: operation,
		Parent:    p.parent,
		Layer:     layer,
		Start:     p.received,
	})
	p.entry.Tag("mq.topic", p.topic)
	if p.h.o.Broker != "" {
		p.entry.Tag("mq.broker", p.h.o.Broker)
	}
	p.entry.Tag("mqtt.clientid", p.cl.ID)
	p.entry.Tag("mqtt.qos", strconv.Itoa(int(p.qos)))
	if p.will {
		p.entry.Tag("mqtt.will", "true")
	}
}

// end reports the publish's spans, if there is anything to tell of it: a match, or a trace that
// the publisher is part of.
func (p *publish) end() {
	if !p.report {
		return
	}
	if !p.settled {
		p.entry.Error("refused: panic")
	}
	p.entry.End()
}

// message is the publish as rules see it. It shares the packet's memory.
func (p *publish) message(pk *packets.Packet) *rules.Message {
	m := p.h.messageOf(p.cl, pk, p.received)
	if p.entry != nil {
		ctx := p.entry.Context()
		m.TraceID, m.SW8 = ctx.TraceID, ctx.Carrier().SW8
	}
	return m
}

// wantsOrigin says whether a rule selects from what tells of dropped messages.
func (h *hook) wantsOrigin() bool {
	return h.wanting(rules.MessageDropped) != nil || h.wanting(rules.DeliveryDropped) != nil
}

// messageOf is what the client publishes as rules see it, but for the trace. It shares the packet's memory.
func (h *hook) messageOf(cl *mqtt.Client, pk *packets.Packet, received time.Time) *rules.Message {
	host, _, err := net.SplitHostPort(cl.Net.Remote)
	if err != nil {
		host = cl.Net.Remote
	}
	props := &pk.Properties
	m := &rules.Message{
		ID:              h.ids.next(),
		ClientID:        cl.ID,
		Username:        string(cl.Properties.Username),
		HasUsername:     len(cl.Properties.Username) > 0,
		Topic:           pk.TopicName,
		Payload:         pk.Payload,
		QoS:             pk.FixedHeader.Qos,
		Retain:          pk.FixedHeader.Retain,
		Dup:             pk.FixedHeader.Dup,
		Timestamp:       received,
		PeerHost:        host,
		PeerName:        cl.Net.Remote,
		Node:            h.o.Node,
		ContentType:     props.ContentType,
		ResponseTopic:   props.ResponseTopic,
		CorrelationData: props.CorrelationData,
		MessageExpiry:   props.MessageExpiryInterval,
		PayloadIsUTF8:   props.PayloadFormatFlag && props.PayloadFormat == 1,
	}
	for _, u := range props.User {
		m.UserProperties = append(m.UserProperties, [2]string{u.Key, u.Val})
	}
	return m
}

// messageIDs makes the ids that rules see as the column id: unique over restarts, in the form
// of 32 hexadecimal digits.
type messageIDs struct {
	run  uint64 // random, one for the life of the process
	last atomic.Uint64
}

func (m *messageIDs) next() string {
	var id [16]byte
	binary.BigEndian.PutUint64(id[:8], m.run)
	binary.BigEndian.PutUint64(id[8:], m.last.Add(1))
	return hex.EncodeToString(id[:])
}

// source is what rules have matched, as records tell of it.
type source struct {
	topic, clientID string
	at              time.Time
	origin          string // of the trace, as a metric label
}

// records are what the matches owe, each match with a LocalSpan under the entry, or under that of the rule that has republished what
// it fired on. Those end with the entry unless they are ended before.
func (h *hook) records(set *rules.Set, chain *rules.Chain, entry tracectx.Span, of source, matching time.Time) ([]bridge.Record, []tracectx.Span) {
	ctx := entry.Context()
	carrier := ctx.Carrier()
	records := make([]bridge.Record, 0, len(chain.Matches))
	spans := make([]tracectx.Span, 0, len(chain.Matches))
	for _, m := range chain.Matches {
		h.metrics.matches.WithLabelValues(m.Rule.Name, of.origin).Inc()
		parent, topic := entry, of.topic
		if m.On >= 0 {
			on := &chain.Published[m.On]
			parent, topic = spans[on.By], on.Topic
		}
		span := parent.StartLocal(tracectx.SpanOptions{Operation: "rule/" + m.Rule.Name, Start: matching})
		if m.On >= 0 {
			span.Tag("mq.topic", topic)
		}
		spans = append(spans, span)
		for _, d := range m.Deliveries {
			records = append(records, bridge.Record{
				ID:          d.ID,
				Rule:        m.Rule.Name,
				Generation:  set.Generation(),
				Destination: d.Destination,
				Lane:        d.Lane,
				Ordered:     d.Ordered,
				Body:        d.Body,
				Path:        d.Path,
				Query:       d.Query,
				Headers:     renderedHeaders(d.Headers),
				Topic:       topic,
				ClientID:    of.clientID,
				Published:   of.at,
				SW8:         carrier.SW8,
				Correlation: carrier.Correlation,
				TraceID:     ctx.TraceID,
			})
		}
	}
	return records, spans
}

// tellDropped flags the spans of matches that owed a record which was dropped, and ends all of them, children before their
// parents, which come earlier. The records are in the order of the matches.
func tellDropped(matches []rules.Match, spans []tracectx.Span, records []bridge.Record) {
	for i, m := range matches {
		var of []bridge.Record
		of, records = records[:len(m.Deliveries)], records[len(m.Deliveries):]
		for _, r := range of {
			if r.Dropped {
				spans[i].Error("dropped: no room for destination " + strconv.Quote(r.Destination))
			}
		}
	}
	for _, s := range slices.Backward(spans) {
		s.End()
	}
}

// destinations names those of the records, each once.
func destinations(records []bridge.Record) string {
	var names []string
	for _, r := range records {
		names = append(names, r.Destination)
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}

// origin is where the trace of the publish comes from, as a metric label.
func (p *publish) origin() string {
	switch p.outcome.Status {
	case tracectx.Found:
		return "upstream"
	case tracectx.Malformed:
		return "malformed"
	default:
		return "new"
	}
}
