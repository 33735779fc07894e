package rules

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// filePlace is a position in a file, both from 1, col in characters.
type filePlace struct{ line, col int }

// align answers for every byte of a scalar's value, and for its end, where it
// stands in the file. YAML folds lines, strips indents and reads escapes, but
// keeps the characters that are no white space in their order: these are found
// one after the other, and white space is taken to stand where it can.
func (f *file) align(n *yaml.Node) []filePlace {
	a := aligner{lines: f.lines, at: filePlace{max(n.Line, 1), max(n.Column, 1)}, style: n.Style}
	switch n.Style {
	case yaml.LiteralStyle, yaml.FoldedStyle:
		a.at = filePlace{a.at.line + 1, 1}
	case yaml.DoubleQuotedStyle, yaml.SingleQuotedStyle:
		a.at.col++
	}
	a.load()
	places := make([]filePlace, len(n.Value)+1)
	for i, r := range n.Value {
		if !isYAMLSpace(r) {
			a.find(r)
		}
		for j := range utf8.RuneLen(r) {
			places[i+j] = a.at
		}
		a.pass(r)
	}
	places[len(n.Value)] = a.at
	return places
}

// aligner walks the source of one scalar.
type aligner struct {
	lines []string
	style yaml.Style
	at    filePlace
	rest  string // of the line at
}

func isYAMLSpace(r rune) bool { return r == ' ' || r == '\t' || r == '\n' || r == '\r' }

// load makes rest what at says.
func (a *aligner) load() {
	a.rest = ""
	if a.at.line <= len(a.lines) {
		a.rest = a.lines[a.at.line-1]
		for range a.at.col - 1 {
			_, n := utf8.DecodeRuneInString(a.rest)
			a.rest = a.rest[n:]
		}
	}
}

// element is the next character of the source as the value has it, and how many
// bytes and columns spell it; 0 at the end of a line.
func (a *aligner) element() (r rune, bytes, cols int) {
	if a.rest == "" {
		return '\n', 0, 0
	}
	if a.style == yaml.SingleQuotedStyle && strings.HasPrefix(a.rest, "''") {
		return '\'', 2, 2
	}
	if a.style == yaml.DoubleQuotedStyle && a.rest[0] == '\\' {
		return escapedElement(a.rest)
	}
	r, bytes = utf8.DecodeRuneInString(a.rest)
	return r, bytes, 1
}

// escapedElement reads an escape of a double-quoted scalar. What stands for
// white space is answered as such.
func escapedElement(s string) (r rune, bytes, cols int) {
	if len(s) == 1 {
		return ' ', 1, 1 // joins two lines
	}
	digits := map[byte]int{'x': 2, 'u': 4, 'U': 8}[s[1]]
	if digits > 0 && len(s) >= 2+digits {
		code, _ := strconv.ParseUint(s[2:2+digits], 16, 32)
		return rune(code), 2 + digits, 2 + digits
	}
	switch s[1] {
	case '"', '\\', '/':
		return rune(s[1]), 2, 2
	}
	_, n := utf8.DecodeRuneInString(s[1:])
	return ' ', 1 + n, 2
}

// find moves to the next character of the source that is r, over white space
// alone. If something else is in the way it stays.
func (a *aligner) find(r rune) {
	back := *a
	for {
		got, bytes, cols := a.element()
		switch {
		case got == r && bytes > 0:
			return
		case bytes == 0 && a.at.line < len(a.lines):
			a.at = filePlace{a.at.line + 1, 1}
			a.load()
		case bytes > 0 && isYAMLSpace(got):
			a.skip(bytes, cols)
		default:
			*a = back
			return
		}
	}
}

// pass moves over r, if it stands here.
func (a *aligner) pass(r rune) {
	got, bytes, cols := a.element()
	if bytes > 0 && (got == r || isYAMLSpace(r) && isYAMLSpace(got)) {
		a.skip(bytes, cols)
	}
}

func (a *aligner) skip(bytes, cols int) {
	a.rest = a.rest[bytes:]
	a.at.col += cols
}
