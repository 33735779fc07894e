package rules

import "unsafe"

// document is the payload of one message, read as JSON in place. It is scanned at
// most once, when something first reads into it, and each object or list below its
// outermost one that is read into is scanned once more, however many rules read from it.
type document struct {
	text   string
	state  documentState
	tables []table
	// entries holds the members of all tables, one after the other.
	entries []entry
}

type documentState uint8

const (
	documentUnread documentState = iota
	documentValid
	documentInvalid
)

// table is what one object or array of the document holds.
type table struct {
	offset   int // of its bracket
	from, to int // its entries
	lookups  int
	index    map[string]int // nil: not made yet
}

type entry struct {
	key      string
	from, to int // the value's text
}

// keptEntries bounds the memory that a document keeps from one message to the
// next.
const keptEntries = 1024

// reset makes d the document of another payload, which must not change while d
// is read.
func (d *document) reset(payload []byte) {
	d.text = unsafe.String(unsafe.SliceData(payload), len(payload))
	d.state = documentUnread
	clear(d.tables)
	d.tables = d.tables[:0]
	if cap(d.entries) > keptEntries {
		d.entries = nil
	}
	clear(d.entries)
	d.entries = d.entries[:0]
}

func (d *document) valid() bool {
	if d.state == documentUnread {
		d.state = documentInvalid
		if scanJSON(d.text, &d.entries) {
			d.state = documentValid
			d.tables = append(d.tables, table{offset: d.begin(), to: len(d.entries)})
		}
	}
	return d.state == documentValid
}

// root is the whole document; the caller has seen that it is valid.
func (d *document) root() value {
	to := len(d.text)
	for isJSONSpace(d.text[to-1]) {
		to--
	}
	return d.value(d.begin(), to)
}

// begin is where the document's value begins.
func (d *document) begin() int { return passSpace(d.text, 0) }

func (d *document) value(from, to int) value {
	raw := d.text[from:to]
	if raw[0] == '{' || raw[0] == '[' {
		return value{kind: kindRaw, n: uint64(from), s: raw}
	}
	return scalar(raw)
}

// member is the value of a key of the object raw; undefined if there is none. Of
// duplicate keys the last wins, and a key is plain text whatever it contains.
func (d *document) member(raw value, key string) value {
	t := d.table(raw)
	if t.lookups++; t.lookups > indexedAfter && t.to-t.from >= indexedFrom {
		if t.index == nil {
			d.makeIndex(t)
		}
		if i, ok := t.index[key]; ok {
			return d.value(d.entries[i].from, d.entries[i].to)
		}
		return value{}
	}
	for i := t.to - 1; i >= t.from; i-- {
		if e := &d.entries[i]; e.key == key {
			return d.value(e.from, e.to)
		}
	}
	return value{}
}

// elem is the n-th value of the list raw, from 1, negative from the end.
func (d *document) elem(raw value, n int) value {
	t := d.table(raw)
	i, ok := place(n, t.to-t.from)
	if !ok {
		return value{}
	}
	e := d.entries[t.from+i]
	return d.value(e.from, e.to)
}

// A table gets a map once it has been searched indexedAfter times, if it has
// indexedFrom members: else comparing keys is cheaper.
const (
	indexedFrom  = 64
	indexedAfter = 16
)

func (d *document) makeIndex(t *table) {
	t.index = make(map[string]int, t.to-t.from)
	for i := t.from; i < t.to; i++ {
		t.index[d.entries[i].key] = i
	}
}

func (d *document) table(raw value) *table {
	offset := int(raw.n)
	for i := range d.tables {
		if d.tables[i].offset == offset {
			return &d.tables[i]
		}
	}
	t := table{offset: offset, from: len(d.entries)}
	c := cursor{s: d.text, i: offset}
	c.each(func(key string) {
		start := c.i
		c.skip()
		d.entries = append(d.entries, entry{key, start, c.i})
	})
	t.to = len(d.entries)
	d.tables = append(d.tables, t)
	return &d.tables[len(d.tables)-1]
}

// forget drops what was read of the stretch within, which is done with, if it was
// read after there were so many tables and entries. Else a list of a hundred
// thousand elements would make as many tables to search.
func (d *document) forget(within span, tables, entries int) {
	kept := d.tables[:tables]
	for _, t := range d.tables[tables:] {
		if t.offset < within.start || t.offset >= within.end {
			kept = append(kept, t)
		}
	}
	clear(d.tables[len(kept):])
	d.tables = kept
	if len(kept) == tables {
		clear(d.entries[entries:])
		d.entries = d.entries[:entries]
	}
}

// place turns an index of the rule language, 1 the first and -1 the last, into
// one of Go.
func place(n, length int) (int, bool) {
	if n < 0 {
		n += length
	} else {
		n--
	}
	return n, n >= 0 && n < length
}

// payloadValue is the payload as a string, sharing its memory. It belongs to the
// message that the document was reset to.
func payloadValue(payload []byte) value {
	return value{kind: kindString, n: payloadText, s: unsafe.String(unsafe.SliceData(payload), len(payload))}
}
