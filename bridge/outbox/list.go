package outbox

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/throughline-mqtt/throughline/store"
)

// pageBytes bounds what List holds in memory at a time, beside one entry.
const pageBytes = 4 << 20

// Which of the two places a filter looks into.
type Which int

// Where a filter looks.
const (
	QueuedAndDead Which = iota
	QueuedOnly
	DeadOnly
)

// A Filter selects entries. A field that has its zero value selects all.
type Filter struct {
	Which       Which
	ID          string
	IDs         []string // any of these
	Rule        string
	Destination string
	OlderThan   time.Duration // since it was published
	Limit       int           // entries
}

// An Entry is a queued record or a dead letter.
type Entry struct {
	DeadLetter // of a queued record only the Record is set
	Dead       bool
	// Err says that the record is damaged; only Seq, Dead and Destination are set then.
	Err error
}

// A Cursor is how far a walk over the entries has come. It outlasts a restart.
type Cursor struct {
	Dead        bool      // it is among the dead letters, and through with what is queued
	From, Until uint64    // the Seqs that are left, there
	At          time.Time // the time that ages are counted to
}

// Begin returns the cursor of a walk over what is stored now: what is appended or redriven from now on is not met.
func (o *Outbox) Begin() Cursor {
	o.mu.Lock()
	defer o.mu.Unlock()
	return Cursor{Until: o.seq, At: o.o.Now()}
}

// Select reads some of what f selects from c on, n entries at the most and without their bodies, in the order of List, and
// says where to go on; more is false at the end. There may be more although nothing was found: what one call reads is
// bounded. But for the last of them the entries have no more than an eighth of MaxUnflushed together, so that they may all
// be redriven in one flush. f.Limit doesn't count. An error means that the store can't be read.
func (o *Outbox) Select(f Filter, c Cursor, n int) (found []Entry, next Cursor, more bool, err error) {
	if f.Which == DeadOnly && !c.Dead {
		c.Dead, c.From = true, 0
	}
	found, from, err := o.readEntries(page{filter: &f, dead: c.Dead, from: c.From, until: c.Until, now: c.At, most: n, bodiless: true,
		bytes: int(min(pageBytes, o.o.MaxUnflushed/8))})
	if err != nil {
		return nil, c, false, fmt.Errorf("read outbox in %s: %w", o.st.Path(), err)
	}
	next = c
	switch {
	case from > 0:
		next.From = from
	case c.Dead || f.Which == QueuedOnly:
		return found, next, false, nil
	default:
		next.Dead, next.From = true, 0
	}
	return found, next, true, nil
}

// List calls fn with the queued records that f selects, and then with the dead letters, each in the order of Seq, until fn
// returns false. It reads some at a time: what changes meanwhile may be seen or not. fn owns the entry and may call the
// outbox. A filter by anything but place leaves out damaged records. An error means that the store can't be read.
func (o *Outbox) List(f Filter, fn func(Entry) bool) error {
	now := o.o.Now()
	left := f.Limit
	for _, dead := range []bool{false, true} {
		if dead && f.Which == QueuedOnly || !dead && f.Which == DeadOnly {
			continue
		}
		for from, more := uint64(0), true; more; {
			entries, next, err := o.readEntries(page{filter: &f, dead: dead, from: from, until: math.MaxUint64, now: now, most: pageRecords, bytes: pageBytes})
			if err != nil {
				return fmt.Errorf("list outbox in %s: %w", o.st.Path(), err)
			}
			for _, e := range entries {
				if !fn(e) {
					return nil
				}
				if left--; left == 0 {
					return nil
				}
			}
			from, more = next, next > 0
		}
	}
	return nil
}

// page says what readEntries reads.
type page struct {
	filter      *Filter
	dead        bool
	from, until uint64 // Seqs
	now         time.Time
	most, bytes int // entries, and their bytes, which the last one may pass
	bodiless    bool
}

// readEntries reads some of what p asks for, and says where to go on; 0: that was all.
func (o *Outbox) readEntries(p page) (entries []Entry, next uint64, err error) {
	bucket, size, read := recordsBucket, 0, 0
	if p.dead {
		bucket = deadBucket
	}
	err = o.st.View(func(v *store.View) error {
		return each(v, bucket, p.from, func(seq uint64, value []byte) error {
			switch {
			case seq > p.until:
				return errStop
			case read == pageRecords || size > p.bytes || len(entries) == p.most:
				next = seq
				return errStop
			}
			read++
			e := decodeEntry(value, p.dead)
			if !p.filter.selects(&e, p.now) {
				return nil
			}
			e.Seq = seq
			size += len(value)
			if p.bodiless {
				e.Body = nil
			}
			e.Body = bytes.Clone(e.Body)
			if state := v.Get(stateBucket, key(seq)); state != nil && !p.dead && e.Err == nil {
				s, err := decodeState(state)
				if err != nil {
					e = Entry{DeadLetter: DeadLetter{Record: Record{Seq: seq, Destination: e.Destination}}, Err: err}
				}
				e.Attempts, e.Next, e.LastError = s.attempts, s.next, s.lastError
			}
			entries = append(entries, e)
			return nil
		})
	})
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.DeleteFunc(entries, func(e Entry) bool {
		return p.dead && o.dead[e.Seq] || !p.dead && !o.queued(e.Seq)
	}), next, err
}

// decodeEntry decodes all but the delivery state. The slices of the entry are parts of value.
func decodeEntry(value []byte, dead bool) Entry {
	e := Entry{Dead: dead}
	if dead {
		e.DeadLetter, e.Err = decodeDead(value)
	} else {
		e.Record, e.Err = decodeRecord(value)
	}
	if e.Err == nil {
		return e
	}
	e.DeadLetter = DeadLetter{}
	if dead {
		e.Destination, _ = deadDestination(value) // "" if it can't be told
	} else if h, err := decodeRefHeader(value); err == nil {
		e.Destination = string(h.destination)
	}
	return e
}

func (f *Filter) selects(e *Entry, now time.Time) bool {
	if e.Err != nil {
		return f.ID == "" && f.IDs == nil && f.Rule == "" && f.Destination == "" && f.OlderThan == 0
	}
	return (f.ID == "" || f.ID == e.ID) &&
		(f.IDs == nil || slices.Contains(f.IDs, e.ID)) &&
		(f.Rule == "" || f.Rule == e.Rule) &&
		(f.Destination == "" || f.Destination == e.Destination) &&
		(f.OlderThan == 0 || now.Sub(e.Published) > f.OlderThan)
}

// Requeue moves a dead letter back to the queue, as its newest record: with the same id, a Seq of its own, no attempts, and
// Queued set to now. It refuses with a *FullError if the destination's cap would be passed, with ErrNotFound if there is
// no such dead letter, and with ErrDamaged if it can't be read.
func (o *Outbox) Requeue(seq uint64) (*Commit, error) {
	value, err := o.claimDead(seq)
	if err != nil {
		return nil, err
	}
	d, err := decodeDead(value)
	if err != nil {
		o.unclaimDead(seq)
		return nil, fmt.Errorf("requeue dead letter %d of %s: %w: %w", seq, o.st.Path(), ErrDamaged, err)
	}
	r := d.Record
	r.Queued = o.o.Now()
	r.Attempts = 0
	c, err := o.append([]Record{r}, [][]byte{encodeRecord(&r)}, &redriven{seq: seq, size: recordSize(value)})
	if err != nil {
		o.unclaimDead(seq)
	}
	return c, err
}

// Purge deletes a queued record, or a dead letter if dead is set, for good. Unlike Remove it does not wait for a flush that
// is needed anyway. The commit's error is ErrNotFound if there is no such record, or no such dead letter, and ErrDamaged if
// it can't be told whose dead letter it is. With another error a dead letter is still there; so is a queued record if Purge has
// returned with it, and if it comes later, it is as with Remove.
func (o *Outbox) Purge(seq uint64, dead bool) *Commit {
	if !dead {
		o.mu.Lock()
		defer o.mu.Unlock()
		if !o.queued(seq) {
			return store.Completed(ErrNotFound)
		}
		return o.leave(seq, leaving{purged: true})
	}
	value, err := o.claimDead(seq)
	if err != nil {
		return store.Completed(err)
	}
	name, err := deadDestination(value)
	if err != nil {
		o.unclaimDead(seq)
		return store.Completed(fmt.Errorf("purge dead letter %d of %s: %w: %w", seq, o.st.Path(), ErrDamaged, err))
	}
	return o.st.Do(store.Request{
		Ops: []store.Op{{Bucket: deadBucket, Key: key(seq)}},
		Applied: func(err error) {
			o.mu.Lock()
			defer o.unlock()
			o.exhumed(err, seq, name, recordSize(value))
			if err == nil {
				o.names[name].purgedDead++
			}
			o.noticeSpace()
		},
	})
}

// claimDead reads a dead letter that nobody else may purge or redrive from now on.
func (o *Outbox) claimDead(seq uint64) ([]byte, error) {
	o.mu.Lock()
	claimed := o.dead[seq]
	o.dead[seq] = true
	o.mu.Unlock()
	if claimed {
		return nil, ErrNotFound
	}
	var value []byte
	err := o.st.View(func(v *store.View) error {
		value = bytes.Clone(v.Get(deadBucket, key(seq)))
		return nil
	})
	if err == nil && value == nil {
		err = ErrNotFound
	}
	if err != nil {
		o.unclaimDead(seq)
	}
	return value, err
}

func (o *Outbox) unclaimDead(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.dead, seq)
}

// exhumed is what becomes of a claimed dead letter when the flush that deletes it has ended.
func (o *Outbox) exhumed(err error, seq uint64, destination string, size int64) {
	delete(o.dead, seq)
	if err == nil {
		o.names[destination].exhume(size)
		o.total.exhume(size)
	}
}
