package hooks

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLogLeavesPacketsOut(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(newLogHandler(slog.NewTextHandler(&out, nil))).With("hook", "throughline")
	log.Warn("error processing packet", "error", errors.New("malformed"), "client", "v7", "pk", "secret")
	log.Error("publish packet error", "packet", "secret")
	log.WithGroup("g").Info("added hook", "packet", "secret", "hook", "x")
	got := out.String()
	if strings.Contains(got, "secret") || strings.Contains(got, "publish packet error") {
		t.Errorf("log has what it should leave out:\n%s", got)
	}
	for _, want := range []string{"client=v7", "error=malformed", "hook=throughline", "g.hook=x"} {
		if !strings.Contains(got, want) {
			t.Errorf("log lacks %s:\n%s", want, got)
		}
	}
}

func TestLogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := slog.New(newLogHandler(slog.NewTextHandler(&out, nil)))
		count := func(text string) int { return strings.Count(out.String(), text) }
		for range 1000 {
			log.Warn("error processing packet")
			log.With("client", "v7").Warn("keepalive") // each kind has its own
		}
		if n, m := count("error processing packet"), count("keepalive"); n != logBurst || m != logBurst {
			t.Errorf("%d and %d lines passed, want %d", n, m, logBurst)
		}
		time.Sleep(logWindow)
		log.Warn("error processing packet")
		if count("error processing packet") != logBurst+1 || count("suppressed=990") != 1 {
			t.Errorf("after a window:\n%s", out.String())
		}
		out.Reset()
		for i := range 10 * logKinds {
			log.Warn(fmt.Sprint("kind ", i))
		}
		if n := count("kind"); n > logKinds+logBurst {
			t.Errorf("%d lines passed", n)
		}
	})
}
