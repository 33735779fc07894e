package rules_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// owed is the one delivery of a set for a message, nil if its rule failed.
func owed(t *testing.T, set *rules.Set, payload string) *rules.Delivery {
	t.Helper()
	got := match(set, message("t", payload))
	if len(got) == 0 {
		return nil
	}
	if len(got) != 1 || len(got[0].Deliveries) != 1 {
		t.Fatalf("matches %+v", got)
	}
	return &got[0].Deliveries[0]
}

// counted are the outcomes that are not 0.
func counted(set *rules.Set) string {
	var all []string
	set.Rules()[0].Outcomes().Each(func(o rules.Outcome, n uint64) {
		if n > 0 {
			all = append(all, fmt.Sprintf("%s %d", o, n))
		}
	})
	return strings.Join(all, ", ")
}

func destinationSet(t testing.TB, items, destination, action string) *rules.Set {
	t.Helper()
	return load(t, fmt.Sprintf("destinations: {d: {url: 'http://127.0.0.1/base/?key=1'%s}}\nrules:\n  - name: r\n    sql: SELECT %s FROM \"t\"\n    actions: [{http: d%s}]\n", destination, items, action))
}

// TestRawBodies: body_template as EMQX renders it.
func TestRawBodies(t *testing.T) {
	tests := []struct{ name, items, template, payload, want, counts string }{
		{"text", `payload.a AS a`, `a=${a}, ${.a}!`, `{"a":"x"}`, `a=x, x!`, "matched 1"},
		{"nothing is escaped", `payload.a AS a`, `{"a": "${a}"}`, `{"a":"\"\n"}`, "{\"a\": \"\"\n\"}", "matched 1"},
		{"undefined", `payload.a AS a`, `{"a": ${a}, "b": ${b}}`, `{}`, `{"a": undefined, "b": undefined}`, "matched 1, undefined_in_body 1"},
		{"null is null", `payload.a AS a`, `${a}`, `{"a":null}`, `null`, "matched 1"},
		{"only what was selected", `payload`, `${clientid}`, `{}`, `undefined`, "matched 1, undefined_in_body 1"},
		{"the whole row", `payload.a AS a, payload.b AS b`, `${.}`, `{"a":[1]}`, `{"a":[1],"b":"undefined"}`, "matched 1, undefined_in_body 1"},
		{"an empty template is the whole row", `payload.a AS a, payload.b AS b`, ``, `{"a":[1]}`, `{"a":[1],"b":"undefined"}`, "matched 1, undefined_in_body 1"},
		{"a dollar", `payload.a AS a`, `${$}{a} $5 ${$}`, `{}`, `${a} $5 $`, "matched 1"},
		{"what is no variable stays", `payload.a AS a`, `${a-b} ${a[1]} ${} ${ a } ${x ${a} ${`, `{"a":1}`, `${a-b} ${a[1]} ${} ${ a } ${x 1 ${`, "matched 1"},
		{"floats have ten decimals", `1/3 AS a, 1.50 AS b, 2.0 AS c, 100000000000000000000.5 AS d`, `${a} ${b} ${c} ${d}`, `{}`, `0.3333333333 1.5 2.0 100000000000000000000.0`, "matched 1"},
		{"integers are exact", `payload.a AS a`, `${a}`, `{"a":123456789012345678901234567890}`, `123456789012345678901234567890`, "matched 1"},
		{"booleans", `payload.a AS a`, `${a}`, `{"a":true}`, `true`, "matched 1"},
		{"maps are JSON", `payload.a AS a`, `${a}`, `{"a":{"b":[72,105]}}`, `{"b":[72,105]}`, "matched 1"},
		{"code points are text", `payload.a AS a`, `${a}`, `{"a":[72,105,8364]}`, "Hi\u20ac", "matched 1"},
		{"other lists are JSON", `payload.a AS a`, `${a}`, `{"a":[72,1]}`, `[72,1]`, "matched 1"},
		{"lists of text are JSON", `payload.a AS a`, `${a}`, `{"a":["H","i"]}`, `["H","i"]`, "matched 1"},
		{"text is read into", `payload`, `${payload.a.b}`, `{"a":{"b":1}}`, `1`, "matched 1"},
		{"text in text is not", `payload`, `${payload.a.b}`, `{"a":"{\"b\":1}"}`, `undefined`, "matched 1, undefined_in_body 1"},
		{"bytes are kept", `payload`, `${payload}`, "\xff\x00", "\xff\x00", "matched 1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text, _ := json.Marshal(tt.template)
			set := destinationSet(t, tt.items, "", ", body_template: "+string(text))
			d := owed(t, set, tt.payload)
			if d == nil || string(d.Body) != tt.want {
				t.Errorf("got %+v, want body %q", d, tt.want)
			}
			if got := counted(set); got != tt.counts {
				t.Errorf("counted %s, want %s", got, tt.counts)
			}
		})
	}
}

// TestRequests: what of a request depends on the row, beside its body.
func TestRequests(t *testing.T) {
	const failed = "render_failed 1"
	tests := []struct{ name, destination, payload, want, counts string }{
		{"path", `path: "/v/${a}/x"`, `{"a":"V7"}`, `/v/V7/x`, ""},
		{"path without a slash", `path: "${a}/x/"`, `{"a":"V7"}`, `/V7/x/`, ""},
		{"path in parts", `path: "/v-${a}.${b};x=%20${$}"`, `{"a":1,"b":2.5}`, `/v-1.2.5;x=%20$`, ""},
		{"path is escaped", `path: "/${a}"`, `{"a":"a/b?c#d%e é;\r\n"}`, `/a%2Fb%3Fc%23d%25e%20%C3%A9%3B%0D%0A`, ""},
		{"undefined in a path", `path: "/${a}"`, `{}`, `/undefined`, "matched 1, undefined_in_body 1"},
		{"a segment that climbs", `path: "/${a}/x"`, `{"a":".."}`, ``, failed},
		{"a segment that stays", `path: "/x/${a}"`, `{"a":"."}`, ``, failed},
		{"parts that climb together", `path: "/${a}${b}/x"`, `{"a":".","b":"."}`, ``, failed},
		{"text that climbs together with them", `path: "/%2e${a}/x"`, `{"a":"."}`, ``, failed},
		{"a slash that would climb once unescaped", `path: "/${a}/x"`, `{"a":"v7/../../admin"}`, ``, failed},
		{"and a backslash", `path: "/${a}/x"`, `{"a":"v7\\..\\admin"}`, ``, failed},
		{"parameters that a server takes off", `path: "/${a};v=1/x"`, `{"a":".."}`, ``, failed},
		{"parameters of its own", `path: "/${a}/x"`, `{"a":"..;v=1"}`, ``, failed},
		{"nothing but parameters", `path: "/${a};v=1/x"`, `{"a":""}`, ``, failed},
		{"parameters behind a name", `path: "/${a};v=1/x"`, `{"a":"v7;..;"}`, `/v7%3B..%3B;v=1/x`, ""},
		{"an empty segment", `path: "/${a}/x"`, `{"a":""}`, ``, failed},
		{"a segment of slashes", `path: "/${a}/x"`, `{"a":"//"}`, ``, failed},
		{"points that do not climb", `path: "/${a}/x"`, `{"a":"..."}`, `/.../x`, ""},
		{"escapes that would climb once unescaped twice", `path: "/${a}/x"`, `{"a":"%2e%2e"}`, `/%252e%252e/x`, ""},
		{"query", `query: {b: "${b}", a: "x${a}"}`, `{"a":"1&2=3 é+","b":7}`, `?b=7&a=x1%262%3D3+%C3%A9%2B`, ""},
		{"undefined in a query", `query: {a: "x${a}", b: "${b}"}`, `{"b":""}`, `?b=`, "matched 1, undefined_in_body 1"},
		{"headers", `headers: {X-Vin: "v ${a}", x-b: "${b}"}`, `{"a":"é\t7","b":{"c":1}}`, "\nX-Vin: v é\t7\nX-B: {\"c\":1}", ""},
		{"undefined in a header", `headers: {X-Vin: "v ${a}"}`, `{}`, ``, "matched 1, undefined_in_body 1"},
		{"line feed", `headers: {X-Vin: "${a}", X-B: "${b}"}`, `{"a":"x\nSet-Cookie: y","b":1}`, "\nX-B: 1 left out X-Vin", "matched 1, header_left_out 1"},
		{"carriage return", `headers: {X-Vin: "${a}"}`, `{"a":"\r"}`, " left out X-Vin", "matched 1, header_left_out 1"},
		{"NUL", `headers: {X-Vin: "${a}"}`, `{"a":"\u0000"}`, " left out X-Vin", "matched 1, header_left_out 1"},
		{"another control character", `headers: {X-Vin: "${a}"}`, `{"a":"\u007f"}`, " left out X-Vin", "matched 1, header_left_out 1"},
		{"secrets are not stored", `headers: {X-Key: "${env:A_KEY}-${a}-${env:B_KEY}"}`, `{"a":"V7"}`, "\nX-Key: \x00-V7-\x00", ""},
		{"a NUL is no place for a secret", `headers: {X-Key: "${a}${env:A_KEY}"}`, `{"a":"\u0000"}`, " left out X-Key", "matched 1, header_left_out 1"},
		{"as long as may be", `path: "/${a}"`, `{"a":"` + strings.Repeat("x", 8191) + `"}`, "/" + strings.Repeat("x", 8191), ""},
		{"a path that is too long", `path: "/${a}"`, `{"a":"` + strings.Repeat("x", 8192) + `"}`, "", failed},
		{"a path that is too long once it is escaped", `path: "/${a}"`, `{"a":"` + strings.Repeat(" ", 3000) + `"}`, "", failed},
		{"path and query that are too long together", `path: "/${a}", query: {a: "${a}"}`, `{"a":"` + strings.Repeat("x", 4095) + `"}`, "", failed},
		{"a query that is too long", `query: {a: "${a}", b: "${a}"}`, `{"a":"` + strings.Repeat("x", 8193) + `"}`, "", failed},
		{"a header that is too long", `headers: {X-A: "${a}"}`, `{"a":"` + strings.Repeat("x", 8193) + `"}`, "", failed},
	}
	t.Setenv("A_KEY", "hunter2")
	t.Setenv("B_KEY", "hunter3")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := destinationSet(t, "payload.a AS a, payload.b AS b", ", "+tt.destination, ", body: {x: 1}")
			d := owed(t, set, tt.payload)
			got := ""
			if d != nil {
				got = d.Path
				if d.Query != "" {
					got += "?" + d.Query
				}
				for _, h := range d.Headers {
					got += "\n" + h.Name + ": " + h.Value
				}
				for _, name := range d.LeftOut {
					got += " left out " + name
				}
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			want := tt.counts
			if want == "" {
				want = "matched 1"
			}
			if failed := d == nil; failed != (want == "render_failed 1") || counted(set) != want {
				t.Errorf("counted %s, want %s", counted(set), want)
			}
		})
	}
}

// TestFixedTargets: what depends on no message is a part of the url, and costs deliveries nothing.
func TestFixedTargets(t *testing.T) {
	t.Setenv("A_KEY", "hunter2")
	tests := []struct{ name, destination, want string }{
		{"path", `path: /v7/x`, "http://127.0.0.1/base/v7/x?key=1"},
		{"path without a slash", `path: v7`, "http://127.0.0.1/base/v7?key=1"},
		{"path with a literal dollar", `path: "/${$}x"`, "http://127.0.0.1/base/$x?key=1"},
		{"query", `query: {a: "x y", "b&": 7}`, "http://127.0.0.1/base/?key=1&a=x+y&b%26=7"},
		{"query beside a path that depends", `path: "/${a}", query: {a: 1}`, "http://127.0.0.1/base/?key=1&a=1"},
		{"path beside a query that depends", `path: "/x", query: {a: "${a}", b: 2}`, "http://127.0.0.1/base/x?key=1&b=2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := destinationSet(t, "payload.a AS a", ", "+tt.destination, "")
			if got := set.Destinations()[0].URL; got != tt.want {
				t.Errorf("url %s, want %s", got, tt.want)
			}
			if rendered := set.Destinations()[0].Rendered; rendered != strings.Contains(tt.destination, "${a}") {
				t.Errorf("rendered %t", rendered)
			}
			if d := owed(t, set, `{"a":1}`); !strings.Contains(tt.destination, "${a}") && d.Path+d.Query != "" {
				t.Errorf("delivery %+v", d)
			}
		})
	}
	set := destinationSet(t, "1 AS a", `, headers: {X-A: "k ${env:A_KEY}", X-B: "${a} ${env:A_KEY}", X-C: "${$}{a}"}`, "")
	var got []string
	for _, h := range set.Destinations()[0].Headers {
		got = append(got, fmt.Sprintf("%s %s %t %d", h.Name, h.Value.Reveal(), h.Rendered, len(h.Secrets)))
	}
	if diff := cmp.Diff([]string{"X-A k hunter2 false 1", "X-B  true 1", "X-C ${a} false 0"}, got); diff != "" {
		t.Errorf("headers, -want +got\n%s", diff)
	}
}

// TestRefusalsOfRequests: what could not be rendered is told, but not what it was.
func TestRefusalsOfRequests(t *testing.T) {
	set := destinationSet(t, "payload.a AS a, payload.b AS b", `, path: "/${a}", headers: {X-B: "${b}"}`, "")
	tests := []struct {
		payload, want string
		why           rules.Outcome
	}{
		{`{"a":"..","b":"secret"}`, `a segment of the path for destination "d" is empty or climbs`, rules.RenderFailed},
		{`{"a":"secret","b":"secret\n"}`, `header X-B for destination "d" holds a line break or another control character`, rules.HeaderLeftOut},
	}
	for _, tt := range tests {
		m := message("t", tt.payload)
		refused := set.Run(set.Candidates(nil, m.Topic), m, nil).Refused
		if len(refused) != 1 || refused[0].Why != tt.why || refused[0].Text != tt.want || refused[0].Rule.Name != "r" {
			t.Errorf("%s: refused %+v", tt.payload, refused)
		}
	}
}

// TestPayloadBound: a message that would be too long is not published, and the rule's
// deliveries are made.
func TestPayloadBound(t *testing.T) {
	text := strings.Repeat("${a}", 9)
	set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - name: r\n    sql: SELECT payload.a AS a FROM \"t\"\n    actions: "+
		`[{republish: {topic: x, payload_template: "`+text+`"}}, {republish: {topic: "`+text+`"}}, {republish: {topic: x, payload: "`+text+`"}}, {http: d}]`+"\n")
	m := message("t", `{"a":"`+strings.Repeat("x", 1<<20)+`"}`)
	chain := set.Run(set.Candidates(nil, m.Topic), m, nil)
	if len(chain.Published) != 0 || len(chain.Matches) != 1 || len(chain.Matches[0].Deliveries) != 1 || counted(set) != "matched 1, not_republished 3" {
		t.Errorf("%d published, matches %d, counted %s", len(chain.Published), len(chain.Matches), counted(set))
	}
}

// TestBodiesBound: all bodies for a message are bounded together, whatever rows and
// rules there are; what does not fit fails as a whole, and takes no room.
func TestBodiesBound(t *testing.T) {
	set := load(t, `
destinations: {d: {url: "http://127.0.0.1/"}}
rules:
  - {name: a, sql: 'FOREACH payload.n AS n DO payload.a AS a FROM "t"', actions: [{http: d}]}
  - {name: b, sql: 'SELECT payload.a AS a FROM "t"', actions: [{http: d}]}
`)
	for rows, want := range map[int]int{40: 41, 63: 64, 64: 64, 65: 1} {
		m := message("t", fmt.Sprintf(`{"n":[1%s],"a":"%s"}`, strings.Repeat(",1", rows-1), strings.Repeat("x", 1<<20-10)))
		n := 0
		for _, m := range set.Run(set.Candidates(nil, m.Topic), m, nil).Matches {
			n += len(m.Deliveries)
		}
		if n != want {
			t.Errorf("%d rows: %d deliveries, want %d", rows, n, want)
		}
	}
}

// TestRequestsBound: what is rendered beside the bodies is in the same bound.
func TestRequestsBound(t *testing.T) {
	headers := ""
	for n := range 10 {
		headers += fmt.Sprintf("X-%d: '${a}', ", n)
	}
	set := load(t, fmt.Sprintf(`
destinations: {d: {url: "http://127.0.0.1/", path: "/${a}", headers: {%s}}}
rules:
  - {name: a, sql: 'FOREACH payload.n AS n DO payload.a AS a FROM "t"', actions: [{http: d, body: {}}]}
`, strings.TrimSuffix(headers, ", ")))
	for rows, want := range map[int]int{700: 700, 900: 0} {
		m := message("t", fmt.Sprintf(`{"n":[1%s],"a":"%s"}`, strings.Repeat(",1", rows-1), strings.Repeat("x", 8000)))
		n := 0
		for _, m := range set.Run(set.Candidates(nil, m.Topic), m, nil).Matches {
			n += len(m.Deliveries)
		}
		if n != want {
			t.Errorf("%d rows: %d deliveries, want %d", rows, n, want)
		}
	}
}

// TestBodyBound: nothing that is rendered is cut: the rule fails, and no other delivery
// of it is made either.
func TestBodyBound(t *testing.T) {
	const bound = 8 << 20
	megabyte := `{"a":"` + strings.Repeat("x", 1<<20) + `"}`
	for name, body := range map[string]string{
		"row":      ``,
		"raw":      `, body_template: '` + strings.Repeat("${a}", 9) + `'`,
		"text":     `, body: {t: "` + strings.Repeat("${a}", 9) + `"}`,
		"members":  `, body: {` + strings.TrimSuffix(strings.Repeat("k%d: '${a}', ", 9), ", ") + `}`,
		"elements": `, body: [` + strings.TrimSuffix(strings.Repeat("'${a}', ", 9), ", ") + `]`,
		"variable": `, body: "${.}"`,
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(body, "%d") {
				body = fmt.Sprintf(body, 1, 2, 3, 4, 5, 6, 7, 8, 9)
			}
			items := "payload.a AS a"
			if name == "row" || name == "variable" {
				items = "payload.a AS a"
				for i := range 8 {
					items += fmt.Sprintf(", payload.a AS a%d", i)
				}
			}
			set := destinationSet(t, items, "", "}, {http: d"+body)
			if got := match(set, message("t", megabyte)); len(got) != 0 || counted(set) != "render_failed 1" {
				t.Errorf("%d matches, counted %s", len(got), counted(set))
			}
			if got := match(set, message("t", `{"a":"x"}`)); len(got) != 1 || len(got[0].Deliveries) != 2 {
				t.Errorf("the next message: %+v", got)
			}
		})
	}
	set := destinationSet(t, "payload.a AS a", "", `, body_template: '${a}'`)
	if d := owed(t, set, `{"a":"`+strings.Repeat("x", bound)+`"}`); d == nil || len(d.Body) != bound {
		t.Errorf("a body as long as may be: %s", counted(set))
	}
}

// FuzzRequest: whatever the values, a structured body is JSON, a header has no line
// break, and neither segments nor hosts are more or others than in the definition.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{"V7", "..", "%2e%2e/", "a/../b", "\\..\\", "//evil.example", "@evil.example:80", "?x#y", "\r\nX: y", "\x00", "\xff", "\u2028\u2025", "..;/"} {
		f.Add(s, ".", []byte(`{"a":1}`))
	}
	f.Add("", "", []byte(`{"a":[72,105]}`))
	f.Setenv("A_KEY", "hunter2")
	set := destinationSet(f, "payload.a AS a, payload.b AS b, payload.j AS j",
		`, path: "/v/${a}/${j}.${b}/end", query: {q: "${a}", r: "x${j}${b}"}, headers: {X-A: "${a}", X-B: "k ${env:A_KEY} ${b}${j}"}`,
		`, body: {a: "${a}", t: "${a} ${b} ${j}", l: ["${b}", {x: "${j.a}"}], r: "${.}"}`)
	base := set.Destinations()[0].URL
	f.Fuzz(func(t *testing.T, a, b string, j []byte) {
		payload, err := json.Marshal(map[string]any{"a": a, "b": b, "j": string(j)})
		if err != nil {
			t.Fatal(err)
		}
		if json.Valid(j) {
			payload = slices.Concat([]byte(`{"j":`), j, []byte(`,`), payload[1:])
		}
		d := owed(t, set, string(payload))
		if d == nil {
			return
		}
		if !json.Valid(d.Body) || !utf8.Valid(d.Body) {
			t.Errorf("body %q", d.Body)
		}
		before, key, _ := strings.Cut(base, "?")
		u, err := url.Parse(strings.TrimRight(before, "/") + d.Path + "?" + key + "&" + d.Query)
		if err != nil || u.Host != "127.0.0.1" || u.User != nil || u.Fragment != "" {
			t.Fatalf("url %q: %v", u, err)
		}
		if n := strings.Count(u.EscapedPath(), "/"); n != len(strings.Split("/base/v/a/j.b/end", "/"))-1 {
			t.Errorf("path %q", u.EscapedPath())
		}
		// As a server sees it that unescapes first and then cleans the path.
		if clean := path.Clean(u.Path); !strings.HasPrefix(clean, "/base/v/") || !strings.HasSuffix(clean, "/end") || strings.Count(clean, "/") < strings.Count(u.EscapedPath(), "/") {
			t.Errorf("path %q becomes %q", u.EscapedPath(), clean)
		}
		q, err := url.ParseQuery(u.RawQuery)
		if err != nil || len(q["key"]) != 1 || len(q["q"]) > 1 || len(q["r"]) > 1 || len(q) > 3 {
			t.Errorf("query %q: %v, %v", u.RawQuery, q, err)
		}
		for _, h := range d.Headers {
			secrets := map[string]int{"X-B": 1}[h.Name]
			if strings.ContainsAny(h.Value, "\r\n") || strings.Count(h.Value, "\x00") != secrets || strings.Contains(h.Value, "hunter2") {
				t.Errorf("header %s: %q", h.Name, h.Value)
			}
		}
	})
}
