// Package bridge sends what the outbox holds to its destinations over HTTP, at
// least once and in order per lane, with the trace context that each record
// was stored with. DESIGN.md beside it says how.
//
// It knows nothing of MQTT, of rules, or of how records are stored: a record's
// body, lane and trace context are opaque but for the one JSON field that
// carries the trace on.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// The durable queue's types, so that callers of this package need no other.
type (
	// Record is one delivery that is owed.
	Record = outbox.Record
	// Header is one that was rendered for a record.
	Header = outbox.Header
	// Ref is what is known of a record that waits.
	Ref = outbox.Ref
	// DeadLetter is a record that was given up.
	DeadLetter = outbox.DeadLetter
	// Commit is done when a change is on disk.
	Commit = outbox.Commit
	// FullError says which cap left no room.
	FullError = outbox.FullError
)

// ErrFull is what Append's error is when the queue has no room.
var ErrFull = outbox.ErrFull

// Queue is the durable queue as far as deliveries need it. Its methods are
// called from several goroutines at once and don't wait for the disk. Nothing
// depends on the commits of Remove, Reschedule and Bury: if one is lost in a
// crash, its record is sent again; if its flush fails, the queue makes it again.
// Bury's is waited for now and then, so that a slow disk slows it down. If
// it has failed when Bury returns, the record is still queued.
type Queue interface {
	// Append stores records, all or none but for those that it marks as Dropped.
	Append(recs []Record) (*Commit, error)
	// Watch calls fn with everything stored before it returns, and then with
	// what each commit adds, in Seq order, never twice at a time. fn does not
	// block. It is called once. After an error not everything was announced.
	Watch(fn func(refs []Ref)) error
	// Load returns a stored record, or an error that is outbox.ErrNotFound.
	Load(seq uint64) (Record, error)
	// Remove takes out a record that was delivered.
	Remove(seq uint64) *Commit
	// Reschedule notes a failed attempt.
	Reschedule(seq uint64, attempts int, next time.Time, lastError string) *Commit
	// Bury moves a record to the dead letters.
	Bury(seq uint64, d DeadLetter) *Commit
	// Pauses returns the destinations that are paused.
	Pauses() map[string]Pause
	// Pause keeps that a destination is paused, in place of what was kept.
	Pause(destination string, p Pause) *Commit
	// Resume is the end of that.
	Resume(destination string) *Commit
}

// Destination is where records go. It is not changed once it was handed over.
type Destination struct {
	Name, URL string
	// Method is that of all requests; "": POST. With GET and DELETE there is no body.
	Method string
	// Headers go with every attempt. They can't replace webhook-id,
	// webhook-timestamp, X-Throughline-Attempt, X-Throughline-Ids and the trace headers, nor what
	// SigningKeys and IdempotencyKey ask for.
	Headers map[string]string
	// HeaderSecrets are the secrets that belong into a header of a record, by its
	// canonical name: the first in the place of its first NUL, and so on.
	HeaderSecrets map[string][]string
	// Rendered says that records have a path, a query or headers of their own. What is
	// answered to one of them, such as 404 or 410, is then about that one.
	Rendered bool
	// TraceBody says where in the JSON body the trace context goes.
	TraceBody TraceFields
	// TraceHeaders sends the trace context as headers too.
	TraceHeaders bool
	// SigningKeys sign each attempt, one signature for each; nil: none. They
	// are the bytes themselves, decoded.
	SigningKeys [][]byte
	// IdempotencyKey sends the webhook-id as Idempotency-Key too.
	IdempotencyKey bool
	// Basic and OAuth2 make the Authorization header; nil: Headers may. What OAuth2
	// fails at is our own side's: see Response.
	Basic  *BasicAuth
	OAuth2 *OAuth2
	// TLS is for https alone; zero: the system's CAs, no client certificate. Its
	// files are read again when they change; while new ones are no good, those
	// from before stay in use.
	TLS TLS
	// Egress is checked for each address that is dialled, after DNS, those of
	// OAuth2's token endpoint too.
	Egress Egress
	// Concurrency bounds the requests under way at a time; 0: 16.
	Concurrency int
	// Rate bounds the requests over time, the breaker's probes included; zero:
	// no bound.
	Rate Rate
	// Batch sends several records in a request; zero: each has its own, whose body
	// is the record's.
	Batch Batch
	// Timeout bounds a request, from the connection to the answer's end; 0: 10 s.
	Timeout time.Duration
	// MaxAge is how long after it was queued a record is given up; 0: 24 h.
	MaxAge time.Duration
	// LaneHold is how long a record that keeps failing holds its lane up while
	// others get through; then it leaves the lane and is retried alone. Time in
	// which the breaker is open doesn't count. 0: 1 min.
	LaneHold time.Duration
}

// BasicAuth is a name and a password, RFC 7617. The name has no colon.
type BasicAuth struct{ Username, Password string }

// TraceFields are the paths of the members that carry sw8 and sw8-correlation,
// dots between nested names; "" is nowhere.
type TraceFields = tracectx.Fields

const (
	defaultConcurrency = 16
	defaultTimeout     = 10 * time.Second
	defaultMaxAge      = 24 * time.Hour
	defaultLaneHold    = time.Minute
)

// Options are the parts a Bridge is made of. Queue and Tracer are required.
type Options struct {
	Queue  Queue
	Tracer tracectx.Tracer
	// Sender sends for all destinations; nil: over HTTP, with connections of
	// its own for each destination.
	Sender Sender
	// Unauthorized is called when a destination has answered 401 or 407, or its token
	// endpoint has refused us: what it is shown may have been replaced. It is called
	// in a goroutine of its own, in which it may call SetDestinations; for each
	// destination at most once in 10 s. nil: nothing is done.
	Unauthorized func(destination string)
	// OwnAddresses are those of the broker's admin API, which no destination may
	// be at; an unspecified one stands for all of this host.
	OwnAddresses []netip.AddrPort
	Logger       *slog.Logger          // nil: no log
	Registerer   prometheus.Registerer // nil: no metrics
	Schedule     Schedule              // zero: the default one
	// Rand yields the jitter, values in [0, 1), and is safe for concurrent
	// use; nil: random.
	Rand func() float64
}

// Bridge forwards records to destinations. Its methods are safe for concurrent use.
type Bridge struct {
	queue        Queue
	tracer       tracectx.Tracer
	sender       Sender
	own          []netip.AddrPort
	unauthorized func(string)
	log          *slog.Logger
	metrics      *metrics
	schedule     Schedule
	random       func() float64

	attempts sync.WaitGroup  // the goroutines that make them
	ctx      context.Context // of all attempts
	cancel   context.CancelFunc

	watch sync.Once

	pausing sync.Mutex // held while a pause changes, in memory and in the queue; before mu

	mu         sync.Mutex // before a forwarder's
	paused     map[string]Pause
	forwarders map[string]*forwarder
	stopped    bool
}

// New returns a Bridge that sends nothing until SetDestinations was called. It
// fails if metrics of these names are registered already.
func New(o Options) (*Bridge, error) {
	if o.Queue == nil || o.Tracer == nil {
		return nil, errors.New("bridge: a queue and a tracer are required")
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, fmt.Errorf("bridge: register metrics: %w", err)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	b := &Bridge{
		queue:        o.Queue,
		tracer:       o.Tracer,
		sender:       o.Sender,
		own:          o.OwnAddresses,
		unauthorized: o.Unauthorized,
		log:          o.Logger,
		metrics:      m,
		schedule:     o.Schedule.orDefault(),
		random:       randomOrDefault(o.Rand),
		forwarders:   map[string]*forwarder{},
		paused:       maps.Clone(o.Queue.Pauses()),
	}
	if b.paused == nil {
		b.paused = map[string]Pause{}
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b, nil
}

// Append stores records; they are sent once they are on disk. The error is
// ErrFull when there is no room; records that may be dropped then are Dropped
// rather. It does not wait for the disk: the commit can be waited for.
func (b *Bridge) Append(recs []Record) (*Commit, error) { return b.queue.Append(recs) }

// SetDestinations replaces all destinations at once; the first call starts the
// deliveries. Records of a destination whose definition changed are due at
// once. Records of one that is gone, or whose URL can't be used (which is
// logged), are held until it returns or they reach their max age.
func (b *Bridge) SetDestinations(ds []Destination) {
	b.define(ds)
	b.watch.Do(func() {
		if err := b.queue.Watch(b.take); err != nil {
			b.log.Error("stored records can't be read, not all will be sent before a restart", "error", err)
		}
	})
}

func (b *Bridge) define(ds []Destination) {
	b.pausing.Lock()
	defer b.pausing.Unlock()
	for _, name := range b.redefine(ds) {
		b.keep(name, nil)
	}
}

// redefine is define without what must be kept; it returns the destinations
// that are paused no more, since they are others now.
func (b *Bridge) redefine(ds []Destination) (resumed []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	routes := make(map[string]*route, len(ds))
	for _, d := range ds {
		r, err := newRoute(d)
		if err != nil {
			b.log.Error("destination can't be used, its records are held", "destination", d.Name, "error", err)
			continue
		}
		routes[d.Name] = r
	}
	for name, f := range b.forwarders {
		switch r := routes[name]; {
		case r == nil && f.retire():
			delete(b.forwarders, name)
		case r != nil:
			if f.define(r) {
				resumed = append(resumed, name)
			}
			delete(routes, name)
		}
	}
	for name, r := range routes {
		if b.forwarder(name).define(r) {
			resumed = append(resumed, name)
		}
	}
	return resumed
}

// take accepts records that are on disk.
func (b *Bridge) take(refs []Ref) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(refs) > 0 {
		name, n := refs[0].Destination, 1
		for n < len(refs) && refs[n].Destination == name {
			n++
		}
		b.forwarder(name).add(refs[:n])
		refs = refs[n:]
	}
}

// forwarder returns the forwarder of that name, a new one if need be. The
// caller holds b.mu.
func (b *Bridge) forwarder(name string) *forwarder {
	f, ok := b.forwarders[name]
	if !ok {
		f = newForwarder(b, name)
		b.forwarders[name] = f
	}
	return f
}

// Stop starts no further attempts and waits for those under way. When ctx ends
// first they are cut off, and the error says how many; their records stay in
// the queue, like all that is not done. The queue must outlive the call.
func (b *Bridge) Stop(ctx context.Context) error {
	b.mu.Lock()
	b.stopped = true
	for _, f := range b.forwarders {
		f.stop()
	}
	b.mu.Unlock()
	defer b.cancel()

	done := make(chan struct{})
	go func() {
		b.attempts.Wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		n := b.underWay()
		b.cancel()
		select {
		case <-done:
		case <-time.After(cutOff):
		}
		err = fmt.Errorf("stop deliveries: %d attempts cut off: %w", n, ctx.Err())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.forwarders {
		f.close()
	}
	return err
}

// Attempts counts the attempts since the start by what their outcome meant, of
// all destinations together; each class is there.
func (b *Bridge) Attempts() map[Class]uint64 {
	n := make(map[Class]uint64, len(classes))
	for _, c := range classes {
		n[c] = b.metrics.total[c].Load()
	}
	return n
}

// cutOff is how long a sender may take to notice that its context ended.
const cutOff = time.Second

func (b *Bridge) underWay() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, f := range b.forwarders {
		n += f.underWay()
	}
	return n
}

// newSender returns what sends to r over HTTP.
func (b *Bridge) newSender(r *route, log *slog.Logger) *httpSender {
	return newHTTPSender(senderOptions{
		ctx: b.ctx, concurrency: r.limit, tls: r.def.TLS, oauth: r.def.OAuth2, egress: r.def.Egress, own: b.own, log: log,
	})
}

// same reports whether two definitions are the same.
func (d Destination) same(e Destination) bool { return reflect.DeepEqual(d, e) }
