package bridge

import (
	"context"
	"errors"
	"net"
	"slices"
	"syscall"
)

// localFaults are what the operating system answers to a dial for reasons of
// this host: no route, no address or port to send from, no room for another
// socket, or a rule of the local firewall.
var localFaults = []error{
	syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EADDRNOTAVAIL, syscall.EAFNOSUPPORT,
	syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.EPERM, syscall.EACCES,
}

// localFault reports whether err is that of a dial that failed for reasons of
// this host. EHOSTUNREACH is also what a router far away, or a silent neighbour,
// causes: it is ours only if routed says that there is no way to the address.
func localFault(err error, routed func(net.Addr) bool) bool {
	oe, ok := errors.AsType[*net.OpError](err)
	if !ok || oe.Op != "dial" {
		return false
	}
	if errors.Is(oe, syscall.EHOSTUNREACH) {
		return oe.Addr != nil && !routed(oe.Addr)
	}
	return slices.ContainsFunc(localFaults, func(fault error) bool { return errors.Is(oe, fault) })
}

// routed reports whether this host has a route to the address. Connecting a UDP
// socket looks the route up, and sends nothing.
func routed(to net.Addr) bool {
	var d net.Dialer
	c, err := d.DialContext(context.Background(), "udp", to.String()) // an IP address: it doesn't block
	if err != nil {
		return !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.ENETUNREACH)
	}
	_ = c.Close()
	return true
}
