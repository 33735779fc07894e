// Package sessions keeps what a client's session owns beyond its connection: the messages on
// their way to the client, those that wait for it, and the broker's retained messages.
//
// A Session delivers in the order in which it was given messages: it assigns packet identifiers of
// its own, keeps to the client's Receive Maximum, waits while the connection has enough to write, and
// sends again on the next connection what was not acknowledged on the last. It never blocks.
//
// It knows PUBLISH, PUBREL and the acknowledgements on the wire, and nothing of subscriptions, of the
// server, or of how a connection is written to. In this version all of it lives in memory.
package sessions

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// MaxInflight bounds the messages that were sent to a client and are not acknowledged, whatever its
	// Receive Maximum: they are what a resumed session sends again.
	MaxInflight = 1024
	// MaxInflightBytes bounds them too. One message is always sent.
	MaxInflightBytes = 8 << 20

	// MaxQueued bounds what waits for one client, offline or slow. Beyond it, or MaxQueuedBytes, a
	// message is dropped and counted, the one that came last: those before it are still in order.
	MaxQueued = 10_000
	// MaxQueuedBytes is to MaxQueued what MaxInflightBytes is to MaxInflight.
	MaxQueuedBytes = 64 << 20
	// MaxQueuedRetained bounds the retained messages that wait beside those. Their memory is not the session's.
	MaxQueuedRetained = 100_000

	// Publishers are asked to wait for a client that is behind, beginning at pauseFrom of what may be queued, if it takes
	// at least healthyRate messages a second: waiting helps it then. One that takes less or nothing delays nobody. At QoS 0 they are asked
	// for as long as a connection needs to write what healthy clients take at once.
	pauseFrom   = 0.25
	healthyRate = 1000
	flushTime   = 20 * time.Millisecond
	// maxPause is the longest that a publisher is asked to wait, after one message. Less than a vehicle
	// would notice, and enough that hundreds of publishers together don't outrun one subscriber.
	maxPause = 10 * time.Millisecond
	// rateWindow is how long messages are counted for a rate; none counts for twice that before it is taken for none.
	rateWindow = 500 * time.Millisecond

	// overhead is what a message costs beside its bytes.
	overhead = 128
)

// Packet types as the fixed header's upper four bits hold them (MQTT 5, 2.1.2).
const (
	typePublish = 3
	typePuback  = 4
	typePubrec  = 5
	typePubrel  = 6
	typePubcomp = 7
)

// reasonFailure is the least reason code that says that something failed (MQTT 5, 2.4).
const reasonFailure = 0x80

// Conn is a connection as a session writes to it. Its methods don't block and are called with the session locked.
type Conn interface {
	// Send writes a frame; at idAt, unless that is 0, id takes the place of two of its bytes. If more is
	// false so much waits for the peer that nothing should follow until the session's Drained is called. An
	// error means that the connection has ended.
	Send(frame []byte, idAt int, id uint16) (more bool, err error)
	// Offer is Send for a frame that may be lost: it takes it if there is room, and says so.
	Offer(frame []byte) (taken, more bool)
}

// Counters count what waits and what was not delivered. They are shared by all sessions.
type Counters struct {
	Queued atomic.Int64 // messages without a packet identifier yet

	QueueFull atomic.Uint64 // MaxQueued or MaxQueuedBytes was reached
	Congested atomic.Uint64 // QoS 0 to a client that doesn't take what waits for it
	TooLarge  atomic.Uint64 // beyond the client's Maximum Packet Size [MQTT-3.1.2-24]
	Expired   atomic.Uint64 // [MQTT-3.3.2-5]
}

// Dropped is how many messages were not delivered, whatever for.
func (c *Counters) Dropped() uint64 {
	return c.QueueFull.Load() + c.Congested.Load() + c.TooLarge.Load() + c.Expired.Load()
}

// Reason says why a message was not delivered.
type Reason string

// The reasons there are, those that EMQX has too under its names.
const (
	QueueFull Reason = "queue_full" // MaxQueued or MaxQueuedBytes was reached, or MaxQueuedRetained
	QoS0      Reason = "qos0_msg"   // the client is not connected, or doesn't take what waits for it
	Expired   Reason = "expired"
	TooLarge  Reason = "too_large" // beyond the client's Maximum Packet Size
)

// Drop is a delivery that was not made.
type Drop struct {
	Delivery
	Reason Reason
}

// Observer is told what a session drops later than in Deliver, whose Result says it. Its methods must not call the session.
type Observer interface {
	// Watching says whether drops are to be remembered at all. It is called with the session locked, and must not block.
	Watching() bool
	// Dropped gets the drops of one call, without locks.
	Dropped([]Drop)
}

// Delivery is a message as one subscriber gets it.
type Delivery struct {
	Message         *Message
	QoS             byte     // 0 to 2
	Retain          bool     // the flag as it is sent
	SubscriptionIDs []uint32 // ascending; shared between deliveries, nobody changes it
	// Stored says that it is a retained message for a new subscription: it waits even at QoS 0, for as long as
	// the connection lasts, and MaxQueuedRetained is its bound.
	Stored bool
}

// size is what a delivery counts for, in bytes. Its message shares the memory of the packet that it came in, properties and all.
func (d *Delivery) size() int {
	m := d.Message
	return len(m.Topic) + len(m.Payload) + 2*len(m.Properties) + overhead
}

// flight is a delivery of QoS 1 or 2 that has a packet identifier.
type flight struct {
	Delivery
	id       uint16
	sent     bool // on some connection: what comes now is a DUP [MQTT-3.3.1-1]
	released bool // PUBREC has come: what comes now is a PUBREL, and Message is nil
}

// Session is one client's. It is safe for concurrent use.
type Session struct {
	counters *Counters

	mu      sync.Mutex
	conn    Conn // nil while the client is not connected
	v5      bool
	window  int  // how many flights may be out
	largest int  // bytes of a packet; 0: no bound
	blocked bool // conn has enough to write
	ended   bool

	lastID      uint16
	wrapped     bool     // identifiers have begun again: some may be in use
	flights     []flight // in the order in which they were sent first
	out         int      // how many of them, from the first, were sent on this connection
	flightBytes int      // of those that have a message still

	queue       []Delivery // what waits for a place among the flights: queue[head:]
	head        int
	stored      int  // how many in the queue are stored ones
	queuedBytes int  // without those
	fleeting    int  // how many in the queue are of QoS 0
	full        bool // the last message was dropped for want of room

	observer Observer // nil: nobody wants to know
	drops    []Drop   // for it, once the lock is released

	blockedAt time.Time // when conn had enough to write
	rate      rate      // at which the client takes what is queued
}

// rate counts events while somebody wants to know.
type rate struct {
	begin   time.Time // of the window
	n       int       // in the window
	healthy bool      // in the one before, which was too short if there was none
}

// start begins anew: what is not known is taken to be well.
func (r *rate) start(now time.Time) { *r = rate{begin: now, healthy: true} }

func (r *rate) count(now time.Time) {
	r.n++
	if d := now.Sub(r.begin); d >= rateWindow {
		*r = rate{begin: now, healthy: float64(r.n) >= healthyRate*d.Seconds()}
	}
}

func (r *rate) well(now time.Time) bool { return r.healthy && now.Sub(r.begin) < 2*rateWindow }

// New returns a session without a connection. The counters are required.
func New(c *Counters) *Session { return &Session{counters: c} }

// Observe makes o the session's observer.
func (s *Session) Observe(o Observer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.observer = o
}

// unlock releases the lock, and tells the observer what was dropped under it.
func (s *Session) unlock() {
	drops, o := s.drops, s.observer
	s.drops = nil
	s.mu.Unlock()
	if len(drops) > 0 {
		o.Dropped(drops)
	}
}

// dropped notes a drop for the observer; "" is none.
func (s *Session) dropped(d *Delivery, why Reason) {
	if why != "" && s.observer != nil && !d.Message.Unwatched && s.observer.Watching() {
		s.drops = append(s.drops, Drop{*d, why})
	}
}

// ConnOptions describe the client's side of a connection.
type ConnOptions struct {
	V5                bool // MQTT 5, or else 3.1 or 3.1.1
	ReceiveMaximum    int  // 0: MQTT's own limit of 65535
	MaximumPacketSize int  // bytes; 0: none
}

// Attach makes the session deliver through c: first, in order, what was not acknowledged before [MQTT-4.4.0-1], then
// what has waited.
func (s *Session) Attach(c Conn, o ConnOptions) {
	s.mu.Lock()
	defer s.unlock()
	s.conn, s.v5, s.largest = c, o.V5, o.MaximumPacketSize
	s.window = MaxInflight
	if o.ReceiveMaximum > 0 {
		s.window = min(o.ReceiveMaximum, MaxInflight)
	}
	s.out, s.blocked = 0, false
	s.rate.start(time.Now())
	s.pump()
}

// Detach makes the session keep what comes, if c is what it delivers through, and reports that.
func (s *Session) Detach(c Conn) bool {
	s.mu.Lock()
	defer s.unlock()
	if s.conn != c {
		return false
	}
	s.conn, s.out, s.blocked = nil, 0, false
	if s.fleeting > 0 {
		s.queue = slices.DeleteFunc(s.queue[s.head:], func(d Delivery) bool {
			if d.QoS == 0 {
				s.account(&d, -1)
				s.dropped(&d, QoS0)
			}
			return d.QoS == 0
		})
		s.head = 0
	}
	return true
}

// End drops all that the session holds. It takes nothing more.
func (s *Session) End() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended, s.conn = true, nil
	s.counters.Queued.Add(int64(s.head - len(s.queue)))
	s.flights, s.out, s.flightBytes = nil, 0, 0
	s.queue, s.head, s.stored, s.queuedBytes, s.fleeting = nil, 0, 0, 0, 0
}

// Online reports whether the session has a connection.
func (s *Session) Online() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != nil
}

// Result is what became of a delivery.
type Result struct {
	Sent bool // it was written to the connection
	Full bool // it was dropped for want of room, the first since there was some
	// Pause is how long the publisher should wait before its next message for the client to keep up: zero unless that would help.
	Pause time.Duration
	// Dropped is why the message will not be delivered; "": it was sent, or waits, or the session has ended.
	Dropped Reason
}

// Deliver sends the message or keeps it. A message of QoS 0 is dropped if there is no connection. e is the encoder of
// d.Message, for the caller to share between sessions.
func (s *Session) Deliver(d Delivery, e *Encoder) Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ended:
		return Result{}
	case s.conn == nil && d.QoS == 0:
		return Result{Dropped: QoS0}
	case d.QoS == 0 && !d.Stored && s.stored == 0: // else it waits its turn: one of those may be of the same topic
		return s.deliverOnce(d, e)
	case s.head == len(s.queue) && s.ready():
		sent, why := s.launch(d, e)
		return Result{Sent: sent, Dropped: why}
	}
	full := s.live() >= MaxQueued || s.queuedBytes+d.size() > MaxQueuedBytes
	if d.Stored {
		full = s.stored >= MaxQueuedRetained
	}
	r := Result{Full: full && !s.full, Pause: s.pause()}
	s.full = full
	if full {
		s.counters.QueueFull.Add(1)
		r.Dropped = QueueFull
	} else {
		s.push(d)
	}
	return r
}

// live is how many wait beside the stored ones.
func (s *Session) live() int { return len(s.queue) - s.head - s.stored }

// deliverOnce sends a message of QoS 0.
func (s *Session) deliverOnce(d Delivery, e *Encoder) (r Result) {
	if s.blocked {
		if time.Since(s.blockedAt) > flushTime {
			s.counters.Congested.Add(1)
			r.Dropped = QoS0
			return r
		}
		r.Pause = maxPause / 2 // and it goes out, if there is room
	}
	if s.expired(&d, e) {
		r.Dropped = Expired
		return r
	}
	frame, _, ok := s.encode(&d, e)
	if !ok {
		r.Dropped = TooLarge
		return r
	}
	taken, more := s.conn.Offer(frame)
	if !taken {
		s.counters.Congested.Add(1)
		r.Dropped = QoS0
	}
	s.block(more)
	r.Sent = taken
	return r
}

// ready reports whether a further flight may be sent.
func (s *Session) ready() bool {
	return s.conn != nil && !s.blocked && s.out == len(s.flights) && s.out < s.window && s.flightBytes < MaxInflightBytes
}

// launch sends the delivery, with a packet identifier unless it is of QoS 0, or says why not.
func (s *Session) launch(d Delivery, e *Encoder) (sent bool, why Reason) {
	if s.expired(&d, e) {
		return false, Expired
	}
	frame, idAt, ok := s.encode(&d, e)
	if !ok {
		return false, TooLarge
	}
	if d.QoS == 0 {
		return s.send(frame, 0, 0), ""
	}
	f := flight{Delivery: d, id: s.nextID()}
	f.sent = s.send(frame, idAt, f.id)
	s.flights = append(s.flights, f)
	s.flightBytes += d.size()
	s.out++
	return f.sent, ""
}

// expired reports whether the client is not to get the message any more, and counts it.
func (s *Session) expired(d *Delivery, e *Encoder) bool {
	if !d.Message.Expired(e.now()) {
		return false
	}
	s.counters.Expired.Add(1)
	return true
}

// encode returns the frame for the client. If it is not ok it is too large for the client, which is counted.
func (s *Session) encode(d *Delivery, e *Encoder) (frame []byte, idAt int, ok bool) {
	frame, idAt = e.frame(d, s.v5)
	if s.largest > 0 && len(frame) > s.largest {
		s.counters.TooLarge.Add(1)
		return nil, 0, false
	}
	return frame, idAt, true
}

func (s *Session) send(frame []byte, idAt int, id uint16) bool {
	more, err := s.conn.Send(frame, idAt, id)
	s.block(more)
	return err == nil
}

// block notes whether the connection takes more.
func (s *Session) block(more bool) {
	if !more && !s.blocked {
		s.blocked, s.blockedAt = true, time.Now()
	}
}

// nextID is a packet identifier that is not in use [MQTT-2.2.1-3].
func (s *Session) nextID() uint16 {
	for {
		if s.lastID++; s.lastID == 0 {
			s.lastID, s.wrapped = 1, true
		}
		if !s.wrapped || !slices.ContainsFunc(s.flights, func(f flight) bool { return f.id == s.lastID }) {
			return s.lastID
		}
	}
}

// pump sends what may be sent now. The caller holds s.mu.
func (s *Session) pump() {
	if s.conn == nil || s.blocked || s.out == s.window || s.out == len(s.flights) && s.head == len(s.queue) {
		return
	}
	e := NewEncoder(nil)
	defer e.Release()
	for s.conn != nil && !s.blocked && s.out < s.window && s.out < len(s.flights) {
		s.relaunch(e)
	}
	for s.ready() && s.head < len(s.queue) {
		d := s.pop()
		e.Reset(d.Message)
		_, why := s.launch(d, e)
		s.dropped(&d, why)
	}
}

// relaunch sends the next flight of an earlier connection again.
func (s *Session) relaunch(e *Encoder) {
	f := &s.flights[s.out]
	if f.released {
		s.out++
		s.send(pubrel(f.id), 0, 0)
		return
	}
	e.Reset(f.Message)
	if !f.sent && s.expired(&f.Delivery, e) { // one that was sent is completed, however long that takes
		s.dropped(&f.Delivery, Expired)
		s.land(s.out)
		return
	}
	frame, idAt, ok := s.encode(&f.Delivery, e)
	if !ok {
		s.dropped(&f.Delivery, TooLarge)
		s.land(s.out)
		return
	}
	if f.sent {
		frame[0] |= dupFlag // [MQTT-3.3.1-1]
	}
	s.out++
	f.sent = s.send(frame, idAt, f.id) || f.sent
}

// Acknowledged takes a PUBACK, PUBREC or PUBCOMP that came through c: packet type, packet identifier, reason code.
// What doesn't fit any message is answered as MQTT 5 demands (4.3.3), and changes nothing.
func (s *Session) Acknowledged(c Conn, kind byte, id uint16, reason byte) {
	s.mu.Lock()
	defer s.unlock()
	if s.conn == nil || s.conn != c {
		return
	}
	i := slices.IndexFunc(s.flights[:s.out], func(f flight) bool { return f.id == id })
	switch {
	case kind == typePubrec && (i < 0 || s.flights[i].QoS != 2):
		s.send(s.pubrelUnknown(id), 0, 0)
		return
	case i < 0:
		return
	}
	f := &s.flights[i]
	switch {
	case kind == typePubrec && reason < reasonFailure: // [MQTT-4.3.3-4]
		if !f.released {
			s.flightBytes -= f.size()
			f.released, f.Message = true, nil
		}
		s.send(pubrel(id), 0, 0)
		return
	case kind == typePubrec, // refused: that is the end of it
		kind == typePuback && f.QoS == 1,
		kind == typePubcomp && f.released:
	default:
		return // of another kind than the message needs
	}
	s.land(i)
	s.out--
	if s.head < len(s.queue) {
		s.rate.count(time.Now())
	}
	s.pump()
}

// land takes a flight out.
func (s *Session) land(i int) {
	if f := &s.flights[i]; f.Message != nil {
		s.flightBytes -= f.size()
	}
	s.flights = slices.Delete(s.flights, i, i+1)
	if len(s.flights) == 0 && cap(s.flights) > keptFlights {
		s.flights = nil
	}
}

// keptFlights is the capacity that a session without flights keeps.
const keptFlights = 8

// Drained is to be called, without locks of c's, when more may follow through c.
func (s *Session) Drained(c Conn) {
	s.mu.Lock()
	defer s.unlock()
	if s.conn == nil || s.conn != c {
		return
	}
	s.blocked = false
	s.pump()
}

// pause is how long a publisher should wait: the longer, the more is queued, and not at all if that would not help.
func (s *Session) pause() time.Duration {
	fill := max(float64(s.live())/MaxQueued, float64(s.queuedBytes)/MaxQueuedBytes)
	if s.conn == nil || fill < pauseFrom || !s.rate.well(time.Now()) {
		return 0
	}
	return time.Duration(min(1, (fill-pauseFrom)/(1-pauseFrom)) * float64(maxPause))
}

func (s *Session) push(d Delivery) {
	if s.head == len(s.queue) {
		s.rate.start(time.Now())
	}
	s.queue = append(s.queue, d)
	s.account(&d, 1)
}

func (s *Session) pop() Delivery {
	d := s.queue[s.head]
	s.queue[s.head] = Delivery{} // so that the message can go
	s.head++
	s.account(&d, -1)
	switch {
	case s.head == len(s.queue):
		s.queue, s.head = nil, 0
	case s.head >= 256 && s.head > len(s.queue)/2:
		s.queue, s.head = slices.Delete(s.queue, 0, s.head), 0
	}
	return d
}

// account keeps the sums over the queue.
func (s *Session) account(d *Delivery, sign int) {
	s.counters.Queued.Add(int64(sign))
	if d.Stored {
		s.stored += sign
	} else {
		s.queuedBytes += sign * d.size()
	}
	if d.QoS == 0 {
		s.fleeting += sign
	}
}

func pubrel(id uint16) []byte {
	return []byte{typePubrel<<4 | 2, 2, byte(id >> 8), byte(id)} // [MQTT-3.6.1-1]
}

// pubrelUnknown answers a PUBREC whose identifier is not in use: its client must get rid of it all the same.
func (s *Session) pubrelUnknown(id uint16) []byte {
	frame := pubrel(id)
	if s.v5 {
		frame[1] = 3
		frame = append(frame, reasonIdentifierNotFound)
	}
	return frame
}

const reasonIdentifierNotFound = 0x92
