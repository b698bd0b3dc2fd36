package storage

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// MaxMemSize is the greatest length of a MemFile.
const MaxMemSize = 1 << 62

const (
	memChunkSize = 4096
	memLeafSlots = 512
	memLeafSize  = memChunkSize * memLeafSlots
)

// MemFile is a sparse file in memory. What was never written costs nothing, whatever the offset.
//
// The content is a map of leaves of 2 MiB, each a table of chunks of 4 KiB; a chunk that is not there reads as zeroes
// and is a hole. Leaves and chunks are shared between clones and copied on the first write: a leaf belongs to the file
// whose owner it names, a chunk to the owner of its leaf if the leaf's bit for it is set. What belongs to nobody any
// more is never written again.
//
// Nothing is ever reserved: ZeroRange leaves a hole and Preallocate changes the length at most. Lock knows no others
// and always succeeds.
type MemFile struct {
	name   string
	closed atomic.Bool
	size   atomic.Int64
	chunks atomic.Int64 // chunks present, over all leaves

	// mu is held shared by whatever works inside the leaves that are there (the leaf's own lock then orders it with its
	// like) and exclusively by whatever changes the set of leaves, removes chunks or shortens the file.
	mu     sync.RWMutex
	owner  *memOwner
	leaves map[int64]*memLeaf
	keys   []int64 // of leaves, ascending
}

// memOwner is compared by address only; it has a byte so that no two share one.
type memOwner struct{ _ byte }

type memLeaf struct {
	owner *memOwner
	mu    sync.RWMutex
	used  int // chunks present
	owned [memLeafSlots / 64]uint64
	slots [memLeafSlots]*[memChunkSize]byte
}

var (
	_ File         = (*MemFile)(nil)
	_ NowaitReader = (*MemFile)(nil)
)

// NewMemFile returns an empty file; the name is for messages.
func NewMemFile(name string) *MemFile {
	return &MemFile{name: name, owner: new(memOwner), leaves: make(map[int64]*memLeaf)}
}

// Clone returns an independent file with the same content, in time and memory that do not depend on how much content
// there is in a leaf. A file that was closed can still be cloned: that is how a test opens it again.
func (f *MemFile) Clone() *MemFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owner = new(memOwner) // disown every leaf: from now on both files copy before they write
	c := &MemFile{name: f.name, owner: new(memOwner), leaves: maps.Clone(f.leaves), keys: slices.Clone(f.keys)}
	c.size.Store(f.size.Load())
	c.chunks.Store(f.chunks.Load())
	return c
}

func (f *MemFile) begin(doing string, off, n int64) error {
	if f.closed.Load() {
		return fileError(doing, f.name, fs.ErrClosed)
	}
	if err := checkRange(off, n); err != nil {
		return opError(doing, f.name, off, err)
	}
	return nil
}

// beginGrow is begin for what may make the file longer.
func (f *MemFile) beginGrow(doing string, off, n int64) error {
	if err := f.begin(doing, off, n); err != nil {
		return err
	}
	if off+n > MaxMemSize {
		return opError(doing, f.name, off, syscall.EFBIG)
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (f *MemFile) ReadAt(p []byte, off int64) (int, error) {
	one := [1][]byte{p}
	return f.ReadVAt(one[:], off)
}

// ReadAtNowait is ReadAt.
func (f *MemFile) ReadAtNowait(p []byte, off int64) (int, error) { return f.ReadAt(p, off) }

// ReadVAt reads one contiguous range into the buffers.
func (f *MemFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	if err := f.begin("reading", off, totalLen(bufs)); err != nil {
		return 0, err
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	left := max(f.size.Load()-off, 0)
	done := 0
	for _, b := range bufs {
		n := min(int64(len(b)), left)
		f.copyOut(b[:n], off+int64(done))
		done, left = done+int(n), left-n
		if n < int64(len(b)) {
			return done, io.EOF
		}
	}
	return done, nil
}

// copyOut reads bytes that lie inside the file.
func (f *MemFile) copyOut(p []byte, off int64) {
	for len(p) > 0 {
		n := min(int64(len(p)), memLeafSize-off%memLeafSize)
		if leaf := f.leaves[off/memLeafSize]; leaf == nil {
			clear(p[:n])
		} else {
			leaf.read(p[:n], off%memLeafSize)
		}
		p, off = p[n:], off+n
	}
}

func (l *memLeaf) read(p []byte, off int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for len(p) > 0 {
		in := off % memChunkSize
		n := min(int64(len(p)), memChunkSize-in)
		if c := l.slots[off/memChunkSize]; c == nil {
			clear(p[:n])
		} else {
			copy(p[:n], c[in:])
		}
		p, off = p[n:], off+n
	}
}

// WriteAt implements io.WriterAt.
func (f *MemFile) WriteAt(p []byte, off int64) (int, error) {
	one := [1][]byte{p}
	return f.WriteVAt(one[:], off)
}

// WriteVAt writes the buffers to one contiguous range.
func (f *MemFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	total := totalLen(bufs)
	if err := f.beginGrow("writing", off, total); err != nil || total == 0 {
		return 0, err
	}
	f.mu.RLock()
	if f.ownsLeaves(off, total) {
		f.copyIn(bufs, off)
		f.mu.RUnlock()
		return int(total), nil
	}
	f.mu.RUnlock()

	f.mu.Lock()
	defer f.mu.Unlock()
	for key := off / memLeafSize; key <= (off+total-1)/memLeafSize; key++ {
		f.ownLeaf(key)
	}
	f.copyIn(bufs, off)
	return int(total), nil
}

func (f *MemFile) ownsLeaves(off, n int64) bool {
	for key := off / memLeafSize; key <= (off+n-1)/memLeafSize; key++ {
		if leaf := f.leaves[key]; leaf == nil || leaf.owner != f.owner {
			return false
		}
	}
	return true
}

// ownLeaf returns the leaf, made or copied if need be. The caller holds mu exclusively.
func (f *MemFile) ownLeaf(key int64) *memLeaf {
	leaf := f.leaves[key]
	if leaf != nil && leaf.owner == f.owner {
		return leaf
	}
	own := &memLeaf{owner: f.owner}
	if leaf == nil {
		at, _ := slices.BinarySearch(f.keys, key)
		f.keys = slices.Insert(f.keys, at, key)
	} else {
		own.used, own.slots = leaf.used, leaf.slots // a disowned leaf is never written: no lock needed
	}
	f.leaves[key] = own
	return own
}

// copyIn writes to leaves that the file owns, and then makes the new bytes part of the file: whoever sees the new
// length sees the bytes.
func (f *MemFile) copyIn(bufs [][]byte, off int64) {
	for _, p := range bufs {
		for len(p) > 0 {
			n := min(int64(len(p)), memLeafSize-off%memLeafSize)
			added := f.leaves[off/memLeafSize].write(p[:n], off%memLeafSize)
			f.chunks.Add(int64(added))
			p, off = p[n:], off+n
		}
	}
	f.growTo(off)
}

func (f *MemFile) growTo(size int64) {
	for {
		old := f.size.Load()
		if old >= size || f.size.CompareAndSwap(old, size) {
			return
		}
	}
}

func (l *memLeaf) write(p []byte, off int64) (added int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(p) > 0 {
		slot, in := off/memChunkSize, off%memChunkSize
		if l.slots[slot] == nil {
			added++
		}
		n := copy(l.own(slot)[in:], p)
		p, off = p[n:], off+int64(n)
	}
	l.used += added
	return added
}

// own returns a chunk that may be written.
func (l *memLeaf) own(slot int64) *[memChunkSize]byte {
	if l.owned[slot/64]&(1<<(slot%64)) != 0 {
		return l.slots[slot]
	}
	c := new([memChunkSize]byte)
	if old := l.slots[slot]; old != nil {
		*c = *old
	}
	l.slots[slot] = c
	l.owned[slot/64] |= 1 << (slot % 64)
	return c
}

// Sync does nothing.
func (f *MemFile) Sync() error { return f.begin("syncing", 0, 0) }

// Size returns the length.
func (f *MemFile) Size() (int64, error) {
	return f.size.Load(), f.begin("measuring", 0, 0)
}

// Truncate sets the length.
func (f *MemFile) Truncate(size int64) error {
	if err := f.beginGrow("truncating", size, 0); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.size.Load(); size < old {
		f.zero(size, old-size) // bytes past the end are always zero, so that growing needs no work
	}
	f.size.Store(size)
	return nil
}

// PunchHole makes a hole.
func (f *MemFile) PunchHole(off, n int64) error {
	if err := f.begin("punching", off, n); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.zero(off, n)
	return nil
}

// ZeroRange makes a hole, and the file longer where needed.
func (f *MemFile) ZeroRange(off, n int64) error {
	if err := f.beginGrow("zeroing", off, n); err != nil || n == 0 {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.zero(off, n)
	f.growTo(off + n)
	return nil
}

// Preallocate makes the file longer where needed.
func (f *MemFile) Preallocate(off, n int64) error {
	if err := f.beginGrow("preallocating", off, n); err != nil || n == 0 {
		return err
	}
	f.mu.Lock() // not shared: a truncation at the same time sets the size without looking
	defer f.mu.Unlock()
	f.growTo(off + n)
	return nil
}

// zero clears the part of the range that lies inside the file. It visits the leaves that exist, not the range. The
// caller holds mu exclusively.
func (f *MemFile) zero(off, n int64) {
	size := f.size.Load()
	end := min(off+n, size)
	if off >= end {
		return
	}
	if end == size {
		end = (end + memChunkSize - 1) &^ (memChunkSize - 1) // the rest of the last chunk is zero anyway: drop it whole
	}
	first, _ := slices.BinarySearch(f.keys, off/memLeafSize)
	last, found := slices.BinarySearch(f.keys, (end-1)/memLeafSize)
	if found {
		last++
	}
	kept := f.keys[:first]
	for _, key := range f.keys[first:last] {
		base := key * memLeafSize
		if !f.zeroLeaf(key, max(off-base, 0), min(end-base, memLeafSize)) {
			kept = append(kept, key)
		}
	}
	f.keys = append(kept, f.keys[last:]...)
}

// zeroLeaf clears [from, to) of a leaf and reports whether the leaf went away with it.
func (f *MemFile) zeroLeaf(key, from, to int64) (gone bool) {
	used := f.leaves[key].used
	if to-from < memLeafSize {
		leaf := f.ownLeaf(key)
		leaf.zero(from, to)
		f.chunks.Add(int64(leaf.used - used))
		if leaf.used > 0 {
			return false
		}
	} else {
		f.chunks.Add(int64(-used))
	}
	delete(f.leaves, key)
	return true
}

func (l *memLeaf) zero(from, to int64) {
	for from < to {
		slot, in := from/memChunkSize, from%memChunkSize
		n := min(to-from, memChunkSize-in)
		switch {
		case l.slots[slot] == nil:
		case n == memChunkSize:
			l.slots[slot] = nil
			l.owned[slot/64] &^= 1 << (slot % 64)
			l.used--
		default:
			clear(l.own(slot)[in : in+n])
		}
		from += n
	}
}

// NextExtent is exact to the chunk.
func (f *MemFile) NextExtent(off int64) (end int64, data bool, err error) {
	if err := f.begin("mapping", off, 0); err != nil {
		return 0, false, err
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	size := f.size.Load()
	if off >= size {
		return 0, false, io.EOF
	}
	at, found := slices.BinarySearch(f.keys, off/memLeafSize)
	end = off
	if found {
		var slot int64
		if data, slot = f.leaves[f.keys[at]].runFrom(off % memLeafSize / memChunkSize); slot < memLeafSlots {
			return min(f.keys[at]*memLeafSize+slot*memChunkSize, size), data, nil
		}
		end = (f.keys[at] + 1) * memLeafSize
		at++
	}
	for ; at < len(f.keys) && end < size; at++ {
		base := f.keys[at] * memLeafSize
		if base > end { // no leaf: a hole
			if data {
				return end, data, nil
			}
			end = base
		}
		slot := f.leaves[f.keys[at]].runEnd((end-base)/memChunkSize, data)
		end = base + slot*memChunkSize
		if slot < memLeafSlots {
			return min(end, size), data, nil
		}
	}
	if !data {
		end = size
	}
	return min(end, size), data, nil
}

// runFrom reports whether a slot is present, and where the run of slots that are alike ends. One lock holds for both: a
// concurrent write between two looks would make an empty run.
func (l *memLeaf) runFrom(slot int64) (present bool, end int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	present = l.slots[slot] != nil
	for end = slot; end < memLeafSlots && (l.slots[end] != nil) == present; end++ {
	}
	return present, end
}

// runEnd returns the first slot from start on that is not as present says.
func (l *memLeaf) runEnd(start int64, present bool) int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for start < memLeafSlots && (l.slots[start] != nil) == present {
		start++
	}
	return start
}

// Lock knows no others and succeeds.
func (f *MemFile) Lock(LockMode) error { return f.begin("locking", 0, 0) }

// Stat describes the file.
func (f *MemFile) Stat() Info {
	return Info{Name: f.name, Align: 1, Allocated: f.chunks.Load() * memChunkSize}
}

// Close makes every further call fail. The content stays for Clone.
func (f *MemFile) Close() error {
	if f.closed.Swap(true) {
		return fileError("closing", f.name, fs.ErrClosed)
	}
	return nil
}

// CopyContent makes dst read as src does: the same length, the same bytes, holes where src has holes. Tests use it to
// give a file made in memory to a program that wants a path.
func CopyContent(dst, src File) error {
	size, err := src.Size()
	if err != nil {
		return err
	}
	for _, length := range []int64{0, size} {
		if err := dst.Truncate(length); err != nil {
			return err
		}
	}
	buf := make([]byte, 64<<10)
	for off := int64(0); off < size; {
		end, data, err := src.NextExtent(off)
		if err != nil {
			return err
		}
		if !data {
			off = end
			continue
		}
		n := min(int64(len(buf)), end-off)
		if _, err := src.ReadAt(buf[:n], off); err != nil {
			return fmt.Errorf("copying: %w", err)
		}
		if _, err := dst.WriteAt(buf[:n], off); err != nil {
			return fmt.Errorf("copying: %w", err)
		}
		off += n
	}
	return nil
}
