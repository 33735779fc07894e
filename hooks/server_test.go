package hooks_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

const ruleFile = `
destinations:
  notification-center: {url: "http://127.0.0.1:1/notify"}
rules:
  - name: hard-brake
    sql: SELECT payload.vin AS vin, payload.decel AS decel, clientid FROM "fleet/+/telemetry" WHERE payload.decel >= 6.5
    actions: [{http: notification-center}]
  - name: any-brake
    sql: SELECT payload.decel AS decel FROM "fleet/#" WHERE payload.decel >= 7
    actions: [{http: notification-center}]
  - name: traced
    sql: SELECT trace_id, sw8 FROM "traced/+" WHERE payload.n > 0
    actions: [{http: notification-center}]
`

// queue is the outbox as a publish sees it: it takes what it is told to take.
type queue struct {
	mu      sync.Mutex
	records []bridge.Record
	answer  func() (hooks.Commit, error) // nil: stored at once
	drop    func(bridge.Record) bool     // nil: none
}

func (q *queue) append(records []bridge.Record) (hooks.Commit, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.answer != nil {
		if c, err := q.answer(); err != nil || c != nil {
			return c, err
		}
	}
	for i := range records {
		if records[i].Dropped = q.drop != nil && q.drop(records[i]); !records[i].Dropped {
			q.records = append(q.records, records[i])
		}
	}
	return done(nil), nil
}

// next answers the appends from now on; nil: stored at once.
func (q *queue) next(answer func() (hooks.Commit, error)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.answer = answer
}

func (q *queue) taken() []bridge.Record {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.records)
}

// commit ends when the test says so.
type commit struct {
	ended chan struct{}
	err   error
}

func pending() *commit { return &commit{ended: make(chan struct{})} }

func done(err error) *commit {
	c := pending()
	c.end(err)
	return c
}

func (c *commit) end(err error) {
	c.err = err
	close(c.ended)
}

func (c *commit) Done() <-chan struct{} { return c.ended }

func (c *commit) Err() error {
	select {
	case <-c.ended:
		return c.err
	default:
		return nil
	}
}

func (c *commit) Watch(fn func(error)) {
	go func() {
		<-c.ended
		fn(c.err)
	}()
}

type broker struct {
	t       *testing.T
	server  *hooks.Server
	address string
	queue   *queue
	space   chan struct{}
	tracer  *tracectxtest.Recorder
	metrics *prometheus.Registry
	log     *syncBuffer
}

// syncBuffer is a log's destination that can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func start(t *testing.T, change ...func(*hooks.Options)) *broker {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(ruleFile), 0o600); err != nil {
		t.Fatal(err)
	}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		t.Fatal(problems)
	}
	x, err := tracectx.NewExtractor(tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"})
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{
		t: t, queue: &queue{}, space: make(chan struct{}, 1),
		tracer: tracectxtest.NewRecorder("broker"), metrics: prometheus.NewRegistry(), log: &syncBuffer{},
	}
	listener := hooks.ListenerOptions{Name: "tcp", Address: "127.0.0.1:0"}
	o := hooks.Options{
		Listeners:  []hooks.ListenerOptions{listener},
		Auth:       auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Name: "tcp", Address: listener.Address}}}),
		Rules:      func() *rules.Set { return set },
		Append:     b.queue.append,
		Space:      b.space,
		Extractor:  x,
		Tracer:     b.tracer,
		Broker:     "mqtt.example:1883",
		Node:       "broker@test",
		Logger:     slog.New(slog.NewTextHandler(b.log, nil)),
		Registerer: b.metrics,
	}
	for _, fn := range change {
		fn(&o)
	}
	if b.server, err = hooks.New(o); err != nil {
		t.Fatal(err)
	}
	b.address = b.server.Addresses()[0]
	b.server.Start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := b.server.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *broker) client(version byte, id string) *rawClient {
	b.t.Helper()
	return connected(b.t, b.address, version, id)
}

// metric is the value of a series, written name{label="value"} as it is exported.
func (b *broker) metric(series string) float64 {
	b.t.Helper()
	families, err := b.metrics.Gather()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name := f.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			if name != series {
				continue
			}
			return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	b.t.Fatalf("no metric %s", series)
	return 0
}

func (b *broker) wantMetric(series string, want float64) {
	b.t.Helper()
	b.eventually(series, func() bool { return b.metric(series) == want })
}

func (b *broker) eventually(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatalf("%s: did not come\n%s", what, b.log)
		}
	}
}

const braking = `{"vin":"V7","decel":6.75}`

func TestMatchIsStoredBeforeItIsAcknowledged(t *testing.T) {
	for _, c := range []struct {
		version, qos byte
		ack          string
	}{
		{4, 0, ""}, {4, 1, "Puback 0x00"}, {4, 2, "Pubrec 0x00"},
		{5, 0, ""}, {5, 1, "Puback 0x00"}, {5, 2, "Pubrec 0x00"},
	} {
		t.Run(fmt.Sprintf("version %d QoS %d", c.version, c.qos), func(t *testing.T) {
			b := start(t)
			stored := pending()
			b.queue.next(func() (hooks.Commit, error) { b.queue.answer = nil; return stored, nil })
			vehicle := b.client(c.version, "v7")
			var id uint16
			if c.qos > 0 {
				id = 9
			}
			vehicle.publish("fleet/v7/telemetry", c.qos, id, braking)
			if c.qos > 0 {
				// next is a PINGREQ and what comes before its PINGRESP, which nothing may hold up.
				if got := show(vehicle.next()...); got != "" {
					t.Fatalf("got %s before the commit", got)
				}
				stored.end(nil)
				if got := show(vehicle.read()); got != c.ack {
					t.Errorf("got %q, want %q", got, c.ack)
				}
			} else if got := show(vehicle.next()...); got != "" {
				t.Errorf("got %q", got)
			}
			vehicle.publish("fleet/v8/telemetry", 1, 10, braking)
			if got := show(vehicle.next()...); got != "Puback 0x00" {
				t.Errorf("got %q", got)
			}
			if n := len(b.queue.taken()); n != 1 {
				t.Errorf("%d records for the second publish, want 1", n)
			}
			waited := 1.0
			if c.qos > 0 {
				waited = 2
			}
			b.wantMetric("throughline_commit_wait_seconds", waited)
		})
	}
}

func TestRecord(t *testing.T) {
	b := start(t)
	before := time.Now()
	b.client(4, "v7").publish("fleet/v7/telemetry", 1, 1, `{"vin":"V7","decel":7.25}`)
	b.eventually("two records", func() bool { return len(b.queue.taken()) == 2 })
	got := b.queue.taken()
	published := got[0].Published
	if published.Before(before) || published.After(time.Now()) {
		t.Errorf("published at %v", published)
	}
	b.eventually("the segment", func() bool { return len(b.tracer.Segments()) == 1 })
	segment := b.tracer.Segments()[0]
	entry := tracectx.Context{
		Sampled: true, TraceID: segment.TraceID, SegmentID: segment.ID, SpanID: 0,
		Service: "broker", Instance: "broker@test", Endpoint: "mqtt/publish/fleet/+/telemetry",
	}
	set := got[0].Generation
	record := func(rule, body string) bridge.Record {
		return bridge.Record{
			Rule: rule, Generation: set, Destination: "notification-center",
			Lane: "v7", Ordered: true, Body: []byte(body),
			Topic: "fleet/v7/telemetry", ClientID: "v7", Published: published,
			SW8: entry.Carrier().SW8, TraceID: segment.TraceID,
		}
	}
	want := []bridge.Record{
		record("hard-brake", `{"vin":"V7","decel":7.25,"clientid":"v7"}`),
		record("any-brake", `{"decel":7.25}`),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	b.wantMetric(`throughline_rule_matches_total{rule="hard-brake",trace="new"}`, 1)
	b.wantMetric(`throughline_rule_matches_total{rule="any-brake",trace="new"}`, 1)
	b.wantMetric(`throughline_rule_outcomes_total{outcome="matched",rule="hard-brake"}`, 1)
	b.wantMetric(`throughline_publishes_total{qos="1"}`, 1)
}

func TestSpans(t *testing.T) {
	upstream := tracectx.Context{
		Sampled: true, TraceID: "vehicle.trace", SegmentID: "vehicle.segment", SpanID: 3,
		Service: "vehicle", Instance: "v7", Endpoint: "drive", Peer: "mqtt.example:1883",
		Correlation: tracectx.Correlation{{Key: "region", Value: "north"}},
	}
	carrier := upstream.Carrier()
	inPayload := fmt.Sprintf(`{"vin":"V7","decel":6.75,"sw8":%q,"sw8-correlation":%q}`, carrier.SW8, carrier.Correlation)
	properties := []packets.UserProperty{{Key: "sw8", Val: carrier.SW8}, {Key: "sw8-correlation", Val: carrier.Correlation}}
	for _, c := range []struct {
		name      string
		version   byte
		topic     string
		payload   string
		user      []packets.UserProperty
		operation string // of the entry span; empty: no segment
		upstream  bool
		rules     []string
		malformed string // series
	}{
		{name: "match without a carrier", version: 4, topic: "fleet/v7/telemetry", payload: braking, operation: "mqtt/publish/fleet/+/telemetry", rules: []string{"hard-brake"}},
		{name: "carrier in the payload", version: 4, topic: "fleet/v7/telemetry", payload: inPayload, operation: "mqtt/publish/fleet/+/telemetry", upstream: true, rules: []string{"hard-brake"}},
		{name: "carrier in user properties", version: 5, topic: "fleet/v7/telemetry", payload: braking, user: properties, operation: "mqtt/publish/fleet/+/telemetry", upstream: true, rules: []string{"hard-brake"}},
		{name: "two rules", version: 4, topic: "fleet/v7/telemetry", payload: `{"decel":7}`, operation: "mqtt/publish/fleet/+/telemetry", rules: []string{"hard-brake", "any-brake"}},
		{name: "a wider filter", version: 4, topic: "fleet/v7", payload: `{"decel":7}`, operation: "mqtt/publish/fleet/#", rules: []string{"any-brake"}},
		{name: "no match", version: 4, topic: "fleet/v7/telemetry", payload: `{"decel":1}`},
		{name: "no match, with a carrier", version: 5, topic: "fleet/v7/telemetry", payload: `{"decel":1}`, user: properties, operation: "mqtt/publish/fleet/+/telemetry", upstream: true},
		{name: "no candidate", version: 4, topic: "other", payload: braking},
		{name: "no candidate, with a carrier", version: 4, topic: "other", payload: inPayload, operation: "mqtt/publish", upstream: true},
		{name: "malformed in user properties", version: 5, topic: "fleet/v7/telemetry", payload: inPayload, user: []packets.UserProperty{{Key: "sw8", Val: "1-2-3"}}, operation: "mqtt/publish/fleet/+/telemetry", rules: []string{"hard-brake"}, malformed: `throughline_carriers_malformed_total{header="sw8",reason="fields"}`},
		{name: "malformed in the payload", version: 4, topic: "fleet/v7/telemetry", payload: `{"decel":6.5,"sw8":7}`, operation: "mqtt/publish/fleet/+/telemetry", rules: []string{"hard-brake"}, malformed: `throughline_carriers_malformed_total{header="sw8",reason="not_string"}`},
		{name: "malformed correlation", version: 5, topic: "fleet/v7/telemetry", payload: braking, user: []packets.UserProperty{properties[0], {Key: "sw8-correlation", Val: "region"}}, operation: "mqtt/publish/fleet/+/telemetry", upstream: true, rules: []string{"hard-brake"}, malformed: `throughline_carriers_malformed_total{header="sw8-correlation",reason="entry"}`},
		{name: "a rule that reads the trace and does not match", version: 4, topic: "traced/v7", payload: `{"n":0}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t)
			vehicle := b.client(c.version, "v7")
			vehicle.publish(c.topic, 1, 1, c.payload, c.user...)
			if got := show(vehicle.next()...); got != "Puback 0x00" {
				t.Fatalf("got %q", got)
			}
			segments := b.tracer.Segments()
			if c.operation == "" {
				if len(segments) > 0 {
					t.Errorf("%d segments, want none", len(segments))
				}
				return
			}
			if len(segments) != 1 {
				t.Fatalf("%d segments, want one", len(segments))
			}
			entry := segments[0].Span(0)
			if entry.Operation != c.operation || entry.Layer != tracectx.LayerRPCFramework || entry.Component != 0 {
				t.Errorf("entry span %q, layer %d, component %d", entry.Operation, entry.Layer, entry.Component)
			}
			for key, want := range map[string]string{"mq.topic": c.topic, "mq.broker": "mqtt.example:1883", "mqtt.clientid": "v7", "mqtt.qos": "1"} {
				if got := entry.Tag(key); got != want {
					t.Errorf("tag %s is %q, want %q", key, got, want)
				}
			}
			if (len(entry.Refs) == 1) != c.upstream || (segments[0].TraceID == "vehicle.trace") != c.upstream {
				t.Errorf("trace %s, refs %+v; upstream: %v", segments[0].TraceID, entry.Refs, c.upstream)
			}
			var locals []string
			for _, s := range segments[0].Spans[1:] {
				if s.Kind != tracectxtest.Local || s.Parent != 0 {
					t.Errorf("span %q is %s under %d", s.Operation, s.Kind, s.Parent)
				}
				locals = append(locals, strings.TrimPrefix(s.Operation, "rule/"))
			}
			if !slices.Equal(locals, c.rules) {
				t.Errorf("local spans of %v, want %v", locals, c.rules)
			}
			origin := "new"
			switch {
			case c.upstream:
				origin = "upstream"
			case c.malformed != "":
				origin = "malformed"
			}
			for _, rule := range c.rules {
				b.wantMetric(fmt.Sprintf("throughline_rule_matches_total{rule=%q,trace=%q}", rule, origin), 1)
			}
			if c.malformed != "" {
				b.wantMetric(c.malformed, 1)
			}
			for _, r := range b.queue.taken() {
				ctx, err := tracectx.Decode(tracectx.Carrier{SW8: r.SW8, Correlation: r.Correlation})
				if err != nil || ctx.TraceID != segments[0].TraceID || ctx.SegmentID != segments[0].ID {
					t.Errorf("record has context %+v, %v", ctx, err)
				}
				if bag := c.upstream && c.malformed == ""; (len(ctx.Correlation) == 1) != bag {
					t.Errorf("record has correlation %v", ctx.Correlation)
				}
			}
		})
	}
}

func TestRuleReadsTheTraceOfItsPublish(t *testing.T) {
	b := start(t)
	vehicle := b.client(4, "v7")
	vehicle.publish("traced/v7", 1, 1, `{"n":1}`)
	vehicle.next()
	records := b.queue.taken()
	if len(records) != 1 {
		t.Fatalf("%d records", len(records))
	}
	want := fmt.Sprintf(`{"trace_id":%q,"sw8":%q}`, records[0].TraceID, records[0].SW8)
	if got := string(records[0].Body); got != want || records[0].TraceID == "" {
		t.Errorf("body is %s, want %s", got, want)
	}
}

func TestNothingMatched(t *testing.T) {
	b := start(t)
	subscriber := b.client(4, "dashboard")
	subscriber.subscribe("fleet/#")
	b.client(4, "v7").publish("fleet/v7/telemetry", 1, 1, `{"decel":1}`)
	if got := show(subscriber.read()); got != "Publish fleet/v7/telemetry" {
		t.Errorf("subscriber got %s", got)
	}
	if n := len(b.queue.taken()); n != 0 {
		t.Errorf("%d records", n)
	}
}

func TestRefusals(t *testing.T) {
	full := fmt.Errorf("append: %w", bridge.ErrFull)
	for _, cause := range []struct {
		name, reason string
		answer       func() (hooks.Commit, error)
	}{
		{"outbox full", "full", func() (hooks.Commit, error) { return nil, full }},
		{"append failed", "append_failed", func() (hooks.Commit, error) { return nil, errors.New("store is closed") }},
	} {
		for _, c := range []struct {
			version, qos byte
			back         string
		}{
			{4, 1, ""},
			{4, 2, ""},
			{5, 1, "Puback 0x97"},
			{5, 2, ""},
		} {
			t.Run(fmt.Sprintf("%s, version %d QoS %d", cause.name, c.version, c.qos), func(t *testing.T) {
				b := start(t)
				b.queue.next(cause.answer)
				subscriber := b.client(4, "dashboard")
				subscriber.subscribe("#")
				vehicle := b.client(c.version, "v7")
				vehicle.publish("fleet/v7/telemetry", c.qos, 1, braking)
				if got := show(vehicle.next()...); got != c.back {
					t.Errorf("got %q, want %q", got, c.back)
				}
				vehicle.publish("end", 0, 0, "x")
				if got := show(subscriber.read()); got != "Publish end" {
					t.Errorf("subscriber got %s", got)
				}
				b.wantMetric(fmt.Sprintf("throughline_publishes_refused_total{reason=%q}", cause.reason), 1)
				if segments := b.tracer.Segments(); len(segments) != 1 || !segments[0].Span(0).Failed {
					t.Errorf("entry span of a refused publish is not flagged: %+v", segments)
				}
			})
		}
	}
}

func TestRefusedPublishIsNotRetained(t *testing.T) {
	b := start(t)
	vehicle, late := b.client(4, "v7"), b.client(4, "late")
	retained := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1, Retain: true},
		TopicName:   "fleet/v7/telemetry", PacketID: 1, Payload: []byte(`{"decel":6.5}`),
	}
	vehicle.send(retained)
	vehicle.next()
	b.queue.next(func() (hooks.Commit, error) { return nil, bridge.ErrFull })
	retained.PacketID, retained.Payload = 2, []byte(braking)
	vehicle.send(retained)
	vehicle.next()
	late.subscribe("fleet/+/telemetry")
	if got := string(late.read().Payload); got != `{"decel":6.5}` {
		t.Errorf("retained is %s, want what was accepted", got)
	}
}

// TestTopicAlias: rules and subscribers see the topic, never the alias.
func TestTopicAlias(t *testing.T) {
	b := start(t)
	subscriber := b.client(4, "dashboard")
	subscriber.subscribe("fleet/#")
	c := b.client(5, "v7")
	for _, topic := range []string{"fleet/v7/telemetry", ""} {
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish},
			TopicName:   topic, Payload: []byte(braking),
			Properties: packets.Properties{TopicAlias: 1, TopicAliasFlag: true},
		})
		if got := subscriber.read(); got.TopicName != "fleet/v7/telemetry" {
			t.Errorf("the subscriber got topic %q", got.TopicName)
		}
	}
	for _, r := range b.queue.taken() {
		if r.Topic != "fleet/v7/telemetry" {
			t.Errorf("a record has topic %q", r.Topic)
		}
	}
	if n := len(b.queue.taken()); n != 2 {
		t.Errorf("%d records", n)
	}
}

func TestFullOutboxDropsQoS0(t *testing.T) {
	b := start(t)
	b.queue.next(func() (hooks.Commit, error) { return nil, bridge.ErrFull })
	vehicle := b.client(4, "v7")
	vehicle.publish("fleet/v7/telemetry", 0, 0, braking)
	vehicle.next()
	b.wantMetric(`throughline_publishes_dropped_total{reason="full"}`, 1)
	b.wantMetric(`throughline_publishes_refused_total{reason="full"}`, 0)
	b.wantMetric("throughline_refused_connections", 0) // nobody waits for an acknowledgement
}

// A publish of which a record was dropped is acknowledged, and the trace tells which rule's it was.
func TestDroppedRecordIsInTheTrace(t *testing.T) {
	for name, drop := range map[string]func(bridge.Record) bool{
		"one":  func(r bridge.Record) bool { return r.Rule == "any-brake" },
		"all":  func(bridge.Record) bool { return true },
		"none": nil,
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t)
			b.queue.drop = drop
			vehicle := b.client(5, "v7")
			vehicle.publish("fleet/v7/telemetry", 1, 1, `{"vin":"V7","decel":7.5}`)
			if got := show(vehicle.next()...); got != "Puback 0x00" {
				t.Fatalf("got %q", got)
			}
			segments := b.tracer.Segments()
			if len(segments) != 1 || len(segments[0].Spans) != 3 || segments[0].Span(0).Failed {
				t.Fatalf("segments %+v", segments)
			}
			for _, s := range segments[0].Spans[1:] {
				want := drop != nil && drop(bridge.Record{Rule: strings.TrimPrefix(s.Operation, "rule/")})
				if s.Failed != want || want && (len(s.Logs) != 1 || !strings.Contains(fmt.Sprint(s.Logs), `dropped: no room for destination "notification-center"`)) {
					t.Errorf("span %s: failed %v with %v, want %v", s.Operation, s.Failed, s.Logs, want)
				}
			}
		})
	}
}

func TestRefusedConnectionsAreClosedWhenSpaceReturns(t *testing.T) {
	b := start(t)
	b.queue.next(func() (hooks.Commit, error) { return nil, bridge.ErrFull })
	v3, v5, answered, other := b.client(4, "v3"), b.client(5, "v5"), b.client(5, "answered"), b.client(4, "other")
	for range 3 {
		v3.publish("fleet/v7/telemetry", 1, 1, braking)
	}
	v5.publish("fleet/v7/telemetry", 2, 1, braking)
	answered.publish("fleet/v7/telemetry", 1, 1, braking)
	for _, c := range []*rawClient{v3, v5, answered, other} {
		c.next() // the connections stay
	}
	b.wantMetric("throughline_refused_connections", 2)
	gone := b.client(4, "gone")
	gone.publish("fleet/v7/telemetry", 1, 1, braking)
	gone.next()
	b.wantMetric("throughline_refused_connections", 3)
	gone.conn.Close()
	b.wantMetric("throughline_refused_connections", 2)

	b.queue.next(nil)
	b.space <- struct{}{}
	v3.wantClosed()
	if got := show(v5.read()); got != "Disconnect 0x89" {
		t.Errorf("MQTT 5 client got %s", got)
	}
	v5.wantClosed()
	answered.next()
	other.next()
	b.wantMetric("throughline_refused_connections_closed_total", 2)

	again := b.client(4, "v3")
	again.publish("fleet/v7/telemetry", 1, 1, braking)
	if got := show(again.next()...); got != "Puback 0x00" || len(b.queue.taken()) != 1 {
		t.Errorf("after a reconnect: got %q, %d records", got, len(b.queue.taken()))
	}
	for _, line := range []string{"refusing matching publishes", "accepting matching publishes again"} {
		if n := strings.Count(b.log.String(), line); n != 1 {
			t.Errorf("%q is logged %d times, want once:\n%s", line, n, b.log)
		}
	}
}

func TestPanicInOnPublishIsARefusal(t *testing.T) {
	for _, version := range []byte{4, 5} {
		b := start(t)
		b.queue.next(func() (hooks.Commit, error) { panic("out of cheese") })
		vehicle := b.client(version, "v7")
		for range 2 {
			vehicle.publish("fleet/v7/telemetry", 1, 1, braking)
			if got := show(vehicle.next()...); got != "" {
				t.Errorf("version %d: got %q", version, got)
			}
		}
		b.wantMetric(`throughline_hook_panics_total{hook="OnPublish"}`, 2)
		b.wantMetric(`throughline_publishes_refused_total{reason="panic"}`, 2)
		if segments := b.tracer.Segments(); len(segments) != 2 || !segments[0].Span(0).Failed {
			t.Errorf("entry span of a publish that panicked is not flagged: %+v", segments)
		}
		if n := strings.Count(b.log.String(), "out of cheese"); n != 1 || !strings.Contains(b.log.String(), "server_test.go") {
			t.Errorf("the panic is logged %d times, want once with its stack:\n%s", n, b.log)
		}
	}
}

// The other half of TestPlainMochiDiesOfATruncatedSubscribe (F1). The decoder never sees it.
func TestTruncatedSubscribeEndsItsConnectionAlone(t *testing.T) {
	b := start(t)
	other := b.client(5, "other")
	for i := range 3 {
		c := b.client(5, fmt.Sprint("v", i))
		c.subscribe("a", "b")
		c.bytes(truncatedSubscribe...)
		if got := show(c.read()); got != "Disconnect 0x81" {
			t.Errorf("got %s", got)
		}
		c.wantClosed()
	}
	other.next()
	b.wantMetric("throughline_connection_panics_total", 0)
	b.wantMetric(`throughline_frames_refused_total{reason="malformed"}`, 3)
	// Nothing of the three is left.
	b.wantMetric("throughline_connections", 1)
	b.wantMetric("throughline_mqtt_sessions", 1)
	b.wantMetric("throughline_mqtt_subscriptions", 0)
	b.wantMetric("throughline_mqtt_clients", 1)
}

// The other half of TestPlainMochiReservesWhatAHeaderAnnounces (F12).
func TestHeadersReserveNothing(t *testing.T) {
	b := start(t, func(o *hooks.Options) { o.MaxPacketSize = 1 << 20 })
	before := allocated()
	for range 8 {
		c := dial(t, b.address, 4)
		c.bytes(hugeConnect...)
		c.wantClosed()
	}
	if got := allocated() - before; got > 8<<20 {
		t.Errorf("eight headers made the process allocate %d bytes", got)
	}
	b.wantMetric(`throughline_frames_refused_total{reason="connect_too_large"}`, 8)
}

// The other half of TestPlainMochiWaitsForConnectForEver (F12).
func TestSilentConnectionIsClosed(t *testing.T) {
	b := start(t, func(o *hooks.Options) { o.ConnectTimeout = 20 * time.Millisecond })
	patient := b.client(4, "v7")
	dial(t, b.address, 4).wantClosed()
	b.wantMetric("throughline_connect_timeouts_total", 1)
	patient.next() // the timeout is not the connection's
}

func TestPacketSizeAfterConnect(t *testing.T) {
	b := start(t, func(o *hooks.Options) { o.MaxPacketSize = 1000 })
	vehicle := b.client(4, "v7")
	vehicle.publish("t", 0, 0, strings.Repeat("x", 1000-6))
	vehicle.next()
	vehicle.publish("t", 0, 0, strings.Repeat("x", 1000-5))
	vehicle.wantClosed()
	b.wantMetric(`throughline_frames_refused_total{reason="too_large"}`, 1)
}

// MQTT 5 clients learn the limit, and don't try.
func TestConnackAnnouncesThePacketSize(t *testing.T) {
	for _, limit := range []int{0, 1000} {
		b := start(t, func(o *hooks.Options) { o.MaxPacketSize = limit })
		c := dial(t, b.address, 5)
		c.connect("v7")
		if got := c.read().Properties.MaximumPacketSize; got != uint32(limit) {
			t.Errorf("CONNACK announces %d, want %d", got, limit)
		}
	}
}

func TestAcknowledgementsDoNotEchoProperties(t *testing.T) {
	b := start(t)
	vehicle := b.client(5, "v7")
	vehicle.publish("other", 1, 1, "x", packets.UserProperty{Key: "k", Val: "v"})
	if ack := vehicle.read(); len(ack.Properties.User) != 0 {
		t.Errorf("PUBACK carries %v", ack.Properties.User)
	}
}

func TestTakeoverClosesTheOldConnection(t *testing.T) {
	b := start(t)
	old := b.client(5, "v7")
	b.client(5, "v7").next()
	if got := show(old.read()); got != "Disconnect 0x8e" {
		t.Errorf("got %s", got)
	}
	old.wantClosed()
	b.wantMetric("throughline_connections", 1)
}

func TestUnknownClientsAreDenied(t *testing.T) {
	no := false
	b := start(t, func(o *hooks.Options) {
		o.Auth = auth.NewPolicy(auth.Options{Anonymous: &no, Listeners: []auth.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}})
	})
	c := dial(t, b.address, 4)
	c.connect("v7")
	if got := show(c.read()); got != "Connack 0x05" {
		t.Errorf("got %s", got)
	}
	c.wantClosed()
}

func TestTopicsAreDeniedWithoutACL(t *testing.T) {
	yes := true
	b := start(t, func(o *hooks.Options) {
		o.Auth = auth.NewPolicy(auth.Options{Anonymous: &yes, Listeners: []auth.Listener{{Name: "tcp", Address: "0.0.0.0:1883"}}})
	})
	c := b.client(5, "v7")
	if got := c.subscribe("fleet/#").ReasonCodes; !bytes.Equal(got, []byte{0x80}) {
		t.Errorf("SUBACK %x", got)
	}
	c.publish("fleet/v7/telemetry", 1, 1, braking)
	if got := show(c.next()...); got != "Puback 0x87" || len(b.queue.taken()) != 0 {
		t.Errorf("got %q, %d records", got, len(b.queue.taken()))
	}
}

func TestMaxSubscriptions(t *testing.T) {
	for _, c := range []struct {
		version byte
		refused byte
	}{{4, 0x80}, {5, 0x97}} {
		b := start(t, func(o *hooks.Options) { o.MaxSubscriptions = 2 })
		client := b.client(c.version, "dashboard")
		if got := client.subscribe("a", "b", "c").ReasonCodes; !bytes.Equal(got, []byte{1, 1, c.refused}) {
			t.Errorf("version %d: SUBACK %x", c.version, got)
		}
		if got := client.subscribe("b", "d").ReasonCodes; !bytes.Equal(got, []byte{1, c.refused}) {
			t.Errorf("version %d: second SUBACK %x", c.version, got)
		}
		b.wantMetric("throughline_mqtt_subscriptions", 2)
	}
}

func TestShutdown(t *testing.T) {
	b := start(t)
	v3, v5, silent := b.client(4, "v3"), b.client(5, "v5"), dial(t, b.address, 4)
	b.eventually("three connections", func() bool { return b.metric("throughline_connections") == 3 })
	if !b.server.Accepting() {
		t.Error("Accepting is false before the stop")
	}
	b.server.StopAccepting()
	if b.server.Accepting() {
		t.Error("Accepting is true after StopAccepting")
	}
	if _, err := net.Dial("tcp", b.address); err == nil {
		t.Error("a connection was accepted after StopAccepting")
	}
	v3.next() // clients go on

	// What the client sent and nobody read must not cost it the DISCONNECT.
	v5.bytes(bytes.Repeat([]byte{0xc0, 0}, 500)...)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := b.server.DisconnectClients(ctx); err != nil {
		t.Error(err)
	}
	for {
		pk := v5.read()
		if pk.FixedHeader.Type == packets.Pingresp {
			continue
		}
		if got := show(pk); got != "Disconnect 0x8b" {
			t.Errorf("MQTT 5 client got %s", got)
		}
		break
	}
	v5.wantClosed()
	v3.wantClosed()
	silent.wantClosed()
	if err := b.server.Close(ctx); err != nil {
		t.Error(err)
	}
}

// A subscriber with a queue, whose sockets' buffers are full, holds nobody up for long.
func TestShutdownIsBoundedThoughAClientDoesNotRead(t *testing.T) {
	b := start(t)
	deaf := b.client(5, "deaf")
	deaf.subscribe("flood")
	loud := b.client(4, "loud")
	payload := strings.Repeat("x", 512<<10)
	for range 64 { // 32 MiB: more than the sockets' buffers take
		loud.publish("flood", 0, 0, payload)
	}
	loud.next()
	b.server.StopAccepting()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := b.server.DisconnectClients(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	b.wantMetric("throughline_connections", 0)
}

func TestNewFailsWhole(t *testing.T) {
	b := start(t)
	taken := b.address
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	x, err := tracectx.NewExtractor(tracectx.Fields{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = hooks.New(hooks.Options{
		Listeners: []hooks.ListenerOptions{{Name: "free", Address: address}, {Name: "taken", Address: taken}},
		Auth:      auth.NewPolicy(auth.Options{}),
		Rules:     func() *rules.Set { return nil },
		Append:    (&queue{}).append,
		Extractor: x,
		Tracer:    tracectxtest.NewRecorder("broker"),
	})
	if err == nil || !strings.Contains(err.Error(), `open listener "taken"`) {
		t.Fatalf("got %v", err)
	}
	again, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatalf("the first listener stayed open: %v", err)
	}
	again.Close()

	if _, err := hooks.New(hooks.Options{}); err == nil {
		t.Error("New without its parts succeeded")
	}
}

// TestConnectAnswers: what a client gets for a CONNECT that is odd.
func TestConnectAnswers(t *testing.T) {
	const v4, v5 = "00044d51545404", "00044d51545405"
	for _, c := range []struct{ name, body, want string }{
		{"3.1.1 without id, clean session", v4 + "02003c" + "0000", "20020000"},
		{"3.1.1 without id, session to be kept", v4 + "00003c" + "0000", "20020002"}, // [MQTT-3.1.3-8]
		{"3.1", "00064d5149736470" + "03" + "02003c" + "00027637", "20020000"},
		{"level 6", "00044d51545406" + "02003c" + "00027637", "20020084"},           // [MQTT-3.1.2-2]
		{"level 2", "00044d51545402" + "02003c" + "00027637", "20020001"},           // [MQTT-3.1.2-2] of 3.1.1
		{"another name", "00044d515453" + "04" + "02003c" + "00027637", "20020001"}, // [MQTT-3.1.2-1]
		{"will without payload", v4 + "06003c" + "00027637" + "000161" + "0000", "20020000"},
		{"password without length", v4 + "c2003c" + "00027637" + "000175" + "0000", "20020000"},
		{"password without name", v4 + "42003c" + "00027637" + "000170", ""},
		{"not all there", v5 + "02003c" + "00" + "000276", "2003008100"},
		{"an unknown property", v5 + "02003c" + "02ff00" + "00027637", "2003008100"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t)
			peer := dial(t, b.address, 4)
			body, err := hex.DecodeString(c.body)
			if err != nil {
				t.Fatal(err)
			}
			peer.bytes(append([]byte{0x10, byte(len(body))}, body...)...)
			want, err := hex.DecodeString(c.want)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(peer.r, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %x, %v; want %x", got, err, want)
			}
			if accepted := len(want) == 4 && want[3] == 0; !accepted {
				peer.wantClosed()
			} else if got := show(peer.next()...); got != "" {
				t.Errorf("got %s", got)
			}
		})
	}
}
