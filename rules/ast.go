package rules

import (
	"fmt"
	"strings"
)

// statement is one parsed rule. Parts that could not be parsed are nil and were
// reported.
type statement struct {
	span
	foreach bool
	items   []item // SELECT, or FOREACH
	do      []item
	incase  expr
	from    []source
	fromAt  span
	where   expr
}

// item is one output of SELECT, FOREACH or DO.
type item struct {
	span
	star  bool // *
	x     expr // nil for * and where it could not be parsed
	alias *ref // nil: the item names itself
}

// source is one name of the FROM clause.
type source struct {
	span
	name string
}

type expr interface{ pos() span }

// literal is a string, number or boolean constant.
type literal struct {
	span
	val value
}

// ref is a column, an output, or a path into one. steps[0] is its root.
type ref struct {
	span
	steps []step
}

type stepKind uint8

const (
	stepKey     stepKind = iota // .name
	stepIndex                   // [n]
	stepDynamic                 // [name]: an index looked up when the rule runs
	stepRange                   // [m..n]
)

// step is one element of a path.
type step struct {
	span
	kind     stepKind
	key      string
	quoted   bool // "key" as a root
	index    int  // stepIndex, and the first of stepRange; 1-based, negative from the end
	negative bool // tells -0, which appends, from 0
	last     int  // of stepRange
	of       *ref // stepDynamic
	// at answers the index of a stepDynamic, once the step is compiled.
	at evalFn
}

// isFixed reports whether the step alone says where it leads. Others may fail.
func (s *step) isFixed() bool { return s.kind == stepKey || s.kind == stepIndex }

// root is the column or output that the path starts from.
func (r *ref) root() step { return r.steps[0] }

// keys is the path as map keys, and ok false if it has steps that are none.
func (r *ref) keys() (path []string, ok bool) {
	for _, s := range r.steps {
		if s.kind != stepKey {
			return nil, false
		}
		path = append(path, s.key)
	}
	return path, true
}

type call struct {
	span
	module *ref // Module.func(...); nil: none
	name   string
	nameAt span
	args   []expr
}

// unary is a sign.
type unary struct {
	span
	op tokenKind
	x  expr
}

// binary is arithmetic, one comparison, AND or OR.
type binary struct {
	span
	op   tokenKind
	l, r expr
}

type not struct {
	span
	x expr
}

type in struct {
	span
	x       expr
	list    []expr
	negated bool
}

type list struct {
	span
	elems []expr
}

// rangeList is [m..n], a list of integers.
type rangeList struct {
	span
	first, last int
}

// caseOf is CASE in both forms: subject is nil in the searched one.
type caseOf struct {
	span
	subject expr
	whens   []when
	other   expr // ELSE; nil: undefined
}

type when struct{ cond, then expr }

// isCondition reports whether x is a truth that only a condition can use.
func isCondition(x expr) bool {
	switch x := x.(type) {
	case *not, *in:
		return true
	case *binary:
		return x.op == keywordAnd || x.op == keywordOr
	}
	return false
}

// isComparison reports whether x is a single comparison.
func isComparison(x expr) bool {
	b, ok := x.(*binary)
	return ok && b.op.isComparison()
}

// text is the path as messages show it.
func (r *ref) text() string {
	var b strings.Builder
	for i, s := range r.steps {
		switch s.kind {
		case stepKey:
			if i > 0 {
				b.WriteByte('.')
			}
			b.WriteString(s.key)
		case stepIndex:
			fmt.Fprintf(&b, "[%d]", s.index)
		case stepRange:
			fmt.Fprintf(&b, "[%d..%d]", s.index, s.last)
		case stepDynamic:
			fmt.Fprintf(&b, "[%s]", s.of.text())
		}
	}
	return b.String()
}
