// Package meta keeps a QCOW2 image's metadata in memory and on disk in step: the guest-to-host mapping, the refcounts, and
// the flush pipeline between them and the disk.
//
// # Model
//
// A [Store] belongs to one open image. [Mapping] answers where a guest cluster lies, without locks. [Refcounts] hands
// out host clusters and takes them back. [Ranges] holds the guest ranges whose mapping is being changed. [Epochs] knows
// which requests are running. A change of the mapping follows one shape:
//
//	hold a Range · Prepare the slice · Alloc clusters · write data to them · Put the entries · Retire what they replaced
//
// Every step before Put can fail and be undone without a trace; Put and Retire cannot fail.
//
// # The flush pipeline
//
// Put changes memory only. [Store.Flush] is the only way those changes reach the disk:
//
//  1. what nobody on disk points to yet: refcount blocks (whose increases were made before anything refers to the
//     clusters), slices of L2 tables that no L1 entry on disk points to, a moved refcount table. Sync: guest data in new
//     clusters, written earlier by the requests, becomes durable with them.
//     1b, rarely: entries of the refcount table for new blocks that step 2 depends on, or the header's pointer to a moved
//     table. Sync.
//  2. the pointers: slices of reachable L2 tables, L1 entries, entries of the refcount table for blocks added ahead of
//     need. Sync.
//  3. what those pointers no longer refer to is settled: once every request that began before has ended, its host space
//     is punched, its counts are lowered in memory, and the next flush writes them.
//
// A crash between any two writes, keeping any subset of un-synced sectors, leaves counts at least as high as references
// and every pointer aimed at durable content. A step that fails leaves everything it covered dirty, and the next flush
// does it again.
package meta

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/journal"
	"github.com/droverproject/drover/storage"
)

// Store is the metadata of one open image.
type Store struct {
	Layout format.Layout
	Map    *Mapping
	Refs   *Refcounts // nil when the image is read-only
	Ranges Ranges
	Epochs *Epochs

	// journal has what changed since the last flush outlive the process; nil when there is none.
	journal *journal.Journal

	file storage.File
	// places knows what must not be written over; nil when the image is read-only.
	places     *places
	wreck      wreck
	l1         TableAt
	refTable   TableAt // as the header names it; its Len is in clusters. Only for images open read-only
	inactiveL1 []TableAt
	alone      bool // Exclusive runs; under gate
	// onFree is told of clusters that are about to become free, when no request can be using them any more.
	onFree func(ClusterRun)
	pass   PassDiscard

	log  writeLog
	mark dirtyMark
	// settling: the flush that runs leaves nothing in memory. Under gate.
	settling bool
	data     *dataFile  // nil when guest data lies in file
	packMu   sync.Mutex // compressed clusters are written one after the other

	gate    sync.Mutex // held by the flush that runs, and by whoever has the metadata to itself
	flushMu sync.Mutex
	running bool
	next    *flushBatch

	settledMu sync.Mutex
	settled   []settled
	reclaimMu sync.Mutex // one reclaim at a time
}

// settled are references whose removal is durable, waiting for the requests of their epoch to end.
type settled struct {
	runs  []Retired
	epoch uint64
}

// dataFile is the external data file. Its writes have a log of their own: its sync fails by itself.
type dataFile struct {
	file storage.File
	log  writeLog
}

// Config is what a Store is made of.
type Config struct {
	File          storage.File
	DataFile      storage.File // the external data file, nil when there is none
	Layout        format.Layout
	L1Off         format.HostOff
	L1Len         int64
	RefTableOff   format.HostOff
	RefTableLen   int64 // clusters
	SnapshotsOff  format.HostOff
	SnapshotsSize int64
	InactiveL1    []TableAt // the L1 tables of snapshots
	BitmapsOff    format.HostOff
	BitmapsSize   int64
	KeysOff       format.HostOff // LUKS header and key material
	KeysSize      int64
	Overlap       Structure // what is watched, see Store.Guard
	// WriteCorrupt sets the corrupt bit in the header and syncs. OnCorrupt is told, once, that it was set.
	WriteCorrupt  func() error
	OnCorrupt     func(error)
	Writable      bool
	CacheBytes    int64 // bound of the L2 cache
	SliceBytes    int64 // of L2 table that are read, held and written together; 0 means the default
	RefcountBytes int64 // bound of the clean refcount blocks that are kept; 0 means the default
	Memory        *block.CacheBudget
	OnFree        func(ClusterRun)
	PassDiscard   PassDiscard
	// Lazy: counts may stay in memory between flushes. WriteDirty sets or clears the header's dirty bit and syncs; Dirty
	// says that it is set.
	Lazy, Dirty bool
	WriteDirty  func(on bool) error
}

// Open makes a Store. It reads the refcount table of a writable image and nothing else; the header has been validated.
func Open(c Config) (*Store, error) {
	s := &Store{Layout: c.Layout, Epochs: NewEpochs(), file: c.File, onFree: c.OnFree, pass: c.PassDiscard}
	if c.DataFile != nil {
		s.data = &dataFile{file: c.DataFile}
	}
	s.Map = newMapping(c)
	if !c.Writable {
		s.refTable = TableAt{c.RefTableOff, c.RefTableLen}
		return s, nil
	}
	if err := s.openRefcounts(c); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Store) openRefcounts(c Config) error {
	refs, err := newRefcounts(c.File, c.Layout, c.RefTableOff, c.RefTableLen)
	if err != nil {
		return err
	}
	if c.RefcountBytes > 0 {
		refs.keep = int(max(c.RefcountBytes/c.Layout.ClusterSize(), 1))
	}
	s.Refs, s.Map.rc, s.Map.wrote = refs, refs, s.Wrote
	if err := distinct(c); err != nil {
		return err
	}
	s.openPlaces(c, refs)
	s.mark.lazy, s.mark.write = c.Lazy, c.WriteDirty
	s.mark.on.Store(c.Dirty)
	if c.Lazy {
		refs.marked = s.mark.on.Load
	}
	return nil
}

// Wrote notes that [off, off+n) of the file was written, or may have been, which the next flush must make durable. It is
// called after the write returned and before the request is acknowledged.
func (s *Store) Wrote(off, n int64) { s.log.mark(off, n) }

// WroteData is Wrote for guest data, which lies in the external data file where there is one.
func (s *Store) WroteData(off, n int64) {
	if s.data != nil {
		s.data.log.mark(off, n)
		return
	}
	s.log.mark(off, n)
}

// ZeroedData is WroteData for zeroes that were not written. There is an external data file.
func (s *Store) ZeroedData(off, n int64) { s.data.log.markZeroed(off, n) }

// Pressure runs a flush when the cache holds too much that waits for one. It is called before a request, never inside.
func (s *Store) Pressure(ctx context.Context) error {
	if !s.Map.crowded() {
		return nil
	}
	return s.Flush(ctx)
}

// Crowded reports that Pressure would flush.
func (s *Store) Crowded() bool { return s.Map.crowded() }

// flushBatch is one run of the pipeline and everyone who waits for it.
type flushBatch struct {
	done chan struct{}
	err  error
}

// Flush makes every change that returned before the call durable. Calls that come while a flush runs share the next one.
func (s *Store) Flush(ctx context.Context) error {
	s.flushMu.Lock()
	b := s.next
	if b == nil {
		b = &flushBatch{done: make(chan struct{})}
		s.next = b
	}
	if !s.running {
		s.running = true
		s.next = nil
		s.flushMu.Unlock()
		s.runBatch(b)
		return b.err
	}
	s.flushMu.Unlock()
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// runBatch runs one batch and starts the one that gathered meanwhile.
func (s *Store) runBatch(b *flushBatch) {
	b.err = s.flushOnce()
	close(b.done)
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if n := s.next; n != nil {
		s.next = nil
		go s.runBatch(n)
		return
	}
	s.running = false
}

// flushOnce runs the pipeline. Only one runs at a time.
func (s *Store) flushOnce() error {
	defer s.tellCorrupt()
	s.gate.Lock()
	defer s.gate.Unlock()
	return s.flushGated()
}

func (s *Store) flushGated() error {
	if s.Refs == nil {
		return nil
	}
	if err := s.writeDoubtAgain(); err != nil {
		return err
	}
	if err := s.writeCorrupt(); err != nil {
		return err
	}
	if err := s.reclaimMarked(); err != nil {
		return err
	}
	if err := s.growAhead(); err != nil {
		return err
	}
	g := s.freeze()
	err := s.write(g)
	if err != nil {
		s.thaw(g)
		s.notKept()
		return err
	}
	s.kept() // before anything is freed: no record names what is handed out again
	s.finish(g)
	return s.reclaimMarked()
}

// unfreed reports whether references whose removal is durable still count.
func (s *Store) unfreed() bool {
	s.settledMu.Lock()
	defer s.settledMu.Unlock()
	return len(s.settled) > 0
}

// reclaimMarked frees what can be freed. Where the counts that go down stay in memory, the disk must say so first.
func (s *Store) reclaimMarked() error {
	if !s.unfreed() || s.Corrupt() != nil {
		return nil
	}
	if s.mark.lazy {
		if err := s.MarkDirtyGated(); err != nil {
			return err
		}
	}
	s.reclaim()
	return nil
}

// writeDoubtAgain repeats the writes that a failed sync left in doubt, with no request running. A flush is therefore
// never called from inside a request.
func (s *Store) writeDoubtAgain() error {
	if !s.log.hasDoubt() && (s.data == nil || !s.data.log.hasDoubt()) {
		return nil
	}
	if err := s.Epochs.Quiesce(); err == nil { // after Close nothing runs anyway
		defer s.Epochs.Resume()
	}
	if s.data != nil {
		if err := s.data.log.rewrite(s.data.file); err != nil {
			return fmt.Errorf("external data file: %w", err)
		}
	}
	return s.log.rewrite(s.file)
}

// generation is one flush's frozen copy of what memory holds and the disk does not.
type generation struct {
	wrote   logCut // where the file was written
	data    logCut // where the external data file was written
	retired []Retired
	l1      []frozenL1
	tables  []*table // become reachable with l1
	early   []frozenSlice
	late    []frozenSlice
	refs    frozenRefs
	// ordered: the late writes point to things that must be durable before.
	ordered bool
}

type frozenL1 struct {
	chunk  int64
	lo, hi int64
	raw    []byte
}

type frozenSlice struct {
	s   *slice
	raw *[]byte
}

// freeze cuts a generation. The order matters: references retired before the cut had their entries changed before, so
// the frozen slices show them gone; and the refcounts are frozen last, so they count whatever the slices point to. Counts that are postponed stay.
func (s *Store) freeze() *generation {
	g := &generation{}
	g.wrote = s.log.cut()
	if s.data != nil {
		g.data = s.data.log.cut()
	}
	s.cutJournal(func() { g.retired = s.Refs.takeRetired() })
	s.Map.freezeL1(g)
	s.Map.freezeSlices(g)
	if !s.postpone() {
		g.refs = s.Refs.freeze()
	}
	g.ordered = g.ordered || g.refs.increased || len(g.refs.newBlocks) > 0 || g.refs.table != nil || len(g.tables) > 0
	return g
}

func (m *Mapping) freezeL1(g *generation) {
	m.l1mu.Lock()
	defer m.l1mu.Unlock()
	for _, i := range m.dirtyL1 {
		ch := m.chunks[i].Load()
		f := frozenL1{chunk: i, lo: ch.dirtyLo, hi: ch.dirtyHi}
		f.raw = make([]byte, (f.hi-f.lo)*8)
		for k := f.lo; k < f.hi; k++ {
			b := format.EncodeUint64(ch.entries[k].Load())
			copy(f.raw[(k-f.lo)*8:], b[:])
		}
		ch.dirtyLo, ch.dirtyHi = 0, 0
		g.l1 = append(g.l1, f)
	}
	g.tables, m.dirtyL1, m.newTables = m.newTables, nil, nil
}

func (m *Mapping) freezeSlices(g *generation) {
	m.dirtyMu.Lock()
	dirty := m.dirty
	m.dirty = nil
	m.dirtyMu.Unlock()
	for _, s := range dirty {
		f := frozenSlice{s, sliceBuf(m.sliceSize)}
		s.mu.Lock()
		words := *s.words.Load() // what was changed is not packed
		for k := range words {
			b := format.EncodeUint64(words[k].Load())
			copy((*f.raw)[k*8:], b[:])
		}
		g.ordered = g.ordered || s.fresh
		s.dirty, s.fresh, s.writing = false, false, true
		s.mu.Unlock()
		if s.t.exposed.Load() {
			g.late = append(g.late, f)
		} else {
			g.early = append(g.early, f)
		}
	}
	byHost := func(a, b frozenSlice) int {
		switch x, y := m.sliceHost(a.s), m.sliceHost(b.s); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	}
	slices.SortFunc(g.early, byHost)
	slices.SortFunc(g.late, byHost)
}

// write puts a generation on the disk in the pipeline's order.
func (s *Store) write(g *generation) error {
	if err := s.writeSlices(g.early); err != nil {
		return err
	}
	if err := s.Refs.writeBlocks(&g.refs); err != nil {
		return err
	}
	pointers := len(g.late) > 0 || len(g.l1) > 0 || len(g.refs.newBlocks) > 0 || g.refs.table != nil
	wrote := !g.wrote.empty() || len(g.early) > 0 || len(g.refs.blocks) > 0
	if err := s.syncData(g); err != nil {
		return err
	}
	if !pointers && !wrote {
		return nil
	}
	if pointers && g.ordered {
		if err := s.sync(); err != nil {
			return err
		}
		if g.refs.urgent {
			if err := s.Refs.writePointers(&g.refs); err != nil {
				return err
			}
			if err := s.sync(); err != nil {
				return err
			}
		}
	}
	for _, t := range g.tables {
		t.exposed.Store(true)
	}
	if err := s.writeSlices(g.late); err != nil {
		return err
	}
	if err := s.Map.writeL1(g.l1); err != nil {
		return err
	}
	if !g.refs.urgent {
		if err := s.Refs.writePointers(&g.refs); err != nil {
			return err
		}
	}
	return s.sync()
}

func (s *Store) sync() error {
	storage.Tell(s.file, storage.EventFlushToDisk)
	if err := s.file.Sync(); err != nil {
		return fmt.Errorf("syncing image file: %w", err)
	}
	return nil
}

// syncData makes guest data in the external data file durable, before any pointer to it is written.
func (s *Store) syncData(g *generation) error {
	if g.data.empty() {
		return nil
	}
	if err := s.data.file.Sync(); err != nil {
		return fmt.Errorf("syncing external data file: %w", err)
	}
	return nil
}

// writeSlices writes frozen slices, sorted by host offset, neighbours together.
func (s *Store) writeSlices(fs []frozenSlice) error {
	size := s.Map.sliceSize
	var vec [][]byte
	for i := 0; i < len(fs); {
		vec = vec[:0]
		at := s.Map.sliceHost(fs[i].s)
		for ; i < len(fs) && s.Map.sliceHost(fs[i].s) == at+format.HostOff(int64(len(vec))*size); i++ {
			vec = append(vec, *fs[i].raw)
		}
		storage.Tell(s.file, storage.EventL2Update)
		if err := storage.WriteVFull(s.file, vec, int64(at)); err != nil {
			return fmt.Errorf("writing L2 table at host offset %#x: %w", at, err)
		}
	}
	return nil
}

func (m *Mapping) writeL1(fs []frozenL1) error {
	for _, f := range fs {
		at := m.l1Off + format.HostOff((f.chunk*l1ChunkEntries+f.lo)*8)
		storage.Tell(m.file, storage.EventL1Update)
		if err := storage.WriteFull(m.file, f.raw, int64(at)); err != nil {
			return fmt.Errorf("writing L1 table at host offset %#x: %w", at, err)
		}
	}
	return nil
}

// thaw takes back a generation that did not become durable: all of it is written again by the next flush.
func (s *Store) thaw(g *generation) {
	s.log.lost(g.wrote)
	if s.data != nil {
		s.data.log.lost(g.data)
	}
	s.Refs.putBackRetired(g.retired)
	s.Refs.thaw(&g.refs)
	m := s.Map
	m.l1mu.Lock()
	for _, f := range g.l1 {
		m.markL1(f.chunk, m.chunks[f.chunk].Load(), f.lo, f.hi)
	}
	m.newTables = append(m.newTables, g.tables...)
	m.l1mu.Unlock()
	for _, fs := range [][]frozenSlice{g.early, g.late} {
		for _, f := range fs {
			f.s.mu.Lock()
			f.s.writing = false
			// Whatever was synced may be lost after a failed sync: the entries count as pointing to data not yet durable.
			f.s.fresh = true
			m.markDirty(f.s)
			f.s.mu.Unlock()
			sliceBufs.Put(f.raw)
		}
	}
}

// finish notes that a generation is durable.
func (s *Store) finish(g *generation) {
	for _, fs := range [][]frozenSlice{g.early, g.late} {
		for _, f := range fs {
			f.s.mu.Lock()
			f.s.writing = false
			f.s.mu.Unlock()
			sliceBufs.Put(f.raw)
		}
	}
	s.Refs.finish(&g.refs)
	if len(g.retired) == 0 {
		return
	}
	s.settledMu.Lock()
	s.settled = append(s.settled, settled{g.retired, s.Epochs.Now()})
	s.settledMu.Unlock()
}

// growAhead has a refcount block ready before it is needed. Metadata that makes that impossible stops later changes, not
// the flush of those accepted.
func (s *Store) growAhead() error {
	if s.Corrupt() != nil {
		return nil
	}
	err := s.Refs.growAhead()
	if impossible := corruptIn(err); impossible != nil {
		s.MarkCorruptGated(impossible)
		return nil
	}
	if errors.Is(err, ErrImageFull) {
		return nil
	}
	return err
}

// reclaim frees what is settled and out of every request's sight. What fails to be freed stays counted: a leak in
// this process at worst, tried again by the next reclaim.
func (s *Store) reclaim() {
	s.reclaimMu.Lock()
	defer s.reclaimMu.Unlock()
	s.settledMu.Lock()
	n := 0
	for n < len(s.settled) && s.Epochs.Safe(s.settled[n].epoch) {
		n++
	}
	ready := s.settled[:n:n]
	s.settled = s.settled[n:]
	s.settledMu.Unlock()
	for _, g := range ready {
		var failed []Retired
		for _, r := range g.runs {
			if s.Corrupt() != nil {
				failed = append(failed, r)
				continue
			}
			rest, err := s.free(r)
			if impossible := corruptIn(err); impossible != nil {
				s.MarkCorruptGated(impossible)
			}
			if err != nil {
				failed = append(failed, rest)
			}
		}
		if len(failed) > 0 {
			s.settledMu.Lock()
			s.settled = append(s.settled, settled{failed, g.epoch})
			s.settledMu.Unlock()
		}
	}
}

// free lowers the counts of a run, and punches those clusters that lose their last reference while they still count as
// used: nobody else can be given a cluster whose hole is yet to be punched. On an error it returns what is left to do.
func (s *Store) free(r Retired) (rest Retired, err error) {
	for r.N > 0 {
		last, n, err := s.Refs.sameFate(r.First, r.N)
		if err != nil {
			return r, err
		}
		run := ClusterRun{r.First, n}
		storage.Tell(s.file, storage.EventClusterFree)
		if err := s.leave(run, r.Kind, last); err != nil {
			return r, err
		}
		if last {
			s.onFree(run)
			if s.pass.Passes(r.Cause) {
				// A failed punch costs host space only.
				_ = s.file.PunchHole(int64(s.Layout.Offset(run.First)), n<<s.Layout.ClusterBits)
			}
		}
		if err := s.Refs.Apply(run); err != nil {
			s.places.add(r.Kind, run)
			return r, err
		}
		r.First, r.N = run.End(), r.N-n
	}
	return r, nil
}

// Settle makes everything durable, including the counts of clusters freed last. It is called when no request runs.
func (s *Store) Settle() error {
	defer s.tellCorrupt()
	s.gate.Lock()
	defer s.gate.Unlock()
	return s.SettleGated()
}
