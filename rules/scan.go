package rules

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// maxStatement bounds the text of one statement, in bytes. What the parser and
// the closures recurse over is bounded by it.
const maxStatement = 64 << 10

// scan splits a statement into tokens, the last of which is tokenEOF. Text that is
// no token is reported. cut: a quote is never closed, so that it is unknown what
// the statement says from there on.
func scan(text string, report func(diagnostic)) (tokens []token, cut bool) {
	s := scanner{text: text, report: report}
	for {
		t := s.next()
		tokens = append(tokens, t)
		if t.kind == tokenEOF {
			return tokens, s.cut
		}
	}
}

type scanner struct {
	text   string
	at     int
	cut    bool
	report func(diagnostic)
}

// operators, longest first, so that <= is never taken for <.
var operators = []struct {
	text string
	kind tokenKind
}{
	{"<=", tokenLe}, {">=", tokenGe}, {"<>", tokenNe}, {"!=", tokenNe}, {"=~", tokenMatch}, {"~=", tokenTildeEq}, {"..", tokenDotDot},
	{"=", tokenEq}, {"<", tokenLt}, {">", tokenGt}, {"+", tokenPlus}, {"-", tokenMinus}, {"*", tokenStar}, {"/", tokenSlash},
	{"(", tokenLParen}, {")", tokenRParen}, {"[", tokenLBracket}, {"]", tokenRBracket}, {",", tokenComma}, {".", tokenDot},
}

func (s *scanner) next() token {
	s.skipSpace()
	if s.at == len(s.text) {
		return token{kind: tokenEOF, span: span{s.at, s.at}}
	}
	start, c := s.at, s.text[s.at]
	switch {
	case isLetter(c):
		return s.word()
	case isDigit(c):
		return s.number()
	case c == '\'' || c == '"':
		return s.quoted(c)
	}
	for _, op := range operators {
		if strings.HasPrefix(s.text[s.at:], op.text) {
			s.at += len(op.text)
			return token{kind: op.kind, span: span{start, s.at}}
		}
	}
	return s.stray()
}

// skipSpace passes white space and comments, which run from -- to the end of the
// line.
func (s *scanner) skipSpace() {
	for s.at < len(s.text) {
		switch {
		case strings.IndexByte(" \t\r\n\v\f", s.text[s.at]) >= 0:
			s.at++
		case strings.HasPrefix(s.text[s.at:], "--"):
			end := strings.IndexByte(s.text[s.at:], '\n')
			if end < 0 {
				s.at = len(s.text)
				return
			}
			s.at += end
		default:
			return
		}
	}
}

func (s *scanner) word() token {
	start := s.at
	for s.at < len(s.text) && isNameByte(s.text[s.at]) {
		s.at++
	}
	t := token{kind: tokenIdent, span: span{start, s.at}, text: s.text[start:s.at]}
	if k, ok := keyword(t.text); ok {
		t.kind = k
	}
	return t
}

// number scans digits, or digits "." digits with an optional exponent. A sign is
// an operator, and 1..3 is a range.
func (s *scanner) number() token {
	start, kind := s.at, tokenInt
	s.digits()
	if s.byteAt(0) == '.' && isDigit(s.byteAt(1)) {
		kind = tokenFloat
		s.at++
		s.digits()
		if e := s.byteAt(0); e == 'e' || e == 'E' {
			skip := 1
			if sign := s.byteAt(1); sign == '+' || sign == '-' {
				skip = 2
			}
			if isDigit(s.byteAt(skip)) {
				s.at += skip
				s.digits()
			}
		}
	}
	digits := s.at
	for isNameByte(s.byteAt(0)) {
		s.at++
	}
	if s.at > digits {
		s.report(diagnostic{span: span{start, s.at}, name: "bad-number", message: fmt.Sprintf("malformed number %s", quote(s.text[start:s.at])),
			hint: "numbers are written 12, 1.5 or 1.5e3"})
	}
	return token{kind: kind, span: span{start, s.at}, text: s.text[start:digits]}
}

func (s *scanner) digits() {
	for isDigit(s.byteAt(0)) {
		s.at++
	}
}

// byteAt is the byte n places on, 0 past the end.
func (s *scanner) byteAt(n int) byte {
	if s.at+n < len(s.text) {
		return s.text[s.at+n]
	}
	return 0
}

// quoted scans up to the same quote: there are no escapes. The content loses
// single quotes and then double quotes at its ends, as the dialect has it.
func (s *scanner) quoted(q byte) token {
	start := s.at
	n := strings.IndexByte(s.text[start+1:], q)
	if n < 0 {
		s.at = len(s.text)
		end := len(s.text)
		if line := strings.IndexByte(s.text[start:], '\n'); line >= 0 {
			end = start + line
		}
		s.report(diagnostic{span: span{start, end}, name: "unclosed-quote", message: fmt.Sprintf("this %c is never closed", q),
			hint: "there are no escapes in a literal: it ends at the next " + string(q)})
		s.cut = true
		return token{kind: tokenBad, span: span{start, end}}
	}
	s.at = start + 1 + n + 1
	kind := tokenString
	if q == '"' {
		kind = tokenQuoted
	}
	inner := s.text[start+1 : s.at-1]
	text := strings.Trim(strings.Trim(inner, "'"), `"`)
	if text != inner {
		s.report(diagnostic{span: span{start, s.at}, severity: Warning, name: "quotes-at-ends",
			message: fmt.Sprintf("what stands between quotes loses the quotes at its ends: this is %s", quote(text)),
			hint:    `unescape('\x22') is a double quote, unescape('\x27') a single one`})
	}
	return token{kind: kind, span: span{start, s.at}, text: text}
}

// stray reports and passes text that begins no token: one report for a run of
// it, so that a name in another script is one mistake.
func (s *scanner) stray() token {
	start := s.at
	_, n := utf8.DecodeRuneInString(s.text[s.at:])
	s.at += n
	named := s.text[start] == '_' || n > 1
	for named && s.at < len(s.text) && (isNameByte(s.text[s.at]) || s.text[s.at] >= utf8.RuneSelf) {
		s.at++
	}
	if c := s.text[start]; (c == '&' || c == '|') && strings.HasPrefix(s.text[s.at:], string(c)) {
		s.at++ // one mistake, not two
	}
	d := diagnostic{span: span{start, s.at}, name: "unexpected-text", message: fmt.Sprintf("unexpected %s", quote(s.text[start:s.at]))}
	switch {
	case named:
		d.hint = "a name that is not ASCII letters, digits and _ must be in double quotes, a string in single quotes"
	case s.text[start] == ';':
		d.hint = "a rule is one statement, without a semicolon"
	default:
		d.hint = strayHints[s.text[start]]
	}
	s.report(d)
	return token{kind: tokenBad, span: d.span}
}

// strayHints are what stands here for the operators of other languages.
var strayHints = map[byte]string{
	'&': "write AND",
	'|': "write OR; strings are joined with +",
	'!': "write NOT, and != for unequal",
	'%': "write mod",
	'$': "names stand as they are in a statement; ${...} is for bodies and templates",
}

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isNameByte(c byte) bool {
	return isLetter(c) || isDigit(c) || c == '_' || c == '$' || c == '@' || c == '~'
}
