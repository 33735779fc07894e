package rules_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

func evalLine(t *testing.T, sql, event string) string {
	t.Helper()
	line, err := json.Marshal(map[string]any{"sql": sql, "event": json.RawMessage(event)})
	if err != nil {
		t.Fatal(err)
	}
	return evalText(string(line))
}

// vectorClock is the time at which statements run.
var vectorClock = time.UnixMilli(1_700_000_000_005).UTC()

func evalText(line string) string {
	return string(rules.Eval([]byte(line), func() time.Time { return vectorClock }))
}

// published is an event with the payload given, on topic fleet/v7/telemetry.
func published(payload string) string {
	text, _ := json.Marshal(payload)
	return `{"topic":"fleet/v7/telemetry","clientid":"v7","qos":1,"timestamp":1700000000000,"payload":` + string(text) + `}`
}

const telemetry = `{"vin":"V7","speed":88,"ratio":0.5,"ok":true,"none":null,"text":"12","word":"fast",
	"pos":{"lat":52.5,"lon":13.4},"list":[10,20,30],"big":9007199254740993,"nested":"{\"a\":{\"b\":[1,2]}}",
	"a.b":1,"a*":2,"#":3,"@this":4,"dup":1,"dup":2,"esc\"aped":5,"objs":[{"x":1},{"x":2}]}`

// TestSelect asserts what an expression selected AS x answers; "" is undefined.
func TestSelect(t *testing.T) {
	tests := []struct{ name, expr, want string }{
		{"string literal", `'text'`, `"text"`},
		{"literal is trimmed of quotes", `'"abc"'`, `"abc"`},
		{"no escapes in a literal", `'a\n'`, `"a\\n"`},
		{"integer", `42`, `42`},
		{"float", `1.50`, `1.5`},
		{"float with an exponent", `1.5e3`, `1500.0`},
		{"booleans", `[true, false]`, `[true,false]`},
		{"sign", `[-5, +5, - 1.5]`, `[-5,5,-1.5]`},
		{"big integer", `12345678901234567890`, `12345678901234567890`},
		{"big integers in a list", `[12345678901234567890, -12345678901234567890]`, `[12345678901234567890,-12345678901234567890]`},
		{"column", `clientid`, `"v7"`},
		{"unknown column", `"username"`, ``},
		{"path", `payload.pos.lat`, `52.5`},
		{"integer beyond 2^53", `payload.big`, `9007199254740993`},
		{"null", `payload.none`, `null`},
		{"missing key", `payload.nope`, ``},
		{"missing parent", `payload.nope.deeper`, ``},
		{"wrong container", `payload.speed.x`, ``},
		{"key with a point", `payload.'a.b'`, `1`},
		{"key with a star", `payload.'a*'`, `2`},
		{"key that is a path language's operator", `payload.'#'`, `3`},
		{"key that is a modifier", `payload.'@this'`, `4`},
		{"last of duplicate keys", `payload.dup`, `2`},
		{"escaped key", `payload.'esc"aped'`, `5`},
		{"quoted step in double quotes", `payload."vin"`, `"V7"`},
		{"first index", `payload.list[1]`, `10`},
		{"last index", `payload.list[-1]`, `30`},
		{"index zero", `payload.list[0]`, ``},
		{"index out of range", `payload.list[4]`, ``},
		{"negative index out of range", `payload.list[-4]`, ``},
		{"index of a map", `payload.pos[1]`, ``},
		{"key of a list", `payload.list.x`, ``},
		{"path below an index", `payload.objs[2].x`, `2`},
		{"text that holds JSON", `payload.nested.a.b[2]`, `2`},
		{"text that holds none", `payload.word.a`, ``},
		{"whole object", `payload.pos`, `{"lat":52.5,"lon":13.4}`},
		{"whole list", `payload.list`, `[10,20,30]`},

		{"addition", `payload.speed + 2`, `90`},
		{"precedence", `1 + 2 * 3`, `7`},
		{"left associative", `10 - 3 - 2`, `5`},
		{"parentheses", `(1 + 2) * 3`, `9`},
		{"division is a float", `4 / 2`, `2.0`},
		{"div truncates", `-7 div 2`, `-3`},
		{"mod has the sign of the dividend", `-7 mod 2`, `-1`},
		{"div and mod as functions", `[div(7, 2), mod(7, 2)]`, `[3,1]`},
		{"plus overflows into big", `9223372036854775807 + 1`, `9223372036854775808`},
		{"minus overflows into big", `-9223372036854775807 - 2`, `-9223372036854775809`},
		{"times overflows into big", `9007199254740993 * 9007199254740993`, `81129638414606699710187514626049`},
		{"big shrinks again", `9223372036854775808 - 1`, `9223372036854775807`},
		{"smallest integer", `-9223372036854775808 div -1`, `9223372036854775808`},
		{"float arithmetic", `payload.ratio * 3`, `1.5`},
		{"float sums", `[payload.ratio + 1, 1 - payload.ratio, -payload.ratio]`, `[1.5,0.5,-0.5]`},
		{"floor of a large float", `floor(1.0e20)`, `100000000000000000000`},
		{"large and small floats", `[1.0e300, 1.0e-9, 1.0e20]`, `[1e+300,1e-09,100000000000000000000.0]`},
		{"plus joins strings", `'a' + 'b'`, `"ab"`},
		{"plus stringifies", `'n=' + 5 + 1.50 + true`, `"n=51.5true"`},
		{"plus with a map", `'' + payload.pos`, `"{\"lat\":52.5,\"lon\":13.4}"`},
		{"word operators in any case", `7 DIV 2 Mod 2`, `1`},

		{"comparison as a value", `payload.speed > 80`, `true`},
		{"searched case", `CASE WHEN payload.speed > 100 THEN 'high' WHEN payload.speed > 50 THEN 'mid' ELSE 'low' END`, `"mid"`},
		{"case without else", `CASE WHEN false THEN 1 END`, ``},
		{"simple case", `CASE payload.vin WHEN 'V6' THEN 6 WHEN 'V7' THEN 7 END`, `7`},
		{"simple case converts nothing", `CASE payload.text WHEN 12 THEN 'n' ELSE 'none' END`, `"none"`},

		{"null()", `null()`, ``},
		{"coalesce of two", `coalesce(payload.nope, 'x')`, `"x"`},
		{"coalesce of a list", `coalesce([payload.nope, payload.none, 1])`, `null`},
		{"is_null", `[is_null(payload.nope), is_null(payload.none), is_null(1)]`, `[true,false,false]`},
		{"is_null_var", `[is_null_var(payload.nope), is_null_var(payload.none), is_null_var(1)]`, `[true,true,false]`},
		{"is_not_null", `[is_not_null(payload.nope), is_not_null_var(payload.none), is_not_null(1)]`, `[false,false,true]`},
		{"type tests", `[is_str('a'), is_int(1), is_float(1.0), is_num(1), is_bool(true), is_map(payload.pos), is_array(payload.list), is_str(1)]`,
			`[true,true,true,true,true,true,true,false]`},
		{"str", `[str(1), str(1.0), str(0.1), str(true), str(payload.none), str(payload.nope)]`, `["1","1.0","0.1","true","null","undefined"]`},
		{"str of at most ten decimals", `str(1 / 3.0)`, `"0.3333333333"`},
		{"str of code points", `str([72, 105])`, `"Hi"`},
		{"str of a list", `str([72, 'x'])`, `"[72,\"x\"]"`},
		{"int", `[int('12'), int(-1.5), int(true), int('1.9')]`, `[12,-2,1,1]`},
		{"float()", `[float('1.5'), float(2)]`, `[1.5,2.0]`},
		{"bool", `[bool('true'), bool(0)]`, `[true,false]`},
		{"abs", `[abs(-5), abs(5)]`, `[5,5]`},
		{"rounding", `[round(1.5), round(-1.5), ceil(1.2), floor(-1.2), round(3)]`, `[2,-2,2,-2,3]`},
		{"lower and upper", `lower('ABC') + upper('xyz')`, `"abcXYZ"`},
		{"concat", `[concat('a', 1), concat(['a', 'b', 2])]`, `["a1","ab2"]`},
		{"topic", `[topic(), topic(2)]`, `["fleet/v7/telemetry","v7"]`},
		{"functions of the message", `[clientid(), qos(), payload('pos.lat')]`, `["v7",1,52.5]`},
		{"now_timestamp", `[now_timestamp(), now_timestamp('millisecond')]`, `[1700000000,1700000000005]`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := `{"matched":true,"rows":[{"x":` + tt.want + `}]}`
			if tt.want == "" {
				want = `{"matched":true,"rows":[{}]}`
			}
			if got := evalLine(t, `SELECT `+tt.expr+` AS x FROM "fleet/#"`, published(telemetry)); got != want {
				t.Errorf("SELECT %s AS x\n got %s\nwant %s", tt.expr, got, want)
			}
		})
	}
}

// TestRow asserts the whole row of a list of items.
func TestRow(t *testing.T) {
	tests := []struct{ name, items, want string }{
		{"a column keeps its name", `clientid, qos`, `{"clientid":"v7","qos":1}`},
		{"a path keeps its shape", `payload.pos.lat, payload.vin`, `{"payload":{"pos":{"lat":52.5},"vin":"V7"}}`},
		{"an index without alias is a list", `payload.list[2]`, `{"payload":{"list":[20]}}`},
		{"a string is its own key", `'abc'`, `{"abc":"abc"}`},
		{"AS may be left out", `payload.vin vin`, `{"vin":"V7"}`},
		{"alias in quotes", `payload.vin AS "the vin"`, `{"the vin":"V7"}`},
		{"nested alias", `1 AS a.b.c, 2 AS a.b.d, 3 AS a.e`, `{"a":{"b":{"c":1,"d":2},"e":3}}`},
		{"last write wins", `1 AS a, 2 AS a`, `{"a":2}`},
		{"a scalar on the way is replaced", `1 AS a, 2 AS a.b`, `{"a":{"b":2}}`},
		{"text on the way is replaced, not read", `'{"x":1}' AS a, 2 AS a.b`, `{"a":{"b":2}}`},
		{"alias index replaces", `payload.list AS c, 'X' AS c[2]`, `{"c":[10,"X",30]}`},
		{"alias index from the end", `payload.list AS c, 'X' AS c[-1]`, `{"c":[10,20,"X"]}`},
		{"alias index zero prepends", `payload.list AS c, 'X' AS c[0]`, `{"c":["X",10,20,30]}`},
		{"alias index minus zero appends", `payload.list AS c, 'X' AS c[-0]`, `{"c":[10,20,30,"X"]}`},
		{"alias index out of range changes nothing", `payload.list AS c, 'X' AS c[7]`, `{"c":[10,20,30]}`},
		{"alias index without a list", `'X' AS c[7]`, `{"c":["X"]}`},
		{"items see earlier outputs", `payload.pos AS p, p.lat AS lat`, `{"p":{"lat":52.5,"lon":13.4},"lat":52.5}`},
		{"outputs come before the row", `'other' AS clientid, clientid AS c`, `{"clientid":"other","c":"other"}`},
		{"and what they have not is the row's", `1 AS payload.x, payload.vin AS v`, `{"payload":{"x":1},"v":"V7"}`},
		{"a map in the outputs stays as it was", `payload.pos AS p, p AS q, 1 AS q.lat`, `{"p":{"lat":52.5,"lon":13.4},"q":{"lat":1,"lon":13.4}}`},
		{"columns are case-sensitive", `ClientID AS x`, `{}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := `{"matched":true,"rows":[` + tt.want + `]}`
			if got := evalLine(t, `SELECT `+tt.items+` FROM "fleet/#"`, published(telemetry)); got != want {
				t.Errorf("SELECT %s\n got %s\nwant %s", tt.items, got, want)
			}
		})
	}
}

func TestRowOfText(t *testing.T) {
	tests := []struct{ name, items, payload, want string }{
		{"star", `*`, `{}`, `{"topic":"fleet/v7/telemetry","clientid":"v7","qos":1,"timestamp":1700000000000,"payload":"{}"}`},
		{"star and more", `*, 2 AS qos`, `{}`, `{"topic":"fleet/v7/telemetry","clientid":"v7","qos":2,"timestamp":1700000000000,"payload":"{}"}`},
		{"payload is text", `payload`, `{"a":1}`, `{"payload":"{\"a\":1}"}`},
		{"payload as another", `payload AS p, p.a AS a`, `{"a":1}`, `{"p":"{\"a\":1}","a":1}`},
		{"payload patched in place", `payload, 'X' AS payload.data[1].name`, `{"data":[{"name":"a"},{"name":"b"}]}`,
			`{"payload":{"data":[{"name":"X"},{"name":"b"}]}}`},
		{"payload that is no UTF-8", `payload`, "a\xffb", `{"payload":"a` + "\ufffd" + `b"}`},
		{"a list as payload", `payload[2] AS x`, `[1,2]`, `{"x":2}`},
		{"a number as payload", `payload.x AS x`, `5`, `{}`},
		{"a number that no float holds", `payload.x AS x`, `{"x":1e999}`, `{}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			event := published(tt.payload)
			if strings.Contains(tt.payload, "\xff") {
				event = `{"topic":"fleet/v7/telemetry","payload_base64":"Yf9i"}`
			}
			want := `{"matched":true,"rows":[` + tt.want + `]}`
			if got := evalLine(t, `SELECT `+tt.items+` FROM "fleet/#"`, event); got != want {
				t.Errorf("SELECT %s\n got %s\nwant %s", tt.items, got, want)
			}
		})
	}
}

func TestWhere(t *testing.T) {
	tests := []struct {
		name, where string
		want        bool
	}{
		{"greater", `payload.speed > 80`, true},
		{"not greater", `payload.speed > 88`, false},
		{"greater or equal", `payload.speed >= 88`, true},
		{"equal", `payload.vin = 'V7'`, true},
		{"not equal, both spellings", `payload.vin != 'V8' AND payload.vin <> 'V8'`, true},
		{"integer equals float", `payload.speed = 88.0`, true},
		{"integers are exact", `payload.big = 9007199254740992`, false},
		{"integer against float is exact", `payload.big > 9007199254740992.0`, true},
		{"number against numeric text", `payload.text = 12`, true},
		{"numeric text against number", `13 > payload.text`, true},
		{"text against text sorts as text", `'9' > '12'`, true},
		{"number against other text is false", `payload.word = 12`, false},
		{"and so is its opposite", `payload.word != 12`, false},
		{"boolean against text", `payload.ok = 'true'`, true},
		{"null against text", `payload.none = 'null'`, true},
		{"undefined against a value", `payload.nope = 1`, false},
		{"undefined is not even different", `payload.nope != 1`, false},
		{"undefined against null", `payload.nope = payload.none`, false},
		{"undefined against undefined", `payload.nope = payload.gone`, true},
		{"undefined against undefined, ordered", `payload.nope <= payload.gone AND payload.nope >= payload.gone`, true},
		{"undefined is not less than undefined", `payload.nope < payload.gone`, false},
		{"number < boolean", `1 < true`, true},
		{"boolean < map", `payload.ok < payload.pos`, true},
		{"map < list", `payload.pos < payload.list`, true},
		{"list < string", `payload.list < 'a'`, true},
		{"lists compare by elements", `payload.list = [10, 20.0, 30]`, true},
		{"a double-quoted value is a variable", `clientid = "v7"`, false},
		{"AND binds closer than OR", `true OR false AND false`, true},
		{"parentheses", `(true OR false) AND false`, false},
		{"NOT binds closer than AND", `NOT false AND false`, false},
		{"NOT of a comparison", `NOT payload.speed > 100`, true},
		{"NOT of a conjunction", `NOT (payload.speed > 80 AND payload.vin = 'V7')`, false},
		{"NOT of what is no boolean", `NOT payload.vin`, false},
		{"bare boolean", `payload.ok`, true},
		{"bare value that is no boolean", `payload.speed`, false},
		{"IN", `payload.vin IN ('V6', 'V7')`, true},
		{"IN converts nothing", `payload.text IN (12)`, false},
		{"IN tells 88 from 88.0", `payload.speed IN (88.0)`, false},
		{"NOT IN", `payload.vin NOT IN ('V6', 'V8')`, true},
		{"NOT ... IN", `NOT payload.vin IN ('V6', 'V7')`, false},
		{"topic match", `topic =~ 'fleet/+/telemetry'`, true},
		{"topic match with #", `topic =~ 'fleet/#'`, true},
		{"no topic match", `topic =~ 'fleet/+'`, false},
		{"a function", `is_num(payload.speed)`, true},
		{"arithmetic binds closer than comparison", `payload.speed - 8 * 10 = 8`, true},
		{"keywords in any case", `not payload.speed > 100 And payload.ok oR false`, true},
		{"an alias", `v = 'V7'`, true},
		{"an alias hides a column", `qos = 'hidden'`, true},
		{"maps compare whole", `payload.pos = p`, true},
		{"smaller maps come first", `payload.objs[1] < payload.pos`, true},
		{"maps of one size by keys, then values", `payload.objs[1] < payload.objs[2]`, true},
		{"IN with lists and maps", `payload.list IN (1, [10, 20, 30]) AND payload.objs[1] IN (payload.objs[2], payload.objs[1])`, true},
		{"IN with lists tells 20 from 20.0", `payload.list IN ([10, 20.0, 30])`, false},
		{"IN with floats, null, booleans and big integers", `0.5 IN (payload.ratio) AND payload.none IN (true, payload.none) AND payload.ok IN (true) AND 99999999999999999999 IN (99999999999999999999)`, true},
		{"big integers compare", `99999999999999999999 > 99999999999999999998 AND 99999999999999999999 > 1.5 AND -99999999999999999999 < payload.speed`, true},
		{"booleans and null sort by name", `false < payload.none AND payload.none < true`, true},
		{"signed and float text is numeric", `'-12' = -12 AND '+1.5' = 1.5 AND '1.5e1' = 15`, true},
		{"what only looks numeric", `'1.' = 1 OR '.5' = 0.5 OR '1e' = 1 OR ' 1' = 1 OR '-' = 0 OR '' = 0 OR '1_0' = 10`, false},
		{"=~ needs text", `payload.speed =~ '#' OR payload.nope =~ '#'`, false},
		{"comment", "payload.ok -- AND false\n AND true", true},
		{"short circuit", `false AND upper(1) = 'x'`, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sql := `SELECT payload.vin AS v, payload.pos AS p, 'hidden' AS qos FROM "fleet/#" WHERE ` + tt.where
			got := evalLine(t, sql, published(telemetry))
			if strings.HasPrefix(got, `{"matched":true`) != tt.want || strings.Contains(got, "error") {
				t.Errorf("WHERE %s: %s, want %t", tt.where, got, tt.want)
			}
		})
	}
}

func TestFrom(t *testing.T) {
	tests := []struct {
		name, from, topic string
		want              bool
	}{
		{"exact", `"a/b"`, "a/b", true},
		{"other", `"a/b"`, "a/c", false},
		{"single quotes", `'a/+'`, "a/b", true},
		{"bare word", `abc`, "abc", true},
		{"several", `"x", 'a/#'`, "a/b/c", true},
		{"# matches the parent", `"a/#"`, "a", true},
		{"+ matches an empty level", `"a/+"`, "a/", true},
		{"+ is one level", `"a/+"`, "a/b/c", false},
		{"$ topics are hidden from #", `"#"`, "$SYS/x", false},
		{"$ topics are hidden from +", `"+/x"`, "$SYS/x", false},
		{"$ topics by name", `"$SYS/#"`, "$SYS/x", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := evalLine(t, `SELECT topic FROM `+tt.from, `{"topic":"`+tt.topic+`"}`)
			if strings.HasPrefix(got, `{"matched":true`) != tt.want {
				t.Errorf("FROM %s, topic %s: %s, want %t", tt.from, tt.topic, got, tt.want)
			}
		})
	}
}

func TestEvalAnswers(t *testing.T) {
	tests := []struct{ name, line, want string }{
		{"parse error", `{"sql":"SELECT a\nFROM 5"}`, `{"error":"parse","message":"2:6: expected a topic filter in quotes, found \"5\""}`},
		{"unknown function", `{"sql":"SELECT upperr(a) AS x FROM \"t\""}`, `{"error":"parse","message":"1:8: unknown function \"upperr\""}`},
		{"payload is no JSON", `{"sql":"SELECT payload.x FROM \"t\"","event":{"payload":"x"}}`, `{"error":"runtime","message":"the payload is not valid JSON"}`},
		{"empty payload", `{"sql":"SELECT payload.x FROM \"t\"","event":{"payload":""}}`, `{"error":"runtime","message":"the payload is not valid JSON"}`},
		{"SELECT fails before WHERE", `{"sql":"SELECT payload.x FROM \"t\" WHERE false","event":{"payload":"x"}}`, `{"error":"runtime","message":"the payload is not valid JSON"}`},
		{"payload that is not read may be anything", `{"sql":"SELECT payload FROM \"t\"","event":{"payload":"x"}}`, `{"matched":true,"rows":[{"payload":"x"}]}`},
		{"no payload", `{"sql":"SELECT payload.x AS x FROM \"t\"","event":{}}`, `{"matched":true,"rows":[{}]}`},
		{"bad argument", `{"sql":"SELECT lower(1) AS x FROM \"t\""}`, `{"error":"runtime","message":"lower: needs a string, found 1"}`},
		{"undefined argument", `{"sql":"SELECT lower(username) AS x FROM \"t\""}`, `{"error":"runtime","message":"lower: needs a string, found undefined"}`},
		{"division by zero", `{"sql":"SELECT 1 div 0 AS x FROM \"t\""}`, `{"error":"runtime","message":"division by zero"}`},
		{"float division by zero", `{"sql":"SELECT 1 / 0.0 AS x FROM \"t\""}`, `{"error":"runtime","message":"division by zero"}`},
		{"minus of text", `{"sql":"SELECT 'a' - 1 AS x FROM \"t\""}`, `{"error":"runtime","message":"- needs numbers, found a string and an integer"}`},
		{"condition that is no boolean", `{"sql":"SELECT 1 AS x FROM \"t\" WHERE upper('a')"}`, `{"error":"runtime","message":"upper answers a string where a condition needs a boolean"}`},
		{"overflow of a float", `{"sql":"SELECT 1.0e300 * 1.0e300 AS x FROM \"t\""}`, `{"error":"runtime","message":"the result is no finite number"}`},
		{"plus of a map", `{"sql":"SELECT 1 + flags AS x FROM \"t\"","event":{"flags":{}}}`, `{"error":"runtime","message":"+ needs numbers, found an integer and a map"}`},
		{"sign of text", `{"sql":"SELECT -clientid AS x FROM \"t\"","event":{"clientid":"c"}}`, `{"error":"runtime","message":"- needs a number, found a string"}`},
		{"no such boolean", `{"sql":"SELECT bool('yes') AS x FROM \"t\""}`, `{"error":"runtime","message":"bool: no boolean: \"yes\""}`},
		{"no such unit", `{"sql":"SELECT now_timestamp('hour') AS x FROM \"t\""}`, `{"error":"parse","message":"1:22: now_timestamp: expected second, millisecond, microsecond or nanosecond, found \"hour\""}`},
		{"no such level", `{"sql":"SELECT topic(3) AS x FROM \"#\"","event":{"topic":"a/b"}}`, `{"error":"runtime","message":"topic: the topic has no level 3"}`},
		{"abs of a float", `{"sql":"SELECT abs(-1.5) AS x FROM \"t\""}`, `{"error":"runtime","message":"abs: needs an integer, found -1.5"}`},
		{"template", `{"sql":"SELECT payload, 1.50 AS f, [72,105] AS l, true AS b, null() AS u FROM \"t\"","event":{"payload":"{\"a\":\"q\\\"q\"}"},"template":"${payload.a} ${.f} ${l} ${b} ${u} ${x.y} ${$}{x} ${a-b} $ ${"}`,
			`{"matched":true,"rows":[{"payload":"{\"a\":\"q\\\"q\"}","f":1.5,"l":[72,105],"b":true}],"rendered":["q\"q 1.5 Hi true undefined undefined ${x} ${a-b} $ ${"]}`},
		{"whole row in a template", `{"sql":"SELECT 1 AS a, null() AS b, null() AS c.d FROM \"t\"","template":"${.}"}`,
			`{"matched":true,"rows":[{"a":1,"c":{}}],"rendered":["{\"a\":1,\"b\":\"undefined\",\"c\":{\"d\":\"undefined\"}}"]}`},
		{"empty template", `{"sql":"SELECT 1 AS a FROM \"t\"","template":""}`, `{"matched":true,"rows":[{"a":1}],"rendered":["{\"a\":1}"]}`},
		{"no JSON", `SELECT`, `{"error":"request","message":"no JSON object"}`},
		{"no statement", `{}`, `{"error":"request","message":"sql must be a string"}`},
		{"retain", `{"sql":"SELECT flags.retain AS r FROM \"t\"","event":{"retain":true}}`, `{"matched":true,"rows":[{"r":true}]}`},
		{"user property", `{"sql":"SELECT pub_props.'User-Property'.foo AS f FROM \"t\"","event":{"pub_props":{"User-Property":{"foo":"bar"}}}}`, `{"matched":true,"rows":[{"f":"bar"}]}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := string(rules.Eval([]byte(tt.line), nil)); got != tt.want {
				t.Errorf("%s\n got %s\nwant %s", tt.line, got, tt.want)
			}
		})
	}
}
