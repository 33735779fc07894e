package hooks

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/sessions"
)

// A connection's life is led here, with what mochi exports: it decodes, answers and keeps the subscriptions. Its own
// EstablishConnection is not used: it has two goroutines a connection, of which one can't be recovered and the
// other keeps 16 kB of stack for as long as the vehicle is silent; it hands a session on without a lock, and it leaves
// clients behind that were gone before their CONNACK. Nor is its event loop, which copies the list of all sessions twice a second
// to find those that have expired, and leaves their subscriptions in the index (docs/decisions/0007).

// connection is one network connection of a client. What is not said to be otherwise is for one goroutine at a time:
// the one that waits for the socket, or the worker that it waits for.
type connection struct {
	server   *Server
	listener string
	conn     *guard.Conn
	done     chan struct{} // ticks when a worker has done its work

	client      *mqtt.Client // nil before CONNECT
	counted     bool         // among mochi's connected clients
	established bool         // CONNACK has said that all is well
	over        bool         // nothing more is read
	panicked    bool
	err         error // why it is over; nil after the client's DISCONNECT

	will       *will             // nil: none, or it must not be sent
	subscriber *subscriber       // nil before CONNACK
	aliases    map[uint16]string // topic aliases that the client has set [MQTT-3.3.2-11]
	existed    []bool            // of the SUBSCRIBE under way, per filter: it is no new subscription
	retained   []retainedFor     // to be sent once its SUBACK is written
	pause      time.Duration     // how long the publish under way has its client wait
	published  uint              // how many publishes were taken
	inherited  int               // messages of QoS 2 that were not released when the client connected

	leaving []leaving              // of the UNSUBSCRIBE under way; nil: nobody wants to know
	goodbye *packets.Properties    // of the client's DISCONNECT; nil: nobody wants to know, or there was none
	endedBy atomic.Pointer[string] // why somebody else ends the connection; nil: nobody does

	presence  sync.Mutex // of what events have said
	present   bool       // the client is connected
	connected time.Time  // since when; zero: it never was
}

// Acknowledged implements guard.Receiver.
func (c *connection) Acknowledged(kind byte, id uint16, reason byte) {
	c.subscriber.session.Acknowledged(c.conn, kind, id, reason)
}

// Drained implements guard.Receiver. It may be called at any time once there is a subscriber.
func (c *connection) Drained() { c.subscriber.session.Drained(c.conn) }

// connectionOf is the client's; nil if there is none of ours.
func connectionOf(cl *mqtt.Client) *connection {
	if c, ok := cl.Net.Conn.(*guard.Conn); ok {
		owner, _ := c.Owner().(*connection)
		return owner
	}
	return nil
}

// serve leads the connection's life. This goroutine waits, on a small stack; workers do all else.
func (s *Server) serve(listener string, conn *guard.Conn) error {
	c := &connection{server: s, listener: listener, conn: conn, done: make(chan struct{}, 1)}
	conn.SetOwner(c)
	for step := c.step; !c.over; s.workers.do(step, c.done) {
		conn.Wait()
	}
	s.workers.do(c.end, c.done)
	return c.err
}

// recovered is to be deferred: a panic ends the connection alone.
func (c *connection) recovered() {
	if cause := recover(); cause != nil {
		c.over, c.panicked, c.err = true, true, fmt.Errorf("panic: %v", cause)
		c.conn.Panicked(cause)
	}
}

// step takes the packets that are there.
func (c *connection) step() {
	defer c.recovered()
	for {
		ready, err := c.conn.Next()
		switch {
		case err != nil:
		case !ready:
			return
		case !c.established:
			err = c.connect()
		default:
			if err = c.client.Read(c.receive); errors.Is(err, guard.ErrNothingReady) {
				continue
			}
			c.over = true // nil: the client has said goodbye
		}
		if err != nil || c.over {
			c.over, c.err = true, err
			return
		}
	}
}

// receive has mochi act on a packet. An error ends the connection.
func (c *connection) receive(cl *mqtt.Client, pk packets.Packet) error {
	mochi := c.server.mochi
	switch pk.FixedHeader.Type {
	case packets.Connect: // guard refuses it before [MQTT-3.1.0-2]
		return c.violated(packets.ErrProtocolViolationSecondConnect)
	case packets.Auth: // no method was agreed on [MQTT-4.12.0-7]
		return c.violated(packets.ErrProtocolViolation)
	case packets.Disconnect:
		if c.server.hook.wanting(rules.ClientDisconnected) != nil {
			c.goodbye = &pk.Properties
		}
	case packets.Pubrel:
		pk.ReasonCode = packets.CodeSuccess.Code // whatever the client says, it is due a PUBCOMP [MQTT-4.3.3-11], which mochi keeps back
	case packets.Publish:
		if !mqtt.IsValidFilter(pk.TopicName, true) {
			return c.refusePublish(&pk)
		}
		if pk.FixedHeader.Qos > 0 && c.full(pk.PacketID) {
			return c.violated(packets.ErrReceiveMaximum) // [MQTT-3.3.4-7]
		}
	}
	err := mochi.InjectPacket(cl, pk)
	if err != nil {
		return c.violated(err)
	}
	// It counts what it is given once more; Client.Read has done that.
	atomic.AddInt64(&mochi.Info.PacketsReceived, -1)
	if pk.FixedHeader.Type == packets.Publish {
		atomic.AddInt64(&mochi.Info.MessagesReceived, -1)
	}
	return nil
}

// receiveMaximum is how many messages of QoS 2 an MQTT 5 client may have unreleased: as many as CONNACK says. MQTT 3.1.1 has no
// such number; what one client may make the broker remember is bounded all the same.
const (
	receiveMaximum    = 1024
	maximumUnreleased = 8192
)

// full reports whether the client has as many messages of QoS 2 unreleased as it may, and this one isn't among them. Those of QoS 1
// are mostly acknowledged before the next is looked at; guard bounds those that aren't.
func (c *connection) full(id uint16) bool {
	limit := maximumUnreleased
	if c.client.Properties.ProtocolVersion == 5 {
		limit = min(limit, receiveMaximum+c.inherited) // the number is one of the connection's (MQTT 5, 4.9)
	}
	open := c.client.State.Inflight
	if open.Len() < limit {
		return false
	}
	_, again := open.Get(id)
	return !again
}

// violated tells an MQTT 5 client why its connection ends [MQTT-4.13.1-1].
func (c *connection) violated(err error) error {
	var code packets.Code
	if errors.As(err, &code) && code.Code >= packets.ErrUnspecifiedError.Code {
		c.server.disconnect(c.conn, code, time.Now().Add(farewell))
	}
	return err
}

// refusePublish answers a publish to a topic that is the server's own, such as $SYS, as one that the client is not allowed
// [MQTT-3.3.5-2]. mochi doesn't answer it.
func (c *connection) refusePublish(pk *packets.Packet) error {
	if pk.FixedHeader.Qos == 0 {
		return nil
	}
	ack := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}, PacketID: pk.PacketID, Created: time.Now().Unix()}
	if pk.FixedHeader.Qos == 2 {
		ack.FixedHeader.Type = packets.Pubrec
	}
	if c.client.Properties.ProtocolVersion == 5 {
		ack.ReasonCode = packets.ErrNotAuthorized.Code
	}
	return c.client.WritePacket(ack)
}

// connect lets the client in, or says why not. An error ends the connection.
func (c *connection) connect() error {
	s := c.server
	cl := s.mochi.NewClient(c.conn, c.listener, "", false)
	c.client = cl
	fh := new(packets.FixedHeader)
	if err := cl.ReadFixedHeader(fh); err != nil {
		return fmt.Errorf("read CONNECT: %w", err)
	}
	pk, err := cl.ReadPacket(fh)
	if err != nil {
		return fmt.Errorf("read CONNECT: %w", err)
	}
	cl.ParseConnect(c.listener, pk)
	detach(cl)
	if code := valid(&pk); code != packets.CodeSuccess { // [MQTT-3.1.4-1]
		return c.refuse(&pk, code)
	}
	if !s.hook.authenticate(cl, pk.Connect.Password) { // [MQTT-3.1.4-2]
		return c.refuse(&pk, packets.ErrBadUsernameOrPassword)
	}
	c.conn.Admit(cl.ID) // first: the end of the connection ends the turn by this id, whatever comes now
	if !s.hook.takeOver(cl, c.conn) {
		return c.refuse(&pk, packets.ErrServerBusy)
	}
	// Once and a half [MQTT-3.1.2-22]; mochi reckons that in 16 bits, and ends connections of more than 43690 s at once.
	c.conn.SetKeepalive(time.Duration(pk.Connect.Keepalive) * 3 * time.Second / 2)
	c.will = willOf(&pk)
	present := s.inherit(cl, pk.Connect.Clean)
	c.inherited = cl.State.Inflight.Len()
	s.mochi.Clients.Add(cl) // [MQTT-4.1.0-1]
	c.counted = true
	connected := atomic.AddInt64(&s.mochi.Info.ClientsConnected, 1)
	if connected > atomic.LoadInt64(&s.mochi.Info.ClientsMaximum) {
		atomic.StoreInt64(&s.mochi.Info.ClientsMaximum, connected)
	}
	s.hook.expiries.take(cl.ID)
	c.subscriber = s.hook.subscribers.open(identity(cl), present)
	if err := s.mochi.SendConnack(cl, packets.CodeSuccess, present, nil); err != nil { // [MQTT-3.2.0-1]
		return fmt.Errorf("write CONNACK: %w", err)
	}
	c.established = true
	c.answered(&pk, packets.CodeSuccess)
	if will := s.hook.wills.take(cl.ID); will != nil && !present {
		will() // its session has ended; one that is resumed has no will any more [MQTT-3.1.3-9]
	}
	c.conn.SetReceiver(c)
	c.subscriber.session.Attach(c.conn, sessions.ConnOptions{
		V5:                pk.ProtocolVersion == 5,
		ReceiveMaximum:    int(pk.Properties.ReceiveMaximum),
		MaximumPacketSize: int(pk.Properties.MaximumPacketSize),
	})
	s.hook.turns.end(cl.ID, c.conn)
	return nil
}

// valid says whether a CONNECT is, beyond what guard has looked at. mochi's ConnectValidate is not asked: it refuses wills
// without payload and passwords without length, which are allowed.
func valid(pk *packets.Packet) packets.Code {
	switch name, level := string(pk.Connect.ProtocolName), pk.ProtocolVersion; {
	case name == "MQTT" && (level == 4 || level == 5), name == "MQIsdp" && level == 3:
	default:
		return packets.ErrUnsupportedProtocolVersion // [MQTT-3.1.2-1] [MQTT-3.1.2-2]
	}
	if pk.Properties.AuthenticationMethod != "" {
		return packets.ErrBadAuthenticationMethod // [MQTT-4.12.0-1]
	}
	if pk.ProtocolVersion < 5 && !pk.Connect.Clean && pk.Connect.ClientIdentifier == "" {
		return packets.ErrClientIdentifierNotValid // [MQTT-3.1.3-8] of 3.1.1
	}
	return packets.CodeSuccess
}

// detach has nothing of the client keep the memory of its CONNECT packet, which may hold a will of 64 kB: a session lasts
// longer than its connection.
func detach(cl *mqtt.Client) {
	cl.ID = strings.Clone(cl.ID)
	cl.Properties.Username = bytes.Clone(cl.Properties.Username)
	was := cl.Properties.Props
	cl.Properties.Props = packets.Properties{ // what mochi looks at later
		SessionExpiryInterval:     was.SessionExpiryInterval,
		SessionExpiryIntervalFlag: was.SessionExpiryIntervalFlag,
		MaximumPacketSize:         was.MaximumPacketSize,
		RequestProblemInfo:        was.RequestProblemInfo,
		RequestProblemInfoFlag:    was.RequestProblemInfoFlag,
		RequestResponseInfo:       was.RequestResponseInfo,
		AssignedClientID:          strings.Clone(was.AssignedClientID),
	}
	cl.Properties.Will = mqtt.Will{} // connection has it
	// mochi's own count would end a connection for a message of QoS 0, for one that is sent again, and in MQTT 3.1.1.
	cl.State.Inflight.ResetReceiveQuota(math.MaxUint16)
	// A quota would have it look for messages of its own to send after each packet, which deadlocks
	// (Inflight.NextImmediate). What goes to the client is not mochi's.
	cl.State.Inflight.ResetSendQuota(0)
}

// refuse answers a CONNECT with what the code is in the client's version [MQTT-3.1.4-5].
func (c *connection) refuse(connect *packets.Packet, code packets.Code) error {
	if c.client.Properties.ProtocolVersion < 5 {
		if code == packets.ErrServerBusy {
			code = packets.ErrServerUnavailable
		}
		if _, ok := packets.V5CodesToV3[code]; !ok {
			return fmt.Errorf("refuse CONNECT: %w", code) // no return code says that (MQTT 3.1.1, 3.1.4)
		}
	}
	if err := c.server.mochi.SendConnack(c.client, code, false, nil); err != nil {
		return fmt.Errorf("refuse CONNECT: %w", errors.Join(code, err))
	}
	c.answered(connect, code)
	return fmt.Errorf("refuse CONNECT: %w", code)
}

// inherit moves the session that the client's id has, if it is to be resumed, to the client, and reports that. takeOver has seen
// to it that nobody else does this for the same id.
func (s *Server) inherit(cl *mqtt.Client, clean bool) bool {
	old, ok := s.mochi.Clients.Get(cl.ID)
	if !ok {
		return false
	}
	old.Stop(packets.ErrSessionTakenOver)                                    // it has been, unless it took too long
	if clean || old.Properties.ProtocolVersion < 5 && old.Properties.Clean { // [MQTT-3.1.2-4]
		s.mochi.UnsubscribeClient(old)
		old.ClearInflights()
		return false
	}
	// The index knows subscriptions by the client's id: there they stay, and with the old client until nobody finds it any more, so that no
	// message is missed.
	for filter, sub := range old.State.Subscriptions.GetAll() {
		cl.State.Subscriptions.Add(filter, sub)
	}
	// What the client has sent at QoS 2 and not released [MQTT-3.1.2-5].
	for _, pk := range old.State.Inflight.GetAll(false) {
		old.State.Inflight.Delete(pk.PacketID)
		if pk.FixedHeader.Type == packets.Pubrec {
			cl.State.Inflight.Set(pk)
		} else {
			atomic.AddInt64(&s.mochi.Info.Inflight, -1) // a PUBACK that was not written: it is sent again
		}
	}
	return true
}

// end lets go of the client.
func (c *connection) end() {
	defer c.recovered()
	s, h := c.server, c.server.hook
	defer h.turns.endAll(c.conn)
	h.refusals.forget(c.conn)
	cl := c.client
	if cl == nil {
		return
	}
	c.gone(c.whyGone(), c.goodbye)                                  // first: once the session is let go of, the client may be back
	if c.established && c.will != nil && !c.panicked && !c.left() { // [MQTT-3.1.2-8]
		h.publishWill(cl, c.will)
	}
	c.will, c.aliases, c.existed, c.retained, c.leaving, c.goodbye = nil, nil, nil, nil, nil, nil // the client may stay for long, and its connection with it
	cl.Stop(c.err)
	if !c.counted {
		return
	}
	atomic.AddInt64(&s.mochi.Info.ClientsConnected, -1)
	if !c.subscriber.session.Detach(c.conn) && c.established {
		return // another connection has the session
	}
	switch expiry := sessionExpiry(cl); {
	case h.turns.another(cl.ID, c.conn):
		// Another connection is about to have the session: it did not wait for this end any longer.
	case expiry == 0:
		s.forget(cl) // [MQTT-4.1.0-2]
	case expiry != never:
		h.expiries.after(expiry, cl.ID, func() { s.expire(cl) })
	}
}

// never is the expiry of a session that has none.
const never time.Duration = -1

// sessionExpiry is how long the session lasts without a connection (MQTT 5, 3.1.2.11.2; MQTT 3.1.1, 3.1.2.4).
func sessionExpiry(cl *mqtt.Client) time.Duration {
	p := &cl.Properties
	switch {
	case p.ProtocolVersion < 5 && p.Clean:
		return 0
	case p.ProtocolVersion < 5, p.Props.SessionExpiryInterval == math.MaxUint32:
		return never
	default:
		return time.Duration(p.Props.SessionExpiryInterval) * time.Second
	}
}

// expire ends a session whose time is over, unless its client is about to resume it.
func (s *Server) expire(cl *mqtt.Client) {
	defer func() {
		if cause := recover(); cause != nil {
			s.hook.panicked("expire", cl, cause)
		}
	}()
	if now, ok := s.mochi.Clients.Get(cl.ID); !ok || now != cl {
		return // the client has been back: this alarm came too late to be cancelled, and must not take the turn from its connection's end
	}
	turn := new(guard.Conn)
	if !s.hook.turns.tryBegin(cl.ID, turn) {
		return
	}
	defer s.hook.turns.end(cl.ID, turn)
	if cl.Closed() {
		s.forget(cl)
	}
}

// forget ends the client's session, if it is still this client's.
func (s *Server) forget(cl *mqtt.Client) {
	if now, ok := s.mochi.Clients.Get(cl.ID); !ok || now != cl {
		return
	}
	if sub := s.hook.subscribers.get(cl.ID); sub != nil {
		s.hook.subscribers.close(sub)
	}
	cl.ClearInflights()
	s.mochi.UnsubscribeClient(cl)
	s.mochi.Clients.Delete(cl.ID)
}

// left reports whether the client has said goodbye in a way that drops its will [MQTT-3.14.4-3].
func (c *connection) left() bool {
	reason, ok := c.conn.Disconnected()
	return ok && reason == 0 && c.err == nil
}

// workers are goroutines that do for others what needs a deep stack: many connections are silent, and would keep
// theirs for it. There are as many as there is work at a time, and some more that wait for it. The zero value is not usable.
type workers struct {
	work chan job
	idle atomic.Int32
	quit chan struct{}
}

// maxIdleWorkers is how many wait for work: about as many as begin to work between two times that one is done.
const maxIdleWorkers = 64

type job struct {
	do   func()
	done chan<- struct{}
}

func newWorkers(quit chan struct{}) *workers { return &workers{work: make(chan job), quit: quit} }

// do has a worker call f, which must not panic, and waits for it. done is for it alone to use, and has room for one.
func (w *workers) do(f func(), done chan struct{}) {
	j := job{f, done}
	select {
	case w.work <- j:
	default:
		go w.run(j)
	}
	<-done
}

func (w *workers) run(j job) {
	for {
		j.do()
		j.done <- struct{}{}
		if w.idle.Add(1) > maxIdleWorkers {
			w.idle.Add(-1)
			return
		}
		select {
		case j = <-w.work:
			w.idle.Add(-1)
		case <-w.quit:
			return
		}
	}
}
