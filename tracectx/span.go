package tracectx

import "time"

// Tracer opens segments. Implementations are safe for concurrent use and never
// block on a collector.
type Tracer interface {
	// StartEntry opens a segment whose first span is an EntrySpan, which refers to
	// o.Parent as another process's span (CrossProcess). A zero parent begins a new
	// trace, and whether it is sampled is decided here.
	StartEntry(o SpanOptions) Span

	// StartLocal opens a segment whose first span is a LocalSpan, which refers to
	// o.Parent as a span of this service (CrossThread): work that goes on after the
	// parent's segment was reported, even in a later process. A zero parent begins
	// a new trace, as with StartEntry.
	StartLocal(o SpanOptions) Span
}

// SpanOptions describe a span to start.
type SpanOptions struct {
	Operation string
	Parent    Context // for Tracer's methods alone
	Layer     Layer
	Component int32  // SkyWalking's component id; 0: none. There is none for MQTT.
	Peer      string // exit spans: the address called, field 8 of the sw8 that goes there
	Start     time.Time
}

// Layer is what kind of work a span does, in SkyWalking's numbering.
type Layer int32

// LayerMQ on an EntrySpan makes SkyWalking draw a virtual queue before the service.
const (
	LayerUnknown      Layer = 0
	LayerDatabase     Layer = 1
	LayerRPCFramework Layer = 2
	LayerHTTP         Layer = 3
	LayerMQ           Layer = 4
)

// Span is a span under way. The spans of one segment are for one goroutine at a
// time; a context taken from them may go anywhere. After End every method but
// Context does nothing, and a child started then is the ended span itself.
type Span interface {
	// Context is what a child elsewhere refers to. An exit span's has Peer set, so
	// its Carrier is what goes on the wire. It is complete even when the trace is
	// not sampled.
	Context() Context

	// StartLocal and StartExit start a child in the same segment; o.Parent is ignored.
	StartLocal(o SpanOptions) Span
	StartExit(o SpanOptions) Span

	// Tag adds a tag. A key that repeats is reported twice.
	Tag(key, value string)

	// Error flags the span as failed and logs the cause.
	Error(cause string)

	// End ends the span. Ending a segment's first span ends those still open and
	// reports the segment.
	End()
}
