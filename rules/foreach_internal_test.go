package rules

import (
	"errors"
	"testing"
	"time"
)

// TestForeachTime: elements that take too long fail the rule, and not only once all
// of them have had their turn.
func TestForeachTime(t *testing.T) {
	for name, list := range map[string]string{"of the payload": "payload", "computed": "json_decode(payload)"} {
		t.Run(name, func(t *testing.T) {
			p := compile(`FOREACH `+list+` AS e DO e INCASE e > 1 FROM "#"`, func(d diagnostic) { t.Fatal(d.message) })
			payload := []byte("[2, 1, 1]")
			e := &env{now: time.Now}
			e.reset(&Message{Topic: "t", Payload: payload}, payload)
			e.start("slow")
			if ok, err := p.first(e); !ok || err != nil {
				t.Fatalf("in time: %t, %v", ok, err)
			}
			e.elements.until = time.Now().Add(-time.Nanosecond)
			ok, err := p.next(e)
			if wrong, is := errors.AsType[*fault](err); ok || !is || wrong.outcome != BadArgument || wrong.message != "FOREACH takes longer than 5s" {
				t.Errorf("too late: %t, %v", ok, err)
			}
		})
	}
}
