// Package tracectx carries SkyWalking's trace context between processes: the sw8
// header (version 3) and sw8-correlation on the wire, where they are looked for in a
// message, and the Tracer and Span interfaces that the rest of the broker uses.
//
// It knows nothing of how spans are reported (package skywalking does), of MQTT or
// of HTTP. Contexts are values that are passed on explicitly: nothing here hangs on
// a goroutine, so a context can be stored and continued after a restart.
//
// [SkyWalking Cross Process Propagation Headers Protocol, version 3.0] is the
// reference for "sw8 v3 field N".
//
// [SkyWalking Cross Process Propagation Headers Protocol, version 3.0]: https://skywalking.apache.org/docs/main/latest/en/api/x-process-propagation-headers-v3/
package tracectx

import (
	"encoding/base64"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Names of the headers, and of the MQTT 5 user properties that carry them.
const (
	HeaderSW8         = "sw8"
	HeaderCorrelation = "sw8-correlation"
)

const (
	sw8Fields = 8

	// maxHeader bounds each header's text: "should be less than 2k", says the
	// protocol. Agents leave the context out when it is longer.
	maxHeader = 2<<10 - 1

	// maxID bounds trace and segment ids. Agents' ids have less than 100 bytes and
	// SkyWalking's relational storages keep 150 or 200; the bound leaves room for
	// our own service, instance and endpoint in the next hop's header.
	maxID = 256

	// Defaults of SkyWalking's agents (correlation.element_max_number and
	// correlation.value_max_length).
	maxCorrelationKeys  = 3
	maxCorrelationValue = 128
)

// Context is one sw8 header with its sw8-correlation: what a span says about itself
// to the spans that follow it elsewhere. The zero value is no context.
type Context struct {
	Sampled   bool
	TraceID   string
	SegmentID string // the parent's segment
	SpanID    int32  // the parent span in that segment

	// The parent's service, its instance, and the operation of the first span of
	// the parent's segment. Empty ones are accepted from the wire.
	Service, Instance, Endpoint string

	// Peer is the address the client used to reach the next hop. SkyWalking joins
	// the two services by it: it must equal the exit span's peer.
	Peer string

	Correlation Correlation // shared between contexts: not to be modified
}

// Correlation is the baggage of a trace, in the order received, without duplicates.
type Correlation []Entry

// Entry is one key of the baggage.
type Entry struct{ Key, Value string }

// Carrier holds the raw texts of the two headers; "" is an absent header.
type Carrier struct{ SW8, Correlation string }

// Reason says what is wrong with a header: a fixed set, fit for a metric label.
type Reason string

// What Decode and Extract find wrong.
const (
	ReasonTooLong   Reason = "too_long"   // 2 kB or more
	ReasonFields    Reason = "fields"     // not eight fields
	ReasonSample    Reason = "sample"     // field 1 is not 0 or 1
	ReasonBase64    Reason = "base64"     // not padded base64 of the standard alphabet
	ReasonUTF8      Reason = "utf8"       // the decoded text is not UTF-8, which the protocol to the collector demands
	ReasonID        Reason = "id"         // field 2 or 3 is empty, or longer than 256 bytes
	ReasonSpanID    Reason = "span_id"    // field 4 is not a non-negative 32-bit decimal
	ReasonNotString Reason = "not_string" // the payload's field holds no JSON string
	ReasonEntry     Reason = "entry"      // correlation: not key:value, or an empty key
	ReasonKeys      Reason = "keys"       // correlation: more than three keys
	ReasonValue     Reason = "value"      // correlation: a value of more than 128 bytes
)

// Reasons lists every reason, so that counters by reason can start at zero.
func Reasons() []Reason {
	return []Reason{
		ReasonTooLong, ReasonFields, ReasonSample, ReasonBase64, ReasonUTF8, ReasonID,
		ReasonSpanID, ReasonNotString, ReasonEntry, ReasonKeys, ReasonValue,
	}
}

// CarrierError is the error of Decode.
type CarrierError struct {
	Header string // HeaderSW8 or HeaderCorrelation
	Reason Reason // of the first fault
}

func (e *CarrierError) Error() string {
	return "decode " + e.Header + ": " + string(e.Reason)
}

// IsZero reports whether c is no context: it has no trace id.
func (c Context) IsZero() bool { return c.TraceID == "" }

// base64Text is what agents of every language emit: the standard alphabet with
// padding. The URL alphabet could not be told apart, since "-" separates the fields.
var base64Text = base64.StdEncoding.Strict()

// Carrier encodes c. A zero context gives a zero Carrier. What Decode returned is
// encoded to the very text that it came from, but for correlation entries that
// Decode left out.
func (c Context) Carrier() Carrier {
	var buf [512]byte
	out := Carrier{SW8: string(c.AppendSW8(buf[:0]))}
	if out.SW8 != "" && len(c.Correlation) > 0 {
		out.Correlation = string(c.Correlation.Append(buf[:0]))
	}
	return out
}

// AppendSW8 appends the text of the sw8 header to dst; nothing for a zero context.
// What is decodable at the other end is up to c: texts must be UTF-8, ids within
// their bounds, the whole under 2 kB. Contexts of spans are.
func (c Context) AppendSW8(dst []byte) []byte {
	if c.IsZero() {
		return dst
	}
	sample := byte('0') // sw8 v3 field 1
	if c.Sampled {
		sample = '1'
	}
	dst = append(dst, sample, '-')
	dst = base64Text.AppendEncode(dst, []byte(c.TraceID)) // sw8 v3 field 2
	dst = append(dst, '-')
	dst = base64Text.AppendEncode(dst, []byte(c.SegmentID)) // sw8 v3 field 3
	dst = append(dst, '-')
	dst = strconv.AppendInt(dst, int64(c.SpanID), 10) // sw8 v3 field 4
	dst = append(dst, '-')
	dst = base64Text.AppendEncode(dst, []byte(c.Service)) // sw8 v3 field 5
	dst = append(dst, '-')
	dst = base64Text.AppendEncode(dst, []byte(c.Instance)) // sw8 v3 field 6
	dst = append(dst, '-')
	dst = base64Text.AppendEncode(dst, []byte(c.Endpoint)) // sw8 v3 field 7
	dst = append(dst, '-')
	return base64Text.AppendEncode(dst, []byte(c.Peer)) // sw8 v3 field 8
}

// Append appends the text of the sw8-correlation header to dst.
func (c Correlation) Append(dst []byte) []byte {
	for i, e := range c {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = base64Text.AppendEncode(dst, []byte(e.Key))
		dst = append(dst, ':')
		dst = base64Text.AppendEncode(dst, []byte(e.Value))
	}
	return dst
}

// Decode reads a carrier. Without an sw8 header the context is zero and the error
// nil, whatever the correlation says.
//
// Every error is a *CarrierError. If its Header is HeaderSW8, there is no context.
// If it is HeaderCorrelation, the context is good, and its correlation lacks the
// entries that could not be taken: malformed ones, values over 128 bytes, and what
// comes after the third key. Of an entry's key that repeats, the last value counts.
//
// The result shares no memory with the carrier.
func Decode(c Carrier) (Context, error) {
	if c.SW8 == "" {
		return Context{}, nil
	}
	ctx, reason := decodeSW8(c.SW8)
	if reason != "" {
		return Context{}, &CarrierError{Header: HeaderSW8, Reason: reason}
	}
	ctx.Correlation, reason = decodeCorrelation(c.Correlation)
	if reason != "" {
		return ctx, &CarrierError{Header: HeaderCorrelation, Reason: reason}
	}
	return ctx, nil
}

func decodeSW8(header string) (Context, Reason) {
	if len(header) > maxHeader {
		return Context{}, ReasonTooLong
	}
	var fields [sw8Fields]string
	rest := header
	for i := range fields {
		field, after, more := strings.Cut(rest, "-")
		if last := i == sw8Fields-1; more == last {
			return Context{}, ReasonFields
		}
		fields[i], rest = field, after
	}

	if fields[0] != "0" && fields[0] != "1" { // sw8 v3 field 1
		return Context{}, ReasonSample
	}
	spanID, ok := decodeSpanID(fields[3]) // sw8 v3 field 4
	if !ok {
		return Context{}, ReasonSpanID
	}

	// All texts are decoded into one buffer and share one string.
	var buf [maxHeader]byte
	var ends [sw8Fields]int
	text := buf[:0]
	for i, field := range fields {
		if i != 0 && i != 3 {
			var reason Reason
			if text, reason = appendText(text, field); reason != "" {
				return Context{}, reason
			}
		}
		ends[i] = len(text)
	}
	all := string(text)
	c := Context{
		Sampled:   fields[0] == "1",
		TraceID:   all[:ends[1]],        // sw8 v3 field 2
		SegmentID: all[ends[1]:ends[2]], // sw8 v3 field 3
		SpanID:    spanID,
		Service:   all[ends[3]:ends[4]], // sw8 v3 field 5
		Instance:  all[ends[4]:ends[5]], // sw8 v3 field 6
		Endpoint:  all[ends[5]:ends[6]], // sw8 v3 field 7
		Peer:      all[ends[6]:ends[7]], // sw8 v3 field 8
	}
	for _, id := range []string{c.TraceID, c.SegmentID} {
		if id == "" || len(id) > maxID {
			return Context{}, ReasonID
		}
	}
	return c, ""
}

// decodeSpanID takes digits alone, in the one form that encoding gives.
func decodeSpanID(field string) (int32, bool) {
	n, err := strconv.ParseUint(field, 10, 32)
	if err != nil || n > math.MaxInt32 || (field[0] == '0' && len(field) > 1) {
		return 0, false
	}
	return int32(n), true
}

// appendText appends the text that field encodes. dst has room for it.
func appendText(dst []byte, field string) ([]byte, Reason) {
	start := len(dst)
	dst, err := base64Text.AppendDecode(dst, []byte(field))
	// The decoder skips line breaks, which makes the field longer than its text needs.
	if err != nil || base64Text.EncodedLen(len(dst)-start) != len(field) {
		return dst, ReasonBase64
	}
	if !utf8.Valid(dst[start:]) {
		return dst, ReasonUTF8
	}
	return dst, ""
}

// decodeCorrelation returns the entries that could be taken, and the first fault.
func decodeCorrelation(header string) (Correlation, Reason) {
	if header == "" {
		return nil, ""
	}
	if len(header) > maxHeader {
		return nil, ReasonTooLong
	}
	var entries Correlation
	var first Reason
	for field := range strings.SplitSeq(header, ",") {
		e, reason := decodeEntry(field)
		if reason == "" {
			i := slices.IndexFunc(entries, func(have Entry) bool { return have.Key == e.Key })
			switch {
			case i >= 0:
				entries[i] = e
			case len(entries) == maxCorrelationKeys:
				reason = ReasonKeys
			default:
				entries = append(entries, e)
			}
		}
		if first == "" {
			first = reason
		}
	}
	return entries, first
}

func decodeEntry(field string) (Entry, Reason) {
	key, value, ok := strings.Cut(field, ":")
	if !ok || key == "" {
		return Entry{}, ReasonEntry
	}
	var buf [maxHeader]byte
	text, reason := appendText(buf[:0], key)
	if reason != "" {
		return Entry{}, reason
	}
	end := len(text)
	if text, reason = appendText(text, value); reason != "" {
		return Entry{}, reason
	}
	if len(text)-end > maxCorrelationValue {
		return Entry{}, ReasonValue
	}
	all := string(text)
	return Entry{Key: all[:end], Value: all[end:]}, ""
}
