package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// disk is a store's file whose flushes can be made to fail.
type disk struct {
	path string
	mu   sync.Mutex
	file *os.File // as the store has it open
}

func (d *disk) open(name string, flag int, perm os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(name, flag, perm)
	d.mu.Lock()
	d.file = f
	d.mu.Unlock()
	return f, err
}

// fail puts a file under the store's descriptor that takes every write, but can't be flushed.
func (d *disk) fail(t *testing.T) {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	conn, err := d.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failure error
	err = conn.Control(func(fd uintptr) { failure = syscall.Dup3(int(null.Fd()), int(fd), 0) })
	if err := errors.Join(err, failure); err != nil {
		t.Fatal(err)
	}
}

func (d *disk) start(t *testing.T, o outbox.Options) (*store.Store, *outbox.Outbox) {
	t.Helper()
	st, err := store.Open(d.path, store.Options{Buckets: outbox.Buckets(), OpenFile: d.open, ReopenAfter: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, st) })
	ob, err := outbox.Open(st, o)
	if err != nil {
		t.Fatal(err)
	}
	return st, ob
}

func untilOpen(t *testing.T, st *store.Store) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); st.Err() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not open: %v", st.Err())
		}
	}
}

// failed waits for a commit that must fail.
func failed(t *testing.T, c *outbox.Commit) {
	t.Helper()
	<-c.Done()
	if c.Err() == nil {
		t.Fatal("the flush has not failed")
	}
}

// TestFailedFlush has a flush fail with each change that an outbox makes in it, the disk having taken it or not. What is
// promised to somebody who waits is as if it had never been asked for; what nobody will ask for again comes about later.
func TestFailedFlush(t *testing.T) {
	const queued, dead = 0, 1 // the records that the change is made to
	var seqs [2]uint64
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, ob *outbox.Outbox) *outbox.Commit
		want   []string // after the reopening, and after a restart
	}{
		{"append", func(t *testing.T, ob *outbox.Outbox) *outbox.Commit {
			c, err := ob.Append([]outbox.Record{{ID: "new", Destination: "center"}})
			if err != nil {
				t.Fatal(err)
			}
			return c
		}, []string{"queued 0", "dead died"}},
		{"remove", func(_ *testing.T, ob *outbox.Outbox) *outbox.Commit { return ob.Remove(seqs[queued]) },
			[]string{"dead died"}},
		{"bury", func(_ *testing.T, ob *outbox.Outbox) *outbox.Commit {
			return ob.Bury(seqs[queued], outbox.DeadLetter{Reason: "poison"})
		}, []string{"dead poison", "dead died"}},
		{"reschedule", func(_ *testing.T, ob *outbox.Outbox) *outbox.Commit {
			return ob.Reschedule(seqs[queued], 3, noon, "500")
		}, []string{"queued 0", "dead died"}},
		{"purge", func(_ *testing.T, ob *outbox.Outbox) *outbox.Commit { return ob.Purge(seqs[queued], false) },
			[]string{"dead died"}},
		{"purge dead", func(_ *testing.T, ob *outbox.Outbox) *outbox.Commit { return ob.Purge(seqs[dead], true) },
			[]string{"queued 0", "dead died"}},
		{"requeue", func(t *testing.T, ob *outbox.Outbox) *outbox.Commit {
			c, err := ob.Requeue(seqs[dead])
			if err != nil {
				t.Fatal(err)
			}
			return c
		}, []string{"queued 0", "dead died"}},
	} {
		for _, reached := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/reached=%t", tt.name, reached), func(t *testing.T) {
				d := &disk{path: filepath.Join(t.TempDir(), "outbox.db")}
				st, ob := d.start(t, outbox.Options{})
				recs := []outbox.Record{{ID: "a", Destination: "center", Body: []byte("a")}, {ID: "b", Destination: "center"}}
				commit(t, ob, recs)
				seqs = [2]uint64{recs[0].Seq, recs[1].Seq}
				wait(t, ob.Bury(recs[1].Seq, outbox.DeadLetter{Reason: "died"}))
				var announced []uint64
				if err := ob.Watch(func(refs []outbox.Ref) {
					for _, r := range refs {
						announced = append(announced, r.Seq)
					}
				}); err != nil {
					t.Fatal(err)
				}

				twin := d.path + ".twin"
				b, err := os.ReadFile(d.path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(twin, b, 0o600); err != nil {
					t.Fatal(err)
				}
				other := &disk{path: twin}
				twinStore, twinOutbox := other.start(t, outbox.Options{})
				wait(t, tt.change(t, twinOutbox))
				closeStore(t, twinStore)

				d.fail(t)
				if reached {
					if err := os.Rename(twin, d.path); err != nil {
						t.Fatal(err)
					}
				}
				failed(t, tt.change(t, ob))
				untilOpen(t, st)
				select {
				case <-ob.Space():
				case <-time.After(10 * time.Second):
					t.Fatal("Space has not ticked")
				}
				next := []outbox.Record{{ID: "next", Destination: "center"}}
				commit(t, ob, next) // what is made again was written before
				if next[0].Seq <= seqs[1] {
					t.Errorf("Seq %d after %d", next[0].Seq, seqs[1])
				}
				check := func(ob *outbox.Outbox) {
					t.Helper()
					if got, want := states(t, ob), append(slices.Clone(tt.want), "queued 0"); !slices.Equal(sorted(got), sorted(want)) {
						t.Errorf("got %q, want %q", got, want)
					}
				}
				check(ob)
				if want := []uint64{seqs[0], next[0].Seq}; !slices.Equal(announced, want) {
					t.Errorf("announced %d, want %d", announced, want)
				}
				for end := time.Now().Add(10 * time.Second); ob.Stats().Records != count(tt.want, "queued 0")+1; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("%d records are still stored", ob.Stats().Records)
					}
				}
				before := ob.Stats()
				closeStore(t, st)
				_, ob = d.start(t, outbox.Options{})
				check(ob)
				if after := ob.Stats(); after.Bytes != before.Bytes || after.DeadBytes != before.DeadBytes {
					t.Errorf("counted %+v, stored %+v", before.Usage, after.Usage)
				}
			})
		}
	}
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

func count(all []string, s string) (n int) {
	for _, other := range all {
		if other == s {
			n++
		}
	}
	return n
}

// states says of each record that is stored in which state it is, and how often it was tried or why it died.
func states(t *testing.T, ob *outbox.Outbox) []string {
	t.Helper()
	var all []string
	for _, e := range list(t, ob, outbox.Filter{}) {
		switch {
		case e.Err != nil:
			t.Error(e.Err)
		case e.Dead:
			all = append(all, "dead "+e.Reason)
		default:
			all = append(all, fmt.Sprintf("queued %d", e.Attempts))
		}
	}
	return all
}

// TestWhileFailed has what an outbox does while its store takes no writes.
func TestWhileFailed(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "outbox.db")}
	st, ob := d.start(t, outbox.Options{})
	const n = 3000 // more than is made again at a time
	recs := make([]outbox.Record, n+3)
	for i := range recs {
		recs[i] = outbox.Record{ID: fmt.Sprint(i), Destination: "center"}
	}
	commit(t, ob, recs)
	aside := d.path + ".aside"
	if err := os.Rename(d.path, aside); err != nil { // nothing is opened as long as it isn't there
		t.Fatal(err)
	}
	d.fail(t)
	c, err := ob.Append([]outbox.Record{{Destination: "center"}})
	if err != nil {
		t.Fatal(err)
	}
	failed(t, c)

	if _, err := ob.Append([]outbox.Record{{Destination: "center"}}); err == nil || errors.Is(err, outbox.ErrFull) {
		t.Errorf("Append: %v", err)
	}
	for _, r := range recs[:n] {
		if err := ob.Remove(r.Seq).Err(); err == nil || errors.Is(err, outbox.ErrNotFound) {
			t.Fatalf("Remove: %v", err)
		}
	}
	if err := ob.Remove(recs[0].Seq).Err(); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("Remove again: %v", err)
	}
	if _, err := ob.Load(recs[0].Seq); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("Load of what was removed: %v", err)
	}
	for name, c := range map[string]*outbox.Commit{
		"Bury":       ob.Bury(recs[n].Seq, outbox.DeadLetter{Reason: "poison"}),
		"Reschedule": ob.Reschedule(recs[n+1].Seq, 1, noon, "x"),
		"Purge":      ob.Purge(recs[n+2].Seq, false),
	} {
		if failed(t, c); errors.Is(c.Err(), outbox.ErrNotFound) {
			t.Errorf("%s: %v", name, c.Err())
		}
	}

	if err := os.Rename(aside, d.path); err != nil {
		t.Fatal(err)
	}
	untilOpen(t, st)
	want := []string{"queued 0", "queued 0", "queued 0"}
	if got := states(t, ob); !slices.Equal(got, want) {
		t.Errorf("got %d records, want %q", len(got), want)
	}
	for end := time.Now().Add(10 * time.Second); ob.Stats().Records != 3; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d records are still stored", ob.Stats().Records)
		}
	}
	closeStore(t, st)
	st, again := open(t, d.path, outbox.Options{})
	defer closeStore(t, st)
	if got := states(t, again); !slices.Equal(got, want) {
		t.Errorf("after a restart: %d records, want %q", len(got), want)
	}
}

// TestFailuresUnderLoad appends and delivers while the disk fails again and again: each record that was acknowledged is
// announced once, in order, and none that wasn't; and in the end the file has what was not delivered.
func TestFailuresUnderLoad(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "outbox.db")}
	st, ob := d.start(t, outbox.Options{})
	var mu sync.Mutex
	acknowledged := make(map[uint64]bool)
	var announced []uint64
	var delivered []uint64
	var consumer sync.WaitGroup
	deliver := make(chan uint64, 1<<20)
	if err := ob.Watch(func(refs []outbox.Ref) {
		for _, r := range refs {
			announced = append(announced, r.Seq)
			deliver <- r.Seq
		}
	}); err != nil {
		t.Fatal(err)
	}
	consumer.Go(func() {
		for seq := range deliver {
			if seq%4 == 0 {
				continue // stays queued
			}
			if err := ob.Remove(seq).Err(); errors.Is(err, outbox.ErrNotFound) {
				t.Errorf("record %d was announced and isn't queued", seq)
			}
			delivered = append(delivered, seq)
		}
	})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	refused := 0
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				recs := []outbox.Record{{Destination: "center", Body: []byte("x")}, {Destination: "other"}}
				c, err := ob.Append(recs)
				if err == nil {
					err = c.Wait(context.Background())
				}
				mu.Lock()
				if err == nil {
					acknowledged[recs[0].Seq], acknowledged[recs[1].Seq] = true, true
				} else {
					refused++
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	for range 8 {
		time.Sleep(20 * time.Millisecond)
		d.fail(t)
		for st.Err() == nil {
			time.Sleep(100 * time.Microsecond)
		}
		untilOpen(t, st)
	}
	time.Sleep(20 * time.Millisecond)
	close(stop)
	wg.Wait()
	close(deliver)
	consumer.Wait()
	if !slices.IsSorted(announced) || len(announced) != len(acknowledged) {
		t.Errorf("%d records announced, sorted %t; %d acknowledged", len(announced), slices.IsSorted(announced), len(acknowledged))
	}
	for _, seq := range announced {
		if !acknowledged[seq] {
			t.Errorf("record %d was announced, and not acknowledged", seq)
		}
	}
	for _, seq := range delivered {
		delete(acknowledged, seq)
	}
	if refused == 0 || len(acknowledged) == 0 || len(delivered) == 0 {
		t.Errorf("%d refused, %d queued, %d delivered", refused, len(acknowledged), len(delivered))
	}
	for end := time.Now().Add(10 * time.Second); ob.Stats().Records != len(acknowledged); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d records stored, want %d", ob.Stats().Records, len(acknowledged))
		}
	}
	before := ob.Stats()
	closeStore(t, st)
	st, again := open(t, d.path, outbox.Options{})
	defer closeStore(t, st)
	for _, e := range list(t, again, outbox.Filter{}) {
		if !acknowledged[e.Seq] {
			t.Errorf("record %d is stored, and was delivered or not acknowledged", e.Seq)
		}
		delete(acknowledged, e.Seq)
	}
	if len(acknowledged) > 0 {
		t.Errorf("%d acknowledged records are lost", len(acknowledged))
	}
	if after := again.Stats(); after.Bytes != before.Bytes || after.Records != before.Records {
		t.Errorf("counted %d records, %d bytes; stored %d, %d", before.Records, before.Bytes, after.Records, after.Bytes)
	}
}

// TestFailedPurge: what an outbox has told its watcher isn't queued any more doesn't come back when the purge fails, since nobody
// would send it.
func TestFailedPurge(t *testing.T) {
	for name, told := range map[string]func(ob *outbox.Outbox, seq uint64) error{
		"load":       func(ob *outbox.Outbox, seq uint64) error { _, err := ob.Load(seq); return err },
		"remove":     func(ob *outbox.Outbox, seq uint64) error { return ob.Remove(seq).Err() },
		"reschedule": func(ob *outbox.Outbox, seq uint64) error { return ob.Reschedule(seq, 1, noon, "x").Err() },
	} {
		t.Run(name, func(t *testing.T) {
			d := &disk{path: filepath.Join(t.TempDir(), "outbox.db")}
			st, ob := d.start(t, outbox.Options{})
			recs := []outbox.Record{{Destination: "center"}, {Destination: "center"}}
			commit(t, ob, recs)
			d.fail(t)
			c := ob.Purge(recs[0].Seq, false)
			if err := told(ob, recs[0].Seq); !errors.Is(err, outbox.ErrNotFound) {
				t.Fatalf("error %v", err)
			}
			failed(t, c)
			untilOpen(t, st)
			for end := time.Now().Add(10 * time.Second); ob.Stats().Records != 1; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d records are queued, and one of them will never be sent", ob.Stats().Records)
				}
			}
			if u := ob.Stats().Destinations["center"]; u.Purged != 1 {
				t.Errorf("%d counted as purged", u.Purged)
			}
		})
	}
}
