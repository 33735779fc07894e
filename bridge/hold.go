package bridge

import (
	"log/slog"
	"time"
)

// held is a head that has failed, since it came to the front of its lane.
type held struct {
	lane  *lane
	seq   uint64        // of the head; another one there: it is done with
	since time.Duration // on the clock of grace
	wins  uint64        // what others had delivered by then
}

// grace measures how long heads have kept their lanes waiting. Its clock runs
// while the destination takes records and stands while it does not: an outage is
// no record's fault, and must not scatter the lanes when it ends. It is not safe
// for concurrent use.
type grace struct {
	limit time.Duration
	ran   time.Duration
	from  time.Time // since when it runs; zero: it stands
	wins  uint64    // records delivered
	// returns counts how often it was started. A head that has not failed since
	// the last time waits for its turn, whatever it did in an outage.
	returns uint32
}

// set starts or stops the clock.
func (g *grace) set(runs bool, now time.Time) {
	g.ran = g.clock(now)
	g.from = time.Time{}
	if runs {
		g.from = now
		g.returns++
	}
}

func (g *grace) clock(now time.Time) time.Duration {
	if g.from.IsZero() {
		return g.ran
	}
	return g.ran + now.Sub(g.from)
}

// ends tells when h has kept its lane for too long; ok is false while that can't
// be told, since the clock stands, nothing else was delivered since, or it has not been
// tried since the clock stood.
func (g *grace) ends(h held, now time.Time) (at time.Time, ok bool) {
	if g.from.IsZero() || g.wins == h.wins || h.lane.tried != g.returns {
		return time.Time{}, false
	}
	return now.Add(h.since + g.limit - g.clock(now)), true
}

// fails notes that a head has failed, unless that is known or it holds up nobody.
func (ls *lanes) fails(l *lane, since time.Duration, wins uint64) {
	if !l.ordered || l.failing {
		return
	}
	l.failing = true
	ls.failing++
	ls.held.push(held{lane: l, seq: l.head.seq, since: since, wins: wins})
	const slack = 64
	if ls.held.len() > 2*ls.failing+slack {
		ls.held.drop(func(h held) bool { return !h.stands() })
	}
}

// stands reports whether the head is still there and has not got through since.
func (h held) stands() bool { return h.lane.failing && h.lane.head.seq == h.seq }

// longest returns the head that has failed for the longest time.
func (ls *lanes) longest() (h held, ok bool) {
	for ls.held.len() > 0 {
		if h = ls.held.front(); h.stands() {
			return h, true
		}
		ls.held.pop()
	}
	return held{}, false
}

// relent forgets that a head has failed.
func (ls *lanes) relent(l *lane) {
	if l.failing {
		l.failing = false
		ls.failing--
	}
}

// relentAll forgets all heads that have failed.
func (ls *lanes) relentAll() {
	for h, ok := ls.longest(); ok; h, ok = ls.longest() {
		ls.relent(h.lane)
	}
}

// split lets the head of an ordered lane go on without a lane, wherever it is, in
// somebody's hands too. What is behind it goes on as the lane: overdue if the next
// record was queued before cutoff, else ready.
func (ls *lanes) split(l *lane, cutoff int64) {
	ls.relent(l)
	delete(ls.byKey, l.key)
	l.ordered = false
	rest := l.rest
	l.rest = fifo[pending]{}
	if rest.len() == 0 {
		return
	}
	next := &lane{key: l.key, ordered: true, head: rest.pop(), rest: rest}
	ls.byKey[l.key] = next
	ls.enqueue(next, cutoff)
}

// fails notes that the head of a lane has failed. The caller holds f.mu.
func (f *forwarder) fails(l *lane, now time.Time) {
	l.tried = f.grace.returns
	f.lanes.fails(l, f.grace.clock(now), f.grace.wins)
}

// holdEnds tells when the next record leaves its lane if nothing changes. The
// caller holds f.mu.
func (f *forwarder) holdEnds(now time.Time) (at time.Time, ok bool) {
	h, ok := f.lanes.longest()
	if !ok {
		return time.Time{}, false
	}
	return f.grace.ends(h, now)
}

// release takes the records out of their lanes that have failed for too long
// while others got through. The caller holds f.mu.
func (f *forwarder) release(now time.Time) {
	for {
		at, ok := f.holdEnds(now)
		if !ok || at.After(now) {
			return
		}
		h, _ := f.lanes.longest()
		behind := h.lane.rest.len()
		f.lanes.split(h.lane, f.cutoff(now))
		f.meters.laneLeft.Inc()
		if unsaid, ok := f.notices.worth("lane left", now); ok {
			f.log.Log(f.bridge.ctx, slog.LevelWarn, "record keeps failing while others get through: it leaves its lane and is retried alone",
				"lane", h.lane.key, "seq", h.seq, "lane_hold", f.grace.limit, "behind_it", behind, "not_logged_before", unsaid)
		}
	}
}
