package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkPublishToWebhook is the whole way: publishes at QoS 1 from raw connections, each
// matching, until the webhook has got them all. An operation is one message.
func BenchmarkPublishToWebhook(b *testing.B) {
	for _, load := range []struct{ clients, window int }{{1, 1}, {10, 20}, {50, 20}} {
		b.Run(fmt.Sprintf("clients=%d/window=%d", load.clients, load.window), func(b *testing.B) {
			var arrived atomic.Int64
			all := make(chan struct{})
			sink, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			s := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if arrived.Add(1) == int64(b.N) {
					close(all)
				}
			})}
			go s.Serve(sink)
			defer s.Close()
			a := startBenchBroker(b, sink.Addr().String())

			conns := make([]*rawPublisher, load.clients)
			for i := range conns {
				conns[i] = dialRaw(b, a.mqttAddress(), fmt.Sprintf("bench-%d", i))
			}
			b.ReportAllocs()
			b.ResetTimer()
			var wg sync.WaitGroup
			for i, c := range conns {
				n := b.N / load.clients
				if i < b.N%load.clients {
					n++
				}
				wg.Go(func() {
					if err := c.publish(n, load.window, "bench/in/1", `{"mid":123,"value":75,"pad":"abcdefghijklmnopqrstuvwxyz"}`); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
			select {
			case <-all:
			case <-time.After(time.Minute):
				b.Errorf("%d of %d arrived", arrived.Load(), b.N)
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
		})
	}
}

func startBenchBroker(b *testing.B, sink string) *app {
	b.Helper()
	dir := b.TempDir()
	cfg := defaultConfig()
	cfg.Listeners = []listenerConfig{{Name: "tcp", Address: "127.0.0.1:0"}}
	cfg.Auth.Anonymous = true
	cfg.Admin.Address = ""
	cfg.Trace.Collector = ""
	cfg.Trace.Instance = "bench"
	cfg.DataDir = dir
	cfg.Rules.Watch = false
	cfg.Rules.Dir = writeRules(b, dir, sink, `
destinations:
  sink: {url: "http://WEBHOOK/hook", concurrency: 64, ordered: false}
rules:
  - name: over-50
    sql: SELECT payload.mid AS mid, payload.value AS value, clientid FROM "bench/in/+" WHERE payload.value > 50
    actions:
      - http: sink
`)
	a, err := startApp(b.Context(), cfg, discardLog)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := a.stop(); err != nil {
			b.Error(err)
		}
	})
	return a
}

// rawPublisher is as little of an MQTT 3.1.1 client as a load needs, so that a profile shows the broker.
type rawPublisher struct {
	conn net.Conn
	r    *bufio.Reader
	w    *bufio.Writer
}

func dialRaw(b *testing.B, address, clientID string) *rawPublisher {
	b.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	p := &rawPublisher{conn, bufio.NewReader(conn), bufio.NewWriter(conn)}
	connect := append([]byte{0x10, byte(12 + len(clientID)), 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, byte(len(clientID))}, clientID...)
	if _, err := conn.Write(connect); err != nil {
		b.Fatal(err)
	}
	connack := make([]byte, 4)
	if _, err := io.ReadFull(p.r, connack); err != nil || connack[3] != 0 {
		b.Fatalf("CONNACK %x: %v", connack, err)
	}
	return p
}

// publish sends n messages at QoS 1 with window of them in flight, and returns once all are acknowledged.
func (p *rawPublisher) publish(n, window int, topic, payload string) error {
	acked := make(chan struct{}, window)
	for range window {
		acked <- struct{}{}
	}
	failed := make(chan error, 1)
	go func() {
		ack := make([]byte, 4)
		for range n {
			if _, err := io.ReadFull(p.r, ack); err != nil {
				failed <- err
				return
			}
			acked <- struct{}{}
		}
		failed <- nil
	}()
	var id uint16
	for range n {
		select {
		case <-acked:
		default:
			if err := p.w.Flush(); err != nil {
				return err
			}
			select {
			case <-acked:
			case err := <-failed:
				return fmt.Errorf("no acknowledgement: %w", err)
			}
		}
		if id++; id == 0 {
			id = 1
		}
		length := 2 + len(topic) + 2 + len(payload)
		frame := append([]byte{0x32}, binary.AppendUvarint(nil, uint64(length))...)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(topic)))
		frame = append(frame, topic...)
		frame = binary.BigEndian.AppendUint16(frame, id)
		frame = append(frame, payload...)
		if _, err := p.w.Write(frame); err != nil {
			return err
		}
	}
	if err := p.w.Flush(); err != nil {
		return err
	}
	return <-failed
}
