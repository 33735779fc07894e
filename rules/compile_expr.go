package rules

import (
	"errors"
	"fmt"
)

// value compiles an expression.
func (c *compiler) value(x expr) evalFn {
	if c.watch != nil {
		return c.watch.value(x, c.bareValue(x))
	}
	return c.bareValue(x)
}

func (c *compiler) bareValue(x expr) evalFn {
	switch x := x.(type) {
	case *literal:
		v := x.val
		return func(*env) (value, error) { return v, nil }
	case *ref:
		return c.ref(x)
	case *call:
		return c.call(x)
	case *unary:
		return c.sign(x)
	case *binary:
		if x.op.isComparison() {
			cond := c.comparison(x)
			return func(e *env) (value, error) {
				b, err := cond(e)
				return boolean(b), err
			}
		}
		op, l, r := x.op, c.value(x.l), c.value(x.r)
		return func(e *env) (value, error) {
			a, err := l(e)
			if err != nil {
				return value{}, err
			}
			b, err := r(e)
			if err != nil {
				return value{}, err
			}
			v, err := arithmetic(op, a, b)
			if err == nil && v.kind == kindString {
				err = e.build(len(v.s))
			}
			return v, err
		}
	case *list:
		return c.list(x)
	case *rangeList:
		return c.rangeList(x)
	case *caseOf:
		return c.caseOf(x)
	}
	return undefined
}

func (c *compiler) sign(x *unary) evalFn {
	of := c.value(x.x)
	if lit, ok := x.x.(*literal); ok && lit.val.isNumber() && x.op == tokenMinus {
		v, _ := negate(lit.val)
		return func(*env) (value, error) { return v, nil }
	}
	op := x.op
	return func(e *env) (value, error) {
		v, err := of(e)
		if err != nil {
			return value{}, err
		}
		if op == tokenMinus {
			return negate(v)
		}
		if !v.isNumber() {
			return value{}, badArgument("+ needs a number, found %s", v.describe())
		}
		return v, nil
	}
}

func (c *compiler) values(xs []expr) []evalFn {
	fns := make([]evalFn, len(xs))
	for i, x := range xs {
		fns[i] = c.value(x)
	}
	return fns
}

func (c *compiler) list(x *list) evalFn {
	fns := c.values(x.elems)
	return func(e *env) (value, error) {
		elems := make([]value, len(fns))
		for i, fn := range fns {
			v, err := fn(e)
			if err != nil {
				return value{}, err
			}
			elems[i] = v
		}
		v := listOf(elems)
		return v, e.build(v.weight())
	}
}

// rangeList is a constant, the elements of all of which in a statement are bounded.
func (c *compiler) rangeList(x *rangeList) evalFn {
	n := x.last - x.first + 1
	switch {
	case n < 0:
		c.fail(x.span, "bad-range", fmt.Sprintf("write [%d..%d]", x.last, x.first), "the range [%d..%d] runs backwards", x.first, x.last)
		return undefined
	case n > maxElements-c.ranged:
		c.fail(x.span, "bad-range", "", "ranges of a statement make at most %d elements, with this one %d", maxElements, c.ranged+n)
		return undefined
	}
	c.ranged += n
	elems := make([]value, n)
	for i := range elems {
		elems[i] = integer(int64(x.first + i))
	}
	v := listOf(elems)
	return func(*env) (value, error) { return v, nil }
}

func (c *compiler) comparison(x *binary) condFn {
	c.checkComparison(x)
	op, l, r := x.op, c.value(x.l), c.value(x.r)
	return func(e *env) (bool, error) {
		a, err := l(e)
		if err != nil {
			return false, err
		}
		b, err := r(e)
		if err != nil {
			return false, err
		}
		answer, mismatch := compare(op, a, b)
		e.mismatch = e.mismatch || mismatch
		return answer, nil
	}
}

// condition compiles what stands in WHERE and WHEN. A value that is no boolean is
// no truth; a function must answer a boolean.
func (c *compiler) condition(x expr) condFn {
	if c.watch != nil {
		return c.watch.condition(x, c.bareCondition(x))
	}
	return c.bareCondition(x)
}

func (c *compiler) bareCondition(x expr) condFn {
	switch x := x.(type) {
	case *binary:
		switch {
		case x.op == keywordAnd || x.op == keywordOr:
			return c.connective(x)
		case x.op.isComparison():
			return c.comparison(x)
		}
	case *not:
		return c.not(x)
	case *in:
		return c.in(x)
	case *call:
		of, name := c.value(x), x.name
		return func(e *env) (bool, error) {
			v, err := of(e)
			if err != nil {
				return false, err
			}
			if v.kind != kindBool {
				return false, badArgument("%s answers %s where a condition needs a boolean", name, v.describe())
			}
			return v.bool(), nil
		}
	}
	of := c.value(x)
	return func(e *env) (bool, error) {
		v, err := of(e)
		return v.isTrue(), err
	}
}

func (c *compiler) connective(x *binary) condFn {
	l, r, decided := c.condition(x.l), c.condition(x.r), x.op == keywordOr
	return func(e *env) (bool, error) {
		if b, err := l(e); err != nil || b == decided {
			return b, err
		}
		return r(e)
	}
}

// not: the opposite of a truth. NOT of a value that is no boolean is false, as
// the value itself is.
func (c *compiler) not(x *not) condFn {
	switch x.x.(type) {
	case *ref, *call, *literal:
		of := c.value(x.x)
		return func(e *env) (bool, error) {
			v, err := of(e)
			return v.kind == kindBool && !v.bool(), err
		}
	}
	of := c.condition(x.x)
	return func(e *env) (bool, error) {
		b, err := of(e)
		return err == nil && !b, err
	}
}

// in compares without any conversion.
func (c *compiler) in(x *in) condFn {
	of, elems, negated := c.value(x.x), c.values(x.list), x.negated
	return func(e *env) (bool, error) {
		v, err := of(e)
		if err != nil {
			return false, err
		}
		for _, elem := range elems {
			w, err := elem(e)
			if err != nil {
				return false, err
			}
			if identical(v, w) {
				return !negated, nil
			}
		}
		return negated, nil
	}
}

func (c *compiler) caseOf(x *caseOf) evalFn {
	conds, thens := make([]condFn, len(x.whens)), make([]evalFn, len(x.whens))
	var subject evalFn
	var matches []evalFn
	if x.subject != nil {
		subject, matches = c.value(x.subject), make([]evalFn, len(x.whens))
	}
	for i, w := range x.whens {
		if subject != nil {
			matches[i] = c.value(w.cond)
		} else {
			c.judgeCondition("WHEN", w.cond)
			conds[i] = c.condition(w.cond)
		}
		thens[i] = c.value(w.then)
	}
	other := evalFn(undefined)
	if x.other != nil {
		other = c.value(x.other)
	}
	if subject == nil {
		return func(e *env) (value, error) {
			for i, cond := range conds {
				if b, err := cond(e); err != nil {
					return value{}, err
				} else if b {
					return thens[i](e)
				}
			}
			return other(e)
		}
	}
	return func(e *env) (value, error) {
		v, err := subject(e)
		if err != nil {
			return value{}, err
		}
		for i, match := range matches {
			if w, err := match(e); err != nil {
				return value{}, err
			} else if identical(v, w) {
				return thens[i](e)
			}
		}
		return other(e)
	}
}

// call compiles a function call. That the function exists and takes so many
// arguments is seen here, not when a message comes.
func (c *compiler) call(x *call) evalFn {
	args := c.values(x.args)
	f, ok := functions[x.name]
	switch {
	case x.module != nil:
		hint := "there are no modules; see docs/rules.md#functions"
		if ok {
			hint = fmt.Sprintf("write %s(...): functions are called by their name alone", x.name)
		}
		c.fail(x.nameAt, "unknown-function", hint, "unknown module %s", quote(x.module.text()))
		return undefined
	case !ok:
		c.fail(x.nameAt, "unknown-function", functionHint(x.name), "unknown function %s", quote(x.name))
		return undefined
	case len(args) < f.min || len(args) > f.max:
		c.fail(x.span, "wrong-arity", "", "%s takes %s, found %d", x.name, f.arity(), len(args))
		return undefined
	}
	if f.constant != nil {
		c.constants(x, f, args)
	}
	return func(e *env) (value, error) {
		base := len(e.args)
		defer func() { e.args = e.args[:base] }()
		for _, arg := range args {
			v, err := arg(e)
			if err != nil {
				return value{}, err
			}
			e.args = append(e.args, v)
		}
		v, err := f.eval(e, e.args[base:])
		if failed, ok := errors.AsType[*fault](err); ok && failed.outcome == BadArgument {
			err = badArgument("%s: %s", x.name, failed.message)
		}
		if err == nil && v.kind >= kindString { // others weigh next to nothing
			err = e.build(v.weight())
		}
		return v, err
	}
}

// constants shows a function the arguments that are constants, and puts what it
// makes of them into their places.
func (c *compiler) constants(x *call, f function, args []evalFn) {
	for i, arg := range x.args {
		v, ok := constantOf(arg)
		if !ok {
			continue
		}
		v, err := f.constant(i, len(args), v)
		if err != nil {
			c.fail(arg.pos(), "bad-argument", "", "%s: %s", x.name, err)
			continue
		}
		args[i] = func(*env) (value, error) { return v, nil }
	}
}

// constantOf is the value of a literal, with a sign or without.
func constantOf(x expr) (value, bool) {
	switch x := x.(type) {
	case *literal:
		return x.val, true
	case *unary:
		if lit, ok := x.x.(*literal); ok && lit.val.isNumber() {
			if x.op == tokenPlus {
				return lit.val, true
			}
			v, err := negate(lit.val)
			return v, err == nil
		}
	}
	return value{}, false
}
