package rules

import "slices"

// MaxRows bounds the rows of all rules for one publish: each makes at least one
// record, and all of a publish are stored together.
const MaxRows = 1000

// first runs the statement on the env's message. If it has a row, that is in e.out,
// and next replaces it by the one after it. After an error, what went before does
// not count: the statement has failed as a whole.
func (p *program) first(e *env) (bool, error) {
	if p.each == nil {
		return p.selects(e)
	}
	if ok, err := p.begin(e); err != nil || !ok {
		return false, err
	}
	return p.next(e)
}

// selects decides whether a SELECT fires.
func (p *program) selects(e *env) (fired bool, err error) {
	if !p.whereFirst {
		if err := p.selectInto(e); err != nil || p.where == nil {
			return err == nil, err
		}
		return p.where(e)
	}
	if p.selectReads && e.column("payload").kind == kindString && !e.doc.valid() {
		return false, errPayloadNotJSON
	}
	if fired, err := p.where(e); err != nil || !fired {
		return false, err
	}
	return true, p.selectInto(e)
}

func (p *program) selectInto(e *env) error {
	for i := range p.outputs {
		o := &p.outputs[i]
		if o.eval == nil {
			e.row.each(e.out.set)
			if e.rule != "" {
				e.out.set("metadata", e.metadata())
			}
			for _, m := range e.bound.members {
				e.out.set(m.key, m.val)
			}
			if err := e.build(e.out.weight()); err != nil {
				return err
			}
			continue
		}
		v, err := o.eval(e)
		if err != nil {
			return err
		}
		if err := e.place(&e.out, o, v); err != nil {
			return err
		}
	}
	return nil
}

// place puts an item's value where it goes.
func (e *env) place(into *object, o *output, v value) error {
	target := o.target
	if o.looks {
		target = slices.Clone(target)
		for i := range target {
			if target[i].kind != stepDynamic {
				continue
			}
			fixed, err := e.fix(&target[i])
			if err != nil {
				return err
			}
			target[i] = fixed
		}
	}
	e.write(into, target, v)
	return e.build(into.lookup(target[0].key).weight())
}

// write puts a value into the outputs, or what FOREACH binds. Text is not read into,
// but replaced by a map, save that of payload.
func (e *env) write(into *object, target []step, v value) {
	root := target[0].key
	if len(target) > 1 {
		old := into.lookup(root)
		if root == "payload" && old.kind == kindString {
			old = e.opened(old)
		}
		v = put(old, target[1:], v)
	}
	into.set(root, v)
}

// put is old with v at path: maps on the way are merged into, anything else is
// replaced by a map.
func put(old value, path []step, v value) value {
	if len(path) == 0 {
		return v
	}
	old = old.decoded()
	s, rest := path[0], path[1:]
	if s.kind == stepKey {
		o := &object{}
		if old.kind == kindObject {
			o = old.object().clone()
		}
		o.set(s.key, put(o.lookup(s.key), rest, v))
		return objectOf(o)
	}
	if old.kind != kindList {
		return listOf([]value{put(value{}, rest, v)})
	}
	elems := old.list()
	switch i, ok := place(s.index, len(elems)); {
	case s.index == 0 && s.negative:
		return listOf(append(slices.Clone(elems), put(value{}, rest, v)))
	case s.index == 0:
		return listOf(slices.Insert(slices.Clone(elems), 0, put(value{}, rest, v)))
	case ok:
		elems = slices.Clone(elems)
		elems[i] = put(elems[i], rest, v)
	}
	return listOf(elems)
}
