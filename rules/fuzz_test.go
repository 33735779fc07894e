package rules_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/throughline-mqtt/throughline/rules"
)

// FuzzCompile: any text compiles or is refused, with positions inside it.
func FuzzCompile(f *testing.F) {
	for _, s := range []string{
		`SELECT payload.vin AS vin, *, 'x' y FROM "a/+", b WHERE NOT (a = 1 AND b <> 2.5e3) OR c NOT IN (1, 'x')`,
		`FOREACH payload.l AS e DO e.a[1].b AS c[-1] INCASE e.x > 1 FROM "t"`,
		`SELECT CASE a WHEN 1 THEN [1..2] ELSE a[b.c] END x FROM t -- end`,
		`SELECT ((((`, `SELECT - - 'a`, "SELECT é _x \x00", `SELECT a.1.2 FROM`, `WHERE FROM SELECT`, `SELECT a IN`, "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range rules.CompileText(text) {
			if s[0] < 0 || s[0] > s[1] || s[1] > len(text) {
				t.Errorf("%q: a problem at %v", text, s)
			}
		}
	})
}

// FuzzLoad: any file loads or is refused, with positions inside it, and printing
// the problems writes printable text alone.
func FuzzLoad(f *testing.F) {
	archives, err := filepath.Glob("testdata/problems/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range archives {
		archive, err := txtar.ParseFile(path)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range archive.Files {
			if strings.HasSuffix(file.Name, ".yaml") {
				f.Add(string(file.Data))
			}
		}
	}
	f.Add(hardBrake)
	f.Add("destinations: {d: {url: 'http://h/'}}\nrules: [{name: r, sql: '', actions: [{http: d}]}]")
	f.Add("rules:\r\n- sql: 'a\r\n\r\n  b'")
	f.Add("\ufeffrules:\n\t- {name: a}\x00\xff")
	f.Add("\xff\xfer\x00")
	f.Add("a: &a [*a]\n<<: *a\n---\n? [x]\n: !!str y\n")
	f.Add("rules: [" + strings.Repeat("a,", 300) + "]")
	f.Add("rules: [{sql: \"\\x41\\u00e9\\\n  \\tb\"}]")
	f.Fuzz(func(t *testing.T, text string) {
		set, problems := rules.BuildText(text)
		if (set == nil) != rules.HasErrors(problems) {
			t.Errorf("set %v, problems %v", set, problems)
		}
		lines := 1 + strings.Count(strings.NewReplacer("\r\n", "\n", "\r", "\n", "\u0085", "\n", "\u2028", "\n", "\u2029", "\n").Replace(text), "\n")
		for _, p := range problems {
			if p.Line > lines || p.Line < 1 || p.Col < 1 || p.Width < 1 || p.Source != "" && p.Col+p.Width > utf8.RuneCountInString(p.Source)+2 || p.Name == "" || p.Message == "" {
				t.Errorf("bad problem %+v", p)
			}
		}
		var b strings.Builder
		if err := rules.Print(&b, problems); err != nil {
			t.Fatal(err)
		}
		if strings.ContainsAny(b.String(), "\x1b\r\x00\t") {
			t.Errorf("printed control characters: %q", b.String())
		}
	})
}

// FuzzMatch: whatever the payload, matching does not panic and every body is
// valid JSON and UTF-8.
func FuzzMatch(f *testing.F) {
	for _, s := range []string{
		telemetry, ``, `null`, `[]`, `[[1],{"a":{"b":"{\"c\":[1]}"}}]`, `{"a":1e999,"b":-0,"c":1.0e-7}`, `{"a":"\ud800","\u0062":2}`, "{\"a\":\"\xff\"}",
		`[{"b":[1,{"c":2}]},3,[4]]`, `{"l":[{"b":[{"c":1}]},{"b":1},2,"{\"b\":3}"],"a":1,"b":-1}`,
		`{"a":123456789012345678901234567890,"b":"12x","l":[[[]]]}`, ` {"a" : [ 1 , 2 ] , "a" : { } } `,
	} {
		f.Add([]byte(s))
	}
	path := filepath.Join(f.TempDir(), "rules.yaml")
	text := `
destinations: {d: {url: "http://127.0.0.1/"}}
rules:
  - name: row
    sql: SELECT *, payload.a.b.c[1] AS x, payload.l, payload.a + 'x' AS s FROM "t" WHERE payload.a > payload.b OR NOT payload.a = 1 OR true
    actions: [{http: d}]
  - name: body
    sql: SELECT payload, payload.a AS a, payload.b AS b, a.b.c AS c, 1 AS payload.a.z FROM "t"
    actions: [{http: d, id: "${a}", body: {a: "${a}", t: "${a} ${b}", p: "${payload.a}", l: ["${c}", {x: "${b.c}"}], r: "${.}"}}]
  - name: elements
    sql: FOREACH payload.a AS a, coalesce(payload.l, payload) AS e DO e, e.b[payload.b].c AS c, a + '' AS s, e[a] AS n, 'x' AS e.b[a] INCASE e <> payload.b OR NOT e.b FROM "t"
    actions: [{http: d}, {http: d, id: "${s}", body: {e: "${e}", c: ["${c}"]}}]
  - name: payload
    sql: FOREACH payload FROM "t"
    actions: [{http: d}]
  - name: ranges
    sql: SELECT payload.l[-2..2] AS r, payload.l[2..9] AS s, r[payload.b] AS x, payload AS p, 1 AS p[payload.b].z FROM "t"
    actions: [{http: d}]
  - name: arithmetic
    sql: SELECT payload.a * payload.a AS x, payload.a div payload.b AS y, str(payload.a) AS z, int(payload.b) AS i FROM "t" WHERE x IN (1, payload.a) OR x != y
    actions: [{http: d}]
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		f.Fatal(err)
	}
	set, problems := rules.Load([]string{path}, rules.LoadOptions{})
	if set == nil {
		f.Fatal(problems)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		before := slices.Clone(payload)
		matches := match(set, &rules.Message{Topic: "t", Payload: payload})
		if string(before) != string(payload) {
			t.Error("the payload was changed")
		}
		for _, m := range matches {
			for _, d := range m.Deliveries {
				if !json.Valid(d.Body) || !utf8.Valid(d.Body) {
					t.Errorf("payload %q, rule %s: body %q", payload, m.Rule.Name, d.Body)
				}
			}
		}
	})
}

// FuzzOrder: nobody can tell that WHERE ran before SELECT.
func FuzzOrder(f *testing.F) {
	statements := []string{
		`SELECT payload.a AS x, clientid FROM "t" WHERE payload.b > 1`,
		`SELECT payload.a, payload.b.c FROM "t" WHERE payload.b.c = 1 AND payload.a.z = 2`,
		`SELECT payload.a AS x FROM "t" WHERE clientid = 'other' AND payload.b = 1`,
		`SELECT clientid FROM "t" WHERE clientid = 'other' AND payload.b = 1`,
		`SELECT *, payload.a[1] AS x FROM "t" WHERE lower(payload.b) = 'x'`,
		`SELECT [payload.a, 'x'] AS x, payload FROM "t" WHERE payload.b IN (1, 'x') OR NOT payload.a`,
		`SELECT payload AS p, p.a AS a, p AS payload FROM "t" WHERE clientid = 'c'`,
	}
	for i := range statements {
		for _, payload := range []string{`{"a":{"z":2},"b":{"c":1}}`, `{"a":[1],"b":"x"}`, `{"b":2}`, `{"b":"12x"}`, `no`} {
			f.Add(i, []byte(payload))
		}
	}
	f.Fuzz(func(t *testing.T, i int, payload []byte) {
		sql := statements[uint(i)%uint(len(statements))]
		whereFirst, ends := rules.BothOrders(sql, payload)
		if !whereFirst || ends[0] != ends[1] {
			t.Errorf("%s on %q, where first %t: %v", sql, payload, whereFirst, ends)
		}
	})
}

// TestOrderThatShows: where WHERE may read an output or SELECT may fail, SELECT
// runs first.
func TestOrderThatShows(t *testing.T) {
	for _, sql := range []string{
		`SELECT payload.a AS x FROM "t" WHERE x > 1`,
		`SELECT payload.a AS payload.b FROM "t" WHERE payload.b > 1`,
		`SELECT payload.a.b FROM "t" WHERE is_map(payload.a)`,
		`SELECT upper(payload.a) AS x FROM "t" WHERE payload.b > 1`,
		`SELECT payload.a > 1 AS x FROM "t" WHERE payload.b > 1`,
		`SELECT '{"x":1}' AS payload, payload.x AS x FROM "t" WHERE clientid = 'c'`,
	} {
		if whereFirst, _ := rules.BothOrders(sql, nil); whereFirst {
			t.Errorf("%s runs WHERE first", sql)
		}
	}
}

// FuzzEval: whatever the line, the answer is one JSON object.
func FuzzEval(f *testing.F) {
	f.Add(`{"sql":"SELECT payload.a AS x FROM \"t\" WHERE x > 1","event":{"payload":"{\"a\":2}"}}`)
	f.Add(`{"sql":"SELECT *","event":{"payload_base64":"/w==","retain":1}}`)
	f.Fuzz(func(t *testing.T, line string) {
		var answer map[string]any
		if err := json.Unmarshal(rules.Eval([]byte(line), nil), &answer); err != nil {
			t.Errorf("%q: %v", line, err)
		}
	})
}

// FuzzIndex compares the topic index with a look at every filter.
func FuzzIndex(f *testing.F) {
	f.Add("a/b\n+/b\n#\na/#\n$SYS/#\n+/+", "a/b")
	f.Add("a/#\na\n+", "a")
	f.Add("/+\n//\n+/\n#", "/")
	f.Add("#\n+/x\n$SYS/+", "$SYS/x")
	f.Fuzz(func(t *testing.T, filters, topic string) {
		if !utf8.ValidString(filters) || strings.ContainsAny(filters, "'\"\r\x00") || len(filters) > 200 {
			t.Skip()
		}
		var b strings.Builder
		b.WriteString("destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n")
		for i, filter := range strings.Split(filters, "\n") {
			sql, _ := json.Marshal(fmt.Sprintf("SELECT * FROM '%s'", filter))
			fmt.Fprintf(&b, "  - {name: r%02d, sql: %s, actions: [{http: d}]}\n", i, sql)
		}
		set, _ := rules.BuildText(b.String())
		if set == nil {
			t.Skip()
		}
		var got, want []string
		for _, r := range set.Candidates(nil, topic) {
			got = append(got, r.Name)
		}
		for _, r := range set.Rules() {
			if rules.MatchFilter(r.Filters()[0], topic) {
				want = append(want, r.Name)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("filters %q, topic %q: got %v, want %v", filters, topic, got, want)
		}
	})
}
