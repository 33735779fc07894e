package rules

import (
	"fmt"
	"math"
	"strings"

	"go.yaml.in/yaml/v3"
)

// bodyReader compiles the structured body of an action.
type bodyReader struct {
	file    *file
	program *program // of the rule; nil if its statement could not be compiled
	depth   int
}

// maxBodyDepth bounds how deeply a structured body may nest.
const maxBodyDepth = 64

func (b *bodyReader) read(n *yaml.Node) bodyFn {
	if b.depth == maxBodyDepth {
		b.file.fail(n, "nested-too-deeply", "", "a body nests at most %d deep", maxBodyDepth)
		return constantBody(null)
	}
	b.depth++
	defer func() { b.depth-- }()
	switch n.Kind {
	case yaml.MappingNode:
		var members []bodyMember
		b.file.mapping(n, "a body", func(key, val *yaml.Node) {
			if strings.Contains(key.Value, "${") {
				b.file.fail(key, "bad-template", "", "the keys of a body cannot hold variables")
			}
			members = append(members, bodyMember{key.Value, b.read(val)})
		})
		return mapBody(members)
	case yaml.SequenceNode:
		var elems []bodyFn
		for _, e := range n.Content {
			elems = append(elems, b.read(e))
		}
		return listBody(elems)
	}
	switch n.Tag {
	case "!!null":
		return constantBody(null)
	case "!!bool":
		return constantBody(boolean(strings.EqualFold(n.Value, "true")))
	case "!!int", "!!float":
		return constantBody(b.number(n))
	}
	if !strings.Contains(n.Value, "${") {
		return constantBody(str(n.Value))
	}
	return textBody(b.template(n, n.Value))
}

// number keeps decimal integers exact, however long; YAML itself would not.
func (b *bodyReader) number(n *yaml.Node) value {
	digits := strings.TrimLeft(n.Value, "+-")
	if !strings.HasPrefix(digits, "0") && strings.Trim(digits, "0123456789") == "" {
		if v, ok := parseInteger(n.Value); ok {
			return v
		}
	}
	var decoded any
	if err := n.Decode(&decoded); err != nil {
		b.file.fail(n, "bad-number", "", "no number: %s", describeNode(n))
		return null
	}
	switch x := decoded.(type) {
	case int:
		return integer(int64(x))
	case int64:
		return integer(x)
	case uint64:
		v, _ := parseInteger(fmt.Sprint(x))
		return v
	case float64:
		if !math.IsInf(x, 0) && !math.IsNaN(x) {
			return float(x)
		}
	}
	b.file.fail(n, "bad-number", "", "JSON has no number %s", describeNode(n))
	return null
}

// template reads a text with variables, and warns of those that the statement
// does not select.
func (b *bodyReader) template(n *yaml.Node, text string) template {
	t := parseTemplate(text, func(d diagnostic) { b.file.within(n, d) })
	b.checkSelected(n, t)
	return t
}

func (b *bodyReader) checkSelected(n *yaml.Node, t template) {
	for _, p := range t {
		if len(p.path) == 0 || b.selects(p.path[0].key) {
			continue
		}
		name := p.path[0].key
		b.file.within(n, diagnostic{span: p.span, severity: Warning, name: "not-selected", message: fmt.Sprintf("%s is always undefined: the statement does not select it", quote(name)), hint: b.selectHint(name)})
	}
}

// checkTraceFields refuses a body that has a field of its own where the trace
// context goes, and warns of one that can have no such field.
func (b *bodyReader) checkTraceFields(body *yaml.Node, t TraceBody) {
	for _, path := range []string{t.SW8, t.Correlation} {
		if path == "" {
			continue
		}
		if body.Kind != yaml.MappingNode {
			if body.Kind == yaml.SequenceNode || !isVariable(body.Value) {
				b.file.warn(body, "body-not-object", "make the body a mapping, or set trace: {body: {}} in the destination", "the body can be no JSON object, so the trace context cannot go into its field %s", quote(path))
				return
			}
			continue
		}
		if at := collision(body, strings.Split(path, ".")); at != nil {
			b.file.fail(at, "trace-field-collision", "rename it, or set trace.body of the destination", "the trace context goes into field %s of the body", quote(path))
		}
	}
}

// isVariable reports whether a template is one variable, which may be a map.
func isVariable(text string) bool {
	t := parseTemplate(text, func(diagnostic) {})
	return len(t) == 1 && t[0].isVar
}

// collision is the key of body that keeps path from being added to it, nil if
// none does.
func collision(body *yaml.Node, path []string) *yaml.Node {
	for i := 0; i+1 < len(body.Content); i += 2 {
		key, val := body.Content[i], body.Content[i+1]
		if key.Value != path[0] {
			continue
		}
		if len(path) == 1 || val.Kind != yaml.MappingNode {
			return key
		}
		return collision(val, path[1:])
	}
	return nil
}
