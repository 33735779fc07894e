package outbox

import (
	"encoding/binary"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/store"
)

// pauseKey begins the key of a paused destination in the meta bucket.
const pauseKey = "pause/"

// A Pause says that nothing is sent to a destination. What it means is the sender's: the outbox only keeps it, and appends go on.
type Pause struct {
	Reason string    // 1 kB at the most
	Since  time.Time // zero: Pause sets it to now
	Of     string    // what the destination was at the time, opaque; 1 kB at the most
}

// Pause keeps that a destination is paused, in place of what was kept of it. It doesn't wait for the disk; the commit does.
func (o *Outbox) Pause(destination string, p Pause) *Commit {
	if p.Since.IsZero() {
		p.Since = o.o.Now()
	}
	p.Reason, p.Of = clip(p.Reason, maxLastError), clip(p.Of, maxLastError)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pauses[destination] = p
	return o.st.Write([]store.Op{{Bucket: metaBucket, Key: []byte(pauseKey + destination), Value: encodePause(p)}})
}

// Resume is the end of a pause; there need not be one.
func (o *Outbox) Resume(destination string) *Commit {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.pauses, destination)
	return o.st.Write([]store.Op{{Bucket: metaBucket, Key: []byte(pauseKey + destination)}})
}

// Pauses returns the destinations that are paused, whether or not that is on disk yet. The map is the caller's.
func (o *Outbox) Pauses() map[string]Pause {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.pauses)
}

// restorePauses reads what is paused.
func (o *Outbox) restorePauses(v *store.View) (err error) {
	v.ForEach(metaBucket, []byte(pauseKey), func(key, value []byte) bool {
		name, ok := strings.CutPrefix(string(key), pauseKey)
		if !ok {
			return false
		}
		var p Pause
		if p, err = decodePause(value); err != nil {
			err = fmt.Errorf("%s: pause of destination %q: %w", metaBucket, name, err)
		}
		o.pauses[name] = p
		return err == nil
	})
	return err
}

func encodePause(p Pause) []byte {
	v := make([]byte, frameSize, frameSize+2*binary.MaxVarintLen64+9+len(p.Reason)+len(p.Of))
	v = appendTime(v, p.Since)
	v = appendString(v, p.Reason)
	v = appendString(v, p.Of)
	return seal(frameVersion, v, nil)
}

func decodePause(v []byte) (Pause, error) {
	header, tail, err := unseal(frameVersion, v)
	if err != nil {
		return Pause{}, err
	}
	if len(tail) > 0 {
		return Pause{}, errDamaged
	}
	d := decoder[string]{rest: string(header)}
	p := Pause{Since: d.time(), Reason: d.text(), Of: d.text()}
	return p, d.end()
}
