package guard

import (
	"bytes"
	"errors"
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

func TestFollow(t *testing.T) {
	connect := frame(typeConnect, 10)
	for _, c := range []struct {
		name   string
		in     []byte
		pass   int
		reason Reason // empty: all pass
	}{
		{"nothing", nil, 0, ""},
		{"connect", connect, 12, ""},
		{"connect, ping", append(bytes.Clone(connect), frame(12, 0)...), 14, ""},
		{"connect of the largest size", frame(typeConnect, 98), 100, ""},
		{"connect too large", frame(typeConnect, 99), 1, ConnectTooLarge},
		{"connect of 256 MiB in a header", []byte{0x10, 0xff, 0xff, 0xff, 0x7f}, 1, ConnectTooLarge},
		{"publish first", frame(3, 10), 0, NotConnect},
		{"publish of the largest size", append(bytes.Clone(connect), frame(3, 997)...), 1012, ""},
		{"publish too large", append(bytes.Clone(connect), frame(3, 998)...), 14, TooLarge},
		{"reserved type", append(bytes.Clone(connect), 0x00, 0x00), 12, PacketType},
		{"a server's packet", append(bytes.Clone(connect), frame(2, 2)...), 12, PacketType},
		{"length of five bytes", append(bytes.Clone(connect), 0x30, 0x80, 0x80, 0x80, 0x80, 0x01), 16, MalformedLength},
		{"padded length", append(bytes.Clone(connect), 0xc0, 0x80, 0x80, 0x00), 16, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := follower{max: 1000, maxConnect: 100}
			n, err := f.follow(c.in)
			if got := reasonOf(t, err); n != c.pass || got != c.reason {
				t.Errorf("follow passed %d bytes, %q; want %d, %q", n, got, c.pass, c.reason)
			}
			if err != nil && err.Error() == "" {
				t.Error("error without text")
			}
		})
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

// FuzzFollow: no input makes the follower panic, how it is split makes no difference, need never
// reaches beyond the current frame, and no byte of the body of a frame over the limit passes.
func FuzzFollow(f *testing.F) {
	f.Add(frame(typeConnect, 10), uint8(1))
	f.Add(append(frame(typeConnect, 10), frame(3, 300)...), uint8(7))
	f.Add([]byte{0x10, 0xff, 0xff, 0xff, 0xff, 0xff}, uint8(2))
	f.Add(append(frame(typeConnect, 3), 0x30, 0x80, 0x80, 0x80, 0x80), uint8(3))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		const limit, connectLimit = 500, 60
		whole := follower{max: limit, maxConnect: connectLimit}
		passed, err := whole.follow(in)

		split := follower{max: limit, maxConnect: connectLimit}
		n, splitErr := 0, error(nil)
		for splitErr == nil && n < len(in) {
			var ok int
			size := min(int(step)%17+1, len(in)-n)
			ok, splitErr = split.follow(in[n : n+size])
			n += ok
		}
		if n != passed || reasonOf(t, err) != reasonOf(t, splitErr) {
			t.Fatalf("whole: %d bytes, %v; in steps: %d bytes, %v", passed, err, n, splitErr)
		}

		byNeed := follower{max: limit, maxConnect: connectLimit}
		for rest := in[:passed]; len(rest) > 0; {
			size := min(byNeed.need(), len(rest))
			if size < 1 {
				t.Fatal("need is less than a byte")
			}
			before := byNeed.connected
			if _, err := byNeed.follow(rest[:size]); err != nil {
				t.Fatalf("refused what passed: %v", err)
			}
			if !before && byNeed.connected && byNeed.state != atType {
				t.Fatal("need reached beyond CONNECT")
			}
			rest = rest[size:]
		}

		// What passed, read again by the book.
		for rest, first := in[:passed], true; len(rest) > 0; first = false {
			size, shift, i := 0, 0, 1
			for ; i < len(rest); i++ {
				size |= int(rest[i]&0x7f) << shift
				shift += 7
				if rest[i]&0x80 == 0 {
					i++
					break
				}
			}
			if i == len(rest) {
				break // a header, perhaps not whole, without a byte of body
			}
			bound := limit
			if first {
				bound = connectLimit
			}
			if i+size > bound {
				t.Fatalf("body of a frame of %d bytes passed, limit %d", i+size, bound)
			}
			rest = rest[min(i+size, len(rest)):]
		}
	})
}
