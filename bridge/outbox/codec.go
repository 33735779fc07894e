package outbox

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/store"
)

// Every stored value is a frame:
//
//	version      1 byte
//	header size  uint32, big-endian like all numbers here
//	tail CRC     uint32, CRC-32C of the tail
//	header CRC   uint32, CRC-32C of the 9 bytes before it and the header
//	header
//	tail         the rest
//
// so that the header can be trusted without reading the tail. Inside a header, strings are preceded by their length as a
// uvarint, and times are a byte (0: the zero time) and, unless that is 0, nanoseconds since 1970 as 8 bytes.
const (
	frameVersion = 1
	// requestVersion is that of a record with more of a request than its body. One without keeps the version before, so that
	// it costs nothing and a broker of that version reads it.
	requestVersion = 2
	frameSize      = 1 + 4 + 4 + 4

	flagOrdered = 1 << 0
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errDamaged is the reason for anything that can't be what was written.
var errDamaged = fmt.Errorf("%w value", store.ErrCorrupt)

// seal completes a frame: v holds frameSize bytes of room, then the header.
func seal(version byte, v, tail []byte) []byte {
	header := v[frameSize:]
	v[0] = version
	binary.BigEndian.PutUint32(v[1:], uint32(len(header)))
	binary.BigEndian.PutUint32(v[5:], crc32.Checksum(tail, castagnoli))
	binary.BigEndian.PutUint32(v[9:], headerSum(v[:9], header))
	return append(v, tail...)
}

func headerSum(prefix, header []byte) uint32 {
	return crc32.Update(crc32.Checksum(prefix, castagnoli), castagnoli, header)
}

// unseal splits a frame of a version up to newest and checks its header. The tail is checked by tailIntact.
func unseal(newest byte, v []byte) (header, tail []byte, err error) {
	if len(v) == 0 {
		return nil, nil, errDamaged
	}
	if v[0] > newest {
		return nil, nil, fmt.Errorf("format %d of a newer version, this one reads up to %d", v[0], newest)
	}
	if v[0] < frameVersion || len(v) < frameSize {
		return nil, nil, errDamaged
	}
	n := uint64(binary.BigEndian.Uint32(v[1:]))
	if n > uint64(len(v)-frameSize) {
		return nil, nil, errDamaged
	}
	header, tail = v[frameSize:frameSize+n], v[frameSize+n:]
	if headerSum(v[:9], header) != binary.BigEndian.Uint32(v[9:]) {
		return nil, nil, errDamaged
	}
	return header, tail, nil
}

// tailIntact reports whether the tail of v, which unseal has split, is what was sealed.
func tailIntact(v, tail []byte) bool {
	return crc32.Checksum(tail, castagnoli) == binary.BigEndian.Uint32(v[5:])
}

// encodeRecord returns the frame of what never changes of a record: all but Seq and the delivery state. The body is the
// tail. What a Ref needs comes first.
func encodeRecord(r *Record) []byte {
	size := frameSize + 1 + 2*9 + 10*binary.MaxVarintLen32 + len(r.Destination) + len(r.Lane) + len(r.ID) + len(r.Rule) +
		len(r.Generation) + len(r.Topic) + len(r.ClientID) + len(r.SW8) + len(r.Correlation) + len(r.TraceID) + len(r.Body)
	v := make([]byte, frameSize, size)
	var flags byte
	if r.Ordered {
		flags |= flagOrdered
	}
	v = append(v, flags)
	v = appendTime(v, r.Published)
	v = appendTime(v, r.Queued)
	for _, s := range []string{r.Destination, r.Lane, r.ID, r.Rule, r.Generation, r.Topic, r.ClientID, r.SW8, r.Correlation, r.TraceID} {
		v = appendString(v, s)
	}
	if r.Path == "" && r.Query == "" && len(r.Headers) == 0 {
		return seal(frameVersion, v, r.Body)
	}
	return seal(requestVersion, appendRequest(v, r), r.Body)
}

// appendRequest appends what the request has beside its body.
func appendRequest(v []byte, r *Record) []byte {
	v = appendString(appendString(v, r.Path), r.Query)
	v = binary.AppendUvarint(v, uint64(len(r.Headers)))
	for _, h := range r.Headers {
		v = appendString(appendString(v, h.Name), h.Value)
	}
	return v
}

func decodeRequest(d *decoder[string], r *Record) {
	r.Path, r.Query = d.text(), d.text()
	for range d.int() {
		h := Header{Name: d.text(), Value: d.text()}
		if d.bad {
			return
		}
		r.Headers = append(r.Headers, h)
	}
}

// decodeRecord is the inverse of encodeRecord. The body is a part of v.
func decodeRecord(v []byte) (Record, error) {
	header, tail, err := unseal(requestVersion, v)
	if err != nil {
		return Record{}, err
	}
	if !tailIntact(v, tail) {
		return Record{}, errDamaged
	}
	d := decoder[string]{rest: string(header)}
	r := Record{Body: tail}
	r.Ordered, r.Published, r.Queued = decodeRefStart(&d)
	for _, s := range []*string{&r.Destination, &r.Lane, &r.ID, &r.Rule, &r.Generation, &r.Topic, &r.ClientID, &r.SW8, &r.Correlation, &r.TraceID} {
		*s = d.text()
	}
	if v[0] >= requestVersion {
		decodeRequest(&d, &r)
	}
	return r, d.end()
}

// refHeader is the part of a record that a Ref is made of. Its slices are parts of the value.
type refHeader struct {
	ordered           bool
	published, queued time.Time
	destination, lane []byte
}

func decodeRefHeader(v []byte) (refHeader, error) {
	header, _, err := unseal(requestVersion, v)
	if err != nil {
		return refHeader{}, err
	}
	d := decoder[[]byte]{rest: header}
	var h refHeader
	h.ordered, h.published, h.queued = decodeRefStart(&d)
	h.destination, h.lane = d.text(), d.text()
	if d.bad {
		return refHeader{}, errDamaged
	}
	return h, nil
}

func decodeRefStart[T string | []byte](d *decoder[T]) (ordered bool, published, queued time.Time) {
	flags := d.byte()
	if flags&^flagOrdered != 0 {
		d.bad = true
	}
	return flags&flagOrdered != 0, d.time(), d.time()
}

// deliveryState is what a failed attempt changes.
type deliveryState struct {
	attempts  int
	next      time.Time
	lastError string
}

func encodeState(s deliveryState) []byte {
	v := make([]byte, frameSize, frameSize+2*binary.MaxVarintLen64+9+len(s.lastError))
	v = binary.AppendUvarint(v, uint64(s.attempts))
	v = appendTime(v, s.next)
	v = appendString(v, s.lastError)
	return seal(frameVersion, v, nil)
}

func decodeState(v []byte) (deliveryState, error) {
	header, tail, err := unseal(frameVersion, v)
	if err != nil {
		return deliveryState{}, err
	}
	if len(tail) > 0 {
		return deliveryState{}, errDamaged
	}
	d := decoder[string]{rest: string(header)}
	s := deliveryState{attempts: d.int(), next: d.time(), lastError: d.text()}
	return s, d.end()
}

// encodeDead returns the frame of a dead letter, whose tail is the frame of its record as it was queued.
func encodeDead(d *DeadLetter, record []byte) []byte {
	size := frameSize + 5*binary.MaxVarintLen64 + 9 + len(d.Reason) + len(d.LastError) + len(d.Response) + len(record)
	v := make([]byte, frameSize, size)
	v = appendTime(v, d.Buried)
	v = binary.AppendUvarint(v, uint64(d.Status))
	v = binary.AppendUvarint(v, uint64(d.Attempts))
	v = appendString(v, d.Reason)
	v = appendString(v, d.LastError)
	v = appendString(v, d.Response)
	return seal(frameVersion, v, record)
}

// decodeDead is the inverse of encodeDead. The slices of the dead letter are its own or parts of v.
func decodeDead(v []byte) (DeadLetter, error) {
	header, tail, err := unseal(frameVersion, v)
	if err != nil {
		return DeadLetter{}, err
	}
	r, err := decodeRecord(tail)
	if err != nil {
		return DeadLetter{}, err
	}
	d := decoder[string]{rest: string(header)}
	l := DeadLetter{Record: r, Buried: d.time(), Status: d.int()}
	l.Attempts, l.Reason, l.LastError = d.int(), d.text(), d.text()
	if s := d.text(); s != "" {
		l.Response = []byte(s)
	}
	return l, d.end()
}

// deadDestination names the destination of a dead letter without reading its body.
func deadDestination(v []byte) (string, error) {
	_, tail, err := unseal(frameVersion, v)
	if err != nil {
		return "", err
	}
	h, err := decodeRefHeader(tail)
	return string(h.destination), err
}

func appendString[T string | []byte](v []byte, s T) []byte {
	v = binary.AppendUvarint(v, uint64(len(s)))
	return append(v, s...)
}

func appendTime(v []byte, t time.Time) []byte {
	if t.IsZero() {
		return append(v, 0)
	}
	return binary.BigEndian.AppendUint64(append(v, 1), uint64(t.UnixNano()))
}

// decoder takes fields off the front of a header. After the first one that isn't there it is bad and returns zero values.
type decoder[T string | []byte] struct {
	rest T
	bad  bool
}

func (d *decoder[T]) take(n uint64) T {
	if d.bad || n > uint64(len(d.rest)) {
		d.bad = true
		return d.rest[:0]
	}
	t := d.rest[:n]
	d.rest = d.rest[n:]
	return t
}

func (d *decoder[T]) byte() byte {
	if t := d.take(1); len(t) == 1 {
		return t[0]
	}
	return 0
}

func (d *decoder[T]) uvarint() uint64 {
	var n uint64
	for shift := 0; shift < 64; shift += 7 {
		b := d.byte()
		n |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return n
		}
	}
	d.bad = true
	return 0
}

func (d *decoder[T]) int() int {
	n := d.uvarint()
	if n > 1<<31-1 {
		d.bad = true
		return 0
	}
	return int(n)
}

func (d *decoder[T]) text() T { return d.take(d.uvarint()) }

func (d *decoder[T]) time() time.Time {
	switch d.byte() {
	case 0:
		return time.Time{}
	case 1:
	default:
		d.bad = true
	}
	t := d.take(8)
	if d.bad {
		return time.Time{}
	}
	var n uint64
	for i := range 8 {
		n = n<<8 | uint64(t[i])
	}
	return time.Unix(0, int64(n)).UTC()
}

// end is errDamaged unless exactly all fields were there.
func (d *decoder[T]) end() error {
	if d.bad || len(d.rest) > 0 {
		return errDamaged
	}
	return nil
}

// clip bounds a text that comes from elsewhere, on a character boundary if it has any.
func clip(s string, max int) string {
	if len(s) <= max {
		return s
	}
	return strings.ToValidUTF8(s[:max], "")
}
