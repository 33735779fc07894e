package outbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// faultChild names the file that the test program works on when it is run as its own child.
const faultChild = "THROUGHLINE_OUTBOX_FAULT_CHILD"

// TestEveryWriteFails has a child make a store, append, remove, bury and note attempts under strace, which makes the n-th
// call of a kind fail in each of its threads, for every n that comes about. Whichever it is, the child goes on by itself, or
// says why it can't start; nothing that was acknowledged is lost, and what was acknowledged as gone stays so.
func TestEveryWriteFails(t *testing.T) {
	if path := os.Getenv(faultChild); path != "" {
		os.Exit(faultScenario(path))
	}
	needTrace(t)
	for _, call := range []string{"pwrite64", "fdatasync", "fsync", "ftruncate"} {
		t.Run(call, func(t *testing.T) {
			n := 1
			for ; ; n++ {
				name, text := "EIO", "input/output error"
				if n%2 == 0 {
					name, text = "ENOSPC", "no space left on device"
				}
				path := filepath.Join(t.TempDir(), "outbox.db")
				out, code, injected := runFaulty(t, path, fmt.Sprintf("inject=%s:error=%s:when=%d", call, name, n), call)
				if !injected {
					break
				}
				if code != 0 && (code != exitNotOpen || !strings.Contains(out, text) || !strings.Contains(out, path)) {
					t.Errorf("%s %d: exit %d, want %q and the file's name\n%s", call, n, code, text, out)
				}
				checkFaulty(t, fmt.Sprintf("%s %d", call, n), path, out)
			}
			if n < 2 {
				t.Errorf("no %s was made", call)
			}
			t.Logf("%d times", n-1)
		})
	}
	// From one on, all of them: the disk is gone.
	for _, n := range []int{1, 4, 9} {
		t.Run(fmt.Sprintf("all from %d", n), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "outbox.db")
			out, code, injected := runFaulty(t, path, fmt.Sprintf("inject=pwrite64,fdatasync:error=EIO:when=%d+", n), "pwrite64,fdatasync")
			if !injected || code != exitNotOpen && code != exitFailing || !strings.Contains(out, "input/output error") || !strings.Contains(out, path) {
				t.Errorf("exit %d, fault made %t\n%s", code, injected, out)
			}
			checkFaulty(t, "after it", path, out)
		})
	}
}

const (
	exitNotOpen = 3
	exitFailing = 4
)

// runFaulty runs the child under strace with a fault, and returns what it said.
func runFaulty(t *testing.T, path, fault, calls string) (out string, code int, injected bool) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "trace")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "strace", "-f", "-o", log, "-e", "trace="+calls, "-e", "signal=none", "-e", fault,
		os.Args[0], "-test.run=^TestEveryWriteFails$")
	cmd.Env = append(os.Environ(), faultChild+"="+path)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || stderr.Len() > 0 {
		t.Fatalf("%s: %v\n%s%s", fault, err, stdout.Bytes(), stderr.Bytes())
	}
	trace, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return stdout.String(), cmd.ProcessState.ExitCode(), bytes.Contains(trace, []byte("(INJECTED)"))
}

// checkFaulty opens what a child has left, without faults.
func checkFaulty(t *testing.T, name, path, out string) {
	t.Helper()
	owed, gone := make(map[string]bool), make(map[string]bool)
	for line := range strings.Lines(out) {
		verb, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch verb {
		case "appended":
			owed[id] = true
		case "removing":
			delete(owed, id)
		case "removed":
			gone[id] = true
		}
	}
	st, ob := open(t, path, outbox.Options{})
	defer closeStore(t, st)
	for _, e := range list(t, ob, outbox.Filter{}) {
		delete(owed, e.ID)
		if e.Err != nil || gone[e.ID] {
			t.Errorf("%s: record %q, removed %t, error %v", name, e.ID, gone[e.ID], e.Err)
		}
	}
	for id := range owed {
		t.Errorf("%s: acknowledged record %s is lost\n%s", name, id, out)
	}
	commit(t, ob, []outbox.Record{{Destination: "center"}})
}

// faultScenario is the child.
func faultScenario(path string) (code int) {
	st, err := store.Open(path, store.Options{Buckets: outbox.Buckets(), ReopenAfter: 2 * time.Millisecond})
	if err != nil {
		fmt.Println("not open:", err)
		return exitNotOpen
	}
	ob, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		fmt.Println("not open:", err)
		return exitNotOpen
	}
	defer st.Close(context.Background()) //nolint:errcheck // the parent looks at the file
	done := func(c *outbox.Commit) error { return c.Wait(context.Background()) }
	var kept []outbox.Record
	for step := range 6 {
		recs := []outbox.Record{
			{ID: fmt.Sprintf("%d-a", step), Destination: "center", Body: make([]byte, 100)},
			{ID: fmt.Sprintf("%d-b", step), Destination: "other", Body: make([]byte, step*20_000)},
			{ID: fmt.Sprintf("%d-c", step), Destination: "center"},
		}
		c, err := ob.Append(recs)
		if err == nil {
			err = done(c)
		}
		if err == nil {
			for _, r := range recs {
				fmt.Println("appended", r.ID)
			}
			kept = append(kept, recs...)
		} else {
			fmt.Println("refused", err)
		}
		if len(kept) > 2 {
			fmt.Println("removing", kept[0].ID)
			removal := ob.Remove(kept[0].Seq)
			ob.Bury(kept[1].Seq, outbox.DeadLetter{Reason: "poison"})
			attempt := ob.Reschedule(kept[2].Seq, 1, noon, "503")
			st.Write(nil) // they would wait for a flush that somebody needs
			if done(removal) == nil {
				fmt.Println("removed", kept[0].ID)
			}
			_ = done(attempt)
			kept = kept[2:]
		}
		for end := time.Now().Add(3 * time.Second); st.Err() != nil; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				fmt.Println("failing", st.Err())
				return exitFailing
			}
		}
	}
	// The fault is over, unless it hits this one.
	for try := 0; ; try++ {
		c, err := ob.Append([]outbox.Record{{ID: "last", Destination: "center"}})
		if err == nil {
			err = done(c)
		}
		if err == nil {
			fmt.Println("appended last")
			return 0
		}
		if try == 1000 {
			fmt.Println("failing", err)
			return exitFailing
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestReadOnlyFileSystem: the start says what is wrong, and the next one has everything.
func TestReadOnlyFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("no right to mount a file system: %v", err)
	}
	defer func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "outbox.db")
	st, ob := open(t, path, outbox.Options{})
	commit(t, ob, []outbox.Record{whole()})
	closeStore(t, st)
	for _, there := range []bool{true, false} {
		if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		if !there {
			path += ".new one"
		}
		if _, err := store.Open(path, store.Options{Buckets: outbox.Buckets()}); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), path) {
			t.Errorf("there %t: error %v", there, err)
		}
		if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=8m"); err != nil {
			t.Fatal(err)
		}
		st, ob := open(t, path, outbox.Options{})
		if n := ob.Stats().Records; there && n != 1 {
			t.Errorf("%d records", n)
		}
		closeStore(t, st)
	}
}

// TestDiskFull fills a small file system. What was acknowledged is there, deliveries go on, and appends once there is room.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("no right to mount a file system: %v", err)
	}
	defer func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	for _, floor := range []int64{0, 1 << 20} {
		t.Run(fmt.Sprintf("floor=%d", floor), func(t *testing.T) {
			path := filepath.Join(dir, fmt.Sprintf("%d.db", floor))
			defer os.Remove(path)
			st, err := store.Open(path, store.Options{Buckets: outbox.Buckets(), ReopenAfter: time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			ob, err := outbox.Open(st, outbox.Options{})
			if err != nil {
				t.Fatal(err)
			}
			lookNow := func() {
				if floor > 0 {
					once, cancel := context.WithCancel(context.Background())
					cancel()
					ob.KeepFree(once, floor, func() (int64, error) {
						free, _, err := store.Space(dir)
						return free, err
					})
				}
			}
			var seqs []uint64
			add := func() error {
				recs := []outbox.Record{{Destination: "center", Body: bytes.Repeat([]byte{byte(len(seqs))}, 64<<10)}}
				lookNow()
				c, err := ob.Append(recs)
				if err == nil {
					err = c.Wait(t.Context())
				}
				if err == nil {
					seqs = append(seqs, recs[0].Seq)
				}
				return err
			}
			for err = add(); err == nil; err = add() {
				if len(seqs) > 200 {
					t.Fatal("the file system takes everything")
				}
			}
			if floor > 0 && !errors.Is(err, outbox.ErrFull) || floor == 0 && !errors.Is(err, syscall.ENOSPC) || len(seqs) < 50 {
				t.Errorf("after %d records: %v", len(seqs), err)
			}
			untilOpen(t, st)
			full := len(seqs)
			for _, seq := range seqs {
				if r, err := ob.Load(seq); err != nil || len(r.Body) != 64<<10 {
					t.Errorf("record %d: %d bytes, error %v", seq, len(r.Body), err)
				}
			}
			for _, seq := range seqs[:full/2] {
				ob.Remove(seq)
			}
			for end := time.Now().Add(10 * time.Second); ob.Stats().Records > full-full/2; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d records, and no removal gets through: %v", ob.Stats().Records, st.Err())
				}
			}
			untilOpen(t, st)
			if floor == 0 { // with a floor, the room inside so small a file doesn't count
				if err := add(); err != nil {
					t.Errorf("with half of it free again: %v", err)
				}
			}
			want := ob.Stats().Records
			closeStore(t, st)
			st, again := open(t, path, outbox.Options{})
			defer closeStore(t, st)
			if got := len(list(t, again, outbox.Filter{})); got != want {
				t.Errorf("%d records after a restart, want %d", got, want)
			}
		})
	}
}
