package outbox_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

const floor = 1 << 20

// look has the outbox look at the free space once.
func look(ob *outbox.Outbox, free int64, err error) {
	once, cancel := context.WithCancel(context.Background())
	cancel()
	ob.KeepFree(once, floor, func() (int64, error) { return free, err })
}

func ticked(ob *outbox.Outbox) bool {
	select {
	case <-ob.Space():
		return true
	default:
		return false
	}
}

func TestKeepFree(t *testing.T) {
	r := prometheus.NewRegistry()
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Registerer: r})
	recs := []outbox.Record{{Destination: "center", Body: make([]byte, 100_000)}, {Destination: "center"}, {Destination: "center"}}
	commit(t, ob, recs)
	look(ob, floor+200_000, nil)
	commit(t, ob, []outbox.Record{{Destination: "center", Body: make([]byte, 150_000)}})
	_, err := ob.Append([]outbox.Record{{Destination: "center", Body: make([]byte, 150_000)}})
	if !errors.Is(err, outbox.ErrFull) { // before the next look
		t.Errorf("beyond what was free: %v", err)
	}
	commit(t, ob, []outbox.Record{{Destination: "center"}})

	look(ob, floor-1, nil)
	_, err = ob.Append([]outbox.Record{{Destination: "center"}})
	var full *outbox.FullError
	if !errors.As(err, &full) || !full.Disk || full.Free != floor-1 || full.Limit != floor ||
		!strings.Contains(err.Error(), "1048575 bytes are free on the disk, where 1048576 are to stay free") {
		t.Errorf("error %v", err)
	}
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP throughline_outbox_refused_total Appends that were refused, by the cap they would have passed; disk: too little is free on the file system.
# TYPE throughline_outbox_refused_total counter
throughline_outbox_refused_total{cap="destination"} 0
throughline_outbox_refused_total{cap="disk"} 2
throughline_outbox_refused_total{cap="total"} 0
throughline_outbox_refused_total{cap="unflushed"} 0
`), "throughline_outbox_refused_total"); err != nil {
		t.Error(err)
	}
	wait(t, ob.Remove(recs[0].Seq))
	wait(t, ob.Reschedule(recs[1].Seq, 1, noon, "503"))
	wait(t, ob.Bury(recs[1].Seq, outbox.DeadLetter{}))
	wait(t, ob.Purge(recs[1].Seq, true))
	wait(t, ob.Purge(recs[2].Seq, false))

	look(ob, floor+floor/32, nil) // not enough for those who come back
	if ticked(ob) {
		t.Error("space was announced too early")
	}
	look(ob, 2*floor, nil)
	if !ticked(ob) {
		t.Error("no space was announced")
	}
	commit(t, ob, []outbox.Record{{Destination: "center"}})
	look(ob, 0, nil)
	look(ob, 0, errors.New("unknown")) // whatever it is, it's no reason to refuse
	commit(t, ob, []outbox.Record{{Destination: "center"}})
}

// TestKeepFreeUsesTheFile: what was freed inside the file is used though the file system is full, and no more than that.
func TestKeepFreeUsesTheFile(t *testing.T) {
	st, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	body := make([]byte, 64<<10)
	var seqs []uint64
	for range 1500 {
		recs := []outbox.Record{{Destination: "center", Body: body}}
		c, err := ob.Append(recs)
		if err != nil {
			t.Fatal(err)
		}
		if len(seqs)%100 == 99 {
			wait(t, c)
		}
		seqs = append(seqs, recs[0].Seq)
	}
	look(ob, 0, nil)
	if _, err := ob.Append([]outbox.Record{{Destination: "center"}}); !errors.Is(err, outbox.ErrFull) {
		t.Errorf("nothing is free, inside or out: %v", err)
	}
	for _, seq := range seqs {
		ob.Remove(seq)
	}
	wait(t, ob.Purge(mustAppend(t, ob), false)) // shares its flush with the removals, or follows it
	before, taken := st.Size(), 0
	for ; ; taken++ {
		look(ob, 0, nil)
		c, err := ob.Append([]outbox.Record{{Destination: "center", Body: body}})
		if errors.Is(err, outbox.ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		wait(t, c)
	}
	if taken < 500 || st.Size() > before {
		t.Errorf("%d records were taken, the file grew from %d to %d bytes", taken, before, st.Size())
	}
}

// mustAppend appends a record whatever is free.
func mustAppend(t *testing.T, ob *outbox.Outbox) uint64 {
	t.Helper()
	look(ob, 1<<40, nil)
	recs := []outbox.Record{{Destination: "center"}}
	commit(t, ob, recs)
	return recs[0].Seq
}

// TestKeepFreeEnds: it looks again and again, and not once its context has ended.
func TestKeepFreeEnds(t *testing.T) {
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	looks := make(chan struct{}, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ob.KeepFree(ctx, floor, func() (int64, error) { looks <- struct{}{}; return 1 << 40, nil })
	}()
	for range 2 {
		select {
		case <-looks:
		case <-time.After(10 * time.Second):
			t.Fatal("it doesn't look")
		}
	}
	cancel()
	<-done
}
