package skywalking

import (
	"github.com/apache/skywalking-go/plugins/core/reporter"
	commonv3 "skywalking.apache.org/repo/goapi/collect/common/v3"
	agentv3 "skywalking.apache.org/repo/goapi/collect/language/agent/v3"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// finished is an ended span as reporters see it. It no longer changes.
type finished span

var (
	_ reporter.ReportedSpan   = (*finished)(nil)
	_ reporter.SegmentContext = (*finished)(nil)
	_ reporter.SpanContext    = (*parent)(nil)
)

func (f *finished) Context() reporter.SegmentContext { return f }

// Refs returns what the segment's first span refers to. That it is a span of this
// service, and no other process's, is seen by the referring span being a LocalSpan.
func (f *finished) Refs() []reporter.SpanContext {
	if f.id != 0 || f.segment.parent.IsZero() {
		return nil
	}
	return []reporter.SpanContext{(*parent)(&f.segment.parent)}
}

func (f *finished) StartTime() int64             { return f.start }
func (f *finished) EndTime() int64               { return f.end }
func (f *finished) OperationName() string        { return f.operation }
func (f *finished) Peer() string                 { return f.peer }
func (f *finished) SpanType() agentv3.SpanType   { return f.kind }
func (f *finished) SpanLayer() agentv3.SpanLayer { return agentv3.SpanLayer(f.layer) }
func (f *finished) IsError() bool                { return f.failed }
func (f *finished) Logs() []*agentv3.Log         { return f.logs }
func (f *finished) ComponentID() int32           { return f.component }

func (f *finished) Tags() []*commonv3.KeyStringValuePair {
	if len(f.tags) == 0 {
		return nil
	}
	pairs := make([]commonv3.KeyStringValuePair, len(f.tags)) // one allocation for all
	tags := make([]*commonv3.KeyStringValuePair, len(f.tags))
	for i, t := range f.tags {
		pairs[i].Key, pairs[i].Value = t.key, t.value
		tags[i] = &pairs[i]
	}
	return tags
}

func (f *finished) GetTraceID() string   { return f.segment.traceID }
func (f *finished) GetSegmentID() string { return f.segment.id }
func (f *finished) GetSpanID() int32     { return f.id }

// GetParentSpanID is the parent in the same segment, -1 for the first span even if
// it refers to another segment.
func (f *finished) GetParentSpanID() int32 { return f.parentID }

func (f *finished) GetParentSegmentID() string { return f.segment.parent.SegmentID }

func (f *finished) GetCorrelationContextValue(key string) string {
	for _, e := range f.segment.parent.Correlation {
		if e.Key == key {
			return e.Value
		}
	}
	return ""
}

// SetCorrelationContextValue does nothing: the span has ended and its context is out.
func (f *finished) SetCorrelationContextValue(string, string) {}

// parent is the context that a segment continues, as reporters see it.
type parent tracectx.Context

func (p *parent) GetTraceID() string               { return p.TraceID }
func (p *parent) GetParentSegmentID() string       { return p.SegmentID }
func (p *parent) GetParentService() string         { return p.Service }
func (p *parent) GetParentServiceInstance() string { return p.Instance }
func (p *parent) GetParentEndpoint() string        { return p.Endpoint }
func (p *parent) GetAddressUsedAtClient() string   { return p.Peer }
func (p *parent) GetParentSpanID() int32           { return p.SpanID }
