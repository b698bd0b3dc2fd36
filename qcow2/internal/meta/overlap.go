package meta

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Structure is a set of the kinds of metadata that lie in an image file.
type Structure uint16

// The nine structures, in the order in which QEMU numbers them.
const (
	MainHeader Structure = 1 << iota
	ActiveL1
	ActiveL2
	RefcountBlock
	RefcountTable
	SnapshotTable
	InactiveL1
	InactiveL2
	BitmapDirectory
)

// QEMU's templates.
const (
	OverlapNone     Structure = 0
	OverlapConstant           = MainHeader | ActiveL1 | RefcountTable | SnapshotTable | BitmapDirectory
	OverlapCached             = OverlapConstant | ActiveL2 | RefcountBlock | InactiveL1
	OverlapAll                = OverlapCached | InactiveL2
)

// structureNames are QEMU's, from its message.
var structureNames = [...]string{
	"qcow2_header", "active L1 table", "active L2 table", "refcount block", "refcount table", "snapshot table",
	"inactive L1 table", "inactive L2 table", "bitmap directory",
}

// String names the first structure of the set.
func (s Structure) String() string {
	i := bits.TrailingZeros16(uint16(s))
	if i >= len(structureNames) {
		return "nothing"
	}
	return structureNames[i]
}

// TableAt is a table of L1 entries on the host.
type TableAt struct {
	Off format.HostOff
	Len int64 // entries
}

// places knows which host clusters hold metadata, so that nothing else is ever written there, whatever a damaged or hostile
// image claims. Asking costs the same however large the image is: a binary search in the few runs that structures of many
// clusters occupy, and one look into a hash table that holds those of one cluster. Neither takes a lock.
type places struct {
	on Structure // what is watched

	segments atomic.Pointer[[]segment]
	singles  atomic.Pointer[singleTable]
	// complete: the L2 tables are among the singles. They are looked for when the first change needs to know.
	complete atomic.Bool
	building sync.Mutex

	mu   sync.Mutex // held by those who change what is known
	runs []placedRun
	more map[placed]int // claims of one kind to one cluster beyond the first
}

// segment is a run of clusters that the same structures occupy. Segments are sorted and do not overlap.
type segment struct {
	ClusterRun
	kinds Structure
}

type placedRun struct {
	ClusterRun
	kind Structure
}

type placed struct {
	c    format.ClusterIdx
	kind Structure
}

// newPlaces returns places that watch the structures in on.
func newPlaces(on Structure) *places {
	p := &places{on: on, more: make(map[placed]int)}
	p.segments.Store(new([]segment))
	p.singles.Store(newSingleTable(64))
	return p
}

// at returns which watched structures, apart from those in but, lie in a run of clusters.
func (p *places) at(r ClusterRun, but Structure) Structure {
	want := p.on &^ but
	if want == 0 || r.N <= 0 {
		return 0
	}
	var found Structure
	segs := *p.segments.Load()
	i, _ := slices.BinarySearchFunc(segs, r.First, func(s segment, c format.ClusterIdx) int {
		if s.End() <= c {
			return -1
		}
		return 1
	})
	for ; i < len(segs) && segs[i].First < r.End(); i++ {
		found |= segs[i].kinds
	}
	if want&singleKinds != 0 {
		found |= p.singles.Load().at(r)
	}
	return found & want
}

// add notes that a run of clusters holds a structure.
func (p *places) add(kind Structure, r ClusterRun) {
	if p.on&kind == 0 || r.N <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if kind&singleKinds == 0 {
		p.runs = append(p.runs, placedRun{r, kind})
		p.flatten()
		return
	}
	for c := r.First; c < r.End(); c++ {
		if p.claimed(c)&kind != 0 {
			p.more[placed{c, kind}]++
			continue
		}
		p.setSingle(c, kind, true)
	}
}

// remove undoes one add, for all of its clusters or some of them.
func (p *places) remove(kind Structure, r ClusterRun) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if kind&singleKinds == 0 {
		p.cut(r, kind)
		return
	}
	for c := r.First; c < r.End(); c++ {
		if k := (placed{c, kind}); p.more[k] > 1 {
			p.more[k]--
			continue
		} else if p.more[k] == 1 {
			delete(p.more, k)
			continue
		}
		p.setSingle(c, kind, false)
	}
}

// forget notes that a run of clusters holds nothing any more.
func (p *places) forget(r ClusterRun) {
	if p.at(r, 0) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut(r, ^singleKinds)
	for c := r.First; c < r.End(); c++ {
		for kind := Structure(1); kind <= BitmapDirectory; kind <<= 1 {
			delete(p.more, placed{c, kind})
		}
		p.setSingle(c, singleKinds, false)
	}
}

// replace notes that runs is all there is of a structure.
func (p *places) replace(kind Structure, runs ...ClusterRun) {
	if p.on&kind == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.runs = slices.DeleteFunc(p.runs, func(x placedRun) bool { return x.kind == kind })
	for _, r := range runs {
		if r.N > 0 {
			p.runs = append(p.runs, placedRun{r, kind})
		}
	}
	p.flatten()
}

// cut takes a run out of the runs of the kinds given; mu is held.
func (p *places) cut(r ClusterRun, kinds Structure) {
	var left []placedRun
	for _, x := range p.runs {
		if x.kind&kinds == 0 || !x.overlaps(r) {
			left = append(left, x)
			continue
		}
		if x.First < r.First {
			left = append(left, placedRun{ClusterRun{x.First, int64(r.First - x.First)}, x.kind})
		}
		if r.End() < x.End() {
			left = append(left, placedRun{ClusterRun{r.End(), int64(x.End() - r.End())}, x.kind})
		}
	}
	p.runs = left
	p.flatten()
}

// flatten makes segments of the runs, which may overlap; mu is held.
func (p *places) flatten() {
	type edge struct {
		at   format.ClusterIdx
		kind Structure
		step int
	}
	edges := make([]edge, 0, 2*len(p.runs))
	for _, r := range p.runs {
		edges = append(edges, edge{r.First, r.kind, 1}, edge{r.End(), r.kind, -1})
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.at, b.at) })
	var segs []segment
	var depth [len(structureNames)]int
	var now Structure
	for i, e := range edges {
		if i > 0 && now != 0 && e.at > edges[i-1].at {
			segs = append(segs, segment{ClusterRun{edges[i-1].at, int64(e.at - edges[i-1].at)}, now})
		}
		k := bits.TrailingZeros16(uint16(e.kind))
		if depth[k] += e.step; depth[k] > 0 {
			now |= e.kind
		} else {
			now &^= e.kind
		}
	}
	p.segments.Store(&segs)
}

// claimed returns what a cluster holds of the structures of one cluster; mu is held.
func (p *places) claimed(c format.ClusterIdx) Structure { return p.singles.Load().at(ClusterRun{c, 1}) }

// setSingle changes what a cluster holds; mu is held.
func (p *places) setSingle(c format.ClusterIdx, kinds Structure, yes bool) {
	t := p.singles.Load()
	if t.set(c, kinds, yes) {
		return
	}
	t = t.grown()
	t.set(c, kinds, yes)
	p.singles.Store(t)
}

// singleKinds are the structures of one cluster each, of which there are many.
const singleKinds = ActiveL2 | RefcountBlock | InactiveL2

// A singleTable is a hash table from groups of clusters to what each cluster of the group holds. Readers take no lock;
// there is one writer at a time. A group once in it stays.
type singleTable struct {
	slots []singleSlot // a power of two
	used  int
	seed  maphash.Seed // an image must not be able to choose what collides
}

type singleSlot struct {
	group atomic.Uint64 // plus one; 0 is a free slot
	lanes atomic.Uint64 // laneBits for each cluster
}

const (
	laneBits  = 4
	groupBits = 4 // 64 bits hold 16 lanes
	groupSize = 1 << groupBits
)

func newSingleTable(slots int) *singleTable {
	return &singleTable{slots: make([]singleSlot, slots), seed: maphash.MakeSeed()}
}

// lane returns the bits of a lane that stand for the kinds given.
func lane(kinds Structure) uint64 {
	var b uint64
	if kinds&ActiveL2 != 0 {
		b |= 1
	}
	if kinds&RefcountBlock != 0 {
		b |= 2
	}
	if kinds&InactiveL2 != 0 {
		b |= 4
	}
	return b
}

var laneKinds = [1 << laneBits]Structure{
	1: ActiveL2, 2: RefcountBlock, 3: ActiveL2 | RefcountBlock, 4: InactiveL2, 5: ActiveL2 | InactiveL2,
	6: RefcountBlock | InactiveL2, 7: ActiveL2 | RefcountBlock | InactiveL2,
}

// slot returns the slot of a group, or the free one where it would be.
func (t *singleTable) slot(group uint64) *singleSlot {
	mask := uint64(len(t.slots) - 1)
	for i := maphash.Comparable(t.seed, group) & mask; ; i = (i + 1) & mask {
		if k := t.slots[i].group.Load(); k == 0 || k == group+1 {
			return &t.slots[i]
		}
	}
}

func (t *singleTable) at(r ClusterRun) Structure {
	var found Structure
	for c := r.First; c < r.End(); {
		group := uint64(c) >> groupBits
		end := min(r.End(), format.ClusterIdx((group+1)<<groupBits))
		// A slot that was free when it was found may hold another group by now.
		if s := t.slot(group); s.group.Load() == group+1 {
			for lanes := s.lanes.Load(); lanes != 0 && c < end; c++ {
				found |= laneKinds[lanes>>(uint64(c)%groupSize*laneBits)&(1<<laneBits-1)]
			}
		}
		c = end
	}
	return found
}

// set changes what a cluster holds. It reports false when the table is too full for another group.
func (t *singleTable) set(c format.ClusterIdx, kinds Structure, yes bool) bool {
	group := uint64(c) >> groupBits
	s := t.slot(group)
	bits := lane(kinds) << (uint64(c) % groupSize * laneBits)
	if s.group.Load() != 0 {
		if yes {
			s.lanes.Store(s.lanes.Load() | bits)
		} else {
			s.lanes.Store(s.lanes.Load() &^ bits)
		}
		return true
	}
	if !yes {
		return true
	}
	if t.used*4 >= len(t.slots)*3 {
		return false
	}
	t.used++
	s.lanes.Store(bits)
	s.group.Store(group + 1) // last: who finds the group finds its lanes
	return true
}

// grown returns a larger table with the same content, without groups that hold nothing.
func (t *singleTable) grown() *singleTable {
	n := newSingleTable(2 * len(t.slots))
	for i := range t.slots {
		if lanes := t.slots[i].lanes.Load(); lanes != 0 {
			s := n.slot(t.slots[i].group.Load() - 1)
			s.lanes.Store(lanes)
			s.group.Store(t.slots[i].group.Load())
			n.used++
		}
	}
	return n
}

// Guard refuses to have guest data written at a range of the image file that belongs to the image's own structures. A sound
// image never asks for it; one that does is corrupt, and the write would make it worse.
func (s *Store) Guard(off format.HostOff, n int64) error {
	if s.Layout.DataFile {
		return nil // guest data is in another file
	}
	if err := s.findTables(); err != nil {
		return err
	}
	first := s.Layout.Cluster(off)
	last := s.Layout.Cluster(off + format.HostOff(max(n, 1)) - 1)
	return s.guardClusters(ClusterRun{first, int64(last-first) + 1}, 0)
}

// GuardReady reports whether Guard answers without reading from the disk.
func (s *Store) GuardReady() bool { return s.places.complete.Load() }

// guardClusters refuses clusters that hold structures other than those in but.
func (s *Store) guardClusters(r ClusterRun, but Structure) error {
	if found := s.places.at(r, but); found != 0 {
		return corrupt("Preventing invalid write on metadata (overlaps with %s)", found)
	}
	return nil
}

func (r ClusterRun) overlaps(o ClusterRun) bool { return r.First < o.End() && o.First < r.End() }

// ClustersOf returns the clusters that n bytes at a host offset lie in.
func ClustersOf(lay format.Layout, off format.HostOff, n int64) ClusterRun {
	if n == 0 {
		return ClusterRun{lay.Cluster(off), 0}
	}
	first, last := lay.Cluster(off), lay.Cluster(off+format.HostOff(n)-1)
	return ClusterRun{first, int64(last-first) + 1}
}

// openPlaces notes where everything lies that the configuration and the refcount table name. The L2 tables follow when
// the first change asks for them (findTables): opening reads no L1 table.
func (s *Store) openPlaces(c Config, refs *Refcounts) {
	p := newPlaces(c.Overlap)
	lay := c.Layout
	p.runs = append(p.runs,
		placedRun{ClusterRun{0, 1}, MainHeader},
		placedRun{ClustersOf(lay, c.KeysOff, c.KeysSize), MainHeader}, // as precious: without its keys an image is lost
		placedRun{ClustersOf(lay, c.L1Off, c.L1Len*8), ActiveL1},
		placedRun{ClustersOf(lay, c.RefTableOff, c.RefTableLen*lay.ClusterSize()), RefcountTable},
		placedRun{ClustersOf(lay, c.SnapshotsOff, c.SnapshotsSize), SnapshotTable},
		placedRun{ClustersOf(lay, c.BitmapsOff, c.BitmapsSize), BitmapDirectory},
	)
	for _, t := range c.InactiveL1 {
		p.runs = append(p.runs, placedRun{ClustersOf(lay, t.Off, t.Len*8), InactiveL1})
	}
	p.runs = slices.DeleteFunc(p.runs, func(r placedRun) bool { return p.on&r.kind == 0 || r.N <= 0 })
	p.flatten()
	for _, host := range refs.hosts {
		if host != 0 {
			p.addOnce(RefcountBlock, lay.Cluster(host))
		}
	}
	s.places = p
	s.wreck.write, s.wreck.tell = c.WriteCorrupt, c.OnCorrupt
	s.l1, s.inactiveL1 = TableAt{c.L1Off, c.L1Len}, c.InactiveL1
	refs.guard, refs.claim = s.guardClusters, p.add
	s.Map.guard, s.Map.claim, s.Map.findTables = s.guardClusters, p.add, s.findTables
}

// distinct refuses an image whose own structures lie on one another: changing one would change the other.
func distinct(c Config) error {
	runs := []placedRun{
		{ClusterRun{0, 1}, MainHeader},
		{ClustersOf(c.Layout, c.L1Off, c.L1Len*8), ActiveL1},
		{ClustersOf(c.Layout, c.SnapshotsOff, c.SnapshotsSize), SnapshotTable},
		{ClustersOf(c.Layout, c.RefTableOff, c.RefTableLen*c.Layout.ClusterSize()), RefcountTable},
	}
	for i, r := range runs {
		for _, o := range runs[:i] {
			if r.N > 0 && o.N > 0 && r.overlaps(o.ClusterRun) {
				return corrupt("the %s overlaps with the %s", o.kind, r.kind)
			}
		}
	}
	return nil
}

// SetBitmapDirectory notes where the bitmap directory lies now; n is 0 when there is none.
func (s *Store) SetBitmapDirectory(off format.HostOff, n int64) {
	s.places.replace(BitmapDirectory, ClustersOf(s.Layout, off, n))
}

// findTables notes where the L2 tables lie, once, before the first change. What it reads is bounded by what the file holds:
// holes are skipped, and what several snapshots share is read once.
func (s *Store) findTables() error {
	p := s.places
	if p.complete.Load() {
		return nil
	}
	p.building.Lock()
	defer p.building.Unlock()
	if p.complete.Load() {
		return nil
	}
	if p.on&ActiveL2 != 0 {
		if err := s.scanL1(byteRange{int64(s.l1.Off), s.l1.Len * 8}, ActiveL2); err != nil {
			return fmt.Errorf("reading L1 table at host offset %#x: %w", s.l1.Off, err)
		}
	}
	if p.on&InactiveL2 != 0 {
		for _, r := range unionOf(s.inactiveL1) {
			if err := s.scanL1(r, InactiveL2); err != nil {
				return fmt.Errorf("reading L1 table of a snapshot at host offset %#x: %w", r.off, err)
			}
		}
	}
	p.complete.Store(true)
	return nil
}

// byteRange is a range of the image file.
type byteRange struct{ off, n int64 }

// unionOf returns the bytes that tables cover, each once.
func unionOf(tables []TableAt) []byteRange {
	sorted := slices.Clone(tables)
	slices.SortFunc(sorted, func(a, b TableAt) int { return cmp.Compare(a.Off, b.Off) })
	var out []byteRange
	for _, t := range sorted {
		off, n := int64(t.Off), t.Len*8
		if k := len(out) - 1; k >= 0 && off <= out[k].off+out[k].n {
			out[k].n = max(out[k].n, off+n-out[k].off)
			continue
		}
		out = append(out, byteRange{off, n})
	}
	return out
}

// scanL1 notes the tables that the entries in a range of the file point to. Entries behind the end of the file, as in a
// table that was never written, point to nothing.
func (s *Store) scanL1(r byteRange, kind Structure) error {
	size, err := s.file.Size()
	if err != nil {
		return err
	}
	buf := make([]byte, min(r.n, 1<<20))
	at, stop := r.off, min(r.off+r.n, size)
	for at < stop {
		end, data, err := s.nextExtent(at, stop)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		// An extent may end within an entry, which is then read whole.
		if !data {
			at = max(end&^7, at+8)
			continue
		}
		end = min((end+7)&^7, stop)
		for ; at < end; at += int64(len(buf)) {
			b := buf[:min(int64(len(buf)), (stop-at)&^7)]
			if len(b) == 0 {
				return nil
			}
			if err := storage.ReadFull(s.file, b, at); err != nil {
				return err
			}
			s.noteTables(b, kind)
		}
	}
	return nil
}

// smallTable is what is read sooner than the host is asked for holes in it.
const smallTable = 64 << 10

func (s *Store) nextExtent(at, stop int64) (end int64, data bool, err error) {
	if stop-at <= smallTable {
		return stop, true, nil
	}
	return s.file.NextExtent(at)
}

func (s *Store) noteTables(entries []byte, kind Structure) {
	last := uint64(0)
	for ; len(entries) >= 8; entries = entries[8:] {
		e := format.L1Entry(be64(entries))
		off := e.Offset()
		if off == 0 {
			continue
		}
		c := s.Layout.Cluster(off)
		if kind == InactiveL2 && uint64(c)+1 == last {
			continue
		}
		last = uint64(c) + 1
		s.places.addOnce(kind, c)
	}
}

// addOnce is add for one cluster, without counting how often: of the tables of snapshots none is removed singly.
func (p *places) addOnce(kind Structure, c format.ClusterIdx) {
	if kind == ActiveL2 {
		p.add(kind, ClusterRun{c, 1})
		return
	}
	if p.on&kind == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setSingle(c, kind, true)
}

// leave notes that a run of clusters is about to lose a reference as the structure it was, if any. It refuses when the run
// still holds metadata: then what loses the reference is guest data on top of it, or a table that a snapshot uses, too. An
// operation that has the metadata to itself frees structures by intention.
func (s *Store) leave(r ClusterRun, was Structure, last bool) error {
	if was != 0 {
		s.places.remove(was, r)
	}
	switch {
	case s.alone && last:
		s.places.forget(r)
		return nil
	case s.alone || was != 0 && !last:
		return nil
	}
	if found := s.places.at(r, 0); found != 0 {
		s.places.add(was, r)
		return corrupt("freeing clusters at host offset %#x, where the %s lies", s.Layout.Offset(r.First), found)
	}
	return nil
}
