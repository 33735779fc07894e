package outbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// A store that has failed is not full: all is refused, and nothing dropped, also of a destination that is full.
func TestNoDropByAFailedStore(t *testing.T) {
	var file *os.File
	st, err := store.Open(filepath.Join(t.TempDir(), "outbox.db"), store.Options{
		Buckets: outbox.Buckets(),
		OpenFile: func(name string, flag int, perm os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, perm)
			return file, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close(context.Background()) })
	r := prometheus.NewRegistry()
	caps := outbox.Caps{Of: map[string]outbox.Cap{"d": {MaxBytes: 100, Drop: true}}}
	ob, err := outbox.Open(st, outbox.Options{Caps: caps, Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	recs := kb("d", "r")
	if c, err := ob.Append(recs); err != nil || !recs[0].Dropped || c.Wait(t.Context()) != nil {
		t.Fatalf("dropped %v, error %v", recs[0].Dropped, err)
	}
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if err := syscall.Dup3(int(full.Fd()), int(file.Fd()), 0); err != nil {
		t.Fatal(err)
	}
	c, err := ob.Append(kb("r"))
	if err != nil {
		t.Fatal(err)
	}
	failed := c.Wait(t.Context())
	if failed == nil {
		t.Fatal("a flush to a full disk has not failed")
	}
	recs = kb("d")
	if _, err := ob.Append(recs); !errors.Is(err, failed) || errors.Is(err, outbox.ErrFull) || recs[0].Dropped {
		t.Errorf("dropped %v, error %v", recs[0].Dropped, err)
	}
	if got := droppedOf(t, r)["d"]; got != 1 {
		t.Errorf("%v counted, want 1", got)
	}
}
