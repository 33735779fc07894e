package main

import (
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/throughline-mqtt/throughline/rules"
)

// decoder reads a YAML file by its nodes, so that every problem has its place
// and all of them are found in one pass.
type decoder struct {
	file           string
	base           string // folder that relative paths are relative to; "": the working folder
	lines          []string
	env            func(string) (string, bool)
	requireSecrets bool
	problems       []rules.Problem
}

type node struct{ *yaml.Node }

type position struct{ line, col, width int }

// fields maps each key that an object may have to what reads its value.
type fields map[string]func(node)

func (n node) pos() position {
	if n.Node == nil {
		return position{}
	}
	w := utf8.RuneCountInString(n.Value)
	if n.Kind != yaml.ScalarNode || n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		w = 1
	} else if n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0 {
		w += 2
	}
	return position{n.Line, n.Column, max(w, 1)}
}

func (n node) isList() bool   { return n.Node != nil && n.Kind == yaml.SequenceNode }
func (n node) isObject() bool { return n.Node != nil && n.Kind == yaml.MappingNode }
func (n node) isNull() bool {
	return n.Node == nil || n.Kind == yaml.ScalarNode && n.Tag == "!!null"
}

func (n node) kind() string {
	switch {
	case n.isNull():
		return "nothing"
	case n.isList():
		return "a list"
	case n.isObject():
		return "an object"
	}
	return strconv.Quote(n.Value)
}

func (d *decoder) problemAt(p position, s rules.Severity, name, message, hint string) {
	d.problems = rules.AppendProblem(d.problems, d.lines, rules.Problem{
		File: d.file, Line: p.line, Col: p.col, Width: p.width, Severity: s, Name: name, Message: message, Hint: hint,
	})
}

func (d *decoder) errorf(n node, name, message, hint string) {
	d.problemAt(n.pos(), rules.Error, name, message, hint)
}

func (d *decoder) warnAt(p position, name, message, hint string) {
	d.problemAt(p, rules.Warning, name, message, hint)
}

func (d *decoder) expected(n node, what string) {
	d.errorf(n, "type", "expected "+what+", found "+n.kind(), "")
}

// read returns the file's one document, or a node that is nothing after a problem.
func (d *decoder) read(file string) node {
	src, err := rules.ReadText(file)
	if err != nil {
		d.problemAt(position{}, rules.Error, "file", "read configuration: "+err.Error(), "")
		return node{}
	}
	root, lines, problems := rules.ParseYAML(file, src)
	d.lines, d.problems = lines, append(d.problems, problems...)
	return node{root}
}

// object reads a mapping. A missing one is fine; an unknown or doubled key is an error.
func (d *decoder) object(n node, name string, f fields) {
	if n.isNull() {
		return
	}
	if !n.isObject() {
		d.expected(n, "an object")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := node{n.Content[i]}, node{n.Content[i+1]}
		full := k.Value
		if name != "" {
			full = name + "." + full
		}
		read, ok := f[k.Value]
		switch {
		case !ok:
			hint := ""
			if near := rules.Suggest(k.Value, slices.Sorted(maps.Keys(f))); near != "" {
				hint = "did you mean " + near + "?"
			}
			d.errorf(k, "unknown-key", fmt.Sprintf("unknown key %q", full), hint)
		case seen[k.Value]:
			d.errorf(k, "doubled-key", fmt.Sprintf("key %q is given twice", full), "")
		default:
			seen[k.Value] = true
			read(v)
		}
	}
}

func (d *decoder) into(name string, f fields) func(node) {
	return func(n node) { d.object(n, name, f) }
}

func (d *decoder) list(n node, each func(node)) {
	if n.isNull() {
		return
	}
	if !n.isList() {
		d.expected(n, "a list")
		return
	}
	for _, c := range n.Content {
		each(node{c})
	}
}

// unsupported is the reader of a key that the design has and this version does not.
func (d *decoder) unsupported(key string) func(node) {
	return func(n node) {
		d.errorf(n, "not-supported", key+" is not supported yet", "remove the key")
	}
}

// only accepts one value of those that the design knows; the others are not supported yet.
func (d *decoder) only(key, value string, others ...string) func(node) {
	return func(n node) {
		var v string
		d.text(&v)(n)
		switch {
		case v == value:
		case slices.Contains(others, v):
			d.errorf(n, "not-supported", fmt.Sprintf("%s: %s is not supported yet", key, v), "use "+value)
		case n.Kind == yaml.ScalarNode:
			d.errorf(n, "value", fmt.Sprintf("%s: expected one of %s, found %q", key, strings.Join(append([]string{value}, others...), ", "), v), "")
		}
	}
}

func (d *decoder) oneOf(to *string, values ...string) func(node) {
	return func(n node) {
		if !slices.Contains(values, n.Value) || n.Kind != yaml.ScalarNode {
			d.expected(n, "one of "+strings.Join(values, ", "))
			return
		}
		*to = n.Value
	}
}

// text reads a scalar, with ${env:NAME} and ${file:PATH} in it refused: those are for secrets.
func (d *decoder) text(to *string) func(node) {
	return func(n node) {
		switch {
		case n.Node == nil || n.Kind != yaml.ScalarNode || n.isNull():
			d.expected(n, "a text")
		case strings.Contains(n.Value, "${env:") || strings.Contains(n.Value, "${file:"):
			d.errorf(n, "no-secret-here", "${env:NAME} and ${file:PATH} are for secrets: this text is taken as it is", "write the value out")
		default:
			*to = n.Value
		}
	}
}

func (d *decoder) texts(to *[]string) func(node) {
	return func(n node) {
		*to = nil
		d.list(n, func(n node) {
			var s string
			d.text(&s)(n)
			*to = append(*to, s)
		})
	}
}

// secret reads a text in which ${env:NAME} and ${file:PATH} stand for secrets. An
// empty one is an error: it would open what it should guard.
func (d *decoder) secret(to *string) func(node) {
	return func(n node) {
		if n.Node == nil || n.Kind != yaml.ScalarNode || n.isNull() {
			d.expected(n, "a text")
			return
		}
		value, err := rules.ExpandSecrets(n.Value, d.base, d.lookup)
		switch {
		case err != nil:
			s := rules.Warning
			if d.requireSecrets {
				s = rules.Error
			}
			d.problemAt(n.pos(), s, "secret-missing", err.Error(), "")
		case value.Reveal() == "":
			d.errorf(n, "secret-empty", "the secret is empty", "")
		default:
			*to = value.Reveal()
		}
	}
}

// path reads the name of a file or folder.
func (d *decoder) path(to *string) func(node) {
	return func(n node) {
		var name string
		d.text(&name)(n)
		switch {
		case name != "":
			*to = d.resolve(name)
		case n.Kind == yaml.ScalarNode && n.Value == "" && !n.isNull():
			d.expected(n, "a path")
		}
	}
}

func (d *decoder) resolve(p string) string {
	if d.base == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(d.base, p)
}

func (d *decoder) lookup(name string) (string, bool) {
	if d.env == nil {
		return "", false
	}
	return d.env(name)
}

func (d *decoder) boolean(n node, to *bool) {
	v, err := strconv.ParseBool(n.Value)
	if err != nil || n.Tag != "!!bool" {
		hint := ""
		if n.Kind == yaml.ScalarNode && (n.Value == "true" || n.Value == "false") {
			hint = "write " + n.Value + " without quotes"
		}
		d.errorf(n, "type", "expected true or false, found "+n.kind(), hint)
		return
	}
	*to = v
}

func (d *decoder) integer(to *int, least, most int) func(node) {
	return func(n node) {
		v, err := strconv.Atoi(n.Value)
		if err != nil || n.Kind != yaml.ScalarNode || v < least || v > most {
			d.expected(n, fmt.Sprintf("a whole number from %d to %d", least, most))
			return
		}
		*to = v
	}
}

func (d *decoder) share(to *float64) func(node) {
	return func(n node) {
		v, err := strconv.ParseFloat(n.Value, 64)
		if err != nil || n.Kind != yaml.ScalarNode || !(v >= 0 && v <= 1) {
			d.expected(n, "a number from 0 to 1")
			return
		}
		*to = v
	}
}

func (d *decoder) duration(to *time.Duration, least, most time.Duration) func(node) {
	return func(n node) {
		v, err := time.ParseDuration(n.Value)
		if err != nil || v < least || v > most {
			d.expected(n, fmt.Sprintf("a duration from %v to %v, such as 5s", least, most))
			return
		}
		*to = v
	}
}

func (d *decoder) size(to *int64, least, most int64) func(node) {
	return func(n node) {
		v, ok := rules.ParseSize(n.Value)
		if !ok || n.Kind != yaml.ScalarNode || v < least || v > most {
			d.expected(n, fmt.Sprintf("a size from %s to %s, such as 1MiB", rules.FormatSize(least), rules.FormatSize(most)))
			return
		}
		*to = v
	}
}

func (d *decoder) level(to *slog.Level) func(node) {
	return func(n node) {
		var name string
		d.oneOf(&name, "debug", "info", "warn", "error")(n)
		if name != "" {
			_ = to.UnmarshalText([]byte(name)) // the four names are slog's own
		}
	}
}
