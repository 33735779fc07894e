package bridge

import (
	"context"
	"encoding/binary"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestEgressCheck(t *testing.T) {
	var (
		private  = prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
		loopback = prefixes("127.0.0.0/8", "::1/128")
		all      = prefixes("0.0.0.0/0", "::/0")
		admin    = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:18083")}
		anywhere = []netip.AddrPort{netip.MustParseAddrPort("[::]:18083")}
	)
	for _, tt := range []struct {
		name   string
		egress Egress
		own    []netip.AddrPort
		to     string
		want   string // "": open
	}{
		{"public", Egress{}, nil, "203.0.113.7:443", ""},
		{"loopback", Egress{}, admin, "127.0.0.1:8080", ""},
		{"loopback, IPv6", Egress{}, nil, "[::1]:8080", ""},
		{"private", Egress{}, nil, "10.1.2.3:8080", ""},
		{"unique local", Egress{}, nil, "[fd12::1]:8080", ""},

		{"metadata", Egress{}, nil, "169.254.169.254:80", "address 169.254.169.254 is always refused: a metadata service"},
		{"metadata, mapped", Egress{}, nil, "[::ffff:169.254.169.254]:80", "address 169.254.169.254 is always refused: a metadata service"},
		{"metadata, NAT64", Egress{}, nil, "[64:ff9b::a9fe:a9fe]:80", "address 64:ff9b::a9fe:a9fe is always refused: a metadata service"},
		{"metadata, NAT64 of its own network", Egress{}, nil, "[64:ff9b:1::a9fe:a9fe]:80", "always refused: a metadata service"},
		{"public, NAT64 of its own network, another length", Egress{}, nil, "[64:ff9b:1:cb00:71:700::]:443", ""},
		{"metadata, translated", Egress{}, nil, "[::ffff:0:a9fe:a9fe]:80", "always refused: a metadata service"},
		{"metadata, 6to4", Egress{}, nil, "[2002:a9fe:a9fe::1]:80", "always refused: a metadata service"},
		{"metadata, compatible", Egress{}, nil, "[::169.254.169.254]:80", "always refused: a metadata service"},
		{"metadata, AWS", Egress{}, nil, "[fd00:ec2::254]:80", "always refused: a metadata service"},
		{"metadata, Google Cloud", Egress{}, nil, "[fd20:ce::254]:80", "always refused: a metadata service"},
		{"metadata, Alibaba", Egress{}, nil, "100.100.100.200:80", "always refused: a metadata service"},
		{"metadata, Azure", Egress{}, nil, "168.63.129.16:80", "always refused: a metadata service"},
		{"link-local", Egress{}, nil, "169.254.7.7:80", "always refused: link-local"},
		{"link-local, IPv6 with a zone", Egress{}, nil, "[fe80::1%eth0]:80", "always refused: link-local"},
		{"multicast", Egress{}, nil, "239.1.2.3:80", "always refused: multicast"},
		{"multicast, IPv6", Egress{}, nil, "[ff02::1]:80", "always refused: multicast"},
		{"broadcast", Egress{}, nil, "255.255.255.255:80", "always refused: broadcast"},
		{"unspecified", Egress{}, nil, "0.0.0.0:80", "always refused: unspecified"},
		{"unspecified, mapped", Egress{}, nil, "[::ffff:0.0.0.0]:80", "always refused: unspecified"},
		{"unspecified, IPv6", Egress{}, nil, "[::]:80", "always refused: unspecified"},
		{"never opened", Egress{Allow: all}, nil, "169.254.169.254:80", "always refused"},

		{"admin", Egress{Allow: all}, admin, "127.0.0.1:18083", "address 127.0.0.1 is always refused: the broker's own admin API"},
		{"admin, mapped", Egress{}, admin, "[::ffff:127.0.0.1]:18083", "admin API"},
		{"admin, another address", Egress{}, admin, "127.0.0.2:18083", ""},
		{"admin anywhere", Egress{}, anywhere, "127.0.0.2:18083", "admin API"},
		{"admin anywhere, another host", Egress{}, anywhere, "203.0.113.7:18083", ""},
		{"admin anywhere, another port", Egress{}, anywhere, "127.0.0.1:18084", ""},

		{"closed", Egress{Deny: private}, nil, "10.1.2.3:80", "address 10.1.2.3 is refused: egress.deny has 10.0.0.0/8"},
		{"closed, mapped", Egress{Deny: private}, nil, "[::ffff:10.1.2.3]:80", "egress.deny has 10.0.0.0/8"},
		{"closed, NAT64", Egress{Deny: private}, nil, "[64:ff9b::10.1.2.3]:80", "egress.deny has 10.0.0.0/8"},
		{"closed, loopback", Egress{Deny: loopback}, nil, "[::1]:80", "egress.deny has ::1/128"},
		{"not closed", Egress{Deny: private}, nil, "127.0.0.1:80", ""},
		{"opened", Egress{Deny: private, Allow: prefixes("10.1.2.0/24")}, nil, "10.1.2.3:80", ""},
		{"opened by what is wider", Egress{Deny: prefixes("10.1.2.3/32"), Allow: private}, nil, "10.1.2.3:80", ""},
		{"not opened", Egress{Deny: private, Allow: prefixes("10.1.2.0/24")}, nil, "10.1.3.3:80", "egress.deny has 10.0.0.0/8"},
		{"allow alone closes nothing", Egress{Allow: private}, nil, "203.0.113.7:80", ""},
		{"all closed, IPv6", Egress{Deny: all}, nil, "[2001:db8::1]:80", "egress.deny has ::/0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.egress.Check(netip.MustParseAddrPort(tt.to), tt.own)
			if (err == nil) != (tt.want == "") || err != nil && (!strings.Contains(err.Error(), tt.want) || !isOwn(err)) {
				t.Errorf("%s: %v, want %q", tt.to, err, tt.want)
			}
		})
	}
	// This host's own addresses count where the admin API listens everywhere.
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.(*net.IPNet).IP)
		if err := (Egress{}).Check(netip.AddrPortFrom(ip, 18083), anywhere); err == nil {
			t.Errorf("%s is this host, and open", ip)
		}
	}
}

// nameServer answers every question for an IPv4 address with what addr holds, and
// others with nothing.
func nameServer(t *testing.T, addr *atomic.Pointer[netip.Addr]) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			q := buf[:n]
			end := 12 // of the header, RFC 1035 section 4.1
			for q[end] != 0 {
				end += int(q[end]) + 1
			}
			end += 5
			a := append([]byte{}, q[:end]...)
			binary.BigEndian.PutUint16(a[2:], 0x8180)
			clear(a[6:12])
			if binary.BigEndian.Uint16(q[end-4:]) == 1 {
				a[7] = 1
				a = append(a, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
				a = append(a, addr.Load().AsSlice()...)
			}
			if _, err := conn.WriteTo(a, from); err != nil {
				return
			}
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// A name is as good as the address that it has when it is dialled.
func TestEgressAfterDNS(t *testing.T) {
	var requests atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		w.Header().Set("Connection", "close")
	}))
	defer srv.Close()
	_, port, err := net.SplitHostPort(srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	url := "http://center.example:" + port + "/notify"

	var addr atomic.Pointer[netip.Addr]
	answer := func(text string) {
		a := netip.MustParseAddr(text)
		addr.Store(&a)
	}
	resolver := nameServer(t, &addr)
	s := newHTTPSender(senderOptions{resolver: resolver, egress: Egress{Deny: prefixes("127.0.0.2/32")}})
	defer s.close()
	for _, tt := range []struct{ addr, want string }{
		{"127.0.0.1", ""},
		{"169.254.169.254", "address 169.254.169.254 is always refused: a metadata service"},
		{"127.0.0.2", "address 127.0.0.2 is refused: egress.deny has 127.0.0.2/32"},
		{"0.0.0.0", "address 0.0.0.0 is always refused: unspecified"},
		{"127.0.0.1", ""},
	} {
		answer(tt.addr)
		res := send(t, s, url, time.Minute)
		if tt.want == "" && res.Status != 200 || tt.want != "" && (!res.Own || res.Status != 0 || failureText(res) != tt.want) {
			t.Errorf("center.example is %s: %+v, %s", tt.addr, res, failureText(res))
		}
	}
	if n := requests.Load(); n != 2 {
		t.Errorf("%d requests arrived, want 2", n)
	}

	// A token endpoint is no way round.
	answer("169.254.169.254")
	s = newHTTPSender(senderOptions{resolver: resolver, oauth: &OAuth2{TokenURL: "http://idp.example:" + port}})
	defer s.close()
	if res := send(t, s, srv.URL, time.Minute); !res.Own || failureText(res) != "token endpoint: address 169.254.169.254 is always refused: a metadata service" {
		t.Errorf("token endpoint: %+v", res)
	}
}

// Each address of a name is looked at: a refused one is passed over for the next.
func TestEgressLocalhost(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	url := strings.Replace(srv.URL, "127.0.0.1", "localhost", 1)
	s := newHTTPSender(senderOptions{egress: Egress{Deny: prefixes("::1/128")}})
	defer s.close()
	if res := send(t, s, url, time.Minute); res.Status != 404 {
		t.Errorf("127.0.0.1 is open: %+v", res)
	}
	s = newHTTPSender(senderOptions{egress: Egress{Deny: prefixes("::1/128", "127.0.0.0/8")}})
	defer s.close()
	if res := send(t, s, url, time.Minute); !res.Own || !strings.Contains(failureText(res), "is refused: egress.deny has ") {
		t.Errorf("both are closed: %+v", res)
	}
	own := []netip.AddrPort{netip.MustParseAddrPort(srv.Listener.Addr().String())}
	s = newHTTPSender(senderOptions{own: own})
	defer s.close()
	if res := send(t, s, srv.URL, time.Minute); !res.Own || !strings.Contains(failureText(res), "the broker's own admin API") {
		t.Errorf("the admin API: %+v", res)
	}
}
