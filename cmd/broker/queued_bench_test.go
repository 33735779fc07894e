package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// The bar is set with -queued 1000000 -lanes 100000; less is for a look whether the benchmark still runs.
var (
	queuedRecords = flag.Int("queued", 20_000, "records of BenchmarkQueued")
	queuedLanes   = flag.Int("lanes", 2_000, "lanes of BenchmarkQueued")
)

// BenchmarkQueued starts a broker, in a process of its own, on a queue that an outage has left, while the webhook is still
// away; then the webhook returns. It reports how long the start takes, the broker's memory that no file backs
// (RssAnon) before the return and its greatest after it, when the first delivery came, and deliveries per second in the first second and in the first ten.
func BenchmarkQueued(b *testing.B) {
	dir := b.TempDir()
	sink, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	address := sink.Addr().String()
	sink.Close()
	fillOutbox(b, filepath.Join(dir, "data"))
	writeRules(b, dir, address, hardBrake)
	admin := freeAddress(b)
	config := filepath.Join(dir, "broker.yaml")
	text := fmt.Sprintf("listeners: [{name: tcp, address: %q}]\ndata_dir: data\nrules: {dir: rules.d}\ntrace: {collector: \"\"}\nadmin: {address: %q}\n", freeAddress(b), admin)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}

	began := time.Now()
	broker := runBroker(b, config, admin)
	b.ReportMetric(time.Since(began).Seconds(), "start-s")
	b.ReportMetric(rssAnon(b, broker.Process.Pid), "queued-MB")

	var taken atomic.Int64
	first := make(chan struct{})
	server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if taken.Add(1) == 1 {
			close(first)
		}
	})}
	back := time.Now()
	if sink, err = net.Listen("tcp", address); err != nil {
		b.Fatal(err)
	}
	go func() { _ = server.Serve(sink) }()
	defer server.Close()
	<-first
	b.ReportMetric(time.Since(back).Seconds(), "first-s")
	peak, start := 0.0, time.Now()
	for _, part := range []struct {
		until time.Duration
		name  string
	}{{time.Second, "1s-records/s"}, {10 * time.Second, "10s-records/s"}} {
		for time.Since(start) < part.until && taken.Load() < int64(*queuedRecords) {
			time.Sleep(50 * time.Millisecond)
			peak = max(peak, rssAnon(b, broker.Process.Pid))
		}
		b.ReportMetric(float64(taken.Load())/time.Since(start).Seconds(), part.name)
	}
	b.ReportMetric(peak, "draining-MB")
	_ = broker.Process.Signal(syscall.SIGTERM)
	if err := broker.Wait(); err != nil {
		b.Error(err)
	}
}

// fillOutbox makes a data directory with queued records, of some 300 bytes each.
func fillOutbox(b *testing.B, dir string) {
	b.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	st, err := store.Open(filepath.Join(dir, storeFile), store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = st.Close(context.Background()) }()
	o, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		b.Fatal(err)
	}
	body := []byte(`{"event":"hard-brake","vin":"V7","decel":7.25,"text":"` + strings.Repeat("x", 100) + `"}`)
	recs := make([]outbox.Record, 0, 1000)
	for i := range *queuedRecords {
		lane := fmt.Sprint("vehicle-", i%*queuedLanes)
		recs = append(recs, outbox.Record{
			Rule: "hard-brake", Destination: "notification-center", Lane: lane, Ordered: true,
			Body: body, Topic: "fleet/" + lane + "/telemetry", ClientID: lane,
		})
		if len(recs) < cap(recs) && i+1 < *queuedRecords {
			continue
		}
		c, err := o.Append(recs)
		if err == nil {
			err = c.Wait(context.Background())
		}
		if err != nil {
			b.Fatal(err)
		}
		recs = recs[:0]
	}
}

// rssAnon is the resident memory of a process that no file backs, in MB.
func rssAnon(b *testing.B, pid int) float64 {
	b.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Skip("no /proc here:", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "RssAnon:"); ok {
			kb, _ := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 64)
			return kb / 1e3
		}
	}
	b.Fatal("no RssAnon")
	return 0
}
