package bridge

import (
	"maps"
	"time"
)

const (
	// noticeAgain is how long a text that was logged is not logged again: an
	// outage of a day is some lines, not one per attempt.
	noticeAgain = 10 * time.Minute
	// noticeTexts bounds the lines within that time from a destination whose
	// failures never read the same.
	noticeTexts = 32
)

// notices decides which of a destination's failures are worth a log line: one
// whose text was not there lately. It is not safe for concurrent use.
type notices struct {
	said map[string]*notice
}

type notice struct {
	at     time.Time
	unsaid int // times since then
}

// worth reports whether to log text now, and if so how often it came up unsaid
// since the last time.
func (n *notices) worth(text string, now time.Time) (unsaid int, ok bool) {
	old := n.said[text]
	if old != nil && now.Sub(old.at) < noticeAgain {
		old.unsaid++
		return 0, false
	}
	if old == nil && len(n.said) >= noticeTexts {
		maps.DeleteFunc(n.said, func(_ string, o *notice) bool { return now.Sub(o.at) >= noticeAgain })
		if len(n.said) >= noticeTexts {
			return 0, false
		}
	}
	if old != nil {
		unsaid = old.unsaid
	}
	if n.said == nil {
		n.said = map[string]*notice{}
	}
	n.said[text] = &notice{at: now}
	return unsaid, true
}
