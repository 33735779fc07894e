//go:build !(linux || darwin || freebsd)

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Space says how large the file system is that path is on, and how much of it is left to a process without privileges, in
// bytes. It may hang as long as the file system does. The error is errors.ErrUnsupported where there is no way to ask.
func Space(path string) (free, size int64, err error) {
	return 0, 0, fmt.Errorf("space of %s: %w", path, errors.ErrUnsupported)
}

func keepOwner(*os.File, fs.FileInfo) error { return nil }
