package outbox_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

// TestRedrivenIsYoung: the age of a dead letter that is redriven counts from then, and it is no new record.
func TestRedrivenIsYoung(t *testing.T) {
	now := noon.Truncate(time.Millisecond)
	_, ob := open(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{Now: func() time.Time { return now }})
	recs := []outbox.Record{whole(), whole()}
	commit(t, ob, recs)
	wait(t, ob.Bury(recs[0].Seq, outbox.DeadLetter{}))
	now = now.Add(time.Hour)
	wait(t, ob.Remove(recs[1].Seq))
	if s := ob.Stats(); !s.Oldest.IsZero() {
		t.Errorf("oldest %v with nothing but a dead letter", s.Oldest)
	}
	c, err := ob.Requeue(recs[0].Seq)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, c)
	if s := ob.Stats(); !s.Oldest.Equal(now) || s.Destinations["center"].Appended != 2 || s.Destinations["center"].Redriven != 1 {
		t.Errorf("stats %+v, want the oldest from %v on", s, now)
	}
}
