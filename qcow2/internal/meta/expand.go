package meta

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// Expansion replaces zero clusters, which version 2 of the format does not have, by what reads the same there: unallocated
// clusters, or clusters full of zeroes where a backing file would show through. It works on the L2 tables of all trees,
// those of internal snapshots too, inside Exclusive.
type Expansion struct {
	s *Store
	// zero writes a cluster at a host offset that the guest, at the cluster given, reads as zeroes; nil when unallocated
	// clusters read so.
	zero     func(GuestCluster, format.HostOff) error
	tables   map[format.HostOff]*ownedTable
	progress func(done, total int64)
}

// ownedTable is an L2 table.
type ownedTable struct {
	first GuestCluster // that it maps
	// owners is how many trees refer to it, and so through it to each of its clusters.
	owners int
}

// NewExpansion prepares the expansion of all trees of an image.
func (s *Store) NewExpansion(trees []*Tree, zero func(GuestCluster, format.HostOff) error, progress func(done, total int64)) *Expansion {
	x := &Expansion{s: s, zero: zero, tables: make(map[format.HostOff]*ownedTable), progress: progress}
	for _, t := range trees {
		for i, e := range t.L1 {
			off := format.L1Entry(e).Offset()
			if off == 0 {
				continue
			}
			if x.tables[off] == nil {
				x.tables[off] = &ownedTable{first: GuestCluster(int64(i) * s.Layout.L2Entries())}
			}
			x.tables[off].owners++
		}
	}
	return x
}

// eachTable calls fn for every L2 table, which may change it in raw.
func (x *Expansion) eachTable(ctx context.Context, fn func(off format.HostOff, raw []byte) error) error {
	raw := make([]byte, x.s.Layout.ClusterSize())
	for i, off := range slices.Sorted(maps.Keys(x.tables)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := x.s.readTable(off, raw); err != nil {
			return err
		}
		if err := fn(off, raw); err != nil {
			return err
		}
		x.progress(int64(i)+1, int64(len(x.tables)))
	}
	return nil
}

// HasCompressed reports whether there are compressed clusters in any tree.
func (x *Expansion) HasCompressed(ctx context.Context) (bool, error) {
	found := errors.New("found")
	err := x.eachTable(ctx, func(_ format.HostOff, raw []byte) error {
		for k := 0; k < len(raw); k += int(x.s.Layout.L2EntrySize()) {
			if format.L2Entry(be64(raw[k:])).Compressed() {
				return found
			}
		}
		return nil
	})
	if errors.Is(err, found) {
		return true, nil
	}
	return false, err
}

// Run expands every table. The image is valid at each moment; after a failure some zero clusters are left.
func (x *Expansion) Run(ctx context.Context) error {
	return x.eachTable(ctx, x.expand)
}

// expand changes one table. What its new entries point to is durable, zeroes and counts, before the table is written; what
// the old ones held is let go when that is durable.
func (x *Expansion) expand(off format.HostOff, raw []byte) error {
	s, table := x.s, x.tables[off]
	n := table.owners
	var fresh, gone []ClusterRun
	undo := func(err error) error {
		for _, r := range fresh {
			err = errors.Join(err, s.drop(r, n, CauseOther))
		}
		return errors.Join(err, s.SettleGated())
	}
	changed := false
	for k := 0; k < len(raw); k += int(s.Layout.L2EntrySize()) {
		e := format.L2Entry(be64(raw[k:]))
		kind := s.Layout.Kind(e)
		switch kind {
		case format.KindInvalid:
			return undo(corrupt("L2 entry %#x in the table at host offset %#x", uint64(e), off))
		case format.KindZeroPlain, format.KindZeroAlloc:
		default:
			continue
		}
		next, run, err := x.replace(e, table.first+GuestCluster(int64(k)/s.Layout.L2EntrySize()), n)
		if err != nil {
			return undo(err)
		}
		if run.N > 0 {
			fresh = append(fresh, run)
		}
		if kind == format.KindZeroAlloc && next.HostOffset() != e.HostOffset() {
			gone = appendRun(gone, ClusterRun{s.Layout.Cluster(e.HostOffset()), 1})
		}
		b := format.EncodeUint64(uint64(next))
		copy(raw[k:], b[:])
		changed = true
	}
	if !changed {
		return nil
	}
	if err := errors.Join(s.SettleGated(), s.SyncNow()); err != nil {
		return undo(err)
	}
	if err := s.WriteNow(raw, off); err != nil {
		return err
	}
	if err := s.SyncNow(); err != nil {
		return err
	}
	for _, r := range gone {
		if err := s.drop(r, n, CauseOther); err != nil {
			return err
		}
	}
	return s.relieve()
}

// replace returns the entry that stands for a zero cluster in version 2, and the cluster that was allocated for it.
func (x *Expansion) replace(e format.L2Entry, c GuestCluster, owners int) (format.L2Entry, ClusterRun, error) {
	s := x.s
	if x.zero == nil {
		return 0, ClusterRun{}, nil
	}
	if host := e.HostOffset(); host != 0 && e.Copied() && owners == 1 {
		// Nobody else has this cluster, and nobody reads it while the entry says zero.
		return format.MakeL2(host, true), ClusterRun{}, x.zero(c, host)
	}
	run, _, err := s.Refs.Alloc(1)
	if err != nil {
		return 0, ClusterRun{}, err
	}
	for i := 1; i < owners; i++ {
		if _, err := s.Refs.Raise(run); err != nil {
			return 0, ClusterRun{}, errors.Join(err, s.drop(run, i, CauseOther))
		}
	}
	host := s.Layout.Offset(run.First)
	if err := x.zero(c, host); err != nil {
		return 0, ClusterRun{}, errors.Join(fmt.Errorf("writing a cluster of zeroes: %w", err), s.drop(run, owners, CauseOther))
	}
	return format.MakeL2(host, owners == 1), run, nil
}

// drop takes n references from each cluster of a run.
func (s *Store) drop(r ClusterRun, n int, cause Cause) error {
	for range n {
		if _, err := s.free(Retired{ClusterRun: r, Cause: cause}); err != nil {
			return err
		}
	}
	return nil
}
