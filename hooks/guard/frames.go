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
	Malformed       Reason = "malformed"         // can't be read as its packet type says
	ProtocolError   Reason = "protocol_error"    // can be read, but the protocol doesn't allow it
)

var reasons = [...]Reason{
	NotConnect, NotAdmitted, PacketType, MalformedLength, ConnectTooLarge, TooLarge, Malformed, ProtocolError,
}

// Reason codes of MQTT 5 for frames that are refused (2.4, 4.13).
const (
	codeMalformed     = 0x81
	codeProtocolError = 0x82
	codeNotAuthorized = 0x87
	codeTopicFilter   = 0x8f
	codeTopicName     = 0x90
	codeTopicAlias    = 0x94
	codeTooLarge      = 0x95
	codePayloadFormat = 0x99
)

// A FrameError is what Conn.Next returns when it refuses a frame; the connection is closed then.
type FrameError struct {
	Reason Reason
	Code   byte   // reason code of MQTT 5, one for DISCONNECT; a refused CONNECT has one that CONNACK takes too
	Type   byte   // packet type, 0 to 15
	Size   int    // bytes of the frame as far as its header tells, where the reason is a size
	Limit  int    // what Size had to keep to
	Detail string // for Malformed and ProtocolError: found and expected, without the client's own text
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
	case Malformed, ProtocolError:
		return fmt.Sprintf("refuse frame: packet type %d: %s", e.Type, e.Detail)
	default:
		return fmt.Sprintf("refuse frame: packet type %d has %d bytes or more, at most %d are allowed", e.Type, e.Size, e.Limit)
	}
}

// Packet types as the fixed header's upper four bits hold them (MQTT 5, 2.1.2).
const (
	typeConnect = 1
	typeConnack = 2
	// fromClients has a bit for each packet type that a client may send: all but 0, CONNACK,
	// SUBACK, UNSUBACK and PINGRESP.
	fromClients uint16 = 1<<1 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<10 | 1<<12 | 1<<14 | 1<<15
)
