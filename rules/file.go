package rules

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// file is one rule file while it is read. All that is wrong with it is collected.
type file struct {
	path     string
	lines    []string
	problems []Problem
	// hidden is text that no problem may show: secrets that stand in the file
	// itself, against all advice.
	hidden []string
	// aligned is the scalar that within was last asked about, and its places.
	aligned *yaml.Node
	places  []filePlace
}

// lineBreaks are those that YAML counts lines by.
var lineBreaks = strings.NewReplacer("\r\n", "\n", "\r", "\n", "\u0085", "\n", "\u2028", "\n", "\u2029", "\n")

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// ParseYAML parses a text as rule files are: one document without anchors and tags.
// root is nil if there is none, or if there are problems. lines are what problems
// count by. path is for the problems alone.
func ParseYAML(path, text string) (root *yaml.Node, lines []string, problems []Problem) {
	f := &file{path: path}
	root = f.open(text)
	return root, f.lines, f.shown()
}

// open parses the text as one YAML document; nil if it has none or is none.
func (f *file) open(text string) *yaml.Node {
	text = strings.TrimPrefix(text, "\ufeff")
	f.lines = strings.Split(lineBreaks.Replace(strings.ToValidUTF8(text, "\ufffd")), "\n")
	if d, ok := checkCharacters(text); !ok {
		line, col := lineCol(lineBreaks.Replace(text[:d.start]), len(text))
		f.add(Problem{Line: line, Col: col, Width: 1, Name: d.name, Message: d.message, Hint: d.hint})
		return nil
	}
	decoder := yaml.NewDecoder(strings.NewReader(text))
	var document, second yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		f.syntaxError(err)
		return nil
	}
	if err := decoder.Decode(&second); err == nil {
		f.fail(&second, "several-documents", "put it into a file of its own", "a second document in one file")
		return nil
	} else if !errors.Is(err, io.EOF) {
		f.syntaxError(err)
		return nil
	}
	root := document.Content[0]
	if !f.isPlain(root) {
		return nil
	}
	return root
}

// checkCharacters says where text begins to be none that YAML 1.2 section 5.1
// allows, and why.
func checkCharacters(text string) (d diagnostic, ok bool) {
	if strings.HasPrefix(text, "\xff\xfe") || strings.HasPrefix(text, "\xfe\xff") {
		return diagnostic{name: "not-utf-8", message: "expected UTF-8, found UTF-16", hint: "save the file as UTF-8"}, false
	}
	for i, r := range text {
		at := span{i, i}
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], "\ufffd"):
			return diagnostic{span: at, name: "not-utf-8", message: fmt.Sprintf("expected UTF-8, found the byte 0x%02X", text[i]), hint: "save the file as UTF-8"}, false
		case r == '\t', r == '\n', r == '\r', r == '\u0085', ' ' <= r && r <= '~', r >= 0xA0 && r != 0xFEFF && r != 0xFFFE && r != 0xFFFF:
		default:
			return diagnostic{
				span: at, name: "bad-character", message: fmt.Sprintf("expected text, found the control character U+%04X", r),
				hint: "remove it; within double quotes YAML has escapes such as \\t and \\u0007",
			}, false
		}
	}
	return d, true
}

func (f *file) syntaxError(err error) {
	line, message := yamlError(err)
	line = min(line, len(f.lines))
	source := f.lines[line-1]
	f.add(Problem{Line: line, Col: indentOf(source) + 1, Width: 1, Name: "yaml-syntax", Message: "yaml: " + message, Hint: yamlHint(message, f.lines, line)})
}

// yamlError takes the line out of the text of an error of the YAML library, which
// is the only place that has it.
func yamlError(err error) (line int, message string) {
	line, message = 1, err.Error()
	if m := yamlLine.FindStringSubmatch(message); m != nil {
		message = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = max(n, 1)
		}
	}
	return line, message
}

func indentOf(line string) int { return len(line) - len(strings.TrimLeft(line, " \t")) }

// yamlHint says what a syntax error mostly comes from. The library's line may be
// that before it.
func yamlHint(message string, lines []string, line int) string {
	for _, near := range lines[line-1 : min(line+1, len(lines))] {
		if strings.Contains(near[:indentOf(near)], "\t") {
			return "indent with spaces, not tabs"
		}
	}
	for _, h := range []struct{ part, hint string }{
		{"found character that cannot start any token", "text that begins with @, ` or % must be quoted"},
		{"mapping values are not allowed", "text that holds a colon and a space must be quoted; else look at the indentation of this line and the one before"},
		{"found unexpected end of stream", "a quote or a bracket is not closed"},
		{"could not find expected ':'", "a key is followed by a colon and a space; look at the line before, too"},
		{"did not find expected ',' or", "a bracket is not closed, or text with a comma, bracket or colon is not quoted"},
		{"did not find expected", "look at the indentation of this line and of those after it"},
		{"exceeded max depth", "no rule file nests so deeply"},
		{"found unknown escape character", "write a backslash twice within double quotes, or use single quotes"},
	} {
		if strings.Contains(message, h.part) {
			return h.hint
		}
	}
	return ""
}

// isPlain refuses anchors, aliases and tags in all of n. A rule file needs none,
// and aliases can make a small file endless.
func (f *file) isPlain(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		f.fail(n, "yaml-anchor", "write the value out", "anchors and aliases are not allowed")
		return false
	case n.Style&yaml.TaggedStyle != 0:
		f.fail(n, "yaml-tag", "remove it; text that begins with ! must be quoted", "tags are not allowed")
		return false
	}
	plain := true
	for _, c := range n.Content {
		plain = f.isPlain(c) && plain
	}
	return plain
}

// add completes a problem with the file's name and source line.
func (f *file) add(p Problem) {
	p.File = f.path
	f.problems = AppendProblem(f.problems, f.lines, p)
}

// AppendProblem appends a problem of a file whose lines are given, with the
// source line. From some 200 on those of the same file are counted alone, in the last one.
func AppendProblem(problems []Problem, lines []string, p Problem) []Problem {
	length := 0
	if p.Line > 0 && p.Line <= len(lines) && len(problems) <= maxProblems {
		length = utf8.RuneCountInString(lines[p.Line-1])
	}
	if n := len(problems); n >= maxProblems {
		if n == maxProblems {
			problems = append(problems, Problem{
				File: p.File, Line: p.Line, Col: max(1, min(p.Col, length+1)), Width: 1, Severity: p.Severity,
				Name: "too-many-problems", Hint: "mend those that are shown first",
			})
		}
		last := &problems[maxProblems]
		last.untold++
		last.Severity = min(last.Severity, p.Severity) // Error is the least
		last.Message = fmt.Sprintf("too many problems: %d more", last.untold)
		return problems
	}
	if p.Line > 0 && p.Line <= len(lines) {
		line := lines[p.Line-1]
		p.Col = min(p.Col, length+1)
		p.Width = max(1, min(p.Width, length+1-p.Col))
		switch last := len(problems) - 1; {
		case len(line) > maxSource:
		case last >= 0 && problems[last].Line == p.Line:
			p.Source = problems[last].Source
		default:
			p.Source = MaskCredentials(line)
		}
	}
	return append(problems, p)
}

// full says that further problems are counted alone.
func (f *file) full() bool { return len(f.problems) > maxProblems }

// isLost says that nothing that is found further changes the outcome.
func (f *file) isLost() bool { return f.full() && f.problems[maxProblems].Severity == Error }

func (f *file) fail(n *yaml.Node, name, hint, format string, args ...any) {
	f.at(n, Error, name, hint, format, args...)
}

func (f *file) warn(n *yaml.Node, name, hint, format string, args ...any) {
	f.at(n, Warning, name, hint, format, args...)
}

func (f *file) at(n *yaml.Node, s Severity, name, hint, format string, args ...any) {
	p := Problem{Line: max(n.Line, 1), Col: max(n.Column, 1), Width: 1, Severity: s, Name: name, Hint: hint, Message: fmt.Sprintf(format, args...)}
	if n.Kind == yaml.ScalarNode {
		switch n.Style {
		case yaml.LiteralStyle, yaml.FoldedStyle:
		case yaml.DoubleQuotedStyle, yaml.SingleQuotedStyle:
			p.Width = utf8.RuneCountInString(n.Value) + 2
		default:
			p.Width = max(1, utf8.RuneCountInString(n.Value))
		}
	}
	f.add(p)
}

// within reports a problem of the text that the scalar n holds.
func (f *file) within(n *yaml.Node, d diagnostic) {
	if f.full() { // finding the place takes time
		f.add(Problem{Line: max(n.Line, 1), Severity: d.severity})
		return
	}
	if f.aligned != n {
		f.aligned, f.places = n, f.align(n)
	}
	places := f.places
	from := places[min(d.start, len(places)-1)]
	width := 1
	if to := places[min(max(d.end, d.start), len(places)-1)]; to.line == from.line {
		width = max(1, to.col-from.col)
	} else if from.line <= len(f.lines) {
		width = max(1, utf8.RuneCountInString(f.lines[from.line-1])-from.col+1)
	}
	f.add(Problem{Line: from.line, Col: from.col, Width: width, Severity: d.severity, Name: d.name, Message: d.message, Hint: d.hint})
}

// field is one key of a mapping and what reads it.
type field struct {
	name string
	read func(key, val *yaml.Node)
}

// fields reads a mapping. Unknown and doubled keys are errors. It is false if n
// is no mapping.
func (f *file) fields(n *yaml.Node, what string, known ...field) bool {
	return f.mapping(n, what, func(key, val *yaml.Node) {
		i := slices.IndexFunc(known, func(k field) bool { return k.name == key.Value })
		if i < 0 {
			names := make([]string, len(known))
			for i, k := range known {
				names[i] = k.name
			}
			f.fail(key, "unknown-key", didYouMean(key.Value, names), "unknown key %s in %s", quote(key.Value), what)
			return
		}
		known[i].read(key, val)
	})
}

// mapping calls fn for every key, each once.
func (f *file) mapping(n *yaml.Node, what string, fn func(key, val *yaml.Node)) bool {
	if n.Kind != yaml.MappingNode {
		f.fail(n, "wrong-type", "", "%s must be a mapping of keys, found %s", what, describeNode(n))
		return false
	}
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			f.fail(key, "wrong-type", "", "a key must be text, found %s", describeNode(key))
			continue
		}
		if line, ok := seen[key.Value]; ok {
			f.fail(key, "doubled-key", fmt.Sprintf("it is already on line %d", line), "doubled key %s in %s", quote(key.Value), what)
			continue
		}
		seen[key.Value] = key.Line
		fn(key, val)
	}
	return true
}

// elements calls fn for every element of a list.
func (f *file) elements(n *yaml.Node, what string, fn func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		f.fail(n, "wrong-type", "each element begins with a dash: - ...", "%s must be a list, found %s", what, describeNode(n))
		return
	}
	for _, e := range n.Content {
		fn(e)
	}
}

// text reads a scalar of any type as text.
func (f *file) text(n *yaml.Node, what string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		f.fail(n, "wrong-type", "", "%s must be text, found %s", what, describeNode(n))
		return "", false
	}
	return n.Value, true
}

func (f *file) bool(n *yaml.Node, what string, into *bool) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		hint := ""
		if lower := strings.ToLower(n.Value); n.Kind == yaml.ScalarNode && (lower == "true" || lower == "false") {
			hint = unquotedHint(lower)
		}
		f.fail(n, "wrong-type", hint, "%s must be true or false, found %s", what, describeNode(n))
		return
	}
	*into = strings.EqualFold(n.Value, "true")
}

// unquotedHint is for what would be right if YAML didn't take it for text.
func unquotedHint(value string) string { return fmt.Sprintf("write %s without quotes", value) }

func (f *file) int(n *yaml.Node, what string, low, high int, into *int) {
	i, err := strconv.Atoi(n.Value)
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" || err != nil || i < low || i > high {
		hint := ""
		if n.Kind == yaml.ScalarNode && n.Tag == "!!str" && err == nil && i >= low && i <= high {
			hint = unquotedHint(n.Value)
		}
		f.fail(n, "out-of-range", hint, "%s must be a number from %d to %d, found %s", what, low, high, describeNode(n))
		return
	}
	*into = i
}

func (f *file) duration(n *yaml.Node, what string, low, high time.Duration, into *time.Duration) {
	d, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil || d < low || d > high {
		f.fail(n, "out-of-range", "", "%s must be a duration such as %s, from %s to %s, found %s", what, short(*into), short(low), short(high), describeNode(n))
		return
	}
	*into = d
}

// short prints a duration as a file would say it: 24h, not 24h0m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// describeNode is a node as messages show it.
func describeNode(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!null":
		return "nothing"
	}
	return quote(n.Value)
}
