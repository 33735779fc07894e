package bridge

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

	"github.com/tidwall/gjson"
)

// isObject reports whether body is one JSON object, whole and valid.
func isObject(body []byte) bool {
	trimmed := bytes.TrimLeft(body, " \t\r\n")
	return len(trimmed) > 0 && trimmed[0] == '{' && gjson.ValidBytes(body)
}

// placement is what setField did.
type placement int

const (
	blocked  placement = iota // a parent on the path is there and is no object
	added                     // the field is new
	replaced                  // a field of that name had a value, which is gone
)

// setField sets the string field at path in body, which must be a valid JSON
// object, and returns the new body: the old one's array where it had room.
// Every other byte stays as it is. A field that exists more than once is
// replaced everywhere, since readers disagree on which one counts. value must
// need no escaping, which carriers (base64 and punctuation) never do.
func setField(body []byte, path []string, value string) ([]byte, placement) {
	return setFieldIn(body, skipSpace(body, 0), path, value)
}

// setFieldIn is setField for the object whose brace opens at offset open.
func setFieldIn(body []byte, open int, path []string, value string) ([]byte, placement) {
	result := added
	found := false
	i := skipSpace(body, open+1)
	last := open + 1 // where a further member goes: behind the last one
	for body[i] != '}' {
		if body[i] == ',' {
			i = skipSpace(body, i+1)
		}
		keyEnd := skipValue(body, i)
		key := body[i:keyEnd]
		start := skipSpace(body, skipSpace(body, keyEnd)+1) // over the colon
		end := skipValue(body, start)
		if keyIs(key, path[0]) {
			size := len(body)
			switch {
			case len(path) == 1:
				body = slices.Replace(body, start, end, quoted(value)...)
				result = replaced
			case body[start] == '{':
				body, result = setFieldIn(body, start, path[1:], value)
			default:
				return body, blocked
			}
			if result == blocked {
				return body, blocked
			}
			found = true
			end += len(body) - size
		}
		last = end
		i = skipSpace(body, end)
	}
	if found {
		return body, result
	}

	comma := ""
	if last > open+1 {
		comma = ","
	}
	return insert(body, last, comma, opening(path), value, closing(path)), added
}

// opening is what stands before the value of a member that is new with all its parents.
func opening(path []string) string {
	if len(path) == 1 && isPlain(path[0]) { // nearly always
		return `"` + path[0] + `":"`
	}
	var b strings.Builder
	for i, name := range path {
		if i > 0 {
			b.WriteByte('{')
		}
		text, _ := json.Marshal(name) // a string always has an encoding
		b.Write(text)
		b.WriteByte(':')
	}
	b.WriteByte('"')
	return b.String()
}

// closing is what stands behind it.
func closing(path []string) string {
	if len(path) == 1 {
		return `"`
	}
	return `"` + strings.Repeat("}", len(path)-1)
}

// isPlain reports whether name is the same in JSON.
func isPlain(name string) bool {
	return !strings.ContainsFunc(name, func(r rune) bool {
		return r < ' ' || r > '~' || strings.ContainsRune(`"\<>&`, r)
	})
}

// insert puts parts into body at an offset, in the array of body if that has room.
func insert(body []byte, at int, parts ...string) []byte {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	end := len(body)
	body = slices.Grow(body, n)[:end+n]
	copy(body[at+n:], body[at:end])
	for _, p := range parts {
		at += copy(body[at:], p)
	}
	return body
}

func quoted(value string) []byte {
	text := make([]byte, 0, len(value)+2)
	return append(append(append(text, '"'), value...), '"')
}

// keyIs compares a key as it stands in the text, in its quotes, with a name.
func keyIs(text []byte, name string) bool {
	inner := text[1 : len(text)-1]
	if bytes.IndexByte(inner, '\\') < 0 {
		return string(inner) == name
	}
	var key string
	return json.Unmarshal(text, &key) == nil && key == name
}

// skipSpace and skipValue walk text that is known to be valid JSON.
func skipSpace(text []byte, i int) int {
	for text[i] == ' ' || text[i] == '\n' || text[i] == '\t' || text[i] == '\r' {
		i++
	}
	return i
}

// skipValue returns the offset behind the value that starts at i.
func skipValue(text []byte, i int) int {
	switch text[i] {
	case '"':
		return skipString(text, i)
	case '{', '[':
		for depth := 0; ; {
			switch text[i] {
			case '"':
				i = skipString(text, i)
				continue
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
			i++
		}
	}
	for ; i < len(text); i++ {
		switch text[i] {
		case ',', '}', ']', ' ', '\n', '\t', '\r':
			return i
		}
	}
	return i
}

func skipString(text []byte, i int) int {
	for i++; ; {
		i += bytes.IndexByte(text[i:], '"')
		slashes := 0
		for text[i-1-slashes] == '\\' {
			slashes++
		}
		i++
		if slashes%2 == 0 {
			return i
		}
	}
}
