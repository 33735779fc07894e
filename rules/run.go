package rules

import "slices"

// run decides whether the statement fires on the env's message and leaves its row
// in e.out.
func (p *program) run(e *env) (fired bool, err error) {
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
			continue
		}
		v, err := o.eval(e)
		if err != nil {
			return err
		}
		e.write(o.target, v)
	}
	return nil
}

// write puts a value into the outputs. Text is not read into, but replaced by a
// map, save that of payload.
func (e *env) write(target []step, v value) {
	root := target[0].key
	if len(target) > 1 {
		old := e.out.lookup(root)
		if root == "payload" && old.kind == kindString {
			old = e.opened(old)
		}
		v = put(old, target[1:], v)
	}
	e.out.set(root, v)
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
