package bridge

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
)

// Egress says which addresses a destination may be reached at, beside those that
// never are. All are open by default; Deny closes, and Allow opens what Deny has
// closed, whatever the order and the length of the prefixes. The prefixes are
// masked, and those of IPv4 are not in their IPv6 form.
type Egress struct{ Deny, Allow []netip.Prefix }

// refusedAlways are the addresses that no destination has: what is behind them
// is this host, its link, or what hands out its credentials.
var refusedAlways = []struct {
	what     string
	prefixes []netip.Prefix
}{
	{"a metadata service", prefixes(
		"169.254.169.254/32", // AWS, Azure, Google Cloud, Oracle, DigitalOcean, Hetzner, OpenStack and more
		"169.254.170.2/32",   // AWS, ECS task credentials
		"169.254.170.23/32",  // AWS, EKS Pod Identity
		"169.254.42.42/32",   // Scaleway
		"169.254.0.23/32",    // Tencent Cloud
		"100.100.100.200/32", // Alibaba Cloud
		"168.63.129.16/32",   // Azure, WireServer
		"192.0.0.192/32",     // Oracle Cloud, Classic
		"fd00:ec2::254/128",  // AWS
		"fd00:ec2::23/128",   // AWS, EKS Pod Identity
		"fd20:ce::254/128",   // Google Cloud
		"fd00:42::42/128",    // Scaleway
	)},
	{"link-local", prefixes("169.254.0.0/16", "fe80::/10")},
	{"multicast", prefixes("224.0.0.0/4", "ff00::/8")},
	{"broadcast", prefixes("255.255.255.255/32")},
	{"unspecified", prefixes("0.0.0.0/8", "::/128")}, // connects to this host
}

func prefixes(texts ...string) []netip.Prefix {
	ps := make([]netip.Prefix, len(texts))
	for i, text := range texts {
		ps[i] = netip.MustParsePrefix(text)
	}
	return ps
}

// embeddings are the IPv6 prefixes that hold an IPv4 address, and at which byte:
// a gateway may take a packet on to that one.
var embeddings = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},    // NAT64, RFC 6052 section 2.1
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12},  // NAT64 within a network, RFC 8215; with the last 32 bits, as nearly all do
	{netip.MustParsePrefix("2002::/16"), 2},        // 6to4, RFC 3056 section 2
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12}, // IPv4-translated, RFC 2765 section 2.1
	{netip.MustParsePrefix("::/96"), 12},           // IPv4-compatible, RFC 4291 section 2.5.5.1
}

// forms are the addresses that a means: itself, without a zone, as IPv4 if it is
// that in its IPv6 form, and the IPv4 address that it embeds.
func forms(a netip.Addr) []netip.Addr {
	a = a.Unmap().WithZone("")
	fs := []netip.Addr{a}
	if !a.Is6() || a == netip.IPv6Unspecified() || a == netip.IPv6Loopback() {
		return fs
	}
	b := a.As16()
	for _, e := range embeddings {
		// Zeros are what the other lengths of a prefix end with, RFC 6052 section 2.2,
		// and lead nowhere.
		if v4 := netip.AddrFrom4([4]byte(b[e.at : e.at+4])); e.prefix.Contains(a) && !v4.IsUnspecified() {
			fs = append(fs, v4)
		}
	}
	return fs
}

// within returns the first prefix that holds one of the addresses.
func within(addrs []netip.Addr, ps []netip.Prefix) (netip.Prefix, bool) {
	for _, p := range ps {
		if slices.ContainsFunc(addrs, p.Contains) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// Check tells why a connection to the address is refused; nil: it is not. own are
// addresses of the broker itself, as in Options.OwnAddresses. The error names the address
// and what refuses it.
func (e Egress) Check(to netip.AddrPort, own []netip.AddrPort) error {
	addrs := forms(to.Addr())
	for _, r := range refusedAlways {
		if _, ok := within(addrs, r.prefixes); ok {
			return refusal(to, "is always refused: "+r.what)
		}
	}
	for _, o := range own {
		if o.Port() == to.Port() && isHere(addrs, o.Addr()) {
			return refusal(to, "is always refused: the broker's own admin API")
		}
	}
	if _, ok := within(addrs, e.Allow); ok {
		return nil
	}
	if p, ok := within(addrs, e.Deny); ok {
		return refusal(to, "is refused: egress.deny has "+p.String())
	}
	return nil
}

func refusal(to netip.AddrPort, why string) error {
	return &ownError{text: fmt.Sprintf("address %s %s", to.Addr().Unmap(), why)}
}

// isHere reports whether one of the addresses is that of a listener. One that
// listens everywhere has all of this host.
func isHere(addrs []netip.Addr, listener netip.Addr) bool {
	listener = listener.Unmap().WithZone("")
	if !listener.IsUnspecified() {
		return slices.Contains(addrs, listener)
	}
	if slices.ContainsFunc(addrs, netip.Addr.IsLoopback) {
		return true
	}
	interfaces, err := net.InterfaceAddrs()
	if err != nil { // rather none than the wrong one
		return true
	}
	return slices.ContainsFunc(interfaces, func(i net.Addr) bool {
		n, ok := i.(*net.IPNet)
		if !ok {
			return false
		}
		a, ok := netip.AddrFromSlice(n.IP)
		return ok && slices.Contains(addrs, a.Unmap())
	})
}

// guard is a net.Dialer's Control. It sees each address that is about to be
// dialled, so that it doesn't matter what names it had, or will have.
func (e Egress) guard(own []netip.AddrPort) func(network, address string, _ syscall.RawConn) error {
	return func(_, address string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return &ownError{text: fmt.Sprintf("address %q is refused: it can't be read", address)}
		}
		return e.Check(to, own)
	}
}
