package tracectx_test

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// header is a case of testdata/sw8/headers.json: a carrier, and either the context in
// it or the reason to refuse it.
type header struct {
	Name              string
	SW8               string
	Correlation       string `json:"sw8-correlation"`
	Context           tracectx.Context
	Reason            tracectx.Reason
	CorrelationReason tracectx.Reason `json:"correlation_reason"`
}

func headers(t testing.TB) []header {
	t.Helper()
	data, err := os.ReadFile("../testdata/sw8/headers.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []header
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func (h header) carrier() tracectx.Carrier {
	return tracectx.Carrier{SW8: h.SW8, Correlation: h.Correlation}
}

func TestDecode(t *testing.T) {
	for _, h := range headers(t) {
		t.Run(h.Name, func(t *testing.T) {
			got, err := tracectx.Decode(h.carrier())
			if diff := cmp.Diff(h.Context, got); diff != "" {
				t.Errorf("context (-want +got):\n%s", diff)
			}
			var bad *tracectx.CarrierError
			if err != nil && !errors.As(err, &bad) {
				t.Fatalf("error %v is no *CarrierError", err)
			}
			switch {
			case h.Reason != "":
				if bad == nil || bad.Header != tracectx.HeaderSW8 || bad.Reason != h.Reason {
					t.Errorf("error %v, want sw8: %s", err, h.Reason)
				}
			case h.CorrelationReason != "":
				if bad == nil || bad.Header != tracectx.HeaderCorrelation || bad.Reason != h.CorrelationReason {
					t.Errorf("error %v, want sw8-correlation: %s", err, h.CorrelationReason)
				}
			case err != nil:
				t.Errorf("error %v", err)
			}
			if bad != nil && !slices.Contains(tracectx.Reasons(), bad.Reason) {
				t.Errorf("reason %q is not among Reasons", bad.Reason)
			}
		})
	}
}

func TestDecodeWithoutSW8IsNoContext(t *testing.T) {
	for _, c := range []tracectx.Carrier{{}, {Correlation: "YQ==:MQ=="}} {
		ctx, err := tracectx.Decode(c)
		if err != nil || !ctx.IsZero() || ctx.Correlation != nil {
			t.Errorf("Decode(%v) = %v, %v; want nothing", c, ctx, err)
		}
	}
}

func TestDecodedContextsEncodeToTheirHeader(t *testing.T) {
	for _, h := range headers(t) {
		if h.Reason != "" {
			continue
		}
		if got := h.Context.Carrier().SW8; got != h.SW8 {
			t.Errorf("%s: encoded to\n%s, want\n%s", h.Name, got, h.SW8)
		}
	}
}

func TestZeroContextHasNoCarrier(t *testing.T) {
	c := tracectx.Context{Correlation: tracectx.Correlation{{Key: "a", Value: "1"}}}
	if got := c.Carrier(); got != (tracectx.Carrier{}) {
		t.Errorf("Carrier of no context = %v", got)
	}
}

func FuzzDecode(f *testing.F) {
	for _, h := range headers(f) {
		f.Add(h.SW8, h.Correlation)
	}
	f.Fuzz(func(t *testing.T, sw8, correlation string) {
		ctx, err := tracectx.Decode(tracectx.Carrier{SW8: sw8, Correlation: correlation})
		var bad *tracectx.CarrierError
		if errors.As(err, &bad) && bad.Header == tracectx.HeaderSW8 {
			if !ctx.IsZero() {
				t.Fatalf("context %v with %v", ctx, err)
			}
			return
		}
		c := ctx.Carrier()
		if c.SW8 != sw8 {
			t.Fatalf("sw8 %q encodes to %q", sw8, c.SW8)
		}
		again, err := tracectx.Decode(c)
		if err != nil {
			t.Fatalf("%v after encoding", err)
		}
		if diff := cmp.Diff(ctx, again); diff != "" {
			t.Fatalf("changed by encoding (-before +after):\n%s", diff)
		}
		if again.Carrier() != c {
			t.Fatalf("encoding is not stable: %v, then %v", c, again.Carrier())
		}
	})
}

func FuzzEncode(f *testing.F) {
	f.Add(true, "trace", "segment", int32(3), "service", "instance", "endpoint", "peer:1", "key", "value")
	f.Add(false, "-", ",:-", int32(0), "", "", "", "", "k", "")
	f.Fuzz(func(t *testing.T, sampled bool, trace, segment string, span int32, service, instance, endpoint, peer, key, value string) {
		texts := []string{trace, segment, service, instance, endpoint, peer, key, value}
		if trace == "" || segment == "" || key == "" || span < 0 || len(value) > 128 ||
			slices.ContainsFunc(texts, func(s string) bool { return !utf8.ValidString(s) || len(s) > 200 }) {
			t.Skip("no valid context")
		}
		want := tracectx.Context{
			Sampled: sampled, TraceID: trace, SegmentID: segment, SpanID: span,
			Service: service, Instance: instance, Endpoint: endpoint, Peer: peer,
			Correlation: tracectx.Correlation{{Key: key, Value: value}},
		}
		got, err := tracectx.Decode(want.Carrier())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("(-encoded +decoded):\n%s", diff)
		}
	})
}

// typical is a context with texts of common length.
var typical = tracectx.Context{
	Sampled:     true,
	TraceID:     "3f2a9d0c4be14c6a9a3f6f1f0f7d2b11.57.17639471234560003",
	SegmentID:   "3f2a9d0c4be14c6a9a3f6f1f0f7d2b11.57.17639471234560002",
	SpanID:      1,
	Service:     "vehicle-7",
	Instance:    "v7@cab",
	Endpoint:    "telemetry/loop",
	Peer:        "broker.example.com:8883",
	Correlation: tracectx.Correlation{{Key: "vin", Value: "WVWZZZ1JZXW000001"}},
}

func BenchmarkDecode(b *testing.B) {
	c := typical.Carrier()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tracectx.Decode(c); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeMalformed(b *testing.B) {
	c := tracectx.Carrier{SW8: strings.Repeat("1-", 1000)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tracectx.Decode(c); err == nil {
			b.Fatal("decoded")
		}
	}
}

func BenchmarkAppendSW8(b *testing.B) {
	buf := make([]byte, 0, 512)
	b.ReportAllocs()
	for b.Loop() {
		buf = typical.AppendSW8(buf[:0])
	}
}

func BenchmarkCarrier(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if typical.Carrier().SW8 == "" {
			b.Fatal("nothing encoded")
		}
	}
}
