package outbox_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 123, time.UTC)

func whole() outbox.Record {
	return outbox.Record{
		ID: "id-1", Rule: "hard-brake", Generation: "0123456789ab", Destination: "center",
		Lane: "v7", Ordered: true, Body: []byte(`{"vin":"V7"}`), Path: "/v7", Query: "q=a+b",
		Headers: []outbox.Header{{Name: "X-Vin", Value: "V7"}, {Name: "X-Key", Value: "\x00-V7"}}, Topic: "fleet/v7/telemetry", ClientID: "v7",
		Published: noon, SW8: "1-a-b-0-c-d-e-f", Correlation: "a2V5:dmFs", TraceID: "trace-1",
	}
}

func TestAppendAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	now := noon
	st, ob := open(t, path, outbox.Options{Now: func() time.Time { return now }})
	recs := []outbox.Record{whole(), {Destination: "other", Attempts: 9, LastError: "x", Next: noon}}
	commit(t, ob, recs)
	if recs[0].Seq == 0 || recs[1].Seq != recs[0].Seq+1 {
		t.Errorf("seqs %d, %d", recs[0].Seq, recs[1].Seq)
	}
	if _, err := ulid.ParseStrict(recs[1].ID); err != nil || recs[0].ID != "id-1" {
		t.Errorf("ids %q, %q: %v", recs[0].ID, recs[1].ID, err)
	}
	want := whole()
	want.Seq, want.Queued = recs[0].Seq, noon
	wantOther := outbox.Record{Seq: recs[1].Seq, ID: recs[1].ID, Destination: "other", Body: []byte{}, Published: noon, Queued: noon}
	check := func(ob *outbox.Outbox) {
		t.Helper()
		for _, want := range []outbox.Record{want, wantOther} {
			if got, err := ob.Load(want.Seq); err != nil || !cmp.Equal(got, want) {
				t.Errorf("error %v, diff %s", err, cmp.Diff(want, got))
			}
		}
	}
	check(ob)

	wait(t, ob.Reschedule(want.Seq, 3, noon.Add(time.Minute), strings.Repeat("e", 5000)))
	want.Attempts, want.Next, want.LastError = 3, noon.Add(time.Minute), strings.Repeat("e", 1024)
	check(ob)

	closeStore(t, st)
	_, ob = open(t, path, outbox.Options{})
	check(ob)
	wait(t, ob.Remove(want.Seq))
	if _, err := ob.Load(want.Seq); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("Load after Remove: %v", err)
	}
}

func TestNotFound(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	recs := []outbox.Record{whole()}
	commit(t, ob, recs)
	wait(t, ob.Remove(recs[0].Seq))
	for _, seq := range []uint64{0, recs[0].Seq, recs[0].Seq + 1} {
		_, err := ob.Load(seq)
		_, requeueErr := ob.Requeue(seq)
		for name, err := range map[string]error{
			"Load":        err,
			"Remove":      ob.Remove(seq).Wait(t.Context()),
			"Reschedule":  ob.Reschedule(seq, 1, noon, "").Wait(t.Context()),
			"Bury":        ob.Bury(seq, outbox.DeadLetter{}).Wait(t.Context()),
			"Purge":       ob.Purge(seq, false).Wait(t.Context()),
			"Purge, dead": ob.Purge(seq, true).Wait(t.Context()),
			"Requeue":     requeueErr,
		} {
			if !errors.Is(err, outbox.ErrNotFound) {
				t.Errorf("%s of %d: %v", name, seq, err)
			}
		}
	}
	commit(t, ob, recs)
	ob.Remove(recs[0].Seq)
	if err := ob.Remove(recs[0].Seq).Wait(t.Context()); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("second Remove: %v", err)
	}
}

func TestAppendRefusesNonsense(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	if _, err := ob.Append([]outbox.Record{whole(), {}}); err == nil || !strings.Contains(err.Error(), "without destination") {
		t.Errorf("error %v", err)
	}
	if c, err := ob.Append(nil); err != nil || c.Wait(t.Context()) != nil {
		t.Errorf("nothing: %v", err)
	}
	if s := ob.Stats(); s.Records != 0 || s.Bytes != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestSeqIsNeverReused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	highest := uint64(0)
	for range 3 {
		st, ob := open(t, path, outbox.Options{})
		recs := []outbox.Record{whole(), whole()}
		commit(t, ob, recs)
		if recs[0].Seq <= highest {
			t.Fatalf("seq %d after %d", recs[0].Seq, highest)
		}
		highest = recs[1].Seq
		for _, r := range recs {
			wait(t, ob.Remove(r.Seq))
		}
		closeStore(t, st)
	}
}

func TestCaps(t *testing.T) {
	size := func() int64 {
		_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
		commit(t, ob, []outbox.Record{whole()})
		return ob.Stats().Bytes
	}()
	to := func(destination string) outbox.Record {
		r := whole()
		r.Destination = destination[:1] + "enter" // of the same length
		return r
	}
	for _, tt := range []struct {
		name   string
		o      outbox.Options
		append [][]outbox.Record // the last is refused
		want   outbox.FullError
		text   string
	}{
		{
			"all", outbox.Options{MaxBytes: 3 * size},
			[][]outbox.Record{{to("a"), to("b")}, {to("a"), to("b")}},
			outbox.FullError{Limit: 3 * size, Used: 2 * size, Wanted: 2 * size}, fmt.Sprintf("bytes used, %d more are wanted", 2*size),
		},
		{
			"one destination", outbox.Options{Caps: outbox.Caps{Of: map[string]outbox.Cap{"aenter": {MaxBytes: 2 * size}}}},
			[][]outbox.Record{{to("a")}, {to("b"), to("b"), to("b")}, {to("b"), to("a"), to("b"), to("a")}},
			outbox.FullError{Destination: "aenter", Limit: 2 * size, Used: size, Wanted: 2 * size}, `destination "aenter" uses`,
		},
		{
			"one that never fits", outbox.Options{MaxBytes: size - 1},
			[][]outbox.Record{{to("a")}},
			outbox.FullError{Limit: size - 1, Wanted: size}, fmt.Sprintf("%d more are wanted, which never fit", size),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := prometheus.NewRegistry()
			tt.o.Registerer = r
			_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), tt.o)
			last := len(tt.append) - 1
			for _, recs := range tt.append[:last] {
				commit(t, ob, recs)
			}
			before := ob.Stats()
			_, err := ob.Append(tt.append[last])
			var full *outbox.FullError
			if !errors.As(err, &full) || !errors.Is(err, outbox.ErrFull) || *full != tt.want {
				t.Fatalf("error %#v, want %#v", err, tt.want)
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q, want %q in it", err, tt.text)
			}
			after := ob.Stats()
			for name, u := range after.Destinations {
				if u == (outbox.Usage{}) {
					delete(after.Destinations, name) // seen first in what was refused
				}
			}
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("the refused append has left something: %s", diff)
			}
			entries := 0
			if err := ob.List(outbox.Filter{}, func(outbox.Entry) bool { entries++; return true }); err != nil || entries != before.Records {
				t.Errorf("%d entries, want %d, error %v", entries, before.Records, err)
			}
			if n, err := testutil.GatherAndCount(r, "throughline_outbox_refused_total"); err != nil || n != 4 {
				t.Errorf("%d refusal counters, error %v", n, err)
			}
		})
	}
}

// TestUnflushedCap: what waits for a slow disk is bounded, however much room the disk has.
func TestUnflushedCap(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{MaxUnflushed: 1000})
	big := whole()
	big.Body = make([]byte, 5000)
	commit(t, ob, []outbox.Record{big}) // one always may wait
	stop := errors.New("stop")
	hold, held := make(chan struct{}), make(chan struct{})
	c, err := ob.Append([]outbox.Record{big})
	if err != nil {
		t.Fatal(err)
	}
	c.Watch(func(error) { close(held); <-hold }) // the committer stands still
	<-held
	if _, err := ob.Append([]outbox.Record{whole()}); err != nil {
		t.Fatal(err)
	}
	err = stop
	for range 10 {
		if _, err = ob.Append([]outbox.Record{whole()}); err != nil {
			break
		}
	}
	var full *outbox.FullError
	if !errors.As(err, &full) || !full.Unflushed || full.Limit != 1000 {
		t.Errorf("error %v", err)
	}
	close(hold)
	select {
	case <-ob.Space():
	case <-time.After(10 * time.Second):
		t.Error("no space is announced after the flush")
	}
}

func TestSpace(t *testing.T) {
	const n = 32
	_, probe := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	commit(t, probe, []outbox.Record{whole()})
	limit := n * probe.Stats().Bytes
	for name, o := range map[string]outbox.Options{
		"all":         {MaxBytes: limit},
		"destination": {Caps: outbox.Caps{Default: outbox.Cap{MaxBytes: limit}}},
	} {
		t.Run(name, func(t *testing.T) {
			_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), o)
			recs := make([]outbox.Record, n)
			for i := range recs {
				recs[i] = whole()
			}
			commit(t, ob, recs)
			wait(t, ob.Remove(recs[0].Seq))
			commit(t, ob, []outbox.Record{whole()})
			tick := func() bool {
				select {
				case <-ob.Space():
					return true
				default:
					return false
				}
			}
			if tick() {
				t.Error("space is announced though nothing was refused")
			}
			if _, err := ob.Append([]outbox.Record{whole()}); !errors.Is(err, outbox.ErrFull) {
				t.Fatalf("error %v", err)
			}
			wait(t, ob.Remove(recs[1].Seq))
			if tick() {
				t.Error("space is announced at the first record that leaves")
			}
			wait(t, ob.Remove(recs[2].Seq))
			if !tick() {
				t.Error("no space is announced once a sixteenth is free")
			}
			wait(t, ob.Remove(recs[3].Seq))
			if tick() {
				t.Error("space is announced twice")
			}
		})
	}
}

func TestDeadLetters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	now := noon
	o := outbox.Options{Now: func() time.Time { return now }, MaxBytes: 1 << 20}
	st, ob := open(t, path, o)
	recs := []outbox.Record{whole(), whole()}
	commit(t, ob, recs)
	seq := recs[0].Seq
	wait(t, ob.Reschedule(seq, 2, noon, "status 500"))
	now = noon.Add(time.Hour)
	wait(t, ob.Bury(seq, outbox.DeadLetter{
		Record: outbox.Record{Attempts: 3, LastError: "status 400"},
		Reason: "poison", Status: 400, Response: bytes.Repeat([]byte("r"), 5000),
	}))
	if _, err := ob.Load(seq); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("Load after Bury: %v", err)
	}
	want := outbox.Entry{Dead: true, DeadLetter: outbox.DeadLetter{
		Record: whole(), Reason: "poison", Buried: now, Status: 400, Response: bytes.Repeat([]byte("r"), 4096),
	}}
	want.Seq, want.Queued, want.Attempts, want.LastError = seq, noon, 3, "status 400"
	for range 2 { // before and after a restart
		if got := list(t, ob, outbox.Filter{Which: outbox.DeadOnly}); !cmp.Equal(got, []outbox.Entry{want}) {
			t.Errorf("diff %s", cmp.Diff([]outbox.Entry{want}, got))
		}
		s := ob.Stats()
		if s.Records != 1 || s.DeadLetters != 1 || s.DeadBytes < 4096 || s.Destinations["center"].DeadBytes != s.DeadBytes {
			t.Errorf("stats %+v", s)
		}
		closeStore(t, st)
		st, ob = open(t, path, o)
	}

	var announced []outbox.Ref
	if err := ob.Watch(func(refs []outbox.Ref) { announced = append(announced, refs...) }); err != nil {
		t.Fatal(err)
	}
	c, err := ob.Requeue(seq)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ob.Requeue(seq); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("second Requeue: %v", err)
	}
	wait(t, c)
	if len(announced) != 2 || announced[1].Seq <= recs[1].Seq || !announced[1].Queued.Equal(now) {
		t.Fatalf("announced %+v", announced)
	}
	got, err := ob.Load(announced[1].Seq)
	wantRecord := whole()
	wantRecord.Seq, wantRecord.Queued = announced[1].Seq, now
	if err != nil || !cmp.Equal(got, wantRecord) {
		t.Errorf("error %v, diff %s", err, cmp.Diff(wantRecord, got))
	}
	if s := ob.Stats(); s.DeadLetters != 0 || s.DeadBytes != 0 || s.Records != 2 {
		t.Errorf("stats %+v", s)
	}

	wait(t, ob.Bury(got.Seq, outbox.DeadLetter{Reason: "again"}))
	wait(t, ob.Purge(got.Seq, true))
	wait(t, ob.Purge(recs[1].Seq, false))
	if s := ob.Stats(); s.DeadLetters != 0 || s.DeadBytes != 0 || s.Records != 0 || s.Bytes != 0 {
		t.Errorf("stats %+v", s)
	}
	if got := list(t, ob, outbox.Filter{}); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
}

// TestDeadLettersCount: they fill the outbox as a whole, but not their destination, and burying is never refused.
func TestDeadLettersCount(t *testing.T) {
	o := outbox.Options{MaxBytes: 4000, Caps: outbox.Caps{Default: outbox.Cap{MaxBytes: 2500}}}
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), o)
	bury := func() error {
		r := whole()
		r.Body = make([]byte, 2000)
		recs := []outbox.Record{r}
		c, err := ob.Append(recs)
		if err != nil {
			return err
		}
		wait(t, c)
		wait(t, ob.Bury(recs[0].Seq, outbox.DeadLetter{Response: make([]byte, 4000)}))
		return nil
	}
	if err := bury(); err != nil {
		t.Fatal(err)
	}
	err := bury()
	var full *outbox.FullError
	if !errors.As(err, &full) || full.Dead < 6000 || full.Destination != "" || !strings.Contains(err.Error(), "by dead letters") {
		t.Fatalf("error %v", err)
	}
	wait(t, ob.Purge(list(t, ob, outbox.Filter{})[0].Seq, true))
	<-ob.Space()
	if err := bury(); err != nil {
		t.Error(err)
	}
}

func TestList(t *testing.T) {
	now := noon.Add(time.Hour)
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Now: func() time.Time { return now }})
	var recs []outbox.Record
	for i := range 3000 { // more than are read at a time
		r := whole()
		r.ID = fmt.Sprint("id-", i)
		r.Rule = []string{"even", "odd"}[i%2]
		r.Destination = []string{"a", "b", "c"}[i%3]
		r.Published = noon.Add(time.Duration(i) * time.Second)
		recs = append(recs, r)
	}
	commit(t, ob, recs)
	for i := 0; i < 3000; i += 1000 {
		wait(t, ob.Bury(recs[i].Seq, outbox.DeadLetter{Reason: "x"}))
	}
	for _, tt := range []struct {
		name      string
		f         outbox.Filter
		want      int
		wantFirst string
	}{
		{"all", outbox.Filter{}, 3000, "id-1"},
		{"queued", outbox.Filter{Which: outbox.QueuedOnly}, 2997, "id-1"},
		{"dead", outbox.Filter{Which: outbox.DeadOnly}, 3, "id-0"},
		{"id", outbox.Filter{ID: "id-2500"}, 1, "id-2500"},
		{"dead id", outbox.Filter{ID: "id-2000"}, 1, "id-2000"},
		{"rule", outbox.Filter{Rule: "odd"}, 1500, "id-1"},
		{"rule and destination", outbox.Filter{Rule: "odd", Destination: "b"}, 500, "id-1"},
		{"age", outbox.Filter{OlderThan: 59*time.Minute + 50*time.Second}, 10, "id-1"},
		{"limit", outbox.Filter{Limit: 2, Destination: "c"}, 2, "id-2"},
		{"none", outbox.Filter{Destination: "d"}, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := list(t, ob, tt.f)
			if len(got) != tt.want || len(got) > 0 && got[0].ID != tt.wantFirst {
				t.Fatalf("%d entries, want %d; first %+v, want %s", len(got), tt.want, got[:min(1, len(got))], tt.wantFirst)
			}
			if !slices.IsSortedFunc(got, func(a, b outbox.Entry) int {
				if a.Dead != b.Dead {
					return map[bool]int{true: 1, false: -1}[a.Dead]
				}
				return int(a.Seq) - int(b.Seq)
			}) {
				t.Error("out of order")
			}
		})
	}
	calls := 0
	if err := ob.List(outbox.Filter{}, func(outbox.Entry) bool { calls++; return false }); err != nil || calls != 1 {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

func TestWatch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	st, ob := open(t, path, outbox.Options{})
	fill(t, ob, 2500, 10)
	removed := list(t, ob, outbox.Filter{Limit: 1})[0].Seq
	wait(t, ob.Remove(removed))
	wait(t, ob.Reschedule(removed+1, 4, noon, "x"))
	closeStore(t, st)

	_, ob = open(t, path, outbox.Options{})
	appends := 0
	var got []outbox.Ref
	err := ob.Watch(func(refs []outbox.Ref) {
		got = append(got, refs...)
		if appends < 3 { // while what is stored is still being announced
			appends++
			commit(t, ob, []outbox.Record{whole()})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	commit(t, ob, []outbox.Record{whole(), {Destination: "other", Lane: "ignored"}})
	if len(got) != 2499+3+2 {
		t.Fatalf("%d announced, want 2504", len(got))
	}
	for i, r := range got[1:] {
		if r.Seq <= got[i].Seq {
			t.Fatalf("seq %d is announced after %d", r.Seq, got[i].Seq)
		}
	}
	if r := got[0]; r.Seq != removed+1 || r.Attempts != 4 || !r.Next.Equal(noon) || r.Lane != "vehicle-000001" || !r.Ordered || r.Destination != "center" {
		t.Errorf("first %+v", r)
	}
	if r := got[len(got)-1]; r.Ordered || r.Lane != "" || r.Destination != "other" || r.Size == 0 || r.Published.IsZero() || r.Queued.IsZero() {
		t.Errorf("last %+v", r)
	}
	if err := ob.Watch(func([]outbox.Ref) {}); err == nil {
		t.Error("a second Watch is not refused")
	}
}

// TestWatchFails: after an error nobody is told of what is appended, and nothing is kept for him.
func TestWatchFails(t *testing.T) {
	st, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	recs := []outbox.Record{whole(), whole()}
	commit(t, ob, recs)
	state := store.Op{Bucket: "outbox.state", Key: binary.BigEndian.AppendUint64(nil, recs[1].Seq), Value: []byte{1}}
	wait(t, st.Write([]store.Op{state}))
	if err := ob.Watch(func([]outbox.Ref) { t.Error("told of records after the damaged one") }); !errors.Is(err, store.ErrCorrupt) {
		t.Fatalf("error %v", err)
	}
	commit(t, ob, []outbox.Record{whole()})

	state.Value = nil
	wait(t, st.Write([]store.Op{state}))
	announced := 0
	if err := ob.Watch(func(refs []outbox.Ref) { announced += len(refs) }); err != nil || announced != 3 {
		t.Errorf("%d announced, error %v, want all 3 from the store", announced, err)
	}
}

// TestConcurrentUse: every acknowledged record is announced once, before its commit is done, in the order of Seq, and
// what is removed is gone, whatever runs at the same time.
func TestConcurrentUse(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	var mu sync.Mutex
	announced := make(map[uint64]bool)
	last := uint64(0)
	if err := ob.Watch(func(refs []outbox.Ref) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range refs {
			if r.Seq <= last {
				t.Errorf("seq %d after %d", r.Seq, last)
			}
			last = r.Seq
			announced[r.Seq] = true
		}
	}); err != nil {
		t.Fatal(err)
	}
	const writers, rounds = 8, 40
	kept := make(chan uint64, writers*rounds)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			previous := uint64(0)
			for range rounds {
				recs := []outbox.Record{whole(), whole(), whole()}
				c, err := ob.Append(recs)
				if err == nil {
					err = c.Wait(t.Context())
				}
				if err != nil {
					t.Error(err)
					return
				}
				if recs[0].Seq <= previous || recs[2].Seq != recs[0].Seq+2 {
					t.Errorf("writer %d: seq %d after %d", w, recs[0].Seq, previous)
				}
				previous = recs[2].Seq
				mu.Lock()
				if !announced[recs[0].Seq] || !announced[recs[2].Seq] {
					t.Error("committed, but not announced")
				}
				mu.Unlock()
				if r, err := ob.Load(recs[1].Seq); err != nil || r.ID != recs[1].ID {
					t.Errorf("Load: %v", err)
				}
				ob.Reschedule(recs[0].Seq, 1, noon, "")
				ob.Remove(recs[0].Seq)
				ob.Bury(recs[1].Seq, outbox.DeadLetter{})
				kept <- recs[2].Seq
				ob.Stats()
			}
		})
	}
	wg.Wait()
	close(kept)
	commit(t, ob, []outbox.Record{whole()}) // flushes the lazy ones
	for seq := range kept {
		if _, err := ob.Load(seq); err != nil {
			t.Errorf("record %d: %v", seq, err)
		}
	}
	if s := ob.Stats(); s.Records != writers*rounds+1 || s.DeadLetters != writers*rounds {
		t.Errorf("stats %+v", s)
	}
}

func TestStats(t *testing.T) {
	now := noon
	r := prometheus.NewRegistry()
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Now: func() time.Time { return now }, MaxBytes: 1 << 20, Registerer: r})
	var recs []outbox.Record
	for range 500 {
		one := []outbox.Record{whole()}
		if _, err := ob.Append(one); err != nil {
			t.Fatal(err)
		}
		recs = append(recs, one...)
		now = now.Add(time.Second)
	}
	commit(t, ob, []outbox.Record{{Destination: "other"}})
	for i := range 500 { // all but the oldest and the newest leave, from the middle outwards
		j := (i + 250) % 500
		if j != 0 && j != 499 {
			if err := ob.Remove(recs[j].Seq).Err(); err != nil { // it isn't flushed
				t.Fatal(err)
			}
		}
	}
	wait(t, ob.Reschedule(recs[0].Seq, 1, noon, "")) // flushed after the removals
	oldest := func(want time.Time) {
		t.Helper()
		want = want.Truncate(time.Millisecond)
		if s := ob.Stats(); !s.Destinations["center"].Oldest.Equal(want) || !s.Oldest.Equal(want) {
			t.Errorf("oldest %v and %v, want %v", s.Destinations["center"].Oldest, s.Oldest, want)
		}
	}
	oldest(noon)
	wait(t, ob.Remove(recs[0].Seq))
	oldest(noon.Add(499 * time.Second))
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP throughline_outbox_oldest_seconds Age of the oldest record queued; 0: none.
# TYPE throughline_outbox_oldest_seconds gauge
throughline_outbox_oldest_seconds{destination="center"} 1.000000123
throughline_outbox_oldest_seconds{destination="other"} 0.000000123
# HELP throughline_outbox_records Records queued.
# TYPE throughline_outbox_records gauge
throughline_outbox_records{destination="center"} 1
throughline_outbox_records{destination="other"} 1
# HELP throughline_outbox_limit_bytes Cap on the bytes of queued records and dead letters together; 0: none.
# TYPE throughline_outbox_limit_bytes gauge
throughline_outbox_limit_bytes 1.048576e+06
`), "throughline_outbox_oldest_seconds", "throughline_outbox_records", "throughline_outbox_limit_bytes"); err != nil {
		t.Error(err)
	}
	wait(t, ob.Remove(recs[499].Seq))
	if s := ob.Stats(); !s.Destinations["center"].Oldest.IsZero() || s.Destinations["center"].Bytes != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestAfterFailedStore(t *testing.T) {
	st, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{MaxBytes: 1 << 20})
	recs := []outbox.Record{whole()}
	commit(t, ob, recs)
	before := ob.Stats()
	announced := 0
	if err := ob.Watch(func(refs []outbox.Ref) { announced += len(refs) }); err != nil {
		t.Fatal(err)
	}
	closeStore(t, st) // fails every write, as a failed flush does
	c, err := ob.Append([]outbox.Record{whole()})
	if err == nil {
		err = c.Wait(t.Context())
	}
	if !errors.Is(err, store.ErrClosed) {
		t.Errorf("Append: %v", err)
	}
	if err := ob.Remove(recs[0].Seq).Wait(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Remove: %v", err)
	}
	if diff := cmp.Diff(before, ob.Stats()); diff != "" {
		t.Errorf("what failed is counted: %s", diff)
	}
	if announced != 1 {
		t.Errorf("%d announced, want 1", announced)
	}
}

// TestLargeOutbox: a backlog of many lanes costs little memory, and none of it is in the cache.
func TestLargeOutbox(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	st, ob := open(t, path, outbox.Options{})
	const n = 50_000
	fill(t, ob, n, 5000)
	bytes := ob.Stats().Bytes
	closeStore(t, st)
	_, ob = open(t, path, outbox.Options{})
	if s := ob.Stats(); s.Records != n || s.Bytes != bytes {
		t.Errorf("%d records, %d bytes, want %d, %d", s.Records, s.Bytes, n, bytes)
	}
	next, lanes := uint64(1), make(map[string]int)
	if err := ob.Watch(func(refs []outbox.Ref) {
		for _, r := range refs {
			if r.Seq != next {
				t.Fatalf("seq %d, want %d", r.Seq, next)
			}
			next++
			lanes[r.Lane]++
		}
	}); err != nil {
		t.Fatal(err)
	}
	if next != n+1 || len(lanes) != 5000 {
		t.Errorf("%d records in %d lanes", next-1, len(lanes))
	}
}

// TestDamagedFile flips bits: then the outbox doesn't open, or tells which record is damaged, or has them all; never
// another content than what was stored.
func TestDamagedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	st, ob := open(t, path, outbox.Options{})
	var recs []outbox.Record
	for i := range 60 {
		r := whole()
		r.ID = fmt.Sprint("id-", i)
		r.Body = bytes.Repeat([]byte{byte(i)}, 300+100*i)
		recs = append(recs, r)
	}
	commit(t, ob, recs)
	wait(t, ob.Reschedule(recs[5].Seq, 2, noon, "status 500"))
	wait(t, ob.Bury(recs[7].Seq, outbox.DeadLetter{Reason: "poison", Response: []byte("no")}))
	wait(t, ob.Bury(recs[8].Seq, outbox.DeadLetter{Reason: "poison"}))
	want := make(map[uint64]outbox.Entry)
	for _, e := range list(t, ob, outbox.Filter{}) {
		want[e.Seq] = e
	}
	used := st.Size()
	closeStore(t, st)
	if err := os.Truncate(path, used); err != nil {
		t.Fatal(err)
	}
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	refused, marked := 0, 0
	for range 300 {
		at := 2*os.Getpagesize() + rnd.IntN(len(sound)-2*os.Getpagesize())
		file := bytes.Clone(sound)
		file[at] ^= 1 << rnd.UintN(8)
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readAll(t, path)
		if after, readErr := os.ReadFile(path); readErr != nil || err != nil && !bytes.Equal(after, file) {
			t.Errorf("byte %d: the file was changed", at)
		}
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), path) || !errors.Is(err, store.ErrCorrupt) && !strings.Contains(err.Error(), "newer version") {
				t.Errorf("byte %d: unclear error %v", at, err)
			}
			continue
		}
		for _, e := range got {
			if e.Err != nil {
				marked++
			} else if w := want[e.Seq]; !reflect.DeepEqual(e, w) {
				// The key itself has no checksum: a record may have got another place in the order.
				e.Seq = w.Seq
				if w.ID != "" && !reflect.DeepEqual(e, w) {
					t.Errorf("byte %d: %s", at, cmp.Diff(w, e))
				}
			}
		}
		if len(got) != len(want) {
			t.Errorf("byte %d: %d entries, want %d", at, len(got), len(want))
		}
	}
	if refused == 0 || marked == 0 {
		t.Errorf("%d refused, %d marked", refused, marked)
	}
}

func readAll(t *testing.T, path string) ([]outbox.Entry, error) {
	st, err := store.Open(path, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		return nil, err
	}
	defer closeStore(t, st)
	ob, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		return nil, err
	}
	if err := ob.Watch(func([]outbox.Ref) {}); err != nil {
		return nil, err
	}
	return list(t, ob, outbox.Filter{}), nil
}

func list(tb testing.TB, ob *outbox.Outbox, f outbox.Filter) []outbox.Entry {
	tb.Helper()
	var all []outbox.Entry
	if err := ob.List(f, func(e outbox.Entry) bool {
		all = append(all, e)
		return true
	}); err != nil {
		tb.Fatal(err)
	}
	return all
}

func commit(tb testing.TB, ob *outbox.Outbox, recs []outbox.Record) {
	tb.Helper()
	c, err := ob.Append(recs)
	if err != nil {
		tb.Fatal(err)
	}
	wait(tb, c)
}

func wait(tb testing.TB, c *outbox.Commit) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := c.Wait(ctx); err != nil {
		tb.Fatal(err)
	}
}
