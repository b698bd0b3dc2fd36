package meta

import (
	"context"
	"maps"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// Painted is what a host cluster holds for the trees.
type Painted uint8

// The kinds of Painted.
const (
	PaintedTable      Painted = iota // an L2 table
	PaintedData                      // data
	PaintedReserved                  // nothing, for a cluster that reads as zeroes
	PaintedCompressed                // compressed data
)

// Paint calls fn for everything that the active tree and those of snapshots refer to, with active set for the first. Places
// may come more than once. What cannot be followed is left out. It is for Still.
func (s *Store) Paint(ctx context.Context, active TableAt, inactive []TableAt, fn func(r ClusterRun, kind Painted, active bool)) error {
	tables := make(map[format.HostOff]bool) // whether the active tree has it
	for i, at := range append([]TableAt{active}, inactive...) {
		t, err := s.LoadTree(at.Off, at.Len)
		if err != nil {
			return err
		}
		for _, w := range t.L1 {
			off := format.L1Entry(w).Offset()
			if off == 0 || !s.Layout.Aligned(off) {
				continue
			}
			tables[off] = tables[off] || i == 0
			fn(ClusterRun{s.Layout.Cluster(off), 1}, PaintedTable, i == 0)
		}
	}
	all := Tree{s: s}
	for _, off := range slices.Sorted(maps.Keys(tables)) {
		all.L1 = append(all.L1, uint64(off))
	}
	lay := s.Layout
	step := int(lay.L2EntrySize())
	return all.tables(ctx, func(_ int, off format.HostOff, raw []byte) error {
		for k := 0; k < len(raw); k += step {
			e := format.L2Entry(be64(raw[k:]))
			if e == 0 {
				continue
			}
			kind := PaintedData
			switch lay.Kind(e) {
			case format.KindZeroAlloc:
				kind = PaintedReserved
			case format.KindCompressed:
				kind = PaintedCompressed
			}
			if r, err := s.entryClusters(e); err == nil && r.N > 0 {
				fn(r, kind, tables[off])
			}
		}
		return nil
	})
}
