package outbox

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"unsafe"
)

func TestEntryIsSmall(t *testing.T) {
	if got := unsafe.Sizeof(entry{}); got != 24 {
		t.Errorf("an entry takes %d bytes, want 24", got)
	}
}

// An index does what a map does, whatever the order of the calls.
func TestIndex(t *testing.T) {
	for _, load := range []struct {
		name            string
		insert, forward int // percent: of the steps, and of the insertions that go to the end
		seqs            uint64
	}{
		{"queue", 50, 100, 1 << 40}, {"growing", 80, 100, 1 << 40}, {"out of order", 55, 0, 5000}, {"mixed", 52, 70, 20000},
	} {
		t.Run(load.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			var x index
			model := map[uint64]item{}
			last := uint64(0)
			var seqs []uint64
			for step := range 60_000 {
				if r.IntN(100) < load.insert {
					seq := last + 1 + r.Uint64N(3)
					if r.IntN(100) >= load.forward {
						seq = 1 + r.Uint64N(load.seqs)
					}
					last = max(last, seq)
					it := item{queued: r.Int64(), size: r.Uint32()}
					x.set(seq, it)
					model[seq] = it
					seqs = append(seqs, seq)
				} else if len(seqs) > 0 {
					i := r.IntN(min(len(seqs), 3000)) // mostly the old ones, not all
					x.delete(seqs[i])
					delete(model, seqs[i])
					seqs[i] = seqs[0]
					seqs = seqs[1:]
				}
				if step%1000 == 0 {
					compareIndex(t, &x, model, last)
				}
			}
			compareIndex(t, &x, model, last)
			for seq := range model {
				x.delete(seq)
			}
			if len(x.chunks) != 0 {
				t.Errorf("emptied, it has %d chunks", len(x.chunks))
			}
		})
	}
}

func compareIndex(t *testing.T, x *index, model map[uint64]item, last uint64) {
	t.Helper()
	for seq, want := range model {
		if got, ok := x.of(seq); !ok || got != want {
			t.Fatalf("item of %d is %v, %v; want %v", seq, got, ok, want)
		}
	}
	for range 100 {
		seq := rand.Uint64N(last + 5)
		if _, want := model[seq]; x.has(seq) != want {
			t.Fatalf("has(%d) is %v", seq, !want)
		}
	}
	alive, counted, before := 0, 0, uint64(0)
	for _, c := range x.chunks {
		if c.alive == 0 || len(c.entries) > chunkEntries {
			t.Fatalf("a chunk of %d entries, %d of them alive", len(c.entries), c.alive)
		}
		counted += c.alive
		for i, e := range c.entries {
			if e.seq <= before && (i > 0 || before > 0) {
				t.Fatalf("%d comes after %d", e.seq, before)
			}
			before = e.seq
			if !e.gone() {
				alive++
			}
		}
	}
	if alive != len(model) || counted != len(model) {
		t.Fatalf("%d entries are alive, %d are counted, want %d", alive, counted, len(model))
	}
}

// What is left of many keeps little memory: one in 600 survives.
func TestIndexGivesMemoryBack(t *testing.T) {
	const n, every = 600_000, 600
	before := inUse()
	var x index
	for seq := range uint64(n) {
		x.set(seq, item{})
	}
	for seq := range uint64(n) {
		if seq%every != 0 {
			x.delete(seq)
		}
	}
	if got := inUse() - before; got > n/every*200+1<<20 {
		t.Errorf("%d items take %d bytes", n/every, got)
	}
	runtime.KeepAlive(&x)
}

func inUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkIndex(b *testing.B) {
	for _, n := range []uint64{1000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var x index
			for seq := range n {
				x.set(seq, item{})
			}
			seq := n
			for b.Loop() { // one comes, is looked at twice, and the oldest leaves
				x.set(seq, item{size: 1})
				x.has(seq - n/2)
				x.set(seq, item{size: 2})
				x.delete(seq - n)
				seq++
			}
		})
	}
}
