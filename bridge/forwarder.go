package bridge

import (
	"errors"
	"log/slog"
	"math"
	"strconv"
	"sync"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

// forwarder sends the records of one destination. Its goroutines are the
// attempts under way, as many as the destination's concurrency at most; what
// waits has none.
type forwarder struct {
	bridge *Bridge
	name   string
	log    *slog.Logger
	meters *meters

	mu      sync.Mutex // never held while the queue or the sender is called
	route   *route     // nil: not defined, its records are held
	maxAge  time.Duration
	lanes   lanes
	breaker breaker
	limiter limiter
	notices notices
	grace   grace
	size    int       // records in a request at most, for now; see batch.go
	first   time.Time // since when something is due that lingers; zero: nothing is
	active  int       // goroutines
	told    time.Time // when Options.Unauthorized was last called; zero: never
	buried  int       // bytes of dead letters whose flush nobody has waited for
	stopped bool
	paused  *Pause    // nil: it is not
	since   time.Time // it is as it is
	failure string    // why the breaker opened

	timer *time.Timer
	armed time.Time // when the timer fires; zero: it doesn't
	sweep time.Time // when to look for records past their max age next
}

// newForwarder returns the forwarder of a destination that is not defined yet. The
// caller holds b.mu.
func newForwarder(b *Bridge, name string) *forwarder {
	f := &forwarder{
		bridge:  b,
		name:    name,
		log:     b.log.With("destination", name),
		meters:  b.metrics.destination(name),
		maxAge:  defaultMaxAge,
		stopped: b.stopped,
		since:   time.Now(),
	}
	if p, ok := b.paused[name]; ok {
		f.pause(p)
		f.log.Warn("destination is paused, its records are held", "reason", p.Reason, "since", p.Since)
	}
	return f
}

const (
	// ownFailureWait is how long a record waits that the queue can't read.
	ownFailureWait = 5 * time.Second
	// buriedAhead bounds, for each goroutine, the dead letters that wait in
	// memory for a slow disk: a backlog that expires as a whole is read faster
	// than it is written.
	buriedAhead = 1 << 20
	// buriedBeside is about what one takes beside its body.
	buriedBeside = 1 << 10
)

// define sets where the records go, and starts afresh if that has changed. It
// reports whether that was the end of a pause.
func (f *forwarder) define(r *route) (resumed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.route != nil && f.route.def.same(r.def) {
		return false
	}
	if f.outgrown(r) {
		f.paused, resumed = nil, true
		f.meters.paused.Set(0)
		f.log.Info("destination was gone, and is defined anew: what waited is due", "records", f.lanes.records)
	}
	if f.route != nil {
		f.closeSender()
	}
	if r.sender = f.bridge.sender; r.sender == nil {
		r.sender = f.bridge.newSender(r, f.log)
	}
	f.route, f.maxAge = r, r.maxAge
	f.breaker, f.notices = breaker{}, notices{}
	f.limiter.define(r.rate)
	f.size, f.first = r.batch.Max, time.Time{}
	f.lanes.relentAll()
	f.grace = grace{limit: r.hold}
	f.grace.set(f.paused == nil, time.Now())
	f.since = time.Now()
	f.meters.open.Set(0)
	f.meters.held.Set(0)
	f.sweep = time.Time{}
	f.lanes.wakeAll()
	f.dispatch(time.Now())
	return resumed
}

// retire takes the definition away. It reports true if no record is left, and
// then the forwarder is of no use any more.
func (f *forwarder) retire() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.route != nil {
		f.closeSender()
		f.route = nil
		f.breaker, f.notices = breaker{}, notices{}
		f.grace = grace{}
		f.since = time.Now()
		f.meters.open.Set(0)
	}
	if f.lanes.records == 0 {
		f.stopLocked()
		f.meters.forget()
		return true
	}
	f.hold()
	return false
}

// hold tells that there are records without a definition.
func (f *forwarder) hold() {
	f.meters.held.Set(float64(f.lanes.records))
	if _, ok := f.notices.worth("held", time.Now()); ok {
		f.log.Error("destination is not defined, its records are held", "records", f.lanes.records)
	}
}

// add accepts committed records, in Seq order.
func (f *forwarder) add(refs []Ref) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range refs {
		// r.Next is left aside: it is only set on what was stored before a
		// restart, and what it waited for may be over. The breaker keeps a
		// destination that still fails from being flooded.
		f.lanes.push(r.Lane, r.Ordered, pending{
			seq:      r.Seq,
			queued:   r.Queued.UnixMilli(),
			attempts: uint32(min(max(r.Attempts, 0), math.MaxInt32)),
		})
	}
	if f.route == nil {
		f.hold()
	}
	f.dispatch(time.Now())
}

// forget drops records that were purged from the queue; ordered ones only if
// keys has their lane. An attempt under way is not cut off. It may be that the
// destination failed for these alone, so a probe is due soon.
func (f *forwarder) forget(seqs map[uint64]bool, keys map[string]bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	f.lanes.drop(seqs, keys, f.cutoff(now))
	if f.route == nil {
		f.meters.held.Set(float64(f.lanes.records))
	}
	f.breaker.asked = true
	f.dispatch(now)
}

// hurry makes those of the records due that wait for another attempt, and
// returns how many. If the destination fails, a probe is due soon, too, unless
// it asked for quiet.
func (f *forwarder) hurry(seqs map[uint64]bool) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	n := f.lanes.wakeOnly(seqs)
	f.breaker.asked = true
	f.dispatch(now)
	return n
}

func (f *forwarder) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopLocked()
}

func (f *forwarder) stopLocked() {
	f.stopped = true
	if f.timer != nil {
		f.timer.Stop()
	}
}

func (f *forwarder) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.route != nil {
		f.closeSender()
	}
}

// closeSender lets go of idle connections; attempts under way are not touched.
func (f *forwarder) closeSender() {
	if s, ok := f.route.sender.(*httpSender); ok {
		s.close()
	}
}

func (f *forwarder) underWay() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.active
}

// job is a lane whose head is to be sent, or to be given up.
type job struct {
	lane    *lane
	route   *route // nil if expired
	expired bool
	batch   *batch // nil: the head alone; else lane is the first of the batch's
}

// choose takes the next job out of the lanes. The caller holds f.mu.
func (f *forwarder) choose(now time.Time) (job, bool) {
	if f.stopped {
		return job{}, false
	}
	if f.lanes.overdue.len() > 0 {
		return job{lane: f.lanes.expired(), expired: true}, true
	}
	if !f.sends() {
		return job{}, false
	}
	f.lanes.wake(now)
	due := f.lanes.due()
	probing := f.breaker.open != "" || !due
	if probing {
		at, failing := f.breaker.probe()
		if !failing || now.Before(at) || !due && len(f.lanes.waiting) == 0 {
			return job{}, false
		}
	} else if f.lingers(now) {
		return job{}, false
	}
	// Nothing leaves its lane before its turn has come, so that what waits for
	// the rate has no goroutine, and its order.
	if !f.limiter.allows(now) {
		return job{}, false
	}
	l := f.lanes.next()
	if l == nil { // a probe of what is not due
		l = f.lanes.earliest()
	}
	if l.head.queued < f.cutoff(now) {
		return job{lane: l, expired: true}, true
	}
	f.limiter.started()
	f.breaker.started = now
	j := job{lane: l, route: f.route}
	if f.route.batches() && !probing {
		j.batch = f.gather(l, now)
	}
	return j, true
}

// cutoff is the time, in Unix milliseconds, before which a record was queued
// that is past its max age.
func (f *forwarder) cutoff(now time.Time) int64 { return now.Add(-f.maxAge).UnixMilli() }

// limit is how many goroutines there may be. The caller holds f.mu.
func (f *forwarder) limit() int {
	if f.route == nil {
		return 1 // held records only expire
	}
	return f.route.limit
}

// dispatch starts as many goroutines as there is work and room for, and sets
// the timer for what is not due yet. The caller holds f.mu.
func (f *forwarder) dispatch(now time.Time) {
	if f.stopped {
		return
	}
	f.release(now)
	f.ripen(now)
	if f.lanes.idle() && f.lanes.failing == 0 {
		return
	}
	if !now.Before(f.sweep) {
		f.lanes.retire(f.cutoff(now))
		f.sweep = now.Add(min(max(f.maxAge/10, time.Second), time.Minute))
	}
	for f.active < f.limit() {
		j, ok := f.choose(now)
		if !ok {
			break
		}
		f.active++
		f.bridge.attempts.Go(func() { f.run(j) })
	}
	f.arm(now)
}

// arm sets the timer for the next thing that becomes due. The caller holds f.mu.
func (f *forwarder) arm(now time.Time) {
	if f.lanes.idle() && f.lanes.failing == 0 {
		return
	}
	at := f.sweep
	if f.sends() {
		if w := f.lanes.waiting; f.breaker.open == "" && len(w) > 0 && w[0].due.Before(at) {
			at = w[0].due
		}
		if probe, failing := f.breaker.probe(); failing && probe.Before(at) {
			at = probe
		}
		if !f.first.IsZero() {
			if end := f.first.Add(f.route.batch.Linger); end.After(now) && end.Before(at) {
				at = end
			}
		}
		if turn, waits := f.limiter.waits(now); waits { // whatever is due
			at = turn
			if f.sweep.Before(at) {
				at = f.sweep
			}
		}
		if end, held := f.holdEnds(now); held && end.Before(at) {
			at = end
		}
	}
	if !at.After(now) { // due, but every goroutine is busy: the first to finish takes it
		return
	}
	if !f.armed.IsZero() && !at.Before(f.armed) {
		return
	}
	f.armed = at
	if f.timer == nil {
		f.timer = time.AfterFunc(at.Sub(now), f.tick)
	} else {
		f.timer.Reset(at.Sub(now))
	}
}

func (f *forwarder) tick() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.armed = time.Time{}
	f.dispatch(time.Now())
}

// run does jobs until there is none.
func (f *forwarder) run(j job) {
	for ok := true; ok; {
		single := j.batch == nil || f.sendBatch(&j)
		var out outcome
		if single {
			out = f.do(j)
		}

		f.mu.Lock()
		now := time.Now()
		switch {
		case !single: // the batch's lanes are back
		case out.done || j.lane.head.purged:
			f.lanes.advance(j.lane, f.cutoff(now))
		case !j.expired && j.route != f.route: // it failed at what the destination was before
			f.lanes.wait(j.lane, now)
		default:
			f.lanes.wait(j.lane, out.due)
		}
		ok = f.active <= f.limit() // it may have been lowered
		if ok {
			j, ok = f.choose(now)
		}
		if !ok {
			f.active--
		}
		f.dispatch(now)
		if f.route == nil {
			f.meters.held.Set(float64(f.lanes.records))
		}
		f.mu.Unlock()
	}
}

// outcome is what becomes of the lane's head.
type outcome struct {
	done bool      // it is out of the queue
	due  time.Time // else: when it is tried again
}

// do makes one attempt, or gives an expired record up.
func (f *forwarder) do(j job) outcome {
	p := &j.lane.head
	rec, err := f.bridge.queue.Load(p.seq)
	if errors.Is(err, outbox.ErrNotFound) { // somebody purged it
		f.mu.Lock()
		f.breaker.asked = true // if it was to be a probe, none was made
		f.mu.Unlock()
		return outcome{done: true}
	}
	if err != nil {
		f.tell(slog.LevelError, "read record: "+err.Error(), "record can't be read, it stays in the queue", "seq", p.seq, "error", err)
		f.mu.Lock()
		f.fails(j.lane, time.Now())
		f.mu.Unlock()
		return outcome{due: time.Now().Add(ownFailureWait)}
	}
	rec.Attempts = int(p.attempts) // what is stored may lag behind
	if j.expired {
		return f.bury(p.seq, rec, ReasonExpired, Response{})
	}

	f.meters.inFlight.Inc()
	a := f.attempt(j.route, &rec)
	f.meters.inFlight.Dec()
	if a.res.Err != nil && f.bridge.ctx.Err() != nil { // cut off by Stop: not an attempt
		return outcome{due: time.Now()}
	}
	class := a.res.Class()
	if class != OwnSide {
		p.attempts++
		rec.Attempts++
	}
	f.meters.attempted(class, 1)

	if class == Success {
		f.bridge.queue.Remove(p.seq)
		f.meters.delivered(rec.Rule, a.carrier, time.Since(rec.Published).Seconds())
		f.mu.Lock()
		f.judge(class, j, Response{}, false)
		f.fit(j.route, 1, a.res)
		f.mu.Unlock()
		return outcome{done: true}
	}
	return f.failed(class, j, rec, a)
}

// failed decides what becomes of a record after an attempt that was no success.
func (f *forwarder) failed(class Class, j job, rec Record, a attempted) outcome {
	p := &j.lane.head
	text := failureText(a.res)
	rec.LastError = text
	level := slog.LevelWarn
	if class != Retry {
		level = slog.LevelError
	}
	message := "delivery failed"
	if class == OwnSide {
		message = "delivery failed on our side, nothing was sent"
	}
	f.tell(level, string(class)+": "+text, message,
		"class", string(class), "failure", text, "attempt", rec.Attempts,
		"rule", rec.Rule, "webhook_id", rec.ID, "trace_id", a.traceID)

	if class == Poison {
		p.refused = min(p.refused+1, poisonAttempts)
	}
	if class == Gone {
		f.bridge.pausing.Lock()
	}
	f.mu.Lock()
	stale := j.route != f.route
	before := f.breaker.open == ""
	own := j.route.refusesOne(&rec, a.res)
	f.judge(class, j, a.res, own)
	after := f.breaker.open == ""
	if !stale {
		f.fails(j.lane, time.Now())
	}
	// A 410 that comes while it is paused, or while everything is refused, says
	// nothing about the record.
	gone := class == Gone && !stale && f.paused == nil && f.breaker.open != Poison
	closes := gone && !own
	pause := Pause{Reason: PausedGone, Since: time.Now()}
	if closes {
		pause.Of = f.route.fingerprint()
		f.pause(pause)
	}
	f.mu.Unlock()
	if closes {
		f.bridge.keep(f.name, &pause)
		f.log.Error("destination says that it is gone, it is paused until it is resumed or its definition changes", "failure", text)
	}
	if class == Gone {
		f.bridge.pausing.Unlock()
	}

	reason := ""
	switch {
	case stale: // what the destination was before says nothing about what it is
	case gone: // those after the first are kept
		reason = ReasonGone
	case class == Poison && p.refused == poisonAttempts && before && after: // else it is a bad deploy
		reason = ReasonPoison
	}
	if reason != "" {
		return f.bury(p.seq, rec, reason, a.res)
	}
	tries := rec.Attempts
	if class == Poison { // those of an outage before say nothing of the record, and would have its lane wait for minutes
		tries = int(p.refused)
	}
	wait := f.bridge.schedule.wait(class, tries, f.bridge.random)
	if class == Retry && a.res.RetryAfter > 0 {
		wait = a.res.RetryAfter
	}
	due := time.Now().Add(wait)
	return outcome{due: due, done: missing(f.bridge.queue.Reschedule(p.seq, rec.Attempts, due, text))}
}

// missing reports whether a change was of no effect since the record is not in
// the queue: somebody purged it while it was sent.
func missing(c *Commit) bool { return c != nil && errors.Is(c.Err(), outbox.ErrNotFound) }

// judge tells the breaker of an attempt, and acts on it when it opens or
// closes. own: the answer is about the record alone. The caller holds f.mu.
func (f *forwarder) judge(class Class, j job, res Response, own bool) {
	if j.route != f.route || f.paused != nil { // it says nothing about what will be sent next
		return
	}
	who := j.lane.key
	if !j.lane.ordered {
		who = strconv.FormatUint(j.lane.head.seq, 10)
	}
	before := f.breaker.open
	var quiet time.Time
	if class == Retry && res.RetryAfter > 0 {
		quiet = time.Now().Add(res.RetryAfter)
	}
	if own {
		f.breaker.answered(class)
	} else {
		f.breaker.record(class, who, quiet)
	}
	after := f.breaker.open
	if class == Success {
		f.grace.wins++
	}
	if class == f.breaker.failing() {
		f.failure = failureText(res)
	}
	if (before == "") != (after == "") {
		f.grace.set(after == "", time.Now())
	}
	switch {
	case before == after:
	case after == "":
		f.meters.open.Set(0)
		f.since = time.Now()
		f.lanes.wakeAll()
		f.log.Info("destination answers again, what waited is due", "records", f.lanes.records)
	default:
		f.meters.open.Set(1)
		f.since = time.Now()
		f.closeSender() // probes get connections that are not from before
		f.log.Error("destination fails, it is only probed until it answers",
			"class", string(after), "failure", failureText(res), "records", f.lanes.records)
	}
}

// bury makes a dead letter of a record, unless the queue can't be written to:
// then the record's turn comes again. It waits for the disk now and then.
func (f *forwarder) bury(seq uint64, rec Record, reason string, res Response) outcome {
	commit := f.bridge.queue.Bury(seq, DeadLetter{
		Record:   rec,
		Reason:   reason,
		Buried:   time.Now(),
		Status:   res.Status,
		Response: res.Body,
	})
	if missing(commit) {
		return outcome{done: true}
	}
	if commit != nil && commit.Err() != nil {
		f.mu.Lock()
		f.breaker.started = time.Now() // else a destination that fails would be probed with this record at once, again and again
		f.mu.Unlock()
		return outcome{due: time.Now().Add(ownFailureWait)}
	}
	f.meters.dead[reason].Inc()
	f.tell(slog.LevelError, "dead letter: "+reason+": "+rec.LastError, "record is a dead letter",
		"reason", reason, "failure", rec.LastError, "attempts", rec.Attempts,
		"rule", rec.Rule, "webhook_id", rec.ID, "trace_id", rec.TraceID)

	f.mu.Lock()
	f.buried += len(rec.Body) + buriedBeside
	ahead := f.buried >= buriedAhead
	if ahead {
		f.buried = 0
	}
	f.mu.Unlock()
	if ahead {
		_ = commit.Wait(f.bridge.ctx) // a failed flush is the store's to tell, and the queue's to make again
	}
	return outcome{done: true}
}

// tell logs what was not logged lately under this text.
func (f *forwarder) tell(level slog.Level, text, message string, attrs ...any) {
	f.mu.Lock()
	unsaid, ok := f.notices.worth(text, time.Now())
	f.mu.Unlock()
	if !ok {
		return
	}
	if unsaid > 0 {
		attrs = append(attrs, "not_logged_before", unsaid)
	}
	f.log.Log(f.bridge.ctx, level, message, attrs...)
}
