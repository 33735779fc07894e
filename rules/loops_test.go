package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

// TestManyLoops: as many rules as a file may have, each leading to all others, are
// loaded in the time that it takes to read them.
func TestManyLoops(t *testing.T) {
	var b strings.Builder
	b.WriteString("rules:\n")
	for i := 0; b.Len() < 1<<19; i++ {
		fmt.Fprintf(&b, "  - {name: r%d, sql: 'SELECT 1 AS x FROM a%d, \"+/b\"', actions: [republish: {topic: a/b}]}\n", i, i)
	}
	set, problems := rules.BuildText(b.String())
	if set == nil || len(problems) == 0 || problems[0].Name != "republish-loop" {
		t.Errorf("%d problems, the first %+v", len(problems), problems[:min(1, len(problems))])
	}
}
