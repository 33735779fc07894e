// Package tracectxtest is the far side of tracing for tests and demonstrations: a
// Recorder, which is a tracectx.Tracer that remembers, a Collector, which receives
// what any SkyWalking agent reports over gRPC, and trees of what either got, with all
// that is broken in them.
//
// It stores nothing, and aggregates nothing: it is no SkyWalking.
package tracectxtest

import (
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// Segment is a finished segment. Segments are not modified once they were handed out.
type Segment struct {
	TraceID, ID       string
	Service, Instance string
	Spans             []*Span // by id
}

// Span returns the span with that id, nil if there is none.
func (s *Segment) Span(id int32) *Span {
	for _, sp := range s.Spans {
		if sp.ID == id {
			return sp
		}
	}
	return nil
}

// Span is a span of a finished segment.
type Span struct {
	ID, Parent int32 // Parent: in the same segment; -1: none
	Kind       Kind
	Operation  string
	Peer       string
	Layer      tracectx.Layer
	Component  int32
	Start, End time.Time // of millisecond precision from a Collector
	Failed     bool
	Tags       []KeyValue
	Logs       []Log
	Refs       []Ref // spans of other segments that it continues
}

// Tag returns the first tag of that key, "" if there is none.
func (s *Span) Tag(key string) string {
	for _, t := range s.Tags {
		if t.Key == key {
			return t.Value
		}
	}
	return ""
}

// Kind is the type of a span, in SkyWalking's words.
type Kind string

// Kinds of spans.
const (
	Entry Kind = "Entry"
	Exit  Kind = "Exit"
	Local Kind = "Local"
)

// KeyValue is a tag, or an item of a log.
type KeyValue struct{ Key, Value string }

// Log is an entry of a span's log.
type Log struct {
	Time time.Time
	Data []KeyValue
}

// Ref is a reference to a span of another segment.
type Ref struct {
	Kind                        RefKind
	TraceID, SegmentID          string
	SpanID                      int32
	Service, Instance, Endpoint string // the parent's
	Peer                        string // the network address that the parent called
}

// RefKind is the type of a reference, in SkyWalking's words.
type RefKind string

// Kinds of references.
const (
	CrossProcess RefKind = "CrossProcess"
	CrossThread  RefKind = "CrossThread"
)
