package rules

import (
	"cmp"
	"math"
	"math/big"
	"slices"
	"strings"
)

// compare answers one comparison. mismatch is true where a number met a string
// that is none, which makes the answer false.
func compare(op tokenKind, l, r value) (answer, mismatch bool) {
	if op == tokenMatch {
		return matchOperator(l, r)
	}
	switch {
	case !l.defined() && !r.defined():
		return op == tokenEq || op == tokenLe || op == tokenGe, false
	case !l.defined() || !r.defined():
		return false, false
	case l.kind == kindString && r.kind == kindString:
		return holds(op, strings.Compare(l.s, r.s)), false
	case l.isNumber() && r.kind == kindString:
		n, ok := parseNumeric(r.s)
		return ok && holds(op, compareNumbers(l, n)), !ok
	case l.kind == kindString && r.isNumber():
		n, ok := parseNumeric(l.s)
		return ok && holds(op, compareNumbers(n, r)), !ok
	case isAtom(l) && r.kind == kindString:
		return holds(op, strings.Compare(l.text(), r.s)), false
	case l.kind == kindString && isAtom(r):
		return holds(op, strings.Compare(l.s, r.text())), false
	}
	return holds(op, order(l, r)), false
}

func isAtom(v value) bool { return v.kind == kindBool || v.kind == kindNull }

func holds(op tokenKind, c int) bool {
	switch op {
	case tokenEq:
		return c == 0
	case tokenNe:
		return c != 0
	case tokenLt:
		return c < 0
	case tokenLe:
		return c <= 0
	case tokenGt:
		return c > 0
	}
	return c >= 0 // tokenGe
}

// matchOperator is =~: a topic on the left, a topic filter on the right.
func matchOperator(l, r value) (answer, mismatch bool) {
	if !l.defined() || !r.defined() {
		return false, false
	}
	if l.kind != kindString || r.kind != kindString {
		return false, true
	}
	return matchFilter(r.s, l.s), false
}

// order is Erlang's order of terms: number < boolean and null < map < list <
// string, with 1 equal to 1.0.
func order(l, r value) int {
	if c := cmp.Compare(rank(l), rank(r)); c != 0 {
		return c
	}
	switch {
	case l.isNumber():
		return compareNumbers(l, r)
	case l.kind == kindString:
		return strings.Compare(l.s, r.s)
	case l.isList():
		return slices.CompareFunc(l.decoded().list(), r.decoded().list(), order)
	case l.isObject():
		return orderObjects(l.decoded().object(), r.decoded().object())
	}
	return strings.Compare(l.text(), r.text()) // atoms sort by their names
}

func rank(v value) int {
	switch {
	case v.isNumber():
		return 0
	case v.isObject():
		return 2
	case v.isList():
		return 3
	case v.kind == kindString:
		return 4
	}
	return 1
}

// orderObjects compares sizes, then keys, then values.
func orderObjects(l, r *object) int {
	if c := cmp.Compare(len(l.members), len(r.members)); c != 0 {
		return c
	}
	x, y := l.sorted(), r.sorted()
	byKey := func(a, b member) int { return strings.Compare(a.key, b.key) }
	if c := slices.CompareFunc(x, y, byKey); c != 0 {
		return c
	}
	return slices.CompareFunc(x, y, func(a, b member) int { return order(a.val, b.val) })
}

func (o *object) sorted() []member {
	return slices.SortedFunc(slices.Values(o.members), func(a, b member) int { return strings.Compare(a.key, b.key) })
}

// exactInFloat is the largest magnitude up to which every integer is a float.
const exactInFloat = 1 << 53

// compareNumbers is exact: an integer is never rounded to be compared with a
// float.
func compareNumbers(l, r value) int {
	switch {
	case l.kind == kindInt && r.kind == kindInt:
		return cmp.Compare(l.int(), r.int())
	case l.kind == kindFloat && r.kind == kindFloat:
		return cmp.Compare(l.float(), r.float())
	case l.isInteger() && r.isInteger():
		return l.bigOf().Cmp(r.bigOf())
	case l.kind == kindFloat:
		return -compareIntFloat(r, l.float())
	}
	return compareIntFloat(l, r.float())
}

func compareIntFloat(i value, f float64) int {
	if i.kind == kindInt && i.int() <= exactInFloat && i.int() >= -exactInFloat || math.IsInf(f, 0) {
		return cmp.Compare(i.toFloat(), f)
	}
	return new(big.Float).SetInt(i.bigOf()).Cmp(big.NewFloat(f))
}

// identical is the equality of IN and of the simple CASE: nothing is converted,
// and 1 is not 1.0.
func identical(l, r value) bool {
	l, r = l.decoded(), r.decoded()
	if l.kind != r.kind {
		return false
	}
	switch l.kind {
	case kindString:
		return l.s == r.s
	case kindBig:
		return l.big().Cmp(r.big()) == 0
	case kindFloat:
		return l.float() == r.float()
	case kindList:
		return slices.EqualFunc(l.list(), r.list(), identical)
	case kindObject:
		if len(l.object().members) != len(r.object().members) {
			return false // before anything is sorted
		}
		return slices.EqualFunc(l.object().sorted(), r.object().sorted(), func(a, b member) bool {
			return a.key == b.key && identical(a.val, b.val)
		})
	}
	return l.n == r.n
}
