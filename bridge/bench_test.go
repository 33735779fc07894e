package bridge_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// sink is a webhook on loopback that takes everything and counts.
func sink(b *testing.B) (url string, taken *atomic.Int64) {
	taken = &atomic.Int64{}
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		taken.Add(1)
	}))
	b.Cleanup(srv.Close)
	return srv.URL + "/notify", taken
}

// records returns n records over a thousand lanes, bodies of 256 bytes.
func records(n int) []bridge.Record {
	_, carrier := stored()
	body := fmt.Appendf(nil, `{"event":"hard-brake","vin":"V7","text":%q}`, strings.Repeat("x", 200))
	recs := make([]bridge.Record, n)
	for i := range recs {
		recs[i] = bridge.Record{
			Rule: "hard-brake", Destination: nc, Lane: fmt.Sprint(i % 1000), Ordered: true, Topic: "fleet/v7/telemetry",
			Body: body, SW8: carrier.SW8, Correlation: carrier.Correlation, TraceID: "trace-1",
		}
	}
	return recs
}

// BenchmarkDeliver is what a record costs from the append to its removal, the
// sink in the same process included: everything over a loopback connection and
// through the outbox on disk.
func BenchmarkDeliver(b *testing.B) {
	url, taken := sink(b)
	d := to(nc)
	d.URL = url
	d.Concurrency = 64
	p := start(b, filepath.Join(b.TempDir(), "outbox.db"), bridge.Schedule{}, d)
	defer p.stop(b)
	const batch = 1000
	recs := records(batch)
	b.ReportAllocs()
	n := int64(0)
	for b.Loop() {
		for i := range recs {
			recs[i].ID = ""
		}
		if _, err := p.Append(recs); err != nil {
			b.Fatal(err)
		}
		n += batch
		for taken.Load() < n {
			time.Sleep(100 * time.Microsecond)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(n), "us/record")
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkBatch is what a batch saves: as BenchmarkDeliver, over concurrency and
// records in a request, with the CPU time of the process, sink included. Each record is
// taken apart from the array by the sink.
func BenchmarkBatch(b *testing.B) {
	for _, most := range []int{1, 10, 100} {
		b.Run(fmt.Sprint("max=", most), func(b *testing.B) {
			taken, requests := &atomic.Int64{}, &atomic.Int64{}
			srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				body, err := io.ReadAll(r.Body)
				if err != nil {
					b.Error(err)
				}
				n := int64(1)
				if parsed := gjson.ParseBytes(body); parsed.IsArray() {
					n = int64(len(parsed.Array()))
				}
				taken.Add(n)
			}))
			b.Cleanup(srv.Close)
			d := to(nc)
			d.URL = srv.URL + "/notify"
			d.Batch = bridge.Batch{Max: most}
			p := start(b, filepath.Join(b.TempDir(), "outbox.db"), bridge.Schedule{}, d)
			defer p.stop(b)
			const backlog = 1000
			recs := records(backlog)
			b.ReportAllocs()
			before, n := cpuTime(), int64(0)
			for b.Loop() {
				for i := range recs {
					recs[i].ID = ""
				}
				if _, err := p.Append(recs); err != nil {
					b.Fatal(err)
				}
				n += backlog
				for taken.Load() < n {
					time.Sleep(100 * time.Microsecond)
				}
			}
			b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(n), "cpu-us/record")
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "records/s")
			b.ReportMetric(float64(n)/float64(requests.Load()), "records/request")
		})
	}
}

// cpuTime is what the process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkWaiting is the memory of a million records that wait for a
// destination that is down, over a hundred thousand lanes.
func BenchmarkWaiting(b *testing.B) {
	lanes := make([]string, 100_000)
	for i := range lanes {
		lanes[i] = fmt.Sprint("vehicle-", i)
	}
	refs := make([]bridge.Ref, 1_000_000)
	for i := range refs {
		refs[i] = bridge.Ref{Seq: uint64(i + 1), Destination: nc, Lane: lanes[i%len(lanes)], Ordered: true, Queued: time.Now()}
	}
	for b.Loop() {
		before := heap()
		br, err := bridge.New(bridge.Options{Queue: &refQueue{refs: refs}, Tracer: tracectxtest.NewRecorder("broker")})
		if err != nil {
			b.Fatal(err)
		}
		br.SetDestinations(nil)
		b.ReportMetric(float64(heap()-before)/float64(len(refs)), "heap-B/record")
		runtime.KeepAlive(br)
	}
}

// refQueue announces refs and holds no records.
type refQueue struct {
	memQueue
	refs []bridge.Ref
}

func (q *refQueue) Watch(fn func([]bridge.Ref)) error {
	for refs := range slices.Chunk(q.refs, 1024) {
		fn(refs)
	}
	return nil
}

// heap returns what is in use after a collection.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
