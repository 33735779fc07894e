// Package guard is what stands between the network and the MQTT server: listeners that
// survive whatever a connection does, and the connection wrapper that the server reads from
// and writes to.
//
// Per connection it keeps a goroutine whose panics are recovered, a deadline for the CONNECT
// packet, and a bound on the size of every frame, checked on the fixed header before the
// server allocates for it. Over all connections it keeps their number bounded.
//
// On the way out it never blocks the server: frames wait for the peer within bounds and are
// written many at a time, and acknowledgements of publishes wait for the commits that their
// publishes joined (the ack gate, out.go).
//
// It knows what a well-formed packet is, and refuses others before the server decodes them. Sessions, topics
// and authentication are the server's. It doesn't know which server that is either.
//
// Not covered: a panic in a goroutine that the server starts by itself ends the process, since
// nobody but that goroutine can recover it.
package guard

import (
	"log/slog"
	"math"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

const (
	// DefaultConnectTimeout is generous for a vehicle on a bad radio link, and short enough that
	// connections which never say anything don't pile up.
	DefaultConnectTimeout = 5 * time.Second

	// MaxConnectSize bounds a CONNECT packet, since its sender is not authenticated yet: what
	// the server reserves for a header that anyone may send stays small. A client id, a will, a
	// name and a token of several kilobytes fit easily.
	MaxConnectSize = 64 << 10

	// MaxTopicLevels bounds the levels of topic names and filters. Some servers' work grows with their square, and with all other
	// clients waiting.
	MaxTopicLevels = 128

	// refusedPause is the least time between two lines about refused frames: each names one
	// client of perhaps many, the metric has them all.
	refusedPause = 10 * time.Second

	// maxFrameSize is the largest frame that MQTT can express: type, four bytes of length, body.
	maxFrameSize = 1 + 4 + 268_435_455
)

// Options bound what all listeners of one Guard accept together.
type Options struct {
	// MaxConnections bounds the open connections, over all listeners. Zero: no bound.
	MaxConnections int
	// MaxPacketSize is the largest frame accepted, in bytes, fixed header included; before
	// authentication MaxConnectSize holds if it is smaller. Zero: MQTT's own limit of 256 MiB.
	MaxPacketSize int
	// ConnectTimeout is how long a connection has to send its CONNECT packet whole, counted from
	// accept. Zero: DefaultConnectTimeout.
	ConnectTimeout time.Duration
	// StallTimeout is how long a peer may take nothing of what waits for it before it is
	// disconnected. Zero: DefaultStallTimeout.
	StallTimeout time.Duration
	// TopicAliasMaximum is the one that the server announces to MQTT 5 clients.
	TopicAliasMaximum uint16
	// Logger receives what ops should see: nil discards it.
	Logger *slog.Logger
	// Registerer receives the metrics: nil means none.
	Registerer prometheus.Registerer
}

// Guard is the policy, the count and the metrics that its listeners share.
// It is safe for concurrent use.
type Guard struct {
	maxConnections    int64
	maxFrame          int
	connectTimeout    time.Duration
	stallTimeout      time.Duration
	topicAliasMaximum uint16
	log               *slog.Logger
	metrics           metrics

	open atomic.Int64 // connections
	full atomic.Bool  // MaxConnections is reached, and that was logged

	mu          sync.Mutex
	lastPanic   string
	nextRefused time.Time // when a refused frame is logged again
	unsaid      int       // how many were not since
}

// New returns a Guard without listeners; Listener makes them.
func New(o Options) *Guard {
	g := &Guard{
		maxConnections:    int64(o.MaxConnections),
		maxFrame:          o.MaxPacketSize,
		connectTimeout:    o.ConnectTimeout,
		stallTimeout:      o.StallTimeout,
		topicAliasMaximum: o.TopicAliasMaximum,
		log:               o.Logger,
	}
	if g.maxConnections <= 0 {
		g.maxConnections = math.MaxInt64
	}
	if g.maxFrame <= 0 || g.maxFrame > maxFrameSize {
		g.maxFrame = maxFrameSize
	}
	if g.connectTimeout <= 0 {
		g.connectTimeout = DefaultConnectTimeout
	}
	if g.stallTimeout <= 0 {
		g.stallTimeout = DefaultStallTimeout
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	g.metrics = newMetrics(o.Registerer, g)
	return g
}

// acquire takes a place among the open connections, or says that there is none.
func (g *Guard) acquire() bool {
	if g.open.Add(1) <= g.maxConnections {
		if g.full.CompareAndSwap(true, false) {
			g.log.Info("connections are accepted again")
		}
		return true
	}
	g.open.Add(-1)
	g.metrics.refused.Inc()
	if g.full.CompareAndSwap(false, true) {
		g.log.Warn("refusing connections: max_connections is reached", "max_connections", g.maxConnections)
	}
	return false
}

func (g *Guard) release() { g.open.Add(-1) }

// panicked counts a recovered panic and logs it with its stack when its text changes: a packet
// that makes the server panic can be sent as often as its sender likes.
func (g *Guard) panicked(c *Conn, cause string) {
	g.metrics.panics.Inc()
	g.mu.Lock()
	same := cause == g.lastPanic
	g.lastPanic = cause
	g.mu.Unlock()
	if same {
		return
	}
	g.log.Error("panic in a connection, which was closed", "panic", cause, "client", c.ClientID(),
		"remote", c.RemoteAddr().String(), "stack", string(debug.Stack()))
}

// refused counts a refused frame, and names its client in the log if it was admitted. A vehicle whose
// message is too large sends it again and again, and a fleet has many with the same firmware.
func (g *Guard) refused(c *Conn, e *FrameError) {
	g.metrics.frames[e.Reason].Inc()
	client := c.ClientID()
	if client == "" {
		return
	}
	now := time.Now()
	g.mu.Lock()
	if now.Before(g.nextRefused) {
		g.unsaid++
		g.mu.Unlock()
		return
	}
	unsaid := g.unsaid
	g.nextRefused, g.unsaid = now.Add(refusedPause), 0
	g.mu.Unlock()
	g.log.Warn("connection closed for a frame", "client", client, "remote", c.RemoteAddr().String(), "error", e, "others_since", unsaid)
}

type metrics struct {
	accepted        prometheus.Counter
	refused         prometheus.Counter
	acceptErrors    prometheus.Counter
	connectTimeouts prometheus.Counter
	silent          prometheus.Counter
	panics          prometheus.Counter
	stalled         prometheus.Counter
	frames          map[Reason]prometheus.Counter
}

func newMetrics(r prometheus.Registerer, g *Guard) metrics {
	auto := promauto.With(r)
	counter := func(name, help string) prometheus.Counter {
		return auto.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	auto.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "throughline_connections",
		Help: "Open network connections, those before CONNECT included.",
	}, func() float64 { return float64(g.open.Load()) })
	frames := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_frames_refused_total",
		Help: "Connections closed for a frame that the guard refused, by reason.",
	}, []string{"reason"})
	m := metrics{
		accepted:        counter("throughline_connections_accepted_total", "Connections accepted."),
		refused:         counter("throughline_connections_refused_total", "Connections closed at once because max_connections was reached."),
		acceptErrors:    counter("throughline_accept_errors_total", "Errors of accept, such as too many open files."),
		connectTimeouts: counter("throughline_connect_timeouts_total", "Connections closed because their CONNECT packet did not arrive in time."),
		silent:          counter("throughline_keepalive_timeouts_total", "Connections closed because the client sent nothing for one and a half times its keepalive."),
		panics:          counter("throughline_connection_panics_total", "Panics recovered in a connection's goroutine."),
		stalled:         counter("throughline_connections_stalled_total", "Connections closed because the client did not take what waited for it."),
		frames:          make(map[Reason]prometheus.Counter, len(reasons)),
	}
	for _, reason := range reasons {
		m.frames[reason] = frames.WithLabelValues(string(reason))
	}
	return m
}
