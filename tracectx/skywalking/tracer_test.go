package skywalking_test

import (
	"math"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/apache/skywalking-go/plugins/core/reporter"
	"github.com/google/go-cmp/cmp"
	logv3 "skywalking.apache.org/repo/goapi/collect/logging/v3"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
)

// kept is a reporter.Reporter that keeps what it gets.
type kept struct {
	mu       sync.Mutex
	entity   *reporter.Entity
	segments [][]reporter.ReportedSpan
}

func (k *kept) Boot(e *reporter.Entity, _ []reporter.AgentConfigChangeWatcher) { k.entity = e }
func (k *kept) SendTracing(spans []reporter.ReportedSpan) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.segments = append(k.segments, spans)
}
func (k *kept) SendMetrics([]reporter.ReportedMeter) {}
func (k *kept) SendLog(*logv3.LogData)               {}
func (k *kept) ConnectionStatus() reporter.ConnectionStatus {
	return reporter.ConnectionStatusConnected
}
func (k *kept) Close() {}

func newTracer(t testing.TB, o skywalking.Options) *skywalking.Tracer {
	t.Helper()
	if o.Service == "" {
		o.Service, o.Instance = "mqtt-broker", "broker@1"
	}
	tracer, err := skywalking.NewTracer(o)
	if err != nil {
		t.Fatal(err)
	}
	return tracer
}

var vehicle = tracectx.Context{
	Sampled: true, TraceID: "trace", SegmentID: "vehicle-segment", SpanID: 2,
	Service: "vehicle-7", Instance: "v7@cab", Endpoint: "loop", Peer: "127.0.0.1:1883",
	Correlation: tracectx.Correlation{{Key: "vin", Value: "V7"}},
}

func TestNewTracerRefuses(t *testing.T) {
	for name, o := range map[string]skywalking.Options{
		"no service":      {Instance: "i"},
		"no instance":     {Service: "s"},
		"negative sample": {Service: "s", Instance: "i", Sample: -0.1},
		"sample over 1":   {Service: "s", Instance: "i", Sample: 1.1},
		"no number":       {Service: "s", Instance: "i", Sample: math.NaN()},
	} {
		if _, err := skywalking.NewTracer(o); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestTracerIntroducesItself(t *testing.T) {
	var k kept
	newTracer(t, skywalking.Options{Reporter: &k})
	if k.entity.ServiceName != "mqtt-broker" || k.entity.ServiceInstanceName != "broker@1" {
		t.Errorf("entity %+v", k.entity)
	}
	props := make(map[string]string)
	for _, p := range k.entity.Props {
		props[p.Key] = p.Value
	}
	for _, key := range []string{"language", "OS Name", "Process No.", "hostname"} {
		if props[key] == "" {
			t.Errorf("no property %q in %v", key, props)
		}
	}
	if props["language"] != "go" {
		t.Errorf("language %q", props["language"])
	}
}

func TestSegmentIsReportedChildrenFirst(t *testing.T) {
	var k kept
	clock := time.UnixMilli(1_700_000_000_000)
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: &k, Now: func() time.Time { return clock }})

	entry := tracer.StartEntry(tracectx.SpanOptions{Operation: "mqtt/publish/a", Parent: vehicle, Start: clock.Add(-time.Second)})
	rule := entry.StartLocal(tracectx.SpanOptions{Operation: "rule/r"})
	exit := rule.StartExit(tracectx.SpanOptions{Operation: "out", Peer: "h:1", Layer: tracectx.LayerHTTP, Component: 5005})
	exit.Tag("url", "http://h:1/\xff")
	exit.Error("status 500")
	clock = clock.Add(5 * time.Millisecond)
	exit.End()
	clock = clock.Add(time.Millisecond)
	entry.End() // with the rule's span open
	rule.Tag("late", "x")
	rule.End()
	entry.End()

	if len(k.segments) != 1 {
		t.Fatalf("%d segments reported, want 1", len(k.segments))
	}
	var got []string
	for _, sp := range k.segments[0] {
		got = append(got, sp.OperationName())
		if sp.Context().GetTraceID() != "trace" || sp.Context().GetSegmentID() != entry.Context().SegmentID {
			t.Errorf("%s: trace %s, segment %s", sp.OperationName(), sp.Context().GetTraceID(), sp.Context().GetSegmentID())
		}
	}
	if diff := cmp.Diff([]string{"out", "rule/r", "mqtt/publish/a"}, got); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}

	out, local, root := k.segments[0][0], k.segments[0][1], k.segments[0][2]
	if root.Context().GetSpanID() != 0 || root.Context().GetParentSpanID() != -1 ||
		local.Context().GetParentSpanID() != 0 || out.Context().GetParentSpanID() != 1 {
		t.Error("span ids do not tell the tree")
	}
	if len(out.Refs())+len(local.Refs()) != 0 || len(root.Refs()) != 1 {
		t.Fatal("the first span alone refers to the parent")
	}
	ref := root.Refs()[0]
	if ref.GetTraceID() != "trace" || ref.GetParentSegmentID() != "vehicle-segment" || ref.GetParentSpanID() != 2 ||
		ref.GetParentService() != "vehicle-7" || ref.GetParentServiceInstance() != "v7@cab" ||
		ref.GetParentEndpoint() != "loop" || ref.GetAddressUsedAtClient() != "127.0.0.1:1883" {
		t.Errorf("reference %+v", ref)
	}
	if root.EndTime()-root.StartTime() != 1006 || out.EndTime()-out.StartTime() != 5 || local.EndTime() != root.EndTime() {
		t.Errorf("times: root %d-%d, out %d-%d, local ends %d",
			root.StartTime(), root.EndTime(), out.StartTime(), out.EndTime(), local.EndTime())
	}
	if !out.IsError() || len(out.Logs()) != 1 || out.Logs()[0].Data[1].Value != "status 500" || root.IsError() {
		t.Error("the error is not on the exit span alone")
	}
	if tags := out.Tags(); len(tags) != 1 || tags[0].Value != "http://h:1/\uFFFD" {
		t.Errorf("tags %v", tags)
	}
	if len(local.Tags()) != 0 {
		t.Error("a tag was added after the end")
	}
	if root.Context().GetCorrelationContextValue("vin") != "V7" || root.Context().GetCorrelationContextValue("x") != "" {
		t.Error("correlation is not readable")
	}
}

func TestContextOfSpans(t *testing.T) {
	tracer := newTracer(t, skywalking.Options{Sample: 1})
	entry := tracer.StartEntry(tracectx.SpanOptions{Operation: "mqtt/publish/a", Parent: vehicle})
	exit := entry.StartExit(tracectx.SpanOptions{Operation: "out", Peer: "h:1"})

	want := tracectx.Context{
		Sampled: true, TraceID: "trace", SegmentID: entry.Context().SegmentID, SpanID: 0,
		Service: "mqtt-broker", Instance: "broker@1", Endpoint: "mqtt/publish/a", Correlation: vehicle.Correlation,
	}
	if diff := cmp.Diff(want, entry.Context()); diff != "" {
		t.Errorf("entry (-want +got):\n%s", diff)
	}
	want.SpanID, want.Peer = 1, "h:1"
	if diff := cmp.Diff(want, exit.Context()); diff != "" {
		t.Errorf("exit (-want +got):\n%s", diff)
	}
	entry.End()
	if late := entry.StartExit(tracectx.SpanOptions{Operation: "late", Peer: "h:2"}); late.Context().SpanID != 0 {
		t.Errorf("a child of an ended span refers to span %d, which is in no segment", late.Context().SpanID)
	}
}

func TestSampling(t *testing.T) {
	unsampled := vehicle
	unsampled.Sampled = false
	for _, tt := range []struct {
		name   string
		sample float64
		parent tracectx.Context
		want   bool
	}{
		{"new trace, all", 1, tracectx.Context{}, true},
		{"new trace, none", 0, tracectx.Context{}, false},
		{"upstream 1 wins", 0, vehicle, true},
		{"upstream 0 wins", 1, unsampled, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var k kept
			tracer := newTracer(t, skywalking.Options{Sample: tt.sample, Reporter: &k})
			entry := tracer.StartEntry(tracectx.SpanOptions{Operation: "e", Parent: tt.parent})
			entry.Tag("a", "b")
			local := tracer.StartLocal(tracectx.SpanOptions{Operation: "l", Parent: entry.Context()})
			exit := local.StartExit(tracectx.SpanOptions{Operation: "x", Peer: "h:1"})
			exit.Error("boom")
			exit.End()
			local.End()
			entry.End()

			c := exit.Context()
			if c.Sampled != tt.want || c.TraceID != entry.Context().TraceID || c.SegmentID == entry.Context().SegmentID {
				t.Errorf("exit context %+v of entry %+v", c, entry.Context())
			}
			if got, err := tracectx.Decode(c.Carrier()); err != nil || got.Sampled != tt.want {
				t.Errorf("the carrier holds %+v, %v", got, err)
			}
			if reported := len(k.segments) == 2; reported != tt.want {
				t.Errorf("%d segments reported", len(k.segments))
			}
		})
	}
}

func TestSampleIsAShare(t *testing.T) {
	tracer := newTracer(t, skywalking.Options{Sample: 0.5})
	sampled := 0
	for range 2000 {
		if tracer.StartEntry(tracectx.SpanOptions{}).Context().Sampled {
			sampled++
		}
	}
	if sampled < 800 || sampled > 1200 { // nine standard deviations
		t.Errorf("%d of 2000 sampled", sampled)
	}
}

func TestIDsAreUnique(t *testing.T) {
	const goroutines, each = 8, 2000
	still := time.UnixMilli(1_700_000_000_000)
	tracers := []*skywalking.Tracer{
		newTracer(t, skywalking.Options{Now: func() time.Time { return still }}),
		newTracer(t, skywalking.Options{Now: func() time.Time { return still }}),
	}
	var mu sync.Mutex
	seen := make(map[string]bool)
	var wg sync.WaitGroup
	for i := range goroutines {
		wg.Go(func() {
			for range each {
				c := tracers[i%2].StartEntry(tracectx.SpanOptions{}).Context()
				mu.Lock()
				seen[c.TraceID] = true
				seen[c.SegmentID] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) != 2*goroutines*each {
		t.Errorf("%d ids, want %d", len(seen), 2*goroutines*each)
	}
	for id := range seen {
		parts := strings.Split(id, ".")
		if len(parts) != 3 || len(parts[0]) != 32 || strings.Trim(parts[0], "0123456789abcdef") != "" {
			t.Fatalf("id %q is not uuid.n.n", id)
		}
		break
	}
}

func TestHeadersStayInBounds(t *testing.T) {
	wide := strings.Repeat("\U0001F69A", 1000) // four bytes each
	for _, text := range []string{wide, strings.Repeat("x", 5000), strings.Repeat("a\xff", 500)} {
		tracer := newTracer(t, skywalking.Options{Service: text, Instance: text, Sample: 1})
		parent := vehicle
		parent.TraceID = strings.Repeat("t", 256)
		entry := tracer.StartEntry(tracectx.SpanOptions{Operation: text, Parent: parent})
		exit := entry.StartExit(tracectx.SpanOptions{Operation: text, Peer: text})
		c, err := tracectx.Decode(exit.Context().Carrier())
		if err != nil {
			t.Fatalf("%.10q: %v", text, err)
		}
		if diff := cmp.Diff(exit.Context(), c); diff != "" {
			t.Errorf("(-context +decoded):\n%s", diff)
		}
		if n := utf8.RuneCountInString(c.Service); n != 70 {
			t.Errorf("service cut to %d characters", n)
		}
		if n := utf8.RuneCountInString(c.Endpoint); n > 150 || n < 75 {
			t.Errorf("operation cut to %d characters", n)
		}
	}
}

func TestClockSetBack(t *testing.T) {
	var k kept
	clock := time.UnixMilli(1_700_000_000_000)
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: &k, Now: func() time.Time { return clock }})
	first := tracer.StartEntry(tracectx.SpanOptions{})
	clock = clock.Add(-time.Hour)
	second := tracer.StartEntry(tracectx.SpanOptions{})
	first.End()
	if first.Context().SegmentID == second.Context().SegmentID {
		t.Error("an id was used twice")
	}
	if sp := k.segments[0][0]; sp.EndTime() != sp.StartTime() {
		t.Errorf("span from %d to %d", sp.StartTime(), sp.EndTime())
	}
}

// publishAndAttempt builds what one publish with one delivery costs.
func publishAndAttempt(tracer *skywalking.Tracer, parent tracectx.Context) {
	entry := tracer.StartEntry(tracectx.SpanOptions{Operation: "mqtt/publish/fleet/+/telemetry", Parent: parent})
	entry.Tag("mq.topic", "fleet/v7/telemetry")
	entry.Tag("mq.broker", "127.0.0.1:1883")
	entry.End()
	attempt := tracer.StartLocal(tracectx.SpanOptions{Operation: "deliver/notification-center", Parent: entry.Context()})
	exit := attempt.StartExit(tracectx.SpanOptions{Operation: "/notify", Peer: "127.0.0.1:8080", Layer: tracectx.LayerHTTP, Component: 5005})
	exit.Tag("url", "http://127.0.0.1:8080/notify")
	exit.End()
	attempt.End()
}

func BenchmarkPublishAndAttempt(b *testing.B) {
	unsampled := vehicle
	unsampled.Sampled = false
	for name, bb := range map[string]struct {
		parent tracectx.Context
		to     reporter.Reporter
	}{
		"sampled": {vehicle, skywalking.Discard()}, "unsampled": {unsampled, skywalking.Discard()}, "no reporter": {vehicle, nil},
	} {
		b.Run(name, func(b *testing.B) {
			parent := bb.parent
			tracer := newTracer(b, skywalking.Options{Sample: 1, Reporter: bb.to})
			b.ReportAllocs()
			for b.Loop() {
				publishAndAttempt(tracer, parent)
			}
		})
	}
}
