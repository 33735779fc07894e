package outbox_test

import (
	"math"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/store"
)

// turnover keeps a backlog of records of 100 B to 64 kB, as many of each order of magnitude, and replaces them little by
// little: most in the order of their appends and some long after their turn, as lanes that wait do. Every tenth notes an
// attempt, every fiftieth is buried; dead letters are purged when there are more than a twentieth of the backlog.
type turnover struct {
	st   *store.Store
	ob   *outbox.Outbox
	rnd  *rand.Rand
	body []byte
	live []uint64
	dead []uint64
}

func newTurnover(tb testing.TB) *turnover {
	st, ob := open(tb, filepath.Join(tb.TempDir(), "outbox.db"), outbox.Options{})
	tb.Cleanup(func() { closeStore(tb, st) })
	w := &turnover{st: st, ob: ob, rnd: rand.New(rand.NewPCG(1, 2)), body: make([]byte, 64<<10)}
	for i := range w.body {
		w.body[i] = byte(w.rnd.Uint32())
	}
	return w
}

// flush appends some records and lets as many go, in one flush, or more append than go.
func (w *turnover) flush(tb testing.TB, appends, goes int) {
	recs := make([]outbox.Record, appends)
	for i := range recs {
		size := int(100 * math.Pow(655, w.rnd.Float64()))
		recs[i] = outbox.Record{Destination: "center", Body: w.body[:size]}
	}
	for range goes {
		i := 0
		if w.rnd.IntN(10) == 0 {
			i = w.rnd.IntN(len(w.live))
		}
		seq := w.live[i]
		w.live = append(w.live[:i], w.live[i+1:]...)
		switch n := w.rnd.IntN(50); {
		case n == 0:
			w.ob.Bury(seq, outbox.DeadLetter{Reason: "poison"})
			w.dead = append(w.dead, seq)
		default:
			w.ob.Remove(seq)
		}
	}
	for range goes / 10 {
		w.ob.Reschedule(w.live[w.rnd.IntN(len(w.live))], 1, noon, "answered 503 Service Unavailable")
	}
	commit(tb, w.ob, recs)
	for _, r := range recs {
		w.live = append(w.live, r.Seq)
	}
	for len(w.dead) > len(w.live)/20 {
		wait(tb, w.ob.Purge(w.dead[0], true))
		w.dead = w.dead[1:]
	}
}

// factor is the size of the file by what it holds.
func (w *turnover) factor() float64 {
	s := w.ob.Stats()
	return float64(w.st.Size()) / float64(s.Bytes+s.DeadBytes)
}

// TestFileReusesSpace: at a steady backlog the file stays within a factor of it, however much goes through.
func TestFileReusesSpace(t *testing.T) {
	const backlog, perFlush = 1000, 25
	w := newTurnover(t)
	for len(w.live) < backlog {
		w.flush(t, perFlush, 0)
	}
	filled := w.factor()
	var factors []float64
	for range 12 {
		for range backlog / perFlush {
			w.flush(t, perFlush, perFlush)
		}
		factors = append(factors, w.factor())
	}
	t.Logf("file by content: %.2f when filled, then %.2f", filled, factors)
	for _, f := range factors {
		if f > 2 {
			t.Errorf("the file is %.2f times what it holds: %.2f", f, factors)
			break
		}
	}
}

// BenchmarkTurnover is the same at a backlog of 10,000 records, some 100 MB; one op is a turnover of a hundredth of it. It says
// how many times the file is what it holds, in the end.
func BenchmarkTurnover(b *testing.B) {
	const backlog, perFlush = 10_000, 25
	w := newTurnover(b)
	for len(w.live) < backlog {
		w.flush(b, perFlush, 0)
	}
	filled := w.factor()
	b.ReportAllocs()
	for b.Loop() {
		for range backlog / perFlush / 100 {
			w.flush(b, perFlush, perFlush)
		}
	}
	b.ReportMetric(filled, "file/content-filled")
	b.ReportMetric(w.factor(), "file/content")
}
