package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/paho"
	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// twoCenters are rules by which a telemetry message goes to both destinations, and an alarm to one.
const twoCenters = `
destinations:
  alarms: {url: "http://WEBHOOK/notify"}
  statistics: {url: "http://SECOND/notify", SETTINGS}
rules:
  - name: brake
    sql: SELECT payload.count AS count, payload.pad AS pad FROM "fleet/+/telemetry", "fleet/+/alarm"
    actions: [{http: alarms}]
  - name: all
    sql: SELECT payload.count AS count, payload.pad AS pad FROM "fleet/+/telemetry"
    actions: [{http: statistics}]
`

// centers is a fleet with two webhooks; the one for statistics is down.
type centers struct {
	*fleet
	statistics *webhook
}

func startCenters(t *testing.T, settings string) *centers {
	t.Helper()
	c := &centers{statistics: newWebhook(t)}
	c.statistics.stop()
	c.fleet = startFleet(t, c.rules(settings), func(cfg *config) { cfg.Rules.Watch = false })
	return c
}

func (c *centers) rules(settings string) string {
	return strings.NewReplacer("SECOND", c.statistics.address, "SETTINGS", settings).Replace(twoCenters)
}

func (c *centers) reload(t *testing.T, settings string) {
	t.Helper()
	writeRules(t, filepath.Dir(c.config.Rules.Dir), c.webhook.address, c.rules(settings))
	if r := c.keeper.Reload(); !r.OK {
		t.Fatalf("reload: %v", r.Problems)
	}
}

var padding = strings.Repeat("x", 32<<10)

func padded(count int) string { return fmt.Sprintf(`{"count":%d,"pad":%q}`, count, padding) }

// publish publishes telemetry at QoS 1 and returns the reason code.
func (c *centers) publish(t *testing.T, v *paho.Client, count int) byte {
	t.Helper()
	return publish5(t, v, 1, "fleet/v21/telemetry", padded(count), tracectx.Carrier{})
}

// fill publishes until the code is no success, and returns how many were accepted.
func (c *centers) fill(t *testing.T, v *paho.Client) int {
	t.Helper()
	for n := range 100 {
		if code := c.publish(t, v, n); code >= 0x80 {
			if n == 0 || code != 0x97 {
				t.Errorf("publish %d: reason code %#x, want 0x97 (quota exceeded)", n, code)
			}
			return n
		}
	}
	t.Fatal("100 publishes of 32 kB accepted with a cap of 1 MiB")
	return 0
}

func countsOf(t *testing.T, rs []request) (all []string) {
	t.Helper()
	for _, r := range rs {
		all = append(all, fmt.Sprint(decodeJSON(t, r.body)["count"]))
	}
	return all
}

// TestFullDestinationDrops: with ack_and_count a full destination loses its own deliveries, told and counted, and nobody
// else's.
func TestFullDestinationDrops(t *testing.T) {
	c := startCenters(t, "on_full: ack_and_count, max_bytes: 1MiB")
	if n := c.metric(t, "throughline_outbox_dropped_total", `destination="statistics"`); n != 0 {
		t.Errorf("%v dropped before the first publish", n)
	}
	const messages = 60
	v5, v3 := dial5(t, c.mqttAddress(), "v21"), dial3(t, c.mqttAddress(), "v22")
	var want []string
	for n := range messages {
		want = append(want, fmt.Sprint(n))
		if n%2 == 0 {
			if code := c.publish(t, v5, n); code != 0 {
				t.Fatalf("publish %d: reason code %#x", n, code)
			}
		} else {
			publish3(t, v3, "fleet/v22/telemetry", padded(n))
		}
		c.webhook.await(n + 1) // of two lanes: one after the other
	}
	if diff := cmp.Diff(want, countsOf(t, c.webhook.requests())); diff != "" {
		t.Errorf("alarms (-want +got):\n%s", diff)
	}
	dropped := int(c.metric(t, "throughline_outbox_dropped_total", `destination="statistics"`))
	if dropped < messages/4 || dropped > messages*3/4 {
		t.Fatalf("%d of %d dropped", dropped, messages)
	}
	for metric, label := range map[string]string{
		"throughline_outbox_dropped_total":    `destination="alarms"`,
		"throughline_outbox_refused_total":    "",
		"throughline_publishes_refused_total": "",
		"throughline_publishes_dropped_total": "",
	} {
		if n := c.metric(t, metric, label); n != 0 {
			t.Errorf("%s %s is %v, want 0", metric, label, n)
		}
	}
	if n := strings.Count(c.logged.String(), "dropping records"); n != 1 {
		t.Errorf("the log says %d times that dropping begins", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	flagged := 0
	if err := c.collector.Wait(ctx, func(all []*tracectxtest.Segment) bool {
		flagged = 0
		for _, s := range all {
			for _, span := range s.Spans {
				if span.Operation == "rule/all" && span.Failed && !s.Span(0).Failed {
					flagged++
				}
			}
		}
		return flagged == dropped
	}); err != nil {
		t.Errorf("%d spans tell of a dropped record, want %d", flagged, dropped)
	}

	c.statistics.start()
	got := countsOf(t, c.statistics.await(messages-dropped))
	waitFor(t, "the log to say that dropping has ended, and how many it were", func() bool {
		return strings.Contains(c.logged.String(), fmt.Sprintf("destination=statistics dropped=%d", dropped))
	})
	if code := c.publish(t, v5, messages); code != 0 {
		t.Errorf("reason code %#x", code)
	}
	c.statistics.await(len(got) + 1)
	waitFor(t, "an empty outbox", func() bool { return strings.Contains(c.get(t, "/api/v1/outbox"), `"records":[]`) })
	if n := len(c.statistics.requests()); n != messages-dropped+1 {
		t.Errorf("%d deliveries, want %d", n, messages-dropped+1)
	}
}

// TestAnyFullDestinationRefusesAll: nothing of a refused publish is stored, for no destination.
func TestAnyFullDestinationRefusesAll(t *testing.T) {
	c := startCenters(t, "on_full: refuse, max_bytes: 1MiB")
	v := dial5(t, c.mqttAddress(), "v21")
	accepted := c.fill(t, v)
	c.webhook.await(accepted)
	// What owes nothing to the full destination is accepted and delivered, behind it in the same lane.
	if code := publish5(t, v, 1, "fleet/v21/alarm", `{"count":"alarm"}`, tracectx.Carrier{}); code != 0 {
		t.Errorf("reason code %#x for a publish that owes nothing to the full destination", code)
	}
	got := countsOf(t, c.webhook.await(accepted+1))
	if len(got) != accepted+1 || got[accepted] != "alarm" {
		t.Errorf("alarms got %v, want the %d accepted ones and the alarm", got, accepted)
	}
	if n := c.metric(t, "throughline_outbox_dropped_total"); n != 0 {
		t.Errorf("%v counted as dropped", n)
	}
	refused := c.metric(t, "throughline_publishes_refused_total", `reason="full"`)
	publish5QoS0(t, v, "fleet/v21/telemetry", padded(1000))
	waitFor(t, "the QoS 0 publish to be counted", func() bool {
		return c.metric(t, "throughline_publishes_dropped_total", `reason="full"`) == 1
	})
	if n := c.metric(t, "throughline_publishes_refused_total", `reason="full"`); n != refused {
		t.Errorf("a publish of QoS 0 is counted among those refused: %v, were %v", n, refused)
	}
}

func publish5QoS0(t *testing.T, c *paho.Client, topic, payload string) {
	t.Helper()
	if _, err := c.Publish(t.Context(), &paho.Publish{Topic: topic, Payload: []byte(payload)}); err != nil {
		t.Fatal(err)
	}
}

// TestReloadOfOnFull changes the policy while the destination is full: it is in force at once, for those too that wait for
// an acknowledgement.
func TestReloadOfOnFull(t *testing.T) {
	c := startCenters(t, "on_full: refuse, max_bytes: 1MiB")
	v := dial5(t, c.mqttAddress(), "v21")
	accepted := c.fill(t, v)
	v3 := dial3(t, c.mqttAddress(), "v22")
	silent := v3.Publish("fleet/v22/telemetry", 1, false, padded(2000))
	if silent.WaitTimeout(300 * time.Millisecond) {
		t.Error("a publish was acknowledged though its record can't be stored")
	}

	c.reload(t, "on_full: ack_and_count, max_bytes: 1MiB")
	if code := c.publish(t, v, accepted); code != 0 {
		t.Errorf("reason code %#x with ack_and_count", code)
	}
	if !silent.WaitTimeout(20*time.Second) || silent.Error() != nil {
		t.Errorf("the client that was refused silently is not released: %v", silent.Error())
	}
	c.webhook.await(accepted + 2)
	if n := c.metric(t, "throughline_outbox_dropped_total", `destination="statistics"`); n != 2 {
		t.Errorf("%v dropped, want 2", n)
	}

	c.reload(t, "on_full: refuse, max_bytes: 1MiB")
	if code := c.publish(t, v, accepted+1); code != 0x97 {
		t.Errorf("reason code %#x with refuse, want 0x97", code)
	}
	if n := c.metric(t, "throughline_outbox_dropped_total", `destination="statistics"`); n != 2 {
		t.Errorf("%v dropped, want 2 still", n)
	}
	waitFor(t, "the log to say that dropping has ended", func() bool {
		return strings.Contains(c.logged.String(), "destination=statistics dropped=2")
	})
	c.statistics.start()
	c.statistics.await(accepted)
	waitFor(t, "publishes to be accepted again", func() bool { return c.publish(t, v, accepted+1) == 0 })
}

// TestReloadOfMaxBytes: more room is there at once, for those too that wait for an acknowledgement.
func TestReloadOfMaxBytes(t *testing.T) {
	c := startCenters(t, "max_bytes: 1MiB")
	v := dial5(t, c.mqttAddress(), "v21")
	accepted := c.fill(t, v)
	v3 := dial3(t, c.mqttAddress(), "v22")
	silent := v3.Publish("fleet/v22/telemetry", 1, false, padded(2000))
	if silent.WaitTimeout(300 * time.Millisecond) {
		t.Error("a publish was acknowledged though its record can't be stored")
	}
	c.reload(t, "max_bytes: 64MiB")
	if code := c.publish(t, v, accepted); code != 0 {
		t.Errorf("reason code %#x with more room", code)
	}
	if !silent.WaitTimeout(20*time.Second) || silent.Error() != nil {
		t.Errorf("the client that was refused silently is not released: %v", silent.Error())
	}
	c.statistics.start()
	c.statistics.await(accepted + 2)
}

// TestReleaseThoughAnotherIsFull: a client that was refused for one destination is released when that has room, though
// another is full still, and refuses all the time.
func TestReleaseThoughAnotherIsFull(t *testing.T) {
	c := startCenters(t, "max_bytes: 1MiB")
	c.webhook.stop()
	text := strings.Replace(c.rules("max_bytes: 1MiB"), `/notify"}`, `/notify", max_bytes: 2MiB}`, 1)
	writeRules(t, filepath.Dir(c.config.Rules.Dir), c.webhook.address, text)
	if r := c.keeper.Reload(); !r.OK {
		t.Fatalf("reload: %v", r.Problems)
	}
	v := dial5(t, c.mqttAddress(), "v21")
	c.fill(t, v) // statistics is full
	for n, code := 100, byte(0); code < 0x80; n++ {
		code = publish5(t, v, 1, "fleet/v21/alarm", padded(n), tracectx.Carrier{})
	} // and so is alarms
	// That the client library calls them done doesn't say that they were acknowledged: it does so when it sends them again.
	alarm := dial3(t, c.mqttAddress(), "v22").Publish("fleet/v22/alarm", 1, false, padded(2000))
	both := dial3(t, c.mqttAddress(), "v24").Publish("fleet/v24/telemetry", 1, false, padded(3000))
	if alarm.WaitTimeout(300*time.Millisecond) || both.WaitTimeout(0) {
		t.Error("a publish was acknowledged though its record can't be stored")
	}

	c.webhook.start()
	waitFor(t, "the alarm to be released and delivered, though statistics has no room", func() bool {
		if code := c.publish(t, v, 1000); code != 0x97 {
			t.Fatalf("reason code %#x, statistics has no room", code)
		}
		return slices.Contains(countsOf(t, c.webhook.requests()), "2000")
	})
	if slices.Contains(countsOf(t, c.webhook.requests()), "3000") {
		t.Error("a publish that statistics has refused was delivered to alarms")
	}
	c.statistics.start()
	for _, w := range []*webhook{c.webhook, c.statistics} {
		waitFor(t, "the publish for both to be released and delivered", func() bool {
			return slices.Contains(countsOf(t, w.requests()), "3000")
		})
	}
}

// TestDeadWebhookFillsItsOwnCap: what goes to other destinations alone is accepted and delivered as ever.
func TestDeadWebhookFillsItsOwnCap(t *testing.T) {
	c := startCenters(t, "on_full: refuse")
	c.reload(t, "on_full: refuse, max_bytes: 2MiB")
	v := dial5(t, c.mqttAddress(), "v21")
	accepted := c.fill(t, v)
	const alarms = 200 // 6.4 MB, more than the dead webhook's cap
	for n := range alarms {
		if code := publish5(t, v, 1, "fleet/v21/alarm", padded(n), tracectx.Carrier{}); code != 0 {
			t.Fatalf("alarm %d: reason code %#x", n, code)
		}
	}
	c.webhook.await(accepted + alarms)
	if n := c.metric(t, "throughline_outbox_records", `destination="statistics"`); int(n) != accepted {
		t.Errorf("%v records wait for the dead webhook, want %d", n, accepted)
	}
}

// TestCapsInForce: what a rule file says wins over the configuration, and that holds for what no file defines.
func TestCapsInForce(t *testing.T) {
	file := writeRules(t, t.TempDir(), "127.0.0.1:1", `
destinations:
  neither: {url: "http://WEBHOOK/"}
  drops: {url: "http://WEBHOOK/", on_full: ack_and_count}
  refuses: {url: "http://WEBHOOK/", on_full: refuse}
  both: {url: "http://WEBHOOK/", on_full: refuse, max_bytes: 2MiB}
`)
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		t.Fatal(problems)
	}
	for onFull, drop := range map[string]bool{"refuse": false, "ack_and_count": true} {
		c := outboxConfig{MaxBytesPerDestination: 4 << 20, OnFull: onFull}
		want := outbox.Caps{Default: outbox.Cap{MaxBytes: 4 << 20, Drop: drop}, Of: map[string]outbox.Cap{}}
		if diff := cmp.Diff(want, caps(c, nil)); diff != "" {
			t.Errorf("%s, no rules (-want +got):\n%s", onFull, diff)
		}
		want.Of = map[string]outbox.Cap{
			"neither": {MaxBytes: 4 << 20, Drop: drop}, "drops": {MaxBytes: 4 << 20, Drop: true},
			"refuses": {MaxBytes: 4 << 20}, "both": {MaxBytes: 2 << 20},
		}
		if diff := cmp.Diff(want, caps(c, set)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", onFull, diff)
		}
	}
}

// TestCapsAtRest: without a broker the caps are those that it would have, also of its last good rules; without any rules it
// goes on with the configuration's.
func TestCapsAtRest(t *testing.T) {
	f := startFleet(t, strings.Replace(hardBrake, "http://WEBHOOK/notify", "http://WEBHOOK/notify\n    max_bytes: 2MiB", 1), nil)
	f.webhook.stop()
	publish3(t, dial3(t, f.mqttAddress(), "v23"), "fleet/v23/telemetry", `{"vin":"V23","decel":9}`)
	f.stopApp(t)
	limit := func() int64 {
		t.Helper()
		c := &cli{stdout: io.Discard, stderr: io.Discard, env: os.LookupEnv}
		n, err := openAtRest(t.Context(), c, f.config, filepath.Join(f.config.DataDir, storeFile),
			outboxCall[int64]{atRest: func(o admin.Outbox) (int64, error) { return o.Stats().Destinations["notification-center"].Limit, nil }})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := limit(); n != 2<<20 {
		t.Errorf("cap %d, want that of the rule file", n)
	}
	writeRules(t, filepath.Dir(f.config.Rules.Dir), "", "no: rules")
	if n := limit(); n != 2<<20 {
		t.Errorf("cap %d with bad rule files, want that of the last good ones", n)
	}
	if err := os.RemoveAll(f.config.Rules.Dir); err != nil {
		t.Fatal(err)
	}
	kept, err := filepath.Glob(filepath.Join(f.config.DataDir, "*.json"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("%v, %v", kept, err)
	}
	if err := os.Remove(kept[0]); err != nil {
		t.Fatal(err)
	}
	if n := limit(); n != f.config.Outbox.MaxBytesPerDestination {
		t.Errorf("cap %d without rules, want the configuration's", n)
	}
}
