package rules

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/tidwall/gjson"
)

// FuzzScan compares what is JSON with encoding/json and gjson, and the members with a walk over them.
func FuzzScan(f *testing.F) {
	for _, s := range []string{
		``, ` `, `{}`, `[]`, ` { } `, `null`, `nul`, `truefalse`, `-0`, `-`, `01`, `1.`, `.5`, `1e`, `1E+3`, `-1.5e-7 `, `""`, `"`, `"\`, `"\u12"`, `"\u12aG"`, `"\ud83d\ude00"`, `"\x"`,
		`{"a":1}`, `{"a" : [ 1 , 2 ] , "a" : { } } `, `{"a":1,}`, `{"a"}`, `{"a":}`, `{,}`, `{1:2}`, `{"a":1 "b":2}`, `[1,]`, `[,1]`, `[1 2]`, `[1}`, `{"a":1]`, `}`, `]`, `[[[]]`, `[]]`, `1 2`,
		`{"a":{"b":[{"c":null}]},"\u0061":2,"":3}`, "\"\x00\"", "\"\x7f\xff\"", "\ufeff{}", strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth),
		strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1), strings.Repeat(`{"a":[`, maxDepth/2) + strings.Repeat("]}", maxDepth/2), `[{"x":1},[2,[3]],"\"]"]`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		members := []entry{{key: "before"}}
		got := scanJSON(text, &members)
		if want := gjson.Valid(text) && deepest(text) <= maxDepth; got != want {
			t.Fatalf("%q: %t, want %t", text, got, want)
		}
		if got && !json.Valid([]byte(text)) {
			t.Fatalf("%q: encoding/json takes it for no JSON", text)
		}
		if scanJSON(text, nil) != got {
			t.Fatalf("%q: the answer depends on whether members are asked for", text)
		}
		if !got {
			return
		}
		want := []entry{{key: "before"}}
		c := cursor{s: text}
		if first := c.space(); first == '{' || first == '[' {
			c.each(func(key string) {
				start := c.i
				c.skip()
				want = append(want, entry{key, start, c.i})
			})
		}
		if !slices.Equal(members, want) {
			t.Errorf("%q: members %v, want %v", text, members, want)
		}
	})
}

// deepest is how deeply the brackets of text nest.
func deepest(text string) int {
	depth, most, inString := 0, 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '[' || c == '{':
			depth++
			most = max(most, depth)
		case c == ']' || c == '}':
			depth--
		}
	}
	return most
}
