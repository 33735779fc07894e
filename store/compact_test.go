package store_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/throughline-mqtt/throughline/store"
)

// drained makes a store that has once held much more than it does.
func drained(t *testing.T) (path, want string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s.db")
	s := openWith(t, path, store.Options{Buckets: []string{bucket, "small", "empty"}})
	fill(t, s, 20_000)
	var ops []store.Op
	for i := range 20_000 {
		if i%100 != 0 {
			ops = append(ops, del(fmt.Sprintf("%06d", i)))
		}
	}
	ops = append(ops, store.Op{Bucket: "small", Key: []byte("k"), Value: []byte{}}, put("long", strings.Repeat("x", 100_000)))
	wait(t, s.Write(ops))
	want = content(t, s, "")
	closeStore(t, s)
	return path, want
}

func compact(t *testing.T, path string, o store.CompactOptions) (store.Compacted, error) {
	t.Helper()
	if o.LockTimeout == 0 {
		o.LockTimeout = 10 * time.Millisecond
	}
	return store.Compact(t.Context(), path, o)
}

func TestCompact(t *testing.T) {
	path, want := drained(t)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path+".compact", []byte("left by one that was killed"))
	link := filepath.Join(t.TempDir(), "link.db")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	estimate, err := compact(t, link, store.CompactOptions{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, before) {
		t.Errorf("a dry run has changed the file, error %v", err)
	}
	c, err := compact(t, link, store.CompactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() != c.After || info.Mode().Perm() != 0o640 {
		t.Errorf("file %v, error %v, want %d bytes and mode 0640", info, err, c.After)
	}
	if c.Before != int64(len(before)) || estimate.Before != c.Before || c.After > c.Before/8 || estimate.After < c.After || estimate.After > c.Before {
		t.Errorf("compacted %+v, estimated %+v", c, estimate)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v, error %v", info, err)
	}
	if _, err := os.Stat(path + ".compact"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was left: %v", err)
	}
	s := openWith(t, path, store.Options{Buckets: []string{bucket, "small", "empty"}})
	if got := content(t, s, ""); got != want {
		t.Errorf("content has %d bytes, want %d", len(got), len(want))
	}
	if err := s.View(func(v *store.View) error {
		if got := v.Get("small", []byte("k")); got == nil || len(got) > 0 {
			t.Errorf("the empty value is %q", got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	fill(t, s, 1000)
	closeStore(t, s)
	if again, err := compact(t, path, store.CompactOptions{}); err != nil || again.Before < c.After {
		t.Errorf("again: %+v, error %v", again, err)
	}
}

// TestCompactRefuses: the file and what it holds are as before.
func TestCompactRefuses(t *testing.T) {
	stopped, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name    string
		ctx     context.Context
		prepare func(t *testing.T, path string)
		is      error
		want    string
	}{
		{"open", t.Context(), func(t *testing.T, path string) { open(t, path) }, store.ErrLocked, "another process has it open"},
		{"stopped", stopped, func(*testing.T, string) {}, context.Canceled, ""},
		{"cut off", t.Context(), func(t *testing.T, path string) {
			if err := os.Truncate(path, 100_000); err != nil {
				t.Fatal(err)
			}
		}, store.ErrCorrupt, "is damaged"},
		{"missing", t.Context(), func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, fs.ErrNotExist, "no such file"},
		{"newer", t.Context(), func(t *testing.T, path string) {
			editFile(t, path, func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("store.meta")).Put([]byte("format"), binary.BigEndian.AppendUint32(nil, store.Format+1))
			})
		}, nil, "written by a newer version"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, _ := drained(t)
			tt.prepare(t, path)
			before, _ := os.ReadFile(path)
			_, err := store.Compact(tt.ctx, path, store.CompactOptions{LockTimeout: 10 * time.Millisecond})
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			after, _ := os.ReadFile(path)
			if !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
			if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestOpenDuringCompaction has a compaction put its file in place between a start's look at the file and its lock: what were
// written to the old one would be lost.
func TestOpenDuringCompaction(t *testing.T) {
	path, _ := drained(t)
	_, err := store.Open(path, store.Options{Buckets: []string{bucket}, OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
		f, err := os.OpenFile(name, flag, perm)
		if _, err := compact(t, path, store.CompactOptions{}); err != nil {
			t.Error(err)
		}
		return f, err
	}})
	if err == nil || !strings.Contains(err.Error(), "another file was put in its place meanwhile; try again") {
		t.Errorf("error %v", err)
	}
	open(t, path)
}

const compactChild = "THROUGHLINE_COMPACT_CHILD"

// TestKillCompaction kills compactions at random moments: there is always one whole file.
func TestKillCompaction(t *testing.T) {
	if path := os.Getenv(compactChild); path != "" {
		fmt.Println("ready")
		for {
			if _, err := store.Compact(context.Background(), path, store.CompactOptions{}); err != nil {
				panic(err)
			}
		}
	}
	path, want := drained(t)
	for range 12 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKillCompaction$")
		cmd.Env = append(os.Environ(), compactChild+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
			t.Fatalf("the child has ended by itself: %v", err)
		}
		s := openWith(t, path, store.Options{Buckets: []string{bucket, "small", "empty"}})
		if got := content(t, s, ""); got != want {
			t.Fatalf("content has %d bytes, want %d", len(got), len(want))
		}
		closeStore(t, s)
	}
	if _, err := compact(t, path, store.CompactOptions{}); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
