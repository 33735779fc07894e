package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/throughline-mqtt/throughline/rules"
)

// kibibyte is a payload of 1 KiB; what the rules below ask for stands at its end.
func kibibyte() string {
	var b strings.Builder
	b.WriteString(`{"readings":[`)
	for i := 0; b.Len() < 900; i++ {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"t":%d,"v":%d.25}`, 1700000000+i, i)
	}
	b.WriteString(`],"vin":"WVWZZZ1JZXW000001","speed":88,"decel":2.5,"gear":"D","ok":true`)
	b.WriteString(`,"pad":"` + strings.Repeat("x", 1024-b.Len()-len(`,"pad":""}`)) + `"}`)
	return b.String()
}

func kibibyteSet(b *testing.B, where, body string) *rules.Set {
	b.Helper()
	return load(b, `
destinations: {center: {url: "http://127.0.0.1:8080/notify"}}
rules:
  - name: bar
    sql: |
      SELECT payload.vin AS vin, payload.speed AS speed, payload.decel AS decel, payload.gear AS gear, clientid
      FROM "fleet/+/telemetry"
      WHERE `+where+`
    actions:
      - http: center
`+body)
}

// BenchmarkValidate is what it takes to know that 1 KiB is JSON and no more; the two after it are to be seen beside it.
func BenchmarkValidate(b *testing.B) {
	payload := []byte(kibibyte())
	b.SetBytes(int64(len(payload)))
	for b.Loop() {
		if !gjson.ValidBytes(payload) {
			b.Fatal("no JSON")
		}
	}
}

// BenchmarkWhere is a WHERE on two fields of 1 KiB that doesn't match, its validation included.
func BenchmarkWhere(b *testing.B) {
	benchmarkKibibyte(b, kibibyteSet(b, `payload.speed > 80 AND payload.decel >= 6.5`, ""), 0)
}

// BenchmarkSelect is a row of five columns for 1 KiB that matches, and its body.
func BenchmarkSelect(b *testing.B) {
	benchmarkKibibyte(b, kibibyteSet(b, `payload.speed > 80 AND payload.decel >= 2.5`, `        body:
          event: hard-brake
          vin: ${vin}
          speed: ${speed}
          decel: ${decel}
          gear: ${gear}
          vehicle: ${clientid}
`), 1)
}

func benchmarkKibibyte(b *testing.B, set *rules.Set, want int) {
	m := message("fleet/v7/telemetry", kibibyte())
	var cands []*rules.Rule
	b.SetBytes(int64(len(m.Payload)))
	b.ReportAllocs()
	for b.Loop() {
		cands = set.Candidates(cands[:0], m.Topic)
		if got := set.Run(cands, m, nil).Matches; len(got) != want {
			b.Fatalf("%d matches, want %d", len(got), want)
		}
	}
}
