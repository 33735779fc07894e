package rules

import "strings"

func columnOf(name string) evalArgs {
	return func(e *env, _ []value) (value, error) { return e.column(name), nil }
}

// flag is one of the message's flags, undefined where there is none of that name.
func flag(e *env, args []value) (value, error) {
	name, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	return e.field(e.column("flags"), &step{kind: stepKey, key: name}), nil
}

// topicLevel is the topic, or its n-th level from 1.
func topicLevel(e *env, args []value) (value, error) {
	topic := e.column("topic")
	if len(args) == 0 {
		return topic, nil
	}
	level, err := countOf(args[0], "a level", 1)
	if err != nil || topic.kind != kindString {
		return topic, err
	}
	n := level
	for name := range strings.SplitSeq(topic.s, "/") {
		if n--; n == 0 {
			return str(name), nil
		}
	}
	return value{}, badArgument("the topic has no level %d", level)
}

// payloadField is the payload, or what a dotted path finds in its JSON.
func payloadField(e *env, args []value) (value, error) {
	if len(args) == 0 {
		return e.column("payload"), nil
	}
	path, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	v := e.column("payload")
	if v.kind == kindString {
		if v, err = e.payloadJSON(); err != nil {
			return value{}, err
		}
	}
	return e.within(v, path), nil
}

// within is what a dotted path finds in v.
func (e *env) within(v value, path string) value {
	for key := range strings.SplitSeq(path, ".") {
		v = e.field(v, &step{kind: stepKey, key: key})
	}
	return v
}

// containsTopic looks for a topic, and a QoS if that is given too, in a list of
// subscriptions: maps with topic and qos. Other elements are passed over.
func containsTopic(is func(topic, subscribed string) bool) evalArgs {
	return func(_ *env, args []value) (value, error) {
		subscriptions, err := listArg(args[0])
		if err != nil {
			return value{}, err
		}
		topic, err := textOf(args[1])
		if err != nil {
			return value{}, err
		}
		if len(args) == 3 && !args[2].isInteger() {
			return value{}, badArgument("a QoS is an integer, found %s", shown(args[2]))
		}
		for _, s := range subscriptions {
			if s.kind != kindObject {
				continue
			}
			name := s.object().lookup("topic")
			if name.kind == kindString && is(topic, name.s) && (len(args) < 3 || identical(s.object().lookup("qos"), args[2])) {
				return boolean(true), nil
			}
		}
		return boolean(false), nil
	}
}
