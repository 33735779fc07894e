package bridge

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestFIFO(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var f fifo[int]
	var want []int
	most := 0
	for n := range 200_000 {
		switch k := rng.IntN(1000); {
		case k < 10:
			back := []int{-n, n}
			f.unshift(back...)
			want = append(back, want...)
		case k < 500 || f.len() == 0:
			f.push(n)
			want = append(want, n)
		case k < 999:
			if got := f.pop(); got != want[0] {
				t.Fatalf("popped %d, want %d", got, want[0])
			}
			want = want[1:]
		default:
			odd := func(v int) bool { return v%2 == 1 }
			f.drop(odd)
			want = slices.DeleteFunc(want, odd)
		}
		most = max(most, len(want))
		if f.len() != len(want) || len(want) > 0 && f.front() != want[0] {
			t.Fatalf("%d elements, want %d", f.len(), len(want))
		}
	}
	if slack := cap(f.items); slack > 4*most+64 {
		t.Errorf("room for %d elements with %d in it at most", slack, most)
	}
}

// Whatever happens to lanes, each record comes out once, in its lane's order
// unless it has left that, and nothing is kept of a lane that is empty.
func TestLanes(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	keys := []string{"", "a", "b", "c", "d", "e"} // "": no lane
	var ls lanes
	now := time.Now()
	var flying []*lane
	last := map[string]uint64{}
	const records = 20_000
	pushed, done, together := uint64(0), 0, 0
	left, failed := map[uint64]bool{}, map[uint64]time.Duration{} // failed: on the clock that is pushed
	purged, flew := map[uint64]bool{}, map[uint64]bool{}          // flew: it was in somebody's hands when it was purged
	for done < records {
		switch k := rng.IntN(10); {
		case k < 3 && pushed < records:
			key := keys[rng.IntN(len(keys))]
			pushed++
			ls.push(key, key != "", pending{seq: pushed, queued: int64(pushed)})
		case k < 6:
			l := ls.next()
			if l == nil {
				l = ls.earliest()
			}
			if l == nil && ls.overdue.len() > 0 {
				l = ls.overdue.pop()
			}
			switch {
			case l == nil:
			case rng.IntN(3) == 0:
				want := 1 + rng.IntN(6)
				out, n := ls.gather(l, want, int64(pushed)-500)
				sum := 0
				for _, l := range out {
					more := ls.flying[l]
					if sum += 1 + len(more); len(more) > 0 && (l.failing || l.head.alone && l != out[0]) {
						t.Fatalf("lane %s: head failing %v, alone %v, and %d more fly", l.key, l.failing, l.head.alone, len(more))
					}
					together += len(more)
					for i, p := range append([]pending{l.head}, more...) {
						if old := int64(p.seq) < int64(pushed)-500; i > 0 && p.alone || old && (i > 0 || l != out[0]) {
							t.Fatalf("record %d was gathered, alone: %v, old: %v", p.seq, p.alone, old)
						}
					}
				}
				if sum != n || n > want {
					t.Fatalf("%d records gathered, said to be %d, want %d at most", sum, n, want)
				}
				flying = append(flying, out...)
			default:
				flying = append(flying, l)
			}
		case k < 9 && len(flying) > 0:
			i := rng.IntN(len(flying))
			l := flying[i]
			flying = slices.Delete(flying, i, i+1)
			if more := ls.flying[l]; len(more) > 0 {
				if rng.IntN(4) == 0 { // the head is to be sent alone
					before := ls.records
					ls.loosen(l)
					done += before - ls.records
					flying = append(flying, l)
					break
				}
				var kept []pending
				through := rng.IntN(len(more) + 2)
				for i, p := range append([]pending{l.head}, more...) {
					if p.purged != purged[p.seq] {
						t.Fatalf("record %d comes out, marked as purged: %v, purged: %v", p.seq, p.purged, purged[p.seq])
					}
					switch {
					case p.purged:
					case i >= through:
						p.alone = rng.IntN(3) == 0
						kept = append(kept, p)
					case l.ordered && p.seq <= last[l.key]:
						t.Fatalf("lane %s: record %d after %d", l.key, p.seq, last[l.key])
					case l.ordered:
						last[l.key] = p.seq
					}
				}
				done += 1 + len(more) - len(kept)
				var due time.Time
				if rng.IntN(2) == 0 {
					due = now.Add(time.Duration(rng.IntN(100)) * time.Second)
				}
				ls.land(l, kept, due, int64(pushed)-500)
				break
			}
			if rng.IntN(3) == 0 {
				if since := failed[l.head.seq]; l.ordered && l.failing != (since > 0) {
					t.Fatalf("record %d has failed: %v, want %v", l.head.seq, l.failing, since > 0)
				}
				if rng.IntN(2) == 0 {
					ls.fails(l, time.Duration(pushed), 0)
					if failed[l.head.seq] == 0 {
						failed[l.head.seq] = time.Duration(pushed)
					}
				}
				ls.wait(l, now.Add(time.Duration(rng.IntN(100))*time.Second))
				break
			}
			if l.ordered && l.head.seq <= last[l.key] {
				t.Fatalf("lane %s: record %d after %d", l.key, l.head.seq, last[l.key])
			}
			if left[l.head.seq] && l.ordered {
				t.Fatalf("lane %s: record %d comes out in the lane that it has left", l.key, l.head.seq)
			}
			if l.head.purged != purged[l.head.seq] || purged[l.head.seq] && !flew[l.head.seq] {
				t.Fatalf("record %d comes out, marked as purged: %v, purged: %v", l.head.seq, l.head.purged, purged[l.head.seq])
			}
			if l.ordered {
				last[l.key] = l.head.seq
			}
			ls.advance(l, int64(pushed)-500)
			done++
		case pushed > 0 && rng.IntN(100) == 0: // purge some of the newest
			seqs, all := map[uint64]bool{}, map[string]bool{}
			for range 20 {
				if seq := pushed - uint64(rng.IntN(int(min(pushed, 200)))); !purged[seq] {
					seqs[seq], purged[seq] = true, true
				}
			}
			for _, key := range keys[1:] {
				all[key] = true
			}
			for _, l := range flying {
				for _, p := range append([]pending{l.head}, ls.flying[l]...) {
					if seqs[p.seq] {
						flew[p.seq] = true
					}
				}
			}
			before := ls.records
			ls.drop(seqs, all, int64(pushed)-500)
			done += before - ls.records
		case rng.IntN(10) == 0: // the head that has failed for the longest time leaves its lane
			h, ok := ls.longest()
			if ls.held.len() > 2*ls.failing+65 {
				t.Fatalf("%d heads noted, %d have failed", ls.held.len(), ls.failing)
			}
			if !ok {
				break
			}
			if since := failed[h.seq]; since != h.since || left[h.seq] {
				t.Fatalf("record %d failed first at %d, want %d; it has left: %v", h.seq, h.since, since, left[h.seq])
			}
			left[h.seq] = true
			ls.split(h.lane, int64(pushed)-500)
			if h.lane.ordered || h.lane.rest.len() > 0 {
				t.Fatalf("record %d has left, with its lane", h.seq)
			}
		case rng.IntN(1000) == 0:
			ls.relentAll()
			clear(failed)
		case rng.IntN(100) == 0:
			ls.wakeOnly(map[uint64]bool{pushed: true, pushed / 2: true})
		case rng.IntN(50) == 0:
			ls.retire(int64(pushed) - 500)
		case rng.IntN(10) == 0:
			now = now.Add(30 * time.Second)
			ls.wake(now)
		case rng.IntN(200) == 0:
			ls.wakeAll()
		}
	}
	if together == 0 {
		t.Error("nothing flew with the head of its lane")
	}
	if len(left) == 0 || ls.failing != 0 {
		t.Errorf("%d records have left, %d fail still", len(left), ls.failing)
	}
	if len(purged) == 0 || len(flew) == 0 || len(ls.flying) != 0 {
		t.Errorf("%d purged, %d of them flying; %d fly still", len(purged), len(flew), len(ls.flying))
	}
	if !ls.idle() || ls.records != 0 || len(ls.byKey) != 0 {
		t.Errorf("%d records, %d lanes left", ls.records, len(ls.byKey))
	}
}
