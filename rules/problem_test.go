package rules_test

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/throughline-mqtt/throughline/rules"
)

var update = flag.Bool("update", false, "rewrite the goldens")

// TestProblems loads the files of each archive in testdata/problems and compares
// what is printed with its file want.
func TestProblems(t *testing.T) {
	archives, err := filepath.Glob("testdata/problems/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no archives: %v", err)
	}
	for _, path := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Chdir(t.TempDir())
			var want *txtar.File
			for i, f := range archive.Files {
				if f.Name == "want" {
					want = &archive.Files[i]
					continue
				}
				writeFile(t, f.Name, string(f.Data))
			}
			set, problems := rules.Load([]string{"rules.d"}, rules.LoadOptions{LookupEnv: func(name string) (string, bool) {
				return "s3cret", name == "SET"
			}})
			if (set == nil) != rules.HasErrors(problems) {
				t.Errorf("set %v with problems %v", set, problems)
			}
			var b strings.Builder
			if err := rules.Print(&b, problems); err != nil {
				t.Fatal(err)
			}
			if *update {
				if want == nil {
					archive.Files = append(archive.Files, txtar.File{Name: "want"})
					want = &archive.Files[len(archive.Files)-1]
				}
				want.Data = []byte(b.String())
				rewrite(t, path, txtar.Format(archive))
				return
			}
			if want == nil {
				t.Fatal("no file want; run with -update")
			}
			if diff := cmp.Diff(string(want.Data), b.String()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

var packageDir, _ = os.Getwd()

func rewrite(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(packageDir, path), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestEveryProblemIsShown: each problem of the code comes about in an archive, or is asked for by its name in a test.
func TestEveryProblemIsShown(t *testing.T) {
	shown := map[string]bool{}
	archives, err := filepath.Glob("testdata/problems/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(archives, "../testdata/script/test.txtar") {
		archive, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for _, f := range archive.Files {
			writeFile(t, filepath.Join(dir, f.Name), string(f.Data))
		}
		_, problems := rules.Load([]string{filepath.Join(dir, "rules.d")}, rules.LoadOptions{})
		_, ofTests := rules.LoadTests([]string{filepath.Join(dir, "bad.d")}, rules.LoadOptions{})
		for _, p := range append(problems, ofTests...) {
			shown[p.Name] = true
		}
	}
	tests, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Glob("../testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	for _, path := range slices.Concat(tests, scripts) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(text)
	}
	for _, name := range problemNames(t) {
		if !shown[name] && !regexp.MustCompile(`[^a-z-]`+name+`[^a-z-]`).MatchString(source.String()) {
			t.Errorf("no test shows %s", name)
		}
	}
}
