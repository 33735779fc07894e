package rules

import (
	"encoding/hex"
	"math"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

func toText(_ *env, args []value) (value, error) {
	if args[0].kind == kindString {
		return args[0], nil
	}
	return made(args[0].text())
}

func toUTF16(_ *env, args []value) (value, error) {
	s := args[0].text()
	if !utf8.ValidString(s) {
		return value{}, badArgument("needs UTF-8, found %s", shown(args[0]))
	}
	units := make([]byte, 0, 2*len(s))
	for _, r := range s {
		high, low := utf16.EncodeRune(r)
		if high == utf8.RuneError {
			units = append(units, byte(r), byte(r>>8))
			continue
		}
		units = append(units, byte(high), byte(high>>8), byte(low), byte(low>>8))
	}
	return made(string(units))
}

func toBool(_ *env, args []value) (value, error) {
	switch v := args[0]; {
	case v.kind == kindBool:
		return v, nil
	case v.kind == kindString && (v.s == "true" || v.s == "false"):
		return boolean(v.s == "true"), nil
	case v.kind == kindInt && (v.int() == 0 || v.int() == 1):
		return boolean(v.int() == 1), nil
	}
	return value{}, badArgument("no boolean: %s", shown(args[0]))
}

// toInt takes the floor of floats.
func toInt(_ *env, args []value) (value, error) {
	v := args[0]
	if v.kind == kindString {
		n, ok := parseNumeric(v.s)
		if !ok {
			return value{}, badArgument("no number: %s", shown(v))
		}
		v = n
	}
	switch v.kind {
	case kindInt, kindBig:
		return v, nil
	case kindFloat:
		return wholeNumber(math.Floor(v.float())), nil
	case kindBool:
		return integer(int64(v.n)), nil
	}
	return value{}, badArgument("no number: %s", shown(v))
}

// toFloat rounds to so many decimals if it is told to.
func toFloat(_ *env, args []value) (value, error) {
	v := args[0]
	if v.kind == kindString {
		v, _ = parseNumeric(v.s)
	}
	if !v.isNumber() {
		return value{}, badArgument("no number: %s", shown(args[0]))
	}
	f := v.toFloat()
	if len(args) == 2 {
		n, err := decimalsOf(args[1])
		if err != nil {
			return value{}, err
		}
		if math.Abs(f) < exactInFloat { // beyond it there are none
			f, _ = strconv.ParseFloat(scaled(f, n), 64)
		}
	}
	return finite(f)
}

func floatText(_ *env, args []value) (value, error) {
	f, err := floatOf(args[0])
	if err != nil {
		return value{}, err
	}
	n, err := decimalsOf(args[1])
	return str(decimals(f, n)), err
}

// maxDecimals is Erlang's.
const maxDecimals = 253

func decimalsOf(v value) (int, error) {
	n, err := countOf(v, "a number of decimals", 0)
	if err == nil && n > maxDecimals {
		return 0, badArgument("at most %d decimals, found %d", maxDecimals, n)
	}
	return n, err
}

func decimalsConstant(i, _ int, v value) (value, error) {
	if i != 1 {
		return v, nil
	}
	_, err := decimalsOf(v)
	return v, err
}

// toMap takes a map, its JSON text, or a list of pairs: lists of a key and a value,
// or what map_to_entries makes.
func toMap(e *env, args []value) (value, error) {
	if !args[0].isList() {
		o, err := e.mapArg(args[0])
		return objectOf(o), err
	}
	o := &object{}
	for _, pair := range args[0].decoded().list() {
		var key, v value
		switch {
		case pair.kind == kindList && len(pair.list()) == 2:
			key, v = pair.list()[0], pair.list()[1]
		case pair.kind == kindObject:
			key, v = pair.object().lookup("key"), pair.object().lookup("value")
		}
		if key.kind != kindString {
			return value{}, badArgument("a pair is a list of a key and a value, found %s", shown(pair))
		}
		o.set(key.s, v)
	}
	return objectOf(o), nil
}

// toHex writes upper case, after the prefix if one is given.
func toHex(_ *env, args []value) (value, error) {
	if err := textsOf(args...); err != nil {
		return value{}, err
	}
	digits := strings.ToUpper(hex.EncodeToString([]byte(args[0].s)))
	if len(args) == 2 {
		digits = args[1].s + digits
	}
	return made(digits)
}

// fromHex reads digits of either case, after the prefix if one is given. An odd
// number of them begins with half a byte.
func fromHex(_ *env, args []value) (value, error) {
	if err := textsOf(args...); err != nil {
		return value{}, err
	}
	digits := args[0].s
	if len(args) == 2 {
		var ok bool
		if digits, ok = strings.CutPrefix(digits, args[1].s); !ok {
			return value{}, badArgument("expected the prefix %s, found %s", quote(args[1].s), quote(args[0].s))
		}
	}
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	b, err := hex.DecodeString(digits)
	if err != nil {
		return value{}, badArgument("no hexadecimal digits: %s", quote(args[0].s))
	}
	return made(string(b))
}

// fixed prints f with n decimals. What lies in the middle goes away from zero, and
// not to the even digit.
func fixed(f float64, n int) string {
	if tie := math.Ldexp(f, n+1); math.Abs(tie) < exactInFloat && math.Abs(math.Mod(tie, 2)) == 1 {
		f = math.Nextafter(f, math.Inf(int(math.Copysign(1, f))))
	}
	return strconv.FormatFloat(f, 'f', n, 64)
}

// maxScaled is the number of decimals up to which they fit in a float.
const maxScaled = 15

// scaled is fixed as Erlang's float_to_binary does it, which other engines print
// floats with: it rounds the decimals as an integer, so that 0.5195, which a float is
// a little below, has the three decimals 0.520.
func scaled(f float64, n int) string {
	if n > maxScaled || math.Abs(f) >= exactInFloat {
		return fixed(f, n)
	}
	whole, fraction := math.Modf(math.Abs(f))
	unit := math.Pow10(n)
	decimals := math.Floor(float64(fraction*unit) + 0.5) // the conversion keeps the two steps apart
	if decimals == unit {
		whole, decimals = whole+1, 0
	}
	b := make([]byte, 0, 32)
	if math.Signbit(f) {
		b = append(b, '-')
	}
	b = strconv.AppendInt(b, int64(whole), 10)
	if n == 0 {
		return string(b)
	}
	digits := strconv.FormatInt(int64(decimals), 10)
	b = append(append(b, '.'), strings.Repeat("0", n-len(digits))...)
	return string(append(b, digits...))
}
