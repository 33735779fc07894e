package hooks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks/guard"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
)

const (
	// farewell bounds how long a client may take to accept the packet that says goodbye.
	farewell = 2 * time.Second

	// writesPending is how many outgoing messages mochi queues for a client: none come that way. It
	// reserves eight bytes for each at connect: its default of 8192 costs 64 kB per vehicle.
	writesPending = 1

	// readBuffer is the least that bufio has. guard's connections have buffers of their own.
	readBuffer = 16

	// sweepInterval is how often expired retained messages are removed. They are not delivered before that either.
	sweepInterval = time.Minute
)

// Commit is a group commit that records joined. *bridge.Commit is one.
type Commit = guard.Commit

// Options describe the MQTT server. Rules, Append, Extractor, Tracer and Auth are required.
type Options struct {
	Listeners []ListenerOptions

	// MaxConnections, MaxPacketSize and ConnectTimeout are guard.Options'.
	MaxConnections int
	MaxPacketSize  int
	ConnectTimeout time.Duration
	// MaxSubscriptions bounds the topic filters of one client; more are refused one by one. Zero: no bound.
	MaxSubscriptions int

	// Auth says who may do what.
	Auth *auth.Policy
	// Rules returns the current rules; nil if there are none.
	Rules func() *rules.Set
	// Append stores a publish's records, all or none but for those that it marks as Dropped, without
	// waiting for the disk. If an error is bridge.ErrFull the publish is refused until Space ticks.
	Append func([]bridge.Record) (Commit, error)
	// Space ticks when there is room again after Append answered bridge.ErrFull.
	Space <-chan struct{}

	// Extractor finds the trace context in a publish, and Tracer continues it.
	Extractor *tracectx.Extractor
	Tracer    tracectx.Tracer
	// Broker is the address that vehicles know the broker by: the tag mq.broker. Empty: no tag.
	Broker string
	// Node is the broker's own name, for rules that read it.
	Node string
	// Version is the broker's, for its $SYS topic.
	Version string

	Logger     *slog.Logger          // nil: discard
	Registerer prometheus.Registerer // nil: no metrics
}

// ListenerOptions describe one listener.
type ListenerOptions struct {
	Name    string // known to Auth by it
	Address string // host:port; port 0 picks a free one
}

// Server is the MQTT server. To stop it: StopAccepting, DisconnectClients, Close.
type Server struct {
	mochi     *mqtt.Server
	hook      *hook
	listeners []*guard.Listener

	started atomic.Bool
	stopped atomic.Bool
	tasks   sync.WaitGroup
	quit    chan struct{} // ends the tasks and the workers
	workers *workers

	closing sync.Once
	closed  chan struct{}
}

// New builds the server and opens its listeners' addresses; nothing is accepted before Start.
// If it fails nothing stays open.
func New(o Options) (*Server, error) {
	if o.Rules == nil || o.Append == nil || o.Extractor == nil || o.Tracer == nil || o.Auth == nil {
		return nil, errors.New("new MQTT server: Rules, Append, Extractor, Tracer and Auth are required")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		mochi: mqtt.New(&mqtt.Options{
			Capabilities:            capabilities(o),
			Logger:                  slog.New(newLogHandler(o.Logger.Handler())),
			ClientNetReadBufferSize: readBuffer,
		}),
		quit:   make(chan struct{}),
		closed: make(chan struct{}),
	}
	s.workers = newWorkers(s.quit)
	s.hook = newHook(o)
	s.hook.server = s
	s.hook.subscribers.index, s.hook.subscribers.clients = s.mochi.Topics, s.mochi.Clients
	registerState(o.Registerer, s.mochi, s.hook)
	registerOutcomes(o.Registerer, o.Rules)
	if err := s.mochi.AddHook(s.hook, nil); err != nil {
		return nil, fmt.Errorf("new MQTT server: %w", err)
	}
	g := guard.New(guard.Options{
		MaxConnections: o.MaxConnections,
		MaxPacketSize:  o.MaxPacketSize,
		ConnectTimeout: o.ConnectTimeout,
		Logger:         o.Logger,
		Registerer:     o.Registerer,

		TopicAliasMaximum: topicAliasMaximum,
	})
	for _, lo := range o.Listeners {
		l := g.Listener(lo.Name, lo.Address)
		if err := l.Init(); err != nil {
			s.StopAccepting()
			return nil, fmt.Errorf("new MQTT server: %w", err)
		}
		s.listeners = append(s.listeners, l)
	}
	return s, nil
}

// capabilities are mochi's settings as a fleet needs them.
func capabilities(o Options) *mqtt.Capabilities {
	c := mqtt.NewDefaultServerCapabilities()
	c.MaximumPacketSize = uint32(max(o.MaxPacketSize, 0)) // 0: no limit here, MQTT's own in guard
	c.MaximumClientWritesPending = writesPending
	c.ReceiveMaximum = receiveMaximum
	// mochi drops retained and queued messages after a day unless this is 0: then only a
	// message's own expiry counts [MQTT-3.3.2-5].
	c.MaximumMessageExpiryInterval = 0
	// Topic aliases are resolved, and announced, before mochi sees them (OnPacketRead).
	c.TopicAliasMaximum = 0
	// Otherwise a publish's user properties come back in its PUBACK.
	c.Compatibilities.NoInheritedPropertiesOnAck = true
	// Who may not subscribe doesn't learn whether the topic exists.
	c.Compatibilities.ObscureNotAuthorized = true
	// PassiveClientDisconnect stays off. With it mochi leaves the connection open after its own
	// DISCONNECT: a session's old connection would go on publishing after a takeover
	// [MQTT-3.1.4-3]. What it is for, that the client gets to read the DISCONNECT, guard does by
	// closing in two steps.
	c.Compatibilities.PassiveClientDisconnect = false
	return c
}

// Start begins to accept connections and returns. It is to be called once.
func (s *Server) Start() {
	for _, l := range s.listeners {
		s.tasks.Go(func() { l.Serve(s.serve) })
	}
	s.tasks.Go(func() { s.hook.refusals.release(s.quit, s.closeRefused) })
	s.tasks.Go(s.sweep)
	s.tasks.Go(s.publishSys)
	s.started.Store(true)
}

// Accepting reports whether the server is started and not stopping.
func (s *Server) Accepting() bool { return s.started.Load() && !s.stopped.Load() }

// Addresses are where the listeners accept, in the order of Options.
func (s *Server) Addresses() []string {
	out := make([]string, 0, len(s.listeners))
	for _, l := range s.listeners {
		out = append(out, l.Address())
	}
	return out
}

// StopAccepting closes the listeners' addresses. Clients stay connected.
func (s *Server) StopAccepting() {
	s.stopped.Store(true)
	for _, l := range s.listeners {
		l.StopAccepting()
	}
}

// DisconnectClients, after StopAccepting, ends every connection, MQTT 5 clients' with a
// DISCONNECT that says so (0x8B, server shutting down), and returns when mochi has let go of them
// all. It takes no longer than ctx: then connections are cut off, and the error says how many.
func (s *Server) DisconnectClients(ctx context.Context) error {
	by := time.Now().Add(farewell)
	if end, ok := ctx.Deadline(); ok && end.Before(by) {
		by = end
	}
	var goodbyes sync.WaitGroup
	for _, l := range s.listeners {
		for _, c := range l.Conns() {
			goodbyes.Go(func() { s.disconnect(c, packets.ErrServerShuttingDown, by) })
		}
	}
	goodbyes.Wait()
	var errs []error
	for _, l := range s.listeners {
		errs = append(errs, l.Drain(ctx))
	}
	return errors.Join(errs...)
}

// Close ends what is left: listeners, connections, tasks. It takes no longer than
// ctx; a hook that is stuck is left behind then. Calling it again waits for the first call's end.
func (s *Server) Close(ctx context.Context) error {
	s.closing.Do(func() {
		s.StopAccepting()
		s.hook.wills.close()
		s.hook.expiries.close()
		close(s.quit)
		go func() {
			for _, l := range s.listeners {
				l.Close()
			}
			s.tasks.Wait()
			close(s.closed)
		}()
	})
	select {
	case <-s.closed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close MQTT server: %w", context.Cause(ctx))
	}
}

// closeRefused closes a connection whose client waits for an acknowledgement that won't come, so
// that it reconnects and sends again.
func (s *Server) closeRefused(c *guard.Conn) {
	s.tasks.Go(func() { s.disconnect(c, packets.ErrServerBusy, time.Now().Add(farewell)) })
}

// disconnect closes a connection, with an MQTT 5 client's DISCONNECT as its last frame. It
// doesn't use mochi's DisconnectClient: that also stops the client, whose worker may be in the middle of a packet.
func (s *Server) disconnect(c *guard.Conn, code packets.Code, by time.Time) {
	s.disconnectFor(reasonName(code.Code), c, code, by)
}

// disconnectFor is disconnect for a reason that events name so.
func (s *Server) disconnectFor(why string, c *guard.Conn, code packets.Code, by time.Time) {
	cl, ok := s.client(c)
	if ok {
		if owner := connectionOf(cl); owner != nil {
			owner.endedFor(why)
		}
	}
	if !ok || cl.Properties.ProtocolVersion < 5 {
		_ = c.Close() // in MQTT 3.1.1 servers send no DISCONNECT
		return
	}
	var frame bytes.Buffer
	pk := packets.Packet{
		ProtocolVersion: 5,
		FixedHeader:     packets.FixedHeader{Type: packets.Disconnect},
		ReasonCode:      code.Code,
	}
	if err := pk.DisconnectEncode(&frame); err != nil {
		_ = c.Close()
		return
	}
	_ = c.CloseWith(frame.Bytes(), by) // a client that takes no goodbye goes without
}

// client is the one that has the connection now.
func (s *Server) client(c *guard.Conn) (*mqtt.Client, bool) {
	cl, ok := s.mochi.Clients.Get(c.ClientID())
	return cl, ok && cl.Net.Conn == net.Conn(c)
}

// sweep removes expired retained messages until the server closes.
func (s *Server) sweep() {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			s.hook.retained.Sweep(now)
		case <-s.quit:
			return
		}
	}
}
