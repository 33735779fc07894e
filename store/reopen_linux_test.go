package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/store"
)

// disk is a file that can be made to fail under a store.
type disk struct {
	path string
	mu   sync.Mutex
	file *os.File // as the store has it open
}

func (d *disk) open(name string, flag int, perm os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(name, flag, perm)
	d.mu.Lock()
	d.file = f
	d.mu.Unlock()
	return f, err
}

// fail makes the next flush fail.
func (d *disk) fail(t *testing.T) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	replace(t, d.file, "/dev/null")
}

// twin returns the path of a copy of the store to which ops were flushed: what the disk may hold if their flush fails.
func (d *disk) twin(t *testing.T, ops []store.Op) string {
	t.Helper()
	twin := d.path + ".twin"
	b, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, twin, b)
	s := open(t, twin)
	wait(t, s.Write(ops))
	closeStore(t, s)
	return twin
}

func failing(t *testing.T, s *store.Store, ops []store.Op) error {
	t.Helper()
	c := s.Write(ops)
	<-c.Done()
	if c.Err() == nil {
		t.Fatal("the flush has not failed")
	}
	return c.Err()
}

// untilOpen waits until the store takes writes.
func untilOpen(t *testing.T, s *store.Store) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); s.Err() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not open: %v", s.Err())
		}
	}
}

// TestReopen has the n-th flush fail, so that each of the two meta pages is the one to be taken back, with the disk having
// taken the flush or not. It is undone in both cases, and the store goes on by itself.
func TestReopen(t *testing.T) {
	for n := range 4 {
		for _, reached := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/reached=%t", n, reached), func(t *testing.T) {
				d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
				r := prometheus.NewRegistry()
				s := openWith(t, d.path, store.Options{
					Buckets: []string{bucket}, OpenFile: d.open, Registerer: r, ReopenAfter: 20 * time.Millisecond,
				})
				var reopened atomic.Int32
				s.OnReopen(func() {
					if err := s.Err(); err != nil {
						t.Errorf("told of the reopening with %v", err)
					}
					reopened.Add(1)
					s.Write([]store.Op{put("told", "1")})
				})
				fill(t, s, 300)
				for i := range n {
					wait(t, s.Write([]store.Op{put("kept", fmt.Sprint(i))}))
				}
				want := content(t, s, "")
				lost := []store.Op{put("000001", "changed"), put("lost", strings.Repeat("x", 10_000)), del("000002")}
				twin := d.twin(t, lost)
				d.fail(t)
				if reached {
					if err := os.Rename(twin, d.path); err != nil {
						t.Fatal(err)
					}
				}
				failing(t, s, lost)
				untilOpen(t, s)
				wait(t, s.Write(nil)) // after what OnReopen has written
				if got := content(t, s, ""); got != want+" told=1" {
					t.Errorf("content has %d bytes, want %d", len(got), len(want))
				}
				wait(t, s.Write([]store.Op{put("later", "1"), del("told")}))
				if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP throughline_store_failed 1 after a failed flush, until the store's file was opened anew: nothing is written meanwhile.
# TYPE throughline_store_failed gauge
throughline_store_failed 0
# HELP throughline_store_reopenings_total Times that the store's file was opened anew after a failed flush, and writing went on.
# TYPE throughline_store_reopenings_total counter
throughline_store_reopenings_total 1
`), "throughline_store_failed", "throughline_store_reopenings_total"); err != nil {
					t.Error(err)
				}
				if reopened.Load() != 1 {
					t.Errorf("told %d times", reopened.Load())
				}
				closeStore(t, s)
				if got := content(t, open(t, d.path), ""); got != want+" later=1" {
					t.Errorf("content after a restart has %d bytes, want %d", len(got), len(want)+8)
				}
			})
		}
	}
}

// TestReopenNeeds has what a store must find before it goes on. It fails loudly until that is there, and leaves the file
// alone.
func TestReopenNeeds(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, sound, older []byte) []byte // nil: no file
		want   string
	}{
		{"whole file", func(_ *testing.T, sound, _ []byte) []byte { return sound[:len(sound)/2] }, "it was cut off"},
		{"all that was flushed", func(_ *testing.T, _, older []byte) []byte { return older }, "has succeeded"},
		{"any file", func(*testing.T, []byte, []byte) []byte { return nil }, "a new one isn't made in its place"},
		{"sound pages", func(_ *testing.T, sound, _ []byte) []byte {
			b := bytes.Clone(sound)
			for at := 2 * os.Getpagesize(); at < len(b); at += os.Getpagesize() {
				b[at] ^= 0xff
			}
			return b
		}, "is damaged"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
			s := openWith(t, d.path, store.Options{Buckets: []string{bucket}, OpenFile: d.open, ReopenAfter: 10 * time.Millisecond})
			fill(t, s, 300)
			older := used(t, s, d.path)
			wait(t, s.Write([]store.Op{put("newest", "1")}))
			sound := used(t, s, d.path)
			want := content(t, s, "")

			d.fail(t)
			other := d.path + ".other"
			file := tt.damage(t, sound, older)
			if err := os.Remove(d.path); err != nil {
				t.Fatal(err)
			}
			if file != nil {
				writeFile(t, d.path, file)
			}
			first := failing(t, s, []store.Op{put("lost", "1")})
			for end := time.Now().Add(10 * time.Second); !strings.Contains(s.Err().Error(), tt.want); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("error %q, want %q in it", s.Err(), tt.want)
				}
			}
			if !strings.Contains(s.Err().Error(), first.Error()) {
				t.Errorf("error %q doesn't have the first one, %q", s.Err(), first)
			}
			if err := failing(t, s, []store.Op{put("later", "1")}); !strings.Contains(err.Error(), tt.want) {
				t.Errorf("a later write: %v", err)
			}
			if err := s.View(func(*store.View) error { return nil }); err == nil || errors.Is(err, store.ErrClosed) {
				t.Errorf("View: %v", err)
			}
			if got, err := os.ReadFile(d.path); !bytes.Equal(got, file) || file == nil && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the file was changed, error %v", err)
			}
			writeFile(t, other, sound)
			if err := os.Rename(other, d.path); err != nil {
				t.Fatal(err)
			}
			untilOpen(t, s)
			if got := content(t, s, ""); got != want {
				t.Errorf("content has %d bytes, want %d", len(got), len(want))
			}
		})
	}
}

// used reads the part of the file that is in use.
func used(t *testing.T, s *store.Store, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b[:s.Size()]
}

// TestReopenReadOnly has a file system that has become read-only, as Linux makes it after an error.
func TestReopenReadOnly(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
	var readOnly atomic.Bool
	s := openWith(t, d.path, store.Options{
		Buckets: []string{bucket}, ReopenAfter: 10 * time.Millisecond,
		OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
			if readOnly.Load() && flag&os.O_RDWR != 0 {
				return nil, &os.PathError{Op: "open", Path: name, Err: syscall.EROFS}
			}
			return d.open(name, flag, perm)
		},
	})
	wait(t, s.Write([]store.Op{put("a", "1")}))
	readOnly.Store(true)
	d.fail(t)
	failing(t, s, []store.Op{put("b", "1")})
	for end := time.Now().Add(10 * time.Second); !errors.Is(s.Err(), syscall.EROFS); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("error %v", s.Err())
		}
	}
	readOnly.Store(false)
	untilOpen(t, s)
	wait(t, s.Write([]store.Op{put("c", "1")}))
	if got := content(t, s, ""); got != "a=1 c=1" {
		t.Errorf("content %q", got)
	}
}

// TestReopenUndoesWhatIsNotSeen has an undoing fail whose failed flush is not to be seen in the file. The disk may have it all
// the same, so that nothing is built on the file before the undoing has succeeded.
func TestReopenUndoesWhatIsNotSeen(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
	var readOnly atomic.Bool
	s := openWith(t, d.path, store.Options{
		Buckets: []string{bucket}, ReopenAfter: 10 * time.Millisecond,
		OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
			if readOnly.Load() && flag&os.O_CREATE == 0 { // the undoing makes no file
				return os.Open(name)
			}
			return d.open(name, flag, perm)
		},
	})
	wait(t, s.Write([]store.Op{put("a", "1")}))
	readOnly.Store(true)
	d.fail(t)
	failing(t, s, []store.Op{put("b", "1")})
	for end := time.Now().Add(10 * time.Second); !errors.Is(s.Err(), syscall.EBADF); time.Sleep(time.Millisecond) {
		if time.Now().After(end) || s.Err() == nil {
			t.Fatalf("error %v", s.Err())
		}
	}
	readOnly.Store(false)
	untilOpen(t, s)
	wait(t, s.Write([]store.Op{put("c", "1")}))
	if got := content(t, s, ""); got != "a=1 c=1" {
		t.Errorf("content %q", got)
	}
}

// TestOpenConfirms: a file is flushed before anything is built on it, since what was flushed last may be in the page cache
// alone.
func TestOpenConfirms(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	wait(t, s.Write([]store.Op{put("a", "1")}))
	closeStore(t, s)
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = store.Open(path, store.Options{Buckets: []string{bucket}, OpenFile: func(name string, _ int, _ os.FileMode) (*os.File, error) {
		return os.Open(name)
	}})
	if !errors.Is(err, syscall.EBADF) || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v", err)
	}
	if got := content(t, open(t, path), ""); got != "a=1" {
		t.Errorf("content %q", got)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, sound) {
		t.Errorf("opening it has changed the file, error %v", err)
	}
}

// TestCompactedWhileFailed has the file compacted while it isn't open, and so not locked. It is sound, and not to be moved away.
func TestCompactedWhileFailed(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
	s := openWith(t, d.path, store.Options{Buckets: []string{bucket}, OpenFile: d.open, ReopenAfter: time.Second})
	for i := range 50 {
		wait(t, s.Write([]store.Op{put("a", fmt.Sprint(i))}))
	}
	d.fail(t)
	failing(t, s, []store.Op{put("b", "1")})
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) { // once the store has closed it
		if _, err = compact(t, d.path, store.CompactOptions{}); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); !strings.Contains(s.Err().Error(), "not open again"); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("error %v", s.Err())
		}
	}
	if err := s.Err(); errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), "restart the broker") {
		t.Errorf("error %v", err)
	}
	closeStore(t, s)
	if got := content(t, open(t, d.path), ""); got != "a=49" {
		t.Errorf("content %q", got)
	}
}

// TestReopenUnderLoad has the disk fail again and again while many write and read.
func TestReopenUnderLoad(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
	s := openWith(t, d.path, store.Options{Buckets: []string{bucket}, OpenFile: d.open, ReopenAfter: time.Millisecond})
	var acknowledged sync.Map
	var done atomic.Bool
	var refused atomic.Int32
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; !done.Load(); i++ {
				key := fmt.Sprintf("%d-%06d", w, i)
				c := s.Write([]store.Op{put(key, key)})
				<-c.Done()
				acknowledged.Store(key, c.Err() == nil)
				if c.Err() != nil {
					refused.Add(1)
					time.Sleep(time.Millisecond)
				}
			}
		})
		wg.Go(func() {
			for i := 0; !done.Load(); i++ {
				err := s.View(func(v *store.View) error {
					v.ForEach(bucket, nil, func(key, value []byte) bool {
						if !bytes.Equal(key, value) {
							t.Errorf("%q is %q", key, value)
						}
						return true
					})
					return nil
				})
				if errors.Is(err, store.ErrClosed) || errors.Is(err, store.ErrCorrupt) {
					t.Error(err)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	for range 8 {
		time.Sleep(10 * time.Millisecond)
		d.fail(t)
		failing(t, s, []store.Op{put("never", "never")})
		untilOpen(t, s)
	}
	done.Store(true)
	wg.Wait()
	untilOpen(t, s)
	there := make(map[string]bool)
	for kv := range strings.FieldsSeq(content(t, s, "")) {
		key, _, _ := strings.Cut(kv, "=")
		there[key] = true
	}
	if there["never"] {
		t.Error("what failed is there")
	}
	acknowledged.Range(func(key, ok any) bool {
		if there[key.(string)] != ok.(bool) {
			t.Errorf("%s: acknowledged %t, in the file %t", key, ok, there[key.(string)])
		}
		return true
	})
	if refused.Load() == 0 || len(there) == 0 {
		t.Errorf("%d writes refused, %d made", refused.Load(), len(there))
	}
}

func TestCloseWhileFailed(t *testing.T) {
	d := &disk{path: filepath.Join(t.TempDir(), "s.db")}
	s := openWith(t, d.path, store.Options{Buckets: []string{bucket}, OpenFile: d.open, ReopenAfter: time.Hour})
	wait(t, s.Write([]store.Op{put("a", "1")}))
	d.fail(t)
	failing(t, s, []store.Op{put("b", "1")})
	closeStore(t, s)
	if got := content(t, open(t, d.path), ""); got != "a=1" {
		t.Errorf("content %q", got)
	}
}
