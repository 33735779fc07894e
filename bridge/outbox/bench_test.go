package outbox_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

var benchBody = bytes.Repeat([]byte(`{"vin":"V7","decel":7.25},`), 6)

// benchRecord is stored in about 300 bytes.
func benchRecord(lane string) outbox.Record {
	return outbox.Record{
		Rule: "hard-brake", Generation: "0123456789ab", Destination: "center",
		Lane: lane, Ordered: true, Body: benchBody, Topic: "fleet/v7/telemetry", ClientID: lane,
		Published: time.Now(), TraceID: "0123456789abcdef0123456789abcdef",
	}
}

// BenchmarkAppend has a number of appends under way that each wait for the disk; one op is one durable record.
func BenchmarkAppend(b *testing.B) {
	for _, inFlight := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("inflight=%d", inFlight), func(b *testing.B) {
			_, ob := open(b, filepath.Join(b.TempDir(), "outbox.db"), outbox.Options{})
			b.ReportAllocs()
			concurrently(b, inFlight, func() {
				c, err := ob.Append([]outbox.Record{benchRecord("v7")})
				if err == nil {
					err = c.Wait(context.Background())
				}
				if err != nil {
					b.Error(err)
				}
			})
		})
	}
}

// BenchmarkAppendRemove is the steady state: each append has a removal follow it, as a delivery does, with a backlog of
// 20,000 between them; 64 appends in flight.
func BenchmarkAppendRemove(b *testing.B) {
	_, ob := open(b, filepath.Join(b.TempDir(), "outbox.db"), outbox.Options{})
	const backlog = 20_000
	queue := make(chan uint64, backlog+1<<16)
	if err := ob.Watch(func(refs []outbox.Ref) {
		for _, r := range refs {
			queue <- r.Seq
		}
	}); err != nil {
		b.Fatal(err)
	}
	for range backlog / 1000 {
		recs := make([]outbox.Record, 1000)
		for i := range recs {
			recs[i] = benchRecord("v7")
		}
		if _, err := ob.Append(recs); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	concurrently(b, 64, func() {
		c, err := ob.Append([]outbox.Record{benchRecord("v7")})
		if err == nil {
			err = c.Wait(context.Background())
		}
		if err != nil {
			b.Error(err)
		}
		ob.Remove(<-queue)
	})
}

func BenchmarkLoad(b *testing.B) {
	for _, cached := range []bool{true, false} {
		b.Run(fmt.Sprintf("cached=%t", cached), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "outbox.db")
			st, ob := open(b, path, outbox.Options{})
			const n = 10_000
			fill(b, ob, n, 100)
			if !cached {
				closeStore(b, st)
				_, ob = open(b, path, outbox.Options{})
			}
			b.ReportAllocs()
			i := uint64(0)
			for b.Loop() {
				if _, err := ob.Load(i%n + 1); err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
	}
}

// BenchmarkOpen is a restart with 100,000 records in 10,000 lanes: one op opens the store and announces every record.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "outbox.db")
	st, ob := open(b, path, outbox.Options{})
	const n = 100_000
	fill(b, ob, n, 10_000)
	closeStore(b, st)
	b.ReportAllocs()
	for b.Loop() {
		st, err := store.Open(path, store.Options{Buckets: outbox.Buckets()})
		if err != nil {
			b.Fatal(err)
		}
		ob, err := outbox.Open(st, outbox.Options{})
		if err != nil {
			b.Fatal(err)
		}
		announced := 0
		if err := ob.Watch(func(refs []outbox.Ref) { announced += len(refs) }); err != nil || announced != n {
			b.Fatal(announced, err)
		}
		closeStore(b, st)
	}
}

// concurrently runs fn b.N times in n goroutines.
func concurrently(b *testing.B, n int, fn func()) {
	var wg sync.WaitGroup
	var next atomic.Int64
	b.ResetTimer()
	for range n {
		wg.Go(func() {
			for next.Add(1) <= int64(b.N) {
				fn()
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}

// fill appends n records in a number of lanes and waits for the disk.
func fill(tb testing.TB, ob *outbox.Outbox, n, lanes int) {
	tb.Helper()
	for done := 0; done < n; {
		recs := make([]outbox.Record, min(1000, n-done))
		for i := range recs {
			recs[i] = benchRecord(fmt.Sprintf("vehicle-%06d", (done+i)%lanes))
		}
		c, err := ob.Append(recs)
		if err != nil {
			tb.Fatal(err)
		}
		if err := c.Wait(context.Background()); err != nil {
			tb.Fatal(err)
		}
		done += len(recs)
	}
}

func open(tb testing.TB, path string, o outbox.Options) (*store.Store, *outbox.Outbox) {
	tb.Helper()
	st, err := store.Open(path, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closeStore(tb, st) })
	ob, err := outbox.Open(st, o)
	if err != nil {
		tb.Fatal(err)
	}
	return st, ob
}

func closeStore(tb testing.TB, st *store.Store) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := st.Close(ctx); err != nil {
		tb.Error(err)
	}
}
