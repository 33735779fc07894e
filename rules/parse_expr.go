package rules

import (
	"math"
	"strconv"
)

// Precedence, low to high: OR, AND, NOT, comparison and IN, + and -,
// * / div mod, sign. Conditions and values share one descent, since a parenthesis
// may hold either; where a condition cannot stand is checked on the way up.

func (p *parser) or() expr {
	l := p.and()
	for p.peek().kind == keywordOr {
		op := p.next()
		r := p.and()
		l = &binary{span: l.pos().to(r.pos()), op: op.kind, l: l, r: r}
	}
	return l
}

func (p *parser) and() expr {
	l := p.not()
	for p.peek().kind == keywordAnd {
		op := p.next()
		r := p.not()
		l = &binary{span: l.pos().to(r.pos()), op: op.kind, l: l, r: r}
	}
	return l
}

func (p *parser) not() expr {
	if p.peek().kind != keywordNot {
		return p.predicate()
	}
	op := p.next()
	defer p.nest(op.span)()
	x := p.not()
	return &not{span: op.span.to(x.pos()), x: x}
}

// predicate is a value, one comparison, or IN.
func (p *parser) predicate() expr {
	l := p.sum()
	t := p.peek()
	switch {
	case t.kind == tokenTildeEq:
		p.unexpected("a comparison")
	case t.kind.isComparison():
		p.next()
		p.operand(l)
		r := p.operand(p.sum())
		if next := p.peek(); next.kind.isComparison() {
			p.fail(next.span, "syntax", "join comparisons with AND", "comparisons cannot be chained")
		}
		return &binary{span: l.pos().to(r.pos()), op: t.kind, l: l, r: r}
	case t.kind == keywordIn, t.kind == keywordNot && p.follows(keywordIn):
		p.operand(l)
		negated := p.accept(keywordNot)
		p.next()
		p.expect(tokenLParen, `"(" and a list after IN`)
		elems := p.values(tokenRParen, `"," or ")"`)
		return &in{span: l.pos().to(p.last().span), x: l, list: elems, negated: negated}
	}
	return l
}

// operand refuses a condition or comparison where a single value is needed.
func (p *parser) operand(x expr) expr {
	if isCondition(x) || isComparison(x) {
		p.fail(x.pos(), "syntax", "", "a comparison or condition cannot be an operand")
	}
	return x
}

// value is an expression or one comparison; AND, OR, NOT and IN stand in
// conditions alone.
func (p *parser) value(want string) expr {
	switch k := p.peek().kind; {
	case k == tokenEOF, k.startsClause(), k == tokenComma, k == tokenRParen, k == tokenRBracket:
		p.unexpected(want)
	}
	x := p.or()
	if isCondition(x) {
		p.fail(x.pos(), "syntax", "use CASE WHEN ... THEN true ELSE false END", "AND, OR, NOT and IN stand in conditions only: WHERE, INCASE and WHEN")
	}
	return x
}

// values is a list of values up to the closing bracket, which is passed.
func (p *parser) values(closing tokenKind, want string) []expr {
	var xs []expr
	if p.accept(closing) {
		return nil
	}
	for {
		xs = append(xs, p.value("a value"))
		if p.accept(closing) {
			return xs
		}
		p.expect(tokenComma, want)
	}
}

func (p *parser) sum() expr {
	l := p.product()
	for p.peek().kind == tokenPlus || p.peek().kind == tokenMinus {
		l = p.arithmetic(l, p.product)
	}
	return l
}

func (p *parser) product() expr {
	l := p.sign()
	for {
		switch p.peek().kind {
		case tokenStar, tokenSlash, keywordDiv, keywordMod:
			l = p.arithmetic(l, p.sign)
		default:
			return l
		}
	}
}

func (p *parser) arithmetic(l expr, right func() expr) expr {
	op := p.next()
	p.operand(l)
	r := p.operand(right())
	return &binary{span: l.pos().to(r.pos()), op: op.kind, l: l, r: r}
}

func (p *parser) sign() expr {
	t := p.peek()
	if t.kind != tokenMinus && t.kind != tokenPlus {
		return p.primary()
	}
	p.next()
	defer p.nest(t.span)()
	x := p.operand(p.sign())
	return &unary{span: t.span.to(x.pos()), op: t.kind, x: x}
}

// nest counts one level of nesting until the answer is called.
func (p *parser) nest(at span) func() {
	p.depth++
	if p.depth > maxNesting {
		p.fail(at, "nested-too-deeply", "", "expressions nest at most %d deep", maxNesting)
	}
	return func() { p.depth-- }
}

func (p *parser) primary() expr {
	t := p.peek()
	switch t.kind {
	case tokenString:
		p.next()
		return &literal{t.span, str(t.text)}
	case tokenInt:
		p.next()
		return &literal{t.span, p.integer(t)}
	case tokenFloat:
		p.next()
		v, ok := parseFloat(t.text)
		if !ok {
			p.complain(t.span, "bad-number", "", "%s does not fit in a float", t.text)
		}
		return &literal{t.span, v}
	case tokenIdent:
		p.next()
		if t.text == "true" || t.text == "false" {
			return &literal{t.span, boolean(t.text == "true")}
		}
		if p.peek().kind == tokenLParen {
			return p.call(t)
		}
		r := p.path(t)
		if p.peek().kind == tokenLParen {
			return p.moduleCall(r)
		}
		return r
	case keywordDiv, keywordMod: // also functions: mod(a, b)
		if p.follows(tokenLParen) {
			p.next()
			t.text = t.kind.String()
			return p.call(t)
		}
	case tokenQuoted:
		p.next()
		return p.path(t)
	case tokenLParen:
		p.next()
		defer p.nest(t.span)()
		x := p.or()
		p.expect(tokenRParen, `")"`)
		return x
	case tokenLBracket:
		return p.brackets()
	case keywordCase:
		return p.caseOf()
	case tokenBad:
		p.next()
		return &literal{t.span, value{}}
	case tokenDot:
		if p.follows(tokenInt) {
			p.fail(t.span.to(p.tokens[p.at+1].span), "bad-number", "write 0."+p.tokens[p.at+1].text, "a number cannot begin with a point")
		}
	}
	p.unexpected("a value")
	return nil
}

func (p *parser) integer(t token) value {
	v, ok := parseInteger(t.text)
	if !ok {
		p.complain(t.span, "bad-number", "", "an integer has at most %d digits", maxDigits)
	}
	return v
}

func (p *parser) call(name token) expr {
	defer p.nest(name.span)()
	p.next() // (
	args := p.values(tokenRParen, `"," or ")"`)
	return &call{span: name.span.to(p.last().span), name: name.text, nameAt: name.span, args: args}
}

// moduleCall is Module.func(...), which there are none of.
func (p *parser) moduleCall(r *ref) expr {
	function := r.steps[len(r.steps)-1]
	x := p.call(token{span: r.span, text: function.key}).(*call)
	module := *r
	module.steps = r.steps[:len(r.steps)-1]
	x.module = &module
	return x
}

// brackets is a list or a range.
func (p *parser) brackets() expr {
	open := p.next()
	defer p.nest(open.span)()
	if p.rangeFollows() {
		first, _, _ := p.signedInt()
		p.next()
		last := p.rangeEnd()
		return &rangeList{span: open.span.to(p.last().span), first: first, last: last}
	}
	elems := p.values(tokenRBracket, `"," or "]"`)
	return &list{span: open.span.to(p.last().span), elems: elems}
}

// rangeFollows reports whether an integer, its sign or none, and .. come next.
func (p *parser) rangeFollows() bool {
	rest := p.tokens[p.at:]
	if rest[0].kind == tokenMinus || rest[0].kind == tokenPlus {
		rest = rest[1:]
	}
	return rest[0].kind == tokenInt && rest[1].kind == tokenDotDot
}

func (p *parser) rangeEnd() int {
	n, _, ok := p.signedInt()
	if !ok {
		p.unexpected("an integer after ..")
	}
	p.expect(tokenRBracket, `"]"`)
	return n
}

// signedInt reads an integer with an optional sign; ok is false if there is
// none, and then the sign may have been passed.
func (p *parser) signedInt() (n int, negative, ok bool) {
	switch p.peek().kind {
	case tokenMinus:
		negative = true
		p.next()
	case tokenPlus:
		p.next()
	}
	if p.peek().kind != tokenInt {
		return 0, negative, false
	}
	t := p.next()
	n, err := strconv.Atoi(t.text)
	if err != nil || n > math.MaxInt32 {
		n = 0
		p.complain(t.span, "bad-number", "", "an index does not fit: %s", quote(t.text))
	}
	if negative {
		n = -n
	}
	return n, negative, true
}

// path is a reference that begins with the name root.
func (p *parser) path(root token) *ref {
	r := &ref{span: root.span, steps: []step{{span: root.span, key: root.text, quoted: root.kind == tokenQuoted}}}
	for {
		t := p.peek()
		if last := r.steps[len(r.steps)-1]; last.kind == stepRange && (t.kind == tokenDot || t.kind == tokenLBracket) {
			p.fail(t.span, "syntax", "", "nothing can follow a range in a path")
		}
		if len(r.steps) > maxSteps {
			p.fail(r.span.to(p.last().span), "nested-too-deeply", "", "a path has at most %d steps", maxSteps)
		}
		switch t.kind {
		case tokenDot:
			p.next()
			r.steps = append(r.steps, p.key())
		case tokenLBracket:
			r.steps = append(r.steps, p.index())
		default:
			r.span = root.span.to(p.last().span)
			return r
		}
	}
}

func (p *parser) key() step {
	t := p.peek()
	switch t.kind {
	case tokenIdent, tokenString, tokenQuoted, tokenInt:
	case tokenFloat:
		p.fail(t.span, "syntax", "quote a numeric step: a.'1'.100", "%s reads as a float here", t.text)
	default:
		if t.kind.isKeyword() && t.start == p.last().end { // payload.from, not the clause that follows
			p.next()
			p.fail(t.span, "syntax", reservedHint(t.kind), "expected the name of a field, found %s", t.describe())
		}
		p.unexpected("the name of a field")
	}
	p.next()
	return step{span: t.span, kind: stepKey, key: t.text}
}

func (p *parser) index() step {
	open := p.next()
	defer p.nest(open.span)()
	s := step{kind: stepIndex}
	if k := p.peek().kind; k == tokenIdent || k == tokenQuoted {
		s.of = p.path(p.next())
		s.kind = stepDynamic
		p.expect(tokenRBracket, `"]"`)
	} else {
		n, negative, ok := p.signedInt()
		if !ok {
			p.unexpected("an integer index")
		}
		s.index, s.negative = n, negative
		if p.accept(tokenDotDot) {
			s.kind = stepRange
			s.last = p.rangeEnd()
		} else {
			p.expect(tokenRBracket, `"]"`)
		}
	}
	s.span = open.span.to(p.last().span)
	return s
}

func (p *parser) caseOf() expr {
	start := p.next()
	defer p.nest(start.span)()
	c := &caseOf{}
	if p.peek().kind != keywordWhen {
		c.subject = p.value("WHEN or a value")
	}
	for p.accept(keywordWhen) {
		var w when
		if c.subject == nil {
			w.cond = p.or()
		} else {
			w.cond = p.value("a value")
		}
		p.expect(keywordThen, "THEN")
		w.then = p.value("a value")
		c.whens = append(c.whens, w)
	}
	if len(c.whens) == 0 {
		p.unexpected("WHEN")
	}
	if p.accept(keywordElse) {
		c.other = p.value("a value")
	}
	p.expect(keywordEnd, "WHEN, ELSE or END")
	c.span = start.span.to(p.last().span)
	return c
}
