// Command broker is Throughline: an MQTT broker for vehicle fleets that keeps the
// trace unbroken. It reads flags and configuration and wires the packages together;
// everything it does is done elsewhere.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/throughline-mqtt/throughline/bridge"
)

// Exit codes, the same for every command.
const (
	exitOK      = 0
	exitProblem = 1 // what was asked for failed, or problems were found
	exitUsage   = 2 // the command line makes no sense
)

// cli is what a command sees of the world, so that tests can give it another one.
type cli struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            func(string) (string, bool)
	// around puts something between the forwarder and the outbox of serve; nil: nothing.
	around func(bridge.Queue) bridge.Queue
}

type command struct {
	name, usage, summary string
	run                  func(ctx context.Context, c *cli, args []string) int
}

func commands() []command {
	return []command{
		{"demo", "demo [-for DURATION]", "broker, vehicles, notification center and collector in one process", runDemo},
		{"serve", "serve [-config FILE]", "run the broker", runServe},
		{"check", "check [-config FILE] [-strict] [-json] [PATH...]", "validate configuration and rule files", runCheck},
		{"eval", "eval", "evaluate rules over events, JSON lines in and out", runEval},
		{"outbox", "outbox ls|show|retry|purge|pause|resume|compact [-config FILE]", "list, show, send again or delete what waits and what is dead; pause a destination; give back space", runOutbox},
		{"test", "test [-run REGEXP] [-v] [-junit FILE] [PATH...]", "run the unit tests of rules, *_test.yaml", runTest},
		{"explain", "explain -topic T [-payload P] [-rule NAME] [PATH...]", "say for one message why each rule fires or not", runExplain},
		{"passwd", "passwd USER", "print a users-file line", notYet("passwd")},
		{"version", "version", "print the version", runVersion},
	}
}

func main() {
	c := &cli{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, env: os.LookupEnv}
	os.Exit(c.main(context.Background(), os.Args[1:]))
}

// untilSignal returns a context that ends with SIGINT or SIGTERM, for the commands
// that have something to stop; the others end at once, as programs do. So does a
// second signal: nothing that was acknowledged is lost.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

func (c *cli) main(ctx context.Context, args []string) int {
	if len(args) == 0 {
		c.usage(c.stderr)
		return exitUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		c.usage(c.stdout)
		return exitOK
	}
	all := commands()
	i := slices.IndexFunc(all, func(k command) bool { return k.name == args[0] })
	if i < 0 {
		return c.misuse("unknown command %q", args[0])
	}
	return all[i].run(ctx, c, args[1:])
}

func (c *cli) usage(w io.Writer) {
	fmt.Fprintln(w, "Throughline: an MQTT broker that keeps the trace unbroken.\n\nUsage: broker COMMAND [flags]")
	fmt.Fprintln(w)
	for _, k := range commands() {
		fmt.Fprintf(w, "  %-54s %s\n", k.usage, k.summary)
	}
}

// misuse reports a command line that makes no sense.
func (c *cli) misuse(format string, args ...any) int {
	fmt.Fprintf(c.stderr, "error: "+format+"\n", args...)
	fmt.Fprintln(c.stderr, "hint: broker help lists the commands, broker COMMAND -h their flags")
	return exitUsage
}

// fail reports what went wrong, and what to do about it if there is something.
func (c *cli) fail(err error, hint string) int {
	fmt.Fprintln(c.stderr, "error:", err)
	if hint != "" {
		fmt.Fprintln(c.stderr, "hint:", hint)
	}
	return exitProblem
}

// flags returns a flag set that prints the command's usage line and its flags.
func (c *cli) flags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}

// parse reads args. If done, the command ends with code: help was asked for, or the flags make no sense.
func (c *cli) parse(fs *flag.FlagSet, args []string) (code int, done bool) {
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		for _, k := range commands() {
			if k.name == strings.Fields(fs.Name())[0] {
				fmt.Fprintf(c.stdout, "broker %s: %s\n", k.usage, k.summary)
			}
		}
		fs.SetOutput(c.stdout)
		fs.PrintDefaults()
		return exitOK, true
	case err != nil:
		return c.misuse("%s: %v", fs.Name(), err), true
	}
	return 0, false
}

func notYet(name string) func(context.Context, *cli, []string) int {
	return func(_ context.Context, c *cli, _ []string) int {
		fmt.Fprintf(c.stderr, "error: broker %s is not supported yet\n", name)
		return exitUsage
	}
}

func runVersion(_ context.Context, c *cli, _ []string) int {
	fmt.Fprintln(c.stdout, "throughline", version())
	return exitOK
}

// version is the module's version, or the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}
