package rules

import (
	"fmt"
	"math"
	"time"
)

// evalFn computes a value for one message; condFn a truth. What they return may
// share memory with the payload. The error is always a *fault.
type (
	evalFn func(*env) (value, error)
	condFn func(*env) (bool, error)
)

// env is what a statement sees while it runs. One is reused for all rules of a
// message, and from message to message.
type env struct {
	row  row
	rule string // the name of the rule that runs, for metadata
	now  func() time.Time
	doc  document
	out  object // the outputs so far
	// openedText is the last string that was read into as JSON, and openedAs what it holds.
	openedText string
	openedAs   value
	// bound is what FOREACH binds: helpers, and the element. elements are those that
	// have not had their turn, and elementOf what the element's name is written into.
	bound     object
	elements  elements
	elementOf value
	args      []value
	// mismatch is set when a comparison met a number and a string that is none.
	mismatch bool
	// missing is set when a template met an undefined variable.
	missing bool
	// tooLong is set when a body became longer than may be.
	tooLong bool
	// spent is how many bytes of bodies there are by now, of all rules of a chain.
	spent int
	// built is the weight of what the statement has made so far of the message, and
	// buildable what it may be.
	built, buildable int
	// leftOut is set when a header's value could not be sent.
	leftOut bool
}

// row is the message or event that a statement runs on, as columns.
type row interface {
	// column answers undefined for a column that is not there.
	column(name string) value
	// each calls fn for the columns that * selects, in a fixed order.
	each(fn func(name string, v value))
}

// reset prepares for another message.
func (e *env) reset(r row, payload []byte) {
	e.row = r
	e.doc.reset(payload)
	e.openedText, e.openedAs = "", value{}
	e.buildable = max(maxBuilt, builtPerByte*len(payload))
}

// Whatever a statement and a message say, the lists, maps and rows that are made
// of one message by one rule weigh maxBuilt at most together, or builtPerByte for each
// byte of a larger payload: [a, a] AS a, twenty times over, is a million times a.
const (
	maxBuilt     = 64 << 20
	builtPerByte = 16
)

var errBuiltTooMuch = badArgument("the statement makes more than %d MiB of one message", maxBuilt>>20)

// build accounts for something of that weight that the statement has made.
func (e *env) build(weight int) error {
	if e.built += weight; e.built > e.buildable {
		return errBuiltTooMuch
	}
	return nil
}

// start prepares for another rule on the same message.
func (e *env) start(rule string) {
	e.rule = rule
	e.built = 0
	e.out.reset()
	e.bound.reset()
	e.elements, e.elementOf = elements{}, value{}
	e.mismatch, e.missing, e.tooLong, e.leftOut = false, false, false, false
}

// column is a column of the row. metadata is the one that depends on the rule.
func (e *env) column(name string) value {
	v := e.row.column(name)
	if !v.defined() && name == "metadata" && e.rule != "" {
		return e.metadata()
	}
	return v
}

func (e *env) metadata() value {
	return objectOf(&object{members: []member{{"rule_id", str(e.rule)}}})
}

// payloadJSON is the payload as JSON; the fault that it is none.
func (e *env) payloadJSON() (value, error) {
	if !e.doc.valid() {
		return value{}, errPayloadNotJSON
	}
	return e.doc.root(), nil
}

// field goes one step into v: a map by its key, a list by its index, text that
// holds JSON as what it holds. What is not there is undefined.
func (e *env) field(v value, s *step) value {
	if v.kind == kindString {
		v = e.opened(v)
	}
	switch {
	case s.kind == stepIndex && v.kind == kindRaw && v.s[0] == '[':
		return e.doc.elem(v, s.index)
	case s.kind == stepIndex && v.kind == kindList:
		if i, ok := place(s.index, len(v.list())); ok {
			return v.list()[i]
		}
	case s.kind == stepKey && v.kind == kindRaw && v.s[0] == '{':
		return e.doc.member(v, s.key)
	case s.kind == stepKey && v.kind == kindObject:
		return v.object().lookup(s.key)
	}
	return value{}
}

// walk goes along a path whose steps may fail. An index that is looked up and no
// integer leads nowhere.
func (e *env) walk(v value, path []step) (value, error) {
	for i := range path {
		s := &path[i]
		switch s.kind {
		case stepDynamic:
			fixed, err := e.fix(s)
			if err != nil {
				return value{}, err
			}
			v = e.field(v, &fixed)
		case stepRange:
			return e.cut(v, s) // nothing follows a range
		default:
			v = e.field(v, s)
		}
	}
	return v, nil
}

// nowhere is an index that no list has.
const nowhere = math.MinInt

// fix is a step with its index looked up.
func (e *env) fix(s *step) (step, error) {
	n, err := s.at(e)
	if err != nil {
		return step{}, err
	}
	fixed := step{kind: stepIndex, index: nowhere}
	if n.kind == kindInt {
		fixed.index = int(n.int())
	}
	return fixed, nil
}

// cut is the part of a list that a range names: as much of it as there is.
func (e *env) cut(v value, s *step) (value, error) {
	if !v.defined() {
		return value{}, nil
	}
	of := v
	if v.kind == kindString {
		of = e.opened(v)
	}
	if !of.isList() {
		return value{}, badArgument("[%d..%d] needs a list, found %s", s.index, s.last, shown(v))
	}
	if s.index == 0 || s.last == 0 {
		return value{}, badArgument("[%d..%d]: the first element is 1, the last -1", s.index, s.last)
	}
	elems := of.decoded().list()
	from, _ := place(s.index, len(elems))
	to, _ := place(s.last, len(elems))
	from, to = max(from, 0), min(to+1, len(elems))
	if from >= to {
		return listOf(nil), nil
	}
	return listOf(elems[from:to:to]), nil
}

// opened is the map or list that a string holds as JSON text, undefined if it
// holds none. The last text is not decoded again: a rule reads several members of it, or
// one for each element of FOREACH.
func (e *env) opened(v value) value {
	if v.n == payloadText {
		if !e.doc.valid() {
			return value{}
		}
		return e.doc.root()
	}
	for i := range len(v.s) {
		switch v.s[i] {
		case ' ', '\n', '\t', '\r':
			continue
		case '{', '[':
			if v.s != e.openedText {
				e.openedText = v.s
				e.openedAs, _ = decodeJSON(v.s)
			}
			return e.openedAs
		}
		break
	}
	return value{}
}

// Outcome is how a rule fared with a message, as metrics name it.
type Outcome string

// The outcomes of specs of the language, section "Runtime outcomes", and those of
// bounds. A rule has one of them for a message, save that TypeMismatch,
// UndefinedInBody, HeaderLeftOut and NotRepublished are counted beside it.
const (
	Matched         Outcome = "matched"
	NoMatch         Outcome = "no_match"
	PayloadNotJSON  Outcome = "payload_not_json"
	BadArgument     Outcome = "bad_argument"
	TooManyRows     Outcome = "too_many_rows"
	RenderFailed    Outcome = "render_failed"
	TypeMismatch    Outcome = "type_mismatch"
	UndefinedInBody Outcome = "undefined_in_body"
	HeaderLeftOut   Outcome = "header_left_out"
	LoopRefused     Outcome = "loop_refused"
	NotRepublished  Outcome = "not_republished"
)

// fault is why a rule failed on a message: what other engines throw.
type fault struct {
	outcome Outcome
	message string
}

func (f *fault) Error() string { return f.message }

var errPayloadNotJSON = &fault{PayloadNotJSON, "the payload is not valid JSON"}

func renderFailed(format string, args ...any) error {
	return &fault{RenderFailed, fmt.Sprintf(format, args...)}
}

func badArgument(format string, args ...any) error {
	return &fault{BadArgument, fmt.Sprintf(format, args...)}
}
