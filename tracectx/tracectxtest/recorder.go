package tracectxtest

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// Recorder is a tracectx.Tracer that remembers the segments that ended. Its ids tell
// the order in which they were made: "broker.segment.2" is the second one. It is safe
// for concurrent use, its spans too.
type Recorder struct {
	service   string
	unsampled bool

	mu       sync.Mutex
	traces   int
	opened   int
	segments []*Segment
}

var _ tracectx.Tracer = (*Recorder)(nil)

// NewRecorder returns a Recorder for a service of that name, whose instance is
// "<service>@test". It samples every trace that it begins.
func NewRecorder(service string) *Recorder {
	return &Recorder{service: service}
}

// NewUnsampledRecorder returns a Recorder that samples no trace that it begins.
func NewUnsampledRecorder(service string) *Recorder {
	return &Recorder{service: service, unsampled: true}
}

// Segments returns the sampled segments that ended, in the order of their end.
func (r *Recorder) Segments() []*Segment {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.segments)
}

// StartEntry implements tracectx.Tracer.
func (r *Recorder) StartEntry(o tracectx.SpanOptions) tracectx.Span {
	return r.open(Entry, CrossProcess, o)
}

// StartLocal implements tracectx.Tracer.
func (r *Recorder) StartLocal(o tracectx.SpanOptions) tracectx.Span {
	return r.open(Local, CrossThread, o)
}

func (r *Recorder) open(kind Kind, refKind RefKind, o tracectx.SpanOptions) tracectx.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened++
	s := &recording{
		recorder:    r,
		sampled:     o.Parent.Sampled,
		correlation: o.Parent.Correlation,
		segment: &Segment{
			TraceID:  o.Parent.TraceID,
			ID:       fmt.Sprintf("%s.segment.%d", r.service, r.opened),
			Service:  r.service,
			Instance: r.service + "@test",
		},
	}
	if o.Parent.IsZero() {
		r.traces++
		s.sampled = !r.unsampled
		s.segment.TraceID = fmt.Sprintf("%s.trace.%d", r.service, r.traces)
	}
	root := s.start(kind, -1, o)
	if p := o.Parent; !p.IsZero() {
		root.span.Refs = []Ref{{
			Kind: refKind, TraceID: p.TraceID, SegmentID: p.SegmentID, SpanID: p.SpanID,
			Service: p.Service, Instance: p.Instance, Endpoint: p.Endpoint, Peer: p.Peer,
		}}
	}
	return root
}

// recording is a segment under way, guarded by its recorder's lock.
type recording struct {
	recorder    *Recorder
	sampled     bool
	correlation tracectx.Correlation
	segment     *Segment
}

func (s *recording) start(kind Kind, parent int32, o tracectx.SpanOptions) *recordedSpan {
	sp := &Span{
		ID:        int32(len(s.segment.Spans)),
		Parent:    parent,
		Kind:      kind,
		Operation: o.Operation,
		Peer:      o.Peer,
		Layer:     o.Layer,
		Component: o.Component,
		Start:     o.Start,
	}
	if sp.Start.IsZero() {
		sp.Start = time.Now()
	}
	s.segment.Spans = append(s.segment.Spans, sp)
	return &recordedSpan{recording: s, span: sp}
}

// recordedSpan is a span; it has ended when End is set.
type recordedSpan struct {
	recording *recording
	span      *Span
}

func (r *recordedSpan) Context() tracectx.Context {
	s := r.recording
	c := tracectx.Context{
		Sampled:     s.sampled,
		TraceID:     s.segment.TraceID,
		SegmentID:   s.segment.ID,
		SpanID:      r.span.ID,
		Service:     s.segment.Service,
		Instance:    s.segment.Instance,
		Correlation: s.correlation,
	}
	s.recorder.mu.Lock()
	defer s.recorder.mu.Unlock()
	c.Endpoint = s.segment.Spans[0].Operation
	if r.span.Kind == Exit {
		c.Peer = r.span.Peer
	}
	return c
}

func (r *recordedSpan) StartLocal(o tracectx.SpanOptions) tracectx.Span {
	return r.child(Local, o)
}

func (r *recordedSpan) StartExit(o tracectx.SpanOptions) tracectx.Span {
	return r.child(Exit, o)
}

func (r *recordedSpan) child(kind Kind, o tracectx.SpanOptions) tracectx.Span {
	child := r
	r.record(func() { child = r.recording.start(kind, r.span.ID, o) })
	return child
}

func (r *recordedSpan) Tag(key, value string) {
	r.record(func() { r.span.Tags = append(r.span.Tags, KeyValue{key, value}) })
}

func (r *recordedSpan) Error(cause string) {
	r.record(func() {
		r.span.Failed = true
		r.span.Logs = append(r.span.Logs, Log{
			Time: time.Now(),
			Data: []KeyValue{{"event", "error"}, {"message", cause}},
		})
	})
}

func (r *recordedSpan) End() {
	r.record(func() {
		r.span.End = time.Now()
		if r.span.ID != 0 {
			return
		}
		s := r.recording
		for _, sp := range s.segment.Spans {
			if sp.End.IsZero() {
				sp.End = r.span.End
			}
		}
		if s.sampled {
			s.recorder.segments = append(s.recorder.segments, s.segment)
		}
	})
}

// record changes the span unless it has ended.
func (r *recordedSpan) record(change func()) {
	r.recording.recorder.mu.Lock()
	defer r.recording.recorder.mu.Unlock()
	if r.span.End.IsZero() {
		change()
	}
}
