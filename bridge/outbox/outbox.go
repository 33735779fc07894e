// Package outbox is the durable queue of deliveries: records are appended in groups, wait on disk until they are removed,
// and move to the dead letters when they can't be delivered. It bounds what may wait, in bytes.
//
// It does not know what a destination is but a name to count by, nor when or how a record is sent; a record's body and trace
// context are opaque to it. Records that wait are on disk alone: memory holds some 35 bytes for each, and some megabytes of
// the newest.
package outbox

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"
	"unique"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/store"
)

const (
	recordsBucket = "outbox.records" // seq -> record
	stateBucket   = "outbox.state"   // seq -> attempts, next attempt, last error; only after a failed attempt
	deadBucket    = "outbox.dead"    // seq -> dead letter
	metaBucket    = "outbox.meta"    // seqKey -> the highest Seq that may have been used; pauseKey and a destination -> its pause

	seqKey = "seq"
	// seqBlock is how many Seqs are set aside at a time, so that the mark costs nothing per record. The rest of a block
	// is skipped when the outbox is opened again.
	seqBlock = 1 << 16

	// overhead is what a record costs in a page beside its value: key and page element.
	overhead = 8 + 16

	defaultUnflushed = 64 << 20
	cacheBytes       = 16 << 20

	// maxRecord is below what a value in the store and the 32 bits that count it can take.
	maxRecord = 1 << 30

	// maxLastError and maxResponse bound what a destination can make us keep.
	maxLastError = 1 << 10
	maxResponse  = 4 << 10

	// pageRecords is how many records are read in one view, which stops the writer if the file must grow meanwhile.
	pageRecords = 1024
)

// Buckets are the buckets that an outbox needs in its store.
func Buckets() []string { return []string{recordsBucket, stateBucket, deadBucket, metaBucket} }

// Commit is done when what a call has changed is on disk.
type Commit = store.Commit

// A Record is one delivery that is owed.
type Record struct {
	Seq         uint64 // assigned by Append; ascends in the order of appends, never reused
	ID          string // webhook-id, the same in every attempt; empty: Append makes a ULID
	Rule        string
	Generation  string // of the rule set
	Destination string // never empty
	Lane        string // with Ordered: records of the same lane are sent one after the other
	Ordered     bool   // false: no lane
	Body        []byte
	// Path, Query and Headers are what the request has beside what its destination's definition says: nothing, mostly.
	Path, Query string // escaped
	Headers     []Header
	Topic       string
	ClientID    string
	Published   time.Time // zero: Append sets it to now
	Queued      time.Time // when it was appended, or redriven from the dead letters; set by Append

	SW8         string // the EntrySpan's context, encoded
	Correlation string
	TraceID     string

	// Delivery state, changed by Reschedule; Append ignores it.
	Attempts  int
	Next      time.Time // not before; zero: at once
	LastError string

	// Dropped: Append didn't store it, since its destination is full and has Cap.Drop. Set by Append.
	Dropped bool
}

// A Header is one that goes with a record. A NUL in its value, which no header can have, is the place of a secret, so that none
// is on disk; whoever sends the record knows which.
type Header struct{ Name, Value string }

// A Ref is what is needed of a record to schedule it.
type Ref struct {
	Seq               uint64
	Destination, Lane string // equal ones share their memory, save lanes of Append, which are the caller's
	Ordered           bool
	Published, Queued time.Time
	Next              time.Time
	Attempts          int
	Size              int64 // bytes that count against the caps
}

// A DeadLetter is a record that was given up.
type DeadLetter struct {
	Record
	Reason   string
	Buried   time.Time // zero: Bury sets it to now
	Status   int       // of the last response; 0: there was none
	Response []byte    // the first 4 kB of the last response's body
}

var (
	// ErrNotFound: no such record is queued, or no such dead letter kept.
	ErrNotFound = errors.New("no such record in the outbox")
	// ErrFull is what every *FullError is.
	ErrFull = errors.New("outbox is full")
	// ErrDamaged: a dead letter can't be read, and nothing was done to it.
	ErrDamaged = errors.New("damaged dead letter")
)

// A FullError says which cap kept records from being appended, or that the disk is nearly full.
type FullError struct {
	Destination string // whose cap; empty: that of the whole outbox
	Limit       int64  // in bytes
	Used        int64  // in bytes, before the refused records
	Wanted      int64  // in bytes, by the refused records; more than Limit: they never fit
	Dead        int64  // how much of Used are dead letters
	// Unflushed: it is not the disk space; more than Limit is waiting to be flushed because the disk is slow.
	Unflushed bool
	// Disk: it is no cap; Limit is to stay free on the file system, and Free is.
	Disk bool
	Free int64 // in bytes, when it was looked at last
}

func (e *FullError) Error() string {
	wanted := fmt.Sprintf("%d more are wanted", e.Wanted)
	if e.Wanted > e.Limit {
		wanted += ", which never fit"
	}
	switch {
	case e.Unflushed:
		return fmt.Sprintf("outbox is full: %d of %d bytes wait to be flushed, the disk is too slow", e.Used, e.Limit)
	case e.Disk:
		return fmt.Sprintf("outbox is full: %d bytes are free on the disk, where %d are to stay free", e.Free, e.Limit)
	case e.Destination != "":
		return fmt.Sprintf("outbox is full: destination %q uses %d of its %d bytes, %s", e.Destination, e.Used, e.Limit, wanted)
	case e.Dead > 0:
		return fmt.Sprintf("outbox is full: %d of %d bytes used, %d of them by dead letters, %s", e.Used, e.Limit, e.Dead, wanted)
	}
	return fmt.Sprintf("outbox is full: %d of %d bytes used, %s", e.Used, e.Limit, wanted)
}

// Is reports whether target is ErrFull.
func (e *FullError) Is(target error) bool { return target == ErrFull }

// Options bound an outbox. The zero value is usable and has no caps.
type Options struct {
	// MaxBytes caps queued records and dead letters together; 0: no cap. Dead letters count since they are on disk, but
	// burying is never refused.
	MaxBytes int64
	// Caps are those of the destinations until SetCaps is called.
	Caps Caps
	// MaxUnflushed caps what waits in memory for a flush; 0: 64 MiB.
	MaxUnflushed int64
	// Logger gets what isn't returned. Nil: none.
	Logger *slog.Logger
	// Registerer gets the outbox's metrics. Nil: none.
	Registerer prometheus.Registerer
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// An Outbox is the queue in one store. All its methods may be used concurrently.
type Outbox struct {
	st    *store.Store
	o     Options
	space chan struct{}
	met   *metrics

	idsMu   sync.Mutex
	entropy *ulid.MonotonicEntropy

	mu        sync.Mutex
	caps      Caps
	seq       uint64          // last assigned
	reserved  uint64          // up to here the store knows that they may be in use
	committed uint64          // the highest that has been flushed
	items     index           // queued and flushed
	dead      map[uint64]bool // dead letters that are being purged or redriven
	total     account
	unflushed int64
	behind    bool // an append was refused because of unflushed, and that is still high
	names     map[string]*account
	accounts  []*account // by item.account
	cache     cache
	pauses    map[string]Pause
	// afterwards is what unlock does.
	afterwards []func()
	undone     []undone // to be made again once the store takes writes
	redoing    int      // those of them that are under way
	disk       headroom

	watcher func([]Ref)
	// replaying holds what was committed while Watch is still busy with what is stored; nil: it isn't.
	replaying []Ref
	live      bool // replay is over: commits go to watcher
}

// item is what memory holds of a queued record, beside its Seq: 16 bytes, since there may be millions.
type item struct {
	queued  int64 // Unix milliseconds
	size    uint32
	account uint16
	// leaving: Remove, Bury or Purge was called, and isn't flushed yet.
	leaving bool
	// tried: the store has a delivery state for it.
	tried bool
}

// Open opens the outbox in st, whose Options.Buckets must have had Buckets. It reads every record once, though not its
// body. A record that is damaged, or of a newer version, is an error: nothing is skipped.
func Open(st *store.Store, o Options) (*Outbox, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxUnflushed <= 0 {
		o.MaxUnflushed = defaultUnflushed
	}
	ob := &Outbox{
		st:      st,
		o:       o,
		caps:    o.Caps,
		space:   make(chan struct{}, 1),
		entropy: newEntropy(),
		dead:    make(map[uint64]bool),
		names:   make(map[string]*account),
		pauses:  make(map[string]Pause),
		cache:   cache{max: cacheBytes, values: make(map[uint64][]byte)},
		disk:    headroom{left: math.MaxInt64},
	}
	if err := ob.restore(); err != nil {
		return nil, fmt.Errorf("open outbox in %s: %w", st.Path(), err)
	}
	var err error
	if ob.met, err = newMetrics(o.Registerer, ob); err != nil {
		return nil, fmt.Errorf("open outbox: register metrics: %w", err)
	}
	st.OnReopen(ob.reopened)
	return ob, nil
}

// restore counts what is stored.
func (o *Outbox) restore() error {
	return o.st.View(func(v *store.View) error {
		if mark := v.Get(metaBucket, []byte(seqKey)); len(mark) == 8 {
			o.reserved = binary.BigEndian.Uint64(mark)
		} else if mark != nil {
			return fmt.Errorf("sequence mark: %w", errDamaged)
		}
		o.seq = o.reserved
		if err := o.restorePauses(v); err != nil {
			return err
		}

		err := each(v, recordsBucket, 0, func(seq uint64, value []byte) error {
			h, err := decodeRefHeader(value)
			if err != nil {
				return err
			}
			a, err := o.account(string(h.destination))
			if err != nil {
				return err
			}
			o.seq, o.committed = max(o.seq, seq), seq
			a.bytes += recordSize(value)
			o.total.bytes += recordSize(value)
			o.queue(seq, a, recordSize(value), h.queued)
			return nil
		})
		if err != nil {
			return err
		}
		err = each(v, stateBucket, 0, func(seq uint64, value []byte) error {
			if _, err := decodeState(value); err != nil {
				return err
			}
			if it, ok := o.items.of(seq); ok {
				it.tried = true
				o.items.set(seq, it)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return each(v, deadBucket, 0, func(seq uint64, value []byte) error {
			name, err := deadDestination(value)
			if err != nil {
				return err
			}
			a, err := o.account(name)
			if err != nil {
				return err
			}
			o.seq = max(o.seq, seq)
			a.bury(recordSize(value))
			o.total.bury(recordSize(value))
			return nil
		})
	})
}

// errStop ends each without an error.
var errStop = errors.New("stop")

// each calls fn for the entries of a bucket from a Seq on, until it returns an error, to which it adds what it is about.
func each(v *store.View, bucket string, from uint64, fn func(seq uint64, value []byte) error) error {
	var err error
	v.ForEach(bucket, key(from), func(k, value []byte) bool {
		if len(k) != 8 {
			err = fmt.Errorf("%s: key %x: %w", bucket, k, errDamaged)
			return false
		}
		seq := binary.BigEndian.Uint64(k)
		if err = fn(seq, value); err != nil && !errors.Is(err, errStop) {
			err = fmt.Errorf("%s: record %d: %w", bucket, seq, err)
		}
		return err == nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

func key(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

func recordSize(value []byte) int64 { return int64(len(value)) + overhead }

// account returns the account of a destination, opening it if need be.
func (o *Outbox) account(name string) (*account, error) {
	if a, ok := o.names[name]; ok {
		return a, nil
	}
	if len(o.accounts) > math.MaxUint16 {
		return nil, fmt.Errorf("more than %d destinations", math.MaxUint16)
	}
	a := &account{name: unique.Make(name).Value(), index: uint16(len(o.accounts))}
	o.names[a.name] = a
	o.accounts = append(o.accounts, a)
	return a, nil
}

// queue takes a flushed record, whose bytes are counted already, into the queue.
func (o *Outbox) queue(seq uint64, a *account, size int64, queued time.Time) {
	o.items.set(seq, item{queued: queued.UnixMilli(), size: uint32(size), account: a.index})
	a.records++
	o.total.records++
	a.order.push(seq)
}

// Append stores records, all or none, but for those that are Dropped. It fills in their Seq, Queued, and ID and Published
// where those are not set, and returns at once with the commit that tells when they are on disk. It refuses with a *FullError
// if a cap would be passed and dropping what may be dropped makes no room, and with the store's error while that takes no
// writes. If a cap of the whole outbox would be passed, all that may be dropped is. Records whose commit has failed are
// nowhere: they may be appended again. Bodies may be changed again when it has returned.
func (o *Outbox) Append(recs []Record) (*Commit, error) {
	if len(recs) == 0 {
		return store.Completed(nil), nil
	}
	now := o.o.Now()
	values := make([][]byte, len(recs))
	for i := range recs {
		r := &recs[i]
		if r.Destination == "" {
			return nil, errors.New("append to outbox: record without destination")
		}
		if r.ID == "" {
			var err error
			if r.ID, err = o.newID(now); err != nil {
				return nil, fmt.Errorf("append to outbox: make id: %w", err)
			}
		}
		if r.Published.IsZero() {
			r.Published = now
		}
		r.Queued = now
		r.Attempts, r.Next, r.LastError = 0, time.Time{}, ""
		if values[i] = encodeRecord(r); len(values[i]) > maxRecord {
			return nil, fmt.Errorf("append to outbox: record of %d bytes; up to %d are possible", len(values[i]), maxRecord)
		}
	}
	return o.append(recs, values, nil)
}

// newEntropy reads ahead: an id would cost a system call otherwise.
func newEntropy() *ulid.MonotonicEntropy { return ulid.Monotonic(bufio.NewReader(rand.Reader), 0) }

func (o *Outbox) newID(now time.Time) (string, error) {
	o.idsMu.Lock()
	defer o.idsMu.Unlock()
	id, err := ulid.New(ulid.Timestamp(now), o.entropy)
	if errors.Is(err, ulid.ErrMonotonicOverflow) { // the random start was too close to the end: take another
		o.entropy = newEntropy()
		id, err = ulid.New(ulid.Timestamp(now), o.entropy)
	}
	return id.String(), err
}

// redriven is the dead letter that a record was.
type redriven struct {
	seq  uint64
	size int64 // as a dead letter
}

// append stores encoded records, in place of the dead letter from if that isn't nil.
func (o *Outbox) append(recs []Record, values [][]byte, from *redriven) (*Commit, error) {
	if err := o.st.Err(); err != nil {
		return nil, fmt.Errorf("append to outbox: %w", err)
	}
	o.mu.Lock()
	defer o.unlock()
	accounts, stored, err := o.reserve(recs, values, from)
	switch {
	case err != nil:
		return nil, err
	case stored == 0:
		return store.Completed(nil), nil
	}
	ops := make([]store.Op, 0, stored+1)
	if last := o.seq + uint64(stored); last > o.reserved {
		o.reserved = last + seqBlock
		ops = append(ops, store.Op{Bucket: metaBucket, Key: []byte(seqKey), Value: key(o.reserved)})
	}
	refs := make([]Ref, 0, stored) // values and accounts keep step with it
	for i := range recs {
		r := &recs[i]
		if r.Dropped {
			continue
		}
		o.seq++
		r.Seq = o.seq
		ref := Ref{
			Seq:         r.Seq,
			Destination: accounts[i].name,
			Ordered:     r.Ordered,
			Published:   r.Published,
			Queued:      r.Queued,
			Size:        recordSize(values[i]),
		}
		if r.Ordered {
			ref.Lane = r.Lane
		}
		ops = append(ops, store.Op{Bucket: recordsBucket, Key: key(r.Seq), Value: values[i]})
		values[len(refs)], accounts[len(refs)] = values[i], accounts[i]
		refs = append(refs, ref)
	}
	values, accounts = values[:stored], accounts[:stored]
	if from != nil {
		ops = append(ops, store.Op{Bucket: deadBucket, Key: key(from.seq)})
	}
	return o.st.Do(store.Request{Ops: ops, Applied: func(err error) {
		o.appended(err, refs, values, accounts, from)
	}}), nil
}

// reserve counts the bytes of the records that are to be stored, and says how many those are; the others are Dropped. Or it
// refuses, and counts nothing.
func (o *Outbox) reserve(recs []Record, values [][]byte, from *redriven) (accounts []*account, stored int, err error) {
	accounts = make([]*account, len(recs))
	for i := range recs {
		recs[i].Seq, recs[i].Dropped = 0, false
		if accounts[i], err = o.account(recs[i].Destination); err != nil {
			return nil, 0, fmt.Errorf("append to outbox: %w", err)
		}
	}
	var size int64
	for i, a := range accounts {
		a.wanted += recordSize(values[i])
		size += recordSize(values[i])
	}
	size, full := o.fit(accounts, size, from != nil)
	for i, a := range accounts {
		switch {
		case full != nil:
		case a.drop != nil:
			recs[i].Dropped = true
			o.dropped(a, a.drop)
		default:
			a.bytes += recordSize(values[i])
			stored++
		}
	}
	for _, a := range accounts {
		a.wanted, a.drop = 0, nil
	}
	if full != nil {
		o.refused(full)
		return nil, 0, full
	}
	o.total.bytes += size
	o.unflushed += size
	o.disk.left -= size
	return accounts, stored, nil
}

// fit sets drop in the accounts whose records are dropped so that the rest has room, and returns the size of the rest. It
// returns an error if that is not enough.
func (o *Outbox) fit(accounts []*account, size int64, wasDead bool) (rest int64, _ *FullError) {
	drop := func(a *account, full *FullError) bool {
		if wasDead || a.drop != nil || !o.caps.of(a.name).Drop {
			return false
		}
		a.drop = full
		size -= a.wanted
		return true
	}
	for _, a := range accounts {
		if full := o.passedOwnCap(a); full != nil && !drop(a, full) && a.drop == nil {
			return 0, full
		}
	}
	full := o.passedCap(size, wasDead)
	if full == nil {
		return size, nil
	}
	for _, a := range accounts {
		drop(a, full)
	}
	if size == 0 { // nothing is left to be refused
		return 0, nil
	}
	return size, o.passedCap(size, wasDead)
}

// passedCap says which cap of the whole outbox doesn't allow size more bytes; nil if all do.
func (o *Outbox) passedCap(size int64, wasDead bool) *FullError {
	if limit := o.o.MaxUnflushed; o.unflushed > 0 && o.unflushed+size > limit {
		return &FullError{Limit: limit, Used: o.unflushed, Unflushed: true}
	}
	if o.disk.left < size {
		return &FullError{Disk: true, Limit: o.disk.floor, Free: o.disk.free}
	}
	// What was a dead letter is counted in the total already.
	if limit := o.o.MaxBytes; !wasDead && limit > 0 && o.total.used()+size > limit {
		return &FullError{Limit: limit, Used: o.total.used(), Wanted: size, Dead: o.total.deadBytes}
	}
	return nil
}

// passedOwnCap is passedCap for the cap of one destination, and what is wanted of it.
func (o *Outbox) passedOwnCap(a *account) *FullError {
	if limit := o.caps.of(a.name).MaxBytes; limit > 0 && a.bytes+a.wanted > limit {
		return &FullError{Destination: a.name, Limit: limit, Used: a.bytes, Wanted: a.wanted}
	}
	return nil
}

// refused counts a refusal, and notes who is to be told of space.
func (o *Outbox) refused(full *FullError) {
	o.met.refuse(full)
	switch full.cap() {
	case capUnflushed:
		o.behind = true
	case capDisk:
		o.disk.refused = true
	case capTotal:
		o.total.refused = true
	case capDestination:
		o.names[full.Destination].refused = true
	}
}

// appended is what becomes of an append when its flush has ended.
func (o *Outbox) appended(err error, refs []Ref, values [][]byte, accounts []*account, from *redriven) {
	o.mu.Lock()
	if err != nil {
		o.reserved = 0 // what the store knows of it may be undone: the next append says it again
	}
	for i, a := range accounts {
		size := refs[i].Size
		o.unflushed -= size
		if err != nil {
			a.bytes -= size
			o.total.bytes -= size
			continue
		}
		if from == nil {
			a.appended++
		}
		o.queue(refs[i].Seq, a, size, refs[i].Queued)
		o.cache.put(refs[i].Seq, values[i])
		o.committed = refs[i].Seq
	}
	if from != nil {
		o.exhumed(err, from.seq, accounts[0].name, from.size)
		if err == nil {
			accounts[0].redriven++
		}
	}
	o.noticeSpace()
	var announce func([]Ref)
	switch {
	case err != nil || o.watcher == nil: // Watch will find them in the store
	case o.live:
		announce = o.watcher
	default:
		o.replaying = append(o.replaying, refs...)
	}
	o.unlock()
	if announce != nil {
		announce(refs)
	}
}

// Watch calls fn with all that is stored, some at a time and before it returns, and from then on with what each append
// adds, right before that append's commit is done: each record once, in the order of Seq, never two calls at a time. fn
// owns the slice; it must not block, since the store's committer runs it, but may call the outbox. An outbox can be watched
// once. After an error, which is that of reading the store, not all has been announced, nothing more will be, and the
// outbox is not watched.
func (o *Outbox) Watch(fn func([]Ref)) error {
	o.mu.Lock()
	if o.watcher != nil {
		o.mu.Unlock()
		return errors.New("watch outbox: it is watched already")
	}
	o.watcher = fn
	last := o.committed
	o.mu.Unlock()

	lanes := make(map[string]string)
	for from := uint64(0); from <= last; {
		refs, next, err := o.readRefs(from, last, lanes)
		if err != nil {
			o.mu.Lock()
			o.watcher, o.replaying = nil, nil // else what is appended would pile up for nobody
			o.mu.Unlock()
			return fmt.Errorf("watch outbox in %s: %w", o.st.Path(), err)
		}
		if len(refs) > 0 {
			fn(refs)
		}
		from = next
	}
	for {
		o.mu.Lock()
		refs := o.replaying
		o.replaying = nil
		o.live = len(refs) == 0
		o.mu.Unlock()
		if len(refs) == 0 {
			return nil
		}
		fn(refs)
	}
}

// readRefs reads some of the records from Seq from to last, and says where to go on. Lanes that it has met are in lanes.
func (o *Outbox) readRefs(from, last uint64, lanes map[string]string) (refs []Ref, next uint64, err error) {
	next = last + 1
	err = o.st.View(func(v *store.View) error {
		err := each(v, recordsBucket, from, func(seq uint64, value []byte) error {
			if seq > last || len(refs) == pageRecords {
				next = seq
				return errStop
			}
			h, err := decodeRefHeader(value)
			if err != nil {
				return err
			}
			r := Ref{Seq: seq, Ordered: h.ordered, Published: h.published, Queued: h.queued, Size: recordSize(value)}
			if h.ordered {
				lane, ok := lanes[string(h.lane)]
				if !ok {
					lane = unique.Make(string(h.lane)).Value()
					lanes[lane] = lane
				}
				r.Lane = lane
			}
			refs = append(refs, r)
			return nil
		})
		if err != nil {
			return err
		}
		i := 0
		return each(v, stateBucket, from, func(seq uint64, value []byte) error {
			for i < len(refs) && refs[i].Seq < seq {
				i++
			}
			if i == len(refs) {
				return errStop
			}
			s, err := decodeState(value)
			if err == nil && refs[i].Seq == seq {
				refs[i].Attempts, refs[i].Next = s.attempts, s.next
			}
			return err
		})
	})
	o.mu.Lock()
	defer o.mu.Unlock()
	refs = slices.DeleteFunc(refs, func(r Ref) bool { return !o.queued(r.Seq) })
	for i := range refs {
		it, _ := o.items.of(refs[i].Seq)
		refs[i].Destination = o.accounts[it.account].name
	}
	return refs, next, err
}

// queued reports whether a record is flushed and not about to leave.
func (o *Outbox) queued(seq uint64) bool {
	it, ok := o.items.of(seq)
	return ok && !it.leaving
}

// Load reads a queued record. The caller must not change its body. The error is ErrNotFound if it isn't queued, or isn't any
// more; anything else means that the store can't be read.
func (o *Outbox) Load(seq uint64) (Record, error) {
	value, state, err := o.read(seq)
	if err != nil {
		return Record{}, err
	}
	r, err := decodeRecord(value)
	if err != nil {
		return Record{}, fmt.Errorf("load record %d from %s: %w", seq, o.st.Path(), err)
	}
	r.Seq = seq
	if state != nil {
		s, err := decodeState(state)
		if err != nil {
			return Record{}, fmt.Errorf("load record %d from %s: delivery state: %w", seq, o.st.Path(), err)
		}
		r.Attempts, r.Next, r.LastError = s.attempts, s.next, s.lastError
	}
	return r, nil
}

// read returns a queued record as it is stored, and its delivery state, nil if it has none.
func (o *Outbox) read(seq uint64) (value, state []byte, err error) {
	o.mu.Lock()
	it, ok := o.items.of(seq)
	queued, tried := ok && !it.leaving, it.tried
	value = o.cache.values[seq]
	o.mu.Unlock()
	if !queued {
		return nil, nil, ErrNotFound
	}
	if value != nil && !tried {
		return value, nil, nil
	}
	err = o.st.View(func(v *store.View) error {
		value = bytes.Clone(v.Get(recordsBucket, key(seq)))
		state = bytes.Clone(v.Get(stateBucket, key(seq)))
		return nil
	})
	if err == nil && value == nil {
		err = ErrNotFound
	}
	return value, state, err
}

// Flush returns the commit of a flush after which nothing of what was appended before the call waits in memory.
func (o *Outbox) Flush() *Commit { return o.st.Do(store.Request{}) }

// Remove takes a delivered record out of the queue. It joins a flush that is needed anyway, or one after 50 ms; if the
// broker is killed before that, the record is queued again. The commit's error is ErrNotFound if the record isn't queued.
// With any other error the record is out of the queue all the same, and is removed from the disk once the store works again.
func (o *Outbox) Remove(seq uint64) *Commit {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.queued(seq) {
		return store.Completed(ErrNotFound)
	}
	return o.leave(seq, leaving{})
}

// leaving is how a record leaves the queue.
type leaving struct {
	dead   []byte // the dead letter that it becomes; nil: none
	purged bool   // an operator asked for it
	again  bool   // its flush had failed
}

// undone is a record that has left the queue, though the disk doesn't know it: it was delivered, given up or purged, and nobody
// will come back to it.
type undone struct {
	seq    uint64
	dead   []byte // as in leaving
	purged bool   // as in leaving
}

// leave takes a record out of the queue.
func (o *Outbox) leave(seq uint64, l leaving) *Commit {
	it, _ := o.items.of(seq)
	if err := o.st.Err(); err != nil {
		// What could be kept of dead letters has no bound, so those stay in the queue.
		if l.dead == nil && !l.purged {
			it.leaving = true
			o.items.set(seq, it)
			o.undone = append(o.undone, undone{seq: seq})
		}
		return store.Completed(err)
	}
	it.leaving = true
	o.items.set(seq, it)
	ops := make([]store.Op, 1, 3)
	ops[0] = store.Op{Bucket: recordsBucket, Key: key(seq)}
	if it.tried {
		ops = append(ops, store.Op{Bucket: stateBucket, Key: ops[0].Key})
	}
	if l.dead != nil {
		ops = append(ops, store.Op{Bucket: deadBucket, Key: ops[0].Key, Value: l.dead})
	}
	return o.st.Do(store.Request{Ops: ops, Lazy: !l.purged || l.again, Applied: func(err error) { o.left(err, seq, l) }})
}

func (o *Outbox) left(err error, seq uint64, l leaving) {
	o.mu.Lock()
	defer o.unlock()
	if l.again {
		o.redoing--
	}
	it, _ := o.items.of(seq)
	if err != nil {
		// A purged one too: whoever was to send it may have been told meanwhile that it isn't queued, and would never send it.
		o.undone = append(o.undone, undone{seq, l.dead, l.purged})
		return
	}
	o.items.delete(seq)
	o.cache.drop(seq)
	a := o.accounts[it.account]
	a.leave(int64(it.size))
	o.total.leave(int64(it.size))
	a.order.trim(a.records, o.present)
	if l.dead != nil {
		a.bury(recordSize(l.dead))
		o.total.bury(recordSize(l.dead))
	}
	if l.purged {
		a.purged++
	}
	if l.again && o.redoing == 0 {
		o.redo()
	}
	o.noticeSpace()
}

// reopened is called when the store takes writes again after a failed flush, which has left nothing in the file: so of what
// was flushed, memory is right. What is left to do is what nobody else will do again.
func (o *Outbox) reopened() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.redo()
	o.tick() // appends were refused
}

// redo makes some of what is undone again, and the rest after it.
func (o *Outbox) redo() {
	some := o.undone[:min(len(o.undone), pageRecords)]
	if o.undone = o.undone[len(some):]; len(o.undone) == 0 {
		o.undone = nil
	}
	o.redoing = len(some)
	for _, u := range some {
		o.leave(u.seq, leaving{dead: u.dead, purged: u.purged, again: true})
	}
}

func (o *Outbox) present(seq uint64) bool {
	return o.items.has(seq)
}

// Reschedule notes a failed attempt. It is as lazy as Remove; if the broker is killed before the flush, the attempt is
// forgotten. The commit's error is ErrNotFound if the record isn't queued.
func (o *Outbox) Reschedule(seq uint64, attempts int, next time.Time, lastError string) *Commit {
	value := encodeState(deliveryState{attempts: max(attempts, 0), next: next, lastError: clip(lastError, maxLastError)})
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.queued(seq) {
		return store.Completed(ErrNotFound)
	}
	it, _ := o.items.of(seq)
	it.tried = true
	o.items.set(seq, it)
	return o.st.Do(store.Request{Ops: []store.Op{{Bucket: stateBucket, Key: key(seq), Value: value}}, Lazy: true})
}

// Bury moves a record to the dead letters, in one step: it is never in both places, nor in none. Of d, it takes what
// concerns the last attempt: Reason, Status, Response, Buried, Attempts and LastError; the record is the stored one. It is
// as lazy as Remove. The commit's error is ErrNotFound if the record isn't queued. If it has another error when Bury
// returns, the record is still queued. If it gets one later, it is as with Remove.
func (o *Outbox) Bury(seq uint64, d DeadLetter) *Commit {
	value, _, err := o.read(seq)
	if err != nil {
		return store.Completed(err)
	}
	if d.Buried.IsZero() {
		d.Buried = o.o.Now()
	}
	d.Status, d.Attempts = max(d.Status, 0), max(d.Attempts, 0)
	d.Reason, d.LastError = clip(d.Reason, maxLastError), clip(d.LastError, maxLastError)
	d.Response = d.Response[:min(len(d.Response), maxResponse)]
	dead := encodeDead(&d, value)
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.queued(seq) {
		return store.Completed(ErrNotFound)
	}
	return o.leave(seq, leaving{dead: dead})
}
