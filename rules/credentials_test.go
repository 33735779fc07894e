package rules_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/throughline-mqtt/throughline/rules"
)

func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "hush"), "h:u sh\n")
	writeFile(t, filepath.Join(dir, "rules.yaml"), `
destinations:
  basic: {url: "http://127.0.0.1/", basic: {username: broker, password: "${file:hush}"}}
  named: {url: "http://127.0.0.1/", basic: {username: "${env:NAME}", password: "${file:hush}"}}
  oauth2: {url: "http://127.0.0.1/", oauth2: {token_url: "https://idp.example/t?x=1", client_id: "${env:NAME}", client_secret: "${file:hush}", scopes: [a, "b:c"]}}
  tls: {url: "https://127.0.0.1/", tls: {ca_file: ca.pem, cert_file: /etc/c.pem, key_file: sub/k.pem}}
`)
	var files []rules.TLS
	load := func(require bool, err error) (*rules.Set, []rules.Problem) {
		return rules.Load([]string{dir}, rules.LoadOptions{
			RequireSecrets: require,
			LookupEnv:      func(string) (string, bool) { return "n4me", true },
			CheckTLS:       func(f rules.TLS) error { files = append(files, f); return err },
		})
	}
	set, problems := load(true, nil)
	if set == nil {
		t.Fatal(problems)
	}
	ds := set.Destinations()
	if b := ds[0].Basic; b.Username.Reveal() != "broker" || b.Password.Reveal() != "h:u sh" || ds[0].OAuth2 != nil {
		t.Errorf("basic: %q %q", b.Username.Reveal(), b.Password.Reveal())
	}
	if b := ds[1].Basic; b.Username.Reveal() != "n4me" {
		t.Errorf("username %q", b.Username.Reveal())
	}
	if o := ds[2].OAuth2; o.TokenURL != "https://idp.example/t?x=1" || o.ClientID.Reveal() != "n4me" || o.ClientSecret.Reveal() != "h:u sh" || !cmp.Equal(o.Scopes, []string{"a", "b:c"}) {
		t.Errorf("oauth2 %+v", o)
	}
	want := rules.TLS{CAFile: filepath.Join(dir, "ca.pem"), CertFile: "/etc/c.pem", KeyFile: filepath.Join(dir, "sub/k.pem")}
	if ds[3].TLS != want || !cmp.Equal(files, []rules.TLS{want}) {
		t.Errorf("tls %+v, checked %+v", ds[3].TLS, files)
	}
	shown, err := json.Marshal(ds)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{string(shown), fmt.Sprintf("%v %+v %#v", ds, ds[0].Basic, ds[2].OAuth2)} {
		if strings.Contains(s, "h:u") || strings.Contains(s, "n4me") {
			t.Errorf("a secret shows in %s", s)
		}
	}

	for require, loads := range map[bool]bool{false: true, true: false} {
		set, problems := load(require, errors.New("ca.pem: no good"))
		tls := func(p rules.Problem) bool {
			return p.Name == "bad-tls-file" && p.Line == 6 && p.Message == "ca.pem: no good"
		}
		found := 0
		for _, p := range problems {
			if tls(p) {
				found++
			}
		}
		if (set != nil) != loads || found != 1 {
			t.Errorf("bad files, secrets required: %v, loaded: %v, %v", require, set != nil, problems)
		}
	}
}

func TestEgress(t *testing.T) {
	type asked struct {
		Addr string
		Deny int
	}
	var got []asked
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "rules.yaml"), `
destinations:
  a:
    url: http://10.0.0.1/
    oauth2: {token_url: "https://[::1]:8443/", client_id: a, client_secret: "${env:S}"}
    egress: {deny: [loopback, 10.0.0.0/8, "::ffff:192.0.2.0/120", 198.51.100.7], allow: ["fd00::/8"]}
  b: {url: "https://localhost/"}
`)
	set, problems := rules.Load([]string{dir}, rules.LoadOptions{
		LookupEnv: func(string) (string, bool) { return "x", true },
		CheckAddress: func(to netip.AddrPort, e rules.Egress) error {
			got = append(got, asked{to.String(), len(e.Deny)})
			return nil
		},
	})
	if set == nil {
		t.Fatal(problems)
	}
	if diff := cmp.Diff([]asked{{"10.0.0.1:80", 5}, {"[::1]:8443", 5}}, got); diff != "" {
		t.Errorf("addresses that were checked, -want +got\n%s", diff)
	}
	p := netip.MustParsePrefix
	want := rules.Egress{
		Deny:  []netip.Prefix{p("127.0.0.0/8"), p("::1/128"), p("10.0.0.0/8"), p("192.0.2.0/24"), p("198.51.100.7/32")},
		Allow: []netip.Prefix{p("fd00::/8")},
	}
	if diff := cmp.Diff(want, set.Destinations()[0].Egress, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// Credentials that stand in a url are not told, whatever is wrong with it.
func TestURLCredentialsAreHidden(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rules.yaml")
	for _, url := range []string{
		"http://user:s3cret@host/",
		"http://user:s3cret%zz@host/",
		"http://user:s3cret pw@host/",
		"http://user:s3cret/s3cret@host/",
		"http://user:s3cret?s3cret@host/",
		"http://s3cret@s3cret@host/",
		`http://user:s3cret\\\"s3cret@host/`,
		"http://user:s3cret@host/${vin}",
		"http://user:s3cret@host:99999/",
		"http://user:s3cret@/",
		"ftp://user:s3cret@host/",
		"//user:s3cret@host/",
		"user:s3cret@host",
	} {
		t.Run(url, func(t *testing.T) {
			writeFile(t, file, "destinations:\n  nc: {url: '"+url+"'}\n  idp: {url: 'http://127.0.0.1/', oauth2: {token_url: '"+url+"', client_id: a, client_secret: '${env:X}'}}\n")
			_, problems := rules.Load([]string{file}, rules.LoadOptions{})
			if !rules.HasErrors(problems) {
				t.Fatalf("problems %v", problems)
			}
			for _, p := range problems {
				if shown := p.Message + p.Source + p.Hint; strings.Contains(shown, "s3cret") {
					t.Errorf("told: %s", shown)
				}
			}
		})
	}
}
