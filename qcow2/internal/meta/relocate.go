package meta

import (
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Relocation moves clusters that the trees of snapshots refer to, or L2 tables, to other places. It is for Exclusive.
//
// A cluster moves only when the entries at hand hold all the references that are counted: then both copies say the same,
// and the counts of both are as high as the references, until the last entry has changed and that is durable. So a crash
// leaves each entry with the old place or the new, both whole, and a leak at worst. COPIED flags stay as they are, as the new
// cluster is counted like the old.
type Relocation struct {
	s     *Store
	limit format.ClusterIdx
	moves []relocated
}

// relocated is what moves together.
type relocated struct {
	at       []format.HostOff // entries, each once
	old, new uint64           // what of them changes
	mask     uint64
	from, to ClusterRun
	n        uint64 // references that move, to each cluster
}

// NewRelocation begins to move clusters before limit.
func (s *Store) NewRelocation(limit format.ClusterIdx) *Relocation {
	return &Relocation{s: s, limit: limit}
}

// Move copies a cluster to a place before the limit. The entries at hold n references to it. It reports false when they are
// not all there are, or there is no place. copyTo writes what the cluster holds to the new place.
func (r *Relocation) Move(from format.ClusterIdx, at []format.HostOff, n uint64, copyTo func(format.HostOff) error) (bool, error) {
	s := r.s
	counted, err := s.Refs.Get(from)
	if err != nil || counted != n || n == 0 {
		return false, err
	}
	m := relocated{at: at, old: uint64(s.Layout.Offset(from)), mask: format.MaskL2Offset, from: ClusterRun{from, 1}, n: n}
	if same, err := m.unchanged(s); err != nil || !same {
		return false, err
	}
	if m.to, err = s.Refs.AllocBelow(1, min(r.limit, from), true); err != nil || m.to.N == 0 {
		return false, err
	}
	if err := s.raise(m.to, n-1); err != nil {
		return false, err
	}
	to := s.Layout.Offset(m.to.First)
	m.new = uint64(to)
	r.moves = append(r.moves, m)
	return true, copyTo(to)
}

// MoveCompressed is Move for a compressed cluster, of which the entries at hold n references and stream is a copy. A host
// cluster may get most references.
func (r *Relocation) MoveCompressed(e format.L2Entry, at []format.HostOff, n uint64, stream []byte, most uint64) (bool, error) {
	s := r.s
	m := relocated{at: at, old: uint64(e), mask: ^uint64(0), n: n}
	first, last := s.Layout.CompressedClusters(e)
	m.from = ClusterRun{first, int64(last-first) + 1}
	if same, err := m.unchanged(s); err != nil || !same {
		return false, err
	}
	next, err := s.PackBelow(stream, r.limit, max(most, n)-(n-1))
	if err != nil || next == 0 {
		return false, err
	}
	first, last = s.Layout.CompressedClusters(next)
	m.to, m.new = ClusterRun{first, int64(last-first) + 1}, uint64(next)
	if err := s.raise(m.to, n-1); err != nil {
		s.Refs.closeTail()
		return false, err
	}
	r.moves = append(r.moves, m)
	return true, nil
}

// raise adds n references to clusters that have one that nobody holds yet, or takes that away.
func (s *Store) raise(to ClusterRun, n uint64) error {
	for i := range n {
		done, err := s.Refs.Raise(to)
		if err == nil {
			continue
		}
		err = errors.Join(err, s.drop(ClusterRun{to.First, done}, 1, CauseOther))
		return errors.Join(err, s.drop(to, int(i)+1, CauseOther))
	}
	return nil
}

// unchanged reports whether the entries say what they are thought to say.
func (m *relocated) unchanged(s *Store) (bool, error) {
	for _, at := range m.at {
		w, err := s.readWord(at)
		if err != nil || w&(m.mask|format.FlagCompressed) != m.old {
			return false, err
		}
	}
	return true, nil
}

// Commit has the entries lead to the new places and frees the old ones. It reports whether an entry may have changed when
// it fails; if not, nothing has.
func (r *Relocation) Commit() (changed bool, err error) {
	s := r.s
	if err := s.SettleGated(); err != nil {
		return false, r.undo(err)
	}
	if err := s.SyncNow(); err != nil {
		return false, r.undo(err)
	}
	for _, m := range r.moves {
		for _, at := range m.at {
			if err := r.point(at, m); err != nil {
				return true, err
			}
		}
	}
	if err := s.SyncNow(); err != nil {
		return true, err
	}
	for _, m := range r.moves {
		if err := s.drop(m.from, int(m.n), CauseOther); err != nil {
			return true, err
		}
	}
	return true, s.SettleGated()
}

// point changes one entry, within a sector: a power cut leaves it old or new.
func (r *Relocation) point(at format.HostOff, m relocated) error {
	w, err := r.s.readWord(at)
	if err != nil {
		return err
	}
	b := format.EncodeUint64(w&^m.mask | m.new)
	return r.s.WriteNow(b[:], at)
}

// Undo gives the new places back after err, when nothing leads to them.
func (r *Relocation) Undo(err error) error { return r.undo(err) }

func (r *Relocation) undo(err error) error {
	r.s.Refs.closeTail()
	for _, m := range r.moves {
		err = errors.Join(err, r.s.drop(m.to, int(m.n), CauseOther))
	}
	r.moves = nil
	return err
}

// CopyCluster copies a host cluster as it is; what lies behind the end of the file is zeroes.
func (s *Store) CopyCluster(from, to format.HostOff, buf []byte) error {
	if err := storage.ReadFull(s.file, buf, int64(from)); err != nil {
		return fmt.Errorf("reading host offset %#x: %w", from, err)
	}
	return s.WriteNow(buf, to)
}
