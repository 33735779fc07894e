package tracectxtest_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

func TestRecorderRemembersATrace(t *testing.T) {
	vehicle, broker := tracectxtest.NewRecorder("vehicle"), tracectxtest.NewRecorder("broker")
	loop := vehicle.StartLocal(tracectx.SpanOptions{Operation: "loop"})
	publish := loop.StartExit(tracectx.SpanOptions{Operation: "publish", Peer: "b:1883"})
	loop.End() // ends publish too
	publish.Tag("late", "x")

	entry := broker.StartEntry(tracectx.SpanOptions{Operation: "in", Parent: publish.Context()})
	entry.Tag("mq.topic", "a")
	entry.Error("boom")
	if len(broker.Segments()) != 0 {
		t.Error("a segment that has not ended is remembered")
	}
	entry.End()
	entry.End()
	attempt := broker.StartLocal(tracectx.SpanOptions{Operation: "attempt", Parent: entry.Context()})
	attempt.End()
	if late := attempt.StartExit(tracectx.SpanOptions{}); late.Context().SpanID != 0 {
		t.Error("a span was added to a segment that has ended")
	}

	if len(vehicle.Segments()) != 1 || len(broker.Segments()) != 2 {
		t.Fatalf("%d and %d segments", len(vehicle.Segments()), len(broker.Segments()))
	}
	all := append(vehicle.Segments(), broker.Segments()...)
	if broken := tracectxtest.Broken(all); len(broken) > 0 {
		t.Errorf("broken: %q", broken)
	}
	if n := len(all[0].Spans); n != 2 || len(all[0].Spans[1].Tags) != 0 || !all[0].Spans[1].End.Equal(all[0].Spans[0].End) {
		t.Errorf("vehicle's spans: %+v", all[0].Spans)
	}
	in := all[1].Spans[0]
	if in.Tag("mq.topic") != "a" || !in.Failed || len(in.Logs) != 1 {
		t.Errorf("entry: %+v", in)
	}
	want := []tracectxtest.Ref{{
		Kind: tracectxtest.CrossThread, TraceID: "vehicle.trace.1", SegmentID: "broker.segment.1", SpanID: 0,
		Service: "broker", Instance: "broker@test", Endpoint: "in",
	}}
	if diff := cmp.Diff(want, all[2].Spans[0].Refs); diff != "" {
		t.Errorf("attempt's references (-want +got):\n%s", diff)
	}
}

func TestRecorderSampling(t *testing.T) {
	off := tracectxtest.NewUnsampledRecorder("off")
	span := off.StartEntry(tracectx.SpanOptions{Operation: "e"})
	c := span.StartExit(tracectx.SpanOptions{Operation: "x", Peer: "p:1"}).Context()
	span.End()
	if c.Sampled || c.IsZero() || c.Peer != "p:1" || len(off.Segments()) != 0 {
		t.Errorf("context %+v, %d segments", c, len(off.Segments()))
	}
	on := tracectxtest.NewRecorder("on")
	on.StartEntry(tracectx.SpanOptions{Parent: c}).End()
	if len(on.Segments()) != 0 {
		t.Error("upstream's 0 does not win")
	}
}

func TestRecorderIsSafeForConcurrentUse(t *testing.T) {
	r := tracectxtest.NewRecorder("r")
	root := r.StartEntry(tracectx.SpanOptions{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				child := root.StartLocal(tracectx.SpanOptions{Operation: fmt.Sprint(i)})
				child.Tag("a", "b")
				child.Context()
				child.End()
				r.StartLocal(tracectx.SpanOptions{}).End()
			}
		})
	}
	wg.Wait()
	root.End()
	segments := r.Segments()
	if len(segments) != 401 || len(segments[400].Spans) != 401 {
		t.Errorf("%d segments, %d spans in the last", len(segments), len(segments[len(segments)-1].Spans))
	}
}
