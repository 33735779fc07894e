package store_test

import (
	"context"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/throughline-mqtt/throughline/store"
)

// TestReusableOfForeignPages: a file may come from a machine with pages of another size.
func TestReusableOfForeignPages(t *testing.T) {
	const pageSize = 64 << 10
	here, there := filepath.Join(t.TempDir(), "here.db"), filepath.Join(t.TempDir(), "there.db")
	st, err := store.Open(here, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	movePages(t, there, here, pageSize)

	st, err = store.Open(there, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(context.Background())
	if free := st.Reusable(); free == 0 || free%pageSize != 0 || free > st.Size() {
		t.Errorf("%d bytes of %d are free, want whole pages of %d", free, st.Size(), pageSize)
	}
}

// movePages makes dst a copy of src with pages of that size.
func movePages(t *testing.T, dst, src string, size int) {
	t.Helper()
	from, err := bbolt.Open(src, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := bbolt.Open(dst, 0o600, &bbolt.Options{PageSize: size})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if err := bbolt.Compact(to, from, 0); err != nil {
		t.Fatal(err)
	}
}
