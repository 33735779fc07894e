package rules

import (
	"bytes"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tidwall/gjson"
)

// maxDepth bounds how deeply JSON may nest: deeper text counts as no JSON. What
// validates, decodes and compares values recurses, and must not be at the mercy
// of a payload.
const maxDepth = 256

// validJSON reports whether text is one JSON value that nests at most maxDepth
// deep.
func validJSON(text string) bool { return scanJSON(text, nil) }

// cursor walks text that is known to be valid JSON. It is not gjson's ForEach
// since that converts every number and string that it passes, which makes a match
// on 4 KiB cost 1.6 times as much, and passes over a value once for each level
// above it, which makes decoding the deepest text cost 7 times as much.
type cursor struct {
	s string
	i int
}

// space passes white space and answers the byte after it.
func (c *cursor) space() byte {
	for c.s[c.i] == ' ' || c.s[c.i] == '\n' || c.s[c.i] == '\t' || c.s[c.i] == '\r' {
		c.i++
	}
	return c.s[c.i]
}

// str passes a string and answers its text between the quotes, escapes and all.
func (c *cursor) str() (raw string, escaped bool) {
	c.i++
	start := c.i
	n := strings.IndexByte(c.s[c.i:], '"')
	if strings.IndexByte(c.s[start:start+n], '\\') >= 0 {
		return c.escapedStr(start), true
	}
	c.i += n + 1
	return c.s[start : c.i-1], false
}

func (c *cursor) escapedStr(start int) string {
	for c.s[c.i] != '"' {
		if c.s[c.i] == '\\' {
			c.i++
		}
		c.i++
	}
	c.i++
	return c.s[start : c.i-1]
}

// skip passes one value.
func (c *cursor) skip() {
	switch c.space() {
	case '"':
		c.str()
	case '{', '[':
		depth := 0
		for {
			switch c.s[c.i] {
			case '"':
				c.str()
				continue
			case '{', '[':
				depth++
			case '}', ']':
				depth--
			}
			c.i++
			if depth == 0 {
				return
			}
		}
	default:
		for c.i < len(c.s) {
			switch c.s[c.i] {
			case ',', '}', ']', ' ', '\n', '\t', '\r':
				return
			}
			c.i++
		}
	}
}

// each walks the members of the object, or the elements of the array, that c
// stands on. fn must pass the value that c then stands on.
func (c *cursor) each(fn func(key string)) {
	isObject := c.space() == '{'
	c.i++
	for {
		switch c.space() {
		case '}', ']':
			c.i++
			return
		case ',':
			c.i++
			c.space()
		}
		key := ""
		if isObject {
			key = unescape(c.str())
			c.space()
			c.i++ // the colon
			c.space()
		}
		fn(key)
	}
}

// unescape takes what str answers. A lone surrogate becomes U+FFFD.
func unescape(raw string, escaped bool) string {
	if !escaped {
		return raw
	}
	return gjson.Parse(`"` + raw + `"`).Str
}

// decode reads the value that c stands on. Of duplicate keys the last wins. A
// number that neither int64, maxDigits digits nor a float can hold is undefined.
func (c *cursor) decode() value {
	switch c.space() {
	case '{':
		o := &object{}
		c.each(func(key string) { o.set(key, c.decode()) })
		return objectOf(o)
	case '[':
		elems := []value{}
		c.each(func(string) { elems = append(elems, c.decode()) })
		return listOf(elems)
	}
	start := c.i
	c.skip()
	return scalar(c.s[start:c.i])
}

// scalar is the value of a JSON string, number or word.
func scalar(raw string) value {
	switch raw[0] {
	case '"':
		raw = raw[1 : len(raw)-1]
		return str(unescape(raw, strings.IndexByte(raw, '\\') >= 0))
	case 't':
		return boolean(true)
	case 'f':
		return boolean(false)
	case 'n':
		return null
	}
	var v value
	if strings.ContainsAny(raw, ".eE") {
		v, _ = parseFloat(raw)
	} else {
		v, _ = parseInteger(raw)
	}
	return v
}

func decodeValid(text string) value {
	c := cursor{s: text}
	return c.decode()
}

// decodeJSON is false for text that is no valid JSON.
func decodeJSON(text string) (value, bool) {
	if !validJSON(text) {
		return value{}, false
	}
	return decodeValid(text), true
}

// appendJSON writes v as compact JSON. Undefined members are left out, an
// undefined element becomes null so that the others keep their places. Floats
// keep a decimal point, so that they stay floats.
func appendJSON(dst []byte, v value) []byte {
	switch v.kind {
	case kindBool:
		return strconv.AppendBool(dst, v.bool())
	case kindInt:
		return strconv.AppendInt(dst, v.int(), 10)
	case kindBig:
		return v.big().Append(dst, 10)
	case kindFloat:
		return appendFloat(dst, v.float())
	case kindString:
		return appendString(dst, v.s)
	case kindRaw:
		return appendJSON(dst, v.decoded())
	case kindList:
		dst = append(dst, '[')
		for i, e := range v.list() {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendJSON(dst, e)
		}
		return append(dst, ']')
	case kindObject:
		dst = append(dst, '{')
		first := true
		for _, m := range v.object().members {
			if !m.val.defined() {
				continue
			}
			if !first {
				dst = append(dst, ',')
			}
			first = false
			dst = append(appendString(dst, m.key), ':')
			dst = appendJSON(dst, m.val)
		}
		return append(dst, '}')
	}
	return append(dst, "null"...)
}

// appendFloat writes the shortest text that reads back as f.
func appendFloat(dst []byte, f float64) []byte {
	if a := math.Abs(f); a != 0 && (a < 1e-6 || a >= 1e21) {
		return strconv.AppendFloat(dst, f, 'e', -1, 64)
	}
	start := len(dst)
	dst = strconv.AppendFloat(dst, f, 'f', -1, 64)
	if bytes.IndexByte(dst[start:], '.') < 0 {
		dst = append(dst, '.', '0')
	}
	return dst
}

// appendString writes s in quotes.
func appendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	dst = appendEscaped(dst, s)
	return append(dst, '"')
}

const hexDigits = "0123456789abcdef"

// appendEscaped writes s as it stands within a JSON string. Bytes that are no
// UTF-8 become U+FFFD: JSON has no way to carry them.
func appendEscaped(dst []byte, s string) []byte {
	from := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n == 1 {
				dst = append(dst, s[from:i]...)
				dst = utf8.AppendRune(dst, utf8.RuneError)
				from = i + 1
			}
			i += n
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' {
			i++
			continue
		}
		dst = append(dst, s[from:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		from = i
	}
	return append(dst, s[from:]...)
}
