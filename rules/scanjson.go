package rules

import "strings"

// scanJSON reports whether text is one JSON value (RFC 8259) that nests at most maxDepth deep, and appends to members, unless
// that is nil, what its outermost object or list holds. Validating and finding members in one pass takes little more than
// validating: with gjson.Valid before a pass of our own, WHERE on two fields of 1 KiB costs twice as much. What was
// appended is of no use if text is no JSON.
func scanJSON(text string, members *[]entry) bool {
	var (
		objects [maxDepth / 64]uint64 // a bit for each level that is open: an object, not a list
		depth   int
		i       int
		member  entry // of the outermost level
	)
	for { // a value follows
		i = passSpace(text, i)
		if i == len(text) {
			return false
		}
		if depth == 1 {
			member.from = i
		}
		inObject := false
		switch c := text[i]; c {
		case '{', '[':
			if depth == maxDepth {
				return false
			}
			word, bit := &objects[depth/64], uint64(1)<<(depth%64)
			depth++
			i = passSpace(text, i+1)
			switch {
			case i == len(text):
				return false
			case text[i] == c+2: // the bracket that closes it
				i++
				depth--
			case c == '[':
				*word &^= bit
				continue
			default:
				*word |= bit
				inObject = true
			}
		case '"':
			i, _ = passString(text, i)
		case 't':
			i = passWord(text, i, "true")
		case 'f':
			i = passWord(text, i, "false")
		case 'n':
			i = passWord(text, i, "null")
		default:
			i = passNumber(text, i)
		}
		if i < 0 {
			return false
		}
		for !inObject { // a value has ended
			if depth == 1 && members != nil {
				member.to = i
				*members = append(*members, member)
			}
			i = passSpace(text, i)
			if depth == 0 || i == len(text) {
				return depth == 0 && i == len(text)
			}
			inObject = objects[(depth-1)/64]&(1<<((depth-1)%64)) != 0
			c := text[i]
			i++
			if c == ',' {
				if inObject {
					i = passSpace(text, i)
				}
				break
			}
			if c != ']' && c != '}' || inObject != (c == '}') {
				return false
			}
			depth--
			inObject = false
		}
		if !inObject {
			continue
		}
		// A key follows.
		start := i + 1
		if i == len(text) || text[i] != '"' {
			return false
		}
		var escaped bool
		if i, escaped = passString(text, i); i < 0 {
			return false
		}
		if depth == 1 && members != nil {
			member.key = unescape(text[start:i-1], escaped)
		}
		if i = passSpace(text, i); i == len(text) || text[i] != ':' {
			return false
		}
		i++
	}
}

func passSpace(text string, i int) int {
	for i < len(text) && text[i] <= ' ' && isJSONSpace(text[i]) {
		i++
	}
	return i
}

func isJSONSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// asItIs are the bytes that stand in a string as they are.
var asItIs = func() (plain [256]bool) {
	for c := ' '; c < 256; c++ {
		plain[c] = c != '"' && c != '\\'
	}
	return plain
}()

// passString answers where the string that begins at i ends, -1 if it is none.
func passString(text string, i int) (end int, escaped bool) {
	i++
	for i < len(text) {
		c := text[i]
		i++
		switch {
		case asItIs[c]:
		case c == '"':
			return i, escaped
		case c != '\\' || i == len(text):
			return -1, false
		default:
			escaped = true
			i++
			switch text[i-1] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				end := i + 4
				if end > len(text) {
					return -1, false
				}
				for ; i < end; i++ {
					if !isHexDigit(text[i]) {
						return -1, false
					}
				}
			default:
				return -1, false
			}
		}
	}
	return -1, false
}

// passWord answers where the word ends if it begins at i, else -1.
func passWord(text string, i int, word string) int {
	if !strings.HasPrefix(text[i:], word) {
		return -1
	}
	return i + len(word)
}

// passNumber answers where the number that begins at i ends, -1 if it is none.
func passNumber(text string, i int) int {
	if text[i] == '-' {
		i++
	}
	end := passDigits(text, i)
	if end < 0 || end > i+1 && text[i] == '0' {
		return -1
	}
	i = end
	if i < len(text) && text[i] == '.' {
		if i = passDigits(text, i+1); i < 0 {
			return -1
		}
	}
	if i < len(text) && text[i]|0x20 == 'e' {
		i++
		if i < len(text) && (text[i] == '+' || text[i] == '-') {
			i++
		}
		return passDigits(text, i)
	}
	return i
}

// passDigits passes at least one, else it answers -1.
func passDigits(text string, i int) int {
	start := i
	for i < len(text) && text[i]-'0' <= 9 {
		i++
	}
	if i == start {
		return -1
	}
	return i
}
