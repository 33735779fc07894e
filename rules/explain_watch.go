package rules

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// watch takes note of what the expressions of statements come to. It belongs to the
// closures that the compiler makes for it: those that the broker runs, each with a note
// taken of its result.
type watch struct {
	statements map[*Rule]termReader
	runs       []watchedRun

	// Of the run at hand.
	values     map[expr]value
	conditions map[expr]bool
	why        map[*ref]string // why it is undefined
	failed     expr            // the innermost that failed
	where      *Term
	elements   []ElementExplanation
	notShown   int
	rows       []json.RawMessage
	rowCount   int
	undefined  []string
	converted  []string
}

// watchedRun is one rule on one message, the origin or one of those published.
type watchedRun struct {
	RuleExplanation
	rule *Rule
	on   int // as Match has it
}

// compile replaces the rule's program by one that is watched.
func (w *watch) compile(r *Rule) {
	c := &compiler{report: func(diagnostic) {}, watch: w}
	r.program = c.compile(r.SQL)
	st := c.statement
	t := termReader{w: w, st: st, sql: r.SQL}
	t.tokens, _ = scan(r.SQL, c.report)
	w.statements[r] = t
	if where := r.where; where != nil {
		r.where = func(e *env) (bool, error) {
			b, err := where(e)
			term := t.term(st.where)
			w.where = &term
			return b, err
		}
	}
	if r.each == nil || r.each.incase == nil {
		return
	}
	incase, name := r.each.incase, r.each.element
	r.each.incase = func(e *env) (bool, error) {
		w.forget(st.incase)
		b, err := incase(e)
		if len(w.elements) == maxShownRows {
			w.notShown++
			return b, err
		}
		v := e.bound.lookup(name[0].key)
		for i := range name[1:] {
			v = e.field(v, &name[1+i])
		}
		w.elements = append(w.elements, ElementExplanation{Value: appendJSON(nil, v), Incase: t.term(st.incase)})
		t.note(st.incase)
		return b, err
	}
}

func (w *watch) reset() {
	*w = watch{statements: w.statements, runs: w.runs}
}

func (w *watch) value(x expr, eval evalFn) evalFn {
	return func(e *env) (value, error) {
		v, err := eval(e)
		if err != nil {
			w.fails(x)
			return v, err
		}
		if w.values == nil {
			w.values, w.why = make(map[expr]value), make(map[*ref]string)
		}
		w.values[x] = v
		if r, ok := x.(*ref); ok && !v.defined() {
			w.why[r] = e.whyUndefined(r)
		}
		return v, nil
	}
}

func (w *watch) condition(x expr, cond condFn) condFn {
	return func(e *env) (bool, error) {
		b, err := cond(e)
		if err != nil {
			w.fails(x)
			return b, err
		}
		if w.conditions == nil {
			w.conditions = make(map[expr]bool)
		}
		w.conditions[x] = b
		return b, nil
	}
}

func (w *watch) fails(x expr) {
	if w.failed == nil {
		w.failed = x
	}
}

// forget drops what is known of x and all within it, so that another element can be
// told from the one before.
func (w *watch) forget(x expr) {
	walk(x, func(x expr) {
		delete(w.values, x)
		delete(w.conditions, x)
	})
}

// row takes note of the row in e.out.
func (w *watch) row(e *env) {
	if w.rowCount++; w.rowCount <= maxShownRows {
		w.rows = append(w.rows, appendJSON(nil, objectOf(&e.out)))
	}
}

// ran ends the notes on one run.
func (w *watch) ran(r *Rule, on, rows int, err error, e *env) {
	defer w.reset()
	t, watched := w.statements[r]
	if !watched {
		return
	}
	st := t.st
	x := watchedRun{rule: r, on: on}
	x.Rule, x.File, x.Line, x.Fired = r.Name, r.File, r.Line, rows > 0
	x.Sources = r.sources(e.row)
	x.Where, x.Elements, x.ElementsNotShown = w.where, w.elements, w.notShown
	for _, items := range [][]item{st.items, st.do} {
		for _, it := range items {
			t.note(it.x)
		}
	}
	t.note(st.where)
	x.Undefined, x.Converted = w.undefined, w.converted
	if x.Fired {
		x.Rows, x.RowsNotShown = w.rows, w.rowCount-len(w.rows)
	}
	x.Outcome, x.Reason = w.outcome(t, x, err, e)
	w.runs = append(w.runs, x)
}

// outcome is how the run ended, and the first reason for that.
func (w *watch) outcome(t termReader, x watchedRun, err error, e *env) (Outcome, string) {
	failed, _ := errors.AsType[*fault](err)
	switch {
	case failed != nil:
		why := failed.message
		if failed.outcome == PayloadNotJSON {
			why += " (" + payloadProblem([]byte(e.doc.text)) + "), and " + w.reader(t) + " reads into it"
		} else if w.failed != nil {
			why = t.text(w.failed) + ": " + why
		}
		return failed.outcome, why
	case err != nil:
		return BadArgument, err.Error()
	case x.Fired:
		return Matched, ""
	case x.Where != nil && x.Where.Result != TermTrue:
		return NoMatch, x.Where.reason()
	case len(x.Elements) > 0:
		n := len(x.Elements) + x.ElementsNotShown
		first := x.Elements[0].Incase.reason()
		if n == 1 {
			return NoMatch, "INCASE lets the only element not through: " + first
		}
		return NoMatch, fmt.Sprintf("INCASE lets none of the %d elements through; the first: %s", n, first)
	case t.st.foreach:
		collection := t.st.items[len(t.st.items)-1].x
		v := w.values[collection]
		why := " is " + v.describe()
		if v.isList() {
			why = " is an empty list"
		}
		if r, ok := collection.(*ref); ok && w.why[r] != "" {
			why += ": " + w.why[r]
		}
		return NoMatch, "FOREACH has no element: " + t.text(collection) + why
	}
	return NoMatch, "it has no row"
}

// reader is what reads into a payload that is no JSON.
func (w *watch) reader(t termReader) string {
	if w.failed != nil {
		return t.text(w.failed)
	}
	return "SELECT" // which is looked at before, as a whole
}

// reason is the first part of a condition that did not hold that was decisive.
func (t *Term) reason() string {
	if t.Result != TermFalse {
		return t.Text + " has " + t.Result
	}
	switch t.Op {
	case "AND":
		for i := range t.Terms {
			if t.Terms[i].Result == TermFalse {
				return t.Terms[i].reason()
			}
		}
	case "OR", "NOT":
		return t.Text + " is false" + shownValues(t.leaves(nil))
	}
	why := t.Text + " is false" + shownValues(t.Values)
	if t.Note != "" {
		why += ": " + t.Note
	}
	return why
}

func (t *Term) leaves(all []TermValue) []TermValue {
	for _, v := range t.Values {
		if !slices.ContainsFunc(all, func(o TermValue) bool { return o.Text == v.Text }) {
			all = append(all, v)
		}
	}
	for i := range t.Terms {
		all = t.Terms[i].leaves(all)
	}
	return all
}

func shownValues(values []TermValue) string {
	if len(values) == 0 {
		return ""
	}
	var all []string
	for _, v := range values[:min(len(values), maxShownValues)] {
		all = append(all, v.String())
	}
	if len(values) > maxShownValues {
		all = append(all, "...")
	}
	return " (" + strings.Join(all, ", ") + ")"
}

// termReader makes terms of expressions and what is known of them.
type termReader struct {
	w      *watch
	st     *statement
	sql    string
	tokens []token
}

func (t termReader) term(x expr) Term {
	a := Term{Text: t.text(x), Result: TermNotEvaluated}
	if b, ok := t.w.conditions[x]; ok {
		a.Result = fmt.Sprint(b)
	} else if v, ok := t.w.values[x]; ok {
		a.Result = fmt.Sprint(v.isTrue())
	} else if t.w.failed != nil && within(t.w.failed, x) {
		a.Result = TermFailed
	}
	switch x := x.(type) {
	case *binary:
		if x.op == keywordAnd || x.op == keywordOr {
			a.Op = strings.ToUpper(x.op.String())
			for _, part := range parts(x, x.op) {
				a.Terms = append(a.Terms, t.term(part))
			}
			return a
		}
	case *not:
		if isCondition(x.x) || isComparison(x.x) {
			a.Op, a.Terms = "NOT", []Term{t.term(x.x)}
			return a
		}
	}
	a.Values = t.values(x)
	a.Note = t.converted(x)
	if a.Note == "" && a.Result == TermFalse {
		a.Note = t.surprise(x)
	}
	return a
}

// parts are the operands of a run of one connective.
func parts(x expr, op tokenKind) []expr {
	if b, ok := x.(*binary); ok && b.op == op {
		return append(parts(b.l, op), parts(b.r, op)...)
	}
	return []expr{x}
}

// values are what is known of x's operands and of what these are made of.
func (t termReader) values(x expr) (all []TermValue) {
	walk(x, func(y expr) {
		switch y.(type) {
		case *ref, *call, *caseOf:
		case *binary, *unary:
			if y == x || isConstant(y) {
				return
			}
		default:
			return
		}
		v, known := t.w.values[y]
		text := t.text(y)
		if !known || len(all) == maxShownValues || slices.ContainsFunc(all, func(o TermValue) bool { return o.Text == text }) {
			return
		}
		shown := TermValue{Text: text}
		if v.defined() {
			shown.Value = shortJSON(v)
		}
		all = append(all, shown)
	})
	return all
}

func isConstant(x expr) bool {
	_, ok := constantOf(x)
	return ok
}

// shortJSON is a value, or where that is long its beginning as a JSON string.
func shortJSON(v value) json.RawMessage {
	const most = 200
	text := appendJSON(nil, v)
	if len(text) <= most {
		return text
	}
	return appendString(nil, strings.ToValidUTF8(string(text[:most]), "")+"...")
}

// note adds what was undefined and converted within x, each once.
func (t termReader) note(x expr) {
	add := func(all *[]string, text string) {
		if text != "" && len(*all) < maxShownRows && !slices.Contains(*all, text) {
			*all = append(*all, text)
		}
	}
	walk(x, func(x expr) {
		if r, ok := x.(*ref); ok {
			if v, known := t.w.values[r]; known && !v.defined() {
				text := t.text(r)
				if why := t.w.why[r]; why != "" {
					text += ": " + why
				}
				add(&t.w.undefined, text)
			}
		}
		if why := t.converted(x); why != "" {
			add(&t.w.converted, t.text(x)+": "+why)
		}
	})
}

// converted says what a comparison did to what it compared, "" if nothing.
func (t termReader) converted(x expr) string {
	b, ok := x.(*binary)
	if !ok || !b.op.isComparison() {
		return ""
	}
	l, ok1 := t.operand(b.l)
	r, ok2 := t.operand(b.r)
	if !ok1 || !ok2 || !l.defined() || !r.defined() {
		return ""
	}
	if b.op == tokenMatch {
		if l.kind != kindString || r.kind != kindString {
			return "=~ compares a topic with a topic filter, found " + l.describe() + " and " + r.describe()
		}
		return ""
	}
	if l.kind != kindString {
		l, r = r, l
	}
	switch {
	case l.kind != kindString || r.kind == kindString:
		return ""
	case r.isNumber():
		if _, ok := parseNumeric(l.s); !ok {
			return "the string " + quote(l.s) + " is no number"
		}
		return "the string " + quote(l.s) + " is compared as a number"
	case isAtom(r):
		return r.text() + " is compared as a string"
	}
	return ""
}

func (t termReader) operand(x expr) (value, bool) {
	if v, ok := constantOf(x); ok {
		return v, true
	}
	v, ok := t.w.values[x]
	return v, ok
}

// surprise is about conditions that are false although they may look true.
func (t termReader) surprise(x expr) string {
	switch x := x.(type) {
	case *binary:
		l, ok1 := t.operand(x.l)
		r, ok2 := t.operand(x.r)
		if x.op == tokenNe && ok1 && ok2 && l.defined() != r.defined() {
			return "undefined differs from nothing"
		}
	case *in:
		v, ok := t.operand(x.x)
		for _, elem := range x.list {
			w, known := t.operand(elem)
			if !ok || !known || x.negated {
				break
			}
			if equal, _ := compare(tokenEq, v, w); equal && v.defined() {
				return "IN converts nothing, and " + v.describe() + " is not " + w.describe()
			}
		}
	case *ref:
		if v := t.w.values[x]; v.defined() && v.kind != kindBool {
			return "it is no boolean"
		}
	}
	return ""
}

// text is the expression as it stands in the statement, in one line.
func (t termReader) text(x expr) string {
	at := t.balanced(x.pos())
	return strings.Join(strings.Fields(t.sql[at.start:at.end]), " ")
}

// balanced widens a span by the parentheses that it has one half of: those around an
// operand are no part of the operand's own.
func (t termReader) balanced(at span) span {
	first, _ := slices.BinarySearchFunc(t.tokens, at.start, func(k token, start int) int { return k.start - start })
	opened, missing, after := 0, 0, first
	for ; t.tokens[after].start < at.end; after++ {
		switch k := t.tokens[after].kind; {
		case k == tokenLParen:
			opened++
		case k == tokenRParen && opened > 0:
			opened--
		case k == tokenRParen:
			missing++
		}
	}
	for i := first - 1; i >= 0 && missing > 0; i-- {
		if t.tokens[i].kind == tokenLParen {
			at.start = t.tokens[i].start
			missing--
		}
	}
	for ; after < len(t.tokens) && opened > 0; after++ {
		if t.tokens[after].kind == tokenRParen {
			at.end = t.tokens[after].end
			opened--
		}
	}
	return at
}

// whyUndefined says at which step the path of a reference ends, "" if that can't be
// told.
func (e *env) whyUndefined(r *ref) string {
	root := r.root().key
	v, text := e.out.lookup(root), root
	if !v.defined() {
		v = e.bound.lookup(root)
	}
	if !v.defined() {
		v = e.column(root)
	}
	if !v.defined() {
		return "there is no " + quote(root)
	}
	for i := range r.steps[1:] {
		s := &r.steps[1+i]
		if s.kind != stepKey && s.kind != stepIndex {
			return ""
		}
		next := e.field(v, s)
		if !next.defined() {
			return missingStep(v, text, s)
		}
		v = next
		if text += "." + s.key; s.kind == stepIndex {
			text = fmt.Sprintf("%s[%d]", strings.TrimSuffix(text, "."), s.index)
		}
	}
	return ""
}

// missingStep says what v, called text, has instead of the step.
func missingStep(v value, text string, s *step) string {
	if v.kind == kindString {
		if opened, ok := decodeJSON(v.s); ok && (opened.isObject() || opened.isList()) {
			v = opened
		}
	}
	v = v.decoded()
	switch {
	case s.kind == stepIndex && v.kind == kindList:
		return fmt.Sprintf("%s has %d elements", text, len(v.list()))
	case s.kind == stepKey && v.kind == kindObject:
		why := fmt.Sprintf("%s has no %s", text, quote(s.key))
		var keys []string
		for _, m := range v.object().members {
			keys = append(keys, m.key)
		}
		if hint := Suggest(s.key, keys[:min(len(keys), 1000)]); hint != "" {
			why += ", but " + quote(hint)
		}
		return why
	}
	return text + " is " + v.describe()
}

// walk calls fn for x and all expressions within it, x first.
func walk(x expr, fn func(expr)) {
	each := func(xs ...expr) {
		for _, x := range xs {
			walk(x, fn)
		}
	}
	if x == nil {
		return
	}
	fn(x)
	switch x := x.(type) {
	case *call:
		each(x.args...)
	case *unary:
		each(x.x)
	case *binary:
		each(x.l, x.r)
	case *not:
		each(x.x)
	case *in:
		each(x.x)
		each(x.list...)
	case *list:
		each(x.elems...)
	case *caseOf:
		each(x.subject)
		for _, w := range x.whens {
			each(w.cond, w.then)
		}
		each(x.other)
	}
}

// within reports whether x is of, or stands within it.
func within(x, of expr) bool {
	found := false
	walk(of, func(y expr) { found = found || x == y })
	return found
}
