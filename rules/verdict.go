package rules

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// verdict is what is known of a condition before any message comes.
type verdict uint8

const (
	open   verdict = iota // it depends on the message
	never                 // it is false, or fails the rule
	always                // it is true
)

func (v verdict) not() verdict {
	switch v {
	case never:
		return always
	case always:
		return never
	}
	return open
}

// judged is a verdict and why.
type judged struct {
	verdict
	span
	reason, hint string
	// part: it is a slip even where it decides nothing. It is true but for what is
	// undefined, or can't be compared.
	part bool
}

// judge finds what in the conditions of a statement does not depend on messages.
type judge struct {
	*compiler
	parts  []judged // that are never true
	negate int      // how many NOT are around
}

// judgeCondition warns of a condition that is the same for all messages, and of
// what in it is. clause is its keyword.
func (c *compiler) judgeCondition(clause string, x expr) {
	j := judge{compiler: c}
	whole := j.judge(x)
	lit, isLiteral := x.(*literal)
	switch {
	case whole.verdict == never:
		c.warn(whole.span, "never-true", whole.hint, "%s is never true: %s", clause, whole.reason)
	case whole.verdict == always && !(isLiteral && lit.val.isTrue()): // who writes WHERE true means it
		c.warn(whole.span, "always-true", whole.hint, "%s is always true: %s", clause, whole.reason)
	case whole.verdict == open:
		for _, p := range j.parts {
			name, what := "never-true", "never"
			if p.verdict == always {
				name, what = "always-true", "always"
			}
			c.warn(p.span, name, p.hint, "this part of %s is %s true: %s", clause, what, p.reason)
		}
	}
}

// judge is the verdict on x. A part of it that could not be parsed leaves it open.
func (j *judge) judge(x expr) judged {
	switch x := x.(type) {
	case *literal:
		switch {
		case x.val.kind != kindBool:
			return judged{verdict: never, span: x.span, reason: x.val.describe() + " is no boolean", hint: j.meantField(x)}
		case x.val.bool():
			return judged{verdict: always, span: x.span, reason: "it is the constant true"}
		}
		return judged{verdict: never, span: x.span, reason: "it is the constant false", hint: "to switch a rule off write enabled: false"}
	case *unary:
		return judged{verdict: never, span: x.span, reason: "a number is no boolean"}
	case *list:
		return judged{verdict: never, span: x.span, reason: "a list is no boolean"}
	case *rangeList:
		return judged{verdict: never, span: x.span, reason: "a list is no boolean"}
	case *not:
		return j.not(x)
	case *in:
		return j.in(x)
	case *binary:
		switch {
		case x.op == keywordAnd:
			return j.and(x)
		case x.op == keywordOr:
			return j.or(x)
		case x.op.isComparison():
			return j.compare(x)
		}
		return judged{verdict: never, span: x.span, reason: "what arithmetic makes is no boolean"}
	}
	return judged{}
}

func (j *judge) not(x *not) judged {
	if lit, ok := x.x.(*literal); ok && lit.val.kind != kindBool {
		return judged{verdict: never, span: x.span, reason: "NOT of what is no boolean is false"}
	}
	j.negate++
	of := j.judge(x.x)
	j.negate--
	if of.verdict == open || of.part {
		return judged{}
	}
	if _, isConstant := x.x.(*literal); isConstant {
		of.hint = ""
	}
	of.reason = fmt.Sprintf("it is NOT of what is %s true, since %s", map[verdict]string{never: "never", always: "always"}[of.verdict], of.reason)
	return judged{verdict: of.verdict.not(), span: x.span, reason: of.reason}
}

func (j *judge) in(x *in) judged {
	v, ok := j.constant(x.x)
	if !ok {
		return judged{}
	}
	found := false
	for _, e := range x.list {
		w, ok := j.constant(e)
		if !ok {
			return judged{}
		}
		found = found || identical(v, w)
	}
	answer := judged{verdict: never, span: x.span, reason: "all of it is constant", hint: j.meantField(x.x)}
	if found != x.negated {
		answer.verdict = always
	}
	return answer
}

// terms are the operands of a chain of one connective.
func terms(op tokenKind, x expr) []expr {
	if b, ok := x.(*binary); ok && b.op == op {
		return append(terms(op, b.l), terms(op, b.r)...)
	}
	return []expr{x}
}

func (j *judge) and(x *binary) judged {
	answer := judged{verdict: always, span: x.span, reason: "all of it is"}
	var bounds []bound
	for _, t := range terms(keywordAnd, x) {
		of := j.judge(t)
		if of.verdict == never {
			return of
		}
		switch {
		case of.verdict == open:
			answer = judged{}
		case of.part && answer.verdict == always:
			answer = of
		}
		if of.part && j.negate == 0 {
			j.parts = append(j.parts, of)
		}
		b, ok := j.bound(t)
		if !ok {
			continue
		}
		for _, other := range bounds {
			if other.path == b.path && contradict(other, b) {
				hint := "did you mean OR?"
				if other.isSet() && b.isSet() {
					hint = "did you mean OR, or IN?"
				}
				return judged{verdict: never, span: t.pos(), reason: fmt.Sprintf("no %s is both %s and %s", b.name, other.text, b.text), hint: hint}
			}
		}
		if len(bounds) < maxBounds {
			bounds = append(bounds, b)
		}
	}
	return answer
}

// maxBounds bounds how many terms of one chain are compared with each other.
const maxBounds = 100

func (j *judge) or(x *binary) judged {
	answer := judged{verdict: never}
	var dead []judged
	var bounds []bound
	for _, t := range terms(keywordOr, x) {
		of := j.judge(t)
		switch of.verdict {
		case always:
			return of
		case open:
			answer.verdict = open
		case never:
			dead = append(dead, of)
		}
		b, ok := j.bound(t)
		if !ok || b.op != tokenNe {
			continue
		}
		for _, other := range bounds {
			if other.path == b.path && incompatible(other.values[0], b.values[0]) {
				return judged{
					verdict: always, span: t.pos(), reason: fmt.Sprintf("whatever %s is, it is %s or %s", b.name, other.text, b.text),
					hint: "did you mean AND, or NOT IN?", part: true,
				}
			}
		}
		if len(bounds) < maxBounds {
			bounds = append(bounds, b)
		}
	}
	if answer.verdict == never {
		return dead[0]
	}
	if j.negate == 0 {
		j.parts = append(j.parts, dead...)
	}
	return judged{}
}

func (j *judge) compare(x *binary) judged {
	if name, _, _ := j.slip(x); name != "" { // that has a warning of its own
		return judged{}
	}
	l, lConst := j.constant(x.l)
	r, rConst := j.constant(x.r)
	switch {
	case lConst && rConst && l.defined() && r.defined():
		answer := judged{verdict: never, span: x.span, reason: "both sides are constants", hint: j.meantField(x.l, x.r)}
		if holds, _ := compare(x.op, l, r); holds {
			answer.verdict = always
		}
		return answer
	case x.op == tokenMatch && (rConst && r.defined() && r.kind != kindString || lConst && l.defined() && l.kind != kindString):
		return judged{verdict: never, span: x.span, reason: "=~ is of two texts, a topic and a topic filter"}
	case lConst && !l.defined():
		return j.withUndefined(x, x.l, x.r)
	case rConst && !r.defined():
		return j.withUndefined(x, x.r, x.l)
	}
	return judged{}
}

// withUndefined judges a comparison of what is surely undefined with other.
func (j *judge) withUndefined(x *binary, undefined, other expr) judged {
	equal := x.op == tokenEq || x.op == tokenLe || x.op == tokenGe
	v, isConst := j.constant(other)
	answer := judged{verdict: never, span: x.span, reason: "null() is undefined, and what is undefined is never " + x.op.String() + " anything"}
	r, isRef := undefined.(*ref)
	if isRef {
		answer.reason = r.text() + " is always undefined"
	}
	switch o := other.(type) {
	case *ref:
		answer.hint = fmt.Sprintf("is_null(%s) and is_not_null(%[1]s) ask whether it is there", o.text())
	default:
		answer.hint = "is_null(x) and is_not_null(x) ask whether x is there"
	}
	switch {
	case isConst && !v.defined() && equal:
		answer.verdict, answer.reason = always, "both sides are undefined"
	case equal && !isConst && !isSurelyDefined(other):
		return judged{} // it asks whether other is undefined
	case equal && !isRef:
		answer.reason = "one side is undefined, the other is not"
	}
	return answer
}

func isSurelyDefined(x expr) bool {
	switch x := x.(type) {
	case *literal, *unary, *list, *rangeList:
		return true
	case *binary:
		return true // a truth, or arithmetic, which fails where it has no value
	case *call:
		return slices.Contains(numberCalls, x.name) && x.name != "qos"
	}
	return false
}

// constant is the value of x, if no message changes it. What is surely undefined
// is one too.
func (j *judge) constant(x expr) (value, bool) {
	switch x := x.(type) {
	case *call:
		return value{}, x.name == "null" && len(x.args) == 0
	case *ref:
		return value{}, slices.ContainsFunc(x.steps[1:], func(s step) bool { return s.kind == stepIndex && s.index == 0 })
	}
	return constantOf(x)
}

// meantField is a hint for text in single quotes that looks like a field.
func (c *compiler) meantField(xs ...expr) string {
	for _, x := range xs {
		if lit, ok := x.(*literal); ok && lit.val.kind == kindString {
			root, _, _ := strings.Cut(lit.val.s, ".")
			if slices.Contains(c.columns(), root) || c.writes(root) {
				return fmt.Sprintf("did you mean %s, without quotes? Single quotes are for strings", lit.val.s)
			}
		}
	}
	return ""
}

// writes reports whether an item writes an output of that name.
func (c *compiler) writes(root string) bool {
	return slices.ContainsFunc(c.layers, func(l *layer) bool {
		return slices.ContainsFunc(l.writes, func(w write) bool { return w.path[0].key == root })
	})
}

// fieldText is text that is surely meant to be a field.
var fieldText = regexp.MustCompile(`^payload(?:\.[A-Za-z][A-Za-z0-9_]*|\[-?[0-9]+\])+$`)

// checkText warns of a string that looks like a field of the payload.
func (c *compiler) checkText(x expr) {
	if lit, ok := x.(*literal); ok && lit.val.kind == kindString && fieldText.MatchString(lit.val.s) {
		c.warn(lit.span, "single-quoted-field", fmt.Sprintf("did you mean %s, without quotes? Single quotes are for strings", lit.val.s),
			"%s is a string, not the field", "'"+lit.val.s+"'")
	}
}

// checkComparison warns of a comparison, wherever it stands, that can't be meant.
func (c *compiler) checkComparison(x *binary) {
	j := judge{compiler: c}
	name, at, d := j.slip(x)
	_, lConst := constantOf(x.l)
	_, rConst := constantOf(x.r)
	switch name {
	case "":
		if lConst != rConst {
			c.checkText(x.l)
			c.checkText(x.r)
		}
	case "number-and-text":
		c.warn(at, "number-and-text", d.hint, "%s", d.message)
	case "bad-topic-filter":
		c.warn(at, "bad-topic-filter", d.hint, "%s", d.message)
	}
}

// slip is what is surely wrong with a comparison that can't be true; name is "" if
// nothing is.
func (j *judge) slip(x *binary) (name string, at span, d diagnostic) {
	for _, sides := range [][2]expr{{x.l, x.r}, {x.r, x.l}} {
		number, text := sides[0], sides[1]
		lit, ok := text.(*literal)
		if !ok || lit.val.kind != kindString || x.op == tokenMatch || !j.isNumber(number) {
			continue
		}
		if _, isNumber := parseNumeric(lit.val.s); !isNumber {
			d.message = fmt.Sprintf("%s is no number, and is compared with one: that is false, whatever the operator", quote(lit.val.s))
			d.hint = j.meantField(lit)
			return "number-and-text", lit.span, d
		}
	}
	lit, ok := x.r.(*literal)
	if x.op != tokenMatch || !ok || lit.val.kind != kindString {
		return "", span{}, d
	}
	if wrong := checkFilter(lit.val.s); wrong != "" {
		d.message = fmt.Sprintf("%s: %s", quote(lit.val.s), wrong)
	} else if expression.MatchString(lit.val.s) {
		d.message = fmt.Sprintf("%s looks like a regular expression, and =~ takes a topic filter", quote(lit.val.s))
	} else {
		return "", span{}, d
	}
	d.hint = "a filter is such as 'fleet/+/telemetry' or 'fleet/#'"
	if expression.MatchString(lit.val.s) {
		d.hint = "regex_match(topic, 'pattern') takes regular expressions"
	}
	return "bad-topic-filter", lit.span, d
}

// expression is what regular expressions have and topics have not.
var expression = regexp.MustCompile(`^\^|\$$|\.[*+?]|\[[^]]*\][*+?]|\\[dsw.]|\([^)]*\|`)

// isNumber is isNumeric with regard to what items write.
func (j *judge) isNumber(x expr) bool {
	if r, ok := x.(*ref); ok && j.writes(r.root().key) {
		return false
	}
	return isNumeric(x)
}

// bound is a term that compares a path with a constant. For = and IN there may be
// several values; IN is told by its op, keywordIn.
type bound struct {
	path, name, text string
	op               tokenKind
	values           []value
}

// isSet: what satisfies it equals one of the values.
func (b bound) isSet() bool { return b.op == tokenEq || b.op == keywordIn }

var mirrored = map[tokenKind]tokenKind{tokenEq: tokenEq, tokenNe: tokenNe, tokenLt: tokenGt, tokenGt: tokenLt, tokenLe: tokenGe, tokenGe: tokenLe}

func (j *judge) bound(x expr) (b bound, ok bool) {
	switch x := x.(type) {
	case *binary:
		op, side, other := x.op, x.l, x.r
		if _, isRef := side.(*ref); !isRef {
			op, side, other = mirrored[op], other, side
		}
		v, isConst := constantOf(other)
		if _, compares := mirrored[op]; !compares || !isConst {
			return b, false
		}
		b = bound{op: op, values: []value{v}, text: op.String() + " " + constantText(v)}
		if op == tokenEq {
			b.text = constantText(v)
		} else if op == tokenNe {
			b.text = "not " + constantText(v)
		}
		return b, b.of(side)
	case *in:
		b = bound{op: keywordIn, text: "one of the list"}
		for _, e := range x.list {
			v, isConst := constantOf(e)
			if !isConst {
				return b, false
			}
			b.values = append(b.values, v)
		}
		return b, !x.negated && b.of(x.x)
	}
	return b, false
}

// of fills in the path; false if it is none, or depends on others, or the values are
// neither numbers, text nor booleans.
func (b *bound) of(x expr) bool {
	r, ok := x.(*ref)
	if !ok || slices.ContainsFunc(r.steps, func(s step) bool { return !s.isFixed() }) ||
		slices.ContainsFunc(b.values, func(v value) bool { return !v.isNumber() && v.kind != kindString && v.kind != kindBool }) {
		return false
	}
	b.name = r.text()
	for _, s := range r.steps {
		b.path += fmt.Sprintf("%d %q %d;", s.kind, s.key, s.index)
	}
	return true
}

func constantText(v value) string {
	if v.kind == kindString {
		return "'" + strings.Trim(quote(v.s), `"`) + "'"
	}
	return v.text()
}

// contradict reports whether nothing satisfies both.
func contradict(a, b bound) bool {
	switch {
	case a.isSet() && b.isSet():
		return !slices.ContainsFunc(a.values, func(v value) bool {
			return slices.ContainsFunc(b.values, func(w value) bool { return !incompatible(v, w) })
		})
	case b.isSet():
		a, b = b, a
	}
	limit := b.values[0]
	if a.isSet() {
		return !slices.ContainsFunc(a.values, func(v value) bool { return !misses(v, b.op, limit) })
	}
	if b.op == tokenGt || b.op == tokenGe {
		a, b = b, a
	}
	if (a.op != tokenGt && a.op != tokenGe) || (b.op != tokenLt && b.op != tokenLe) || !a.values[0].isNumber() || !b.values[0].isNumber() {
		return false
	}
	c := compareNumbers(a.values[0], b.values[0])
	return c > 0 || c == 0 && (a.op == tokenGt || b.op == tokenLt)
}

// incompatible reports whether nothing equals both v and w: a number equals text
// that reads as the same number.
func incompatible(v, w value) bool {
	if equal, _ := compare(tokenEq, v, w); equal {
		return false
	}
	if v.kind == kindString && w.kind == kindString {
		n, ok1 := parseNumeric(v.s)
		m, ok2 := parseNumeric(w.s)
		return !ok1 || !ok2 || compareNumbers(n, m) != 0
	}
	return true
}

// misses reports whether what equals v can't be op limit.
func misses(v value, op tokenKind, limit value) bool {
	if v.kind == kindString && limit.kind == kindString {
		if _, isNumber := parseNumeric(v.s); isNumber && op != tokenNe {
			return false // a number that equals it is compared otherwise
		}
	} else if op != tokenNe && (v.isNumber() && limit.kind == kindString || limit.kind == kindBool) {
		return false
	}
	holds, _ := compare(op, v, limit)
	return !holds
}
