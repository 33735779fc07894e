//go:build unix

// Only there can a file be cut off that is mapped.

package store_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/store"
)

// cutting is a context that cuts a file off when it is asked for its error first, after the file was verified.
type cutting struct {
	context.Context
	path string
}

func (c *cutting) Err() error {
	if c.path != "" {
		_ = os.Truncate(c.path, 0)
		c.path = ""
	}
	return nil
}

// TestCompactOfWhatCannotBeRead has mapped pages go while they are looked at, as a disk that fails makes them.
func TestCompactOfWhatCannotBeRead(t *testing.T) {
	path, _ := drained(t)
	_, err := store.Compact(&cutting{t.Context(), path}, path, store.CompactOptions{DryRun: true})
	if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v", err)
	}
}
