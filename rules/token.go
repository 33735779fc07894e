package rules

import "strings"

// tokenKind says what a token is. Keywords are kinds of their own, so a reserved
// word can never be taken for a name.
type tokenKind uint8

const (
	tokenEOF tokenKind = iota
	tokenBad           // text that is no token, and was reported
	tokenIdent
	tokenQuoted // "text": a name, never a string
	tokenString // 'text'
	tokenInt
	tokenFloat

	tokenEq       // =
	tokenNe       // != and <>
	tokenLt       // <
	tokenLe       // <=
	tokenGt       // >
	tokenGe       // >=
	tokenMatch    // =~
	tokenTildeEq  // ~=, reserved without a meaning
	tokenPlus     // +
	tokenMinus    // -
	tokenStar     // *
	tokenSlash    // /
	tokenLParen   // (
	tokenRParen   // )
	tokenLBracket // [
	tokenRBracket // ]
	tokenComma    // ,
	tokenDot      // .
	tokenDotDot   // ..

	keywordSelect
	keywordFrom
	keywordWhere
	keywordForeach
	keywordDo
	keywordIncase
	keywordCase
	keywordWhen
	keywordThen
	keywordElse
	keywordEnd
	keywordAs
	keywordAnd
	keywordOr
	keywordNot
	keywordIn
	keywordDiv
	keywordMod
	keywordIf    // reserved, unused
	keywordElsif // reserved, unused
)

var tokenTexts = [...]string{
	tokenEOF: "the end of the statement", tokenBad: "a mistake", tokenIdent: "a name", tokenQuoted: "a quoted name",
	tokenString: "a string", tokenInt: "an integer", tokenFloat: "a float",
	tokenEq: "=", tokenNe: "!=", tokenLt: "<", tokenLe: "<=", tokenGt: ">", tokenGe: ">=",
	tokenMatch: "=~", tokenTildeEq: "~=", tokenPlus: "+", tokenMinus: "-", tokenStar: "*", tokenSlash: "/",
	tokenLParen: "(", tokenRParen: ")", tokenLBracket: "[", tokenRBracket: "]",
	tokenComma: ",", tokenDot: ".", tokenDotDot: "..",
	keywordSelect: "SELECT", keywordFrom: "FROM", keywordWhere: "WHERE", keywordForeach: "FOREACH",
	keywordDo: "DO", keywordIncase: "INCASE", keywordCase: "CASE", keywordWhen: "WHEN",
	keywordThen: "THEN", keywordElse: "ELSE", keywordEnd: "END", keywordAs: "AS", keywordAnd: "AND",
	keywordOr: "OR", keywordNot: "NOT", keywordIn: "IN", keywordDiv: "div", keywordMod: "mod",
	keywordIf: "IF", keywordElsif: "ELSIF",
}

// String is the token as a statement spells it, or a noun for those with a text
// of their own.
func (k tokenKind) String() string { return tokenTexts[k] }

func (k tokenKind) isKeyword() bool { return k >= keywordSelect }

func (k tokenKind) isComparison() bool { return k >= tokenEq && k <= tokenTildeEq }

// startsClause reports whether k ends a list of items or a condition, and is
// therefore where the parser picks up again after a mistake.
func (k tokenKind) startsClause() bool {
	switch k {
	case tokenEOF, keywordSelect, keywordForeach, keywordDo, keywordIncase, keywordFrom, keywordWhere:
		return true
	}
	return false
}

// keyword answers the keyword that word spells, in any case.
func keyword(word string) (tokenKind, bool) {
	for k := keywordSelect; k <= keywordElsif; k++ {
		if strings.EqualFold(word, tokenTexts[k]) {
			return k, true
		}
	}
	return 0, false
}

// span is a stretch of a statement's text, in bytes, end excluded.
type span struct{ start, end int }

func (s span) pos() span { return s }

// to is the span from the start of s to the end of t.
func (s span) to(t span) span { return span{s.start, t.end} }

type token struct {
	span
	kind tokenKind
	text string // names, strings and numbers: what they say, quotes removed
}

// describe names the token in a message: its kind, and its text where that says
// more.
func (t token) describe() string {
	switch t.kind {
	case tokenEOF:
		return t.kind.String()
	case tokenIdent, tokenQuoted, tokenString, tokenInt, tokenFloat:
		return quote(t.text)
	}
	return quote(t.kind.String())
}
