package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// TestBatchesOfTheRuleFile: what several vehicles publish arrives in arrays, each vehicle's in order and each element in a
// trace of its own.
func TestBatchesOfTheRuleFile(t *testing.T) {
	f := startFleet(t, strings.Replace(hardBrake, "http://WEBHOOK/notify", `http://WEBHOOK/notify
    batch: {max: 10, linger: 200ms}`, 1), nil)
	const vehicles, messages = 3, 10
	for vehicle := range vehicles {
		name := fmt.Sprint("v5", vehicle)
		c := dial3(t, f.mqttAddress(), name)
		for n := range messages {
			publish3(t, c, "fleet/"+name+"/telemetry", fmt.Sprintf(`{"vin":%q,"decel":%d}`, name, 10+n))
		}
	}
	waitFor(t, "an empty outbox", func() bool { return strings.Contains(f.get(t, "/api/v1/outbox"), `"records":[]`) })

	requests := f.webhook.requests()
	if len(requests) > vehicles*messages/2 {
		t.Errorf("%d requests for %d deliveries", len(requests), vehicles*messages)
	}
	decels := map[string][]float64{}
	traces := map[string]bool{}
	for _, r := range requests {
		var ids []string
		var elements []struct {
			VIN   string  `json:"vin"`
			Decel float64 `json:"decel"`
			SW8   string  `json:"sw8"`
		}
		if err := json.Unmarshal([]byte("["+r.header.Get("X-Throughline-Ids")+"]"), &ids); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(r.body, &elements); err != nil || len(elements) != len(ids) {
			t.Fatalf("%d ids, body %s: %v", len(ids), r.body, err)
		}
		for _, e := range elements {
			ctx, err := tracectx.Decode(tracectx.Carrier{SW8: e.SW8})
			if err != nil {
				t.Fatal(err)
			}
			traces[ctx.TraceID] = true
			decels[e.VIN] = append(decels[e.VIN], e.Decel)
		}
	}
	for vin, got := range decels {
		if len(got) != messages || !slices.IsSorted(got) {
			t.Errorf("%s: %v", vin, got)
		}
	}
	if len(decels) != vehicles || len(traces) != vehicles*messages {
		t.Errorf("%d vehicles, %d traces", len(decels), len(traces))
	}
	if m := f.get(t, "/metrics"); !strings.Contains(m, fmt.Sprintf("throughline_delivery_batch_records_count{destination=\"notification-center\"} %d\n", len(requests))) {
		i := strings.Index(m, "throughline_delivery_batch_records_count")
		t.Errorf("%d requests, metrics %.90s", len(requests), m[max(i, 0):])
	}
}
