package bridge

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// LimitCall sets how long a call of o goes on.
func LimitCall(o *Operator, d time.Duration) { o.limit = d }

// A commit that fails hides nothing of the rest of its batch: that is counted, and the next batch is paced for it.
func TestSettleGoesOnAfterAFailedCommit(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "outbox.db"), store.Options{Buckets: outbox.Buckets()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(t.Context())
	queue, err := outbox.Open(st, outbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(Options{Queue: queue, Tracer: tracectxtest.NewRecorder("broker")})
	if err != nil {
		t.Fatal(err)
	}
	o := NewOperator(queue, b)
	failure := errors.New("no space left on device")
	dead := Entry{Dead: true, DeadLetter: DeadLetter{Record: Record{Destination: "center"}}}
	queued := Entry{DeadLetter: DeadLetter{Record: Record{Destination: "center"}}}
	done := Changed{Destinations: map[string]Count{}}
	found := []Entry{dead, dead, queued, dead}
	commits := []*Commit{store.Completed(failure), store.Completed(nil), nil, store.Completed(nil)}
	if err := o.settle(t.Context(), found, commits, &done); !errors.Is(err, failure) {
		t.Errorf("error %v, want that of the commit", err)
	}
	if n := done.Destinations["center"]; n != (Count{Queued: 1, Dead: 2}) {
		t.Errorf("counted %+v, want 1 queued and 2 dead", n)
	}
	if o.next.IsZero() {
		t.Error("the next batch doesn't wait for what this one has made due")
	}
}
