package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/throughline-mqtt/throughline/store"
)

// damaged makes stores in all the shapes that a file can have: inline buckets, trees with branches, long values that
// take several pages, free pages; with and without a free list.
func damaged(t *testing.T, freelist bool) (path string, sound []byte, want string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s.db")
	s := openWith(t, path, store.Options{Buckets: []string{bucket, "small", "empty"}})
	fill(t, s, 600)
	wait(t, s.Write([]store.Op{
		put("000300", strings.Repeat("long ", 3000)), del("000001"), del("000002"),
		{Bucket: "small", Key: []byte("k"), Value: []byte("v")},
	}))
	want = content(t, s, "")
	used := s.Size()
	closeStore(t, s)
	if err := os.Truncate(path, used); err != nil {
		t.Fatal(err)
	}
	if freelist {
		editFile(t, path, func(*bbolt.Tx) error { return nil })
	}
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, sound, want
}

// tryDamaged reports whether a file is refused, clearly and unchanged. If it isn't, everything can be read, and written.
func tryDamaged(t *testing.T, path string, file []byte, write bool) (refused bool, got string) {
	t.Helper()
	writeFile(t, path, file)
	s, err := store.Open(path, store.Options{Buckets: []string{bucket, "small", "empty"}})
	if err != nil {
		var v *store.VersionError
		if !errors.Is(err, store.ErrCorrupt) && !errors.As(err, &v) || !strings.Contains(err.Error(), path) {
			t.Errorf("unclear error: %v", err)
		}
		after, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(after, file) {
			t.Errorf("the file was changed, error %v", err)
		}
		return true, ""
	}
	got = content(t, s, "")
	if write {
		wait(t, s.Write([]store.Op{put("zzz", "1"), del("000100")}))
	}
	closeStore(t, s)
	return false, got
}

func TestTruncatedFile(t *testing.T) {
	path, sound, want := damaged(t, false)
	if refused, got := tryDamaged(t, path, sound, true); refused || got != want {
		t.Fatalf("the sound file: refused %v", refused)
	}
	for n := 0; n < len(sound); n += 1000 {
		if refused, _ := tryDamaged(t, path, sound[:n], true); !refused {
			t.Errorf("cut to %d of %d bytes in use: not refused", n, len(sound))
		}
	}
}

// TestFlippedBits flips single bits all over the file: in every byte of what describes a page, and here and there in what it
// holds. None may crash the process, or hide a key that was there.
func TestFlippedBits(t *testing.T) {
	for _, freelist := range []bool{false, true} {
		t.Run(fmt.Sprintf("freelist=%t", freelist), func(t *testing.T) {
			path, sound, want := damaged(t, freelist)
			pageSize := os.Getpagesize()
			refusals, flips := 0, 0
			flip := func(at int, bit byte) {
				file := bytes.Clone(sound)
				file[at] ^= 1 << bit
				refused, got := tryDamaged(t, path, file, flips%64 == 0)
				flips++
				if refused {
					refusals++
					return
				}
				// Without the newest meta page there is the state before the last flush, and a branch may come to point to
				// what a page was before.
				page := file[at/pageSize*pageSize:]
				if meta, branch := at < 2*pageSize, page[8] == 1; !meta && !branch && keys(got) != keys(want) {
					t.Errorf("byte %d of page %d, bit %d: %d keys, want %d", at%pageSize, at/pageSize, bit, keys(got), keys(want))
				}
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			for page := 0; page*pageSize < len(sound); page++ {
				head := sound[page*pageSize : (page+1)*pageSize]
				if page >= 2 && bytes.Count(head, []byte{0}) == len(head) {
					continue // never used
				}
				for at := range 16 + 32 {
					flip(page*pageSize+at, byte(rnd.UintN(8)))
				}
				for range 4 {
					flip(page*pageSize+rnd.IntN(pageSize), byte(rnd.UintN(8)))
				}
			}
			if refusals == 0 || flips < 500 {
				t.Errorf("%d of %d refused", refusals, flips)
			}
		})
	}
}

func keys(content string) int { return strings.Count(" "+content, " 000") }

// TestFileVanishesUnderStore cuts the file while it is open: what a failing disk does to mapped pages.
func TestFileVanishesUnderStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s, err := store.Open(path, store.Options{Buckets: []string{bucket}})
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s, 20_000)
	if err := os.Truncate(path, int64(2*os.Getpagesize())); err != nil {
		t.Fatal(err)
	}
	err = s.View(func(v *store.View) error {
		v.ForEach(bucket, nil, func(_, _ []byte) bool { return true })
		return nil
	})
	if !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("View: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.Write([]store.Op{put("a", "1")}).Wait(ctx); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Write: %v", err)
	}
	if err := s.Close(ctx); err != nil {
		t.Errorf("Close: %v", err)
	}
	// The lock is gone with it.
	if _, err := store.Open(path, store.Options{}); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Open: %v", err)
	}
}
