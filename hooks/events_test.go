package hooks_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// selecting makes rules of the server: one, called r, with this statement.
func selecting(t testing.TB, sql string) func(*hooks.Options) {
	t.Helper()
	return withRules(t, "destinations: {center: {url: 'http://127.0.0.1:1/'}}\nrules:\n  - name: r\n    sql: |\n      "+sql+"\n    actions: [{http: center}]\n")
}

// withRules makes the rules of the server those of this file.
func withRules(t testing.TB, text string) func(*hooks.Options) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		t.Fatal(problems)
	}
	return func(o *hooks.Options) { o.Rules = func() *rules.Set { return set } }
}

// rows are the bodies of the records, as they were appended, with what differs from run to run replaced: times that are between begin and
// now by 1, addresses and message ids by their names.
func (b *broker) rows(begin time.Time) (rows []string) {
	b.t.Helper()
	for _, r := range b.queue.taken() {
		var row map[string]any
		if err := json.Unmarshal(r.Body, &row); err != nil {
			b.t.Fatalf("%s: %v", r.Body, err)
		}
		delete(row, "metadata")
		for name, v := range row {
			switch name {
			case "timestamp", "connected_at", "disconnected_at", "publish_received_at":
				if ms, _ := v.(float64); int64(ms) < begin.UnixMilli() || int64(ms) > time.Now().UnixMilli() {
					b.t.Errorf("%s %v is not between %d and now", name, v, begin.UnixMilli())
				}
				row[name] = 1
			case "peername":
				if text, _ := v.(string); !strings.HasPrefix(text, "127.0.0.1:") || text == b.address {
					b.t.Errorf("peername %v", v)
				}
				row[name] = "peer"
			case "sockname":
				if v != b.address {
					b.t.Errorf("sockname %v, want %s", v, b.address)
				}
				row[name] = "sock"
			case "id":
				if text, _ := v.(string); !regexp.MustCompile("^[0-9a-f]{32}$").MatchString(text) {
					b.t.Errorf("id %v", v)
				}
				row[name] = "id"
			}
		}
		text, err := json.Marshal(row)
		if err != nil {
			b.t.Fatal(err)
		}
		rows = append(rows, string(text))
	}
	return rows
}

// wantRows waits for so many rows, and fails unless they are these, whatever the order of their keys.
func (b *broker) wantRows(begin time.Time, want ...string) {
	b.t.Helper()
	b.eventually(fmt.Sprint(len(want), " records"), func() bool { return len(b.queue.taken()) >= len(want) })
	for i, w := range want {
		var row map[string]any
		if err := json.Unmarshal([]byte(w), &row); err != nil {
			b.t.Fatalf("%s: %v", w, err)
		}
		text, _ := json.Marshal(row)
		want[i] = string(text)
	}
	if diff := cmp.Diff(want, b.rows(begin)); diff != "" {
		b.t.Errorf("-want +got\n%s", diff)
	}
}

// TestEvents leads clients through their lives; each event has all of its columns, in the order in which they come.
func TestEvents(t *testing.T) {
	begin := time.Now()
	all := selecting(t, `SELECT * FROM "$events/#"`)
	common := `"timestamp": 1, "node": "broker@test"`
	t.Run("MQTT 5", func(t *testing.T) {
		b := start(t, all)
		c := dial(t, b.address, 5)
		user := []packets.UserProperty{{Key: "k", Val: "1"}, {Key: "k", Val: "2"}}
		pairs := `"User-Property": {"k": "2"}, "User-Property-Pairs": [{"key": "k", "value": "1"}, {"key": "k", "value": "2"}]`
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Connect},
			Connect: packets.ConnectParams{
				ProtocolName: []byte("MQTT"), ClientIdentifier: "v7", Clean: true, Keepalive: 60, UsernameFlag: true, Username: []byte("depot"),
			},
			Properties: packets.Properties{
				SessionExpiryInterval: 300, SessionExpiryIntervalFlag: true, ReceiveMaximum: 10, MaximumPacketSize: 1000, TopicAliasMaximum: 5,
				RequestProblemInfo: 0, RequestProblemInfoFlag: true, User: user,
			},
		})
		c.read()
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
			Filters:    packets.Subscriptions{{Filter: "commands/v7/#", Qos: 2, Identifier: 9}, {Filter: "bad/#/filter", Qos: 1}},
			Properties: packets.Properties{SubscriptionIdentifier: []int{9}, User: user},
		})
		c.read()
		c.publish("nobody/listens", 1, 2, `{"a":1}`, user...)
		c.read()
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1}, PacketID: 3,
			Filters: packets.Subscriptions{{Filter: "commands/v7/#"}, {Filter: "never/had"}}, Properties: packets.Properties{User: user},
		})
		c.next()
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Disconnect},
			Properties:  packets.Properties{ReasonString: "parked", User: user, SessionExpiryInterval: 10, SessionExpiryIntervalFlag: true},
		})
		who := `"clientid": "v7", "username": "depot", `
		conn := who + `"peername": "peer", "sockname": "sock", "proto_name": "MQTT", "proto_ver": 5, `
		terms := `"keepalive": 60, "clean_start": true, "expiry_interval": 300, "connected_at": 1, "conn_props": {"Session-Expiry-Interval": 300,
			"Receive-Maximum": 10, "Maximum-Packet-Size": 1000, "Topic-Alias-Maximum": 5, "Request-Problem-Information": 0, ` + pairs + `}, `
		topical := who + `"peerhost": "127.0.0.1", "peername": "peer", "client_attrs": {}, `
		b.wantRows(
			begin,
			`{"event": "client.connack", "reason_code": "success", `+conn+terms+common+`}`,
			`{"event": "client.connected", "is_bridge": false, "client_attrs": {}, `+conn+terms+common+`}`,
			`{"event": "client.check_authz_complete", "topic": "commands/v7/#", "action": "subscribe", "result": "allow", "authz_source": "default", `+topical+common+`}`,
			`{"event": "session.subscribed", "topic": "commands/v7/#", "qos": 2, "sub_props": {"Subscription-Identifier": 9, `+pairs+`}, `+topical+common+`}`,
			`{"event": "client.check_authz_complete", "topic": "nobody/listens", "action": "publish", "result": "allow", "authz_source": "default", `+topical+common+`}`,
			`{"event": "message.dropped", "reason": "no_subscribers", "id": "id", "payload": "{\"a\":1}", "topic": "nobody/listens", "qos": 1,
				"flags": {"dup": false, "retain": false}, "pub_props": {`+pairs+`}, "publish_received_at": 1, `+topical+common+`}`,
			`{"event": "session.unsubscribed", "topic": "commands/v7/#", "qos": 2, "unsub_props": {`+pairs+`}, `+topical+common+`}`,
			`{"event": "client.disconnected", "reason": "normal", "connected_at": 1, "disconnected_at": 1, "client_attrs": {},
				"disconn_props": {"Session-Expiry-Interval": 10, "Reason-String": "parked", `+pairs+`}, `+conn+common+`}`,
		)
		for _, r := range b.queue.taken() {
			if r.Lane != "v7" || !r.Ordered || r.ClientID != "v7" || !strings.HasPrefix(r.Topic, "$events/") {
				t.Errorf("record %+v", r)
			}
		}
		for event, n := range map[string]float64{"client.connected": 1, "client.check_authz_complete": 2, "message.dropped": 1, "delivery.dropped": 0} {
			b.wantMetric(fmt.Sprintf("throughline_events_raised_total{event=%q}", event), n)
			b.wantMetric(fmt.Sprintf("throughline_events_matched_total{event=%q}", event), n)
		}
	})
	t.Run("MQTT 3.1.1", func(t *testing.T) {
		b := start(t, all)
		p, _, err := connectPeer(b.address, 4, "v8", false)
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
		conn := `"clientid": "v8", "peername": "peer", "sockname": "sock", "proto_name": "MQTT", "proto_ver": 4, "connected_at": 1, `
		terms := `"keepalive": 60, "clean_start": false, "expiry_interval": 4294967295, "conn_props": {"User-Property": {}}, `
		b.wantRows(
			begin,
			`{"event": "client.connack", "reason_code": "success", `+conn+terms+common+`}`,
			`{"event": "client.connected", "is_bridge": false, "client_attrs": {}, `+conn+terms+common+`}`,
			`{"event": "client.disconnected", "reason": "tcp_closed", "disconnected_at": 1, "client_attrs": {}, "disconn_props": {"User-Property": {}}, `+conn+common+`}`,
		)
	})
}

// TestDisconnectReasons: how a connection ends, as EMQX calls it.
func TestDisconnectReasons(t *testing.T) {
	tests := []struct {
		name    string
		version byte
		end     func(*broker, *rawClient)
		want    string
	}{
		{"says goodbye", 4, func(_ *broker, c *rawClient) { c.bytes(packets.Disconnect<<4, 0) }, "normal"},
		{"says goodbye", 5, func(_ *broker, c *rawClient) { c.bytes(packets.Disconnect<<4, 0) }, "normal"},
		{"goodbye with will", 5, func(_ *broker, c *rawClient) { c.bytes(packets.Disconnect<<4, 2, 4, 0) }, "disconnect_with_will_message"},
		{"goodbye for a reason", 5, func(_ *broker, c *rawClient) { c.bytes(packets.Disconnect<<4, 2, 0x98, 0) }, "administrative_action"},
		{"closes", 4, func(_ *broker, c *rawClient) { c.conn.Close() }, "tcp_closed"},
		{"silent", 5, func(*broker, *rawClient) {}, "keepalive_timeout"},
		{"malformed", 5, func(_ *broker, c *rawClient) { c.bytes(packets.Subscribe<<4|2, 1, 0) }, "internal_error"},
		{"malformed", 4, func(_ *broker, c *rawClient) { c.bytes(packets.Subscribe<<4|2, 1, 0) }, "internal_error"},
		{"second CONNECT", 5, func(_ *broker, c *rawClient) { c.connect("v7") }, "protocol_error"},
		{"taken over", 4, func(b *broker, c *rawClient) { reconnect(b, c.version, false) }, "takenover"},
		{"taken over", 5, func(b *broker, c *rawClient) { reconnect(b, c.version, false) }, "takenover"},
		{"discarded", 5, func(b *broker, c *rawClient) { reconnect(b, c.version, true) }, "discarded"},
		{"server stops", 5, func(b *broker, _ *rawClient) {
			b.server.StopAccepting()
			if err := b.server.DisconnectClients(b.t.Context()); err != nil {
				b.t.Error(err)
			}
			if len(b.queue.taken()) != 1 {
				b.t.Error("it is not told before the connections have ended")
			}
		}, "server_shutting_down"},
		{"server stops", 4, func(b *broker, _ *rawClient) {
			b.server.StopAccepting()
			if err := b.server.DisconnectClients(b.t.Context()); err != nil {
				b.t.Error(err)
			}
		}, "server_shutting_down"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s, version %d", tt.name, tt.version), func(t *testing.T) {
			b := start(t, selecting(t, `SELECT reason, clientid FROM "$events/client_disconnected"`))
			c := dial(t, b.address, tt.version)
			if _, err := c.conn.Write(appendConnect(nil, tt.version, "v7", false, 1)); err != nil {
				t.Fatal(err)
			}
			c.read()
			tt.end(b, c)
			b.eventually("the event", func() bool { return len(b.queue.taken()) > 0 })
			if got, want := string(b.queue.taken()[0].Body), fmt.Sprintf(`{"reason":%q,"clientid":"v7"}`, tt.want); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

func reconnect(b *broker, version byte, clean bool) {
	p, _, err := connectPeer(b.address, version, "v7", clean)
	if err != nil {
		b.t.Error(err)
		return
	}
	b.t.Cleanup(func() { p.Close() })
}

// TestRefusedConnects: a CONNECT that is refused has an event too, and none of a client that is connected, nor of one that is gone.
func TestRefusedConnects(t *testing.T) {
	no, yes := false, true
	tests := []struct {
		name    string
		version byte
		auth    auth.Options
		props   packets.Properties
		want    string
	}{
		{"not known", 5, auth.Options{Anonymous: &no}, packets.Properties{}, "bad_username_or_password"},
		{"not known", 4, auth.Options{Anonymous: &no}, packets.Properties{}, "bad_username_or_password"},
		{"method", 5, auth.Options{Anonymous: &yes}, packets.Properties{AuthenticationMethod: "none"}, "bad_authentication_method"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s, version %d", tt.name, tt.version), func(t *testing.T) {
			b := start(t, selecting(t, `SELECT event, reason_code, clientid, username, proto_ver, keepalive, connected_at FROM "$events/client/+"`), func(o *hooks.Options) {
				tt.auth.Listeners = []auth.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}
				o.Auth = auth.NewPolicy(tt.auth)
			})
			c := dial(t, b.address, tt.version)
			c.send(packets.Packet{
				FixedHeader: packets.FixedHeader{Type: packets.Connect}, Properties: tt.props,
				Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: "v7", Clean: true, Keepalive: 7, UsernameFlag: true, Username: []byte("u")},
			})
			if got := c.read(); got.ReasonCode == 0 {
				t.Fatal("the client is let in")
			}
			b.eventually("the end of the connection", func() bool { return b.metric("throughline_connections") == 0 })
			b.wantRows(time.Now(), fmt.Sprintf(`{"event": "client.connack", "reason_code": %q, "clientid": "v7", "username": "u", "proto_ver": %d, "keepalive": 7}`, tt.want, tt.version))
		})
	}
}

// TestDeniedEvents: what the policy forbids is told, and not that it happened.
func TestDeniedEvents(t *testing.T) {
	yes := true
	b := start(t, selecting(t, `SELECT event, topic, action, result FROM "$events/auth/#", "$events/session/+", "$events/message/+"`), func(o *hooks.Options) {
		o.Auth = auth.NewPolicy(auth.Options{Anonymous: &yes, Listeners: []auth.Listener{{Name: "tcp", Address: ":1883"}}})
	})
	c := b.client(5, "v7")
	if got := c.subscribe("a/#"); got.ReasonCodes[0] < 0x80 {
		t.Errorf("SUBACK %x", got.ReasonCodes)
	}
	c.publish("a/b", 1, 1, "x")
	if got := show(c.read()); got != "Puback 0x87" {
		t.Errorf("got %s", got)
	}
	b.wantRows(
		time.Now(),
		`{"event": "client.check_authz_complete", "topic": "a/#", "action": "subscribe", "result": "deny"}`,
		`{"event": "client.check_authz_complete", "topic": "a/b", "action": "publish", "result": "deny"}`,
	)
}

// TestDroppedDeliveries: each reason for which a message does not reach one of its subscribers.
func TestDroppedDeliveries(t *testing.T) {
	begin := time.Now()
	const sql = `SELECT * FROM "$events/message/delivery_dropped", "$events/message/dropped"`
	row := func(reason, receiver, payload string, qos int, props string) string {
		return fmt.Sprintf(`{"event": "delivery.dropped", "reason": %q, "id": "id", "from_clientid": "publisher", "clientid": %q, "payload": %q,
			"peerhost": "127.0.0.1", "peername": "peer", "topic": "a", "qos": %d, "flags": {"dup": false, "retain": false}, "pub_props": {%s"User-Property": {}},
			"publish_received_at": 1, "timestamp": 1, "node": "broker@test"}`, reason, receiver, payload, qos, props)
	}
	// offline has a session that outlives its connection, with a subscription.
	offline := func(t *testing.T, b *broker) {
		p, _, err := connectPeer(b.address, 5, "offline", false)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.subscribe("a", 1); err != nil {
			t.Fatal(err)
		}
		p.Close()
		b.eventually("the end of the connection", func() bool { return b.metric("throughline_mqtt_clients") == 0 })
	}
	t.Run("no_local", func(t *testing.T) {
		b := start(t, selecting(t, sql))
		c := b.client(5, "publisher")
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
			Filters: packets.Subscriptions{{Filter: "a", Qos: 1, NoLocal: true}},
		})
		c.read()
		c.publish("a", 0, 0, "x")
		b.wantRows(begin, row("no_local", "publisher", "x", 0, ""))
	})
	t.Run("qos0_msg", func(t *testing.T) {
		b := start(t, selecting(t, sql))
		offline(t, b)
		b.client(4, "publisher").publish("a", 0, 0, "x")
		b.wantRows(begin, row("qos0_msg", "offline", "x", 0, ""))
	})
	t.Run("too_large", func(t *testing.T) {
		b := start(t, selecting(t, sql))
		c := dial(t, b.address, 5)
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Connect}, Properties: packets.Properties{MaximumPacketSize: 40},
			Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: "small", Clean: true},
		})
		c.read()
		c.subscribe("a")
		payload := strings.Repeat("x", 60)
		b.client(4, "publisher").publish("a", 1, 1, payload)
		b.wantRows(begin, row("too_large", "small", payload, 1, ""))
	})
	t.Run("expired", func(t *testing.T) {
		b := start(t, selecting(t, sql))
		offline(t, b)
		c := b.client(5, "publisher")
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1}, TopicName: "a", PacketID: 1, Payload: []byte("x"),
			Properties: packets.Properties{MessageExpiryInterval: 1},
		})
		c.read()
		time.Sleep(1100 * time.Millisecond) // what it takes to expire
		p, _, err := connectPeer(b.address, 5, "offline", false)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		b.wantRows(begin, row("expired", "offline", "x", 1, `"Message-Expiry-Interval": 1, `))
	})
	t.Run("queued before there was a rule", func(t *testing.T) {
		var there atomic.Bool
		b := start(t, selecting(t, sql), func(o *hooks.Options) {
			with := o.Rules
			o.Rules = func() *rules.Set {
				if there.Load() {
					return with()
				}
				return nil
			}
		})
		offline(t, b)
		c := b.client(5, "publisher")
		c.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1}, TopicName: "a", PacketID: 1, Payload: []byte("x"),
			Properties: packets.Properties{MessageExpiryInterval: 1},
		})
		c.read()
		there.Store(true)
		time.Sleep(1100 * time.Millisecond) // what it takes to expire
		p, _, err := connectPeer(b.address, 5, "offline", false)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		b.wantRows(begin, `{"event": "delivery.dropped", "reason": "expired", "from_clientid": "publisher", "clientid": "offline", "payload": "x", "topic": "a",
			"qos": 1, "flags": {"dup": false, "retain": false}, "pub_props": {"User-Property": {}}, "timestamp": 1, "node": "broker@test"}`)
	})
	t.Run("retained is taken", func(t *testing.T) {
		b := start(t, selecting(t, sql))
		c := b.client(4, "publisher")
		c.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1, Retain: true}, TopicName: "a", PacketID: 1, Payload: []byte("x")})
		c.read()
		if got := b.queue.taken(); len(got) > 0 {
			t.Errorf("records %v", got)
		}
	})
	t.Run("more than a packet may raise", func(t *testing.T) {
		b := start(t, selecting(t, sql))
		const sessions = 300
		for i := range sessions {
			p, _, err := connectPeer(b.address, 4, fmt.Sprint("offline-", i), false)
			if err == nil {
				err = p.subscribe("a", 1)
			}
			if err != nil {
				t.Fatal(err)
			}
			p.Close()
		}
		b.eventually("the end of the connections", func() bool { return b.metric("throughline_mqtt_clients") == 0 })
		b.client(4, "publisher").publish("a", 0, 0, "x")
		b.wantMetric(`throughline_events_dropped_total{event="delivery.dropped",reason="too_many"}`, sessions-256)
		b.wantMetric(`throughline_events_raised_total{event="delivery.dropped"}`, 256)
	})
}

// TestPresenceInOrder: whatever many connections with one client id do at once, each is told to have come and then to have gone,
// and none comes before the one before it is gone.
func TestPresenceInOrder(t *testing.T) {
	b := start(t, selecting(t, `SELECT event, peername, connected_at, reason FROM "$events/client/connected", "$events/client/disconnected"`))
	const together, rounds = 50, 4
	var all sync.WaitGroup
	for i := range together {
		all.Go(func() {
			for round := range rounds {
				p, _, err := connectPeer(b.address, byte(4+(i+round)%2), "v7", round%2 == 0)
				if err != nil {
					continue // the next has cut it off before its CONNACK
				}
				if i%3 == 0 {
					_, _ = p.Write([]byte{packets.Disconnect << 4, 0})
				}
				p.Close()
			}
		})
	}
	all.Wait()
	b.eventually("the end of all connections", func() bool { return b.metric("throughline_connections") == 0 })
	type told struct {
		Event, Peername, Reason string
		Since                   int64 `json:"connected_at"`
	}
	var last told
	records := b.queue.taken()
	for i, r := range records {
		var now told
		if err := json.Unmarshal(r.Body, &now); err != nil {
			t.Fatal(err)
		}
		switch {
		case i%2 == 0 && now.Event != "client.connected", i%2 == 1 && now.Event != "client.disconnected":
			t.Fatalf("%d: %+v after %+v", i, now, last)
		case i%2 == 1 && (now.Peername != last.Peername || now.Since != last.Since):
			t.Fatalf("%d: %+v is gone after %+v came", i, now, last)
		}
		last = now
	}
	if len(records) < 2*together || len(records)%2 != 0 {
		t.Errorf("%d events", len(records))
	}
}

// TestPresenceBeforeALateEnd: a connection whose end takes too long is told to be gone before the next one comes, and not again.
func TestPresenceBeforeALateEnd(t *testing.T) {
	stuck, release := make(chan struct{}), make(chan struct{})
	var b *broker
	b = start(t, selecting(t, `SELECT event, reason FROM "$events/client/connected", "$events/client/disconnected", "stuck"`), func(o *hooks.Options) {
		o.Append = func(records []bridge.Record) (hooks.Commit, error) {
			if records[0].Topic == "stuck" {
				close(stuck)
				<-release
				return done(nil), nil
			}
			return b.queue.append(records)
		}
	})
	old := b.client(4, "v7")
	old.publish("stuck", 0, 0, "x")
	<-stuck
	p, _, err := connectPeer(b.address, 4, "v7", false)
	if err != nil {
		t.Fatal(err)
	}
	close(release)
	b.eventually("the end of the old connection", func() bool { return b.metric("throughline_connections") == 1 })
	p.Close()
	b.wantRows(
		time.Now(),
		`{"event": "client.connected"}`,
		`{"event": "client.disconnected", "reason": "takenover"}`,
		`{"event": "client.connected"}`,
		`{"event": "client.disconnected", "reason": "tcp_closed"}`,
	)
}

// TestEventsThatCannotBeStored: clients don't notice; it is counted, and the log says so without a line for each.
func TestEventsThatCannotBeStored(t *testing.T) {
	tests := []struct {
		reason string
		answer func() (hooks.Commit, error)
	}{
		{"full", func() (hooks.Commit, error) { return nil, fmt.Errorf("append: %w", bridge.ErrFull) }},
		{"append_failed", func() (hooks.Commit, error) { return nil, errors.New("no disk") }},
		{"commit_failed", func() (hooks.Commit, error) { return done(errors.New("no disk")), nil }},
		{"panic", func() (hooks.Commit, error) { panic("no disk") }},
	}
	for _, tt := range tests {
		t.Run(tt.reason, func(t *testing.T) {
			b := start(t, selecting(t, `SELECT clientid FROM "$events/client/connected"`))
			b.queue.next(tt.answer)
			const n = 30
			for i := range n {
				c := b.client(5, fmt.Sprint("v", i))
				c.next()
				c.conn.Close()
			}
			b.wantMetric(fmt.Sprintf(`throughline_events_dropped_total{event="client.connected",reason=%q}`, tt.reason), n)
			if lines := strings.Count(b.log.String(), "no disk") + strings.Count(b.log.String(), "append: "); lines < 1 || lines > 10 {
				t.Errorf("%d lines:\n%s", lines, b.log)
			}
		})
	}
}

// TestPendingEventsHoldNothing: an acknowledgement waits for the publish's own commit alone.
func TestPendingEventsHoldNothing(t *testing.T) {
	b := start(t, selecting(t, `SELECT clientid FROM "$events/#"`))
	b.queue.next(func() (hooks.Commit, error) { return pending(), nil })
	c := b.client(5, "v7")
	c.subscribe("a")
	c.publish("nobody", 1, 1, "x")
	if got := show(c.read()); got != "Puback 0x00" {
		t.Errorf("got %s", got)
	}
}

// TestEventTrace: a delivery belongs to the event's span, and that of a dropped message to its publisher's trace.
func TestEventTrace(t *testing.T) {
	b := start(t, selecting(t, `SELECT event, trace_id, sw8 FROM "$events/client/connected", "$events/message/dropped"`))
	c := b.client(5, "v7")
	vehicle := tracectx.Context{Sampled: true, TraceID: "t-1", SegmentID: "s-1", SpanID: 3, Service: "vehicle", Instance: "v7", Endpoint: "drive", Peer: "broker"}
	c.publish("nobody", 1, 1, "x", packets.UserProperty{Key: "sw8", Val: vehicle.Carrier().SW8})
	c.read()
	b.eventually("two records", func() bool { return len(b.queue.taken()) == 2 })
	b.eventually("three segments", func() bool { return len(b.tracer.Segments()) == 3 }) // one of the publish
	for i, want := range []string{"mqtt/event/client/connected", "mqtt/event/message/dropped"} {
		r := b.queue.taken()[i]
		at := slices.IndexFunc(b.tracer.Segments(), func(s *tracectxtest.Segment) bool { return s.Span(0).Operation == want })
		if at < 0 {
			t.Fatalf("no segment of %s", want)
		}
		s := b.tracer.Segments()[at]
		if s.TraceID != r.TraceID || !strings.Contains(string(r.Body), `"trace_id":"`+r.TraceID+`"`) || !strings.Contains(string(r.Body), `"sw8":"`+r.SW8+`"`) {
			t.Errorf("trace %s, record %+v, body %s", s.TraceID, r, r.Body)
		}
		if rule := s.Span(1); rule == nil || rule.Operation != "rule/r" {
			t.Errorf("%s: no span of the rule", want)
		}
		if fromVehicle := r.TraceID == "t-1"; fromVehicle != (i == 1) {
			t.Errorf("%s is in trace %s", want, r.TraceID)
		}
	}
	b.wantMetric(`throughline_rule_matches_total{rule="r",trace="new"}`, 1)
	b.wantMetric(`throughline_rule_matches_total{rule="r",trace="upstream"}`, 1)
}

// TestNoEventOfItsOwnDoing: what the broker publishes itself raises none.
func TestNoEventOfItsOwnDoing(t *testing.T) {
	b := start(t, selecting(t, `SELECT topic FROM "$events/message/+"`))
	c := b.client(5, "v7")
	c.subscribe("other") // somebody is there; $SYS topics were published at the start
	c.publish("nobody", 0, 0, "x")
	b.wantRows(time.Now(), `{"topic": "nobody"}`)
}

// TestEventThatRepublishes: what a rule publishes on an event reaches its subscribers, and is never the cause of another event.
func TestEventThatRepublishes(t *testing.T) {
	b := start(t, withRules(t, `
rules:
  - name: presence
    sql: SELECT clientid FROM "$events/client/connected"
    actions: [{republish: {topic: "presence/${clientid}", qos: 1, payload: {online: "${clientid}"}}}]
  - name: lost
    sql: SELECT topic FROM "$events/message/dropped"
    actions: [{republish: {topic: "lost/${topic}", payload: "x"}}]
  - name: missed
    sql: SELECT topic FROM "$events/message/delivery_dropped"
    actions: [{republish: {topic: "missed", payload: "x"}}]
`))
	gone, _, err := connectPeer(b.address, 4, "offline", false)
	if err == nil {
		err = gone.subscribe("missed", 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	b.eventually("the end of the connection", func() bool { return b.metric("throughline_mqtt_clients") == 0 })
	dashboard := b.client(5, "dashboard")
	dashboard.subscribe("presence/#")
	c := b.client(5, "v7")
	if got := dashboard.read(); got.TopicName != "presence/v7" || string(got.Payload) != `{"online":"v7"}` {
		t.Errorf("got %s", show(got))
	}
	c.publish("nobody", 0, 0, "x") // dropped; so is lost/nobody
	c.publish("missed", 0, 0, "x") // dropped for the client that is offline; so is what comes of that
	c.next()
	for event, n := range map[string]float64{"message.dropped": 1, "delivery.dropped": 1} {
		b.wantMetric(fmt.Sprintf("throughline_events_raised_total{event=%q}", event), n)
	}
	b.wantMetric(`throughline_rule_republished_total{rule="lost"}`, 1)
	b.wantMetric(`throughline_rule_republished_total{rule="missed"}`, 1)
}

// TestWillWithoutSubscribers: a will is a message of its client's, whose drop is told as any other's.
func TestWillWithoutSubscribers(t *testing.T) {
	begin := time.Now()
	b := start(t, selecting(t, `SELECT event, reason, id, clientid, payload, topic, qos, publish_received_at FROM "$events/client/disconnected", "$events/message/dropped"`))
	c := dial(t, b.address, 4)
	c.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect: packets.ConnectParams{
			ProtocolName: []byte("MQTT"), ClientIdentifier: "v7", Clean: true, Keepalive: 60,
			WillFlag: true, WillTopic: "lost/v7", WillPayload: []byte("gone"), WillQos: 1,
		},
	})
	c.read()
	c.conn.Close()
	b.wantRows(
		begin,
		`{"event": "client.disconnected", "reason": "tcp_closed", "clientid": "v7"}`,
		`{"event": "message.dropped", "reason": "no_subscribers", "id": "id", "clientid": "v7", "payload": "gone", "topic": "lost/v7", "qos": 1, "publish_received_at": 1}`,
	)
}
