package sessions_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/sessions"
)

// wire is a connection that remembers what was sent, in short words.
type wire struct {
	sent  []string
	busy  bool // so much waits that nothing should follow
	full  bool // so much that frames which may be lost are
	ended bool
}

func (w *wire) Send(frame []byte, idAt int, id uint16) (bool, error) {
	if w.ended {
		return false, errors.New("closed")
	}
	b := slices.Clone(frame)
	if idAt > 0 {
		binary.BigEndian.PutUint16(b[idAt:], id)
	}
	w.sent = append(w.sent, words(b))
	return !w.busy, nil
}

func (w *wire) Offer(frame []byte) (taken, more bool) {
	if w.full {
		return false, false
	}
	more, err := w.Send(frame, 0, 0)
	return err == nil, more
}

// words tells a frame of a topic and payload shorter than 100 bytes.
func words(b []byte) string {
	body := b[2:]
	switch b[0] >> 4 {
	case 6:
		s := fmt.Sprintf("pubrel %d", binary.BigEndian.Uint16(body))
		if len(body) > 2 {
			s += fmt.Sprintf(" %#x", body[2])
		}
		return s
	case 3:
		n := 2 + int(binary.BigEndian.Uint16(body))
		s := "publish"
		if b[0]&8 != 0 {
			s += " dup"
		}
		if qos := b[0] >> 1 & 3; qos > 0 {
			s += fmt.Sprintf(" %d", binary.BigEndian.Uint16(body[n:]))
			n += 2
		}
		if b[0]&1 != 0 {
			s += " retain"
		}
		return s + " " + string(body[n:])
	}
	return fmt.Sprintf("% x", b)
}

// want fails unless exactly these frames were sent since the last call.
func (w *wire) want(t *testing.T, frames ...string) {
	t.Helper()
	if !slices.Equal(w.sent, frames) {
		t.Errorf("sent %q, want %q", w.sent, frames)
	}
	w.sent = nil
}

func deliver(s *sessions.Session, qos byte, payloads ...string) (pause time.Duration) {
	for _, p := range payloads {
		m := &sessions.Message{Topic: "a", Payload: []byte(p), QoS: qos}
		e := sessions.NewEncoder(m)
		pause = s.Deliver(sessions.Delivery{Message: m, QoS: qos}, e).Pause
		e.Release()
	}
	return pause
}

const (
	puback  = 4
	pubrec  = 5
	pubcomp = 7
)

func online(o sessions.ConnOptions) (*sessions.Session, *wire, *sessions.Counters) {
	var c sessions.Counters
	s, w := sessions.New(&c), new(wire)
	s.Attach(w, o)
	return s, w, &c
}

func TestDeliverOnline(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	deliver(s, 0, "zero")
	deliver(s, 1, "one")
	deliver(s, 2, "two")
	w.want(t, "publish zero", "publish 1 one", "publish 2 two")

	s.Acknowledged(w, puback, 1, 0)
	s.Acknowledged(w, puback, 2, 0) // a PUBACK doesn't end QoS 2
	s.Acknowledged(w, pubcomp, 2, 0)
	s.Acknowledged(w, pubrec, 2, 0)
	s.Acknowledged(w, pubrec, 2, 0) // sent again: so is the answer
	w.want(t, "pubrel 2", "pubrel 2")
	s.Acknowledged(w, pubcomp, 2, 0)
	if queued, inflight := s.Waiting(); queued != 0 || inflight != 0 {
		t.Errorf("%d queued, %d in flight after all were acknowledged", queued, inflight)
	}
	s.Acknowledged(w, puback, 1, 0) // once more
	s.Acknowledged(w, pubcomp, 7, 0)
	s.Acknowledged(w, pubrec, 7, 0) // never sent
	w.want(t, "pubrel 7")
}

func TestPubrecOfAnUnknownIdentifier(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{V5: true})
	s.Acknowledged(w, pubrec, 7, 0)
	w.want(t, "pubrel 7 0x92")
}

// [MQTT-4.3.3-4]: a PUBREC that refuses ends it, without PUBREL.
func TestPubrecThatRefuses(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{V5: true, ReceiveMaximum: 1})
	deliver(s, 2, "x")
	deliver(s, 1, "y")
	w.sent = nil
	s.Acknowledged(w, pubrec, 1, 0x97)
	if len(w.sent) != 1 || w.sent[0][:9] != "publish 2" {
		t.Errorf("sent %q, want the next message", w.sent)
	}
}

// [MQTT-3.3.4-9]: no more than the client's Receive Maximum is ever out.
func TestReceiveMaximum(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{ReceiveMaximum: 2})
	deliver(s, 1, "a", "b", "c", "d")
	deliver(s, 0, "zero") // not counted
	w.want(t, "publish 1 a", "publish 2 b", "publish zero")
	s.Acknowledged(w, puback, 2, 0)
	w.want(t, "publish 3 c")
	s.Acknowledged(w, puback, 1, 0)
	w.want(t, "publish 4 d")
}

// QoS 2 counts until its PUBCOMP.
func TestReceiveMaximumCountsReleased(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{ReceiveMaximum: 1})
	deliver(s, 2, "a", "b")
	s.Acknowledged(w, pubrec, 1, 0)
	w.want(t, "publish 1 a", "pubrel 1")
	s.Acknowledged(w, pubcomp, 1, 0)
	w.want(t, "publish 2 b")
}

// [MQTT-4.4.0-1]: on the next connection what was not acknowledged comes again, in order, then what has waited.
func TestReconnect(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	deliver(s, 1, "a")
	deliver(s, 2, "b", "c")
	s.Acknowledged(w, pubrec, 2, 0)
	if s.Detach(new(wire)) {
		t.Error("detached a connection that it doesn't have")
	}
	if !s.Detach(w) || s.Online() {
		t.Error("not detached")
	}
	deliver(s, 0, "lost")
	deliver(s, 1, "d")
	s.Acknowledged(w, puback, 1, 0) // too late: it may not have been read from the old connection
	w.sent = nil

	again := new(wire)
	s.Attach(again, sessions.ConnOptions{ReceiveMaximum: 2})
	again.want(t, "publish dup 1 a", "pubrel 2")
	s.Acknowledged(again, puback, 3, 0) // not out yet on this connection
	s.Acknowledged(again, puback, 1, 0)
	again.want(t, "publish dup 3 c")
	s.Acknowledged(again, pubcomp, 2, 0)
	again.want(t, "publish 4 d")
	w.want(t)
}

// What a dead connection did not take is no DUP on the next one.
func TestNeverSent(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	w.ended = true
	deliver(s, 1, "a")
	s.Detach(w)
	again := new(wire)
	s.Attach(again, sessions.ConnOptions{})
	again.want(t, "publish 1 a")
}

func TestIdentifiersInUseAreNotGivenAgain(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	kept := []uint16{5, 9, 65535} // never acknowledged
	for id := 1; id <= 65535; id++ {
		deliver(s, 1, "x")
		if !slices.Contains(kept, uint16(id)) {
			s.Acknowledged(w, puback, uint16(id), 0)
		}
	}
	w.sent = nil
	for range 8 {
		deliver(s, 1, "x")
	}
	w.want(t, "publish 1 x", "publish 2 x", "publish 3 x", "publish 4 x", "publish 6 x", "publish 7 x", "publish 8 x", "publish 10 x")
}

// What is unacknowledged is bounded in bytes as well, but one message is always sent.
func TestInflightBytes(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	large := strings.Repeat("x", sessions.MaxInflightBytes+1)
	s2 := &sessions.Message{Topic: "a", Payload: []byte(large), QoS: 2}
	deliverMessage := func(m *sessions.Message) {
		e := sessions.NewEncoder(m)
		s.Deliver(sessions.Delivery{Message: m, QoS: 2}, e)
		e.Release()
	}
	deliverMessage(s2)
	deliver(s, 1, "waits")
	if queued, inflight := s.Waiting(); queued != 1 || inflight != 1 || len(w.sent) != 1 {
		t.Errorf("%d queued, %d in flight, %d sent; want one each", queued, inflight, len(w.sent))
	}
	s.Acknowledged(w, pubrec, 1, 0) // its message is needed no longer
	w.sent = nil
	s.Acknowledged(w, pubcomp, 1, 0)
	w.want(t, "publish 2 waits")
}

func TestBlockedConnection(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	w.busy = true
	deliver(s, 1, "a", "b", "c")
	w.want(t, "publish 1 a")
	s.Acknowledged(w, puback, 1, 0) // makes a place, but not in the connection
	w.want(t)
	w.busy = false
	s.Drained(new(wire)) // another one's
	w.want(t)
	s.Drained(w)
	w.want(t, "publish 2 b", "publish 3 c")
}

// At QoS 0 a client that takes nothing for a while loses what comes, and nobody waits for it.
func TestBlockedConnectionQoS0(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, w, c := online(sessions.ConnOptions{})
		w.busy = true
		if p := deliver(s, 0, "a"); p != 0 {
			t.Errorf("asked to wait %v before anything waits", p)
		}
		if p := deliver(s, 0, "b"); p == 0 || p > 10*time.Millisecond {
			t.Errorf("asked to wait %v for a client that took something just now", p)
		}
		time.Sleep(time.Second)
		if p := deliver(s, 0, "c"); p != 0 {
			t.Errorf("asked to wait %v for a client that takes nothing", p)
		}
		w.want(t, "publish a", "publish b")
		s.Drained(w)
		w.full = true
		deliver(s, 0, "d")
		w.want(t)
		if n := c.Congested.Load(); n != 2 {
			t.Errorf("%d counted as congested, want 2", n)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	s, w, c := online(sessions.ConnOptions{ReceiveMaximum: 1})
	deliver(s, 1, "a") // the one that is out
	for i := range sessions.MaxQueued {
		deliver(s, 1, fmt.Sprint(i))
	}
	m := &sessions.Message{Topic: "a", Payload: []byte("too much"), QoS: 1}
	for i := range 3 {
		if r := s.Deliver(sessions.Delivery{Message: m, QoS: 1}, sessions.NewEncoder(m)); r.Sent || r.Full != (i == 0) {
			t.Errorf("message %d beyond the bound: %+v", i, r)
		}
	}
	if dropped, queued := c.QueueFull.Load(), c.Queued.Load(); dropped != 3 || queued != sessions.MaxQueued {
		t.Errorf("%d dropped, %d queued", dropped, queued)
	}
	s.Acknowledged(w, puback, 1, 0)
	deliver(s, 1, "fits again")
	w.sent = nil
	s.Detach(w)
	s.Attach(w, sessions.ConnOptions{})
	var got []string
	for acked := 0; acked < len(w.sent); acked++ {
		f := strings.Fields(w.sent[acked])
		got = append(got, f[len(f)-1])
		s.Acknowledged(w, puback, uint16(acked+2), 0)
	}
	if len(got) != sessions.MaxQueued+1 || got[0] != "0" || got[sessions.MaxQueued-1] != fmt.Sprint(sessions.MaxQueued-1) {
		t.Errorf("%d messages came, from %q", len(got), got[0])
	}
	if queued, inflight := s.Waiting(); queued+inflight != 0 || c.Queued.Load() != 0 {
		t.Errorf("left: %d queued, %d in flight, %d counted", queued, inflight, c.Queued.Load())
	}
}

// Publishers wait for a client that is behind if that helps it, and for no other.
func TestPause(t *testing.T) {
	for _, c := range []struct {
		name  string
		every time.Duration // the client acknowledges a message
		want  bool          // publishers are asked to wait
	}{
		{"a fast client", 200 * time.Microsecond, true},
		{"a slow client", 100 * time.Millisecond, false},
		{"a client that takes nothing", time.Hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, w, _ := online(sessions.ConnOptions{ReceiveMaximum: 1})
				for range sessions.MaxQueued / 2 {
					deliver(s, 1, "x")
				}
				id := uint16(0)
				for begin := time.Now(); time.Since(begin) < 5*time.Second; {
					time.Sleep(min(c.every, time.Second))
					if c.every < time.Second {
						id++
						s.Acknowledged(w, puback, id, 0)
						deliver(s, 1, "x") // so that as many wait
					}
				}
				p := deliver(s, 1, "x")
				if (p > 0) != c.want || p > 10*time.Millisecond {
					t.Errorf("asked to wait %v", p)
				}
			})
		})
	}
}

// Retained messages for a new subscription wait for their client, even at QoS 0, but not for its next connection.
func TestStored(t *testing.T) {
	s, w, c := online(sessions.ConnOptions{})
	stored := func(qos byte, payload string) {
		m := &sessions.Message{Topic: "a", Payload: []byte(payload), QoS: qos}
		s.Deliver(sessions.Delivery{Message: m, QoS: qos, Stored: true}, sessions.NewEncoder(m))
	}
	w.busy, w.full = true, true
	stored(1, "one")
	stored(0, "zero")
	stored(1, "two")
	w.want(t, "publish 1 one")
	w.busy = false
	s.Drained(w)
	w.want(t, "publish zero", "publish 2 two")

	w.busy = true
	stored(1, "three")
	for range sessions.MaxQueued + 5 { // more than others may
		stored(0, "zero")
	}
	stored(1, "four")
	if n := c.QueueFull.Load(); n != 0 {
		t.Errorf("%d dropped", n)
	}
	s.Detach(w)
	again := new(wire)
	s.Attach(again, sessions.ConnOptions{})
	again.want(t, "publish dup 1 one", "publish dup 2 two", "publish dup 3 three", "publish 4 four")
	if n := c.Queued.Load(); n != 0 {
		t.Errorf("%d counted as queued", n)
	}
	s.Detach(again)
	stored(0, "nobody is there")
	if queued, _ := s.Waiting(); queued != 0 {
		t.Error("QoS 0 was kept for the next connection")
	}
}

func TestQueueIsBoundedInBytes(t *testing.T) {
	var c sessions.Counters
	s := sessions.New(&c)
	m := &sessions.Message{Topic: "a", Payload: make([]byte, sessions.MaxQueuedBytes/4), QoS: 1}
	e := sessions.NewEncoder(m)
	for range 4 {
		s.Deliver(sessions.Delivery{Message: m, QoS: 1}, e)
	}
	if queued, _ := s.Waiting(); queued != 3 || c.QueueFull.Load() != 1 {
		t.Errorf("%d queued, %d dropped", queued, c.QueueFull.Load())
	}
	s.End()
	if n := c.Queued.Load(); n != 0 {
		t.Errorf("%d counted as queued after the end", n)
	}
	deliver(s, 1, "x")
	if queued, _ := s.Waiting(); queued != 0 {
		t.Error("a session that has ended took a message")
	}
}

// [MQTT-3.1.2-24] [MQTT-3.1.2-25]: too large for the client is as good as delivered.
func TestMaximumPacketSize(t *testing.T) {
	s, w, c := online(sessions.ConnOptions{MaximumPacketSize: 12})
	deliver(s, 1, "this is too large", "fits")
	w.want(t, "publish 1 fits")
	if n := c.TooLarge.Load(); n != 1 {
		t.Errorf("%d counted as too large", n)
	}
}

// [MQTT-3.3.2-5], and [MQTT-3.3.2-6]: what is left of the expiry is sent.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c sessions.Counters
		s := sessions.New(&c)
		for _, expiry := range []time.Duration{10 * time.Second, time.Minute} {
			m := &sessions.Message{Topic: "a", Payload: []byte("x"), QoS: 1, Expires: time.Now().Add(expiry)}
			s.Deliver(sessions.Delivery{Message: m, QoS: 1}, sessions.NewEncoder(m))
		}
		time.Sleep(20 * time.Second)
		w := new(wire)
		s.Attach(w, sessions.ConnOptions{V5: true})
		w.want(t, "publish 1 \x05\x02\x00\x00\x00\x28x") // 40 seconds
		if n := c.Expired.Load(); n != 1 {
			t.Errorf("%d counted as expired", n)
		}
		s.Detach(w)
		time.Sleep(time.Hour)
		s.Attach(w, sessions.ConnOptions{V5: true})
		w.want(t, "publish dup 1 \x05\x02\x00\x00\x00\x01x") // its delivery had begun
	})
}

func TestAckOfAReplacedConnectionChangesNothing(t *testing.T) {
	s, w, _ := online(sessions.ConnOptions{})
	deliver(s, 1, "a")
	next := new(wire)
	s.Attach(next, sessions.ConnOptions{})
	s.Acknowledged(w, puback, 1, 0)
	if _, inflight := s.Waiting(); inflight != 1 {
		t.Error("an acknowledgement of the old connection was taken")
	}
	if s.Detach(w) {
		t.Error("the old connection took the session along")
	}
}

// Retained messages that wait take no room from others, and none overtakes them: it may be of the same topic.
func TestLiveBesideStored(t *testing.T) {
	s, w, c := online(sessions.ConnOptions{ReceiveMaximum: 1})
	deliver(s, 1, "out")
	m := &sessions.Message{Topic: "a", Payload: []byte("stored"), QoS: 1}
	for range sessions.MaxQueued + 5 {
		s.Deliver(sessions.Delivery{Message: m, QoS: 1, Stored: true}, sessions.NewEncoder(m))
	}
	deliver(s, 0, "zero")
	deliver(s, 1, "one")
	if n := c.Dropped(); n != 0 {
		t.Errorf("%d dropped", n)
	}
	w.sent = nil
	for id := range uint16(sessions.MaxQueued + 6) {
		s.Acknowledged(w, puback, id+1, 0)
	}
	want := []string{"publish zero", fmt.Sprintf("publish %d one", sessions.MaxQueued+7)}
	if got := w.sent[len(w.sent)-2:]; !slices.Equal(got, want) {
		t.Errorf("the last to come are %q, want %q", got, want)
	}
	deliver(s, 0, "at once")
	if got := w.sent[len(w.sent)-1]; got != "publish at once" {
		t.Errorf("got %q", got)
	}
}

// [MQTT-3.1.2-24] holds for what is sent again, too: the client would be sent it first on every connection.
func TestMaximumPacketSizeOfTheNextConnection(t *testing.T) {
	s, w, c := online(sessions.ConnOptions{})
	deliver(s, 1, "this is too large", "fits")
	s.Detach(w)
	again := new(wire)
	s.Attach(again, sessions.ConnOptions{MaximumPacketSize: 12})
	again.want(t, "publish dup 2 fits")
	if n := c.TooLarge.Load(); n != 1 {
		t.Errorf("%d counted as too large", n)
	}
}

func BenchmarkDeliver(b *testing.B) {
	for _, subscribers := range []int{1, 50} {
		b.Run(fmt.Sprintf("%d subscribers", subscribers), func(b *testing.B) {
			var c sessions.Counters
			var all []*sessions.Session
			for range subscribers {
				s := sessions.New(&c)
				s.Attach(sink{}, sessions.ConnOptions{})
				all = append(all, s)
			}
			payload := make([]byte, 128)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				m := &sessions.Message{Topic: "fleet/v7/telemetry", Payload: payload, QoS: 1}
				e := sessions.NewEncoder(m)
				for _, s := range all {
					s.Deliver(sessions.Delivery{Message: m, QoS: 1}, e)
					s.Acknowledged(sink{}, puback, uint16(i%65535+1), 0)
				}
				e.Release()
			}
		})
	}
}

type sink struct{}

func (sink) Send([]byte, int, uint16) (bool, error) { return true, nil }
func (sink) Offer([]byte) (bool, bool)              { return true, true }

// watcher remembers the drops that it is told, in short words.
type watcher struct {
	session *sessions.Session
	blind   bool
	got     []string
}

func (w *watcher) Watching() bool { return !w.blind }

func (w *watcher) Dropped(drops []sessions.Drop) {
	w.session.Online() // the lock is free
	for _, d := range drops {
		w.got = append(w.got, string(d.Reason)+" "+string(d.Message.Payload))
	}
}

func TestDrops(t *testing.T) {
	send := func(s *sessions.Session, qos byte, payload string, expires time.Duration) sessions.Reason {
		m := &sessions.Message{Topic: "a", Payload: []byte(payload), QoS: qos}
		if expires > 0 {
			m.Expires = time.Now().Add(expires)
		}
		e := sessions.NewEncoder(m)
		defer e.Release()
		return s.Deliver(sessions.Delivery{Message: m, QoS: qos}, e).Dropped
	}
	synctest.Test(t, func(t *testing.T) {
		s, w, _ := online(sessions.ConnOptions{ReceiveMaximum: 1, MaximumPacketSize: 20})
		seen := &watcher{session: s}
		s.Observe(seen)
		long := strings.Repeat("x", 30)
		for _, tt := range []struct {
			qos     byte
			payload string
			want    sessions.Reason
		}{{0, "zero", ""}, {0, long, sessions.TooLarge}, {1, long, sessions.TooLarge}, {1, "one", ""}, {1, "waits", ""}} {
			if got := send(s, tt.qos, tt.payload, 0); got != tt.want {
				t.Errorf("QoS %d %s: dropped for %q, want %q", tt.qos, tt.payload, got, tt.want)
			}
		}
		if got := send(s, 1, "perishes", time.Second); got != "" {
			t.Errorf("dropped for %q", got)
		}
		if got := send(s, 1, long+"later", 0); got != "" {
			t.Errorf("dropped for %q before its turn", got)
		}
		w.full = true
		if got := send(s, 0, "congested", 0); got != sessions.QoS0 {
			t.Errorf("dropped for %q", got)
		}
		if len(seen.got) > 0 {
			t.Errorf("told %q, which Deliver has said", seen.got)
		}
		time.Sleep(time.Second)
		s.Drained(w)
		s.Acknowledged(w, puback, 1, 0)
		s.Acknowledged(w, puback, 2, 0)
		if want := []string{"expired perishes", "too_large " + long + "later"}; !slices.Equal(seen.got, want) {
			t.Errorf("told %q, want %q", seen.got, want)
		}

		s.Detach(w)
		if got := send(s, 0, "offline", 0); got != sessions.QoS0 {
			t.Errorf("dropped for %q", got)
		}
		send(s, 1, "a", time.Second)
		send(s, 1, "unseen", time.Second)
		time.Sleep(time.Second)
		seen.got = nil
		seen.blind = true
		s.Attach(new(wire), sessions.ConnOptions{})
		if len(seen.got) > 0 {
			t.Errorf("told %q though nobody watches", seen.got)
		}
	})
	t.Run("queue", func(t *testing.T) {
		s := sessions.New(new(sessions.Counters))
		for range sessions.MaxQueued {
			if got := send(s, 1, "x", 0); got != "" {
				t.Fatalf("dropped for %q", got)
			}
		}
		if got := send(s, 1, "x", 0); got != sessions.QueueFull {
			t.Errorf("dropped for %q", got)
		}
		s.End()
		if got := send(s, 1, "x", 0); got != "" {
			t.Errorf("a session that has ended drops for %q", got)
		}
	})
	t.Run("what nobody is to be told of", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := sessions.New(new(sessions.Counters))
			seen := &watcher{session: s}
			s.Observe(seen)
			m := &sessions.Message{Topic: "a", QoS: 1, Unwatched: true, Expires: time.Now().Add(time.Second)}
			e := sessions.NewEncoder(m)
			defer e.Release()
			s.Deliver(sessions.Delivery{Message: m, QoS: 1}, e)
			time.Sleep(time.Second)
			s.Attach(new(wire), sessions.ConnOptions{})
			if len(seen.got) > 0 {
				t.Errorf("told %q", seen.got)
			}
		})
	})
}
