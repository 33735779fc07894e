package rules

import (
	"math"
	"math/big"
	"strconv"
	"strings"
)

// kind is the type of a value in the rule language. String and bytes are one
// type; undefined is the absence of a value and differs from null.
type kind uint8

const (
	kindUndefined kind = iota
	kindNull
	kindBool
	kindInt
	kindBig // an integer beyond int64
	kindFloat
	kindString
	kindRaw // an object or array of the payload, not decoded
	kindList
	kindObject
)

var kindNames = [...]string{
	kindUndefined: "undefined", kindNull: "null", kindBool: "a boolean", kindInt: "an integer", kindBig: "an integer",
	kindFloat: "a float", kindString: "a string", kindRaw: "a map or list", kindList: "a list", kindObject: "a map",
}

// value is one value. Its zero is undefined. Values are immutable: a change makes
// a new one. Strings may share memory with the payload, so what outlives the
// message must be copied.
type value struct {
	kind kind
	// n is the boolean, the int64, the bits of the float; for kindRaw the offset
	// of s in the payload; for kindString payloadText marks the payload itself; for
	// kindList and kindObject the weight.
	n uint64
	s string // the string, or the JSON text of kindRaw
	x any    // *big.Int, []value or *object
}

// payloadText in value.n marks the string that is the message's payload, whose
// JSON is parsed once a message rather than once a step.
const payloadText = 1

var null = value{kind: kindNull}

func boolean(b bool) value {
	if b {
		return value{kind: kindBool, n: 1}
	}
	return value{kind: kindBool}
}

func integer(i int64) value { return value{kind: kindInt, n: uint64(i)} }

// bigInteger keeps integers that fit in int64 in one form only.
func bigInteger(i *big.Int) value {
	if i.IsInt64() {
		return integer(i.Int64())
	}
	return value{kind: kindBig, x: i}
}

func float(f float64) value { return value{kind: kindFloat, n: math.Float64bits(f)} }

func str(s string) value { return value{kind: kindString, s: s} }

func listOf(elems []value) value {
	w := scalarWeight
	for i := range elems {
		w += elems[i].weight()
	}
	return value{kind: kindList, n: uint64(w), x: elems}
}

func objectOf(o *object) value {
	return value{kind: kindObject, n: uint64(o.weight()), x: o}
}

// scalarWeight is what a value weighs that has no parts.
const scalarWeight = 8

// weight is about how many bytes v has as JSON. Values share their parts, so that
// it may be far more than what v takes in memory, and what walks v takes as long.
func (v value) weight() int {
	switch v.kind {
	case kindString, kindRaw:
		return scalarWeight + len(v.s)
	case kindList, kindObject:
		return int(v.n)
	case kindBig:
		return scalarWeight + v.big().BitLen()/3
	}
	return scalarWeight
}

// weight of nil is that of what a function answers beside an error.
func (o *object) weight() int {
	w := scalarWeight
	if o == nil {
		return w
	}
	for i := range o.members {
		w += scalarWeight + len(o.members[i].key) + o.members[i].val.weight()
	}
	return w
}

func (v value) bool() bool       { return v.n != 0 }
func (v value) int() int64       { return int64(v.n) }
func (v value) float() float64   { return math.Float64frombits(v.n) }
func (v value) big() *big.Int    { return v.x.(*big.Int) }
func (v value) list() []value    { return v.x.([]value) }
func (v value) object() *object  { return v.x.(*object) }
func (v value) defined() bool    { return v.kind != kindUndefined }
func (v value) isNumber() bool   { return v.kind == kindInt || v.kind == kindBig || v.kind == kindFloat }
func (v value) isInteger() bool  { return v.kind == kindInt || v.kind == kindBig }
func (v value) isTrue() bool     { return v.kind == kindBool && v.n != 0 }
func (v value) isList() bool     { return v.kind == kindList || v.kind == kindRaw && v.s[0] == '[' }
func (v value) isObject() bool   { return v.kind == kindObject || v.kind == kindRaw && v.s[0] == '{' }
func (v value) describe() string { return kindNames[v.decoded().kind] }

// bigOf is an integer of either kind as a big.Int, which the caller must not
// change.
func (v value) bigOf() *big.Int {
	if v.kind == kindBig {
		return v.big()
	}
	return big.NewInt(v.int())
}

// toFloat is any number as a float; integers beyond 2^53 lose their last digits.
func (v value) toFloat() float64 {
	switch v.kind {
	case kindInt:
		return float64(v.int())
	case kindBig:
		f, _ := new(big.Float).SetInt(v.big()).Float64()
		return f
	}
	return v.float()
}

// decoded is v with a raw object or array decoded.
func (v value) decoded() value {
	if v.kind == kindRaw {
		return decodeValid(v.s)
	}
	return v
}

// object is a map that remembers the order in which its keys came.
type object struct {
	members []member
	index   map[string]int // nil while the object is small enough to search
}

type member struct {
	key string
	val value
}

// indexFrom is the size at which an object gets an index: below it a search
// through the members is faster.
const indexFrom = 16

func (o *object) find(key string) int {
	if o.index != nil {
		if i, ok := o.index[key]; ok {
			return i
		}
		return -1
	}
	for i := range o.members {
		if o.members[i].key == key {
			return i
		}
	}
	return -1
}

// lookup answers undefined for a key that is not there.
func (o *object) lookup(key string) value {
	if i := o.find(key); i >= 0 {
		return o.members[i].val
	}
	return value{}
}

// set adds or replaces key; the last one wins, at the place of the first.
func (o *object) set(key string, v value) {
	if i := o.find(key); i >= 0 {
		o.members[i].val = v
		return
	}
	o.members = append(o.members, member{key, v})
	switch {
	case o.index != nil:
		o.index[key] = len(o.members) - 1
	case len(o.members) >= indexFrom:
		o.index = make(map[string]int, 2*indexFrom)
		for i := range o.members {
			o.index[o.members[i].key] = i
		}
	}
}

func (o *object) clone() *object {
	c := &object{members: make([]member, 0, len(o.members)+1)}
	for _, m := range o.members {
		c.set(m.key, m.val)
	}
	return c
}

// reset empties the object and keeps its memory.
func (o *object) reset() {
	clear(o.members)
	o.members = o.members[:0]
	o.index = nil
}

// text is the value as str() and text templates show it: numbers compactly,
// floats with at most ten decimals, maps as JSON, and a list as JSON unless all
// its elements are printable code points, which print as text.
func (v value) text() string {
	switch v.kind {
	case kindUndefined:
		return "undefined"
	case kindNull:
		return "null"
	case kindBool:
		return strconv.FormatBool(v.bool())
	case kindInt:
		return strconv.FormatInt(v.int(), 10)
	case kindBig:
		return v.big().String()
	case kindFloat:
		return decimals(v.float(), 10)
	case kindString:
		return v.s
	case kindRaw:
		return v.decoded().text()
	case kindList:
		if s, ok := codePoints(v.list()); ok {
			return s
		}
	}
	return string(appendJSON(nil, v))
}

// decimals prints f with at most n decimals, and at least one unless n is 0: 1.0,
// 0.25.
func decimals(f float64, n int) string {
	s := scaled(f, n)
	if n == 0 {
		return s
	}
	s = strings.TrimRight(s, "0")
	if strings.HasSuffix(s, ".") {
		s += "0"
	}
	return s
}

// codePoints is the text that a list of printable code points spells, the empty
// text for the empty list.
func codePoints(elems []value) (string, bool) {
	var b strings.Builder
	for _, e := range elems {
		if e.kind != kindInt || !isPrintableCode(e.int()) {
			return "", false
		}
		b.WriteRune(rune(e.int()))
	}
	return b.String(), true
}

// isPrintableCode is what Erlang's io_lib takes for a printable code point.
func isPrintableCode(c int64) bool {
	return c >= 0x20 && c <= 0x7e || c >= 0xa0 && c < 0xd800 || c >= 0xe000 && c < 0xfffe || c >= 0x10000 && c <= 0x10ffff ||
		c >= '\b' && c <= '\r' || c == 0x1b
}
