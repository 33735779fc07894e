package rules_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

var fenced = regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")

// TestDocsFromEMQX loads the rule files of docs/from-emqx.md, and has the rule that was moved over send what it sent in EMQX.
func TestDocsFromEMQX(t *testing.T) {
	page, err := os.ReadFile("../docs/from-emqx.md")
	if err != nil {
		t.Fatal(err)
	}
	files := 0
	for _, block := range fenced.FindAllStringSubmatch(string(page), -1) {
		if block[1] != "yaml" {
			continue
		}
		files++
		set := load(t, block[2])
		m := message("fleet/v7/telemetry", `{"vin":"V7","decel":7.1}`)
		got := match(set, m)
		if len(got) != 1 || len(got[0].Deliveries) != 1 {
			t.Fatalf("%s: matches %v", block[2], got)
		}
		d := got[0].Deliveries[0]
		want := `{"vin": "V7", "decel": 7.1, "ts": 1700000000000}`
		if files == 2 { // as a map
			want = strings.ReplaceAll(want, " ", "")
		}
		if string(d.Body) != want || d.Path != "/vehicles/V7/alerts" {
			t.Errorf("%s sends %s to %s, want %s", block[2], d.Body, d.Path, want)
		}
	}
	if files != 2 {
		t.Errorf("%d rule files, want 2", files)
	}
	known := strings.Join(rules.FunctionNames(), " ") + " "
	for _, name := range regexp.MustCompile("`([a-z0-9_]+)`").FindAllStringSubmatch(section(t, string(page), "## What does not move"), -1) {
		if strings.Contains(known, name[1]+" ") {
			t.Errorf("%s is said not to move, and does", name[1])
		}
	}
}

// section is the part of a page under a heading of the second level.
func section(t *testing.T, page, heading string) string {
	t.Helper()
	_, after, ok := strings.Cut(page, heading+"\n")
	if !ok {
		t.Fatalf("no section %s", heading)
	}
	text, _, _ := strings.Cut(after, "\n## ")
	return text
}
