package guard

import "net"

// ListenerOn is a listener on a socket of the test's.
func (g *Guard) ListenerOn(id string, socket net.Listener) *Listener {
	l := g.Listener(id, "")
	l.socket = socket
	return l
}
