package rules

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// egressWords stand for several prefixes each.
var egressWords = map[string][]string{
	"loopback": {"127.0.0.0/8", "::1/128"},
	"private": { // RFC 1918, RFC 6598, RFC 4193
		"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7",
	},
}

// egress reads which addresses are closed and opened.
func (f *file) egress(n *yaml.Node) Egress {
	var e Egress
	list := func(into *[]netip.Prefix, what string) func(_, n *yaml.Node) {
		return func(_, n *yaml.Node) {
			f.elements(n, what, func(n *yaml.Node) { *into = append(*into, f.prefixes(n)...) })
		}
	}
	f.fields(n, "egress",
		field{"deny", list(&e.Deny, "deny")},
		field{"allow", list(&e.Allow, "allow")})
	return e
}

// prefixes are what one element of egress says, in the form that addresses are
// compared in: IPv4 is never written as IPv6.
func (f *file) prefixes(n *yaml.Node) []netip.Prefix {
	bad := func(hint string) []netip.Prefix {
		f.fail(n, "bad-address", hint, "no address, no CIDR, and not loopback or private: %s", describeNode(n))
		return nil
	}
	if n.Kind != yaml.ScalarNode {
		return bad("")
	}
	if texts, ok := egressWords[n.Value]; ok {
		var ps []netip.Prefix
		for _, text := range texts {
			ps = append(ps, netip.MustParsePrefix(text))
		}
		return ps
	}
	if a, err := netip.ParseAddr(n.Value); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
	}
	p, err := netip.ParsePrefix(n.Value)
	if err != nil {
		return bad(didYouMean(n.Value, []string{"loopback", "private"}))
	}
	const mapped = 96 // bits before an IPv4 address in its IPv6 form
	if p.Addr().Is4In6() && p.Bits() >= mapped {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mapped)
	}
	if p != p.Masked() {
		return bad(fmt.Sprintf("did you mean %s, or %s alone?", p.Masked(), p.Addr()))
	}
	return []netip.Prefix{p}
}

// reached is a url that requests go to, and where it stands.
type reached struct {
	url string
	at  *yaml.Node
}

// open tells whether a url's address may be dialled, if it holds one. What a
// name stands for is only known when it is dialled.
func (l *loader) open(f *file, r reached, e Egress) {
	u, err := url.Parse(r.url)
	if l.options.CheckAddress == nil || r.url == "" || err != nil {
		return
	}
	addr, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return
	}
	port := map[string]uint16{"http": 80, "https": 443}[u.Scheme]
	if p, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
		port = uint16(p)
	}
	if err := l.options.CheckAddress(netip.AddrPortFrom(addr, port), e); err != nil {
		f.fail(r.at, "refused-address", "", "%s", err)
	}
}
