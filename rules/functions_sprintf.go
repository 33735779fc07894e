package rules

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// directive is text and, after it, what a format prints there.
type directive struct {
	text string
	verb byte // 0: nothing, the text is the end
	// unicode is the modifier t, left the adjustment of a width with a minus.
	unicode, left bool
	// width and precision are -1 where there is none.
	width, precision int
	padding          rune
}

// takes is how many arguments d needs.
func (d directive) takes() int {
	if d.verb == 0 || d.verb == '~' || d.verb == 'n' {
		return 0
	}
	return 1
}

const verbs = "swpfebBcn~"

// parseFormat reads ~F.P.PadModC as io:format of Erlang has it.
func parseFormat(format string) ([]directive, error) {
	var ds []directive
	rest := format
	for {
		text, after, ok := strings.Cut(rest, "~")
		if !ok {
			return append(ds, directive{text: text}), nil
		}
		d := directive{text: text, width: -1, precision: -1, padding: ' '}
		from := after
		var err error
		after, d.left = strings.CutPrefix(after, "-")
		if after, d.width, err = digitsOf(after); err == nil && strings.HasPrefix(after, ".") {
			after, d.precision, err = digitsOf(after[1:])
		}
		if err == nil && strings.HasPrefix(after, ".") && len(after) > 1 {
			r, n := utf8.DecodeRuneInString(after[1:])
			d.padding, after = r, after[1+n:]
		}
		after, d.unicode = strings.CutPrefix(after, "t")
		if err != nil || after == "" || strings.IndexByte(verbs, after[0]) < 0 {
			_, n := utf8.DecodeRuneInString(after)
			return nil, badArgument("unknown directive %s: there are ~s, ~ts, ~p, ~w, ~n, ~~, ~b, ~f, ~e and ~c, with a width and precision such as ~8.2f",
				quote("~"+from[:len(from)-len(after)+n]))
		}
		d.verb, rest = after[0], after[1:]
		if err := d.check(); err != nil {
			return nil, err
		}
		ds = append(ds, d)
	}
}

// check is for what a precision cannot be.
func (d directive) check() error {
	low, high := 0, maxText
	switch d.verb {
	case 'f':
		low, high = 1, maxDecimals
	case 'e':
		low, high = 2, maxDecimals
	case 'b', 'B':
		low, high = 2, 36
	}
	if d.precision != -1 && (d.precision < low || d.precision > high) {
		return badArgument("~%c takes a precision of %d to %d, found %d", d.verb, low, high, d.precision)
	}
	if d.width > maxText {
		return errTextTooLong
	}
	return nil
}

// digitsOf reads a number, -1 where there is none. What it does not take is a *,
// which would leave a width to an argument.
func digitsOf(s string) (rest string, n int, err error) {
	i := 0
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	if i == 0 {
		return s, -1, nil
	}
	if n, err = strconv.Atoi(s[:i]); err != nil {
		n, err = math.MaxInt32, nil
	}
	return s[i:], n, err
}

// sprintfConstant counts the arguments too.
func sprintfConstant(i, n int, v value) (value, error) {
	v, err := formatConstant(i, n, v)
	if ds, ok := v.x.([]directive); ok && err == nil {
		err = countDirectives(ds, n-1)
	}
	return v, err
}

func formatConstant(i, _ int, v value) (value, error) {
	if i != 0 {
		return v, nil
	}
	ds, err := formatOf(v)
	v.x = ds
	return v, err
}

func formatOf(v value) ([]directive, error) {
	if ds, ok := v.x.([]directive); ok {
		return ds, nil
	}
	s, err := textOf(v)
	if err != nil {
		return nil, err
	}
	return parseFormat(s)
}

func sprintf(_ *env, args []value) (value, error) { return formatted(args[0], args[1:]) }

// sprintfList has the arguments in a list.
func sprintfList(_ *env, args []value) (value, error) {
	elems, err := listArg(args[1])
	if err != nil {
		return value{}, err
	}
	return formatted(args[0], elems)
}

func formatted(format value, args []value) (value, error) {
	ds, err := formatOf(format)
	if err != nil {
		return value{}, err
	}
	if err := countDirectives(ds, len(args)); err != nil {
		return value{}, err
	}
	var b []byte
	for _, d := range ds {
		b = append(b, d.text...)
		switch {
		case d.verb == 0:
		case d.takes() == 0:
			char := map[byte]string{'n': "\n", '~': "~"}[d.verb]
			b = append(b, strings.Repeat(char, max(1, d.width))...)
		default:
			s, err := d.print(args[0])
			if err != nil {
				return value{}, err
			}
			b, args = append(b, s...), args[1:]
		}
		if len(b) > maxText {
			return value{}, errTextTooLong
		}
	}
	return made(string(b))
}

func countDirectives(ds []directive, args int) error {
	n := 0
	for _, d := range ds {
		n += d.takes()
	}
	if n != args {
		return badArgument("the format prints %d values, found %d", n, args)
	}
	return nil
}

func (d directive) print(v value) (string, error) {
	wrong := func(needs string) (string, error) {
		return "", badArgument("~%c needs %s, found %s", d.verb, needs, shown(v))
	}
	switch d.verb {
	case 's':
		s, ok := characters(v)
		if !ok {
			if v.isNumber() {
				return wrong("a string (~p prints a number)")
			}
			return wrong("a string")
		}
		return d.adjusted(s, true), nil
	case 'w':
		return d.adjusted(string(appendTerm(nil, v, termRaw)), false), nil
	case 'p':
		if d.unicode {
			return string(appendTerm(nil, v, termUnicode)), nil
		}
		return string(appendTerm(nil, v, termLatin1)), nil
	case 'f', 'e':
		if v.kind != kindFloat {
			return wrong("a float (float makes one)")
		}
		return d.adjusted(d.float(v.float()), false), nil
	case 'b', 'B':
		if !v.isInteger() {
			return wrong("an integer")
		}
		base := d.precision
		if base < 0 {
			base = 10
		}
		digits := v.bigOf().Text(base)
		if d.verb == 'B' {
			digits = strings.ToUpper(digits)
		}
		return d.adjusted(digits, false), nil
	}
	// c
	if v.kind != kindInt || v.int() < 0 || v.int() > utf8.MaxRune || !utf8.ValidRune(rune(v.int())) {
		return wrong("a code point")
	}
	times := d.precision
	if times < 0 {
		times = max(1, d.width)
	}
	return d.adjusted(strings.Repeat(string(rune(v.int())), min(times, maxText)), false), nil
}

func (d directive) float(f float64) string {
	digits := d.precision
	if digits < 0 {
		digits = 6
	}
	if d.verb == 'f' {
		return fixed(f, digits)
	}
	// Of the shortest digits that read back as f, a last 5 that must go goes up.
	if shortest, exponent, _ := strings.Cut(strconv.FormatFloat(f, 'e', -1, 64), "e"); strings.HasSuffix(shortest, "5") &&
		len(strings.TrimPrefix(shortest, "-")) == digits+2 {
		f, _ = strconv.ParseFloat(shortest[:len(shortest)-1]+"6e"+exponent, 64)
	}
	mantissa, exponent, _ := strings.Cut(strconv.FormatFloat(f, 'e', digits-1, 64), "e")
	n, _ := strconv.Atoi(exponent)
	return fmt.Sprintf("%se%+d", mantissa, n)
}

// adjusted is s at the width of d. What is too wide is cut off if it is text, and
// stars if it is not.
func (d directive) adjusted(s string, cut bool) string {
	width := d.width
	if cut && d.precision >= 0 {
		s = s[:prefixOf(s, d.precision)]
		width = max(width, d.precision)
	}
	if width < 0 {
		return s
	}
	missing := width - countGraphemes(s)
	switch padding := strings.Repeat(string(d.padding), max(0, missing)); {
	case missing < 0 && cut:
		return s[:prefixOf(s, width)]
	case missing < 0:
		return strings.Repeat("*", width)
	case d.left:
		return s + padding
	default:
		return padding + s
	}
}

// characters is what ~s prints: a string, a boolean, or a list of code points and
// strings.
func characters(v value) (string, bool) {
	switch v.kind {
	case kindString:
		return v.s, true
	case kindBool:
		return v.text(), true
	case kindRaw:
		return characters(v.decoded())
	case kindList:
		var b strings.Builder
		for _, e := range v.list() {
			if e.kind == kindInt && e.int() >= 0 && e.int() <= utf8.MaxRune && utf8.ValidRune(rune(e.int())) {
				b.WriteRune(rune(e.int()))
				continue
			}
			s, ok := characters(e)
			if !ok || e.kind == kindBool {
				return "", false
			}
			b.WriteString(s)
		}
		return b.String(), true
	}
	return "", false
}

// termForm is how the text of a term shows strings: as the numbers of their bytes,
// as text where every byte is a printable Latin-1 character, or as text where every
// character is printable.
type termForm uint8

const (
	termRaw termForm = iota
	termLatin1
	termUnicode
)

// appendTerm writes a value as Erlang writes the term that it is there, in one
// line.
func appendTerm(dst []byte, v value, form termForm) []byte {
	switch v.kind {
	case kindFloat:
		return append(dst, termFloat(v.float())...)
	case kindString:
		return appendBinary(dst, v.s, form)
	case kindRaw:
		return appendTerm(dst, v.decoded(), form)
	case kindList:
		elems := v.list()
		if s, ok := codePoints(elems); ok && form != termRaw && len(elems) > 0 {
			return append(appendQuoted(append(dst, '"'), s), '"')
		}
		dst = append(dst, '[')
		for i, e := range elems {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendTerm(dst, e, form)
		}
		return append(dst, ']')
	case kindObject:
		dst = append(dst, "#{"...)
		for i, m := range v.object().sorted() {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(appendBinary(dst, m.key, form), " => "...)
			dst = appendTerm(dst, m.val, form)
		}
		return append(dst, '}')
	}
	return append(dst, v.text()...)
}

func appendBinary(dst []byte, s string, form termForm) []byte {
	dst = append(dst, "<<"...)
	switch {
	case s == "":
	case form == termUnicode && isPrintable(s):
		dst = append(appendQuoted(append(dst, '"'), s), '"')
		if !isASCII(s) {
			dst = append(dst, "/utf8"...)
		}
	case form == termLatin1 && isPrintableLatin1(s):
		dst = append(appendQuoted(append(dst, '"'), s), '"')
	default:
		for i := range len(s) {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = strconv.AppendUint(dst, uint64(s[i]), 10)
		}
	}
	return append(dst, ">>"...)
}

func isPrintable(s string) bool {
	for _, r := range s {
		if !isPrintableCode(int64(r)) {
			return false
		}
	}
	return utf8.ValidString(s)
}

func isPrintableLatin1(s string) bool {
	for i := range len(s) {
		if !isPrintableCode(int64(s[i])) {
			return false
		}
	}
	return true
}

// quotedEscapes are the characters that Erlang writes with a backslash, and how.
var quotedEscapes = map[byte]byte{'\n': 'n', '\t': 't', '\r': 'r', '\b': 'b', '\f': 'f', '\v': 'v', 0x1b: 'e', '"': '"', '\\': '\\'}

func appendQuoted(dst []byte, s string) []byte {
	for i := range len(s) {
		if c, ok := quotedEscapes[s[i]]; ok {
			dst = append(dst, '\\', c)
			continue
		}
		dst = append(dst, s[i])
	}
	return dst
}

// termFloat is the shorter of both ways to write the shortest digits, the plain one
// if they are of one length; from 2^53 on it has an exponent.
func termFloat(f float64) string {
	plain := strconv.FormatFloat(f, 'f', -1, 64)
	if !strings.Contains(plain, ".") {
		plain += ".0"
	}
	mantissa, exponent, _ := strings.Cut(strconv.FormatFloat(f, 'e', -1, 64), "e")
	if !strings.Contains(mantissa, ".") {
		mantissa += ".0"
	}
	n, _ := strconv.Atoi(exponent)
	scientific := mantissa + "e" + strconv.Itoa(n)
	if math.Abs(f) < exactInFloat && len(plain) <= len(scientific) {
		return plain
	}
	return scientific
}
