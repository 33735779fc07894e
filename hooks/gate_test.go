package hooks_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/hooks"
)

// TestFailedCommitClosesWithoutAcknowledgement: what was not flushed is never acknowledged, neither on
// this connection nor on the next one of the same session.
func TestFailedCommitClosesWithoutAcknowledgement(t *testing.T) {
	for _, c := range []struct {
		version, qos byte
		early        bool // the commit has failed before mochi writes its acknowledgement
	}{
		{4, 1, false}, {4, 2, false}, {5, 1, false}, {5, 2, false},
		{4, 1, true}, {4, 2, true}, {5, 1, true}, {5, 2, true},
	} {
		t.Run(fmt.Sprintf("version %d QoS %d early %v", c.version, c.qos, c.early), func(t *testing.T) {
			b := start(t)
			commit := pending()
			if c.early {
				commit.end(errors.New("no space left on device"))
			}
			b.queue.next(func() (hooks.Commit, error) { b.queue.answer = nil; return commit, nil })
			vehicle := b.persistentClient(c.version, "v7")
			vehicle.publish("fleet/v7/telemetry", c.qos, 9, braking)
			if !c.early {
				if got := show(vehicle.next()...); got != "" {
					t.Fatalf("got %s before the commit", got)
				}
				commit.end(errors.New("no space left on device"))
			}
			vehicle.wantClosed()
			b.wantMetric(`throughline_publishes_refused_total{reason="commit_failed"}`, 1)

			// The client comes back, and mochi must not resume with a PUBREC for what is lost.
			again := b.persistentClient(c.version, "v7")
			if got := show(again.next()...); got != "" {
				t.Errorf("the resumed session got %s", got)
			}
			again.publishDup("fleet/v7/telemetry", c.qos, 9, braking)
			want := map[byte]string{1: "Puback 0x00", 2: "Pubrec 0x00"}[c.qos]
			if got := show(again.next()...); got != want {
				t.Errorf("sent again: got %q, want %q", got, want)
			}
			if n := len(b.queue.taken()); n != 1 {
				t.Errorf("%d records stored, want 1", n)
			}
		})
	}
}

// TestTakeoverWaitsForTheCommit: a second connection of the same client gets no PUBREC for what the
// first one published before it is on disk.
func TestTakeoverWaitsForTheCommit(t *testing.T) {
	for _, ending := range []error{nil, errors.New("disk on fire")} {
		t.Run(fmt.Sprint("commit ends with ", ending), func(t *testing.T) {
			b := start(t)
			commit := pending()
			b.queue.next(func() (hooks.Commit, error) { b.queue.answer = nil; return commit, nil })
			first := b.persistentClient(5, "v7")
			first.publish("fleet/v7/telemetry", 2, 9, braking)
			if got := show(first.next()...); got != "" {
				t.Fatalf("got %s before the commit", got)
			}
			second := b.dialed(5)
			connected := make(chan struct{})
			go func() {
				defer close(connected)
				second.connectPersistent("v7")
			}()
			if got := show(first.read()); got != "Disconnect 0x8e" {
				t.Errorf("the first connection got %s", got)
			}
			first.wantClosed()
			select {
			case <-connected:
				t.Error("the session was taken over before the commit")
			default:
			}
			commit.end(ending)
			<-connected
			// What is on disk is known to have come; what isn't is stored now.
			second.publishDup("fleet/v7/telemetry", 2, 9, braking)
			if got := show(second.next()...); got != "Pubrec 0x00" {
				t.Errorf("sent again: got %q", got)
			}
			want := 0 // the queue doesn't count what it answers with a commit of the test's
			if ending != nil {
				want = 1
			}
			if n := len(b.queue.taken()); n != want {
				t.Errorf("%d records stored by the second connection, want %d", n, want)
			}
		})
	}
}

// TestUnwrittenAcknowledgementOfALostPublish: mochi keeps a PUBACK that it could not write, as it does PUBRECs.
func TestUnwrittenAcknowledgementOfALostPublish(t *testing.T) {
	for _, version := range []byte{4, 5} {
		b := start(t)
		first, second := pending(), pending()
		vehicle := b.persistentClient(version, "v7")
		b.queue.next(func() (hooks.Commit, error) { return first, nil })
		vehicle.publish("fleet/v7/telemetry", 1, 8, braking)
		if got := show(vehicle.next()...); got != "" {
			t.Fatalf("got %s before the commit", got)
		}
		closed := make(chan struct{})
		b.queue.next(func() (hooks.Commit, error) {
			first.end(errors.New("disk on fire"))
			vehicle.wantClosed()
			close(closed)
			return second, nil
		})
		vehicle.publish("fleet/v7/telemetry", 1, 9, braking)
		<-closed // else the next connection may be the one that ends this one
		again := make(chan string)
		go func() { again <- show(b.persistentClient(version, "v7").next()...) }()
		second.end(errors.New("disk on fire"))
		if got := <-again; got != "" {
			t.Errorf("version %d: the resumed session got %s", version, got)
		}
	}
}

// TestUndeliverableMessagesHoldNothingUp: messages beyond a client's Maximum Packet Size leave its other packets alone.
func TestUndeliverableMessagesHoldNothingUp(t *testing.T) {
	b := start(t)
	vehicle := b.dialed(5)
	vehicle.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect:     packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: "v7", Clean: true, Keepalive: 60},
		Properties:  packets.Properties{MaximumPacketSize: 100},
	})
	if pk := vehicle.read(); pk.ReasonCode != 0 {
		t.Fatalf("got %s", show(pk))
	}
	vehicle.subscribe("commands/#")
	sender := b.client(4, "sender")
	large := strings.Repeat("x", 200) // can't be sent to the vehicle
	for range 200 {
		for range 50 {
			sender.publish("commands/v7", 0, 0, large)
		}
		vehicle.next()
	}
}

// TestTakeoverDuringAStall: the client gets its session back though the disk hangs, but no PUBREC for what may
// never get there. What it sends again is stored again.
func TestTakeoverDuringAStall(t *testing.T) {
	t.Parallel() // it lasts as long as a takeover waits
	b := start(t)
	commit := pending()
	b.queue.next(func() (hooks.Commit, error) { b.queue.answer = nil; return commit, nil })
	first := b.persistentClient(5, "v7")
	first.publish("fleet/v7/telemetry", 2, 9, braking)
	if got := show(first.next()...); got != "" {
		t.Fatalf("got %s before the commit", got)
	}
	second := b.persistentClient(5, "v7")
	if got := show(second.next()...); got != "" {
		t.Errorf("the second connection got %s", got)
	}
	second.publishDup("fleet/v7/telemetry", 2, 9, braking)
	if got := show(second.next()...); got != "Pubrec 0x00" {
		t.Errorf("sent again: got %q", got)
	}
	commit.end(errors.New("disk on fire"))
	b.wantMetric(`throughline_publishes_refused_total{reason="commit_failed"}`, 1)
	if got := show(second.next()...); got != "" {
		t.Errorf("the second connection got %s", got)
	}
}

// TestStalledDiskHoldsAcknowledgementsAlone: PINGRESP, SUBACK and deliveries pass, and acknowledgements
// come in the order of the publishes once the disk is back.
func TestStalledDiskHoldsAcknowledgementsAlone(t *testing.T) {
	b := start(t)
	commit := pending()
	b.queue.next(func() (hooks.Commit, error) { return commit, nil })
	vehicle := b.client(5, "v7")
	for id := uint16(1); id <= 20; id++ {
		topic := "fleet/v7/telemetry"
		if id%3 == 0 {
			topic = "nothing/matches" // its acknowledgement waits its turn
		}
		vehicle.publish(topic, 1+byte(id%2), id, braking)
	}
	if got := show(vehicle.subscribe("commands/#")); got != "Suback 0x00" {
		t.Errorf("got %s", got)
	}
	other := b.client(4, "other")
	other.publish("commands/v7", 0, 0, "stop")
	if got := show(vehicle.read()); got != "Publish commands/v7" {
		t.Errorf("got %s", got)
	}
	if got := show(vehicle.next()...); got != "" {
		t.Fatalf("got %s before the commit", got)
	}
	commit.end(nil)
	for id := uint16(1); id <= 20; id++ {
		pk := vehicle.read()
		want := packets.Puback
		if id%2 == 1 {
			want = packets.Pubrec
		}
		if pk.FixedHeader.Type != want || pk.PacketID != id {
			t.Fatalf("got %s %d, want id %d", show(pk), pk.PacketID, id)
		}
	}
}

// persistentClient connects with a session that outlives the connection.
func (b *broker) persistentClient(version byte, id string) *rawClient {
	b.t.Helper()
	c := b.dialed(version)
	c.connectPersistent(id)
	return c
}

func (b *broker) dialed(version byte) *rawClient {
	b.t.Helper()
	return dial(b.t, b.address, version)
}

// connectPersistent connects and returns when the CONNACK is there.
func (c *rawClient) connectPersistent(id string) {
	c.t.Helper()
	c.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect:     packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: id, Keepalive: 60},
		Properties:  packets.Properties{SessionExpiryInterval: 300, SessionExpiryIntervalFlag: true},
	})
	pk, err := c.tryRead()
	if err != nil || pk.FixedHeader.Type != packets.Connack || pk.ReasonCode != 0 {
		c.t.Errorf("connect as %q: got %s, %v", id, show(pk), err)
	}
}

// publishDup publishes again what was not acknowledged.
func (c *rawClient) publishDup(topic string, qos byte, id uint16, payload string) {
	c.t.Helper()
	c.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos, Dup: true},
		TopicName:   topic, PacketID: id, Payload: []byte(payload),
	})
}
