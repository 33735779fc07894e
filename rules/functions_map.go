package rules

import (
	"strings"
)

// mapArg is an argument that is a map, or text that is one as JSON.
func (e *env) mapArg(v value) (*object, error) {
	of := v
	if v.kind == kindString {
		of = e.opened(v)
	}
	if !of.isObject() {
		return nil, badArgument("needs a map, found %s", shown(v))
	}
	return of.decoded().object(), nil
}

// A keyPath makes the path of a key.
type keyPath func(key value) ([]step, error)

func literalKey(key value) ([]step, error) {
	s, err := textOf(key)
	return []step{{kind: stepKey, key: s}}, err
}

// dottedPath refuses a path that makes maps deeper than JSON may nest.
func dottedPath(key value) ([]step, error) {
	if path, ok := key.x.([]step); ok {
		return path, nil
	}
	s, err := textOf(key)
	if err != nil {
		return nil, err
	}
	if n := strings.Count(s, ".") + 1; n > maxDepth {
		return nil, badArgument("a path has at most %d keys, found %d", maxDepth, n)
	}
	var path []step
	for name := range strings.SplitSeq(s, ".") {
		path = append(path, step{kind: stepKey, key: name})
	}
	return path, nil
}

func pathConstant(i, _ int, v value) (value, error) {
	if i != 0 {
		return v, nil
	}
	path, err := dottedPath(v)
	v.x = path
	return v, err
}

// mapGet answers the third argument, or undefined, for what is not there, and for
// what is no map at all.
func mapGet(pathOf keyPath) evalArgs {
	return func(e *env, args []value) (value, error) {
		path, err := pathOf(args[0])
		if err != nil {
			return value{}, err
		}
		v := args[1]
		for i := range path {
			v = e.field(v, &path[i])
		}
		if !v.defined() && len(args) == 3 {
			return args[2], nil
		}
		return v, nil
	}
}

// mapPut takes undefined as the empty map, as AS a.b does.
func mapPut(pathOf keyPath) evalArgs {
	return func(e *env, args []value) (value, error) {
		path, err := pathOf(args[0])
		if err != nil {
			return value{}, err
		}
		into := &object{}
		if args[2].defined() {
			if into, err = e.mapArg(args[2]); err != nil {
				return value{}, err
			}
		}
		return put(objectOf(into), path, args[1]), nil
	}
}

// eachMember makes a list of a map, in the order of its keys.
func eachMember(of func(member) value) evalArgs {
	return func(e *env, args []value) (value, error) {
		o, err := e.mapArg(args[0])
		if err != nil {
			return value{}, err
		}
		elems := make([]value, 0, len(o.members))
		for _, m := range o.sorted() {
			elems = append(elems, of(m))
		}
		return listOf(elems), nil
	}
}

func entryOf(m member) value {
	return objectOf(&object{members: []member{{"key", str(m.key)}, {"value", m.val}}})
}

func mapSize(e *env, args []value) (value, error) {
	o, err := e.mapArg(args[0])
	if err != nil {
		return value{}, err
	}
	return integer(int64(len(o.members))), nil
}
