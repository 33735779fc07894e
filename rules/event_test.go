package rules_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// eventOf is an event of the kind that has all that it can have.
func eventOf(k rules.EventKind) *rules.Event {
	m := message("fleet/v9/telemetry", `{"n":1}`)
	m.ClientID, m.Username, m.HasUsername = "v9", "sender", true
	m.UserProperties, m.Retain = [][2]string{{"a", "1"}}, true
	return &rules.Event{
		Kind: k, Timestamp: time.UnixMilli(1_700_000_000_500), Node: "broker@a",
		ClientID: "v7", Username: "depot", HasUsername: true, PeerName: "192.0.2.8:5000",
		Connection: &rules.Connection{
			SockName: "192.0.2.1:1883", ProtoName: "MQTT", ProtoVer: 5, Keepalive: 60, CleanStart: true, Expiry: 300,
			At: time.UnixMilli(1_700_000_000_400), Until: time.UnixMilli(1_700_000_000_500),
		},
		Reason: "why", Topic: "commands/v7/#", QoS: 2,
		Action: "publish", Result: "deny", Source: "default",
		Properties: rules.Properties{
			List: []rules.Property{{Name: "Receive-Maximum", Number: 10}, {Name: "Reason-String", Text: "bye"}},
			User: [][2]string{{"k", "1"}, {"k", "2"}},
		},
		Message: m,
		TraceID: "t1", SW8: "1-a",
	}
}

// TestEventColumns: what * selects of each event, in order.
func TestEventColumns(t *testing.T) {
	const (
		who    = `"clientid":"v7","username":"depot",`
		peer   = `"peerhost":"192.0.2.8","peername":"192.0.2.8:5000",`
		proto  = `"proto_name":"MQTT","proto_ver":5,`
		sock   = `"peername":"192.0.2.8:5000","sockname":"192.0.2.1:1883",` + proto
		terms  = `"keepalive":60,"clean_start":true,"expiry_interval":300,`
		props  = `{"Receive-Maximum":10,"Reason-String":"bye","User-Property":{"k":"2"},"User-Property-Pairs":[{"key":"k","value":"1"},{"key":"k","value":"2"}]},`
		common = `"timestamp":1700000000500,"node":"broker@a","metadata":{"rule_id":"r"}}`
		msg    = `"payload":"{\"n\":1}","peerhost":"192.0.2.7","peername":"192.0.2.7:4711","topic":"fleet/v9/telemetry","qos":1,` +
			`"flags":{"dup":false,"retain":true},"pub_props":{"User-Property":{"a":"1"},"User-Property-Pairs":[{"key":"a","value":"1"}]},` +
			`"publish_received_at":1700000000000,`
	)
	tests := []struct {
		kind      rules.EventKind
		from, row string
	}{
		{rules.ClientConnected, "client/connected", `{` + who + sock + terms + `"is_bridge":false,"conn_props":` + props + `"connected_at":1700000000400,"client_attrs":{},"event":"client.connected",` + common},
		{rules.ClientDisconnected, "client/disconnected", `{"reason":"why",` + who + sock + `"disconn_props":` + props + `"connected_at":1700000000400,"disconnected_at":1700000000500,"client_attrs":{},"event":"client.disconnected",` + common},
		{rules.ClientConnack, "client/connack", `{"reason_code":"why",` + who + sock + terms + `"connected_at":1700000000400,"conn_props":` + props + `"event":"client.connack",` + common},
		{rules.SessionSubscribed, "session/subscribed", `{` + who + peer + `"topic":"commands/v7/#","qos":2,"sub_props":` + props + `"client_attrs":{},"event":"session.subscribed",` + common},
		{rules.SessionUnsubscribed, "session/unsubscribed", `{` + who + peer + `"topic":"commands/v7/#","qos":2,"unsub_props":` + props + `"client_attrs":{},"event":"session.unsubscribed",` + common},
		{rules.MessageDropped, "message/dropped", `{"reason":"why","id":"m1",` + who + msg + `"client_attrs":{},"event":"message.dropped",` + common},
		{rules.DeliveryDropped, "message/delivery_dropped", `{"reason":"why","id":"m1","from_clientid":"v9","from_username":"sender",` + who + msg + `"event":"delivery.dropped",` + common},
		{rules.AuthzChecked, "auth/check_authz_complete", `{` + who + peer + `"topic":"commands/v7/#","action":"publish","authz_source":"default","result":"deny","client_attrs":{},"event":"client.check_authz_complete",` + common},
	}
	if len(tests) != int(rules.EventKinds) {
		t.Errorf("%d events are tested of %d", len(tests), rules.EventKinds)
	}
	for _, tt := range tests {
		t.Run(tt.from, func(t *testing.T) {
			set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules: [{name: r, sql: 'SELECT * FROM \"$events/"+tt.from+"\"', actions: [{http: d}]}]\n")
			got := set.RunEvent(set.EventCandidates(tt.kind), eventOf(tt.kind), nil).Matches
			if len(got) != 1 || len(got[0].Deliveries) != 1 {
				t.Fatalf("matches: %v", got)
			}
			d := got[0].Deliveries[0]
			if diff := cmp.Diff(tt.row, string(d.Body)); diff != "" {
				t.Error(diff)
			}
			if d.Lane != "v7" || !d.Ordered {
				t.Errorf("lane %q, ordered %v: a vehicle's events go out in order", d.Lane, d.Ordered)
			}
			// One that has nothing has the columns that need nothing, and breaks nothing.
			for range 2 {
				if got := set.RunEvent(set.EventCandidates(tt.kind), &rules.Event{Kind: tt.kind}, nil).Matches; len(got) != 1 {
					t.Errorf("an empty event: matches %v", got)
				}
			}
		})
	}
}

// TestEventSources: which rules an event is for.
func TestEventSources(t *testing.T) {
	all := []string{
		"client/connected", "client/disconnected", "client/connack", "session/subscribed", "session/unsubscribed",
		"message/dropped", "message/delivery_dropped", "auth/check_authz_complete",
	}
	tests := []struct {
		from string
		want []string // after $events/
	}{
		{`"$events/client/connected"`, []string{"client/connected"}},
		{`"$events/client_connected"`, []string{"client/connected"}},
		{`"$events/client_disconnected", '$events/client_connack'`, []string{"client/disconnected", "client/connack"}},
		{`"$events/session_subscribed", "$events/session_unsubscribed"`, []string{"session/subscribed", "session/unsubscribed"}},
		{`"$events/message_dropped", "$events/delivery_dropped"`, []string{"message/dropped", "message/delivery_dropped"}},
		{`"$events/client_check_authz_complete"`, []string{"auth/check_authz_complete"}},
		{`"$events/client/+"`, []string{"client/connected", "client/disconnected", "client/connack"}},
		{`"$events/+/connected"`, []string{"client/connected"}},
		{`"$events/message/#"`, []string{"message/dropped", "message/delivery_dropped"}},
		{`"$events/+"`, all}, // the legacy names have one level
		{`"$events/#"`, all},
		{`"$events/client/connected", "$events/client_connected", "$events/client/#"`, []string{"client/connected", "client/disconnected", "client/connack"}},
		{`"#"`, nil},
		{`"+/client/connected"`, nil},
		{`"+/#", "fleet/#"`, nil},
		{`"fleet/#", "$events/client/connack"`, []string{"client/connack"}},
	}
	for _, tt := range tests {
		t.Run(tt.from, func(t *testing.T) {
			set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - name: r\n    sql: |\n      SELECT event FROM "+tt.from+"\n    actions: [{http: d}]\n")
			var got []string
			for k := range rules.EventKinds {
				if c := set.EventCandidates(k); len(c) > 0 {
					got = append(got, strings.TrimPrefix(k.Topic(), "$events/"))
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
			if c := set.Candidates(nil, "$events/client/connected"); len(c) > 0 {
				t.Errorf("a publish to the event's name is a publish to it: %v", c)
			}
		})
	}
	t.Run("disabled", func(t *testing.T) {
		set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules: [{name: r, enabled: false, sql: 'SELECT * FROM \"$events/#\"', actions: [{http: d}]}]\n")
		if c := set.EventCandidates(rules.ClientConnected); len(c) > 0 {
			t.Errorf("candidates: %v", c)
		}
	})
}

func TestEventStatements(t *testing.T) {
	tests := []struct{ name, items, where, want string }{
		{"trace columns by name", "trace_id, sw8", "", `{"trace_id":"t1","sw8":"1-a"}`},
		{"text of a reason", "reason AS r", "WHERE reason = 'why'", `{"r":"why"}`},
		{"times", "disconnected_at - connected_at AS online", "WHERE disconnected_at > connected_at", `{"online":100}`},
		{"properties", "disconn_props.'User-Property'.k AS k", "", `{"k":"2"}`},
		{"what it does not have", "payload.x AS x, keepalive AS k, 1 AS one", "", `{"one":1}`},
		{"not met", "reason", "WHERE reason = 'normal'", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - name: r\n    sql: |\n      SELECT "+tt.items+` FROM "t", "$events/client/disconnected" `+tt.where+"\n    actions: [{http: d}]\n")
			got := set.RunEvent(set.EventCandidates(rules.ClientDisconnected), eventOf(rules.ClientDisconnected), nil).Matches
			var body string
			if len(got) > 0 {
				body = string(got[0].Deliveries[0].Body)
			}
			if diff := cmp.Diff(tt.want, body); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestEventPayload: the payload of a dropped message is read as that of a publish is.
func TestEventPayload(t *testing.T) {
	set := load(t, `
destinations: {d: {url: "http://127.0.0.1/"}}
rules: [{name: r, sql: 'SELECT payload.n AS n FROM "$events/message/dropped" WHERE payload.n = 1', actions: [{http: d}]}]
`)
	ev := eventOf(rules.MessageDropped)
	if got := set.RunEvent(set.EventCandidates(ev.Kind), ev, nil).Matches; len(got) != 1 || string(got[0].Deliveries[0].Body) != `{"n":1}` {
		t.Errorf("matches: %v", got)
	}
	ev.Message.Payload = []byte("no JSON")
	if got := set.RunEvent(set.EventCandidates(ev.Kind), ev, nil).Matches; len(got) != 0 {
		t.Errorf("matches: %v", got)
	}
	counts := map[rules.Outcome]uint64{}
	set.Rules()[0].Outcomes().Each(func(o rules.Outcome, n uint64) { counts[o] = n })
	if counts[rules.Matched] != 1 || counts[rules.PayloadNotJSON] != 1 {
		t.Errorf("outcomes: %v", counts)
	}
}

func TestEvalEvents(t *testing.T) {
	tests := []struct{ name, sql, event, want string }{
		{"as the column has it", `SELECT clientid, event FROM "$events/client/connected"`, `{"event":"client.connected","clientid":"c"}`, `{"matched":true,"rows":[{"clientid":"c","event":"client.connected"}]}`},
		{"as FROM has it", `SELECT event FROM "$events/client/connected"`, `{"event":"$events/client/connected"}`, `{"matched":true,"rows":[{"event":"client.connected"}]}`},
		{"legacy, on both sides", `SELECT event FROM "$events/client_connected"`, `{"event":"$events/client_connected"}`, `{"matched":true,"rows":[{"event":"client.connected"}]}`},
		{"wildcard", `SELECT reason FROM "$events/client/+"`, `{"event":"client.disconnected","reason":"normal"}`, `{"matched":true,"rows":[{"reason":"normal"}]}`},
		{"another event", `SELECT 1 AS x FROM "$events/client/connected"`, `{"event":"client.disconnected"}`, `{"matched":false}`},
		{"an event's topic is a column", `SELECT topic FROM "$events/session/subscribed"`, `{"event":"session.subscribed","topic":"a/#"}`, `{"matched":true,"rows":[{"topic":"a/#"}]}`},
		{"no event of a topic", `SELECT 1 AS x FROM "#"`, `{"event":"session.subscribed","topic":"a"}`, `{"matched":false}`},
		{"no publish of an event", `SELECT 1 AS x FROM "$events/#"`, `{"topic":"a"}`, `{"matched":false}`},
		{"a publish by name", `SELECT event FROM "a"`, `{"event":"message.publish","topic":"a"}`, `{"matched":true,"rows":[{"event":"message.publish"}]}`},
		{"dropped payload", `SELECT payload.x AS x FROM "$events/message/dropped"`, `{"event":"message.dropped","payload":"{\"x\":1}"}`, `{"matched":true,"rows":[{"x":1}]}`},
		{"without $events", `SELECT event FROM "$events/client/connected"`, `{"event":"client/connected"}`, `{"matched":true,"rows":[{"event":"client.connected"}]}`},
		{"misspelt", `SELECT 1 AS x FROM "$events/#"`, `{"event":"client.conected"}`, `{"error":"request","message":"unknown event \"client.conected\": did you mean client.connected?"}`},
		{"no name", `SELECT 1 AS x FROM "$events/#"`, `{"event":1}`, `{"error":"request","message":"the event's name must be a string"}`},
		{"unsupported", `SELECT 1 AS x FROM "$events/message/acked"`, `{"event":"message.acked"}`, `{"error":"parse","message":"1:20: event \"$events/message/acked\" is not supported"}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := evalLine(t, tt.sql, tt.event); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestDocsEvents: the table of docs/rules.md has every event with its columns, and its legacy name means it.
func TestDocsEvents(t *testing.T) {
	text, err := os.ReadFile("../docs/rules.md")
	if err != nil {
		t.Fatal(err)
	}
	var got, want [][]string
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\$events/[^`]+)` \\| ([^|]+) \\| `([^`]+)` \\|$").FindAllStringSubmatch(string(text), -1) {
		got = append(got, m[1:3])
		set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules: [{name: r, sql: 'SELECT 1 AS x FROM \""+m[3]+"\"', actions: [{http: d}]}]\n")
		for k := range rules.EventKinds {
			if (len(set.EventCandidates(k)) > 0) != (k.Topic() == m[1]) {
				t.Errorf("%s is not %s", m[3], m[1])
			}
		}
	}
	for k := range rules.EventKinds {
		columns := slices.DeleteFunc(k.Columns(), func(c string) bool { return c == "event" || c == "timestamp" || c == "node" })
		want = append(want, []string{k.Topic(), "`" + strings.Join(columns, "`, `") + "`"})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-code +docs\n%s", diff)
	}
}
