package store_test

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/store"
)

// TestFailedFlush has the n-th flush fail, in each of the ways in which it can: another file is put under the store's
// descriptor, one that can't be written, or has no space, or takes every write but can't be flushed.
func TestFailedFlush(t *testing.T) {
	for _, tt := range []struct {
		name string
		file string // "": the store's own, for reading alone
		want syscall.Errno
	}{
		{"write", "", syscall.EBADF},
		{"disk full", "/dev/full", syscall.ENOSPC},
		{"flush", "/dev/null", syscall.EINVAL},
	} {
		for n := range 4 {
			t.Run(fmt.Sprintf("%s/%d", tt.name, n), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "s.db")
				var file *os.File
				r := prometheus.NewRegistry()
				s := openWith(t, path, store.Options{
					Buckets:     []string{bucket},
					Registerer:  r,
					ReopenAfter: time.Hour,
					OpenFile: func(name string, flag int, perm os.FileMode) (f *os.File, err error) {
						file, err = os.OpenFile(name, flag, perm)
						return file, err
					},
				})
				var acknowledged []string
				for i := range n {
					key := fmt.Sprint(i)
					wait(t, s.Write([]store.Op{put(key, "1"), put("last", key)}))
					acknowledged = append(acknowledged, key+"=1")
				}
				replace(t, file, cmp.Or(tt.file, path))

				c := s.Write([]store.Op{put("lost", "1"), put("last", "lost")})
				<-c.Done()
				err := c.Err()
				if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), path) {
					t.Errorf("error %v, want %v that names the file", err, tt.want)
				}
				again := s.Write([]store.Op{put("later", "1")})
				<-again.Done()
				if again.Err() != err || s.Err() != err {
					t.Errorf("later: %v and %v, want the same error", again.Err(), s.Err())
				}
				if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP throughline_store_failed 1 after a failed flush, until the store's file was opened anew: nothing is written meanwhile.
# TYPE throughline_store_failed gauge
throughline_store_failed 1
`), "throughline_store_failed"); err != nil {
					t.Error(err)
				}
				closeStore(t, s)

				got := content(t, open(t, path), "")
				for _, want := range acknowledged {
					if !strings.Contains(got, want) {
						t.Errorf("content %q lacks %s", got, want)
					}
				}
				if strings.Contains(got, "lost") || strings.Contains(got, "later") {
					t.Errorf("content %q", got)
				}
			})
		}
	}
}

// replace opens another file under the descriptor of f.
func replace(t *testing.T, f *os.File, path string) {
	t.Helper()
	mode := os.O_RDONLY
	if strings.HasPrefix(path, "/dev/") {
		mode = os.O_WRONLY
	}
	other, err := os.OpenFile(path, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failure error
	// Control keeps the descriptor from being closed, and used for something else, meanwhile.
	err = conn.Control(func(fd uintptr) { failure = syscall.Dup3(int(other.Fd()), int(fd), 0) })
	if err := errors.Join(err, failure); err != nil {
		t.Fatal(err)
	}
}
