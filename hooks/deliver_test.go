package hooks_test

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/sessions"
)

func (b *broker) subject() subject { return subject{address: b.address, wait: patience} }

// publication is a PUBLISH without packet identifier, as QoS 0 has it.
func publication(topic, payload string, change ...func(*packets.Packet)) packets.Packet {
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish}, TopicName: topic, Payload: []byte(payload),
	}
	for _, fn := range change {
		fn(&pk)
	}
	return pk
}

func retained(pk *packets.Packet) { pk.FixedHeader.Retain = true }

// subscription subscribes with the options of MQTT 5, and reads the SUBACK.
func (c *rawClient) subscription(filter string, change ...func(*packets.Subscription)) {
	c.t.Helper()
	sub := packets.Subscription{Filter: filter, Qos: 1}
	for _, fn := range change {
		fn(&sub)
	}
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 60_000,
		Filters: packets.Subscriptions{sub},
	}
	if sub.Identifier > 0 {
		pk.Properties.SubscriptionIdentifier = []int{sub.Identifier}
	}
	c.send(pk)
	if got := show(c.read()); got != "Suback 0x00" {
		c.t.Fatalf("subscribe to %q: got %s", filter, got)
	}
}

// TestPropertiesTravel: what MQTT 5 has passed on unchanged is, in order, and the expiry counts down [MQTT-3.3.2-6].
func TestPropertiesTravel(t *testing.T) {
	b := start(t)
	five, four := b.client(5, "five"), b.client(4, "four")
	five.subscription("a/+", func(s *packets.Subscription) { s.Identifier = 300 })
	five.subscription("a/#", func(s *packets.Subscription) { s.Identifier = 7 })
	four.subscribe("a/b")
	sent := packets.Properties{
		PayloadFormat: 1, PayloadFormatFlag: true, MessageExpiryInterval: 100, ContentType: "text/plain",
		ResponseTopic: "answers/v7", CorrelationData: []byte{0, 1, 2},
		User: []packets.UserProperty{{Key: "b", Val: "1"}, {Key: "a", Val: "2"}, {Key: "b", Val: "3"}},
	}
	b.client(5, "v7").send(publication("a/b", "héllo", func(pk *packets.Packet) { pk.Properties = sent }))
	got := five.read()
	want := sent
	want.SubscriptionIdentifier = []int{7, 300}
	if got.Properties.MessageExpiryInterval < 90 || got.Properties.MessageExpiryInterval > 100 {
		t.Errorf("expiry is %d, of 100", got.Properties.MessageExpiryInterval)
	}
	want.MessageExpiryInterval = got.Properties.MessageExpiryInterval
	if diff := cmp.Diff(want, got.Properties); diff != "" || string(got.Payload) != "héllo" {
		t.Errorf("payload %q, properties:\n%s", got.Payload, diff)
	}
	if got := four.read(); got.TopicName != "a/b" || string(got.Payload) != "héllo" {
		t.Errorf("MQTT 3.1.1 got %s %q", show(got), got.Payload)
	}
	if got := show(five.next()...) + show(four.next()...); got != "" {
		t.Errorf("more came: %s", got)
	}
}

// The options of overlapping subscriptions, taken together (MQTT 5, 3.3.4).
func TestOverlappingSubscriptions(t *testing.T) {
	b := start(t)
	v7 := b.client(5, "v7")
	v7.subscription("+/b", func(s *packets.Subscription) { s.NoLocal, s.Qos, s.Identifier = true, 1, 1 })
	other := b.client(5, "other")
	own := publication("a/b", "own")

	v7.send(own)
	if got := show(v7.next()...); got != "" {
		t.Errorf("no local: got %s", got)
	}
	v7.subscription("a/#", func(s *packets.Subscription) { s.Qos, s.Identifier, s.RetainAsPublished = 0, 2, true })
	v7.send(own)
	if got := v7.next(); len(got) != 1 || !slices.Equal(got[0].Properties.SubscriptionIdentifier, []int{2}) {
		t.Errorf("no local on one of two: got %s", show(got...))
	}
	other.publish("a/b", 1, 1, "other's")
	other.read()
	if got := v7.read(); got.FixedHeader.Qos != 1 || !slices.Equal(got.Properties.SubscriptionIdentifier, []int{1, 2}) {
		t.Errorf("QoS %d, identifiers %v", got.FixedHeader.Qos, got.Properties.SubscriptionIdentifier)
	}
	for range 10 {
		other.send(publication("a/b", "other's", retained))
		if got := v7.read(); !got.FixedHeader.Retain {
			t.Fatal("retain as published on one of two: the flag is not set")
		}
	}
	plain := b.client(4, "plain")
	plain.subscribe("a/b")
	plain.next() // the retained message
	other.send(publication("a/b", "live", retained))
	if got := plain.read(); got.FixedHeader.Retain {
		t.Error("a live message has the retain flag [MQTT-3.3.1-9 of 3.1.1]")
	}
}

// [MQTT-3.3.1-9] to [MQTT-3.3.1-11]: retain handling; and SUBACK comes first.
func TestRetainHandling(t *testing.T) {
	b := start(t)
	b.client(4, "v7").send(publication("a/b", "x", retained))
	b.wantMetric("throughline_mqtt_retained_messages", 20+1) // beside $SYS topics
	for handling, want := range []string{"Publish a/b; Publish a/b", "Publish a/b; ", "; "} {
		c := b.client(5, fmt.Sprint("c", handling))
		var got []string
		for range 2 {
			c.subscription("a/#", func(s *packets.Subscription) { s.RetainHandling = byte(handling) })
			got = append(got, show(c.next()...))
		}
		if got := strings.Join(got, "; "); got != want {
			t.Errorf("retain handling %d: got %q, want %q", handling, got, want)
		}
	}
	c := b.client(5, "shared")
	c.subscription("$share/g/a/#")
	if got := show(c.next()...); got != "" {
		t.Errorf("a shared subscription got %s", got)
	}
}

// TestRetainedIsNeverOlder: a new subscriber ends up with the newest message of a topic, whatever is published meanwhile.
func TestRetainedIsNeverOlder(t *testing.T) {
	b := start(t)
	vehicle := b.client(4, "v7")
	for round := range 100 {
		topic := fmt.Sprint("state/", round)
		vehicle.send(publication(topic, "old", retained))
		vehicle.next()
		c := b.client(4, fmt.Sprint("c", round))
		var both sync.WaitGroup
		both.Go(func() { c.subscribeAt(0, topic) })
		both.Go(func() { vehicle.send(publication(topic, "new", retained)) })
		both.Wait()
		vehicle.next()
		last := ""
		for _, pk := range c.next() {
			if pk.FixedHeader.Type == packets.Publish {
				last = string(pk.Payload)
			}
		}
		if last != "new" {
			t.Fatalf("round %d: the last message is %q", round, last)
		}
	}
}

func TestSharedSubscription(t *testing.T) {
	b := start(t)
	s := b.subject()
	var online []*rawClient
	for i := range 3 {
		c := s.client(t, 5, fmt.Sprint("online", i), persistent)
		c.subscription("$share/g/a/+")
		online = append(online, c)
	}
	away := s.client(t, 5, "away", persistent)
	away.subscription("$share/g/a/+")
	away.conn.Close()
	both := s.client(t, 5, "both")
	both.subscription("a/#") // not shared: gets all
	b.wantMetric("throughline_mqtt_clients", 4)
	v7 := b.client(5, "v7")
	for i := range 30 {
		v7.publish("a/b", 1, uint16(i+1), "x")
	}
	v7.next()
	for i, c := range online {
		if got := len(c.next()); got != 10 {
			t.Errorf("member %d got %d messages, want 10", i, got)
		}
	}
	if got := len(both.next()); got != 30 {
		t.Errorf("the other subscriber got %d messages, want 30", got)
	}
	for _, c := range online {
		c.conn.Close()
	}
	b.wantMetric("throughline_mqtt_clients", 2)
	v7.publish("a/b", 1, 100, "nobody is there")
	v7.next()
	b.wantMetric("throughline_mqtt_messages_queued", 1) // one of those who are away
}

func TestWills(t *testing.T) {
	b := start(t)
	s := b.subject()
	watcher := b.client(5, "watcher")
	watcher.subscription("will/#", func(s *packets.Subscription) { s.RetainAsPublished = true })
	n := 0
	vehicle := func(version byte, options ...connectOption) *rawClient {
		n++
		return s.client(t, version, fmt.Sprint("v", n), append([]connectOption{func(pk *packets.Packet) {
			pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload = true, fmt.Sprint("will/", n), []byte("gone")
		}}, options...)...)
	}
	delayed := func(seconds uint32) connectOption {
		return func(pk *packets.Packet) { pk.Connect.WillProperties.WillDelayInterval = seconds }
	}
	clean := func(pk *packets.Packet) { pk.Connect.Clean = true }
	want := func(what string) packets.Packet {
		t.Helper()
		got := watcher.read()
		if got.TopicName != fmt.Sprint("will/", n) {
			t.Errorf("%s: got %s", what, show(got))
		}
		return got
	}
	wantNone := func(what string) {
		t.Helper()
		if got := show(watcher.next()...); got != "" {
			t.Errorf("%s: got %s", what, got)
		}
	}

	vehicle(4).conn.Close()
	want("connection lost")
	vehicle(4).disconnect()
	wantNone("DISCONNECT")
	vehicle(5).bytes(0xe0, 0)
	b.wantMetric("throughline_mqtt_clients", 1)
	wantNone("DISCONNECT of MQTT 5 without a code")
	vehicle(5).bytes(0xe0, 1, 4) // [MQTT-3.14.4-3], 0x04: with the will; without a property length
	want("DISCONNECT with the will")
	vehicle(5).bytes(0xe0, 2, 0x80, 0)
	want("DISCONNECT for an error")
	vehicle(5).bytes(0x00, 0)
	want("malformed packet")
	vehicle(4).bytes(0xe0, 0x80, 0x00) // a padded length
	b.wantMetric("throughline_mqtt_clients", 1)
	wantNone("DISCONNECT with a padded length")

	vehicle(5, func(pk *packets.Packet) {
		pk.Connect.WillQos, pk.Connect.WillRetain = 1, true
		pk.Connect.WillProperties = packets.Properties{
			ContentType: "text/plain", ResponseTopic: "r", CorrelationData: []byte("c"), MessageExpiryInterval: 60,
			PayloadFormat: 1, PayloadFormatFlag: true, User: []packets.UserProperty{{Key: "k", Val: "v"}},
		}
	}).conn.Close()
	got := want("will with properties")
	if p := got.Properties; p.ContentType != "text/plain" || p.ResponseTopic != "r" || string(p.CorrelationData) != "c" ||
		p.MessageExpiryInterval == 0 || p.PayloadFormat != 1 || len(p.User) != 1 || got.FixedHeader.Qos != 1 || !got.FixedHeader.Retain {
		t.Errorf("the will came without all its properties: %+v", got)
	}

	vehicle(5, delayed(60)).conn.Close()
	want("a delay that the session doesn't last") // MQTT 5, 3.1.3.2.2
	vehicle(5, persistent, delayed(1)).conn.Close()
	want("a delay that passes")
	vehicle(5, persistent, delayed(60)).conn.Close()
	b.wantMetric("throughline_mqtt_clients", 1)
	back := s.client(t, 5, fmt.Sprint("v", n), persistent)
	wantNone("resumed in time") // [MQTT-3.1.3-9]
	back.disconnect()
	vehicle(5, persistent, delayed(60)).conn.Close()
	b.wantMetric("throughline_mqtt_clients", 1)
	s.client(t, 5, fmt.Sprint("v", n), clean)
	want("a new session instead of the old one")
	again := vehicle(4)
	s.client(t, 4, fmt.Sprint("v", n))
	want("taken over") // [MQTT-3.1.4-3]
	again.wantClosed()
}

// TestSessionExpiry: a session is resumed until its time is over (MQTT 5, 3.1.2.11.2), and no longer.
func TestSessionExpiry(t *testing.T) {
	b := start(t)
	s := b.subject()
	for _, c := range []struct {
		version byte
		seconds uint32
		lasts   bool
	}{{5, 0, false}, {5, 1, false}, {5, 60, true}, {5, 0xffffffff, true}, {4, 0, true}} {
		id := fmt.Sprintf("%d for %d", c.version, c.seconds)
		v7 := s.client(t, c.version, id, expiring(c.seconds))
		v7.subscribed("commands/" + id)
		v7.conn.Close()
		b.wantMetric("throughline_mqtt_clients", 0)
		if !c.lasts {
			b.eventually(id+" to expire", func() bool { _, there := b.server.Mochi().Clients.Get(id); return !there })
		}
		v7 = s.client(t, c.version, id, expiring(c.seconds))
		if v7.connack.SessionPresent != c.lasts {
			t.Errorf("%s: session present is %v", id, v7.connack.SessionPresent)
		}
		v7.conn.Close()
		b.wantMetric("throughline_mqtt_clients", 0)
	}
}

// TestKeepalive: acknowledgements count, though mochi doesn't see them [MQTT-3.1.2-22]; and large intervals don't wrap around.
func TestKeepalive(t *testing.T) {
	t.Parallel()
	b := start(t)
	keepalive := func(seconds uint16) connectOption {
		return func(pk *packets.Packet) { pk.Connect.Keepalive = seconds }
	}
	s := b.subject()
	silent := s.client(t, 4, "silent", keepalive(1))
	large := s.client(t, 4, "large", keepalive(43_691)) // one and a half of it in 16 bits: 0
	acking := s.client(t, 4, "acking", keepalive(1))
	acking.subscribe("a")
	v7 := b.client(4, "v7")
	for i := range 10 {
		v7.publish("a", 1, uint16(i+1), "x")
		if err := acking.acknowledge(acking.read()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
	}
	silent.wantClosed()
	acking.next()
	large.next()
}

// TestOddPackets: what mochi would leave without an answer, or answer wrongly.
func TestOddPackets(t *testing.T) {
	b := start(t)
	for _, c := range []struct {
		name    string
		version byte
		send    []byte
		want    string
	}{
		{"publish to $SYS at QoS 1", 5, publishFrame(5, "$SYS/x", 1), "Puback 0x87"}, // [MQTT-3.3.5-2]
		{"publish to $SYS at QoS 2", 5, publishFrame(5, "$SYS/x", 2), "Pubrec 0x87"},
		{"publish to $SYS in 3.1.1", 4, publishFrame(4, "$SYS/x", 1), "Puback 0x00"},
		{"PUBREL that found nothing", 5, []byte{0x62, 3, 0, 9, 0x92}, "Pubcomp 0x92"}, // [MQTT-4.3.3-11]
		{"AUTH without a method", 5, []byte{0xf0, 6, 0x18, 4, 0x15, 0, 1, 'x'}, "Disconnect 0x82"},
		{"second CONNECT", 5, []byte{0x10, 15, 0, 4, 'M', 'Q', 'T', 'T', 5, 2, 0, 60, 0, 0, 2, 'v', '7'}, "Disconnect 0x82"},
		{"topic with too many levels", 5, publishFrame(5, strings.Repeat("/", guard.MaxTopicLevels), 1), "Disconnect 0x90"},
		{"topic with many levels", 5, publishFrame(5, strings.Repeat("/", guard.MaxTopicLevels-1), 1), "Puback 0x00"},
		{"filter with too many levels", 5, subscribeFrame(strings.Repeat("/", guard.MaxTopicLevels)), "Disconnect 0x8f"},
		{"filter with many levels", 5, subscribeFrame(strings.Repeat("/", guard.MaxTopicLevels-1)), "Suback 0x00"},
	} {
		v7 := b.client(c.version, "v7")
		v7.bytes(c.send...)
		if got := show(v7.read()); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
		v7.conn.Close()
	}
	v7 := b.subject()
	if _, err := v7.tryClient(t, 5, "v7", func(pk *packets.Packet) { pk.Properties.AuthenticationMethod = "SCRAM" }); err == nil ||
		!strings.Contains(err.Error(), "0x8c") { // [MQTT-4.12.0-1]
		t.Errorf("an authentication method that there is not: %v", err)
	}
}

// denying lets clients connect, and do nothing.
func denying(t *testing.T) *auth.Policy {
	t.Helper()
	anonymous := true
	return auth.NewPolicy(auth.Options{Anonymous: &anonymous, Listeners: []auth.Listener{{Name: "tcp", Address: ":1883"}}})
}

// TestFilterSyntax: MQTT 5, 4.7.1 and 4.8.2. A filter with a slip of the pen must not be waited on for ever.
func TestFilterSyntax(t *testing.T) {
	b := start(t)
	five, four := b.client(5, "five"), b.client(4, "four")
	for filter, valid := range map[string]bool{
		"a": true, "/": true, "a//b": true, "+": true, "#": true, "a/#": true, "+/a/#": true, "/+": true, "$SYS/#": true,
		"$share/g/a": true, "$share/g/#": true, "$share/g//": true,
		"a#": false, "a/b#": false, "a+": false, "+a/b": false, "a/+b/c": false, "a/#/b": false, "#/": false, "##": false, "": false,
		"$SHARE/g/a": false, "$share//a": false, "$share/g/": false, "$share/g": false, "$share/g+/a": false, "$share/g/a#": false,
	} {
		want := [2]byte{0x8f, 0x80}
		if valid {
			want = [2]byte{1, 1}
		}
		for i, c := range []*rawClient{five, four} {
			c.send(packets.Packet{
				FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
				Filters: packets.Subscriptions{{Filter: filter, Qos: 1}},
			})
			pk := c.read()
			for pk.FixedHeader.Type == packets.Publish { // a retained one of an earlier round
				pk = c.read()
			}
			if pk.FixedHeader.Type != packets.Suback || len(pk.ReasonCodes) != 1 || pk.ReasonCodes[0] != want[i] {
				t.Errorf("version %d, filter %q: SUBACK %#x, want %#x", c.version, filter, pk.ReasonCodes, want[i])
			}
		}
	}
}

// TestFullQueueIsLogged: once a session, with its name.
func TestFullQueueIsLogged(t *testing.T) {
	b := start(t)
	s := b.subject()
	away := s.client(t, 4, "away", persistent)
	away.subscribed("a")
	away.conn.Close()
	b.wantMetric("throughline_mqtt_clients", 0)
	v7 := b.client(4, "v7")
	for i := range sessions.MaxQueued + 10 {
		v7.publish("a", 1, uint16(i%60_000+1), "x")
		if i%1000 == 999 {
			v7.next()
		}
	}
	v7.next()
	b.wantMetric(`throughline_mqtt_messages_dropped_total{reason="queue_full"}`, 10)
	if n := strings.Count(b.log.String(), "client=away"); n != 1 {
		t.Errorf("said %d times:\n%s", n, b.log)
	}
}

func publishFrame(version byte, topic string, qos byte) []byte {
	return appendPublish(nil, version, topic, qos, false, 9, []byte("x"))
}

func subscribeFrame(filter string) []byte { return appendSubscribe(nil, 5, filter, 0) }

// TestManyUnreleasedMessages: MQTT 3.1.1 has no Receive Maximum.
func TestManyUnreleasedMessages(t *testing.T) {
	b := start(t)
	v7 := b.client(4, "v7")
	const n = 1500
	for id := uint16(1); id <= n; id++ {
		v7.publish("a", 2, id, "x")
	}
	for id := uint16(1); id <= n; id++ {
		if err := v7.acked(packets.Pubrec, id); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeniedPublish: in MQTT 3.1.1 the connection ends, and without a packet that servers don't send there (3.14).
func TestDeniedPublish(t *testing.T) {
	b := start(t, func(o *hooks.Options) { o.Auth = denying(t) })
	v7 := b.client(4, "v7")
	v7.publish("a", 1, 1, "x")
	v7.wantClosed()
	five := b.client(5, "v5")
	five.publish("a", 1, 1, "x")
	if got := show(five.next()...); got != "Puback 0x87" {
		t.Errorf("got %s", got)
	}
}

func TestSysTopics(t *testing.T) {
	b := start(t)
	c := b.client(4, "ops")
	c.subscribe("$SYS/#")
	got := make(map[string]string)
	b.eventually("$SYS topics", func() bool {
		for _, pk := range c.next() {
			got[pk.TopicName] = string(pk.Payload)
		}
		return len(got) == 20
	})
	if got["$SYS/broker/started"] == "" || got["$SYS/broker/clients/connected"] == "" {
		t.Errorf("got %v", got)
	}
	c.subscribe("#")
	if got := show(c.next()...); got != "" { // [MQTT-4.7.2-1]
		t.Errorf("# got %s", got)
	}
}

// TestNothingKeepsAPacket: a name or a filter is a few bytes, the packet that it came in may be many.
func TestNothingKeepsAPacket(t *testing.T) {
	b := start(t)
	s := b.subject()
	large := strings.Repeat("x", 60_000)
	user := []packets.UserProperty{{Key: "k", Val: large}}
	ops := b.client(5, "ops")
	before := liveHeap()
	const n = 100
	for i := range n {
		v7 := s.client(t, 5, fmt.Sprint("v", i), persistent, func(pk *packets.Packet) {
			pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload = true, "w", []byte(large)
		})
		v7.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1, Properties: packets.Properties{User: user},
			Filters: packets.Subscriptions{{Filter: fmt.Sprint("commands/", i)}},
		})
		v7.read()
		for alias := range uint16(10) {
			v7.send(packets.Packet{
				FixedHeader: packets.FixedHeader{Type: packets.Publish}, TopicName: fmt.Sprint(i, alias, large),
				Properties: packets.Properties{TopicAlias: alias + 1, TopicAliasFlag: true},
			})
		}
		v7.disconnect()
		topic := fmt.Sprint("state/", i, "/x")
		ops.send(publication(topic, large, retained))
		ops.send(publication(topic, "x", retained))
		ops.send(packets.Packet{ // sets an alias
			FixedHeader: packets.FixedHeader{Type: packets.Publish}, TopicName: fmt.Sprint("a/", i), Payload: []byte(large),
			Properties: packets.Properties{TopicAlias: uint16(i%16 + 1), TopicAliasFlag: true},
		})
	}
	ops.next()
	b.wantMetric("throughline_connections", 1)
	runtime.Gosched()
	if grown := liveHeap() - before; grown > n*20_000 {
		t.Errorf("the heap has grown by %d bytes a client, topic and alias", grown/n)
	}
}

// Nothing is left of clients that were gone before their CONNACK, or were refused.
func TestNothingIsLeftOfClientsThatDidNotStay(t *testing.T) {
	b := start(t)
	for i := range 50 {
		c := dial(t, b.address, 4)
		c.connect(fmt.Sprint("gone", i))
		c.conn.Close() // perhaps before the CONNACK is written
	}
	b.wantMetric("throughline_connections", 0)
	b.wantMetric("throughline_mqtt_clients", 0)
	b.wantMetric("throughline_mqtt_sessions", 0)
}

// TestGoodbyeOfAClientThatReadsNothing: a vehicle that publishes, says DISCONNECT and is gone resets the connection with the first
// acknowledgement. What it has sent counts, and its will is dropped [MQTT-3.14.4-3].
func TestGoodbyeOfAClientThatReadsNothing(t *testing.T) {
	b := start(t)
	s := b.subject()
	watcher := b.client(4, "watcher")
	watcher.subscribe("will", "last")
	const rounds = 30
	for i := range rounds {
		v7 := s.client(t, 4, fmt.Sprint("v", i), func(pk *packets.Packet) {
			pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload = true, "will", []byte("dead")
		})
		var all []byte
		for id := range uint16(40) { // as many as one read takes
			all = appendPublish(all, 4, "x", 1, false, id+1, []byte("p"))
		}
		all = appendPublish(all, 4, "last", 0, false, 0, []byte("x"))
		v7.bytes(append(all, 0xe0, 0)...)
		v7.conn.Close()
	}
	b.wantMetric("throughline_connections", 1)
	got := watcher.next()
	if n := len(got); n != rounds || slices.ContainsFunc(got, func(pk packets.Packet) bool { return pk.TopicName == "will" }) {
		t.Errorf("%d messages of %d: %s", n, rounds, show(got...))
	}
}

// TestUnreleasedOfAnEarlierConnection: the Receive Maximum is one of each connection (MQTT 5, 4.9).
func TestUnreleasedOfAnEarlierConnection(t *testing.T) {
	b := start(t)
	s := b.subject()
	v7 := s.client(t, 5, "v7", persistent)
	const announced = 1024
	for id := uint16(1); id <= announced; id++ {
		v7.publish("a", 2, id, "x")
	}
	v7.publish("a", 2, 1, "x") // sent again: not another one
	v7.publish("a", 0, 0, "x") // doesn't count
	for range announced + 1 {
		if got := show(v7.read()); got != "Pubrec 0x00" {
			t.Fatalf("got %s", got)
		}
	}
	v7.conn.Close()
	b.wantMetric("throughline_mqtt_clients", 0)
	v7 = s.client(t, 5, "v7", persistent)
	v7.publish("a", 1, 2000, "x")
	if got := show(v7.next()...); got != "Puback 0x00" {
		t.Errorf("got %s", got)
	}
	for id := uint16(3000); id <= 3000+announced; id++ {
		v7.publish("a", 2, id, "x")
	}
	got := show(v7.read())
	for got == "Pubrec 0x00" {
		got = show(v7.read())
	}
	if got != "Disconnect 0x93" {
		t.Errorf("beyond the maximum: got %s", got)
	}
}

// TestRepeatedFilter: a filter may stand twice in one packet.
func TestRepeatedFilter(t *testing.T) {
	b := start(t, func(o *hooks.Options) { o.MaxSubscriptions = 2 })
	other := b.client(5, "other")
	other.subscribe("a/b")
	other.send(publication("a/b", "x", retained))
	other.read()
	v7 := b.client(5, "v7")
	filter := packets.Subscription{Filter: "a/b", Qos: 1, RetainHandling: 1}
	v7.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
		Filters: packets.Subscriptions{filter, filter, {Filter: "c", Qos: 1}},
	})
	suback := v7.read()
	if got := show(v7.next()...); !slices.Equal(suback.ReasonCodes, []byte{1, 1, 1}) || got != "Publish a/b" {
		t.Errorf("SUBACK %#x, then %s; want the retained message once", suback.ReasonCodes, got)
	}
	b.wantMetric("throughline_mqtt_subscriptions", 3)
	v7.bytes(appendFrame(nil, packets.Unsubscribe<<4|2, []byte{0, 9, 0}, text("a/b"), text("a/b"), text("nobody"))...)
	want := []byte{packets.Unsuback << 4, 6, 0, 9, 0, 0x00, 0x11, 0x11}
	frame := make([]byte, len(want))
	if _, err := io.ReadFull(v7.r, frame); err != nil || !bytes.Equal(frame, want) {
		t.Errorf("UNSUBACK % x, %v; want % x", frame, err, want)
	}
	b.wantMetric("throughline_mqtt_subscriptions", 2)
}
