package bridge

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Class is what an attempt's outcome means for its record. Its values are
// metric labels.
type Class string

const (
	// Success is a 2xx answer: the record is done.
	Success Class = "success"
	// Retry is for a destination that is down, busy or out of reach: the record waits and is sent again.
	Retry Class = "retry"
	// Configuration is for a destination that answers, but not at this address
	// or not to us (a moved path, a wrong token): the record is kept, and sent
	// again slowly. If its path, query or headers are its own, the answer is about that
	// record, unless it is 401 or 407.
	Configuration Class = "configuration"
	// Poison is for a body that will not be taken: after three such answers the record is a dead letter.
	Poison Class = "poison"
	// Gone is for a destination that says it is gone for good (410), or
	// that what the record's own path, query or headers ask for is.
	Gone Class = "gone"
	// OwnSide is for what failed on our side before anything was sent, such as
	// a missing route: it is no attempt, and the record waits.
	OwnSide Class = "own_side"
)

var classes = []Class{Success, Retry, Configuration, Poison, Gone, OwnSide}

// Class tells what the outcome means.
func (r Response) Class() Class {
	if r.Own && r.Err != nil {
		return OwnSide
	}
	return Classify(r.Status, r.Err)
}

// Classify tells what an attempt's outcome means that was made. err is why there
// was no answer; a nil err with a status outside 200..499 is retried as well.
func Classify(status int, err error) Class {
	if err != nil {
		return Retry
	}
	switch status {
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusLocked,
		http.StatusTooEarly, http.StatusTooManyRequests:
		return Retry
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound,
		http.StatusMethodNotAllowed, http.StatusProxyAuthRequired:
		return Configuration
	case http.StatusGone:
		return Gone
	}
	switch status / 100 {
	case 2:
		return Success
	case 3: // redirects are never followed: a webhook that moved is a wrong url
		return Configuration
	case 4:
		return Poison
	}
	return Retry
}

// poisonAttempts is how many times a record is refused as poison before it is
// a dead letter: a receiver in the middle of a deploy may refuse what it takes
// a moment later.
const poisonAttempts = 3

// Schedule says how long a record waits between attempts. The zero value is
// the default schedule.
type Schedule struct {
	// Steps are the waits after the first, second, ... failed attempt, each
	// with full jitter: a random share of it, so that records which failed
	// together don't come back together.
	Steps []time.Duration
	// Min and Max bound the random wait once Steps are used up, and always
	// for configuration errors.
	Min, Max time.Duration
}

func (s Schedule) orDefault() Schedule {
	if s.Steps == nil {
		s.Steps = []time.Duration{
			500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second,
			10 * time.Second, 30 * time.Second, time.Minute,
		}
	}
	if s.Max == 0 {
		s.Min, s.Max = time.Minute, 5*time.Minute
	}
	return s
}

// wait is the time between the failed attempt of that number (1-based; those
// made so far if c is OwnSide) and the next. random yields values in [0, 1).
func (s Schedule) wait(c Class, attempt int, random func() float64) time.Duration {
	if c == OwnSide { // none was made: the wait after the last one, which doesn't grow
		attempt = max(attempt, 1)
	}
	if c != Configuration && attempt <= len(s.Steps) {
		return time.Duration(random() * float64(s.Steps[attempt-1]))
	}
	return s.Min + time.Duration(random()*float64(s.Max-s.Min))
}

func randomOrDefault(random func() float64) func() float64 {
	if random == nil {
		return rand.Float64
	}
	return random
}

// failureMost bounds what is told of a failure: an answer that is no HTTP stands
// in its error, up to 64 kB of it.
const failureMost = 512

// failureText says what went wrong in words that are the same for the same
// failure: the ephemeral port of a broken connection, say, is left out, since
// a failure is logged when its text changes.
func failureText(r Response) string {
	text := failureWhole(r)
	if len(text) > failureMost {
		text = strings.ToValidUTF8(text[:failureMost], "") + "..."
	}
	return text
}

func failureWhole(r Response) string {
	if r.Err == nil {
		if text := http.StatusText(r.Status); text != "" {
			return fmt.Sprintf("answered %d %s", r.Status, text)
		}
		return fmt.Sprintf("answered %d", r.Status)
	}
	if oe, ok := errors.AsType[*net.OpError](r.Err); ok {
		if oe.Timeout() {
			return oe.Op + " timed out"
		}
		if de, ok := errors.AsType[*net.DNSError](oe.Err); ok {
			return lookupText(de)
		}
		return oe.Err.Error()
	}
	if ne, ok := errors.AsType[net.Error](r.Err); ok && ne.Timeout() {
		return "timed out"
	}
	if errors.Is(r.Err, io.EOF) || errors.Is(r.Err, io.ErrUnexpectedEOF) {
		return "connection closed without an answer"
	}
	if ue, ok := errors.AsType[*url.Error](r.Err); ok {
		return ue.Err.Error()
	}
	return r.Err.Error()
}

// lookupText is the error's text without the port that the resolver has asked from.
func lookupText(e *net.DNSError) string {
	short := *e
	if strings.Contains(short.Err, "->") {
		short.Err = short.Err[strings.LastIndex(short.Err, ": ")+len(": "):]
	}
	return short.Error()
}
