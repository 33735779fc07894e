package guard

import "fmt"

// Reason says why a frame was refused. The set is small and fixed: it is a metric label.
type Reason string

// The reasons there are.
const (
	NotConnect      Reason = "not_connect"       // the first packet is no CONNECT [MQTT-3.1.0-1]
	NotAdmitted     Reason = "not_admitted"      // read on although the client was not admitted
	PacketType      Reason = "packet_type"       // reserved, or one that only servers send
	MalformedLength Reason = "malformed_length"  // more than four bytes of remaining length
	ConnectTooLarge Reason = "connect_too_large" // CONNECT beyond MaxConnectSize
	TooLarge        Reason = "too_large"         // any other packet beyond MaxPacketSize
)

var reasons = [...]Reason{NotConnect, NotAdmitted, PacketType, MalformedLength, ConnectTooLarge, TooLarge}

// A FrameError is what Conn.Read returns when it refuses a frame; the connection is closed then.
type FrameError struct {
	Reason Reason
	Type   byte // packet type, 0 to 15
	Size   int  // bytes of the frame as far as its header tells, where the reason is a size
	Limit  int  // what Size had to keep to
}

func (e *FrameError) Error() string {
	switch e.Reason {
	case NotConnect:
		return fmt.Sprintf("refuse frame: first packet has type %d, not CONNECT", e.Type)
	case PacketType:
		return fmt.Sprintf("refuse frame: packet type %d is not for clients", e.Type)
	case MalformedLength:
		return fmt.Sprintf("refuse frame: remaining length of packet type %d has more than four bytes", e.Type)
	case NotAdmitted:
		return "refuse frame: client is not admitted"
	default:
		return fmt.Sprintf("refuse frame: packet type %d has %d bytes or more, at most %d are allowed", e.Type, e.Size, e.Limit)
	}
}

// Packet types as the fixed header's upper four bits hold them (MQTT 5, 2.1.2).
const (
	typeConnect = 1
	// fromClients has a bit for each packet type that a client may send: all but 0, CONNACK,
	// SUBACK, UNSUBACK and PINGRESP.
	fromClients uint16 = 1<<1 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<10 | 1<<12 | 1<<14 | 1<<15
)

// follower follows the frame boundaries in the bytes that a client sends. The first frame has
// to be a CONNECT and keeps to maxConnect; the others keep to max.
type follower struct {
	max, maxConnect int

	state     followerState
	kind      byte // packet type of the current frame
	lengths   int  // bytes of its remaining length seen
	remaining int  // in inLength the length so far, in inBody the bytes still to come
	connected bool // the CONNECT frame has passed whole
}

type followerState uint8

const (
	atType followerState = iota
	inLength
	inBody
)

// need is how many bytes are known to belong to the current frame at least: a read of that many
// never reaches into the next one.
func (f *follower) need() int {
	if f.state == inBody {
		return f.remaining
	}
	return 1
}

// follow takes the next bytes and returns how many of them, from the first, may pass: all, or
// those before the byte that shows the frame to be unacceptable. How the bytes are split over
// calls makes no difference. After an error the follower must not be used any more.
func (f *follower) follow(p []byte) (int, error) {
	for i := 0; i < len(p); {
		switch f.state {
		case atType:
			if err := f.begin(p[i] >> 4); err != nil {
				return i, err
			}
			i++
		case inLength:
			if err := f.length(p[i]); err != nil {
				return i, err
			}
			i++
		case inBody:
			n := min(len(p)-i, f.remaining)
			f.remaining -= n
			i += n
			if f.remaining == 0 {
				f.end()
			}
		}
	}
	return len(p), nil
}

func (f *follower) begin(kind byte) error {
	if !f.connected && kind != typeConnect {
		return &FrameError{Reason: NotConnect, Type: kind}
	}
	if fromClients&(1<<kind) == 0 {
		return &FrameError{Reason: PacketType, Type: kind}
	}
	f.state, f.kind, f.lengths, f.remaining = inLength, kind, 0, 0
	return nil
}

// length takes one byte of the remaining length, a variable byte integer (MQTT 5, 1.5.5).
func (f *follower) length(b byte) error {
	f.remaining |= int(b&0x7f) << (7 * f.lengths)
	f.lengths++
	limit, reason := f.max, TooLarge
	if !f.connected {
		limit, reason = f.maxConnect, ConnectTooLarge
	}
	if size := 1 + f.lengths + f.remaining; size > limit {
		return &FrameError{Reason: reason, Type: f.kind, Size: size, Limit: limit}
	}
	switch {
	case b&0x80 != 0 && f.lengths == 4:
		return &FrameError{Reason: MalformedLength, Type: f.kind}
	case b&0x80 != 0:
	case f.remaining == 0:
		f.end()
	default:
		f.state = inBody
	}
	return nil
}

func (f *follower) end() {
	f.state = atType
	f.connected = true
}
