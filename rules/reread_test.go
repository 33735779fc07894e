package rules_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

// Secrets are read again for the rules in use, for one destination, and never made
// worse.
func TestRereadSecrets(t *testing.T) {
	const signed = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	dir, secrets := t.TempDir(), t.TempDir()
	secret := func(name, text string) { writeFile(t, filepath.Join(secrets, name), text+"\n") }
	for name, text := range map[string]string{"header": "h1", "password": "p1", "client": "c1", "whsec": signed, "other": "o1"} {
		secret(name, text)
	}
	path := filepath.Join(dir, "rules.yaml")
	text := strings.ReplaceAll(`
destinations:
  a: {url: "http://127.0.0.1/", headers: {X-Key: "Key ${file:DIR/header}"}, basic: {username: broker, password: "${file:DIR/password}"}, signing: {secrets: ["${file:DIR/whsec}"]}}
  b: {url: "http://127.0.0.1/", headers: {X-Key: "${file:DIR/other}"}, oauth2: {token_url: "http://127.0.0.1/", client_id: broker, client_secret: "${file:DIR/client}"}}
rules:
  - {name: r, sql: SELECT * FROM "t", actions: [{http: a}, {http: b}]}
`, "DIR", secrets)
	writeFile(t, path, text)
	applied := 0
	o := rules.KeeperOptions{
		Paths: []string{dir}, StateDir: t.TempDir(), Load: rules.LoadOptions{RequireSecrets: true},
		Apply: func(*rules.Set) { applied++ },
	}
	k := open(t, o)
	generation := k.Current().Generation()
	want := func(step, header, password, client, other string) {
		t.Helper()
		ds := k.Current().Destinations()
		got := []string{ds[0].Headers[0].Value.Reveal(), ds[0].Basic.Password.Reveal(), ds[1].OAuth2.ClientSecret.Reveal(), ds[1].Headers[0].Value.Reveal()}
		for i, w := range []string{"Key " + header, password, client, other} {
			if got[i] != w {
				t.Errorf("%s: secrets %q, want %q in place %d", step, got, w, i)
			}
		}
		if k.Current().Generation() != generation {
			t.Errorf("%s: another generation", step)
		}
	}
	reread := func(destination string, want bool) {
		t.Helper()
		if changed, err := k.RereadSecrets(destination); err != nil || changed != want {
			t.Errorf("%s: changed %v, %v, want %v", destination, changed, err, want)
		}
	}

	reread("a", false)
	if applied != 1 {
		t.Errorf("applied %d sets where nothing has changed", applied)
	}
	match(k.Current(), message("t", `{}`))
	for name, text := range map[string]string{"header": "h2", "password": "p2", "client": "c2", "other": "o2"} {
		secret(name, text)
	}
	writeFile(t, path, badRules) // what is on disk is nobody's concern here
	reread("a", true)
	want("a", "h2", "p2", "c1", "o1")
	reread("a", false)
	reread("b", true)
	want("b", "h2", "p2", "c2", "o2")
	reread("gone", false)
	if n := k.Current().Rules()[0].Outcomes().Matched.Load(); n != 1 || applied != 3 {
		t.Errorf("%d matches counted, %d sets applied", n, applied)
	}

	// What can't be read stays, and hinders nothing else.
	secret("header", "h3")
	if err := os.Remove(filepath.Join(secrets, "password")); err != nil {
		t.Fatal(err)
	}
	reread("a", true)
	want("unreadable", "h3", "p2", "c2", "o2")
	reread("a", false)

	// What is no good changes nothing, and is not told.
	secret("header", "h4")
	secret("whsec", "whsec_c2hvcnQ=")
	_, err := k.RereadSecrets("a")
	bad, ok := errors.AsType[*rules.LoadError](err)
	if !ok || len(bad.Problems) != 1 || bad.Problems[0].Name != "bad-secret" || strings.Contains(err.Error(), "c2hvcnQ") {
		t.Errorf("a bad secret: %v", err)
	}
	want("bad", "h3", "p2", "c2", "o2")

	// It works on the copy of the last good files too.
	secret("whsec", signed)
	secret("password", "p5")
	k = open(t, o)
	if !k.Last().Fallback {
		t.Fatal("not on the copy")
	}
	want("copy", "h4", "p5", "c2", "o2")
	secret("header", "h5")
	reread("a", true)
	want("copy, again", "h5", "p5", "c2", "o2")
}
