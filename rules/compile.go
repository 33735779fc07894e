package rules

import (
	"fmt"
	"slices"
	"strings"
)

// program is a compiled statement. It is immutable and may run in many places at
// once, each with an env of its own.
type program struct {
	filters []string   // topic filters of FROM
	events  eventSet   // events of FROM
	each    *iteration // FOREACH; nil: SELECT
	outputs []output   // of SELECT or DO
	where   condFn     // nil: always
	// whereFirst: nobody can tell whether WHERE ran before SELECT, so that a
	// message that does not match costs no outputs. selectReads says that SELECT
	// reads into the payload, which fails the rule where that is no JSON, match or
	// no match.
	whereFirst, selectReads bool
	// star: the outputs hold all columns. roots are the names of the others.
	star  bool
	roots []string
	// numbers are those of roots that are surely no text.
	numbers []string
}

// output is one item of SELECT, DO or FOREACH.
type output struct {
	eval   evalFn // nil: *
	target []step // without ranges
	looks  bool   // an index of target is looked up
}

// compile turns a statement's text into a program. Every mistake is reported; the
// program is of no use if one of them is an error.
func compile(text string, report func(diagnostic)) *program {
	return (&compiler{report: report}).compile(text)
}

func (c *compiler) compile(text string) *program {
	st := parse(text, c.report)
	c.statement = st
	c.from(st)
	if st.foreach {
		c.foreach(st)
		return &c.program
	}
	out := &layer{of: outputsOf}
	c.layers = []*layer{out}
	safe := true
	for i, it := range st.items {
		c.output(i, it, out)
		safe = safe && (it.star || isSafe(it.x))
	}
	if st.where != nil {
		out.final, c.inWhere = true, true
		c.judgeCondition("WHERE", st.where)
		c.where = c.condition(st.where)
		c.whereFirst = safe && !c.whereReadsOutputs && !c.selectMayRead
	}
	return &c.program
}

type compiler struct {
	program
	report            func(diagnostic)
	statement         *statement
	watch             *watch   // nil: nobody watches what expressions come to
	layers            []*layer // what a reference is looked up in before the row
	inWhere           bool
	whereReadsOutputs bool
	ranged            int // elements of all [m..n]
	// selectMayRead: it depends on an output called payload whether SELECT reads
	// into the message's.
	selectMayRead bool
}

// layer is a map that names are looked up in before the row: the outputs, or what
// FOREACH binds.
type layer struct {
	of     func(*env) *object
	writes []write // so far
	// final: all of it is written. What it holds then hides the row's, undefined or
	// not, as in a union of both; before, what it does not define is the row's.
	final bool
}

func outputsOf(e *env) *object { return &e.out }
func boundOf(e *env) *object   { return &e.bound }

// write is what one item writes to a layer.
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

// output compiles an item of SELECT or DO.
func (c *compiler) output(i int, it item, out *layer) {
	if it.star {
		c.star = true
		c.outputs = append(c.outputs, output{})
		return
	}
	if o, ok := c.item(i, it, out); ok {
		c.outputs = append(c.outputs, o)
		c.addRoot(o.target[0].key)
		c.noteNumber(o, it.x)
	}
}

// item compiles an item that is not *; into is where it writes.
func (c *compiler) item(i int, it item, into *layer) (output, bool) {
	target, same := c.target(i, it)
	if it.x == nil || target == nil {
		return output{}, false
	}
	c.checkText(it.x)
	// A reference to an output of the same item is one to an earlier output.
	o := output{eval: c.value(it.x), target: target}
	for i := range target {
		o.looks = o.looks || target[i].kind == stepDynamic
	}
	into.writes = append(into.writes, write{target, same})
	return o, true
}

func (c *compiler) addRoot(name string) {
	if !slices.Contains(c.roots, name) {
		c.roots = append(c.roots, name)
	}
}

// noteNumber notes whether what was written last to an output is surely a number.
func (c *compiler) noteNumber(o output, x expr) {
	name := o.target[0].key
	c.numbers = slices.DeleteFunc(c.numbers, func(s string) bool { return s == name })
	if len(o.target) == 1 && isNumeric(x) {
		c.numbers = append(c.numbers, name)
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
			steps := x.steps
			if last := len(steps) - 1; steps[last].kind == stepRange {
				steps = steps[:last] // what is cut out takes the place of the list
			}
			steps, _ = c.lookups(steps)
			return steps, plain
		case *literal:
			if x.val.kind == kindString {
				return []step{{kind: stepKey, key: x.val.s}}, false
			}
		}
		return []step{{kind: stepKey, key: fmt.Sprintf("item_%d", i+1)}}, false
	}
	if isRef {
		written, ok1 := it.alias.keys()
		read, ok2 := from.keys()
		same = ok1 && ok2 && slices.Equal(written, read)
	}
	path, _ = c.lookups(it.alias.steps)
	return path, same
}

// lookups compiles the indexes of a path that are looked up. fixed: there are none,
// nor a range, so that walking the path cannot fail.
func (c *compiler) lookups(steps []step) (compiled []step, fixed bool) {
	if !slices.ContainsFunc(steps, func(s step) bool { return !s.isFixed() }) {
		return steps, true
	}
	compiled = slices.Clone(steps)
	for i := range compiled {
		if s := &compiled[i]; s.kind == stepDynamic {
			s.at = c.index(s.of)
		}
	}
	return compiled, false
}

// index compiles an index that is looked up: in the row first, in what is only
// partly written after it.
func (c *compiler) index(r *ref) evalFn {
	c.checkPath(r)
	rest, fixed := c.lookups(r.steps[1:])
	eval := rowPath(r, rest, fixed)
	for _, l := range slices.Backward(c.layers) {
		if !l.mayDiffer(r) {
			continue
		}
		if l.final {
			eval = l.read(r, rest, fixed, eval)
		} else {
			eval = firstDefined(eval, l.read(r, rest, fixed, undefined))
		}
		c.whereReadsOutputs = c.whereReadsOutputs || c.inWhere
	}
	return eval
}

func firstDefined(a, b evalFn) evalFn {
	return func(e *env) (value, error) {
		if v, err := a(e); err != nil || v.defined() {
			return v, err
		}
		return b(e)
	}
}

// isSafe reports whether x can neither fail nor count anything, the reading of a
// payload that is no JSON aside.
func isSafe(x expr) bool {
	switch x := x.(type) {
	case *literal:
		return true
	case *ref:
		return !slices.ContainsFunc(x.steps, func(s step) bool { return !s.isFixed() })
	case *list:
		return !slices.ContainsFunc(x.elems, func(e expr) bool { return !isSafe(e) })
	}
	return false
}

// ref compiles a reference: the outputs first, as far as they can differ from the
// row, then the row.
func (c *compiler) ref(r *ref) evalFn {
	c.checkPath(r)
	rest, fixed := c.lookups(r.steps[1:])
	eval, differs := rowPath(r, rest, fixed), false
	for _, l := range slices.Backward(c.layers) {
		if l.mayDiffer(r) {
			eval, differs = l.read(r, rest, fixed, eval), true
		}
	}
	if !c.inWhere && r.root().key == "payload" && len(r.steps) > 1 {
		c.selectReads, c.selectMayRead = true, c.selectMayRead || differs
	}
	c.whereReadsOutputs = c.whereReadsOutputs || c.inWhere && differs
	return eval
}

// checkPath warns of what in a path is always undefined.
func (c *compiler) checkPath(r *ref) {
	for i, s := range r.steps {
		switch {
		case i == 0:
		case s.kind == stepIndex && s.index == 0:
			c.warn(s.span, "index-zero", "the first element is [1], the last [-1]", "index 0 is always undefined")
		case s.kind == stepRange && (s.index == 0 || s.last == 0):
			c.warn(s.span, "index-zero", "the first element is [1], the last [-1]", "a range from or to index 0 always fails")
		}
	}
	c.checkName(r)
}

// read compiles a reference to what the layer holds, or else to what below finds.
// rest are the compiled steps after the root.
func (l *layer) read(r *ref, rest []step, fixed bool, below evalFn) evalFn {
	of, root := l.of, r.root().key
	hides := l.final && l.writesWhole(root)
	if !fixed {
		return func(e *env) (value, error) {
			v, err := e.walk(of(e).lookup(root), rest)
			if err != nil || v.defined() || hides {
				return v, err
			}
			return below(e)
		}
	}
	return func(e *env) (value, error) {
		v := of(e).lookup(root)
		for i := range rest {
			v = e.field(v, &rest[i])
		}
		if v.defined() || hides {
			return v, nil
		}
		return below(e)
	}
}

// writesWhole reports whether an item has root itself as its target.
func (l *layer) writesWhole(root string) bool {
	return slices.ContainsFunc(l.writes, func(w write) bool { return w.path[0].key == root && len(w.path) == 1 })
}

func undefined(*env) (value, error) { return value{}, nil }

// mayDiffer reports whether the layer may hold something else under r than the
// row.
func (l *layer) mayDiffer(r *ref) bool {
	for _, w := range l.writes {
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
	var written []string
	for _, l := range c.layers {
		for _, w := range l.writes {
			written = append(written, w.path[0].key)
		}
	}
	if slices.Contains(columns, root.key) || slices.Contains(written, root.key) {
		return
	}
	if root.quoted {
		hint := fmt.Sprintf("did you mean '%s'? Double quotes are for names, single quotes for strings", root.key)
		if first, _, isPath := strings.Cut(root.key, "."); isPath && (slices.Contains(columns, first) || slices.Contains(written, first)) {
			hint = fmt.Sprintf("did you mean %s, without quotes? Double quotes are for one name", root.key)
		}
		c.warn(root.span, "double-quoted-value", hint, "no column is called %s", quote(root.key))
		return
	}
	hint := didYouMean(root.key, slices.Concat(written, columns))
	if strings.EqualFold(root.key, "null") {
		hint = "there is no literal NULL: is_null(x) and is_null_var(x) ask for it, null() is undefined"
	}
	c.warn(root.span, "unknown-column", hint, "no source of the FROM clause has a column %s", quote(root.key))
}

// rowPath reads a path of the row. Only the payload must be JSON to be read into;
// other text that holds none reads as undefined.
func rowPath(r *ref, rest []step, fixed bool) evalFn {
	root := r.root().key
	read := func(e *env) (value, error) {
		v := e.column(root)
		if v.kind == kindString {
			return e.payloadJSON()
		}
		return v, nil
	}
	switch {
	case root != "payload" && !fixed:
		return func(e *env) (value, error) { return e.walk(e.column(root), rest) }
	case root == "payload" && !fixed:
		return func(e *env) (value, error) {
			v, err := read(e)
			if err != nil {
				return value{}, err
			}
			return e.walk(v, rest)
		}
	case root == "payload" && len(rest) > 0:
		return func(e *env) (value, error) {
			v, err := read(e)
			for i := range rest {
				v = e.field(v, &rest[i])
			}
			return v, err
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
