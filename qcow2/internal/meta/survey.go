package meta

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// ReferenceKind is what a Reference leads to.
type ReferenceKind uint8

// The kinds of a Reference.
const (
	ToData       ReferenceKind = iota // a cluster of data, or one that is reserved
	ToCompressed                      // the bytes of a compressed cluster
	ToTable                           // an L2 table
)

// Reference is one entry of a table that leads to a host cluster.
type Reference struct {
	Cluster format.ClusterIdx // the last, of a compressed cluster
	Kind    ReferenceKind
	// Entry is what the entry says, of a compressed cluster; it tells it from its neighbours in the same host cluster.
	Entry format.L2Entry
	At    format.HostOff // where the entry lies
	// Guest is the guest cluster of an L2 entry, the index of an L1 entry.
	Guest GuestCluster
	// Weight counts the trees of snapshots that have the entry, Active tells that the active tree has it.
	Weight uint32
	Active bool
}

// Survey is who refers to the clusters from some place on.
type Survey struct {
	Usage *Usage
	// From is where it begins: at Want, or behind it where there are too many references to hold.
	Want, From format.ClusterIdx
	Refs       []Reference // by cluster and entry
	// Odd counts entries that lead there in a way that cannot be changed: their table stands at two places of a disk.
	Odd int64
}

// surveyed is an L2 table.
type surveyed struct {
	index  int64 // in the L1 tables
	weight uint32
	active bool
	odd    bool // at different indexes
}

type surveyor struct {
	s      *Store
	v      *Survey
	tables map[format.HostOff]surveyed
	most   int
}

// NewSurvey finds out who refers to the host clusters from want on, in the active tree and those of snapshots. It reads the
// disk, which must hold what memory holds and not change meanwhile. Metadata that is impossible, or refers to what is
// counted as free, ends it: nothing may be moved in such an image.
func (s *Store) NewSurvey(ctx context.Context, active TableAt, inactive []TableAt, u *Usage, want format.ClusterIdx, most int) (*Survey, error) {
	sv := &surveyor{s: s, v: &Survey{Usage: u, Want: want, From: want}, tables: make(map[format.HostOff]surveyed), most: most}
	for i, at := range append([]TableAt{active}, inactive...) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := sv.l1(at, i == 0); err != nil {
			return nil, err
		}
	}
	if err := sv.walk(ctx); err != nil {
		return nil, err
	}
	sv.sort()
	return sv.v, nil
}

func (sv *surveyor) l1(at TableAt, active bool) error {
	t, err := sv.s.LoadTree(at.Off, at.Len)
	if err != nil {
		return err
	}
	for i, w := range t.L1 {
		off := format.L1Entry(w).Offset()
		if off == 0 {
			continue
		}
		if err := sv.inUse(off, "L1 table", at.Off); err != nil {
			return err
		}
		known, again := sv.tables[off]
		known.odd = known.odd || again && known.index != int64(i)
		known.index = int64(i)
		weight := uint32(1)
		if active {
			known.odd, weight = known.odd || known.active, 0
			known.active = true
		}
		known.weight += weight
		sv.tables[off] = known
		sv.note(Reference{Cluster: sv.s.Layout.Cluster(off), Kind: ToTable, At: at.Off + format.HostOff(i*8),
			Guest: GuestCluster(i), Weight: weight, Active: active})
	}
	return nil
}

// inUse refuses a reference to what is counted as free: what is thought to be a hole is none.
func (sv *surveyor) inUse(off format.HostOff, what string, at format.HostOff) error {
	if !sv.s.Layout.Aligned(off) {
		return corrupt("an entry of the %s at host offset %#x leads to %#x, which is not on a cluster boundary", what, at, off)
	}
	if !sv.v.Usage.Has(sv.s.Layout.Cluster(off)) {
		return corrupt("an entry of the %s at host offset %#x leads to %#x, which is counted as free", what, at, off)
	}
	return nil
}

// walk reads every L2 table once.
func (sv *surveyor) walk(ctx context.Context) error {
	lay := sv.s.Layout
	all := Tree{s: sv.s}
	for _, off := range slices.Sorted(maps.Keys(sv.tables)) {
		all.L1 = append(all.L1, uint64(off))
	}
	step := int(lay.L2EntrySize())
	return all.tables(ctx, func(_ int, off format.HostOff, raw []byte) error {
		t := sv.tables[off]
		for k := 0; k < len(raw); k += step {
			e := format.L2Entry(be64(raw[k:]))
			if e == 0 {
				continue
			}
			r := Reference{Kind: ToData, At: off + format.HostOff(k), Weight: t.weight, Active: t.active,
				Guest: GuestCluster(t.index*lay.L2Entries() + int64(k/step))}
			switch lay.Kind(e) {
			case format.KindInvalid:
				return corrupt("L2 entry %#x in the table at host offset %#x", uint64(e), off)
			case format.KindNormal, format.KindZeroAlloc:
				if lay.DataFile {
					continue
				}
				if err := sv.inUse(e.HostOffset(), "L2 table", off); err != nil {
					return err
				}
				r.Cluster = lay.Cluster(e.HostOffset())
			case format.KindCompressed:
				first, last := lay.CompressedClusters(e)
				for c := first; c <= last; c++ {
					if err := sv.inUse(lay.Offset(c), "L2 table", off); err != nil {
						return err
					}
				}
				r.Kind, r.Entry, r.Cluster = ToCompressed, e, last
			default:
				continue
			}
			if t.odd && r.Cluster >= sv.v.From {
				sv.v.Odd++
				continue
			}
			sv.note(r)
		}
		return nil
	})
}

// note keeps a reference that leads to the part that is looked at. When there are too many, the part becomes smaller.
func (sv *surveyor) note(r Reference) {
	v := sv.v
	if r.Cluster < v.From {
		return
	}
	v.Refs = append(v.Refs, r)
	if len(v.Refs) < sv.most {
		return
	}
	sv.sort()
	v.From = max(v.Refs[len(v.Refs)/2].Cluster, v.From+1)
	n, _ := slices.BinarySearchFunc(v.Refs, v.From, func(r Reference, c format.ClusterIdx) int { return cmp.Compare(r.Cluster, c) })
	v.Refs = append(v.Refs[:0], v.Refs[n:]...)
}

func (sv *surveyor) sort() {
	slices.SortFunc(sv.v.Refs, func(a, b Reference) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Entry, b.Entry), cmp.Compare(a.At, b.At))
	})
}

// EntryPlace returns where on the disk the L2 entry of a guest cluster of the active tree lies, 0 where there is no table.
func (m *Mapping) EntryPlace(c GuestCluster) (format.HostOff, error) {
	l1 := int64(c >> m.l2Bits)
	if l1 >= m.l1Len {
		return 0, nil
	}
	chunk, err := m.chunk(l1/l1ChunkEntries, true)
	if err != nil {
		return 0, err
	}
	off := format.L1Entry(chunk.entries[l1%l1ChunkEntries].Load()).Offset()
	if off == 0 {
		return 0, nil
	}
	return off + format.HostOff((int64(c)&(1<<m.l2Bits-1))*m.lay.L2EntrySize()), nil
}

// L1Place returns where on the disk an entry of the active L1 table lies.
func (m *Mapping) L1Place(i int64) format.HostOff { return m.l1Off + format.HostOff(i*8) }

// readWord reads an entry of a table.
func (s *Store) readWord(at format.HostOff) (uint64, error) {
	var b [8]byte
	if n, err := s.file.ReadAt(b[:], int64(at)); n < len(b) {
		return 0, fmt.Errorf("reading a table entry at host offset %#x: %w", at, err)
	}
	return be64(b[:]), nil
}
