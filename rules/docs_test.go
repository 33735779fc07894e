package rules_test

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// docsPage is docs/rules.md, read for what can be run in it. Fenced blocks are
//
//	yaml          a rule file that loads
//	yaml test     a test file that passes with the first rule file
//	json payload  the message that bodies and tables are about
//	json body     the one body that the last rule file sends for it
//	http          the one request, without the headers that all requests have
//	sql           a statement without a problem
//	jsonl         requests and answers of broker eval, in turn
//	json check    what check -json writes, as its script has it
//	(nothing)     what check or test prints, as one of the goldens or scripts has it
//
// and the first code span of each row of a table is run too, as TestDocsTables
// says for each kind of table.
type docsPage struct {
	payload  string
	blocks   []docsBlock
	rows     []docsRow
	headings []string // of the third level, under the last of the second
}

type docsBlock struct {
	kind, text string
	line       int
}

// docsRow is one row of a table: its code span, what its second cell says, and the
// code span that its third begins with.
type docsRow struct {
	header, code, says, third string
	line                      int
}

var tableRow = regexp.MustCompile("^\\| `([^`]+)`[^|]*\\| ([^|]+) \\|(?: `([^`]+)`)?")

func readDocs(t *testing.T) *docsPage {
	t.Helper()
	text, err := os.ReadFile("../docs/rules.md")
	if err != nil {
		t.Fatal(err)
	}
	page := &docsPage{}
	var block *docsBlock
	header := ""
	for i, line := range strings.Split(string(text), "\n") {
		fence, isFence := strings.CutPrefix(line, "```")
		switch {
		case isFence && block == nil:
			block = &docsBlock{kind: fence, line: i + 1}
		case isFence:
			page.blocks = append(page.blocks, *block)
			if block.kind == "json payload" {
				page.payload = block.text
			}
			block = nil
		case block != nil:
			block.text += line + "\n"
		case strings.HasPrefix(line, "## "):
			page.headings = nil
		case strings.HasPrefix(line, "### "):
			page.headings = append(page.headings, strings.TrimPrefix(line, "### "))
		case !strings.HasPrefix(line, "|"):
			header = ""
		case header == "":
			header = line
		case !strings.HasPrefix(line, "|---"):
			m := tableRow.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("line %d: a row of a table without code", i+1)
			}
			page.rows = append(page.rows, docsRow{header: header, code: m[1], says: strings.Trim(m[2], "`"), third: m[3], line: i + 1})
		}
	}
	if page.payload == "" || block != nil {
		t.Fatal("the page has no payload, or a block that never ends")
	}
	return page
}

// TestDocsBlocks runs the fenced blocks.
func TestDocsBlocks(t *testing.T) {
	page := readDocs(t)
	var set, first *rules.Set
	seen := map[string]int{}
	for _, b := range page.blocks {
		seen[b.kind]++
		switch b.kind {
		case "yaml":
			set = load(t, b.text)
			if first == nil {
				first = set
			}
		case "yaml test":
			failures, problems := rules.RunTests(first, b.text)
			if len(failures)+len(problems) > 0 {
				t.Errorf("line %d: %v %v", b.line, failures, problems)
			}
		case "json payload":
		case "json body":
			got := match(set, message("fleet/v7/telemetry", page.payload))
			if len(got) != 1 || len(got[0].Deliveries) != 1 {
				t.Fatalf("line %d: matches %v", b.line, got)
			}
			if diff := cmp.Diff(compact(t, b.text), compact(t, string(got[0].Deliveries[0].Body))); diff != "" {
				t.Errorf("line %d: -docs +got\n%s", b.line, diff)
			}
		case "http":
			got := match(set, message("fleet/v7/telemetry", page.payload))
			if len(got) != 1 || len(got[0].Deliveries) != 1 {
				t.Fatalf("line %d: matches %v", b.line, got)
			}
			if diff := cmp.Diff(b.text, requestText(set.Destinations()[0], got[0].Deliveries[0])); diff != "" {
				t.Errorf("line %d: -docs +got\n%s", b.line, diff)
			}
		case "sql":
			if spans := rules.CompileText(b.text); len(spans) > 0 {
				t.Errorf("line %d: problems at %v", b.line, spans)
			}
		case "jsonl":
			lines := strings.Split(strings.TrimSpace(b.text), "\n")
			for i := 0; i+1 < len(lines); i += 2 {
				if diff := cmp.Diff(compact(t, lines[i+1]), string(rules.Eval([]byte(lines[i]), nil))); diff != "" {
					t.Errorf("line %d: -docs +got\n%s", b.line+i+2, diff)
				}
			}
			if len(lines)%2 != 0 {
				t.Errorf("line %d: a request without an answer", b.line)
			}
		case "json check":
			script, err := os.ReadFile("../testdata/script/check-json.txtar")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(script), "\n"+b.text) {
				t.Errorf("line %d: the script has not this", b.line)
			}
		case "":
			if !inGolden(t, b.text) {
				t.Errorf("line %d: no golden has this", b.line)
			}
		default:
			t.Errorf("line %d: nothing checks a block of %s", b.line, b.kind)
		}
	}
	if len(seen) != 9 {
		t.Errorf("blocks: %v, want some of each kind", seen)
	}
}

// requestText is what a delivery makes of a request, whose url has a query.
func requestText(to rules.Destination, d rules.Delivery) string {
	before, query, _ := strings.Cut(to.URL, "?")
	text := to.Method + " " + before + d.Path + "?" + query + "&" + d.Query + "\n"
	for _, h := range d.Headers {
		text += h.Name + ": " + h.Value + "\n"
	}
	return text + "\n" + string(d.Body) + "\n"
}

func compact(t *testing.T, text string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(text)); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return b.String()
}

func inGolden(t *testing.T, text string) bool {
	t.Helper()
	archives, err := filepath.Glob("testdata/problems/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"test", "explain"} {
		scripts, err := filepath.Glob("../testdata/script/" + command + "*.txtar")
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, scripts...)
	}
	return slices.ContainsFunc(archives, func(path string) bool {
		golden, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(golden), "\n"+text)
	})
}

// TestDocsTables runs the rows of the tables.
func TestDocsTables(t *testing.T) {
	page := readDocs(t)
	text, err := json.Marshal(page.payload)
	if err != nil {
		t.Fatal(err)
	}
	event := `{"topic":"fleet/v7/telemetry","clientid":"v7","qos":1,"retain":false,"timestamp":1700000000000,"peerhost":"192.0.2.7","payload":` + string(text) + `}`
	var functions, outcomes []string
	for _, r := range page.rows {
		name, _, _ := strings.Cut(r.header[2:], " |")
		var sql, want string
		switch name {
		case "expression", "function":
			sql, want = `SELECT `+r.code+` AS x FROM "#"`, `{"matched":true,"rows":[{"x":`+r.says+`}]}`
			if r.says == "undefined" {
				want = `{"matched":true,"rows":[{}]}`
			}
			if name == "function" {
				function, _, _ := strings.Cut(r.code, "(")
				functions = append(functions, function)
				signature, arity := signatureOf(r.third)
				if signature != function || arity != rules.Arity(function) {
					t.Errorf("line %d: %s is %s of %v arguments, want %s of %v", r.line, r.third, signature, arity, function, rules.Arity(function))
				}
			}
		case "items":
			sql, want = `SELECT `+r.code+` FROM "#"`, `{"matched":true,"rows":[`+r.says+`]}`
		case "statement":
			sql, want = r.code, `{"matched":true,"rows":[`+r.says+`]}`
			if r.says == "none" {
				want = `{"matched":false}`
			}
		case "condition":
			sql, want = `SELECT 1 AS x FROM "#" WHERE `+r.code, map[string]string{"yes": `{"matched":true,"rows":[{"x":1}]}`, "no": `{"matched":false}`}[r.says]
		case "outcome":
			outcomes = append(outcomes, r.code)
			continue
		case "event": // TestDocsEvents
			continue
		default:
			t.Errorf("line %d: nothing checks a table of %s", r.line, name)
			continue
		}
		if got := evalLine(t, sql, event); got != want {
			t.Errorf("line %d: %s\n got %s\nwant %s", r.line, r.code, got, want)
		}
	}
	slices.Sort(functions)
	if diff := cmp.Diff(rules.FunctionNames(), functions); diff != "" {
		t.Errorf("functions, -code +docs\n%s", diff)
	}
	var counted []string
	(&rules.Outcomes{}).Each(func(o rules.Outcome, _ uint64) { counted = append(counted, string(o)) })
	slices.Sort(counted)
	slices.Sort(outcomes)
	if diff := cmp.Diff(counted, outcomes); diff != "" {
		t.Errorf("outcomes, -code +docs\n%s", diff)
	}
}

var optional = regexp.MustCompile(`\[[^\[\]]*\]`)

// signatureOf reads name(a, b[, c]): the name, and how many arguments it takes at
// least and at most; -1 is any number.
func signatureOf(text string) (name string, arity [2]int) {
	count := func(s string) int {
		_, params, _ := strings.Cut(strings.TrimSuffix(s, ")"), "(")
		if params == "" {
			return 0
		}
		return strings.Count(params, ",") + 1
	}
	name, params, _ := strings.Cut(text, "(")
	if strings.Contains(params, "...") {
		return name, [2]int{count(strings.Replace(text, ", ...", "", 1)), -1}
	}
	required := text
	for optional.MatchString(required) {
		required = optional.ReplaceAllString(required, "")
	}
	return name, [2]int{count(required), count(strings.NewReplacer("[", "", "]", "").Replace(text))}
}

// TestDocsDefaults: the first rule file shows the defaults of a destination.
func TestDocsDefaults(t *testing.T) {
	page := readDocs(t)
	i := slices.IndexFunc(page.blocks, func(b docsBlock) bool { return b.kind == "yaml" })
	shown := load(t, page.blocks[i].text).Destinations()[0]
	shown.Headers = nil
	if diff := cmp.Diff(load(t, hardBrake).Destinations()[0], shown); diff != "" {
		t.Errorf("-default +docs\n%s", diff)
	}
}

// TestDocsProblems: the last section has a heading for every problem, and for
// nothing else.
func TestDocsProblems(t *testing.T) {
	got := readDocs(t).headings
	if want := problemNames(t); !slices.Equal(got, want) {
		t.Errorf("headings, -code +docs\n%s", cmp.Diff(want, got))
	}
}

// problemNames are the names of all problems in the code of the package, sorted:
// the field name of a diagnostic or Problem, and the second argument of what
// reports one.
func problemNames(t *testing.T) []string {
	t.Helper()
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	names, files := map[string]bool{}, token.NewFileSet()
	for _, path := range sources {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		source, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		add := func(x ast.Expr) {
			if literal, ok := x.(*ast.BasicLit); ok {
				name, _ := strconv.Unquote(literal.Value)
				names[name] = true
				return
			}
			passed, ok := x.(*ast.Ident)
			if field, isField := x.(*ast.SelectorExpr); isField {
				passed, ok = field.Sel, true
			}
			if !ok || passed.Name != "name" { // else it is passed on
				t.Errorf("%s: the name of a problem must be a literal", files.Position(x.Pos()))
			}
		}
		ast.Inspect(source, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if method, ok := n.Fun.(*ast.SelectorExpr); ok && slices.Contains([]string{"fail", "warn", "complain"}, method.Sel.Name) {
					add(n.Args[1])
				}
			case *ast.CompositeLit:
				if kind, ok := n.Type.(*ast.Ident); ok && (kind.Name == "diagnostic" || kind.Name == "Problem") {
					for _, field := range n.Elts {
						if pair, ok := field.(*ast.KeyValueExpr); ok && strings.EqualFold(pair.Key.(*ast.Ident).Name, "name") {
							add(pair.Value)
						}
					}
				}
			}
			return true
		})
	}
	return slices.Sorted(maps.Keys(names))
}
