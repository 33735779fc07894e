package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// maxExplained bounds the payload that explain reads, as MQTT does.
const maxExplained = 256 << 20

// runExplain says for one message why each rule fires or not.
func runExplain(_ context.Context, c *cli, args []string) int {
	fs := c.flags("explain")
	m := rules.Message{ID: strings.Repeat("0", 31) + "1", Node: "broker@explain", Timestamp: time.Now()}
	fs.StringVar(&m.Topic, "topic", "", "`TOPIC` that the message is published to")
	payload := fs.String("payload", "", "`PAYLOAD` of the message; @FILE: what the file holds; -: what standard input does")
	fs.StringVar(&m.ClientID, "clientid", "test", "`CLIENTID` of the publisher")
	username := fs.String("username", "", "`USERNAME` of the publisher")
	qos := fs.Int("qos", 0, "0, 1 or 2")
	only := fs.String("rule", "", "only this rule, by `NAME`")
	asJSON := fs.Bool("json", false, "write JSON")
	paths, code, done := c.parseMixed(fs, args)
	if done {
		return code
	}
	switch {
	case m.Topic == "":
		return c.misuse("explain: say which -topic the message is published to")
	case strings.ContainsAny(m.Topic, "+#\x00"):
		return c.misuse("explain: -topic %q is no topic to publish to: it holds a wildcard or NUL", m.Topic)
	case *qos < 0 || *qos > 2:
		return c.misuse("explain: -qos must be 0, 1 or 2, found %d", *qos)
	}
	m.QoS, m.Username, m.HasUsername = byte(*qos), *username, *username != ""
	if len(paths) == 0 {
		if fi, err := os.Stat("rules.d"); err != nil || !fi.IsDir() {
			return c.misuse("explain: no path, and no folder rules.d here")
		}
		paths = []string{"rules.d"}
	}
	var err error
	if m.Payload, err = c.payload(*payload); err != nil {
		return c.fail(fmt.Errorf("read -payload: %w", err), "")
	}
	set, problems := rules.Load(paths, ruleOptions(c.env, 0, false, nil))
	if set == nil {
		if err := rules.Print(c.stderr, problems); err != nil {
			return c.fail(err, "")
		}
		fmt.Fprintln(c.stderr, "error: the files have problems; nothing was explained")
		return exitProblem
	}
	x := set.Explain(&m)
	if *only != "" {
		var names []string
		for _, r := range set.Rules() {
			names = append(names, r.Name)
		}
		if !slices.Contains(names, *only) {
			hint := ""
			if s := rules.Suggest(*only, names); s != "" {
				hint = "did you mean " + s + "?"
			}
			return c.fail(fmt.Errorf("there is no rule %q", *only), hint)
		}
		x = onlyRule(x, *only)
	}
	if *asJSON {
		return c.writeJSON(x)
	}
	if err := printExplanation(c.stdout, &m, x); err != nil {
		return c.fail(fmt.Errorf("write explanation: %w", err), "")
	}
	return exitOK
}

// onlyRule leaves out what is not about the rule: what others republish is where it runs on that.
func onlyRule(x rules.Explanation, name string) rules.Explanation {
	other := func(r rules.RuleExplanation) bool { return r.Rule != name }
	x.Rules = slices.DeleteFunc(x.Rules, other)
	x.Republished = slices.DeleteFunc(x.Republished, func(r rules.RepublishExplanation) bool {
		return r.By != name && !slices.ContainsFunc(r.Rules, func(r rules.RuleExplanation) bool { return !other(r) })
	})
	for i := range x.Republished {
		if r := &x.Republished[i]; r.By != name {
			r.Rules = slices.DeleteFunc(r.Rules, other)
		}
	}
	return x
}

// payload is what -payload says.
func (c *cli) payload(text string) ([]byte, error) {
	var from io.Reader
	name, isFile := strings.CutPrefix(text, "@")
	switch {
	case isFile:
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close() // only read
		from = f
	case text == "-":
		from = c.stdin
	default:
		return []byte(text), nil
	}
	all, err := io.ReadAll(io.LimitReader(from, maxExplained+1))
	if err == nil && len(all) > maxExplained {
		err = errors.New("larger than a message can be")
	}
	return all, err
}

// explainer writes an explanation for people: a line for each rule, and below it how that came about.
type explainer struct {
	*bufio.Writer
	ran   bool            // the rule before
	noted map[string]bool // with its term
}

func printExplanation(w io.Writer, m *rules.Message, x rules.Explanation) error {
	p := explainer{Writer: bufio.NewWriter(w), ran: true}
	about := counted(len(m.Payload), "byte") + " of JSON"
	if x.PayloadProblem != "" {
		about = counted(len(m.Payload), "byte") + ", no JSON: " + printable(x.PayloadProblem)
	}
	fmt.Fprintf(p, "topic %s, clientid %s, qos %d, payload of %s\n", printable(m.Topic), printable(m.ClientID), m.QoS, about)
	for i := range x.Rules {
		p.rule(&x.Rules[i], "")
	}
	for _, r := range x.Republished {
		fmt.Fprintf(p, "\nrepublished by %s: topic %s, qos %d, retain %t\n  %s\n", r.By, printable(r.Topic), r.QoS, r.Retain, shortened(r.Payload))
		for i := range r.Rules {
			p.rule(&r.Rules[i], "  ")
		}
		if len(r.Rules) == 0 {
			fmt.Fprintln(p, "  no rule selects from it")
		}
	}
	return p.Flush()
}

func (p *explainer) rule(r *rules.RuleExplanation, indent string) {
	ran := r.Outcome != "" // else one line is all there is to say
	if ran || p.ran {
		fmt.Fprintln(p)
	}
	p.ran, p.noted = ran, make(map[string]bool)
	line := func(format string, args ...any) { fmt.Fprintf(p, indent+format+"\n", args...) }
	if r.Fired {
		messages := ""
		if r.Messages > 0 {
			messages = ", " + counted(r.Messages, "message")
		}
		line("%s: fired: %s, %s%s", r.Rule, counted(len(r.Rows)+r.RowsNotShown, "row"), counted(len(r.Requests), "request"), messages)
	} else {
		line("%s: did not fire: %s", r.Rule, printable(r.Reason))
	}
	if !ran {
		if len(r.Sources) > 1 { // the reason of a single one is in the line
			for _, s := range r.Sources {
				line("  %s", printable(s.Why))
			}
		}
		return
	}
	indent += "  "
	line("at %s:%d, outcome %s", printable(r.File), r.Line, r.Outcome)
	for _, s := range r.Sources {
		if s.Matched {
			line("FROM %q", printable(s.Name))
		}
	}
	if r.Where != nil {
		line("WHERE")
		p.term(*r.Where, indent+"  ")
	}
	for i, e := range r.Elements {
		line("element %d: %s", i+1, shortened(string(e.Value)))
		p.term(e.Incase, indent+"  ")
	}
	if r.ElementsNotShown > 0 {
		line("and %s", counted(r.ElementsNotShown, "more element"))
	}
	for _, u := range r.Undefined {
		line("undefined: %s", printable(u))
	}
	for _, c := range r.Converted {
		if !p.noted[c] {
			line("converted: %s", printable(c))
		}
	}
	for _, row := range r.Rows {
		line("row %s", shortened(string(row)))
	}
	if r.RowsNotShown > 0 {
		line("and %s", counted(r.RowsNotShown, "more row"))
	}
	for _, q := range r.Requests {
		id, lane := "an id of its own", "no lane"
		if q.ID != "" {
			id = "id " + printable(q.ID)
		}
		if q.Ordered {
			lane = "lane " + printable(q.Lane)
		}
		line("request to %s, %s, %s", q.Destination, id, lane)
		line("  %s %s", q.Method, shortened(q.URL))
		for _, h := range q.Headers {
			line("  %s: %s", h.Name, shortened(h.Value))
		}
		for _, name := range q.LeftOut {
			line("  %s: left out, HTTP can't carry its value", name)
		}
		if q.Body != "" {
			line("  %s", shortened(q.Body))
		}
	}
	for _, why := range r.NotRepublished {
		line("not republished: %s", printable(why))
	}
}

// term writes a condition, what it is made of below it.
func (p *explainer) term(t rules.Term, indent string) {
	if t.Op != "" {
		fmt.Fprintf(p, "%s%s: %s\n", indent, t.Op, t.Result)
		for _, part := range t.Terms {
			p.term(part, indent+"  ")
		}
		return
	}
	values := ""
	for i, v := range t.Values {
		values += map[bool]string{true: " (", false: ", "}[i == 0] + v.String()
	}
	if values != "" {
		values += ")"
	}
	if t.Note != "" {
		values += ": " + t.Note
		p.noted[t.Text+": "+t.Note] = true
	}
	fmt.Fprintf(p, "%s%s: %s%s\n", indent, printable(t.Text), t.Result, printable(values))
}
