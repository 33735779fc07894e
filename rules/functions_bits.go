package rules

import (
	"math"
	"math/big"
	"slices"
)

func bitNot(_ *env, args []value) (value, error) {
	if !args[0].isInteger() {
		return value{}, badArgument("needs an integer, found %s", shown(args[0]))
	}
	return bigInteger(new(big.Int).Not(args[0].bigOf())), nil
}

// onIntegers is for operators whose results have no more bits than the
// operands.
func onIntegers(op func(z, x, y *big.Int) *big.Int) evalArgs {
	return func(_ *env, args []value) (value, error) {
		for _, v := range args {
			if !v.isInteger() {
				return value{}, badArgument("needs integers, found %s", shown(v))
			}
		}
		return bigInteger(op(new(big.Int), args[0].bigOf(), args[1].bigOf())), nil
	}
}

// shift is to the left with direction 1, to the right with -1, and the other way
// by a negative number of bits. To the right the sign stays.
func shift(direction int) evalArgs {
	return func(_ *env, args []value) (value, error) {
		for _, v := range args {
			if !v.isInteger() {
				return value{}, badArgument("needs integers, found %s", shown(v))
			}
		}
		x, by := args[0].bigOf(), args[1].bigOf()
		if by.Sign()*direction < 0 {
			n := uint(math.MaxInt32)
			if d := new(big.Int).Abs(by); d.IsInt64() && d.Int64() < math.MaxInt32 {
				n = uint(d.Int64())
			}
			return bigInteger(new(big.Int).Rsh(x, n)), nil
		}
		d := new(big.Int).Abs(by)
		if x.Sign() == 0 {
			return integer(0), nil
		}
		if !d.IsInt64() || d.Int64() > maxBits || x.BitLen()+int(d.Int64()) > maxBits {
			return value{}, badArgument("the result has more than %d bits", maxBits)
		}
		return bigInteger(new(big.Int).Lsh(x, uint(d.Int64()))), nil
	}
}

func measured(size func(string) int) evalArgs {
	return func(_ *env, args []value) (value, error) {
		s, err := textOf(args[0])
		if err != nil {
			return value{}, err
		}
		return integer(int64(size(s))), nil
	}
}

// The words that subbits takes, by the place of the argument.
var subbitsWords = map[int][]string{
	3: {"integer", "float", "bits"},
	4: {"unsigned", "signed"},
	5: {"big", "little"},
}

func subbitsConstant(i, n int, v value) (value, error) {
	var err error
	switch {
	case i >= 3:
		_, err = wordOf(v, subbitsWords[i]...)
	case i == 1 && n > 2:
		_, err = countOf(v, "the first bit", 1)
	case i > 0:
		_, err = countOf(v, "a number of bits", 0)
	}
	return v, err
}

// subbits reads bits of a string: how many, or from where and how many, and then
// as what. There is none past the end, and what is left if that is less than was
// asked for.
func subbits(_ *env, args []value) (value, error) {
	text, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	start, lengthAt := 1, 1
	if len(args) > 2 {
		if start, err = countOf(args[1], "the first bit", 1); err != nil {
			return value{}, err
		}
		lengthAt = 2
	}
	n, err := countOf(args[lengthAt], "a number of bits", 0)
	if err != nil {
		return value{}, err
	}
	words := [...]string{3: "integer", 4: "unsigned", 5: "big"}
	for i := 3; i < len(args); i++ {
		if words[i], err = wordOf(args[i], subbitsWords[i]...); err != nil {
			return value{}, err
		}
	}
	start--
	if start >= 8*len(text) {
		return value{}, nil
	}
	n = min(n, 8*len(text)-start)
	switch words[3] {
	case "bits":
		return wholeBytes(text, start, n)
	case "float":
		return floatBits(text, start, n, words[5] == "little")
	}
	if n > maxBits {
		return value{}, badArgument("an integer has at most %d bits, found %d", maxBits, n)
	}
	return integerBits(text, start, n, words[4] == "signed", words[5] == "little"), nil
}

// bitsAt are n bits from start, as many bytes as they need. The last byte, if it
// is not full, has its bits at the lower end.
func bitsAt(text string, start, n int) []byte {
	bits := make([]byte, (n+7)/8)
	for i := range bits {
		from := start + 8*i
		word := uint16(text[from/8]) << 8
		if from/8+1 < len(text) {
			word |= uint16(text[from/8+1])
		}
		bits[i] = byte(word >> (8 - from%8))
		if left := n - 8*i; left < 8 {
			bits[i] >>= 8 - left
		}
	}
	return bits
}

func wholeBytes(text string, start, n int) (value, error) {
	switch {
	case n%8 != 0:
		return value{}, badArgument("a string has whole bytes, found %d bits", n)
	case start%8 == 0:
		return str(text[start/8 : (start+n)/8]), nil
	}
	return made(string(bitsAt(text, start, n)))
}

func integerBits(text string, start, n int, signed, little bool) value {
	bits := bitsAt(text, start, n)
	z := new(big.Int)
	if little {
		slices.Reverse(bits)
		z.SetBytes(bits)
	} else if odd := n % 8; odd != 0 {
		last := bits[len(bits)-1]
		z.SetBytes(bits[:len(bits)-1])
		z.Lsh(z, uint(odd)).Or(z, big.NewInt(int64(last)))
	} else {
		z.SetBytes(bits)
	}
	if signed && n > 0 && z.Bit(n-1) == 1 {
		z.Sub(z, new(big.Int).Lsh(big.NewInt(1), uint(n)))
	}
	return bigInteger(z)
}

func floatBits(text string, start, n int, little bool) (value, error) {
	if n != 16 && n != 32 && n != 64 {
		return value{}, badArgument("a float has 16, 32 or 64 bits, found %d", n)
	}
	bits := bitsAt(text, start, n)
	if little {
		slices.Reverse(bits)
	}
	var u uint64
	for _, b := range bits {
		u = u<<8 | uint64(b)
	}
	switch n {
	case 16:
		return finite(halfFloat(uint16(u)))
	case 32:
		return finite(float64(math.Float32frombits(uint32(u))))
	}
	return finite(math.Float64frombits(u))
}

// halfFloat is the binary16 of IEEE 754.
func halfFloat(u uint16) float64 {
	exponent, fraction := int(u>>10&0x1f), float64(u&0x3ff)
	f := math.Ldexp(fraction, -24)
	switch {
	case exponent == 0x1f:
		f = math.Inf(1)
	case exponent > 0:
		f = math.Ldexp(1024+fraction, exponent-25)
	}
	if u>>15 == 1 {
		f = -f
	}
	return f
}
