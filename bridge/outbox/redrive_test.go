package outbox_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// walk selects from c to the end, n at a time.
func walk(t *testing.T, ob *outbox.Outbox, f outbox.Filter, c outbox.Cursor, n int) []outbox.Entry {
	t.Helper()
	var all []outbox.Entry
	for more := true; more; {
		found, next, goOn, err := ob.Select(f, c, n)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > n {
			t.Fatalf("%d found at once, want %d at most", len(found), n)
		}
		if goOn && next == c {
			t.Fatalf("no progress at %+v", c)
		}
		all = append(all, found...)
		c, more = next, goOn
	}
	return all
}

// TestSelect: a walk in small steps finds what a listing does, without bodies, and nothing that comes later.
func TestSelect(t *testing.T) {
	now := noon.Add(time.Hour)
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Now: func() time.Time { return now }})
	var recs []outbox.Record
	for i := range 2500 {
		r := whole()
		r.ID = fmt.Sprint("id-", i)
		r.Rule = []string{"even", "odd"}[i%2]
		r.Published = noon.Add(time.Duration(i) * time.Second)
		recs = append(recs, r)
	}
	commit(t, ob, recs)
	var last *outbox.Commit
	for i := 0; i < 2500; i += 50 {
		last = ob.Bury(recs[i].Seq, outbox.DeadLetter{Reason: "x"})
	}
	wait(t, last)
	begin := ob.Begin()
	late := []outbox.Record{whole()}
	commit(t, ob, late)
	c, err := ob.Requeue(recs[0].Seq)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, c)
	now = now.Add(24 * time.Hour) // ages are counted to when the walk began

	for name, f := range map[string]outbox.Filter{
		"all":     {},
		"queued":  {Which: outbox.QueuedOnly},
		"dead":    {Which: outbox.DeadOnly},
		"rule":    {Rule: "odd"},
		"nothing": {Rule: "none"},
		"ids":     {IDs: []string{"id-7", "id-50", "id-2499", "nosuch"}},
		"age":     {OlderThan: 50 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			aged := f
			if f.OlderThan > 0 {
				aged.OlderThan += 24 * time.Hour
			}
			var want []string
			for _, e := range list(t, ob, aged) {
				if e.Seq <= begin.Until {
					want = append(want, e.ID)
				}
			}
			for _, n := range []int{7, 1000, 5000} {
				var got []string
				for _, e := range walk(t, ob, f, begin, n) {
					got = append(got, e.ID)
					if e.Body != nil {
						t.Fatalf("%s has a body", e.ID)
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("%d at a time: %d found, want %d", n, len(got), len(want))
				}
			}
			if (len(want) == 0) != (name == "nothing") {
				t.Errorf("%d in the listing", len(want))
			}
		})
	}
}

// TestSelectIsBounded: what is selected at a time fits into the flush window, an entry aside, however many may be taken.
func TestSelectIsBounded(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{MaxUnflushed: 64 << 10})
	for range 20 {
		r := whole()
		r.Body = make([]byte, 3<<10)
		commit(t, ob, []outbox.Record{r})
	}
	c, all := ob.Begin(), 0
	for more := true; more; {
		var found []outbox.Entry
		var err error
		if found, c, more, err = ob.Select(outbox.Filter{}, c, 50); err != nil {
			t.Fatal(err)
		}
		if all += len(found); len(found) > 3 {
			t.Errorf("%d of 3 kB at a time with a window of 64 KiB, want 3 at most", len(found))
		}
	}
	if all != 20 {
		t.Errorf("%d found, want 20", all)
	}
}

// TestPurgeCounts: what is purged gives its space back, is counted once, and wakes those who were refused.
func TestPurgeCounts(t *testing.T) {
	r := prometheus.NewRegistry()
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Registerer: r, MaxBytes: 6 << 10})
	big := func() []outbox.Record {
		r := whole()
		r.Body = make([]byte, 2<<10)
		return []outbox.Record{r}
	}
	first, second := big(), big()
	commit(t, ob, first)
	commit(t, ob, second)
	wait(t, ob.Bury(second[0].Seq, outbox.DeadLetter{}))
	if _, err := ob.Append(big()); !errors.Is(err, outbox.ErrFull) {
		t.Fatalf("append: %v", err)
	}
	if err := ob.Purge(second[0].Seq, false).Wait(t.Context()); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("purge of a dead letter as a record: %v", err)
	}
	for range 2 { // the second time nothing is left, and nothing is counted
		_ = ob.Purge(first[0].Seq, false).Wait(t.Context())
		_ = ob.Purge(second[0].Seq, true).Wait(t.Context())
	}
	select {
	case <-ob.Space():
	case <-time.After(10 * time.Second):
		t.Error("nobody is told of the space")
	}
	if s := ob.Stats(); s.Bytes != 0 || s.DeadBytes != 0 || s.Records != 0 || s.DeadLetters != 0 {
		t.Errorf("stats %+v", s)
	}
	third := big()
	commit(t, ob, third)
	wait(t, ob.Bury(third[0].Seq, outbox.DeadLetter{}))
	c, err := ob.Requeue(third[0].Seq)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, c)
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP throughline_outbox_purged_total Records and dead letters deleted by operators, by the state they were in.
# TYPE throughline_outbox_purged_total counter
throughline_outbox_purged_total{destination="center",state="dead"} 1
throughline_outbox_purged_total{destination="center",state="queued"} 1
# HELP throughline_outbox_redriven_total Dead letters queued again by operators.
# TYPE throughline_outbox_redriven_total counter
throughline_outbox_redriven_total{destination="center"} 1
`), "throughline_outbox_purged_total", "throughline_outbox_redriven_total"); err != nil {
		t.Error(err)
	}
}

// redriveChild is killChild for TestKillRedrive.
const redriveChild = "THROUGHLINE_OUTBOX_REDRIVE_CHILD"

// TestKillRedrive has a child bury records, redrive and purge them until it is killed. After every kill each record is there
// once, queued or dead, with its content; one that was said to be redriven is queued, and one that was purged is gone.
func TestKillRedrive(t *testing.T) {
	if path := os.Getenv(redriveChild); path != "" {
		redriveForever(path)
		return
	}
	path := filepath.Join(t.TempDir(), "outbox.db")
	redriven := 0
	for round := range 6 {
		last := map[string]string{} // what the child said of an id
		cmd := exec.Command(os.Args[0], "-test.run=^TestKillRedrive$")
		cmd.Env = append(os.Environ(), redriveChild+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		var kill *time.Timer
		for s := bufio.NewScanner(out); s.Scan(); {
			if kill == nil {
				kill = time.AfterFunc(time.Duration(20+rand.IntN(200))*time.Millisecond, func() { cmd.Process.Kill() })
			}
			verb, id, _ := strings.Cut(s.Text(), " ")
			last[id] = verb
			if verb == "redriven" {
				redriven++
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the child has ended by itself")
		}
		st, ob := open(t, path, outbox.Options{})
		there := map[string]outbox.Entry{}
		for _, e := range list(t, ob, outbox.Filter{}) {
			if _, ok := there[e.ID]; ok || e.Err != nil || !bytes.Equal(e.Body, []byte(e.ID)) {
				t.Errorf("round %d: %s is there twice or with body %q, error %v", round, e.ID, e.Body, e.Err)
			}
			there[e.ID] = e
		}
		for id, verb := range last {
			e, ok := there[id]
			if ok == (verb == "purged") && verb != "purging" || ok && verb == "redriven" && e.Dead || ok && verb == "buried" && !e.Dead {
				t.Errorf("round %d: %s was %s; there: %v, dead: %v", round, id, verb, ok, e.Dead)
			}
		}
		closeStore(t, st)
	}
	if redriven == 0 {
		t.Error("nothing was redriven")
	}
}

// redriveForever is the child.
func redriveForever(path string) {
	st, err := store.Open(path, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		panic(err)
	}
	ob, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		panic(err)
	}
	must := func(c *outbox.Commit, err error) {
		if err == nil {
			<-c.Done()
			err = c.Err()
		}
		if err != nil {
			panic(err)
		}
	}
	for i := 0; ; i++ {
		id := fmt.Sprintf("%d-%d", time.Now().UnixNano(), i)
		recs := []outbox.Record{{ID: id, Destination: "center", Body: []byte(id)}}
		must(ob.Append(recs))
		fmt.Println("appended", id)
		must(ob.Bury(recs[0].Seq, outbox.DeadLetter{Reason: "poison"}), nil)
		fmt.Println("buried", id)
		if i%3 == 0 {
			continue
		}
		fmt.Println("redriving", id)
		must(ob.Requeue(recs[0].Seq))
		fmt.Println("redriven", id)
		if i%3 == 1 {
			continue
		}
		fmt.Println("purging", id)
		for _, e := range func() (all []outbox.Entry) {
			_ = ob.List(outbox.Filter{ID: id}, func(e outbox.Entry) bool { all = append(all, e); return true })
			return all
		}() {
			must(ob.Purge(e.Seq, e.Dead), nil)
		}
		fmt.Println("purged", id)
	}
}
