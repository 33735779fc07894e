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
)

// past is a deadline that has passed: it makes blocked reads and writes return.
var past = time.Unix(1, 0)

// Conn is the connection as the server sees it. Reading refuses frames that break the limits;
// closing is bounded in time even if the peer reads nothing. Read is for one goroutine, all else is safe
// for concurrent use, and each Write reaches the peer in one piece.
type Conn struct {
	net.Conn
	guard *Guard

	frames follower     // of the reading goroutine
	client atomic.Value // string: the client id, once admitted

	closed atomic.Bool
	once   sync.Once

	deadlines sync.Mutex
	endBy     time.Time // no deadline lies after it; zero: no bound

	writes sync.Mutex
	torn   bool // a write failed, perhaps in the middle of a frame
}

func newConn(raw net.Conn, g *Guard) *Conn {
	c := &Conn{
		Conn:   raw,
		guard:  g,
		frames: follower{max: g.maxFrame, maxConnect: min(g.maxFrame, MaxConnectSize)},
	}
	// The server sets its keepalive deadline once it has read the CONNECT packet whole. An error
	// here means that the connection is gone, which the first read tells as well.
	_ = raw.SetDeadline(time.Now().Add(g.connectTimeout))
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

// Write writes whole frames. It blocks until the peer's window takes them or the deadline passes.
func (c *Conn) Write(p []byte) (int, error) {
	c.writes.Lock()
	defer c.writes.Unlock()
	return c.write(p)
}

func (c *Conn) write(p []byte) (int, error) {
	if c.torn || c.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := c.Conn.Write(p)
	c.torn = err != nil
	return n, err
}

// CloseWith writes a last frame, then closes the connection. Nothing can be written after it.
// Where the peer doesn't read, it gives up at the deadline by, as do all reads and writes under way.
func (c *Conn) CloseWith(frame []byte, by time.Time) error {
	c.setEnd(by)
	c.writes.Lock()
	defer c.writes.Unlock()
	_, err := c.write(frame)
	return errors.Join(err, c.Close())
}

// Close makes reads and writes fail, those under way included, and tells the peer that nothing
// more comes. The socket itself is closed when the server has let go of the connection, so
// that the peer gets what was written before.
func (c *Conn) Close() error {
	c.once.Do(func() {
		c.closed.Store(true)
		c.setEnd(past)
		if half, ok := c.Conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
			c.abort()
		}
	})
	return nil
}

// abort closes the socket at once, without last words.
func (c *Conn) abort() {
	c.closed.Store(true)
	_ = c.Conn.Close() // whatever it answers, the connection is of no use any more
}

// finish ends a connection that the server has let go of.
func (c *Conn) finish() {
	_ = c.Close()
	_ = c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, c.Conn, lingerBytes)
	c.abort()
}

// setEnd moves the end of the connection to at, unless it ends earlier already.
func (c *Conn) setEnd(at time.Time) {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if c.endBy.IsZero() || at.Before(c.endBy) {
		c.endBy = at
	}
	_ = c.Conn.SetDeadline(c.endBy) // fails on a closed connection alone
}

// SetDeadline is net.Conn's, but never beyond the end that CloseWith or Close has set: the server
// refreshes its keepalive deadline at every packet.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadline(c.Conn.SetDeadline, t) }

// SetReadDeadline is to SetDeadline as in net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(c.Conn.SetReadDeadline, t) }

// SetWriteDeadline is to SetDeadline as in net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(c.Conn.SetWriteDeadline, t) }

func (c *Conn) setDeadline(set func(time.Time) error, t time.Time) error {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if !c.endBy.IsZero() && (t.IsZero() || t.After(c.endBy)) {
		t = c.endBy
	}
	return set(t)
}
