package outbox

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/throughline-mqtt/throughline/store"
)

// FuzzDecode feeds headers with a right checksum to every decoder: none panics, and what one accepts is encoded to something
// that is decoded to the same.
func FuzzDecode(f *testing.F) {
	when := time.Date(2026, 3, 1, 12, 0, 0, 5, time.UTC)
	record := encodeRecord(&Record{ID: "i", Rule: "r", Destination: "d", Lane: "l", Ordered: true, Body: []byte("b"), Published: when, SW8: "s"})
	dead := encodeDead(&DeadLetter{Reason: "r", Buried: when, Status: 400, Response: []byte("no"), Record: Record{Attempts: 3}}, record)
	request := encodeRecord(&Record{ID: "i", Destination: "d", Path: "/p", Query: "q=1", Headers: []Header{{"A", "b"}, {"C", "\x00"}}, Body: []byte("b")})
	for _, v := range [][]byte{record, request, dead, encodeState(deliveryState{attempts: 2, next: when, lastError: "e"})} {
		header, tail, err := unseal(requestVersion, v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(v[0] == requestVersion, header, tail)
	}
	f.Add(false, []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, withRequest bool, header, tail []byte) {
		version := byte(frameVersion)
		if withRequest {
			version = requestVersion
		}
		v := seal(version, append(make([]byte, frameSize), header...), tail)
		if r, err := decodeRecord(v); err == nil {
			if again, err := decodeRecord(encodeRecord(&r)); err != nil || !cmp.Equal(r, again) {
				t.Errorf("record: error %v, diff %s", err, cmp.Diff(r, again))
			}
			h, err := decodeRefHeader(v)
			if err != nil || string(h.destination) != r.Destination || string(h.lane) != r.Lane || h.ordered != r.Ordered || !h.queued.Equal(r.Queued) {
				t.Errorf("ref header %+v of %+v, error %v", h, r, err)
			}
		}
		if s, err := decodeState(v); err == nil {
			if again, err := decodeState(encodeState(s)); err != nil || again != s {
				t.Errorf("state %+v became %+v, error %v", s, again, err)
			}
		}
		if d, err := decodeDead(v); err == nil {
			again, err := decodeDead(encodeDead(&d, tail))
			if err != nil || !cmp.Equal(d, again, cmpopts.EquateEmpty()) {
				t.Errorf("dead letter: error %v, diff %s", err, cmp.Diff(d, again))
			}
		}
		deadDestination(v)
	})
}

// FuzzDecodeRaw feeds anything to the decoders: none panics, nor takes a value whose checksum is wrong.
func FuzzDecodeRaw(f *testing.F) {
	v := encodeRecord(&Record{Destination: "d", Body: []byte("body")})
	f.Add(v, 3, byte(1))
	f.Add([]byte{1}, 0, byte(0))
	f.Add([]byte{}, 0, byte(0))
	f.Fuzz(func(t *testing.T, v []byte, at int, flip byte) {
		_, err := decodeRecord(v)
		decodeState(v)
		decodeDead(v)
		if err != nil || flip == 0 || len(v) == 0 {
			return
		}
		changed := bytes.Clone(v)
		changed[uint(at)%uint(len(v))] ^= flip
		if bits := flip & (flip - 1); bits != 0 {
			return // of single bits a CRC misses none
		}
		if _, err := decodeRecord(changed); err == nil {
			t.Errorf("byte %d with bit %02x flipped is accepted", uint(at)%uint(len(v)), flip)
		}
	})
}

func TestUnseal(t *testing.T) {
	v := seal(frameVersion, append(make([]byte, frameSize), "header"...), []byte("tail"))
	newer := bytes.Clone(v)
	newer[0] = frameVersion + 1
	if _, _, err := unseal(frameVersion, newer); err == nil || errors.Is(err, store.ErrCorrupt) {
		t.Errorf("a newer version: %v", err)
	}
	for n := range len(v) - len("tail") {
		if _, _, err := unseal(frameVersion, v[:n]); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

// TestRecordVersions: a record without a request of its own is as it was before there were any, byte for byte, and one with
// them is a newer one to a broker from before.
func TestRecordVersions(t *testing.T) {
	r := Record{ID: "i", Rule: "r", Destination: "d", Lane: "l", Ordered: true, Body: []byte("b"), Published: time.Unix(0, 5).UTC(), SW8: "s"}
	const before = "010000001ad280b0c46019f4a301010000000000000005000164016c016901720000000173000062"
	if got := hex.EncodeToString(encodeRecord(&r)); got != before {
		t.Errorf("record %s, want %s", got, before)
	}
	for _, h := range []Record{{Path: "/p"}, {Query: "q"}, {Headers: []Header{{"A", ""}}}} {
		with := r
		with.Path, with.Query, with.Headers = h.Path, h.Query, h.Headers
		v := encodeRecord(&with)
		if _, _, err := unseal(frameVersion, v); err == nil || errors.Is(err, store.ErrCorrupt) {
			t.Errorf("%+v to a broker from before: %v", h, err)
		}
		if _, err := decodeState(v); err == nil {
			t.Errorf("%+v is taken for something else", h)
		}
		got, err := decodeRecord(v)
		if err != nil || !cmp.Equal(with, got) {
			t.Errorf("error %v, -want +got\n%s", err, cmp.Diff(with, got))
		}
	}
}

func TestClip(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"abc", "abc"}, {"abcdef", "abcd"}, {"abcé", "abc"}, {"", ""},
	} {
		if got := clip(tt.in, 4); got != tt.want {
			t.Errorf("clip(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

// TestOrderGivesMemoryBack: one record that stays doesn't keep the memory of all that passed it.
func TestOrderGivesMemoryBack(t *testing.T) {
	alive := map[uint64]bool{1: true}
	has := func(seq uint64) bool { return alive[seq] }
	q := order{seqs: []uint64{1}}
	for seq := uint64(2); seq < 10_000; seq++ {
		alive[seq] = true
		q.push(seq)
		delete(alive, seq)
		q.trim(len(alive), has)
	}
	if cap(q.seqs) > 200 {
		t.Errorf("room for %d", cap(q.seqs))
	}
	if seq, ok := q.first(has); !ok || seq != 1 {
		t.Errorf("first is %d, %t", seq, ok)
	}
	delete(alive, 1)
	if seq, ok := q.first(has); ok {
		t.Errorf("first is %d where none is", seq)
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := cache{max: 100, values: make(map[uint64][]byte)}
	for seq := range uint64(1000) {
		c.put(seq, make([]byte, 30))
		if seq%3 == 0 {
			c.drop(seq)
		}
	}
	if c.bytes != int64(30*len(c.values)) || c.bytes > 100 || len(c.values) < 2 || cap(c.order.seqs) > 500 {
		t.Errorf("%d bytes, %d values, order of %d", c.bytes, len(c.values), cap(c.order.seqs))
	}
	c.put(2000, make([]byte, 101))
	if c.bytes != 0 || len(c.values) != 0 {
		t.Errorf("a value that is too large: %d bytes, %d values", c.bytes, len(c.values))
	}
}
