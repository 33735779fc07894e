package bridge

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// TLS names the files that a destination's TLS is made of, all PEM. Server
// certificates are always verified; there is no way to turn that off.
type TLS struct {
	// CAFile holds the only CAs that are trusted; "": those of the system.
	CAFile string
	// CertFile and KeyFile are the client certificate, with its intermediates,
	// and its key; both or neither.
	CertFile, KeyFile string
}

// Check reads the files, and tells the first thing that is wrong with them.
// The error names the file, and never holds what a file says.
func (t TLS) Check() error {
	texts, err := t.read()
	if err == nil {
		_, err = texts.config(t)
	}
	return err
}

const (
	// maxTLSFile has room for a system's whole list of CAs.
	maxTLSFile = 1 << 20
	// tlsFilesFresh is how long what was read of the files is taken as it is.
	// Each is a few kilobytes, so reading beats trusting times and sizes.
	tlsFilesFresh = time.Second
)

// tlsTexts are the contents of the files of a TLS.
type tlsTexts struct{ ca, cert, key []byte }

func (t TLS) read() (tlsTexts, error) {
	if (t.CertFile == "") != (t.KeyFile == "") {
		return tlsTexts{}, errors.New("cert_file and key_file are given together, or not at all")
	}
	var texts tlsTexts
	for _, f := range []struct {
		key, path string
		into      *[]byte
	}{{"ca_file", t.CAFile, &texts.ca}, {"cert_file", t.CertFile, &texts.cert}, {"key_file", t.KeyFile, &texts.key}} {
		if f.path == "" {
			continue
		}
		text, err := readSmall(f.path)
		if err != nil {
			return tlsTexts{}, fmt.Errorf("%s: %w", f.key, err)
		}
		*f.into = text
	}
	return texts, nil
}

// readSmall reads a regular file, and so never waits for a writer.
func readSmall(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxTLSFile {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, maxTLSFile)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // only read
	return io.ReadAll(io.LimitReader(f, maxTLSFile))
}

func (a tlsTexts) same(b tlsTexts) bool {
	return bytes.Equal(a.ca, b.ca) && bytes.Equal(a.cert, b.cert) && bytes.Equal(a.key, b.key)
}

// config is what the texts say; the files are named in errors alone.
func (a tlsTexts) config(files TLS) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if files.CAFile != "" {
		roots, err := parseCAs(a.ca)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %s: %w", files.CAFile, err)
		}
		c.RootCAs = roots
	}
	if files.CertFile != "" {
		pair, err := tls.X509KeyPair(a.cert, a.key)
		if err != nil {
			return nil, fmt.Errorf("cert_file, key_file: %s, %s: %w", files.CertFile, files.KeyFile, err)
		}
		// Not Certificates: of those none is sent to a server whose list of CAs
		// lacks the issuer, as it does with an intermediate that it was not told of.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return c, nil
}

// parseCAs takes every certificate of text. Unlike AppendCertsFromPEM it doesn't
// pass over a bad one: who trusts it would find out by a handshake that fails.
func parseCAs(text []byte) (*x509.CertPool, error) {
	roots, n := x509.NewCertPool(), 0
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			if n == 0 {
				return nil, errors.New("it holds no certificate in PEM")
			}
			return roots, nil
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a %q, only certificates are expected", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", n+1, err)
		}
		roots.AddCert(cert)
		n++
	}
}

// connections is the http.RoundTripper of one destination. When the files of its
// TLS have changed it makes new connections with the new ones; what is under way
// is not touched.
type connections struct {
	files TLS
	log   *slog.Logger
	open  func(*tls.Config) *http.Transport

	current atomic.Pointer[http.Transport] // nil: the files have not been good yet

	mu      sync.Mutex // held while the files are read
	checked time.Time
	texts   tlsTexts // what current is made of
	bad     string   // what is wrong with the files, as logged; "": nothing
}

// newConnections reads no file yet. open makes a transport for each state of
// the files.
func newConnections(files TLS, log *slog.Logger, open func(*tls.Config) *http.Transport) *connections {
	c := &connections{files: files, log: log, open: open}
	if files == (TLS{}) {
		c.current.Store(open(&tls.Config{MinVersion: tls.VersionTLS12}))
	}
	return c
}

// RoundTrip implements http.RoundTripper.
func (c *connections) RoundTrip(r *http.Request) (*http.Response, error) {
	t, err := c.transport()
	if err != nil {
		if r.Body != nil {
			r.Body.Close() // RoundTrip owes that, whatever happens
		}
		return nil, err
	}
	return t.RoundTrip(r)
}

// transport is the one to use now. It fails only as long as the files were
// never good.
func (c *connections) transport() (*http.Transport, error) {
	if c.files == (TLS{}) {
		return c.current.Load(), nil
	}
	if t := c.current.Load(); t != nil && !c.mu.TryLock() {
		return t, nil // somebody else is looking
	} else if t == nil {
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if now := time.Now(); c.checked.IsZero() || now.Sub(c.checked) >= tlsFilesFresh {
		c.checked = now
		c.refresh()
	}
	if t := c.current.Load(); t != nil {
		return t, nil
	}
	return nil, &ownError{text: "tls: " + c.bad}
}

// refresh takes the files as they are now, if they are good. The caller holds c.mu.
func (c *connections) refresh() {
	texts, err := c.files.read()
	before := c.current.Load()
	if err == nil && before != nil && texts.same(c.texts) {
		c.bad = ""
		return
	}
	var config *tls.Config
	if err == nil {
		config, err = texts.config(c.files)
	}
	if err != nil {
		// Without a last good one the attempts fail, and that is logged.
		if before != nil && err.Error() != c.bad {
			c.log.Error("the tls files are bad, the last good ones stay in use", "error", err)
		}
		c.bad = err.Error()
		return
	}
	c.texts, c.bad = texts, ""
	c.current.Store(c.open(config))
	if before != nil {
		before.CloseIdleConnections()
		c.log.Info("the tls files have changed, new connections use them")
	}
}

// CloseIdleConnections lets go of what no request uses.
func (c *connections) CloseIdleConnections() {
	if t := c.current.Load(); t != nil {
		t.CloseIdleConnections()
	}
}
