package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// stopBound is how long a graceful stop may take in all. Each step has a bound of its own below it.
const stopBound = 30 * time.Second

// runServe runs the broker until ctx ends, which SIGTERM and SIGINT do.
func runServe(ctx context.Context, c *cli, args []string) int {
	fs := c.flags("serve")
	file := fs.String("config", "", "configuration `FILE`; none: MQTT on 127.0.0.1:1883, admin on 127.0.0.1:18083, data in ./data")
	if code, done := c.parse(fs, args); done {
		return code
	}
	if fs.NArg() > 0 {
		return c.misuse("serve: unexpected argument %q", fs.Arg(0))
	}
	cfg, ok := c.configFor(*file)
	if !ok {
		return exitProblem
	}
	log := newLogger(c.stderr, cfg.Log)
	a, err := startApp(ctx, cfg, log)
	var bad *rules.LoadError
	switch {
	case errors.As(err, &bad):
		_ = rules.Print(c.stderr, bad.Problems) // the exit code says it too
		return c.fail(errors.New("the rule files have problems, and there is no last good set to start with"), "")
	case err != nil:
		return c.fail(err, "")
	}
	failure := a.run(ctx)
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopBound)
	defer cancel()
	if err := errors.Join(failure, a.stop(bounded)); err != nil {
		return c.fail(err, "")
	}
	return exitOK
}

// run returns when ctx ends, or with what ended the app from inside. Meanwhile
// SIGHUP reloads the rules.
func (a *app) run(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
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
