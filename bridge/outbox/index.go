package outbox

import (
	"cmp"
	"math"
	"slices"
)

// chunkEntries bounds a chunk: 12 KiB, which is what one deletion may have to copy.
const chunkEntries = 512

// index is a map of Seqs to items in 24 bytes for each, where a Go map takes twice that: Seqs ascend, so they are kept in
// their order, in chunks. A chunk is copied when half of it is gone, so that what lasts longest keeps no memory of what came with it.
type index struct{ chunks []chunk }

// chunk holds entries in the order of their Seqs, those that are gone included. Its first and its last may be gone.
type chunk struct {
	entries []entry
	alive   int
}

type entry struct {
	seq uint64
	item
}

// noTime marks an entry that is gone, where a field of its own would take 8 bytes.
const noTime = math.MinInt64

func (e *entry) gone() bool { return e.queued == noTime }

// find returns the chunk that seq belongs into, and where in it; ok is false if there is no entry.
func (x *index) find(seq uint64) (c, at int, ok bool) {
	c, ok = slices.BinarySearchFunc(x.chunks, seq, func(c chunk, seq uint64) int { return cmp.Compare(c.entries[0].seq, seq) })
	if ok {
		return c, 0, true
	}
	c = max(c-1, 0)
	if c == len(x.chunks) {
		return c, 0, false
	}
	at, ok = slices.BinarySearchFunc(x.chunks[c].entries, seq, func(e entry, seq uint64) int { return cmp.Compare(e.seq, seq) })
	return c, at, ok
}

// of returns the item of a Seq.
func (x *index) of(seq uint64) (item, bool) {
	c, at, ok := x.find(seq)
	if !ok || x.chunks[c].entries[at].gone() {
		return item{}, false
	}
	return x.chunks[c].entries[at].item, true
}

// has reports whether a Seq has an item.
func (x *index) has(seq uint64) bool {
	_, ok := x.of(seq)
	return ok
}

// set gives a Seq its item. The next one in order costs the least.
func (x *index) set(seq uint64, it item) {
	e := entry{seq: seq, item: it}
	c, at, ok := x.find(seq)
	switch {
	case ok:
		old := &x.chunks[c].entries[at]
		if old.gone() {
			x.chunks[c].alive++
		}
		*old = e
	case c == len(x.chunks), c == len(x.chunks)-1 && at == chunkEntries:
		x.chunks = append(x.chunks, chunk{entries: []entry{e}, alive: 1})
	default:
		to := &x.chunks[c]
		to.entries = slices.Insert(to.entries, at, e)
		to.alive++
		if len(to.entries) > chunkEntries {
			x.split(c)
		}
	}
}

// split makes two chunks of one that has grown too long in its middle.
func (x *index) split(c int) {
	all := x.chunks[c].entries
	var halves [2]chunk
	for i, part := range [][]entry{all[:len(all)/2], all[len(all)/2:]} {
		halves[i].entries = slices.Clone(part)
		for _, e := range part {
			if !e.gone() {
				halves[i].alive++
			}
		}
	}
	x.chunks = slices.Replace(x.chunks, c, c+1, halves[:]...)
	x.chunks = slices.DeleteFunc(x.chunks, func(c chunk) bool { return c.alive == 0 })
}

// delete takes the item of a Seq away; there may be none.
func (x *index) delete(seq uint64) {
	c, at, ok := x.find(seq)
	if !ok || x.chunks[c].entries[at].gone() {
		return
	}
	from := &x.chunks[c]
	from.entries[at].item = item{queued: noTime}
	from.alive--
	switch {
	case from.alive == 0 && c == 0: // the usual case costs no copy
		x.chunks[0] = chunk{}
		x.chunks = x.chunks[1:]
	case from.alive == 0:
		x.chunks = slices.Delete(x.chunks, c, c+1)
	case from.alive <= len(from.entries)/2 && c < len(x.chunks)-1: // the last one grows again
		kept := make([]entry, 0, from.alive)
		for _, e := range from.entries {
			if !e.gone() {
				kept = append(kept, e)
			}
		}
		from.entries = kept
	}
}
