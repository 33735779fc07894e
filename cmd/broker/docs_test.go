package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// pages returns the text of README.md and of each page of docs, by name.
func pages(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(names) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	text := map[string]string{}
	for _, name := range append(names, "../../README.md") {
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text[filepath.Base(name)] = string(src)
	}
	return text
}

// TestMetricsOfTheDocsExist: nobody waits for an alarm on a metric that there is not.
func TestMetricsOfTheDocsExist(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	publish3(t, dial3(t, f.mqttAddress(), "v30"), "fleet/v30/telemetry", `{"vin":"V30","decel":9}`)
	f.webhook.await(1)
	exposed := f.get(t, "/metrics")
	found := 0
	for page, text := range pages(t) {
		for _, name := range regexp.MustCompile(`throughline_[a-z0-9_]+`).FindAllString(text, -1) {
			found++
			if !strings.Contains(exposed, "\n# TYPE "+name+" ") {
				t.Errorf("%s names %s, which /metrics has not", page, name)
			}
		}
	}
	if found == 0 {
		t.Error("the docs name no metric")
	}
}

// TestPathsOfTheDocsExist asks for each row of the table of the admin API.
func TestPathsOfTheDocsExist(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	rows := regexp.MustCompile("(?m)^\\| `(GET|POST) (/[^`]+)` \\|").FindAllStringSubmatch(pages(t)["operations.md"], -1)
	if len(rows) < 8 {
		t.Fatalf("the table of the admin API has rows %q", rows)
	}
	for _, row := range rows {
		req, err := http.NewRequestWithContext(t.Context(), row[1], "http://"+f.adminAddress()+strings.ReplaceAll(row[2], "{webhook-id}", "nosuch"), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if ours := resp.Header.Get("Content-Type") == "application/problem+json"; resp.StatusCode != http.StatusOK && !ours {
			t.Errorf("%s %s: %s", row[1], row[2], resp.Status)
		}
	}
}

// TestCommandsOfTheDocsParse: every command line of a block of shell is one that the program takes.
func TestCommandsOfTheDocsParse(t *testing.T) {
	text := pages(t)
	t.Chdir(t.TempDir())
	if err := os.Mkdir("rules.d", 0o755); err != nil {
		t.Fatal(err)
	}
	found := 0
	for page, text := range text {
		for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
			for line := range strings.Lines(block[1]) {
				command := regexp.MustCompile(`^(?:\./broker|go run \./cmd/broker) ([^#>&|\n]+)`).FindStringSubmatch(line)
				if command == nil {
					continue
				}
				found++
				args := strings.Fields(command[1])
				want := []int{exitOK, exitProblem} // there is nothing to list here, but the line is understood
				if slices.Contains([]string{"serve", "demo"}, args[0]) {
					args, want = append(args, "-h"), []int{exitOK} // parse the flags and start nothing
				}
				if code, _, errs := run(t, "", args...); !slices.Contains(want, code) {
					t.Errorf("%s: broker %s: exit %d\n%s", page, command[1], code, errs)
				}
			}
		}
	}
	if found == 0 {
		t.Error("the docs have no command line")
	}
}

// TestConfigsOfTheDocs: what is shown as the defaults loads, and is the defaults.
func TestConfigsOfTheDocs(t *testing.T) {
	annotated, err := os.ReadFile("../../testdata/config/broker.yaml")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```yaml\n(listeners:.*?)```").FindStringSubmatch(pages(t)["operations.md"])
	if block == nil {
		t.Fatal("operations.md shows no configuration")
	}
	for name, text := range map[string]string{
		"testdata/config/broker.yaml": string(annotated),
		"docs/operations.md":          strings.Replace(block[1], `token: "${file:/run/secrets/admin}", `, "", 1),
	} {
		file := writeConfig(t, text)
		dir := filepath.Dir(file)
		if err := os.Mkdir(filepath.Join(dir, "rules.d"), 0o755); err != nil {
			t.Fatal(err)
		}
		got, problems := loadConfig(file, loadOptions{RequireSecrets: true})
		if len(problems) > 0 {
			t.Errorf("%s: %v", name, problems)
		}
		want := defaultConfig()
		want.Auth.Anonymous = true
		want.DataDir = filepath.Join(dir, "data")
		want.Rules.Dir = filepath.Join(dir, "rules.d")
		want.Trace.Instance = defaultInstance()
		want.Admin.Hosts = got.Admin.Hosts // none, as an empty list
		if diff := cmp.Diff(want, got); diff != "" || len(got.Admin.Hosts) > 0 {
			t.Errorf("%s is not the defaults (-defaults +file):\n%s", name, diff)
		}
		bare, _ := loadConfig(writeConfig(t, "log: {}"), loadOptions{})
		if filepath.Base(bare.DataDir) != "data" || !filepath.IsAbs(bare.DataDir) {
			t.Errorf("data_dir left out is %q, not in the file's folder", bare.DataDir)
		}
	}
}

// TestExamplesOfTheDocsAreRules: each block of YAML that holds rules loads.
func TestExamplesOfTheDocsAreRules(t *testing.T) {
	readme := pages(t)["README.md"]
	file := regexp.MustCompile(`(?s)cat > rules\.d/\S+ <<'EOF'\n(.*?)\nEOF`).FindStringSubmatch(readme)
	if file == nil {
		t.Fatal("README.md has no rule file")
	}
	name := filepath.Join(t.TempDir(), "rule.yaml")
	if err := os.WriteFile(name, []byte(file[1]), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, problems := rules.Load([]string{name}, rules.LoadOptions{}); len(problems) > 0 {
		t.Errorf("README.md: %v", problems)
	}
}

// TestStepsOfTheDocs: operations.md and architecture.md name the steps of the stop in their order,
// and operations.md how long they take at the most.
func TestStepsOfTheDocs(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	var total time.Duration
	var names []string
	for _, s := range f.steps {
		total += s.bound
		names = append(names, s.name)
	}
	order := regexp.MustCompile(strings.Join(names, `\b[^.]*\b`))
	for page, text := range pages(t) {
		if page != "operations.md" && page != "architecture.md" {
			continue
		}
		if !order.MatchString(text) {
			t.Errorf("%s does not name the steps %v in that order in one sentence", page, names)
		}
	}
	if want := fmt.Sprintf("%d s in all", int(total.Seconds())); !strings.Contains(strings.Join(strings.Fields(pages(t)["operations.md"]), " "), want) {
		t.Errorf("operations.md does not say %q", want)
	}
}
