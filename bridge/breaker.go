package bridge

import (
	"math/bits"
	"time"
)

const (
	// breakerRow failures in a row open the breaker, and so do half of the
	// last breakerWindow attempts.
	breakerRow    = 5
	breakerWindow = 20
	// poisonRow poison answers in a row over distinct lanes are a bad deploy
	// rather than bad records.
	poisonRow = 5
	// probeEvery is how soon a destination is tried again that fails, so that
	// its return is noticed within that time.
	probeEvery = 2 * time.Second
	// slowProbeEvery is for a destination that answers, but wants something
	// else of us (a token, another address): somebody has to act first.
	slowProbeEvery = 30 * time.Second
	// askedProbe is how soon after an attempt the next one is that somebody
	// asked for.
	askedProbe = time.Second
)

// breaker tells whether a destination is worth trying. Closed, everything that
// is due goes out. Open, one record at a time goes out as a probe, and what
// waits consumes no attempt. It is not safe for concurrent use.
type breaker struct {
	open     Class               // why it is open; "": closed
	last     Class               // of the last failure
	one      Class               // of the last answer, if that was about its record alone
	failures int                 // in a row to reach it, or to be let in
	window   uint32              // the last attempts, 1 bit each, set: failed
	refused  map[string]struct{} // lanes (seq for a record without one) with poison answers in a row
	started  time.Time           // the last attempt
	asked    bool                // an operator has changed something since that ended
	until    time.Time           // the destination asked for quiet until then (Retry-After)
}

// record takes an attempt's outcome in. who names the record's lane.
func (b *breaker) record(c Class, who string, quiet time.Time) {
	b.asked, b.one = false, ""
	if quiet.After(b.until) {
		b.until = quiet
	}
	if b.open == Poison && c != Success {
		return // no other failure shows that the bad deploy is over
	}
	if c != Poison {
		b.refused = nil
	}
	switch c {
	case Success:
		if b.open != "" {
			b.window = 0
		}
		b.open, b.last, b.failures, b.until = "", "", 0, time.Time{}
		b.window <<= 1
	case Poison: // it answers, so it is neither down nor gone
		b.open, b.failures, b.window, b.until = "", 0, 0, time.Time{}
		if b.refused == nil {
			b.refused = map[string]struct{}{}
		}
		if len(b.refused) < poisonRow {
			b.refused[who] = struct{}{}
		}
		if len(b.refused) == poisonRow {
			b.open, b.last = Poison, Poison
		}
	case Retry, Configuration, OwnSide:
		b.failures++
		b.window = b.window<<1 | 1
		b.last = c
		failed := bits.OnesCount32(b.window & (1<<breakerWindow - 1))
		if b.open != "" || b.failures >= breakerRow || failed >= breakerWindow/2 {
			b.open = c
		}
	}
}

// answered takes in a failure that is about its record alone: the destination is there,
// as with a poison answer, but however many of them there are, it is no bad deploy.
func (b *breaker) answered(c Class) {
	b.asked = false
	if b.open == Poison {
		return
	}
	b.open, b.last, b.one = "", "", c
	b.refused, b.failures, b.window, b.until = nil, 0, 0, time.Time{}
}

// failing is the class of the last failure, from the first of a row on; "": it doesn't fail.
func (b *breaker) failing() Class {
	switch {
	case b.open != "":
		return b.open
	case b.failures > 0:
		return b.last
	}
	return b.one
}

// probe tells when the next attempt is worth making although nothing is due;
// ok is false while the destination is not failing.
func (b *breaker) probe() (at time.Time, ok bool) {
	if b.open == "" && b.failures == 0 {
		return time.Time{}, false
	}
	every := probeEvery
	if b.last == Configuration {
		every = slowProbeEvery
	}
	if b.asked {
		every = askedProbe
	}
	at = b.started.Add(every)
	if b.until.After(at) {
		at = b.until
	}
	return at, true
}
