package guard

import (
	"encoding/binary"
	"sync"
)

const (
	// smallRead is the read buffer that every connection keeps: what a vehicle sends at a time fits.
	smallRead = 512
	// largeRead is the buffer that a connection with more to read borrows.
	largeRead = 16 << 10
)

var largeBuffers = sync.Pool{New: func() any { return new([largeRead]byte) }}

// inbound holds what was read from the socket until it is handed on: frames that are whole and well formed. It is for
// the reading goroutine. What a frame announces reserves nothing: the buffer grows with what has come.
type inbound struct {
	max, maxConnect int // bytes of a frame, and of CONNECT

	inspector inspector
	connected bool // CONNECT was found whole

	disconnected bool // DISCONNECT was
	goodbye      byte // its reason code

	buf   []byte           // small, large, or a frame's own
	large *[largeRead]byte // borrowed, nil if not
	space []byte           // of buf: where the next read goes
	start int              // of what is not handed on yet
	ready int              // bytes from start that may be handed on
	end   int              // of what was read
	want  int              // bytes of the frame that begins at start+ready, as far as they are known
	full  bool             // the last read took all there was room for: more is likely to have come
	small [smallRead]byte
}

// take hands on as much of what is ready as p has room for.
func (in *inbound) take(p []byte) int {
	n := copy(p, in.buf[in.start:in.start+in.ready])
	in.start += n
	in.ready -= n
	return n
}

// scan makes the frames that are there ready, up to the first that acknowledges a message to the client: if
// that is the first of all it is taken out and given to acknowledged. After CONNECT it stops, since it is not known yet whether
// the client is let in. The error is that of the first frame; one that has others before it is found again later.
func (in *inbound) scan(acknowledged func(kind byte, id uint16, reason byte)) *FrameError {
	for {
		frame, header, err := in.next()
		if err == nil && frame != nil {
			err = in.inspector.inspect(frame)
		}
		switch {
		case err != nil && in.ready > 0, err == nil && frame == nil:
			return nil
		case err != nil:
			return err
		}
		switch kind := frame[0] >> 4; {
		case kind != typePuback && kind != typePubrec && kind != typePubcomp:
			in.ready += len(frame)
			if kind == typeDisconnect {
				in.disconnected = true
				if in.inspector.version == 5 && len(frame) > header {
					in.goodbye = frame[header]
				}
				return nil // nothing comes after it [MQTT-3.14.4-1]
			}
			if !in.connected {
				in.connected = true
				return nil
			}
		case in.ready > 0:
			return nil
		default:
			in.start += len(frame)
			body := frame[header:]
			var reason byte
			if len(body) > 2 {
				reason = body[2]
			}
			acknowledged(kind, binary.BigEndian.Uint16(body), reason)
		}
	}
}

// next returns the frame that begins at start+ready, and the size of its fixed header; nil if it isn't there whole.
func (in *inbound) next() (frame []byte, header int, _ *FrameError) {
	p := in.buf[in.start+in.ready : in.end]
	in.want = 0
	if len(p) == 0 {
		return nil, 0, nil
	}
	kind := p[0] >> 4
	limit, tooLarge := in.max, TooLarge
	if !in.connected {
		if kind != typeConnect {
			return nil, 0, &FrameError{Reason: NotConnect, Type: kind, Code: codeProtocolError}
		}
		limit, tooLarge = in.maxConnect, ConnectTooLarge
	}
	if fromClients&(1<<kind) == 0 {
		return nil, 0, &FrameError{Reason: PacketType, Type: kind, Code: codeProtocolError}
	}
	// The remaining length, a variable byte integer (MQTT 5, 1.5.5).
	remaining := 0
	for i := 1; i < len(p); i++ {
		b := p[i]
		remaining |= int(b&0x7f) << (7 * (i - 1))
		in.want = 1 + i + remaining
		if in.want > limit {
			return nil, 0, &FrameError{Reason: tooLarge, Type: kind, Size: in.want, Limit: limit, Code: codeTooLarge}
		}
		if b&0x80 == 0 {
			if len(p) < in.want {
				return nil, 0, nil
			}
			return p[:in.want], 1 + i, nil
		}
		if i == 4 {
			return nil, 0, &FrameError{Reason: MalformedLength, Type: kind, Code: codeMalformed}
		}
	}
	return nil, 0, nil
}

// room is where the next bytes are to be read to. There is always some. Nothing may be ready.
func (in *inbound) room() []byte {
	pending := in.end - in.start
	switch {
	case in.buf == nil:
		in.buf = in.small[:]
	case pending == 0 && !in.full && len(in.buf) > smallRead:
		in.use(in.small[:], nil)
	case pending == 0 && len(in.buf) > largeRead, in.full && len(in.buf) < largeRead:
		large := largeBuffers.Get().(*[largeRead]byte)
		in.use(large[:], large)
	case pending == len(in.buf):
		in.use(make([]byte, max(min(in.want, 2*len(in.buf)), len(in.buf)+smallRead)), nil)
	case in.start > 0 && (pending == 0 || in.end == len(in.buf)):
		in.end = copy(in.buf, in.buf[in.start:in.end])
		in.start = 0
	}
	return in.buf[in.end:]
}

// use moves what is pending to another buffer, and gives back a borrowed one.
func (in *inbound) use(buf []byte, large *[largeRead]byte) {
	n := copy(buf, in.buf[in.start:in.end])
	in.giveBack()
	in.buf, in.large, in.start, in.end = buf, large, 0, n
}

// release gives up what was read and not handed on. Nothing can be read any more.
func (in *inbound) release() {
	in.giveBack()
	in.buf, in.space, in.start, in.ready, in.end = nil, nil, 0, 0, 0
}

func (in *inbound) giveBack() {
	if in.large != nil {
		largeBuffers.Put(in.large)
		in.large = nil
	}
}

// read notes that n bytes were read to room.
func (in *inbound) read(n int) {
	in.end += n
	in.full = in.end == len(in.buf)
}
