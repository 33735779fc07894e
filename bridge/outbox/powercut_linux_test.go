package outbox_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// powerCut makes TestPowerCut trace for as long as it says, and check a thousand images for each second of that.
const powerCut = "THROUGHLINE_POWERCUT"

// failuresChild names the file that TestPowerCutAfterFailures works on when it is run as its own child.
const failuresChild = "THROUGHLINE_OUTBOX_FAILURES_CHILD"

// sector is what a disk writes whole or not at all.
const sector = 512

// event is a system call of the child that matters, at its beginning or its end.
type event struct {
	call   string // pwrite64, ftruncate, sync, or write for a line that the child says
	end    bool
	id     int // the same for the beginning and the end of a call
	failed bool
	offset int64
	data   []byte
	state  state // of a write, for the medium
}

// state is what has become of a write.
type state int

const (
	loose   state = iota // no flush covers it yet
	unsure               // one that failed did: the system takes it for written, and no later one covers it
	durable              // one that succeeded did
)

// TestPowerCut traces what a child writes, flushes and acknowledges, and makes files as a disk may hold them when the power
// fails: all that a finished flush covers, and of what was written since then any sectors. Each must be whole and have every
// record that was acknowledged.
func TestPowerCut(t *testing.T) { testPowerCut(t, "TestKill", killChild) }

// TestPowerCutAfterFailures is TestPowerCut with a disk whose flushes fail now and then, which the child gets over by itself, or
// by a restart. What a failed flush covers may be on the disk or not, from then on, while whoever reads the file sees it.
func TestPowerCutAfterFailures(t *testing.T) {
	if path := os.Getenv(failuresChild); path != "" {
		appendInSpiteOfFailures(path)
		return
	}
	testPowerCut(t, "TestPowerCutAfterFailures", failuresChild, "-e", "inject=fdatasync:error=EIO:when=3+5", "-e", "inject=fsync:error=EIO:when=1+2")
}

// testPowerCut runs a test as a child that finds its file's path in an environment variable, with strace's options fault.
func testPowerCut(t *testing.T, child, variable string, fault ...string) {
	t.Helper()
	duration, perCut, cuts := 300*time.Millisecond, 3, 60
	if v := os.Getenv(powerCut); v != "" {
		var err error
		if duration, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
		perCut, cuts = 10, int(duration.Seconds()*100)
	}
	needTrace(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "outbox.db")
	st, _ := open(t, path, outbox.Options{})
	closeStore(t, st)
	base, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	events := trace(t, path, duration, child, variable, fault)
	flushes, failed, said := 0, 0, 0
	for _, e := range events {
		if e.end && e.call == "sync" {
			flushes++
			if e.failed {
				failed++
			}
		}
		if !e.end && e.call == "write" {
			said++
		}
	}
	if flushes < 10 || said < 10 || (failed == 0) != (len(fault) == 0) {
		t.Fatalf("%d flushes, %d of which have failed, and %d lines in the trace", flushes, failed, said)
	}

	rnd := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	d := newMedium(base)
	at := make(map[int]bool)
	if len(fault) > 0 {
		cuts, perCut = cuts/2, perCut+2
		// When a flush is about to be made after a failure, it is most likely to matter what became of that.
		var after []int
		for i, since := 0, len(events); i < len(events); i, since = i+1, since+1 {
			switch e := events[i]; {
			case e.failed:
				since = 0
			case e.call == "sync" && !e.end && since < 40:
				after = append(after, i)
			}
		}
		rnd.Shuffle(len(after), func(i, j int) { after[i], after[j] = after[j], after[i] })
		for _, i := range after[:min(len(after), cuts)] {
			at[i] = true
		}
	}
	for len(at) < cuts && len(at) < len(events) {
		at[rnd.IntN(len(events))] = true
	}
	at[len(events)-1] = true
	images, records := 0, 0
	for i, e := range events {
		d.take(e)
		if !at[i] {
			continue
		}
		for n := range perCut {
			image := d.image(rnd, n)
			images++
			got, err := d.check(dir, image)
			if records += got; err != nil {
				kept := filepath.Join(os.TempDir(), fmt.Sprintf("throughline-powercut-%d.db", os.Getpid()))
				t.Fatalf("cut after event %d of %d: %v; image kept in %s, error %v", i, len(events), err, kept, os.WriteFile(kept, image, 0o600))
			}
		}
	}
	t.Logf("%d flushes, %d failed, %d lines said, %d images with %d records in all: none lost", flushes, failed, said, images, records)
}

// medium is a disk with a cache that loses power.
type medium struct {
	durable []byte
	later   []event // writes and truncations since then, in their order
	open    map[int]int
	owed    map[string]bool
	gone    map[string]bool // acknowledged as removed
}

func newMedium(base []byte) *medium {
	return &medium{durable: bytes.Clone(base), open: make(map[int]int), owed: make(map[string]bool), gone: make(map[string]bool)}
}

func (d *medium) take(e event) {
	switch {
	case e.call == "sync" && !e.end:
		// It covers what has ended; of what is under way it may be anything.
		n := 0
		for _, w := range d.later {
			if !w.end {
				break
			}
			n++
		}
		d.open[e.id] = n
	case e.call == "sync":
		covered := d.later[:d.open[e.id]]
		delete(d.open, e.id)
		for i := range covered {
			switch w := &covered[i]; {
			case w.state != loose:
			case !e.failed:
				w.state = durable
			case w.call == "pwrite64":
				w.state = unsure
			}
		}
		n := 0
		for ; n < len(d.later) && d.later[n].state == durable; n++ {
			d.durable = apply(d.durable, d.later[n], func(int64) bool { return true })
		}
		d.later = d.later[n:]
		for id := range d.open {
			d.open[id] = max(0, d.open[id]-n)
		}
	case e.call == "write":
		if e.end {
			return
		}
		for line := range strings.Lines(string(e.data)) {
			verb, id, _ := strings.Cut(strings.TrimSpace(line), " ")
			switch verb {
			case "appended":
				d.owed[id] = true
			case "removing":
				delete(d.owed, id)
			case "removed":
				d.gone[id] = true
			}
		}
	case !e.end:
		d.later = append(d.later, e)
	default:
		for i := range d.later {
			if d.later[i].id == e.id {
				d.later[i].end = true
			}
		}
	}
}

// apply makes those sectors of a write, or the truncation, for which want says so.
func apply(file []byte, w event, want func(at int64) bool) []byte {
	if w.call == "ftruncate" {
		if !want(0) {
			return file
		}
		return resize(file, w.offset)
	}
	for at := int64(0); at < int64(len(w.data)); at += sector {
		if !want(w.offset + at) {
			continue
		}
		piece := w.data[at:min(at+sector, int64(len(w.data)))]
		if end := w.offset + at + int64(len(piece)); end > int64(len(file)) {
			file = resize(file, end)
		}
		copy(file[w.offset+at:], piece)
	}
	return file
}

func resize(file []byte, size int64) []byte {
	if size <= int64(len(file)) {
		return file[:size]
	}
	return append(file, make([]byte, size-int64(len(file)))...)
}

// image is what the disk may hold now: of what is not durable nothing, all, some calls whole, or any sectors; or all but one of
// the newest meta pages that a failed flush covers, if there are any: each says which of the other pages are in use.
func (d *medium) image(rnd *rand.Rand, variant int) []byte {
	file := bytes.Clone(d.durable)
	share := rnd.Float64()
	missing := -1
	for i, n := len(d.later)-1, 0; i >= 0 && n <= variant; i-- {
		if d.later[i].state == unsure && d.later[i].offset < 2*int64(os.Getpagesize()) {
			if n == variant {
				missing = i
			}
			n++
		}
	}
	for i, w := range d.later {
		whole := rnd.Float64() < share
		file = apply(file, w, func(int64) bool {
			switch {
			case w.state == durable:
				return true
			case missing >= 0 && variant < 4:
				return i != missing
			case variant == 0:
				return true
			case variant == 1:
				return false
			case variant%3 == 2:
				return rnd.Float64() < share
			}
			return whole
		})
	}
	return file
}

// check opens an image as a broker would, and returns how many records it has.
func (d *medium) check(dir string, image []byte) (n int, err error) {
	path := filepath.Join(dir, "image.db")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		return 0, err
	}
	st, err := store.Open(path, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, st.Close(context.Background())) }()
	ob, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		return 0, err
	}
	lost := maps.Clone(d.owed)
	var problem error
	if err := ob.List(outbox.Filter{}, func(e outbox.Entry) bool {
		n++
		delete(lost, e.ID)
		switch {
		case e.Err != nil:
			problem = e.Err
		case d.gone[e.ID]:
			problem = fmt.Errorf("record %s is back", e.ID)
		}
		return problem == nil
	}); err != nil {
		return n, err
	}
	if problem == nil && len(lost) > 0 {
		problem = fmt.Errorf("%d of %d acknowledged records are lost", len(lost), len(d.owed))
	}
	return n, problem
}

// needTrace skips a test where there is no strace, or no right to trace.
func needTrace(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("strace", "-f", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace doesn't work here: %v %s", err, out)
	}
}

// trace runs a child under strace for a while, and returns what it did.
func trace(t *testing.T, path string, duration time.Duration, child, variable string, fault []string) []event {
	t.Helper()
	log := filepath.Join(t.TempDir(), "trace")
	options := append([]string{"-f", "-y", "-xx", "-s", "16777216", "-o", log,
		"-e", "trace=pwrite64,ftruncate,fdatasync,fsync,write", "-e", "signal=none"}, fault...)
	cmd := exec.Command("strace", append(options, os.Args[0], "-test.run=^"+child+"$")...)
	cmd.Env = append(os.Environ(), variable+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if _, err := r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(duration, func() {
		// The child alone: strace then ends by itself, with its log complete.
		pids, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if err != nil {
			t.Error(err)
		}
		for pid := range strings.FieldsSeq(string(pids)) {
			if n, err := strconv.Atoi(pid); err == nil {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
	})
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	f, err := os.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return parseTrace(t, f, path)
}

// parseTrace reads strace's lines: "PID call(args) = result", or in two parts if another thread's come in between.
func parseTrace(t *testing.T, r io.Reader, path string) (events []event) {
	t.Helper()
	// strace writes the path in hexadecimal too.
	var quoted strings.Builder
	for _, b := range []byte(path) {
		fmt.Fprintf(&quoted, `\x%02x`, b)
	}
	pending := make(map[string]event) // by thread
	in := bufio.NewReaderSize(r, 1<<20)
	for id := 0; ; id++ {
		line, err := in.ReadString('\n')
		if err != nil {
			return events
		}
		pid, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "<... ") {
			if e, ok := pending[pid]; ok && !strings.HasSuffix(rest, "= ?") {
				e.end, e.failed = true, strings.Contains(rest, ") = -1 ")
				events = append(events, e)
			}
			delete(pending, pid)
			continue
		}
		call, args, ok := strings.Cut(rest, "(")
		if !ok {
			continue
		}
		ours := strings.Contains(args[:min(len(args), 4*len(path)+100)], "<"+path+">") || strings.Contains(args[:min(len(args), 4*len(path)+100)], quoted.String())
		e := event{call: call, id: id}
		switch {
		case call == "write" && strings.HasPrefix(args, "1<"):
			e.data = quotedData(t, args)
		case !ours:
			continue
		case call == "fsync" || call == "fdatasync":
			e.call = "sync"
		case call == "ftruncate":
			e.offset = lastNumber(t, args)
		case call == "pwrite64":
			e.data, e.offset = quotedData(t, args), lastNumber(t, args)
		default:
			continue
		}
		events = append(events, e)
		if strings.Contains(args, "<unfinished ...>") {
			pending[pid] = e
			continue
		}
		if strings.HasSuffix(rest, "= ?") {
			continue
		}
		e.end, e.failed = true, strings.Contains(rest, ") = -1 ")
		events = append(events, e)
	}
}

func quotedData(t *testing.T, args string) []byte {
	t.Helper()
	from := strings.Index(args, `, "`) + 3
	to := strings.LastIndex(args, `"`)
	if from < 3 || to < from {
		t.Fatalf("no data in %.100q", args)
	}
	b, err := hex.DecodeString(strings.ReplaceAll(args[from:to], `\x`, ""))
	if err != nil {
		t.Fatalf("data in %.100q: %v", args, err)
	}
	return b
}

// lastNumber is the last argument, whether the call has ended or not.
func lastNumber(t *testing.T, args string) int64 {
	t.Helper()
	args, _, _ = strings.Cut(args, "<unfinished ...>") // with ") = ?" behind it if the call was cut off
	if i := strings.LastIndexAny(args, `">`); i >= 0 { // the data, or the file
		args = args[i+1:]
	}
	args, _, _ = strings.Cut(args, ")")
	fields := strings.Split(strings.TrimSpace(args), ",")
	n, err := strconv.ParseInt(strings.TrimSpace(fields[len(fields)-1]), 10, 64)
	if err != nil {
		t.Fatalf("no number at the end of %.100q: %v", args, err)
	}
	return n
}

// appendInSpiteOfFailures is a child that appends and removes. When a flush has failed, it goes on once the store does, or
// every other time opens it anew, as after a restart.
func appendInSpiteOfFailures(path string) {
	var out sync.Mutex
	say := func(verb, id string) {
		out.Lock()
		defer out.Unlock()
		fmt.Println(verb, id)
	}
	for restart := false; ; restart = !restart {
		after := time.Millisecond
		if restart {
			after = time.Hour
		}
		st, err := store.Open(path, store.Options{Buckets: outbox.Buckets(), ReopenAfter: after})
		if err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		ob, err := outbox.Open(st, outbox.Options{})
		if err != nil {
			panic(err)
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		for lane := range 4 {
			wg.Go(func() {
				for i := 0; !stop.Load(); i++ {
					recs := []outbox.Record{{Destination: "center", Ordered: true, Lane: fmt.Sprint(lane), Body: make([]byte, rand.IntN(1500))}}
					c, err := ob.Append(recs)
					if err == nil {
						err = c.Wait(context.Background())
					}
					if err != nil {
						time.Sleep(time.Millisecond)
						continue
					}
					say("appended", recs[0].ID)
					if i%8 == 0 { // few stay: in a small file, what is freed is soon overwritten
						continue
					}
					say("removing", recs[0].ID)
					ob.Remove(recs[0].Seq).Watch(func(err error) {
						if err == nil {
							say("removed", recs[0].ID)
						}
					})
				}
			})
		}
		for failures := 0; failures < 3 && !(restart && failures > 0); time.Sleep(time.Millisecond) {
			if st.Err() != nil {
				failures++
			}
		}
		stop.Store(true)
		if err := st.Close(context.Background()); err != nil {
			panic(err)
		}
		wg.Wait()
	}
}

// TestOpenWritesWhatItSees: before a file that was there already is flushed to, both of its meta pages are on the disk as they are
// seen. The process before may have ended when the page cache alone held them.
func TestOpenWritesWhatItSees(t *testing.T) {
	needTrace(t)
	path := filepath.Join(t.TempDir(), "outbox.db")
	st, _ := open(t, path, outbox.Options{})
	closeStore(t, st)
	seen, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := seen[:2*os.Getpagesize()]
	got := make([]byte, len(want))
	for _, e := range trace(t, path, 50*time.Millisecond, "TestKill", killChild, nil) {
		if e.call == "pwrite64" && !e.end {
			if e.offset+int64(len(e.data)) > int64(len(got)) {
				t.Fatalf("%d bytes are written at %d before the meta pages are flushed", len(e.data), e.offset)
			}
			copy(got[e.offset:], e.data)
		}
		if e.call == "sync" {
			break
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("the first flush does not write both meta pages as they are")
	}
}
