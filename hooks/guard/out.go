package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	// DefaultStallTimeout is how long a peer may take nothing of what waits for it. It has to be
	// above what a vehicle loses on a bad radio link, and below what makes its commands worthless.
	DefaultStallTimeout = 15 * time.Second

	// maxWaiting is how much may wait for one peer, in bytes, beyond one packet of the largest
	// size: enough for a burst to a slow link, and little enough that a hundred stalled peers
	// don't fill the memory.
	maxWaiting = 4 << 20

	// maxHeld is how many acknowledgements are held for one client before it is read no further.
	// It lies above the receive maximum of 1024 that the server announces, and above what MQTT
	// 3.1.1 clients usually have in flight: the PINGREQ of one that has more is not read until the disk is back.
	maxHeld = 2048

	// highWater is how much may wait before the session is told to hold messages back, in bytes: enough for the
	// writer to fill its system calls. At lowWater they may follow again.
	highWater = 512 << 10
	lowWater  = 128 << 10

	// keptBuffer is the capacity that an idle connection may keep.
	keptBuffer = 512
)

// Packet types of frames that acknowledge a publish of the peer (MQTT 5, 2.1.2).
const (
	typePuback = 4
	typePubrec = 5
)

// Commit is something that an acknowledgement waits for. *store.Commit is one.
type Commit interface {
	// Done is closed when it has ended.
	Done() <-chan struct{}
	// Err is how it ended; nil before it has.
	Err() error
	// Watch calls fn once with how it ended, at once if it has. fn must not block.
	Watch(fn func(error))
}

// A StallError says that the peer did not take what waits for it.
type StallError struct {
	After   time.Duration // it took nothing for so long; zero: too much waited
	Waiting int           // bytes, where that was the bound
}

func (e *StallError) Error() string {
	if e.After > 0 {
		return fmt.Sprintf("peer has taken nothing for %v", e.After)
	}
	return fmt.Sprintf("more than %d bytes wait for the peer", e.Waiting)
}

// outbound is the way from the server to the peer. Frames wait in a buffer that a goroutine of
// their own writes, as many as there are in one system call; it lives only while something waits, so that
// writing never blocks the server and an idle connection costs nothing. Acknowledgements of publishes
// that joined a commit wait aside, in order, until it is done: the ack gate.
type outbound struct {
	conn net.Conn
	// failed is called once, without locks, when the peer has stalled, can't be written to, or a commit failed.
	failed func(cause error)

	stall time.Duration
	limit int

	mu      sync.Mutex
	waiting []byte // frames to be written next
	spare   []byte // the other buffer, to be swapped with waiting
	going   int    // bytes that are being written, from the other buffer
	writing bool   // the goroutine lives
	ended   bool   // takes no more frames
	lost    bool   // since the peer is gone: what is written goes nowhere
	last    bool   // when all is written, the write side is closed
	closed  func() // called then

	pressed bool   // highWater was passed, and drained not called since
	drained func() // called without locks at lowWater after that; nil: nobody waits for it

	gate gate
}

// gate holds acknowledgements until their commits are done.
type gate struct {
	joined []joined      // the commits that are not done well, in order, each once
	bytes  []byte        // the held frames, one after the other
	acks   int           // how many
	room   chan struct{} // made when a reader waits for room, and closed when there is some
}

// joined is a commit, and what was held since it was joined.
type joined struct {
	commit      Commit
	acks, bytes int
}

func (o *outbound) init(conn net.Conn, stall time.Duration, limit int, failed func(error)) {
	o.conn, o.stall, o.limit, o.failed = conn, stall, limit, failed
}

// write takes whole frames. It doesn't block. For a peer that is gone that is all it does: what was read from it, perhaps a
// DISCONNECT, is still to be acted on.
func (o *outbound) write(p []byte) error {
	o.mu.Lock()
	if o.ended {
		lost := o.lost
		o.mu.Unlock()
		if lost {
			return nil
		}
		return net.ErrClosed
	}
	for rest := p; len(rest) > 0; {
		n := frameSize(rest)
		switch kind := rest[0] >> 4; kind {
		case typePuback, typePubrec:
			o.waiting = o.gate.pass(o.waiting, rest[:n])
		default:
			o.waiting = append(o.waiting, rest[:n]...)
		}
		rest = rest[n:]
	}
	_, err := o.wroteUnlock()
	return err
}

// send is write for one frame that is no acknowledgement. At idAt, unless that is 0, id takes the place of two of its
// bytes. Unless more is true nothing should follow until drained was called.
func (o *outbound) send(frame []byte, idAt int, id uint16) (more bool, err error) {
	o.mu.Lock()
	if o.ended {
		o.mu.Unlock()
		return false, net.ErrClosed
	}
	at := len(o.waiting)
	o.waiting = append(o.waiting, frame...)
	if idAt > 0 {
		binary.BigEndian.PutUint16(o.waiting[at+idAt:], id)
	}
	return o.wroteUnlock()
}

// offer is send for a frame that may be lost. It is, rather than that the peer be cut off for what waits.
func (o *outbound) offer(frame []byte) (taken, more bool) {
	o.mu.Lock()
	if o.ended || len(o.waiting)+o.going > maxWaiting/2 { // with the frame still below the limit
		o.mu.Unlock()
		return false, false
	}
	o.waiting = append(o.waiting, frame...)
	more, err := o.wroteUnlock()
	return err == nil, more
}

// wroteUnlock ends a write: it releases o.mu.
func (o *outbound) wroteUnlock() (more bool, err error) {
	waiting := len(o.waiting) + o.going
	if waiting > o.limit {
		o.ended = true
		o.mu.Unlock()
		o.failed(&StallError{Waiting: o.limit})
		return false, net.ErrClosed
	}
	if waiting > highWater {
		o.pressed = true
	}
	more = !o.pressed
	o.startLocked()
	o.mu.Unlock()
	return more, nil
}

// frameSize is the size of the first frame in p, which the server has encoded; all of p if it is none.
func frameSize(p []byte) int {
	size, shift := 0, 0
	for i := 1; i < len(p) && i <= 4; i++ {
		size |= int(p[i]&0x7f) << shift
		shift += 7
		if p[i]&0x80 == 0 {
			return min(1+i+size, len(p))
		}
	}
	return len(p)
}

// startLocked sees to it that what waits is written. The caller holds o.mu.
func (o *outbound) startLocked() {
	if o.writing || len(o.waiting) == 0 && !o.last {
		return
	}
	o.writing = true
	go o.run()
}

// run writes until nothing waits.
func (o *outbound) run() {
	for {
		o.mu.Lock()
		if len(o.waiting) == 0 {
			o.writing = false
			if cap(o.waiting) > keptBuffer || o.ended {
				o.waiting = nil
			}
			if cap(o.spare) > keptBuffer || o.ended {
				o.spare = nil
			}
			last, closed := o.last, o.closed
			o.mu.Unlock()
			if last {
				closed()
			}
			return
		}
		frames := o.waiting
		o.waiting, o.spare, o.going = o.spare[:0], nil, len(frames)
		o.mu.Unlock()

		err := o.flush(frames)

		o.mu.Lock()
		o.spare, o.going = frames[:0], 0
		if err != nil {
			var stalled *StallError
			o.lost = o.lost || !o.ended && !errors.As(err, &stalled)
			o.ended, o.writing, o.waiting, o.spare = true, false, nil, nil
			last, closed := o.last, o.closed
			o.mu.Unlock()
			if last {
				closed()
				return
			}
			o.failed(err)
			return
		}
		var drained func()
		if o.pressed && len(o.waiting) <= lowWater {
			o.pressed, drained = false, o.drained
		}
		o.mu.Unlock()
		if drained != nil {
			drained()
		}
	}
}

// flush writes the frames. A peer that takes them slowly has as long as it takes, unless the end is set.
func (o *outbound) flush(frames []byte) error {
	for {
		o.mu.Lock()
		last := o.last
		if !last { // else the deadline has been set already
			_ = o.conn.SetWriteDeadline(time.Now().Add(o.stall)) // fails on a closed connection alone
		}
		o.mu.Unlock()
		n, err := o.conn.Write(frames)
		switch {
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case last:
			return err
		case n == 0:
			return &StallError{After: o.stall}
		}
		frames = frames[n:]
	}
}

// end takes no more frames but a last one, which may be empty, and calls closed once: when all that
// waits is written by the deadline, or can't be. Held acknowledgements are never written any more. It is
// called once.
func (o *outbound) end(frame []byte, by time.Time, closed func()) {
	o.mu.Lock()
	o.gate.drop()
	if o.ended {
		o.mu.Unlock()
		closed()
		return
	}
	o.ended, o.last, o.closed = true, true, closed
	_ = o.conn.SetWriteDeadline(by) // fails on a closed connection alone
	o.waiting = append(o.waiting, frame...)
	o.startLocked()
	o.mu.Unlock()
}

// join makes acknowledgements that are written from now on wait for the commit, and for those joined before.
func (o *outbound) join(c Commit) {
	o.mu.Lock()
	defer o.mu.Unlock()
	g := &o.gate
	if n := len(g.joined); n == 0 || g.joined[n-1].commit != c {
		g.joined = append(g.joined, joined{commit: c})
	}
}

// release lets the acknowledgements through whose commits are done.
func (o *outbound) release() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return
	}
	o.waiting = o.gate.release(o.waiting)
	o.startLocked()
}

// pass appends an acknowledgement, or holds it.
func (g *gate) pass(to, frame []byte) []byte {
	if to = g.release(to); len(g.joined) == 0 {
		return append(to, frame...)
	}
	g.bytes = append(g.bytes, frame...)
	g.acks++
	newest := &g.joined[len(g.joined)-1]
	newest.acks, newest.bytes = newest.acks+1, newest.bytes+len(frame)
	return to
}

// release appends the frames whose commits are done well. A commit that failed, or isn't done, holds back
// all that joined after it: after a failure the connection is about to end.
func (g *gate) release(to []byte) []byte {
	n, size := 0, 0
	for _, j := range g.joined {
		if !doneWell(j.commit) {
			break
		}
		n, size, g.acks = n+1, size+j.bytes, g.acks-j.acks
	}
	if n == 0 {
		return to
	}
	to = append(to, g.bytes[:size]...)
	g.joined = slices.Delete(g.joined, 0, n)
	g.bytes = slices.Delete(g.bytes, 0, size)
	if len(g.bytes) == 0 && cap(g.bytes) > keptBuffer {
		g.bytes = nil
	}
	if g.acks < maxHeld {
		g.makeRoom()
	}
	return to
}

func doneWell(c Commit) bool {
	select {
	case <-c.Done():
		return c.Err() == nil
	default:
		return false
	}
}

// drop forgets the held acknowledgements.
func (g *gate) drop() {
	g.joined, g.bytes, g.acks = nil, nil, 0
	g.makeRoom()
}

func (g *gate) makeRoom() {
	if g.room != nil {
		close(g.room)
		g.room = nil
	}
}

// full returns a channel that is closed when there is room for further acknowledgements, nil if there is now.
func (o *outbound) full() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	g := &o.gate
	if g.acks < maxHeld {
		return nil
	}
	if g.room == nil {
		g.room = make(chan struct{})
	}
	return g.room
}
