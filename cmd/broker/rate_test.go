package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRateOfTheRuleFile: a rate holds back what is stored, its change in the rule file is in force at once, and a stop does
// not wait for it.
func TestRateOfTheRuleFile(t *testing.T) {
	at := func(rate string) string {
		return strings.Replace(hardBrake, "http://WEBHOOK/notify", "http://WEBHOOK/notify\n    rate: "+rate, 1)
	}
	f := startFleet(t, at("1/h"), func(c *config) { c.Rules.Watch = false })
	c := dial3(t, f.mqttAddress(), "v41")
	const messages = 20
	for range messages {
		publish3(t, c, "fleet/v41/telemetry", `{"vin":"V41","decel":9}`)
	}
	f.webhook.await(1)
	time.Sleep(300 * time.Millisecond) // for what must not come
	if n := len(f.webhook.requests()); n != 1 {
		t.Fatalf("%d requests at 1/h", n)
	}
	reload := func(rate string) {
		t.Helper()
		writeRules(t, filepath.Dir(f.config.Rules.Dir), f.webhook.address, at(rate))
		if r := f.keeper.Reload(); !r.OK {
			t.Fatalf("reload: %v", r.Problems)
		}
	}
	reload("0/s")
	for i, r := range f.webhook.await(messages) {
		if n := r.header.Get("X-Throughline-Attempt"); n != "1" {
			t.Errorf("request %d is attempt %s", i, n)
		}
	}

	reload("1/h")
	publish3(t, c, "fleet/v41/telemetry", `{"vin":"V41","decel":9}`)
	publish3(t, c, "fleet/v41/telemetry", `{"vin":"V41","decel":9}`)
	f.webhook.await(messages + 1)
	c.Disconnect(100)
	began := time.Now()
	f.stopApp(t)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the stop took %v", took)
	}
	if n := len(f.webhook.requests()); n != messages+1 {
		t.Errorf("%d requests, want %d", n, messages+1)
	}
}
