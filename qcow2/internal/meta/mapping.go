package meta

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/journal"
	"github.com/droverproject/drover/storage"
)

// GuestCluster numbers guest clusters: GuestOff >> cluster_bits.
type GuestCluster uint64

const (
	l1ChunkEntries = 512 // L1 entries that are read and held together
	// defaultSliceBytes of an L2 table are read, held and written together.
	defaultSliceBytes = 4096
	lockStripes       = 64
	minSlices         = 2
	// minDirty slices may always wait for a flush.
	minDirty = 8
)

// Mapping is the guest-to-host map: the L1 table, read in chunks on demand and then kept, and a bounded cache of slices of
// L2 tables, both in host byte order. A slice that says little is kept as a few runs (see packed) until it is changed.
//
// Lookups take no lock: they follow atomic pointers to a slice and load a word. A slice that is evicted meanwhile stays
// valid for whoever holds it, since the garbage collector keeps it, and what it says was true at some moment of the
// lookup. Changing words takes that slice's lock, and only slices that are in the cache are changed (Edit pins them).
//
// Lock order: stripe (creating and loading) → slice.mu → dirtyMu; stripe → l1mu; stripe → ringMu → slice.mu.
// None is held while a flush waits for the disk; a stripe is held while one chunk, slice or new table is read or written.
type Mapping struct {
	file   storage.File
	nowait storage.NowaitReader // file, if it can
	lay    format.Layout
	rc     *Refcounts // nil when the image is read-only
	// wrote notes a write that the next flush must make durable.
	wrote func(off, n int64)
	// journal is told of every change of an entry before it is made; nil when there is none.
	journal *journal.Journal
	// guard refuses clusters that hold other structures than those in but; claim notes a new one. findTables completes what
	// guard knows before the first change.
	guard      func(r ClusterRun, but Structure) error
	claim      func(kind Structure, r ClusterRun)
	findTables func() error

	l1Off     format.HostOff
	l1Len     int64
	l2Bits    uint8
	perSlice  int64 // L2 entries in a slice
	stride    int64 // words per L2 entry
	sliceSize int64 // bytes

	chunks  []atomic.Pointer[l1Chunk]
	stripes [lockStripes]sync.Mutex

	l1mu      sync.Mutex // guards changes of L1 entries and the two lists
	dirtyL1   []int64    // chunks with dirty entries
	newTables []*table   // tables that no L1 entry on disk points to

	dirtyMu sync.Mutex
	dirty   []*slice

	ringMu    sync.Mutex // guards the eviction clock
	ring      []*slice
	hand      int
	maxSlices int                // of those that are not packed
	bytes     atomic.Int64       // that the slices in the ring take; the bound is that of maxSlices
	roomy     bool               // all slices of the disk fit, so that dirty ones are in nobody's way
	memory    *block.CacheBudget // of several images together
}

type l1Chunk struct {
	entries [l1ChunkEntries]atomic.Uint64
	tables  [l1ChunkEntries]atomic.Pointer[table]
	// under Mapping.l1mu: entries [dirtyLo, dirtyHi) differ from the disk
	dirtyLo, dirtyHi int64
}

// table is an L2 table at one place on the host. A table that moves (copy-on-write of a shared table) becomes another
// table; this one stays as it is for those who still read it.
type table struct {
	host format.HostOff
	// exposed: an L1 entry on disk points here, or may. Until then its slices can be written at any time.
	exposed atomic.Bool
	slices  []atomic.Pointer[slice]
}

type slice struct {
	t      *table
	index  int64
	words  atomic.Pointer[[]atomic.Uint64] // nil while the slice is packed
	packed packed                          // as loaded; what counts once there are words is those
	used   atomic.Bool                     // touched since the eviction clock passed

	mu      sync.Mutex
	size    int64 // what the ring counts for it
	dead    bool  // evicted: words must not be changed any more
	pins    int   // edits that rely on it staying in the cache
	dirty   bool  // differs from the disk and is in Mapping.dirty
	fresh   bool  // has gained entries that point to data the disk may not hold yet
	writing bool  // a flush is writing its frozen copy
}

func (m *Mapping) sliceHost(s *slice) format.HostOff {
	return s.t.host + format.HostOff(s.index*m.sliceSize)
}

// Run is what the mapping says of N consecutive guest clusters: one kind, and where there are host clusters, consecutive
// ones. With extended L2 entries N is 1 wherever a table exists.
type Run struct {
	Kind   format.L2Kind
	Copied bool
	Entry  format.L2Entry // of the first cluster
	Bitmap format.L2Bitmap
	N      int64
}

func newMapping(c Config) *Mapping {
	m := &Mapping{file: c.File, memory: c.Memory}
	m.nowait, _ = c.File.(storage.NowaitReader)
	m.reset(c)
	return m
}

// reset makes the mapping an empty cache of the L1 table that c names. No request and no flush runs; a sweep may.
func (m *Mapping) reset(c Config) {
	m.ringMu.Lock()
	defer m.ringMu.Unlock()
	m.dirtyMu.Lock() // crowded is asked outside requests
	defer m.dirtyMu.Unlock()
	m.memory.Add(-m.bytes.Swap(0))
	m.ring, m.hand = nil, 0
	lay := c.Layout
	m.lay, m.l1Off, m.l1Len, m.l2Bits = lay, c.L1Off, c.L1Len, 0
	m.dirtyL1, m.newTables, m.dirty = nil, nil, nil
	for lay.L2Entries()>>m.l2Bits > 1 {
		m.l2Bits++
	}
	m.sliceSize = min(lay.ClusterSize(), max(c.SliceBytes, format.SectorSize))
	if c.SliceBytes == 0 {
		m.sliceSize = min(lay.ClusterSize(), defaultSliceBytes)
	}
	m.perSlice = m.sliceSize / lay.L2EntrySize()
	m.stride = lay.L2EntrySize() / 8
	m.chunks = make([]atomic.Pointer[l1Chunk], (c.L1Len+l1ChunkEntries-1)/l1ChunkEntries)
	m.maxSlices = int(max(c.CacheBytes/m.sliceSize, minSlices))
	m.roomy = int64(m.maxSlices) >= m.l1Len*(lay.ClusterSize()/m.sliceSize)
}

// Lookup returns the run that begins at guest cluster c, at most limit clusters long. With wait unset it returns
// storage.ErrWouldBlock rather than read metadata from the disk.
func (m *Mapping) Lookup(c GuestCluster, limit int64, wait bool) (Run, error) {
	l1 := int64(c >> m.l2Bits)
	if l1 >= m.l1Len {
		return Run{}, corrupt("guest cluster %d is outside the L1 table", c)
	}
	chunk, err := m.chunk(l1/l1ChunkEntries, wait)
	if err != nil {
		return Run{}, err
	}
	t := chunk.tables[l1%l1ChunkEntries].Load()
	if t == nil {
		if format.L1Entry(chunk.entries[l1%l1ChunkEntries].Load()).Offset() == 0 {
			return m.absentRun(chunk, c, l1, limit), nil
		}
		if t, err = m.table(chunk, l1); err != nil {
			return Run{}, err
		}
	}
	idx := int64(c) & (1<<m.l2Bits - 1)
	s := t.slices[idx/m.perSlice].Load()
	if s == nil {
		if s, err = m.loadSlice(t, idx/m.perSlice, wait); err != nil {
			return Run{}, err
		}
	}
	if !s.used.Load() {
		s.used.Store(true)
	}
	return m.scan(s, c, idx%m.perSlice, limit)
}

// absentRun counts the clusters from c on that no L2 table maps, within one chunk of the L1 table.
func (m *Mapping) absentRun(chunk *l1Chunk, c GuestCluster, l1, limit int64) Run {
	n := int64(1)<<m.l2Bits - int64(c)&(1<<m.l2Bits-1)
	for i := l1 + 1; n < limit && i < m.l1Len && i%l1ChunkEntries != 0; i++ {
		if format.L1Entry(chunk.entries[i%l1ChunkEntries].Load()).Offset() != 0 {
			break
		}
		n += 1 << m.l2Bits
	}
	return Run{Kind: format.KindUnallocated, N: min(n, limit)}
}

// scan reads the run that begins at entry i of a slice.
func (m *Mapping) scan(s *slice, c GuestCluster, i, limit int64) (Run, error) {
	if m.stride == 2 {
		return m.extendedEntry(s, c, i)
	}
	loaded := s.words.Load()
	if loaded == nil {
		return m.scanPacked(s.packed, c, i, limit)
	}
	words := *loaded
	first := format.L2Entry(words[i].Load())
	run := Run{Kind: m.lay.Kind(first), Copied: first.Copied(), Entry: first, N: 1}
	limit = min(limit, m.perSlice-i)
	switch run.Kind {
	case format.KindInvalid:
		return Run{}, corrupt("L2 entry %#x of guest cluster %d", uint64(first), c)
	case format.KindCompressed:
	case format.KindUnallocated, format.KindZeroPlain:
		for run.N < limit && m.lay.Kind(format.L2Entry(words[i+run.N].Load())) == run.Kind {
			run.N++
		}
	default:
		// A run of data continues with the same flags and the next host cluster: the next word is known.
		next := uint64(first) + uint64(m.lay.ClusterSize())
		for run.N < limit && words[i+run.N].Load() == next {
			run.N++
			next += uint64(m.lay.ClusterSize())
		}
	}
	return run, nil
}

// extendedEntry reads both words of an extended entry as one, under the slice's lock.
func (m *Mapping) extendedEntry(s *slice, c GuestCluster, i int64) (Run, error) {
	words := *s.words.Load()
	s.mu.Lock()
	e := format.L2Entry(words[2*i].Load())
	b := format.L2Bitmap(words[2*i+1].Load())
	s.mu.Unlock()
	kind := m.lay.Kind(e)
	if kind == format.KindInvalid || !m.lay.ValidBitmap(e, b) {
		return Run{}, corrupt("L2 entry %#x %#x of guest cluster %d", uint64(e), uint64(b), c)
	}
	return Run{Kind: kind, Copied: e.Copied(), Entry: e, Bitmap: b, N: 1}, nil
}

func (m *Mapping) stripe(a, b int64) *sync.Mutex {
	return &m.stripes[uint64(a*31+b)%lockStripes]
}

func (m *Mapping) chunk(i int64, wait bool) (*l1Chunk, error) {
	if ch := m.chunks[i].Load(); ch != nil {
		return ch, nil
	}
	if !wait {
		return nil, storage.ErrWouldBlock
	}
	mu := m.stripe(-1, i)
	mu.Lock()
	defer mu.Unlock()
	if ch := m.chunks[i].Load(); ch != nil {
		return ch, nil
	}
	n := min(l1ChunkEntries, m.l1Len-i*l1ChunkEntries)
	raw := make([]byte, n*8)
	at := m.l1Off + format.HostOff(i*l1ChunkEntries*8)
	if err := storage.ReadFull(m.file, raw, int64(at)); err != nil {
		return nil, fmt.Errorf("reading L1 table at host offset %#x: %w", at, err)
	}
	ch := new(l1Chunk)
	for k := range n {
		ch.entries[k].Store(be64(raw[k*8:]))
	}
	m.chunks[i].Store(ch)
	return ch, nil
}

// table returns the table that L1 entry l1 points to, which is not 0.
func (m *Mapping) table(chunk *l1Chunk, l1 int64) (*table, error) {
	mu := m.stripe(-2, l1)
	mu.Lock()
	defer mu.Unlock()
	return m.tableLocked(chunk, l1)
}

func (m *Mapping) tableLocked(chunk *l1Chunk, l1 int64) (*table, error) {
	p := &chunk.tables[l1%l1ChunkEntries]
	if t := p.Load(); t != nil {
		return t, nil
	}
	off := format.L1Entry(chunk.entries[l1%l1ChunkEntries].Load()).Offset()
	if !m.lay.Aligned(off) {
		return nil, corrupt("L1 entry %d: L2 table at host offset %#x is not on a cluster boundary", l1, off)
	}
	t := m.newTable(off, true)
	p.Store(t)
	return t, nil
}

func (m *Mapping) newTable(host format.HostOff, exposed bool) *table {
	t := &table{host: host, slices: make([]atomic.Pointer[slice], m.lay.ClusterSize()/m.sliceSize)}
	t.exposed.Store(exposed)
	return t
}

// loadSlice reads a slice. With wait unset it returns storage.ErrWouldBlock rather than wait for the disk or for who loads
// something already.
func (m *Mapping) loadSlice(t *table, i int64, wait bool) (*slice, error) {
	mu := m.stripe(int64(t.host>>m.lay.ClusterBits), i)
	if wait {
		mu.Lock()
	} else if !mu.TryLock() {
		return nil, storage.ErrWouldBlock
	}
	defer mu.Unlock()
	if s := t.slices[i].Load(); s != nil {
		return s, nil
	}
	s := &slice{t: t, index: i}
	raw := sliceBuf(m.sliceSize)
	defer sliceBufs.Put(raw)
	if err := m.readSlice(*raw, m.sliceHost(s), wait); err != nil {
		return nil, err
	}
	s.size = m.sliceSize
	if runs, ok := m.pack(*raw); ok {
		s.packed, s.size = runs, runs.size()
	} else {
		words := make([]atomic.Uint64, m.sliceSize/8)
		for k := range words {
			words[k].Store(be64((*raw)[k*8:]))
		}
		s.words.Store(&words)
	}
	s.used.Store(true)
	size := s.size // an edit may unpack the slice, and count that, as soon as others see it
	t.slices[i].Store(s)
	m.admit(s, size)
	return s, nil
}

func (m *Mapping) readSlice(b []byte, at format.HostOff, wait bool) error {
	if !wait {
		if m.nowait == nil {
			return storage.ErrWouldBlock
		}
		if n, _ := m.nowait.ReadAtNowait(b, int64(at)); n < len(b) {
			return storage.ErrWouldBlock // if it failed, the full request meets the error and reports it
		}
		return nil
	}
	storage.Tell(m.file, storage.EventL2Load)
	if err := storage.ReadFull(m.file, b, int64(at)); err != nil {
		return fmt.Errorf("reading L2 table at host offset %#x: %w", at, err)
	}
	return nil
}

var sliceBufs = sync.Pool{New: func() any { return new([]byte) }}

// sliceBuf returns a buffer of n bytes with anything in it, to go back to sliceBufs.
func sliceBuf(n int64) *[]byte {
	b := sliceBufs.Get().(*[]byte)
	if int64(cap(*b)) < n {
		*b = make([]byte, n)
	}
	*b = (*b)[:n]
	return b
}

// admit puts a loaded slice of so many bytes into the eviction clock and makes room for it.
func (m *Mapping) admit(s *slice, size int64) {
	m.ringMu.Lock()
	defer m.ringMu.Unlock()
	for steps := 2 * len(m.ring); m.full(size) && steps > 0; steps-- {
		if m.hand >= len(m.ring) {
			m.hand = 0
		}
		if !m.evict(m.ring[m.hand]) {
			m.hand++
			continue
		}
		last := len(m.ring) - 1
		m.ring[m.hand] = m.ring[last]
		m.ring[last] = nil
		m.ring = m.ring[:last]
	}
	m.ring = append(m.ring, s)
	m.grew(size)
}

func (m *Mapping) grew(n int64) {
	m.bytes.Add(n)
	m.memory.Add(n)
}

// full reports whether a slice must go before one of so many bytes comes: by this cache's own bound, or by that of all
// together.
func (m *Mapping) full(n int64) bool {
	return len(m.ring) >= minSlices && (m.bytes.Load()+n > int64(m.maxSlices)*m.sliceSize || m.memory.Full(n))
}

// Forget gives all memory back at the end, when no request and no flush runs any more.
func (m *Mapping) Forget() {
	m.ringMu.Lock()
	defer m.ringMu.Unlock()
	m.memory.Add(-m.bytes.Swap(0))
	m.ring = nil
}

// Sweep drops the slices that nobody used since the last sweep (or since the eviction clock passed) and that hold nothing
// the disk does not.
func (m *Mapping) Sweep() {
	m.ringMu.Lock()
	defer m.ringMu.Unlock()
	kept := m.ring[:0]
	for _, s := range m.ring {
		if !m.evict(s) {
			kept = append(kept, s)
		}
	}
	clear(m.ring[len(kept):])
	m.ring, m.hand = kept, 0
}

// evict takes a slice out of the cache unless it was used lately, is pinned, or holds what the disk does not.
func (m *Mapping) evict(s *slice) bool {
	if s.used.Load() {
		s.used.Store(false)
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pins > 0 || s.dirty || s.writing {
		return false
	}
	s.dead = true
	s.t.slices[s.index].CompareAndSwap(s, nil)
	m.grew(-s.size)
	return true
}

// Edit is the right to change entries of one slice. The slice's table belongs to this image alone (the L1 entry is
// COPIED), and it stays in the cache until Done.
type Edit struct {
	m     *Mapping
	s     *slice
	words []atomic.Uint64
	c     GuestCluster
	first int64
	// N is how many clusters from the first on the edit reaches.
	N int64
}

// Prepare makes the mapping of guest cluster c changeable: it creates the L2 table or copies a shared one. The caller
// holds a Range over what it will change and calls Done. It changes nothing that a reader can see.
func (m *Mapping) Prepare(c GuestCluster) (Edit, error) {
	if err := m.findTables(); err != nil {
		return Edit{}, err
	}
	l1 := int64(c >> m.l2Bits)
	if l1 >= m.l1Len {
		return Edit{}, corrupt("guest cluster %d is outside the L1 table", c)
	}
	chunk, err := m.chunk(l1/l1ChunkEntries, true)
	if err != nil {
		return Edit{}, err
	}
	idx := int64(c) & (1<<m.l2Bits - 1)
	for {
		t, err := m.ownTable(chunk, l1)
		if err != nil {
			return Edit{}, err
		}
		if err := m.guard(ClusterRun{m.lay.Cluster(t.host), 1}, ActiveL2); err != nil {
			return Edit{}, err
		}
		s := t.slices[idx/m.perSlice].Load()
		if s == nil {
			if s, err = m.loadSlice(t, idx/m.perSlice, true); err != nil {
				return Edit{}, err
			}
		}
		if e, ok := m.edit(s, c, idx%m.perSlice); ok {
			return e, nil
		}
	}
}

// TryPrepare is Prepare where the table is this image's alone already and its slice is in memory. It reports false otherwise.
func (m *Mapping) TryPrepare(c GuestCluster) (Edit, bool) {
	l1 := int64(c >> m.l2Bits)
	if l1 >= m.l1Len {
		return Edit{}, false
	}
	chunk, err := m.chunk(l1/l1ChunkEntries, false)
	if err != nil {
		return Edit{}, false
	}
	k := l1 % l1ChunkEntries
	if !format.L1Entry(chunk.entries[k].Load()).Copied() {
		return Edit{}, false
	}
	t := chunk.tables[k].Load()
	if t == nil || m.guard(ClusterRun{m.lay.Cluster(t.host), 1}, ActiveL2) != nil {
		return Edit{}, false
	}
	idx := int64(c) & (1<<m.l2Bits - 1)
	s := t.slices[idx/m.perSlice].Load()
	if s == nil {
		return Edit{}, false
	}
	return m.edit(s, c, idx%m.perSlice)
}

// edit pins a slice, which is unpacked for that, unless it has been evicted.
func (m *Mapping) edit(s *slice, c GuestCluster, first int64) (Edit, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return Edit{}, false
	}
	words := s.words.Load()
	if words == nil {
		words = m.unpack(s.packed)
		s.words.Store(words)
		m.grew(m.sliceSize - s.size)
		s.size = m.sliceSize
	}
	s.pins++
	return Edit{m, s, *words, c, first, m.perSlice - first}, true
}

// ownTable returns the L2 table of L1 entry l1, created or copied so that it may be changed in place.
func (m *Mapping) ownTable(chunk *l1Chunk, l1 int64) (*table, error) {
	k := l1 % l1ChunkEntries
	// install stores the table before the entry: who sees COPIED sees the table it speaks of.
	if format.L1Entry(chunk.entries[k].Load()).Copied() {
		if t := chunk.tables[k].Load(); t != nil {
			return t, nil
		}
	}
	mu := m.stripe(-2, l1)
	mu.Lock()
	defer mu.Unlock()
	e := format.L1Entry(chunk.entries[k].Load())
	if e.Offset() != 0 && e.Copied() {
		return m.tableLocked(chunk, l1)
	}
	if err := m.guard(ClustersOf(m.lay, m.l1Off+format.HostOff(l1*8), 8), ActiveL1); err != nil {
		return nil, err
	}
	run, virgin, err := m.rc.Alloc(1)
	if err != nil {
		return nil, fmt.Errorf("allocating L2 table: %w", err)
	}
	t := m.newTable(m.lay.Offset(run.First), false)
	if err := m.fillTable(t, e.Offset(), virgin); err != nil {
		return nil, errors.Join(err, m.rc.Release(run))
	}
	m.install(chunk, l1, t)
	if e.Offset() != 0 {
		m.rc.Retire(Retired{ClusterRun: ClusterRun{m.lay.Cluster(e.Offset()), 1}, Cause: CauseOther, Kind: ActiveL2})
	}
	return t, nil
}

// fillTable gives a new table's cluster its content on the host: zeroes, or a copy of the shared table at from. A shared
// table is never dirty: tables are changed only while they are not shared.
func (m *Mapping) fillTable(t *table, from format.HostOff, virgin bool) error {
	at := int64(t.host)
	b := make([]byte, m.lay.ClusterSize())
	switch {
	case from == 0 && virgin:
		// The host has the zeroes; but no L1 entry may point behind the end of the file, so its last sector is written.
		at += int64(len(b)) - storage.SectorSize
		b = b[:storage.SectorSize]
	case from != 0:
		if !m.lay.Aligned(from) {
			return corrupt("L2 table at host offset %#x is not on a cluster boundary", from)
		}
		storage.Tell(m.file, storage.EventL2AllocCOWRead)
		if err := storage.ReadFull(m.file, b, int64(from)); err != nil {
			return fmt.Errorf("reading L2 table at host offset %#x: %w", from, err)
		}
		clearCopied(b, m.lay)
	}
	storage.Tell(m.file, storage.EventL2AllocWrite)
	err := storage.WriteFull(m.file, b, at)
	m.wrote(at, int64(len(b)))
	if err != nil {
		return fmt.Errorf("writing L2 table at host offset %#x: %w", t.host, err)
	}
	return nil
}

// clearCopied drops the COPIED flags of a table copied from a shared one. They are clear already in an image that is
// sound; clearing them again makes sure that a wrong one cannot let two owners write one cluster. It reports whether any
// was set.
func clearCopied(b []byte, lay format.Layout) (any bool) {
	for i := 0; i < len(b); i += int(lay.L2EntrySize()) {
		e := format.L2Entry(be64(b[i:]))
		if !e.Compressed() && e.Copied() {
			b[i] &^= 0x80
			any = true
		}
	}
	return any
}

// install makes t the table of L1 entry l1, in memory; the stripe of l1 is held.
func (m *Mapping) install(chunk *l1Chunk, l1 int64, t *table) {
	k := l1 % l1ChunkEntries
	m.l1mu.Lock()
	defer m.l1mu.Unlock()
	chunk.tables[k].Store(t)
	chunk.entries[k].Store(uint64(format.MakeL1(t.host, true)))
	m.markL1(l1/l1ChunkEntries, chunk, k, k+1)
	m.newTables = append(m.newTables, t)
	m.claim(ActiveL2, ClusterRun{m.lay.Cluster(t.host), 1})
}

// markL1 marks entries [lo, hi) of a chunk as differing from the disk; l1mu is held.
func (m *Mapping) markL1(i int64, chunk *l1Chunk, lo, hi int64) {
	if chunk.dirtyLo == chunk.dirtyHi {
		chunk.dirtyLo, chunk.dirtyHi = lo, hi
		m.dirtyL1 = append(m.dirtyL1, i)
		return
	}
	chunk.dirtyLo, chunk.dirtyHi = min(chunk.dirtyLo, lo), max(chunk.dirtyHi, hi)
}

// Entry is an L2 entry: one word, and with extended L2 entries the bitmap of its subclusters.
type Entry struct {
	Word   format.L2Entry
	Bitmap format.L2Bitmap
}

// Entry returns the entry of the edit's i-th cluster. The Range that the caller holds keeps it from changing.
func (e Edit) Entry(i int64) Entry {
	at := (e.first + i) * e.m.stride
	entry := Entry{Word: format.L2Entry(e.words[at].Load())}
	if e.m.stride == 2 {
		entry.Bitmap = format.L2Bitmap(e.words[at+1].Load())
	}
	return entry
}

// Put replaces the entries of clusters [i, i+n) by what f returns for each. Data that new entries point to has been
// written (not necessarily synced) and its clusters are counted. It cannot fail.
func (e Edit) Put(i, n int64, f func(k int64, old Entry) Entry) {
	s := e.s
	s.mu.Lock()
	defer s.mu.Unlock()
	var recorded run
	for k := range n {
		old := e.Entry(i + k)
		entry := f(k, old)
		if entry == old {
			continue
		}
		// First of all: a flush that the journal takes this change to be part of must find the slice among the dirty ones.
		e.m.markDirty(s)
		if e.m.journal == nil {
			e.store(i+k, entry)
		} else if !recorded.extend(e, i+k, entry) {
			recorded.store(e)
			recorded = newRun(i+k, entry)
		}
	}
	recorded.store(e)
}

// store changes the entry of the edit's i-th cluster; the slice's mu is held.
func (e Edit) store(i int64, entry Entry) {
	at := (e.first + i) * e.m.stride
	e.words[at].Store(uint64(entry.Word))
	if e.m.stride == 2 {
		e.words[at+1].Store(uint64(entry.Bitmap))
	}
	switch e.m.lay.Type(entry.Word) {
	case format.KindNormal, format.KindCompressed:
		e.s.fresh = true
	}
}

// markDirty queues a slice for the next flush; its mu is held.
func (m *Mapping) markDirty(s *slice) {
	if s.dirty {
		return
	}
	s.dirty = true
	m.dirtyMu.Lock()
	m.dirty = append(m.dirty, s)
	m.dirtyMu.Unlock()
}

// Done ends the edit.
func (e Edit) Done() {
	e.s.mu.Lock()
	e.s.pins--
	e.s.mu.Unlock()
}

// crowded reports that so much of the cache waits for a flush that one should run before more is changed.
func (m *Mapping) crowded() bool {
	m.dirtyMu.Lock()
	defer m.dirtyMu.Unlock()
	if m.memory.Full(0) {
		// What is dirty cannot make room, so as much must be left that is not.
		return int64(len(m.dirty))*m.sliceSize > max(m.bytes.Load()/2, minDirty*m.sliceSize)
	}
	return !m.roomy && len(m.dirty) > max(m.maxSlices/2, minDirty)
}

// SliceRest returns how many clusters from c on one Edit reaches.
func (m *Mapping) SliceRest(c GuestCluster) int64 {
	return m.perSlice - int64(c)%m.perSlice
}
