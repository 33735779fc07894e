package hooks_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/tracectx"
)

const alertRules = `
destinations:
  center: {url: "http://127.0.0.1:1/"}
rules:
  - name: brake
    sql: SELECT payload.vin AS vin, payload.decel AS decel FROM "fleet/+/telemetry" WHERE payload.decel >= 6.5
    actions:
      - republish: {topic: "alerts/${vin}", qos: 1, payload: {decel: "${decel}"}, user_properties: {from: "${vin}"}}
      - http: center
  - name: alert
    sql: SELECT clientid, topic, qos, payload.decel AS decel, pub_props.'User-Property' AS user, trace_id FROM "alerts/#"
    actions: [{http: center}]
  - name: keep
    sql: SELECT payload.vin AS vin FROM "keep/+"
    actions: [{republish: {topic: "kept/${vin}", retain: true, payload_template: "${vin}"}}]
  - name: itself
    sql: SELECT payload FROM "loop/#"
    actions: [{republish: {topic: "loop/${payload}", payload_template: "${payload}"}}]
  - name: online
    sql: SELECT clientid FROM "$events/client/connected" WHERE clientid = 'v9'
    actions: [{republish: {topic: "presence/${clientid}", payload_template: on}}]
  - name: presence
    sql: SELECT clientid, topic, payload FROM "presence/+"
    actions: [{http: center}]
`

// TestRepublish: what a rule republishes comes after what it was made of, and the rules that select it owe what they owe with the
// publish itself, before that is acknowledged.
func TestRepublish(t *testing.T) {
	b := start(t, withRules(t, alertRules))
	stored := pending()
	dashboard, old := b.client(5, "dashboard"), b.client(4, "old")
	dashboard.subscription("#")
	old.subscribe("alerts/+")
	vehicle := b.client(5, "v7")
	vehicle.subscription("alerts/#", func(s *packets.Subscription) { s.NoLocal = true })
	b.queue.next(func() (hooks.Commit, error) { return stored, nil })
	vehicle.publish("fleet/v7/telemetry", 1, 9, braking)

	// The vehicle has not published the alert itself: No Local doesn't keep it from it.
	if got := vehicle.next(); show(got...) != "Publish alerts/V7" {
		t.Fatalf("before the commit the vehicle got %s", show(got...))
	}
	stored.end(nil)
	if got := show(vehicle.read()); got != "Puback 0x00" {
		t.Errorf("the vehicle got %s", got)
	}
	got := []packets.Packet{dashboard.read(), dashboard.read()}
	if show(got...) != "Publish fleet/v7/telemetry, Publish alerts/V7" {
		t.Fatalf("the dashboard got %s", show(got...))
	}
	alert := got[1]
	want := []packets.UserProperty{{Key: "from", Val: "V7"}}
	if diff := cmp.Diff(want, alert.Properties.User); diff != "" || alert.FixedHeader.Qos != 1 || alert.FixedHeader.Retain || string(alert.Payload) != `{"decel":6.75}` {
		t.Errorf("QoS %d, retain %v, payload %s, properties %s", alert.FixedHeader.Qos, alert.FixedHeader.Retain, alert.Payload, diff)
	}
	if got := old.read(); show(got) != "Publish alerts/V7" || string(got.Payload) != `{"decel":6.75}` {
		t.Errorf("MQTT 3.1.1 got %s %s", show(got), got.Payload)
	}
}

// TestRepublishOwes looks at the records and the spans.
func TestRepublishOwes(t *testing.T) {
	b := start(t, withRules(t, alertRules))
	var appends int
	b.queue.next(func() (hooks.Commit, error) { appends++; return nil, nil })
	vehicle := b.client(5, "v7")
	upstream := tracectx.Context{Sampled: true, TraceID: "vehicle.trace", SegmentID: "s", Service: "vehicle", Instance: "v7", Endpoint: "drive", Peer: "mqtt.example:1883"}
	vehicle.publish("fleet/v7/telemetry", 1, 9, braking, packets.UserProperty{Key: "sw8", Val: upstream.Carrier().SW8})
	if got := show(vehicle.next()...); got != "Puback 0x00" {
		t.Fatalf("got %s", got)
	}
	records := b.queue.taken()
	if len(records) != 2 || appends != 1 {
		t.Fatalf("%d records in %d appends, want two in one", len(records), appends)
	}
	own, reached := records[0], records[1]
	if own.Rule != "brake" || own.Topic != "fleet/v7/telemetry" || reached.Rule != "alert" || reached.Topic != "alerts/V7" {
		t.Errorf("records of %s on %s and of %s on %s", own.Rule, own.Topic, reached.Rule, reached.Topic)
	}
	if reached.ClientID != "v7" || reached.Lane != "v7" || !reached.Ordered || reached.TraceID != "vehicle.trace" || reached.SW8 != own.SW8 || !reached.Published.Equal(own.Published) {
		t.Errorf("the record of the rule that was reached: %+v", reached)
	}
	if want := `{"clientid":"v7","topic":"alerts/V7","qos":1,"decel":6.75,"user":{"from":"V7"},"trace_id":"vehicle.trace"}`; string(reached.Body) != want {
		t.Errorf("body %s, want %s", reached.Body, want)
	}
	b.eventually("the segment", func() bool { return len(b.tracer.Segments()) == 1 })
	segment := b.tracer.Segments()[0]
	var spans []string
	for _, s := range segment.Spans {
		spans = append(spans, fmt.Sprintf("%d under %d: %s %s", s.ID, s.Parent, s.Operation, s.Tag("mq.topic")))
	}
	want := []string{
		"0 under -1: mqtt/publish/fleet/+/telemetry fleet/v7/telemetry",
		"1 under 0: rule/brake ",
		"2 under 1: rule/alert alerts/V7",
	}
	if diff := cmp.Diff(want, spans); diff != "" || segment.TraceID != "vehicle.trace" {
		t.Errorf("trace %s, spans, -want +got\n%s", segment.TraceID, diff)
	}
	for series, want := range map[string]float64{
		`throughline_rule_republished_total{rule="brake"}`:                     1,
		`throughline_rule_republished_total{rule="alert"}`:                     0,
		`throughline_rule_matches_total{rule="alert",trace="upstream"}`:        1,
		`throughline_rule_outcomes_total{outcome="matched",rule="alert"}`:      1,
		`throughline_rule_outcomes_total{outcome="matched",rule="brake"}`:      1,
		`throughline_rule_outcomes_total{outcome="loop_refused",rule="brake"}`: 0,
		`throughline_publishes_total{qos="1"}`:                                 1,
	} {
		b.wantMetric(series, want)
	}
}

// TestRefusedPublishRepublishesNothing: when the client sends it again, subscribers would get it twice.
func TestRefusedPublishRepublishesNothing(t *testing.T) {
	b := start(t, withRules(t, alertRules))
	dashboard := b.client(4, "dashboard")
	dashboard.subscribe("#")
	full := true
	b.queue.next(func() (hooks.Commit, error) {
		if full {
			return nil, bridge.ErrFull
		}
		return nil, nil
	})
	vehicle := b.client(5, "v7")
	vehicle.publish("fleet/v7/telemetry", 1, 9, braking)
	if got := show(vehicle.next()...); got != "Puback 0x97" {
		t.Fatalf("got %s", got)
	}
	b.queue.mu.Lock()
	full = false
	b.queue.mu.Unlock()
	vehicle.publish("fleet/v7/telemetry", 1, 9, braking)
	if got := show(vehicle.next()...); got != "Puback 0x00" {
		t.Fatalf("got %s", got)
	}
	if got := show(dashboard.read(), dashboard.read()) + show(dashboard.next()...); got != "Publish fleet/v7/telemetry, Publish alerts/V7" {
		t.Errorf("the dashboard got %s", got)
	}
	b.wantMetric(`throughline_rule_republished_total{rule="brake"}`, 1)
}

// TestRepublishToSessions: to one that is offline, and to one that subscribes later if it is retained.
func TestRepublishToSessions(t *testing.T) {
	b := start(t, withRules(t, alertRules))
	s := b.subject()
	away := s.client(t, 4, "away", persistent)
	away.subscribed("alerts/#")
	away.conn.Close()
	b.wantMetric("throughline_mqtt_clients", 0)
	vehicle := b.client(4, "v7")
	vehicle.publish("fleet/v7/telemetry", 0, 0, braking)
	vehicle.publish("keep/1", 0, 0, `{"vin":"V7"}`)
	vehicle.next()
	away = s.client(t, 4, "away", persistent)
	if got := away.read(); show(got) != "Publish alerts/V7" || string(got.Payload) != `{"decel":6.75}` || got.FixedHeader.Qos != 1 {
		t.Errorf("the session got %s at QoS %d", show(got), got.FixedHeader.Qos)
	}
	late := b.client(4, "late")
	late.subscribe("kept/#")
	if got := late.read(); show(got) != "Publish kept/V7" || string(got.Payload) != "V7" || !got.FixedHeader.Retain {
		t.Errorf("the later subscriber got %s, retain %v", show(got), got.FixedHeader.Retain)
	}
}

// TestLoopsAreRefused: subscribers get the message, the rule doesn't, and the log says so once, however often that is. So it is with a topic that
// is none.
func TestLoopsAreRefused(t *testing.T) {
	b := start(t, withRules(t, alertRules))
	dashboard := b.client(4, "dashboard")
	dashboard.subscribe("loop/#")
	vehicle := b.client(4, "v7")
	const times = 20
	for range times {
		vehicle.publish("loop/a", 1, 9, "b")
		if got := show(vehicle.next()...); got != "Puback 0x00" {
			t.Fatalf("got %s", got)
		}
		if got := show(dashboard.read(), dashboard.read()); got != "Publish loop/a, Publish loop/b" {
			t.Fatalf("the dashboard got %s", got)
		}
		vehicle.publish("loop/a", 1, 9, "#")
		if got := show(vehicle.next()...) + show(dashboard.read()) + show(dashboard.next()...); got != "Puback 0x00Publish loop/a" {
			t.Fatalf("got %s", got)
		}
	}
	for series, want := range map[string]float64{
		`throughline_rule_outcomes_total{outcome="matched",rule="itself"}`:         2 * times,
		`throughline_rule_outcomes_total{outcome="loop_refused",rule="itself"}`:    times,
		`throughline_rule_outcomes_total{outcome="not_republished",rule="itself"}`: times,
		`throughline_rule_republished_total{rule="itself"}`:                        times,
	} {
		b.wantMetric(series, want)
	}
	for _, line := range []string{`outcome=loop_refused cause="the message comes from the rule itself, by way of itself"`, `outcome=not_republished cause="the topic holds a wildcard: \"loop/#\""`} {
		if n := strings.Count(b.log.String(), line); n != 1 {
			t.Errorf("%s: %d times in\n%s", line, n, b.log)
		}
	}
}

// TestRepublishOnAnEvent: it goes to subscribers, and to rules, as the client's.
func TestRepublishOnAnEvent(t *testing.T) {
	b := start(t, withRules(t, alertRules))
	dashboard := b.client(4, "dashboard")
	dashboard.subscribe("presence/#")
	b.client(5, "v9")
	if got := dashboard.read(); show(got) != "Publish presence/v9" || string(got.Payload) != "on" {
		t.Errorf("the dashboard got %s %s", show(got), got.Payload)
	}
	b.eventually("a record", func() bool { return len(b.queue.taken()) == 1 })
	r := b.queue.taken()[0]
	if want := `{"clientid":"v9","topic":"presence/v9","payload":"on"}`; r.Rule != "presence" || string(r.Body) != want || r.ClientID != "v9" || r.Topic != "presence/v9" {
		t.Errorf("record %+v with body %s", r, r.Body)
	}
}

// TestRepublishAlone: a publish that owes no record is acknowledged at once.
func TestRepublishAlone(t *testing.T) {
	b := start(t, withRules(t, `
rules:
  - {name: r, sql: 'SELECT payload FROM "in"', actions: [{republish: {topic: out, payload_template: "${payload}"}}]}
`))
	dashboard := b.client(4, "dashboard")
	dashboard.subscribe("out")
	vehicle := b.client(4, "v7")
	vehicle.publish("in", 1, 1, "x")
	if got := show(vehicle.next()...); got != "Puback 0x00" {
		t.Errorf("got %s", got)
	}
	if got := dashboard.read(); show(got) != "Publish out" || string(got.Payload) != "x" || got.FixedHeader.Qos != 0 {
		t.Errorf("the dashboard got %s %s", show(got), got.Payload)
	}
	if n := len(b.queue.taken()); n != 0 {
		t.Errorf("%d records", n)
	}
}
