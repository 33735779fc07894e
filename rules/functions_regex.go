package rules

import (
	"errors"
	"regexp"
	"regexp/syntax"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Patterns are RE2, as the package regexp takes them, so that matching takes linear
// time. One that is a constant is compiled when the rule is loaded and hangs at
// the value; others may come from a message, so their size and number are bounded.
const (
	maxPattern      = 1 << 9 // bytes
	maxInstructions = 1 << 9 // what each byte of the text may cost
	keptPatterns    = 64
	maxConstantSize = 1 << 14 // instructions of a constant pattern
	// maxMatchCost is what matching a text may cost: that of the longest string that functions make
	// and the largest pattern of a message. A constant may be larger, and its texts are shorter.
	maxMatchCost = maxInstructions * maxText
)

// pattern is a compiled one, with about how many instructions it has.
type pattern struct {
	*regexp.Regexp
	size int
}

func patternConstant(i, _ int, v value) (value, error) {
	if i != 1 {
		return v, nil
	}
	text, err := textOf(v)
	if err != nil {
		return v, err
	}
	re, err := compilePattern(text, maxConstantSize)
	v.x = re
	return v, err
}

// compilePattern refuses what makes more than so many instructions before it is
// made.
func compilePattern(text string, limit int) (*pattern, error) {
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return nil, patternError(text, err)
	}
	size := instructions(parsed, limit)
	if size > limit {
		return nil, badArgument("the pattern %s is too large", quote(text))
	}
	re, err := regexp.Compile(text)
	if err != nil {
		return nil, patternError(text, err)
	}
	return &pattern{re, size}, nil
}

func patternError(text string, err error) error {
	if wrong, ok := errors.AsType[*syntax.Error](err); ok {
		return badArgument("the pattern %s is not RE2: %s: %s", quote(text), wrong.Code, quote(wrong.Expr))
	}
	return badArgument("the pattern %s is not RE2: %s", quote(text), err)
}

// instructions is about how many a pattern becomes; any number above limit once it
// is above that.
func instructions(re *syntax.Regexp, limit int) int {
	n := 1 + len(re.Rune)/64
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		if n += instructions(sub, limit); n > limit {
			return n
		}
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max) + 1
	}
	return n
}

// patterns are compiled ones that were no constants.
var patterns = struct {
	sync.Mutex
	compiled map[string]*pattern
}{compiled: map[string]*pattern{}}

// patternOf is the compiled pattern of an argument.
func patternOf(v value) (*pattern, error) {
	if re, ok := v.x.(*pattern); ok {
		return re, nil
	}
	text, err := textOf(v)
	if err != nil {
		return nil, err
	}
	if len(text) > maxPattern {
		return nil, badArgument("a pattern that is no constant has at most %d bytes, found %d", maxPattern, len(text))
	}
	patterns.Lock()
	re := patterns.compiled[text]
	patterns.Unlock()
	if re != nil {
		return re, nil
	}
	text = strings.Clone(text) // it may be part of the payload
	if re, err = compilePattern(text, maxInstructions); err != nil {
		return nil, err
	}
	patterns.Lock()
	defer patterns.Unlock()
	if len(patterns.compiled) >= keptPatterns {
		for old := range patterns.compiled {
			delete(patterns.compiled, old)
			break
		}
	}
	patterns.compiled[text] = re
	return re, nil
}

func regexArgs(args []value) (string, *regexp.Regexp, error) {
	s, err := textOf(args[0])
	if err != nil {
		return "", nil, err
	}
	re, err := patternOf(args[1])
	if err != nil {
		return "", nil, err
	}
	if re.size > maxInstructions && len(s) > maxMatchCost/re.size {
		return "", nil, badArgument("for this pattern a text has at most %d bytes, found %d", maxMatchCost/re.size, len(s))
	}
	return s, re.Regexp, nil
}

func regexMatch(_ *env, args []value) (value, error) {
	s, re, err := regexArgs(args)
	if err != nil {
		return value{}, err
	}
	return boolean(re.MatchString(s)), nil
}

// regexExtract is the groups of the first match. Those at the end that took no part
// in it are left out, others are empty.
func regexExtract(_ *env, args []value) (value, error) {
	s, re, err := regexArgs(args)
	if err != nil {
		return value{}, err
	}
	places := re.FindStringSubmatchIndex(s)
	for len(places) > 2 && places[len(places)-1] < 0 {
		places = places[:len(places)-2]
	}
	groups := []value{}
	for i := 2; i < len(places); i += 2 {
		groups = append(groups, str(group(s, places, i/2)))
	}
	return listOf(groups), nil
}

// group is the text of a group, empty for one that took no part and one that there
// is not.
func group(s string, places []int, n int) string {
	if 2*n >= len(places) || places[2*n] < 0 {
		return ""
	}
	return s[places[2*n]:places[2*n+1]]
}

func regexReplace(_ *env, args []value) (value, error) {
	s, re, err := regexArgs(args)
	if err != nil {
		return value{}, err
	}
	with, err := textOf(args[2])
	if err != nil {
		return value{}, err
	}
	parts := parseReplacement(with)
	matches, err := allMatches(re, s, replaceTime)
	if err != nil {
		return value{}, err
	}
	if len(matches) == 0 {
		return args[0], nil
	}
	var b strings.Builder
	end := 0
	for _, places := range matches {
		b.WriteString(s[end:places[0]])
		for _, p := range parts {
			b.WriteString(p.text)
			if p.group >= 0 {
				b.WriteString(group(s, places, p.group))
			}
			if b.Len() > maxText {
				return value{}, errTextTooLong
			}
		}
		end = places[1]
	}
	b.WriteString(s[end:])
	return made(b.String())
}

// replaceTime is how long the matches of one text may be looked for. Finding one takes
// linear time, but each may look at all the rest of the text before it turns out to
// be short, as with a.*b|a, and a message chooses the text.
const replaceTime = 2 * time.Second

// firstSteps is about how many bytes may be looked at before the time is.
const firstSteps = 1 << 22

// allMatches looks for more and more of them, since nothing can stop a search: what is
// found again doubles the time at most.
func allMatches(re *regexp.Regexp, s string, limit time.Duration) ([][]int, error) {
	most := maxElements / (re.NumSubexp() + 1) // a place is kept for every group of every match
	start := time.Now()
	for n := max(16, firstSteps/(len(s)+1)); ; n *= 2 {
		n = min(n, most+1)
		matches := re.FindAllStringSubmatchIndex(s, n)
		switch {
		case len(matches) < n:
			return matches, nil
		case n > most:
			return nil, badArgument("more than %d matches", most)
		case time.Since(start) > limit:
			return nil, badArgument("the matches take longer than %s to find", limit)
		}
	}
}

// replacement is text and, after it, a group; -1 is none.
type replacement struct {
	text  string
	group int
}

// parseReplacement reads what re:replace of Erlang takes: & is the whole match,
// \1, \g1 and \g{1} a group, and a backslash makes any other character what it is.
func parseReplacement(s string) []replacement {
	var parts []replacement
	for {
		i := strings.IndexAny(s, `\&`)
		if i < 0 || i == len(s)-1 && s[i] == '\\' {
			return append(parts, replacement{s, -1})
		}
		text, rest := s[:i], s[i+1:]
		if s[i] == '&' {
			parts, s = append(parts, replacement{text, 0}), rest
			continue
		}
		if n, length := groupNumber(rest); length > 0 {
			parts, s = append(parts, replacement{text, n}), rest[length:]
			continue
		}
		parts = append(parts, replacement{text + rest[:1], -1})
		s = rest[1:]
	}
}

// groupNumber reads 1, g1 or g{1}; length is how many bytes that is, 0 if it is
// none of them.
func groupNumber(s string) (n, length int) {
	digits := strings.TrimPrefix(s, "g")
	start := len(s) - len(digits)
	closing := ""
	if start == 1 && strings.HasPrefix(digits, "{") {
		digits, start, closing = digits[1:], 2, "}"
	}
	i := 0
	for i < len(digits) && isDigit(digits[i]) {
		i++
	}
	if i == 0 || digits[0] == '0' || !strings.HasPrefix(digits[i:], closing) {
		return 0, 0
	}
	n, err := strconv.Atoi(digits[:i])
	if err != nil || n > maxElements {
		n = maxElements // more than there can be
	}
	return n, start + i + len(closing)
}
