package meta

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// ErrImageFull is returned when the image file has reached the largest size that its refcount table may describe.
var ErrImageFull = errors.New("image file has reached the largest size its refcount table can describe")

// runClasses is the number of power-of-two run lengths that the allocator remembers a starting point for.
const runClasses = 16

// cleanBlocksKept is the default of how many refcount blocks are kept though nothing in them waits for a flush.
const cleanBlocksKept = 32

// Refcounts owns the refcount table and blocks: it finds free clusters, hands them out, and takes them back.
//
// Invariant: a count in memory is never lower than the references that any state of the disk may hold after a crash.
// Increases are made here at once, before anything refers to the cluster. Decreases arrive only through Apply, which
// the flush pipeline calls when the removal of the reference is durable and no request can still be using it. So a
// block may be written to the disk at any moment, and a free cluster here is free in every sense.
type Refcounts struct {
	file storage.File
	lay  format.Layout

	mu    sync.Mutex
	hosts []format.HostOff  // where each block is; 0: there is none, and all its counts are 0
	known map[int]*refBlock // what is known of the blocks touched so far

	tableOff      format.HostOff
	tableClusters int64
	tableMoved    bool // the header on disk still names the old table

	keep      int   // how many clean ones may be
	resident  []int // blocks with data
	hand      int   // clock hand over resident
	dirty     []int
	newBlocks []int // blocks whose table entry is not on disk

	increased bool // a count rose since the last freeze
	freed     bool // a cluster has become free since the image was opened
	// tail is where the next compressed cluster may begin, 0 when in a new host cluster.
	tail    format.HostOff
	retired []Retired

	// starts[k]: no free run of 2^k clusters or more begins before it.
	starts [runClasses]format.ClusterIdx
	// virgin: no free cluster at or behind this one has ever held a byte, so it reads as zeroes. It starts at the end
	// of the file and moves behind every cluster that is freed.
	virgin format.ClusterIdx
	// guard refuses places that hold other structures than those in but: they must never be handed out, whatever the refcounts
	// claim, and no block may lie there. claim notes a new structure.
	guard func(r ClusterRun, but Structure) error
	claim func(kind Structure, r ClusterRun)

	topUsed format.ClusterIdx // one past the highest cluster handed out

	// marked, if set, says whether the disk tells that counts are postponed, without which they must not change.
	marked func() bool
}

type refBlock struct {
	data []byte   // the block as on disk, nil when not loaded
	free []uint64 // bit set = count is 0; nil when not known or when full
	full bool     // no free cluster in it
	used bool     // touched since the clock hand passed

	dirtyLo, dirtyHi int  // bytes of data that differ from the disk; equal when none
	writing          bool // a flush is writing it
	isNew            bool // the table on disk does not point to it yet
	serves           bool // a new block that holds counts of clusters the pointers of this flush may refer to
}

// ClusterRun is a run of host clusters.
type ClusterRun struct {
	First format.ClusterIdx
	N     int64
}

// Retired is a run of clusters that each lost a reference.
type Retired struct {
	ClusterRun
	Cause Cause
	// Kind is the structure that the clusters have been until they are free, if any: nothing is written there till then.
	Kind Structure
}

// End returns the index after the run.
func (r ClusterRun) End() format.ClusterIdx { return r.First + format.ClusterIdx(r.N) }

func newRefcounts(file storage.File, lay format.Layout, tableOff format.HostOff, tableClusters int64) (*Refcounts, error) {
	rc := &Refcounts{file: file, lay: lay, tableOff: tableOff, tableClusters: tableClusters, known: make(map[int]*refBlock), keep: cleanBlocksKept,
		guard: func(ClusterRun, Structure) error { return nil }, claim: func(Structure, ClusterRun) {}}
	if err := rc.loadTable(tableClusters * lay.ClusterSize()); err != nil {
		return nil, err
	}
	size, err := file.Size()
	if err != nil {
		return nil, fmt.Errorf("size of image file: %w", err)
	}
	rc.virgin = format.ClusterIdx((size + lay.ClusterSize() - 1) >> lay.ClusterBits)
	if file.Stat().Device {
		rc.virgin = 1 << 62 // a block device holds old bytes everywhere
	}
	return rc, nil
}

// loadBytes is how much of the refcount table is read at once. It is small, and entries of 0 are not written down: most tables
// are empty but for their beginning, and to touch memory costs more than to read.
const loadBytes = 32 << 10

// loadTable reads the refcount table, of so many bytes.
func (rc *Refcounts) loadTable(size int64) error {
	rc.hosts = make([]format.HostOff, size/8)
	buf := make([]byte, min(size, loadBytes))
	storage.Tell(rc.file, storage.EventRefTableLoad)
	for done := int64(0); done < size; done += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), size-done)]
		if err := storage.ReadFull(rc.file, part, int64(rc.tableOff)+done); err != nil {
			return fmt.Errorf("reading refcount table at host offset %#x: %w", rc.tableOff, err)
		}
		for i := 0; i < len(part); i += 8 {
			e := format.RefTableEntry(be64(part[i:]))
			if e == 0 {
				continue
			}
			num := (done + int64(i)) / 8
			if e.Reserved() != 0 || !rc.lay.Aligned(e.Offset()) || e.Offset() > 1<<63-1-format.HostOff(rc.lay.ClusterSize()) {
				return corrupt("refcount table entry %d (%#x) is not a cluster offset", num, uint64(e))
			}
			rc.hosts[num] = e.Offset()
		}
	}
	return nil
}

func (rc *Refcounts) perBlock() format.ClusterIdx {
	return format.ClusterIdx(rc.lay.RefcountsPerBlock())
}

func (rc *Refcounts) split(c format.ClusterIdx) (block int, slot int64) {
	return int(c / rc.perBlock()), int64(c % rc.perBlock())
}

// maxClusters is the number of clusters that the largest allowed refcount table describes.
func (rc *Refcounts) maxClusters() format.ClusterIdx {
	n := format.ClusterIdx(format.MaxRefTableBytes/8) * rc.perBlock()
	return min(n, 1<<(56-rc.lay.ClusterBits)) // host offsets have 56 bits
}

// exists reports whether the refcount table has a block at index b.
func (rc *Refcounts) exists(b int) bool { return b < len(rc.hosts) && rc.hosts[b] != 0 }

// block returns what is known of block b, which exists.
func (rc *Refcounts) block(b int) *refBlock {
	blk := rc.known[b]
	if blk == nil {
		blk = new(refBlock)
		rc.known[b] = blk
	}
	return blk
}

// load makes block b's data present; b must have a host offset.
func (rc *Refcounts) load(b int) error {
	blk := rc.block(b)
	blk.used = true
	if blk.data != nil {
		return nil
	}
	if err := rc.guard(ClusterRun{rc.lay.Cluster(rc.hosts[b]), 1}, RefcountBlock); err != nil {
		return err
	}
	data := make([]byte, rc.lay.ClusterSize())
	storage.Tell(rc.file, storage.EventRefBlockLoad)
	if err := storage.ReadFull(rc.file, data, int64(rc.hosts[b])); err != nil {
		return fmt.Errorf("reading refcount block at host offset %#x: %w", rc.hosts[b], err)
	}
	blk.data = data
	rc.resident = append(rc.resident, b)
	if blk.free == nil && !blk.full {
		rc.index(b)
	}
	return nil
}

// index builds the free bitmap of a loaded block.
func (rc *Refcounts) index(b int) {
	blk := rc.block(b)
	n := rc.lay.RefcountsPerBlock()
	free := make([]uint64, (n+63)/64)
	any := false
	for i := int64(0); i < n; i++ {
		if rc.lay.Refcount(blk.data, i) == 0 {
			free[i/64] |= 1 << (i % 64)
			any = true
		}
	}
	if !any {
		blk.full = true
		return
	}
	blk.free = free
}

// dropClean lets go of the data of clean blocks beyond the bound; their free bitmaps stay. It is called only where
// nobody holds on to a block's data.
func (rc *Refcounts) dropClean() {
	for n := len(rc.resident) * 2; len(rc.resident) > rc.keep && n > 0; n-- {
		rc.hand++
		if rc.hand >= len(rc.resident) {
			rc.hand = 0
		}
		blk := rc.known[rc.resident[rc.hand]]
		if blk.dirtyLo != blk.dirtyHi || blk.writing || blk.isNew {
			continue
		}
		if blk.used {
			blk.used = false
			continue
		}
		blk.data = nil
		last := len(rc.resident) - 1
		rc.resident[rc.hand] = rc.resident[last]
		rc.resident = rc.resident[:last]
	}
}

// Get returns the count of one cluster.
func (rc *Refcounts) Get(c format.ClusterIdx) (uint64, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	b, slot := rc.split(c)
	if !rc.exists(b) {
		return 0, nil
	}
	if err := rc.load(b); err != nil {
		return 0, err
	}
	return rc.lay.Refcount(rc.known[b].data, slot), nil
}

// set stores a count in a loaded block and keeps the free bitmap true.
func (rc *Refcounts) set(b int, slot int64, v uint64) {
	blk := rc.block(b)
	rc.lay.SetRefcount(blk.data, slot, v)
	rc.touch(b, slot)
	if v != 0 {
		if blk.free != nil {
			blk.free[slot/64] &^= 1 << (slot % 64)
		}
		return
	}
	if blk.free == nil {
		blk.free = make([]uint64, (rc.lay.RefcountsPerBlock()+63)/64)
		blk.full = false
	}
	blk.free[slot/64] |= 1 << (slot % 64)
	c := format.ClusterIdx(b)*rc.perBlock() + format.ClusterIdx(slot)
	rc.virgin = max(rc.virgin, c+1)
	rc.freed = true
	rc.leaveTail(c)
	for k := range rc.starts {
		back := format.ClusterIdx(1)<<k - 1
		rc.starts[k] = min(rc.starts[k], c-min(c, back))
	}
}

// touch marks the sector that holds slot as differing from the disk.
func (rc *Refcounts) touch(b int, slot int64) {
	blk := rc.block(b)
	at := int(slot*int64(rc.lay.RefcountBits())/8) &^ (storage.SectorSize - 1)
	end := at + storage.SectorSize
	if blk.dirtyLo == blk.dirtyHi {
		blk.dirtyLo, blk.dirtyHi = at, end
		rc.dirty = append(rc.dirty, b)
		return
	}
	blk.dirtyLo, blk.dirtyHi = min(blk.dirtyLo, at), max(blk.dirtyHi, end)
}

// Alloc hands out host clusters in one run, each with a count of 1: n of them where the file has so many in a row or can
// grow by them, else as many as lie between two refcount structures at its end. virgin reports that the whole run reads
// as zeroes already. The caller refers to the clusters through the mapping, or gives them back with Release.
func (rc *Refcounts) Alloc(n int64) (run ClusterRun, virgin bool, err error) {
	storage.Tell(rc.file, storage.EventClusterAlloc)
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.marked != nil && !rc.marked() {
		return ClusterRun{}, false, ErrNotMarked
	}
	defer rc.dropClean()
	run, err = rc.find(n)
	if err != nil {
		return ClusterRun{}, false, err
	}
	if run.First == 0 {
		return ClusterRun{}, false, rc.headerIsFree()
	}
	if err := rc.guard(run, 0); err != nil {
		return ClusterRun{}, false, err
	}
	for b, _ := rc.split(run.First); format.ClusterIdx(b)*rc.perBlock() < run.End(); b++ {
		if err := rc.load(b); err != nil {
			return ClusterRun{}, false, err
		}
	}
	rc.mark(run)
	return run, run.First >= rc.virgin, nil
}

// TryAlloc is Alloc of one cluster. It reports false, and has changed nothing, where that would take waiting for anybody or
// reading, or is refused.
func (rc *Refcounts) TryAlloc() (c format.ClusterIdx, virgin, ok bool) {
	if !rc.mu.TryLock() {
		return 0, false, false
	}
	defer rc.mu.Unlock()
	if rc.marked != nil && !rc.marked() {
		return 0, false, false
	}
	c = rc.starts[0]
	b, slot := rc.split(c)
	blk := rc.known[b]
	if c == 0 || c >= rc.maxClusters() || !rc.exists(b) || blk == nil || blk.data == nil || blk.free == nil {
		return 0, false, false
	}
	if free, next := freeRun(blk.free, slot, int64(rc.perBlock())); free == 0 {
		if next >= int64(rc.perBlock()) {
			return 0, false, false
		}
		c += format.ClusterIdx(next - slot)
	}
	run := ClusterRun{c, 1}
	if rc.guard(run, 0) != nil {
		return 0, false, false
	}
	blk.used = true
	rc.starts[0] = c // none is free before it, and mark moves on behind it
	rc.mark(run)
	return c, c >= rc.virgin, true
}

// headerIsFree is the error of a refcount of 0 for the header's cluster: an offset of 0 means that there is no cluster.
func (rc *Refcounts) headerIsFree() error {
	if err := rc.guard(ClusterRun{0, 1}, 0); err != nil {
		return err
	}
	return corrupt("Preventing invalid allocation of a cluster at offset 0")
}

// mark counts every cluster of a free run whose blocks are loaded.
func (rc *Refcounts) mark(run ClusterRun) {
	for c := run.First; c < run.End(); c++ {
		b, slot := rc.split(c)
		rc.set(b, slot, 1)
		rc.known[b].serves = true
	}
	rc.increased = true
	rc.topUsed = max(rc.topUsed, run.End())
	for k := range rc.starts {
		if rc.starts[k] >= run.First && rc.starts[k] < run.End() {
			rc.starts[k] = run.End()
		}
	}
}

// find returns the first run of n free clusters, all described by refcount blocks. Where the described part of the file
// ends it adds a block and goes on behind it, or returns the shorter run that lies before it.
func (rc *Refcounts) find(n int64) (ClusterRun, error) {
	class := min(bits.Len64(uint64(n-1)), runClasses-1)
	limit := rc.maxClusters()
	c := rc.starts[class]
	run := ClusterRun{First: c}
	for run.N < n {
		if c >= limit && run.N > 0 {
			return run, nil
		}
		if c >= limit && n > 1 {
			return rc.find((n + 1) / 2) // the file can grow no more: what is left are smaller holes
		}
		if c >= limit {
			return ClusterRun{}, fmt.Errorf("allocating %d clusters: %w", n, ErrImageFull)
		}
		b, slot := rc.split(c)
		if !rc.exists(b) {
			if run.N > 0 {
				return run, nil
			}
			if err := rc.addBlock(b); err != nil {
				return ClusterRun{}, err
			}
		}
		blk := rc.block(b)
		if blk.free == nil && !blk.full {
			if len(rc.resident) > 2*rc.keep {
				rc.dropClean()
			}
			if err := rc.load(b); err != nil {
				return ClusterRun{}, err
			}
		}
		if blk.full {
			c = format.ClusterIdx(b+1) * rc.perBlock()
			run = ClusterRun{First: c}
			continue
		}
		free, next := freeRun(blk.free, slot, int64(rc.perBlock()))
		if free > 0 {
			run.N += free
			c += format.ClusterIdx(free)
			continue
		}
		if slot == 0 && next >= int64(rc.perBlock()) {
			blk.free, blk.full = nil, true
		}
		c += format.ClusterIdx(next - slot)
		run = ClusterRun{First: c}
	}
	if n <= 1<<class {
		rc.starts[class] = run.First // no run that long begins before it
	}
	run.N = n
	return run, nil
}

// freeRun returns how many clusters from slot on are free, and, when slot is not, the next one that is (or n).
func freeRun(free []uint64, slot, n int64) (run, next int64) {
	w, off := slot/64, uint(slot%64)
	if free[w]>>off&1 == 0 {
		word := free[w] >> off << off
		for word == 0 {
			w++
			if w*64 >= n {
				return 0, n
			}
			word = free[w]
		}
		return 0, w*64 + int64(bits.TrailingZeros64(word))
	}
	for {
		ones := int64(bits.TrailingZeros64(^(free[w] >> off)))
		ones = min(ones, 64-int64(off))
		run += ones
		if ones < 64-int64(off) {
			return run, 0
		}
		w, off = w+1, 0
		if w*64 >= n {
			return min(run, n-slot), 0
		}
	}
}

// addBlock creates the refcount block for index b, growing the refcount table where it is too short. The block lies
// in the region it describes, which nothing refers to yet, and counts itself.
func (rc *Refcounts) addBlock(b int) error {
	if b >= len(rc.hosts) {
		return rc.growTable(b)
	}
	at := format.ClusterIdx(b) * rc.perBlock()
	if err := rc.guard(ClusterRun{at, 1}, 0); err != nil {
		return err
	}
	if err := rc.guard(ClustersOf(rc.lay, rc.tableOff+format.HostOff(b*8), 8), RefcountTable); err != nil {
		return err
	}
	rc.installBlock(b, rc.lay.Offset(at))
	rc.countOwn(ClusterRun{at, 1})
	return nil
}

// installBlock puts an empty block at host into memory, to be written whole.
func (rc *Refcounts) installBlock(b int, host format.HostOff) {
	size := int(rc.lay.ClusterSize())
	n := rc.lay.RefcountsPerBlock()
	free := make([]uint64, (n+63)/64)
	for i := range free {
		free[i] = ^uint64(0)
	}
	if n%64 != 0 {
		free[len(free)-1] = 1<<(n%64) - 1
	}
	rc.hosts[b] = host
	rc.claim(RefcountBlock, ClusterRun{rc.lay.Cluster(host), 1})
	rc.known[b] = &refBlock{data: make([]byte, size), free: free, isNew: true, dirtyHi: size, used: true}
	rc.resident = append(rc.resident, b)
	rc.dirty = append(rc.dirty, b)
	rc.newBlocks = append(rc.newBlocks, b)
}

// countOwn counts clusters that hold refcount structures. Unlike mark it does not say that pointers of the mapping
// depend on the block.
func (rc *Refcounts) countOwn(run ClusterRun) {
	for c := run.First; c < run.End(); c++ {
		b, slot := rc.split(c)
		rc.set(b, slot, 1)
	}
}

// growTable moves the refcount table to a larger place that can describe block b. The new table and the blocks that
// describe it lie together at the start of region b; the header is switched by the next flush, and the old table's
// clusters are retired behind that.
func (rc *Refcounts) growTable(b int) error {
	cs := rc.lay.ClusterSize()
	maxEntries := int64(format.MaxRefTableBytes / 8)
	if int64(b) >= maxEntries {
		return fmt.Errorf("growing refcount table: %w", ErrImageFull)
	}
	perCluster := cs / 8
	want := (int64(b) + 1) * 3 / 2
	var tableClusters, ownBlocks int64
	for {
		tableClusters = (want + perCluster - 1) / perCluster
		tableClusters = min(tableClusters, max(1, maxEntries/perCluster))
		total := tableClusters + ownBlocks
		need := (total + int64(rc.perBlock()) - 1) / int64(rc.perBlock())
		if need <= ownBlocks && int64(b)+ownBlocks <= tableClusters*perCluster {
			break
		}
		ownBlocks = max(need, ownBlocks)
		want = max(want, int64(b)+ownBlocks)
		if int64(b)+ownBlocks > maxEntries {
			return fmt.Errorf("growing refcount table: %w", ErrImageFull)
		}
	}
	at := format.ClusterIdx(b) * rc.perBlock()
	whole := ClusterRun{at, ownBlocks + tableClusters}
	if whole.End() > rc.maxClusters() {
		return fmt.Errorf("growing refcount table: %w", ErrImageFull)
	}
	if err := rc.guard(whole, 0); err != nil {
		return err
	}

	old := ClusterRun{rc.lay.Cluster(rc.tableOff), rc.tableClusters}
	hosts := make([]format.HostOff, tableClusters*perCluster)
	copy(hosts, rc.hosts)
	rc.hosts = hosts
	for i := int64(0); i < ownBlocks; i++ {
		rc.installBlock(b+int(i), rc.lay.Offset(at+format.ClusterIdx(i)))
	}
	rc.countOwn(whole)
	rc.tableOff = rc.lay.Offset(at + format.ClusterIdx(ownBlocks))
	rc.tableClusters = tableClusters
	rc.tableMoved = true
	rc.claim(RefcountTable, ClusterRun{rc.lay.Cluster(rc.tableOff), tableClusters})
	rc.retired = append(rc.retired, Retired{ClusterRun: old, Cause: CauseOther, Kind: RefcountTable})
	return nil
}

// growAhead adds the next refcount block while the last one still has room, so that by the time its counts matter the
// table entry that makes it valid has become durable with an ordinary flush.
func (rc *Refcounts) growAhead() error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.topUsed == 0 {
		return nil
	}
	b, slot := rc.split(rc.topUsed - 1)
	if int64(slot) < rc.lay.RefcountsPerBlock()*7/8 {
		return nil
	}
	next := b + 1
	if rc.exists(next) {
		return nil
	}
	if format.ClusterIdx(next+1)*rc.perBlock() > rc.maxClusters() {
		return nil
	}
	return rc.addBlock(next)
}

// Release takes back clusters that Alloc handed out and that nothing ever referred to.
func (rc *Refcounts) Release(run ClusterRun) error {
	return rc.Apply(run)
}

// Retire queues the end of one reference to each cluster of a run. The flush pipeline applies it once the removal of
// the reference is durable and every request that may still use it has ended.
func (rc *Refcounts) Retire(r Retired) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if n := len(rc.retired); n > 0 && rc.retired[n-1].End() == r.First && rc.retired[n-1].Cause == r.Cause && rc.retired[n-1].Kind == r.Kind {
		rc.retired[n-1].N += r.N
		return
	}
	rc.retired = append(rc.retired, r)
}

// takeRetired cuts the queue for a flush.
func (rc *Refcounts) takeRetired() []Retired {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	r := rc.retired
	rc.retired = nil
	return r
}

// putBackRetired returns a cut queue after a flush that failed.
func (rc *Refcounts) putBackRetired(r []Retired) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.retired = append(r, rc.retired...)
}

// Apply lowers the count of each cluster of run by one. On an error nothing has been changed.
func (rc *Refcounts) Apply(run ClusterRun) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	return rc.release(run)
}

// release is Apply with mu held.
func (rc *Refcounts) release(run ClusterRun) error {
	err := rc.eachBlock(run, func(b int, slot, n int64) error {
		for i := slot; i < slot+n; i++ {
			if rc.lay.Refcount(rc.known[b].data, i) == 0 {
				c := format.ClusterIdx(b)*rc.perBlock() + format.ClusterIdx(i)
				return corrupt("freeing cluster at host offset %#x, which is free already", rc.lay.Offset(c))
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return rc.eachBlock(run, func(b int, slot, n int64) error {
		for i := slot; i < slot+n; i++ {
			rc.lower(b, i)
		}
		return nil
	})
}

// lower takes one from a count that is not 0.
func (rc *Refcounts) lower(b int, slot int64) {
	blk := rc.known[b]
	v := rc.lay.Refcount(blk.data, slot) - 1
	if v == 0 {
		rc.set(b, slot, 0)
		return
	}
	rc.lay.SetRefcount(blk.data, slot, v)
	rc.touch(b, slot)
}
