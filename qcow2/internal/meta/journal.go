package meta

import (
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/journal"
)

// KeepJournal has every change of the mapping recorded from now on. It is called before the first.
func (s *Store) KeepJournal(j *journal.Journal) {
	s.journal, s.Map.journal = j, j
	j.Resume(!s.mark.on.Load())
}

// LeaveJournal ends the use of the journal's memory. Changes, if any come, are outstanding until they are flushed.
func (s *Store) LeaveJournal() {
	if s.journal != nil {
		s.journal.Detach()
	}
}

// Journal returns the journal that is kept, nil when there is none.
func (s *Store) Journal() *journal.Journal { return s.journal }

// cutJournal runs fn, and has what changes from then on recorded apart from what changed before.
func (s *Store) cutJournal(fn func()) {
	if s.journal == nil {
		fn()
		return
	}
	s.journal.Cut(fn)
}

// kept notes that what was recorded before the cut is durable.
func (s *Store) kept() {
	if s.journal != nil {
		s.journal.Done()
	}
}

// notKept notes that it may not be.
func (s *Store) notKept() {
	if s.journal != nil {
		s.journal.Failed()
	}
}

// run is a change of neighbouring entries that one record expresses. The zero value is no change.
type run struct {
	i, n int64 // clusters of an edit
	step int64 // between their words; with one entry anything
	Entry
}

func newRun(i int64, e Entry) run { return run{i: i, n: 1, Entry: e} }

// extend adds an entry if the record can express it, too.
func (r *run) extend(e Edit, i int64, next Entry) bool {
	if r.n == 0 || i != r.i+r.n || next.Bitmap != r.Bitmap || r.compressed(e.m.lay) {
		return false
	}
	step := int64(0)
	if next.Word != r.Word {
		step = e.m.lay.ClusterSize()
	}
	if r.n > 1 && step != r.step || uint64(next.Word) != uint64(r.Word)+uint64(r.n*step) {
		return false
	}
	r.step = step
	r.n++
	return true
}

func (r *run) compressed(lay format.Layout) bool { return lay.Type(r.Word) == format.KindCompressed }

// store records the change and makes it, in this order: who sees the entries, and builds on them, relies on the record. The
// slice's mu is held, so that a flush freezes all of it or nothing.
func (r *run) store(e Edit) {
	if r.n == 0 {
		return
	}
	if r.compressed(e.m.lay) { // it shares its host clusters with others
		e.m.journal.Miss()
	} else {
		e.m.journal.Append(journal.Record{Cluster: uint64(e.c) + uint64(r.i), N: uint32(r.n), Step: uint32(r.step),
			Word: uint64(r.Word), Bitmap: uint64(r.Bitmap)})
	}
	for k := range r.n {
		e.store(r.i+k, Entry{r.Word + format.L2Entry(k*r.step), r.Bitmap})
	}
}
