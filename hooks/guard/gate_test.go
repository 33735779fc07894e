package guard_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// flush is a commit that a test ends.
type flush struct {
	mu       sync.Mutex
	done     chan struct{}
	err      error
	watchers []func(error)
}

func newFlush() *flush { return &flush{done: make(chan struct{})} }

func (f *flush) Done() <-chan struct{} { return f.done }

func (f *flush) Err() error {
	select {
	case <-f.done:
		return f.err
	default:
		return nil
	}
}

func (f *flush) Watch(fn func(error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.done:
		fn(f.err)
	default:
		f.watchers = append(f.watchers, fn)
	}
}

func (f *flush) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
	close(f.done)
	for _, fn := range f.watchers {
		fn(err)
	}
}

// admitted is a client's side and the server's side of a connection whose CONNECT was read.
func admitted(t *testing.T, o guard.Options) (peer net.Conn, server *guard.Conn) {
	t.Helper()
	got := make(chan *guard.Conn)
	release := make(chan struct{})
	l := serve(t, guard.New(o), func(_ string, c blocking) error {
		if _, err := io.ReadFull(c, make([]byte, len(connect))); err != nil {
			return err
		}
		gc := c.Conn
		gc.Admit("v7")
		got <- gc
		<-release
		return nil
	})
	t.Cleanup(func() { close(release) })
	peer = dial(t, l)
	send(t, peer, connect...)
	return peer, <-got
}

func ack(kind, id byte) []byte { return []byte{kind << 4, 2, 0, id} }

var pingresp = []byte{0xd0, 0}

func write(t *testing.T, c *guard.Conn, frames ...[]byte) {
	t.Helper()
	if _, err := c.Write(bytes.Join(frames, nil)); err != nil {
		t.Fatal(err)
	}
}

func wantBytes(t *testing.T, c net.Conn, frames ...[]byte) {
	t.Helper()
	want := bytes.Join(frames, nil)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("peer got % x, %v, want % x", got, err, want)
	}
}

func TestGateHoldsAcknowledgementsAlone(t *testing.T) {
	peer, c := admitted(t, guard.Options{})
	write(t, c, ack(4, 1)) // nothing joined yet
	wantBytes(t, peer, ack(4, 1))

	first, second := newFlush(), newFlush()
	var ended []error
	note := func(err error) { ended = append(ended, err) }
	c.Join(first, note)
	write(t, c, ack(4, 2))
	c.Join(first, note)
	publish := []byte{0x30, 5, 0, 1, 't', 'h', 'i'}
	long := append([]byte{0x40, 0x86, 0x00}, 0, 3, 0x97, 2, 0, 0) // PUBACK with properties, its length in two bytes
	write(t, c, pingresp, long, publish, ack(5, 4))               // several frames in one write
	c.Join(second, note)
	write(t, c, ack(4, 5))
	wantBytes(t, peer, pingresp, publish)

	second.end(nil) // out of turn: the first commit's acknowledgements come first
	write(t, c, pingresp)
	wantBytes(t, peer, pingresp)
	first.end(nil)
	wantBytes(t, peer, ack(4, 2), long, ack(5, 4), ack(4, 5))
	write(t, c, ack(4, 6))
	wantBytes(t, peer, ack(4, 6))
	if len(ended) != 3 || errors.Join(ended...) != nil {
		t.Errorf("done was called with %v", ended)
	}
}

func TestGateFailedCommit(t *testing.T) {
	for _, early := range []bool{false, true} {
		peer, c := admitted(t, guard.Options{})
		f := newFlush()
		if early {
			f.end(errors.New("disk on fire"))
		}
		told := make(chan error, 1)
		c.Join(f, func(err error) { told <- err })
		_, err := c.Write(ack(4, 1))
		if !early {
			f.end(errors.New("disk on fire"))
		} else if err == nil {
			t.Error("an acknowledgement was taken after its commit had failed")
		}
		if err := <-told; err == nil {
			t.Error("done was told of a success")
		}
		wantClosed(t, peer)
		if _, err := c.Write(pingresp); err == nil {
			t.Error("a frame was taken after a failed commit")
		}
	}
}

func TestCloseWritesAllButHeldAcknowledgements(t *testing.T) {
	peer, c := admitted(t, guard.Options{})
	f := newFlush()
	c.Join(f, func(error) {})
	write(t, c, ack(4, 1), pingresp)
	disconnect := []byte{0xe0, 0}
	if err := c.CloseWith(disconnect, time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	f.end(nil)
	wantBytes(t, peer, pingresp, disconnect)
	wantClosed(t, peer)
}

// TestGateIsBounded: past the bound the client is read no further, until the disk is back.
func TestGateIsBounded(t *testing.T) {
	peer, c := admitted(t, guard.Options{})
	f := newFlush()
	c.Join(f, func(error) {})
	const bound = 2048
	for range bound {
		write(t, c, ack(4, 1))
	}
	send(t, peer, pingreq...)
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(blocking{c}, make([]byte, len(pingreq)))
		read <- err
	}()
	select {
	case err := <-read:
		t.Errorf("read on with %d acknowledgements held: %v", bound, err)
	case <-time.After(50 * time.Millisecond):
	}
	f.end(nil)
	if err := <-read; err != nil {
		t.Error(err)
	}
	if _, err := io.CopyN(io.Discard, peer, bound*4); err != nil {
		t.Errorf("the held acknowledgements: %v", err)
	}
}

// TestGateKnowsEveryCommit: one that no acknowledgement came for counts as well.
func TestGateKnowsEveryCommit(t *testing.T) {
	peer, c := admitted(t, guard.Options{})
	first, second := newFlush(), newFlush()
	c.Join(first, func(error) {})
	c.Join(second, func(error) {})
	write(t, c, ack(4, 1))
	second.end(nil)
	write(t, c, ack(4, 2), pingresp)
	wantBytes(t, peer, pingresp)
	first.end(nil)
	wantBytes(t, peer, ack(4, 1), ack(4, 2))
}

// TestKeepaliveDoesNotRunWhileThePeerIsNotRead: what it sent in time was not looked at.
func TestKeepaliveDoesNotRunWhileThePeerIsNotRead(t *testing.T) {
	peer, c := admitted(t, guard.Options{})
	f := newFlush()
	c.Join(f, func(error) {})
	for range 2048 {
		write(t, c, ack(4, 1))
	}
	send(t, peer, pingreq...)
	const keepalive = 200 * time.Millisecond
	c.SetKeepalive(keepalive)
	time.AfterFunc(2*keepalive, func() { f.end(nil) })
	if _, err := io.ReadFull(blocking{c}, make([]byte, len(pingreq))); err != nil {
		t.Error(err)
	}
	if _, err := (blocking{c}).Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a peer that is silent from then on: %v", err)
	}
}

// TestSlowPeerIsNotStalled: all of it takes longer than the stall timeout, but the peer takes some all the time.
func TestSlowPeerIsNotStalled(t *testing.T) {
	const stall = 300 * time.Millisecond
	peer, c := admitted(t, guard.Options{StallTimeout: stall})
	const size = 24 << 20 // far more than the sockets' buffers take
	write(t, c, bytes.Repeat(pingresp, size/2))
	chunk := make([]byte, 1<<20)
	for got := 0; got < size; {
		n, err := io.ReadFull(peer, chunk)
		if got += n; err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
		time.Sleep(stall / 6)
	}
}

func TestCloseEndsAReadThatWaitsForRoom(t *testing.T) {
	_, c := admitted(t, guard.Options{})
	c.Join(newFlush(), func(error) {})
	for range 2048 {
		write(t, c, ack(4, 1))
	}
	read := make(chan error, 1)
	go func() {
		_, err := blocking{c}.Read(make([]byte, 1))
		read <- err
	}()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err == nil {
		t.Error("read a byte that was never sent")
	}
}

// TestStalledPeerNeverBlocksTheServer: what a peer doesn't take waits, up to a bound in time and in bytes.
func TestStalledPeerNeverBlocksTheServer(t *testing.T) {
	message := append([]byte{0x30, 0x80, 0x80, 0x04}, make([]byte, 64<<10)...)
	t.Run("bytes", func(t *testing.T) {
		registry := prometheus.NewRegistry()
		_, c := admitted(t, guard.Options{MaxPacketSize: 1 << 20, Registerer: registry})
		var err error
		written := 0
		for ; err == nil && written < 64<<20; written += len(message) {
			_, err = c.Write(message)
		}
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%d bytes written to a peer that reads nothing: %v", written, err)
		}
		metric(t, registry, "throughline_connections_stalled_total 1")
	})
	t.Run("time", func(t *testing.T) {
		registry := prometheus.NewRegistry()
		_, c := admitted(t, guard.Options{StallTimeout: 50 * time.Millisecond, Registerer: registry})
		for range 512 { // 32 MiB: more than the sockets' buffers take, less than the bound
			if _, err := c.Write(message); err != nil {
				break
			}
		}
		metric(t, registry, "throughline_connections_stalled_total 1")
		if _, err := c.Write(pingresp); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write to a peer that has stalled: %v", err)
		}
	})
}

// TestFramesArriveWholeAndInOrder writes from many goroutines.
func TestFramesArriveWholeAndInOrder(t *testing.T) {
	peer, c := admitted(t, guard.Options{})
	const writers, each = 8, 500
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, err := c.Write([]byte{0x30, 4, byte(w), byte(i >> 8), byte(i), 'x'}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var next [writers]int
	frame := make([]byte, 6)
	for range writers * each {
		if _, err := io.ReadFull(peer, frame); err != nil {
			t.Fatal(err)
		}
		w, i := int(frame[2]), int(frame[3])<<8|int(frame[4])
		if frame[0] != 0x30 || frame[5] != 'x' || i != next[w] {
			t.Fatalf("frame % x, want number %d of writer %d", frame, next[w], w)
		}
		next[w]++
	}
	wg.Wait()
}

// TestOfferIsNoReasonToEnd: what may be lost is, when much waits, and the connection goes on.
func TestOfferIsNoReasonToEnd(t *testing.T) {
	peer, c := admitted(t, guard.Options{MaxPacketSize: 1 << 20})
	message := append([]byte{0x30, 0x80, 0x80, 0x20}, make([]byte, 512<<10)...)
	taken, more := 0, true
	for ok := true; ok; taken++ {
		if ok, more = c.Offer(message); taken > 1000 {
			t.Fatal("a peer that reads nothing is offered without end")
		}
	}
	if more {
		t.Error("more may follow, though something was refused")
	}
	drained := make(chan struct{}, 1)
	c.SetReceiver(receiver{drained: func() { drained <- struct{}{} }})
	if _, err := io.CopyN(io.Discard, peer, int64(taken-1)*int64(len(message))); err != nil {
		t.Error(err)
	}
	<-drained
	if ok, more := c.Offer(pingresp); !ok || !more {
		t.Error("a peer that has read all is refused")
	}
	wantBytes(t, peer, pingresp)
}

type receiver struct{ drained func() }

func (receiver) Acknowledged(byte, uint16, byte) {}
func (r receiver) Drained()                      { r.drained() }

// Drained is called in a goroutine that nobody else recovers.
func TestPanicInDrainedEndsItsConnectionAlone(t *testing.T) {
	registry := prometheus.NewRegistry()
	peer, c := admitted(t, guard.Options{MaxPacketSize: 1 << 20, Registerer: registry})
	c.SetReceiver(receiver{drained: func() { panic("out of cheese") }})
	more := true
	for more {
		var err error
		if more, err = c.Send(append([]byte{0x30, 0x80, 0x80, 0x04}, make([]byte, 64<<10)...), 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = io.Copy(io.Discard, peer) // until it is closed
	metric(t, registry, "throughline_connection_panics_total 1")
}
