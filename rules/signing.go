package rules

import (
	"cmp"
	"encoding/base64"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

const (
	// maxSigningSecrets is room for a rotation within a rotation. Each costs the
	// receiver a signature to compare.
	maxSigningSecrets = 4
	// minSigningKey is what Standard Webhooks 1.0 asks for, in bytes.
	minSigningKey = 24
	// signingPrefix marks a symmetric secret, Standard Webhooks 1.0, "Signature
	// scheme". It is no part of the key.
	signingPrefix = "whsec_"
)

// signing reads what to sign with: the keys, decoded. A secret that is missing
// has an empty key.
func (l *loader) signing(f *file, key, n *yaml.Node) []Secret {
	f.hide(n)
	if n.Kind != yaml.MappingNode { // said without the text, which may be a secret
		f.fail(n, "wrong-type", `signing: {secrets: ["${file:/run/secrets/whsec}"]}`, "signing must be a mapping of keys")
		return nil
	}
	var keys []Secret
	given := false
	f.fields(n, "signing", field{"secrets", func(_, n *yaml.Node) {
		given = true
		switch {
		case n.Kind != yaml.SequenceNode:
			f.fail(n, "wrong-type", "", "secrets must be a list")
		case len(n.Content) == 0:
			f.fail(n, "missing-key", "", "signing needs at least one secret")
		case len(n.Content) > maxSigningSecrets:
			f.fail(n.Content[maxSigningSecrets], "out-of-range", "", "signing takes %d secrets at most, found %d", maxSigningSecrets, len(n.Content))
		default:
			for _, e := range n.Content {
				keys = append(keys, l.signingKey(f, e))
			}
		}
	}})
	if !given {
		f.fail(key, "missing-key", "", "signing needs %s", quote("secrets"))
	}
	return keys
}

// signingKey is the key that one secret stands for. No problem says what the
// secret is.
func (l *loader) signingKey(f *file, n *yaml.Node) Secret {
	name, ok := secretName(n)
	if !ok {
		f.fail(n, "bad-secret", "secrets do not belong into rule files", "a signing secret must be ${env:NAME} or ${file:PATH} alone")
		return Secret{}
	}
	text := l.secretPart(f, n, span{0, len(n.Value)}, name)
	if text == "" {
		return Secret{}
	}
	// As the reference libraries do: with the prefix or without, the rest is
	// base64 of the standard alphabet, padded. They pass over line breaks in it;
	// here two secrets in one file are not taken for one.
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(text, signingPrefix))
	switch {
	case err != nil || strings.ContainsAny(text, "\r\n"):
		f.fail(n, "bad-secret", "echo whsec_$(openssl rand -base64 32) makes one", "the signing secret is not %s and base64", signingPrefix)
		return Secret{}
	case len(key) < minSigningKey:
		f.fail(n, "bad-secret", "echo whsec_$(openssl rand -base64 32) makes one", "the signing secret has %d bytes, it needs at least %d", len(key), minSigningKey)
		return Secret{}
	}
	return Secret{string(key)}
}

// secretName is what stands in a scalar that is one ${env:NAME} or ${file:PATH}
// and nothing else.
func secretName(n *yaml.Node) (string, bool) {
	inner, opened := strings.CutPrefix(n.Value, "${")
	name, closed := strings.CutSuffix(inner, "}")
	if n.Kind != yaml.ScalarNode || !opened || !closed || strings.ContainsAny(name, "${}") {
		return "", false
	}
	return name, strings.HasPrefix(name, "env:") || strings.HasPrefix(name, "file:")
}

// minHidden is the length from which on text is taken for a secret. What is
// shorter protects nothing, and stands in other words too.
const minHidden = 4

// reference is what stands for a secret, or should.
var reference = regexp.MustCompile(`\$\{[^}]*\}?`)

// hide keeps all text of n that stands for no secret out of problems: it may be
// one.
func (f *file) hide(n *yaml.Node) {
	if n.Kind == yaml.ScalarNode && n.Tag != "!!bool" && n.Tag != "!!null" {
		for part := range strings.FieldsSeq(reference.ReplaceAllString(n.Value, " ")) { // it may stand on several lines
			if len(part) >= minHidden {
				f.hidden = append(f.hidden, part)
			}
		}
	}
	for i, c := range n.Content {
		if n.Kind != yaml.MappingNode || i%2 == 1 { // not the keys
			f.hide(c)
		}
	}
}

// credentialWords are in the names of headers and keys whose values let somebody in.
var credentialWords = regexp.MustCompile(`(?i)auth|cookie|token|secret|passw|api-?key`)

func isCredential(header string) bool { return credentialWords.MatchString(header) }

// schemes are what an Authorization begins with: no secret, and worth seeing.
var schemes = []string{"basic", "bearer", "digest", "token", "apikey"}

// shownInCredential is what needs no stars: a reference to a secret, or a scheme.
var shownInCredential = regexp.MustCompile(`^(?:\$\{[^}]*\}|(?i:` + strings.Join(schemes, "|") + `) )`)

// hideCredential is hide for the value of a header. It may be shorter than other
// secrets, and its scheme is shown.
func (f *file) hideCredential(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode {
		f.hide(n)
		return
	}
	for part := range strings.FieldsSeq(reference.ReplaceAllString(n.Value, " ")) {
		if len(part) >= minHidden && !slices.Contains(schemes, strings.ToLower(part)) {
			f.hidden = append(f.hidden, part)
		}
	}
}

// credentialLine is a key that names a credential, and its value, in a line of
// YAML: in quotes, or up to where a plain scalar may end.
var credentialLine = regexp.MustCompile(`(?i)(["']?(?:(?:proxy-)?authorization|cookie|x-api-key|token|password|client_secret)["']?\s*:\s+)("(?:[^"\\]|\\.)*"?|'[^']*'?|[^,}\]#]*)`)

// MaskCredentials puts stars in the place of what a line of YAML says for a key
// that names a credential, but for references to secrets, ${env:NAME} and
// ${file:PATH}. Each star stands for a character. It is for lines that could not be
// read, or whose keys are not what they should be: what stands where is not known then.
func MaskCredentials(line string) string {
	return credentialLine.ReplaceAllStringFunc(line, func(found string) string {
		at := credentialLine.FindStringSubmatchIndex(found)[4]
		value, masked := found[at:], strings.Builder{}
		masked.WriteString(found[:at])
		for value != "" {
			if shown := shownInCredential.FindString(value); shown != "" {
				masked.WriteString(shown)
				value = value[len(shown):]
				continue
			}
			r, n := utf8.DecodeRuneInString(value)
			if unicode.IsSpace(r) || r == '"' || r == '\'' {
				masked.WriteRune(r)
			} else {
				masked.WriteByte('*')
			}
			value = value[n:]
		}
		return masked.String()
	})
}

// writtenSecret is a secret of Standard Webhooks, wherever in a file it stands:
// under a wrong key, or in a line that is no YAML.
var writtenSecret = regexp.MustCompile(`wh(?:sec|sk)_[A-Za-z0-9+/_=-]+`)

// shown are the file's problems without its secrets. Stars take their room, so
// that the carets stay right.
func (f *file) shown() []Problem {
	slices.SortFunc(f.hidden, func(a, b string) int { return cmp.Or(len(b)-len(a), strings.Compare(a, b)) }) // one may be part of another
	stars := func(s string) string { return strings.Repeat("*", utf8.RuneCountInString(s)) }
	var pairs []string
	for _, h := range slices.Compact(f.hidden) {
		pairs = append(pairs, h, stars(h))
	}
	hide := strings.NewReplacer(pairs...)
	for i := range f.problems {
		p := &f.problems[i]
		for _, s := range []*string{&p.Source, &p.Message, &p.Hint} {
			*s = hide.Replace(writtenSecret.ReplaceAllStringFunc(*s, stars))
		}
	}
	return f.problems
}
