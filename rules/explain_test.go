package rules_test

import (
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

var random = regexp.MustCompile(`random\(|uuid_v4`)

// TestExplainVectors: for every vector an explanation says what running it does, rows
// and errors included.
func TestExplainVectors(t *testing.T) {
	paths, err := filepath.Glob("testdata/vectors/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range paths {
		for _, v := range readVectors(t, path).Vectors {
			if random.MatchString(v.statement()) {
				continue
			}
			n++
			if run, told := rules.RunAndExplain(v.statement(), []byte(v.event())); run != told {
				t.Errorf("%s: %s\n run %s\ntold %s", path, v.statement(), run, told)
			}
		}
	}
	if n < minVectors {
		t.Errorf("%d vectors, want at least %d", n, minVectors)
	}
}

// FuzzExplain is TestExplainVectors for any statement and payload.
func FuzzExplain(f *testing.F) {
	for _, sql := range []string{
		`SELECT payload.a.b AS x, * FROM "#" WHERE (payload.a = 1 OR NOT payload.b > '2') AND x IN (1, '2') AND (1 + 2) * payload.c > 3`,
		`FOREACH payload.l AS e DO e.a AS a, CASE WHEN e.a = 1 THEN e.b ELSE 1 div e.c END AS b INCASE e.a > 1 OR e.x[payload.n] = 'y' FROM "#" WHERE e <> payload.m`,
		`SELECT 1 AS x FROM "#" WHERE payload.a AND upper(payload.b) = "C" AND topic =~ '#' AND payload.l[-1] != null()`,
	} {
		f.Add(sql, `{"a":{"b":"x"},"b":"3","c":[1],"l":[{"a":1},{"a":2,"b":null,"c":0}],"n":1}`)
		f.Add(sql, `{"a":`)
	}
	f.Fuzz(func(t *testing.T, sql, payload string) {
		if random.MatchString(sql) {
			return
		}
		text, err := json.Marshal(payload)
		if err != nil {
			t.Fatal(err)
		}
		if run, told := rules.RunAndExplain(sql, []byte(`{"topic":"t","qos":1,"payload":`+string(text)+`}`)); run != told {
			t.Errorf("%s\n run %s\ntold %s", sql, run, told)
		}
	})
}

// TestReasons: the first reason why a rule did not fire.
func TestReasons(t *testing.T) {
	tests := []struct{ name, statement, payload, want string }{
		{"a comparison", `SELECT 1 AS x FROM "t" WHERE payload.decel >= 6.5`, `{"decel":2}`, `payload.decel >= 6.5 is false (payload.decel = 2)`},
		{"undefined", `SELECT 1 AS x FROM "t" WHERE payload.decel >= 6.5`, `{"desel":7}`, `payload.decel >= 6.5 is false (payload.decel is undefined)`},
		{"the first of AND", `SELECT 1 AS x FROM "t" WHERE payload.a = 1 AND payload.b = 2 AND payload.c = 3`, `{"a":1,"b":1,"c":1}`, `payload.b = 2 is false (payload.b = 1)`},
		{"all of OR", `SELECT 1 AS x FROM "t" WHERE true AND (payload.a = 1 OR payload.b = 2)`, `{"a":2,"b":1}`, `payload.a = 1 OR payload.b = 2 is false (payload.a = 2, payload.b = 1)`},
		{"NOT", `SELECT 1 AS x FROM "t" WHERE NOT (payload.a = 1 AND payload.b = 2)`, `{"a":1,"b":2}`, `NOT (payload.a = 1 AND payload.b = 2) is false (payload.a = 1, payload.b = 2)`},
		{"parentheses", "SELECT 1 AS x FROM \"t\" WHERE (payload.a + 1)\n  * 2 > (3)", `{"a":0}`, `(payload.a + 1) * 2 > (3) is false ((payload.a + 1) * 2 = 2, payload.a + 1 = 1, payload.a = 0)`},
		{"a call", `SELECT 1 AS x FROM "t" WHERE lower(payload.a) = 'x'`, `{"a":"Y"}`, `lower(payload.a) = 'x' is false (lower(payload.a) = "y", payload.a = "Y")`},
		{"no number", `SELECT 1 AS x FROM "t" WHERE payload.a > 1`, `{"a":"many"}`, `payload.a > 1 is false (payload.a = "many"): the string "many" is no number`},
		{"a number in a string", `SELECT 1 AS x FROM "t" WHERE 10 < payload.a`, `{"a":"9"}`, `10 < payload.a is false (payload.a = "9"): the string "9" is compared as a number`},
		{"IN converts nothing", `SELECT 1 AS x FROM "t" WHERE payload.a IN (2, '1')`, `{"a":1}`, `payload.a IN (2, '1') is false (payload.a = 1): IN converts nothing, and an integer is not a string`},
		{"undefined differs from nothing", `SELECT 1 AS x FROM "t" WHERE payload.a <> 1`, `{}`, `payload.a <> 1 is false (payload.a is undefined): undefined differs from nothing`},
		{"no boolean", `SELECT 1 AS x FROM "t" WHERE payload.a`, `{"a":1}`, `payload.a is false (payload.a = 1): it is no boolean`},
		{"a double-quoted value", `SELECT 1 AS x FROM "t" WHERE payload.a = "y"`, `{"a":"y"}`, `payload.a = "y" is false (payload.a = "y", "y" is undefined)`},
		{"an alias", `SELECT payload.a AS a FROM "t" WHERE a = 2`, `{"a":1}`, `a = 2 is false (a = 1)`},
		{"no JSON", `SELECT 1 AS x FROM "t" WHERE payload.a = 1`, `{"a":1,}`, `the payload is not valid JSON (at byte 8: invalid character '}' looking for beginning of object key string), and payload.a reads into it`},
		{"no JSON for SELECT", `SELECT payload.a AS x FROM "t" WHERE qos = 2`, ``, `the payload is not valid JSON (it is empty), and SELECT reads into it`},
		{"a function", `SELECT abs(payload.a) AS x FROM "t"`, `{"a":"x"}`, `abs(payload.a): abs: needs an integer, found "x"`},
		{"division", `SELECT 1 + 1 div payload.a AS x FROM "t"`, `{"a":0}`, `1 div payload.a: division by zero`},
		{"no list", `FOREACH payload.l FROM "t"`, `{"list":[]}`, `FOREACH has no element: payload.l is undefined: payload has no "l"`},
		{"an empty list", `FOREACH payload.l FROM "t"`, `{"l":[]}`, `FOREACH has no element: payload.l is an empty list`},
		{"INCASE", `FOREACH payload.l AS e INCASE e.a > 1 FROM "t"`, `{"l":[{"a":1},{}]}`, `INCASE lets none of the 2 elements through; the first: e.a > 1 is false (e.a = 1)`},
		{"INCASE of one", `FOREACH payload.l AS e INCASE e > 1 FROM "t"`, `{"l":[1]}`, `INCASE lets the only element not through: e > 1 is false (e = 1)`},
		{"WHERE before FOREACH", `FOREACH payload.l AS e FROM "t" WHERE payload.n = 1`, `{"l":[1]}`, `payload.n = 1 is false (payload.n is undefined)`},
		{"too many rows", `FOREACH sublist(1001, payload.l) FROM "t"`, `{"l":[` + zeros + `]}`, `more than 1000 rows`},
		{"another level", `SELECT 1 AS x FROM "a/+/c"`, ``, `FROM does not select topic "t": "a/+/c" wants "a" as level 1, found "t"`},
		{"a longer filter", `SELECT 1 AS x FROM "t/u"`, ``, `FROM does not select topic "t": "t/u" wants "u" as level 2, and the topic ends before`},
		{"an event", `SELECT 1 AS x FROM "$events/client/connected"`, ``, `FROM does not select topic "t": "$events/client/connected" is an event`},
		{"several filters", `SELECT 1 AS x FROM "a", "b"`, ``, `FROM does not select topic "t"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - name: r\n    sql: |\n      "+
				strings.ReplaceAll(tt.statement, "\n", "\n      ")+"\n    actions: [{http: d}]\n")
			got := set.Explain(message("t", tt.payload)).Rules[0]
			if diff := cmp.Diff(tt.want, got.Reason); diff != "" || got.Fired {
				t.Errorf("fired %t, -want +got\n%s", got.Fired, diff)
			}
			if n := len(match(set, message("t", tt.payload))); n != 0 {
				t.Errorf("Run has %d matches", n)
			}
		})
	}
}

var zeros = strings.Repeat("0,", 1001) + "0"
