package rules

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// FuzzPrint: a statement that is parsed, printed and parsed again is the same.
func FuzzPrint(f *testing.F) {
	for _, s := range vectorStatements(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		once, problems := parsed(text)
		if len(problems) > 0 {
			return
		}
		printed := printStatement(once)
		twice, problems := parsed(printed)
		for _, d := range problems {
			// What is printed has more parentheses, and is longer.
			if d.name == "nested-too-deeply" || d.name == "statement-too-long" {
				return
			}
			t.Fatalf("%q\nprinted %q\nproblem at %v: %s", text, printed, d.span, d.message)
		}
		if diff := cmp.Diff(once, twice, sameStatement...); diff != "" {
			t.Errorf("%q\nprinted %q\n-once +twice\n%s", text, printed, diff)
		}
	})
}

// TestPrint: the printer keeps apart what the parser does.
func TestPrint(t *testing.T) {
	tests := []struct{ text, want string }{
		{`select a+b*-2 x, * from t`, `SELECT (a + (b * -(2))) AS 'x', * FROM 't'`},
		{`FOREACH "q".k[-0] AS e.f DO e[1..2], [1..3] INCASE NOT a OR b NOT IN (1, 'x') FROM "u", v WHERE div(1, 2.5e3) =~ case when c then 1 else true end`,
			`FOREACH "q".'k'[-0] AS 'e'.'f' DO e[1..2], [1..3] INCASE ((NOT a) OR (b NOT IN (1, 'x'))) FROM 'u', 'v' WHERE (div(1, 2500.0) =~ CASE WHEN c THEN 1 ELSE true END)`},
		{`SELECT a[b.c[-1]], m.n.f(1) FROM "it's"`, `SELECT a[b.'c'[-1]], m.'n'.'f'(1) FROM "it's"`},
	}
	for _, tt := range tests {
		st, problems := parsed(tt.text)
		if got := strings.ReplaceAll(printStatement(st), "\n", " "); len(problems) > 0 || got != tt.want {
			t.Errorf("%s\n got %s\nwant %s\n%v", tt.text, got, tt.want, problems)
		}
	}
}

func parsed(text string) (*statement, []diagnostic) {
	var problems []diagnostic
	st := parse(text, func(d diagnostic) { problems = append(problems, d) })
	return st, problems
}

var sameStatement = []cmp.Option{
	cmp.Exporter(func(reflect.Type) bool { return true }),
	cmp.Comparer(func(a, b span) bool { return true }),
	cmp.Comparer(func(a, b value) bool { return identical(a, b) }),
	cmp.Comparer(func(a, b evalFn) bool { return (a == nil) == (b == nil) }),
}

// vectorStatements are the statements and expressions of all vectors.
func vectorStatements(tb testing.TB) (statements []string) {
	tb.Helper()
	paths, err := filepath.Glob("testdata/vectors/*.yaml")
	if err != nil || len(paths) == 0 {
		tb.Fatal("no vectors", err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			tb.Fatal(err)
		}
		var file struct {
			Vectors []struct{ SQL, Select, Items, Where string }
		}
		if err := yaml.Unmarshal(text, &file); err != nil {
			tb.Fatal(err)
		}
		for _, v := range file.Vectors {
			switch {
			case v.SQL != "":
				statements = append(statements, v.SQL)
			case v.Where != "":
				statements = append(statements, `SELECT 1 FROM t WHERE `+v.Where)
			default:
				statements = append(statements, `SELECT `+v.Select+v.Items+` FROM t`)
			}
		}
	}
	return statements
}

// printStatement is a statement that parses to st, which had no mistakes.
// Everything that can be in parentheses is.
func printStatement(st *statement) string {
	var p printer
	if st.foreach {
		p.items("FOREACH", st.items)
		if st.do != nil {
			p.items("\nDO", st.do)
		}
		if st.incase != nil {
			p.text("\nINCASE ").expr(st.incase)
		}
	} else {
		p.items("SELECT", st.items)
	}
	p.text("\nFROM ")
	for i, s := range st.from {
		p.comma(i).quoted(s.name)
	}
	if st.where != nil {
		p.text("\nWHERE ").expr(st.where)
	}
	return p.String()
}

type printer struct{ strings.Builder }

func (p *printer) text(s string) *printer {
	p.WriteString(s)
	return p
}

func (p *printer) comma(i int) *printer {
	if i > 0 {
		p.WriteString(", ")
	}
	return p
}

// quoted is a text in the quotes that it does not hold itself.
func (p *printer) quoted(s string) {
	q := "'"
	if strings.Contains(s, q) {
		q = `"`
	}
	p.text(q).text(s).text(q)
}

func (p *printer) items(clause string, items []item) {
	p.text(clause).text(" ")
	for i, it := range items {
		p.comma(i)
		if it.star {
			p.text("*")
			continue
		}
		p.expr(it.x)
		if it.alias != nil {
			p.text(" AS ").path(it.alias, true)
		}
	}
}

func (p *printer) exprs(xs []expr) {
	for i, x := range xs {
		p.comma(i).expr(x)
	}
}

// path of a target may have any text as its root, in single quotes.
func (p *printer) path(r *ref, isTarget bool) {
	switch root := r.root(); {
	case root.quoted:
		p.text(`"`).text(root.key).text(`"`)
	case isTarget:
		p.quoted(root.key)
	default:
		p.text(root.key)
	}
	for _, s := range r.steps[1:] {
		switch s.kind {
		case stepKey:
			p.text(".").quoted(s.key)
		case stepIndex:
			sign := ""
			if s.negative && s.index == 0 {
				sign = "-"
			}
			fmt.Fprintf(p, "[%s%d]", sign, s.index)
		case stepRange:
			fmt.Fprintf(p, "[%d..%d]", s.index, s.last)
		case stepDynamic:
			p.text("[").path(s.of, false)
			p.text("]")
		}
	}
}

func (p *printer) expr(x expr) {
	switch x := x.(type) {
	case *literal:
		p.literal(x.val)
	case *ref:
		p.path(x, false)
	case *call:
		if x.module != nil {
			p.path(x.module, false)
			p.text(".").quoted(x.name)
		} else {
			p.text(x.name)
		}
		p.text("(").exprs(x.args)
		p.text(")")
	case *unary:
		p.text(x.op.String()).text("(").expr(x.x)
		p.text(")")
	case *binary:
		p.text("(").expr(x.l)
		p.text(" ").text(x.op.String()).text(" ").expr(x.r)
		p.text(")")
	case *not:
		p.text("(NOT ").expr(x.x)
		p.text(")")
	case *in:
		p.text("(").expr(x.x)
		if x.negated {
			p.text(" NOT")
		}
		p.text(" IN (").exprs(x.list)
		p.text("))")
	case *list:
		p.text("[").exprs(x.elems)
		p.text("]")
	case *rangeList:
		fmt.Fprintf(p, "[%d..%d]", x.first, x.last)
	case *caseOf:
		p.text("CASE")
		if x.subject != nil {
			p.text(" ").expr(x.subject)
		}
		for _, w := range x.whens {
			p.text(" WHEN ").expr(w.cond)
			p.text(" THEN ").expr(w.then)
		}
		if x.other != nil {
			p.text(" ELSE ").expr(x.other)
		}
		p.text(" END")
	default:
		panic(fmt.Sprintf("an expression of type %T", x))
	}
}

func (p *printer) literal(v value) {
	switch v.kind {
	case kindString:
		p.quoted(v.s)
	case kindFloat:
		s := strconv.FormatFloat(v.float(), 'f', -1, 64)
		if !strings.Contains(s, ".") {
			s += ".0"
		}
		p.text(s)
	default:
		p.text(v.text())
	}
}
