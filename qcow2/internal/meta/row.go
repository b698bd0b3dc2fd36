package meta

import (
	"fmt"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// AllocRow hands out n clusters in one run, each with a count of 1, as a table needs them. Alloc ends a run where a
// refcount block has to lie; a row that is longer than what lies between two of them goes to the end of the file, behind
// the blocks that count it.
func (rc *Refcounts) AllocRow(n int64) (ClusterRun, error) {
	run, _, err := rc.Alloc(n)
	if err != nil || run.N == n {
		return run, err
	}
	if err := rc.Release(run); err != nil {
		return ClusterRun{}, err
	}
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	return rc.rowAtEnd(n)
}

// rowAtEnd allocates n clusters behind everything that has a refcount block; mu is held.
func (rc *Refcounts) rowAtEnd(n int64) (ClusterRun, error) {
	perBlock := int64(rc.perBlock())
	if perBlock < 2 {
		return ClusterRun{}, corrupt("refcount blocks of %d counts", perBlock)
	}
	blocks := (n + perBlock - 2) / (perBlock - 1) // each counts itself too
	for {
		b := rc.endBlock()
		whole := ClusterRun{format.ClusterIdx(b) * rc.perBlock(), blocks + n}
		if whole.End() > rc.maxClusters() || int64(b)+blocks > format.MaxRefTableBytes/8 {
			return ClusterRun{}, fmt.Errorf("allocating %d clusters in a row: %w", n, ErrImageFull)
		}
		if int64(b)+blocks > int64(len(rc.hosts)) {
			if err := rc.growTable(max(b+int(blocks)-1, len(rc.hosts))); err != nil {
				return ClusterRun{}, err
			}
			continue // the table has gone where the row was to go
		}
		if err := rc.guard(whole, 0); err != nil {
			return ClusterRun{}, err
		}
		for i := range int(blocks) {
			rc.installBlock(b+i, rc.lay.Offset(whole.First+format.ClusterIdx(i)))
		}
		rc.countOwn(ClusterRun{whole.First, blocks})
		row := ClusterRun{whole.First + format.ClusterIdx(blocks), n}
		rc.mark(row)
		return row, nil
	}
}

// endBlock returns the index of the first refcount block behind all that exist.
func (rc *Refcounts) endBlock() int {
	b := len(rc.hosts)
	for b > 0 && rc.hosts[b-1] == 0 {
		b--
	}
	return b
}

// UsedEnd returns the index after the last cluster that has a reference.
func (rc *Refcounts) UsedEnd() (format.ClusterIdx, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for b := rc.endBlock() - 1; b >= 0; b-- {
		if !rc.exists(b) {
			continue
		}
		if err := rc.load(b); err != nil {
			return 0, err
		}
		for slot := rc.lay.RefcountsPerBlock() - 1; slot >= 0; slot-- {
			if rc.lay.Refcount(rc.known[b].data, slot) != 0 {
				rc.dropClean()
				return format.ClusterIdx(b)*rc.perBlock() + format.ClusterIdx(slot) + 1, nil
			}
		}
		rc.dropClean()
	}
	return 0, nil
}

// PressureGated is Pressure for Exclusive.
func (s *Store) PressureGated() error {
	if !s.Map.crowded() {
		return nil
	}
	return s.SettleGated()
}

// TruncateFree cuts what is free off the end of the file, and refcount blocks there that count nothing but themselves. It is
// for Exclusive, when the counts on the disk are those in memory.
func (s *Store) TruncateFree() error {
	if err := s.Refs.dropEmptyBlocks(s); err != nil {
		return err
	}
	end, err := s.Refs.UsedEnd()
	if err != nil {
		return err
	}
	size, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("size of image file: %w", err)
	}
	most := int64(s.Layout.Offset(end))
	if size <= most || s.file.Stat().Device {
		return nil
	}
	if err := s.file.Truncate(most); err != nil {
		return fmt.Errorf("cutting the free end off the image file: %w", err)
	}
	return s.SyncNow()
}

// CutEnd gives the free end of the file back if something was freed since the image was opened. It is for the end, after
// Settle and CloseClean: what the disk holds says that nothing is there. What fails costs space only.
func (s *Store) CutEnd() {
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.Refs != nil && s.Refs.freed && !s.mark.on.Load() {
		_ = s.TruncateFree()
	}
}

// dropEmptyBlocks takes refcount blocks off the end that lie in the part of the file they count and count nothing else.
// They are there because the file was longer once, or was expected to become so.
func (rc *Refcounts) dropEmptyBlocks(s *Store) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	for b := rc.endBlock() - 1; b > 0; b-- {
		if !rc.exists(b) {
			continue
		}
		empty, err := rc.countsOnlyItself(b)
		if err != nil || !empty {
			return err
		}
		// Without its entry in the table the block's own cluster is free, and it referred to nothing.
		if err := rc.forgetBlock(s, b); err != nil {
			return err
		}
	}
	return nil
}

// forgetBlock takes a block out of the table, durably; mu is held.
func (rc *Refcounts) forgetBlock(s *Store, b int) error {
	zero := format.EncodeUint64(0)
	if err := s.WriteNow(zero[:], rc.tableOff+format.HostOff(b*8)); err != nil {
		return err
	}
	rc.hosts[b] = 0
	delete(rc.known, b)
	rc.resident = slices.DeleteFunc(rc.resident, func(i int) bool { return i == b })
	return s.SyncNow()
}

func (rc *Refcounts) countsOnlyItself(b int) (bool, error) {
	own, self := rc.split(rc.lay.Cluster(rc.hosts[b]))
	if own != b {
		return false, nil
	}
	if err := rc.load(b); err != nil {
		return false, err
	}
	for slot := range rc.lay.RefcountsPerBlock() {
		if slot != self && rc.lay.Refcount(rc.known[b].data, slot) != 0 {
			return false, nil
		}
	}
	return true, nil
}

// MustRepair reports whether an operation stopped half way, so that the image stays marked until it is repaired.
func (s *Store) MustRepair() bool { return s.mark.stays }
