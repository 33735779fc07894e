package rules_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// load makes a set of one file; the test fails on any error.
func load(t testing.TB, text string) *rules.Set {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rules.yaml")
	writeFile(t, path, text)
	set, problems := rules.Load([]string{path}, rules.LoadOptions{})
	if set == nil {
		var b strings.Builder
		if err := rules.Print(&b, problems); err != nil {
			t.Fatal(err)
		}
		t.Fatalf("load:\n%s", b.String())
	}
	return set
}

func message(topic, payload string) *rules.Message {
	return &rules.Message{ID: "m1", ClientID: "v7", Topic: topic, Payload: []byte(payload), QoS: 1, Timestamp: time.UnixMilli(1_700_000_000_000),
		PeerHost: "192.0.2.7", PeerName: "192.0.2.7:4711", Node: "broker@a"}
}

// match runs a message through a set as the broker does.
func match(set *rules.Set, m *rules.Message) []rules.Match {
	return set.Run(set.Candidates(nil, m.Topic), m, nil).Matches
}

const hardBrake = `
destinations:
  notification-center: {url: "http://127.0.0.1:8080/notify"}
rules:
  - name: hard-brake
    description: Tell the notification center when a vehicle brakes hard.
    sql: |
      SELECT payload.vin AS vin, payload.decel AS decel, clientid, timestamp
      FROM "fleet/+/telemetry"
      WHERE payload.decel >= 6.5
    actions:
      - http: notification-center
        id: "${vin}-${timestamp}"
        body:
          event: hard-brake
          vin: ${vin}
          decel: ${decel}
          text: "${vin} braked at ${decel} m/s2"
`

func TestMatchDelivers(t *testing.T) {
	set := load(t, hardBrake)
	m := message("fleet/v7/telemetry", `{"vin":"V\"7","decel":7.1}`)
	got := match(set, m)
	clear(m.Payload) // what was answered must not share its memory
	if len(got) != 1 || got[0].Rule.Name != "hard-brake" {
		t.Fatalf("matches: %v", got)
	}
	want := []rules.Delivery{{
		Destination: "notification-center", ID: `V"7-1700000000000`, Lane: "v7", Ordered: true,
		Body: []byte(`{"event":"hard-brake","vin":"V\"7","decel":7.1,"text":"V\"7 braked at 7.1 m/s2"}`),
	}}
	if diff := cmp.Diff(want, got[0].Deliveries); diff != "" {
		t.Errorf("deliveries, -want +got\n%s", diff)
	}
	for _, payload := range []string{`{"decel":6.4}`, `{}`, `{"decel":"n/a"}`, `no JSON`, `{"decel":"6.5"}`} {
		match(set, message("fleet/v7/telemetry", payload))
	}
	counts := map[rules.Outcome]uint64{}
	set.Rules()[0].Outcomes().Each(func(o rules.Outcome, n uint64) { counts[o] = n })
	wantCounts := map[rules.Outcome]uint64{rules.Matched: 2, rules.NoMatch: 3, rules.PayloadNotJSON: 1, rules.BadArgument: 0,
		rules.TooManyRows: 0, rules.RenderFailed: 0, rules.TypeMismatch: 1, rules.UndefinedInBody: 1, rules.HeaderLeftOut: 0,
		rules.LoopRefused: 0, rules.NotRepublished: 0}
	if diff := cmp.Diff(wantCounts, counts); diff != "" {
		t.Errorf("outcomes, -want +got\n%s", diff)
	}
}

// TestBodies renders bodies; sql selects what they show.
func TestBodies(t *testing.T) {
	tests := []struct{ name, items, body, payload, want string }{
		{"omitted is the row", `payload.a AS a, payload.none AS n`, ``, `{"a":1}`, `{"a":1}`},
		{"alone keeps its type", `payload.a AS a, payload.o AS o`, `{n: "${a}", o: "${o}", s: "n${a}"}`, `{"a":9007199254740993,"o":{"x":[1,null]}}`,
			`{"n":9007199254740993,"o":{"x":[1,null]},"s":"n9007199254740993"}`},
		{"keys keep their order", `1 AS x`, `{z: 1, a: 2, m: 3}`, `{}`, `{"z":1,"a":2,"m":3}`},
		{"text is escaped", `payload.a AS a`, `{t: "<${a}>"}`, `{"a":"\"\\\n\u0001é\ud83d\ude00"}`, `{"t":"<\"\\\n\u0001é😀>"}`},
		{"missing keys are left out", `payload.a AS a`, `{x: "${a}", y: "no ${a}", z: 1}`, `{}`, `{"z":1}`},
		{"missing first key", `payload.a AS a`, `{x: "${a}", z: 1, y: 2}`, `{}`, `{"z":1,"y":2}`},
		{"missing within a nested map", `payload.a AS a`, `{m: {x: "${a}"}, l: ["${a}", 1]}`, `{}`, `{"m":{},"l":[null,1]}`},
		{"null is no missing value", `payload.a AS a`, `{x: "${a}", y: "is ${a}"}`, `{"a":null}`, `{"x":null,"y":"is null"}`},
		{"paths", `payload`, `{x: "${payload.a.b}"}`, `{"a":{"b":[1]}}`, `{"x":[1]}`},
		{"text in text is not read", `payload`, `{x: "${payload.a.b}", z: 1}`, `{"a":"{\"b\":1}"}`, `{"z":1}`},
		{"whole row", `payload.a AS a`, `{row: "${.}", a: "${.a}"}`, `{"a":1}`, `{"row":{"a":1},"a":1}`},
		{"literal dollar", `1 AS a`, `{x: "${$}{a}", y: "$5"}`, `{}`, `{"x":"${a}","y":"$5"}`},
		{"YAML types", `1 AS a`, `{i: 12, big: 123456789012345678901234567890, f: 1.50, b: true, n: null, s: "1", h: 0x10, e: 1e3, d: 2020-01-02}`, `{}`,
			`{"i":12,"big":123456789012345678901234567890,"f":1.5,"b":true,"n":null,"s":"1","h":16,"e":1000.0,"d":"2020-01-02"}`},
		{"duplicate keys, the last wins", `payload.a AS a`, `{x: "${a}"}`, `{"a":{"k":1,"k":2}}`, `{"x":{"k":2}}`},
		{"floats stay floats", `payload.a / 2 AS a`, `{x: "${a}", t: "${a}m"}`, `{"a":4}`, `{"x":2.0,"t":"2.0m"}`},
		{"variable as the body", `payload.a AS a`, `"${a}"`, `{"a":{"b":1}}`, `{"b":1}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			body := ""
			if tt.body != "" {
				body = ", body: " + tt.body
			}
			set := load(t, fmt.Sprintf("destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - name: r\n    sql: SELECT %s FROM \"t\"\n    actions: [{http: d%s}]\n", tt.items, body))
			got := match(set, message("t", tt.payload))
			if len(got) != 1 {
				t.Fatal("no match")
			}
			if s := string(got[0].Deliveries[0].Body); s != tt.want {
				t.Errorf("body %s\n got %s\nwant %s", tt.body, s, tt.want)
			}
		})
	}
}

func TestIDs(t *testing.T) {
	tests := []struct{ name, payload, want string }{
		{"text and number", `{"a":"x","b":1}`, "x-1"},
		{"undefined", `{"a":"x"}`, ""},
		{"control character", `{"a":"x\ny","b":1}`, ""},
		{"too long", `{"a":"` + strings.Repeat("x", 254) + `","b":1}`, ""},
		{"as long as may be", `{"a":"` + strings.Repeat("x", 253) + `","b":1}`, strings.Repeat("x", 253) + "-1"},
	}
	set := load(t, "destinations: {d: {url: 'http://127.0.0.1/', ordered: false}}\nrules:\n  - name: r\n    sql: SELECT payload.a AS a, payload.b AS b FROM \"t\"\n    actions: [{http: d, id: '${a}-${b}'}]\n")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := match(set, message("t", tt.payload))[0].Deliveries[0]
			if d.ID != tt.want || d.Ordered || d.Lane != "" {
				t.Errorf("delivery %+v, want id %q and no lane", d, tt.want)
			}
		})
	}
}

func TestLanes(t *testing.T) {
	set := load(t, "destinations: {u: {url: 'http://127.0.0.1/', ordered: username}, q: {url: 'http://127.0.0.1/', ordered: qos}}\nrules:\n  - name: r\n    sql: SELECT * FROM \"t\"\n    actions: [{http: u}, {http: q}]\n")
	m := message("t", "")
	ds := match(set, m)[0].Deliveries
	if ds[0].Ordered || !ds[1].Ordered || ds[1].Lane != "1" {
		t.Errorf("without a username: %+v", ds)
	}
	m.Username, m.HasUsername = "", true
	if ds := match(set, m)[0].Deliveries; !ds[0].Ordered || ds[0].Lane != "" {
		t.Errorf("with an empty username: %+v", ds)
	}
}

func TestColumns(t *testing.T) {
	set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - name: all\n    sql: SELECT *, trace_id, sw8 FROM \"t\"\n    actions: [{http: d}]\n")
	m := message("t", "hi")
	m.UserProperties = [][2]string{{"a", "1"}, {"a", "2"}}
	m.ContentType, m.ResponseTopic, m.MessageExpiry, m.PayloadIsUTF8, m.CorrelationData = "text/plain", "r", 60, true, []byte("c")
	m.TraceID, m.Retain = "trace-1", true
	want := `{"id":"m1","clientid":"v7","payload":"hi","peerhost":"192.0.2.7","peername":"192.0.2.7:4711","topic":"t","qos":1,` +
		`"flags":{"dup":false,"retain":true},"pub_props":{"Payload-Format-Indicator":1,"Message-Expiry-Interval":60,"Content-Type":"text/plain",` +
		`"Response-Topic":"r","Correlation-Data":"c","User-Property":{"a":"2"},"User-Property-Pairs":[{"key":"a","value":"1"},{"key":"a","value":"2"}]},` +
		`"publish_received_at":1700000000000,"client_attrs":{},"event":"message.publish","timestamp":1700000000000,"node":"broker@a",` +
		`"metadata":{"rule_id":"all"},"trace_id":"trace-1"}`
	if got := string(match(set, m)[0].Deliveries[0].Body); got != want {
		t.Errorf("row\n got %s\nwant %s", got, want)
	}
}

func TestCandidates(t *testing.T) {
	set := load(t, `
destinations: {d: {url: "http://127.0.0.1/"}}
rules:
  - {name: everything, sql: "SELECT * FROM \"#\"", actions: [{http: d}]}
  - {name: exact, sql: "SELECT * FROM \"fleet/v7/telemetry\"", actions: [{http: d}]}
  - {name: b-plus, sql: "SELECT * FROM \"fleet/+/telemetry\"", actions: [{http: d}]}
  - {name: a-plus, sql: "SELECT * FROM \"fleet/+/telemetry\", \"fleet/#\"", actions: [{http: d}]}
  - {name: late-plus, sql: "SELECT * FROM \"fleet/v7/+\"", actions: [{http: d}]}
  - {name: other, sql: "SELECT * FROM \"boiler/#\"", actions: [{http: d}]}
  - {name: off, enabled: false, sql: "SELECT * FROM \"#\"", actions: [{http: d}]}
`)
	tests := []struct {
		topic string
		want  []string // rule and its filter
	}{
		{"fleet/v7/telemetry", []string{"exact fleet/v7/telemetry", "late-plus fleet/v7/+", "a-plus fleet/+/telemetry", "b-plus fleet/+/telemetry", "everything #"}},
		{"fleet", []string{"a-plus fleet/#", "everything #"}},
		{"boiler/1", []string{"other boiler/#", "everything #"}},
		{"$SYS/broker", nil},
	}
	for _, tt := range tests {
		t.Run(tt.topic, func(t *testing.T) {
			var got []string
			for _, r := range set.Candidates(nil, tt.topic) {
				got = append(got, r.Name+" "+r.Filter(tt.topic))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
	if n := len(set.Rules()); n != 7 {
		t.Errorf("%d rules, want 7", n)
	}
}

func TestSecretsStayHidden(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "token"), "hunter2\n")
	writeFile(t, filepath.Join(dir, "rules.yaml"), `destinations: {d: {url: "http://127.0.0.1/", method: PUT, timeout: 3s, concurrency: 2,
  retry: {max_age: 1h, lane_hold: 90s}, batch: {max: 50, linger: 5ms}, trace: {body: {sw8: trace.sw8}, headers: false}, headers: {authorization: "Bearer ${file:token}", X-Env: "${env:E}"}}}`)
	set, problems := rules.Load([]string{dir}, rules.LoadOptions{RequireSecrets: true, LookupEnv: func(string) (string, bool) { return "env-secret", true }})
	if set == nil {
		t.Fatal(problems)
	}
	d := set.Destinations()[0]
	if got := d.Headers[0].Name + ": " + d.Headers[0].Value.Reveal() + ", " + d.Headers[1].Value.Reveal(); got != "Authorization: Bearer hunter2, env-secret" {
		t.Errorf("headers %s", got)
	}
	if d.Method != "PUT" || d.Timeout != 3*time.Second || d.Concurrency != 2 || d.MaxAge != time.Hour || d.LaneHold != 90*time.Second || d.Batch != (rules.Batch{Max: 50, Linger: 5 * time.Millisecond}) || d.TraceHeaders || d.TraceBody != (rules.TraceBody{SW8: "trace.sw8"}) || d.Ordered != "clientid" {
		t.Errorf("destination %+v", d)
	}
	var logged bytes.Buffer
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "d", d, "h", d.Headers[0].Value)
	text, err := json.Marshal(set.Destinations())
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{fmt.Sprintf("%v %+v %#v %s %v", d, d, d, d.Headers[0].Value, d.Headers), string(text), logged.String()} {
		if strings.Contains(shown, "hunter2") || strings.Contains(shown, "env-secret") {
			t.Errorf("a secret shows in %s", shown)
		}
	}
	if set, problems := rules.Load([]string{dir}, rules.LoadOptions{RequireSecrets: true, LookupEnv: func(string) (string, bool) { return "", false }}); set != nil {
		t.Errorf("loaded without a secret, problems %v", problems)
	}
}

// TestDepth: JSON that nests too deeply is no JSON, whatever its size.
func TestDepth(t *testing.T) {
	set := load(t, "destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - {name: r, sql: 'SELECT payload.a AS a FROM \"t\"', actions: [{http: d}]}\n")
	nested := func(n int) string { return `{"a":` + strings.Repeat("[", n) + strings.Repeat("]", n) + `}` }
	if got := match(set, message("t", nested(255))); len(got) != 1 || string(got[0].Deliveries[0].Body) != nested(255) {
		t.Error("255 lists within an object were refused")
	}
	for _, payload := range []string{nested(256), strings.Repeat("[", 1<<20), strings.Repeat(`{"a":`, 1<<18)} {
		if got := match(set, message("t", payload)); len(got) != 0 {
			t.Errorf("%.20s... matched", payload)
		}
	}
	if wide := `{"a":[` + strings.Repeat("[],", 1000) + `[]]}`; len(match(set, message("t", wide))) != 1 {
		t.Error("a wide payload was refused")
	}
}

// TestWidePayload reads an object with many members often enough that it gets an
// index.
func TestWidePayload(t *testing.T) {
	var items, members, want []string
	for i := range 200 {
		members = append(members, fmt.Sprintf(`"k%d":%d`, i, i))
	}
	members = append(members, `"k7":"last"`)
	for i := range 30 {
		items = append(items, fmt.Sprintf("payload.k%d AS x%d", i, i))
		v := fmt.Sprint(i)
		if i == 7 {
			v = `"last"`
		}
		want = append(want, fmt.Sprintf(`"x%d":%s`, i, v))
	}
	set := load(t, fmt.Sprintf("destinations: {d: {url: 'http://127.0.0.1/'}}\nrules:\n  - {name: r, sql: 'SELECT %s, payload.nope AS n FROM \"t\"', actions: [{http: d}]}\n", strings.Join(items, ", ")))
	got := match(set, message("t", " {"+strings.Join(members, ", ")+"}\n"))
	if body := string(got[0].Deliveries[0].Body); body != "{"+strings.Join(want, ",")+"}" {
		t.Errorf("body %s", body)
	}
}

func TestExpandSecrets(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "token"), "hunter2\n")
	writeFile(t, filepath.Join(dir, "empty"), "\n")
	env := func(name string) (string, bool) { return "from-env", name == "E" }
	tests := []struct{ text, want, err string }{
		{"plain", "plain", ""},
		{"a ${env:E} b ${file:token} c", "a from-env b hunter2 c", ""},
		{"${env:NONE}", "", `environment variable "NONE" is not set`},
		{"${file:empty}", "", "is empty"},
		{"${file:none}", "", "no such file"},
		{"${file:.}", "", "is no file of at most"},
		{"${clientid}", "", `"${clientid}" is no secret`},
		{"${env:E", "", "never closed"},
	}
	for _, tt := range tests {
		got, err := rules.ExpandSecrets(tt.text, dir, env)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) || got.Reveal() != tt.want {
			t.Errorf("%s: %q, %v, want %q, error with %q", tt.text, got.Reveal(), err, tt.want, tt.err)
		}
	}
}
