package history_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/bridge/history"
)

// play makes a history of lines:
//
//	send MARKER            the trace is t-MARKER, or what follows a slash
//	ack MARKER
//	refuse MARKER
//	got MARKER ID ATTEMPT RUN ANSWER [sw8=...] [body=...]    the id - is none
//	crash RUN
//	bury ID
//
// The first letter of a marker is its lane, but for o..., which has none. Those named q... don't match, and the action sets
// the id of those named n... to the marker.
func play(t *testing.T, script string) *history.Log {
	t.Helper()
	answers := map[string]history.Answer{
		"none": history.None, "taken": history.Taken, "doubtful": history.Doubtful,
		"failed": history.Failed, "poison": history.Poison, "gone": history.Gone,
	}
	l := &history.Log{}
	copies := map[string][]*history.Copy{}
	for i, line := range strings.Split(strings.TrimSpace(script), "\n") {
		f := strings.Fields(line)
		marker, trace, _ := strings.Cut(f[1], "/")
		if trace == "" {
			trace = "t-" + marker
		}
		pop := func() *history.Copy {
			c := copies[f[1]][0]
			copies[f[1]] = copies[f[1]][1:]
			return c
		}
		switch f[0] {
		case "send":
			m := history.Message{Marker: marker, Lane: marker[:1], Matches: marker[0] != 'q'}
			switch m.Lane {
			case "n":
				m.ID = marker
			case "o":
				m.Lane = ""
			}
			copies[f[1]] = append(copies[f[1]], l.Publish(m, trace))
		case "ack":
			pop().Acknowledge()
		case "refuse":
			pop().Refuse()
		case "got":
			d := history.Delivery{Marker: marker, Trace: trace, ID: f[2], Attempt: number(t, f[3]), Run: number(t, f[4])}
			d.SW8, d.Body = fmt.Sprint("span ", i), marker
			if d.ID == "-" {
				d.ID = ""
			}
			for _, extra := range f[6:] {
				switch key, value, _ := strings.Cut(extra, "="); key {
				case "sw8":
					d.SW8 = value
				case "body":
					d.Body = value
				default:
					t.Fatalf("line %q", line)
				}
			}
			a := l.Receive(d)
			if answers[f[5]] != history.None {
				a.Answer(answers[f[5]])
			}
		case "crash":
			l.Crash(number(t, f[1]))
		case "bury":
			l.Bury(f[1])
		default:
			t.Fatalf("line %q", line)
		}
	}
	return l
}

func number(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

const twoAcknowledged = "send a1\nsend a2\nack a1\nack a2\n"

func TestCheckFindsNothingWrong(t *testing.T) {
	for _, tt := range []struct{ name, script string }{
		{"nothing", "crash 1"},
		{"delivered", twoAcknowledged + "got a1 1 1 1 taken\ngot a2 2 1 1 taken"},
		{"unacknowledged, never stored", "send a1\nsend a2\nack a2\ngot a2 2 1 1 taken"},
		{"unacknowledged, stored all the same", "send a1\ngot a1 1 1 1 taken"},
		{"lanes are independent", "send a1\nsend b1\nack a1\nack b1\ngot b1 2 1 1 taken\ngot a1 1 1 1 taken"},
		{"without a lane in any order", "send o1\nsend o2\nack o1\nack o2\ngot o2 2 1 1 taken\ngot o1 1 1 1 taken"},
		{"no match", "send q1\nack q1"},
		{"refused", "send a1\nrefuse a1\nsend a2\nack a2\ngot a2 2 1 1 taken"},
		{"failed, then taken", twoAcknowledged + "got a1 1 1 1 failed\ngot a1 1 2 1 none\ngot a1 1 3 1 taken\ngot a2 2 1 1 taken"},
		{"answer lost", twoAcknowledged + "got a1 1 1 1 doubtful\ngot a1 1 2 1 taken\ngot a2 2 1 1 taken"},
		{"a 2xx cut short, and believed", twoAcknowledged + "got a1 1 1 1 doubtful\ngot a2 2 1 1 taken"},
		{"repeated by the transport", "send a1\nack a1\ngot a1 1 1 1 none sw8=s\ngot a1 1 1 1 taken sw8=s"},
		{"poison", twoAcknowledged + "got a1 1 1 1 poison\ngot a1 1 2 1 poison\ngot a1 1 3 1 poison\ngot a2 2 1 1 taken\nbury 1"},
		{"gone", twoAcknowledged + "got a1 1 1 1 gone\ngot a2 2 1 1 taken\nbury 1"},
		{"a request on its way for too long", twoAcknowledged + "got a1 1 2 1 taken\ngot a2 2 1 1 taken\ngot a1 1 1 1 none"},
		{"and answered", twoAcknowledged + "got a1 1 2 1 failed\ngot a1 1 1 1 taken\ngot a1 1 3 1 taken\ngot a2 2 1 1 taken"},
		{
			"the last ones again after a crash",
			twoAcknowledged + "send a3\nack a3\ngot a1 1 1 1 taken\ngot a2 2 1 1 taken\ncrash 1\n" +
				"got a1 1 1 2 taken\ngot a2 2 1 2 taken\ngot a3 3 1 2 taken",
		},
		{
			"the last of them alone",
			twoAcknowledged + "got a1 1 1 1 taken\ngot a2 2 1 1 taken\ncrash 1\ngot a2 2 1 2 taken",
		},
		{
			"on its way while the broker was killed",
			twoAcknowledged + "got a1 1 1 1 taken\ncrash 1\ngot a1 1 1 2 taken\ngot a2 2 1 1 none\ngot a2 2 1 2 taken",
		},
		{
			"a dead letter does not come again with the others",
			twoAcknowledged + "send a3\nack a3\ngot a1 1 1 1 taken\ngot a2 2 1 1 gone\ngot a3 3 1 1 taken\ncrash 1\n" +
				"got a1 1 1 2 taken\ngot a3 3 1 2 taken\nbury 2",
		},
		{
			"sent again, and both stored",
			"send a1/x\ncrash 1\nsend a1/y\nack a1/y\ngot a1/x 1 1 2 taken\ngot a1/y 2 1 2 taken",
		},
		{
			"sent again, the same bytes, the second alone stored",
			"send a1\ncrash 1\nsend a1\nsend a2\nack a1\nack a2\ngot a1 2 1 2 taken\ngot a2 3 1 2 taken",
		},
		{
			"sent again behind another",
			"send a1\nsend a2\nack a2\ncrash 1\nsend a1\nack a1\ngot a1 1 1 2 taken\ngot a2 2 1 2 taken\ngot a1 3 1 2 taken",
		},
		{
			"an id of the action's",
			"send n1/x\ncrash 1\nsend n1/y\nack n1/y\ngot n1/x n1 1 2 taken\ngot n1/y n1 1 2 taken",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := play(t, tt.script)
			for _, v := range l.Check() {
				t.Error(v)
			}
			if n := l.Owed(); n != 0 {
				t.Errorf("%d owed", n)
			}
		})
	}
}

func TestCheckFindsWhatIsWrong(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		want         []history.Rule
	}{
		{"lost", twoAcknowledged + "got a1 1 1 1 taken", []history.Rule{history.Lost}},
		{"lost in the middle", twoAcknowledged + "send a3\nack a3\ngot a1 1 1 1 taken\ngot a3 3 1 1 taken", []history.Rule{history.Lost}},
		{"never taken", "send a1\nack a1\ngot a1 1 1 1 failed", []history.Rule{history.Lost}},
		{"never answered", "send a1\nack a1\ngot a1 1 1 1 none", []history.Rule{history.Lost}},
		{"poison that is no dead letter", "send a1\nack a1\ngot a1 1 1 1 poison\ngot a1 1 2 1 poison\ngot a1 1 3 1 poison", []history.Rule{history.Lost}},
		{
			"the first copy came, the acknowledged one did not",
			"send a1/x\nsend a1/y\nack a1/y\ngot a1/x 1 1 1 taken",
			[]history.Rule{history.Lost},
		},
		{"one of two that look alike", "send a1\nsend a1\nack a1\nack a1\ngot a1 1 1 1 taken", []history.Rule{history.Lost}},
		{"nobody published it", twoAcknowledged + "got a1 1 1 1 taken\ngot a9 9 1 1 taken\ngot a2 2 1 1 taken", []history.Rule{history.NotPublished}},
		{"doesn't match", "send q1\nack q1\ngot q1 1 1 1 taken", []history.Rule{history.NotMatching}},
		{"refused and delivered", "send a1\nrefuse a1\ngot a1 1 1 1 taken", []history.Rule{history.Refused}},
		{"two records of one publish", "send a1\nack a1\ngot a1 1 1 1 taken\ngot a1 2 1 1 taken", []history.Rule{history.Identity, history.Order}},
		{"another id after a crash", "send a1\nack a1\ngot a1 1 1 1 taken\ncrash 1\ngot a1 2 1 2 taken", []history.Rule{history.Identity, history.Order}},
		{"one id for two", twoAcknowledged + "got a1 1 1 1 taken\ngot a2 1 1 1 taken", []history.Rule{history.Identity, history.Lost}},
		{"no id", "send a1\ngot a1 - 1 1 taken", []history.Rule{history.Identity}},
		{"not the action's id", "send n1\nack n1\ngot n1 other 1 1 taken", []history.Rule{history.Identity, history.Lost}},
		{"another body", "send a1\nack a1\ngot a1 1 1 1 failed\ngot a1 1 2 1 taken body=x", []history.Rule{history.Content}},
		{"attempt zero", "send a1\nack a1\ngot a1 1 0 1 taken", []history.Rule{history.Content}},
		{"a number twice", "send a1\nack a1\ngot a1 1 1 1 failed\ngot a1 1 1 1 taken", []history.Rule{history.Content}},
		{"another trace", "send a1\nack a1\ngot a1/other 1 1 1 taken", []history.Rule{history.Trace, history.Lost}},
		{
			"the other copy's trace",
			"send a1/x\nsend a1/y\nack a1/x\ngot a1/x 1 1 1 taken\ngot a1/y 1 2 1 taken",
			[]history.Rule{history.Trace},
		},
		{"a span twice", twoAcknowledged + "got a1 1 1 1 taken sw8=s\ngot a2 2 1 1 taken sw8=s", []history.Rule{history.Trace}},
		{"a span again", "send a1\nack a1\ngot a1 1 1 1 failed sw8=s\ngot a1 1 2 1 taken sw8=s", []history.Rule{history.Trace}},
		{"swapped", twoAcknowledged + "got a2 2 1 1 taken\ngot a1 1 1 1 taken", []history.Rule{history.Order}},
		{
			"a copy before its publish",
			"send a1/x\nsend a2\nack a2\nsend a1/y\nack a1/y\ngot a1/y 1 1 1 taken\ngot a2 2 1 1 taken",
			[]history.Rule{history.Order},
		},
		{"not waited for", twoAcknowledged + "got a1 1 1 1 failed\ngot a2 2 1 1 taken\ngot a1 1 2 1 taken", []history.Rule{history.Order, history.Order}},
		{"a hanging one not waited for", twoAcknowledged + "got a1 1 1 1 none\ngot a2 2 1 1 taken\ngot a1 1 2 1 taken", []history.Rule{history.Order, history.Order}},
		{"poison given up too early", twoAcknowledged + "got a1 1 1 1 poison\ngot a1 1 2 1 poison\ngot a2 2 1 1 taken\nbury 1", []history.Rule{history.Order}},
		{
			"not waited for after a crash",
			twoAcknowledged + "got a1 1 1 1 failed\ncrash 1\ngot a2 2 1 2 taken\ngot a1 1 2 2 taken",
			[]history.Rule{history.Order, history.Order},
		},
		{
			"one left out after a crash",
			twoAcknowledged + "send a3\nack a3\ngot a1 1 1 1 taken\ngot a2 2 1 1 taken\ngot a3 3 1 1 taken\ncrash 1\n" +
				"got a1 1 1 2 taken\ngot a3 3 1 2 taken",
			[]history.Rule{history.Order},
		},
		{
			"in another order after a crash",
			twoAcknowledged + "got a1 1 1 1 taken\ngot a2 2 1 1 taken\ncrash 1\ngot a2 2 1 2 taken\ngot a1 1 1 2 taken",
			[]history.Rule{history.Order},
		},
		{
			"back although a run went on behind it",
			twoAcknowledged + "got a1 1 1 1 taken\ngot a2 2 1 1 taken\ncrash 1\ngot a2 2 1 2 taken\ncrash 2\ngot a1 1 1 3 taken\ngot a2 2 1 3 taken",
			[]history.Rule{history.Duplicate},
		},
		{"again without a crash", "send a1\nack a1\ngot a1 1 1 1 taken\ngot a1 1 2 1 taken", []history.Rule{history.Duplicate}},
		{"again after a stop", "send a1\nack a1\ngot a1 1 1 1 taken\ngot a1 1 1 2 taken", []history.Rule{history.Duplicate}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := play(t, tt.script)
			wantRules(t, l, tt.want)
			if lost := slices.Contains(tt.want, history.Lost); l.Owed() > 0 != lost && len(tt.want) == 1 {
				t.Errorf("%d owed, lost: %v", l.Owed(), lost)
			}
		})
	}
}

func wantRules(t *testing.T, l *history.Log, want []history.Rule) {
	t.Helper()
	found := l.Check()
	var rules []history.Rule
	for _, v := range found {
		rules = append(rules, v.Rule)
	}
	slices.Sort(rules)
	if want = slices.Sorted(slices.Values(want)); !slices.Equal(rules, want) {
		t.Errorf("found %v, want %q", found, want)
	}
}

func TestCounts(t *testing.T) {
	l := play(t, twoAcknowledged+"send a3\nsend q1\nack q1\ngot a1 1 1 1 failed\ngot a1 1 2 1 taken\ncrash 1\ngot a1 1 2 2 taken")
	if n := l.Owed(); n != 1 {
		t.Errorf("%d owed, want a2", n)
	}
	want := history.Counts{Messages: 4, Copies: 4, Acknowledged: 3, Attempts: 3, Records: 1, Again: 1}
	if got := l.Counts(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
