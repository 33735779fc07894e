// Package skywalking is the tracectx.Tracer that reports to SkyWalking, and the
// reporter that it reports through.
//
// Segments are built here and not by skywalking-go's own tracer, which ties spans to
// goroutines and stops handing on contexts while the collector is away; of
// skywalking-go only the interfaces of plugins/core/reporter are used. Its gRPC
// reporter cannot say that a LocalSpan refers to another segment, drops segments
// without counting them, loses the one whose send fails, and does not flush when
// closed: Reporter, behind the same interface, does all four.
package skywalking

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/apache/skywalking-go/plugins/core/reporter"
	commonv3 "skywalking.apache.org/repo/goapi/collect/common/v3"
	agentv3 "skywalking.apache.org/repo/goapi/collect/language/agent/v3"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// What names are cut to, so that an sw8 header made here stays under 2 kB whatever
// comes in, and says the same as the reported segment.
const (
	maxName           = 70  // characters of a service or an instance: where SkyWalking's OAP cuts them
	maxNameBytes      = 280 // of characters of four bytes
	maxOperation      = 150 // characters, as SkyWalking's agents cut them
	maxOperationBytes = 300
	maxPeer           = 259 // bytes: a host name of 253, a colon and a port
)

// Options configure a Tracer.
type Options struct {
	// Service and Instance are what SkyWalking shows; required. Anything beyond 70
	// characters is cut off.
	Service, Instance string

	// Sample is the share of new traces that are reported, from 0 (none) to 1 (all).
	// A trace that came with a context keeps that context's decision.
	Sample float64

	// Reporter gets the segments; NewTracer boots it. With nil nobody does: contexts
	// flow all the same, and segments that nobody gets cost nothing.
	Reporter reporter.Reporter

	Now func() time.Time // nil: time.Now
}

// Tracer builds segments and hands each to its reporter when it is complete.
type Tracer struct {
	service, instance string
	sample            float64
	reporter          reporter.Reporter
	discards          bool // nobody gets the segments, so that nothing is put into them
	now               func() time.Time
	ids               *idSource
}

var _ tracectx.Tracer = (*Tracer)(nil)

// NewTracer returns a Tracer and boots its reporter, which introduces this process
// to the collector. Closing the reporter is left to the caller.
func NewTracer(o Options) (*Tracer, error) {
	if o.Service == "" || o.Instance == "" {
		return nil, errors.New("skywalking tracer: service and instance must be named")
	}
	if !(o.Sample >= 0 && o.Sample <= 1) {
		return nil, fmt.Errorf("skywalking tracer: sample %v is not between 0 and 1", o.Sample)
	}
	t := &Tracer{
		service:  cut(o.Service, maxName, maxNameBytes),
		instance: cut(o.Instance, maxName, maxNameBytes),
		sample:   o.Sample,
		reporter: o.Reporter,
		now:      o.Now,
		ids:      newIDSource(),
	}
	if t.reporter == nil {
		t.reporter, t.discards = Discard(), true
	}
	if t.now == nil {
		t.now = time.Now
	}
	t.reporter.Boot(&reporter.Entity{
		ServiceName:         t.service,
		ServiceInstanceName: t.instance,
		Props:               instanceProperties(),
	}, nil)
	return t, nil
}

// Discard returns a reporter that takes segments and reports nothing.
func Discard() reporter.Reporter { return reporter.NewDiscardReporter() }

// instanceProperties are what SkyWalking shows of a Go process, in the words of its Go agent.
func instanceProperties() []*commonv3.KeyStringValuePair {
	props := []*commonv3.KeyStringValuePair{
		{Key: "language", Value: "go"},
		{Key: "OS Name", Value: runtime.GOOS},
		{Key: "Process No.", Value: strconv.Itoa(os.Getpid())},
	}
	if host, err := os.Hostname(); err == nil {
		props = append(props, &commonv3.KeyStringValuePair{Key: "hostname", Value: host})
	}
	addrs, _ := net.InterfaceAddrs() // without them the properties are only poorer
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLoopback() && ip.IP.To4() != nil {
			props = append(props, &commonv3.KeyStringValuePair{Key: "ipv4", Value: ip.IP.String()})
		}
	}
	return props
}

// StartEntry implements tracectx.Tracer.
func (t *Tracer) StartEntry(o tracectx.SpanOptions) tracectx.Span {
	return t.open(agentv3.SpanType_Entry, o)
}

// StartLocal implements tracectx.Tracer.
func (t *Tracer) StartLocal(o tracectx.SpanOptions) tracectx.Span {
	return t.open(agentv3.SpanType_Local, o)
}

func (t *Tracer) open(kind agentv3.SpanType, o tracectx.SpanOptions) *span {
	if o.Start.IsZero() {
		o.Start = t.now()
	}
	s := &segment{tracer: t, id: t.ids.next(o.Start), parent: o.Parent}
	if o.Parent.IsZero() {
		s.traceID = t.ids.next(o.Start)
		s.sampled = rand.Float64() < t.sample
	} else {
		s.traceID = o.Parent.TraceID
		s.sampled = o.Parent.Sampled
	}
	s.kept = s.sampled && !t.discards
	root := s.start(kind, -1, o)
	s.endpoint = root.operation
	return root
}

// segment is what one process does for one trace at a stretch.
type segment struct {
	tracer   *Tracer
	traceID  string
	id       string
	sampled  bool             // as contexts have it
	kept     bool             // somebody gets the segment
	parent   tracectx.Context // what the first span refers to; zero: nothing
	endpoint string           // operation of the first span
	spans    []*span          // in the order of their ids, if the segment is kept
	started  int32

	// Most segments have two spans: an entry and a rule, or a delivery and its exit. They
	// cost no allocation of their own.
	room     [2]span
	spanRoom [2]*span
}

func (s *segment) start(kind agentv3.SpanType, parentID int32, o tracectx.SpanOptions) *span {
	if o.Start.IsZero() {
		o.Start = s.tracer.now()
	}
	var sp *span
	if int(s.started) < len(s.room) {
		sp = &s.room[s.started]
	} else {
		sp = new(span)
	}
	*sp = span{
		segment:   s,
		id:        s.started,
		parentID:  parentID,
		kind:      kind,
		operation: cut(o.Operation, maxOperation, maxOperationBytes),
		peer:      cut(o.Peer, maxPeer, maxPeer),
		layer:     o.Layer,
		component: o.Component,
		start:     o.Start.UnixMilli(),
	}
	s.started++
	if s.kept {
		if s.spans == nil {
			s.spans = s.spanRoom[:0]
		}
		s.spans = append(s.spans, sp)
	}
	return sp
}

// report ends what is still open and hands the segment on, children before their
// parents and the first span last, as reporters expect it.
func (s *segment) report(end int64) {
	if !s.kept {
		return
	}
	spans := make([]reporter.ReportedSpan, 0, len(s.spans))
	for _, sp := range slices.Backward(s.spans) {
		if !sp.ended {
			sp.finish(end)
		}
		spans = append(spans, (*finished)(sp))
	}
	s.tracer.reporter.SendTracing(spans)
}

// span implements tracectx.Span.
type span struct {
	segment      *segment
	id, parentID int32
	kind         agentv3.SpanType
	operation    string
	peer         string
	layer        tracectx.Layer
	component    int32
	start, end   int64 // Unix milliseconds
	ended        bool
	failed       bool
	tags         []tag
	logs         []*agentv3.Log
}

// tag is a KeyStringValuePair before it has to be one: half the memory, and none of its own.
type tag struct{ key, value string }

// tagRoom is how many tags the spans of this broker have, with some to spare.
const tagRoom = 6

func (sp *span) Context() tracectx.Context {
	s := sp.segment
	c := tracectx.Context{
		Sampled:     s.sampled,
		TraceID:     s.traceID,
		SegmentID:   s.id,
		SpanID:      sp.id,
		Service:     s.tracer.service,
		Instance:    s.tracer.instance,
		Endpoint:    s.endpoint,
		Correlation: s.parent.Correlation,
	}
	if sp.kind == agentv3.SpanType_Exit {
		c.Peer = sp.peer
	}
	return c
}

func (sp *span) StartLocal(o tracectx.SpanOptions) tracectx.Span {
	return sp.child(agentv3.SpanType_Local, o)
}

func (sp *span) StartExit(o tracectx.SpanOptions) tracectx.Span {
	return sp.child(agentv3.SpanType_Exit, o)
}

func (sp *span) child(kind agentv3.SpanType, o tracectx.SpanOptions) *span {
	if sp.ended { // the segment may be reported: what refers to a new span in it would dangle
		return sp
	}
	return sp.segment.start(kind, sp.id, o)
}

func (sp *span) Tag(key, value string) {
	if !sp.segment.kept || sp.ended {
		return
	}
	if sp.tags == nil {
		sp.tags = make([]tag, 0, tagRoom)
	}
	sp.tags = append(sp.tags, tag{valid(key), valid(value)})
}

func (sp *span) Error(cause string) {
	if !sp.segment.kept || sp.ended {
		return
	}
	sp.failed = true
	sp.logs = append(sp.logs, &agentv3.Log{
		Time: sp.segment.tracer.now().UnixMilli(),
		Data: []*commonv3.KeyStringValuePair{
			{Key: "event", Value: "error"},
			{Key: "message", Value: valid(cause)},
		},
	})
}

func (sp *span) End() {
	if sp.ended {
		return
	}
	sp.finish(sp.segment.tracer.now().UnixMilli())
	if sp.id == 0 {
		sp.segment.report(sp.end)
	}
}

// finish ends the span, not before it started even if the clock was set back.
func (sp *span) finish(end int64) {
	sp.end = max(end, sp.start)
	sp.ended = true
}

// valid replaces what is not UTF-8: protobuf refuses a whole segment for one such byte.
func valid(s string) string {
	return strings.ToValidUTF8(s, "\uFFFD")
}

// cut makes s valid and shortens it to so many characters, and to so many bytes.
func cut(s string, chars, size int) string {
	s = valid(s)
	if len(s) <= chars && len(s) <= size {
		return s
	}
	for i, r := range s {
		if chars == 0 || i+utf8.RuneLen(r) > size {
			return s[:i]
		}
		chars--
	}
	return s
}
