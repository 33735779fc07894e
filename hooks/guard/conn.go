package guard

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lingerTime and lingerBytes bound what is read and thrown away after the write side was
	// closed. Closing a socket with unread bytes resets it, and the peer may lose the last packet
	// that was written for it: the CONNACK or DISCONNECT that says why.
	lingerTime  = time.Second
	lingerBytes = 64 << 10

	// farewell bounds how long a peer may take to accept what was written before Close.
	farewell = 2 * time.Second
)

// past is a deadline that has passed: it makes blocked reads and writes return.
var past = time.Unix(1, 0)

// Conn is the connection as the server sees it. Reading refuses frames that are malformed or break the limits.
// Writing never blocks: what the peer doesn't take waits, within bounds. Closing is bounded in time
// even if the peer reads nothing. Wait, Next, Read and Join are for one goroutine at a time, all else is safe for concurrent
// use, and each Write reaches the peer in one piece, but for acknowledgements that are held.
type Conn struct {
	net.Conn
	guard *Guard

	in     inbound      // of the reading goroutine
	client atomic.Value // string: the client id, once admitted
	out    outbound

	owner    any      // see SetOwner
	receiver Receiver // of the reading goroutine
	readErr  error    // why nothing more can be read, of the reading goroutine

	closed  atomic.Bool
	once    sync.Once
	flushed chan struct{} // closed when what was written before Close has gone, or never will

	commitFailed atomic.Bool
	stalled      atomic.Bool
	unsettled    atomic.Int64  // the joined commits that are not done, and one for the server
	settled      chan struct{} // closed when unsettled is zero

	deadlines sync.Mutex    // Close's deadline must not be overwritten
	keepalive time.Duration // how long the peer may be silent; zero: for ever
	heard     bool          // the deadline of the next read begins anew
}

func newConn(raw net.Conn, g *Guard) *Conn {
	c := &Conn{
		Conn:  raw,
		guard: g,
		in: inbound{
			max: g.maxFrame, maxConnect: min(g.maxFrame, MaxConnectSize),
			inspector: inspector{aliasMax: g.topicAliasMaximum},
		},
		flushed: make(chan struct{}),
		settled: make(chan struct{}),
	}
	c.in.space = c.in.room()
	c.unsettled.Store(1)
	c.out.init(raw, g.stallTimeout, g.maxFrame+maxWaiting, c.failed)
	// Until SetKeepalive, once the CONNECT packet is there whole. An error
	// here means that the connection is gone, which the first read tells as well.
	_ = raw.SetReadDeadline(time.Now().Add(g.connectTimeout))
	return c
}

// Admit says that the client is authenticated, under which id. Until then nothing beyond the
// CONNECT packet can be read.
func (c *Conn) Admit(clientID string) { c.client.Store(clientID) }

// ClientID is the id that the client was admitted under, empty before.
func (c *Conn) ClientID() string {
	id, _ := c.client.Load().(string)
	return id
}

// Receiver is who the peer's acknowledgements are for.
type Receiver interface {
	// Acknowledged is called from Next for a PUBACK, PUBREC or PUBCOMP: packet type, packet identifier, reason code. It must
	// not block.
	Acknowledged(kind byte, id uint16, reason byte)
	// Drained is called, without locks, when more may follow after Send has said no. It must not block.
	Drained()
}

// SetReceiver makes r the receiver. Until then acknowledgements are thrown away: the server has sent nothing that they
// could be for. It is for the goroutine that reads.
func (c *Conn) SetReceiver(r Receiver) {
	c.receiver = r
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.drained = func() {
		defer func() { // this goroutine is the connection's own: nobody else would
			if cause := recover(); cause != nil {
				c.Panicked(cause)
			}
		}()
		r.Drained()
	}
}

// SetOwner keeps something of the server's with the connection. It is for the goroutine that reads.
func (c *Conn) SetOwner(owner any) { c.owner = owner }

// Owner is what SetOwner was given, nil if nothing. Others than that goroutine may ask too, if they have learned of the connection after
// it was set.
func (c *Conn) Owner() any { return c.owner }

// ErrNothingReady is what Read returns when it has given everything that Next has made ready.
var ErrNothingReady = errors.New("no frame is ready")

// Wait returns when the peer has sent something, or the connection has ended: Next knows. It needs next to no stack, unlike
// what is done with a packet; a goroutine that does nothing else keeps 2 kB.
func (c *Conn) Wait() {
	n, err := c.Conn.Read(c.in.space)
	c.in.read(n)
	if n == 0 {
		c.readErr = err // else it comes again
	}
}

// Next makes what Wait has read ready for Read, as far as it is frames that are whole, well formed and within the limits. Those
// that the receiver gets are not among them. If it is not ok nothing is ready, and Wait comes next. At the first frame that
// is refused it closes the connection, an MQTT 5 client's with the reason in a DISCONNECT [MQTT-4.13.1-1], and returns a *FrameError.
// Once the connection is closed from this side it returns net.ErrClosed, whatever has been read. It blocks while too many acknowledgements are held.
func (c *Conn) Next() (ok bool, err error) {
	if c.Ended() {
		return false, net.ErrClosed
	}
	if c.in.connected && c.client.Load() == nil {
		return false, c.refuse(&FrameError{Reason: NotAdmitted, Code: codeNotAuthorized})
	}
	if room := c.out.full(); room != nil {
		<-room // closing makes room too
		c.heard = true
	}
	if err := c.in.scan(c.acknowledged); err != nil {
		return false, c.refuse(err)
	}
	switch {
	case c.in.ready > 0:
		c.heard = true
		return true, nil
	case c.readErr != nil:
		return false, c.lost(c.readErr)
	}
	c.in.space = c.in.room()
	c.setReadDeadline()
	return false, nil
}

// Closed reports whether the connection was closed from this side, or its peer is gone.
func (c *Conn) Closed() bool { return c.closed.Load() }

// Ended reports whether the connection was closed from this side, for another reason than that the peer was gone.
func (c *Conn) Ended() bool {
	if !c.closed.Load() {
		return false
	}
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return !c.out.lost
}

// lost is why the connection ended.
func (c *Conn) lost(err error) error {
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case !errors.Is(err, os.ErrDeadlineExceeded):
	case c.in.connected:
		c.guard.metrics.silent.Inc()
	default:
		c.guard.metrics.connectTimeouts.Inc()
	}
	return err
}

// Read gives what Next has made ready, and doesn't block.
func (c *Conn) Read(p []byte) (int, error) {
	if c.in.ready == 0 {
		return 0, ErrNothingReady
	}
	return c.in.take(p), nil
}

// acknowledged passes on an acknowledgement.
func (c *Conn) acknowledged(kind byte, id uint16, reason byte) {
	c.heard = true
	if c.receiver != nil {
		c.receiver.Acknowledged(kind, id, reason)
	}
}

// refuse ends the connection for a frame. An MQTT 5 client is told why [MQTT-4.13.1-1], unless it has broken off before anybody
// knew who it is.
func (c *Conn) refuse(err *FrameError) error {
	c.guard.refused(c, err)
	switch {
	case c.in.inspector.version < 5:
		c.abort() // no packet says it
	case !c.in.connected: // CONNACK instead of DISCONNECT [MQTT-3.14.0-1]
		_ = c.CloseWith([]byte{typeConnack << 4, 3, 0, err.Code, 0}, time.Now().Add(farewell))
	case c.client.Load() != nil:
		_ = c.CloseWith([]byte{typeDisconnect << 4, 2, err.Code, 0}, time.Now().Add(farewell))
	default:
		c.abort()
	}
	return err
}

// Disconnected returns the reason code of the DISCONNECT that Read has given or is about to give, 0 if it has none, and whether
// there is one. It is for the goroutine that reads.
func (c *Conn) Disconnected() (reason byte, ok bool) { return c.in.goodbye, c.in.disconnected }

// Write takes whole frames, and doesn't block. PUBACK and PUBREC frames wait for the commits that were
// joined before; everything else passes them. A DISCONNECT for an MQTT 3.1.1 client is thrown away.
func (c *Conn) Write(p []byte) (int, error) {
	if len(p) > 0 && p[0]>>4 == typeDisconnect && c.in.inspector.version < 5 {
		return len(p), nil // servers send none in MQTT 3.1.1 (3.14)
	}
	if err := c.out.write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Send writes a frame that is no PUBACK or PUBREC, without blocking. At idAt, unless that is 0, id takes the place of two of
// its bytes. If more is false so much waits for the peer that nothing should follow until the
// receiver's Drained is called; the frame was taken all the same. The error is net.ErrClosed.
func (c *Conn) Send(frame []byte, idAt int, id uint16) (more bool, err error) {
	return c.out.send(frame, idAt, id)
}

// Offer is Send for a frame that may be lost: it takes it if there is room, and says so.
func (c *Conn) Offer(frame []byte) (taken, more bool) { return c.out.offer(frame) }

// Join makes the acknowledgements that are written from now on wait for the commit, and for all
// joined before. If it fails the connection is closed without them. done is called once with how it
// ended, before anything comes of that; it must not block.
func (c *Conn) Join(commit Commit, done func(error)) {
	c.unsettled.Add(1)
	c.out.join(commit)
	commit.Watch(func(err error) {
		defer c.settle()
		if err != nil {
			c.commitFailed.Store(true)
		}
		done(err)
		if err != nil {
			c.abort()
			return
		}
		c.out.release()
	})
}

// CommitFailed reports whether a commit that was joined has failed. It does before that Join's done is called.
func (c *Conn) CommitFailed() bool { return c.commitFailed.Load() }

// Stalled reports whether the connection was closed because its peer took nothing of what waited for it.
func (c *Conn) Stalled() bool { return c.stalled.Load() }

// Settled is closed when the server has let go of the connection and all commits that it joined are done.
func (c *Conn) Settled() <-chan struct{} { return c.settled }

func (c *Conn) settle() {
	if c.unsettled.Add(-1) == 0 {
		close(c.settled)
	}
}

// Panicked counts and logs a panic that was recovered in the connection's work, and ends the connection. It is to be
// called in the deferred function that has recovered it: the log has its stack.
func (c *Conn) Panicked(cause any) {
	c.guard.panicked(c, fmt.Sprint(cause))
	c.abort()
}

// failed ends the connection: the peer has stalled, or is gone.
func (c *Conn) failed(cause error) {
	var stalled *StallError
	if errors.As(cause, &stalled) && !c.closed.Load() {
		c.stalled.Store(true)
		c.guard.metrics.stalled.Inc()
		c.guard.log.Warn("connection closed", "client", c.ClientID(), "remote", c.RemoteAddr().String(), "error", cause)
	}
	c.abort()
}

// CloseWith writes a last frame, then closes the connection. Nothing can be written after it.
// It doesn't wait; what the peer hasn't taken at the deadline by is lost.
func (c *Conn) CloseWith(frame []byte, by time.Time) error {
	c.once.Do(func() { c.end(frame, by) })
	return nil
}

// Close makes reads and writes fail, those under way included, and tells the peer that nothing
// more comes, once what was written before has gone. Acknowledgements that are still held don't go. The
// socket itself is closed when the server has let go of the connection.
func (c *Conn) Close() error { return c.CloseWith(nil, time.Now().Add(farewell)) }

func (c *Conn) end(frame []byte, by time.Time) {
	c.deadlines.Lock()
	c.closed.Store(true)
	_ = c.Conn.SetReadDeadline(past) // fails on a closed connection alone
	c.deadlines.Unlock()
	c.out.end(frame, by, func() {
		if half, ok := c.Conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
			_ = c.Conn.Close()
		}
		close(c.flushed)
	})
}

// abort closes the socket at once, without last words.
func (c *Conn) abort() {
	c.closed.Store(true)
	_ = c.Close()      // first: the writer must not take what comes now for the peer's doing
	_ = c.Conn.Close() // whatever it answers, the connection is of no use any more
}

// finish ends a connection that the server has let go of.
func (c *Conn) finish() {
	c.settle()
	_ = c.Close()
	<-c.flushed
	c.in.release() // whoever keeps the connection does not keep its buffers
	_ = c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, c.Conn, lingerBytes)
	_ = c.Conn.Close()
}

// SetKeepalive sets how long the peer may send nothing, from now and from each packet on [MQTT-3.1.2-22]; zero: for ever. What it
// has sent while it wasn't read counts. It is for the goroutine that reads.
func (c *Conn) SetKeepalive(d time.Duration) { c.keepalive, c.heard = d, true }

// setReadDeadline gives the socket its deadline, once for all packets that came with a read.
func (c *Conn) setReadDeadline() {
	if !c.heard {
		return
	}
	c.heard = false
	var by time.Time
	if c.keepalive > 0 {
		by = time.Now().Add(c.keepalive)
	}
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if !c.closed.Load() {
		_ = c.Conn.SetReadDeadline(by) // fails on a closed connection alone
	}
}

// SetDeadline does nothing. SetKeepalive is for that, and a write doesn't block.
func (c *Conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing.
func (c *Conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }
