package outbox_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

func TestPausesAreKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	st, ob := open(t, path, outbox.Options{Now: func() time.Time { return noon }})
	if got := ob.Pauses(); len(got) != 0 {
		t.Errorf("pauses %v of a new outbox", got)
	}
	commit(t, ob, []outbox.Record{whole()})
	ob.Pause("center", outbox.Pause{Reason: "operator"})
	ob.Pause("other", outbox.Pause{Reason: "gone", Since: noon.Add(time.Hour), Of: "x"})
	ob.Pause("third", outbox.Pause{})
	ob.Pause("center", outbox.Pause{Reason: "gone", Of: strings.Repeat("y", 2000)})
	ob.Resume("never paused")
	wait(t, ob.Resume("third"))
	want := map[string]outbox.Pause{
		"center": {Reason: "gone", Since: noon, Of: strings.Repeat("y", 1024)},
		"other":  {Reason: "gone", Since: noon.Add(time.Hour), Of: "x"},
	}
	if got := ob.Pauses(); !cmp.Equal(got, want) {
		t.Error(cmp.Diff(want, got))
	}
	ob.Pauses()["mine"] = outbox.Pause{}
	closeStore(t, st)
	_, ob = open(t, path, outbox.Options{})
	if got := ob.Pauses(); !cmp.Equal(got, want) {
		t.Errorf("after a restart: %s", cmp.Diff(want, got))
	}
	commit(t, ob, []outbox.Record{whole()})
}

// TestDamagedPause: a pause that can't be read is an error, not a destination that is sent to.
func TestDamagedPause(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	st, ob := open(t, path, outbox.Options{})
	wait(t, ob.Pause("center", outbox.Pause{Reason: "REASON"}))
	closeStore(t, st)
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(file, []byte("REASON"), []byte("reason")), 0o600); err != nil {
		t.Fatal(err)
	}
	if st, err = store.Open(path, store.Options{Buckets: outbox.Buckets()}); err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, st)
	if _, err := outbox.Open(st, outbox.Options{}); !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), `pause of destination "center"`) {
		t.Errorf("open: %v", err)
	}
}

// TestKnow: what is known has its metrics before its first record.
func TestKnow(t *testing.T) {
	r := prometheus.NewRegistry()
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Registerer: r})
	ob.Know("center", "other")
	commit(t, ob, []outbox.Record{whole()})
	ob.Know("other", "center")
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP throughline_outbox_dead_letters Dead letters kept.
# TYPE throughline_outbox_dead_letters gauge
throughline_outbox_dead_letters{destination="center"} 0
throughline_outbox_dead_letters{destination="other"} 0
# HELP throughline_outbox_records Records queued.
# TYPE throughline_outbox_records gauge
throughline_outbox_records{destination="center"} 1
throughline_outbox_records{destination="other"} 0
`), "throughline_outbox_dead_letters", "throughline_outbox_records"); err != nil {
		t.Error(err)
	}
}
