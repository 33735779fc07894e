package rules

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// maxFile bounds a rule file, in bytes: a file beyond it is a mistake, and must
	// not be read into memory to find out.
	maxFile = 1 << 20
	// maxFiles and maxSet bound how many files a set is made of, and their bytes. All are
	// in memory, also while the set is in force.
	maxFiles = 10_000
	maxSet   = 64 << 20
	// maxFolders bounds how deeply folders of rules may nest.
	maxFolders = 16
)

// limits bound what a set is made of.
type limits struct{ files, bytes int }

// read collects all rule files under paths, and the test files: those named, and with
// foldersTests also those of folders. Where test files alone are named, the rules are
// those of their folders.
func read(paths []string, foldersTests bool) *collector {
	return readWithin(limits{maxFiles, maxSet}, paths, foldersTests)
}

func readWithin(max limits, paths []string, foldersTests bool) *collector {
	c := &collector{max: max, foldersTests: foldersTests}
	testsAlone := len(paths) > 0
	for _, p := range paths {
		p = filepath.Clean(p)
		c.path(p)
		testsAlone = testsAlone && isTestFile(filepath.Base(p))
	}
	if testsAlone {
		c.foldersTests = false
		for _, t := range slices.Clone(c.tests) {
			c.path(filepath.Dir(t.Path))
		}
	}
	for _, texts := range [][]fileText{c.texts, c.tests} {
		slices.SortFunc(texts, func(a, b fileText) int { return cmp.Compare(a.Path, b.Path) })
	}
	return c
}

// maxTries is how often files are read while they keep changing.
const maxTries = 5

// readSteady is read for files that others may be replacing: what it answers
// stood there at one time, as far as files tell. A set that is half of one swap of
// links and half of the next is read again.
func readSteady(paths []string) ([]fileText, []Problem) {
	var c *collector
	for range maxTries {
		if c = read(paths, false); c.isSteady() {
			break
		}
	}
	return c.texts, c.problems
}

// isSteady reports whether the paths still lead to what was read.
func (c *collector) isSteady() bool {
	for path, was := range c.infos {
		is, err := os.Stat(path)
		if err != nil || !os.SameFile(is, was) || is.Size() != was.Size() || !is.ModTime().Equal(was.ModTime()) {
			return false
		}
	}
	return true
}

type collector struct {
	max   limits
	texts []fileText
	// tests are the test files that were named, with foldersTests also those of
	// folders.
	tests        []fileText
	foldersTests bool
	bytes        int
	infos        map[string]os.FileInfo // of the files read, by path
	files        visited
	folders      visited
	full         bool // too many files, or bytes
	problems     []Problem
}

// visited are files or folders that were seen before, under whatever path.
type visited map[visitedKey][]os.FileInfo

// visitedKey narrows down what os.SameFile has to compare.
type visitedKey struct {
	size    int64
	modTime time.Time
}

// again reports whether info was seen, and remembers it.
func (v *visited) again(info os.FileInfo) bool {
	if *v == nil {
		*v = visited{}
	}
	key := visitedKey{info.Size(), info.ModTime()}
	if slices.ContainsFunc((*v)[key], func(s os.FileInfo) bool { return os.SameFile(s, info) }) {
		return true
	}
	(*v)[key] = append((*v)[key], info)
	return false
}

func (c *collector) fail(path, name, hint, message string) {
	c.wrong(path, diagnostic{name: name, hint: hint, message: message})
}

func (c *collector) wrong(path string, d diagnostic) {
	c.problems = AppendProblem(c.problems, nil, Problem{File: path, Name: d.name, Message: d.message, Hint: d.hint})
}

// failed reports an error of the file system, without the path that the problem
// names anyway.
func (c *collector) failed(path string, err error) {
	hint := ""
	switch {
	case errors.Is(err, fs.ErrPermission):
		hint = "the user that runs the broker must be able to read it"
	case errors.Is(err, syscall.ELOOP):
		hint = "the link leads back to itself"
	case errors.Is(err, fs.ErrNotExist):
		if _, isLink := os.Readlink(path); isLink == nil {
			hint = "the link leads to nothing"
		}
	}
	c.fail(path, "unreadable-file", hint, withoutPath(err).Error())
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

// folder reads a folder and the folders in it, each once. above are those that it
// is in: a link back to one of them is a loop.
func (c *collector) folder(path string, above []os.FileInfo) {
	info, err := os.Stat(path)
	if err != nil {
		c.failed(path, err)
		return
	}
	switch {
	case slices.ContainsFunc(above, func(a os.FileInfo) bool { return os.SameFile(a, info) }):
		c.fail(path, "folder-loop", "remove the link", "the folder leads back into itself")
		return
	case len(above) == maxFolders:
		c.fail(path, "folder-loop", "move the rules up", fmt.Sprintf("folders of rules nest at most %d deep", maxFolders))
		return
	case c.folders.again(info): // by way of another link
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
		isRule := isRuleFile(name) || c.foldersTests && isTestFile(name)
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
	return (ext == ".yaml" || ext == ".yml") && !isTestFile(name)
}

func isTestFile(name string) bool {
	ext := filepath.Ext(name)
	return (ext == ".yaml" || ext == ".yml") && strings.HasSuffix(strings.TrimSuffix(name, ext), "_test")
}

func (c *collector) file(path string, info os.FileInfo) {
	switch {
	case c.full || c.files.again(info):
		return
	case len(c.texts)+len(c.tests) == c.max.files:
		c.full = true
		c.fail(path, "too-many-files", "is this the folder of the rules?", fmt.Sprintf("this file is one more than the %d that a set has at most", c.max.files))
		return
	}
	text, info, wrong, err := readText(path, info)
	switch {
	case err != nil:
		c.failed(path, err)
		return
	case wrong != nil:
		c.wrong(path, *wrong)
		return
	}
	if c.bytes += len(text); c.bytes > c.max.bytes {
		c.full = true
		c.fail(path, "too-many-files", "is this the folder of the rules?", fmt.Sprintf("with this file the set is larger than the %s that one has at most", FormatSize(int64(c.max.bytes))))
		return
	}
	if c.infos == nil {
		c.infos = map[string]os.FileInfo{}
	}
	c.infos[path] = info
	if isTestFile(filepath.Base(path)) {
		c.tests = append(c.tests, fileText{Path: path, Text: text})
		return
	}
	c.texts = append(c.texts, fileText{Path: path, Text: text})
}

// readText reads a file of at most maxFile bytes. It never waits, as opening a
// pipe would, and a file too large is not read at all. info is what was found under
// the path, and what the file itself says is answered. The diagnostic is for what is
// no matter of the file system.
func readText(path string, info os.FileInfo) (string, os.FileInfo, *diagnostic, error) {
	if wrong := checkInfo(info); wrong != nil {
		return "", nil, wrong, nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // it may have become a pipe
	if err != nil {
		return "", nil, nil, err
	}
	defer f.Close() // only read
	if info, err = f.Stat(); err != nil {
		return "", nil, nil, err
	}
	if wrong := checkInfo(info); wrong != nil {
		return "", nil, wrong, nil
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return "", nil, nil, err
	case len(text) > maxFile: // it grows
		return "", nil, tooLarge(int64(len(text))), nil
	}
	return string(text), info, nil, nil
}

func checkInfo(info os.FileInfo) *diagnostic {
	switch {
	case !info.Mode().IsRegular():
		return &diagnostic{name: "unreadable-file", message: "expected a file, found " + describeMode(info.Mode())}
	case info.Size() > maxFile:
		return tooLarge(info.Size())
	}
	return nil
}

func tooLarge(size int64) *diagnostic {
	return &diagnostic{
		name: "file-too-large", message: fmt.Sprintf("expected at most %d bytes, found %d", maxFile, size),
		hint: "split it; a data file does not belong here",
	}
}

func describeMode(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a folder"
	case m&fs.ModeNamedPipe != 0:
		return "a pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	}
	return "something else"
}

// ReadText reads a text file of at most 1 MiB, such as the broker's configuration:
// it never waits, a file too large is not read, and what is no file is refused. The
// error has no path in it.
func ReadText(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", withoutPath(err)
	}
	text, _, wrong, err := readText(path, info)
	switch {
	case err != nil:
		return "", withoutPath(err)
	case wrong != nil:
		return "", errors.New(wrong.message)
	}
	return text, nil
}

// withoutPath is for an error beside which the path stands anyway.
func withoutPath(err error) error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return pathErr.Err
	}
	return err
}
