// Package auth decides who may connect and who may publish or subscribe to what.
//
// It knows clients by what they say about themselves and by the listener they came through, and
// nothing of the server that asks. Users, tokens and ACL files are not there yet: what can't be verified is
// either allowed as a whole or denied.
package auth

import (
	"net"
	"net/netip"
)

// Listener is what the policy needs to know of one.
type Listener struct {
	Name    string
	Address string // host:port as configured; an empty host is every interface
}

// Options describe a policy.
type Options struct {
	// Anonymous says whether clients may connect without anybody verifying who they are.
	// nil: if every listener is on a loopback address.
	Anonymous *bool
	// Listeners are all that clients can come through.
	Listeners []Listener
}

// Client is who asks.
type Client struct {
	Listener string // name of the listener it came through
	ID       string // client identifier
	Username string
	Password []byte
}

// Action is what a client wants to do with a topic.
type Action uint8

// The actions there are.
const (
	Publish   Action = iota // to a topic name
	Subscribe               // to a topic filter, or to be sent a message of a topic name
)

// Policy answers for one configuration. It is immutable and safe for concurrent use.
// The zero Policy denies everything.
type Policy struct {
	anonymous bool
	loopback  map[string]bool // by listener name
}

// NewPolicy returns the policy that o describes.
func NewPolicy(o Options) *Policy {
	p := &Policy{anonymous: len(o.Listeners) > 0, loopback: make(map[string]bool, len(o.Listeners))}
	for _, l := range o.Listeners {
		p.loopback[l.Name] = Loopback(l.Address)
		p.anonymous = p.anonymous && p.loopback[l.Name]
	}
	if o.Anonymous != nil {
		p.anonymous = *o.Anonymous
	}
	return p
}

// Connect says whether the client may connect. Since no users are known, a name and password
// that it gives can't be verified, and count as if they were not there.
func (p *Policy) Connect(c Client) bool {
	_, known := p.loopback[c.Listener]
	return known && p.anonymous
}

// Allow says whether a connected client may do this with the topic. Without an ACL everything is
// allowed through listeners on a loopback address and nothing through others.
func (p *Policy) Allow(c Client, _ Action, _ string) bool {
	return p.loopback[c.Listener]
}

// Loopback says whether nobody but this machine can connect to the address. A name other than
// localhost is not looked up: it doesn't count as loopback.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
