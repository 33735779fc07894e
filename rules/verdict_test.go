package rules_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

// TestVerdicts: what check calls never true is true of no message, and what it calls always true is true of every one.
func TestVerdicts(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	constant := func() string {
		return pick("1", "1.0", "2", "-1", "'1'", "'1.0'", "'a'", "'b'", "'true'", "true", "false", "null()", "payload.a[0]", "1 + 1", "''")
	}
	operand := func() string { return pick("payload.a", "payload.b", "qos", "topic", constant(), constant()) }
	var condition func(depth int) string
	condition = func(depth int) string {
		if depth == 0 {
			switch random.IntN(8) {
			case 0:
				return fmt.Sprintf("%s %s (%s, %s)", operand(), pick("IN", "NOT IN"), constant(), constant())
			case 1:
				return pick("true", "false", "1", "'a'", "payload.a", "payload.b", "[1]", "is_null(payload.a)")
			}
			return fmt.Sprintf("%s %s %s", operand(), pick("=", "!=", "<", ">", "<=", ">=", "=", "=", "=~"), operand())
		}
		switch random.IntN(5) {
		case 0:
			return "NOT (" + condition(depth-1) + ")"
		case 1, 2:
			return "(" + condition(depth-1) + " OR " + condition(depth-1) + ")"
		}
		return "(" + condition(depth-1) + " AND " + condition(depth-1) + ")"
	}
	values := []string{"1", "1.0", "2", "-1", "3.5", `"1"`, `"1.0"`, `"a"`, `"b"`, `"true"`, "true", "false", "null", "[1]", `{"x":1}`, `""`, ""}
	var payloads []string
	for _, a := range values {
		for _, b := range []string{"1", `"a"`, "true", ""} {
			var members []string
			if a != "" {
				members = append(members, `"a":`+a)
			}
			if b != "" {
				members = append(members, `"b":`+b)
			}
			payloads = append(payloads, "{"+strings.Join(members, ",")+"}")
		}
	}
	seen := map[string]int{}
	for range 3000 {
		sql := "SELECT clientid FROM \"#\" WHERE " + condition(random.IntN(3))
		verdict := rules.Verdict(sql)
		seen[verdict]++
		if verdict == "" {
			continue
		}
		for _, payload := range payloads {
			var answer struct {
				Matched bool
				Error   string
			}
			line, err := json.Marshal(map[string]any{"sql": sql, "event": map[string]any{"topic": "a", "qos": 1, "payload": payload}})
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(rules.Eval(line, nil), &answer); err != nil {
				t.Fatal(err)
			}
			if answer.Error == "" && answer.Matched != (verdict == "always") {
				t.Fatalf("%s\nis %s true, and of %s it is %t", sql, verdict, payload, answer.Matched)
			}
		}
	}
	if seen["never"] < 150 || seen["always"] < 50 || seen[""] < 500 {
		t.Errorf("verdicts %v", seen)
	}
}
