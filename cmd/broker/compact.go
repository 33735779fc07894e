package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/throughline-mqtt/throughline/store"
)

// compacted is what broker outbox compact -json writes.
type compacted struct {
	File   string `json:"file"`
	Before int64  `json:"bytes_before"`
	After  int64  `json:"bytes_after"` // of a dry run: at most, about
	DryRun bool   `json:"dry_run,omitempty"`
}

// outboxCompact gives the space that the data file doesn't use back to the file
// system. A running broker keeps it for itself, since it will be needed again.
func outboxCompact(ctx context.Context, c *cli, args []string) int {
	fs, file, asJSON := outboxFlags(c, "outbox compact")
	dry := fs.Bool("dry-run", false, "say what would come of it, and change nothing")
	if code, done := c.parse(fs, args); done {
		return code
	}
	if fs.NArg() > 0 {
		return c.misuse("outbox compact: unexpected argument %q", fs.Arg(0))
	}
	cfg, ok := c.configFor(*file)
	if !ok {
		return exitProblem
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	name := filepath.Join(cfg.DataDir, storeFile)
	done, err := store.Compact(ctx, name, store.CompactOptions{LockTimeout: 200 * time.Millisecond, DryRun: *dry})
	if err != nil {
		return c.fail(err, compactHint(err))
	}
	if *asJSON {
		return c.writeJSON(compacted{File: name, Before: done.Before, After: done.After, DryRun: *dry})
	}
	if *dry {
		fmt.Fprintf(c.stdout, "%s: %s now, about %s at the most after compaction; nothing was changed\n", name, roughSize(done.Before), roughSize(done.After))
		return exitOK
	}
	fmt.Fprintf(c.stdout, "%s: %s before, %s now\n", name, roughSize(done.Before), roughSize(done.After))
	return exitOK
}

func compactHint(err error) string {
	switch {
	case errors.Is(err, store.ErrLocked):
		return "stop the broker first; a running one uses the free space of its file again by itself"
	case errors.Is(err, fs.ErrNotExist):
		return "-config names the broker's configuration file"
	}
	return ""
}

// roughSize writes a number of bytes with one decimal.
func roughSize(n int64) string {
	for i, unit := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if one := float64(int64(1) << (10 * (4 - i))); float64(n) >= one {
			return fmt.Sprintf("%.1f %s", float64(n)/one, unit)
		}
	}
	return fmt.Sprintf("%d B", n)
}
