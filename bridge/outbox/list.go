package outbox

import (
	"bytes"
	"fmt"
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
	Rule        string
	Destination string
	OlderThan   time.Duration // since it was published
	Limit       int           // entries
}

// An Entry is a queued record or a dead letter.
type Entry struct {
	DeadLetter // of a queued record only the Record is set
	Dead       bool
	// Err says that the record is damaged; only Seq and Dead are set then.
	Err error
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
			entries, next, err := o.readEntries(&f, dead, from, now)
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

// readEntries reads some of what f selects, from a Seq on, and says where to go on; 0: that was all.
func (o *Outbox) readEntries(f *Filter, dead bool, from uint64, now time.Time) (entries []Entry, next uint64, err error) {
	bucket, size, read := recordsBucket, 0, 0
	if dead {
		bucket = deadBucket
	}
	err = o.st.View(func(v *store.View) error {
		return each(v, bucket, from, func(seq uint64, value []byte) error {
			if read == pageRecords || size > pageBytes {
				next = seq
				return errStop
			}
			read++
			e := Entry{Dead: dead}
			var err error
			if dead {
				e.DeadLetter, err = decodeDead(value)
			} else {
				e.Record, err = decodeRecord(value)
			}
			if err != nil {
				e = Entry{Dead: dead, Err: err}
			}
			if !f.selects(&e, now) {
				return nil
			}
			e.Seq = seq
			e.Body = bytes.Clone(e.Body)
			size += len(value)
			if state := v.Get(stateBucket, key(seq)); state != nil && !dead {
				s, err := decodeState(state)
				if err != nil {
					e = Entry{DeadLetter: DeadLetter{Record: Record{Seq: seq}}, Err: err}
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
		return dead && o.dead[e.Seq] || !dead && !o.queued(e.Seq)
	}), next, err
}

func (f *Filter) selects(e *Entry, now time.Time) bool {
	if e.Err != nil {
		return f.ID == "" && f.Rule == "" && f.Destination == "" && f.OlderThan == 0
	}
	return (f.ID == "" || f.ID == e.ID) &&
		(f.Rule == "" || f.Rule == e.Rule) &&
		(f.Destination == "" || f.Destination == e.Destination) &&
		(f.OlderThan == 0 || now.Sub(e.Published) > f.OlderThan)
}

// Requeue moves a dead letter back to the queue, as its newest record: with the same id, a Seq of its own, no attempts, and
// Queued set to now. It refuses with a *FullError if the destination's cap would be passed, and with ErrNotFound if there is
// no such dead letter.
func (o *Outbox) Requeue(seq uint64) (*Commit, error) {
	value, err := o.claimDead(seq)
	if err != nil {
		return nil, err
	}
	d, err := decodeDead(value)
	if err != nil {
		o.unclaimDead(seq)
		return nil, fmt.Errorf("requeue dead letter %d of %s: %w", seq, o.st.Path(), err)
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

// Purge deletes a queued record or a dead letter. It is as lazy as Remove. The commit's error is ErrNotFound if there is
// neither.
func (o *Outbox) Purge(seq uint64) *Commit {
	o.mu.Lock()
	if o.queued(seq) {
		defer o.mu.Unlock()
		return o.leave(seq, nil)
	}
	o.mu.Unlock()
	value, err := o.claimDead(seq)
	if err != nil {
		return store.Completed(err)
	}
	name, err := deadDestination(value)
	if err != nil {
		o.unclaimDead(seq)
		return store.Completed(fmt.Errorf("purge dead letter %d of %s: %w", seq, o.st.Path(), err))
	}
	return o.st.Do(store.Request{
		Ops:  []store.Op{{Bucket: deadBucket, Key: key(seq)}},
		Lazy: true,
		Applied: func(err error) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.exhumed(err, seq, name, recordSize(value))
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
