package meta

import (
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// frozenRefs is the part of a generation that belongs to the refcounts.
type frozenRefs struct {
	blocks    []frozenBlock
	newBlocks []int
	increased bool
	// urgent: pointers of the mapping may refer to clusters counted in a new block, or the table has moved.
	urgent bool
	// table is the whole new refcount table when it has moved, to be written at tableOff and then named by the header.
	table         []byte
	tableOff      format.HostOff
	tableClusters int64
	entries       map[int]format.HostOff // of newBlocks
}

type frozenBlock struct {
	index  int
	host   format.HostOff
	lo, hi int
	raw    []byte
}

// freeze copies what differs from the disk.
func (rc *Refcounts) freeze() frozenRefs {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	f := frozenRefs{newBlocks: rc.newBlocks, increased: rc.increased, tableOff: rc.tableOff, tableClusters: rc.tableClusters}
	for _, i := range rc.dirty {
		b := rc.known[i]
		raw := make([]byte, b.dirtyHi-b.dirtyLo)
		copy(raw, b.data[b.dirtyLo:b.dirtyHi])
		f.blocks = append(f.blocks, frozenBlock{i, rc.hosts[i], b.dirtyLo, b.dirtyHi, raw})
		b.dirtyLo, b.dirtyHi, b.writing = 0, 0, true
	}
	f.entries = make(map[int]format.HostOff, len(rc.newBlocks))
	for _, i := range rc.newBlocks {
		f.entries[i] = rc.hosts[i]
		f.urgent = f.urgent || rc.known[i].serves
	}
	if rc.tableMoved {
		f.urgent = true
		f.table = make([]byte, len(rc.hosts)*8)
		for i := range rc.hosts {
			b := format.EncodeUint64(uint64(format.MakeRefTable(rc.hosts[i])))
			copy(f.table[i*8:], b[:])
		}
	}
	rc.dirty, rc.newBlocks, rc.increased, rc.tableMoved = nil, nil, false, false
	return f
}

// writeBlocks is step 1: blocks whose counts are safe at any time, and a new table that nothing names yet.
func (rc *Refcounts) writeBlocks(f *frozenRefs) error {
	for _, b := range f.blocks {
		at := b.host + format.HostOff(b.lo)
		storage.Tell(rc.file, storage.EventRefBlockUpdatePart)
		if err := storage.WriteFull(rc.file, b.raw, int64(at)); err != nil {
			return fmt.Errorf("writing refcount block at host offset %#x: %w", at, err)
		}
	}
	if f.table == nil {
		return nil
	}
	storage.Tell(rc.file, storage.EventRefBlockAllocWriteTable)
	if err := storage.WriteFull(rc.file, f.table, int64(f.tableOff)); err != nil {
		return fmt.Errorf("writing refcount table at host offset %#x: %w", f.tableOff, err)
	}
	return nil
}

// writePointers makes new blocks valid: by the header's pointer to the table that lists them, or by their entries.
func (rc *Refcounts) writePointers(f *frozenRefs) error {
	if f.table != nil {
		b := format.EncodeRefTablePointer(f.tableOff, uint32(f.tableClusters))
		storage.Tell(rc.file, storage.EventRefBlockAllocSwitchTable)
		if err := storage.WriteFull(rc.file, b[:], format.OffRefTable); err != nil {
			return fmt.Errorf("writing refcount table pointer in the header: %w", err)
		}
		return nil
	}
	for _, i := range f.newBlocks {
		at := f.tableOff + format.HostOff(i*8)
		b := format.EncodeUint64(uint64(format.MakeRefTable(f.entries[i])))
		storage.Tell(rc.file, storage.EventRefBlockAllocHookup)
		if err := storage.WriteFull(rc.file, b[:], int64(at)); err != nil {
			return fmt.Errorf("writing refcount table at host offset %#x: %w", at, err)
		}
	}
	return nil
}

// thaw takes back what a failed flush did not make durable.
func (rc *Refcounts) thaw(f *frozenRefs) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for _, fb := range f.blocks {
		b := rc.known[fb.index]
		b.writing = false
		if b.dirtyLo == b.dirtyHi {
			b.dirtyLo, b.dirtyHi = fb.lo, fb.hi
			rc.dirty = append(rc.dirty, fb.index)
			continue
		}
		b.dirtyLo, b.dirtyHi = min(b.dirtyLo, fb.lo), max(b.dirtyHi, fb.hi)
	}
	rc.newBlocks = append(f.newBlocks, rc.newBlocks...)
	rc.increased = rc.increased || f.increased
	rc.tableMoved = rc.tableMoved || f.table != nil
}

// finish notes that a generation's blocks are durable and valid.
func (rc *Refcounts) finish(f *frozenRefs) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for _, fb := range f.blocks {
		rc.known[fb.index].writing = false
	}
	for _, i := range f.newBlocks {
		rc.known[i].isNew = false
	}
	rc.dropClean()
}

// sameFate reports whether cluster c has one reference left, and for how many of the next n clusters the answer is the
// same.
func (rc *Refcounts) sameFate(c format.ClusterIdx, n int64) (last bool, run int64, err error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	for run < n {
		b, slot := rc.split(c + format.ClusterIdx(run))
		if !rc.exists(b) {
			return last, max(run, 1), nil // freeing it will say what is wrong
		}
		if err := rc.load(b); err != nil {
			return false, 0, err
		}
		blk := rc.known[b]
		for ; slot < int64(rc.perBlock()) && run < n; slot++ {
			one := rc.lay.Refcount(blk.data, slot) == 1
			if run > 0 && one != last {
				return last, run, nil
			}
			last = one
			if one {
				rc.leaveTail(c + format.ClusterIdx(run)) // before the hole is punched
			}
			run++
		}
	}
	return last, run, nil
}
