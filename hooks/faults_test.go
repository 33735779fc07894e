package hooks_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// faults are what is wrong with mochi for a fleet, as its clients see it. F1 and F12 have tests of
// their own in mochi_test.go and server_test.go.
var faults = []struct {
	name string
	need string // what a vehicle, or who sends to it, would meet
	// run returns nil if the server does what MQTT demands, else what it does instead.
	run func(t *testing.T, s subject) error
	// plain serves plain mochi; nil: in this process, with all allowed.
	plain func(t *testing.T) subject
	tries int // if the fault is a race: how often plain mochi is tried
}{
	{
		name:  "F2 deadlock of acknowledgements and publishes",
		need:  "a dashboard with a Receive Maximum stops all that publish to it, for good",
		run:   acknowledgementsBesidePublishes,
		plain: inChild, tries: 10,
	},
	{
		name: "F3 Receive Maximum, burst",
		need: "a vehicle gets the first commands of a burst, and no others until it reconnects",
		run:  burstWithinReceiveMaximum,
	},
	{
		name:  "F3 Receive Maximum, eight publishers",
		need:  "the same from many publishers at once",
		run:   publishersWithinReceiveMaximum,
		plain: inChild,
	},
	{
		name: "F3 Receive Maximum, resumed session",
		need: "a vehicle that comes back is flooded beyond what it said it can take, and may have to disconnect",
		run:  resumptionWithinReceiveMaximum,
	},
	{
		name: "F4 a subscriber that stops reading",
		need: "one dashboard with a hung browser holds up telemetry for every other one",
		run:  deafSubscriber,
	},
	{
		name: "F5 own QoS 1 publish with a command's packet id",
		need: "a command that the vehicle hasn't acknowledged is lost if the link breaks",
		run:  func(t *testing.T, s subject) error { return sharedPacketID(t, s, 1) },
	},
	{
		name: "F5 own QoS 2 publish with a command's packet id",
		need: "a command that the vehicle hasn't acknowledged is lost if the link breaks",
		run:  func(t *testing.T, s subject) error { return sharedPacketID(t, s, 2) },
	},
	{
		name: "F5 acknowledged command amid an own QoS 2 publish",
		need: "the vehicle's own QoS 2 handshake is torn: it learns that its message is unknown",
		run:  acknowledgedAmidOwnPublish,
	},
	{
		name: "F6 order of queued messages",
		need: "a vehicle that was out of range executes unlock before lock",
		run:  orderOfQueuedMessages,
	},
	{
		name: "F7 topics of queued messages",
		need: "a vehicle that allows topic aliases gets commands that it can't tell what they are for",
		run:  topicsOfQueuedMessages,
	},
	{
		name: "F8 subscriptions of expired sessions",
		need: "a vehicle that starts afresh gets what it hasn't subscribed to, and the index only grows",
		run:  subscriptionsOfExpiredSessions,
	},
	{
		name:  "F9 permission for a topic alias",
		need:  "telemetry sent by alias is refused, or allowed where it should not be",
		run:   permissionForAlias,
		plain: func(t *testing.T) subject { return inProcess(t, &namedTopics{}) },
	},
	{
		name: "F9 unknown topic alias",
		need: "telemetry is acknowledged and goes nowhere",
		run:  unknownAlias,
	},
	{
		name: "F9 announced topic aliases",
		need: "vehicles on a metered link spell their topics out in every message",
		run:  announcedAliases,
	},
	{
		name: "F10 retained message of the parent level",
		need: "a dashboard that subscribes to vehicle/7/# doesn't learn what vehicle/7 is",
		run:  retainedParent,
	},
	{
		name: "F10 retained messages expire",
		need: "a dashboard learns nothing of vehicles that have been parked for a day",
		run:  retainedForEver,
	},
	{
		name:  "F11 two connections with one client id",
		need:  "a vehicle whose link flaps stays connected twice, and commands go to the dead connection",
		run:   oneConnectionPerClient,
		plain: func(t *testing.T) subject { return inProcess(t, &meeting{met: make(chan struct{})}) },
	},
	{
		name:  "F11 messages published during a takeover",
		need:  "a vehicle whose link flaps loses commands",
		run:   messagesDuringTakeover,
		plain: func(t *testing.T) subject { return inProcess(t, &interrupting{published: make(chan struct{})}) },
	},
	{
		name:  "F11 a message before CONNACK",
		need:  "a vehicle that comes back amid a burst takes it for a broken server, and hangs up",
		run:   connackComesFirst,
		plain: func(t *testing.T) subject { return inProcess(t, &hasty{sent: make(chan struct{})}) },
	},
	{
		name: "F14 memory per connection",
		need: "fewer vehicles per broker",
		run:  memoryPerConnection,
	},
	{
		name: "F14 queued messages weigh on the server",
		need: "a broker with a fleet out of range is busy with doing nothing",
		run:  queuedMessagesOutsideMochi,
	},
	{
		name: "F16 QoS 2 publish sent again after a reconnect",
		need: "the vehicle is told that its packet id is in use, and gives up a message that was taken",
		run:  resentQoS2Publish,
	},
}

// TestPlainMochiHasTheFault is the alarm for upgrades: if it fails, what meets the fault can go or must
// change.
func TestPlainMochiHasTheFault(t *testing.T) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			for range max(1, f.tries) {
				plain := f.plain
				if plain == nil {
					plain = func(t *testing.T) subject { return inProcess(t, &answering{}) }
				}
				if err := f.run(t, plain(t)); err != nil {
					t.Logf("%v; so %s", err, f.need)
					return
				}
			}
			t.Error("mochi does what it should")
		})
	}
}

func TestFaultsAreMet(t *testing.T) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			b := start(t)
			if err := f.run(t, subject{address: b.address, wait: patience, mochi: b.server.Mochi()}); err != nil {
				t.Errorf("%v; so %s", err, f.need)
			}
		})
	}
}

// subject is a server that is looked at for a fault.
type subject struct {
	address string
	wait    time.Duration // bounds what is waited for
	mochi   *mqtt.Server  // nil if it is in another process
	asked   func() []string
}

// faulty is how long plain mochi is waited for: what it fails to do it would do at once.
const faulty = time.Second

func inProcess(t *testing.T, hook mqtt.Hook) subject {
	t.Helper()
	s, l, err := plainMochi(hook)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(func(string) {}) }) // as in servePlain
	out := subject{address: l.Address(), wait: faulty, mochi: s}
	if h, ok := hook.(*namedTopics); ok {
		out.asked = h.taken
	}
	return out
}

// inChild is for faults that leave goroutines stuck behind.
func inChild(t *testing.T) subject {
	t.Helper()
	return subject{address: startChild(t, "plain").address, wait: faulty}
}

// connectOption changes a CONNECT.
type connectOption func(*packets.Packet)

// expiring is a session that outlives its connection, in MQTT 5 by so many seconds.
func expiring(seconds uint32) connectOption {
	return func(pk *packets.Packet) {
		pk.Connect.Clean = false
		pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = seconds, true
	}
}

var persistent = expiring(300)

func receiveMaximum(n uint16) connectOption {
	return func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = n }
}

func topicAliasMaximum(n uint16) connectOption {
	return func(pk *packets.Packet) { pk.Properties.TopicAliasMaximum = n }
}

// client connects, with a clean session unless told otherwise.
func (s subject) client(t *testing.T, version byte, id string, options ...connectOption) *rawClient {
	t.Helper()
	c, err := s.tryClient(t, version, id, options...)
	if err != nil {
		t.Fatalf("connect as %q: %v", id, err)
	}
	return c
}

func (s subject) tryClient(t *testing.T, version byte, id string, options ...connectOption) (*rawClient, error) {
	t.Helper()
	c := dial(t, s.address, version)
	c.wait = s.wait
	if err := c.trySend(connectPacket(id, options...)); err != nil {
		return nil, err
	}
	var err error
	c.connack, err = c.expect("Connack 0x00")
	return c, err
}

func connectPacket(id string, options ...connectOption) packets.Packet {
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect:     packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: id, Clean: true, Keepalive: 60},
	}
	for _, o := range options {
		o(&pk)
	}
	return pk
}

// subscribeAt subscribes at that QoS; what comes back is left to be read.
func (c *rawClient) subscribeAt(qos byte, filters ...string) {
	c.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 60_000}
	for _, f := range filters {
		pk.Filters = append(pk.Filters, packets.Subscription{Filter: f, Qos: qos})
	}
	c.send(pk)
}

// subscribed subscribes at QoS 2 to filters that nothing is retained for.
func (c *rawClient) subscribed(filters ...string) {
	c.t.Helper()
	c.subscribeAt(2, filters...)
	if got := show(c.read()); got != "Suback 0x00" {
		c.t.Fatalf("subscribe: got %s", got)
	}
}

// disconnect leaves, and returns when the server has closed the connection.
func (c *rawClient) disconnect() {
	c.t.Helper()
	c.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
	for {
		_, err := c.tryRead()
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.t.Errorf("the server keeps the connection after DISCONNECT: %v", err)
		}
		c.conn.Close()
		return
	}
}

// expect reads a packet, and wants the one that show writes so.
func (c *rawClient) expect(want string) (packets.Packet, error) {
	pk, err := c.tryRead()
	if err != nil {
		return pk, fmt.Errorf("nothing came where %s is due: %w", want, err)
	}
	if got := show(pk); got != want {
		return pk, fmt.Errorf("%s came where %s is due", got, want)
	}
	return pk, nil
}

// acked reads a packet, and wants an acknowledgement of that type and packet id that is none of a refusal.
func (c *rawClient) acked(kind byte, id uint16) error {
	want := fmt.Sprintf("%s for packet id %d", packets.PacketNames[kind], id)
	pk, err := c.tryRead()
	if err != nil {
		return fmt.Errorf("nothing came where %s is due: %w", want, err)
	}
	if pk.FixedHeader.Type != kind || pk.PacketID != id || pk.ReasonCode >= packets.ErrUnspecifiedError.Code {
		return fmt.Errorf("%s for packet id %d came where %s is due", show(pk), pk.PacketID, want)
	}
	return nil
}

// deliver publishes, and goes through the handshake of the QoS.
func (c *rawClient) deliver(topic string, qos byte, id uint16, payload string) error {
	return c.deliverPacket(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos},
		TopicName:   topic, PacketID: id, Payload: []byte(payload),
	})
}

func (c *rawClient) deliverPacket(pk packets.Packet) error {
	if err := c.trySend(pk); err != nil {
		return err
	}
	if pk.FixedHeader.Qos == 1 {
		return c.acked(packets.Puback, pk.PacketID)
	}
	if err := c.acked(packets.Pubrec, pk.PacketID); err != nil {
		return err
	}
	if err := c.trySend(reply(packets.Pubrel, pk.PacketID)); err != nil {
		return err
	}
	return c.acked(packets.Pubcomp, pk.PacketID)
}

func reply(kind byte, id uint16) packets.Packet {
	return packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id}
}

// acknowledge answers what a subscriber gets.
func (c *rawClient) acknowledge(pk packets.Packet) error {
	switch {
	case pk.FixedHeader.Type == packets.Pubrel:
		return c.trySend(reply(packets.Pubcomp, pk.PacketID))
	case pk.FixedHeader.Type != packets.Publish:
		return nil
	case pk.FixedHeader.Qos == 1:
		return c.trySend(reply(packets.Puback, pk.PacketID))
	case pk.FixedHeader.Qos == 2:
		return c.trySend(reply(packets.Pubrec, pk.PacketID))
	}
	return nil
}

// end is the payload of the message that tells a test that nothing comes before it any more: messages
// of one sender on one topic and QoS keep their order [MQTT-4.6.0-6].
const end = "end"

// receive takes and acknowledges messages until the end, and returns those before.
func (c *rawClient) receive() ([]packets.Packet, error) {
	var got []packets.Packet
	for {
		pk, err := c.tryRead()
		if err != nil {
			return got, fmt.Errorf("the end did not come after %s: %w", listed(got), err)
		}
		if err := c.acknowledge(pk); err != nil {
			return got, err
		}
		switch {
		case pk.FixedHeader.Type != packets.Publish:
		case string(pk.Payload) == end:
			return got, nil
		default:
			got = append(got, pk)
		}
	}
}

// listed writes messages as errors do.
func listed(pks []packets.Packet) string {
	if len(pks) == 0 {
		return "no message"
	}
	var names []string
	for i, pk := range pks {
		if i == 8 {
			names = append(names, fmt.Sprintf("(%d in all)", len(pks)))
			break
		}
		dup := ""
		if pk.FixedHeader.Dup {
			dup = " DUP"
		}
		names = append(names, fmt.Sprintf("%s=%.8s QoS %d id %d%s", pk.TopicName, pk.Payload, pk.FixedHeader.Qos, pk.PacketID, dup))
	}
	return strings.Join(names, ", ")
}

// takeWithin takes n messages, of which never more than maximum may be unacknowledged. It acknowledges
// when that many are, after a round trip in which no further one may come, or when it has all.
func (c *rawClient) takeWithin(n, maximum int) ([]packets.Packet, error) {
	var got, held []packets.Packet
	unacknowledged, pinged := 0, false
	for len(got) < n || unacknowledged > 0 {
		pk, err := c.tryRead()
		if err != nil {
			return got, fmt.Errorf("Receive Maximum %d: %d of %d messages came, then nothing: %w", maximum, len(got), n, err)
		}
		switch pk.FixedHeader.Type {
		case packets.Publish:
			got, held = append(got, pk), append(held, pk)
			if unacknowledged++; unacknowledged > maximum {
				return got, fmt.Errorf("Receive Maximum %d: %d messages are unacknowledged", maximum, unacknowledged)
			}
		case packets.Pubrel: // only PUBCOMP gives the sender room (MQTT 5, 4.9)
			unacknowledged--
			if err := c.acknowledge(pk); err != nil {
				return got, err
			}
		case packets.Pingresp:
			pinged = false
			for _, pk := range held {
				if pk.FixedHeader.Qos == 1 {
					unacknowledged--
				}
				if err := c.acknowledge(pk); err != nil {
					return got, err
				}
			}
			held = nil
		}
		if !pinged && len(held) > 0 && (unacknowledged == maximum || len(got) == n) {
			pinged = true
			if err := c.trySend(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}}); err != nil {
				return got, err
			}
		}
	}
	return got, nil
}

// inOrder wants the payloads "0", "1" and so on, n of them, at QoS 1 and 2 in turn if mixed, else at QoS 1.
func inOrder(got []packets.Packet, n int, mixed bool) error {
	for i, pk := range got {
		if want := strconv.Itoa(i); string(pk.Payload) != want {
			return fmt.Errorf("message %.8q came in place of %s: the order is %s", pk.Payload, want, listed(got[max(0, i-1):]))
		}
		if want := mixedQoS(i, mixed); pk.FixedHeader.Qos != want {
			return fmt.Errorf("message %d came at QoS %d, not %d", i, pk.FixedHeader.Qos, want)
		}
	}
	if len(got) != n {
		return fmt.Errorf("%d of %d messages came", len(got), n)
	}
	return nil
}

func mixedQoS(i int, mixed bool) byte {
	if mixed {
		return 1 + byte(i%2)
	}
	return 1
}

// deliverMany publishes the payloads "0", "1" and so on.
func (c *rawClient) deliverMany(topic string, n int, mixed bool) error {
	for i := range n {
		if err := c.deliver(topic, mixedQoS(i, mixed), uint16(1+i), strconv.Itoa(i)); err != nil {
			return fmt.Errorf("publish %d: %w", i, err)
		}
	}
	return nil
}

// perPublisher counts messages with payloads "publisher number", whose numbers come from 0 up.
type perPublisher map[string]int

func (p perPublisher) add(pk packets.Packet) error {
	who, number, _ := strings.Cut(string(pk.Payload), " ")
	if want := strconv.Itoa(p[who]); number != want {
		return fmt.Errorf("message %s of publisher %s came in place of %s", number, who, want)
	}
	p[who]++
	return nil
}

func numbered(publisher, number int) string { return fmt.Sprintf("%d %d", publisher, number) }

// F2: Inflight.NextImmediate takes the read lock that it holds already. A publisher that asks for the write
// lock in between blocks it, and is blocked by it. It is called after each packet of a client with a Receive
// Maximum, so that a Receive Maximum that is never reached (F3) does.
func acknowledgementsBesidePublishes(t *testing.T, s subject) error {
	const publishers, batch, maximum = 8, 20, 1000
	subscriber := s.client(t, 5, "dashboard", receiveMaximum(maximum))
	subscriber.subscribe("t")
	room := make(chan struct{}, maximum/2) // what the dashboard has not acknowledged
	gone := make(chan struct{})
	received := make(chan error, 1)
	counts := perPublisher{}
	go func() {
		received <- func() error {
			for {
				pk, err := subscriber.tryRead()
				if err != nil {
					return fmt.Errorf("the subscriber gets nothing more: %w", err)
				}
				if string(pk.Payload) == end {
					return nil
				}
				if err := errors.Join(counts.add(pk), subscriber.acknowledge(pk)); err != nil {
					return err
				}
				<-room
			}
		}()
		close(gone)
	}()

	sent := make([]int, publishers)
	errs := make([]error, publishers)
	until := time.Now().Add(2 * time.Second)
	var all sync.WaitGroup
	for p := range publishers {
		c := s.client(t, 4, fmt.Sprint("v", p))
		all.Go(func() {
			for time.Now().Before(until) && errs[p] == nil {
				for id := range batch {
					select {
					case room <- struct{}{}:
					case <-gone: // and the server's answers will say whether that was all
						return
					}
					if errs[p] = c.trySend(packets.Packet{
						FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1},
						TopicName:   "t", PacketID: uint16(1 + id), Payload: []byte(numbered(p, sent[p])),
					}); errs[p] != nil {
						return
					}
					sent[p]++
				}
				for id := range batch {
					if errs[p] = c.acked(packets.Puback, uint16(1+id)); errs[p] != nil {
						errs[p] = fmt.Errorf("publisher %d, after %d messages: %w", p, sent[p], errs[p])
						break
					}
				}
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := s.client(t, 4, "last").deliver("t", 1, 1, end); err != nil {
		return err
	}
	if err := <-received; err != nil {
		return err
	}
	for p, n := range sent {
		if counts[strconv.Itoa(p)] != n {
			return fmt.Errorf("%d of %d messages of publisher %d came", counts[strconv.Itoa(p)], n, p)
		}
	}
	return nil
}

// F3: what is held back for want of room is deleted as soon as it is sent, so that its acknowledgement makes no
// room: with a Receive Maximum of 10, 20 messages come.
func burstWithinReceiveMaximum(t *testing.T, s subject) error {
	for _, c := range []struct {
		n     int
		mixed bool
	}{{500, false}, {200, true}} {
		id := fmt.Sprintf("v7 mixed %v", c.mixed)
		vehicle, center := s.client(t, 5, id, receiveMaximum(10)), s.client(t, 5, "center")
		vehicle.subscribed("commands/" + id)
		if err := center.deliverMany("commands/"+id, c.n, c.mixed); err != nil {
			return err
		}
		center.next() // the last message is on its way too
		got, err := vehicle.takeWithin(c.n, 10)
		if err != nil {
			return err
		}
		if err := inOrder(got, c.n, c.mixed); err != nil {
			return err
		}
		center.disconnect()
	}
	return nil
}

// F3: that there is room, and that it is taken, are two steps: a publish between them is one too many.
func publishersWithinReceiveMaximum(t *testing.T, s subject) error {
	const publishers, each = 8, 100
	dashboard := s.client(t, 5, "dashboard", receiveMaximum(10))
	dashboard.subscribed("t")
	errs := make([]error, publishers)
	var all sync.WaitGroup
	for p := range publishers {
		c := s.client(t, 5, fmt.Sprint("v", p))
		all.Go(func() {
			for i := range each {
				if errs[p] = c.deliver("t", 1, uint16(1+i), numbered(p, i)); errs[p] != nil {
					errs[p] = fmt.Errorf("publisher %d: %w", p, errs[p])
					return
				}
			}
		})
	}
	got, err := dashboard.takeWithin(publishers*each, 10)
	all.Wait()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	counts := perPublisher{}
	for _, pk := range got {
		if err := counts.add(pk); err != nil {
			return err
		}
	}
	return nil
}

// F3: a resumed session is sent all it has at once.
func resumptionWithinReceiveMaximum(t *testing.T, s subject) error {
	const n, before, after = 20, 10, 3
	vehicle, center := s.client(t, 5, "v7", persistent, receiveMaximum(before)), s.client(t, 5, "center")
	vehicle.subscribed("commands")
	if err := center.deliverMany("commands", n, true); err != nil {
		return err
	}
	for range before {
		if _, err := vehicle.expect("Publish commands"); err != nil {
			return err
		}
	}
	vehicle.disconnect()
	vehicle = s.client(t, 5, "v7", persistent, receiveMaximum(after))
	got, err := vehicle.takeWithin(n, after)
	if err != nil {
		return err
	}
	for i, pk := range got {
		if i < before && !pk.FixedHeader.Dup {
			return fmt.Errorf("message %d is sent again without DUP", i)
		}
	}
	return inOrder(got, n, true)
}

// F4: WriteLoop holds the client's lock while it writes to the socket, and publishers need that lock for a
// packet id.
func deafSubscriber(t *testing.T, s subject) error {
	const messages, size = 256, 64 << 10 // 16 MiB: far beyond what the sockets take
	deaf, healthy, publisher := s.client(t, 4, "deaf"), s.client(t, 4, "healthy"), s.client(t, 4, "publisher")
	if err := deaf.conn.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
		t.Fatal(err)
	}
	deaf.subscribe("t")
	healthy.subscribe("t")
	payload := strings.Repeat("x", size)
	for i := range messages {
		if err := publisher.deliver("t", 1, uint16(1+i), payload); err != nil {
			return fmt.Errorf("publisher of message %d: %w", i, err)
		}
		pk, err := healthy.expect("Publish t")
		if err == nil {
			err = healthy.acknowledge(pk)
		}
		if err != nil {
			return fmt.Errorf("healthy subscriber, message %d: %w", i, err)
		}
	}
	return nil
}

// F5: the packet ids of both directions share one map, and a publish of the client deletes what is there.
func sharedPacketID(t *testing.T, s subject, own byte) error {
	for _, version := range []byte{4, 5} {
		for _, qos := range []byte{1, 2} {
			id := fmt.Sprintf("v%d%d", version, qos)
			topic := "commands/" + id
			vehicle, center := s.client(t, version, id, persistent), s.client(t, version, "center of "+id)
			vehicle.subscribed(topic)
			if err := center.deliver(topic, qos, 1, "stop"); err != nil {
				return err
			}
			command, err := vehicle.expect("Publish " + topic)
			if err != nil {
				return err
			}
			if err := vehicle.deliver("state", own, command.PacketID, "x"); err != nil {
				return fmt.Errorf("MQTT %d, own publish at QoS %d: %w", version, own, err)
			}
			vehicle.disconnect()
			vehicle = s.client(t, version, id, persistent)
			if err := center.deliver(topic, qos, 2, end); err != nil {
				return err
			}
			got, err := vehicle.receive()
			if err != nil {
				return err
			}
			if len(got) != 1 || got[0].PacketID != command.PacketID || !got[0].FixedHeader.Dup || got[0].FixedHeader.Qos != qos {
				return fmt.Errorf("MQTT %d: the resumed session is sent %s where the command at QoS %d with id %d and DUP is due",
					version, listed(got), qos, command.PacketID)
			}
		}
	}
	return nil
}

// F5: the client's acknowledgement of a message deletes its own QoS 2 publish of that packet id.
func acknowledgedAmidOwnPublish(t *testing.T, s subject) error {
	for _, qos := range []byte{1, 2} {
		id := fmt.Sprint("v", qos)
		topic := "commands/" + id
		vehicle, center := s.client(t, 5, id, persistent), s.client(t, 5, "center of "+id)
		vehicle.subscribed(topic)
		if err := center.deliver(topic, qos, 1, "stop"); err != nil {
			return err
		}
		command, err := vehicle.expect("Publish " + topic)
		if err != nil {
			return err
		}
		vehicle.publish("state", 2, command.PacketID, "x")
		if err := vehicle.acked(packets.Pubrec, command.PacketID); err != nil {
			return err
		}
		if err := vehicle.acknowledge(command); err != nil {
			return err
		}
		if qos == 2 {
			if err := vehicle.acked(packets.Pubrel, command.PacketID); err != nil {
				return err
			}
		}
		vehicle.send(reply(packets.Pubrel, command.PacketID))
		if err := vehicle.acked(packets.Pubcomp, command.PacketID); err != nil {
			return fmt.Errorf("command at QoS %d acknowledged before the PUBREL of the own publish: %w", qos, err)
		}
		if qos == 2 {
			vehicle.send(reply(packets.Pubcomp, command.PacketID))
		}
		vehicle.disconnect()
		vehicle = s.client(t, 5, id, persistent)
		if err := center.deliver(topic, qos, 2, end); err != nil {
			return err
		}
		got, err := vehicle.receive()
		if err != nil {
			return err
		}
		if len(got) > 0 {
			return fmt.Errorf("after all was acknowledged the resumed session is sent %s", listed(got))
		}
	}
	return nil
}

// F6: what is resent comes out of a map, sorted, not stably, by the seconds when it was published.
func orderOfQueuedMessages(t *testing.T, s subject) error {
	const n = 300 // within the same second, but for bad luck
	for _, version := range []byte{4, 5} {
		id := fmt.Sprint("v", version)
		topic := "commands/" + id
		vehicle, center := s.client(t, version, id, persistent), s.client(t, version, "center of "+id)
		vehicle.subscribed(topic)
		vehicle.disconnect()
		if err := center.deliverMany(topic, n, true); err != nil {
			return err
		}
		vehicle = s.client(t, version, id, persistent)
		if err := center.deliver(topic, 1, n+1, end); err != nil {
			return err
		}
		got, err := vehicle.receive()
		if err := errors.Join(err, inOrder(got, n, true)); err != nil {
			return fmt.Errorf("MQTT %d: %w", version, err)
		}
	}
	return nil
}

// F6: seconds are compared modulo 65536, so that twice in 36 hours a later message comes first.
func TestPlainMochiSortsBySecondsModulo65536(t *testing.T) {
	inflight := mqtt.NewInflights()
	const wrap = 1 << 16
	inflight.Set(packets.Packet{PacketID: 1, Created: 30_000*wrap - 1})
	inflight.Set(packets.Packet{PacketID: 2, Created: 30_000 * wrap})
	if got := inflight.GetAll(false); got[0].PacketID != 2 {
		t.Errorf("message %d comes first: mochi does what it should", got[0].PacketID)
	}
}

// F7: a message is queued as it would have been sent on the connection that has ended, with its alias alone.
func topicsOfQueuedMessages(t *testing.T, s subject) error {
	const topic = "commands/v7"
	vehicle, center := s.client(t, 5, "v7", persistent, topicAliasMaximum(10)), s.client(t, 5, "center")
	vehicle.subscribed(topic)
	if err := center.deliver(topic, 1, 1, "first"); err != nil {
		return err
	}
	pk, err := vehicle.expect("Publish " + topic)
	if err == nil {
		err = vehicle.acknowledge(pk)
	}
	if err != nil {
		return err
	}
	vehicle.disconnect()
	for i := range 3 {
		if err := center.deliver(topic, 1, uint16(2+i), strconv.Itoa(i)); err != nil {
			return err
		}
	}
	vehicle = s.client(t, 5, "v7", persistent, topicAliasMaximum(10))
	if err := center.deliver(topic, 1, 5, end); err != nil {
		return err
	}
	got, err := vehicle.receive()
	if err != nil {
		return err
	}
	aliases := map[uint16]string{} // of this connection
	for i, pk := range got {
		name := pk.TopicName
		switch {
		case pk.Properties.TopicAlias > 10:
			return fmt.Errorf("queued message %d has topic alias %d beyond the maximum", i, pk.Properties.TopicAlias)
		case name == "":
			name = aliases[pk.Properties.TopicAlias]
		case pk.Properties.TopicAlias > 0:
			aliases[pk.Properties.TopicAlias] = name
		}
		if name != topic {
			return fmt.Errorf("queued message %d comes with topic %q and alias %d, which stands for %q: want %q",
				i, pk.TopicName, pk.Properties.TopicAlias, name, topic)
		}
	}
	if len(got) != 3 {
		return fmt.Errorf("the resumed session is sent %s", listed(got))
	}
	return nil
}

// F8: an expired client is deleted, but not what it subscribed to.
func subscriptionsOfExpiredSessions(t *testing.T, s subject) error {
	vehicle := s.client(t, 5, "v7", expiring(1))
	vehicle.subscribed("commands")
	vehicle.disconnect()
	for by := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, ok := s.mochi.Clients.Get("v7"); !ok {
			break
		}
		if time.Now().After(by) {
			return errors.New("the session did not expire")
		}
	}
	vehicle = s.client(t, 5, "v7")
	if vehicle.connack.SessionPresent {
		return errors.New("an expired session is present")
	}
	vehicle.subscribed("other")
	center := s.client(t, 5, "center")
	if err := center.deliver("commands", 1, 1, "stop"); err != nil {
		return err
	}
	if err := center.deliver("other", 1, 2, end); err != nil {
		return err
	}
	got, err := vehicle.receive()
	if err != nil {
		return err
	}
	if len(got) > 0 {
		return fmt.Errorf("a new session is sent what the expired one subscribed to: %s", listed(got))
	}
	return nil
}

// namedTopics is an access list that knows topics by their names.
type namedTopics struct {
	answering
	mu    sync.Mutex
	asked []string
}

func (h *namedTopics) OnACLCheck(_ *mqtt.Client, topic string, write bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if write {
		h.asked = append(h.asked, topic)
	}
	return topic != ""
}

func (h *namedTopics) taken() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.asked)
}

// aliased is a publish with an alias, and maybe a topic.
func aliased(topic string, alias, id uint16, payload string) packets.Packet {
	return packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1},
		TopicName:   topic, PacketID: id, Payload: []byte(payload),
		Properties: packets.Properties{TopicAlias: alias, TopicAliasFlag: true},
	}
}

// F9: permission is asked before the alias is resolved.
func permissionForAlias(t *testing.T, s subject) error {
	dashboard, vehicle := s.client(t, 5, "dashboard"), s.client(t, 5, "v7")
	dashboard.subscribed("state/#")
	for i, c := range []struct{ topic, want string }{
		{"state/v7", "state/v7"},
		{"", "state/v7"},
		{"state/v7/doors", "state/v7/doors"}, // the alias stands for something else from now on
		{"", "state/v7/doors"},
	} {
		if err := vehicle.deliverPacket(aliased(c.topic, 1, uint16(1+i), "x")); err != nil {
			if s.asked != nil {
				err = fmt.Errorf("%w; permission was asked for %q", err, s.asked())
			}
			return fmt.Errorf("publish to %q by alias: %w", c.want, err)
		}
		if _, err := dashboard.expect("Publish " + c.want); err != nil {
			return err
		}
	}
	return nil
}

// F9: a publish with an alias that stands for nothing goes to the topic "".
func unknownAlias(t *testing.T, s subject) error {
	vehicle := s.client(t, 5, "v7")
	vehicle.send(aliased("", 3, 1, "x"))
	if _, err := vehicle.expect("Disconnect 0x82"); err != nil {
		return fmt.Errorf("publish with an alias that stands for nothing: %w", err)
	}
	// An alias is its connection's [MQTT-3.3.2-7].
	first := s.client(t, 5, "v8", persistent)
	if err := first.deliverPacket(aliased("state", 3, 1, "x")); err != nil {
		return err
	}
	first.disconnect()
	second := s.client(t, 5, "v8", persistent)
	second.send(aliased("", 3, 2, "x"))
	if _, err := second.expect("Disconnect 0x82"); err != nil {
		return fmt.Errorf("publish with the last connection's alias: %w", err)
	}
	return nil
}

// F9: CONNACK never has a Topic Alias Maximum, though aliases up to the configured one are taken.
func announcedAliases(t *testing.T, s subject) error {
	vehicle := s.client(t, 5, "v7")
	maximum := vehicle.connack.Properties.TopicAliasMaximum
	if maximum == 0 {
		return errors.New("CONNACK announces no Topic Alias Maximum: no alias may be sent")
	}
	if err := vehicle.deliverPacket(aliased("state", maximum, 1, "x")); err != nil {
		return err
	}
	vehicle.send(aliased("state", maximum+1, 2, "x"))
	if _, err := vehicle.expect("Disconnect 0x94"); err != nil {
		return fmt.Errorf("alias above the maximum: %w", err)
	}
	zero := s.client(t, 5, "v8")
	zero.bytes(0x30, 8, 0, 1, 't', 3, packets.PropTopicAlias, 0, 0, 'x')
	if _, err := zero.expect("Disconnect 0x94"); err != nil { // [MQTT-3.3.2-8]
		return fmt.Errorf("alias 0: %w", err)
	}
	return nil
}

// F9: an alias publish is matched against the rules by its topic.
func TestRulesSeeTheTopicOfAnAlias(t *testing.T) {
	b := start(t)
	vehicle := subject{address: b.address, wait: patience}.client(t, 5, "v7")
	for i, topic := range []string{"fleet/v7/telemetry", "", "other", ""} {
		if err := vehicle.deliverPacket(aliased(topic, 1, uint16(1+i), braking)); err != nil {
			t.Fatalf("publish %d: %v", i, err)
		}
	}
	var topics []string
	for _, r := range b.queue.taken() {
		topics = append(topics, r.Topic)
	}
	if want := []string{"fleet/v7/telemetry", "fleet/v7/telemetry"}; !slices.Equal(topics, want) {
		t.Errorf("records of %q, want %q", topics, want)
	}
}

// F10: retained messages are looked up below the level before #, not at it [MQTT-4.7.1-2].
func retainedParent(t *testing.T, s subject) error {
	publisher := s.client(t, 4, "publisher")
	for i, topic := range []string{"a", "a/b"} {
		if err := publisher.deliverPacket(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1, Retain: true},
			TopicName:   topic, PacketID: uint16(1 + i), Payload: []byte("retained"),
		}); err != nil {
			return err
		}
	}
	both := []string{"a", "a/b"}
	for _, version := range []byte{4, 5} {
		for _, c := range []struct {
			filter string
			want   []string
			sub    packets.Subscription // MQTT 5 options
		}{
			{filter: "a/#", want: both},
			{filter: "+/#", want: both},
			{filter: "#", want: both},
			{filter: "a/b/#", want: []string{"a/b"}},
			{filter: "a/+/#", want: []string{"a/b"}},
			{filter: "+", want: []string{"a"}},
			{filter: "a/+", want: []string{"a/b"}},
			{filter: "a/#", want: nil, sub: packets.Subscription{RetainHandling: 2}},  // [MQTT-3.3.1-11]
			{filter: "a/#", want: both, sub: packets.Subscription{RetainHandling: 1}}, // [MQTT-3.3.1-10]
		} {
			if version < 5 && c.sub.RetainHandling > 0 {
				continue
			}
			id := fmt.Sprintf("v%d %s %d", version, c.filter, c.sub.RetainHandling)
			got, err := retainedFor(s.client(t, version, id), id, c.filter, c.sub)
			if err != nil {
				return err
			}
			var topics []string
			for _, pk := range got {
				topics = append(topics, pk.TopicName)
				if !pk.FixedHeader.Retain {
					return fmt.Errorf("MQTT %d: retained message of %q comes without the flag", version, pk.TopicName)
				}
			}
			if slices.Sort(topics); !slices.Equal(topics, c.want) {
				return fmt.Errorf("MQTT %d: a subscription to %s (retain handling %d) is sent the retained messages of %q, want %q",
					version, c.filter, c.sub.RetainHandling, topics, c.want)
			}
		}
	}
	vehicle := s.client(t, 5, "twice")
	for i, want := range []int{2, 0} {
		got, err := retainedFor(vehicle, "twice", "a/#", packets.Subscription{RetainHandling: 1})
		if err != nil {
			return err
		}
		if len(got) != want {
			return fmt.Errorf("subscription %d to a/# with retain handling 1 is sent %s", i+1, listed(got))
		}
	}
	return nil
}

// retainedFor subscribes, and returns what comes before a message that the client sends itself afterwards.
func retainedFor(c *rawClient, id, filter string, sub packets.Subscription) ([]packets.Packet, error) {
	own := "end/" + strings.NewReplacer("#", "hash", "+", "plus").Replace(id)
	for i, f := range []packets.Subscription{{Filter: own, Qos: 1}, {Filter: filter, Qos: 1, RetainHandling: sub.RetainHandling}} {
		if err := c.trySend(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: uint16(60_000 + i),
			Filters: packets.Subscriptions{f},
		}); err != nil {
			return nil, err
		}
	}
	c.publish(own, 1, 1, end)
	return c.receive()
}

// F10: a message without expiry gets one of a day, unless this is configured away.
func retainedForEver(_ *testing.T, s subject) error {
	if d := s.mochi.Options.Capabilities.MaximumMessageExpiryInterval; d > 0 {
		return fmt.Errorf("a message that has no expiry is dropped after %v", time.Duration(d)*time.Second)
	}
	return nil
}

// meeting lets two connections of a client meet between mochi's look at the session that there is
// and its replacing it: the first that says goodbye to the session's connection waits for the second.
type meeting struct {
	answering
	mu       sync.Mutex
	arrivals int
	met      chan struct{}
}

func (h *meeting) Provides(b byte) bool { return b == mqtt.OnPacketEncode || h.answering.Provides(b) }

func (h *meeting) OnPacketEncode(_ *mqtt.Client, pk packets.Packet) packets.Packet {
	if pk.FixedHeader.Type == packets.Disconnect && pk.ReasonCode == packets.ErrSessionTakenOver.Code {
		h.mu.Lock()
		if h.arrivals++; h.arrivals == 2 {
			close(h.met)
		}
		h.mu.Unlock()
		select {
		case <-h.met:
		case <-time.After(patience):
		}
	}
	return pk
}

// F11: mochi looks up, inherits and replaces a session without a lock around the three.
func oneConnectionPerClient(t *testing.T, s subject) error {
	const rounds = 100
	in := &inbox{got: map[string]uint16{}}
	m := s.member(t, in)
	if err := <-m.connected; err != nil {
		return err
	}
	m.c.subscribeAt(1, "commands") // the member reads the SUBACK
	if !m.answers() {
		return errors.New("the first connection ended")
	}
	stop := publishing(s.client(t, 4, "center"), "commands")
	for round := range rounds {
		pair := []*member{s.member(t, in), s.member(t, in)}
		for _, m := range pair {
			if err := <-m.connected; err != nil {
				_, _ = stop()
				return fmt.Errorf("round %d: %w", round, err)
			}
		}
		var served []*member
		for _, m := range append(pair, m) {
			if m.answers() {
				served = append(served, m)
			}
		}
		if len(served) != 1 {
			_, _ = stop()
			return fmt.Errorf("round %d: %d connections with the same client id are served at once", round, len(served))
		}
		m = served[0]
	}
	n, err := stop()
	if err != nil {
		return err
	}
	select {
	case <-m.ended:
	case <-m.gone:
		return errors.New("the end did not come")
	}
	return in.whole(n)
}

// publishing publishes "0", "1" and so on at QoS 1, one after the other. The function that it returns sends the end
// after them, and says how many there were.
func publishing(c *rawClient, topic string) func() (int, error) {
	quit, stopped := make(chan struct{}), make(chan error)
	n := 0
	go func() {
		stopped <- func() error {
			for {
				payload := strconv.Itoa(n)
				select {
				case <-quit:
					payload = end
				default:
				}
				if err := c.deliver(topic, 1, uint16(1+n%60_000), payload); err != nil || payload == end {
					return err
				}
				n++
			}
		}()
	}()
	return func() (int, error) {
		close(quit)
		err := <-stopped
		return n, err
	}
}

// interrupting lets two messages be published while a session is taken over: when mochi has copied what the session
// holds, and still gives messages to its old connection.
type interrupting struct {
	answering
	once      sync.Once
	published chan struct{}
}

func (h *interrupting) Provides(b byte) bool {
	return b == mqtt.OnQosDropped || b == mqtt.OnPublished || h.answering.Provides(b)
}

func (h *interrupting) OnQosDropped(*mqtt.Client, packets.Packet) {
	h.once.Do(func() {
		for range 2 { // the first may have begun before
			select {
			case <-h.published:
			case <-time.After(patience):
			}
		}
	})
}

func (h *interrupting) OnPublished(*mqtt.Client, packets.Packet) {
	select {
	case h.published <- struct{}{}:
	default:
	}
}

// hasty has a message sent on a connection that is there, but has no CONNACK yet.
type hasty struct {
	answering
	once sync.Once
	sent chan struct{}
}

func (h *hasty) Provides(b byte) bool {
	return b == mqtt.OnPacketEncode || b == mqtt.OnPacketSent || h.answering.Provides(b)
}

func (h *hasty) OnPacketEncode(_ *mqtt.Client, pk packets.Packet) packets.Packet {
	if pk.FixedHeader.Type == packets.Connack && pk.SessionPresent {
		h.once.Do(func() {
			select {
			case <-h.sent:
			case <-time.After(patience):
			}
		})
	}
	return pk
}

func (h *hasty) OnPacketSent(_ *mqtt.Client, pk packets.Packet, _ []byte) {
	if pk.FixedHeader.Type == packets.Publish {
		select {
		case h.sent <- struct{}{}:
		default:
		}
	}
}

// F11: the connection replaces the last one before its CONNACK is written [MQTT-3.2.0-1].
func connackComesFirst(t *testing.T, s subject) error {
	const rounds = 50
	vehicle := s.client(t, 5, "v7", persistent)
	vehicle.subscribed("commands")
	stop := publishing(s.client(t, 4, "center"), "commands")
	for range rounds {
		vehicle.disconnect()
		var err error
		if vehicle, err = s.tryClient(t, 5, "v7", persistent); err != nil {
			_, _ = stop()
			return fmt.Errorf("first packet of a connection: %w", err)
		}
	}
	_, err := stop()
	return err
}

// F11: the new connection gets a copy of what the session holds, and what is published from then on until it replaces
// the old one goes into the original.
func messagesDuringTakeover(t *testing.T, s subject) error {
	const rounds = 50
	vehicle, center := s.client(t, 5, "v7", persistent), s.client(t, 4, "center")
	vehicle.subscribe("commands")
	if err := center.deliver("commands", 1, 1, "unacknowledged"); err != nil {
		return err
	}
	if _, err := vehicle.expect("Publish commands"); err != nil {
		return err
	}
	stop := publishing(center, "commands")
	in := &inbox{got: map[string]uint16{}}
	for range rounds {
		next := dial(t, s.address, 5)
		next.wait = s.wait
		next.send(connectPacket("v7", persistent))
		for { // messages may come first: that is another fault
			pk, err := next.tryRead()
			if err != nil {
				_, _ = stop()
				return fmt.Errorf("no CONNACK: %w", err)
			}
			if pk.FixedHeader.Type == packets.Connack {
				break
			}
			in.add(pk)
		}
		vehicle.conn.Close()
		vehicle = next
	}
	n, err := stop()
	if err != nil {
		return err
	}
	got, err := vehicle.receive()
	if err != nil {
		return err
	}
	for _, pk := range got {
		in.add(pk)
	}
	return in.whole(n)
}

// member is one of the connections that want to be the client.
type member struct {
	c         *rawClient
	connected chan error // how CONNECT ended
	pongs     chan struct{}
	gone      chan struct{}
	ended     chan struct{} // the end has come here
}

func (s subject) member(t *testing.T, in *inbox) *member {
	t.Helper()
	m := &member{c: dial(t, s.address, 5)}
	m.c.wait = s.wait
	m.c.send(connectPacket("v7", persistent))
	m.run(in)
	return m
}

// run reads and acknowledges until the connection ends.
func (m *member) run(in *inbox) {
	m.connected = make(chan error, 1)
	m.pongs, m.gone, m.ended = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go func() {
		defer m.c.conn.Close()
		defer close(m.gone)
		for {
			pk, err := m.c.tryRead()
			if err != nil {
				select {
				case m.connected <- fmt.Errorf("no CONNACK: %w", err):
				default: // that was said before
				}
				return
			}
			switch pk.FixedHeader.Type {
			case packets.Connack:
				m.connected <- nil
			case packets.Pingresp:
				m.pongs <- struct{}{}
			case packets.Publish:
				if string(pk.Payload) == end {
					close(m.ended)
				} else {
					in.add(pk)
				}
				_ = m.c.acknowledge(pk) // a connection that is going is told by the next read
			}
		}
	}()
}

// answers reports whether the server answers the connection.
func (m *member) answers() bool {
	_ = m.c.trySend(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	select {
	case <-m.pongs:
		return true
	case <-m.gone:
		return false
	}
}

// inbox is what the connections of one client were sent.
type inbox struct {
	mu     sync.Mutex
	got    map[string]uint16 // packet ids, by payload
	double []packets.Packet
}

func (in *inbox) add(pk packets.Packet) {
	in.mu.Lock()
	defer in.mu.Unlock()
	id, again := in.got[string(pk.Payload)]
	if again && !pk.FixedHeader.Dup && id != pk.PacketID {
		in.double = append(in.double, pk)
	}
	in.got[string(pk.Payload)] = pk.PacketID
}

// whole wants each of n messages, and again only as the same delivery.
func (in *inbox) whole(n int) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.double) > 0 {
		return fmt.Errorf("sent twice as if they were new: %s", listed(in.double))
	}
	for i := range n {
		if _, ok := in.got[strconv.Itoa(i)]; !ok {
			return fmt.Errorf("message %d of %d was lost", i, n)
		}
	}
	return nil
}

// F14: a channel with room for 8192 messages is made for each connection.
func memoryPerConnection(t *testing.T, s subject) error {
	const connections, limit = 200, 32 << 10
	before := liveHeap()
	clients := make([]*rawClient, connections)
	for i := range clients {
		clients[i] = s.client(t, 4, fmt.Sprint("v", i))
	}
	each := (liveHeap() - before) / connections
	runtime.KeepAlive(clients)
	t.Logf("%d bytes for each connection, the test's end included", each)
	if each > limit {
		return fmt.Errorf("an idle connection takes %d bytes of heap, more than %d", each, limit)
	}
	return nil
}

// liveHeap is what is left after a garbage collection, once that is the same twice.
func liveHeap() int64 {
	var m runtime.MemStats
	for range 20 {
		last := int64(m.HeapAlloc)
		runtime.GC()
		runtime.ReadMemStats(&m)
		if d := int64(m.HeapAlloc) - last; -64<<10 < d && d < 64<<10 {
			break
		}
	}
	return int64(m.HeapAlloc)
}

// F14: what waits for a client is copied and sorted every second, to find what has expired.
func queuedMessagesOutsideMochi(t *testing.T, s subject) error {
	const n = 300
	vehicle, center := s.client(t, 4, "v7", persistent), s.client(t, 4, "center")
	vehicle.subscribed("commands")
	vehicle.disconnect()
	if err := center.deliverMany("commands", n, false); err != nil {
		return err
	}
	for by := time.Now().Add(s.wait); ; time.Sleep(time.Millisecond) {
		left := 0
		if cl, ok := s.mochi.Clients.Get("v7"); ok {
			left = cl.State.Inflight.Len()
		}
		if left == 0 {
			break
		}
		if time.Now().After(by) {
			return fmt.Errorf("%d of %d messages queued for an offline session are copied and sorted every second", left, n)
		}
	}
	vehicle = s.client(t, 4, "v7", persistent)
	if err := center.deliver("commands", 1, n+1, end); err != nil {
		return err
	}
	got, err := vehicle.receive()
	return errors.Join(err, inOrder(got, n, false))
}

// F16: a publish whose PUBREC is out is answered with "packet identifier in use", be it the same one.
func resentQoS2Publish(t *testing.T, s subject) error {
	const topic = "state"
	dashboard, vehicle := s.client(t, 5, "dashboard"), s.client(t, 5, "v7", persistent)
	dashboard.subscribed(topic)
	vehicle.publish(topic, 2, 7, "open")
	if err := vehicle.acked(packets.Pubrec, 7); err != nil {
		return err
	}
	vehicle.conn.Close()
	vehicle = s.client(t, 5, "v7", persistent)
	vehicle.publishDup(topic, 2, 7, "open")
	// The server may send the PUBREC of the resumed session too, ahead of the answer.
	released := false
	for {
		pk, err := vehicle.tryRead()
		if err != nil {
			return fmt.Errorf("no PUBCOMP: %w", err)
		}
		if pk.PacketID != 7 || pk.ReasonCode != 0 {
			return fmt.Errorf("publish sent again: got %s for packet id %d", show(pk), pk.PacketID)
		}
		if pk.FixedHeader.Type == packets.Pubcomp {
			break
		}
		if pk.FixedHeader.Type == packets.Pubrec && !released {
			released = true
			vehicle.send(reply(packets.Pubrel, 7))
		}
	}
	if err := vehicle.deliver(topic, 1, 8, end); err != nil {
		return err
	}
	got, err := dashboard.receive()
	if err == nil && len(got) != 1 {
		err = fmt.Errorf("the message was delivered %d times", len(got))
	}
	return err
}

// mochi drops messages, whatever their QoS, when a client's queue is full. Whether a fan-in fills it is a matter of luck
// with plain mochi, so that there is no other half.
func TestNothingIsDroppedInAFanIn(t *testing.T) {
	const publishers = 20
	each := 2000
	if raceDetector { // under which the subscriber takes less than the 1,000 a second for which publishers wait: all must fit into its queue
		each = 400
	}
	b := start(t)
	s := subject{address: b.address, wait: patience}
	subscriber := s.client(t, 5, "dashboard")
	subscriber.subscribe("t")
	errs := make([]error, publishers)
	var all sync.WaitGroup
	for p := range publishers {
		c := s.client(t, 4, fmt.Sprint("v", p))
		all.Go(func() {
			for i := range each {
				if err := c.trySend(packets.Packet{
					FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1},
					TopicName:   "t", PacketID: uint16(1 + i), Payload: []byte(numbered(p, i)),
				}); err != nil {
					errs[p] = err
					return
				}
			}
			for i := range each {
				if err := c.acked(packets.Puback, uint16(1+i)); err != nil {
					errs[p] = err
					return
				}
			}
		})
	}
	counts := perPublisher{}
	for range publishers * each {
		pk, err := subscriber.expect("Publish t")
		if err := errors.Join(err, counts.add(pk), subscriber.acknowledge(pk)); err != nil {
			t.Error(err)
			b.wantMetric(`throughline_mqtt_messages_dropped_total{reason="queue_full"}`, 0)
			break
		}
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}
