package rules

import (
	byteorder "encoding/binary"
	"fmt"
	"math"
	"math/big"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
)

// CheckCall calls the i-th function with arguments that the program makes, as
// variables and as constants, and answers what is wrong with the outcome.
func CheckCall(i uint, program []byte) (call, wrong string) {
	names := FunctionNames()
	name := names[i%uint(len(names))]
	f := functions[name]
	m := &argumentMaker{program: program}
	payload := []byte(m.text())
	args := make([]value, f.min+int(m.byte())%(min(f.max, f.min+4)-f.min+1))
	var text []string
	for i := range args {
		args[i] = m.value(3)
		text = append(text, args[i].text())
	}
	call = fmt.Sprintf("%s(%q) on %q", name, text, payload)
	e := &env{now: func() time.Time { return time.Unix(1_700_000_000, 5).UTC() }}
	e.reset(&Message{Topic: "a/b", Payload: payload}, payload)

	got, err := f.eval(e, args)
	if err == nil {
		wrong = exceeds(got, max(m.size, len(payload)))
	} else if _, ok := err.(*fault); !ok || err.Error() == "" {
		wrong = fmt.Sprintf("error %#v", err)
	}
	if f.constant == nil || wrong != "" {
		return call, wrong
	}
	for i := range args {
		v, refused := f.constant(i, len(args), args[i])
		if refused != nil && err == nil {
			return call, fmt.Sprintf("refused as a constant: %s", refused)
		}
		if refused != nil {
			return call, ""
		}
		args[i] = v
	}
	again, errAgain := f.eval(e, args)
	if err == nil && (errAgain != nil || !identical(got, again)) {
		return call, fmt.Sprintf("%s, but with constants %s, %v", got.text(), again.text(), errAgain)
	}
	return call, ""
}

// exceeds says where a result is larger than functions make, and larger than the
// arguments were.
func exceeds(v value, given int) string {
	switch v = v.decoded(); v.kind {
	case kindFloat:
		if math.IsNaN(v.float()) || math.IsInf(v.float(), 0) {
			return "a float that is no finite number"
		}
	case kindBig:
		if v.big().BitLen() > maxBits+1 {
			return fmt.Sprintf("an integer of %d bits", v.big().BitLen())
		}
	case kindString:
		if len(v.s) > max(maxText, given) {
			return fmt.Sprintf("a string of %d bytes", len(v.s))
		}
	case kindList:
		if len(v.list()) > max(maxElements, given) {
			return fmt.Sprintf("a list of %d elements", len(v.list()))
		}
		for _, elem := range v.list() {
			if wrong := exceeds(elem, given); wrong != "" {
				return wrong
			}
		}
	case kindObject:
		for _, m := range v.object().members {
			if wrong := exceeds(m.val, given); wrong != "" {
				return wrong
			}
		}
	}
	return ""
}

// argumentMaker reads values from a program: any bytes are one.
type argumentMaker struct {
	program []byte
	size    int // of all that it made
}

func (m *argumentMaker) byte() byte {
	if len(m.program) == 0 {
		return 0
	}
	b := m.program[0]
	m.program = m.program[1:]
	return b
}

func (m *argumentMaker) word() uint64 {
	var b [8]byte
	m.program = m.program[copy(b[:], m.program):]
	return byteorder.LittleEndian.Uint64(b[:])
}

func (m *argumentMaker) text() string {
	n := min(int(m.byte()), len(m.program))
	s := string(m.program[:n])
	m.program = m.program[n:]
	m.size += len(s)
	return s
}

// usual are texts that functions look for.
var usual = slices.Concat(unitNames, splitModes, padModes, algorithmNames, base64Words, []string{
	"nocrlf", "all", "integer", "float", "bits", "signed", "unsigned", "big", "little", "+08:00", "Z", "local", "%Y-%m-%d %H:%M:%S.%N %::z",
	"1970-01-01T00:00:00Z", "~s ~ts ~p", "~8.2f", "~9..0b ~.16B~n", "~w~-10s", "~99999w", "(a)|b*", `\d+`, `&\1`, "{\"a\":{\"b\":[1,2.5,null]}}", "[[1]]", "a.b", "a",
	"b", ",", "", "0x", `\x41\n`, "true", "1e3", "-0.5",
})

func (m *argumentMaker) value(depth int) value {
	switch kind := m.byte() % 16; kind {
	case 0:
		return value{}
	case 1:
		return null
	case 2:
		return boolean(m.byte()%2 == 1)
	case 3, 4:
		return integer(int64(int8(m.byte())))
	case 5:
		return integer(int64(m.word()))
	case 6:
		return bigInteger(new(big.Int).Lsh(big.NewInt(int64(m.word())), uint(m.byte())))
	case 7:
		if f := math.Float64frombits(m.word()); !math.IsNaN(f) && !math.IsInf(f, 0) {
			return float(f)
		}
		return float(float64(int8(m.byte())) / 4)
	case 8, 9, 10:
		return str(usual[int(m.byte())%len(usual)])
	case 11:
		s := strings.Repeat(m.text(), int(m.byte()))
		m.size += len(s)
		return str(s)
	case 12:
		if v, ok := decodeJSON(m.text()); ok {
			return v
		}
		return value{}
	case 13, 14:
		if depth == 0 {
			return value{}
		}
		elems := make([]value, m.byte()%5)
		for i := range elems {
			elems[i] = m.value(depth - 1)
		}
		if kind == 13 {
			return listOf(elems)
		}
		o := &object{}
		for _, v := range elems {
			o.set(m.text(), v)
		}
		return objectOf(o)
	}
	return str(m.text())
}

// CallsOf are the calls in a statement, each as name/number of arguments.
func CallsOf(sql string) (calls []string) {
	var walk func(reflect.Value)
	walk = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer, reflect.Interface:
			if v.IsNil() {
				return
			}
			if v.Type() == reflect.TypeFor[*call]() {
				calls = append(calls, fmt.Sprintf("%s/%d", v.Elem().FieldByName("name"), v.Elem().FieldByName("args").Len()))
			}
			walk(v.Elem())
		case reflect.Struct:
			for i := range v.NumField() {
				walk(v.Field(i))
			}
		case reflect.Slice:
			for i := range v.Len() {
				walk(v.Index(i))
			}
		}
	}
	walk(reflect.ValueOf(parse(sql, func(diagnostic) {})))
	return calls
}

// KeptPatterns is how many patterns are kept that were no constants.
func KeptPatterns() int {
	patterns.Lock()
	defer patterns.Unlock()
	return len(patterns.compiled)
}

// AllMatches is how many matches a pattern has.
func AllMatches(pattern, text string, limit time.Duration) (int, error) {
	matches, err := allMatches(regexp.MustCompile(pattern), text, limit)
	return len(matches), err
}
