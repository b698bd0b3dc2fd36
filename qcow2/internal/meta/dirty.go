package meta

import (
	"errors"
	"sync/atomic"
)

// ErrNotMarked is returned by Refcounts.Alloc when counts may be postponed but the disk does not say so yet. The request
// gives its ticket back, calls Store.MarkDirty and begins again.
var ErrNotMarked = errors.New("image is not marked dirty yet")

// lazyBlocks bounds how many refcount blocks wait in memory while counts are postponed.
const lazyBlocks = 1024

// dirtyMark is what memory knows of the header's dirty bit, which says that the counts and COPIED flags on the disk may be
// wrong and must be made anew before anybody relies on them. It is on the disk before the first change that makes it
// true, and goes when they are right again and durable.
type dirtyMark struct {
	// lazy: flushes leave the counts in memory (the lazy_refcounts feature), until Settle.
	lazy bool
	on   atomic.Bool
	// stays: an operation stopped half way, so only a repair may take the mark away.
	stays bool
	// write sets or clears the bit in the header and syncs.
	write func(on bool) error
}

// MarkDirty makes sure that the disk says that counts may be wrong. It is called outside of every request.
func (s *Store) MarkDirty() error {
	s.gate.Lock()
	defer s.gate.Unlock()
	return s.MarkDirtyGated()
}

// MarkDirtyGated is MarkDirty for Exclusive.
func (s *Store) MarkDirtyGated() error {
	if s.mark.on.Load() {
		return nil
	}
	if err := s.mark.write(true); err != nil {
		return err
	}
	s.mark.on.Store(true)
	return nil
}

// MarkClean takes the mark away, if counts are not postponed. It is for Exclusive, after SettleGated.
func (s *Store) MarkClean() error {
	if s.mark.lazy {
		return nil
	}
	return s.unmark()
}

// unmark takes the mark away when nothing is left that would make the counts wrong. What could not be freed does.
func (s *Store) unmark() error {
	if !s.mark.on.Load() || s.mark.stays || s.unfreed() || s.Corrupt() != nil {
		return nil
	}
	if err := s.mark.write(false); err != nil {
		return err
	}
	s.mark.on.Store(false)
	return nil
}

// KeepDirty leaves the mark for a repair to take away. It is for Exclusive, after an operation that stopped half way.
func (s *Store) KeepDirty() { s.mark.stays = true }

// CloseClean takes the mark away at the end, after Settle. No request runs.
func (s *Store) CloseClean() error {
	s.gate.Lock()
	defer s.gate.Unlock()
	return s.unmark()
}

// postpone reports whether this flush leaves the counts in memory. A refcount table that has moved must be named by the
// header before its old place is used for something else.
func (s *Store) postpone() bool {
	if !s.mark.lazy || s.settling {
		return false
	}
	s.Refs.mu.Lock()
	defer s.Refs.mu.Unlock()
	return !s.Refs.tableMoved && len(s.Refs.dirty) < lazyBlocks
}
