package rules

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// loader makes rules and destinations of files. Names are resolved once all files
// are read, since a rule may send to a destination of another file.
type loader struct {
	options      LoadOptions
	files        []*file
	destinations map[string]*destinationDecl
	rules        map[string]*ruleDecl
	order        []*ruleDecl // as read
	reading      string      // the destination that is being read
	secrets      map[secretRef]string
	guesses      int
}

type destinationDecl struct {
	Destination
	file    *file
	key     *yaml.Node
	used    bool
	request *request
	// fixedPath and fixedQuery are what is appended to the url of every request.
	fixedPath, fixedQuery string
	// reads are the outputs that request needs, each once.
	reads []string
}

// ruleDecl is a rule whose actions are not resolved yet.
type ruleDecl struct {
	Rule
	file    *file
	name    *yaml.Node
	actions []actionDecl
}

type actionDecl struct {
	http     string
	at       *yaml.Node // of the destination's name
	id       *yaml.Node
	body     *yaml.Node
	template *yaml.Node
}

func newLoader(o LoadOptions) *loader {
	if o.LookupEnv == nil {
		o.LookupEnv = os.LookupEnv
	}
	return &loader{options: o, destinations: make(map[string]*destinationDecl), rules: make(map[string]*ruleDecl), secrets: make(map[secretRef]string)}
}

func (l *loader) read(t fileText) {
	f := &file{path: t.Path}
	l.files = append(l.files, f)
	root := f.open(t.Text)
	if root == nil {
		return
	}
	f.fields(root, "a rule file",
		field{"destinations", func(_, n *yaml.Node) {
			f.mapping(n, "destinations", func(key, val *yaml.Node) { l.destination(f, key, val) })
		}},
		field{"rules", func(_, n *yaml.Node) {
			f.elements(n, "rules", func(n *yaml.Node) { l.rule(f, n) })
		}},
	)
}

// maxName bounds the names of rules and destinations: they are labels of metrics.
const maxName = 64

// checkName allows what is safe in metric labels, logs and paths alike.
func checkName(f *file, n *yaml.Node, what string) bool {
	name := n.Value
	plain := !strings.ContainsFunc(name, func(r rune) bool {
		return r > 127 || !isLetter(byte(r)) && !isDigit(byte(r)) && !strings.ContainsRune("-_.", r)
	})
	if name == "" || len(name) > maxName || !plain {
		f.fail(n, "bad-name", fmt.Sprintf("a name has 1 to %d letters, digits, -, _ and points", maxName), "bad name of a %s: %s", what, describeNode(n))
		return false
	}
	return true
}

func (l *loader) rule(f *file, n *yaml.Node) {
	d := &ruleDecl{Rule: Rule{Enabled: true, File: f.path, Line: n.Line}, file: f}
	var sql, actions *yaml.Node
	ok := f.fields(n, "a rule",
		field{"name", func(_, n *yaml.Node) {
			if text, ok := f.text(n, "name"); ok && checkName(f, n, "rule") {
				d.Name, d.name = text, n
			} else {
				d.name = n
			}
		}},
		field{"description", func(_, n *yaml.Node) { d.Description, _ = f.text(n, "description") }},
		field{"enabled", func(_, n *yaml.Node) { f.bool(n, "enabled", &d.Enabled) }},
		field{"sql", func(_, n *yaml.Node) {
			sql = n
			var ok bool
			if d.SQL, ok = f.text(n, "sql"); ok && !f.isLost() {
				d.program = compile(d.SQL, func(p diagnostic) { f.within(n, p) })
			}
		}},
		field{"actions", func(_, n *yaml.Node) { actions = n }},
	)
	if !ok {
		return
	}
	for _, missing := range []struct {
		name, hint string
		node       *yaml.Node
	}{
		{"name", "name: hard-brake", d.name},
		{"sql", `sql: SELECT * FROM "fleet/+/telemetry"`, sql},
		{"actions", "actions: [{http: DESTINATION}]", actions},
	} {
		if missing.node == nil {
			f.fail(n, "missing-key", missing.hint, "a rule needs %s", quote(missing.name))
		}
	}
	if actions != nil {
		f.elements(actions, "actions", func(n *yaml.Node) { l.action(f, d, n) })
		if actions.Kind == yaml.SequenceNode && len(actions.Content) == 0 {
			f.fail(actions, "missing-key", "actions: [{http: DESTINATION}]", "a rule needs at least one action")
		}
	}
	if d.Name != "" {
		l.declare(d)
	}
}

func (l *loader) declare(d *ruleDecl) {
	if first, ok := l.rules[d.Name]; ok {
		d.file.fail(d.name, "doubled-rule", fmt.Sprintf("it is already at %s:%d", first.file.path, first.name.Line), "doubled rule %s", quote(d.Name))
		return
	}
	l.rules[d.Name] = d
	l.order = append(l.order, d)
}

func (l *loader) action(f *file, d *ruleDecl, n *yaml.Node) {
	var a actionDecl
	var republish *yaml.Node
	var templateKey *yaml.Node
	ok := f.fields(n, "an action",
		field{"http", func(_, n *yaml.Node) {
			a.at = n
			a.http, _ = f.text(n, "http")
		}},
		field{"id", func(_, n *yaml.Node) { a.id = n }},
		field{"body", func(_, n *yaml.Node) { a.body = n }},
		field{"body_template", func(key, n *yaml.Node) {
			a.template = n
			templateKey = key
		}},
		field{"republish", func(_, n *yaml.Node) { republish = n }},
	)
	if !ok {
		return
	}
	if republish != nil {
		if a != (actionDecl{}) {
			f.fail(n, "two-actions", "make each an element of actions", "one action both republishes and sends")
		}
		l.republish(f, d, republish)
		return
	}
	if a.at == nil {
		f.fail(n, "missing-key", "- http: DESTINATION", "an action needs %s or %s", quote("http"), quote("republish"))
		return
	}
	if a.body != nil && a.template != nil {
		f.fail(templateKey, "two-bodies", "", "body and body_template both make the body")
		return
	}
	d.actions = append(d.actions, a)
}

// resolve connects rules with destinations.
func (l *loader) resolve() {
	for _, d := range l.order {
		for _, a := range d.actions {
			l.connect(d, a)
		}
		d.outcomes = &Outcomes{}
		if before := l.options.Previous.ruleNamed(d.Name); before != nil {
			d.outcomes = before.outcomes
		}
	}
	l.checkLoops()
	for _, d := range l.destinations {
		if !d.used {
			d.file.warn(d.key, "unused-destination", "remove it, or look whether the rule that did was renamed or has an error", "no rule sends to destination %s", quote(d.Name))
		}
	}
}

func (s *Set) ruleNamed(name string) *Rule {
	if s == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(s.rules, name, func(r *Rule, name string) int { return cmp.Compare(r.Name, name) })
	if !ok {
		return nil
	}
	return s.rules[i]
}

func (l *loader) connect(d *ruleDecl, a actionDecl) {
	to, ok := l.destinations[a.http]
	if !ok && a.http != "" {
		d.file.fail(a.at, "unknown-destination", l.meantDestination(a.http), "unknown destination %s", quote(a.http))
	}
	b := bodyReader{file: d.file, program: d.program}
	done := action{body: rowBody}
	if a.id != nil {
		if text, ok := d.file.text(a.id, "id"); ok {
			done.id = b.template(a.id, text)
		}
	}
	if a.body != nil {
		done.body = b.read(a.body)
	}
	var raw template
	if a.template != nil {
		if text, ok := d.file.text(a.template, "body_template"); ok {
			raw = b.raw(a.template, text)
			done.body = rawBody(raw)
		}
	}
	if !ok {
		return
	}
	to.used = true
	done.destination = &to.Destination
	if to.request != nil {
		done.request = to.request
		b.checkReads(a.at, to)
	}
	switch {
	case to.bodiless() && (a.body != nil || a.template != nil):
		b.file.warn(cmp.Or(a.body, a.template), "body-not-sent", "", "destination %s has method %s, which sends no body", quote(to.Name), to.Method)
	case a.body != nil:
		b.checkTraceFields(a.body, to.TraceBody)
	case a.template != nil:
		b.checkRawTraceFields(a.template, raw, to.TraceBody)
	}
	d.Rule.actions = append(d.Rule.actions, done)
}

// maxGuesses is how many unknown destinations get a hint: each is compared with all
// that there are.
const maxGuesses = 200

func (l *loader) meantDestination(name string) string {
	if l.guesses++; l.guesses > maxGuesses {
		return ""
	}
	return didYouMean(name, slices.Sorted(maps.Keys(l.destinations)))
}

func (l *loader) ruleList() []*Rule {
	rules := make([]*Rule, 0, len(l.order))
	for _, d := range l.order {
		rules = append(rules, &d.Rule)
	}
	slices.SortFunc(rules, func(a, b *Rule) int { return cmp.Compare(a.Name, b.Name) })
	markTraceReaders(rules)
	return rules
}

func (l *loader) destinationList() []Destination {
	list := make([]Destination, 0, len(l.destinations))
	for _, d := range l.destinations {
		list = append(list, d.Destination)
	}
	slices.SortFunc(list, func(a, b Destination) int { return cmp.Compare(a.Name, b.Name) })
	return list
}
