package rules_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// TestFunctionVectors: every function has a vector with an answer for every number
// of arguments that it takes.
func TestFunctionVectors(t *testing.T) {
	paths, err := filepath.Glob("testdata/vectors/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	called := map[string]bool{}
	for _, path := range paths {
		for _, v := range readVectors(t, path).Vectors {
			if v.Value == "" {
				continue
			}
			for _, call := range rules.CallsOf(v.statement()) {
				called[call] = true
			}
		}
	}
	for _, name := range rules.FunctionNames() {
		arity := rules.Arity(name)
		if arity[1] < 0 {
			arity[1] = arity[0] + 2
		}
		for n := arity[0]; n <= arity[1]; n++ {
			if call := fmt.Sprintf("%s/%d", name, n); !called[call] {
				t.Errorf("no vector for %s", call)
			}
		}
	}
}

// TestLocalTime: local is the zone of the clock.
func TestLocalTime(t *testing.T) {
	zone := time.FixedZone("", -(3*3600 + 30*60))
	const line = `{"sql":"SELECT now_rfc3339('millisecond') AS now, unix_ts_to_rfc3339(0) AS at, timezone_to_second('local') AS east, format_date('second', 'local', '%H:%M %z', 0) AS date, date_to_unix_ts('second', 'local', '%Y-%m-%d', '1970-01-01') AS ts FROM \"t\""}`
	const want = `{"matched":true,"rows":[{"now":"2023-11-14T18:43:20.005-03:30","at":"1969-12-31T20:30:00-03:30","east":-12600,"date":"20:30 -0330","ts":12600}]}`
	if got := string(rules.Eval([]byte(line), func() time.Time { return vectorClock.In(zone) })); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestPatternCache: patterns that come from messages do not pile up, and one that is
// thrown away still matches.
func TestPatternCache(t *testing.T) {
	for range 2 {
		for i := range 1000 {
			line := fmt.Sprintf(`{"sql":"SELECT regex_match('n%d', payload) AS x FROM \"t\"","event":{"payload":"^n%d$"}}`, i, i)
			if got, want := string(rules.Eval([]byte(line), nil)), `{"matched":true,"rows":[{"x":true}]}`; got != want {
				t.Fatalf("%s: %s", line, got)
			}
		}
	}
	if n := rules.KeptPatterns(); n > 64 {
		t.Errorf("%d patterns are kept", n)
	}
}

// TestAllMatches: the search ends when it takes too long, and finds all when it does
// not, in however many steps.
func TestAllMatches(t *testing.T) {
	text := strings.Repeat("a", 1<<14)
	if _, err := rules.AllMatches(`a.*b|a`, text, 0); err == nil {
		t.Error("no limit")
	}
	for _, n := range []int{0, 1, 16, 255, 256, 257, 1 << 14} {
		text := strings.Repeat("b", n) + strings.Repeat("c", 1<<14-n)
		if got, err := rules.AllMatches(`b`, text, time.Hour); got != n || err != nil {
			t.Errorf("%d of %d matches, %v", got, n, err)
		}
	}
}

// TestLargePattern: a large constant takes short texts alone, since each byte of a text
// may cost what the pattern has of instructions.
func TestLargePattern(t *testing.T) {
	for _, c := range []struct {
		name, call, payload, want string
	}{
		{"a short text", `regex_match(payload, '(.*a){200}')`, strings.Repeat("a", 1000), `{"matched":true,"rows":[{"x":true}]}`},
		{"a long text", `regex_match(payload, '(.*a){200}')`, strings.Repeat("a", 1<<20), `{"error":"runtime","message":"regex_match: for this pattern a text has at most `},
		{"to replace in", `regex_replace(payload, '(.*a){200}', '')`, strings.Repeat("a", 1<<20), `{"error":"runtime","message":"regex_replace: for this pattern a text has at most `},
		{"a long text, a small pattern", `regex_match(payload, '^(.*a){2}')`, strings.Repeat("a", 1<<20), `{"matched":true,"rows":[{"x":true}]}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			line := fmt.Sprintf(`{"sql":"SELECT %s AS x FROM \"t\"","event":{"payload":"%s"}}`, c.call, c.payload)
			if got := string(rules.Eval([]byte(line), nil)); !strings.HasPrefix(got, c.want) {
				t.Errorf("got %.200s", got)
			}
		})
	}
}

// FuzzFunctions: whatever the arguments, a function answers or fails as a rule
// does, never makes more than it may, and takes a constant as it takes a variable.
func FuzzFunctions(f *testing.F) {
	for i := range rules.FunctionNames() {
		f.Add(uint(i), []byte("\x02{}\x00\x08\x01\x08\x02\x08\x03"))
		f.Add(uint(i), []byte("\x05\xff\xfea\xc3\xa9\x01\x0f\x04\xffab\xc3\x03\x02\x0f\x01,"))
		f.Add(uint(i), []byte("\x00\x02\x0b\x06a,b;%~\xff\x03\x7f\x0b\x02ab\xff\x0b\x03xyz\xff"))
		f.Add(uint(i), []byte("\x00\x01\x0d\x03\x03\x01\x0f\x01a\x01\x0d\x02\x03\x01\x03\x02\x03\x05"))
		f.Add(uint(i), []byte("\x00\x00\x06\xff\xff\xff\xff\xff\xff\xff\x7f\xff\x06\x00\x00\x00\x00\x00\x00\x00\x80\xff\x07\xff\xff\xff\xff\xff\xff\xef\x7f"))
	}
	f.Fuzz(func(t *testing.T, i uint, program []byte) {
		if call, wrong := rules.CheckCall(i, program); wrong != "" {
			t.Errorf("%s: %s", call, wrong)
		}
	})
}
