package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestSecretsAreNotTold: what a destination is shown stands in no log, no answer of the admin API, no segment and no file
// of data_dir, whatever the destination and its token endpoint answer.
func TestSecretsAreNotTold(t *testing.T) {
	const hush = "s3cret"
	file := filepath.Join(t.TempDir(), "secret")
	writeSecret(t, file, hush+"\n")
	t.Setenv("THROUGHLINE_TEST_HUSH", hush)
	t.Setenv("THROUGHLINE_TEST_WHSEC", "whsec_"+hush+"AAAAAAAAAAAAAAAAAAAAAAAAAA")
	for _, code := range []int{200, 302, 401, 410, 422} {
		for name, credentials := range map[string]string{
			"header": `headers: {Authorization: "Bearer ${file:FILE}"}`,
			"basic":  `basic: {username: broker, password: "${file:FILE}"}`,
			"oauth2": `oauth2: {token_url: "URL/token?token=q3cret", client_id: broker, client_secret: "${env:THROUGHLINE_TEST_HUSH}"}`,
			"tokens": `oauth2: {token_url: "URL/refuses?token=q3cret", client_id: broker, client_secret: "${env:THROUGHLINE_TEST_HUSH}"}`,
		} {
			t.Run(fmt.Sprint(code, " ", name), func(t *testing.T) {
				var shown atomic.Int32
				center := secretCenter(t, hush, code, &shown)
				f := startFleet(t, strings.NewReplacer("URL", center, "FILE", file).Replace(strings.Replace(hardBrake, "http://WEBHOOK/notify", `URL/notify?token=q3cret
    signing: {secrets: ["${env:THROUGHLINE_TEST_WHSEC}"]}
    `+credentials, 1)), nil)
				c := dial3(t, f.mqttAddress(), "v60")
				publish3(t, c, "fleet/v60/telemetry", `{"vin":"V60","decel":9}`)
				waitFor(t, "an attempt", func() bool {
					return shown.Load() > 0 && f.metric(t, "throughline_delivery_attempts_total") > 0
				})
				waitFor(t, "its segment", func() bool { return len(f.collector.Segments()) > 1 })
				if f.keeper.Reload(); !strings.Contains(f.logged.String(), "rules are in force") {
					t.Error("no reload")
				}
				seen := f.everything(t)
				for _, secret := range []string{hush, "q3cret", "YnJva2VyOnMzY3JldA"} { // broker:s3cret in base64
					if at := strings.Index(seen, secret); at >= 0 {
						t.Errorf("%s is told: %q", secret, seen[max(0, at-200):min(len(seen), at+200)])
					}
				}
			})
		}
	}
}

// secretCenter is a webhook and token endpoints that count when the secret is shown to them.
func secretCenter(t *testing.T, hush string, code int, shown *atomic.Int32) (url string) {
	t.Helper()
	mux := http.NewServeMux()
	look := func(r *http.Request) {
		_, password, _ := r.BasicAuth()
		if strings.Contains(r.Header.Get("Authorization")+password, hush) {
			shown.Add(1)
		}
	}
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":"token-%s","token_type":"Bearer","expires_in":3600}`, hush)
	})
	mux.HandleFunc("POST /refuses", func(w http.ResponseWriter, r *http.Request) {
		look(r)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"error":"invalid_client","error_description":"no such secret: %s"}`, hush) // as there are endpoints that do
	})
	mux.HandleFunc("POST /notify", func(w http.ResponseWriter, r *http.Request) {
		look(r)
		w.Header().Set("Location", "/elsewhere?token=q3cret")
		w.WriteHeader(code)
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL
}

// everything is all that somebody can read of a broker, but for the rule files and their copy.
func (f *fleet) everything(t *testing.T) string {
	t.Helper()
	seen := f.logged.String()
	list := f.get(t, "/api/v1/outbox")
	for _, path := range []string{"/api/v1/rules", "/api/v1/outbox/stats", "/api/v1/destinations", "/metrics"} {
		seen += f.get(t, path)
	}
	var ids struct{ Records []struct{ ID string } }
	if err := json.Unmarshal([]byte(list), &ids); err != nil {
		t.Fatal(err)
	}
	for _, r := range ids.Records {
		seen += f.get(t, "/api/v1/outbox/"+r.ID)
	}
	segments, err := json.Marshal(f.collector.Segments())
	if err != nil {
		t.Fatal(err)
	}
	seen += list + string(segments)
	err = filepath.WalkDir(f.config.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "rules-last-good.json" {
			return err
		}
		text, err := os.ReadFile(path)
		seen += string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}
