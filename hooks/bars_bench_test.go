package hooks_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/store"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
)

// These benchmarks put figures to what a broker for a fleet has to bear. They assert nothing about speed: the figures are
// those of the machine and of what else it does. Some do their work once, however long the benchmark may take: the loop goes
// round empty then, and ns/op is left out.

// once runs fn in the first round of b.Loop alone.
func once(b *testing.B, fn func()) {
	for first := true; b.Loop(); first = false {
		if first {
			fn()
		}
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkIdleConnections: the resident memory of a process with 10,000 connected clients that do nothing, for each of them, its own
// included, the first time and the third. Linux alone tells it.
func BenchmarkIdleConnections(b *testing.B) {
	const clients = 10_000
	for _, role := range []string{"ours", "plain"} {
		b.Run(role, func(b *testing.B) {
			once(b, func() {
				c := startChild(b, role)
				for cycle := 1; cycle <= 3; cycle++ {
					var peers []*peer
					for i := range clients {
						p, _, err := connectPeer(c.address, 4, fmt.Sprint("v", i), true)
						if err != nil {
							b.Fatal(err)
						}
						peers = append(peers, p)
					}
					if cycle != 2 {
						b.ReportMetric(float64(residentBytes(b, c.cmd.Process.Pid))/clients, fmt.Sprintf("B/conn-%d", cycle))
					}
					for _, p := range peers {
						p.Close()
					}
				}
			})
		})
	}
}

// residentBytes is what /proc tells of a process.
func residentBytes(b *testing.B, pid int) int {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		b.Skip("resident memory is not to be had: ", err)
	}
	var size, resident int
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		b.Fatal(err)
	}
	return resident * os.Getpagesize()
}

func benchServer(b *testing.B, appendRecords func([]bridge.Record) (hooks.Commit, error), change ...func(*hooks.Options)) *served {
	b.Helper()
	s := serve(b, appendRecords, change...)
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			b.Error(err)
		}
	})
	return s
}

// benchPeer is a connected peer that is closed with the benchmark.
func benchPeer(b *testing.B, s *served, version byte, id string) *peer {
	b.Helper()
	p, _, err := connectPeer(s.address, version, id, true)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

func nothingMatches([]bridge.Record) (hooks.Commit, error) {
	return nil, errors.New("this publish should have matched nothing")
}

// each calls fn with what p reads, in a goroutine of its own, until p is closed.
func (p *peer) each(fn func(frame)) {
	_ = p.SetReadDeadline(time.Time{})
	go func() {
		for {
			f, err := p.read()
			if err != nil {
				return
			}
			fn(f)
		}
	}()
}

// delays collects durations.
type delays struct {
	mu  sync.Mutex
	all []time.Duration
}

func (d *delays) add(took time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all = append(d.all, took)
}

// await waits for n of them, a few seconds at most, and returns how many are lacking.
func (d *delays) await(n int) int {
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(time.Millisecond) {
		d.mu.Lock()
		lacking := n - len(d.all)
		d.mu.Unlock()
		if lacking <= 0 || time.Now().After(end) {
			return lacking
		}
	}
}

func (d *delays) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all = nil
}

// report reports a percentile in milliseconds; 100 is the greatest.
func (d *delays) report(b *testing.B, percentile int, unit string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slices.Sort(d.all)
	if n := len(d.all); n > 0 {
		b.ReportMetric(float64(d.all[min(n*percentile/100, n-1)].Microseconds())/1000, unit)
	}
}

// sentAt keeps when the publish of each packet identifier was sent.
type sentAt [1 << 16]atomic.Int64

func (s *sentAt) set(id uint16) { s[id].Store(time.Now().UnixNano()) }
func (s *sentAt) since(id uint16) time.Duration {
	return time.Duration(time.Now().UnixNano() - s[id].Load())
}

// BenchmarkStalledSubscriber: how long a message takes from the publisher's write to each of 100 subscribers at QoS 1,
// without and with one more subscriber that reads nothing, and for which megabytes wait. An operation is a publish; 50 go out a
// second. Whether the one that reads nothing is still connected at the end is told too: a server may send it away.
func BenchmarkStalledSubscriber(b *testing.B) {
	const subscribers, pause = 100, 20 * time.Millisecond
	for _, stalled := range []int{0, 1} {
		b.Run(fmt.Sprintf("stalled=%d", stalled), func(b *testing.B) {
			s := benchServer(b, nothingMatches)
			publisher := benchPeer(b, s, 4, "publisher")
			if stalled == 1 {
				stall(b, benchPeer(b, s, 4, "stalled"), publisher)
			}
			var took delays
			for i := range subscribers {
				p := benchPeer(b, s, 4, fmt.Sprint("subscriber-", i))
				if err := p.subscribe("bench", 1); err != nil {
					b.Fatal(err)
				}
				p.each(func(f frame) {
					_, id, payload, err := f.publish(4)
					if err != nil {
						b.Errorf("got %s: %v", packets.PacketNames[f.kind], err)
						return
					}
					took.add(time.Duration(time.Now().UnixNano() - int64(binary.BigEndian.Uint64(payload))))
					_, _ = p.Write(appendAck(nil, packets.Puback, id))
				})
			}
			publisher.each(func(frame) {})
			var id uint16
			send := func() {
				id = after(id)
				payload := binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
				if _, err := publisher.Write(appendPublish(nil, 4, "bench", 1, false, id, payload)); err != nil {
					b.Fatal(err)
				}
			}
			send() // finds everything cold
			took.await(subscribers)
			took.reset()

			tick := time.NewTicker(pause)
			defer tick.Stop()
			n := 0
			for b.Loop() {
				send()
				n++
				<-tick.C
			}
			lost := took.await(n * subscribers)
			took.report(b, 50, "p50-ms")
			took.report(b, 99, "p99-ms")
			b.ReportMetric(float64(lost), "lost")
			if stalled == 1 {
				b.ReportMetric(s.sum(b, "throughline_connections")-subscribers-1, "stalled-connected")
			}
			b.ReportMetric(0, "ns/op") // it is the pause
		})
	}
}

// stall subscribes, and has more sent than sockets' buffers take, so that the server keeps the rest.
func stall(b *testing.B, deaf, publisher *peer) {
	b.Helper()
	for _, filter := range []string{"fill", "bench"} {
		if err := deaf.subscribe(filter, 1); err != nil {
			b.Fatal(err)
		}
	}
	var fill []byte
	for range 128 {
		fill = appendPublish(fill, 4, "fill", 0, false, 0, make([]byte, 64<<10))
	}
	if _, err := publisher.Write(append(fill, pingreq...)); err != nil {
		b.Fatal(err)
	}
	if _, err := publisher.expect(packets.Pingresp); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkConnectStorm: the greatest delay of a PUBACK for a steady client's 200 publishes a second, while 3,000 clients, 50 at a
// time, connect, subscribe and disconnect; with a rule that each of their events matches, and without.
func BenchmarkConnectStorm(b *testing.B) {
	b.Run("no rule", func(b *testing.B) { connectStorm(b, benchServer(b, nothingMatches)) })
	b.Run("events", func(b *testing.B) {
		queue := &groupQueue{flush: func() (time.Duration, error) { return time.Millisecond, nil }}
		queue.run(nil)
		b.Cleanup(queue.stop)
		s := benchServer(b, queue.append, selecting(b, `SELECT * FROM "$events/client/+", "$events/session/+"`))
		connectStorm(b, s)
		b.ReportMetric(s.sum(b, "throughline_events_matched_total"), "events")
	})
}

func connectStorm(b *testing.B, s *served) {
	const connects, together, pause = 3000, 50, 5 * time.Millisecond
	steady := benchPeer(b, s, 4, "steady")
	var sent sentAt
	var took delays
	steady.each(func(f frame) {
		if id, _, err := f.ack(); err == nil {
			took.add(sent.since(id))
		}
	})
	once(b, func() {
		stop := make(chan struct{})
		var publishing, storm sync.WaitGroup
		n := 0
		publishing.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			var id uint16
			for {
				select {
				case <-tick.C:
				case <-stop:
					return
				}
				id = after(id)
				sent.set(id)
				if _, err := steady.Write(appendPublish(nil, 4, "bench", 1, false, id, []byte("x"))); err != nil {
					b.Error(err)
					return
				}
				n++
			}
		})
		var next atomic.Int64
		began := time.Now()
		for range together {
			storm.Go(func() {
				for i := next.Add(1); i <= connects; i = next.Add(1) {
					p, _, err := connectPeer(s.address, byte(4+i%2), fmt.Sprint("storm-", i), true)
					if err == nil {
						if err = p.subscribe("storm/#", 1); err == nil {
							_, err = p.Write([]byte{packets.Disconnect << 4, 0})
						}
						p.Close()
					}
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		storm.Wait()
		lasted := time.Since(began)
		close(stop)
		publishing.Wait()
		lacking := took.await(n)
		took.report(b, 50, "p50-ms")
		took.report(b, 100, "max-ms")
		b.ReportMetric(float64(lacking), "unacknowledged")
		b.ReportMetric(connects/lasted.Seconds(), "connects/s")
	})
}

// BenchmarkDiskStall: a client with 100 publishes in flight, all of which match, goes on while a commit takes three seconds. What is
// told is the longest that it waited for a PINGRESP, and whether its connection, of which the keepalive is one second, lived.
func BenchmarkDiskStall(b *testing.B) {
	const window, stall, pause = 100, 3 * time.Second, 20 * time.Millisecond
	var stalling atomic.Bool
	queue := &groupQueue{flush: func() (time.Duration, error) {
		if stalling.CompareAndSwap(true, false) {
			return stall, nil
		}
		return time.Millisecond, nil
	}}
	queue.run(nil)
	b.Cleanup(queue.stop)
	s := benchServer(b, queue.append)
	p, err := dialPeer(s.address, 4)
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	if _, err := p.connect("vehicle", true, 1); err != nil {
		b.Fatal(err)
	}
	once(b, func() {
		pongs, acks := make(chan struct{}, 1), make(chan struct{}, window)
		for range window {
			acks <- struct{}{}
		}
		p.each(func(f frame) {
			switch f.kind {
			case packets.Pingresp:
				pongs <- struct{}{}
			case packets.Puback:
				acks <- struct{}{}
			}
		})
		var writing, publishing sync.WaitGroup
		var mu sync.Mutex // of writes
		stop := make(chan struct{})
		write := func(frame []byte) bool {
			mu.Lock()
			defer mu.Unlock()
			_, err := p.Write(frame)
			return err == nil
		}
		var acked atomic.Int64
		publishing.Go(func() {
			var id uint16
			for {
				select {
				case <-acks:
					acked.Add(1)
				case <-stop:
					return
				}
				id = after(id)
				if !write(appendPublish(nil, 4, "fleet/v7/telemetry", 1, false, id, []byte(braking))) {
					return
				}
			}
		})
		var pings delays
		lived := 1.0
		writing.Go(func() {
			for {
				began := time.Now()
				if !write(pingreq) {
					lived = 0
					return
				}
				select {
				case <-pongs:
					pings.add(time.Since(began))
				case <-time.After(2 * stall):
					pings.add(time.Since(began))
					lived = 0
					return
				}
				select {
				case <-time.After(pause):
				case <-stop:
					return
				}
			}
		})
		time.Sleep(200 * time.Millisecond)
		stalling.Store(true)
		time.Sleep(stall)
		before := acked.Load()
		time.Sleep(500 * time.Millisecond)
		if acked.Load() == before { // the disk is back, and the window is still full
			lived = 0
		}
		close(stop)
		writing.Wait()
		publishing.Wait()
		pings.report(b, 100, "max-ping-ms")
		b.ReportMetric(lived, "lived")
		b.ReportMetric(float64(acked.Load()), "acknowledged")
	})
}

// accepting is a destination that has every record at once, so that records don't pile up in the outbox and no network is measured.
type accepting struct{}

func (accepting) Send(context.Context, *bridge.Request) bridge.Response {
	return bridge.Response{Status: http.StatusNoContent}
}

// BenchmarkAckGate: acknowledgements a second for a client with 100 publishes in flight, all of which match, with the
// outbox on the test's disk. Records are taken out again as fast as they can be. An operation is 1,000 publishes.
func BenchmarkAckGate(b *testing.B) {
	const window, batch = 100, 1000
	st, err := store.Open(filepath.Join(b.TempDir(), "outbox.db"), store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		b.Fatal(err)
	}
	queue, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		b.Fatal(err)
	}
	tracer, err := skywalking.NewTracer(skywalking.Options{Service: "broker", Instance: "broker@test"})
	if err != nil {
		b.Fatal(err)
	}
	forwarder, err := bridge.New(bridge.Options{Queue: queue, Tracer: tracer, Sender: accepting{}})
	if err != nil {
		b.Fatal(err)
	}
	forwarder.SetDestinations([]bridge.Destination{{Name: "notification-center", URL: "http://127.0.0.1:1/notify", Concurrency: 64}})
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := errors.Join(forwarder.Stop(ctx), st.Close(ctx)); err != nil {
			b.Error(err)
		}
	})
	s := benchServer(b, func(records []bridge.Record) (hooks.Commit, error) { return forwarder.Append(records) },
		func(o *hooks.Options) { o.Space = queue.Space() })
	p := benchPeer(b, s, 4, "vehicle")
	free := make(chan struct{}, window)
	for range window {
		free <- struct{}{}
	}
	p.each(func(f frame) {
		if f.kind == packets.Puback {
			free <- struct{}{}
		}
	})
	var id uint16
	var out []byte
	ops := 0
	b.ReportAllocs()
	for b.Loop() {
		ops++
		for range batch {
			select {
			case <-free:
			default: // nothing more may go out: what is gathered goes now
				if _, err := p.Write(out); err != nil {
					b.Fatal(err)
				}
				out = out[:0]
				select {
				case <-free:
				case <-time.After(patience):
					b.Fatal("no acknowledgement comes")
				}
			}
			id = after(id)
			out = appendPublish(out, 4, "fleet/v7/telemetry", 1, false, id, []byte(braking))
		}
	}
	if _, err := p.Write(out); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(ops*batch)/b.Elapsed().Seconds(), "acks/s")
}

// BenchmarkFloodOfFrames: what a small frame costs that comes with a thousand others in one write. An operation is such a write, and
// over when the server has answered its last frame.
func BenchmarkFloodOfFrames(b *testing.B) {
	const frames = 1000
	for _, c := range []struct {
		name  string
		frame []byte
	}{
		{"pingreq", pingreq},
		{"publish", appendPublish(nil, 4, "nobody/listens", 0, false, 0, []byte("x"))},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := benchServer(b, nothingMatches)
			p := benchPeer(b, s, 4, "flooding")
			answers := 1 // the PINGRESP of the PINGREQ at the end
			if bytes.Equal(c.frame, pingreq) {
				answers += frames
			}
			flood := append(bytes.Repeat(c.frame, frames), pingreq...)
			answered := make(chan struct{}, 1)
			n := 0
			p.each(func(frame) {
				if n++; n%answers == 0 {
					answered <- struct{}{}
				}
			})
			ops := 0
			b.ReportAllocs()
			for b.Loop() {
				ops++
				if _, err := p.Write(flood); err != nil {
					b.Fatal(err)
				}
				select {
				case <-answered:
				case <-time.After(patience):
					b.Fatal("no answer")
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(ops*frames), "ns/frame")
		})
	}
}
