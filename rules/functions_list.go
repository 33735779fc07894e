package rules

import "slices"

// nth counts from 1.
func nth(_ *env, args []value) (value, error) {
	n, err := countOf(args[0], "a place", 1)
	if err != nil {
		return value{}, err
	}
	elems, err := listArg(args[1])
	if err != nil {
		return value{}, err
	}
	if n > len(elems) {
		return value{}, badArgument("the list has no element %s, only %d", args[0].text(), len(elems))
	}
	return elems[n-1], nil
}

func length(_ *env, args []value) (value, error) {
	elems, err := listArg(args[0])
	if err != nil {
		return value{}, err
	}
	return integer(int64(len(elems))), nil
}

// sublist is the first elements of a list, or so many from a place on; those that
// there are.
func sublist(_ *env, args []value) (value, error) {
	last := len(args) - 1
	elems, err := listArg(args[last])
	if err != nil {
		return value{}, err
	}
	n, err := countOf(args[last-1], "a length", 0)
	if err != nil {
		return value{}, err
	}
	if len(args) == 3 {
		start, err := countOf(args[0], "a start", 1)
		if err != nil {
			return value{}, err
		}
		elems = elems[min(start-1, len(elems)):]
	}
	return listOf(elems[:min(n, len(elems))]), nil
}

// listEnd is the first or the last element.
func listEnd(n int) evalArgs {
	return func(_ *env, args []value) (value, error) {
		elems, err := listArg(args[0])
		if err != nil {
			return value{}, err
		}
		i, ok := place(n, len(elems))
		if !ok {
			return value{}, badArgument("the list is empty")
		}
		return elems[i], nil
	}
}

// contains converts nothing, as IN does not.
func contains(_ *env, args []value) (value, error) {
	elems, err := listArg(args[1])
	if err != nil {
		return value{}, err
	}
	return boolean(slices.ContainsFunc(elems, func(v value) bool { return identical(v, args[0]) })), nil
}
