package main

import (
	"fmt"
	"slices"
	"testing"

	"github.com/eclipse/paho.golang/paho"
)

const presence = `
destinations:
  notification-center:
    url: http://WEBHOOK/notify
rules:
  - name: presence
    sql: SELECT event, clientid, reason FROM "$events/client/connected", "$events/client/disconnected"
    actions: [{http: notification-center}]
`

// told are the events that have arrived, of one client.
func told(t *testing.T, f *fleet, client string) (events []string) {
	t.Helper()
	for _, r := range f.webhook.requests() {
		if r.context.IsZero() {
			t.Errorf("no trace context in %s", r.body)
		}
		row := decodeJSON(t, r.body)
		if row["clientid"] != client {
			continue
		}
		text := fmt.Sprint(row["event"])
		if row["reason"] != nil {
			text += " " + fmt.Sprint(row["reason"])
		}
		events = append(events, text)
	}
	return events
}

// TestPresenceArrivesInOrder: a vehicle's coming and going, as it was, also over an outage and a restart of the broker.
func TestPresenceArrivesInOrder(t *testing.T) {
	f := startFleet(t, presence, nil)
	once := []string{"client.connected", "client.disconnected normal"}
	cycle := func(client string) {
		c := dial5(t, f.mqttAddress(), client)
		if err := c.Disconnect(&paho.Disconnect{}); err != nil {
			t.Fatal(err)
		}
		// The broker may not have read it yet, and would call the next connection a takeover.
		waitFor(t, "the end of the connection", func() bool { return f.metric(t, "throughline_mqtt_clients") == 0 })
	}
	await := func(client string, want []string) {
		t.Helper()
		waitFor(t, fmt.Sprintf("%q of %s", want, client), func() bool { return len(told(t, f, client)) >= len(want) })
		if got := told(t, f, client); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", client, got, want)
		}
	}
	cycle("v20")
	await("v20", once)

	f.webhook.stop()
	const cycles = 5
	var want []string
	for range cycles {
		cycle("v21")
		want = append(want, once...)
	}
	cycle("v22")
	dial5(t, f.mqttAddress(), "v23") // is connected when the broker stops
	f.stopApp(t)
	f.webhook.start()
	f.start(t)
	await("v21", want)
	await("v22", once)
	await("v23", []string{"client.connected", "client.disconnected server_shutting_down"})
}
