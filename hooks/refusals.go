package hooks

import (
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

const (
	// releasePause paces the closing of refused connections to 500 a second: their clients all
	// come back at once and send again what filled the outbox.
	releasePause = 2 * time.Millisecond

	// grace is what a publish that was refused just before room came back may take until its
	// connection is remembered: no second tick would come for it.
	grace = 100 * time.Millisecond

	// settle is the least time between two releases. An outbox at its edge gives room and takes
	// it away with every record.
	settle = 10 * time.Second
)

// refusals remembers which connections wait for an acknowledgement that won't come, until they can
// be closed: clients send again only after a reconnect. It says in the log when refusing begins and ends.
// It is safe for concurrent use.
type refusals struct {
	log   *slog.Logger
	space <-chan struct{}
	again chan struct{} // ticks when a commit that was late has succeeded

	waiting prometheus.Gauge
	closed  prometheus.Counter

	mu       sync.Mutex
	refusing bool
	count    int // refused since refusing began
	conns    map[*guard.Conn]struct{}
}

func newRefusals(log *slog.Logger, space <-chan struct{}, m *metrics) *refusals {
	return &refusals{
		log: log, space: space, again: make(chan struct{}, 1),
		waiting: m.refusedWaiting, closed: m.refusedClosed,
		conns: make(map[*guard.Conn]struct{}),
	}
}

// refused notes a refusal. c is the connection if the client got no answer, else nil.
func (r *refusals) refused(c *guard.Conn, reason reason, cause error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c != nil {
		r.conns[c] = struct{}{}
		r.waiting.Set(float64(len(r.conns)))
	}
	r.count++
	if !r.refusing {
		r.refusing = true
		r.log.Error("refusing matching publishes", "reason", string(reason), "error", cause)
	}
}

// forget drops a connection that has ended.
func (r *refusals) forget(c *guard.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	r.waiting.Set(float64(len(r.conns)))
}

// recovered says that a commit which was given up has succeeded after all.
func (r *refusals) recovered() {
	select {
	case r.again <- struct{}{}:
	default:
	}
}

// release closes the remembered connections, paced, each time there is room again, until quit is closed.
// closeConn must not block.
func (r *refusals) release(quit <-chan struct{}, closeConn func(*guard.Conn)) {
	for {
		select {
		case <-r.space:
		case <-r.again:
		case <-quit:
			return
		}
		if !pause(grace, quit) {
			return
		}
		r.mu.Lock()
		r.log.Info("accepting matching publishes again", "refused", r.count, "connections_to_close", len(r.conns))
		r.refusing, r.count = false, 0
		r.mu.Unlock()
		for pause(releasePause, quit) {
			c := r.next()
			if c == nil {
				break
			}
			closeConn(c)
			r.closed.Inc()
		}
		if !pause(settle, quit) {
			return
		}
	}
}

// next takes a remembered connection; nil if there is none, or there is no room any more.
func (r *refusals) next() *guard.Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refusing {
		return nil
	}
	for c := range r.conns {
		delete(r.conns, c)
		r.waiting.Set(float64(len(r.conns)))
		return c
	}
	return nil
}

// pause waits, and says whether quit is still open.
func pause(d time.Duration, quit <-chan struct{}) bool {
	select {
	case <-time.After(d):
		return true
	case <-quit:
		return false
	}
}
