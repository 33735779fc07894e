package rules

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// Secret is text that is never printed: it reads [redacted] in logs, JSON and
// every form of fmt.
type Secret struct{ text string }

const redacted = "[redacted]"

// Reveal is the text itself.
func (s Secret) Reveal() string { return s.text }

// String keeps the text out of %s and %v.
func (Secret) String() string { return redacted }

// GoString keeps it out of %#v.
func (Secret) GoString() string { return redacted }

// LogValue keeps it out of logs.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText keeps it out of JSON and YAML.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// ExpandSecrets fills in each ${env:NAME} and ${file:PATH} of text, as in the
// headers of a destination; a relative PATH is taken from dir. Other files of the
// broker, its configuration above all, write their secrets the same way. The error
// names the first one that is missing, or what is no secret.
func ExpandSecrets(text, dir string, lookupEnv func(string) (string, bool)) (Secret, error) {
	var b strings.Builder
	for {
		before, rest, found := strings.Cut(text, "${")
		b.WriteString(before)
		if !found {
			return Secret{b.String()}, nil
		}
		name, after, closed := strings.Cut(rest, "}")
		if !closed {
			return Secret{}, fmt.Errorf("${ is never closed")
		}
		value, known, err := findSecret(name, dir, lookupEnv)
		switch {
		case !known:
			return Secret{}, fmt.Errorf("%s is no secret: they are written ${env:NAME} or ${file:PATH}", quote("${"+name+"}"))
		case err != nil:
			return Secret{}, err
		}
		b.WriteString(value)
		text = after
	}
}

// findSecret is the secret that env:NAME or file:PATH names; known is false for
// anything else. An error never holds what a file says.
func findSecret(name, dir string, lookupEnv func(string) (string, bool)) (value string, known bool, err error) {
	if env, ok := strings.CutPrefix(name, "env:"); ok {
		value, ok := lookupEnv(env)
		if !ok || value == "" {
			return "", true, fmt.Errorf("environment variable %s is not set", quote(env))
		}
		return value, true, nil
	}
	if path, ok := strings.CutPrefix(name, "file:"); ok {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		value, err := readSecret(path)
		return value, true, err
	}
	return "", false, nil
}

// secretRef is a secret as one destination names it.
type secretRef struct{ destination, name string }

// findSecret is that of the destination which is being read. It remembers what it
// found, and while another destination is read again it tells what that was.
func (l *loader) findSecret(name, dir string) (value string, known bool, err error) {
	ref := secretRef{l.reading, name}
	old, had := "", false
	if l.options.reread != "" && l.options.Previous != nil {
		old, had = l.options.Previous.secrets[ref]
	}
	if had && l.reading != l.options.reread {
		value, known = old, true
	} else if value, known, err = findSecret(name, dir, l.options.LookupEnv); err != nil && had {
		value, err = old, nil
	}
	if known && err == nil {
		l.secrets[ref] = value
	}
	return value, known, err
}

// maxSecret bounds a secret's file, in bytes.
const maxSecret = 64 << 10

// readSecret reads a file without the line break at its end. Its errors never
// hold what the file says.
func readSecret(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSecret {
		return "", fmt.Errorf("%s is no file of at most %d bytes", path, maxSecret)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() // only read
	text, err := io.ReadAll(io.LimitReader(f, maxSecret))
	if err != nil {
		return "", err
	}
	secret := strings.TrimRight(string(text), "\r\n")
	if secret == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return secret, nil
}
