package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// The layout of a bbolt file, version 2, as bbolt's internal/common describes it in structs. Numbers are in the machine's
// own byte order.
const (
	pageHeaderSize = 16 // id uint64, flags, count uint16, overflow uint32
	elementSize    = 16 // branch: pos, ksize uint32, page uint64; leaf: flags, pos, ksize, vsize uint32
	metaSize       = 64 // magic, version, page size, flags uint32, root, sequence, free list, high water, txid, checksum uint64
	metaTxid       = 48
	bucketSize     = 16 // root page, sequence uint64

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10
	bucketLeaf   = 0x01
	noFreelist   = ^uint64(0)

	// maxDepth is far above the depth of any tree that fits a disk.
	maxDepth = 64
)

// verify checks that the file at path is a whole bbolt file: as long as it says it is, and every page of its trees what
// its parent takes it for. bbolt itself has no such check that a damaged file can't crash: it follows what it finds in
// mapped memory. Free space and values are not looked at; who writes a value must be able to tell whether it is still the
// same. A damaged newest meta page can't be told from one that a power cut has torn: the state one flush before is
// taken, as bbolt does. It returns the number of that flush. A stop that is closed ends it with ErrClosed; nil: nothing does.
func verify(path string, lockTimeout time.Duration, stop <-chan struct{}) (flushed uint64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("open store: %w", err)
	}
	defer f.Close()
	// Holding bbolt's shared lock keeps a process that writes from being mistaken for damage.
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		ReadOnly: true,
		Timeout:  lockTimeout,
		OpenFile: openFilled,
	})
	var system *fs.PathError
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return 0, fmt.Errorf("open store %s: %w", path, ErrLocked)
	case errors.As(err, &system):
		return 0, fmt.Errorf("open store: %w", err)
	case err != nil:
		return 0, &CorruptError{Path: path, Reason: err.Error()}
	}
	defer db.Close() //nolint:errcheck // opened to read
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("open store: %w", err)
	}
	c := checker{f: f, size: info.Size(), pageSize: int64(db.Info().PageSize), stop: stop}
	switch err := c.check(); {
	case errors.Is(err, ErrClosed):
		return 0, err
	case errors.As(err, &system): // the disk can't give it back, which says nothing about what it holds
		return 0, fmt.Errorf("read store: %w", err)
	case err != nil:
		return 0, &CorruptError{Path: path, Reason: err.Error()}
	}
	return c.flushed, nil
}

// openFilled keeps bbolt from taking an empty file for one to initialise.
func openFilled(name string, flag int, perm os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	if err == nil && info.Size() == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

type checker struct {
	f         io.ReaderAt
	size      int64
	pageSize  int64
	flushed   uint64   // the number of the newest flush
	highWater uint64   // pages from here on are not in use
	seen      []uint64 // one bit for each page
	stop      <-chan struct{}
}

func (c *checker) check() error {
	root, freelist, err := c.meta()
	if err != nil {
		return err
	}
	if want := int64(c.highWater) * c.pageSize; c.size < want {
		return fmt.Errorf("it has %d bytes where %d are in use: it was cut off", c.size, want)
	}
	c.seen = make([]uint64, c.highWater/64+1)
	c.seen[0] = 0b11 // the meta pages
	if err := c.page(root, nil, nil, 0); err != nil {
		return err
	}
	if freelist != noFreelist {
		return c.freelist(freelist)
	}
	return nil
}

// meta finds the newer of the valid meta pages.
func (c *checker) meta() (root, freelist uint64, err error) {
	found := false
	for i := range int64(2) {
		b := make([]byte, metaSize)
		if _, err := c.f.ReadAt(b, i*c.pageSize+pageHeaderSize); err != nil {
			return 0, 0, err
		}
		txid := native.Uint64(b[metaTxid:])
		if metaSum(b) != native.Uint64(b[metaSize-8:]) || found && txid < c.flushed {
			continue
		}
		c.flushed, found = txid, true
		root, freelist, c.highWater = native.Uint64(b[16:]), native.Uint64(b[32:]), native.Uint64(b[40:])
	}
	switch {
	case !found:
		return 0, 0, errors.New("both meta pages are damaged")
	case c.highWater > uint64(c.size/c.pageSize)+1:
		return 0, 0, fmt.Errorf("it has %d bytes where %d pages of %d bytes are in use: it was cut off", c.size, c.highWater, c.pageSize)
	}
	return root, freelist, nil
}

// metaSum is the checksum that the content of a meta page must have.
func metaSum(b []byte) uint64 {
	sum := fnv.New64a()
	sum.Write(b[:metaSize-8])
	return sum.Sum64()
}

var native = binary.NativeEndian

// elements is a page, or an inline bucket, whose content is read as far as it is needed.
type elements struct {
	r           io.ReaderAt
	off         int64 // of the page header
	size        int64 // with all its overflow pages
	head        []byte
	flags       uint16
	count       int
	description string
}

// load reads the header and the first bytes of a page, up to max of them, and checks what doesn't need the elements.
func load(r io.ReaderAt, off, size, max int64, description string) (elements, error) {
	e := elements{r: r, off: off, size: size, description: description}
	e.head = make([]byte, min(size, max))
	if size < pageHeaderSize {
		return e, fmt.Errorf("%s has %d bytes", description, size)
	}
	if _, err := r.ReadAt(e.head, off); err != nil {
		return e, fmt.Errorf("%s: %w", description, err)
	}
	e.flags = native.Uint16(e.head[8:])
	e.count = int(native.Uint16(e.head[10:]))
	return e, nil
}

// bytes returns n bytes at pos, which the page must have.
func (e *elements) bytes(pos, n int64) ([]byte, error) {
	if pos < 0 || n < 0 || pos+n > e.size {
		return nil, fmt.Errorf("%s: an entry lies outside of it", e.description)
	}
	if pos+n <= int64(len(e.head)) {
		return e.head[pos : pos+n], nil
	}
	b := make([]byte, n)
	if _, err := e.r.ReadAt(b, e.off+pos); err != nil {
		return nil, fmt.Errorf("%s: %w", e.description, err)
	}
	return b, nil
}

// An entry is an element of a page with its key. Its value starts at end.
type entry struct {
	element, key []byte
	end          int64
}

// next returns the i-th entry. bbolt writes entries without gaps: the first key follows the last element, and every other
// one the value before it. So a number that has changed shows, in the elements and in the header.
func (e *elements) next(i int, previous entry, valueSize int64) (entry, error) {
	at := int64(pageHeaderSize + i*elementSize)
	el, err := e.bytes(at, elementSize)
	if err != nil {
		return entry{}, err
	}
	posSize := el
	if e.flags == leafPage {
		posSize = el[4:]
	}
	pos, size := at+int64(native.Uint32(posSize)), int64(native.Uint32(posSize[4:]))
	want := int64(pageHeaderSize + e.count*elementSize)
	if i > 0 {
		want = previous.end + valueSize
	}
	if pos != want {
		return entry{}, fmt.Errorf("%s: entry %d is not in its place", e.description, i)
	}
	key, err := e.bytes(pos, size)
	if err != nil {
		return entry{}, err
	}
	if len(key) == 0 || i > 0 && bytes.Compare(key, previous.key) <= 0 {
		return entry{}, fmt.Errorf("%s: its keys are out of order", e.description)
	}
	return entry{element: el, key: key, end: pos + size}, nil
}

// mark notes that pages are in use, each by one tree only.
func (c *checker) mark(id, n uint64) error {
	if n > c.highWater || id > c.highWater-n {
		return fmt.Errorf("page %d is outside of what is in use", id)
	}
	for ; n > 0; id, n = id+1, n-1 {
		if c.seen[id/64]&(1<<(id%64)) != 0 {
			return fmt.Errorf("page %d is used twice", id)
		}
		c.seen[id/64] |= 1 << (id % 64)
	}
	return nil
}

// open reads the beginning of a page whose first occurrence this is.
func (c *checker) open(id uint64) (elements, error) {
	select {
	case <-c.stop:
		return elements{}, ErrClosed
	default:
	}
	if err := c.mark(id, 1); err != nil {
		return elements{}, err
	}
	e, err := load(c.f, int64(id)*c.pageSize, c.pageSize, c.pageSize, fmt.Sprintf("page %d", id))
	if err != nil {
		return e, err
	}
	if found := native.Uint64(e.head); found != id {
		return e, fmt.Errorf("page %d calls itself %d", id, found)
	}
	overflow := uint64(native.Uint32(e.head[12:]))
	if err := c.mark(id+1, overflow); err != nil {
		return e, err
	}
	e.size += int64(overflow) * c.pageSize
	return e, nil
}

// page checks the tree below a page, whose keys must be at least low and below high; nil: no bound.
func (c *checker) page(id uint64, low, high []byte, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d lies too deep", id)
	}
	e, err := c.open(id)
	if err != nil {
		return err
	}
	switch {
	case e.flags == leafPage && e.count > 0: // what is empty, bbolt keeps inline
		_, err := c.leaf(&e, low, high, depth)
		return err
	case e.flags == branchPage && e.count > 0:
		return c.branch(&e, low, high, depth)
	}
	return fmt.Errorf("page %d is neither leaf nor branch", id)
}

func (c *checker) branch(e *elements, low, high []byte, depth int) error {
	children := make([]entry, e.count)
	var previous entry
	for i := range children {
		var err error
		if previous, err = e.next(i, previous, 0); err != nil {
			return err
		}
		if outside(previous.key, low, high) {
			return fmt.Errorf("%s: a key lies outside of its range", e.description)
		}
		children[i] = previous
	}
	for i, child := range children {
		to := high
		if i+1 < len(children) {
			to = children[i+1].key
		}
		if err := c.page(native.Uint64(child.element[8:]), child.key, to, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaf also returns where the last value ends.
func (c *checker) leaf(e *elements, low, high []byte, depth int) (end int64, err error) {
	var entry entry
	size := int64(pageHeaderSize) // where nothing is, the header is the end
	for i := range e.count {
		if entry, err = e.next(i, entry, size); err != nil {
			return 0, err
		}
		if outside(entry.key, low, high) {
			return 0, fmt.Errorf("%s: a key lies outside of its range", e.description)
		}
		size = int64(native.Uint32(entry.element[12:]))
		if entry.end+size > e.size {
			return 0, fmt.Errorf("%s: a value lies outside of it", e.description)
		}
		switch native.Uint32(entry.element) {
		case 0:
		case bucketLeaf:
			if err := c.bucket(e, entry.end, size, depth); err != nil {
				return 0, err
			}
		default:
			return 0, fmt.Errorf("%s: entry %d is of an unknown kind", e.description, i)
		}
	}
	return entry.end + size, nil
}

// outside reports whether key is below low or not below high; nil: no bound.
func outside(key, low, high []byte) bool {
	return bytes.Compare(key, low) < 0 || high != nil && bytes.Compare(key, high) >= 0
}

// bucket checks a bucket's tree: pages of its own, or one that is part of the value.
func (c *checker) bucket(e *elements, at, n int64, depth int) error {
	header, err := e.bytes(at, min(n, bucketSize))
	if err != nil {
		return err
	}
	if len(header) < bucketSize {
		return fmt.Errorf("%s: a bucket of %d bytes", e.description, n)
	}
	if root := native.Uint64(header); root != 0 {
		return c.page(root, nil, nil, depth+1)
	}
	inline, err := load(e.r, e.off+at+bucketSize, n-bucketSize, n, e.description+", inline bucket")
	if err != nil {
		return err
	}
	if inline.flags != leafPage {
		return fmt.Errorf("%s is no leaf", inline.description)
	}
	end, err := c.leaf(&inline, nil, nil, depth+1)
	if err == nil && end != inline.size {
		err = fmt.Errorf("%s doesn't end with its last entry", inline.description)
	}
	return err
}

// freelist checks a free list that another tool has written; this package leaves none.
func (c *checker) freelist(id uint64) error {
	e, err := c.open(id)
	if err != nil {
		return err
	}
	if e.flags != freelistPage {
		return fmt.Errorf("page %d is no free list", id)
	}
	at, n := int64(pageHeaderSize), int64(e.count)
	if n == 0xffff { // the number didn't fit and comes first
		b, err := e.bytes(at, 8)
		if err != nil {
			return err
		}
		at, n = at+8, int64(min(native.Uint64(b), c.highWater))
	}
	b, err := e.bytes(at, n*8)
	if err != nil {
		return err
	}
	for ; len(b) > 0; b = b[8:] {
		if err := c.mark(native.Uint64(b), 1); err != nil {
			return fmt.Errorf("free list: %w", err)
		}
	}
	return nil
}
