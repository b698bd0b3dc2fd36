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
	s      *Store
	backed bool
	// owners tells how many trees refer to a table, and so through it to each of its clusters.
	owners   map[format.HostOff]int
	progress func(done, total int64)
	zeroes   []byte // a cluster
}

// NewExpansion prepares the expansion of all trees of an image.
func (s *Store) NewExpansion(trees []*Tree, backed bool, progress func(done, total int64)) *Expansion {
	x := &Expansion{s: s, backed: backed, owners: make(map[format.HostOff]int), progress: progress,
		zeroes: make([]byte, s.Layout.ClusterSize())}
	for _, t := range trees {
		for _, e := range t.L1 {
			if off := format.L1Entry(e).Offset(); off != 0 {
				x.owners[off]++
			}
		}
	}
	return x
}

// eachTable calls fn for every L2 table, which may change it in raw.
func (x *Expansion) eachTable(ctx context.Context, fn func(off format.HostOff, raw []byte) error) error {
	raw := make([]byte, x.s.Layout.ClusterSize())
	for i, off := range slices.Sorted(maps.Keys(x.owners)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := x.s.readTable(off, raw); err != nil {
			return err
		}
		if err := fn(off, raw); err != nil {
			return err
		}
		x.progress(int64(i)+1, int64(len(x.owners)))
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
	s, n := x.s, x.owners[off]
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
		next, run, err := x.replace(e, n)
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
func (x *Expansion) replace(e format.L2Entry, owners int) (format.L2Entry, ClusterRun, error) {
	s := x.s
	if !x.backed {
		return 0, ClusterRun{}, nil
	}
	if host := e.HostOffset(); host != 0 && e.Copied() && owners == 1 {
		// Nobody else has this cluster, and nobody reads it while the entry says zero.
		return format.MakeL2(host, true), ClusterRun{}, s.WriteNow(x.zeroes, host)
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
	if err := s.WriteNow(x.zeroes, host); err != nil {
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
