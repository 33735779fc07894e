package rules_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

const badRules = "rules:\n  - name: broken\n    sql: SELECT upperr(a) AS x FROM \"t\"\n    actions: []\n"

func open(t *testing.T, o rules.KeeperOptions) *rules.Keeper {
	t.Helper()
	k, err := rules.OpenKeeper(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func TestReload(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	writeFile(t, path, hardBrake)
	var applied []string
	var k *rules.Keeper
	o := rules.KeeperOptions{Paths: []string{dir}, StateDir: state, Apply: func(s *rules.Set) {
		if k != nil && k.Current() == s {
			t.Error("a set was in use before it was applied")
		}
		applied = append(applied, s.Generation())
	}}
	k = open(t, o)
	first := k.Current()
	if r := k.Last(); !r.OK || r.Fallback || r.Generation != first.Generation() || len(r.Generation) != 12 {
		t.Errorf("first load %+v", r)
	}
	match(first, message("fleet/v7/telemetry", `{"decel":9}`))

	writeFile(t, path, badRules)
	if r := k.Reload(); r.OK || len(r.Problems) == 0 || k.Current() != first || r.Generation != first.Generation() {
		t.Errorf("bad files: %+v", r)
	}

	writeFile(t, path, strings.Replace(hardBrake, "6.5", "5", 1))
	if r := k.Reload(); !r.OK || k.Current() == first || r.Generation == first.Generation() {
		t.Errorf("good files: %+v", r)
	}
	if n := k.Current().Rules()[0].Outcomes().Matched.Load(); n != 1 {
		t.Errorf("a reload lost the counters: %d matched", n)
	}
	if len(applied) != 2 {
		t.Errorf("applied %v", applied)
	}
}

// TestRestartWithBadFiles starts on the copy of the last good files.
func TestRestartWithBadFiles(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	o := rules.KeeperOptions{Paths: []string{dir}, StateDir: state}
	writeFile(t, path, hardBrake)
	good := open(t, o).Current().Generation()
	writeFile(t, path, badRules)
	for _, attempt := range []string{"first restart", "second restart"} {
		k := open(t, o)
		if r := k.Last(); r.OK || !r.Fallback || r.Generation != good || len(r.Problems) == 0 {
			t.Errorf("%s: %+v", attempt, r)
		}
		if r := k.Reload(); !r.Fallback || k.Current().Generation() != good {
			t.Errorf("%s, reload of bad files: %+v", attempt, r)
		}
	}
	k := open(t, o)
	writeFile(t, path, strings.Replace(hardBrake, "6.5", "5", 1))
	if r := k.Reload(); !r.OK || r.Fallback {
		t.Errorf("reload of good files: %+v", r)
	}
	if files, err := os.ReadDir(state); err != nil || len(files) != 1 {
		t.Errorf("the state folder holds %v, %v", files, err)
	}
}

func TestNothingToStartWith(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "a.yaml"), badRules)
	tests := []struct{ name, kept string }{
		{"no copy", ""},
		{"the copy is cut", `{"version":1,"files":[{"path":"a.ya`},
		{"the copy is of another version", `{"version":2,"files":[]}`},
		{"the copy is bad", `{"version":1,"files":[{"path":"a.yaml","text":"rules: 1"}]}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			state := t.TempDir()
			if tt.kept != "" {
				writeFile(t, filepath.Join(state, "rules-last-good.json"), tt.kept)
			}
			_, err := rules.OpenKeeper(rules.KeeperOptions{Paths: []string{dir}, StateDir: state, Watch: true})
			failed, ok := errors.AsType[*rules.LoadError](err)
			if !ok || len(failed.Problems) == 0 || !strings.Contains(err.Error(), "upperr") {
				t.Errorf("error %v", err)
			}
			if (tt.kept != "") != strings.Contains(err.Error(), "last good rules") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestCopyFails: a set is used although its copy cannot be written.
func TestCopyFails(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "a.yaml"), hardBrake)
	k := open(t, rules.KeeperOptions{Paths: []string{dir}, StateDir: filepath.Join(dir, "gone")})
	if r := k.Last(); !r.OK || r.Err == nil {
		t.Errorf("%+v", r)
	}
}

// TestWatch changes files in the ways that editors and Kubernetes do, and waits
// for the reload that each must cause.
func TestWatch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "rules.d")
	link := filepath.Join(dir, "..data")
	version := func(name, threshold string) {
		writeFile(t, filepath.Join(dir, name, "a.yaml"), strings.Replace(hardBrake, "6.5", threshold, 1))
	}
	version("..v1", "1")
	symlink(t, "..v1", link)
	symlink(t, "..data/a.yaml", filepath.Join(dir, "a.yaml"))

	reloads := make(chan rules.Reload, 100)
	k := open(t, rules.KeeperOptions{Paths: []string{dir}, Watch: true, Debounce: 20 * time.Millisecond, OnReload: func(r rules.Reload) { reloads <- r }})
	wantRules := func(step string, n int, text string) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			s := k.Current()
			if len(s.Rules()) == n && strings.Contains(s.Rules()[n-1].SQL, text) {
				return
			}
			select {
			case <-reloads:
			case <-deadline:
				t.Fatalf("%s: no reload, last %+v", step, k.Last())
			}
		}
	}
	wantRules("start", 1, ">= 1")

	version("..v2", "2")
	symlink(t, "..v2", link+"_tmp")
	rename(t, link+"_tmp", link)
	wantRules("a ConfigMap swaps its link", 1, ">= 2")

	second := strings.NewReplacer("hard-brake", "second", "notification-center", "other", "6.5", "3").Replace(hardBrake)
	writeFile(t, filepath.Join(dir, ".b.yaml.swp"), second)
	rename(t, filepath.Join(dir, ".b.yaml.swp"), filepath.Join(dir, "b.yaml"))
	wantRules("an editor renames", 2, ">= 3")

	third := strings.NewReplacer("hard-brake", "third", "notification-center", "third", "6.5", "4").Replace(hardBrake)
	writeFile(t, filepath.Join(dir, "sub", "c.yaml"), third)
	wantRules("a new folder", 3, ">= 4")
	writeFile(t, filepath.Join(dir, "sub", "c.yaml"), strings.Replace(third, ">= 4", ">= 5", 1))
	wantRules("a file in the new folder", 3, ">= 5")

	if err := os.RemoveAll(filepath.Join(dir, "sub")); err != nil {
		t.Fatal(err)
	}
	wantRules("a folder is removed", 2, ">= 3")

	rename(t, dir, dir+".old")
	writeFile(t, filepath.Join(dir, "a.yaml"), strings.Replace(hardBrake, "6.5", "7", 1))
	wantRules("the folder is replaced", 1, ">= 7")
}

func symlink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestDebounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done, changes := make(chan struct{}), make(chan struct{})
		var fired []time.Duration
		start := time.Now()
		go rules.Debounce(done, changes, time.Second, func() { fired = append(fired, time.Since(start)) })
		changes <- struct{}{}
		time.Sleep(500 * time.Millisecond)
		changes <- struct{}{}
		time.Sleep(10 * time.Second) // one reload, a second after the second change
		for range 40 {               // changes that never pause
			changes <- struct{}{}
			time.Sleep(250 * time.Millisecond)
		}
		time.Sleep(5 * time.Second)
		close(done)
		synctest.Wait()
		if len(fired) != 3 || fired[0] != 1500*time.Millisecond || fired[1] != 18500*time.Millisecond {
			t.Errorf("fired at %v, want 1.5s, 18.5s and once more", fired)
		}
	})
}

func TestFolders(t *testing.T) {
	t.Chdir(t.TempDir())
	rule := func(name string) string {
		return strings.NewReplacer("hard-brake", name, "notification-center", name).Replace(hardBrake)
	}
	writeFile(t, "rules.d/a.yaml", rule("a"))
	writeFile(t, "rules.d/sub/b.yml", rule("b"))
	writeFile(t, "rules.d/a_test.yaml", "tests: []")
	writeFile(t, "rules.d/.hidden/c.yaml", rule("c"))
	symlink(t, "sub", "rules.d/linked") // the same file a second time
	if set, problems := rules.Load([]string{"rules.d", "rules.d/a.yaml"}, rules.LoadOptions{}); set == nil || len(set.Rules()) != 2 {
		t.Errorf("problems %v", problems)
	}

	symlink(t, "..", "rules.d/sub/loop")
	symlink(t, "self.yaml", "rules.d/self.yaml")
	writeFile(t, "rules.d/large.yaml", "# "+strings.Repeat("x", 1<<20))
	writeFile(t, "rules.d/latin1.yaml", "# caf\xe9\n")
	if err := os.Mkdir("rules.d/folder.yaml", 0o755); err != nil {
		t.Fatal(err)
	}
	_, problems := rules.Load([]string{"rules.d", "nowhere.yaml"}, rules.LoadOptions{})
	var got []string
	for _, p := range problems {
		got = append(got, p.String())
	}
	want := []string{
		"nowhere.yaml: no such file or directory",
		"rules.d/large.yaml: expected at most 1048576 bytes, found 1048578",
		"rules.d/latin1.yaml:1:6: expected UTF-8, found the byte 0xE9",
		"rules.d/linked/loop: the folder leads back into itself", // and sub is read already
		"rules.d/self.yaml: too many levels of symbolic links",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestGoneDestinations: records without a destination are a warning of all files together, and come first.
func TestGoneDestinations(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.yaml")
	writeFile(t, file, `destinations: {center: {url: "http://127.0.0.1/"}}`)
	waiting := map[string]int{"center": 3, "z": 1, "done": 0, "a": 20}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{Waiting: func() map[string]int { return waiting }})
	var got []string
	for _, p := range problems {
		got = append(got, p.Name+" "+p.String())
	}
	want := []string{
		`gone-destination warning: 20 records wait for the destination "a", which no rule file defines`,
		`gone-destination warning: 1 record waits for the destination "z", which no rule file defines`,
		`unused-destination ` + file + `:1:16: warning: no rule sends to destination "center"`,
	}
	if set == nil || !slices.Equal(got, want) || len(waiting) != 4 {
		t.Errorf("problems %q, want %q", got, want)
	}
	if set, problems = rules.Load(nil, rules.LoadOptions{Waiting: func() map[string]int { return waiting }}); set == nil || len(problems) != 3 {
		t.Errorf("without files: %v", problems)
	}
}
