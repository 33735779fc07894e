package store_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.etcd.io/bbolt"

	"github.com/throughline-mqtt/throughline/store"
)

const bucket = "things"

func TestWriteAndRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	wait(t, s.Write([]store.Op{put("a", "1"), put("b", "2"), put("c", "3")}))
	wait(t, s.Write([]store.Op{del("b"), put("c", "4"), put("d", ""), del("never there")}))
	want := "a=1 c=4 d="
	if got := content(t, s, ""); got != want {
		t.Errorf("content %q, want %q", got, want)
	}
	if got := content(t, s, "b"); got != "c=4 d=" {
		t.Errorf("content from b %q", got)
	}
	closeStore(t, s)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file %v, error %v, want mode 0600", info, err)
	}
	if got := content(t, open(t, path), ""); got != want {
		t.Errorf("content after reopening %q, want %q", got, want)
	}
}

func TestForEachStops(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	wait(t, s.Write([]store.Op{put("a", "1"), put("b", "2")}))
	calls := 0
	err := s.View(func(v *store.View) error {
		v.ForEach(bucket, nil, func(_, _ []byte) bool { calls++; return false })
		v.ForEach("unknown", nil, func(_, _ []byte) bool { calls++; return true })
		return nil
	})
	if err != nil || calls != 1 {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

// TestOrder has everything that is promised of the order: of application, of Applied, and of that before Done.
func TestOrder(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	const n = 2000
	var applied []int // of the committer's goroutine alone until the last commit is done
	var last *store.Commit
	flushes := 0
	for i := range n {
		c := s.Do(store.Request{
			Ops:     []store.Op{put("k", fmt.Sprint(i))},
			Lazy:    i%3 == 0,
			Applied: func(err error) { applied = append(applied, i) },
		})
		if c != last {
			flushes++
		}
		last = c
	}
	wait(t, s.Write(nil))
	if got, want := content(t, s, ""), fmt.Sprintf("k=%d", n-1); got != want {
		t.Errorf("content %q, want %q", got, want)
	}
	for i, got := range applied {
		if got != i {
			t.Fatalf("request %d was applied as number %d", got, i)
		}
	}
	if len(applied) != n {
		t.Errorf("%d requests applied, want %d", len(applied), n)
	}
	if flushes > n/2 {
		t.Errorf("%d writes took %d flushes: they don't share them", n, flushes)
	}
}

func TestConcurrentWriters(t *testing.T) {
	r := prometheus.NewRegistry()
	s := openWith(t, filepath.Join(t.TempDir(), "s.db"), store.Options{Buckets: []string{bucket}, Registerer: r})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 50 {
				key := fmt.Sprintf("%d-%02d", w, i)
				if err := s.Write([]store.Op{put(key, key)}).Wait(t.Context()); err != nil {
					t.Error(err)
				}
				err := s.View(func(v *store.View) error {
					if got := string(v.Get(bucket, []byte(key))); got != key {
						t.Errorf("%s is %q right after its commit", key, got)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n, err := testutil.GatherAndCount(r); err != nil || n != 5 {
		t.Errorf("%d metrics, error %v, want 5", n, err)
	}
	closeStore(t, s)
	if n, err := testutil.GatherAndCount(r); err != nil || n != 0 {
		t.Errorf("%d metrics after Close, error %v, want none", n, err)
	}
}

func TestLazy(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	wait(t, s.Do(store.Request{Ops: []store.Op{put("alone", "1")}, Lazy: true}))

	lazy := s.Do(store.Request{Ops: []store.Op{put("a", "1")}, Lazy: true})
	urgent := s.Write([]store.Op{put("b", "2")})
	if lazy != urgent {
		t.Error("a lazy write didn't join the flush of the next one")
	}
	wait(t, urgent)

	lazy = s.Do(store.Request{Ops: []store.Op{put("c", "3")}, Lazy: true})
	closeStore(t, s)
	select {
	case <-lazy.Done():
	default:
		t.Error("Close left a lazy write behind")
	}
	if err := lazy.Err(); err != nil {
		t.Error(err)
	}
}

func TestCommit(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	c := s.Do(store.Request{Ops: []store.Op{put("a", "1")}, Lazy: true})
	before := make(chan error, 1)
	c.Watch(func(err error) { before <- err })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Wait(ctx); err == nil {
		<-c.Done() // it was done already
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("Wait: %v", err)
	}
	wait(t, c)
	if err := <-before; err != nil {
		t.Error(err)
	}
	after := false
	c.Watch(func(error) { after = true })
	if !after {
		t.Error("Watch on a commit that is done didn't call at once")
	}
	failed := errors.New("x")
	if err := store.Completed(failed).Err(); err != failed {
		t.Errorf("Err: %v", err)
	}
}

func TestImpossibleRequests(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	for _, tt := range []struct {
		name string
		op   store.Op
		want string
	}{
		{"unknown bucket", store.Op{Bucket: "x", Key: []byte("a")}, `unknown bucket "x"`},
		{"store's own bucket", store.Op{Bucket: "store.meta", Key: []byte("format")}, "unknown bucket"},
		{"no key", store.Op{Bucket: bucket}, "a key of 0 bytes"},
		{"long key", store.Op{Bucket: bucket, Key: make([]byte, 1<<16)}, "a key of 65536 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			applied := make(chan error, 1)
			err := s.Do(store.Request{Ops: []store.Op{put("good", "1"), tt.op}, Applied: func(err error) { applied <- err }}).Wait(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if got := <-applied; got != err {
				t.Errorf("Applied got %v", got)
			}
		})
	}
	if got := content(t, s, ""); got != "" {
		t.Errorf("content %q of refused requests", got)
	}
	wait(t, s.Write([]store.Op{put("a", "1")}))
}

func TestClosed(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	closeStore(t, s)
	closeStore(t, s)
	if err := s.Write([]store.Op{put("a", "1")}).Wait(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
	if err := s.View(func(*store.View) error { return nil }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("View: %v", err)
	}
}

func TestCloseIsBounded(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	err := s.View(func(*store.View) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := s.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Close during a view: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	closeStore(t, s)
}

func TestViewPassesOn(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	want := errors.New("x")
	if err := s.View(func(*store.View) error { return want }); err != want {
		t.Errorf("error %v", err)
	}
	defer func() {
		if r := recover(); r != "mine" {
			t.Errorf("recovered %v", r)
		}
	}()
	s.View(func(*store.View) error { panic("mine") })
	t.Error("a caller's panic was swallowed")
}

func TestOpenRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(t *testing.T, path string)
		is   error
		want string
	}{
		{"empty file", func(t *testing.T, path string) { writeFile(t, path, nil) }, store.ErrCorrupt, "it is empty"},
		{"text", func(t *testing.T, path string) { writeFile(t, path, []byte(strings.Repeat("text ", 5000))) }, store.ErrCorrupt, "invalid"},
		{"folder", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, nil, "not a regular file"},
		{"somebody else's bbolt file", func(t *testing.T, path string) {
			editFile(t, path, func(tx *bbolt.Tx) error {
				_, err := tx.CreateBucket([]byte("other"))
				return err
			})
		}, store.ErrCorrupt, "no format version"},
		{"newer version", func(t *testing.T, path string) {
			closeStore(t, open(t, path))
			editFile(t, path, func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("store.meta")).Put([]byte("format"), binary.BigEndian.AppendUint32(nil, store.Format+1))
			})
		}, nil, "has format 2, written by a newer version; this one reads up to format 1"},
		{"locked", func(t *testing.T, path string) { open(t, path) }, store.ErrLocked, "another process"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s.db")
			tt.make(t, path)
			_, err := store.Open(path, store.Options{Buckets: []string{bucket}, LockTimeout: 100 * time.Millisecond})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Fatalf("error %v, want one that names %s and has %q", err, path, tt.want)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v is no %v", err, tt.is)
			}
		})
	}

	t.Run("version error", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s.db")
		closeStore(t, open(t, path))
		editFile(t, path, func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("store.meta")).Put([]byte("format"), binary.BigEndian.AppendUint32(nil, 7))
		})
		_, err := store.Open(path, store.Options{})
		var v *store.VersionError
		if !errors.As(err, &v) || v.Found != 7 || v.Known != store.Format {
			t.Errorf("error %#v", err)
		}
	})

	t.Run("bucket names", func(t *testing.T) {
		for _, name := range []string{"", "store.meta"} {
			if _, err := store.Open(filepath.Join(t.TempDir(), "s.db"), store.Options{Buckets: []string{name}}); err == nil {
				t.Errorf("bucket %q was accepted", name)
			}
		}
	})

	t.Run("no folder", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "missing", "s.db")
		if _, err := store.Open(path, store.Options{}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("error %v", err)
		}
	})
}

// TestOpenAfterCompaction opens a file with a free list in it, as bbolt's own tool leaves it.
func TestOpenAfterCompaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	fill(t, s, 2000)
	closeStore(t, s)
	editFile(t, path, func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte(bucket))
		for i := range 1000 {
			if err := b.Delete([]byte(fmt.Sprintf("%06d", i))); err != nil {
				return err
			}
		}
		return nil
	})
	s = open(t, path)
	wait(t, s.Write([]store.Op{put("a", "1")}))
	if n := strings.Count(content(t, s, ""), "="); n != 1001 {
		t.Errorf("%d keys, want 1001", n)
	}
}

// TestSpaceIsReused: under steady load the file stops growing.
func TestSpaceIsReused(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "s.db"))
	const backlog = 2000
	fill(t, s, backlog)
	size := s.Size()
	for i := backlog; i < 5*backlog; i += 100 {
		ops := make([]store.Op, 0, 200)
		for j := i; j < i+100; j++ {
			ops = append(ops, put(fmt.Sprintf("%06d", j), value), del(fmt.Sprintf("%06d", j-backlog)))
		}
		wait(t, s.Write(ops))
	}
	if s.Size() > 2*size {
		t.Errorf("%d bytes have become %d after writing and deleting four times as much", size, s.Size())
	}
}

var value = strings.Repeat("v", 100)

// fill writes keys 000000 and up, in several flushes.
func fill(tb testing.TB, s *store.Store, n int) {
	tb.Helper()
	for i := 0; i < n; {
		var ops []store.Op
		for range min(500, n-i) {
			ops = append(ops, put(fmt.Sprintf("%06d", i), value))
			i++
		}
		wait(tb, s.Write(ops))
	}
}

func put(key, value string) store.Op {
	return store.Op{Bucket: bucket, Key: []byte(key), Value: append([]byte{}, value...)}
}

func del(key string) store.Op { return store.Op{Bucket: bucket, Key: []byte(key)} }

func wait(tb testing.TB, c *store.Commit) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := c.Wait(ctx); err != nil {
		tb.Fatal(err)
	}
}

func content(tb testing.TB, s *store.Store, from string) string {
	tb.Helper()
	var all []string
	err := s.View(func(v *store.View) error {
		v.ForEach(bucket, []byte(from), func(key, value []byte) bool {
			all = append(all, fmt.Sprintf("%s=%s", key, value))
			return true
		})
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return strings.Join(all, " ")
}

func open(tb testing.TB, path string) *store.Store {
	tb.Helper()
	return openWith(tb, path, store.Options{Buckets: []string{bucket}})
}

func openWith(tb testing.TB, path string, o store.Options) *store.Store {
	tb.Helper()
	s, err := store.Open(path, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closeStore(tb, s) })
	return s
}

func closeStore(tb testing.TB, s *store.Store) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		tb.Error(err)
	}
}

// editFile changes a file behind the store's back, and leaves a free list in it.
func editFile(tb testing.TB, path string, fn func(*bbolt.Tx) error) {
	tb.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		tb.Fatal(err)
	}
	if err := errors.Join(db.Update(fn), db.Close()); err != nil {
		tb.Fatal(err)
	}
}

func writeFile(tb testing.TB, path string, b []byte) {
	tb.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		tb.Fatal(err)
	}
}
