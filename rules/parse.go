package rules

import (
	"fmt"
	"strings"
)

// maxNesting bounds how deeply expressions may nest in parentheses, lists, calls,
// CASE and signs.
const maxNesting = 100

// maxSteps bounds the steps of a path: each makes a level of what it is written to.
const maxSteps = 100

// parse reads one statement. Every mistake is reported; the parser picks up again
// at the next item or clause, so one mistake does not hide another.
func parse(text string, report func(diagnostic)) *statement {
	if len(text) > maxStatement {
		report(diagnostic{name: "statement-too-long", message: fmt.Sprintf("a statement has at most %d bytes, this one %d", maxStatement, len(text))})
		return &statement{}
	}
	p := parser{report: report}
	p.tokens, p.cut = scan(text, report)
	return p.statement()
}

type parser struct {
	tokens []token
	cut    bool // what is missing at the end may be behind an open quote
	at     int
	depth  int
	report func(diagnostic)
}

// misstep unwinds the parser to where it can pick up again; what went wrong has
// been reported.
type misstep struct{}

func (p *parser) peek() token { return p.tokens[p.at] }

func (p *parser) next() token {
	t := p.tokens[p.at]
	if t.kind != tokenEOF {
		p.at++
	}
	return t
}

func (p *parser) accept(k tokenKind) bool {
	if p.peek().kind == k {
		p.next()
		return true
	}
	return false
}

// follows reports whether the token after the next one is k.
func (p *parser) follows(k tokenKind) bool {
	return p.at+1 < len(p.tokens) && p.tokens[p.at+1].kind == k
}

// last is the token before the next one.
func (p *parser) last() token { return p.tokens[max(p.at-1, 0)] }

func (p *parser) fail(at span, name, hint, format string, args ...any) {
	p.complain(at, name, hint, format, args...)
	panic(misstep{})
}

func (p *parser) complain(at span, name, hint, format string, args ...any) {
	p.report(diagnostic{span: at, name: name, hint: hint, message: fmt.Sprintf(format, args...)})
}

// unexpected reports the next token. If it is a misspelt one of the keywords, it
// is taken for that.
func (p *parser) unexpected(want string, keywords ...string) {
	t := p.peek()
	if t.kind == tokenBad || t.kind == tokenEOF && p.cut {
		panic(misstep{}) // reported already
	}
	hint := ""
	switch {
	case t.kind == tokenTildeEq:
		hint = "did you mean =~?"
	case t.kind == tokenEq && p.last().kind == tokenEq:
		hint = "one = compares"
	case t.kind == tokenGt && p.last().kind == tokenEq:
		hint = "did you mean >=?"
	case t.kind == tokenIdent && otherSQL[strings.ToUpper(t.text)] != "":
		hint = otherSQL[strings.ToUpper(t.text)]
	case t.kind == tokenIdent:
		if hint = didYouMean(t.text, keywords); hint != "" {
			p.tokens[p.at].kind, _ = keyword(Suggest(t.text, keywords))
		}
	case t.kind.isKeyword() && !t.kind.startsClause() && t.kind != keywordAs:
		hint = reservedHint(t.kind)
	}
	p.fail(t.span, "syntax", hint, "expected %s, found %s", want, t.describe())
}

// otherSQL are words that SQL has elsewhere, and what stands for them here.
var otherSQL = map[string]string{
	"IS":      "is_null(x), is_null_var(x) and their like ask for what is not there",
	"LIKE":    "there is no LIKE: regex_match(s, pattern), or =~ for a topic and a topic filter",
	"BETWEEN": "there is no BETWEEN: write x >= 1 AND x <= 2",
	"GROUP":   "there is no GROUP BY: a rule sees one message",
	"ORDER":   "there is no ORDER BY: a rule sees one message",
	"LIMIT":   "there is no LIMIT: a rule sees one message",
	"JOIN":    "there is no JOIN: a rule sees one message",
}

func reservedHint(k tokenKind) string {
	return fmt.Sprintf("%s is a reserved word: a column or field of that name must be quoted", k)
}

func (p *parser) expect(k tokenKind, want string) token {
	if p.peek().kind != k {
		p.unexpected(want)
	}
	return p.next()
}

// guard runs fn and, after a misstep in it, passes tokens until stop says to go
// on. Brackets that open meanwhile are passed as a whole.
func (p *parser) guard(stop func(tokenKind) bool, fn func()) {
	depth := p.depth
	defer func() {
		switch r := recover(); r.(type) {
		case nil:
			return
		case misstep:
		default:
			panic(r)
		}
		p.depth = depth
		for open := 0; ; p.next() {
			k := p.peek().kind
			if k == tokenEOF || open <= 0 && stop(k) || k.startsClause() {
				return
			}
			switch k {
			case tokenLParen, tokenLBracket:
				open++
			case tokenRParen, tokenRBracket:
				open--
			}
		}
	}()
	fn()
}

func (p *parser) statement() *statement {
	st := &statement{}
	p.guard(tokenKind.startsClause, func() {
		t := p.peek()
		switch {
		case p.accept(keywordSelect):
		case p.accept(keywordForeach):
			st.foreach = true
		default:
			hint := ""
			if t.kind == tokenIdent {
				hint = didYouMean(t.text, []string{"SELECT", "FOREACH"})
			}
			p.fail(t.span, "syntax", hint, "a statement begins with SELECT or FOREACH, found %s", t.describe())
		}
		st.span = t.span
		st.items = p.items()
	})
	if st.foreach {
		if p.accept(keywordDo) {
			st.do = p.items()
		}
		if p.accept(keywordIncase) {
			st.incase = p.condition()
		}
	}
	p.from(st)
	if p.accept(keywordWhere) {
		st.where = p.condition()
	}
	if t := p.peek(); t.kind != tokenEOF {
		hint := ""
		switch t.kind {
		case keywordFrom, keywordWhere, keywordDo, keywordIncase:
			hint = "the order is SELECT, FROM, WHERE, or FOREACH, DO, INCASE, FROM, WHERE"
		}
		p.complain(t.span, "syntax", hint, "expected the end of the statement, found %s", t.describe())
	}
	return st
}

func (p *parser) items() []item {
	var items []item
	for {
		p.guard(endsItem, func() {
			it := p.item()
			if k := p.peek().kind; !endsItem(k) {
				p.unexpected("a comma or FROM", "FROM", "AS")
			}
			items = append(items, it)
		})
		if !p.accept(tokenComma) {
			return items
		}
	}
}

func endsItem(k tokenKind) bool { return k == tokenComma || k.startsClause() }

func (p *parser) item() item {
	first := p.peek()
	if p.accept(tokenStar) {
		return item{span: first.span, star: true}
	}
	it := item{x: p.value("a column, * or an expression")}
	switch k := p.peek().kind; {
	case p.accept(keywordAs):
		it.alias = p.target()
	case k == tokenIdent || k == tokenQuoted:
		it.alias = p.target() // AS may be left out
	}
	it.span = first.span.to(p.last().span)
	return it
}

// target is what AS names: a path, which may have indexes but no range.
func (p *parser) target() *ref {
	if k := p.peek().kind; k != tokenIdent && k != tokenQuoted && k != tokenString {
		p.unexpected("a name after AS")
	}
	r := p.path(p.next())
	for _, s := range r.steps {
		if s.kind == stepRange {
			p.fail(s.span, "syntax", "", "a range cannot be the target of AS")
		}
	}
	return r
}

func (p *parser) from(st *statement) {
	p.guard(tokenKind.startsClause, func() {
		st.fromAt = p.expect(keywordFrom, "FROM").span
	})
	if st.fromAt == (span{}) {
		return
	}
	for {
		p.guard(endsItem, func() {
			switch t := p.peek(); t.kind {
			case tokenString, tokenQuoted, tokenIdent:
				p.next()
				if !endsItem(p.peek().kind) {
					if next := p.peek(); t.kind == tokenIdent && next.kind != tokenIdent {
						p.fail(next.span, "syntax", "a topic filter with more than letters and digits must be quoted", "expected a comma or WHERE, found %s", next.describe())
					}
					p.unexpected("a comma or WHERE", "WHERE")
				}
				st.from = append(st.from, source{span: t.span, name: t.text})
			default:
				p.unexpected("a topic filter in quotes")
			}
		})
		if !p.accept(tokenComma) {
			return
		}
	}
}

// condition is the whole of a WHERE or INCASE.
func (p *parser) condition() (x expr) {
	p.guard(tokenKind.startsClause, func() {
		cond := p.or()
		if !p.peek().kind.startsClause() {
			p.unexpected("AND, OR or the end of the condition")
		}
		x = cond
	})
	return x
}
