package bridge

import (
	"time"

	"golang.org/x/time/rate"
)

// Rate is N attempts in every Per; N 0 is no bound.
type Rate struct {
	N   int
	Per time.Duration
}

// burstTime is how much of a rate may go out at once after a quiet time. Less,
// and a timer that is late would cost attempts at high rates; more, and a
// destination that counts by the second would see too many.
const burstTime = 100 * time.Millisecond

// limiter says when the next attempt may start. It does not wait itself, and is
// not safe for concurrent use. The zero value is no bound.
type limiter struct {
	rate   Rate
	bucket *rate.Limiter // nil: no bound
	// turn is when the next attempt may start; zero: nobody has asked since the
	// last one. It is asked for once, and kept, so that looking at it now and
	// when the timer fires can't answer differently.
	turn time.Time
}

// define sets the rate. A rate that did not change is not started afresh.
func (l *limiter) define(r Rate) {
	if r == l.rate {
		return
	}
	*l = limiter{rate: r}
	if r.N > 0 && r.Per > 0 {
		burst := max(1, int(float64(r.N)*burstTime.Seconds()/r.Per.Seconds()))
		l.bucket = rate.NewLimiter(rate.Limit(float64(r.N)/r.Per.Seconds()), burst)
	}
}

// allows reports whether an attempt may start at now. The caller asks when
// there is one to make, and tells when it starts.
func (l *limiter) allows(now time.Time) bool {
	if l.bucket == nil {
		return true
	}
	if l.turn.IsZero() {
		l.turn = now.Add(l.bucket.ReserveN(now, 1).DelayFrom(now))
	}
	return !now.Before(l.turn)
}

// started uses the turn up that allows has granted.
func (l *limiter) started() { l.turn = time.Time{} }

// waits tells when the turn comes that was asked for; ok is false if it has come
// or nobody has asked.
func (l *limiter) waits(now time.Time) (turn time.Time, ok bool) {
	return l.turn, l.turn.After(now)
}
