package history

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// A record is what the attempts of one webhook-id and trace have in common: one publish's delivery.
type record struct {
	message  *message
	trace    string
	id       string
	attempts []*Attempt
	rank     int // among the records of its lane
}

type recordKey struct{ id, trace string }

type check struct {
	log     *Log
	found   []Violation
	came    []*Attempt // by run, then by arrival
	records []*record  // in the order in which they came first
	byKey   map[recordKey]*record
	byID    map[string]*record // one of them, if there are several
	traced  map[string]bool    // by marker: whether its copies have traces
}

func newCheck(l *Log) *check {
	c := &check{
		log: l, came: slices.Clone(l.attempts), byKey: make(map[recordKey]*record), byID: make(map[string]*record),
		traced: make(map[string]bool, len(l.messages)),
	}
	slices.SortStableFunc(c.came, func(a, b *Attempt) int { return cmp.Compare(a.Run, b.Run) })
	for marker, m := range l.messages {
		c.traced[marker] = m.traced()
	}
	return c
}

func (c *check) report(rule Rule, format string, args ...any) {
	c.found = append(c.found, Violation{rule, fmt.Sprintf(format, args...)})
}

// identify makes records of the attempts, and checks each for itself and against the others of its record.
func (c *check) identify() {
	for _, in := range c.log.lanes {
		in.records = nil
	}
	spans := make(map[string]*Attempt)
	for _, a := range c.came {
		a.late = false
		m := c.log.messages[a.Marker]
		switch {
		case m == nil:
			c.report(NotPublished, "%v", a)
			continue
		case !m.Matches:
			c.report(NotMatching, "%v", a)
			continue
		case a.ID == "":
			c.report(Identity, "%v: no webhook-id", a)
			continue
		case m.ID != "" && a.ID != m.ID:
			c.report(Identity, "%v: the action sets %s", a, m.ID)
			continue
		}
		owner := c.byID[a.ID]
		if owner != nil && owner.message != m {
			c.report(Identity, "%v: the id is that of %s", a, owner.message.Marker)
			continue
		}
		trace := ""
		if c.traced[a.Marker] {
			trace = a.Trace
			if !slices.ContainsFunc(m.copies, func(cp *Copy) bool { return cp.trace == trace }) {
				c.report(Trace, "%v: trace %q is of none of its publishes", a, a.Trace)
				continue
			}
		}
		key := recordKey{a.ID, trace}
		r := c.byKey[key]
		if r == nil {
			if owner != nil && m.ID == "" {
				c.report(Trace, "%v: came in trace %q before", a, owner.trace)
				continue
			}
			in := c.log.lanes[m.Lane]
			r = &record{message: m, trace: trace, id: a.ID, rank: len(in.records)}
			c.byKey[key], c.byID[a.ID] = r, r
			c.records = append(c.records, r)
			in.records = append(in.records, r)
		}
		if a.SW8 != "" {
			if b := spans[a.SW8]; b != nil && (b.Run != a.Run || b.ID != a.ID || b.Attempt != a.Attempt) {
				c.report(Trace, "%v: has the sw8 of %v", a, b)
			}
			spans[a.SW8] = a
		}
		c.follow(r, a)
		r.attempts = append(r.attempts, a)
	}
}

// follow checks an attempt against those of its record before it.
func (c *check) follow(r *record, a *Attempt) {
	if a.Attempt < 1 {
		c.report(Content, "%v: attempts count from 1", a)
	}
	if len(r.attempts) == 0 {
		return
	}
	if first := r.attempts[0]; first.Body != a.Body {
		c.report(Content, "%v: body %s, was %s", a, a.Body, first.Body)
	}
	for _, b := range r.attempts {
		if b.Run != a.Run {
			continue
		}
		// A request may be on its way for longer than the broker waits for its answer.
		a.late = a.late || a.Attempt < b.Attempt
		// Repeated by the transport it has the same span, see DESIGN.md; that is checked by the spans.
		if a.Attempt == b.Attempt && a.SW8 != b.SW8 {
			c.report(Content, "%v: the number was used before", a)
		}
	}
}

// debt is what copies that can't be told apart are owed together.
type debt struct {
	origin
	missing int
}

// owed returns the origins that have acknowledged copies without a delivery, in order of their markers.
func (c *check) owed() []debt {
	done := make(map[origin]int)
	for _, r := range c.records {
		if c.log.dead[r.id] || slices.ContainsFunc(r.attempts, (*Attempt).taken) {
			done[origin{r.message.Marker, r.trace}]++
		}
	}
	var all []debt
	for _, marker := range sorted(c.log.messages) {
		m := c.log.messages[marker]
		if !m.Matches {
			continue
		}
		acknowledged := make(map[string]int) // by trace
		for _, cp := range m.copies {
			if cp.acknowledged {
				acknowledged[cp.trace]++
			}
		}
		for _, trace := range sorted(acknowledged) {
			o := origin{marker, trace}
			if n := acknowledged[trace] - done[o]; n > 0 {
				all = append(all, debt{o, n})
			}
		}
	}
	return all
}

func (a *Attempt) taken() bool { return a.answer == Taken || a.answer == Doubtful }

// complete checks that there is a record for each acknowledged copy, and no more records than copies.
func (c *check) complete() {
	for _, o := range c.owed() {
		c.report(Lost, "%s, trace %q: %d acknowledged publishes without a delivery that was taken", o.marker, o.trace, o.missing)
	}
	sent := make(map[origin]int)
	refused := make(map[origin]int)
	for marker, m := range c.log.messages {
		for _, cp := range m.copies {
			sent[origin{marker, cp.trace}]++
			if cp.refused {
				refused[origin{marker, cp.trace}]++
			}
		}
	}
	came := make(map[origin]int)
	for _, r := range c.records {
		o := origin{r.message.Marker, r.trace}
		switch came[o]++; {
		case came[o] > sent[o]:
			c.report(Identity, "%v: record %d of %d publishes", r.attempts[0], came[o], sent[o])
		case came[o] > sent[o]-refused[o]:
			c.report(Refused, "%v", r.attempts[0])
		}
	}
}

// order checks that the records of a lane came first in the order of their publishes. What wasn't acknowledged may have
// no record, so which copy a record is of is only known in the end: positions are all that are still possible.
func (c *check) order(name string, in *lane) {
	missing := make(map[origin]bool)
	for _, o := range c.owed() {
		missing[o.origin] = true
	}
	var copies []*Copy
	for _, cp := range in.copies {
		if cp.message.Matches {
			copies = append(copies, cp)
		}
	}
	skippable := func(cp *Copy) bool { return !cp.acknowledged || missing[origin{cp.message.Marker, cp.trace}] }
	positions := []int{0}
	for i, r := range in.records {
		next := make(map[int]bool)
		for _, p := range positions {
			for q := p; q < len(copies); q++ {
				if copies[q].message == r.message && copies[q].trace == r.trace {
					next[q+1] = true
				}
				if !skippable(copies[q]) {
					break
				}
			}
		}
		if len(next) == 0 {
			before := "the first"
			if i > 0 {
				before = "after " + in.records[i-1].message.Marker
			}
			c.report(Order, "lane %s: %v: came %s, which is not the order of the publishes", name, r.attempts[0], before)
			return // what follows is compared with a wrong place
		}
		positions = sorted(next)
	}
}

// turns checks that each record of a lane waited for the one before it, and came again only where it may.
func (c *check) turns(name string, in *lane) {
	var last *record
	run, floor := 0, 0 // the run under way, and the first rank that came in it
	for _, a := range c.came {
		r := c.byKey[c.key(a)]
		if r == nil || a.late || c.log.lanes[r.message.Lane] != in || !slices.Contains(r.attempts, a) {
			continue
		}
		from := 0 // everything from here to r must be done with
		switch {
		case last == nil || a.Run != run:
			// A restart goes on where the removals on disk end, which are in the order of the lane: never before the place where
			// the last one went on.
			if last != nil && r.rank < floor {
				c.report(Duplicate, "lane %s: %v: run %d went on behind it", name, a, run)
			}
			run, floor = a.Run, r.rank
		case r.rank < last.rank:
			c.report(Order, "lane %s: %v: came again behind %s", name, a, last.message.Marker)
			continue
		default:
			from = last.rank
		}
		for _, b := range in.records[from:r.rank] {
			if !b.done(a) {
				c.report(Order, "lane %s: %v: came before %s was done with", name, a, b.message.Marker)
				break
			}
			// Since this run went on, each one had its turn in it; dead letters alone are not there any more.
			if b != last && b.rank >= floor && !b.buried(a) {
				c.report(Order, "lane %s: %v: came after %s, and %s between them did not", name, a, last.message.Marker, b.message.Marker)
				break
			}
		}
		if b := c.takenBefore(r, a); b != nil {
			c.report(Duplicate, "lane %s: %v: was taken as attempt %d of run %d, and there was no crash since", name, a, b.Attempt, b.Run)
		}
		last = r
	}
}

// before reports whether an attempt was answered before another one came, or its run was over.
func (a *Attempt) before(b *Attempt) bool {
	return a.Run < b.Run || a.Run == b.Run && a.answered > 0 && a.answered < b.at
}

// done reports whether a record was taken, or may have become a dead letter, before an attempt of another came.
func (r *record) done(a *Attempt) bool {
	return r.buried(a) || slices.ContainsFunc(r.attempts, func(b *Attempt) bool { return b.taken() && b.before(a) })
}

// buried reports whether a record may have become a dead letter before an attempt came.
func (r *record) buried(a *Attempt) bool {
	poison := 0
	for _, b := range r.attempts {
		if !b.before(a) {
			continue
		}
		switch b.answer {
		case Gone:
			return true
		case Poison:
			poison++
		}
	}
	return poison >= poisons
}

// takenBefore returns the attempt after which a record should not have come again.
func (c *check) takenBefore(r *record, a *Attempt) *Attempt {
	for _, b := range r.attempts {
		if b.answer != Taken || b == a || b.late || !b.before(a) {
			continue
		}
		crashed := false
		for run := b.Run; run < a.Run; run++ {
			crashed = crashed || c.log.crashed[run]
		}
		if !crashed {
			return b
		}
	}
	return nil
}

func (c *check) key(a *Attempt) recordKey {
	if c.traced[a.Marker] {
		return recordKey{a.ID, a.Trace}
	}
	return recordKey{a.ID, ""}
}

func sorted[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
