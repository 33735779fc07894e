package rules

import (
	"cmp"
	"slices"
	"strings"
)

// checkFilter says what is wrong with a topic filter, "" if nothing is. MQTT 5
// section 4.7.
func checkFilter(filter string) string {
	switch {
	case filter == "":
		return "a topic filter must not be empty"
	case len(filter) > 65535:
		return "a topic filter has at most 65,535 bytes"
	case strings.ContainsRune(filter, 0):
		return "a topic filter must not contain the NUL character"
	case strings.HasPrefix(filter, "$share/"):
		return "a rule cannot read a shared subscription"
	}
	levels := strings.Split(filter, "/")
	for i, l := range levels {
		switch {
		case l == "#" && i < len(levels)-1:
			return "# must be the last level of a topic filter"
		case l != "#" && strings.Contains(l, "#"), l != "+" && strings.Contains(l, "+"):
			return "a wildcard must be a whole level of a topic filter"
		}
	}
	return ""
}

// matchFilter reports whether a topic filter matches a topic name. A leading
// wildcard does not match a topic that begins with $ [MQTT-4.7.2-1].
func matchFilter(filter, topic string) bool {
	if strings.HasPrefix(topic, "$") && (strings.HasPrefix(filter, "+") || strings.HasPrefix(filter, "#")) {
		return false
	}
	for {
		f, filterRest, moreFilter := strings.Cut(filter, "/")
		if f == "#" {
			return !moreFilter
		}
		t, topicRest, moreTopic := strings.Cut(topic, "/")
		if f != "+" && f != t {
			return false
		}
		switch {
		case !moreFilter:
			return !moreTopic
		case !moreTopic:
			return filterRest == "#" // a/# matches a
		}
		filter, topic = filterRest, topicRest
	}
}

// moreSpecific sorts the filters that match one topic, most specific first: at
// the first level that differs a name beats +, and + beats #.
func moreSpecific(a, b string) int {
	return slices.CompareFunc(strings.Split(a, "/"), strings.Split(b, "/"), func(x, y string) int {
		return cmp.Compare(wildness(x), wildness(y))
	})
}

func wildness(level string) int {
	switch level {
	case "+":
		return 1
	case "#":
		return 2
	}
	return 0
}

// topicIndex finds the filters that match a topic by walking its levels, so that
// filters of other topics cost nothing.
type topicIndex struct {
	root topicNode
}

type topicNode struct {
	levels map[string]*topicNode
	plus   *topicNode
	rest   []indexed // filters that end with # here
	here   []indexed // filters that end here
}

// indexed is a rule under one of its filters. Ranks sort by how specific the
// filter is, then by the rule's name.
type indexed struct {
	rule *Rule
	rank int
}

func newTopicIndex(rules []*Rule) *topicIndex {
	type pair struct {
		filter string
		rule   *Rule
	}
	var all []pair
	for _, r := range rules {
		for _, f := range r.filters {
			all = append(all, pair{f, r})
		}
	}
	slices.SortFunc(all, func(a, b pair) int {
		return cmp.Or(moreSpecific(a.filter, b.filter), strings.Compare(a.rule.Name, b.rule.Name))
	})
	x := &topicIndex{}
	for rank, p := range all {
		x.add(p.filter, indexed{p.rule, rank})
	}
	return x
}

func (x *topicIndex) add(filter string, e indexed) {
	n := &x.root
	for level := range strings.SplitSeq(filter, "/") {
		switch level {
		case "#":
			n.rest = append(n.rest, e)
			return
		case "+":
			if n.plus == nil {
				n.plus = &topicNode{}
			}
			n = n.plus
		default:
			next := n.levels[level]
			if next == nil {
				if n.levels == nil {
					n.levels = make(map[string]*topicNode)
				}
				next = &topicNode{}
				n.levels[level] = next
			}
			n = next
		}
	}
	n.here = append(n.here, e)
}

// find appends the rules whose filters match topic, most specific filter first,
// each rule once.
func (x *topicIndex) find(dst []*Rule, topic string) []*Rule {
	var few [16]indexed
	found := x.root.collect(few[:0], topic, strings.HasPrefix(topic, "$"))
	slices.SortFunc(found, func(a, b indexed) int { return cmp.Compare(a.rank, b.rank) })
	from := len(dst)
	for _, e := range found {
		if len(e.rule.filters) > 1 && slices.Contains(dst[from:], e.rule) {
			continue
		}
		dst = append(dst, e.rule)
	}
	return dst
}

// collect appends what matches the levels of topic from n on. noWildcards keeps
// a leading wildcard from matching a topic that begins with $ [MQTT-4.7.2-1].
func (n *topicNode) collect(dst []indexed, topic string, noWildcards bool) []indexed {
	if !noWildcards {
		dst = append(dst, n.rest...)
	}
	level, rest, more := strings.Cut(topic, "/")
	if next := n.levels[level]; next != nil {
		dst = next.follow(dst, rest, more)
	}
	if n.plus != nil && !noWildcards {
		dst = n.plus.follow(dst, rest, more)
	}
	return dst
}

func (n *topicNode) follow(dst []indexed, rest string, more bool) []indexed {
	if more {
		return n.collect(dst, rest, false)
	}
	dst = append(dst, n.here...)
	return append(dst, n.rest...) // a/# matches a
}
