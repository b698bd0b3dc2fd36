package meta

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Exclusive runs fn with the metadata to itself: no request and no flush but fn's own runs, and the disk holds what memory
// holds. It is how operations that concern the whole image work (snapshots, resizing, repair): on the file, in
// plain steps, each made durable before the next. fn uses SettleGated, WriteNow and SyncNow, and the methods of Refs; what it
// changes of the mapping it changes on the disk, and has the Store look there again with Reload.
func (s *Store) Exclusive(ctx context.Context, fn func() error) error {
	if err := s.Epochs.Quiesce(); err != nil {
		return err
	}
	defer s.Epochs.Resume()
	defer s.tellCorrupt()
	s.gate.Lock()
	defer s.gate.Unlock()
	return s.onSettled(ctx, fn)
}

// AtClose is Exclusive after Epochs.Close: no request comes any more.
func (s *Store) AtClose(fn func() error) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	return s.onSettled(context.Background(), fn)
}

// onSettled runs fn when everything is on the disk.
func (s *Store) onSettled(ctx context.Context, fn func() error) error {
	if err := s.SettleGated(); err != nil {
		return err
	}
	if err := s.Corrupt(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.mark.lazy {
		if err := s.MarkDirtyGated(); err != nil {
			return err
		}
	}
	if s.places != nil {
		if err := s.findTables(); err != nil {
			return err
		}
	}
	s.alone = true
	defer func() { s.alone = false }()
	if s.journal != nil {
		s.journal.Hold()
		// While the disk says that counts may be wrong, the next opening makes them anew by what it finds there, and would
		// take the clusters that only records name for unused.
		defer func() { s.journal.Resume(!s.mark.on.Load()) }()
	}
	return fn()
}

// Still runs fn while nothing changes: no request, no flush and no Exclusive runs, and the disk holds what memory holds.
func (s *Store) Still(fn func() error) error {
	if err := s.Epochs.Quiesce(); err != nil {
		return err
	}
	defer s.Epochs.Resume()
	s.gate.Lock()
	defer s.gate.Unlock()
	if err := s.SettleGated(); err != nil {
		return err
	}
	return fn()
}

// Pause runs fn while no request and no flush runs. Unlike Exclusive it makes nothing durable: what fn changes it changes as
// a request does, in memory, and the next flush writes it. The flush that runs is waited for before requests are held.
func (s *Store) Pause(fn func() error) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	if err := s.Epochs.Quiesce(); err != nil {
		return err
	}
	defer s.Epochs.Resume()
	return fn()
}

// Gated runs fn while no flush and no Exclusive runs; requests may.
func (s *Store) Gated(fn func() error) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	return fn()
}

// SettleGated makes every change of the refcounts durable, including the counts of what was retired. It is for Exclusive.
func (s *Store) SettleGated() error {
	s.settling = true
	defer func() { s.settling = false }()
	// The first flush removes the last references; with no request running they settle at once, and the second writes
	// the lowered counts. Each clears one half of the journal.
	for range 2 {
		if err := s.flushGated(); err != nil {
			return err
		}
	}
	return nil
}

// WriteNow writes b at a host offset. What it writes is in doubt after a sync that fails, like every write.
func (s *Store) WriteNow(b []byte, off format.HostOff) error {
	err := storage.WriteFull(s.file, b, int64(off))
	s.Wrote(int64(off), int64(len(b)))
	if err != nil {
		return fmt.Errorf("writing at host offset %#x: %w", off, err)
	}
	return nil
}

// SyncNow makes what WriteNow wrote durable, and in Exclusive every write so far. The gate is held.
func (s *Store) SyncNow() error {
	// Beside requests, what a failed sync left in doubt is left to the next flush, which waits for them: what is read back
	// and written again must not change meanwhile.
	if s.alone && s.log.hasDoubt() {
		if err := s.log.rewrite(s.file); err != nil {
			return err
		}
	}
	wrote := s.log.cut()
	if err := s.sync(); err != nil {
		s.log.lost(wrote)
		return err
	}
	return nil
}

// Reload forgets what memory holds of the mapping and the refcounts and takes c for what the header says. It is for
// Exclusive, when everything is on the disk. On an error the Store can be used no more than before.
func (s *Store) Reload(c Config) error {
	if s.Refs != nil {
		if err := s.openRefcounts(c); err != nil {
			return err
		}
	}
	s.Layout = c.Layout
	s.Map.reset(c)
	return nil
}
