package rules

import (
	"math"
	"math/big"
	"math/rand/v2"
)

func absolute(_ *env, args []value) (value, error) {
	v := args[0]
	if !v.isInteger() {
		return value{}, badArgument("needs an integer, found %s", shown(v))
	}
	if v.bigOf().Sign() < 0 {
		return negate(v)
	}
	return v, nil
}

// rounded makes an integer of a number.
func rounded(round func(float64) float64) evalArgs {
	return func(_ *env, args []value) (value, error) {
		switch v := args[0]; v.kind {
		case kindInt, kindBig:
			return v, nil
		case kindFloat:
			return wholeNumber(round(v.float())), nil
		}
		return value{}, badArgument("needs a number, found %s", shown(args[0]))
	}
}

// wholeNumber is a finite float without a fraction as an integer.
func wholeNumber(f float64) value {
	if math.Abs(f) <= exactInFloat {
		return integer(int64(f))
	}
	i, _ := big.NewFloat(f).Int(nil)
	return bigInteger(i)
}

func operator(op tokenKind) evalArgs {
	return func(_ *env, args []value) (value, error) { return arithmetic(op, args[0], args[1]) }
}

func onFloat(fn func(float64) float64) evalArgs {
	return func(_ *env, args []value) (value, error) {
		f, err := floatOf(args[0])
		if err != nil {
			return value{}, err
		}
		return finite(fn(f))
	}
}

func onFloats(fn func(x, y float64) float64) evalArgs {
	return func(_ *env, args []value) (value, error) {
		x, err := floatOf(args[0])
		if err != nil {
			return value{}, err
		}
		y, err := floatOf(args[1])
		if err != nil {
			return value{}, err
		}
		return finite(fn(x, y))
	}
}

func floatOf(v value) (float64, error) {
	if !v.isNumber() {
		return 0, badArgument("needs a number, found %s", shown(v))
	}
	f := v.toFloat()
	if math.IsInf(f, 0) {
		return 0, badArgument("the number is beyond what a float holds")
	}
	return f, nil
}

// random is from 0 up to, but without, 1.
func random(*env, []value) (value, error) { return float(rand.Float64()), nil }
