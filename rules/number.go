package rules

import (
	"math"
	"math/big"
	"strconv"
)

// maxDigits bounds the integers that are read from text, and maxBits those that
// arithmetic makes: beyond any use, and parsing and printing take more than
// linear time.
const (
	maxDigits = 1000
	maxBits   = 1 << 14
)

// parseNumeric is a string as a number: an integer, else a float. It takes the
// whole string or nothing.
func parseNumeric(s string) (value, bool) {
	sign := 0
	if s != "" && (s[0] == '+' || s[0] == '-') {
		sign = 1
	}
	i := sign
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	if i == sign {
		return value{}, false
	}
	if i == len(s) {
		return parseInteger(s)
	}
	if s[i] == '.' {
		i++
		from := i
		for i < len(s) && isDigit(s[i]) {
			i++
		}
		if i == from {
			return value{}, false
		}
	}
	if i < len(s) && (s[i] == 'e' || s[i] == 'E') {
		i++
		if i < len(s) && (s[i] == '+' || s[i] == '-') {
			i++
		}
		from := i
		for i < len(s) && isDigit(s[i]) {
			i++
		}
		if i == from {
			return value{}, false
		}
	}
	if i < len(s) {
		return value{}, false
	}
	return parseFloat(s)
}

// parseInteger takes digits with an optional sign; false if there are too many
// of them.
func parseInteger(s string) (value, bool) {
	if i, err := strconv.ParseInt(s, 10, 64); err == nil {
		return integer(i), true
	}
	if len(s) > maxDigits {
		return value{}, false
	}
	i, ok := new(big.Int).SetString(s, 10)
	if !ok {
		return value{}, false
	}
	return bigInteger(i), true
}

// parseFloat answers false for what a float cannot hold.
func parseFloat(s string) (value, bool) {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return value{}, false
	}
	return float(f), true
}

// arithmetic is a binary operator on two values.
func arithmetic(op tokenKind, l, r value) (value, error) {
	if op == tokenPlus && (l.kind == kindString || r.kind == kindString) {
		return made(l.text() + r.text())
	}
	if !l.isNumber() || !r.isNumber() {
		return value{}, badArgument("%s needs numbers, found %s and %s", op, l.describe(), r.describe())
	}
	if op == tokenSlash {
		d := r.toFloat()
		if d == 0 {
			return value{}, badArgument("division by zero")
		}
		return finite(l.toFloat() / d)
	}
	if op == keywordDiv || op == keywordMod {
		return divide(op, l, r)
	}
	if l.kind == kindFloat || r.kind == kindFloat {
		return floatArithmetic(op, l.toFloat(), r.toFloat())
	}
	if l.kind == kindInt && r.kind == kindInt {
		if i, ok := intArithmetic(op, l.int(), r.int()); ok {
			return integer(i), nil
		}
	}
	return bigArithmetic(op, l.bigOf(), r.bigOf())
}

func floatArithmetic(op tokenKind, l, r float64) (value, error) {
	switch op {
	case tokenPlus:
		return finite(l + r)
	case tokenMinus:
		return finite(l - r)
	}
	return finite(l * r)
}

// finite refuses what JSON has no number for.
func finite(f float64) (value, error) {
	if math.IsInf(f, 0) || math.IsNaN(f) {
		return value{}, badArgument("the result is no finite number")
	}
	return float(f), nil
}

// intArithmetic answers false where the result does not fit.
func intArithmetic(op tokenKind, l, r int64) (int64, bool) {
	switch op {
	case tokenPlus:
		s := l + r
		return s, (s > l) == (r > 0)
	case tokenMinus:
		d := l - r
		return d, (d < l) == (r > 0)
	}
	if l == 0 || r == 0 {
		return 0, true
	}
	p := l * r
	return p, p/r == l && !(l == -1 && r == math.MinInt64) && !(r == -1 && l == math.MinInt64)
}

func bigArithmetic(op tokenKind, l, r *big.Int) (value, error) {
	z := new(big.Int)
	switch op {
	case tokenPlus:
		z.Add(l, r)
	case tokenMinus:
		z.Sub(l, r)
	default:
		z.Mul(l, r)
	}
	if z.BitLen() > maxBits {
		return value{}, badArgument("the result has more than %d bits", maxBits)
	}
	return bigInteger(z), nil
}

// divide is div and mod: integers only, truncating, the remainder with the sign
// of the dividend.
func divide(op tokenKind, l, r value) (value, error) {
	if !l.isInteger() || !r.isInteger() {
		return value{}, badArgument("%s needs integers, found %s and %s", op, l.describe(), r.describe())
	}
	if r.kind == kindInt && r.int() == 0 {
		return value{}, badArgument("division by zero")
	}
	if l.kind == kindInt && r.kind == kindInt && !(l.int() == math.MinInt64 && r.int() == -1) {
		if op == keywordDiv {
			return integer(l.int() / r.int()), nil
		}
		return integer(l.int() % r.int()), nil
	}
	q, m := new(big.Int).QuoRem(l.bigOf(), r.bigOf(), new(big.Int))
	if op == keywordDiv {
		return bigInteger(q), nil
	}
	return bigInteger(m), nil
}

// negate is the unary minus.
func negate(v value) (value, error) {
	switch v.kind {
	case kindFloat:
		return float(-v.float()), nil
	case kindInt, kindBig:
		return arithmetic(tokenMinus, integer(0), v)
	}
	return value{}, badArgument("- needs a number, found %s", v.describe())
}
