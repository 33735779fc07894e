package rules_test

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// run runs a message through a set as the broker does. Ids of republished messages
// are id-1, id-2 and so on.
func run(set *rules.Set, m *rules.Message) rules.Chain {
	n := 0
	return set.Run(set.Candidates(nil, m.Topic), m, func() string { n++; return fmt.Sprint("id-", n) })
}

// outcomes are the counters of a rule that are not zero, as text.
func outcomes(t *testing.T, set *rules.Set, rule string) string {
	t.Helper()
	var all []string
	for _, r := range set.Rules() {
		if r.Name == rule {
			r.Outcomes().Each(func(o rules.Outcome, n uint64) {
				if n > 0 {
					all = append(all, fmt.Sprint(o, " ", n))
				}
			})
		}
	}
	return strings.Join(all, ", ")
}

// republishing is a rule of that name.
func republishing(name, sql, action string) string {
	return fmt.Sprintf("  - {name: %s, sql: '%s', actions: [{republish: %s}]}\n", name, sql, action)
}

// TestRepublished shows what one action makes of a row.
func TestRepublished(t *testing.T) {
	long := strings.Repeat("x", 65535)
	tests := []struct {
		name, items, action, payload string
		want                         string // topic, QoS, retain, payload, properties
		refused, counted             string
	}{
		{name: "defaults", items: `payload.a AS a`, action: `{topic: out}`, payload: `{"a":1}`, want: `out 0 false {"a":1} []`},
		{name: "structured", items: `payload.a AS a`, action: `{topic: "alerts/${a}", qos: 2, retain: true, payload: {n: "${a}", t: "<${a}>", u: "${u}"}}`, payload: `{"a":"\"7"}`,
			want: `alerts/"7 2 true {"n":"\"7","t":"<\"7>"} []`, counted: "undefined_in_body 1"},
		{name: "a variable as structured payload is JSON", items: `payload`, action: `{topic: out, payload: "${payload}"}`, payload: `{"a":1}`, want: `out 0 false "{\"a\":1}" []`},
		{name: "raw", items: `payload, qos, clientid`, action: `{topic: "copy/${clientid}", qos: "${qos}", payload_template: "${payload} ${nope}"}`, payload: `{"a":"\"7"}`,
			want: `copy/v7 1 false {"a":"\"7"} undefined []`, counted: "undefined_in_body 1"},
		{name: "raw and empty", items: `qos`, action: `{topic: out, payload_template: ""}`, want: `out 0 false {"qos":1} []`},
		{name: "a payload that is undefined", items: `qos`, action: `{topic: out, payload: "${nope}"}`, want: `out 0 false null []`, counted: "undefined_in_body 1"},
		{name: "levels from a variable", items: `topic`, action: `{topic: "copy/${topic}", payload: 1}`, want: `copy/t/1 0 false 1 []`},
		{name: "undefined in the topic", items: `1 AS a`, action: `{topic: "alerts/${nope}", payload: 1}`, want: `alerts/undefined 0 false 1 []`, counted: "undefined_in_body 1"},
		{name: "options from variables", items: `flags, payload.q AS q`, action: `{topic: out, qos: "${q}", retain: "${flags.retain}", payload: 1}`, payload: `{"q":"2"}`, want: `out 2 true 1 []`},
		{name: "retain as a number", items: `1 AS r`, action: `{topic: out, retain: "${r}", payload: 1}`, want: `out 0 true 1 []`},
		{name: "retain as text", items: `'false' AS r`, action: `{topic: out, retain: "${r}", payload: 1}`, want: `out 0 false 1 []`},
		{name: "undefined options", items: `1 AS r`, action: `{topic: out, qos: "${nope}", retain: "${nope}", payload: 1}`, want: `out 0 false 1 []`, counted: "undefined_in_body 1"},
		{name: "no QoS", items: `payload.q AS q`, action: `{topic: out, qos: "${q}"}`, payload: `{"q":3}`, refused: `qos is none: "3"`},
		{name: "no QoS either", items: `true AS q`, action: `{topic: out, qos: "${q}"}`, refused: `qos is none: "true"`},
		{name: "no flag", items: `2 AS r`, action: `{topic: out, retain: "${r}"}`, refused: `retain is neither true nor false: "2"`},
		{name: "user properties", items: `payload.a AS a`, action: `{topic: out, payload: 1, user_properties: {site: d1, a: "<${a}>", u: "${u}"}}`, payload: `{"a":7}`,
			want: `out 0 false 1 [[site d1] [a <7>]]`, counted: "undefined_in_body 1"},
		{name: "user properties that are too long or have a NUL", items: `payload.a AS a, payload.b AS b`, action: `{topic: out, payload: 1, user_properties: {a: "x${a}", b: "${b}", c: d}}`,
			payload: `{"a":"` + long + `","b":"\u0000"}`, want: `out 0 false 1 [[c d]]`, counted: "undefined_in_body 1"},
		{name: "user properties of a map", items: `payload.p AS p`, action: `{topic: out, payload: 1, user_properties: "${p}"}`, payload: `{"p":{"b":"x","a":[1,"2"],"bad\u0000":"1"}}`,
			want: `out 0 false 1 [[b x] [a 1] [a 2]]`, counted: "undefined_in_body 1"},
		{name: "user properties of what is no map", items: `1 AS p`, action: `{topic: out, payload: 1, user_properties: "${p}"}`, want: `out 0 false 1 []`, counted: "undefined_in_body 1"},
		{name: "user properties that are selected", items: `pub_props.'User-Property' AS user_properties`, action: `{topic: out, payload: 1}`, want: `out 0 false 1 [[k 2]]`},
		{name: "user properties of the message", items: `1 AS x`, action: `{topic: out, payload: 1, user_properties: "${pub_props.'User-Property'}"}`, want: `out 0 false 1 [[k 1] [k 2]]`},

		{name: "empty topic", items: `payload.a AS a`, action: `{topic: "${a}"}`, payload: `{"a":""}`, refused: `the topic is empty`},
		{name: "plus", items: `payload.a AS a`, action: `{topic: "x/${a}"}`, payload: `{"a":"a+b"}`, refused: `the topic holds a wildcard: "x/a+b"`},
		{name: "number sign", items: `payload.a AS a`, action: `{topic: "x/${a}"}`, payload: `{"a":"#"}`, refused: `the topic holds a wildcard: "x/#"`},
		{name: "NUL", items: `payload.a AS a`, action: `{topic: "x/${a}"}`, payload: `{"a":"\u0000"}`, refused: `the topic holds the NUL character: "x/\x00"`},
		{name: "the broker's own", items: `payload.a AS a`, action: `{topic: "${a}/x"}`, payload: `{"a":"$SYS"}`, refused: `the topic begins with $: "$SYS/x"`},
		{name: "a dollar elsewhere", items: `payload.a AS a`, action: `{topic: "x/${a}", payload: 1}`, payload: `{"a":"$SYS"}`, want: `x/$SYS 0 false 1 []`},
		{name: "too long", items: `payload.a AS a`, action: `{topic: "x${a}"}`, payload: `{"a":"` + long + `"}`, refused: `the topic has more than 65,535 bytes`},
		{name: "as long as may be", items: `payload.a AS a`, action: `{topic: "${a}", payload: 1}`, payload: `{"a":"` + long + `"}`, want: long + ` 0 false 1 []`},
		{name: "too deep", items: `payload.a AS a`, action: `{topic: "${a}"}`, payload: `{"a":"` + strings.Repeat("/", 128) + `"}`, refused: `the topic has more than 128 levels: "` + strings.Repeat("/", 60) + `..."`},
		{name: "not UTF-8", items: `payload AS a`, action: `{topic: "x/${a}"}`, payload: "\xff", refused: `the topic is not UTF-8: "x/\xff"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, "rules:\n"+republishing("r", "SELECT "+strings.ReplaceAll(tt.items, "'", "''")+" FROM \"t/#\"", tt.action))
			m := message("t/1", tt.payload)
			m.Retain, m.UserProperties = true, [][2]string{{"k", "1"}, {"k", "2"}}
			c := run(set, m)
			for i := range m.Payload { // what was made must not share its memory
				m.Payload[i] = 'Z'
			}
			counted := "matched 1"
			if tt.counted != "" {
				counted += ", " + tt.counted
			}
			if tt.refused != "" {
				if len(c.Refused) != 1 || c.Refused[0].Why != rules.NotRepublished || c.Refused[0].Text != tt.refused || c.Refused[0].Rule.Name != "r" {
					t.Fatalf("refused %+v, want %s", c.Refused, tt.refused)
				}
				counted += ", not_republished 1"
			}
			if got := outcomes(t, set, "r"); got != counted {
				t.Errorf("counted %s, want %s", got, counted)
			}
			if len(c.Matches) != 1 || c.Matches[0].On != -1 || len(c.Matches[0].Deliveries) != 0 {
				t.Errorf("matches %+v", c.Matches)
			}
			if tt.want == "" {
				if len(c.Published) != 0 {
					t.Errorf("published %+v", c.Published[0].Message)
				}
				return
			}
			if len(c.Published) != 1 || len(c.Refused) != 0 {
				t.Fatalf("published %v, refused %v", c.Published, c.Refused)
			}
			p := c.Published[0]
			if got := fmt.Sprintln(p.Topic, p.QoS, p.Retain, string(p.Payload), p.UserProperties); strings.TrimSpace(got) != tt.want {
				t.Errorf("got  %swant %s", got, tt.want)
			}
			if p.ID != "id-1" || p.ClientID != "v7" || p.PeerHost != "192.0.2.7" || p.PeerName != "192.0.2.7:4711" || p.Node != "broker@a" || p.Dup || p.Timestamp.Before(m.Timestamp) {
				t.Errorf("published by %+v", p.Message)
			}
		})
	}
}

// shown is a chain as text: what fired on what and what it owes, what was
// published, and what was refused.
func shown(c rules.Chain) []string {
	var lines []string
	for _, m := range c.Matches {
		on := "the publish"
		if m.On >= 0 {
			on = c.Published[m.On].Topic
		}
		line := m.Rule.Name + " on " + on
		for _, d := range m.Deliveries {
			line += fmt.Sprintf(" -> %s in lane %s", d.Body, d.Lane)
		}
		lines = append(lines, line)
	}
	for _, p := range c.Published {
		lines = append(lines, fmt.Sprintf("%s publishes %s %s", c.Matches[p.By].Rule.Name, p.Topic, p.Payload))
	}
	for _, r := range c.Refused {
		lines = append(lines, fmt.Sprintf("%s: %s: %s", r.Rule.Name, r.Why, r.Text))
	}
	return lines
}

func TestChains(t *testing.T) {
	const send = "actions: [{http: d}]"
	tests := []struct {
		name, rules string
		want        []string
	}{
		{"a rule on what another republishes", `
  - {name: brake, sql: "SELECT payload.n AS n FROM \"fleet/#\"", actions: [{republish: {topic: "alerts/${n}", qos: 1}}, {http: d}]}
  - {name: alert, sql: "SELECT clientid, username, topic, qos, payload.n + 1 AS n, trace_id FROM \"alerts/#\"", ` + send + `}
  - {name: other, sql: "SELECT * FROM \"other/#\"", ` + send + `}
`, []string{
			`brake on the publish -> {"n":7} in lane v7`,
			`alert on alerts/7 -> {"clientid":"v7","username":"ops","topic":"alerts/7","qos":1,"n":8,"trace_id":"trace-1"} in lane v7`,
			`brake publishes alerts/7 {"n":7}`,
		}},
		{"into its own FROM", `
  - {name: a, sql: "SELECT 1 AS x FROM \"#\"", actions: [{republish: {topic: a}}, {http: d}]}
  - {name: b, sql: "SELECT 2 AS x FROM a", ` + send + `}
`, []string{
			`a on the publish -> {"x":1} in lane v7`,
			`b on a -> {"x":2} in lane v7`,
			`a publishes a {"x":1}`,
			`a: loop_refused: the message comes from the rule itself, by way of a`,
		}},
		{"into its own FROM, which WHERE keeps out", `
  - {name: a, sql: "SELECT 1 AS x FROM \"#\" WHERE topic =~ 'fleet/#'", actions: [{republish: {topic: a}}]}
`, []string{`a on the publish`, `a publishes a {"x":1}`}},
		{"by way of others", `
  - {name: a, sql: "SELECT 1 AS x FROM \"fleet/#\", a", actions: [{republish: {topic: b}}]}
  - {name: b, sql: "SELECT 1 AS x FROM b", actions: [{republish: {topic: c}}]}
  - {name: c, sql: "SELECT 1 AS x FROM c", actions: [{republish: {topic: a}}]}
`, []string{
			`a on the publish`, `b on b`, `c on c`,
			`a publishes b {"x":1}`, `b publishes c {"x":1}`, `c publishes a {"x":1}`,
			`a: loop_refused: the message comes from the rule itself, by way of a -> b -> c`,
		}},
		{"twice, but not in one line", `
  - {name: a, sql: "SELECT 1 AS x FROM \"fleet/#\"", actions: [{republish: {topic: c}}, {republish: {topic: b}}]}
  - {name: b, sql: "SELECT 2 AS x FROM b", actions: [{republish: {topic: c}}]}
  - {name: c, sql: "SELECT 1 AS x FROM c", ` + send + `}
`, []string{
			`a on the publish`, `c on c -> {"x":1} in lane v7`, `b on b`, `c on c -> {"x":1} in lane v7`,
			`a publishes c {"x":1}`, `a publishes b {"x":1}`, `b publishes c {"x":2}`,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:"+tt.rules)
			m := message("fleet/v7", `{"n":7}`)
			m.Username, m.HasUsername, m.TraceID = "ops", true, "trace-1"
			if diff := cmp.Diff(tt.want, shown(run(set, m))); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestChainOfManyRules(t *testing.T) {
	text := "rules:\n"
	for i := range 12 {
		text += republishing(fmt.Sprint("r", i), fmt.Sprintf(`SELECT 1 AS x FROM "t%d"`, i), fmt.Sprintf("{topic: t%d}", i+1))
	}
	set := load(t, text)
	c := run(set, message("t0", ""))
	if len(c.Matches) != 9 || len(c.Published) != 9 || c.Published[8].Topic != "t9" {
		t.Errorf("got %d matches and %d messages:\n%s", len(c.Matches), len(c.Published), strings.Join(shown(c), "\n"))
	}
	if got := outcomes(t, set, "r9"); got != "loop_refused 1" {
		t.Errorf("the tenth rule counted %s", got)
	}
	if got := outcomes(t, set, "r10"); got != "" {
		t.Errorf("the eleventh rule counted %s", got)
	}
}

// TestChainIsBounded: rules that multiply what they get end at the bounds, whatever
// is the first that they reach.
func TestChainIsBounded(t *testing.T) {
	actions := func(topic, payload string) string {
		one := fmt.Sprintf("{republish: {topic: %s, payload_template: '%s'}}", topic, payload)
		return strings.Repeat(one+", ", 7) + one
	}
	multiply := func(payload string) string {
		text := "rules:\n"
		for i := range 8 {
			text += fmt.Sprintf("  - {name: r%d, sql: 'SELECT payload FROM t%d', actions: [%s]}\n", i, i, actions(fmt.Sprint("t", i+1), payload))
		}
		return text
	}
	tests := []struct {
		name, text, payload string
		most                int // messages
		refused             string
	}{
		{"messages", multiply("${payload}"), "x", 1000, "more than 1000 messages of one publish"},
		{"bytes", multiply("${payload}${payload}"), strings.Repeat("x", 1<<20), 7, "more than 16777216 bytes of messages of one publish"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, tt.text)
			c := run(set, message("t0", tt.payload))
			size := 0
			for _, p := range c.Published {
				size += len(p.Payload)
			}
			if len(c.Published) != tt.most || size > 16<<20 || len(c.Refused) == 0 || c.Refused[0].Text != tt.refused {
				t.Errorf("%d messages of %d bytes, refused %+v", len(c.Published), size, c.Refused[:min(1, len(c.Refused))])
			}
		})
	}

	t.Run("rows", func(t *testing.T) {
		text := "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n"
		text += fmt.Sprintf("  - {name: a, sql: 'SELECT 1 AS x FROM t0', actions: [%s]}\n", strings.Repeat("{republish: {topic: t1}}, ", 600)+"{http: d}")
		text += "  - {name: b, sql: 'SELECT 1 AS x FROM t1', actions: [{http: d}]}\n  - {name: c, sql: 'SELECT 1 AS x FROM t1', actions: [{http: d}]}\n"
		set := load(t, text)
		c := run(set, message("t0", ""))
		if len(c.Matches) != 1000 || len(c.Refused) != 201 || c.Refused[0].Why != rules.TooManyRows || c.Refused[0].Text != "more than 1000 rows, with the 1000 of the rules before it" {
			t.Errorf("%d matches, refused %d, the first %+v", len(c.Matches), len(c.Refused), c.Refused[:1])
		}
		if b, c := outcomes(t, set, "b"), outcomes(t, set, "c"); b != "matched 500, too_many_rows 100" || c != "matched 499, too_many_rows 101" {
			t.Errorf("b: %s; c: %s", b, c)
		}
	})
}

// TestNothingIsMadeBeyondTheBound: once a message was too much, those after it are
// refused without being made, whatever their size.
func TestNothingIsMadeBeyondTheBound(t *testing.T) {
	const tooLong, tooMany = "the payload has more than 8388608 bytes", "more than 16777216 bytes of messages of one publish"
	tests := []struct {
		name      string
		template  string
		sizes     []int
		published int
		refused   []string
	}{
		{"that do not fit", "${e}", []int{7 << 20, 7 << 20, 7 << 20, 1, 1}, 2, []string{tooMany, tooMany, tooMany}},
		{"too long by themselves", strings.Repeat("${e}", 9), []int{1 << 20, 1 << 20, 1 << 20, 1}, 0, []string{tooLong, tooLong, tooMany, tooMany}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := load(t, "rules:\n"+republishing("a", `FOREACH payload.l AS e DO e FROM t`, `{topic: out, payload_template: "`+tt.template+`"}`))
			var l []string
			for _, n := range tt.sizes {
				l = append(l, `"`+strings.Repeat("x", n)+`"`)
			}
			c := run(set, message("t", `{"l":[`+strings.Join(l, ",")+`]}`))
			var refused []string
			for _, r := range c.Refused {
				refused = append(refused, r.Text)
			}
			if diff := cmp.Diff(tt.refused, refused); len(c.Published) != tt.published || diff != "" {
				t.Errorf("%d messages, want %d; refused, -want +got\n%s", len(c.Published), tt.published, diff)
			}
		})
	}
}

// TestRulesThatFailAreBounded: a rule that fails late, on each of many messages, ends as well.
func TestRulesThatFailAreBounded(t *testing.T) {
	set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n"+
		republishing("a", `FOREACH payload.l AS e DO payload FROM t`, `{topic: u, payload_template: "${payload}"}`)+
		"  - {name: b, sql: 'FOREACH payload.m AS e DO payload FROM u', actions: [{http: d}]}\n")
	c := run(set, message("t", `{"l":`+integers(20)+`,"m":`+integers(1001)+`,"pad":"`+strings.Repeat("x", 20_000)+`"}`))
	if len(c.Matches) != 1 || len(c.Published) != 20 || len(c.Refused) != 20 {
		t.Errorf("%d matches, %d messages, %d refused, want 1, 20 and 20", len(c.Matches), len(c.Published), len(c.Refused))
	}
	if got := outcomes(t, set, "b"); got != "too_many_rows 12, render_failed 8" {
		t.Errorf("b: %s", got)
	}
}

// TestChainOfEvent: what an event republishes is the client's.
func TestChainOfEvent(t *testing.T) {
	set := load(t, `
destinations: {d: {url: "http://127.0.0.1/"}}
rules:
  - {name: gone, sql: "SELECT reason FROM \"$events/client/disconnected\"", actions: [{republish: {topic: "gone/x"}}]}
  - {name: next, sql: "SELECT clientid, username, peerhost, peername, node, payload.reason AS reason FROM \"gone/+\"", actions: [{http: d}]}
`)
	ev := &rules.Event{Kind: rules.ClientDisconnected, Reason: "kicked", ClientID: "v7", Username: "u", HasUsername: true, PeerName: "192.0.2.7:4711", Node: "n"}
	want := []string{"gone on the publish", `next on gone/x -> {"clientid":"v7","username":"u","peerhost":"192.0.2.7","peername":"192.0.2.7:4711","node":"n","reason":"kicked"} in lane v7`,
		`gone publishes gone/x {"reason":"kicked"}`}
	if diff := cmp.Diff(want, shown(set.RunEvent(set.EventCandidates(ev.Kind), ev, nil))); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestRepublishedRows: FOREACH makes a message of each element, or none if one fails.
func TestRepublishedRows(t *testing.T) {
	set := load(t, `
destinations: {d: {url: "http://127.0.0.1/"}}
rules:
  - {name: each, sql: "FOREACH payload.l AS e DO e.n + 1 AS n, clientid, e.bad AS bad FROM \"in\"", actions: [{republish: {topic: "out/${n}"}}, {republish: {topic: "${bad}", payload: 1}}]}
  - {name: next, sql: "SELECT topic FROM \"out/#\"", actions: [{http: d}]}
`[1:])
	c := run(set, message("in", `{"l":[{"n":1,"bad":"+"},{"n":2,"bad":""}]}`))
	want := []string{"each on the publish", `next on out/2 -> {"topic":"out/2"} in lane v7`, `next on out/3 -> {"topic":"out/3"} in lane v7`,
		`each publishes out/2 {"n":2,"clientid":"v7","bad":"+"}`, `each publishes out/3 {"n":3,"clientid":"v7","bad":""}`,
		`each: not_republished: the topic holds a wildcard: "+"`, `each: not_republished: the topic is empty`}
	if diff := cmp.Diff(want, shown(c)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if c := run(set, message("in", `{"l":[{"n":1,"bad":"+"},{"n":[]}]}`)); len(c.Matches)+len(c.Published)+len(c.Refused) != 0 {
		t.Errorf("of a rule that has failed stays %s", shown(c))
	}
	if got := outcomes(t, set, "each"); got != "matched 1, bad_argument 1, not_republished 2" {
		t.Errorf("counted %s", got)
	}
}

func TestReadsTrace(t *testing.T) {
	set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n"+
		"  - {name: a, sql: 'SELECT sw8 FROM t', actions: [{http: d}]}\n"+
		"  - {name: b, sql: 'SELECT 1 AS x FROM t', actions: [{http: d}]}\n"+
		"  - {name: c, sql: 'SELECT 1 AS x FROM t', actions: [{republish: {topic: u}}]}\n")
	for i, want := range []bool{true, false, true} {
		if r := set.Rules()[i]; r.ReadsTrace() != want {
			t.Errorf("%s reads the trace: %v, want %v", r.Name, r.ReadsTrace(), want)
		}
	}
}

// FuzzRepublish: whatever the payload, what is published can be, and is accounted for.
func FuzzRepublish(f *testing.F) {
	for _, s := range []string{
		`{"a":"x","q":1,"r":true,"p":{"k":"v"}}`, `{"a":"#","q":3}`, `{"a":"$x","r":2,"p":[1]}`, `{"a":"a/b/c","q":"2","r":"false","p":"{\"k\":[1,2]}"}`,
		`{"a":"\u0000","p":{"":"\u0000"}}`, `{"a":""}`, "{\"a\":\"\xff\"}", `{"l":[{"a":"x"},{"a":"+"},1]}`, `{"l":"x"}`, `[]`, ``,
	} {
		f.Add([]byte(s))
	}
	set, problems := rules.BuildText(`
rules:
  - name: one
    sql: SELECT payload.a AS a, payload.q AS q, payload.r AS r, payload.p AS p, payload AS x FROM "in"
    actions:
      - republish: {topic: "${a}", qos: "${q}", retain: "${r}", user_properties: "${p}", payload_template: "${x}"}
      - republish: {topic: "out/${a}", user_properties: {a: "${a}", p: "${p}"}}
  - name: each
    sql: FOREACH payload.l AS e FROM "in", "out/#" WHERE topic <> 'x'
    actions: [{republish: {topic: "out/${e.a}", payload: {e: "${e}"}}}]
  - name: again
    sql: SELECT payload, topic AS a FROM "out/#"
    actions: [{republish: {topic: "in", payload_template: "${payload}"}}, {republish: {topic: "${a}/${a}"}}]
`)
	if set == nil {
		f.Fatal(problems)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		c := run(set, &rules.Message{ClientID: "v7", Topic: "in", Payload: payload})
		size := 0
		for i, p := range c.Published {
			size += len(p.Payload)
			if p.Topic == "" || len(p.Topic) > 65535 || strings.ContainsAny(p.Topic, "+#\x00") || strings.HasPrefix(p.Topic, "$") || !utf8.ValidString(p.Topic) || p.QoS > 2 {
				t.Errorf("published to %q at QoS %d", p.Topic, p.QoS)
			}
			for _, u := range p.UserProperties {
				if text := u[0] + u[1]; len(u[0]) > 65535 || len(u[1]) > 65535 || strings.ContainsRune(text, 0) || !utf8.ValidString(text) {
					t.Errorf("user property %q", u)
				}
			}
			if by := c.Matches[p.By]; by.On >= i || p.ClientID != "v7" || p.ID == "" {
				t.Errorf("message %d, of %q, is made by a rule on message %d", i, p.ClientID, by.On)
			}
		}
		if len(c.Published) > 1000 || len(c.Refused) > 1000 || size > 16<<20 {
			t.Errorf("%d messages of %d bytes, %d refused", len(c.Published), size, len(c.Refused))
		}
		for _, m := range c.Matches {
			seen := map[string]bool{m.Rule.Name: true}
			for on := m.On; on >= 0; {
				by := c.Matches[c.Published[on].By]
				if seen[by.Rule.Name] {
					t.Errorf("%s twice on the way to one message", by.Rule.Name)
				}
				seen[by.Rule.Name], on = true, by.On
			}
		}
	})
}
