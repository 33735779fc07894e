package hooks

import (
	"context"
	"log/slog"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
)

const (
	// logBurst and logWindow bound what mochi may log of one kind: it writes a line for
	// every packet that a client gets wrong.
	logBurst  = 10
	logWindow = time.Minute

	// logKinds bounds the texts that are counted apart. mochi has about fifty, all constant.
	logKinds = 100
)

// logHandler is the handler that mochi logs to. It leaves packets out, which mochi logs whole,
// payload included; it lets a text through logBurst times in a logWindow; and it drops what nobody can use: the line for
// every publish that a hook refuses (the hook logs when refusing begins and ends), and the one for a small keepalive, which doesn't say
// whose.
type logHandler struct {
	next  slog.Handler
	quota *logQuota // shared by what WithAttrs and WithGroup derive
}

func newLogHandler(next slog.Handler) *logHandler {
	return &logHandler{next: next, quota: newLogQuota()}
}

func (h *logHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	switch r.Message {
	case "publish packet error", mqtt.ErrMinimumKeepalive.Error():
		return nil
	}
	suppressed, ok := h.quota.take(r.Message, r.Time)
	if !ok {
		return nil
	}
	out := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "pk" && a.Key != "packet" {
			out.AddAttrs(a)
		}
		return true
	})
	if suppressed > 0 {
		out.AddAttrs(slog.Int("suppressed", suppressed))
	}
	return h.next.Handle(ctx, out)
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logHandler{next: h.next.WithAttrs(attrs), quota: h.quota}
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	return &logHandler{next: h.next.WithGroup(name), quota: h.quota}
}

type logQuota struct {
	mu    sync.Mutex
	kinds map[string]*logKind
}

func newLogQuota() *logQuota { return &logQuota{kinds: make(map[string]*logKind)} }

type logKind struct {
	since      time.Time // of the current window
	passed     int       // in it
	suppressed int       // since the last that passed
}

// take says whether a line may pass, and how many of its kind were suppressed before it.
func (q *logQuota) take(kind string, now time.Time) (suppressed int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	k := q.kinds[kind]
	if k == nil {
		if len(q.kinds) >= logKinds {
			kind = ""
			k = q.kinds[kind]
		}
		if k == nil {
			k = &logKind{since: now}
			q.kinds[kind] = k
		}
	}
	if now.Sub(k.since) >= logWindow {
		k.since, k.passed = now, 0
	}
	if k.passed >= logBurst {
		k.suppressed++
		return 0, false
	}
	k.passed++
	suppressed, k.suppressed = k.suppressed, 0
	return suppressed, true
}
