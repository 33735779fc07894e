package rules

import (
	"fmt"
	"time"
)

// RunTests runs tests that are not on disk, unless there is something wrong with
// them.
func RunTests(set *Set, text string) (failures []TestFailure, problems []Problem) {
	f := readTests(fileText{Path: "rules_test.yaml", Text: text}, set)
	if problems = f.shown(); HasErrors(problems) {
		return nil, problems
	}
	for _, t := range f.tests {
		failures = append(failures, (&Tests{set: set}).Run(t)...)
	}
	return failures, problems
}

// RunAndExplain runs a statement on columns, as a request of Eval has them, and explains
// that, and answers how each ended.
func RunAndExplain(sql string, event []byte) (run, told string) {
	p, failed := compileAlone(sql)
	if failed != "" {
		return failed, failed
	}
	of, _ := decodeJSON(string(event))
	columns, payload, err := eventColumns(of)
	if err != nil {
		return err.Error(), err.Error()
	}
	now := func() time.Time { return time.UnixMilli(1700000000000) }
	e := &env{now: now}
	e.reset(eventRow{columns}, payload)
	e.start("r")
	rows, _, err := p.rows(e, nil)
	if err != nil {
		rows = nil // the rule has failed as a whole
	}
	for _, row := range rows[:min(len(rows), maxShownRows)] {
		run += string(appendJSON(nil, row))
	}
	run += fmt.Sprint(len(rows) > 0, err, e.mismatch)

	set := newSet("", []*Rule{{Name: "r", Enabled: true, SQL: sql, program: p}}, nil)
	x := set.explain(explained{of: eventRow{columns}, payload: payload, cands: func(s *Set) []*Rule { return s.rules }, now: now})
	r := x.Rules[0]
	for _, row := range r.Rows {
		told += string(row)
	}
	told += fmt.Sprint(r.Fired, err, e.mismatch)
	if r.Fired == (r.Reason != "") || r.Fired != (r.Outcome == Matched) || (err != nil) != (r.Outcome != Matched && r.Outcome != NoMatch) {
		told += fmt.Sprintf(" outcome %q, reason %q", r.Outcome, r.Reason)
	}
	return run, told
}
