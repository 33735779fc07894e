package guard

import (
	"errors"
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

// Conn is the connection as the server sees it. Reading refuses frames that break the limits.
// Writing never blocks: what the peer doesn't take waits, within bounds. Closing is bounded in time
// even if the peer reads nothing. Read and Join are for one goroutine, all else is safe for concurrent
// use, and each Write reaches the peer in one piece, but for acknowledgements that are held.
type Conn struct {
	net.Conn
	guard *Guard

	frames follower     // of the reading goroutine
	client atomic.Value // string: the client id, once admitted
	out    outbound

	closed  atomic.Bool
	once    sync.Once
	flushed chan struct{} // closed when what was written before Close has gone, or never will

	commitFailed atomic.Bool
	unsettled    atomic.Int64  // the joined commits that are not done, and one for the server
	settled      chan struct{} // closed when unsettled is zero

	deadlines   sync.Mutex    // Close's deadline must not be overwritten by the server's
	readTimeout time.Duration // of the deadline that the server has set last; zero: none
}

func newConn(raw net.Conn, g *Guard) *Conn {
	c := &Conn{
		Conn:    raw,
		guard:   g,
		frames:  follower{max: g.maxFrame, maxConnect: min(g.maxFrame, MaxConnectSize)},
		flushed: make(chan struct{}),
		settled: make(chan struct{}),
	}
	c.unsettled.Store(1)
	c.out.init(raw, g.stallTimeout, g.maxFrame+maxWaiting, c.failed)
	// The server sets its keepalive deadline once it has read the CONNECT packet whole. An error
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

// Read reads what the peer sent as far as its frames keep to the limits. At the first that
// doesn't it closes the connection and returns a *FrameError with the bytes before.
func (c *Conn) Read(p []byte) (int, error) {
	if c.frames.connected && c.client.Load() == nil {
		return 0, c.refuse(&FrameError{Reason: NotAdmitted})
	}
	if room := c.out.full(); room != nil {
		<-room // a bound on what is held; closing makes room too
		c.restartReadDeadline()
	}
	if !c.frames.connected {
		// What comes after CONNECT stays in the socket: whether it may be read is not known yet.
		p = p[:min(len(p), c.frames.need())]
	}
	n, err := c.Conn.Read(p)
	ok, refused := c.frames.follow(p[:n])
	if refused != nil {
		return ok, c.refuse(refused)
	}
	if err != nil && c.closed.Load() {
		return n, net.ErrClosed
	}
	if !c.frames.connected && errors.Is(err, os.ErrDeadlineExceeded) {
		c.guard.metrics.connectTimeouts.Inc()
	}
	return n, err
}

func (c *Conn) refuse(err error) error {
	var fe *FrameError
	if errors.As(err, &fe) {
		c.guard.refused(c, fe)
	}
	c.abort()
	return err
}

// Write takes whole frames, and doesn't block. PUBACK and PUBREC frames wait for the commits that were
// joined before; everything else passes them.
func (c *Conn) Write(p []byte) (int, error) {
	if err := c.out.write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

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

// Settled is closed when the server has let go of the connection and all commits that it joined are done.
func (c *Conn) Settled() <-chan struct{} { return c.settled }

func (c *Conn) settle() {
	if c.unsettled.Add(-1) == 0 {
		close(c.settled)
	}
}

// failed ends the connection: the peer has stalled, or is gone.
func (c *Conn) failed(cause error) {
	var stalled *StallError
	if errors.As(cause, &stalled) && !c.closed.Load() {
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
	_ = c.Conn.Close() // whatever it answers, the connection is of no use any more
	_ = c.Close()
}

// finish ends a connection that the server has let go of.
func (c *Conn) finish() {
	c.settle()
	_ = c.Close()
	<-c.flushed
	_ = c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, c.Conn, lingerBytes)
	_ = c.Conn.Close()
}

// SetDeadline sets the read deadline: how long a write may take is not for the server to say. Once
// the connection is closed it does nothing; the server refreshes its keepalive deadline at every packet.
func (c *Conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetReadDeadline is to SetDeadline as in net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if c.closed.Load() {
		return nil
	}
	c.readTimeout = 0
	if !t.IsZero() {
		c.readTimeout = time.Until(t)
	}
	return c.Conn.SetReadDeadline(t)
}

// restartReadDeadline gives the peer its time again, after it was not read for a while.
func (c *Conn) restartReadDeadline() {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if c.readTimeout > 0 && !c.closed.Load() {
		_ = c.Conn.SetReadDeadline(time.Now().Add(c.readTimeout)) // fails on a closed connection alone
	}
}

// SetWriteDeadline does nothing: a write doesn't block.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }
