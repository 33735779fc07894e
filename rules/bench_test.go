package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

// payloadOf is telemetry of about size bytes, the fields that rules read in its
// middle.
func payloadOf(size int, decel string) string {
	filler := func(n int, prefix string) string {
		var b strings.Builder
		for i := 0; b.Len() < n; i++ {
			fmt.Fprintf(&b, `"%s%d":%d.25,`, prefix, i, i)
		}
		return b.String()
	}
	return `{` + filler(size/2-60, "before") + `"vin":"WVWZZZ1JZXW000001","decel":` + decel + `,` + filler(size/2-20, "after") + `"end":true}`
}

func benchmarkSet(b *testing.B, n int, filter func(i int) string) *rules.Set {
	texts := []string{"destinations: {d: {url: 'http://127.0.0.1/'}}\n"}
	for i := range n {
		if i%1000 == 0 {
			texts = append(texts, "rules:\n")
		}
		texts[len(texts)-1] += fmt.Sprintf(`
  - name: rule-%d
    sql: SELECT payload.vin AS vin, payload.decel AS decel, clientid, timestamp FROM "%s" WHERE payload.decel >= 6.5
    actions:
      - {http: d, body: {event: hard-brake, vin: "${vin}", decel: "${decel}", text: "${vin} braked at ${decel} m/s2"}}
`, i, filter(i))
	}
	set, problems := rules.BuildText(texts...)
	if set == nil {
		b.Fatal(problems[0])
	}
	return set
}

// BenchmarkMatch is what a publish costs: the candidates of its topic, WHERE, and
// the row and body of those that fire.
func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		set := manyRules(b, n)
		for _, size := range []int{256, 4096} {
			for _, fires := range []bool{true, false} {
				name := fmt.Sprintf("rules=%d/payload=%d/fires=%t", n, size, fires)
				b.Run(name, func(b *testing.B) { benchmarkMatch(b, set, "fleet/v7/telemetry", size, fires, 1) })
			}
		}
	}
	same := benchmarkSet(b, 100, func(int) string { return "fleet/+/telemetry" })
	for _, size := range []int{256, 4096} {
		for _, fires := range []bool{true, false} {
			name := fmt.Sprintf("same-topic=100/payload=%d/fires=%t", size, fires)
			b.Run(name, func(b *testing.B) { benchmarkMatch(b, same, "fleet/v7/telemetry", size, fires, 100) })
		}
	}
}

// manyRules is n rules of which one has a filter that matches fleet/v7/telemetry.
func manyRules(b *testing.B, n int) *rules.Set {
	return benchmarkSet(b, n, func(i int) string {
		if i == 0 {
			return "fleet/+/telemetry"
		}
		return fmt.Sprintf("fleet/v%d/events/%d/+", i, i)
	})
}

func benchmarkMatch(b *testing.B, set *rules.Set, topic string, size int, fires bool, want int) {
	decel := "2.5"
	if fires {
		decel = "7.1"
	} else {
		want = 0
	}
	m := message(topic, payloadOf(size, decel))
	var cands []*rules.Rule
	b.ReportAllocs()
	for b.Loop() {
		cands = set.Candidates(cands[:0], topic)
		if got := set.Run(cands, m, nil).Matches; len(got) != want {
			b.Fatalf("%d matches, want %d", len(got), want)
		}
	}
}
