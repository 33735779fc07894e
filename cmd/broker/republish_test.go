package main

import (
	"fmt"
	"testing"
	"time"

	mqtt3 "github.com/eclipse/paho.mqtt.golang"
	"github.com/google/go-cmp/cmp"
)

// alerting republishes what the vehicle says, and calls the notification center for what was republished.
const alerting = `
destinations:
  center: {url: "http://WEBHOOK/notify"}
rules:
  - name: brake
    sql: SELECT payload.vin AS vin, payload.decel AS decel FROM "fleet/+/telemetry" WHERE payload.decel >= 6.5
    actions:
      - republish: {topic: "alerts/${vin}", qos: 1, payload: {decel: "${decel}"}}
  - name: alert
    sql: SELECT clientid, topic(2) AS vin, payload.decel AS decel FROM "alerts/#"
    actions: [{http: center}]
`

// TestRepublishedToSubscriberAndNotificationCenter: a rule that is reached through republish delivers in the vehicle's trace.
func TestRepublishedToSubscriberAndNotificationCenter(t *testing.T) {
	f := startFleet(t, alerting, nil)
	alerts := make(chan string, 10)
	subscriber := dial3(t, f.mqttAddress(), "dashboard")
	if token := subscriber.Subscribe("alerts/#", 1, func(_ mqtt3.Client, m mqtt3.Message) {
		alerts <- fmt.Sprintf("%s at QoS %d: %s", m.Topic(), m.Qos(), m.Payload())
	}); !token.WaitTimeout(10*time.Second) || token.Error() != nil {
		t.Fatal(token.Error())
	}
	out, end := drive(vehicleTracer(t, f, "vehicle-7"), f.mqttAddress())
	vehicle := out.Context()
	publish3(t, dial3(t, f.mqttAddress(), "v7"), "fleet/v7/telemetry", fmt.Sprintf(`{"vin":"V7","decel":7.5,"sw8":%q}`, vehicle.Carrier().SW8))
	end()

	select {
	case got := <-alerts:
		if want := `alerts/V7 at QoS 1: {"decel":7.5}`; got != want {
			t.Errorf("the subscriber got %s, want %s", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the subscriber got nothing")
	}
	got := f.webhook.await(1)[0]
	checkDelivered(t, f, got, vehicle)
	want := map[string]any{"clientid": "v7", "vin": "V7", "decel": jsonNumber("7.5")}
	if diff := cmp.Diff(want, withoutTrace(t, got.body)); diff != "" {
		t.Errorf("body (-want +got):\n%s", diff)
	}
	waitUnbroken(t, f, 3)
	for _, s := range f.collector.Segments() {
		for _, sp := range s.Spans {
			if sp.Operation == "rule/alert" && (s.Span(sp.Parent).Operation != "rule/brake" || s.TraceID != vehicle.TraceID) {
				t.Errorf("the rule that was reached is under %q in trace %s", s.Span(sp.Parent).Operation, s.TraceID)
			}
		}
	}
}
