package rules

import (
	"fmt"
	"slices"
	"strings"
)

// program is a compiled statement. It is immutable and may run in many places at
// once, each with an env of its own.
type program struct {
	filters []string // topic filters of FROM
	events  eventSet // events of FROM
	outputs []output
	where   condFn // nil: always
	// whereFirst: nobody can tell whether WHERE ran before SELECT, so that a
	// message that does not match costs no outputs. selectReads says that SELECT
	// reads into the payload, which fails the rule where that is no JSON, match or
	// no match.
	whereFirst, selectReads bool
	// star: the outputs hold all columns. roots are the names of the others.
	star  bool
	roots []string
}

// output is one item of SELECT.
type output struct {
	eval   evalFn // nil: *
	target []step
}

// compile turns a statement's text into a program. Every mistake is reported; the
// program is of no use if one of them is an error.
func compile(text string, report func(diagnostic)) *program {
	c := &compiler{report: report}
	st := parse(text, report)
	c.from(st)
	if st.foreach {
		c.unsupported(st.span, "FOREACH")
		return &c.program
	}
	safe := true
	for i, it := range st.items {
		c.item(i, it)
		safe = safe && (it.star || isSafe(it.x))
	}
	if st.where != nil {
		c.inWhere = true
		c.where = c.condition(st.where)
		c.whereFirst = safe && !c.whereReadsOutputs && !c.selectMayRead
	}
	return &c.program
}

type compiler struct {
	program
	report func(diagnostic)
	// writes are the outputs so far. A reference may mean one of them.
	writes            []write
	inWhere           bool
	whereReadsOutputs bool
	// selectMayRead: it depends on an output called payload whether SELECT reads
	// into the message's.
	selectMayRead bool
}

// write is what one item writes to the outputs.
type write struct {
	path []step
	// same: the item is a path under its own name, so that reading exactly that
	// path, or below it, finds in the outputs what it finds in the row.
	same bool
}

func (c *compiler) fail(at span, name, hint, format string, args ...any) {
	c.report(diagnostic{span: at, name: name, hint: hint, message: fmt.Sprintf(format, args...)})
}

func (c *compiler) warn(at span, name, hint, format string, args ...any) {
	c.report(diagnostic{span: at, severity: Warning, name: name, hint: hint, message: fmt.Sprintf(format, args...)})
}

func (c *compiler) unsupported(at span, what string) {
	c.fail(at, "not-supported-yet", "", "%s is not supported yet", what)
}

func (c *compiler) from(st *statement) {
	for _, s := range st.from {
		switch {
		case strings.HasPrefix(s.name, eventPrefix):
			c.fromEvent(s)
		case strings.HasPrefix(s.name, "$bridges/"), strings.HasPrefix(s.name, "$sources/"):
			c.fail(s.span, "unsupported-source", "", "source %s is not supported", quote(s.name))
		default:
			if wrong := checkFilter(s.name); wrong != "" {
				c.fail(s.span, "bad-topic-filter", "", "%s: %s", quote(s.name), wrong)
			} else if !slices.Contains(c.filters, s.name) {
				c.filters = append(c.filters, s.name)
			}
		}
	}
}

func (c *compiler) item(i int, it item) {
	if it.star {
		c.star = true
		c.outputs = append(c.outputs, output{})
		return
	}
	target, same := c.target(i, it)
	if it.x == nil || target == nil {
		return
	}
	// A reference to an output of the same item is one to an earlier output.
	eval := c.value(it.x)
	c.outputs = append(c.outputs, output{eval, target})
	c.writes = append(c.writes, write{target, same})
	if root := target[0].key; !slices.Contains(c.roots, root) {
		c.roots = append(c.roots, root)
	}
}

// target is where an item's value goes; same is for a path of the row that keeps
// its name.
func (c *compiler) target(i int, it item) (path []step, same bool) {
	from, isRef := it.x.(*ref)
	if it.alias == nil {
		switch x := it.x.(type) {
		case *ref:
			_, plain := x.keys()
			return x.steps, plain
		case *literal:
			if x.val.kind == kindString {
				return []step{{kind: stepKey, key: x.val.s}}, false
			}
		}
		return []step{{kind: stepKey, key: fmt.Sprintf("item_%d", i+1)}}, false
	}
	for _, s := range it.alias.steps {
		if s.kind == stepDynamic {
			c.unsupported(s.span, "an index that is looked up")
			return nil, false
		}
	}
	if isRef {
		written, ok1 := it.alias.keys()
		read, ok2 := from.keys()
		same = ok1 && ok2 && slices.Equal(written, read)
	}
	return it.alias.steps, same
}

// isSafe reports whether x can neither fail nor count anything, the reading of a
// payload that is no JSON aside.
func isSafe(x expr) bool {
	switch x := x.(type) {
	case *literal, *ref:
		return true
	case *list:
		return !slices.ContainsFunc(x.elems, func(e expr) bool { return !isSafe(e) })
	}
	return false
}

// ref compiles a reference: the outputs first, as far as they can differ from the
// row, then the row.
func (c *compiler) ref(r *ref) evalFn {
	for i, s := range r.steps {
		switch {
		case s.kind == stepDynamic:
			c.unsupported(s.span, "an index that is looked up")
			return undefined
		case s.kind == stepRange:
			c.unsupported(s.span, "a range")
			return undefined
		case s.kind == stepIndex && s.index == 0 && i > 0:
			c.warn(s.span, "index-zero", "the first element is [1], the last [-1]", "index 0 is always undefined")
		}
	}
	c.checkName(r)
	fromRow, differs := rowPath(r), c.mayDiffer(r)
	if !c.inWhere && r.root().key == "payload" && len(r.steps) > 1 {
		c.selectReads, c.selectMayRead = true, c.selectMayRead || differs
	}
	if !differs {
		return fromRow
	}
	c.whereReadsOutputs = c.whereReadsOutputs || c.inWhere
	root, rest := r.root().key, r.steps[1:]
	return func(e *env) (value, error) {
		v := e.out.lookup(root)
		for i := range rest {
			v = e.field(v, &rest[i])
		}
		if v.defined() {
			return v, nil
		}
		return fromRow(e)
	}
}

func undefined(*env) (value, error) { return value{}, nil }

// mayDiffer reports whether the outputs may hold something else under r than the
// row.
func (c *compiler) mayDiffer(r *ref) bool {
	for _, w := range c.writes {
		if w.path[0].key != r.root().key {
			continue
		}
		if !w.same || len(r.steps) < len(w.path) {
			return true
		}
	}
	return false
}

func (c *compiler) checkName(r *ref) {
	root := r.root()
	columns := c.columns()
	if slices.Contains(columns, root.key) || slices.Contains(c.roots, root.key) {
		return
	}
	if root.quoted {
		hint := fmt.Sprintf("did you mean '%s'? Double quotes are for names, single quotes for strings", root.key)
		c.warn(root.span, "double-quoted-value", hint, "no column is called %s", quote(root.key))
		return
	}
	hint := didYouMean(root.key, slices.Concat(c.roots, columns))
	if strings.EqualFold(root.key, "null") {
		hint = "there is no literal NULL: is_null(x) and is_null_var(x) ask for it, null() is undefined"
	}
	c.warn(root.span, "unknown-column", hint, "no source of the FROM clause has a column %s", quote(root.key))
}

// rowPath reads a path of the row. Only the payload must be JSON to be read into;
// other text that holds none reads as undefined.
func rowPath(r *ref) evalFn {
	root, rest := r.root().key, r.steps[1:]
	if root == "payload" && len(rest) > 0 {
		return func(e *env) (value, error) {
			v := e.column(root)
			if v.kind == kindString {
				var err error
				if v, err = e.payloadJSON(); err != nil {
					return value{}, err
				}
			}
			for i := range rest {
				v = e.field(v, &rest[i])
			}
			return v, nil
		}
	}
	return func(e *env) (value, error) {
		v := e.column(root)
		for i := range rest {
			v = e.field(v, &rest[i])
		}
		return v, nil
	}
}
