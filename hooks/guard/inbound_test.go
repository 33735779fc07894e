package guard

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
)

// frame is a frame of that type with n bytes of body.
func frame(kind byte, n int) []byte {
	p := []byte{kind << 4}
	for size := n; ; size >>= 7 {
		if size < 0x80 {
			p = append(p, byte(size))
			break
		}
		p = append(p, byte(size)|0x80)
	}
	return append(p, make([]byte, n)...)
}

func join(frames ...[]byte) []byte { return bytes.Join(frames, nil) }

// feed reads p from a socket that gives at most step bytes at a time, and returns what is handed on, the
// acknowledgements, and the error that ends it.
func feed(in *inbound, p []byte, step int) (passed []byte, acks string, err error) {
	ack := func(kind byte, id uint16, reason byte) { acks += fmt.Sprintf("%d:%d:%#x ", kind, id, reason) }
	chunk := make([]byte, 7)
	for {
		if fe := in.scan(ack); fe != nil {
			return passed, acks, fe
		}
		for in.ready > 0 {
			passed = append(passed, chunk[:in.take(chunk)]...)
			if fe := in.scan(ack); in.ready == 0 && fe != nil {
				return passed, acks, fe
			}
		}
		if len(p) == 0 {
			return passed, acks, nil
		}
		n := copy(in.room(), p[:min(step, len(p))])
		in.read(n)
		p = p[n:]
	}
}

var (
	// A CONNECT of MQTT 3.1.1 with clean session, keepalive and the client identifier "v7".
	connect4 = []byte{0x10, 14, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 2, 'v', '7'}
	ping     = []byte{0xc0, 0}
)

// publishOf is a PUBLISH of QoS 0 with n bytes after the fixed header.
func publishOf(n int) []byte {
	p := frame(3, n)
	p[len(p)-n+1] = 1 // topic name of one byte
	p[len(p)-n+2] = 'a'
	return p
}

func TestInbound(t *testing.T) {
	for _, c := range []struct {
		name   string
		in     []byte
		passed []byte // nil: all
		acks   string
		reason Reason // empty: none
	}{
		{name: "nothing"},
		{name: "connect", in: connect4},
		{name: "connect, ping", in: join(connect4, ping)},
		{name: "connect not whole", in: connect4[:9], passed: []byte{}},
		{name: "connect too large", in: frame(typeConnect, 99), passed: []byte{}, reason: ConnectTooLarge},
		{name: "connect of 256 MiB in a header", in: []byte{0x10, 0xff, 0xff, 0xff, 0x7f}, passed: []byte{}, reason: ConnectTooLarge},
		{name: "publish first", in: publishOf(10), passed: []byte{}, reason: NotConnect},
		{name: "publish of the largest size", in: join(connect4, publishOf(49_997))},
		{name: "publish too large", in: join(connect4, publishOf(49_998)), passed: connect4, reason: TooLarge},
		{name: "reserved type", in: join(connect4, ping, []byte{0, 0}), passed: join(connect4, ping), reason: PacketType},
		{name: "a server's packet", in: join(connect4, frame(2, 2)), passed: connect4, reason: PacketType},
		{name: "length of five bytes", in: join(connect4, []byte{0x30, 0x80, 0x80, 0x80, 0x80, 1}), passed: connect4, reason: MalformedLength},
		{
			name: "acknowledgements are taken out",
			in: join(connect4, []byte{0x40, 2, 0, 1}, ping, []byte{0x50, 2, 0, 2}, []byte{0x70, 2, 1, 0}, publishOf(600),
				[]byte{0x40, 2, 0, 9}),
			passed: join(connect4, ping, publishOf(600)), acks: "4:1:0x0 5:2:0x0 7:256:0x0 4:9:0x0 ",
		},
		{ // MQTT 3.1.1 has no word against it
			name:   "padded lengths",
			in:     join(connect4, []byte{0x40, 0x82, 0x80, 0x80, 0, 3, 7}, []byte{0x50, 0x82, 0, 1, 2}, ping),
			passed: join(connect4, ping), acks: "4:775:0x0 5:258:0x0 ",
		},
	} {
		for _, step := range []int{1, 3, 500, 1 << 20} {
			t.Run(fmt.Sprintf("%s, %d at a time", c.name, step), func(t *testing.T) {
				in := inbound{max: 50_001, maxConnect: 100}
				passed, acks, err := feed(&in, c.in, step)
				want := c.passed
				if want == nil {
					want = c.in
				}
				if !bytes.Equal(passed, want) || acks != c.acks {
					t.Errorf("passed %d bytes, %q; want %d, %q", len(passed), acks, len(want), c.acks)
				}
				if got := reasonOf(t, err); got != c.reason {
					t.Errorf("refused for %q, want %q", got, c.reason)
				}
				if err != nil && err.Error() == "" {
					t.Error("error without text")
				}
			})
		}
	}
}

func TestReasonCodeOfAnAcknowledgement(t *testing.T) {
	in := inbound{max: 1000, maxConnect: 100}
	connect5 := []byte{0x10, 15, 0, 4, 'M', 'Q', 'T', 'T', 5, 2, 0, 60, 0, 0, 2, 'v', '7'}
	_, acks, err := feed(&in, join(connect5, []byte{0x50, 3, 0, 2, 0x97}), 100)
	if acks != "5:2:0x97 " || err != nil {
		t.Errorf("got %q, %v", acks, err)
	}
}

// What an idle connection keeps is small, whatever it has read before.
func TestInboundGivesLargeBuffersBack(t *testing.T) {
	in := inbound{max: 10 << 20, maxConnect: 100}
	if passed, _, err := feed(&in, join(connect4, publishOf(5<<20), ping), 1<<20); err != nil || len(passed) < 5<<20 {
		t.Fatalf("passed %d bytes, %v", len(passed), err)
	}
	in.room()
	in.read(1) // not full
	in.end = in.start
	if got := len(in.room()); got != smallRead || in.large != nil {
		t.Errorf("an idle connection keeps a buffer of %d bytes", got)
	}
}

func reasonOf(t *testing.T, err error) Reason {
	t.Helper()
	if err == nil {
		return ""
	}
	var fe *FrameError
	if !errors.As(err, &fe) {
		t.Fatalf("not a *FrameError: %v", err)
	}
	return fe.Reason
}

// FuzzInbound: no input makes it panic, how it is split makes no difference, no byte of a frame over the limit passes, and
// what it keeps is bounded by what has come.
func FuzzInbound(f *testing.F) {
	f.Add(join(connect4, publishOf(300)), uint8(7))
	f.Add(join(connect4, []byte{0x40, 2, 0, 1}, ping, []byte{0x50, 2, 0, 2}), uint8(1))
	f.Add([]byte{0x10, 0xff, 0xff, 0xff, 0xff, 0xff}, uint8(2))
	f.Add(join(connect4, []byte{0x30, 0x80, 0x80, 0x80, 0x80}), uint8(3))
	f.Fuzz(func(t *testing.T, p []byte, step uint8) {
		const limit, connectLimit = 500, 60
		whole := inbound{max: limit, maxConnect: connectLimit}
		passed, acks, err := feed(&whole, p, len(p)+1)
		split := inbound{max: limit, maxConnect: connectLimit}
		again, acksAgain, errAgain := feed(&split, p, int(step)%17+1)
		if !bytes.Equal(passed, again) || acks != acksAgain || reasonOf(t, err) != reasonOf(t, errAgain) {
			t.Fatalf("whole: %d bytes, %q, %v; in steps: %d bytes, %q, %v", len(passed), acks, err, len(again), acksAgain, errAgain)
		}
		if len(split.buf) > largeRead {
			t.Errorf("a buffer of %d bytes for frames of at most %d", len(split.buf), limit)
		}
		for first := true; len(passed) > 0; first = false { // read again by the book
			size, i := 0, 1
			for ; ; i++ {
				size |= int(passed[i]&0x7f) << (7 * (i - 1))
				if passed[i]&0x80 == 0 {
					break
				}
			}
			size += i + 1
			if size > limit || first && size > connectLimit {
				t.Fatalf("a frame of %d bytes passed", size)
			}
			passed = passed[size:] // panics unless it passed whole
		}
	})
}

func BenchmarkInbound(b *testing.B) {
	p := bytes.Repeat(publishOf(60), 100)
	in := inbound{max: 1 << 20, maxConnect: 100}
	if _, _, err := feed(&in, connect4, 100); err != nil {
		b.Fatal(err)
	}
	out := make([]byte, 1<<16)
	b.ReportAllocs()
	for b.Loop() {
		for rest := p; len(rest) > 0; {
			n := copy(in.room(), rest)
			in.read(n)
			rest = rest[n:]
			if err := in.scan(nil); err != nil {
				b.Fatal(err)
			}
			for in.ready > 0 {
				in.take(out)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/frame")
}
