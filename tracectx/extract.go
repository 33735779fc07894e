package tracectx

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"github.com/tidwall/gjson"
)

// Fields are the agreed places of the carrier in a JSON body: names of members,
// with "." between the levels of nested objects. Every other character stands for
// itself. "" means that the header is never in the body.
type Fields struct{ SW8, Correlation string }

// Extractor finds a carrier in a message. It is immutable and safe for concurrent use.
type Extractor struct{ sw8, correlation path }

// Outcome is what Extract came upon.
type Outcome struct {
	Status Status
	// Reason is why the sw8 header was refused; "" unless Status is Malformed.
	Reason Reason
	// Correlation is why sw8-correlation, or a part of it, was left out of a context
	// that was found; "" if it was complete or absent.
	Correlation Reason
}

// Status says whether a message had a context.
type Status string

// Malformed means that there was a carrier, but none that can be continued.
const (
	None      Status = "none"
	Found     Status = "found"
	Malformed Status = "malformed"
)

// NewExtractor returns an Extractor for payloads with these fields. It is an error
// if a path has an empty name in it, or if both headers are to be in one place.
func NewExtractor(f Fields) (*Extractor, error) {
	sw8, err := newPath(f.SW8)
	if err != nil {
		return nil, fmt.Errorf("payload field for %s: %w", HeaderSW8, err)
	}
	correlation, err := newPath(f.Correlation)
	if err != nil {
		return nil, fmt.Errorf("payload field for %s: %w", HeaderCorrelation, err)
	}
	if f.SW8 != "" && f.SW8 == f.Correlation {
		return nil, fmt.Errorf("payload fields: %s and %s are both %q", HeaderSW8, HeaderCorrelation, f.SW8)
	}
	return &Extractor{sw8: sw8, correlation: correlation}, nil
}

// Extract returns the context of a message: the one in props, the MQTT 5 user
// properties named after the headers, or if there is no sw8 among them, the one in
// the payload. If the first carrier is malformed, the second is not looked at.
//
// The payload is not retained. See FromJSON for what it may be.
func (x *Extractor) Extract(props Carrier, payload []byte) (Context, Outcome) {
	if props.SW8 == "" {
		return x.FromJSON(payload)
	}
	return decode(props)
}

// FromJSON returns the context in the agreed fields of body: how a receiver that got
// a JSON body from the broker joins the trace. A body that is no JSON object, or has
// not the field, or null in it, has no context; a field that holds anything but a
// string is malformed. If a member's name repeats, the last one counts.
//
// The body is not validated and not retained. A body in which the field's name does
// not occur costs one scan for that name: a name that is plain ASCII is not
// recognised if the sender wrote it with JSON escapes.
func (x *Extractor) FromJSON(body []byte) (Context, Outcome) {
	sw8, reason := x.sw8.text(body)
	if reason != "" {
		return Context{}, Outcome{Status: Malformed, Reason: reason}
	}
	if sw8 == "" {
		return Context{}, Outcome{Status: None}
	}
	correlation, reason := x.correlation.text(body)
	ctx, out := decode(Carrier{SW8: sw8, Correlation: correlation})
	if out.Status == Found && out.Correlation == "" {
		out.Correlation = reason
	}
	return ctx, out
}

func decode(c Carrier) (Context, Outcome) {
	ctx, err := Decode(c)
	var bad *CarrierError
	switch {
	case !errors.As(err, &bad):
		return ctx, Outcome{Status: Found}
	case bad.Header == HeaderCorrelation:
		return ctx, Outcome{Status: Found, Correlation: bad.Reason}
	default:
		return Context{}, Outcome{Status: Malformed, Reason: bad.Reason}
	}
}

// path is the place of a string in a JSON body. The zero path is nowhere.
type path struct {
	names []string
	// quoted is the last name as it stands in a body, to look for before anything is
	// parsed; empty if senders might escape it.
	quoted []byte
}

func newPath(text string) (path, error) {
	if text == "" {
		return path{}, nil
	}
	p := path{names: strings.Split(text, ".")}
	for _, name := range p.names {
		if name == "" {
			return path{}, fmt.Errorf("%q has an empty name in it", text)
		}
	}
	last := p.names[len(p.names)-1]
	if !strings.ContainsFunc(last, mayBeEscaped) {
		p.quoted = []byte(`"` + last + `"`)
	}
	return p, nil
}

// mayBeEscaped reports whether some JSON encoder in use writes r as an escape:
// PHP does so with the slash, JavaScript in HTML with <, > and &, Python with all
// that is not ASCII.
func mayBeEscaped(r rune) bool {
	return r < ' ' || r >= 0x7f || strings.ContainsRune(`"\/<>&'`, r)
}

// text returns the string at p, which may share the body's memory; "" if there is none.
func (p path) text(body []byte) (string, Reason) {
	if len(p.names) == 0 || !bytes.Contains(body, p.quoted) {
		return "", ""
	}
	// Shared instead of copied: gjson only reads it, and what is found is decoded
	// into strings of its own before the caller has the body back.
	value := gjson.Parse(unsafe.String(unsafe.SliceData(body), len(body)))
	for _, name := range p.names {
		if !value.IsObject() {
			return "", ""
		}
		value = lastMember(value, name)
	}
	switch value.Type {
	case gjson.String:
		return value.Str, ""
	case gjson.Null: // absent too
		return "", ""
	default:
		return "", ReasonNotString
	}
}

// lastMember finds a member by its literal name. gjson's own paths give the first of
// several, and read numbers and special characters as more than a name.
func lastMember(object gjson.Result, name string) gjson.Result {
	var found gjson.Result
	object.ForEach(func(key, value gjson.Result) bool {
		if key.Str == name {
			found = value
		}
		return true
	})
	return found
}
