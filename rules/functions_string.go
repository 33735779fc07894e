package rules

import (
	"iter"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/rivo/uniseg"
	"golang.org/x/text/cases"
	"golang.org/x/text/language"
)

// Strings may be any bytes. A byte that is no UTF-8 is a character of its own,
// which nothing changes.

func onString(fn func(string) string) evalArgs {
	return func(_ *env, args []value) (value, error) {
		s, err := textOf(args[0])
		if err != nil {
			return value{}, err
		}
		return made(fn(s))
	}
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// lower and upper know letters that change their number: ß is SS. A caser has
// state, so each call has its own.
func lower(s string) string {
	if isASCII(s) {
		return strings.ToLower(s)
	}
	return cases.Lower(language.Und, cases.HandleFinalSigma(false)).String(s)
}

func upper(s string) string {
	if isASCII(s) {
		return strings.ToUpper(s)
	}
	return cases.Upper(language.Und).String(s)
}

// isSpace is white space as Erlang trims it, Pattern_White_Space: a no-break space
// is none.
func isSpace(r rune) bool { return unicode.Is(unicode.Pattern_White_Space, r) }

func trimRight(_ *env, args []value) (value, error) {
	if err := textsOf(args...); err != nil {
		return value{}, err
	}
	s := args[0].s
	if len(args) == 1 {
		return str(strings.TrimRightFunc(s, isSpace)), nil
	}
	for chars := charsOf(args[1].s); s != ""; {
		_, n := utf8.DecodeLastRuneInString(s)
		if !chars.has(s[len(s)-n:]) {
			break
		}
		s = s[:len(s)-n]
	}
	return str(s), nil
}

// charSet is the characters of a string, bytes that are no UTF-8 among them. A
// string is looked at once, since both it and the one that it is looked for in may
// be as long as a payload.
type charSet struct {
	ascii [utf8.RuneSelf]bool
	other map[string]bool
}

func charsOf(s string) *charSet {
	set := &charSet{}
	for s != "" {
		_, n := utf8.DecodeRuneInString(s)
		if s[0] < utf8.RuneSelf {
			set.ascii[s[0]] = true
		} else {
			if set.other == nil {
				set.other = map[string]bool{}
			}
			set.other[s[:n]] = true
		}
		s = s[n:]
	}
	return set
}

func (set *charSet) has(char string) bool {
	if char[0] < utf8.RuneSelf {
		return set.ascii[char[0]]
	}
	return set.other[char]
}

// graphemes are the characters that a reader sees. Only the line break CR LF makes
// one of two in ASCII.
func graphemes(s string) iter.Seq[string] {
	return func(yield func(string) bool) {
		state := -1
		for s != "" {
			var g string
			if len(s) == 1 || s[0] < utf8.RuneSelf && s[1] < utf8.RuneSelf && s[0] != '\r' {
				g, s, state = s[:1], s[1:], -1
			} else {
				g, s, _, state = uniseg.FirstGraphemeClusterInString(s, state)
			}
			if !yield(g) {
				return
			}
		}
	}
}

func countGraphemes(s string) int {
	n := 0
	for range graphemes(s) {
		n++
	}
	return n
}

func reverse(s string) string {
	b, end := make([]byte, len(s)), len(s)
	for g := range graphemes(s) {
		end -= copy(b[end-len(g):], g)
	}
	return string(b)
}

// substring counts characters from 0.
func substring(_ *env, args []value) (value, error) {
	s, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	from, err := countOf(args[1], "a start", 0)
	if err != nil {
		return value{}, err
	}
	s = s[prefixOf(s, from):]
	if len(args) == 3 {
		n, err := countOf(args[2], "a length", 0)
		if err != nil {
			return value{}, err
		}
		s = s[:prefixOf(s, n)]
	}
	return str(s), nil
}

// prefixOf is how many bytes the first n characters of s are.
func prefixOf(s string, n int) int {
	bytes := 0
	if n > 0 {
		for g := range graphemes(s) {
			bytes += len(g)
			if n--; n == 0 {
				break
			}
		}
	}
	return bytes
}

var splitModes = []string{"notrim", "leading", "leading_notrim", "trailing", "trailing_notrim"}

// split is at every separator, or the first or the last. Parts that are empty are
// left out, but in the modes that say notrim.
func split(_ *env, args []value) (value, error) {
	if err := textsOf(args[:2]...); err != nil {
		return value{}, err
	}
	s, sep, mode := args[0].s, args[1].s, ""
	if len(args) == 3 {
		var err error
		if mode, err = wordOf(args[2], splitModes...); err != nil {
			return value{}, err
		}
	}
	where, untrimmed := strings.CutSuffix(mode, "notrim")
	where = strings.TrimSuffix(where, "_")
	var parts []value
	add := func(part string) {
		if untrimmed || part != "" {
			parts = append(parts, str(part))
		}
	}
	for before, after := range around(s, sep, where) {
		add(before)
		s = after
		if len(parts) >= maxElements {
			return value{}, errListTooLong
		}
	}
	add(s)
	return listOf(parts), nil
}

// around answers what is between separators before each that counts, and all that is
// after it. An empty separator is nowhere.
func around(s, sep, where string) iter.Seq2[string, string] {
	return func(yield func(before, after string) bool) {
		if sep == "" {
			return
		}
		if where == "trailing" {
			if i := strings.LastIndex(s, sep); i >= 0 {
				yield(s[:i], s[i+len(sep):])
			}
			return
		}
		for {
			before, after, ok := strings.Cut(s, sep)
			if !ok || !yield(before, after) || where == "leading" {
				return
			}
			s = after
		}
	}
}

// tokens are what is between any of the separating characters, and line breaks if
// the third argument is given.
func tokens(_ *env, args []value) (value, error) {
	if err := textsOf(args[:2]...); err != nil {
		return value{}, err
	}
	separators := charsOf(args[1].s)
	if len(args) == 3 {
		if _, err := wordOf(args[2], "nocrlf"); err != nil {
			return value{}, err
		}
		separators.ascii['\r'], separators.ascii['\n'] = true, true
	}
	var parts []value
	s, start := args[0].s, 0
	for i := 0; i <= len(s); {
		n := 1
		if i < len(s) {
			if _, n = utf8.DecodeRuneInString(s[i:]); !separators.has(s[i : i+n]) {
				i += n
				continue
			}
		}
		if i > start {
			if len(parts) == maxElements {
				return value{}, errListTooLong
			}
			parts = append(parts, str(s[start:i]))
		}
		i += n
		start = i
	}
	return listOf(parts), nil
}

// concat joins two values, or those of a list, as text.
func concat(_ *env, args []value) (value, error) {
	if len(args) == 1 {
		if !args[0].isList() {
			return value{}, badArgument("a single argument must be a list, found %s", shown(args[0]))
		}
		args = args[0].decoded().list()
	}
	return joined(args, "")
}

// joinToString puts a separator between the values of a list.
func joinToString(_ *env, args []value) (value, error) {
	sep := ", "
	if len(args) == 2 {
		var err error
		if sep, err = textOf(args[0]); err != nil {
			return value{}, err
		}
	}
	elems, err := listArg(args[len(args)-1])
	if err != nil {
		return value{}, err
	}
	return joined(elems, sep)
}

func joined(elems []value, sep string) (value, error) {
	var b strings.Builder
	for i, v := range elems {
		if isNullVar(v) {
			return value{}, badArgument("needs values, found %s", shown(v))
		}
		if i > 0 {
			b.WriteString(sep)
		}
		b.WriteString(v.text())
		if b.Len() > maxText {
			return value{}, errTextTooLong
		}
	}
	return str(b.String()), nil
}

var padModes = []string{"leading", "both", "trailing"}

// pad adds the padding, or spaces, once for each character that is missing. Of
// both ends, the second gets one more where their number is odd.
func pad(_ *env, args []value) (value, error) {
	s, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	missing, err := countOf(args[1], "a length", 0)
	if err != nil {
		return value{}, err
	}
	where, with := "trailing", " "
	if len(args) > 2 {
		if where, err = wordOf(args[2], padModes...); err != nil {
			return value{}, err
		}
	}
	if len(args) > 3 {
		if with, err = textOf(args[3]); err != nil {
			return value{}, err
		}
	}
	missing = max(0, missing-countGraphemes(s))
	if int64(missing)*int64(len(with))+int64(len(s)) > maxText {
		return value{}, errTextTooLong
	}
	before := map[string]int{"leading": missing, "both": missing / 2}[where]
	return str(strings.Repeat(with, before) + s + strings.Repeat(with, missing-before)), nil
}

// replace replaces all, the first or the last.
func replace(_ *env, args []value) (value, error) {
	if err := textsOf(args[:3]...); err != nil {
		return value{}, err
	}
	where := "all"
	if len(args) == 4 {
		var err error
		if where, err = wordOf(args[3], "all", "leading", "trailing"); err != nil {
			return value{}, err
		}
	}
	s, with := args[0].s, args[2].s
	var b strings.Builder
	for before, after := range around(s, args[1].s, where) {
		b.WriteString(before)
		b.WriteString(with)
		s = after
		if b.Len()+len(s) > maxText {
			return value{}, errTextTooLong
		}
	}
	if b.Len() == 0 && len(s) == len(args[0].s) {
		return args[0], nil
	}
	b.WriteString(s)
	return str(b.String()), nil
}

func firstByte(_ *env, args []value) (value, error) {
	s, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	if s == "" {
		return value{}, badArgument("the string is empty")
	}
	return integer(int64(s[0])), nil
}

// find is the rest of a string from where another begins in it, empty if it does
// not.
func find(_ *env, args []value) (value, error) {
	if err := textsOf(args[:2]...); err != nil {
		return value{}, err
	}
	where := "leading"
	if len(args) == 3 {
		var err error
		if where, err = wordOf(args[2], "leading", "trailing"); err != nil {
			return value{}, err
		}
	}
	s, sought := args[0].s, args[1].s
	i := strings.Index(s, sought)
	if where == "trailing" && sought != "" {
		i = strings.LastIndex(s, sought)
	}
	if i < 0 {
		i = len(s)
	}
	return str(s[i:]), nil
}

func removePrefix(_ *env, args []value) (value, error) {
	if err := textsOf(args...); err != nil {
		return value{}, err
	}
	return str(strings.TrimPrefix(args[0].s, args[1].s)), nil
}

// escapes are the characters that may stand after a backslash, and what they mean.
const escapes = `ntrbfva\'"?`

const escaped = "\n\t\r\b\f\v\a\\'\"?"

// unescapeString reads the escapes of C, of which \x takes as many digits as there
// are and means a code point.
func unescapeString(_ *env, args []value) (value, error) {
	s, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	var b strings.Builder
	for {
		before, after, ok := strings.Cut(s, `\`)
		b.WriteString(before)
		if !ok {
			return made(b.String())
		}
		if after == "" {
			return value{}, badArgument("a backslash at the end")
		}
		if i := strings.IndexByte(escapes, after[0]); i >= 0 {
			b.WriteByte(escaped[i])
			s = after[1:]
			continue
		}
		if after[0] != 'x' {
			r, _ := utf8.DecodeRuneInString(after)
			return value{}, badArgument("no such escape: %s", quote(`\`+string(r)))
		}
		r, n := codePoint(after[1:])
		if n == 0 {
			return value{}, badArgument(`\x needs hexadecimal digits of a code point, found %s`, quote(after[1:]))
		}
		b.WriteRune(r)
		s = after[1+n:]
	}
}

// codePoint reads hexadecimal digits: n is how many, and 0 if they are no code
// point.
func codePoint(s string) (r rune, n int) {
	for n < len(s) && isHexDigit(s[n]) {
		if r = r<<4 | rune(strings.IndexByte(hexDigits, s[n]|0x20)); r > utf8.MaxRune {
			return 0, 0
		}
		n++
	}
	if !utf8.ValidRune(r) {
		return 0, 0
	}
	return r, n
}

func isHexDigit(c byte) bool {
	return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'f'
}
