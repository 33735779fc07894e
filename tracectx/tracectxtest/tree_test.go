package tracectxtest_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func at(ms float64) time.Time { return noon.Add(time.Duration(ms * float64(time.Millisecond))) }

// chain is an unbroken trace: vehicle -> broker, attempt -> center.
func chain() []*tracectxtest.Segment {
	return []*tracectxtest.Segment{
		{
			TraceID: "t1", ID: "v", Service: "vehicle-7", Instance: "v7@cab",
			Spans: []*tracectxtest.Span{{
				ID: 0, Parent: -1, Kind: tracectxtest.Exit, Operation: "mqtt/publish fleet/v7/telemetry", Peer: "127.0.0.1:1883",
				Start: at(0), End: at(1.2),
			}},
		}, {
			TraceID: "t1", ID: "b", Service: "mqtt-broker", Instance: "b@1",
			Spans: []*tracectxtest.Span{{
				ID: 0, Parent: -1, Kind: tracectxtest.Entry, Operation: "mqtt/publish/fleet/+/telemetry", Start: at(0.3), End: at(1.1),
				Refs: []tracectxtest.Ref{{
					Kind: tracectxtest.CrossProcess, TraceID: "t1", SegmentID: "v", SpanID: 0,
					Service: "vehicle-7", Instance: "v7@cab", Endpoint: "mqtt/publish fleet/v7/telemetry", Peer: "127.0.0.1:1883",
				}},
			}, {
				ID: 1, Parent: 0, Kind: tracectxtest.Local, Operation: "rule/hard-brake", Start: at(0.5), End: at(0.6),
			}},
		}, {
			TraceID: "t1", ID: "a", Service: "mqtt-broker", Instance: "b@1",
			Spans: []*tracectxtest.Span{{
				ID: 0, Parent: -1, Kind: tracectxtest.Local, Operation: "deliver/center", Start: at(1.3), End: at(4),
				Refs: []tracectxtest.Ref{{
					Kind: tracectxtest.CrossThread, TraceID: "t1", SegmentID: "b", SpanID: 0,
					Service: "mqtt-broker", Instance: "b@1", Endpoint: "mqtt/publish/fleet/+/telemetry",
				}},
			}, {
				ID: 1, Parent: 0, Kind: tracectxtest.Exit, Operation: "/notify", Peer: "127.0.0.1:8080", Start: at(1.4), End: at(3.9), Failed: true,
			}},
		}, {
			TraceID: "t1", ID: "c", Service: "notification-center", Instance: "c@1",
			Spans: []*tracectxtest.Span{{
				ID: 0, Parent: -1, Kind: tracectxtest.Entry, Operation: "POST:/notify", Start: at(2), End: at(3),
				Refs: []tracectxtest.Ref{{
					Kind: tracectxtest.CrossProcess, TraceID: "t1", SegmentID: "a", SpanID: 1,
					Service: "mqtt-broker", Instance: "b@1", Endpoint: "deliver/center", Peer: "127.0.0.1:8080",
				}},
			}},
		},
	}
}

const chainPrinted = `trace t1  unbroken
  vehicle-7                    Exit   mqtt/publish fleet/v7/telemetry -> 127.0.0.1:1883  1.2 ms
    mqtt-broker                Entry  mqtt/publish/fleet/+/telemetry                     0.8 ms
      mqtt-broker              Local  rule/hard-brake                                    0.1 ms
      mqtt-broker              Local  deliver/center                                     2.7 ms
        mqtt-broker            Exit   /notify -> 127.0.0.1:8080                          2.5 ms  error
          notification-center  Entry  POST:/notify                                       1.0 ms
`

func write(t *testing.T, segments []*tracectxtest.Segment) string {
	t.Helper()
	var b strings.Builder
	for _, tree := range tracectxtest.Trees(segments) {
		if err := tree.Write(&b); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestTreeIsPrintedTheSameInAnyOrder(t *testing.T) {
	segments := chain()
	for i := range len(segments) {
		turned := slices.Concat(segments[i:], segments[:i], segments[:1]) // one of them twice
		if diff := cmp.Diff(chainPrinted, write(t, turned)); diff != "" {
			t.Fatalf("turned by %d (-want +got):\n%s", i, diff)
		}
		if broken := tracectxtest.Broken(turned); len(broken) > 0 {
			t.Fatalf("broken: %q", broken)
		}
	}
}

func TestBroken(t *testing.T) {
	const vehicle, broker, attempt, center = 0, 1, 2, 3
	root := func(s []*tracectxtest.Segment, i int) *tracectxtest.Span { return s[i].Spans[0] }
	for _, tt := range []struct {
		name   string
		damage func([]*tracectxtest.Segment) []*tracectxtest.Segment
		want   []string // each fault holds its text
	}{
		{
			name: "a segment is missing",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				return slices.Delete(s, broker, broker+1)
			},
			want: []string{
				"mqtt-broker Local deliver/center (span 0 of segment a) refers to span 0 of segment b, which is not there",
				"2 spans have no parent",
			},
		}, {
			name: "only a span is missing",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				root(s, center).Refs[0].SpanID = 7
				return s
			},
			want: []string{"refers to span 7 of segment a, which is not there", "2 spans have no parent"},
		}, {
			name: "the first segment is missing",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				return s[1:]
			},
			want: []string{"refers to span 0 of segment v, which is not there"},
		}, {
			name: "a segment without references: the right trace, but on its own",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				root(s, attempt).Refs = nil
				return s
			},
			want: []string{"2 spans have no parent: vehicle-7 Exit mqtt/publish fleet/v7/telemetry (span 0 of segment v), mqtt-broker Local deliver/center"},
		}, {
			name: "the exit's peer is not the network address",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				s[attempt].Spans[1].Peer = "center:8080"
				return s
			},
			want: []string{`the network address is "center:8080" there and "127.0.0.1:8080" in the reference`},
		}, {
			name: "another process continues what is no exit",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				root(s, center).Refs[0].SpanID = 0
				return s
			},
			want: []string{"no ExitSpan is there"},
		}, {
			name: "the wrong service and instance",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				root(s, attempt).Refs[0].Service = "other"
				root(s, attempt).Refs[0].Instance = "other"
				return s
			},
			want: []string{"the service is", "the instance is"},
		}, {
			name: "another trace",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				s[center].TraceID = "t2"
				return s
			},
			want: []string{`trace t2: notification-center Entry POST:/notify (span 0 of segment c) refers to`},
		}, {
			name: "a parent that is not in the segment",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				s[attempt].Spans[1].Parent = 5
				return s
			},
			want: []string{"its parent, span 5, is not in the segment", "2 spans have no parent"},
		}, {
			name: "a circle",
			damage: func(s []*tracectxtest.Segment) []*tracectxtest.Segment {
				ref := &root(s, broker).Refs[0]
				*ref = tracectxtest.Ref{Kind: tracectxtest.CrossThread, TraceID: "t1", SegmentID: "a", SpanID: 0, Service: "mqtt-broker", Instance: "b@1"}
				return s
			},
			want: []string{
				"segment b) is among its own ancestors", "segment b) is among its own ancestors", "segment a) is among its own ancestors",
				"segment a) is among its own ancestors", "segment c) is among its own ancestors",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			segments := tt.damage(chain())
			got := tracectxtest.Broken(segments)
			if len(got) != len(tt.want) {
				t.Fatalf("%d faults, want %d: %s", len(got), len(tt.want), strings.Join(got, "\n"))
			}
			for i, want := range tt.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("fault %q, want %q", got[i], want)
				}
			}
			if printed := write(t, segments); !strings.Contains(printed, "BROKEN\n") || strings.Count(printed, "  broken: ") != len(got) {
				t.Errorf("printed:\n%s", printed)
			}
		})
	}
}

func TestTreesBeginInOrder(t *testing.T) {
	early, late := chain(), chain()
	for _, s := range late {
		s.TraceID = "t0"
		s.ID += "2"
		for _, sp := range s.Spans {
			sp.Start = sp.Start.Add(time.Second)
			for i := range sp.Refs {
				sp.Refs[i].TraceID = "t0"
				sp.Refs[i].SegmentID += "2"
			}
		}
	}
	trees := tracectxtest.Trees(append(late, early...))
	if len(trees) != 2 || trees[0].TraceID != "t1" || trees[1].TraceID != "t0" {
		t.Fatalf("%d trees, %v", len(trees), trees)
	}
	if broken := tracectxtest.Broken(append(late, early...)); len(broken) > 0 {
		t.Errorf("broken: %q", broken)
	}
}

func TestPrintedTreeHasNoControlCharacters(t *testing.T) {
	segments := chain()
	segments[0].Spans[0].Operation = "a\tb\x1b[2J\r\nc"
	printed := write(t, segments)
	if strings.ContainsAny(printed, "\t\x1b\r") || strings.Count(printed, "\n") != strings.Count(chainPrinted, "\n") {
		t.Errorf("printed: %q", printed)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("full") }

func TestWriteReportsItsError(t *testing.T) {
	if err := tracectxtest.Trees(chain())[0].Write(full{}); err == nil {
		t.Error("no error")
	}
}
