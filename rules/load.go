package rules

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
)

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
// folders. A test file that is named itself is checked, and no more; see LoadTests.
// All that is wrong is answered at once, sorted by position. The set is
// nil if any of it is an error; with warnings alone there is a set.
func Load(paths []string, o LoadOptions) (*Set, []Problem) {
	c := read(paths, false)
	set, problems := build(c.texts, o)
	problems = append(problems, c.problems...)
	for _, t := range c.tests {
		problems = append(problems, readTests(t, set).shown()...)
	}
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
