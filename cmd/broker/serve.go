package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/store"
)

// The garbage collector starts when the heap has grown by GOGC percent, 100 by default: that of a broker with few clients has
// 10 MB, and is looked at many times a second under load, and that of one with a million deliveries queued takes twice the
// memory. With a ballast, which is never touched and so takes addresses alone, and half the percentage, it starts at
// one and a half times the heap and 32 MiB: a fifth less CPU for each message in the first case, a quarter less memory in the second.
const (
	ballast   = 64 << 20
	gcPercent = 50
)

// collectLater tells the garbage collector so, until the returned function is called. GOGC in the environment wins.
func collectLater() (end func()) {
	if os.Getenv("GOGC") != "" {
		return func() {}
	}
	before := debug.SetGCPercent(gcPercent)
	b := make([]byte, ballast)
	return func() {
		debug.SetGCPercent(before)
		runtime.KeepAlive(b)
	}
}

// runServe runs the broker until ctx ends, which SIGTERM and SIGINT do.
func runServe(ctx context.Context, c *cli, args []string) int {
	flags := c.flags("serve")
	file := flags.String("config", "", "configuration `FILE`; none: MQTT on 127.0.0.1:1883, admin on 127.0.0.1:18083, data in ./data")
	if code, done := c.parse(flags, args); done {
		return code
	}
	if flags.NArg() > 0 {
		return c.misuse("serve: unexpected argument %q", flags.Arg(0))
	}
	cfg, ok := c.configFor(*file)
	if !ok {
		return exitProblem
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP) // from before the start to after the stop: its default is to kill
	defer signal.Stop(hup)
	log := newLogger(c.stderr, cfg.Log)
	defer collectLater()()
	a, err := startAppAround(ctx, cfg, log, c.around)
	var bad *rules.LoadError
	switch {
	case errors.As(err, &bad):
		_ = rules.Print(c.stderr, bad.Problems) // the exit code says it too
		return c.fail(errors.New("the rule files have problems, and there is no last good set to start with"), "")
	case err != nil:
		return c.fail(err, startHint(err))
	}
	if err := errors.Join(a.run(ctx, hup), a.stop()); err != nil {
		return c.fail(err, "")
	}
	return exitOK
}

// startHint says what to do about an error that kept the broker from starting, "" if nothing is known.
func startHint(err error) string {
	switch {
	case errors.Is(err, store.ErrLocked):
		return "another broker runs on this data_dir: stop it, or configure a data_dir of its own"
	case errors.Is(err, syscall.EADDRINUSE):
		return "another process listens there: stop it, or configure another address"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return "the user that runs the broker must be able to write to data_dir, and to listen on its ports"
	case errors.Is(err, syscall.ENOSPC):
		return "the disk under data_dir is full: make space, then start again"
	}
	return ""
}

// run returns when ctx ends, or with what ended the app from inside. Meanwhile
// each signal on hup reloads the rules.
func (a *app) run(ctx context.Context, hup <-chan os.Signal) error {
	for {
		select {
		case <-hup:
			a.keeper.Reload()
		case <-ctx.Done():
			a.log.Info("stopping", "cause", "signal")
			return nil
		case err := <-a.failed:
			a.log.Error("stopping", "cause", err)
			return err
		}
	}
}

func newLogger(w io.Writer, c logConfig) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.Level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
