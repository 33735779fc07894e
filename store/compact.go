package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
)

const (
	compactSuffix = ".compact"
	// compactChunk bounds what a compaction holds in memory, in bytes of keys and values.
	compactChunk = 16 << 20
	// compactReserve is left free beside the copy.
	compactReserve = 16 << 20
)

// CompactOptions say how a store is compacted. The zero value is usable.
type CompactOptions struct {
	// LockTimeout bounds the wait for another process to close the file. Zero: 2 s.
	LockTimeout time.Duration
	// DryRun changes nothing, and estimates what would come of it.
	DryRun bool
}

// Compacted is what a compaction has come to.
type Compacted struct {
	Before, After int64 // sizes of the file in bytes; After is an estimate in a dry run
}

// Compact makes the file at path, which nobody may have open, as small as what it holds, and gives the rest back to the file
// system. It copies into a file beside it, compares that key by key, and puts it in the old one's place: whenever it is cut
// off, there is one whole file at path, and what it left beside it is removed by the next call. It refuses if the copy might
// not fit on the disk. The errors are those of Open, that of ctx, and those of the file system.
func Compact(ctx context.Context, path string, o CompactOptions) (c Compacted, err error) {
	if o.LockTimeout <= 0 {
		o.LockTimeout = defaultLockTimeout
	}
	if _, err := os.Stat(path); err != nil {
		return c, fmt.Errorf("compact store: %w", err)
	}
	// What is renamed over a link would replace the link.
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return c, fmt.Errorf("compact store: %w", err)
	}
	if _, err := verify(path, o.LockTimeout, ctx.Done()); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return c, err
	}
	s := &Store{path: path, o: Options{LockTimeout: o.LockTimeout}}
	src, err := s.openFile(os.OpenFile)
	if err != nil {
		return c, err
	}
	// Its lock is held until the new file is in its place.
	defer func() { err = errors.Join(err, src.Close()) }()
	if _, err := s.checkContent(src); err != nil {
		return c, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return c, fmt.Errorf("compact store: %w", err)
	}
	c.Before = info.Size()
	temp := path + compactSuffix
	if !o.DryRun {
		if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return c, fmt.Errorf("compact store: %w", err)
		}
	}
	need, err := inUse(ctx, src)
	if err != nil {
		return c, fmt.Errorf("compact store %s: %w", path, err)
	}
	if o.DryRun {
		c.After = min(need, c.Before)
		return c, nil
	}
	switch free, _, err := Space(filepath.Dir(path)); {
	case errors.Is(err, errors.ErrUnsupported):
	case err != nil:
		return c, fmt.Errorf("compact store: %w", err)
	case free < need+compactReserve:
		return c, fmt.Errorf("compact store %s: the copy takes up to %d bytes, and %d are free", path, need+compactReserve, free)
	}
	if err := rewrite(ctx, src, temp, info); err != nil {
		return c, errors.Join(fmt.Errorf("compact store %s: %w", path, err), removeFile(temp))
	}
	if info, err = os.Stat(temp); err != nil {
		return c, fmt.Errorf("compact store: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return c, errors.Join(fmt.Errorf("compact store: %w", err), removeFile(temp))
	}
	c.After = info.Size()
	return c, syncFolder(filepath.Dir(path))
}

func removeFile(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// inUse estimates, rather too high, how many bytes a copy of src takes.
func inUse(ctx context.Context, src *bbolt.DB) (n int64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer catch(&err)
	page := int64(src.Info().PageSize)
	n = 8 * page // meta pages, and what the roots take
	err = src.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			s := b.Stats()
			n += int64(s.BranchAlloc + s.LeafAlloc)
			return ctx.Err()
		})
	})
	return n, err
}

// catch makes an error of what bbolt runs into in a damaged file. Deferred after SetPanicOnFault, that includes pages which
// the disk can't give back.
func catch(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v", ErrCorrupt, r)
	}
}

// rewrite copies src into a new file at temp that is whole and on disk when it returns.
func rewrite(ctx context.Context, src *bbolt.DB, temp string, like fs.FileInfo) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer catch(&err)
	var f *os.File
	dst, err := bbolt.Open(temp, like.Mode().Perm(), &bbolt.Options{
		// Each flush but the last would be for nothing.
		NoSync: true, NoGrowSync: true,
		NoFreelistSync: true, FreelistType: bbolt.FreelistMapType, NoStatistics: true,
		PageSize: src.Info().PageSize,
		OpenFile: func(name string, flag int, perm os.FileMode) (_ *os.File, err error) {
			f, err = os.OpenFile(name, flag|os.O_EXCL, perm)
			return f, err
		},
	})
	if err != nil {
		return err
	}
	defer func() {
		if dst != nil {
			err = errors.Join(err, dst.Close())
		}
	}()
	if err := errors.Join(f.Chmod(like.Mode().Perm()), keepOwner(f, like)); err != nil {
		return err
	}
	if err := copyKeys(ctx, src, dst); err != nil {
		return err
	}
	if err := compare(ctx, src, dst); err != nil {
		return err
	}
	var used int64
	if err := dst.View(func(tx *bbolt.Tx) error {
		used = tx.Size()
		return nil
	}); err != nil {
		return err
	}
	err, dst = dst.Close(), nil
	if err != nil {
		return err
	}
	if f, err = os.OpenFile(temp, os.O_RDWR, 0); err != nil {
		return err
	}
	// bbolt lets files grow in steps.
	if err := errors.Join(f.Truncate(used), f.Sync(), f.Close()); err != nil {
		return err
	}
	_, err = verify(temp, defaultLockTimeout, ctx.Done())
	return err
}

// copyKeys is bbolt.Compact, but that it can be stopped.
func copyKeys(ctx context.Context, src, dst *bbolt.DB) error {
	return src.View(func(from *bbolt.Tx) error {
		return from.ForEach(func(name []byte, b *bbolt.Bucket) error {
			c := b.Cursor()
			for key, value := c.First(); ; {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := dst.Update(func(to *bbolt.Tx) error {
					bucket, err := to.CreateBucketIfNotExists(name)
					if err != nil {
						return err
					}
					bucket.FillPercent = fillPercent
					for size := 0; key != nil && size < compactChunk; key, value = c.Next() {
						if err := bucket.Put(key, value); err != nil {
							return fmt.Errorf("bucket %s: %w", name, err)
						}
						size += len(key) + len(value)
					}
					return nil
				}); err != nil {
					return err
				}
				if key == nil {
					return nil
				}
			}
		})
	})
}

// compare fails unless two files hold the same.
func compare(ctx context.Context, a, b *bbolt.DB) error {
	return a.View(func(one *bbolt.Tx) error {
		return b.View(func(other *bbolt.Tx) error {
			return one.ForEach(func(name []byte, bucket *bbolt.Bucket) error {
				twin := other.Bucket(name)
				if twin == nil {
					return fmt.Errorf("bucket %s was not copied", name)
				}
				c, d := bucket.Cursor(), twin.Cursor()
				key, value := c.First()
				key2, value2 := d.First()
				for n := 0; ; n++ {
					if n%1024 == 0 && ctx.Err() != nil {
						return ctx.Err()
					}
					if !bytes.Equal(key, key2) || !bytes.Equal(value, value2) {
						return fmt.Errorf("bucket %s: the copy differs at key %x", name, key)
					}
					if key == nil {
						return nil
					}
					key, value = c.Next()
					key2, value2 = d.Next()
				}
			})
		})
	})
}
