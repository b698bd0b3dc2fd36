package check

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// mendEntries repairs what single entries of tables say wrong, and then walks again, for the references are others.
func (r *repairer) mendEntries() error {
	fixed := r.rep.CorruptionsFixed
	if err := r.mendL1s(); err != nil {
		return err
	}
	var own []tableRef
	for _, ref := range r.c.tables.list {
		if r.c.l.Aligned(ref.off) && r.c.counted(r.c.l.Cluster(ref.off), ref.weight) {
			own = append(own, ref)
		}
	}
	if err := r.editL2(own, r.mendL2); err != nil {
		return err
	}
	if r.rep.CorruptionsFixed == fixed {
		return nil
	}
	if err := r.sync(); err != nil {
		return err
	}
	return r.again()
}

// again walks the image as it is now.
func (r *repairer) again() error {
	c, err := r.walk(nil, false)
	if err != nil {
		return err
	}
	r.c, r.blind = c, c.blind
	return nil
}

// mendL1s repairs the entries of the active L1 table and of those of snapshots.
func (r *repairer) mendL1s() error {
	own := r.owner()
	if own.ownsL1() {
		m := l1Mender{repairer: r, active: true}
		if err := r.editL1(r.c.h.L1Offset, r.c.h.L1Size, m.mend); err != nil {
			return fmt.Errorf("mending the active L1 table: %w", err)
		}
	}
	for i := range r.c.snapshots {
		s := &r.c.snapshots[i]
		if !own.ownsSnapshotL1(s) {
			continue
		}
		m := l1Mender{repairer: r}
		if err := r.editL1(s.L1Offset, s.L1Size, m.mend); err != nil {
			return fmt.Errorf("mending the L1 table of snapshot %.128q: %w", s.ID, err)
		}
	}
	return nil
}

// l1Mender repairs the entries of one L1 table.
type l1Mender struct {
	*repairer
	active bool
}

// mend clears reserved bits, and COPIED where there is no table: every reader ignores them. It rounds off an offset that
// cannot be meant otherwise.
func (m *l1Mender) mend(words []uint64, first int64) {
	l := m.c.l
	for i, w := range words {
		e := format.L1Entry(w)
		if w == 0 {
			continue
		}
		index := first + int64(i)
		p := at(e.Offset())
		if m.active {
			p.guest, p.hasGuest = l.GuestOffset(index, 0), true
		}
		switch {
		case e.Offset() == 0:
			words[i] = 0
			m.repaired(Corruption, p, "Repairing L1 entry without a table: l1_index=%d l1_entry=%x", index, w)
			continue
		case e.Reserved() != 0:
			words[i] = w &^ e.Reserved()
			m.repaired(Corruption, p, "Repairing reserved bits of L1 entry: l1_index=%d l1_entry=%x", index, w)
		}
		if to := l.ClusterStart(e.Offset()); to != e.Offset() && m.claims(to, m.weight(e.Offset())) {
			words[i] = uint64(format.MakeL1(to, e.Copied()))
			m.repaired(Corruption, p, "Repairing l2_offset=%x: Table is not cluster aligned, and only %x can be meant",
				e.Offset(), to)
		}
	}
}

// weight returns how many L1 entries point to an L2 table.
func (m *l1Mender) weight(off format.HostOff) uint64 {
	list := m.c.tables.list
	i, ok := slices.BinarySearchFunc(list, off, func(r tableRef, off format.HostOff) int { return cmp.Compare(r.off, off) })
	if !ok {
		return 0
	}
	return list[i].weight
}

// claims reports whether the cluster at off is in use, and by nobody but times references that were found to lie in it
// without being aligned.
func (r *repairer) claims(off format.HostOff, times uint64) bool {
	i := r.c.l.Cluster(off)
	stored, ok := r.c.stored.get(i)
	return i > 0 && ok && stored >= times && times > 0 && r.c.counted(i, times)
}

// mendL2 repairs the entries of a table.
func (r *repairer) mendL2(words []uint64, ref *tableRef) {
	l := r.c.l
	step := int(l.L2EntrySize() / 8)
	for i := 0; i < len(words); i += step {
		e, b := format.L2Entry(words[i]), format.L2Bitmap(0)
		if step == 2 {
			b = format.L2Bitmap(words[i+1])
		}
		if e == 0 && b == 0 {
			continue
		}
		p := at(e.HostOffset())
		if ref.active > 0 {
			p.guest, p.hasGuest = l.GuestOffset(ref.index, int64(i/step)), true
		}
		newE, newB := r.mendEntry(e, b, p, ref.weight)
		words[i] = uint64(newE)
		if step == 2 {
			words[i+1] = uint64(newB)
		}
	}
}

// mendEntry returns an entry without those of its faults that have one remedy.
func (r *repairer) mendEntry(e format.L2Entry, b format.L2Bitmap, p place, weight uint64) (
	format.L2Entry, format.L2Bitmap) {
	l := r.c.l
	if bits := e.Reserved(); bits != 0 { // every reader ignores them
		r.repaired(Corruption, p, "Repairing reserved bits of L2 entry: l2_entry=%x", uint64(e))
		e &^= format.L2Entry(bits)
	}
	switch l.Type(e) {
	case format.KindCompressed:
		return r.mendCompressed(e, b, p)
	case format.KindNormal, format.KindZeroAlloc:
		return r.mendData(e, b, p, weight)
	}
	return e, b
}

// mendCompressed: a compressed cluster is what its descriptor says; flags and subclusters beside it mean nothing.
func (r *repairer) mendCompressed(e format.L2Entry, b format.L2Bitmap, p place) (format.L2Entry, format.L2Bitmap) {
	if e.Copied() {
		r.repaired(Corruption, p, "Repairing OFLAG_COPIED of compressed cluster: l2_entry=%x", uint64(e))
		e &^= format.MakeL2(0, true)
	}
	if b != 0 && !r.c.l.DataFile {
		r.repaired(Corruption, p, "Repairing subcluster allocation bitmap of compressed cluster: l2_entry=%x", uint64(e))
		b = 0
	}
	return e, b
}

// mendData repairs a subcluster bitmap that says both "data" and "zeroes" (the data stays: that loses nothing), and makes
// a preallocated cluster in an impossible place one that is not allocated (it has no data to lose). Data in an impossible
// place is what the cluster there holds if that cluster is in use and nobody else's.
func (r *repairer) mendData(e format.L2Entry, b format.L2Bitmap, p place, weight uint64) (
	format.L2Entry, format.L2Bitmap) {
	l := r.c.l
	if l.ExtendedL2 && b.Overlap() {
		r.repaired(Corruption, p, "Repairing offset=%x: Allocated cluster has corrupted subcluster allocation bitmap", p.host)
		b &^= b << 32
	}
	if l.Aligned(e.HostOffset()) {
		return e, b
	}
	switch {
	case l.ExtendedL2 && b&format.BitmapAllAlloc == 0:
		e = 0
	case l.Type(e) == format.KindZeroAlloc && l.Version >= format.Version3:
		e = format.L2Zero
	default:
		to := l.ClusterStart(e.HostOffset())
		if !l.DataFile && r.claims(to, weight) {
			e = e&^format.MakeL2(e.HostOffset(), false) | format.MakeL2(to, false)
			r.repaired(Corruption, p, "Repairing offset=%x: Data cluster is not properly aligned, and only %x can be meant",
				p.host, to)
		}
		return e, b
	}
	r.repaired(Corruption, p, "Repairing offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", p.host)
	return e, b
}
