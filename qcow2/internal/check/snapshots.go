package check

import (
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// mendSnapshots writes the snapshot table anew where its entries break the format's rules: beside the old one, and then
// the header is switched. The walk afterwards finds the old one leaked.
func (r *repairer) mendSnapshots() error {
	c := r.c
	if !c.mendableTable {
		return nil
	}
	table, err := format.MarshalSnapshots(c.snapshots)
	if err != nil {
		return err
	}
	first, err := r.placeSnapshots(int64(len(table)))
	if errors.Is(err, errNoPlace) {
		r.note("The snapshot table was not repaired: there is no free place for it.")
		return nil
	}
	if err != nil {
		return err
	}
	if err := r.begin(); err != nil {
		return err
	}
	if err := storage.WriteFull(r.file, table, int64(c.l.Offset(first))); err != nil {
		return fmt.Errorf("writing it at host offset %#x: %w", c.l.Offset(first), err)
	}
	if err := r.countNew(first, c.l.ClustersFor(int64(len(table)))); err != nil {
		return err
	}
	if err := r.sync(); err != nil {
		return err
	}
	off := c.l.Offset(first)
	if len(table) == 0 {
		off = 0
	}
	pointer := format.EncodeSnapshotsPointer(uint32(len(c.snapshots)), off)
	if err := storage.WriteFull(r.file, pointer[:], format.OffSnapshots); err != nil {
		return fmt.Errorf("switching to it: %w", err)
	}
	if err := r.sync(); err != nil {
		return err
	}
	r.reportSnapshots()
	return r.again()
}

// placeSnapshots finds free clusters for a snapshot table. Those whose refcounts have a block come first: then the table
// can be counted before the header points to it. On version 2 no others will do, for there no dirty bit protects them.
func (r *repairer) placeSnapshots(length int64) (format.ClusterIdx, error) {
	c := r.c
	n := max(1, c.l.ClustersFor(length))
	refs := newClusterSet(c.refSpans())
	i, err := r.findFree(r.firstFree(), n, func(i format.ClusterIdx) bool {
		block, ok := c.stored.block(c.l.RefTableIndex(i))
		return ok && block != nil && !refs.has(i)
	})
	if errors.Is(err, errNoPlace) && c.l.Version >= format.Version3 {
		return r.findFree(r.firstFree(), n, func(i format.ClusterIdx) bool { return !refs.has(i) })
	}
	return i, err
}

// countNew raises the refcounts of new clusters to one, where there is a sound block for them.
func (r *repairer) countNew(first format.ClusterIdx, n int64) error {
	if r.c.brokenRefs {
		return nil // they are about to be rebuilt
	}
	for i := first; i < first+format.ClusterIdx(n); i++ {
		num := r.c.l.RefTableIndex(i)
		block, ok := r.c.stored.block(num)
		if block == nil || !ok {
			continue
		}
		old := append([]byte(nil), block...)
		r.c.l.SetRefcount(block, r.c.l.RefBlockIndex(i), 1)
		if err := r.writeChanged(r.c.stored.table[num].Offset(), old, block); err != nil {
			return fmt.Errorf("counting cluster %d: %w", i, err)
		}
	}
	return nil
}

// reportSnapshots says what was wrong with the snapshot table.
func (r *repairer) reportSnapshots() {
	p := at(r.c.h.SnapshotsOffset)
	f := r.c.tableFaults
	for _, fault := range []struct {
		times   int64
		message string
	}{
		{int64(r.c.incomplete), "Repairing snapshot table entry that is incomplete"},
		{int64(f.LongExtra), "Discarding too much extra metadata in snapshot table entry"},
		{int64(f.Resized), "Repairing length of extra metadata in snapshot table entry"},
		{f.Overhang, "Discarding snapshot table entries that are none"},
	} {
		if fault.times > 0 {
			r.rep.CorruptionsFixed += fault.times - 1
			r.repaired(Corruption, p, "%s (%d times)", fault.message, fault.times)
		}
	}
}
