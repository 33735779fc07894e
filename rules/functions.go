package rules

import (
	"fmt"
	"maps"
	"math"
	"math/big"
	"slices"
	"strings"
)

// function is one function of the language. eval gets between min and max
// arguments, which it must not keep.
type function struct {
	min, max int
	eval     evalArgs
	// constant, if any, looks at the i-th of n arguments when a rule is loaded,
	// where that is a constant. It answers what eval is to get in its place, such as
	// a pattern with its compiled form, or why no message can make the call succeed.
	constant func(i, n int, v value) (value, error)
}

type evalArgs func(e *env, args []value) (value, error)

// variadic as max: as many arguments as a statement has room for.
const variadic = math.MaxInt

func (f function) arity() string {
	switch {
	case f.max == 0:
		return "no arguments"
	case f.min == f.max && f.min == 1:
		return "1 argument"
	case f.min == f.max:
		return fmt.Sprintf("%d arguments", f.min)
	case f.max == variadic && f.min == 1:
		return "1 argument or more"
	case f.max == variadic:
		return fmt.Sprintf("%d arguments or more", f.min)
	}
	return fmt.Sprintf("%d to %d arguments", f.min, f.max)
}

// functions are all there are. What messages say is in the documents' order.
var functions = map[string]function{
	// The message.
	"msgid":                {0, 0, columnOf("id"), nil},
	"qos":                  {0, 0, columnOf("qos"), nil},
	"flags":                {0, 0, columnOf("flags"), nil},
	"flag":                 {1, 1, flag, nil},
	"topic":                {0, 1, topicLevel, nil},
	"clientid":             {0, 0, columnOf("clientid"), nil},
	"clientip":             {0, 0, columnOf("peerhost"), nil},
	"peerhost":             {0, 0, columnOf("peerhost"), nil},
	"username":             {0, 0, columnOf("username"), nil},
	"payload":              {0, 1, payloadField, nil},
	"contains_topic":       {2, 3, containsTopic(func(topic, name string) bool { return topic == name }), nil},
	"contains_topic_match": {2, 3, containsTopic(func(topic, filter string) bool { return matchFilter(filter, topic) }), nil},

	// Undefined and null.
	"null":            {0, 0, func(*env, []value) (value, error) { return value{}, nil }, nil},
	"coalesce":        {1, 2, coalesce(value.defined), nil},
	"coalesce_ne":     {1, 2, coalesce(func(v value) bool { return v.defined() && (v.kind != kindString || v.s != "") }), nil},
	"is_null":         {1, 1, test(func(v value) bool { return !v.defined() }), nil},
	"is_not_null":     {1, 1, test(value.defined), nil},
	"is_null_var":     {1, 1, test(isNullVar), nil},
	"is_not_null_var": {1, 1, test(func(v value) bool { return !isNullVar(v) }), nil},

	// Types.
	"is_str":   {1, 1, test(func(v value) bool { return v.kind == kindString }), nil},
	"is_bool":  {1, 1, test(func(v value) bool { return v.kind == kindBool }), nil},
	"is_int":   {1, 1, test(value.isInteger), nil},
	"is_float": {1, 1, test(func(v value) bool { return v.kind == kindFloat }), nil},
	"is_num":   {1, 1, test(value.isNumber), nil},
	"is_map":   {1, 1, test(value.isObject), nil},
	"is_array": {1, 1, test(value.isList), nil},
	"is_empty": {1, 1, isEmpty, nil},

	// Conversion.
	"str":          {1, 1, toText, nil},
	"str_utf8":     {1, 1, toText, nil},
	"str_utf16_le": {1, 1, toUTF16, nil},
	"bool":         {1, 1, toBool, nil},
	"int":          {1, 1, toInt, nil},
	"float":        {1, 2, toFloat, decimalsConstant},
	"float2str":    {2, 2, floatText, decimalsConstant},
	"map":          {1, 1, toMap, nil},
	"bin2hexstr":   {1, 2, toHex, nil},
	"hexstr2bin":   {1, 2, fromHex, nil},

	// Numbers.
	"abs":    {1, 1, absolute, nil},
	"ceil":   {1, 1, rounded(math.Ceil), nil},
	"floor":  {1, 1, rounded(math.Floor), nil},
	"round":  {1, 1, rounded(math.Round), nil},
	"div":    {2, 2, operator(keywordDiv), nil},
	"mod":    {2, 2, operator(keywordMod), nil},
	"eq":     {2, 2, func(_ *env, args []value) (value, error) { return boolean(order(args[0], args[1]) == 0), nil }, nil},
	"fmod":   {2, 2, onFloats(math.Mod), nil},
	"power":  {2, 2, onFloats(math.Pow), nil},
	"sqrt":   {1, 1, onFloat(math.Sqrt), nil},
	"exp":    {1, 1, onFloat(math.Exp), nil},
	"log":    {1, 1, onFloat(math.Log), nil},
	"log10":  {1, 1, onFloat(math.Log10), nil},
	"log2":   {1, 1, onFloat(math.Log2), nil},
	"sin":    {1, 1, onFloat(math.Sin), nil},
	"cos":    {1, 1, onFloat(math.Cos), nil},
	"tan":    {1, 1, onFloat(math.Tan), nil},
	"asin":   {1, 1, onFloat(math.Asin), nil},
	"acos":   {1, 1, onFloat(math.Acos), nil},
	"atan":   {1, 1, onFloat(math.Atan), nil},
	"sinh":   {1, 1, onFloat(math.Sinh), nil},
	"cosh":   {1, 1, onFloat(math.Cosh), nil},
	"tanh":   {1, 1, onFloat(math.Tanh), nil},
	"asinh":  {1, 1, onFloat(math.Asinh), nil},
	"acosh":  {1, 1, onFloat(math.Acosh), nil},
	"atanh":  {1, 1, onFloat(math.Atanh), nil},
	"random": {0, 0, random, nil},

	// Bits.
	"bitnot":   {1, 1, bitNot, nil},
	"bitand":   {2, 2, onIntegers((*big.Int).And), nil},
	"bitor":    {2, 2, onIntegers((*big.Int).Or), nil},
	"bitxor":   {2, 2, onIntegers((*big.Int).Xor), nil},
	"bitsl":    {2, 2, shift(1), nil},
	"bitsr":    {2, 2, shift(-1), nil},
	"bitsize":  {1, 1, measured(func(s string) int { return 8 * len(s) }), nil},
	"bytesize": {1, 1, measured(func(s string) int { return len(s) }), nil},
	"subbits":  {2, 6, subbits, subbitsConstant},

	// Strings.
	"lower":          {1, 1, onString(lower), nil},
	"upper":          {1, 1, onString(upper), nil},
	"trim":           {1, 1, onString(func(s string) string { return strings.TrimFunc(s, isSpace) }), nil},
	"ltrim":          {1, 1, onString(func(s string) string { return strings.TrimLeftFunc(s, isSpace) }), nil},
	"rtrim":          {1, 2, trimRight, nil},
	"reverse":        {1, 1, onString(reverse), nil},
	"strlen":         {1, 1, measured(countGraphemes), nil},
	"substr":         {2, 3, substring, nil},
	"split":          {2, 3, split, oneOf(2, splitModes...)},
	"tokens":         {2, 3, tokens, oneOf(2, "nocrlf")},
	"concat":         {1, 2, concat, nil},
	"sprintf":        {1, variadic, sprintf, sprintfConstant},
	"sprintf_s":      {2, 2, sprintfList, formatConstant},
	"pad":            {2, 4, pad, oneOf(2, padModes...)},
	"replace":        {3, 4, replace, oneOf(3, "all", "leading", "trailing")},
	"regex_match":    {2, 2, regexMatch, patternConstant},
	"regex_replace":  {3, 3, regexReplace, patternConstant},
	"regex_extract":  {2, 2, regexExtract, patternConstant},
	"ascii":          {1, 1, firstByte, nil},
	"find":           {2, 3, find, oneOf(2, "leading", "trailing")},
	"rm_prefix":      {2, 2, removePrefix, nil},
	"join_to_string": {1, 2, joinToString, nil},
	"unescape":       {1, 1, unescapeString, nil},

	// Maps.
	"map_new":        {0, 0, func(*env, []value) (value, error) { return objectOf(&object{}), nil }, nil},
	"map_get":        {2, 3, mapGet(dottedPath), pathConstant},
	"map_put":        {3, 3, mapPut(dottedPath), pathConstant},
	"mget":           {2, 3, mapGet(literalKey), nil},
	"mput":           {3, 3, mapPut(literalKey), nil},
	"map_keys":       {1, 1, eachMember(func(m member) value { return str(m.key) }), nil},
	"map_values":     {1, 1, eachMember(func(m member) value { return m.val }), nil},
	"map_to_entries": {1, 1, eachMember(entryOf), nil},
	"map_size":       {1, 1, mapSize, nil},

	// Lists.
	"nth":      {2, 2, nth, nil},
	"length":   {1, 1, length, nil},
	"sublist":  {2, 3, sublist, nil},
	"first":    {1, 1, listEnd(1), nil},
	"last":     {1, 1, listEnd(-1), nil},
	"contains": {2, 2, contains, nil},

	// Hashes and codecs.
	"md5":            {1, 1, hashOf("md5"), nil},
	"sha":            {1, 1, hashOf("sha"), nil},
	"sha256":         {1, 1, hashOf("sha256"), nil},
	"hash":           {2, 2, hash, oneOf(0, algorithmNames...)},
	"gzip":           {1, 1, compress(gzipWriters), nil},
	"gunzip":         {1, 1, decompress(gzipReader), nil},
	"zip":            {1, 1, compress(deflateWriters), nil},
	"unzip":          {1, 1, decompress(deflateReader), nil},
	"zip_compress":   {1, 1, compress(zlibWriters), nil},
	"zip_uncompress": {1, 1, decompress(zlibReader), nil},
	"base64_encode":  {1, 3, toBase64, base64Constant},
	"base64_decode":  {1, 3, fromBase64, base64Constant},
	"json_encode":    {1, 1, toJSON, nil},
	"json_decode":    {1, 1, fromJSON, nil},
	"uuid_v4":        {0, 0, func(*env, []value) (value, error) { return str(uuid("-")), nil }, nil},

	"uuid_v4_no_hyphen": {0, 0, func(*env, []value) (value, error) { return str(uuid("")), nil }, nil},

	// Time.
	"now_timestamp":              {0, 1, nowTimestamp, unitConstant(0)},
	"now_rfc3339":                {0, 1, nowRFC3339, unitConstant(0)},
	"unix_ts_to_rfc3339":         {1, 2, unixToRFC3339, unitConstant(1)},
	"rfc3339_to_unix_ts":         {1, 2, rfc3339ToUnix, unitConstant(1)},
	"format_date":                {3, 4, formatDate, formatDateConstant},
	"date_to_unix_ts":            {3, 4, dateToUnix, dateToUnixConstant},
	"timezone_to_second":         {1, 1, zoneSeconds, zoneConstant},
	"timezone_to_offset_seconds": {1, 1, zoneSeconds, zoneConstant},
}

// functionNames are those that a misspelt name may have meant.
func functionNames() []string { return slices.Sorted(maps.Keys(functions)) }

// elsewhere says for functions that rules of other engines call, by name or by
// what the name begins with, what to do here instead.
var elsewhere = []struct{ name, instead string }{
	{"getenv", "the environment is for destinations: ${env:NAME} in a header"},
	{"kv_store_", "a rule keeps nothing from one message to the next"},
	{"proc_dict_", "a rule keeps nothing from one message to the next"},
	{"schema_", "payloads are JSON, or bytes that subbits reads"},
	{"avro_", "payloads are JSON, or bytes that subbits reads"},
	{"sparkplug_", "payloads are JSON, or bytes that subbits reads"},
	{"term_", "Erlang's terms are not read or written; json_encode and json_decode are"},
	{"jq", "paths read JSON (payload.a.b[1]), and map_get does with a path that is looked up"},
	{"mongo_date", "send the time as text (unix_ts_to_rfc3339) or as a number"},
	{"sqlserver_bin2hexstr", "bin2hexstr(x, '0x') writes the same"},
	{"map_to_redis_hset_args", "destinations get JSON: json_encode"},
	{"join_to_sql_values_string", "destinations get JSON: json_encode, or join_to_string"},
}

// functionHint is for a name that no function has.
func functionHint(name string) string {
	for _, other := range elsewhere {
		if name == other.name || strings.HasSuffix(other.name, "_") && strings.HasPrefix(name, other.name) {
			return other.instead
		}
	}
	if s := Suggest(name, functionNames()); s != "" {
		return fmt.Sprintf("did you mean %s? See docs/rules.md#functions", s)
	}
	return "see docs/rules.md#functions"
}

// Whatever a message says, functions make no string longer than maxText bytes, and no
// list of more than maxElements, unless it is a part of an argument: what a
// message costs must not be for its sender to choose.
const (
	maxText     = 1 << 20
	maxElements = 1 << 16
)

var (
	errTextTooLong = badArgument("the result is longer than %d bytes", maxText)
	errListTooLong = badArgument("the result has more than %d elements", maxElements)
)

// made is a string that a function made.
func made(s string) (value, error) {
	if len(s) > maxText {
		return value{}, errTextTooLong
	}
	return str(s), nil
}

func textOf(v value) (string, error) {
	if v.kind != kindString {
		return "", badArgument("needs a string, found %s", shown(v))
	}
	return v.s, nil
}

// textsOf are arguments that are all strings.
func textsOf(args ...value) error {
	for _, v := range args {
		if _, err := textOf(v); err != nil {
			return err
		}
	}
	return nil
}

// countOf is an argument that is an integer from min. One that is beyond any
// string or list is as good as the largest int32.
func countOf(v value, what string, min int) (int, error) {
	if !v.isInteger() {
		return 0, badArgument("%s is an integer, found %s", what, shown(v))
	}
	if v.kind == kindBig && v.big().Sign() > 0 || v.kind == kindInt && v.int() > math.MaxInt32 {
		return math.MaxInt32, nil
	}
	if v.kind == kindBig || v.int() < int64(min) {
		return 0, badArgument("%s is at least %d, found %s", what, min, shown(v))
	}
	return int(v.int()), nil
}

func listArg(v value) ([]value, error) {
	if !v.isList() {
		return nil, badArgument("needs a list, found %s", shown(v))
	}
	return v.decoded().list(), nil
}

// wordOf is an argument that is one of a few words.
func wordOf(v value, words ...string) (string, error) {
	if v.kind != kindString || !slices.Contains(words, v.s) {
		return "", badArgument("expected %s, found %s", alternatives(words), shown(v))
	}
	return v.s, nil
}

// alternatives are words as a sentence has them.
func alternatives(words []string) string {
	last := len(words) - 1
	if last == 0 {
		return quote(words[0])
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// oneOf refuses a constant argument at that is none of the words.
func oneOf(at int, words ...string) func(int, int, value) (value, error) {
	return func(i, _ int, v value) (value, error) {
		if i != at {
			return v, nil
		}
		_, err := wordOf(v, words...)
		return v, err
	}
}

func isNullVar(v value) bool { return v.kind == kindUndefined || v.kind == kindNull }

func test(is func(value) bool) evalArgs {
	return func(_ *env, args []value) (value, error) { return boolean(is(args[0])), nil }
}

// isEmpty: an empty string, list or map, or the text of an empty map.
func isEmpty(e *env, args []value) (value, error) {
	v := args[0]
	if v.kind == kindString {
		if v.s == "" {
			return boolean(true), nil
		}
		if v = e.opened(v); !v.isObject() {
			return boolean(false), nil
		}
	}
	switch v = v.decoded(); v.kind {
	case kindList:
		return boolean(len(v.list()) == 0), nil
	case kindObject:
		return boolean(len(v.object().members) == 0), nil
	}
	return boolean(false), nil
}

// coalesce is the first of a list, or of two values, that counts.
func coalesce(counts func(value) bool) evalArgs {
	return func(_ *env, args []value) (value, error) {
		if len(args) == 1 {
			if !args[0].isList() {
				return value{}, badArgument("a single argument must be a list, found %s", shown(args[0]))
			}
			args = args[0].decoded().list()
		}
		for _, v := range args {
			if counts(v) {
				return v, nil
			}
		}
		return value{}, nil
	}
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
