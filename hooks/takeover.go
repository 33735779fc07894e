package hooks

import (
	"context"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// takeoverWait bounds how long a client waits for the end of the connection before it that has
// its id. That end takes as long as the flush that the old connection's acknowledgements wait for.
const takeoverWait = 5 * time.Second

// turns lets connections with the same client id become its session one after the other.
type turns struct {
	mu    sync.Mutex
	taken map[string]*guard.Conn   // by client id: whose turn it is
	over  map[string]chan struct{} // closed when that turn is over; made by who waits for it
}

func newTurns() *turns {
	return &turns{taken: make(map[string]*guard.Conn), over: make(map[string]chan struct{})}
}

// begin waits for the turn of c. It gives up when ctx is done.
func (t *turns) begin(ctx context.Context, id string, c *guard.Conn) error {
	for {
		t.mu.Lock()
		if t.taken[id] == nil {
			t.taken[id] = c
			t.mu.Unlock()
			return nil
		}
		over := t.over[id]
		if over == nil {
			over = make(chan struct{})
			t.over[id] = over
		}
		t.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// tryBegin is begin that doesn't wait.
func (t *turns) tryBegin(id string, c *guard.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.taken[id] != nil {
		return false
	}
	t.taken[id] = c
	return true
}

// another reports whether it is the turn of another connection than c.
func (t *turns) another(id string, c *guard.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.taken[id] != nil && t.taken[id] != c
}

// end ends the turn of c, if it has it.
func (t *turns) end(id string, c *guard.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.taken[id] != c {
		return
	}
	delete(t.taken, id)
	if over := t.over[id]; over != nil {
		delete(t.over, id)
		close(over)
	}
}

// endAll ends the turn of a connection that has ended, if it still has one: its CONNACK may have failed.
func (t *turns) endAll(c *guard.Conn) {
	if id := c.ClientID(); id != "" {
		t.end(id, c)
	}
}

// takeOver ends the connection that has the client's id, if there is one, and waits until mochi
// has let go of it and what it has accepted is on disk: the session is handed on with the PUBRECs that mochi has
// sent, as it believes. If others that wait for the same session take too long, the client is
// refused: a takeover beside another one could leave both connections open.
func (h *hook) takeOver(cl *mqtt.Client, c *guard.Conn) bool {
	ctx, cancel := context.WithTimeout(context.Background(), takeoverWait)
	defer cancel()
	if err := h.turns.begin(ctx, cl.ID, c); err != nil {
		h.log.Warn("connection refused: others are taking over the session", "client", cl.ID, "waited", takeoverWait)
		return false
	}
	old, ok := h.server.mochi.Clients.Get(cl.ID)
	if !ok {
		return true
	}
	before, ok := old.Net.Conn.(*guard.Conn)
	if !ok {
		return true
	}
	why := reasonTakenOver
	if cl.Properties.Clean {
		why = reasonDiscarded
	}
	h.server.disconnectFor(why, before, packets.ErrSessionTakenOver, time.Now().Add(farewell))
	select {
	case <-before.Settled():
		return true
	case <-ctx.Done():
	}
	h.log.Warn("a session is taken over before its last connection has ended", "client", cl.ID, "waited", takeoverWait)
	if c := connectionOf(old); c != nil {
		c.gone(why, nil) // before this client is told of; its own end comes too late
	}
	// What its acknowledgements stand for is not known to be on disk: the client sends it again.
	for _, pk := range old.State.Inflight.GetAll(false) {
		h.forgetAck(old, pk.PacketID)
	}
	return true
}
