package rules

import (
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"
)

// function is one function of the language. eval gets between min and max
// arguments, which it must not keep.
type function struct {
	min, max int
	eval     func(e *env, args []value) (value, error)
}

func (f function) arity() string {
	switch {
	case f.max == 0:
		return "no arguments"
	case f.min == f.max && f.min == 1:
		return "1 argument"
	case f.min == f.max:
		return fmt.Sprintf("%d arguments", f.min)
	}
	return fmt.Sprintf("%d to %d arguments", f.min, f.max)
}

var functions = map[string]function{
	// The message.
	"msgid":    {0, 0, columnOf("id")},
	"qos":      {0, 0, columnOf("qos")},
	"flags":    {0, 0, columnOf("flags")},
	"topic":    {0, 1, topicLevel},
	"clientid": {0, 0, columnOf("clientid")},
	"clientip": {0, 0, columnOf("peerhost")},
	"peerhost": {0, 0, columnOf("peerhost")},
	"username": {0, 0, columnOf("username")},
	"payload":  {0, 1, payloadField},

	// Undefined and null.
	"null":            {0, 0, func(*env, []value) (value, error) { return value{}, nil }},
	"coalesce":        {1, 2, coalesce},
	"is_null":         {1, 1, test(func(v value) bool { return !v.defined() })},
	"is_not_null":     {1, 1, test(value.defined)},
	"is_null_var":     {1, 1, test(isNullVar)},
	"is_not_null_var": {1, 1, test(func(v value) bool { return !isNullVar(v) })},

	// Types.
	"is_str":   {1, 1, test(func(v value) bool { return v.kind == kindString })},
	"is_bool":  {1, 1, test(func(v value) bool { return v.kind == kindBool })},
	"is_int":   {1, 1, test(value.isInteger)},
	"is_float": {1, 1, test(func(v value) bool { return v.kind == kindFloat })},
	"is_num":   {1, 1, test(value.isNumber)},
	"is_map":   {1, 1, test(value.isObject)},
	"is_array": {1, 1, test(value.isList)},

	// Conversion.
	"str":      {1, 1, func(_ *env, args []value) (value, error) { return str(args[0].text()), nil }},
	"str_utf8": {1, 1, func(_ *env, args []value) (value, error) { return str(args[0].text()), nil }},
	"bool":     {1, 1, toBool},
	"int":      {1, 1, toInt},
	"float":    {1, 1, toFloat},

	// Numbers.
	"abs":   {1, 1, absolute},
	"ceil":  {1, 1, rounded(math.Ceil)},
	"floor": {1, 1, rounded(math.Floor)},
	"round": {1, 1, rounded(math.Round)},
	"div":   {2, 2, operator(keywordDiv)},
	"mod":   {2, 2, operator(keywordMod)},

	// Strings.
	"lower":  {1, 1, onString(strings.ToLower)},
	"upper":  {1, 1, onString(strings.ToUpper)},
	"trim":   {1, 1, onString(strings.TrimSpace)},
	"concat": {1, 2, concat},

	// Time.
	"now_timestamp": {0, 1, nowTimestamp},
}

// planned are functions of the dialect that are known and refused until they
// exist.
const planned = `flag contains_topic contains_topic_match coalesce_ne eq
acos acosh asin asinh atan atanh cos cosh sin sinh tan tanh exp log log10 log2 sqrt fmod power
bitnot bitand bitor bitxor bitsl bitsr bitsize bytesize subbits
str_utf16_le float2str map bin2hexstr hexstr2bin is_empty
ltrim rtrim reverse strlen substr split tokens sprintf sprintf_s pad replace regex_match regex_replace regex_extract
ascii find rm_prefix join_to_string unescape
map_new map_get map_put mget mput map_keys map_values map_to_entries map_size
nth length sublist first last contains md5 sha sha256 hash gzip gunzip zip unzip zip_compress zip_uncompress
base64_encode base64_decode json_encode json_decode
now_rfc3339 unix_ts_to_rfc3339 rfc3339_to_unix_ts format_date date_to_unix_ts timezone_to_second timezone_to_offset_seconds
random uuid_v4 uuid_v4_no_hyphen`

func isPlanned(name string) bool { return slices.Contains(strings.Fields(planned), name) }

// functionNames are those that a misspelt name may have meant.
func functionNames() []string {
	names := strings.Fields(planned)
	for name := range functions {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func columnOf(name string) func(*env, []value) (value, error) {
	return func(e *env, _ []value) (value, error) { return e.column(name), nil }
}

func test(is func(value) bool) func(*env, []value) (value, error) {
	return func(_ *env, args []value) (value, error) { return boolean(is(args[0])), nil }
}

func isNullVar(v value) bool { return v.kind == kindUndefined || v.kind == kindNull }

// topicLevel is the topic, or its n-th level from 1.
func topicLevel(e *env, args []value) (value, error) {
	topic := e.column("topic")
	if len(args) == 0 || topic.kind != kindString {
		return topic, nil
	}
	if args[0].kind != kindInt || args[0].int() < 1 {
		return value{}, badArgument("a level is an integer from 1, found %s", shown(args[0]))
	}
	n := args[0].int()
	for level := range strings.SplitSeq(topic.s, "/") {
		if n--; n == 0 {
			return str(level), nil
		}
	}
	return value{}, badArgument("the topic has no level %d", args[0].int())
}

// payloadField is the payload, or what a dotted path finds in its JSON.
func payloadField(e *env, args []value) (value, error) {
	if len(args) == 0 {
		return e.column("payload"), nil
	}
	if args[0].kind != kindString {
		return value{}, badArgument("a path is a string, found %s", shown(args[0]))
	}
	v, err := e.payloadJSON()
	for key := range strings.SplitSeq(args[0].s, ".") {
		v = e.field(v, &step{kind: stepKey, key: key})
	}
	return v, err
}

// coalesce is the first of a list, or of two values, that is not undefined.
func coalesce(_ *env, args []value) (value, error) {
	if len(args) == 1 {
		if !args[0].isList() {
			return value{}, badArgument("a single argument must be a list, found %s", shown(args[0]))
		}
		args = args[0].decoded().list()
	}
	for _, v := range args {
		if v.defined() {
			return v, nil
		}
	}
	return value{}, nil
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

func toFloat(_ *env, args []value) (value, error) {
	v := args[0]
	if v.kind == kindString {
		v, _ = parseNumeric(v.s)
	}
	if !v.isNumber() {
		return value{}, badArgument("no number: %s", shown(args[0]))
	}
	return finite(v.toFloat())
}

// wholeNumber is a finite float without a fraction as an integer.
func wholeNumber(f float64) value {
	if math.Abs(f) <= exactInFloat {
		return integer(int64(f))
	}
	i, _ := big.NewFloat(f).Int(nil)
	return bigInteger(i)
}

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
func rounded(round func(float64) float64) func(*env, []value) (value, error) {
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

func operator(op tokenKind) func(*env, []value) (value, error) {
	return func(_ *env, args []value) (value, error) { return arithmetic(op, args[0], args[1]) }
}

func onString(fn func(string) string) func(*env, []value) (value, error) {
	return func(_ *env, args []value) (value, error) {
		if args[0].kind != kindString {
			return value{}, badArgument("needs a string, found %s", shown(args[0]))
		}
		return str(fn(args[0].s)), nil
	}
}

// concat joins two values, or those of a list, as text.
func concat(_ *env, args []value) (value, error) {
	if len(args) == 1 {
		if !args[0].isList() {
			return value{}, badArgument("a single argument must be a list, found %s", shown(args[0]))
		}
		args = args[0].decoded().list()
	}
	var b strings.Builder
	for _, v := range args {
		if isNullVar(v) {
			return value{}, badArgument("needs values, found %s", shown(v))
		}
		b.WriteString(v.text())
	}
	return str(b.String()), nil
}

func nowTimestamp(e *env, args []value) (value, error) {
	unit := "second"
	if len(args) == 1 {
		if args[0].kind != kindString {
			return value{}, badArgument("a unit is a string, found %s", shown(args[0]))
		}
		unit = args[0].s
	}
	return timestamp(e.now(), unit)
}

func timestamp(t time.Time, unit string) (value, error) {
	switch unit {
	case "second":
		return integer(t.Unix()), nil
	case "millisecond":
		return integer(t.UnixMilli()), nil
	case "microsecond":
		return integer(t.UnixMicro()), nil
	case "nanosecond":
		return integer(t.UnixNano()), nil
	}
	return value{}, badArgument("unknown unit %s: second, millisecond, microsecond or nanosecond", quote(unit))
}

// shown is a value within a message: what it is, and its text where that is
// short.
func shown(v value) string {
	switch {
	case v.kind == kindString:
		return quote(v.s)
	case v.isNumber() && v.kind != kindBig, v.kind == kindBool:
		return v.text()
	}
	return v.describe()
}
