package tracectx_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/tracectx"
)

var topLevel = tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"}

func extractor(t testing.TB, f tracectx.Fields) *tracectx.Extractor {
	t.Helper()
	x, err := tracectx.NewExtractor(f)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func TestExtract(t *testing.T) {
	other := typical
	other.TraceID = "another"
	plain := typical
	plain.Correlation = nil
	sw8, correlation := typical.Carrier().SW8, typical.Carrier().Correlation
	nested := tracectx.Fields{SW8: "meta.trace.sw8", Correlation: "meta.trace.bag"}

	for _, tt := range []struct {
		name    string
		fields  tracectx.Fields
		props   tracectx.Carrier
		payload string
		want    tracectx.Context
		outcome tracectx.Outcome
	}{
		{
			name:   "user properties",
			fields: topLevel, props: typical.Carrier(), payload: `{"speed": 3}`,
			want: typical, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "user properties come before the payload",
			fields: topLevel, props: other.Carrier(), payload: `{"sw8": "` + sw8 + `"}`,
			want: other, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "a malformed user property hides the payload",
			fields: topLevel, props: tracectx.Carrier{SW8: "1-x"}, payload: `{"sw8": "` + sw8 + `"}`,
			outcome: tracectx.Outcome{Status: tracectx.Malformed, Reason: tracectx.ReasonFields},
		}, {
			name:   "a correlation alone is no context",
			fields: topLevel, props: tracectx.Carrier{Correlation: correlation}, payload: `{}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "a malformed correlation does not cost the trace",
			fields: topLevel, props: tracectx.Carrier{SW8: sw8, Correlation: "vin"},
			want: plain, outcome: tracectx.Outcome{Status: tracectx.Found, Correlation: tracectx.ReasonEntry},
		}, {
			name:   "payload",
			fields: topLevel, payload: `{"speed": 3, "sw8": "` + sw8 + `", "sw8-correlation": "` + correlation + `"}`,
			want: typical, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "nested payload fields",
			fields: nested, payload: `{"meta": {"trace": {"bag": "` + correlation + `", "sw8": "` + sw8 + `"}}}`,
			want: typical, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "the last of several members of a name counts",
			fields: tracectx.Fields{SW8: "a.b"}, payload: `{"a": {"b": "` + other.Carrier().SW8 + `"}, "a": {"b": "x", "b": "` + sw8 + `"}}`,
			want: plain, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "names are no patterns",
			fields: tracectx.Fields{SW8: "s*8"}, payload: `{"sw8": "` + sw8 + `"}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "names with characters that gjson's paths interpret",
			fields: tracectx.Fields{SW8: "@this.#.!a|b?"}, payload: `{"@this": {"#": {"!a|b?": "` + sw8 + `"}}}`,
			want: plain, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "a number is a name, not a place in an array",
			fields: tracectx.Fields{SW8: "a.0"}, payload: `{"a": ["` + sw8 + `"], "b": {"0": 1}}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "a slash that the sender escaped",
			fields: tracectx.Fields{SW8: "trace/sw8"}, payload: `{"trace\/sw8": "` + sw8 + `"}`,
			want: plain, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "a value with escapes",
			fields: topLevel, payload: `{"sw8": "` + strings.ReplaceAll(sw8, "-", `\u002d`) + `"}`,
			want: plain, outcome: tracectx.Outcome{Status: tracectx.Found},
		}, {
			name:   "the name in a text is not the field",
			fields: topLevel, payload: `{"note": "\"sw8\"", "x": ["sw8"]}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "null is absent",
			fields: topLevel, payload: `{"sw8": null}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "empty is absent",
			fields: topLevel, payload: `{"sw8": ""}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "a number is no carrier",
			fields: topLevel, payload: `{"sw8": 1}`,
			outcome: tracectx.Outcome{Status: tracectx.Malformed, Reason: tracectx.ReasonNotString},
		}, {
			name:   "an object is no carrier",
			fields: topLevel, payload: `{"sw8": {"sw8": "` + sw8 + `"}}`,
			outcome: tracectx.Outcome{Status: tracectx.Malformed, Reason: tracectx.ReasonNotString},
		}, {
			name:   "a correlation that is no string",
			fields: topLevel, payload: `{"sw8": "` + sw8 + `", "sw8-correlation": {"vin": 1}}`,
			want: plain, outcome: tracectx.Outcome{Status: tracectx.Found, Correlation: tracectx.ReasonNotString},
		}, {
			name:   "a path through a string",
			fields: tracectx.Fields{SW8: "a.sw8"}, payload: `{"a": "\"sw8\"", "b": {"sw8": 1}}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "no JSON",
			fields: topLevel, payload: `the "sw8" field`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:   "an array",
			fields: topLevel, payload: `[{"sw8": "` + sw8 + `"}]`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:    "no payload",
			fields:  topLevel,
			outcome: tracectx.Outcome{Status: tracectx.None},
		}, {
			name:    "no fields agreed",
			payload: `{"sw8": "` + sw8 + `"}`,
			outcome: tracectx.Outcome{Status: tracectx.None},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			payload := []byte(tt.payload)
			got, outcome := extractor(t, tt.fields).Extract(tt.props, payload)
			clear(payload) // nothing may be shared with it
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("context (-want +got):\n%s", diff)
			}
			if outcome != tt.outcome {
				t.Errorf("outcome %+v, want %+v", outcome, tt.outcome)
			}
		})
	}
}

func TestNewExtractorRefuses(t *testing.T) {
	for _, f := range []tracectx.Fields{
		{SW8: "."}, {SW8: "a."}, {SW8: ".a"}, {SW8: "a..b"}, {Correlation: "a."}, {SW8: "a", Correlation: "a"},
	} {
		if _, err := tracectx.NewExtractor(f); err == nil {
			t.Errorf("NewExtractor(%+v) took it", f)
		}
	}
}

// FuzzFromJSON compares with encoding/json, which also lets the last member of a name win.
func FuzzFromJSON(f *testing.F) {
	sw8 := typical.Carrier().SW8
	for _, seed := range []string{
		`{"sw8": "` + sw8 + `"}`,
		`{"a": {"sw8": "` + sw8 + `"}, "a": {"sw8": 1, "sw8": "x"}}`,
		`{"a":{"sw8":"1"`, `{"a" "sw8":`, `"sw8"`, `{"sw8":{"sw8":[}`, `{"a":{"sw8":"\u00`, ``,
	} {
		f.Add([]byte(seed))
	}
	flat := extractor(f, topLevel)
	nested := extractor(f, tracectx.Fields{SW8: "a.sw8"})
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		got, outcome := flat.FromJSON(body)
		deep, _ := nested.FromJSON(body)
		if !bytes.Equal(body, before) {
			t.Fatal("the body was changed")
		}
		if (outcome.Status == tracectx.Found) == got.IsZero() {
			t.Fatalf("%+v with context %v", outcome, got)
		}
		var members map[string]json.RawMessage
		if !json.Valid(body) || json.Unmarshal(body, &members) != nil || bytes.Contains(body, []byte(`\u`)) {
			return
		}
		check := func(got tracectx.Context, field json.RawMessage) {
			var text string
			if json.Unmarshal(field, &text) != nil {
				text = ""
			}
			want, err := tracectx.Decode(tracectx.Carrier{SW8: text})
			var bad *tracectx.CarrierError
			if errors.As(err, &bad) {
				want = tracectx.Context{}
			}
			got.Correlation = nil
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("(-encoding/json +extract):\n%s", diff)
			}
		}
		check(got, members["sw8"])
		var inner map[string]json.RawMessage
		if json.Unmarshal(members["a"], &inner) == nil {
			check(deep, inner["sw8"])
		}
	})
}

// payloadOf returns telemetry of about that size, with the last members as given.
func payloadOf(size int, last string) []byte {
	var b bytes.Buffer
	b.WriteByte('{')
	for i := 0; b.Len() < size-len(last)-1; i++ {
		fmt.Fprintf(&b, `"signal%d":{"value":%d.5,"unit":"m/s2"},`, i, i)
	}
	b.WriteString(last)
	b.WriteByte('}')
	return b.Bytes()
}

func BenchmarkExtract(b *testing.B) {
	c := typical.Carrier()
	sw8 := tracectx.Carrier{SW8: c.SW8}
	field := `"sw8":"` + c.SW8 + `"`
	both := field + `,"sw8-correlation":"` + c.Correlation + `"`
	for _, bb := range []struct {
		name    string
		props   tracectx.Carrier
		payload []byte
		want    tracectx.Status
	}{
		{"none/256B", tracectx.Carrier{}, payloadOf(256, `"v":1`), tracectx.None},
		{"none/4KiB", tracectx.Carrier{}, payloadOf(4096, `"v":1`), tracectx.None},
		{"property", sw8, payloadOf(256, `"v":1`), tracectx.Found},
		{"property+correlation", c, payloadOf(256, `"v":1`), tracectx.Found},
		{"payload/256B", tracectx.Carrier{}, payloadOf(256, field), tracectx.Found},
		{"payload/4KiB", tracectx.Carrier{}, payloadOf(4096, field), tracectx.Found},
		{"payload+correlation/4KiB", tracectx.Carrier{}, payloadOf(4096, both), tracectx.Found},
	} {
		b.Run(bb.name, func(b *testing.B) {
			x := extractor(b, topLevel)
			b.ReportAllocs()
			for b.Loop() {
				if _, out := x.Extract(bb.props, bb.payload); out.Status != bb.want {
					b.Fatal(out)
				}
			}
		})
	}
}
