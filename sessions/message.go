package sessions

import (
	"encoding/binary"
	"slices"
	"sync"
	"time"
)

// Message is an application message on its way to subscribers. Sessions share it: nobody changes it.
type Message struct {
	Topic     string
	Payload   []byte
	QoS       byte   // as it was published
	Retain    bool   // as it was published
	Publisher string // client identifier

	// Properties are those that subscribers of MQTT 5 get as they were sent, each encoded as on the wire (MQTT 5,
	// 2.2.2), without a length before them.
	Properties []byte
	// Expires is when the message is worth nothing any more; zero: never [MQTT-3.3.2-5].
	Expires time.Time

	// Origin is what the server wants to know of the message when it is dropped; sessions don't look at it.
	Origin any
	// Unwatched says that observers are not told when it is dropped.
	Unwatched bool
}

// Expired reports whether the message is worth nothing any more.
func (m *Message) Expired(now time.Time) bool {
	return !m.Expires.IsZero() && !now.Before(m.Expires)
}

// Fixed header flags of PUBLISH (MQTT 5, 3.3.1).
const (
	dupFlag    = 1 << 3
	retainFlag = 1
)

// Property identifiers (MQTT 5, 2.2.2.2).
const (
	propertyMessageExpiry  = 0x02
	propertySubscriptionID = 0x0b
)

// keptFrame is the capacity that a pooled encoder may keep.
const keptFrame = 64 << 10

// Encoder encodes one message for its subscribers; what several get alike is encoded once. It is
// for one goroutine.
type Encoder struct {
	m    *Message
	time time.Time // when it was asked for first; zero: not yet

	buf     []byte
	idAt    int
	encoded bool // buf holds the frame for these:
	v5      bool
	qos     byte
	retain  bool
	ids     []uint32
}

var encoders = sync.Pool{New: func() any { return new(Encoder) }}

// NewEncoder returns an encoder for m. Release gives it back.
func NewEncoder(m *Message) *Encoder {
	e := encoders.Get().(*Encoder)
	e.Reset(m)
	return e
}

// Reset makes the encoder one for m.
func (e *Encoder) Reset(m *Message) {
	*e = Encoder{m: m, buf: e.buf}
}

// Release gives the encoder back. It must not be used any more.
func (e *Encoder) Release() {
	if cap(e.buf) > keptFrame {
		e.buf = nil
	}
	e.Reset(nil)
	encoders.Put(e)
}

// now is the time at which the message is sent, the same for all its subscribers.
func (e *Encoder) now() time.Time {
	if e.time.IsZero() && !e.m.Expires.IsZero() {
		e.time = time.Now()
	}
	return e.time
}

// frame returns the PUBLISH packet, without DUP, and where its packet identifier is to be written; 0 at QoS 0,
// which has none [MQTT-2.2.1-2]. The bytes are valid until the next call; their first may be changed.
func (e *Encoder) frame(d *Delivery, v5 bool) ([]byte, int) {
	same := e.encoded && e.v5 == v5 && e.qos == d.QoS && e.retain == d.Retain && slices.Equal(e.ids, d.SubscriptionIDs)
	if !same {
		e.encoded, e.v5, e.qos, e.retain, e.ids = true, v5, d.QoS, d.Retain, d.SubscriptionIDs
		e.encode()
	}
	e.buf[0] &^= dupFlag
	return e.buf, e.idAt
}

func (e *Encoder) encode() {
	m := e.m
	size := 2 + len(m.Topic) + len(m.Payload)
	if e.qos > 0 {
		size += 2
	}
	var props int
	var expiry time.Duration
	if e.v5 {
		props = len(m.Properties)
		if !m.Expires.IsZero() {
			props += 1 + 4
			expiry = max(m.Expires.Sub(e.now()), time.Second)
		}
		for _, id := range e.ids {
			props += 1 + lengthSize(int(id))
		}
		size += lengthSize(props) + props
	}

	first := byte(typePublish<<4) | e.qos<<1
	if e.retain {
		first |= retainFlag
	}
	b := append(slices.Grow(e.buf[:0], 5+size), first)
	b = appendLength(b, size)
	b = binary.BigEndian.AppendUint16(b, uint16(len(m.Topic)))
	b = append(b, m.Topic...)
	e.idAt = 0
	if e.qos > 0 {
		e.idAt = len(b)
		b = append(b, 0, 0)
	}
	if e.v5 {
		b = appendLength(b, props)
		if !m.Expires.IsZero() { // what is left of it [MQTT-3.3.2-6]
			b = append(b, propertyMessageExpiry)
			b = binary.BigEndian.AppendUint32(b, uint32((expiry+time.Second-1)/time.Second))
		}
		b = append(b, m.Properties...)
		for _, id := range e.ids { // [MQTT-3.3.4-3]
			b = appendLength(append(b, propertySubscriptionID), int(id))
		}
	}
	e.buf = append(b, m.Payload...)
}

// appendLength appends a variable byte integer (MQTT 5, 1.5.5).
func appendLength(b []byte, n int) []byte {
	for ; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}

func lengthSize(n int) int {
	size := 1
	for ; n >= 0x80; n >>= 7 {
		size++
	}
	return size
}
