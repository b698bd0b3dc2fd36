package meta

// MemoryUse is what the metadata of an image takes of this process, and what the disk does not have of it yet.
type MemoryUse struct {
	CacheBytes  int64 // decoded L2 tables
	DirtyTables int   // of them, pieces that hold changes since the last flush
	Unsynced    bool  // something was written since the last sync of the file
	Marked      bool  // the disk says that counts may be wrong
}

// MemoryUse looks without stopping anybody: the numbers belong to nearly the same moment.
func (s *Store) MemoryUse() MemoryUse {
	m := s.Map
	m.ringMu.Lock()
	u := MemoryUse{CacheBytes: int64(len(m.ring)) * m.sliceSize, Marked: s.mark.on.Load()}
	m.ringMu.Unlock()
	m.dirtyMu.Lock()
	u.DirtyTables = len(m.dirty)
	m.dirtyMu.Unlock()
	s.log.mu.Lock()
	u.Unsynced = !s.log.since.empty() || !s.log.doubt.empty()
	s.log.mu.Unlock()
	return u
}
