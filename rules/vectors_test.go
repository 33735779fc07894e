package rules_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// minVectors is how many vectors there are at least, and minOfSection how many of each
// of the sections: a file that is no longer read shows.
const (
	minVectors   = 1000
	minOfSection = 20
)

var sections = []string{"0", "1", "2", "3", "4", "5", "6", "7", "9"}

// vectorFile is one file of testdata/vectors, named after what it is about:
//
//	section: 5                    # of the specification of the language, for all below
//	payload: '{"n": 1}'           # of the vectors that have none; may be left out
//	vectors:
//	  - name: why, where the statement alone doesn't say it
//	    select: payload.n + 1
//	    value: 2
//
// A vector has one of
//
//	sql:      a whole statement
//	select:   an expression: SELECT ... AS x FROM "#"
//	items:    what stands after SELECT: SELECT ... FROM "#"
//	where:    a condition: SELECT 1 AS x FROM "#" WHERE ...
//
// and some of
//
//	payload:  the text of the payload; payload_base64 its bytes
//	event:    the columns as JSON text; without it those of vectorEvent. A payload is added.
//	template: a raw template, as broker eval takes it
//	section:  another than the file's
//
// and what is wanted, one of
//
//	value:    what select is, as compact JSON text, or undefined
//	rows:     all rows, as a list in compact JSON text
//	matched:  true: at least one row; false: none
//	parse:    a part of the message with which the statement is refused, its line:col included
//	runtime:  a part of the message with which it fails
//
// and besides, with a template,
//
//	rendered: the list of texts, one per row
//
// JSON text is compared as text, so that integers keep every digit, and floats
// their point. The clock stands at vectorClock. Vectors run through rules.Eval, as in
// broker eval.
type vectorFile struct {
	Section string
	Payload *string
	Vectors []vector
}

type vector struct {
	Name, Section               string
	SQL, Select, Items, Where   string
	Event                       string
	Payload                     *string
	PayloadBase64               *string `yaml:"payload_base64"`
	Template                    *string
	Value, Rows, Parse, Runtime string
	Matched                     *bool
	Rendered                    []string
}

const vectorEvent = `{"topic":"fleet/v7/telemetry","clientid":"v7","qos":1,"retain":false,"timestamp":1700000000000,"peerhost":"192.0.2.7"}`

func TestVectors(t *testing.T) {
	paths, err := filepath.Glob("testdata/vectors/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n, of := 0, map[string]int{}
	for _, path := range paths {
		file := readVectors(t, path)
		n += len(file.Vectors)
		for _, v := range file.Vectors {
			of[v.Section]++
		}
		t.Run(strings.TrimSuffix(filepath.Base(path), ".yaml"), func(t *testing.T) {
			for _, v := range file.Vectors {
				t.Run(v.name(), func(t *testing.T) { v.run(t) })
			}
		})
	}
	if n < minVectors {
		t.Errorf("%d vectors, want at least %d", n, minVectors)
	}
	for _, section := range sections {
		if of[section] < minOfSection {
			t.Errorf("%d vectors of section %s, want at least %d", of[section], section, minOfSection)
		}
	}
}

// readVectors reads a file, whose defaults go into its vectors.
func readVectors(t *testing.T, path string) *vectorFile {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	file := &vectorFile{}
	if err := d.Decode(file); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	if err := d.Decode(&vectorFile{}); !errors.Is(err, io.EOF) {
		t.Fatalf("%s: a second document", path)
	}
	seen := map[string]bool{}
	for i := range file.Vectors {
		v := &file.Vectors[i]
		if v.Section == "" {
			v.Section = file.Section
		}
		if v.Payload == nil && v.PayloadBase64 == nil && v.Event == "" {
			v.Payload = file.Payload
		}
		if err := v.check(); err != nil {
			t.Fatalf("%s: vector %d, %s: %v", path, i+1, v.name(), err)
		}
		key := fmt.Sprint(v.name(), v.statement(), v.Event, v.event())
		if seen[key] {
			t.Fatalf("%s: vector %d, %s: there twice", path, i+1, v.name())
		}
		seen[key] = true
	}
	return file
}

func (v *vector) check() error {
	if v.Section == "" {
		return errors.New("no section")
	}
	if n := given(v.SQL, v.Select, v.Items, v.Where); n != 1 {
		return fmt.Errorf("%d of sql, select, items and where", n)
	}
	wanted := given(v.Value, v.Rows, v.Parse, v.Runtime)
	if v.Matched != nil {
		wanted++
	}
	if wanted != 1 {
		return fmt.Errorf("%d of value, rows, matched, parse and runtime", wanted)
	}
	if v.Value != "" && v.Select == "" {
		return errors.New("value is for select")
	}
	if (v.Template == nil) != (v.Rendered == nil) {
		return errors.New("template and rendered go together")
	}
	return nil
}

func given(texts ...string) (n int) {
	for _, s := range texts {
		if s != "" {
			n++
		}
	}
	return n
}

func (v *vector) name() string {
	if v.Name != "" {
		return v.Name
	}
	return v.SQL + v.Select + v.Items + v.Where
}

func (v *vector) statement() string {
	switch {
	case v.Select != "":
		return `SELECT ` + v.Select + ` AS x FROM "#"`
	case v.Items != "":
		return `SELECT ` + v.Items + ` FROM "#"`
	case v.Where != "":
		return `SELECT 1 AS x FROM "#" WHERE ` + v.Where
	}
	return v.SQL
}

// event is the event's JSON, the payload in it.
func (v *vector) event() string {
	event := v.Event
	if event == "" {
		event = vectorEvent
	}
	for key, text := range map[string]*string{"payload": v.Payload, "payload_base64": v.PayloadBase64} {
		if text != nil {
			quoted, _ := json.Marshal(*text)
			event = strings.TrimSuffix(strings.TrimSpace(event), "}")
			if !strings.HasSuffix(event, "{") {
				event += ","
			}
			event += fmt.Sprintf("%q:%s}", key, quoted)
		}
	}
	return event
}

func (v *vector) run(t *testing.T) {
	line := fmt.Sprintf(`{"sql":%s,"event":%s`, jsonString(v.statement()), v.event())
	if v.Template != nil {
		line += `,"template":` + jsonString(*v.Template)
	}
	got := evalText(line + "}")
	t.Logf("section %s: %s\non %s\n", v.Section, v.statement(), v.event())
	var answer struct {
		Matched        *bool
		Error, Message string
		Rows           json.RawMessage
		Rendered       []string
	}
	if err := json.Unmarshal([]byte(got), &answer); err != nil {
		t.Fatalf("answer %s: %v", got, err)
	}
	value := v.Value
	if value == "undefined" {
		value = "[{}]"
	} else if value != "" {
		value = `[{"x":` + value + `}]`
	}
	switch {
	case v.Parse != "":
		if answer.Error != "parse" || !strings.Contains(answer.Message, v.Parse) {
			t.Errorf("got %s, want a parse error with %q", got, v.Parse)
		}
	case v.Runtime != "":
		if answer.Error != "runtime" || !strings.Contains(answer.Message, v.Runtime) {
			t.Errorf("got %s, want a runtime error with %q", got, v.Runtime)
		}
	case v.Matched != nil:
		if answer.Matched == nil || *answer.Matched != *v.Matched {
			t.Errorf("got %s, want matched %t", got, *v.Matched)
		}
	default:
		if want := value + v.Rows; string(answer.Rows) != want {
			t.Errorf("got  %s\nwant rows %s", got, want)
		}
	}
	if diff := cmp.Diff(v.Rendered, answer.Rendered); diff != "" {
		t.Errorf("rendered, -want +got\n%s", diff)
	}
}

// jsonString is s in quotes, as a request has it: nothing is escaped that needs not be.
func jsonString(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		return err.Error()
	}
	return strings.TrimSpace(b.String())
}
