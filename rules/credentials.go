package rules

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// credentials collects what a destination shows of itself in its Authorization
// header: one thing at most.
type credentials struct {
	first string // the key that has set it; "": none has
}

// take reports a second one at key.
func (c *credentials) take(f *file, key *yaml.Node, name string) {
	if c.first != "" {
		f.fail(key, "several-credentials", "keep the one that the destination wants", "%s and %s both make the header Authorization", c.first, name)
		return
	}
	c.first = name
}

// hideBut keeps the text of a mapping's values out of problems, but for those of
// keys that hold no secret. What is no mapping is hidden as a whole.
func (f *file) hideBut(n *yaml.Node, keys ...string) {
	if n.Kind != yaml.MappingNode {
		f.hide(n)
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if !slices.Contains(keys, n.Content[i].Value) {
			f.hide(n.Content[i+1])
		}
	}
}

// required says which of the keys in a mapping are missing.
func (f *file) required(key, n *yaml.Node, what string, keys ...string) {
	for _, want := range keys {
		missing := true
		for i := 0; i+1 < len(n.Content); i += 2 {
			missing = missing && n.Content[i].Value != want
		}
		if missing {
			f.fail(key, "missing-key", "", "%s needs %s", what, quote(want))
		}
	}
}

// basic reads a name and a password.
func (l *loader) basic(f *file, key, n *yaml.Node) *Basic {
	f.hideBut(n, "username")
	b := &Basic{}
	if !f.fields(n, "basic",
		field{"username", func(_, n *yaml.Node) {
			b.Username = l.identity(f, n, "username")
			if strings.Contains(b.Username.text, ":") {
				f.fail(n, "wrong-value", "", "a username for basic has no colon") // RFC 7617 section 2
			}
		}},
		field{"password", func(_, n *yaml.Node) { b.Password = l.secretAlone(f, n, "password") }},
	) {
		return nil
	}
	f.required(key, n, "basic", "username", "password")
	return b
}

// oauth2 reads what tokens are asked for with, and where.
func (l *loader) oauth2(f *file, key, n *yaml.Node) (*OAuth2, reached) {
	f.hideBut(n, "token_url", "client_id", "scopes")
	o, at := &OAuth2{}, reached{}
	if !f.fields(n, "oauth2",
		field{"token_url", func(_, n *yaml.Node) {
			o.TokenURL = f.url(n, "they are client_id and client_secret")
			at = reached{o.TokenURL, n}
		}},
		field{"client_id", func(_, n *yaml.Node) { o.ClientID = l.identity(f, n, "client_id") }},
		field{"client_secret", func(_, n *yaml.Node) { o.ClientSecret = l.secretAlone(f, n, "client_secret") }},
		field{"scopes", func(_, n *yaml.Node) {
			f.elements(n, "scopes", func(n *yaml.Node) {
				if text, ok := f.text(n, "a scope"); ok && isScope(text) {
					o.Scopes = append(o.Scopes, text)
				} else if ok {
					f.fail(n, "wrong-value", "one scope in each element of the list", "no scope: %s", describeNode(n))
				}
			})
		}},
	) {
		return nil, reached{}
	}
	f.required(key, n, "oauth2", "token_url", "client_id", "client_secret")
	return o, at
}

// isScope is the grammar of a scope, RFC 6749 section 3.3.
func isScope(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' })
}

// identity is a name that may stand in the file, or come from where secrets do.
func (l *loader) identity(f *file, n *yaml.Node, what string) Secret {
	text, ok := f.text(n, what)
	if ok && text == "" {
		f.fail(n, "wrong-value", "", "%s is empty", what)
	}
	if !ok || text == "" {
		return Secret{}
	}
	return l.secret(f, n, text)
}

// secretAlone is a secret that must not stand in the file.
func (l *loader) secretAlone(f *file, n *yaml.Node, what string) Secret {
	name, ok := secretName(n)
	if !ok {
		f.fail(n, "bad-secret", "secrets do not belong into rule files", "%s must be ${env:NAME} or ${file:PATH} alone", what)
		return Secret{}
	}
	return l.secret(f, n, "${"+name+"}")
}
