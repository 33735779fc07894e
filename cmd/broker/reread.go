package main

import (
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/throughline-mqtt/throughline/rules"
)

// rereader reads a destination's secrets again when they were refused.
type rereader struct {
	log    *slog.Logger
	keeper atomic.Pointer[rules.Keeper] // nil while the rules are loaded for the first time

	mu   sync.Mutex
	told map[string]string // by destination, what was wrong the last time
}

// secrets is bridge.Options.Unauthorized.
func (r *rereader) secrets(destination string) {
	k := r.keeper.Load()
	if k == nil { // they have just been read
		return
	}
	changed, err := k.RereadSecrets(destination)
	text := ""
	if err != nil {
		text = err.Error()
	}
	r.mu.Lock()
	news := text != r.told[destination]
	if text == "" {
		delete(r.told, destination)
	} else {
		if r.told == nil {
			r.told = map[string]string{}
		}
		r.told[destination] = text
	}
	r.mu.Unlock()
	switch {
	case changed:
		r.log.Info("the destination refused us, and its secrets have changed since they were read: the new ones are in use", "destination", destination)
	case err != nil && news:
		r.log.Error("the destination refused us, and what its secrets have become is no good: those from before stay in use", "destination", destination, "error", err)
	}
}
