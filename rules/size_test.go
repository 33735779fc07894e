package rules_test

import (
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "4096": 4096, "1KiB": 1 << 10, "1.5MiB": 3 << 19, "10GiB": 10 << 30, "1TiB": 1 << 40, "100 MB": 1e8, "2kB": 2000, "7B": 7,
	} {
		if got, ok := rules.ParseSize(text); got != want || !ok {
			t.Errorf("%q is %d, %v; want %d", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "x", "-1", "NaN", "1e300TiB", "Inf", "1PiB", "GiB", "1 1"} {
		if got, ok := rules.ParseSize(text); ok {
			t.Errorf("%q is %d", text, got)
		}
	}
	for _, n := range []int64{0, 1, 1023, 1 << 10, 1 << 20, 3 << 29, 10 << 30, 1 << 50} {
		if got, ok := rules.ParseSize(rules.FormatSize(n)); got != n || !ok {
			t.Errorf("%d is written %q, which is %d", n, rules.FormatSize(n), got)
		}
	}
}

// What a rule file doesn't say about a full outbox is told apart from what it says: the configuration's defaults hold there.
func TestDestinationOnFull(t *testing.T) {
	for text, want := range map[string]rules.Destination{
		"":                         {},
		", on_full: refuse":        {OnFull: rules.OnFullRefuse},
		", on_full: ack_and_count": {OnFull: rules.OnFullAckAndCount},
		", max_bytes: 1MiB":        {MaxBytes: 1 << 20},
		", max_bytes: 1024TiB":     {MaxBytes: 1 << 50},
		", max_bytes: 5000000":     {MaxBytes: 5_000_000},
	} {
		d := load(t, `destinations: {d: {url: "http://127.0.0.1/"`+text+`}}`).Destinations()[0]
		if d.OnFull != want.OnFull || d.MaxBytes != want.MaxBytes {
			t.Errorf("%q: on_full %q, max_bytes %d", text, d.OnFull, d.MaxBytes)
		}
	}
}
