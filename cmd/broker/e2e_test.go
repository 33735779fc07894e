package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/paho"
	mqtt3 "github.com/eclipse/paho.mqtt.golang"
	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// dial3 connects the Eclipse client for MQTT 3.1.1.
func dial3(t *testing.T, address, clientID string) mqtt3.Client {
	t.Helper()
	c := mqtt3.NewClient(mqtt3.NewClientOptions().AddBroker("tcp://" + address).SetClientID(clientID).
		SetProtocolVersion(4).SetOrderMatters(false).SetMaxReconnectInterval(time.Second))
	if token := c.Connect(); !token.WaitTimeout(10*time.Second) || token.Error() != nil {
		t.Fatalf("connect %s: %v", clientID, token.Error())
	}
	t.Cleanup(func() { c.Disconnect(0) })
	return c
}

// publish3 publishes at QoS 1 and waits for the acknowledgement.
func publish3(t *testing.T, c mqtt3.Client, topic, payload string) {
	t.Helper()
	if token := c.Publish(topic, 1, false, payload); !token.WaitTimeout(10*time.Second) || token.Error() != nil {
		t.Fatalf("publish %s: %v", topic, token.Error())
	}
}

// dial5 connects the Eclipse client for MQTT 5.
func dial5(t *testing.T, address, clientID string) *paho.Client {
	t.Helper()
	conn := dialTCP(t, address)
	c := paho.NewClient(paho.ClientConfig{Conn: conn, ClientID: clientID})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.Connect(ctx, &paho.Connect{ClientID: clientID, CleanStart: true, KeepAlive: 30}); err != nil {
		t.Fatalf("connect %s: %v", clientID, err)
	}
	t.Cleanup(func() { c.Disconnect(&paho.Disconnect{}) })
	return c
}

// publish5 publishes and returns the reason code of the acknowledgement.
func publish5(t *testing.T, c *paho.Client, qos byte, topic, payload string, carrier tracectx.Carrier) byte {
	t.Helper()
	props := &paho.PublishProperties{}
	if carrier.SW8 != "" {
		props.User.Add("sw8", carrier.SW8)
	}
	if carrier.Correlation != "" {
		props.User.Add("sw8-correlation", carrier.Correlation)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ack, err := c.Publish(ctx, &paho.Publish{QoS: qos, Topic: topic, Payload: []byte(payload), Properties: props})
	if ack == nil {
		t.Fatalf("publish %s: %v", topic, err)
	}
	return ack.ReasonCode
}

// vehicleTracer is a vehicle's own tracer, reporting to the fleet's collector.
func vehicleTracer(t *testing.T, f *fleet, service string) tracectx.Tracer {
	t.Helper()
	r, err := skywalking.NewReporter(skywalking.ReporterOptions{Address: f.collector.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return must(skywalking.NewTracer(skywalking.Options{Service: service, Instance: service + "@1", Sample: 1, Reporter: r}))
}

// drive opens the vehicle's segment and returns its exit span to the broker; end reports both.
func drive(tracer tracectx.Tracer, address string) (out tracectx.Span, end func()) {
	root := tracer.StartLocal(tracectx.SpanOptions{Operation: "drive/brake"})
	out = root.StartExit(tracectx.SpanOptions{Operation: "mqtt/publish", Peer: address, Layer: tracectx.LayerRPCFramework})
	return out, func() { out.End(); root.End() }
}

// checkDelivered asserts that the request belongs to a trace that leads back to the
// vehicle's span, or begins at the broker if vehicle is zero.
func checkDelivered(t *testing.T, f *fleet, r request, vehicle tracectx.Context) {
	t.Helper()
	if r.context.IsZero() {
		t.Fatalf("no context in the body %s", r.body)
	}
	byID := map[string]*tracectxtest.Segment{}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := f.collector.Wait(ctx, func(all []*tracectxtest.Segment) bool {
		for _, s := range all {
			byID[s.ID] = s
		}
		a := byID[r.context.SegmentID]
		return a != nil && byID[a.Span(0).Refs[0].SegmentID] != nil
	}); err != nil {
		t.Fatalf("collector has not both segments of the delivery: %v", err)
	}

	// The sw8 in the body is that of an ExitSpan which the collector has.
	attempt := byID[r.context.SegmentID]
	exit := attempt.Span(r.context.SpanID)
	if exit == nil || exit.Kind != tracectxtest.Exit {
		t.Fatalf("span %d of the body's sw8 is %+v, not an ExitSpan", r.context.SpanID, exit)
	}
	if exit.Peer != f.webhook.address || r.context.Peer != exit.Peer {
		t.Errorf("ExitSpan's peer %q, field 8 of sw8 %q, webhook %q", exit.Peer, r.context.Peer, f.webhook.address)
	}
	if exit.Operation != "POST:/notify" || exit.Layer != tracectx.LayerHTTP || exit.Component != 5005 {
		t.Errorf("ExitSpan is %+v", exit)
	}
	if r.context.Endpoint != attempt.Span(0).Operation {
		t.Errorf("field 7 of sw8 is %q, the segment's first span %q", r.context.Endpoint, attempt.Span(0).Operation)
	}

	// Its segment refers to the EntrySpan of the publish,
	ref := attempt.Span(0).Refs[0]
	if attempt.Span(0).Kind != tracectxtest.Local || ref.Kind != tracectxtest.CrossThread {
		t.Errorf("attempt begins with %v and refers %v", attempt.Span(0).Kind, ref.Kind)
	}
	entry := byID[ref.SegmentID].Span(ref.SpanID)
	if entry.Kind != tracectxtest.Entry || entry.Operation != "mqtt/publish/fleet/+/telemetry" {
		t.Errorf("attempt refers to %v span %q", entry.Kind, entry.Operation)
	}
	if entry.Layer == tracectx.LayerMQ || entry.Component != 0 {
		t.Errorf("EntrySpan has layer %d, component %d", entry.Layer, entry.Component)
	}

	// and that one to the vehicle's span.
	if vehicle.IsZero() {
		if len(entry.Refs) != 0 {
			t.Errorf("EntrySpan of a new trace refers to %+v", entry.Refs)
		}
		return
	}
	want := tracectxtest.Ref{
		Kind: tracectxtest.CrossProcess, TraceID: vehicle.TraceID, SegmentID: vehicle.SegmentID, SpanID: vehicle.SpanID,
		Service: vehicle.Service, Instance: vehicle.Instance, Endpoint: vehicle.Endpoint, Peer: vehicle.Peer,
	}
	if len(entry.Refs) != 1 || entry.Refs[0] != want {
		t.Errorf("EntrySpan's references: %s", cmp.Diff([]tracectxtest.Ref{want}, entry.Refs))
	}
	if r.context.TraceID != vehicle.TraceID {
		t.Errorf("trace %s in the body, %s at the vehicle", r.context.TraceID, vehicle.TraceID)
	}
}

// waitUnbroken waits until the collector has at least n segments and every reference resolves.
func waitUnbroken(t *testing.T, f *fleet, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := f.collector.Wait(ctx, func(all []*tracectxtest.Segment) bool {
		return len(all) >= n && len(tracectxtest.Broken(all)) == 0
	}); err != nil {
		t.Errorf("%d segments, broken: %q", len(f.collector.Segments()), tracectxtest.Broken(f.collector.Segments()))
	}
	for _, s := range f.collector.Segments() {
		for _, sp := range s.Spans {
			if strings.Contains(sp.Operation, "fleet/v") {
				t.Errorf("operation %q has a raw topic in it", sp.Operation)
			}
		}
	}
}

// withoutTrace is the body without its trace fields.
func withoutTrace(t *testing.T, body []byte) map[string]any {
	v := decodeJSON(t, body)
	delete(v, "sw8")
	delete(v, "sw8-correlation")
	return v
}

func TestTraceFromMQTT311Payload(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	out, end := drive(vehicleTracer(t, f, "vehicle-7"), f.mqttAddress())
	vehicle := out.Context()

	c := dial3(t, f.mqttAddress(), "v7")
	publish3(t, c, "fleet/v7/telemetry", fmt.Sprintf(
		`{"vin":"V7","decel":7.10,"count":9007199254740993,"sw8":%q}`, vehicle.Carrier().SW8))
	end()

	got := f.webhook.await(1)[0]
	checkDelivered(t, f, got, vehicle)
	const want = `{"event":"hard-brake","vin":"V7","decel":7.1,"count":9007199254740993,"text":"V7 braked at 7.1 m/s2","sw8":`
	if !strings.HasPrefix(string(got.body), want) {
		t.Errorf("body %s\nwant it to begin with %s", got.body, want)
	}
	if h := got.header.Get("sw8"); h != decodeJSON(t, got.body)["sw8"] {
		t.Errorf("header sw8 %q differs from the body's", h)
	}
	if got.header.Get("webhook-id") == "" || got.header.Get("X-Throughline-Attempt") != "1" ||
		got.header.Get("Content-Type") != "application/json" {
		t.Errorf("headers: %v", got.header)
	}
	waitUnbroken(t, f, 3)
}

func TestTraceFromMQTT5UserProperties(t *testing.T) {
	for qos := byte(1); qos <= 2; qos++ {
		t.Run(fmt.Sprintf("QoS %d", qos), func(t *testing.T) {
			f := startFleet(t, hardBrake, nil)
			out, end := drive(vehicleTracer(t, f, "vehicle-8"), f.mqttAddress())
			vehicle := out.Context()
			vehicle.Correlation = tracectx.Correlation{{Key: "plant", Value: "north"}}

			c := dial5(t, f.mqttAddress(), "v8")
			if code := publish5(t, c, qos, "fleet/v8/telemetry", `{"vin":"V8","decel":8}`, vehicle.Carrier()); code >= 0x80 {
				t.Fatalf("reason code %#x", code)
			}
			end()

			got := f.webhook.await(1)[0]
			checkDelivered(t, f, got, vehicle)
			want := map[string]any{"event": "hard-brake", "vin": "V8", "decel": jsonNumber("8"), "text": "V8 braked at 8 m/s2"}
			if diff := cmp.Diff(want, withoutTrace(t, got.body)); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(vehicle.Correlation, got.context.Correlation); diff != "" {
				t.Errorf("correlation (-want +got):\n%s", diff)
			}
			waitUnbroken(t, f, 3)
		})
	}
}

func TestNewTraceWithoutCarrier(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	publish3(t, dial3(t, f.mqttAddress(), "v9"), "fleet/v9/telemetry", `{"vin":"V9","decel":9}`)
	checkDelivered(t, f, f.webhook.await(1)[0], tracectx.Context{})
	waitUnbroken(t, f, 2)
}

func TestMalformedCarriersStartANewTrace(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	c := dial5(t, f.mqttAddress(), "v10")
	carriers := []string{
		"1-not-a-carrier",
		"2-dA==-cw==-0-cw==-aQ==-ZQ==-cA==",
		"1-dA==-cw==-x-cw==-aQ==-ZQ==-cA==",
		"1-" + strings.Repeat("dHJh", 1000) + "-cw==-0-cw==-aQ==-ZQ==-cA==",
		"1-!!-cw==-0-cw==-aQ==-ZQ==-cA==",
	}
	for _, sw8 := range carriers {
		if code := publish5(t, c, 1, "fleet/v10/telemetry", `{"vin":"V10","decel":9}`, tracectx.Carrier{SW8: sw8}); code >= 0x80 {
			t.Errorf("sw8 %.40q: reason code %#x", sw8, code)
		}
	}
	for _, r := range f.webhook.await(len(carriers)) {
		checkDelivered(t, f, r, tracectx.Context{})
	}
	if n := f.metric(t, "throughline_carriers_malformed_total"); n != float64(len(carriers)) {
		t.Errorf("%v malformed carriers counted, want %d", n, len(carriers))
	}
	waitUnbroken(t, f, 2*len(carriers))
}

func TestWhatDoesNotMatchDeliversNothing(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	c := dial3(t, f.mqttAddress(), "v11")
	for _, m := range [][2]string{
		{"fleet/v11/telemetry", `{"vin":"V11","decel":2}`},
		{"fleet/v11/telemetry", `{"vin":"V11"}`},
		{"fleet/v11/telemetry", `{"vin":"V11","decel":"x"}`},
		{"fleet/v11/telemetry", `no JSON at all`},
		{"fleet/v11/telemetry/more", `{"vin":"V11","decel":9}`},
		{"fleet/telemetry", `{"vin":"V11","decel":9}`},
		{"other", `{"vin":"V11","decel":9}`},
	} {
		publish3(t, c, m[0], m[1])
	}
	publish3(t, c, "fleet/v11/telemetry", `{"vin":"last","decel":9}`)
	got := f.webhook.await(1)
	if v := decodeJSON(t, got[0].body)["vin"]; len(got) != 1 || v != "last" {
		t.Errorf("%d requests, the first of %v", len(got), v)
	}
	if n := f.metric(t, "throughline_rule_outcomes_total", `outcome="payload_not_json"`); n != 1 {
		t.Errorf("%v payloads counted that are not JSON, want 1", n)
	}
	if n := f.metric(t, "throughline_rule_outcomes_total", `outcome="type_mismatch"`); n != 1 {
		t.Errorf("%v type mismatches counted, want 1", n)
	}
}

// TestNothingAcknowledgedIsLostInALongOutage queues more than the outbox keeps in memory.
func TestNothingAcknowledgedIsLostInALongOutage(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	f.webhook.stop()
	c := dial3(t, f.mqttAddress(), "v12")
	const messages, size = 700, 48 << 10 // 33 MiB
	pad := strings.Repeat("x", size)
	tokens := make([]mqtt3.Token, messages)
	for i := range tokens {
		tokens[i] = c.Publish("fleet/v12/telemetry", 1, false, fmt.Sprintf(`{"vin":"%s","decel":9,"count":%d}`, pad, i))
	}
	for i, token := range tokens {
		if !token.WaitTimeout(20*time.Second) || token.Error() != nil {
			t.Fatalf("publish %d: %v", i, token.Error())
		}
	}
	f.webhook.start()
	for i, r := range f.webhook.await(messages) {
		if got := fmt.Sprint(decodeJSON(t, r.body)["count"]); got != fmt.Sprint(i) {
			t.Fatalf("request %d has message %s: out of order in its lane, or lost", i, got)
		}
	}
	waitFor(t, "an empty outbox", func() bool { return strings.Contains(f.get(t, "/api/v1/outbox"), `"records":[]`) })
}

// TestFullOutboxRefuses: no acknowledgement at the cap, said clearly, and over by itself.
func TestFullOutboxRefuses(t *testing.T) {
	f := startFleet(t, hardBrake, func(c *config) { c.Outbox.MaxBytesPerDestination = 1 << 20 })
	f.webhook.stop()
	c5 := dial5(t, f.mqttAddress(), "v13")
	pad := strings.Repeat("x", 32<<10)
	message := func(n int) string { return fmt.Sprintf(`{"vin":"%s","decel":9,"count":%d}`, pad, n) }
	accepted := 0
	for ; accepted < 100; accepted++ {
		if code := publish5(t, c5, 1, "fleet/v13/telemetry", message(accepted), tracectx.Carrier{}); code >= 0x80 {
			if code != 0x97 {
				t.Errorf("reason code %#x, want 0x97 (quota exceeded)", code)
			}
			break
		}
	}
	if accepted == 0 || accepted == 100 {
		t.Fatalf("%d publishes of 32 kB accepted with a cap of 1 MiB", accepted)
	}
	// What doesn't match is acknowledged all the same, and so the connection stays.
	if code := publish5(t, c5, 1, "fleet/v13/telemetry", `{"decel":1}`, tracectx.Carrier{}); code >= 0x80 {
		t.Errorf("a publish that matches nothing was refused with %#x", code)
	}
	// MQTT 3.1.1 has no way to say no: nothing comes back.
	c3 := dial3(t, f.mqttAddress(), "v14")
	refused := c3.Publish("fleet/v14/telemetry", 1, false, message(accepted))
	if refused.WaitTimeout(300 * time.Millisecond) {
		t.Error("a publish was acknowledged though its record can't be stored")
	}
	waitFor(t, "a clear word in the log", func() bool {
		return strings.Contains(f.logged.String(), "outbox is full") && strings.Contains(f.logged.String(), "notification-center")
	})
	if n := f.metric(t, "throughline_publishes_refused_total"); n < 2 {
		t.Errorf("%v refusals counted, want at least 2", n)
	}
	if !strings.Contains(f.get(t, "/readyz"), "ok") {
		t.Error("a full outbox took the broker off duty")
	}

	f.webhook.start()
	if !refused.WaitTimeout(20 * time.Second) {
		t.Error("the refused publish was not acknowledged after the webhook's return")
	}
	f.webhook.await(accepted + 1)
	waitFor(t, "publishes to be accepted again", func() bool {
		return publish5(t, c5, 1, "fleet/v13/telemetry", message(1000), tracectx.Carrier{}) < 0x80
	})
}

func TestGracefulStopKeepsWhatWaits(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	f.webhook.stop()
	c := dial3(t, f.mqttAddress(), "v15")
	publish3(t, c, "fleet/v15/telemetry", `{"vin":"V15","decel":9}`)
	c.Disconnect(100)
	f.stopApp(t)
	for _, step := range []string{"listeners", "clients", "forwarder", "outbox", "tracer"} {
		if !strings.Contains(f.logged.String(), "step="+step) {
			t.Errorf("stop step %q is not in the log", step)
		}
	}
	f.webhook.start()
	f.start(t)
	checkDelivered(t, f, f.webhook.await(1)[0], tracectx.Context{})
}

// TestSIGKILLLosesNothing kills the broker, another process, between acknowledgement and delivery.
func TestSIGKILLLosesNothing(t *testing.T) {
	webhook := newWebhook(t)
	collector, err := tracectxtest.NewCollector()
	if err != nil {
		t.Fatal(err)
	}
	defer collector.Stop()
	f := &fleet{webhook: webhook, collector: collector}
	dir := t.TempDir()
	writeRules(t, dir, webhook.address, hardBrake)
	config := filepath.Join(dir, "broker.yaml")
	mqttAddress, adminAddress := freeAddress(t), freeAddress(t)
	if err := os.WriteFile(config, fmt.Appendf(nil, `
listeners: [{name: tcp, address: %q}]
data_dir: data
rules: {dir: rules.d}
trace: {collector: %q}
admin: {address: %q}
`, mqttAddress, collector.Addr(), adminAddress), 0o644); err != nil {
		t.Fatal(err)
	}

	webhook.status.Store(http.StatusServiceUnavailable) // attempts are made, none succeeds
	broker := runBroker(t, config, adminAddress)
	tracer := vehicleTracer(t, f, "vehicle-16")
	out, end := drive(tracer, mqttAddress)
	vehicle := out.Context()
	c := dial3(t, mqttAddress, "v16")
	const messages = 200
	for i := range messages {
		publish3(t, c, "fleet/v16/telemetry", fmt.Sprintf(`{"vin":"V16","decel":9,"count":%d,"sw8":%q}`, i, vehicle.Carrier().SW8))
	}
	end()
	waitFor(t, "a failed attempt", func() bool { return len(webhook.requests()) > 0 })
	failed := webhook.requests()
	// What the broker reported goes on its way before the kill: the segment of a publish whose
	// report was still in memory is gone, and that is not what this test is about.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := collector.Wait(ctx, func(all []*tracectxtest.Segment) bool { return entries(all) >= messages }); err != nil {
		t.Fatalf("the collector has %d publishes of %d", entries(collector.Segments()), messages)
	}
	if err := broker.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = broker.Wait()
	c.Disconnect(0)

	webhook.mu.Lock()
	webhook.got = nil
	webhook.mu.Unlock()
	webhook.status.Store(http.StatusOK)
	broker = runBroker(t, config, adminAddress)
	got := webhook.await(messages)

	ids := map[string]bool{}
	for i, r := range got[:messages] {
		if n := fmt.Sprint(decodeJSON(t, r.body)["count"]); n != fmt.Sprint(i) {
			t.Fatalf("request %d has message %s: out of order in its lane, or lost", i, n)
		}
		checkDelivered(t, f, r, vehicle)
		ids[r.header.Get("webhook-id")] = true
	}
	if len(ids) != messages {
		t.Errorf("%d webhook-ids for %d records", len(ids), messages)
	}
	checkOverRestart(t, collector, failed[0].context.Instance, got[:messages])
	before, after := failed[0], got[0]
	if a, b := before.header.Get("webhook-id"), after.header.Get("webhook-id"); a != b {
		t.Errorf("webhook-id %s before the kill, %s after it", a, b)
	}
	if a, b := withoutTrace(t, before.body), withoutTrace(t, after.body); cmp.Diff(a, b) != "" {
		t.Errorf("bodies differ in more than the trace (-before +after):\n%s", cmp.Diff(a, b))
	}
	if before.context.SegmentID == after.context.SegmentID {
		t.Error("two attempts share a segment")
	}
	if err := broker.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := broker.Wait(); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
}

// checkOverRestart asserts that the requests are attempts of another instance than the one of that name, and that each of
// them refers to an EntrySpan of that one, which is gone.
func checkOverRestart(t *testing.T, collector *tracectxtest.Collector, gone string, requests []request) {
	t.Helper()
	byID := map[string]*tracectxtest.Segment{}
	for _, s := range collector.Segments() {
		byID[s.ID] = s
	}
	referred := map[string]bool{}
	for _, r := range requests {
		attempt := byID[r.context.SegmentID]
		ref := attempt.Span(0).Refs[0]
		entry := byID[ref.SegmentID]
		if attempt.Instance == gone || r.context.Instance != attempt.Instance {
			t.Errorf("attempt of instance %s, sw8 of %s, before the restart it was %s", attempt.Instance, r.context.Instance, gone)
		}
		if entry.Instance != gone || ref.Instance != gone {
			t.Errorf("EntrySpan of instance %s, reference to %s, want %s", entry.Instance, ref.Instance, gone)
		}
		referred[ref.SegmentID] = true
	}
	if len(referred) != len(requests) {
		t.Errorf("%d records refer to %d publishes", len(requests), len(referred))
	}
	if broken := tracectxtest.Broken(collector.Segments()); len(broken) > 0 {
		t.Errorf("broken traces: %q", broken)
	}
}

func entries(all []*tracectxtest.Segment) int {
	n := 0
	for _, s := range all {
		if s.Span(0).Kind == tracectxtest.Entry {
			n++
		}
	}
	return n
}

// runBroker starts the broker as another process, and waits until it is ready.
func runBroker(t testing.TB, config, adminAddress string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "serve", "-config", config)
	cmd.Env = append(os.Environ(), runAsBroker+"=1")
	log := &lockedBuffer{}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		if t.Failed() {
			t.Logf("the broker's log:\n%s", log)
		}
	})
	waitFor(t, "the broker to be ready", func() bool {
		resp, err := http.Get("http://" + adminAddress + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return cmd
}

// TestSIGHUPWhileStopping: a reload that comes too late doesn't cut the stop short.
func TestSIGHUPWhileStopping(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { arrived <- struct{}{}; <-release }))
	defer slow.Close()
	dir := t.TempDir()
	writeRules(t, dir, strings.TrimPrefix(slow.URL, "http://"), hardBrake)
	mqttAddress, adminAddress := freeAddress(t), freeAddress(t)
	config := filepath.Join(dir, "broker.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
listeners: [{name: tcp, address: %q}]
trace: {collector: ""}
admin: {address: %q}
`, mqttAddress, adminAddress), 0o644); err != nil {
		t.Fatal(err)
	}
	broker := runBroker(t, config, adminAddress)
	publish3(t, dial3(t, mqttAddress, "v17"), "fleet/v17/telemetry", `{"vin":"V17","decel":9}`)
	<-arrived
	if err := broker.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the stop to begin", func() bool {
		c, err := net.Dial("tcp", mqttAddress)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	if err := broker.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := broker.Wait(); err != nil {
		t.Errorf("SIGTERM, then SIGHUP: %v", err)
	}
}
