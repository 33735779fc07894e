package skywalking

import (
	"crypto/rand"
	"encoding/hex"
	"strconv"
	"sync/atomic"
	"time"
)

// idSource makes ids in the form of SkyWalking's agents: the process's random UUID in
// hex without dashes, a number that agents use for the thread, and the milliseconds
// since 1970 times 10,000 plus a sequence number, joined by dots.
//
// Since one counter serves the whole source, the thread is always 1.
type idSource struct {
	prefix string
	last   atomic.Int64
}

func newIDSource() *idSource {
	var uuid [16]byte
	rand.Read(uuid[:])             // never fails
	uuid[6] = uuid[6]&0x0f | 0x40  // version 4
	uuid[8] = uuid[8]&^0xc0 | 0x80 // variant of RFC 9562
	return &idSource{prefix: hex.EncodeToString(uuid[:]) + ".1."}
}

// next returns an id that was never returned before, even when the clock stands
// still or goes back.
func (g *idSource) next(now time.Time) string {
	n := now.UnixMilli() * 10_000
	for {
		last := g.last.Load()
		n = max(n, last+1)
		if g.last.CompareAndSwap(last, n) {
			break
		}
	}
	buf := make([]byte, 0, 64)
	buf = append(buf, g.prefix...)
	return string(strconv.AppendInt(buf, n, 10))
}
