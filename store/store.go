// Package store keeps named buckets of ordered keys in one bbolt file, written by one group-committing goroutine:
// what many callers write while a flush is under way goes to disk together in the next one, so a flush is shared
// by all who wait for it.
//
// A flush that fails is undone, whatever of it the disk has: the file is opened anew, verified, set back to the flush
// before, and written again, by itself. So what an owner keeps in memory of what was flushed stays true.
//
// It does not know what it stores: keys and values are opaque, and whoever owns a bucket owns its format. It does not
// limit how much may be queued for the next flush either; callers bound what they write.
package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// Format is the version of the file layout that this build writes, and the newest that it reads.
const Format = 1

const (
	// metaBucket holds what the store itself needs to know about its file.
	metaBucket = "store.meta"
	formatKey  = "format"

	// defaultLockTimeout covers the moment in which a predecessor that is being replaced still closes its file.
	defaultLockTimeout = 2 * time.Second

	// A disk that has just failed is given a moment. One that fails again and again is not read from end to end all the
	// time.
	defaultReopenAfter = time.Second
	maxReopenAfter     = 30 * time.Second

	// initialMmapSize is address space only. bbolt must wait for every reader before it maps a grown file anew;
	// with 64 MiB from the start a store of normal size never does.
	initialMmapSize = 64 << 20
)

var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("another process has it open")
	// ErrCorrupt is what every *CorruptError is.
	ErrCorrupt = errors.New("damaged")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store is closed")
)

// A VersionError says that a file was written by a newer build. The file is left as it is.
type VersionError struct {
	Path         string
	Found, Known uint32
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("open store %s: it has format %d, written by a newer version; this one reads up to format %d", e.Path, e.Found, e.Known)
}

// A CorruptError says that a file isn't what was written to it. The file is left as it is, for a copy or a repair;
// nothing ever starts empty in its place.
type CorruptError struct {
	Path   string
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("store %s is damaged: %s; the file was left as it is: restore it from a backup, or move it away to start empty", e.Path, e.Reason)
}

// Is reports whether target is ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Options say how a store is opened. The zero value is usable.
type Options struct {
	// Buckets are created if they are missing. Only these can be written and read. Their keys should mostly be written
	// in ascending order: pages are filled for that.
	Buckets []string
	// LockTimeout bounds the wait for another process to close the file. Zero: 2 s.
	LockTimeout time.Duration
	// ReopenAfter is the least time from a failed flush until the file is opened anew. It doubles up to 30 s until a flush
	// succeeds. Zero: 1 s.
	ReopenAfter time.Duration
	// OpenFile replaces os.OpenFile, so that a test can get at the descriptor and make the disk fail under the store.
	OpenFile func(name string, flag int, perm os.FileMode) (*os.File, error)
	// Logger gets a message when a flush fails, when the reason changes for which nothing is written, and when writing
	// goes on. Nil: none.
	Logger *slog.Logger
	// Registerer gets the store's metrics until it is closed. Nil: none.
	Registerer prometheus.Registerer
}

// A Store is an open file. All its methods may be used concurrently.
type Store struct {
	path    string
	o       Options
	db      atomic.Pointer[bbolt.DB] // a closed one after a flush has failed, until the file is open again
	file    fs.FileInfo              // of the file that was opened last
	buckets []string
	page    int64 // the file's page size, in bytes; the system's may be another
	log     *slog.Logger
	metrics *metrics

	committer committer
}

// Open opens the store at path, or creates it, readable and writable by its owner only; the folder must exist. An
// existing file is checked from end to end before anything may be written to it. The errors are *VersionError,
// *CorruptError, ErrLocked, and those of the file system, each naming the file.
func Open(path string, o Options) (*Store, error) {
	if o.LockTimeout <= 0 {
		o.LockTimeout = defaultLockTimeout
	}
	if o.ReopenAfter <= 0 {
		o.ReopenAfter = defaultReopenAfter
	}
	if o.OpenFile == nil {
		o.OpenFile = os.OpenFile
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	for _, name := range o.Buckets {
		if name == "" || name == metaBucket {
			return nil, fmt.Errorf("open store %s: bucket name %q is not allowed", path, name)
		}
	}
	switch _, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if err := create(path, o); err != nil {
			return nil, fmt.Errorf("create store %s: %w", path, err)
		}
	case err != nil:
		return nil, fmt.Errorf("open store: %w", err)
	}
	if _, err := verify(path, o.LockTimeout, nil); err != nil {
		return nil, err
	}

	s := &Store{path: path, o: o, buckets: slices.Clone(o.Buckets), log: o.Logger}
	db, err := s.open()
	if err != nil {
		return nil, err
	}
	s.db.Store(db)
	s.page = int64(db.Info().PageSize)
	s.committer.flushed = flushed(db)
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: register metrics: %w", path, err), s.closeFile())
	}
	s.committer.start(s)
	return s, nil
}

// create makes an empty store beside path and then renames it: a file at path is always complete, so one that has been
// cut to nothing is never mistaken for a new one.
func create(path string, o Options) error {
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	db, err := bbolt.Open(temp, 0o600, &bbolt.Options{Timeout: o.LockTimeout, NoFreelistSync: true})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte(metaBucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(formatKey), binary.BigEndian.AppendUint32(nil, Format))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	// Not there any more: another process that was started at the same moment has renamed it.
	if err := os.Rename(temp, path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// syncFolder makes a new directory entry survive a power cut.
func syncFolder(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // folders can't be flushed there
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// openFile opens a verified file.
func (s *Store) openFile(open func(string, int, os.FileMode) (*os.File, error)) (db *bbolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = &CorruptError{Path: s.path, Reason: fmt.Sprint(r)}
		}
	}()
	var f *os.File
	db, err = bbolt.Open(s.path, 0o600, &bbolt.Options{
		Timeout:         s.o.LockTimeout,
		InitialMmapSize: initialMmapSize,
		// The map finds a span of free pages without walking a list that is as long as the last outage was.
		FreelistType: bbolt.FreelistMapType,
		// A synced free list is written whole in every commit, 8 bytes for each free page: 2 MB per flush once a
		// backlog of 1 GB has drained. It is no matter of crash safety: the list is derived from the tree at open.
		NoFreelistSync: true,
		OpenFile: func(name string, flag int, perm os.FileMode) (_ *os.File, err error) {
			f, err = open(name, flag, perm)
			return f, err
		},
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("open store %s: %w", s.path, ErrLocked)
	case err != nil:
		return nil, fmt.Errorf("open store %s: %w", s.path, err)
	}
	// While this waited for the lock, a compaction may have put another file there: what is written to this one is lost.
	locked, err := f.Stat()
	if err == nil {
		var there fs.FileInfo
		if there, err = os.Stat(s.path); err == nil && !os.SameFile(locked, there) {
			err = errors.New("another file was put in its place meanwhile; try again")
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", s.path, err), db.Close())
	}
	return db, nil
}

// open opens a verified file, and makes the buckets that it doesn't have yet.
func (s *Store) open() (db *bbolt.DB, err error) {
	var f *os.File
	if db, err = s.openFile(func(name string, flag int, perm os.FileMode) (_ *os.File, err error) {
		f, err = s.o.OpenFile(name, flag, perm)
		return f, err
	}); err != nil {
		return nil, err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = &CorruptError{Path: s.path, Reason: fmt.Sprint(r)}
		}
		if err != nil {
			err = errors.Join(err, db.Close())
			db = nil
		}
	}()
	if s.file, err = f.Stat(); err != nil {
		return db, fmt.Errorf("open store %s: %w", s.path, err)
	}
	missing, err := s.checkContent(db)
	if err != nil {
		return db, err
	}
	if err := confirm(f, db); err != nil {
		return db, fmt.Errorf("open store %s: %w", s.path, err)
	}
	if len(missing) > 0 {
		if err := db.Update(func(tx *bbolt.Tx) error {
			for _, name := range missing {
				if _, err := tx.CreateBucket([]byte(name)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return db, fmt.Errorf("open store %s: %w", s.path, err)
		}
	}
	return db, nil
}

// flushed is the number of the flush whose state a file has, as bbolt counts them.
func flushed(db *bbolt.DB) (txid uint64) {
	_ = db.View(func(tx *bbolt.Tx) error { // of a file that has just been opened
		txid = uint64(tx.ID())
		return nil
	})
	return txid
}

// checkContent checks the format and says which buckets aren't there yet.
func (s *Store) checkContent(db *bbolt.DB) (missing []string, err error) {
	err = db.View(func(tx *bbolt.Tx) error {
		var v []byte
		if b := tx.Bucket([]byte(metaBucket)); b != nil {
			v = b.Get([]byte(formatKey))
		}
		if len(v) != 4 {
			return &CorruptError{Path: s.path, Reason: "it holds no format version, so it is no store of this broker"}
		}
		if found := binary.BigEndian.Uint32(v); found != Format {
			return &VersionError{Path: s.path, Found: found, Known: Format}
		}
		for _, name := range s.buckets {
			if tx.Bucket([]byte(name)) == nil {
				missing = append(missing, name)
			}
		}
		return nil
	})
	return missing, err
}

func (s *Store) closeFile() error {
	if s.metrics != nil {
		s.metrics.unregister()
	}
	return s.db.Load().Close()
}

// Path is the file's path, as it was given to Open.
func (s *Store) Path() string { return s.path }

// A View reads one consistent state of the store: that after some flush. It is valid only inside the function it was
// given to, on its goroutine.
type View struct {
	s  *Store
	tx *bbolt.Tx
	// inside is true while bbolt runs: a panic then is the file's fault, not the caller's.
	inside bool
}

// View calls fn with a read-only view and returns its error. A long view keeps space from being reused and stops the
// file from growing past its mapping, which stops every flush: read a lot in pieces. The error is ErrClosed after Close,
// that of Err while the file is not open since a flush has failed, and a *CorruptError if the file can't be read.
func (s *Store) View(fn func(*View) error) (err error) {
	// A page that the disk can't give back is a fault in mapped memory.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	v := &View{s: s}
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		if _, fault := r.(interface{ Addr() uintptr }); !fault && !v.inside {
			panic(r)
		}
		err = &CorruptError{Path: s.path, Reason: fmt.Sprint(r)}
	}()
	for {
		db := s.db.Load()
		entered := false
		err = db.View(func(tx *bbolt.Tx) error {
			entered = true
			v.tx = tx
			return fn(v)
		})
		if entered || !errors.Is(err, berrors.ErrDatabaseNotOpen) {
			return err
		}
		// In this order: the new file is there before the error is gone.
		if err := s.Err(); err != nil {
			return err
		}
		if s.db.Load() == db {
			return ErrClosed
		}
	}
}

// Get returns the value of a key, or nil if there is none. The slice must not be changed, nor used after the view.
func (v *View) Get(bucket string, key []byte) []byte {
	v.inside = true
	b := v.tx.Bucket([]byte(bucket))
	var value []byte
	if b != nil {
		value = b.Get(key)
	}
	v.inside = false
	return value
}

// ForEach calls fn for the keys of a bucket in ascending order, from the first one that is not below from (nil: from the
// start), until it returns false. The slices must not be changed, nor used after the call.
func (v *View) ForEach(bucket string, from []byte, fn func(key, value []byte) bool) {
	v.inside = true
	b := v.tx.Bucket([]byte(bucket))
	if b == nil {
		v.inside = false
		return
	}
	c := b.Cursor()
	key, value := c.Seek(from)
	for ; key != nil; key, value = c.Next() {
		v.inside = false
		if !fn(key, value) {
			return
		}
		v.inside = true
	}
	v.inside = false
}

// Size is the part of the file that has ever been used, in bytes; 0 if the store is closed. Space that is freed is used
// again; the file doesn't shrink.
func (s *Store) Size() int64 {
	var size int64
	if err := s.View(func(v *View) error {
		size = v.tx.Size()
		return nil
	}); err != nil {
		return 0
	}
	return size
}

// Reusable is how much of Size is free for what is written next, in bytes; 0 if the file isn't open. Long values may not fit
// into what is free, since they take pages in a row.
func (s *Store) Reusable() int64 {
	if s.Err() != nil {
		return 0
	}
	stats := s.db.Load().Stats()
	return int64(stats.FreePageN+stats.PendingPageN) * s.page
}

// Close flushes what was written, whether lazily or not, closes the file and makes every later Write fail. It waits for
// views to end. If ctx ends first, its error is returned and the closing goes on by itself. A second Close does nothing
// but wait.
func (s *Store) Close(ctx context.Context) error {
	s.committer.stop()
	select {
	case <-s.committer.closed:
		return s.committer.closeErr
	case <-ctx.Done():
		return fmt.Errorf("close store %s: %w", s.path, ctx.Err())
	}
}

// check says what is wrong with ops, if anything: a mistake of one caller must not fail the flush of all.
func (s *Store) check(ops []Op) error {
	for _, op := range ops {
		switch {
		case !slices.Contains(s.buckets, op.Bucket):
			return fmt.Errorf("write to store: unknown bucket %q; it has %s", op.Bucket, strings.Join(s.buckets, ", "))
		case len(op.Key) == 0 || len(op.Key) > bbolt.MaxKeySize:
			return fmt.Errorf("write to store: a key of %d bytes; from 1 to %d are possible", len(op.Key), bbolt.MaxKeySize)
		case len(op.Value) > bbolt.MaxValueSize:
			return fmt.Errorf("write to store: a value of %d bytes; up to %d are possible", len(op.Value), bbolt.MaxValueSize)
		}
	}
	return nil
}
