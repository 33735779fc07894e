package bridge

import "errors"

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

// isOwn reports whether err arose on our own side, before anything was sent.
func isOwn(err error) bool {
	_, ok := errors.AsType[*ownError](err)
	return ok || localFault(err, routed)
}
