package hooks

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

const (
	// releasePause paces the closing of refused connections to 500 a second: their clients all
	// come back at once and send again what filled the outbox.
	releasePause = 2 * time.Millisecond

	// settle is the least time between two releases. An outbox at its edge gives room and takes
	// it away with every record.
	settle = 10 * time.Second
)

// refusals remembers which connections wait for an acknowledgement that won't come, until they can
// be closed: clients send again only after a reconnect. It says in the log when refusing begins and ends.
// It is safe for concurrent use.
//
// What was refused is told apart by what it lacks: room for the destination whose cap it was, or, under a cap of all,
// for those that the publish owed; or a commit. A destination that stays full must not keep those waiting that another
// one has room for again.
type refusals struct {
	log   *slog.Logger
	space <-chan struct{}
	again chan struct{} // ticks when refused connections are to be released though space doesn't

	waiting prometheus.Gauge
	closed  prometheus.Counter

	mu       sync.Mutex
	released time.Time                // when the last release began
	lacking  map[string]bool          // what publishes were refused for since then
	count    int                      // how many
	conns    map[*guard.Conn][]string // with what they lack
}

func newRefusals(log *slog.Logger, space <-chan struct{}, m *metrics) *refusals {
	return &refusals{
		log: log, space: space, again: make(chan struct{}, 1),
		waiting: m.refusedWaiting, closed: m.refusedClosed,
		lacking: make(map[string]bool), conns: make(map[*guard.Conn][]string),
	}
}

// refusal is one publish that was not accepted.
type refusal struct {
	conn     *guard.Conn // nil if its client got an answer
	reason   reason
	cause    error
	owed     string // destinations of its records, if the reason is outboxFull
	full     string // the one of them whose cap it was; "": one of the whole outbox
	received time.Time
}

func (r refusal) lacks() string {
	switch {
	case r.full != "":
		return r.full
	case r.reason == outboxFull:
		return r.owed
	default:
		return string(r.reason)
	}
}

// refused notes a refusal.
func (r *refusals) refused(f refusal) {
	lacks := f.lacks()
	r.mu.Lock()
	defer r.mu.Unlock()
	if f.conn != nil {
		if !slices.Contains(r.conns[f.conn], lacks) {
			r.conns[f.conn] = append(r.conns[f.conn], lacks)
		}
		r.waiting.Set(float64(len(r.conns)))
	}
	r.count++
	if f.reason == outboxFull && !f.received.After(r.released) {
		// It may have been refused before the room that is being given away: then no tick
		// comes for it.
		if f.conn != nil {
			r.releaseAgain()
		}
		return
	}
	if !r.lacking[lacks] {
		r.lacking[lacks] = true
		r.log.Error("refusing matching publishes", "reason", string(f.reason), "error", f.cause, "destinations", f.owed)
	}
}

// forget drops a connection that has ended.
func (r *refusals) forget(c *guard.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	r.waiting.Set(float64(len(r.conns)))
}

// releaseAgain makes for a release that space doesn't tick for. It doesn't block.
func (r *refusals) releaseAgain() {
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
		for _, c := range r.begin() {
			if !r.take(c) {
				continue
			}
			closeConn(c)
			r.closed.Inc()
			if !pause(releasePause, quit) {
				return
			}
		}
		if !pause(settle, quit) {
			return
		}
	}
}

// begin starts a release, and returns the connections that it is for.
func (r *refusals) begin() []*guard.Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count > 0 || len(r.conns) > 0 { // else it was events that there was no room for
		r.log.Info("accepting matching publishes again", "refused", r.count, "connections_to_close", len(r.conns))
	}
	r.released, r.count = time.Now(), 0
	clear(r.lacking)
	return slices.Collect(maps.Keys(r.conns))
}

// take takes a connection that may be closed: it has not ended, and not all that it lacks has been
// refused to others since the release began.
func (r *refusals) take(c *guard.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.ContainsFunc(r.conns[c], func(lacks string) bool { return !r.lacking[lacks] }) {
		return false
	}
	delete(r.conns, c)
	r.waiting.Set(float64(len(r.conns)))
	return true
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
