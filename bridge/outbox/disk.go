package outbox

import (
	"context"
	"log/slog"
	"time"
)

const (
	// lookEvery is how often the free space is looked at. What is appended in between is counted.
	lookEvery = time.Second
	// spareBytes of the free space inside the file are left out of account: a flush copies the pages that it changes before
	// it frees them, and long values need free pages in a row.
	spareBytes = 32 << 20
)

// headroom is how much may be appended before the disk is too full.
type headroom struct {
	left    int64 // in bytes; MaxInt64: nobody keeps anything free
	floor   int64
	free    int64
	refused bool // since there was space last
}

// roomy reports whether there is space again.
func (h *headroom) roomy() bool { return h.left >= h.floor/spaceShare }

// KeepFree has appends refused from now on while less than floor bytes are free on the file system, as free tells, unless
// the file has room inside for them. What makes room is never refused. It returns when ctx ends; free is called about once a
// second and may hang. While it fails, nothing is refused for its sake.
func (o *Outbox) KeepFree(ctx context.Context, floor int64, free func() (int64, error)) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	said := ""
	for {
		n, err := free()
		if err != nil {
			if text := err.Error(); text != said {
				said = text
				o.o.Logger.Error("the free space of the disk can't be told, publishes are taken until it is full", slog.Any("error", err))
			}
			n = 1 << 62
		} else {
			said = ""
		}
		o.look(floor, n)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (o *Outbox) look(floor, free int64) {
	inside := max(0, o.st.Reusable()-spareBytes)
	o.mu.Lock()
	defer o.unlock()
	// What waits for its flush has taken none of the free space yet.
	o.disk.left, o.disk.floor, o.disk.free = max(0, free-floor)+inside-o.unflushed, floor, free
	o.noticeSpace()
}
