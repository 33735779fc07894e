package guard

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	// Pauses after a failed accept: short enough not to be noticed after one aborted connection,
	// long enough that a broker out of file descriptors spends its time on the clients it has.
	minPause = 5 * time.Millisecond
	maxPause = time.Second
)

// A Listener accepts connections on one TCP address.
type Listener struct {
	guard   *Guard
	id      string
	address string
	socket  net.Listener // set by Init

	stopped chan struct{} // closed when nothing is accepted any more

	mu      sync.Mutex
	conns   map[*Conn]struct{}
	serving sync.WaitGroup // the conns' goroutines; Add under mu, never once stopped
}

// Listener returns a listener that opens address in Init. The id is what the server and its
// authentication know the listener by.
func (g *Guard) Listener(id, address string) *Listener {
	return &Listener{
		guard:   g,
		id:      id,
		address: address,
		stopped: make(chan struct{}),
		conns:   make(map[*Conn]struct{}),
	}
}

// Init opens the address.
func (l *Listener) Init() error {
	// TCP keepalive finds vehicles that vanished behind an MQTT keepalive of zero. TCP_NODELAY
	// needs no mention: Go sets it on every accepted connection.
	config := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4,
	}}
	socket, err := config.Listen(context.Background(), "tcp", l.address)
	if err != nil {
		return fmt.Errorf("open listener %q: %w", l.id, err)
	}
	l.socket = socket
	return nil
}

// Address is where the listener accepts; before Init what was configured.
func (l *Listener) Address() string {
	if l.socket == nil {
		return l.address
	}
	return l.socket.Addr().String()
}

// Serve accepts connections, and calls establish for each in a goroutine of its own, until
// StopAccepting or Close. establish keeps the connection until it returns. If it panics, that
// connection is closed and the others go on. An error of accept is tried again after a pause.
func (l *Listener) Serve(establish func(id string, c *Conn) error) {
	var pause time.Duration
	var failure string
	for {
		raw, err := l.socket.Accept()
		switch {
		case err == nil:
			pause, failure = 0, ""
			l.open(raw, establish)
			continue
		case l.isStopped():
			return
		}
		l.guard.metrics.acceptErrors.Inc()
		if text := err.Error(); text != failure {
			failure = text
			l.guard.log.Error("accept failed, trying again", "listener", l.id, "error", err)
		}
		pause = min(max(2*pause, minPause), maxPause)
		select {
		case <-time.After(pause):
		case <-l.stopped:
			return
		}
	}
}

func (l *Listener) open(raw net.Conn, establish func(id string, c *Conn) error) {
	if !l.guard.acquire() {
		_ = raw.Close()
		return
	}
	l.guard.metrics.accepted.Inc()
	c := newConn(raw, l.guard)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isStopped() {
		c.abort()
		l.guard.release()
		return
	}
	l.conns[c] = struct{}{}
	l.serving.Go(func() { l.serve(c, establish) })
}

func (l *Listener) serve(c *Conn, establish func(id string, c *Conn) error) {
	defer l.ended(c)
	c.ended(establish(l.id, c))
}

// ended is to be deferred. It stands apart, as does what it calls, since serve's frame is on the stack for as long as the connection lasts.
func (l *Listener) ended(c *Conn) {
	if cause := recover(); cause != nil {
		c.Panicked(cause)
	}
	c.finish()
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
	l.guard.release()
}

func (c *Conn) ended(err error) {
	c.guard.log.Debug("connection ended", "client", c.ClientID(), "remote", c.RemoteAddr().String(), "error", err)
}

func (l *Listener) isStopped() bool {
	select {
	case <-l.stopped:
		return true
	default:
		return false
	}
}

// StopAccepting closes the address. The open connections stay. Calling it again does nothing.
func (l *Listener) StopAccepting() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isStopped() {
		return
	}
	close(l.stopped)
	if l.socket != nil {
		_ = l.socket.Close() // nothing is left to do about a socket that doesn't close
	}
}

// Conns are the open connections, in no order.
func (l *Listener) Conns() []*Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	conns := make([]*Conn, 0, len(l.conns))
	for c := range l.conns {
		conns = append(conns, c)
	}
	return conns
}

// Drain waits, after StopAccepting, until every connection has ended and establish has returned
// for it. If ctx is done first it closes those that are left, without waiting for them, and returns an error that says how many.
func (l *Listener) Drain(ctx context.Context) error {
	ended := make(chan struct{})
	go func() {
		l.serving.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
	}
	left := l.Conns()
	for _, c := range left {
		c.abort()
	}
	return fmt.Errorf("drain listener %q: %d connections cut off: %w", l.id, len(left), context.Cause(ctx))
}

// Close stops accepting, closes what is left, and returns when establish has returned for every
// connection.
func (l *Listener) Close() {
	l.StopAccepting()
	for _, c := range l.Conns() {
		_ = c.Close()
	}
	l.serving.Wait()
}
