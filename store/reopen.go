package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
)

// reopen opens the file anew after a failed flush, however long that takes, and then has the committer's goroutine go on.
// Its own goroutine is needed since a large file takes a while, in which writes are to fail at once.
func (c *committer) reopen() {
	s := c.s
	_ = s.db.Load().Close() // what it was to write has failed already
	failure := s.Err()
	said := ""
	for {
		select {
		case <-time.After(c.wait):
		case <-c.stopped:
			return
		}
		c.wait = min(2*c.wait, maxReopenAfter)
		db, err := c.openAnew()
		if err == nil {
			s.db.Store(db)
			c.reopened <- struct{}{}
			return
		}
		if errors.Is(err, ErrClosed) {
			return
		}
		now := fmt.Errorf("%w; not open again since: %w", failure, err)
		c.failed.Store(&now)
		if text := err.Error(); text != said {
			said = text
			s.log.Error("store can't be opened again yet", slog.String("path", s.path), slog.Any("error", err))
		}
	}
}

// openAnew verifies the file, undoes the flush that has failed, and proves that flushes work again.
func (c *committer) openAnew() (*bbolt.DB, error) {
	s := c.s
	found, err := verify(s.path, s.o.LockTimeout, c.stopped)
	if err == nil && (found == c.flushed || found == c.flushed+1) {
		if err = s.undo(c.flushed + 1); err == nil && found > c.flushed {
			s.log.Warn("what had failed to be flushed is taken back", slog.String("path", s.path))
			found, err = verify(s.path, s.o.LockTimeout, c.stopped)
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w; a new one isn't made in its place", err)
	case err != nil:
		return nil, err
	case found < c.flushed && s.replaced():
		return nil, fmt.Errorf("open store %s: another file was put in its place, which ends with flush %d where flush %d has succeeded: restart the broker to go on with it, if it was compacted or is meant to be older",
			s.path, found, c.flushed)
	case found < c.flushed:
		return nil, &CorruptError{Path: s.path, Reason: fmt.Sprintf("it ends with flush %d, but flush %d has succeeded", found, c.flushed)}
	case found > c.flushed:
		return nil, fmt.Errorf("open store %s: it has flush %d after flush %d: another process has written to it; restart the broker", s.path, found, c.flushed)
	}
	db, err := s.open()
	if err != nil {
		return nil, err
	}
	if err := s.tryFlush(db); err != nil {
		return nil, errors.Join(fmt.Errorf("write to store %s: %w", s.path, err), db.Close())
	}
	c.flushed = flushed(db)
	return db, nil
}

// replaced reports whether there is another file at the path than the one that was open.
func (s *Store) replaced() bool {
	there, err := os.Stat(s.path)
	return err == nil && !os.SameFile(there, s.file)
}

// undo sets the file back from flush number, which has failed, to the one before.
//
// A flush that has failed may be there all the same: the disk has it, or only the page cache, which the system takes for
// written after it has told of the failure once. It can't be told which. Building on what the disk lacks would destroy both
// states, since flushes reuse the pages that the one before has freed. The state before is whole in any case: its flush has
// succeeded, and no page of it is overwritten before the next one has. So its meta page is put, as if it were a flush older,
// in the place of the failed one's, where the next flush's will be. That is done whether the failed one is to be seen or not:
// what is seen instead may be an undoing that could not be flushed, and that the disk lacks.
func (s *Store) undo(number uint64) (err error) {
	var f *os.File
	// For its lock: nobody else may have the file open.
	db, err := s.openFile(func(name string, flag int, perm os.FileMode) (_ *os.File, err error) {
		f, err = s.o.OpenFile(name, flag&^os.O_CREATE, perm)
		return f, err
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()

	size := int64(db.Info().PageSize)
	page := make([]byte, size)
	if _, err := f.ReadAt(page, int64((number-1)%2)*size); err != nil {
		return fmt.Errorf("read store: %w", err)
	}
	meta := page[pageHeaderSize : pageHeaderSize+metaSize]
	if native.Uint64(meta[metaTxid:]) != number-1 || native.Uint64(meta[metaSize-8:]) != metaSum(meta) {
		return &CorruptError{Path: s.path, Reason: fmt.Sprintf("flush %d has succeeded, and can't be found", number-1)}
	}
	native.PutUint64(page, number%2)
	native.PutUint64(meta[metaTxid:], number-2)
	native.PutUint64(meta[metaSize-8:], metaSum(meta))
	if _, err := f.WriteAt(page, int64(number%2)*size); err != nil {
		return fmt.Errorf("write to store: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write to store: %w", err)
	}
	return nil
}

// confirm has the two meta pages of a file that has just been opened on the disk as they are seen. When the process before has ended
// after a failed flush, or after an undoing that could not be flushed, what is seen may be in the page cache alone. The newest flush
// may be missing on the disk: what is flushed next would overwrite pages of the one before, which a power cut would fall back on. Or the
// disk may still have one that was taken back: a power cut would go on with that, though its pages were overwritten by then. Where the disk
// has what is seen, the same bytes are written over it. What matters of a meta page lies within a sector, so that it can't be torn.
func confirm(f *os.File, db *bbolt.DB) error {
	pages := make([]byte, 2*db.Info().PageSize)
	if _, err := f.ReadAt(pages, 0); err != nil {
		return fmt.Errorf("read store: %w", err)
	}
	if _, err := f.WriteAt(pages, 0); err != nil {
		return fmt.Errorf("write to store: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write to store: %w", err)
	}
	return nil
}

// tryFlush writes what is there already. A disk that fails is noticed before anybody trusts it.
func (s *Store) tryFlush(db *bbolt.DB) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer catch(&err)
	return db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(metaBucket)).Put([]byte(formatKey), binary.BigEndian.AppendUint32(nil, Format))
	})
}

// resume goes on after reopen.
func (c *committer) resume() {
	c.finish(c.cut(), c.s.Err()) // whoever wrote when nothing was written is told so
	c.failed.Store(nil)
	c.s.metrics.reopenings.Inc()
	c.s.log.Info("store is open again, and takes writes", slog.String("path", c.s.path))
	for _, fn := range c.onReopen {
		fn()
	}
}
