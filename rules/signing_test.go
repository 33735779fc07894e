package rules_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/throughline-mqtt/throughline/rules"
)

// TestSigningKeys: with the prefix or without, the key is what the base64 says.
func TestSigningKeys(t *testing.T) {
	const text = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" // of the standard's example
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "rules.yaml"),
		`destinations: {d: {url: "http://127.0.0.1/", signing: {secrets: ["${file:whsec}", "${env:E}"]}}}`)
	read := func(inFile, inEnv string, require bool) (*rules.Set, string) {
		writeFile(t, filepath.Join(dir, "whsec"), inFile)
		set, problems := rules.Load([]string{dir}, rules.LoadOptions{
			RequireSecrets: require,
			LookupEnv:      func(string) (string, bool) { return inEnv, inEnv != "" },
		})
		var b strings.Builder
		if err := rules.Print(&b, problems); err != nil {
			t.Fatal(err)
		}
		return set, b.String()
	}

	set, problems := read("whsec_"+text+"\n", text, true)
	if set == nil {
		t.Fatal(problems)
	}
	d := set.Destinations()[0]
	if len(d.SigningKeys) != 2 || d.SigningKeys[0].Reveal() != string(key) || d.SigningKeys[1].Reveal() != string(key) {
		t.Errorf("%d keys, want twice the key of the example", len(d.SigningKeys))
	}
	shown, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{string(shown), fmt.Sprintf("%v %+v %#v", d, d, d)} {
		if strings.Contains(s, text) || strings.Contains(s, string(key)) {
			t.Errorf("a key shows in %s", s)
		}
	}

	// A missing one is a warning in check and an error in serve, a bad one is an
	// error in both. None is ever shown.
	short := base64.StdEncoding.EncodeToString(key[:23])
	for _, tt := range []struct {
		name, inEnv  string
		check, serve bool // loads
		says         string
	}{
		{"missing", "", true, false, "is not set"},
		{"short", "whsec_" + short, false, false, "has 23 bytes, it needs at least 24"},
		{"no base64", "whsec_" + text[1:], false, false, "is not whsec_ and base64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for require, want := range map[bool]bool{false: tt.check, true: tt.serve} {
				set, problems := read(text, tt.inEnv, require)
				if (set != nil) != want || !strings.Contains(problems, tt.says) || !strings.Contains(problems, "rules.yaml:1:") {
					t.Errorf("secrets required: %v, loaded: %v, problems\n%s", require, set != nil, problems)
				}
				if strings.Contains(problems, text) || tt.inEnv != "" && strings.Contains(problems, tt.inEnv) {
					t.Errorf("a secret shows in\n%s", problems)
				}
			}
		})
	}
}

func TestRatesAndIdempotencyKey(t *testing.T) {
	for text, want := range map[string]rules.Rate{
		"200/s":   {N: 200, Per: time.Second},
		"12000/m": {N: 12000, Per: time.Minute},
		"5/h":     {N: 5, Per: time.Hour},
		"0/s":     {},
		"0/h":     {},
	} {
		d := load(t, `destinations: {d: {url: "http://127.0.0.1/", idempotency_key: true, rate: `+text+`}}`).Destinations()[0]
		if diff := cmp.Diff(want, d.Rate); diff != "" || !d.IdempotencyKey {
			t.Errorf("%s: idempotency_key %v, rate\n%s", text, d.IdempotencyKey, diff)
		}
	}
	if d := load(t, hardBrake).Destinations()[0]; d.IdempotencyKey || d.SigningKeys != nil || d.Rate != (rules.Rate{}) || d.Batch != (rules.Batch{Max: 1}) {
		t.Errorf("defaults %+v", d)
	}
}
