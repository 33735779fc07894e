package outbox_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

// kb are records of the destinations named, a little over 1 kB each.
func kb(destinations ...string) []outbox.Record {
	recs := make([]outbox.Record, len(destinations))
	for i, name := range destinations {
		recs[i] = outbox.Record{Destination: name, Body: make([]byte, 1<<10)}
	}
	return recs
}

// droppedOf is throughline_outbox_dropped_total by destination.
func droppedOf(t *testing.T, r *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "throughline_outbox_dropped_total" {
				all[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	return all
}

// What is appended while something is full: d and d2 may be dropped, r and r2 may not.
func TestDrop(t *testing.T) {
	drop := func(limit int64) outbox.Cap { return outbox.Cap{MaxBytes: limit, Drop: true} }
	refuse := func(limit int64) outbox.Cap { return outbox.Cap{MaxBytes: limit} }
	const one, none = 1500, 0 // room for one record
	for _, tt := range []struct {
		name          string
		d, d2, r, r2  outbox.Cap
		all           int64
		before, now   []string
		want, dropped string // of now
		full          string // part of the error, if it is refused
	}{
		{
			name: "one that may be dropped", d: drop(one), r: refuse(none),
			before: []string{"d"}, now: []string{"d", "r", "d2"}, want: "r d2", dropped: "d",
		},
		{
			name: "nothing else", d: drop(one),
			before: []string{"d"}, now: []string{"d"}, dropped: "d",
		},
		{
			name: "all that may be dropped", d: drop(one), d2: drop(one),
			before: []string{"d", "d2"}, now: []string{"d2", "d", "d2"}, dropped: "d2 d d2",
		},
		{
			name: "several rows of one", d: drop(2 * one), r: refuse(none),
			before: []string{"d"}, now: []string{"d", "r", "d"}, want: "r", dropped: "d d",
		},
		{
			name: "any that refuses refuses all", d: drop(one), r: refuse(one),
			before: []string{"d", "r"}, now: []string{"d", "r", "r2"}, full: `destination "r"`,
		},
		{
			name: "one that refuses while the other has room", d: drop(none), r: refuse(one),
			before: []string{"r"}, now: []string{"d", "r"}, full: `destination "r"`,
		},
		{
			name: "the whole outbox, and the rest fits", d: drop(none), r: refuse(none), all: 2 * one,
			before: []string{"r"}, now: []string{"d", "r", "d"}, want: "r", dropped: "d d",
		},
		{
			name: "the whole outbox, and the rest doesn't fit", d: drop(none), r: refuse(none), all: 2 * one,
			before: []string{"r", "r"}, now: []string{"d", "r"}, full: "bytes used",
		},
		{
			name: "the whole outbox, and there is no rest", d: drop(none), all: one,
			before: []string{"d"}, now: []string{"d"}, dropped: "d",
		},
		{
			name: "own cap first, so that the rest has room", d: drop(one), d2: drop(none), all: 3 * one,
			before: []string{"d"}, now: []string{"d", "d2"}, want: "d2", dropped: "d",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := prometheus.NewRegistry()
			caps := outbox.Caps{Of: map[string]outbox.Cap{"d": tt.d, "d2": tt.d2, "r": tt.r, "r2": tt.r2}}
			_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{MaxBytes: tt.all, Caps: caps, Registerer: r})
			commit(t, ob, kb(tt.before...))
			before := ob.Stats()

			recs := kb(tt.now...)
			c, err := ob.Append(recs)
			if tt.full != "" {
				if !errors.Is(err, outbox.ErrFull) || !strings.Contains(err.Error(), tt.full) {
					t.Fatalf("error %v, want %s", err, tt.full)
				}
				if s := ob.Stats(); s.Bytes != before.Bytes || s.Records != before.Records {
					t.Errorf("the refused append has left something: %+v, was %+v", s, before)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			var stored, dropped []string
			for _, rec := range recs {
				if rec.Dropped != (rec.Seq == 0) && tt.full == "" {
					t.Errorf("%+v has a Seq and is dropped, or neither", rec)
				}
				if rec.Dropped {
					dropped = append(dropped, rec.Destination)
				} else {
					stored = append(stored, rec.Destination)
				}
			}
			if tt.full == "" && strings.Join(stored, " ") != tt.want || strings.Join(dropped, " ") != tt.dropped {
				t.Errorf("stored %v and dropped %v, want %s and %s", stored, dropped, tt.want, tt.dropped)
			}
			counted := map[string]float64{"d": 0, "d2": 0, "r": 0, "r2": 0}
			for _, name := range dropped {
				counted[name]++
			}
			if got := droppedOf(t, r); !maps.Equal(got, counted) {
				t.Errorf("counted %v, want %v", got, counted)
			}
			if tt.full != "" {
				return
			}
			if tt.want == "" {
				select {
				case <-c.Done(): // nobody waits for a flush
				default:
					t.Error("an append without records waits")
				}
			}
			wait(t, c)
			var queued []string
			for _, e := range list(t, ob, outbox.Filter{}) {
				queued = append(queued, e.Destination)
			}
			if want := slices.Concat(tt.before, stored); !slices.Equal(queued, want) {
				t.Errorf("queued %v, want %v", queued, want)
			}
			// What is counted is what is there.
			for _, e := range list(t, ob, outbox.Filter{}) {
				wait(t, ob.Purge(e.Seq, false))
			}
			if s := ob.Stats(); s.Bytes != 0 || s.Records != 0 || s.Destinations["d"].Bytes != 0 || s.Destinations["r"].Bytes != 0 {
				t.Errorf("stats of the empty outbox: %+v", s)
			}
			if n := len(ob.Space()); n != 0 {
				t.Error("space was announced, though nobody was refused")
			}
		})
	}
}

// When the disk is too slow, what may be dropped is, and the rest waits its turn or is refused.
func TestDropUnflushed(t *testing.T) {
	caps := outbox.Caps{Of: map[string]outbox.Cap{"d": {Drop: true}}}
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{MaxUnflushed: 4 << 10, Caps: caps})
	hold, held := make(chan struct{}), make(chan struct{})
	c, err := ob.Append(kb("r"))
	if err != nil {
		t.Fatal(err)
	}
	c.Watch(func(error) { close(held); <-hold }) // the committer stands still
	<-held
	defer close(hold)
	if _, err := ob.Append(kb("r", "r")); err != nil {
		t.Fatal(err)
	}
	recs := kb("d", "r", "d")
	if _, err := ob.Append(recs); err != nil || !recs[0].Dropped || recs[1].Dropped || !recs[2].Dropped {
		t.Errorf("error %v, dropped %v, %v, %v", err, recs[0].Dropped, recs[1].Dropped, recs[2].Dropped)
	}
	if _, err := ob.Append(kb("d", "r")); !errors.Is(err, outbox.ErrFull) {
		t.Errorf("error %v", err)
	}
	if _, err := ob.Append(kb("d")); err != nil {
		t.Errorf("error %v", err)
	}
}

// What is dead is never dropped by being redriven.
func TestNoDropByRequeue(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	recs := kb("d")
	commit(t, ob, recs)
	wait(t, ob.Bury(recs[0].Seq, outbox.DeadLetter{}))
	ob.SetCaps(outbox.Caps{Default: outbox.Cap{MaxBytes: 100, Drop: true}})
	if _, err := ob.Requeue(recs[0].Seq); !errors.Is(err, outbox.ErrFull) {
		t.Errorf("error %v", err)
	}
	if s := ob.Stats(); s.DeadLetters != 1 {
		t.Errorf("%d dead letters", s.DeadLetters)
	}
}

// The log has a line when dropping begins and one when it ends, with how many; not one for each time at the edge of a cap.
func TestDropIsLogged(t *testing.T) {
	now := noon
	var log bytes.Buffer
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{
		Caps: outbox.Caps{Default: outbox.Cap{MaxBytes: 2500, Drop: true}},
		Now:  func() time.Time { return now }, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	drop := func(n int) {
		t.Helper()
		for range n {
			recs := kb("d")
			if c, err := ob.Append(recs); err != nil || !recs[0].Dropped || c.Err() != nil {
				t.Fatalf("dropped %v, error %v", recs[0].Dropped, err)
			}
		}
	}
	drain := func() {
		t.Helper()
		for _, e := range list(t, ob, outbox.Filter{}) {
			wait(t, ob.Purge(e.Seq, false))
		}
	}
	lines := func(begun, ended int) {
		t.Helper()
		text := log.String()
		if b, e := strings.Count(text, "dropping records"), strings.Count(text, "storing records again"); b != begun || e != ended {
			t.Errorf("%d lines of the beginning and %d of the end, want %d and %d:\n%s", b, e, begun, ended, text)
		}
	}
	commit(t, ob, kb("d", "d"))
	drop(3)
	lines(1, 0)
	drain()
	lines(1, 1)
	if !strings.Contains(log.String(), "destination=d dropped=3") {
		t.Errorf("the log doesn't say how many:\n%s", &log)
	}
	for range 5 { // at the edge
		now = now.Add(time.Second)
		commit(t, ob, kb("d", "d"))
		drop(1)
		drain()
	}
	lines(1, 1)
	now = now.Add(10 * time.Second)
	commit(t, ob, kb("d", "d"))
	drop(2)
	lines(2, 1)
	drain()
	lines(2, 2)
	if !strings.Contains(log.String(), "destination=d dropped=7") {
		t.Errorf("the log has lost those of the edge:\n%s", &log)
	}
}

// Caps that change are in force at once, and let those try again that were refused.
func TestSetCaps(t *testing.T) {
	capped := func(limit int64, drop bool) outbox.Caps {
		return outbox.Caps{Of: map[string]outbox.Cap{"c": {MaxBytes: limit, Drop: drop}}}
	}
	for name, tt := range map[string]struct {
		to      outbox.Caps
		err     bool // appends are refused still
		dropped bool
		told    bool
	}{
		"refuse to drop": {to: capped(1500, true), dropped: true, told: true},
		"more room":      {to: capped(3000, false), told: true},
		"no definition":  {to: outbox.Caps{}, told: true}, // the default: no cap
		"less room":      {to: capped(100, false), err: true, told: true},
		"another's":      {to: outbox.Caps{Of: map[string]outbox.Cap{"c": {MaxBytes: 1500}, "x": {}}}, err: true, told: true},
		"the same":       {to: capped(1500, false), err: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := prometheus.NewRegistry()
			_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Caps: capped(1500, false), Registerer: r})
			commit(t, ob, kb("c"))
			if _, err := ob.Append(kb("c")); !errors.Is(err, outbox.ErrFull) {
				t.Fatalf("error %v", err)
			}
			ob.SetCaps(tt.to)
			if told := len(ob.Space()) == 1; told != tt.told {
				t.Errorf("told of space: %v, want %v", told, tt.told)
			}
			recs := kb("c")
			if _, err := ob.Append(recs); errors.Is(err, outbox.ErrFull) != tt.err || recs[0].Dropped != tt.dropped {
				t.Errorf("error %v, dropped %v", err, recs[0].Dropped)
			}
			if got := ob.Stats().Destinations["c"].Limit; got != tt.to.Of["c"].MaxBytes {
				t.Errorf("stats say %d bytes", got)
			}
			for name := range tt.to.Of {
				if _, ok := droppedOf(t, r)[name]; !ok {
					t.Errorf("no counter for %s", name)
				}
			}
		})
	}
	t.Run("drop to refuse", func(t *testing.T) {
		var log bytes.Buffer
		_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Caps: capped(1500, true), Logger: slog.New(slog.NewTextHandler(&log, nil))})
		commit(t, ob, kb("c"))
		commit(t, ob, kb("c"))
		ob.SetCaps(capped(1500, false))
		if _, err := ob.Append(kb("c")); !errors.Is(err, outbox.ErrFull) {
			t.Errorf("error %v", err)
		}
		if !strings.Contains(log.String(), "destination=c dropped=1") {
			t.Errorf("the log doesn't say that dropping has ended:\n%s", &log)
		}
	})
}

// A destination's counter is there before anything is dropped, and goes with its definition.
func TestDroppedCounters(t *testing.T) {
	r := prometheus.NewRegistry()
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Registerer: r})
	for _, names := range [][]string{{"a", "b"}, {"b", "\xff"}, {}} {
		of := map[string]outbox.Cap{}
		for _, name := range names {
			of[name] = outbox.Cap{}
		}
		ob.SetCaps(outbox.Caps{Of: of})
		if n, err := testutil.GatherAndCount(r, "throughline_outbox_dropped_total"); err != nil || n != len(names) {
			t.Errorf("%d counters for %s, error %v", n, fmt.Sprint(names), err)
		}
	}
}
