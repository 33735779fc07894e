package main

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/store"
)

// TestSummary: one line a minute while anything is queued, with what happened in that minute.
func TestSummary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logged := &lockedBuffer{}
		var mu sync.Mutex
		stats := bridge.Stats{Destinations: map[string]bridge.Usage{"a": {Appended: 1000}}}
		attempts := map[bridge.Class]uint64{bridge.Success: 1000, bridge.OwnSide: 0}
		flushes := store.Flushes{Count: 10, Time: time.Second}
		var destinations []bridge.Status
		stop := startSummary(summarySources{
			stats:        func() bridge.Stats { return locked(&mu, &stats) },
			destinations: func() []bridge.Status { return locked(&mu, &destinations) },
			attempts:     func() map[bridge.Class]uint64 { return locked(&mu, &attempts) },
			flushes:      func() store.Flushes { return locked(&mu, &flushes) },
		}, slog.New(slog.NewTextHandler(logged, nil)))
		// The test holds mu but while it sleeps.
		sleep := func(d time.Duration) {
			mu.Unlock()
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
		}
		mu.Lock()
		sleep(time.Second)

		attempts = map[bridge.Class]uint64{bridge.Success: 1010, bridge.OwnSide: 0}
		sleep(10 * time.Minute)
		if text := logged.String(); text != "" {
			t.Errorf("logged with nothing queued: %s", text)
		}
		for n := range 12 {
			destinations = append(destinations, bridge.Status{Name: fmt.Sprintf("f%02d", n), State: bridge.StateFailing})
		}
		destinations = append(destinations, bridge.Status{Name: "p", State: bridge.StatePaused}, bridge.Status{Name: "a", State: bridge.StateActive})
		stats.Records, stats.Bytes, stats.DeadLetters = 7, 700, 2
		stats.Oldest = time.Now().Add(-30 * time.Second)
		stats.Destinations = map[string]bridge.Usage{
			"a": {Appended: 1100, Oldest: stats.Oldest.Add(time.Second)}, "b": {Appended: 50, Oldest: stats.Oldest}, "c": {},
		}
		attempts = map[bridge.Class]uint64{bridge.Success: 1012, bridge.OwnSide: 3}
		flushes = store.Flushes{Count: 30, Time: 1100 * time.Millisecond}
		sleep(time.Minute)
		want := `level=INFO msg="deliveries wait" records=7 bytes=700 oldest=1m29s oldest_destination=b attempts.own_side=3 attempts.success=2 ` +
			`failing="f00,f01,f02,f03,f04,f05,f06,f07,f08,f09 and 2 more" paused=p undefined="" dead_letters=2 flush_mean=5ms records_per_flush=7.5` + "\n"
		if text := logged.String(); !strings.HasSuffix(text, want) || strings.Count(text, "\n") != 1 {
			t.Errorf("logged %s\nwant %s", text, want)
		}
		sleep(time.Minute)
		if text := logged.String(); !strings.HasSuffix(text, "attempts.own_side=0 attempts.success=0 "+
			`failing="f00,f01,f02,f03,f04,f05,f06,f07,f08,f09 and 2 more" paused=p undefined="" dead_letters=2 flush_mean=0s records_per_flush=0.0`+"\n") {
			t.Errorf("the next minute, in which nothing happened: %s", text)
		}
		stop()
		sleep(time.Hour)
		mu.Unlock()
		if n := strings.Count(logged.String(), "\n"); n != 2 {
			t.Errorf("%d lines, want none after the stop", n)
		}
	})
}

// locked reads what mu guards.
func locked[T any](mu *sync.Mutex, v *T) T {
	mu.Lock()
	defer mu.Unlock()
	return *v
}

// TestSummarySources: the running broker's own numbers.
func TestSummarySources(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	before := f.flushes()
	publish3(t, dial3(t, f.mqttAddress(), "v60"), "fleet/v60/telemetry", `{"vin":"V60","decel":9}`)
	f.webhook.await(1)
	if now := f.flushes(); now.Count <= before.Count || now.Time <= before.Time || now.Writes <= before.Writes {
		t.Errorf("flushes %+v, before a publish %+v", now, before)
	}
	if n := f.metric(t, "throughline_outbox_appended_total", `destination="notification-center"`); n != 1 {
		t.Errorf("%v records appended", n)
	}
	for _, class := range []string{"success", "retry", "configuration", "poison", "gone", "own_side"} {
		f.metric(t, "throughline_delivery_attempts_total", `class="`+class+`"`, `destination="notification-center"`)
	}
	for _, name := range []string{
		"throughline_outbox_records", "throughline_outbox_bytes", "throughline_outbox_oldest_seconds", "throughline_outbox_dead_letters",
		"throughline_delivery_breaker_open", "throughline_delivery_paused", "throughline_delivery_lane_left_total",
	} {
		f.metric(t, name, `destination="notification-center"`)
	}
	f.metric(t, "throughline_store_flush_seconds_count")
	f.metric(t, "throughline_store_flush_writes_count")
}
