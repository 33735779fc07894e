package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

const testedRules = `
destinations:
  center: {url: "http://127.0.0.1/", trace: {body: {sw8: trace.sw8, sw8-correlation: trace.correlation}}}
  audit: {url: "http://127.0.0.1/", ordered: false}
  vehicles: {url: "http://127.0.0.1/api?v=1", method: GET, path: "/v/${vin}", query: {n: "${n}", s: "a b"}, headers: {X-Vin: "vin ${vin}", X-Key: "${vin} ${env:KEY}"}, trace: {body: {}}}
rules:
  - {name: row, sql: 'SELECT * FROM "row"', actions: [{http: center}]}
  - {name: picked, sql: 'SELECT payload.a AS a, payload.trace AS trace FROM "picked"', actions: [{http: center}]}
  - {name: rows, sql: 'FOREACH payload.l AS e DO e AS e FROM "rows"', actions: [{http: center}, {http: audit, body: "${e}"}]}
  - {name: asks, sql: 'SELECT payload.vin AS vin, payload.n AS n FROM "asks"', actions: [{http: vehicles}]}
  - {name: forwards, sql: 'FOREACH payload.l AS e DO e AS e FROM "forwards"', actions: [{republish: {topic: "to/${e}", qos: 1, payload: {e: "${e}"}, user_properties: {p: "${e}"}}}, {http: audit}]}
  - {name: second, sql: 'SELECT payload.e AS e FROM "to/+" WHERE payload.e > 1', actions: [{republish: {topic: third, payload_template: "e=${e}", retain: true}}]}
  - {name: event, sql: 'SELECT * FROM "$events/#"', actions: [{http: center}]}
`

// TestTests runs one test each and compares what it says.
func TestTests(t *testing.T) {
	row := func(e string) string {
		return fmt.Sprintf("[{rule: rows, http: center, body: {e: %s}}, {rule: rows, http: audit, body: %s}]", e, e)
	}
	tests := []struct{ name, input, expect, want string }{
		{"every column", `publish: {topic: row, clientid: c, username: u, qos: 2, retain: true, dup: true, id: i, payload: [1, x], timestamp: 12, peerhost: h, peername: n, node: o,
      pub_props: {Content-Type: t, Response-Topic: r, Correlation-Data: d, Message-Expiry-Interval: 4294967295, Payload-Format-Indicator: 1, User-Property: {a: b}, User-Property-Pairs: [{key: a, value: c}]}}`,
			`[{rule: row, http: center, lane: c, body: {id: i, clientid: c, username: u, payload: '[1,"x"]', peerhost: h, peername: n, topic: row, qos: 2, flags: {dup: true, retain: true},
      pub_props: {Payload-Format-Indicator: 1, Message-Expiry-Interval: 4294967295, Content-Type: t, Response-Topic: r, Correlation-Data: d, User-Property: {a: c},
        User-Property-Pairs: [{key: a, value: b}, {key: a, value: c}]}, publish_received_at: 12, timestamp: 12, client_attrs: {}, event: message.publish, node: o, metadata: {rule_id: row}}}]`, ""},
		{"the clock", "now: 2026-03-01T12:00:00Z\n    publish: {topic: row}",
			`[{rule: row, http: center, body: {id: "00000000000000000000000000000001", clientid: test, payload: "", topic: row, qos: 0, flags: {dup: false, retain: false}, pub_props: {User-Property: {}},
        publish_received_at: 1772366400000, timestamp: 1772366400000, client_attrs: {}, event: message.publish, node: broker@test, metadata: {rule_id: row}}}]`, ""},
		{"numbers to the last digit", `publish: {topic: picked, payload: {a: 9007199254740993}}`, `[{rule: picked, http: center, body: {a: 9007199254740992}}]`,
			"body.a: 9007199254740992, 9007199254740993"},
		{"1 is 1.0", `publish: {topic: picked, payload: {a: [1, 2.0, 1e2]}}`, `[{rule: picked, http: center, body: {a: [1.0, 2, 100]}}]`, ""},
		{"null is not nothing", `publish: {topic: picked, payload: {a: null}}`, `[{rule: picked, http: center, body: {}}]`, "body.a: nothing, null"},
		{"not the trace's field", `publish: {topic: picked, payload: {a: 1, trace: {sw8: x}}}`, `[{rule: picked, http: center, body: {a: 1}}]`, ""},
		{"not the trace's field, but beside it", `publish: {topic: picked, payload: {a: 1, trace: {sw8: x, b: 2}}}`, `[{rule: picked, http: center, body: {a: 1, trace: {b: 3}}}]`, "body.trace.b: 3, 2"},
		{"lists", `publish: {topic: picked, payload: {a: [1, [2, 3], {b c: 4}]}}`, `[{rule: picked, http: center, body: {a: [1, [2], {b c: 5}, 6]}}]`,
			`body.a[2][2]: nothing, 3; body.a[3]."b c": 5, 4; body.a[4]: 6, nothing`},
		{"another type", `publish: {topic: picked, payload: {a: "1"}}`, `[{rule: picked, http: center, body: {a: 1}}]`, `body.a: 1, "1"`},
		{"a JSON string", `publish: {topic: rows, payload: {l: ["x"]}}`, row("x"), ""},
		{"no id, no lane", `publish: {topic: rows, payload: {l: ["x"]}}`, `[{rule: rows, http: center}, {rule: rows, http: audit, id: i, lane: l}]`, `id: "i", nothing; lane: "l", false`},
		{"rows in order", `publish: {topic: rows, payload: {l: [1, 2]}}`,
			`[{rule: rows, http: center, body: {e: 1}}, {rule: rows, http: audit, body: 1}, {rule: rows, http: center, body: {e: 2}}, {rule: rows, http: audit, body: 2}]`, ""},
		{"one missing, the others as they are", `publish: {topic: rows, payload: {l: [2, 3]}}`,
			`[{rule: rows, http: audit, body: 2}, {rule: rows, http: audit, body: 3}]`,
			`a request of rule "rows" to "center" was not expected; body: nothing, {"e":2}; a request of rule "rows" to "center" was not expected; body: nothing, {"e":3}`},
		{"another order", `publish: {topic: rows, payload: {l: [1]}}`, `[{rule: rows, http: audit}, {rule: rows, http: center}]`,
			`a request of rule "rows" to "center" comes as number 1, expected as number 2`},
		{"too few", `publish: {topic: nowhere}`, `[{rule: row, http: center}]`, `a request of rule "row" to "center" was expected, and not sent (FROM does not select topic "nowhere": "row" wants "row" as level 1, found "nowhere")`},
		{"every part of a request", `publish: {topic: asks, payload: {vin: a/b, n: 1}}`,
			`[{rule: asks, http: vehicles, method: GET, path: /api/v/a%2Fb, query: {v: 1, n: 1, s: a b}, headers: {x-vin: vin a/b, X-Key: "a/b [redacted]"}}]`, ""},
		{"no part of a request", `publish: {topic: asks, payload: {vin: V7}}`,
			`[{rule: asks, http: vehicles, method: POST, path: /api/v, query: {v: 1, n: 1}, headers: {X-Site: x}, body: {vin: V7}}]`,
			`method: "POST", "GET"; path: "/api/v", "/api/v/V7"; query.n: "1", nothing; query.s: nothing, "a b"; headers.X-Site: "x", nothing; body: {"vin":"V7"}, nothing`},
		{"a query as it is sent", `publish: {topic: asks, payload: {vin: V7, n: 1}}`, `[{rule: asks, http: vehicles, query: "v=1&s=a+b&n=1"}]`, ""},
		{"what is republished, and where it leads", `publish: {topic: forwards, payload: {l: [1, 2]}}`,
			`[{rule: forwards, http: audit}, {rule: forwards, http: audit, body: {e: 2}}, {rule: forwards, republish: {topic: to/1, qos: 1, retain: false, payload: {e: 1.0}, user_properties: {p: 1}}},
        {rule: forwards, republish: {}}, {rule: second, republish: {topic: third, qos: 0, payload: e=2, retain: true}}]`, ""},
		{"requests alone", `publish: {topic: forwards, payload: {l: [1, 2]}}`, `[{rule: forwards, http: audit}, {rule: forwards, http: audit, body: {e: 2}}]`, ""},
		{"another message", `publish: {topic: to/x, payload: {e: 2}}`, `[{rule: second, republish: {topic: fourth, qos: 2, payload: {e: 2}, retain: false}}]`,
			`topic: "fourth", "third"; qos: 2, 0; payload: {"e":2}, "e=2"; retain: false, true`},
		{"a message too many", `publish: {topic: to/x, payload: {e: 2}}`, `[]`,
			`a message republished by rule "second" was not expected; topic: nothing, "third"; payload: nothing, "e=2"`},
		{"a message too few", `publish: {topic: to/x, payload: {e: 1}}`, `[{rule: second, republish: {topic: third}}]`,
			`a message republished by rule "second" was expected, and not sent (payload.e > 1 is false (payload.e = 1))`},
		{"a reason at the end of a chain", `publish: {topic: forwards, payload: {l: [1]}}`,
			`[{rule: forwards, http: audit}, {rule: forwards, republish: {}}, {rule: second, republish: {}}]`,
			`a message republished by rule "second" was expected, and not sent (payload.e > 1 is false (payload.e = 1))`},
		{"connected", `event: {event: $events/client_connected, clientid: c, username: u, peername: "h:1", sockname: s, proto_name: MQIsdp, proto_ver: 3, keepalive: 65535, clean_start: true,
      expiry_interval: 7, conn_props: {Receive-Maximum: 5, User-Property: {a: b}}, connected_at: 3, timestamp: 4, node: o}`,
			`[{rule: event, http: center, lane: c, body: {clientid: c, username: u, peername: "h:1", sockname: s, proto_name: MQIsdp, proto_ver: 3, keepalive: 65535, clean_start: true, expiry_interval: 7,
        is_bridge: false, conn_props: {Receive-Maximum: 5, User-Property: {a: b}, User-Property-Pairs: [{key: a, value: b}]}, connected_at: 3, client_attrs: {}, event: client.connected, timestamp: 4, node: o,
        metadata: {rule_id: event}}}]`, ""},
		{"dropped for one subscriber", `event: {event: delivery.dropped, reason: expired, clientid: to, from_clientid: from, from_username: u, topic: t, qos: 1, payload: {a: 1}, id: i, peerhost: h, retain: true,
      publish_received_at: 1, timestamp: 2, node: o}`,
			`[{rule: event, http: center, lane: to, body: {reason: expired, id: i, from_clientid: from, from_username: u, clientid: to, payload: '{"a":1}', peerhost: h, topic: t, qos: 1, flags: {dup: false, retain: true},
        pub_props: {User-Property: {}}, publish_received_at: 1, event: delivery.dropped, timestamp: 2, node: o, metadata: {rule_id: event}}}]`, ""},
		{"authorization", `event: {event: client.check_authz_complete, clientid: c, topic: t, action: publish, authz_source: file, result: deny, peerhost: h, timestamp: 2, node: o}`,
			`[{rule: event, http: center, body: {clientid: c, peerhost: h, peername: h, topic: t, action: publish, authz_source: file, result: deny, client_attrs: {}, event: client.check_authz_complete,
        timestamp: 2, node: o, metadata: {rule_id: event}}}]`, ""},
	}
	set := load(t, testedRules)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			failures, problems := rules.RunTests(set, fmt.Sprintf("tests:\n  - name: x\n    %s\n    expect: %s\n", tt.input, tt.expect))
			if len(problems) > 0 {
				t.Fatal(problems)
			}
			var got []string
			for _, f := range failures {
				if !strings.HasSuffix(f.Message, "is not as expected") {
					got = append(got, f.Message+reason(f.Reason))
				}
				for _, d := range f.Differences {
					got = append(got, fmt.Sprintf("%s: %s, %s", d.Path, d.Wanted, d.Found))
				}
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, "; ")); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func reason(text string) string {
	if text == "" {
		return ""
	}
	return " (" + text + ")"
}

// FuzzTests: any test file is read or refused, with positions inside it, and what it
// has runs.
func FuzzTests(f *testing.F) {
	f.Add("tests:\n  - name: x\n    publish: {topic: row, payload: {a: [1, .inf, 1e400]}}\n    expect: [{rule: row, http: center, body: {a: 1}}]\n")
	f.Add("tests: [{name: x, event: {event: client.connected, conn_props: {a: 1}}, expect: [{rule: event, http: center, id: x, lane: false}]}]")
	f.Add("tests: [{name: x, event: {event: delivery.dropped, payload_base64: AA==}, now: 1, expect: []}]")
	f.Add("tests: [1, {}, {publish: 1, event: [], expect: {}}, {event: {event: []}}]")
	set, problems := rules.BuildText(testedRules)
	if set == nil {
		f.Fatal(problems)
	}
	f.Fuzz(func(t *testing.T, text string) {
		failures, problems := rules.RunTests(set, text)
		for _, p := range problems {
			if p.Line < 1 || p.Col < 1 || p.Name == "" || p.Message == "" {
				t.Errorf("bad problem %+v", p)
			}
		}
		for _, f := range failures {
			if f.Message == "" || f.Line < 1 {
				t.Errorf("bad failure %+v", f)
			}
		}
	})
}
