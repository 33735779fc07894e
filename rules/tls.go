package rules

import (
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
)

// tls reads which files a destination's TLS is made of; key is where it stands.
func (l *loader) tls(f *file, key, n *yaml.Node) TLS {
	var t TLS
	before := len(f.problems)
	ok := f.fields(n, "tls",
		field{"ca_file", func(_, n *yaml.Node) { t.CAFile = f.besides(n, "ca_file") }},
		field{"cert_file", func(_, n *yaml.Node) { t.CertFile = f.besides(n, "cert_file") }},
		field{"key_file", func(_, n *yaml.Node) { t.KeyFile = f.besides(n, "key_file") }},
	)
	if !ok || len(f.problems) > before {
		return TLS{}
	}
	switch {
	case t == TLS{}:
		f.fail(key, "missing-key", "", "tls needs %s, or %s and %s", quote("ca_file"), quote("cert_file"), quote("key_file"))
		return TLS{}
	case t.KeyFile == "" && t.CertFile != "":
		f.fail(key, "missing-key", "", "%s needs %s", quote("cert_file"), quote("key_file"))
		return TLS{}
	case t.CertFile == "" && t.KeyFile != "":
		f.fail(key, "missing-key", "", "%s needs %s", quote("key_file"), quote("cert_file"))
		return TLS{}
	}
	if l.options.CheckTLS == nil {
		return t
	}
	if err := l.options.CheckTLS(t); err != nil && l.options.RequireSecrets {
		f.fail(key, "bad-tls-file", "", "%s", err)
	} else if err != nil {
		f.warn(key, "bad-tls-file", "", "%s", err)
	}
	return t
}

// besides is the path of a file, relative to the rule file's folder as those of
// ${file:PATH} are; "" if n is none.
func (f *file) besides(n *yaml.Node, what string) string {
	path, ok := f.text(n, what)
	switch {
	case !ok:
		return ""
	case path == "" || strings.ContainsAny(path, "\x00\n"):
		f.fail(n, "wrong-value", "", "%s must be the path of a file, found %s", what, describeNode(n))
		return ""
	case strings.Contains(path, "${"):
		f.fail(n, "wrong-value", "write the path itself: ca.pem, or /run/secrets/ca.pem", "%s must be the path of a file, found %s", what, describeNode(n))
		return ""
	case !filepath.IsAbs(path):
		path = filepath.Join(filepath.Dir(f.path), path)
	}
	return path
}
