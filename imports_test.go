package throughline_test

import (
	"encoding/json"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/throughline-mqtt/throughline"

// mayImport says which packages of ours each package may import. A package that
// is not listed here fails the test: its place in the direction is a decision.
var mayImport = map[string][]string{
	"cmd/broker": {
		"admin", "auth", "bridge", "bridge/outbox", "hooks", "hooks/guard", "rules", "sessions", "store",
		"tracectx", "tracectx/skywalking", "tracectx/tracectxtest",
	},
	"hooks":                 {"auth", "bridge", "hooks/guard", "rules", "sessions", "tracectx"},
	"hooks/guard":           {},
	"auth":                  {},
	"rules":                 {},
	"tracectx":              {},
	"tracectx/skywalking":   {"tracectx"},
	"tracectx/tracectxtest": {"tracectx"},
	"bridge":                {"bridge/outbox", "tracectx"},
	"bridge/outbox":         {"store"},
	"bridge/history":        {},
	"sessions":              {"store"},
	"store":                 {},
	"admin":                 {"bridge", "rules"},
	"docs/examples/center":  {"tracectx"},
}

// staysIn says which packages may import a vendor's modules, by import path prefix.
var staysIn = map[string][]string{
	"github.com/mochi-mqtt/":              {"hooks", "cmd/broker"},
	"go.etcd.io/bbolt":                    {"store"},
	"github.com/go-resty/":                {"bridge"},
	"github.com/apache/skywalking-go":     {"tracectx/skywalking"},
	"google.golang.org/grpc":              {"tracectx/skywalking", "tracectx/tracectxtest"},
	"github.com/tidwall/gjson":            {"rules", "tracectx", "bridge"},
	"golang.org/x/time":                   {"bridge"},
	"golang.org/x/oauth2":                 {"bridge"},
	"github.com/eclipse/":                 {"cmd/broker"},
	"github.com/prometheus/client_golang": nil, // everywhere: a registerer is passed in
}

type listed struct {
	ImportPath string
	Imports    []string
}

func TestImportsPointOneWay(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := 0
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p listed
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if name == "" {
			continue // this test
		}
		allowed, ok := mayImport[name]
		if !ok {
			t.Errorf("%s: not in the list of packages of imports_test.go", name)
			continue
		}
		seen++
		if bad := []string{"internal", "pkg", "util", "common", "types"}; slices.Contains(bad, path.Base(name)) {
			t.Errorf("%s: the layout has no package of that name", name)
		}
		for _, imp := range p.Imports {
			if ours, ok := strings.CutPrefix(imp, module+"/"); ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s, which it may not", name, ours)
			}
			for vendor, in := range staysIn {
				if in != nil && strings.HasPrefix(imp, vendor) && !slices.Contains(in, name) {
					t.Errorf("%s imports %s, which stays in %v", name, imp, in)
				}
			}
		}
	}
	if seen == 0 {
		t.Fatal("go list named no package of ours")
	}
}
