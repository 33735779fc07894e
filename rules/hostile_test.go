package rules_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// patience is far beyond what anything here takes, race detector and busy machine included: what exceeds it hangs.
const patience = 2 * time.Minute

// loadHostile loads paths, and fails the test if that hangs.
func loadHostile(t *testing.T, paths ...string) (*rules.Set, []rules.Problem) {
	t.Helper()
	type loaded struct {
		set      *rules.Set
		problems []rules.Problem
	}
	done := make(chan loaded, 1)
	go func() {
		set, problems := rules.Load(paths, rules.LoadOptions{})
		done <- loaded{set, problems}
	}()
	select {
	case l := <-done:
		return l.set, l.problems
	case <-time.After(patience):
		t.Fatal("it hangs")
	}
	return nil, nil
}

func printed(t *testing.T, problems []rules.Problem) string {
	t.Helper()
	var b strings.Builder
	if err := rules.Print(&b, problems); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestHostileText: whatever stands in a file, there is a clear problem in it, soon.
func TestHostileText(t *testing.T) {
	const fits, quarter = 1<<20 - 100, 1 << 18 // a whole one of these takes 300 MB, and seconds
	fill := func(unit string) string { return strings.Repeat(unit, fits/len(unit)) }
	tests := []struct{ name, text, want string }{
		{"UTF-16, little-endian", "\xff\xfer\x00u\x00l\x00e\x00s\x00:\x00", "r.yaml:1:1: expected UTF-8, found UTF-16\n|[not-utf-8]|hint: save the file as UTF-8"},
		{"UTF-16, big-endian", "\xfe\xff\x00r\x00u", "r.yaml:1:1: expected UTF-8, found UTF-16\n"},
		{"Latin-1", "rules: []\n# caf\xe9\n", "r.yaml:2:6: expected UTF-8, found the byte 0xE9\n"},
		{"cut within a character", "rules: []\n# caf\xc3", "r.yaml:2:6: expected UTF-8, found the byte 0xC3\n"},
		{"NUL", "rules:\n- name: \x00\n", "r.yaml:2:9: expected text, found the control character U+0000\n|[bad-character]"},
		{"all NUL", fill("\x00"), "r.yaml:1:1: expected text, found the control character U+0000\n"},
		{"escape sequences for a terminal", "rules: \x1b[2J", "r.yaml:1:8: expected text, found the control character U+001B\n"},
		{"a second byte order mark", "\ufeff\ufeffrules: []", "r.yaml:1:1: expected text, found the control character U+FEFF\n"},
		{"laughs", "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nrules: *c", "r.yaml:1:4: anchors and aliases are not allowed\n|hint: write the value out"},
		{"an alias of itself", "rules: &a [*a]", "r.yaml:1:8: anchors and aliases are not allowed\n"},
		{"a merge key", "rules:\n- <<: {name: a}\n", `r.yaml:2:3: unknown key "<<" in a rule`},
		{"a merged alias", "x: &x {name: a}\nrules:\n- <<: *x\n", "r.yaml:1:4: anchors and aliases are not allowed\n|r.yaml:3:7: anchors"},
		{"an alias of nothing", "rules: *x", "r.yaml:1:1: yaml: unknown anchor 'x' referenced\n"},
		{"doubled keys", "rules: []\nrules: []\n", `r.yaml:2:1: doubled key "rules" in a rule file` + "\n|hint: it is already on line 1\n"},
		{"doubled keys without end", fill("rules: []\n"), `r.yaml:2:1: doubled key "rules" in a rule file` + "\n|r.yaml:202:1: too many problems: 104646 more\nhint: mend those that are shown first\n|[too-many-problems]"},
		{"tabs", "rules:\n\t- name: a\n", "r.yaml:2:2: yaml: found character that cannot start any token\n|hint: indent with spaces, not tabs\n"},
		{"a key of many", "? [rules]\n: []\n", "r.yaml:1:3: a key must be text, found a list\n"},
		{"no mapping", "just text", `r.yaml:1:1: a rule file must be a mapping of keys, found "just text"`},
		{"deep flow lists", fill("["), "r.yaml:1:1: yaml: exceeded max depth of 10000\n|hint: no rule file nests so deeply\n"},
		{"deep flow maps", fill("{a: "), "r.yaml:1:1: yaml: exceeded max depth of 10000\n"},
		{"deep flow lists that end", "rules: " + strings.Repeat("[", 9000) + strings.Repeat("]", 9000), "r.yaml:1:9: a rule must be a mapping of keys, found a list\n"},
		{"deep block lists", "rules:\n" + fill("- "), "yaml: exceeded max depth of 10000\n"},
		{"a deep body", deepBody(9000), "a body nests at most 64 deep\n"},
		{"a huge flow map", "{" + fill("a,")[:quarter] + "}", `r.yaml:1:2: unknown key "a" in a rule file` + "\n|too many problems: "},
		{"a huge flow list", "rules: [" + fill("a,")[:quarter] + "]", `r.yaml:1:9: a rule must be a mapping of keys, found "a"` + "\n|too many problems: "},
		{"a huge list of destinations", "destinations: {" + fillNumbered("a%d: ,", quarter) + "}", "r.yaml:1:20: a destination must be a mapping of keys, found nothing\n|too many problems: "},
		{"huge headers", "destinations: {a: {url: 'http://h/', headers: {" + fillNumbered("x-token-%d: secret-%[1]d, x-token-%[1]d: b,", quarter) + "}}}", `doubled key "x-token-0" in headers` + "|too many problems: "},
		{"explicit keys", fill("? "), "r.yaml:"},
		{"a statement that is too long", "rules:\n- {name: a, sql: '" + strings.Repeat("a", 100_000) + "', actions: []}", "a statement has at most 65536 bytes"},
		{"a statement of open brackets", "rules:\n- {name: a, actions: [], sql: 'SELECT " + strings.Repeat("(", 60_000) + "'}", "expressions nest at most 100 deep"},
		{"a statement of mistakes", "rules:\n- {name: a, actions: [], sql: 'SELECT " + strings.Repeat("nosuch(1),", 6000) + "1 FROM t'}", `unknown function "nosuch"` + "|too many problems: "},
		{"many statements of mistakes", "rules:\n" + fill("- {name: a, actions: [], sql: 'SELECT nosuch() FROM t'}\n"), `unknown function "nosuch"` + "|too many problems: "},
		{"a long line", "rules: []\n# " + strings.Repeat("x", 900_000) + "\nrule: []", `r.yaml:3:1: unknown key "rule" in a rule file`},
		{"a problem in a long line", "rules: [" + strings.Repeat(" ", 900_000) + "a]", `r.yaml:1:900009: a rule must be a mapping of keys, found "a"` + "\n"},
		{"lines that end in many ways", "rules: []\r\n# a\r# b\u2028# c\u0085rule: []\r\n", `r.yaml:5:1: unknown key "rule" in a rule file` + "\n 5 |   rule: []\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			writeFile(t, "r.yaml", tt.text)
			set, problems := loadHostile(t, "r.yaml")
			if set != nil || len(problems) > 201 {
				t.Errorf("set %v, %d problems", set, len(problems))
			}
			text := printed(t, problems)
			for _, p := range problems {
				text += "[" + p.Name + "]"
			}
			for want := range strings.SplitSeq(tt.want, "|") {
				if !strings.Contains(text, strings.TrimSpace(want)) {
					t.Errorf("problems\n%.500s\nwant %q", text, want)
				}
			}
			for _, p := range problems {
				if p.Name == "" || p.Line > 0 && (p.Col < 1 || p.Width < 1) || len(p.Source) > 70_000 {
					t.Errorf("problem %s:%d:%d %q", p.Name, p.Line, p.Col, p.Message)
				}
			}
		})
	}
}

func deepBody(depth int) string {
	return "destinations: {d: {url: 'http://h/'}}\nrules:\n- name: a\n  sql: SELECT * FROM t\n  actions: [{http: d, body: " + strings.Repeat("[", depth) + strings.Repeat("]", depth) + "}]\n"
}

// fillNumbered repeats a format with rising numbers, up to size bytes.
func fillNumbered(format string, size int) string {
	var b strings.Builder
	for i := 0; b.Len() < size-200; i++ {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// TestAcceptedText: what is unusual but right loads.
func TestAcceptedText(t *testing.T) {
	for name, text := range map[string]string{
		"a byte order mark": "\ufeff" + hardBrake,
		"CRLF":              strings.ReplaceAll(hardBrake, "\n", "\r\n"),
		"CR":                strings.ReplaceAll(hardBrake, "\n", "\r"),
		"tabs at the ends":  strings.ReplaceAll(hardBrake, "telemetry\"\n", "telemetry\"\t\n"),
		"no line break":     strings.TrimRight(hardBrake, "\n"),
		"a long comment":    "# " + strings.Repeat("x", 900_000) + "\n" + hardBrake,
		"nothing":           "",
		"a comment":         "# nothing yet",
	} {
		if set, problems := rules.BuildText(text); set == nil || len(problems) > 0 {
			t.Errorf("%s: %s", name, printed(t, problems))
		}
	}
}

// TestHostilePaths: what is no file, or can't be read, is never waited for.
func TestHostilePaths(t *testing.T) {
	t.Chdir(t.TempDir())
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, "rules.d/good.yaml", hardBrake)
	must(syscall.Mkfifo("rules.d/a-pipe.yaml", 0o600))
	socket, err := net.Listen("unix", "rules.d/b-socket.yaml")
	must(err)
	defer socket.Close()
	symlink(t, os.DevNull, "rules.d/c-device.yaml")
	symlink(t, "/dev/zero", "rules.d/c-endless.yaml")
	symlink(t, "nowhere.yaml", "rules.d/d-dangling.yaml")
	symlink(t, "e-self.yaml", "rules.d/e-self.yaml")
	symlink(t, "f-other.yaml", "rules.d/f-circle.yaml")
	symlink(t, "f-circle.yaml", "rules.d/f-other.yaml")
	symlink(t, "../rules.d", "rules.d/g-loop")
	symlink(t, "nowhere", "rules.d/h-dangling-but-no-rules")
	huge, err := os.Create("rules.d/i-huge.yaml")
	must(err)
	must(huge.Truncate(100 << 20)) // sparse: takes no room
	must(huge.Close())

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, problems := loadHostile(t, "rules.d", "nosuch")
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 50<<20 {
		t.Errorf("%d bytes were allocated", used)
	}
	const want = `nosuch: no such file or directory
rules.d/a-pipe.yaml: expected a file, found a pipe
rules.d/b-socket.yaml: expected a file, found a socket
rules.d/c-device.yaml: expected a file, found a device
rules.d/c-endless.yaml: expected a file, found a device
rules.d/d-dangling.yaml: no such file or directory
hint: the link leads to nothing
rules.d/e-self.yaml: too many levels of symbolic links
hint: the link leads back to itself
rules.d/f-circle.yaml: too many levels of symbolic links
hint: the link leads back to itself
rules.d/f-other.yaml: too many levels of symbolic links
hint: the link leads back to itself
rules.d/g-loop: the folder leads back into itself
hint: remove the link
rules.d/i-huge.yaml: expected at most 1048576 bytes, found 104857600
hint: split it; a data file does not belong here
`
	if got := printed(t, problems); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for i, name := range map[int]string{0: "unreadable-file", 1: "unreadable-file", 9: "folder-loop", 10: "file-too-large"} {
		if problems[i].Name != name {
			t.Errorf("%s is a problem of %s, want %s", problems[i].Message, problems[i].Name, name)
		}
	}
}

// TestUnreadable: a file or folder that the broker's user may not read. For root nothing is; there the same is shown by the error of
// the system for a folder that is a file.
func TestUnreadable(t *testing.T) {
	t.Chdir(t.TempDir())
	writeFile(t, "rules.d/a.yaml", hardBrake)
	path, want := "rules.d/a.yaml/b.yaml", "rules.d/a.yaml/b.yaml: not a directory\n"
	if os.Getuid() != 0 {
		writeFile(t, "rules.d/sub/b.yaml", hardBrake)
		for _, p := range []string{"rules.d/a.yaml", "rules.d/sub"} {
			if err := os.Chmod(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		defer os.Chmod("rules.d/sub", 0o700)
		path = "rules.d"
		want = "rules.d/a.yaml: permission denied\nhint: the user that runs the broker must be able to read it\n" +
			"rules.d/sub: permission denied\nhint: the user that runs the broker must be able to read it\n"
	}
	set, problems := loadHostile(t, path)
	if got := printed(t, problems); set != nil || got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestFoldersFullOfLinks: each folder is read once, however many ways lead to it; here they are 12 to the power of 12.
func TestFoldersFullOfLinks(t *testing.T) {
	t.Chdir(t.TempDir())
	const n = 12
	for i := range n {
		writeFile(t, fmt.Sprintf("rules.d/%02d/a.yaml", i), "rules: []")
		for j := range n {
			if i+1 < n {
				symlink(t, fmt.Sprintf("../%02d", i+1), fmt.Sprintf("rules.d/%02d/link%d", i, j))
			}
		}
	}
	set, problems := loadHostile(t, "rules.d")
	if set == nil || len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
	k := open(t, rules.KeeperOptions{Paths: []string{"rules.d"}, Watch: true}) // the watcher goes the same ways
	if !k.Last().OK {
		t.Errorf("%+v", k.Last())
	}
}

// TestFullFolder: many entries, all but one of them links to nothing, are looked at once each.
func TestFullFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	writeFile(t, "rules.d/0.yaml", hardBrake)
	const entries = 2_000
	for i := range entries {
		name := fmt.Sprintf("rules.d/%06d.yaml", i)
		if i%2 == 0 {
			name = fmt.Sprintf("rules.d/%06d.txt", i)
		}
		symlink(t, "nowhere", name)
	}
	set, problems := loadHostile(t, "rules.d")
	if set != nil || len(problems) != 201 || problems[200].Message != fmt.Sprintf("too many problems: %d more", entries/2-200) {
		t.Errorf("set %v, %d problems, the last %v", set, len(problems), problems[len(problems)-1])
	}
}

// TestSetTooLarge: files beyond what a set may have are not read.
func TestSetTooLarge(t *testing.T) {
	t.Chdir(t.TempDir())
	for i := range 5 {
		writeFile(t, fmt.Sprintf("rules.d/%d.yaml", i), "#"+strings.Repeat(" ", 1<<19-1))
	}
	for _, tt := range []struct {
		files, bytes int
		want         string
	}{
		{5, 5 << 19, ""},
		{3, 5 << 19, "rules.d/3.yaml: this file is one more than the 3 that a set has at most\nhint: is this the folder of the rules?\n"},
		{5, 1 << 20, "rules.d/2.yaml: with this file the set is larger than the 1MiB that one has at most\nhint: is this the folder of the rules?\n"},
	} {
		problems := rules.ReadLimited("rules.d", tt.files, tt.bytes)
		if got := printed(t, problems); got != tt.want || tt.want != "" && problems[0].Name != "too-many-files" {
			t.Errorf("%d files, %d bytes: got\n%s\nwant\n%s", tt.files, tt.bytes, got, tt.want)
		}
	}
}

// TestFolderVanishes: the rules stay, and come back when the folder does.
func TestFolderVanishes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "rules.d")
	writeFile(t, filepath.Join(dir, "a.yaml"), hardBrake)
	k := open(t, rules.KeeperOptions{Paths: []string{dir}})
	first := k.Current()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if r := k.Reload(); r.OK || k.Current() != first || len(r.Problems) != 1 || r.Problems[0].Name != "unreadable-file" {
		t.Errorf("without the folder: %+v", r)
	}
	writeFile(t, filepath.Join(dir, "a.yaml"), hardBrake)
	if r := k.Reload(); !r.OK || r.Generation != first.Generation() {
		t.Errorf("with the folder: %+v", r)
	}
}
