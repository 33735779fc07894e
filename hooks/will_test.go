package hooks_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/tracectx"
)

const lastWords = `
destinations: {center: {url: 'http://127.0.0.1:1/'}}
rules:
  - name: gone
    sql: SELECT clientid, topic, qos, payload.why AS why FROM "will/+"
    actions:
      - http: center
      - republish: {topic: "alerts/${clientid}", payload: {why: "${why}"}}
`

func withWill(payload string, user ...packets.UserProperty) connectOption {
	return func(pk *packets.Packet) {
		pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload, pk.Connect.WillQos = true, "will/v7", []byte(payload), 1
		pk.Connect.WillProperties.User = user
	}
}

// TestWillsMeetRules: what a will owes is stored as what a publish owes is, in the trace that it names.
func TestWillsMeetRules(t *testing.T) {
	b := start(t, withRules(t, lastWords))
	s := b.subject()
	watcher := b.client(5, "watcher")
	watcher.subscribe("#")
	vehicle := tracectx.Context{Sampled: true, TraceID: "t-1", SegmentID: "s-1", SpanID: 3, Service: "vehicle", Instance: "v7", Endpoint: "drive", Peer: "broker"}

	s.client(t, 5, "v7", withWill(`{"why":"lost"}`, packets.UserProperty{Key: "sw8", Val: vehicle.Carrier().SW8})).conn.Close()
	b.eventually("the record", func() bool { return len(b.queue.taken()) == 1 })
	r := b.queue.taken()[0]
	if got, want := string(r.Body), `{"clientid":"v7","topic":"will/v7","qos":1,"why":"lost"}`; got != want {
		t.Errorf("body %s, want %s", got, want)
	}
	if r.TraceID != "t-1" || r.Topic != "will/v7" || r.ClientID != "v7" || r.Lane != "v7" {
		t.Errorf("record %+v", r)
	}
	if got := show(watcher.read(), watcher.read()); got != "Publish will/v7, Publish alerts/v7" {
		t.Errorf("the watcher got %s", got)
	}
	b.eventually("the segment", func() bool { return len(b.tracer.Segments()) == 1 })
	if span := b.tracer.Segments()[0].Span(0); span.Operation != "mqtt/publish/will/+" || span.Tag("mqtt.will") != "true" {
		t.Errorf("span %+v", span)
	}

	s.client(t, 4, "v7", withWill(`{"why":"left"}`)).disconnect()
	b.wantMetric("throughline_mqtt_clients", 1)
	if n := len(b.queue.taken()); n != 1 {
		t.Errorf("%d records, though the client has left in good order", n)
	}
}

// TestWillsThatCannotBeStored: subscribers get them, and it is counted what destinations don't get.
func TestWillsThatCannotBeStored(t *testing.T) {
	for reason, answer := range map[string]func() (hooks.Commit, error){
		"full":          func() (hooks.Commit, error) { return nil, fmt.Errorf("append: %w", bridge.ErrFull) },
		"append_failed": func() (hooks.Commit, error) { return nil, errors.New("no disk") },
		"commit_failed": func() (hooks.Commit, error) { return done(errors.New("no disk")), nil },
	} {
		t.Run(reason, func(t *testing.T) {
			b := start(t, withRules(t, lastWords))
			s := b.subject()
			watcher := b.client(5, "watcher")
			watcher.subscribe("#")
			b.queue.next(answer)
			s.client(t, 5, "v7", withWill(`{"why":"lost"}`)).conn.Close()
			want := "Publish will/v7"
			if reason == "commit_failed" { // nobody waited for it
				want += ", Publish alerts/v7"
			}
			watched := []packets.Packet{watcher.read()}
			if got := show(append(watched, watcher.next()...)...); got != want {
				t.Errorf("the watcher got %s, want %s", got, want)
			}
			b.wantMetric(fmt.Sprintf(`throughline_wills_dropped_total{reason=%q}`, reason), 1)
		})
	}
}
