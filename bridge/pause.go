package bridge

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

// Pause is what is kept of a destination to which nothing is sent.
type Pause = outbox.Pause

// Why a destination is paused.
const (
	PausedByOperator = "operator" // until an operator resumes it
	PausedGone       = "gone"     // it answered 410; until it is resumed or its definition changes
)

// ErrNoDestination is what the error is when nothing is known of a destination.
var ErrNoDestination = errors.New("no such destination")

// State is what a destination is doing.
type State string

// The states of a destination.
const (
	StateActive    State = "active"
	StateFailing   State = "failing"   // its breaker is open: it is only probed
	StatePaused    State = "paused"    // nothing is sent
	StateUndefined State = "undefined" // the rule files have it no more, its records are held
)

// Status is how a destination is.
type Status struct {
	Name  string
	URL   string // without credentials and query; "": not defined
	State State  // "": nothing is being sent, since the queue is at rest
	// Why is the Class of the last answer if that was a failure, which it may be
	// of one that is active too, and the reason why one is paused.
	Why      string
	Failure  string    // what happened then, in words; "" of one that is paused
	Since    time.Time // of State; zero: not known
	InFlight int       // attempts under way
	Usage              // what is stored
}

// Pause stops sending to a destination until Resume is called, restarts or not.
// Its records are queued, and reach their max age. Attempts under way end as they
// would. Once it returns nil that is on disk; with any error but
// ErrNoDestination the destination is paused, but perhaps only until a restart,
// and Pause can be called again. One that is paused already is paused by the
// operator from now on.
func (b *Bridge) Pause(ctx context.Context, name string) error {
	commit, err := b.pause(name)
	if err != nil {
		return err
	}
	return commit.Wait(ctx)
}

func (b *Bridge) pause(name string) (*Commit, error) {
	b.pausing.Lock()
	defer b.pausing.Unlock()
	f, kept, paused := b.lookUp(name)
	if f == nil && !paused {
		return nil, ErrNoDestination
	}
	p := Pause{Reason: PausedByOperator, Since: time.Now()}
	if kept.Reason == PausedByOperator { // it is written again: the first time may have failed
		p = kept
	}
	if f != nil {
		f.mu.Lock()
		f.pause(p)
		f.mu.Unlock()
	}
	return b.keep(name, &p), nil
}

// Resume makes all records of a destination due that was paused, however it was.
// One that is not paused is left as it is. What an error means is as with Pause.
func (b *Bridge) Resume(ctx context.Context, name string) error {
	commit, err := b.resume(name)
	if err != nil {
		return err
	}
	return commit.Wait(ctx)
}

func (b *Bridge) resume(name string) (*Commit, error) {
	b.pausing.Lock()
	defer b.pausing.Unlock()
	f, _, paused := b.lookUp(name)
	if f == nil && !paused {
		return nil, ErrNoDestination
	}
	if f != nil && paused {
		f.resume()
	}
	return b.keep(name, nil), nil // even if it is not: the first time may have failed
}

// lookUp returns what is known of a destination; f is nil if nothing is but a pause.
func (b *Bridge) lookUp(name string) (f *forwarder, p Pause, paused bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, paused = b.paused[name]
	return b.forwarders[name], p, paused
}

// keep stores that a destination is paused, or with nil that it is not. The
// caller holds b.pausing, so that what is stored ends as memory does.
func (b *Bridge) keep(name string, p *Pause) *Commit {
	b.mu.Lock()
	if p != nil {
		b.paused[name] = *p
	} else {
		delete(b.paused, name)
	}
	b.mu.Unlock()
	if p != nil {
		return b.queue.Pause(name, *p)
	}
	return b.queue.Resume(name)
}

// Destinations tells how all destinations are, by name: those that are defined,
// those that have records, and those that are paused. What is stored is not in it.
func (b *Bridge) Destinations() []Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []Status
	for _, f := range b.forwarders {
		all = append(all, f.status())
	}
	for name, p := range b.paused {
		if b.forwarders[name] == nil {
			all = append(all, Status{Name: name, State: StatePaused, Why: p.Reason, Since: p.Since})
		}
	}
	slices.SortFunc(all, func(a, b Status) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func (f *forwarder) status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := Status{Name: f.name, State: StateActive, Since: f.since, InFlight: f.active}
	if f.route != nil {
		s.URL = f.route.safeURL
	}
	switch {
	case f.paused != nil:
		s.State, s.Why, s.Since = StatePaused, f.paused.Reason, f.paused.Since
	case f.route == nil:
		s.State = StateUndefined
	case f.breaker.failing() != "":
		s.Why, s.Failure = string(f.breaker.failing()), f.failure
		if f.breaker.open != "" {
			s.State = StateFailing
		}
	}
	return s
}

// pause stops all attempts but those under way. The caller holds f.mu.
func (f *forwarder) pause(p Pause) {
	f.paused = &p
	f.breaker = breaker{}
	f.grace.set(false, time.Now())
	f.meters.open.Set(0)
	f.meters.paused.Set(1)
	if f.route != nil {
		f.closeSender()
	}
}

// resume starts afresh.
func (f *forwarder) resume() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	f.paused = nil
	f.meters.paused.Set(0)
	f.since = now
	f.breaker, f.notices = breaker{}, notices{}
	f.lanes.relentAll()
	f.grace.set(f.route != nil, now)
	f.lanes.wakeAll()
	f.dispatch(now)
}

// sends reports whether attempts are made. The caller holds f.mu.
func (f *forwarder) sends() bool { return f.route != nil && f.paused == nil }

// outgrown reports whether r is another destination than the one that said it was
// gone. The caller holds f.mu.
func (f *forwarder) outgrown(r *route) bool {
	return f.paused != nil && f.paused.Reason == PausedGone && (f.route != nil || f.paused.Of != r.fingerprint())
}

// fingerprint tells destinations apart over restarts by what says where requests
// go. Secrets are not in it.
func (r *route) fingerprint() string {
	sum := sha256.Sum256([]byte(r.method + " " + r.url))
	return hex.EncodeToString(sum[:16])
}

// Destinations tells how all destinations are, by name, and what is stored for
// them: those that are defined, paused, or have something stored.
func (o *Operator) Destinations() []Status {
	var all []Status
	if o.bridge != nil {
		all = o.bridge.Destinations()
	} else {
		for name, p := range o.queue.Pauses() {
			all = append(all, Status{Name: name, State: StatePaused, Why: p.Reason, Since: p.Since})
		}
	}
	stored := o.queue.Stats().Destinations
	for i := range all {
		all[i].Usage = stored[all[i].Name]
		delete(stored, all[i].Name)
	}
	for name, u := range stored {
		s := Status{Name: name, Usage: u}
		if o.bridge != nil { // else it isn't known whether it is defined
			s.State = StateUndefined
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Status) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// Pause is Bridge.Pause. With a queue at rest it is for the next start; known is
// then what has something stored, or what the queue was told of.
func (o *Operator) Pause(ctx context.Context, name string) (Status, error) {
	switch {
	case o.bridge != nil:
		if err := o.bridge.Pause(ctx, name); err != nil {
			return Status{}, err
		}
	case o.status(name).Name == "":
		return Status{}, ErrNoDestination
	case o.status(name).Why != PausedByOperator:
		if err := o.queue.Pause(name, Pause{Reason: PausedByOperator}).Wait(ctx); err != nil {
			return Status{}, err
		}
	}
	return o.status(name), nil
}

// Resume is Bridge.Resume, in the same way.
func (o *Operator) Resume(ctx context.Context, name string) (Status, error) {
	before := o.status(name)
	switch {
	case o.bridge != nil:
		if err := o.bridge.Resume(ctx, name); err != nil {
			return Status{}, err
		}
	case before.Name == "":
		return Status{}, ErrNoDestination
	case before.State == StatePaused:
		if err := o.queue.Resume(name).Wait(ctx); err != nil {
			return Status{}, err
		}
	}
	s := o.status(name)
	s.Name = name // one that nothing else was known of is known no more
	return s, nil
}

// status returns the status of one destination, a zero one if it isn't known.
func (o *Operator) status(name string) Status {
	for _, s := range o.Destinations() {
		if s.Name == name {
			return s
		}
	}
	return Status{}
}
