package bridge_test

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// Each attempt is a segment of its own that refers to the stored context, and
// what goes out is its exit span's context.
func TestTracePerAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.center.answers(func(_ context.Context, s sent) bridge.Response {
			if s.attempt() == "1" {
				return bridge.Response{Status: 503}
			}
			return bridge.Response{Status: 200}
		})
		parent, carrier := stored()
		published := time.Now().Add(-1500 * time.Millisecond)
		const body = `{"event":"hard-brake","decel":7.10}`
		_, err := r.Append([]bridge.Record{{
			ID: "1", Rule: "hard-brake", Generation: "0123456789ab", Destination: nc, Topic: "fleet/v7/telemetry", Published: published,
			SW8: carrier.SW8, Correlation: carrier.Correlation, TraceID: parent.TraceID, Body: []byte(body),
		}})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)

		segments, requests := r.tracer.Segments(), r.center.all()
		if len(segments) != 2 || len(requests) != 2 {
			t.Fatalf("%d segments for %d attempts, want 2 and 2", len(segments), len(requests))
		}
		for i, seg := range segments {
			local, exit := seg.Spans[0], seg.Spans[1]
			wantRef := tracectxtest.Ref{
				Kind: tracectxtest.CrossThread, TraceID: parent.TraceID, SegmentID: parent.SegmentID, SpanID: parent.SpanID,
				Service: parent.Service, Instance: parent.Instance, Endpoint: parent.Endpoint, Peer: parent.Peer,
			}
			if len(local.Refs) != 1 || local.Refs[0] != wantRef {
				t.Errorf("attempt %d: refs %+v\nwant %+v", i+1, local.Refs, wantRef)
			}
			if local.Kind != tracectxtest.Local || local.Operation != "deliver/"+nc {
				t.Errorf("first span %s %q", local.Kind, local.Operation)
			}
			if exit.Kind != tracectxtest.Exit || exit.Operation != "POST:/notify" || exit.Peer != "127.0.0.1:8080" ||
				exit.Layer != tracectx.LayerHTTP || exit.Component != 5005 {
				t.Errorf("exit span %+v", exit)
			}
			status, attempt := []string{"503", "200"}[i], []string{"1", "2"}[i]
			for key, want := range map[string]string{
				"rule": "hard-brake", "rules.generation": "0123456789ab", "webhook.id": "1", "attempt": attempt, "mq.topic": "fleet/v7/telemetry",
				"queued.ms": []string{"1500", "1999"}[i], // the jitter is just under 500 ms
			} {
				if got := local.Tag(key); got != want {
					t.Errorf("attempt %d: tag %s is %q, want %q", i+1, key, got, want)
				}
			}
			for key, want := range map[string]string{
				"url": "http://127.0.0.1:8080/notify", "http.method": "POST", "http.status_code": status, "status_code": status,
			} {
				if got := exit.Tag(key); got != want {
					t.Errorf("attempt %d: tag %s is %q, want %q", i+1, key, got, want)
				}
			}
			if failed := i == 0; exit.Failed != failed {
				t.Errorf("attempt %d: failed is %v", i+1, exit.Failed)
			}

			var members struct {
				SW8         string `json:"sw8"`
				Correlation string `json:"sw8-correlation"`
			}
			if err := json.Unmarshal(requests[i].Body, &members); err != nil {
				t.Fatal(err)
			}
			got, err := tracectx.Decode(tracectx.Carrier{SW8: members.SW8, Correlation: members.Correlation})
			if err != nil {
				t.Fatal(err)
			}
			if got.TraceID != parent.TraceID || got.SegmentID != seg.ID || got.SpanID != exit.ID || got.Peer != exit.Peer ||
				got.Endpoint != local.Operation || !got.Sampled || len(got.Correlation) != 1 || got.Correlation[0].Value != "V7" {
				t.Errorf("attempt %d: the body carries %+v", i+1, got)
			}
			h := requests[i].Header
			if h.Get("sw8") != members.SW8 || h.Get("sw8-correlation") != members.Correlation {
				t.Errorf("attempt %d: headers %q", i+1, h)
			}
			rest := strings.Replace(string(requests[i].Body), `,"sw8":"`+members.SW8+`","sw8-correlation":"`+members.Correlation+`"`, "", 1)
			if rest != body {
				t.Errorf("attempt %d: without the trace fields the body is %s", i+1, rest)
			}
		}
		r.wantMetric("throughline_deliveries_total{carrier=body,destination=notification-center,rule=hard-brake}", 1)
	})
}

func TestTraceCarriers(t *testing.T) {
	_, carrier := stored()
	unsampled := tracectx.Context{TraceID: "t", SegmentID: "s"}.Carrier()
	tests := []struct {
		name    string
		change  func(*bridge.Destination, *bridge.Record)
		traceID string
		carrier string
		broken  float64
		sampled bool
	}{
		{"body and headers", func(*bridge.Destination, *bridge.Record) {}, "trace-1", "body", 0, true},
		{"headers alone", func(d *bridge.Destination, _ *bridge.Record) { d.TraceBody = bridge.TraceFields{} }, "trace-1", "headers", 0, true},
		{"no JSON object", func(_ *bridge.Destination, r *bridge.Record) { r.Body = []byte("V7 braked") }, "trace-1", "headers", 0, true},
		{"nowhere", func(d *bridge.Destination, _ *bridge.Record) {
			d.TraceBody, d.TraceHeaders = bridge.TraceFields{}, false
		}, "", "none", 0, true},
		{"stored context broken", func(_ *bridge.Destination, r *bridge.Record) { r.SW8 = "1-broken" }, "broker.trace.1", "body", 1, true},
		{"stored correlation broken", func(_ *bridge.Destination, r *bridge.Record) { r.Correlation = "?" }, "trace-1", "body", 1, true},
		{"none stored", func(_ *bridge.Destination, r *bridge.Record) { r.SW8, r.Correlation = "", "" }, "broker.trace.1", "body", 0, true},
		{"not sampled", func(_ *bridge.Destination, r *bridge.Record) { r.SW8 = unsampled.SW8 }, "t", "body", 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newIdleRig(t)
				d := to(nc)
				rec := bridge.Record{Rule: "a", Destination: nc, SW8: carrier.SW8, Correlation: carrier.Correlation, Body: []byte(`{}`)}
				tt.change(&d, &rec)
				r.define(d)
				if _, err := r.Append([]bridge.Record{rec}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()

				s := r.center.all()[0]
				got := tracectx.Carrier{SW8: s.Header.Get("sw8"), Correlation: s.Header.Get("sw8-correlation")}
				ctx, err := tracectx.Decode(got)
				if err != nil || ctx.TraceID != tt.traceID || ctx.Sampled != tt.sampled && tt.carrier != "none" {
					t.Errorf("headers carry %+v, %v; want trace %q", ctx, err, tt.traceID)
				}
				if inBody := strings.Contains(string(s.Body), got.SW8) && got.SW8 != ""; inBody != (tt.carrier == "body") {
					t.Errorf("body %s", s.Body)
				}
				r.wantMetric("throughline_deliveries_total{carrier="+tt.carrier+",destination=notification-center,rule=a}", 1)
				r.wantMetric("throughline_delivery_trace_undecodable_total{destination=notification-center}", tt.broken)
			})
		})
	}
}

func TestTraceFieldReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		if _, err := r.Append([]bridge.Record{{Destination: nc, Body: []byte(`{"sw8":"the vehicle's","a":1}`)}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s := r.center.all()[0]
		if want := `{"sw8":"` + s.Header.Get("sw8") + `","a":1}`; string(s.Body) != want {
			t.Errorf("body %s\nwant %s", s.Body, want)
		}
		r.wantMetric("throughline_delivery_trace_field_replaced_total{destination=notification-center}", 1)
	})
}

func TestHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newIdleRig(t)
		d := to(nc)
		d.URL = "https://user:secret@nc.example/a%20b?token=secret"
		d.Method = http.MethodPut
		d.Headers = map[string]string{
			"Authorization": "Bearer token", "content-type": "application/cloudevents+json",
			"Webhook-Id": "mine", "SW8": "mine", "sw8-correlation": "mine", "x-throughline-attempt": "mine", "webhook-timestamp": "mine",
		}
		r.define(d)
		if _, err := r.Append([]bridge.Record{{ID: "V7\r\n-1-ä", Destination: nc}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s := r.center.all()[0]
		for name, want := range map[string]string{
			"Authorization": "Bearer token", "Content-Type": "application/cloudevents+json", "User-Agent": "throughline",
			"Webhook-Id": "V7%0D%0A-1-%C3%A4", "Webhook-Timestamp": "946684800", "X-Throughline-Attempt": "1",
		} {
			if got := s.Header.Values(name); len(got) != 1 || got[0] != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		if got := s.Header.Get("sw8"); got == "mine" || got == "" {
			t.Errorf("sw8: %q", got)
		}
		if got := s.Header.Values("sw8-correlation"); len(got) != 0 {
			t.Errorf("sw8-correlation: %q, want none", got)
		}
		exit := r.tracer.Segments()[0].Spans[1]
		if exit.Peer != "nc.example:443" || exit.Operation != "PUT:/a%20b" || exit.Tag("url") != "https://nc.example/a%20b" {
			t.Errorf("exit span: peer %q, operation %q, url %q", exit.Peer, exit.Operation, exit.Tag("url"))
		}
		if s.URL != d.URL || s.Method != http.MethodPut {
			t.Errorf("called %s %s", s.Method, s.URL)
		}
	})
}
