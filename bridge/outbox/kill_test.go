package outbox_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// killChild names the file that the test program works on when it is run as its own child.
const killChild = "THROUGHLINE_OUTBOX_KILL_CHILD"

// TestKill has a child append and remove, and say so after each commit, until it is killed at a random moment. After every
// kill each record that was acknowledged is there, unless its removal was under way, and in the order of the appends.
func TestKill(t *testing.T) {
	if path := os.Getenv(killChild); path != "" {
		appendForever(path)
		return
	}
	path := filepath.Join(t.TempDir(), "outbox.db")
	owed := make(map[string]bool)    // acknowledged, and not being removed
	removed := make(map[string]bool) // acknowledged as removed
	rounds, appended := 8, 0
	for round := range rounds {
		for _, line := range runAndKill(t, path, time.Duration(50+rand.IntN(350))*time.Millisecond) {
			verb, id, _ := strings.Cut(line, " ")
			switch verb {
			case "appended":
				owed[id] = true
				appended++
			case "removing":
				delete(owed, id)
			case "removed":
				removed[id] = true
			default:
				t.Fatalf("round %d: the child says %q", round, line)
			}
		}
		st, ob := open(t, path, outbox.Options{})
		lost := make(map[string]bool, len(owed))
		for id := range owed {
			lost[id] = true
		}
		newest := make(map[string]int) // by the child's goroutine
		for _, e := range list(t, ob, outbox.Filter{}) {
			if e.Err != nil {
				t.Fatal(e.Err)
			}
			delete(lost, e.ID)
			if removed[e.ID] {
				t.Errorf("round %d: %s is back", round, e.ID)
			}
			number, err := strconv.Atoi(string(e.Body))
			if err != nil || number <= newest[e.Lane] && newest[e.Lane] > 0 {
				t.Errorf("round %d: %s has number %q after %d, error %v", round, e.ID, e.Body, newest[e.Lane], err)
			}
			newest[e.Lane] = number
		}
		for id := range lost {
			t.Errorf("round %d: %d of %d acknowledged records are lost, %s for one", round, len(lost), len(owed), id)
			break
		}
		closeStore(t, st)
	}
	if appended < rounds {
		t.Errorf("only %d records were acknowledged in %d rounds", appended, rounds)
	}
}

// runAndKill runs the child, kills it some time after it has got going, and returns what it said.
func runAndKill(t *testing.T, path string, after time.Duration) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
	cmd.Env = append(os.Environ(), killChild+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	var kill *time.Timer
	for s := bufio.NewScanner(out); s.Scan(); {
		if kill == nil {
			kill = time.AfterFunc(after, func() { cmd.Process.Kill() })
		}
		lines = append(lines, s.Text())
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child has ended by itself")
	}
	return lines
}

// appendForever is the child: a few goroutines append, and remove every other record of theirs.
func appendForever(path string) {
	st, err := store.Open(path, store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		panic(err)
	}
	ob, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		panic(err)
	}
	var out sync.Mutex
	say := func(verb, id string) {
		out.Lock()
		defer out.Unlock()
		fmt.Println(verb, id) // one write(2), which a kill doesn't undo
	}
	// Numbers go on from round to round.
	start := int(time.Now().UnixMicro())
	var wg sync.WaitGroup
	for lane := range 4 {
		wg.Go(func() {
			for i := start; ; i++ {
				recs := []outbox.Record{{Destination: "center", Ordered: true, Lane: fmt.Sprint(lane), Body: strconv.AppendInt(nil, int64(i), 10)}}
				c, err := ob.Append(recs)
				if err == nil {
					err = c.Wait(context.Background())
				}
				if err != nil {
					panic(err)
				}
				say("appended", recs[0].ID)
				if i%2 == 0 {
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
	wg.Wait()
}
