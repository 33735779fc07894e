package rules

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxFile bounds a rule file, in bytes: a file beyond it is a mistake, and must
// not be read into memory to find out.
const maxFile = 1 << 20

// maxFiles bounds how many files a set is made of.
const maxFiles = 10_000

// maxFolders bounds how deeply folders of rules may nest.
const maxFolders = 16

// LoadOptions says how to load. Its zero is how check does it.
type LoadOptions struct {
	// RequireSecrets makes a missing secret an error rather than a warning.
	RequireSecrets bool
	// LookupEnv finds ${env:NAME}; nil is os.LookupEnv.
	LookupEnv func(string) (string, bool)
	// CheckTLS says what is wrong with the files that a destination's TLS names. As
	// with secrets it is a warning unless RequireSecrets. nil: they are not looked at.
	CheckTLS func(TLS) error
	// CheckAddress says why a destination that has this address in a url can't be
	// reached there. nil: anything can.
	CheckAddress func(netip.AddrPort, Egress) error
	// OutboxBytes is what the whole outbox may have: a cap of a destination above
	// it is a warning. 0: not known.
	OutboxBytes int64
	// Waiting counts the records that wait, by destination: those of one that the set
	// doesn't define are a warning. nil: not known.
	Waiting func() map[string]int
	// Previous is the set that the new one will replace: its rules hand their
	// counters on to those of the same name. May be nil.
	Previous *Set

	// reread is the destination whose secrets alone are read: what a secret was in
	// Previous holds for all others, and where one can't be read. "": all are read.
	reread string
}

// Load reads rule files: the files named, and *.yaml and *.yml within the folders
// named, *_test.yaml excluded. Names that begin with a point are passed over in
// folders. All that is wrong is answered at once, sorted by position. The set is
// nil if any of it is an error; with warnings alone there is a set.
func Load(paths []string, o LoadOptions) (*Set, []Problem) {
	texts, problems := readFiles(paths)
	set, more := build(texts, o)
	problems = append(problems, more...)
	sortProblems(problems)
	if HasErrors(problems) {
		return nil, problems
	}
	return set, problems
}

// fileText is a rule file's content.
type fileText struct {
	Path string `json:"path"`
	Text string `json:"text"`
}

// build makes a set of the files, nil if there are errors.
func build(texts []fileText, o LoadOptions) (*Set, []Problem) {
	l := newLoader(o)
	for _, t := range texts {
		l.read(t)
	}
	l.resolve()
	var problems []Problem
	for _, f := range l.files {
		problems = append(problems, f.shown()...)
	}
	sortProblems(problems)
	if HasErrors(problems) {
		return nil, problems
	}
	set := newSet(generation(texts), l.ruleList(), l.destinationList())
	set.secrets = l.secrets
	return set, append(gone(set, o.Waiting), problems...)
}

// gone warns of records whose destination set doesn't define: they are held. As a
// problem of all files it comes before theirs.
func gone(set *Set, waiting func() map[string]int) (problems []Problem) {
	if waiting == nil {
		return nil
	}
	records := waiting()
	for _, name := range slices.Sorted(maps.Keys(records)) {
		defined := slices.ContainsFunc(set.Destinations(), func(d Destination) bool { return d.Name == name })
		if records[name] == 0 || defined {
			continue
		}
		wait := "records wait"
		if records[name] == 1 {
			wait = "record waits"
		}
		problems = append(problems, Problem{
			Severity: Warning, Name: "gone-destination",
			Message: fmt.Sprintf("%d %s for the destination %s, which no rule file defines", records[name], wait, quote(name)),
			Hint:    "define it again, or delete them: broker outbox purge -state queued -destination " + name,
		})
	}
	return problems
}

// generation is a hash over the names and contents of files, wherever the folder
// stands that they are in.
func generation(texts []fileText) string {
	hash := sha256.New()
	for _, t := range texts {
		fmt.Fprintf(hash, "%q %d\n%s", filepath.Base(t.Path), len(t.Text), t.Text)
	}
	return hex.EncodeToString(hash.Sum(nil))[:12]
}

// readFiles answers the contents of all rule files under paths, sorted by path,
// each once.
func readFiles(paths []string) ([]fileText, []Problem) {
	var c collector
	for _, p := range paths {
		c.path(filepath.Clean(p))
	}
	slices.SortFunc(c.texts, func(a, b fileText) int { return cmp.Compare(a.Path, b.Path) })
	return c.texts, c.problems
}

type collector struct {
	texts    []fileText
	seen     []os.FileInfo
	problems []Problem
}

func (c *collector) fail(path, name, hint, message string) {
	c.problems = append(c.problems, Problem{File: path, Name: name, Message: message, Hint: hint})
}

// failed reports an error of the file system, without the path that the problem
// names anyway.
func (c *collector) failed(path string, err error) {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		err = pathErr.Err
	}
	c.fail(path, "unreadable-file", "", err.Error())
}

func (c *collector) path(path string) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		c.failed(path, err)
	case info.IsDir():
		c.folder(path, nil)
	default:
		c.file(path, info)
	}
}

// folder reads a folder and the folders in it. above are those that it is in: a
// link back to one of them is a loop.
func (c *collector) folder(path string, above []os.FileInfo) {
	info, err := os.Stat(path)
	if err != nil {
		c.failed(path, err)
		return
	}
	if len(above) == maxFolders || slices.ContainsFunc(above, func(a os.FileInfo) bool { return os.SameFile(a, info) }) {
		c.fail(path, "folder-loop", "", "the folder leads back into itself or is too deep")
		return
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		c.failed(path, err)
		return
	}
	above = append(slices.Clone(above), info)
	for _, e := range entries {
		name, full := e.Name(), filepath.Join(path, e.Name())
		if strings.HasPrefix(name, ".") {
			continue
		}
		isRule := isRuleFile(name)
		if !isRule && e.Type().IsRegular() {
			continue
		}
		info, err := os.Stat(full) // follows links
		switch {
		case err != nil && isRule:
			c.failed(full, err)
		case err != nil: // a dangling link to nothing of ours
		case info.IsDir():
			c.folder(full, above)
		case isRule:
			c.file(full, info)
		}
	}
}

func isRuleFile(name string) bool {
	ext := filepath.Ext(name)
	return (ext == ".yaml" || ext == ".yml") && !strings.HasSuffix(strings.TrimSuffix(name, ext), "_test")
}

func (c *collector) file(path string, info os.FileInfo) {
	switch {
	case !info.Mode().IsRegular():
		c.fail(path, "unreadable-file", "", "no regular file")
		return
	case slices.ContainsFunc(c.seen, func(s os.FileInfo) bool { return os.SameFile(s, info) }):
		return
	case len(c.texts) == maxFiles:
		if !slices.ContainsFunc(c.problems, func(p Problem) bool { return p.Name == "too-many-files" }) {
			c.fail(path, "too-many-files", "", fmt.Sprintf("more than %d files", maxFiles))
		}
		return
	}
	c.seen = append(c.seen, info)
	f, err := os.Open(path)
	if err != nil {
		c.failed(path, err)
		return
	}
	defer f.Close() // only read
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		c.failed(path, err)
	case len(text) > maxFile:
		c.fail(path, "file-too-large", "split it", fmt.Sprintf("a rule file has at most %d bytes", maxFile))
	default:
		c.texts = append(c.texts, fileText{Path: path, Text: string(text)})
	}
}
