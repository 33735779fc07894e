package bridge

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// authority is a CA of a test's own.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	a.cert, a.pem = a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, key)
	return a
}

func (a *authority) sign(t *testing.T, c *x509.Certificate, key *ecdsa.PrivateKey) (*x509.Certificate, []byte) {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = serial, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := a.cert
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// issue returns a certificate for loopback and its key.
func (a *authority) issue(t *testing.T, name string) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, cert = a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, k)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// tlsServer answers with the name in the client's certificate, which clients
// must vouch for unless that is nil.
func tlsServer(t *testing.T, by, clients *authority) *httptest.Server {
	t.Helper()
	cert, key := by.issue(t, "server")
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Connection", "close") // each request shows what a handshake comes to now
		w.WriteHeader(http.StatusTeapot)
		if len(r.TLS.PeerCertificates) > 0 {
			_, _ = io.WriteString(w, r.TLS.PeerCertificates[0].Subject.CommonName)
		}
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	if clients != nil {
		srv.TLS.ClientAuth = tls.RequireAndVerifyClientCert
		srv.TLS.ClientCAs = x509.NewCertPool()
		srv.TLS.ClientCAs.AddCert(clients.cert)
	}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

func writeFiles(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
}

// logged is a log that can be read while it is written.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// stale makes the next request look at the files.
func (c *connections) stale() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.checked = time.Time{}
}

func TestPrivateCA(t *testing.T) {
	ours, others := newAuthority(t, "ours"), newAuthority(t, "others")
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{"ours": ours.pem, "others": others.pem, "both": append(append([]byte("# two\n"), others.pem...), ours.pem...)})
	url := tlsServer(t, ours, nil).URL
	for file, taken := range map[string]bool{"ours": true, "both": true, "others": false, "": false} {
		var files TLS
		if file != "" {
			files.CAFile = filepath.Join(dir, file)
		}
		s := newHTTPSender(senderOptions{concurrency: 1, tls: files})
		defer s.close()
		res := send(t, s, url, time.Minute)
		if _, refused := errors.AsType[*tls.CertificateVerificationError](res.Err); refused == taken || (res.Status != 0) != taken || res.Own {
			t.Errorf("ca_file %q: %+v", file, res)
		}
	}
	// A certificate for another name is refused, whoever vouches for it.
	s := newHTTPSender(senderOptions{concurrency: 1, tls: TLS{CAFile: filepath.Join(dir, "ours")}})
	defer s.close()
	if res := send(t, s, strings.Replace(url, "127.0.0.1", "127.0.0.2", 1), time.Minute); res.Err == nil || res.Own {
		t.Errorf("certificate for another address: %+v", res)
	}
}

// A client certificate is presented, replaced without a restart, and kept while
// its successor is no good.
func TestClientCertificate(t *testing.T) {
	ca := newAuthority(t, "ca")
	srv := tlsServer(t, ca, ca)
	dir := t.TempDir()
	files := TLS{CAFile: filepath.Join(dir, "ca"), CertFile: filepath.Join(dir, "cert"), KeyFile: filepath.Join(dir, "key")}
	write := func(name string) {
		cert, key := ca.issue(t, name)
		writeFiles(t, dir, map[string][]byte{"ca": ca.pem, "cert": cert, "key": key})
	}
	var out logged
	s := newHTTPSender(senderOptions{concurrency: 1, tls: files, log: out.logger()})
	defer s.close()
	ask := func(want string) {
		t.Helper()
		s.conns.stale()
		if res := send(t, s, srv.URL, time.Minute); string(res.Body) != want || res.Own {
			t.Errorf("answer %q %+v, want the certificate of %s", res.Body, res, want)
		}
	}

	// Before there are any files, the failure is ours.
	if res := send(t, s, srv.URL, time.Minute); !res.Own || !strings.Contains(failureText(res), "tls: ca_file: stat "+files.CAFile) {
		t.Errorf("without files: %+v", res)
	}
	write("first")
	ask("first")
	write("second")
	ask("second")

	broken, _ := ca.issue(t, "third")
	writeFiles(t, dir, map[string][]byte{"cert": broken}) // not of that key
	for range 3 {
		ask("second")
	}
	if err := os.Remove(files.KeyFile); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		ask("second")
	}
	if n := strings.Count(out.String(), "the tls files are bad"); n != 2 {
		t.Errorf("two faults are logged %d times:\n%s", n, out.String())
	}
	write("fourth")
	ask("fourth")

	without := newHTTPSender(senderOptions{concurrency: 1, tls: TLS{CAFile: files.CAFile}})
	defer without.close()
	if res := send(t, without, srv.URL, time.Minute); res.Err == nil || res.Own || Classify(res.Status, res.Err) != Retry {
		t.Errorf("without a client certificate: %+v", res)
	}
}

// Files are looked at once a second at most, and without being told to.
func TestTLSFilesAreReadAgain(t *testing.T) {
	ca, next := newAuthority(t, "ca"), newAuthority(t, "next")
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{"ca": ca.pem})
	srv := tlsServer(t, next, nil)
	s := newHTTPSender(senderOptions{concurrency: 1, tls: TLS{CAFile: filepath.Join(dir, "ca")}})
	defer s.close()
	if res := send(t, s, srv.URL, time.Minute); res.Err == nil {
		t.Fatalf("answer %+v before the CA is trusted", res)
	}
	writeFiles(t, dir, map[string][]byte{"ca": next.pem})
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		res := send(t, s, srv.URL, time.Minute)
		if res.Status == http.StatusTeapot {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("a minute after the CA was replaced: %+v", res)
		}
	}
}

func TestTLSCheck(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert, key := ca.issue(t, "client")
	other, otherKey := ca.issue(t, "other")
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{
		"ca": ca.pem, "cert": cert, "key": key, "other": other, "other-key": otherKey, "empty": nil, "text": []byte("no PEM"),
		"cut":  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw[:100]}),
		"huge": make([]byte, maxTLSFile+1),
	})
	for _, tt := range []struct{ name, ca, cert, key, want string }{
		{"all", "ca", "cert", "key", ""},
		{"ca alone", "ca", "", "", ""},
		{"cert alone", "", "cert", "key", ""},
		{"cert without key", "", "cert", "", "given together"},
		{"key without cert", "", "", "key", "given together"},
		{"missing", "gone", "", "", "no such file"},
		{"folder", ".", "", "", "is no file of at most"},
		{"huge", "huge", "", "", "is no file of at most"},
		{"empty", "empty", "", "", "holds no certificate"},
		{"text", "text", "", "", "holds no certificate"},
		{"cut", "cut", "", "", "certificate 1: "},
		{"key as ca", "key", "", "", `holds a "PRIVATE KEY"`},
		{"pair that is none", "", "cert", "other-key", "cert_file, key_file: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			at := func(name string) string {
				if name == "" {
					return ""
				}
				return filepath.Join(dir, name)
			}
			err := TLS{CAFile: at(tt.ca), CertFile: at(tt.cert), KeyFile: at(tt.key)}.Check()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), string(key[30:60])) {
				t.Errorf("the key is told: %v", err)
			}
		})
	}
}
