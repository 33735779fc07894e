package bridge

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/tracectx"
)

func TestPlace(t *testing.T) {
	flat := tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"}
	nested := tracectx.Fields{SW8: "trace.sw8", Correlation: "trace.baggage"}
	both := tracectx.Carrier{SW8: "1-SW8", Correlation: "a2V5:dg=="}
	alone := tracectx.Carrier{SW8: "1-SW8"}
	tests := []struct {
		name    string
		fields  tracectx.Fields
		carrier tracectx.Carrier
		body    string
		want    string // "": as it was
		place   placement
	}{
		{"appended", flat, both, `{"vin":"V7"}`, `{"vin":"V7","sw8":"1-SW8","sw8-correlation":"a2V5:dg=="}`, added},
		{"empty object", flat, both, `{}`, `{"sw8":"1-SW8","sw8-correlation":"a2V5:dg=="}`, added},
		{"empty object with space", flat, alone, "{ \n}", "{\"sw8\":\"1-SW8\" \n}", added},
		{"correlation left out", flat, alone, `{"a":1}`, `{"a":1,"sw8":"1-SW8"}`, added},
		{"correlation nowhere", tracectx.Fields{SW8: "sw8"}, both, `{"a":1}`, `{"a":1,"sw8":"1-SW8"}`, added},
		{"rest byte for byte", flat, alone, " { \"n\" : 1.000e2 , \"s\" : \"\\u0041\\\"}\" ,\"b\":[1, {\"sw8\":2}] } \n",
			" { \"n\" : 1.000e2 , \"s\" : \"\\u0041\\\"}\" ,\"b\":[1, {\"sw8\":2}],\"sw8\":\"1-SW8\" } \n", added},
		{"replaced in place", flat, both, `{"sw8": {"x":[1,2]} ,"a":1}`, `{"sw8": "1-SW8" ,"a":1,"sw8-correlation":"a2V5:dg=="}`, replaced},
		{"replaced null", flat, alone, `{"a":1,"sw8":null}`, `{"a":1,"sw8":"1-SW8"}`, replaced},
		{"replaced wherever it is", flat, alone, `{"sw8":"x","a":1,"sw8":-1.5e3}`, `{"sw8":"1-SW8","a":1,"sw8":"1-SW8"}`, replaced},
		{"escaped name", flat, alone, `{"\u0073w8":"x"}`, `{"\u0073w8":"1-SW8"}`, replaced},
		{"name in a value", flat, alone, `{"a":"sw8","b":"\\"}`, `{"a":"sw8","b":"\\","sw8":"1-SW8"}`, added},
		{"nested, new", nested, both, `{"a":1}`, `{"a":1,"trace":{"sw8":"1-SW8","baggage":"a2V5:dg=="}}`, added},
		{"nested, parent there", nested, both, `{"trace":{"id":7},"a":1}`, `{"trace":{"id":7,"sw8":"1-SW8","baggage":"a2V5:dg=="},"a":1}`, added},
		{"nested, replaced", nested, alone, `{"trace":{"sw8":1,"x":2}}`, `{"trace":{"sw8":"1-SW8","x":2}}`, replaced},
		{"parent is no object", nested, both, `{"trace":"off"}`, ``, blocked},
		{"field nowhere", tracectx.Fields{}, both, `{"a":1}`, ``, blocked},
		{"array", flat, both, `[{"a":1}]`, ``, blocked},
		{"text", flat, both, `hello`, ``, blocked},
		{"empty", flat, both, ``, ``, blocked},
		{"broken object", flat, both, `{"a":1`, ``, blocked},
		{"two objects", flat, both, `{"a":1}{"b":2}`, ``, blocked},
		{"quoted name in the path", tracectx.Fields{SW8: `a"b`}, alone, `{}`, `{"a\"b":"1-SW8"}`, added},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := newRoute(Destination{URL: "http://127.0.0.1/", TraceBody: tt.fields})
			if err != nil {
				t.Fatal(err)
			}
			body := []byte(tt.body)
			got, place := r.place(body, tt.carrier)
			want := tt.want
			if want == "" {
				want = tt.body
			}
			if string(got) != want || place != tt.place {
				t.Errorf("place = %d\n got %s\nwant %s (%d)", place, got, want, tt.place)
			}
			if string(body) != tt.body {
				t.Errorf("the stored body was changed: %s", body)
			}
		})
	}
}

// The result is valid JSON in which the field has the value, and nothing else
// has changed.
func FuzzSetField(f *testing.F) {
	for _, body := range []string{`{}`, `{"a":1}`, ` {"sw8" : [1,{}] , "b":"\\\"" } `, `{"t":{"sw8":{}}}`, `{"\u0073w8":1,"sw8":"\\"}`, `{"":{"":0}}`} {
		f.Add([]byte(body), "sw8")
		f.Add([]byte(body), "t.sw8")
	}
	f.Fuzz(func(t *testing.T, body []byte, dotted string) {
		path := strings.Split(dotted, ".")
		if !isObject(body) || !json.Valid(body) || strings.ContainsRune(dotted, '\uFFFD') || len(path) > 20 {
			return
		}
		out, place := setField(bytes.Clone(body), path, "VALUE")
		if !json.Valid(out) {
			t.Fatalf("%s\nbecame invalid: %s", body, out)
		}
		if place == blocked {
			return
		}
		var before, after map[string]any
		if json.Unmarshal(body, &before) != nil || json.Unmarshal(out, &after) != nil {
			return // deeper than the decoder goes
		}
		if got := take(after, path); got != "VALUE" {
			t.Fatalf("%s\nbecame %s\nwith %v at %q", body, out, got, path)
		}
		take(before, path)
		if !reflect.DeepEqual(before, after) {
			t.Fatalf("%s\nbecame %s\nwhich differs elsewhere", body, out)
		}
	})
}

// take removes the value at path, and the objects on the way that are empty then.
func take(object map[string]any, path []string) any {
	v := object[path[0]]
	if len(path) > 1 {
		inner, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = take(inner, path[1:])
		if len(inner) > 0 {
			return v
		}
	}
	delete(object, path[0])
	return v
}

func BenchmarkPlace(b *testing.B) {
	carrier := tracectx.Carrier{SW8: strings.Repeat("x", 300)}
	for _, size := range []int{256, 4096} {
		b.Run(map[int]string{256: "256B", 4096: "4KiB"}[size], func(b *testing.B) {
			r, err := newRoute(Destination{URL: "http://127.0.0.1/", TraceBody: tracectx.Fields{SW8: "sw8"}})
			if err != nil {
				b.Fatal(err)
			}
			var text strings.Builder
			for text.WriteString(`{"vin":"V7"`); text.Len() < size-20; {
				text.WriteString(`,"speed":[1.25,7,"km/h"]`)
			}
			text.WriteString("}")
			body := []byte(text.String())
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, place := r.place(body, carrier); place != added {
					b.Fatal("not added")
				}
			}
		})
	}
}
