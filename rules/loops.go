package rules

import (
	"maps"
	"slices"
	"strings"
)

// Rules that republish into their own FROM are kept from it when they run. That is
// no way to live, so a warning says where it can be seen in the files.
//
// What a variable in a topic stands for is not known. It is taken to be text within a
// level, and to lead to a filter that has another text in its place only if the
// filter agrees in a level that is known: alerts/${vin} may match alerts/v7, but
// ${site}/${vin} is not thought to match fleet/v7. The column topic stands for what FROM selects.

// checkLoops warns of rules that lead to themselves, directly or by way of others.
func (l *loader) checkLoops() {
	var rules []*ruleDecl
	for _, d := range l.order {
		if d.Enabled && d.program != nil && len(d.Rule.republishes) > 0 {
			rules = append(rules, d)
		}
	}
	leads, patience := leadsTo(rules), maxLoopSteps
	for i, d := range rules {
		if at, way := shortestLoop(leads, i, &patience); way != nil {
			through := ""
			for _, j := range way {
				through += " by way of " + quote(rules[j].Name) + ","
			}
			through = strings.ReplaceAll(strings.TrimSuffix(through, ","), ", by way of", ", then")
			d.file.warn(d.Rule.republishes[at].at, "republish-loop", "the rule is kept from what it has led to: narrow FROM, or republish to a topic that it does not select",
				"rule %s republishes into its own FROM%s", quote(d.Name), through)
		}
	}
}

// maxLoopSteps bounds how long leads, and then loops, are looked for: some thousand rules that might all
// lead to each other would be a matter of minutes, and the warning is not worth that.
const maxLoopSteps = 2_000_000

// lead is that an action of a rule publishes to topics which another may select.
type lead struct{ action, to int }

// leadsTo answers the leads of each rule. A rule of many is compared with those
// alone whose filters begin alike.
func leadsTo(rules []*ruleDecl) [][]lead {
	type selects struct {
		rule   int
		filter []string
	}
	begins := make(map[string][]selects)
	for i, d := range rules {
		for _, f := range d.filters {
			levels := strings.Split(f, "/")
			begins[levels[0]] = append(begins[levels[0]], selects{i, levels})
		}
	}
	firsts := slices.Sorted(maps.Keys(begins))
	leads, patience := make([][]lead, len(rules)), maxLoopSteps
	for i, d := range rules {
		seen := make(map[int]bool)
		for a := range d.Rule.republishes {
			for _, topic := range d.topics(d.Rule.republishes[a].topic) {
				for _, first := range firsts {
					if first != topic[0] && !strings.ContainsAny(first, "+#") && !strings.ContainsAny(topic[0], "+#") {
						continue
					}
					for _, f := range begins[first] {
						if patience--; patience < 0 {
							return leads
						}
						if !seen[f.rule] && mayMatch(topic, f.filter) {
							seen[f.rule] = true
							leads[i] = append(leads[i], lead{a, f.rule})
						}
					}
				}
			}
		}
	}
	return leads
}

// shortestLoop is the way from rule i back to itself: the action that it begins
// with, and the rules between, nil if there is no way.
func shortestLoop(leads [][]lead, i int, patience *int) (action int, way []int) {
	from := make(map[int]lead) // how a rule was reached, to being the rule before it
	for queue := []int{i}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		for _, l := range leads[at] {
			if *patience--; *patience < 0 {
				return 0, nil
			}
			if l.to == i {
				action, way = l.action, []int{}
				for ; at != i; at = from[at].to {
					way = append(way, at)
					action = from[at].action
				}
				slices.Reverse(way)
				return action, way
			}
			if _, ok := from[l.to]; !ok {
				from[l.to] = lead{l.action, at}
				queue = append(queue, l.to)
			}
		}
	}
	return 0, nil
}

// topics are the levels of the topics that the template stands for, with + for a
// variable, also within a level, and # for any number of levels.
func (d *ruleDecl) topics(t template) [][]string {
	topicIs := columnTopic(parse(d.SQL, func(diagnostic) {}))
	patterns := []string{""}
	for i, p := range t {
		whole := (i == 0 || strings.HasSuffix(t[i-1].text, "/")) && (i == len(t)-1 || strings.HasPrefix(t[i+1].text, "/"))
		var stands []string
		switch {
		case !p.isVar:
			stands = []string{p.text}
		case whole && len(d.filters) > 0 && len(p.path) == 1 && topicIs[p.path[0].key]:
			stands = d.filters
		default:
			stands = []string{"+"}
		}
		var longer []string
		for _, before := range patterns {
			for _, s := range stands {
				if longer = append(longer, before+s); len(longer) == maxPatterns {
					break
				}
			}
		}
		patterns = longer[:min(len(longer), maxPatterns)]
	}
	levels := make([][]string, len(patterns))
	for i, p := range patterns {
		levels[i] = strings.Split(p, "/")
	}
	return levels
}

// maxPatterns bounds what a template that has the topic in it several times may
// stand for.
const maxPatterns = 100

// columnTopic names the outputs that are the message's topic.
func columnTopic(st *statement) map[string]bool {
	is := make(map[string]bool)
	items := st.items
	if st.foreach {
		items = st.do
		is["topic"] = items == nil
	}
	for _, it := range items {
		if it.star {
			is["topic"] = true
			continue
		}
		name := ""
		if it.alias != nil && len(it.alias.steps) == 1 {
			name = it.alias.steps[0].key
		}
		topic := false
		switch x := it.x.(type) {
		case *ref:
			topic = len(x.steps) == 1 && x.root().key == "topic"
			if it.alias == nil && len(x.steps) == 1 {
				name = x.root().key
			}
		case *call:
			topic = x.name == "topic" && len(x.args) == 0
		}
		is[name] = topic
	}
	return is
}

// mayMatch reports whether the filter matches topics that the pattern stands for.
func mayMatch(topic, filter []string) bool {
	guesses, agrees := 0, 0
	for i := 0; ; i++ {
		switch {
		case i < len(filter) && filter[i] == "#":
			return guesses == 0 || agrees > 0
		case i < len(topic) && topic[i] == "#":
			return agrees > 0
		case i == len(filter) || i == len(topic):
			return len(filter) == len(topic) && (guesses == 0 || agrees > 0)
		case filter[i] == "+":
		case !strings.Contains(topic[i], "+"):
			if topic[i] != filter[i] {
				return false
			}
			agrees++
		default:
			if !fits(topic[i], filter[i]) {
				return false
			}
			guesses++
		}
	}
}

// fits reports whether text is the pattern with something in place of each +.
func fits(pattern, text string) bool {
	parts := strings.Split(pattern, "+")
	first, last := parts[0], parts[len(parts)-1]
	if len(text) < len(first)+len(last) || !strings.HasPrefix(text, first) || !strings.HasSuffix(text, last) {
		return false
	}
	text = text[len(first) : len(text)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		at := strings.Index(text, part)
		if at < 0 {
			return false
		}
		text = text[at+len(part):]
	}
	return true
}
