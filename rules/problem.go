package rules

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Severity says whether a problem keeps a rule set from being used.
type Severity uint8

// An Error keeps the whole set from loading; a Warning does not.
const (
	Error Severity = iota
	Warning
)

func (s Severity) String() string {
	if s == Warning {
		return "warning"
	}
	return "error"
}

// MarshalText makes a severity a word in JSON.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Problem is one mistake in a rule file.
type Problem struct {
	File string `json:"file,omitempty"` // "": it is one of all files together
	// Line and Col count from 1, Col in characters. Line is 0 for a problem of
	// the file as a whole, such as one that cannot be read.
	Line int `json:"line,omitempty"`
	Col  int `json:"col,omitempty"`
	// Width is the number of characters that the caret line underlines.
	Width    int      `json:"width,omitempty"`
	Severity Severity `json:"severity"`
	// Name is stable and kebab-case: the heading of the problem in docs/rules.md.
	Name    string `json:"name"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	// Source is the whole line that Line names, with stars for credentials; "" if it is
	// longer than some 64 KiB.
	Source string `json:"source,omitempty"`

	untold int // how many problems it stands for
}

// String is the problem in one line, file:line:col: message.
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(printable(p.File))
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", p.Line, p.Col)
		}
		b.WriteString(": ")
	}
	if p.Severity == Warning {
		b.WriteString("warning: ")
	}
	b.WriteString(printable(p.Message))
	return b.String()
}

// maxProblems is how many problems of one file are shown: one that is no rule file
// at all may have hundreds of thousands.
const maxProblems = 200

// HasErrors reports whether any problem is more than a warning.
func HasErrors(problems []Problem) bool {
	return slices.ContainsFunc(problems, func(p Problem) bool { return p.Severity == Error })
}

// maxSourceShown is how many characters of a source line are printed: a statement
// may be one line of many kilobytes.
const maxSourceShown = 120

// Print writes problems for people, in the order given:
//
//	rules.d/boiler.yaml:7:15: unknown function "upperr"
//	 7 |   WHERE upperr(payload.site) = 'A'
//	   |         ^^^^^^
//	hint: did you mean upper? See docs/rules.md#functions
//
// Nothing of a file reaches the terminal but printable characters.
func Print(w io.Writer, problems []Problem) error {
	b := bufio.NewWriter(w)
	for _, p := range problems {
		fmt.Fprintln(b, p.String())
		if p.Line > 0 && p.Source != "" {
			shown, before, width := excerpt(p)
			number := strconv.Itoa(p.Line)
			fmt.Fprintf(b, " %s |   %s\n", number, shown)
			fmt.Fprintf(b, " %s |   %s%s\n", strings.Repeat(" ", len(number)), strings.Repeat(" ", before), strings.Repeat("^", width))
		}
		if p.Hint != "" {
			fmt.Fprintf(b, "hint: %s\n", printable(p.Hint))
		}
	}
	return b.Flush()
}

// maxSource is the length of a line, in bytes, from which on it is not kept with
// a problem: no statement is longer, and nobody reads it.
const maxSource = maxStatement + 1024

// excerpt is the part of the source line that is shown, without its indent, and
// where the caret goes in it.
func excerpt(p Problem) (shown string, before, width int) {
	line := []rune(strings.TrimRightFunc(p.Source, unicode.IsSpace))
	indent := 0
	for indent < len(line) && unicode.IsSpace(line[indent]) {
		indent++
	}
	before = max(p.Col-1-indent, 0)
	line = line[min(indent, p.Col-1, len(line)):]
	if before > maxSourceShown*2/3 && before < len(line) {
		cut := before - maxSourceShown/3
		line, before = append([]rune("..."), line[cut:]...), before-cut+3
	}
	if len(line) > maxSourceShown {
		line = append(slices.Clone(line[:maxSourceShown]), []rune("...")...)
	}
	before = min(before, len(line))
	return printable(string(line)), before, max(1, min(p.Width, len(line)-before))
}

// printable replaces what a terminal might act on, character by character, so
// that carets stay in place.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case !unicode.IsPrint(r):
			return utf8.RuneError
		}
		return r
	}, s)
}

func sortProblems(problems []Problem) {
	slices.SortStableFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
}

// diagnostic is a problem in a text of its own, a statement or a template, before
// it is known where in a file that text stands.
type diagnostic struct {
	span
	severity Severity
	name     string
	message  string
	hint     string
}

// maxQuoted bounds the user's text within a message.
const maxQuoted = 60

// quote is the user's text as messages show it.
func quote(text string) string {
	if utf8.RuneCountInString(text) > maxQuoted {
		text = string([]rune(text)[:maxQuoted]) + "..."
	}
	return strconv.Quote(text)
}

// lineCol is the place of a byte offset in a text, both from 1, col in
// characters.
func lineCol(text string, offset int) (line, col int) {
	before := text[:min(offset, len(text))]
	start := strings.LastIndexByte(before, '\n') + 1
	return strings.Count(before, "\n") + 1, utf8.RuneCountInString(before[start:]) + 1
}
