package check

import (
	"cmp"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// clusterSet is a set of clusters as spans in order that do not overlap.
type clusterSet []span

func newClusterSet(spans []span) clusterSet {
	var set clusterSet
	_ = sweep(spans, func(lo, hi, _ uint64) error {
		set = append(set, span{lo, hi})
		return nil
	})
	return set
}

func (s clusterSet) has(i format.ClusterIdx) bool {
	at, found := slices.BinarySearchFunc(s, uint64(i), func(e span, i uint64) int { return cmp.Compare(e.lo, i) })
	return found || at > 0 && uint64(i) < s[at-1].hi
}

// tableOwner tells which tables may be written: what is a table and other metadata too is left alone. (A table that some
// entry takes for data may be written, and must be: its flags protect it.)
type tableOwner struct {
	c *checker
	// others is all metadata but L2 tables, the active L1 table and those of snapshots.
	others, l1, snapshotL1s clusterSet
}

// owner looks at the last walk.
func (r *repairer) owner() *tableOwner {
	c := r.c
	others := []span{{0, 1}}
	add := func(off format.HostOff, n uint64) { others = append(others, c.spanOf(off, n)) }
	add(c.h.SnapshotsOffset, uint64(c.tableBytes))
	if c.h.Crypto != nil {
		add(c.h.Crypto.Offset, c.h.Crypto.Length)
	}
	if c.h.Bitmaps != nil {
		add(c.h.Bitmaps.DirectoryOffset, c.h.Bitmaps.DirectorySize)
	}
	if !c.withoutRefs { // after a rebuild the old structures are free, and the new ones where nothing else is
		others = append(others, c.refSpans()...)
	}
	return &tableOwner{
		c:           c,
		others:      newClusterSet(append(others, c.bitmapTables...)),
		l1:          newClusterSet([]span{c.spanOf(c.h.L1Offset, uint64(c.h.L1Size)*8)}),
		snapshotL1s: newClusterSet(c.snapshotL1s),
	}
}

// refSpans returns the clusters of the refcount table and of everything that it points to.
func (c *checker) refSpans() []span {
	table := c.inside(c.h.RefTableOffset, uint64(c.h.RefTableLen)<<c.l.ClusterBits) // what the file has of it
	spans := []span{c.spanOf(c.h.RefTableOffset, uint64(table))}
	for _, e := range c.stored.table {
		if e != 0 {
			spans = append(spans, c.spanOf(e.Offset(), uint64(c.l.ClusterSize())))
		}
	}
	return spans
}

// spanOf returns the clusters of a range, none if it is not in the file.
func (c *checker) spanOf(off format.HostOff, n uint64) span {
	if n == 0 || !c.inFile(off, n) {
		return span{}
	}
	return span{uint64(c.l.Cluster(off)), uint64(c.l.Cluster(off+format.HostOff(n)-1)) + 1}
}

// ownsL2 reports whether the L2 table may be written.
func (o *tableOwner) ownsL2(ref *tableRef) bool {
	i := o.c.l.Cluster(ref.off)
	return o.c.l.Aligned(ref.off) && !o.others.has(i) && !o.l1.has(i) && !o.snapshotL1s.has(i)
}

// ownsL1 reports whether the active L1 table may be written. A snapshot may have the same table: flags mean nothing there.
func (o *tableOwner) ownsL1() bool {
	for _, s := range o.l1 {
		for i := s.lo; i < s.hi; i++ {
			if o.others.has(format.ClusterIdx(i)) {
				return false
			}
		}
	}
	for _, ref := range o.c.tables.list {
		if o.l1.has(o.c.l.Cluster(ref.off)) {
			return false
		}
	}
	return len(o.l1) > 0
}

// ownsSnapshotL1 reports whether the L1 table of a snapshot may be written.
func (o *tableOwner) ownsSnapshotL1(s *format.Snapshot) bool {
	if !o.c.l.Aligned(s.L1Offset) || s.L1Size > format.MaxL1Entries {
		return false
	}
	own := o.c.spanOf(s.L1Offset, uint64(s.L1Size)*8)
	for i := own.lo; i < own.hi; i++ {
		if o.others.has(format.ClusterIdx(i)) || o.l1.has(format.ClusterIdx(i)) || !o.c.counted(format.ClusterIdx(i), 1) {
			return false
		}
	}
	return own.lo < own.hi
}
