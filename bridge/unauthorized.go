package bridge

import (
	"errors"
	"net/http"
	"time"
)

// unauthorizedAgain is the least time between two calls of Options.Unauthorized
// for one destination: what it does may cost some, and a secret that somebody
// replaces is no faster.
const unauthorizedAgain = 10 * time.Second

// refusesUs reports whether the answer means that what we showed of ourselves is
// wrong, to the destination or to its token endpoint.
func refusesUs(r Response) bool {
	if r.Status == http.StatusUnauthorized || r.Status == http.StatusProxyAuthRequired {
		return true
	}
	own, ok := errors.AsType[*ownError](r.Err)
	return ok && own.credentials
}

// unauthorized is told of every answer. The caller holds no lock, and makes an
// attempt: so Stop waits for what is begun here too.
func (f *forwarder) unauthorized(r Response) {
	if f.bridge.unauthorized == nil || !refusesUs(r) {
		return
	}
	now := time.Now()
	f.mu.Lock()
	due := f.told.IsZero() || now.Sub(f.told) >= unauthorizedAgain
	if due {
		f.told = now
	}
	f.mu.Unlock()
	if due {
		f.bridge.attempts.Go(func() { f.bridge.unauthorized(f.name) })
	}
}
