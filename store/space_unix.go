//go:build linux || darwin || freebsd

package store

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// Space says how large the file system is that path is on, and how much of it is left to a process without privileges, in
// bytes. It may hang as long as the file system does. The error is errors.ErrUnsupported where there is no way to ask.
func Space(path string) (free, size int64, err error) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(path, &s); err != nil {
		return 0, 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	unit := int64(s.Bsize) //nolint:unconvert // the types differ between systems
	return int64(s.Bavail) * unit, int64(s.Blocks) * unit, nil
}

// keepOwner gives a file the owner of another one: a command that root runs must not lock the broker out.
func keepOwner(f *os.File, like fs.FileInfo) error {
	want, ok := like.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("its owner can't be told")
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if has, ok := info.Sys().(*syscall.Stat_t); ok && has.Uid == want.Uid && has.Gid == want.Gid {
		return nil
	}
	return f.Chown(int(want.Uid), int(want.Gid))
}
