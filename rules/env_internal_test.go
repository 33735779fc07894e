package rules

import (
	"strings"
	"testing"
)

// TestOpenedOnce: text within a payload is decoded once for all that a rule reads of
// it, and not kept when the message is done.
func TestOpenedOnce(t *testing.T) {
	text := `{"a": 1, "b": [2]}`
	e := &env{}
	e.reset(&Message{}, nil)
	first := e.opened(str(text))
	if again := e.opened(str(strings.Clone(text))); again.object() != first.object() {
		t.Error("the same text was decoded again")
	}
	if other := e.opened(str(`{"a": 2}`)).object().lookup("a"); other.text() != "2" {
		t.Errorf("a of another text is %s", other.text())
	}
	if none := e.opened(str(`{"a"`)); none.defined() {
		t.Errorf("no JSON holds %s", none.text())
	}
	if b := e.opened(str(text)).object().lookup("b"); b.text() != "[2]" {
		t.Errorf("b is %q", b.text())
	}
	e.reset(nil, nil)
	if e.openedText != "" || e.openedAs.defined() {
		t.Error("the text is kept")
	}
}
