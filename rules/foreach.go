package rules

import (
	"fmt"
	"time"
)

// iteration is what FOREACH adds to a statement. It binds the helpers, all its items
// but the last, and then each element of the list that the last one is.
type iteration struct {
	helpers    []output
	collection evalFn
	element    []step // what the elements are called
	// asList: WHERE, which runs before the elements, sees the whole list under
	// their name.
	asList bool
	incase condFn // nil: always
}

// defaultElement is what an element is called where the list has no alias.
const defaultElement = "item"

// foreach compiles FOREACH. In WHERE, INCASE and DO names are looked up in what is
// bound, then in the row; in DO in its own outputs before. Without DO the row, the
// helpers and the element are the outputs.
func (c *compiler) foreach(st *statement) {
	bound := &layer{of: boundOf}
	c.layers = []*layer{bound}
	c.each = &iteration{collection: undefined}
	for i, it := range st.items {
		if it.star {
			c.fail(it.span, "syntax", `name the list: FOREACH payload.list AS e`, "FOREACH cannot go over *")
			continue
		}
		if i < len(st.items)-1 {
			if o, ok := c.item(i, it, bound); ok {
				c.each.helpers = append(c.each.helpers, o)
			}
			continue
		}
		c.collection(it)
	}
	bound.final = true
	element := write{path: c.each.element}
	if c.each.asList {
		bound.writes = append(bound.writes, element)
	}
	if st.where != nil {
		c.judgeCondition("WHERE", st.where)
		c.where = c.condition(st.where)
	}
	if !c.each.asList && element.path != nil {
		bound.writes = append(bound.writes, element)
	}
	if st.incase != nil {
		c.judgeCondition("INCASE", st.incase)
		c.each.incase = c.condition(st.incase)
	}
	if st.do == nil {
		st.do = []item{{span: st.span, star: true}}
	}
	out := &layer{of: outputsOf}
	c.layers = []*layer{out, bound}
	for i, it := range st.do {
		c.output(i, it, out)
	}
}

// collection compiles the last item of FOREACH.
func (c *compiler) collection(it item) {
	if it.x != nil {
		c.each.collection = c.value(it.x)
	}
	c.each.element = []step{{span: it.span, kind: stepKey, key: defaultElement}}
	if it.alias == nil {
		return
	}
	for _, s := range it.alias.steps {
		if s.kind != stepKey {
			c.fail(s.span, "syntax", "", "the name of FOREACH's elements cannot have an index")
			return
		}
	}
	c.each.element, c.each.asList = it.alias.steps, true
}

// begin binds the helpers, and answers whether there are elements to go over.
func (p *program) begin(e *env) (bool, error) {
	f := p.each
	for i := range f.helpers {
		v, err := f.helpers[i].eval(e)
		if err != nil {
			return false, err
		}
		if err := e.place(&e.bound, &f.helpers[i], v); err != nil {
			return false, err
		}
	}
	v, err := f.collection(e)
	if err == nil && v.kind == kindString && v.n == payloadText {
		v, err = e.payloadJSON()
	}
	if err != nil {
		return false, err
	}
	e.elementOf = e.bound.lookup(f.element[0].key)
	if p.where != nil {
		if f.asList {
			e.bindElement(f.element, v)
		}
		if fired, err := p.where(e); err != nil || !fired {
			return false, err
		}
	}
	e.elements = e.elementsOf(v)
	e.elements.until = time.Now().Add(foreachTime)
	return true, nil
}

// next goes on to the next element that INCASE lets through, and leaves its row in
// e.out.
func (p *program) next(e *env) (bool, error) {
	if p.each == nil {
		return false, nil
	}
	for {
		v, ok := e.nextElement()
		if !ok {
			return false, nil
		}
		if time.Now().After(e.elements.until) {
			return false, badArgument("FOREACH takes longer than %s", foreachTime)
		}
		e.bindElement(p.each.element, v)
		if p.each.incase != nil {
			if survives, err := p.each.incase(e); err != nil {
				return false, err
			} else if !survives {
				continue
			}
		}
		e.out.reset()
		return true, p.selectInto(e)
	}
}

func (e *env) bindElement(name []step, v value) {
	e.bound.set(name[0].key, put(e.elementOf, name[1:], v))
}

// foreachTime is how long the elements of one list may take. A message chooses how many
// they are, and what each costs: INCASE contains(e, payload.list) looks through all of
// the list for each of its elements.
const foreachTime = 5 * time.Second

// elements are the elements of a list, the next of which is at the front.
type elements struct {
	list  []value
	until time.Time // there is to be no next one after it
	// raw: they are read from the document, one by one. Decoding a payload's list
	// first would cost many times its size.
	raw bool
	cursor
	// element is the stretch of the document that the current one is; marks say how
	// much the document held before it was read into.
	element            span
	tables, docEntries int
}

// elementsOf are the elements of a list; anything else has none.
func (e *env) elementsOf(v value) elements {
	switch {
	case v.kind == kindList:
		return elements{list: v.list()}
	case v.kind == kindRaw && v.isList():
		return elements{raw: true, cursor: cursor{s: e.doc.text, i: int(v.n) + 1}, tables: len(e.doc.tables), docEntries: len(e.doc.entries)}
	}
	return elements{}
}

func (e *env) nextElement() (value, bool) {
	l := &e.elements
	if !l.raw {
		if len(l.list) == 0 {
			return value{}, false
		}
		v := l.list[0]
		l.list = l.list[1:]
		return v, true
	}
	e.doc.forget(l.element, l.tables, l.docEntries)
	l.tables, l.docEntries = len(e.doc.tables), len(e.doc.entries)
	if l.space() == ',' {
		l.i++
	}
	if l.space() == ']' {
		return value{}, false
	}
	start := l.i
	l.skip()
	l.element = span{start, l.i}
	return e.doc.value(start, l.i), true
}

func tooManyRows(room int) error {
	message := fmt.Sprintf("more than %d rows", MaxRows)
	if room < MaxRows {
		message = fmt.Sprintf("more than %d rows, with the %d of the rules before it", MaxRows, MaxRows-room)
	}
	return &fault{TooManyRows, message}
}
