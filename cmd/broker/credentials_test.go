package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func writeSecret(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRefusedSecretsAreReadAgain: a secret that was replaced is found after a 401, without a reload.
func TestRefusedSecretsAreReadAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "password")
	writeSecret(t, file, "old-s3cret\n")
	var mu sync.Mutex
	var got []string
	center := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		mu.Lock()
		defer mu.Unlock()
		got = append(got, password)
		if password != "new-s3cret" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer center.Close()
	f := startFleet(t, strings.Replace(hardBrake, "http://WEBHOOK/notify", center.URL+`
    basic: {username: broker, password: "${file:`+file+`}"}`, 1), nil)
	c := dial3(t, f.mqttAddress(), "v50")

	// What is no good is told once, and keeps the old one.
	writeSecret(t, file, "two\nlines")
	publish3(t, c, "fleet/v50/telemetry", `{"vin":"V50","decel":9}`)
	waitFor(t, "a line about the bad secret", func() bool { return strings.Contains(f.logged.String(), "is no good") })

	writeSecret(t, file, "new-s3cret\n")
	waitFor(t, "an empty outbox", func() bool { // the next probe is 30 s away, a change of the rules is not
		f.keeper.RereadSecrets("notification-center")
		return strings.Contains(f.get(t, "/api/v1/outbox"), `"records":[]`)
	})
	mu.Lock()
	passwords := slices.Compact(slices.Clone(got))
	mu.Unlock()
	if !slices.Equal(passwords, []string{"old-s3cret", "new-s3cret"}) {
		t.Errorf("passwords %q", passwords)
	}

	if shown := f.logged.String() + f.get(t, "/api/v1/rules") + f.get(t, "/metrics"); strings.Contains(shown, "s3cret") {
		t.Errorf("a secret is told:\n%s", shown)
	}
}

// TestReplacedSecret: with the new secret in place the first 401 is enough.
func TestReplacedSecret(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	writeSecret(t, file, "old-s3cret\n")
	var refused atomic.Int32
	center := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer new-s3cret" {
			refused.Add(1)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer center.Close()
	f := startFleet(t, strings.Replace(hardBrake, "http://WEBHOOK/notify", center.URL+`
    headers: {Authorization: "Bearer ${file:`+file+`}"}`, 1), nil)
	writeSecret(t, file, "new-s3cret\n")
	c := dial3(t, f.mqttAddress(), "v51")
	publish3(t, c, "fleet/v51/telemetry", `{"vin":"V51","decel":9}`)
	waitFor(t, "an empty outbox", func() bool { return strings.Contains(f.get(t, "/api/v1/outbox"), `"records":[]`) })
	if n := refused.Load(); n != 1 {
		t.Errorf("refused %d times", n)
	}
	if !strings.Contains(f.logged.String(), "its secrets have changed since they were read") {
		t.Errorf("no line about it:\n%s", f.logged)
	}
}

// TestMutualTLSAndTokens: a destination behind a private CA that asks for a client certificate, and tokens
// from an endpoint beside it.
func TestMutualTLSAndTokens(t *testing.T) {
	dir := t.TempDir()
	client := selfSigned(t, dir, "client", "truck-broker")
	pool := x509.NewCertPool()
	pool.AddCert(client)
	var tokens atomic.Int32
	var mu sync.Mutex
	var got []string
	mux := http.NewServeMux()
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		id, secret, _ := r.BasicAuth()
		if id != "throughline" || secret != "s3cret" || r.FormValue("scope") != "notify" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":"t%d","token_type":"Bearer","expires_in":3600}`, tokens.Add(1))
	})
	mux.HandleFunc("POST /notify", func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, r.TLS.PeerCertificates[0].Subject.CommonName+" "+r.Header.Get("Authorization"))
	})
	center := httptest.NewUnstartedServer(mux)
	center.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	center.EnableHTTP2 = true
	center.StartTLS()
	defer center.Close()
	writeSecret(t, filepath.Join(dir, "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: center.Certificate().Raw})))
	t.Setenv("THROUGHLINE_TEST_CLIENT_SECRET", "s3cret")

	f := startFleet(t, strings.Replace(hardBrake, "http://WEBHOOK/notify", strings.NewReplacer("URL", center.URL, "DIR", dir).Replace(`URL/notify
    tls: {ca_file: DIR/ca.pem, cert_file: DIR/client.pem, key_file: DIR/client.key}
    oauth2: {token_url: URL/token, client_id: throughline, client_secret: "${env:THROUGHLINE_TEST_CLIENT_SECRET}", scopes: [notify]}`), 1), nil)
	c := dial3(t, f.mqttAddress(), "v52")
	for range 20 {
		publish3(t, c, "fleet/v52/telemetry", `{"vin":"V52","decel":9}`)
	}
	waitFor(t, "20 requests", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) >= 20 })
	mu.Lock()
	defer mu.Unlock()
	if seen := slices.Compact(got); !slices.Equal(seen, []string{"truck-broker Bearer t1"}) || tokens.Load() != 1 {
		t.Errorf("%d tokens, requests %q", tokens.Load(), seen)
	}
}

// selfSigned writes name.pem and name.key to dir.
func selfSigned(t *testing.T, dir, name, subject string) *x509.Certificate {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: subject}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	writeSecret(t, filepath.Join(dir, name+".pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	writeSecret(t, filepath.Join(dir, name+".key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})))
	return must(x509.ParseCertificate(der))
}

// TestAdminIsNoDestination: a name that stands for the admin API's address is no way to it, and the delivery is kept.
func TestAdminIsNoDestination(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(address)
	f := startFleet(t, strings.Replace(hardBrake, "http://WEBHOOK/notify", "http://localhost:"+port+"/api/v1/rules/reload", 1), func(c *config) { c.Admin.Address = address })
	c := dial3(t, f.mqttAddress(), "v53")
	publish3(t, c, "fleet/v53/telemetry", `{"vin":"V53","decel":9}`)
	waitFor(t, "a line about the refusal", func() bool {
		return strings.Contains(f.logged.String(), "address 127.0.0.1 is always refused: the broker's own admin API") ||
			strings.Contains(f.logged.String(), "connection refused") // where localhost is ::1 first
	})
	if !strings.Contains(f.get(t, "/api/v1/outbox"), `"destination":"notification-center"`) {
		t.Error("the delivery is gone")
	}
}
