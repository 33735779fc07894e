package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// ruleFile is a set with the statements given, each with the actions given.
func ruleFile(actions string, statements ...string) string {
	var b strings.Builder
	b.WriteString("destinations: {a: {url: 'http://127.0.0.1/'}, b: {url: 'http://127.0.0.1/', ordered: false}}\nrules:\n")
	for i, sql := range statements {
		fmt.Fprintf(&b, "  - name: r%d\n    sql: >-\n      %s\n    actions: %s\n", i, sql, actions)
	}
	return b.String()
}

// integers is a JSON list of n integers from 1.
func integers(n int) string {
	elems := make([]string, n)
	for i := range elems {
		elems[i] = fmt.Sprint(i + 1)
	}
	return "[" + strings.Join(elems, ",") + "]"
}

func counts(r *rules.Rule) string {
	var counted []string
	r.Outcomes().Each(func(o rules.Outcome, n uint64) {
		if n > 0 {
			counted = append(counted, fmt.Sprintf("%s=%d", o, n))
		}
	})
	return strings.Join(counted, " ")
}

// TestRowsOwe: rows in order, and within a row the actions in order.
func TestRowsOwe(t *testing.T) {
	set := load(t, ruleFile(`[{http: a, id: "${n}-${x}", body: {x: "${x}"}}, {http: b}]`,
		`FOREACH payload.n AS n, payload.l AS e DO n, e AS x INCASE e <> 2 FROM "t"`))
	got := match(set, message("t", `{"n":"N","l":[1,2,3]}`))
	want := []rules.Delivery{
		{Destination: "a", ID: "N-1", Lane: "v7", Ordered: true, Body: []byte(`{"x":1}`)},
		{Destination: "b", Body: []byte(`{"n":"N","x":1}`)},
		{Destination: "a", ID: "N-3", Lane: "v7", Ordered: true, Body: []byte(`{"x":3}`)},
		{Destination: "b", Body: []byte(`{"n":"N","x":3}`)},
	}
	if len(got) != 1 || got[0].Rows != 2 {
		t.Fatalf("matches %+v, want one of 2 rows", got)
	}
	if diff := cmp.Diff(want, got[0].Deliveries); diff != "" {
		t.Errorf("deliveries, -want +got\n%s", diff)
	}
}

// TestRowsOutcome: what one message counts, and how many rows it has.
func TestRowsOutcome(t *testing.T) {
	tests := []struct {
		name, sql, payload string
		rows               int
		counts             string
	}{
		{"matched once, whatever the rows", `FOREACH payload.l FROM "t"`, `{"l":[1,2,3]}`, 3, "matched=1"},
		{"no list", `FOREACH payload.l FROM "t"`, `{"l":7}`, 0, "no_match=1"},
		{"no such list", `FOREACH payload.l FROM "t"`, `{}`, 0, "no_match=1"},
		{"empty", `FOREACH payload.l FROM "t"`, `{"l":[]}`, 0, "no_match=1"},
		{"none survives", `FOREACH payload.l INCASE item > 3 FROM "t"`, `{"l":[1,2,3]}`, 0, "no_match=1"},
		{"WHERE", `FOREACH payload.l FROM "t" WHERE payload.l[1] = 2`, `{"l":[1,2,3]}`, 0, "no_match=1"},
		{"an error in a helper", `FOREACH 1 div payload.z AS h, payload.l FROM "t" WHERE false`, `{"z":0,"l":[]}`, 0, "bad_argument=1"},
		{"an error at the last element", `FOREACH payload.l DO 6 div item AS x, payload.nope AS y FROM "t"`, `{"l":[1,2,0]}`, 0, "bad_argument=1"},
		{"an error in INCASE", `FOREACH payload.l INCASE 6 div item > 0 FROM "t"`, `{"l":[1,2,0]}`, 0, "bad_argument=1"},
		{"no JSON", `FOREACH payload.l FROM "t" WHERE false`, `x`, 0, "payload_not_json=1"},
		{"payload that is no JSON", `FOREACH payload FROM "t" WHERE false`, `x`, 0, "payload_not_json=1"},
		{"mismatch at several elements", `FOREACH payload.l INCASE item > 'x' FROM "t"`, `{"l":[1,2]}`, 0, "no_match=1 type_mismatch=1"},
		{"undefined at several elements", `FOREACH payload.l DO payload.nope AS x FROM "t"`, `{"l":[1,2]}`, 2, "matched=1 undefined_in_body=1"},
		{"as many as may be", `FOREACH payload.l FROM "t"`, `{"l":` + integers(rules.MaxRows) + `}`, rules.MaxRows, "matched=1"},
		{"one more", `FOREACH payload.l FROM "t"`, `{"l":` + integers(rules.MaxRows+1) + `}`, 0, "too_many_rows=1"},
		{"INCASE before they are counted", `FOREACH payload.l INCASE item > 10000 FROM "t"`, `{"l":` + integers(10_010) + `}`, 10, "matched=1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, ruleFile(`[{http: a, body: {x: "${x}"}}]`, tt.sql))
			rows := 0
			for _, m := range match(set, message("t", tt.payload)) {
				rows += m.Rows
				if len(m.Deliveries) != m.Rows {
					t.Errorf("%d deliveries of %d rows", len(m.Deliveries), m.Rows)
				}
			}
			got := strings.TrimSuffix(counts(set.Rules()[0]), " undefined_in_body=1")
			if strings.Contains(tt.sql, "nope") {
				got = counts(set.Rules()[0])
			}
			if rows != tt.rows || got != tt.counts {
				t.Errorf("%d rows, %s, want %d, %s", rows, got, tt.rows, tt.counts)
			}
		})
	}
}

// TestMaxRowsOfAllRules: a rule that would be too much fails alone, and what comes
// after it may still fit.
func TestMaxRowsOfAllRules(t *testing.T) {
	set := load(t, ruleFile(`[{http: a}]`,
		`FOREACH payload.l DO item FROM "t"`, `FOREACH payload.l DO item FROM "t"`, `SELECT qos FROM "t"`, `FOREACH payload.l DO item FROM "t" WHERE false`))
	got := map[string]int{}
	for _, m := range match(set, message("t", `{"l":`+integers(600)+`}`)) {
		got[m.Rule.Name] = m.Rows
	}
	if diff := cmp.Diff(map[string]int{"r0": 600, "r2": 1}, got); diff != "" {
		t.Errorf("rows, -want +got\n%s", diff)
	}
	for i, want := range []string{"matched=1", "too_many_rows=1", "matched=1", "no_match=1"} {
		if got := counts(set.Rules()[i]); got != want {
			t.Errorf("rule %d: %s, want %s", i, got, want)
		}
	}
}

// TestNoMatchAllocatesNothing: neither a SELECT nor a FOREACH that has no row.
func TestNoMatchAllocatesNothing(t *testing.T) {
	for _, sql := range []string{
		`SELECT payload.a AS a, payload.b AS b FROM "t" WHERE payload.n > 1 AND payload.s = 'x'`,
		`FOREACH payload.s AS s, payload.l AS e DO e FROM "t" WHERE payload.n > 1`,
		`FOREACH payload.s AS s, payload.l AS e DO e.x AS x, s INCASE e.x > 5 AND s = 'y' FROM "t"`,
	} {
		run := rules.Runner(sql, message("t", `{"n":1,"s":"y","l":[{"x":1},{"x":2},{"x":3,"y":[4]}]}`))
		if n := testing.AllocsPerRun(100, func() {
			if run() != 0 {
				t.Fatal("it matched")
			}
		}); n >= 1 {
			t.Errorf("%s: %v allocations", sql, n)
		}
	}
}

// TestLongList: an element costs the same in a list of any length, whatever else
// of the payload is read beside it.
func TestLongList(t *testing.T) {
	const n = 200_000
	set := load(t, ruleFile(`[{http: a}]`, `FOREACH payload.l AS e DO e.x[1] AS x INCASE e.x[1] = payload.want.x AND e.y.z = payload.want.y FROM "t"`))
	payload := `{"l":[` + strings.Repeat(`{"x":[1],"y":{"z":2}},`, n) + `{"x":[7],"y":{"z":8}}],"want":{"x":7,"y":8}}`
	got := match(set, message("t", payload))
	if len(got) != 1 || string(got[0].Deliveries[0].Body) != `{"x":7}` {
		t.Errorf("matches %+v, want the last element", got)
	}
}

// TestBuiltTooMuch: what a few words of a statement multiply ends in an error, and
// takes neither time nor memory.
func TestBuiltTooMuch(t *testing.T) {
	times := func(n int, s string) string { return strings.Repeat(s, n) }
	tests := []struct{ name, sql string }{
		{"lists of lists", `SELECT payload.a AS a` + times(40, `, [a, a] AS a`) + ` FROM "t"`},
		{"lists in one expression", `SELECT payload.a AS a, ` + times(40, `[a, [`) + `a` + times(40, `]]`) + ` AS b` + times(40, `, [b, b, b, b] AS b`) + ` FROM "t"`},
		{"text that is joined", `SELECT payload.a AS a` + times(40, `, a + a AS a`) + ` FROM "t"`},
		{"maps of maps", `SELECT payload.a AS m.a` + times(40, `, m AS m.b, m AS m.c`) + ` FROM "t"`},
		{"maps that functions make", `SELECT map_put('a', payload.a, map_new()) AS a` + times(40, `, map_put('x', a, map_put('y', a, map_new())) AS a`) + ` FROM "t"`},
		{"in WHERE", `SELECT payload.a AS a` + times(40, `, [a, a] AS a`) + ` FROM "t" WHERE a = a`},
		{"in helpers", `FOREACH payload.a AS a` + times(40, `, [a, a] AS a`) + `, payload.l AS e FROM "t"`},
		{"rows", `FOREACH payload.l AS e DO *, payload.l AS l1, payload.l AS l2, payload.l AS l3` + times(30, `, payload`) + ` FROM "t"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, ruleFile(`[{http: a, body: {x: 1}}]`, tt.sql))
			if got := match(set, message("t", `{"a":"0123456789","l":`+integers(1000)+`}`)); len(got) != 0 {
				t.Error("it matched")
			}
			if got := counts(set.Rules()[0]); got != "bad_argument=1" {
				t.Errorf("counted %s", got)
			}
		})
	}
}
