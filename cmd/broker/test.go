package main

import (
	"bufio"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// runTest runs the unit tests of rules.
func runTest(ctx context.Context, c *cli, args []string) int {
	fs := c.flags("test")
	only := fs.String("run", "", "run only the tests whose name matches `REGEXP`")
	verbose := fs.Bool("v", false, "list the tests that pass, too")
	junit := fs.String("junit", "", "write the results to `FILE` as JUnit XML, too")
	asJSON := fs.Bool("json", false, "write JSON")
	paths, code, done := c.parseMixed(fs, args)
	if done {
		return code
	}
	name, err := regexp.Compile(*only)
	if err != nil {
		return c.misuse("test: -run %v", err)
	}
	if len(paths) == 0 {
		if fi, err := os.Stat("rules.d"); err != nil || !fi.IsDir() {
			return c.misuse("test: no path, and no folder rules.d here")
		}
		paths = []string{"rules.d"}
	}
	all, problems := rules.LoadTests(paths, ruleOptions(c.env, 0, false, nil))
	r := testReport{Tests: []testResult{}, Problems: problems}
	if all != nil {
		r.run(ctx, all, name)
		if len(r.Tests) == 0 {
			return c.fail(fmt.Errorf("no test has a name that matches %q", *only), "broker test -v lists them all")
		}
	}
	r.sum()
	code = exitOK
	if !r.Summary.OK {
		code = exitProblem
	}
	if *junit != "" {
		if err := writeJUnit(*junit, &r); err != nil {
			code = c.fail(fmt.Errorf("write -junit: %w", err), "")
		}
	}
	if *asJSON {
		return max(code, c.writeJSON(r))
	}
	if err := rules.Print(c.stderr, problems); err != nil {
		return c.fail(err, "")
	}
	if all == nil {
		fmt.Fprintln(c.stderr, "error: the files have problems; no test was run")
		return exitProblem
	}
	if err := r.print(c.stdout, *verbose); err != nil {
		return c.fail(fmt.Errorf("write results: %w", err), "")
	}
	return code
}

// testReport is what test -json writes.
type testReport struct {
	Tests    []testResult    `json:"tests"`
	Problems []rules.Problem `json:"problems,omitempty"` // of the files; with errors no test is run
	Summary  testSummary     `json:"summary"`
}

type testSummary struct {
	OK     bool `json:"ok"` // the exit code is 0
	Tests  int  `json:"tests"`
	Failed int  `json:"failed"`
}

type testResult struct {
	Name     string              `json:"name"`
	File     string              `json:"file"`
	Line     int                 `json:"line"`
	Passed   bool                `json:"passed"`
	Seconds  float64             `json:"seconds"`
	Failures []rules.TestFailure `json:"failures,omitempty"`
}

// run runs those whose name matches, until ctx ends.
func (r *testReport) run(ctx context.Context, all *rules.Tests, name *regexp.Regexp) {
	for _, t := range all.All() {
		if !name.MatchString(t.Name) || ctx.Err() != nil {
			continue
		}
		begin := time.Now()
		failures := all.Run(t)
		r.Tests = append(r.Tests, testResult{t.Name, t.File, t.Line, len(failures) == 0, time.Since(begin).Seconds(), failures})
	}
}

func (r *testReport) sum() {
	r.Summary = testSummary{Tests: len(r.Tests)}
	for _, t := range r.Tests {
		if !t.Passed {
			r.Summary.Failed++
		}
	}
	r.Summary.OK = r.Summary.Failed == 0 && !rules.HasErrors(r.Problems)
}

// print writes, for people,
//
//	FAIL brakes hard
//	  rules.d/fleet_test.yaml:5:9: a request of rule "hard-brake" to "notification-center" is not as expected
//	    body.decel
//	      wanted 7.1
//	      found  7.2
//	2 tests: 1 passed, 1 failed
func (r *testReport) print(w io.Writer, verbose bool) error {
	b := bufio.NewWriter(w)
	for _, t := range r.Tests {
		switch {
		case !t.Passed:
			fmt.Fprintf(b, "FAIL %s\n", printable(t.Name))
			t.printFailures(b, "  ")
		case verbose:
			fmt.Fprintf(b, "PASS %s\n", printable(t.Name))
		}
	}
	fmt.Fprintf(b, "%s: %d passed, %d failed\n", counted(r.Summary.Tests, "test"), r.Summary.Tests-r.Summary.Failed, r.Summary.Failed)
	return b.Flush()
}

// shownDifferences bounds those of one failure, and shownChars a value in them: the rest doesn't help
// to see what is wrong, and -json has all.
const (
	shownDifferences = 20
	shownChars       = 400
)

func (t *testResult) printFailures(w io.Writer, indent string) {
	for _, f := range t.Failures {
		fmt.Fprintf(w, "%s%s:%d:%d: %s\n", indent, printable(f.File), f.Line, f.Col, printable(f.Message))
		if f.Reason != "" {
			fmt.Fprintf(w, "%s  it did not fire: %s\n", indent, printable(f.Reason))
		}
		for _, d := range f.Differences[:min(len(f.Differences), shownDifferences)] {
			fmt.Fprintf(w, "%s  %s\n%s    wanted %s\n%s    found  %s\n", indent, printable(d.Path), indent, shortened(d.Wanted), indent, shortened(d.Found))
		}
		if more := len(f.Differences) - shownDifferences; more > 0 {
			fmt.Fprintf(w, "%s  and %s\n", indent, counted(more, "more difference"))
		}
	}
}

// shortened is a text as a terminal gets it.
func shortened(s string) string {
	if r := []rune(s); len(r) > shownChars {
		s = string(r[:shownChars]) + "..."
	}
	return printable(s)
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// The XML that CI servers read as JUnit's: a testsuite for each test file.
type (
	junitSuites struct {
		XMLName  xml.Name     `xml:"testsuites"`
		Tests    int          `xml:"tests,attr"`
		Failures int          `xml:"failures,attr"`
		Errors   int          `xml:"errors,attr"`
		Time     string       `xml:"time,attr"` // seconds
		Suites   []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Errors   int         `xml:"errors,attr"`
		Time     string      `xml:"time,attr"`
		Cases    []junitCase `xml:"testcase"`
		seconds  float64
	}
	junitCase struct {
		Class   string        `xml:"classname,attr"`
		Name    string        `xml:"name,attr"`
		File    string        `xml:"file,attr,omitempty"`
		Line    int           `xml:"line,attr,omitempty"`
		Time    string        `xml:"time,attr"`
		Failure *junitMessage `xml:"failure"`
		Error   *junitMessage `xml:"error"`
	}
	junitMessage struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
)

// junit is the report in that form. Files with problems are errors of a suite of their own, so that a server that looks
// at nothing else doesn't show a success.
func (r *testReport) junit() junitSuites {
	all := junitSuites{Tests: r.Summary.Tests, Failures: r.Summary.Failed}
	if rules.HasErrors(r.Problems) {
		s := junitSuite{Name: "files", Time: junitTime(0)}
		for _, p := range r.Problems {
			if p.Severity != rules.Error {
				continue
			}
			s.Cases = append(s.Cases, junitCase{
				Class: "files", Name: p.String(), File: p.File, Line: p.Line, Time: junitTime(0),
				Error: &junitMessage{Message: p.Message, Text: p.String()},
			})
		}
		s.Tests, s.Errors = len(s.Cases), len(s.Cases)
		all.Tests, all.Errors = all.Tests+s.Tests, s.Errors
		all.Suites = append(all.Suites, s)
	}
	total := 0.0
	for _, t := range r.Tests {
		i := slices.IndexFunc(all.Suites, func(s junitSuite) bool { return s.Name == t.File })
		if i < 0 {
			i = len(all.Suites)
			all.Suites = append(all.Suites, junitSuite{Name: t.File})
		}
		s := &all.Suites[i]
		c := junitCase{Class: strings.TrimSuffix(t.File, filepath.Ext(t.File)), Name: t.Name, File: t.File, Line: t.Line, Time: junitTime(t.Seconds)}
		if !t.Passed {
			s.Failures++
			var b strings.Builder
			t.printFailures(&b, "")
			c.Failure = &junitMessage{Message: t.Failures[0].Message, Text: b.String()}
		}
		s.Tests++
		s.seconds += t.Seconds
		s.Time = junitTime(s.seconds)
		s.Cases = append(s.Cases, c)
		total += t.Seconds
	}
	all.Time = junitTime(total)
	return all
}

func junitTime(seconds float64) string { return fmt.Sprintf("%.6f", seconds) }

func writeJUnit(file string, r *testReport) error {
	text, err := xml.MarshalIndent(r.junit(), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, slices.Concat([]byte(xml.Header), text, []byte("\n")), 0o644)
}
