package rules

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// CompileText compiles a statement and answers where each problem stands, in
// bytes.
func CompileText(text string) (spans [][2]int) {
	compile(text, func(d diagnostic) { spans = append(spans, [2]int{d.start, d.end}) })
	return spans
}

// BuildText loads files that are not on disk.
func BuildText(texts ...string) (*Set, []Problem) {
	var files []fileText
	for i, text := range texts {
		files = append(files, fileText{Path: fmt.Sprintf("rules%d.yaml", i), Text: text})
	}
	return build(files, LoadOptions{LookupEnv: func(string) (string, bool) { return "", false }})
}

// ReadLimited reads files as Load does, with other bounds for what a set is made of.
func ReadLimited(path string, files, bytes int) []Problem {
	return readWithin(limits{files, bytes}, []string{path}, false).problems
}

// Verdict is what is known of the WHERE of a statement without a message: "", "never" or
// "always".
func Verdict(sql string) string {
	c := &compiler{report: func(diagnostic) {}}
	st := parse(sql, c.report)
	c.from(st)
	c.layers = []*layer{{of: outputsOf, final: true}}
	j := judge{compiler: c}
	switch v := j.judge(st.where); {
	case v.part:
		return ""
	case v.verdict == never:
		return "never"
	case v.verdict == always:
		return "always"
	}
	return ""
}

// BothOrders runs a statement on a payload with WHERE first, if it allows that,
// and with SELECT first, and answers how each ended.
func BothOrders(sql string, payload []byte) (whereFirst bool, ends [2]string) {
	p := compile(sql, func(diagnostic) {})
	selectFirst := *p
	selectFirst.whereFirst = false
	for i, p := range []*program{p, &selectFirst} {
		e := &env{now: time.Now}
		e.reset(&Message{Topic: "t", ClientID: "c", Payload: payload}, payload)
		fired, err := p.first(e)
		ends[i] = fmt.Sprint(fired, err, e.mismatch)
		if fired {
			ends[i] += string(appendJSON(nil, objectOf(&e.out)))
		}
	}
	return p.whereFirst, ends
}

// MatchFilter is the topic match that the index is compared with.
func MatchFilter(filter, topic string) bool { return matchFilter(filter, topic) }

// Debounce is what stands between events of the file system and a reload.
func Debounce(done, changes <-chan struct{}, quiet time.Duration, fire func()) {
	debounce(done, changes, quiet, fire)
}

// FunctionNames are the functions that statements can call, sorted.
func FunctionNames() []string { return slices.Sorted(maps.Keys(functions)) }

// Arity is how many arguments a function takes at least and at most; -1 is any
// number.
func Arity(name string) [2]int {
	f := functions[name]
	if f.max == variadic {
		return [2]int{f.min, -1}
	}
	return [2]int{f.min, f.max}
}

// Runner runs a statement on a message, each time with the same memory, and answers how
// many rows it has.
func Runner(sql string, m *Message) func() int {
	p := compile(sql, func(diagnostic) {})
	e := &env{now: time.Now}
	return func() (rows int) {
		e.reset(m, m.Payload)
		e.start("r")
		for ok, err := p.first(e); ok && err == nil; ok, err = p.next(e) {
			rows++
		}
		return rows
	}
}
