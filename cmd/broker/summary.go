package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/store"
)

const (
	// summaryEvery is how often one line in the log says how deliveries are, while any waits.
	summaryEvery = time.Minute
	// summaryNames bounds the destinations that it names for each state.
	summaryNames = 10
)

// summarySources are where its numbers come from. The counts are since the start.
type summarySources struct {
	stats        func() bridge.Stats
	destinations func() []bridge.Status
	attempts     func() map[bridge.Class]uint64
	flushes      func() store.Flushes
}

// counts are what a summary tells the change of.
type counts struct {
	attempts map[bridge.Class]uint64
	flushes  store.Flushes
	appended uint64
}

// startSummary logs a line a minute until the function is called that it
// returns, which waits for the last one.
func startSummary(from summarySources, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		every := time.NewTicker(summaryEvery)
		defer every.Stop()
		before := from.count(from.stats())
		for {
			select {
			case <-ctx.Done():
				return
			case <-every.C:
				s := from.stats()
				now := from.count(s)
				if s.Records > 0 {
					log.Info("deliveries wait", from.line(s, before, now)...)
				}
				before = now
			}
		}
	})
	return func() {
		cancel()
		done.Wait()
	}
}

func (from summarySources) count(s bridge.Stats) counts {
	c := counts{attempts: from.attempts(), flushes: from.flushes()}
	for _, u := range s.Destinations {
		c.appended += u.Appended
	}
	return c
}

// line returns what there is to tell: how it is, and what happened since before.
func (from summarySources) line(s bridge.Stats, before, now counts) []any {
	oldest := ""
	for name, u := range s.Destinations { // of several that are as old, always the same
		if !u.Oldest.IsZero() && u.Oldest.Equal(s.Oldest) && (oldest == "" || name < oldest) {
			oldest = name
		}
	}
	var attempts []slog.Attr
	for class, n := range now.attempts {
		attempts = append(attempts, slog.Uint64(string(class), n-before.attempts[class]))
	}
	slices.SortFunc(attempts, func(a, b slog.Attr) int { return cmp.Compare(a.Key, b.Key) })
	in := map[bridge.State][]string{}
	for _, d := range from.destinations() {
		in[d.State] = append(in[d.State], d.Name)
	}
	var flush time.Duration
	var perFlush float64
	if n := now.flushes.Count - before.flushes.Count; n > 0 {
		flush = (now.flushes.Time - before.flushes.Time) / time.Duration(n)
		perFlush = float64(now.appended-before.appended) / float64(n)
	}
	return []any{
		"records", s.Records,
		"bytes", s.Bytes,
		"oldest", max(0, time.Since(s.Oldest)).Round(time.Second),
		"oldest_destination", oldest,
		slog.GroupAttrs("attempts", attempts...),
		"failing", some(in[bridge.StateFailing]),
		"paused", some(in[bridge.StatePaused]),
		"undefined", some(in[bridge.StateUndefined]),
		"dead_letters", s.DeadLetters,
		"flush_mean", flush.Round(10 * time.Microsecond),
		"records_per_flush", fmt.Sprintf("%.1f", perFlush),
	}
}

// some joins names, a bounded number of them.
func some(names []string) string {
	if more := len(names) - summaryNames; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:summaryNames], ","), more)
	}
	return strings.Join(names, ",")
}
