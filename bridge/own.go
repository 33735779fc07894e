package bridge

import (
	"errors"
	"net"
	"syscall"
)

// ownError is a failure of our own side: nothing was sent, and the destination
// has no part in it. Its text names what somebody has to mend, and is the same
// for the same failure.
type ownError struct {
	text string
	// credentials: what we show of ourselves was refused, so it may have been
	// replaced meanwhile.
	credentials bool
}

func (e *ownError) Error() string { return e.text }

// ownCauses are those errors of a dial that are about this host: it has no
// route, no address or no port to send from, or too many files open.
var ownCauses = []error{syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EADDRNOTAVAIL, syscall.EMFILE, syscall.ENFILE}

// isOwn reports whether err arose on our own side, before anything was sent.
func isOwn(err error) bool {
	if _, ok := errors.AsType[*ownError](err); ok {
		return true
	}
	oe, ok := errors.AsType[*net.OpError](err)
	if !ok || oe.Op != "dial" {
		return false
	}
	for _, cause := range ownCauses {
		if errors.Is(oe, cause) {
			return true
		}
	}
	return false
}
