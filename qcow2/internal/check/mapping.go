package check

import (
	"errors"
	"io"
	"math"
	"slices"
	"sync"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// maxSnapshotTable is as much of a snapshot table as is read: with the entry that goes beyond the limit.
const maxSnapshotTable = format.MaxSnapshotTable + 256<<10

// readSnapshots reads the snapshot table and returns its length too. It reads more of it as long as entries ask for
// more, so that the number of entries that the header claims decides nothing.
func (c *checker) readSnapshots() ([]format.Snapshot, int, error) {
	if err := c.h.ValidateSnapshotPointer(); err != nil || c.h.SnapshotCount == 0 {
		return nil, 0, err
	}
	size := int64(64 << 10)
	for {
		if err := c.ctx.Err(); err != nil {
			return nil, 0, err
		}
		b, err := c.read(c.h.SnapshotsOffset, size)
		if err != nil {
			return nil, 0, err
		}
		list, n, err := format.ParseSnapshots(b, int(c.h.SnapshotCount), c.h)
		if !errors.Is(err, io.ErrUnexpectedEOF) || size == maxSnapshotTable {
			return list, n, err
		}
		size = min(4*size, maxSnapshotTable)
	}
}

// recoverSnapshots is readSnapshots for a repair, which is called with what that returned. It gets over faults of single
// entries if it can.
func (c *checker) recoverSnapshots(list []format.Snapshot, tableLen int, err error) ([]format.Snapshot, int, error) {
	sound := err == nil
	for i := range list {
		sound = sound && (c.l.Version < format.Version3 || list[i].ExtraSize >= format.MinSnapshotExtraV3)
	}
	off := c.h.SnapshotsOffset
	if sound || !c.l.Aligned(off) || c.inside(off, 1) == 0 || c.ctx.Err() != nil {
		return list, tableLen, err
	}
	b, readErr := c.read(off, min(maxSnapshotTable, c.inside(off, maxSnapshotTable)+format.MaxSnapshotExtra))
	if readErr != nil {
		return nil, 0, readErr
	}
	found, n, faults := format.RecoverSnapshots(b, int64(c.h.SnapshotCount), c.h, c.fileSize)
	if faults.Hopeless {
		c.blind = true
		return list, tableLen, err
	}
	c.tableFaults, c.mendableTable = faults, true
	return found, n, nil
}

// walkActiveL1 counts the references of the active L1 table and checks its COPIED flags.
func (c *checker) walkActiveL1() error {
	n := uint64(c.h.L1Size) * 8
	c.reference(c.h.L1Offset, n, 1)
	err := c.words(c.h.L1Offset, n, func(first int64, words []uint64) error {
		for i, w := range words {
			if w != 0 {
				c.l1Entry(format.L1Entry(w), first+int64(i), true, 1)
			}
		}
		return nil
	})
	if err != nil {
		return c.failed("the active L1 table", c.h.L1Offset, err)
	}
	return nil
}

// l1Entry counts the reference of one L1 entry, which occurs times times. index is only known of the active L1 table.
func (c *checker) l1Entry(e format.L1Entry, index int64, active bool, times uint64) {
	p := place{host: e.Offset()}
	if active {
		p.guest, p.hasGuest = c.l.GuestOffset(index, 0), true
	}
	if e.Reserved() != 0 {
		c.corrupt(times, p, "ERROR found L1 entry with reserved bits set: %x", uint64(e))
	}
	c.reference(e.Offset(), uint64(c.l.ClusterSize()), times)
	if !c.l.Aligned(e.Offset()) {
		c.blind = true
		c.corrupt(times, p, "ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted", e.Offset())
	}
	ref := tableRef{off: e.Offset(), weight: times}
	if active {
		c.checkL1Copied(e, index, p)
		ref.active, ref.index = times, index
	}
	if c.inside(e.Offset(), 1) > 0 {
		c.tables.add(ref)
	}
}

func (c *checker) checkL1Copied(e format.L1Entry, index int64, p place) {
	if e.Offset() == 0 {
		return
	}
	if rc, ok := c.stored.get(c.l.Cluster(e.Offset())); ok && (rc == 1) != e.Copied() {
		c.copied++
		c.corrupt(1, p, "ERROR OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", index, uint64(e), rc)
	}
}

// walkSnapshots counts the references of the snapshots' L1 tables. Those may overlap, or be the same.
func (c *checker) walkSnapshots(list []format.Snapshot) error {
	if c.l.DataFile && len(list) > 0 {
		c.corrupt(1, at(c.h.SnapshotsOffset), "ERROR %d snapshots in image with data file", len(list))
	}
	p := at(c.h.SnapshotsOffset)
	c.corrupt(uint64(c.tableFaults.LongExtra), p, "ERROR snapshot table entries with too much extra metadata")
	c.corrupt(uint64(c.tableFaults.Resized), p, "ERROR snapshot table entries with extra metadata of a wrong length")
	c.corrupt(uint64(c.tableFaults.Overhang), p, "ERROR snapshot table entries that are none")
	var l1s tableSpans
	for i := range list {
		if s := &list[i]; c.checkSnapshotL1(s) && s.L1Size > 0 {
			l1s.add(c, s.L1Offset, uint64(s.L1Size)*8)
		}
	}
	c.snapshotL1s = l1s.clusters
	return l1s.walk(c, "a snapshot's L1 table", func(w, weight uint64) {
		if w != 0 {
			c.l1Entry(format.L1Entry(w), 0, false, weight)
		}
	})
}

// checkSnapshotL1 reports a snapshot whose L1 table cannot be where and what its entry says, and one whose entry lacks
// what version 3 requires.
func (c *checker) checkSnapshotL1(s *format.Snapshot) bool {
	p := at(s.L1Offset)
	if c.l.Version >= format.Version3 && s.ExtraSize < format.MinSnapshotExtraV3 {
		c.incomplete++
		c.corrupt(1, p, "ERROR snapshot %.128q (%.256q): snapshot table entry is incomplete", s.ID, s.Name)
	}
	if !c.l.Aligned(s.L1Offset) {
		c.blind = true
		c.corrupt(1, p, "ERROR snapshot %.128q (%.256q) l1_offset=%#x: L1 table is not cluster aligned; snapshot table "+
			"entry corrupted", s.ID, s.Name, s.L1Offset)
		return false
	}
	if s.L1Size > format.MaxL1Entries {
		c.blind = true
		c.corrupt(1, p, "ERROR snapshot %.128q (%.256q) l1_size=%#x: L1 table is too large; snapshot table entry "+
			"corrupted", s.ID, s.Name, s.L1Size)
		return false
	}
	return true
}

// walkL2Tables counts the references of each L2 table that something refers to.
func (c *checker) walkL2Tables() error {
	c.tables.merge()
	list := c.walkable()
	c.walked, c.toWalk = 0, int64(len(list))
	next := func() ([]tableRef, bool) {
		if len(list) == 0 {
			return nil, false
		}
		n, _ := batch(list, c.l.ClusterSize())
		piece := list[:n]
		list = list[n:]
		return piece, true
	}
	if len(list) > 0 {
		if n, _ := batch(list, c.l.ClusterSize()); n == len(list) { // one read: not worth a worker
			err := c.eachL2(list, func(words []uint64, ref *tableRef) error {
				c.l2Table(words, ref)
				return nil
			})
			c.progress(len(list))
			return err
		}
	}
	return inOrder(next, c.walkPart, c.takePart)
}

// walkable returns the L2 tables without those at unaligned offsets that are too many: such tables overlap.
func (c *checker) walkable() []tableRef {
	unaligned, list := int64(0), c.tables.list
	for i := range list {
		if c.l.Aligned(list[i].off) {
			continue
		}
		if unaligned += c.l.ClusterSize(); unaligned > c.fileSize+c.l.ClusterSize() {
			return slices.DeleteFunc(slices.Clone(list), c.tooManyUnaligned())
		}
	}
	return list
}

// tooManyUnaligned returns a function that is true for unaligned tables from the moment on that they take more bytes than
// the file has.
func (c *checker) tooManyUnaligned() func(tableRef) bool {
	unaligned := int64(0)
	return func(ref tableRef) bool {
		if c.l.Aligned(ref.off) {
			return false
		}
		unaligned += c.l.ClusterSize()
		return unaligned > c.fileSize+c.l.ClusterSize()
	}
}

// walkPart walks some L2 tables on its own: it changes nothing of c, but returns a checker with what it found.
func (c *checker) walkPart(list []tableRef) (*checker, error) {
	part := &checker{ctx: c.ctx, file: c.file, maxFindings: c.maxFindings, rep: &Report{}, runs: new(refRuns), toWalk: int64(len(list)),
		h: c.h, l: c.l, fileSize: c.fileSize, maxCount: c.maxCount, stored: c.stored}
	if c.opts.OnFinding != nil {
		part.maxFindings = math.MaxInt
	}
	part.failure = part.eachL2(list, func(words []uint64, ref *tableRef) error {
		part.l2Table(words, ref)
		return nil
	})
	return part, nil
}

// takePart adds what a part has found.
func (c *checker) takePart(part *checker) error {
	c.rep.CheckErrors += part.rep.CheckErrors
	c.rep.Corruptions += part.rep.Corruptions
	c.rep.AllocatedClusters += part.rep.AllocatedClusters
	c.rep.FragmentedClusters += part.rep.FragmentedClusters
	c.rep.CompressedClusters += part.rep.CompressedClusters
	for _, f := range part.rep.Findings {
		c.keep(f)
	}
	c.rep.FindingsDropped += part.rep.FindingsDropped
	c.copied += part.copied
	if part.blind {
		c.blind = true
	}
	if part.far != 0 && (c.far == 0 || part.far < c.far) {
		c.far = part.far
	}
	for _, r := range part.runs.list {
		c.referenceClusters(r.first, r.n, r.times)
	}
	if part.failure != nil {
		return part.failure
	}
	c.progress(int(part.toWalk))
	return c.ctx.Err()
}

// progress tells that n more L2 tables have been walked.
func (c *checker) progress(n int) {
	c.walked += int64(n)
	if c.opts.Progress != nil {
		c.opts.Progress(c.walked, c.toWalk)
	}
}

// tableBuffer is what reading L2 tables needs.
type tableBuffer struct {
	bytes []byte
	words []uint64
}

var tableBuffers = sync.Pool{New: func() any { return new(tableBuffer) }}

// eachL2 calls fn for each of a list of L2 tables, which are in the order of the file. words are reused.
func (c *checker) eachL2(list []tableRef, fn func(words []uint64, ref *tableRef) error) error {
	size := c.l.ClusterSize()
	b := tableBuffers.Get().(*tableBuffer)
	defer tableBuffers.Put(b)
	if int64(len(b.words)) != size/8 {
		b.words = make([]uint64, size/8)
	}
	for len(list) > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, length := batch(list, size)
		if len(b.bytes) < length {
			b.bytes = make([]byte, length)
		}
		if err := c.readInto(b.bytes[:length], list[0].off); err != nil {
			return c.failed("L2 table", list[0].off, err)
		}
		for i := range list[:n] {
			ref := &list[i]
			from := ref.off - list[0].off
			format.DecodeTable(b.words, b.bytes[from:int64(from)+size])
			if err := fn(b.words, ref); err != nil {
				return err
			}
		}
		list = list[n:]
	}
	return nil
}

// batch returns how many of the first tables are near enough to be read at once, and the length of that read.
func batch(list []tableRef, size int64) (n, length int) {
	const maxGap = 32 << 10
	end := int64(list[0].off) + size
	n = 1
	for n < len(list) {
		next := int64(list[n].off)
		if next-end > maxGap || next+size-int64(list[0].off) > chunkBytes {
			break
		}
		end = next + size
		n++
	}
	return n, int(end - int64(list[0].off))
}

// l2Table checks the entries of an L2 table and counts their references.
func (c *checker) l2Table(words []uint64, ref *tableRef) {
	step := int(c.l.L2EntrySize() / 8)
	t := tableWalk{checker: c, ref: ref}
	for i := 0; i < len(words); i += step {
		t.e = format.L2Entry(words[i])
		t.b = 0
		if step == 2 {
			t.b = format.L2Bitmap(words[i+1])
		}
		if t.e == 0 && t.b == 0 {
			continue
		}
		t.i = int64(i / step)
		t.entry()
	}
}

// tableWalk is the state of a walk over one L2 table.
type tableWalk struct {
	*checker
	ref *tableRef
	// next is the host offset that would continue the cluster before, 0 at the beginning.
	next format.HostOff

	i int64
	e format.L2Entry
	b format.L2Bitmap
}

func (t *tableWalk) place(host format.HostOff) place {
	if t.ref.active == 0 {
		return at(host)
	}
	return place{host: host, guest: t.l.GuestOffset(t.ref.index, t.i), hasGuest: true}
}

func (t *tableWalk) fault(message string, args ...any) {
	t.corrupt(t.ref.weight, t.place(t.e.HostOffset()), message, args...)
}

// entry checks one entry by its type, and counts what it refers to.
func (t *tableWalk) entry() {
	if r := t.e.Reserved(); r != 0 {
		t.fault("ERROR found l2 entry with reserved bits set: %x", uint64(t.e))
	}
	switch t.l.Type(t.e) {
	case format.KindCompressed:
		t.compressed()
	case format.KindNormal, format.KindZeroAlloc:
		t.data()
	case format.KindUnallocated:
		if t.b&format.BitmapAllAlloc != 0 {
			t.blind = true
			t.fault("ERROR: Unallocated cluster has non-zero subcluster allocation map")
		}
	}
}

func (t *tableWalk) compressed() {
	off, n := t.l.CompressedExtent(t.e)
	if t.e.Copied() {
		t.corrupt(t.ref.weight, t.place(off), "ERROR: coffset=0x%x: copied flag must never be set for compressed clusters",
			off)
	}
	if t.l.DataFile {
		t.blind = true
		t.corrupt(t.ref.weight, t.place(off), "ERROR compressed cluster %d with data file, entry=0x%x", t.i, uint64(t.e))
		return
	}
	if t.b != 0 {
		t.blind = true
		t.corrupt(t.ref.weight, t.place(off), "ERROR compressed cluster %d with non-zero subcluster allocation bitmap, "+
			"entry=0x%x", t.i, uint64(t.e))
		return
	}
	t.reference(off, uint64(n), t.ref.weight)
	active := int64(t.ref.active)
	t.rep.AllocatedClusters += active
	t.rep.CompressedClusters += active
	t.rep.FragmentedClusters += active // what shares sectors with its neighbours is never in one piece
}

func (t *tableWalk) data() {
	off := t.e.HostOffset()
	if t.ref.active > 0 {
		t.checkCopied(off)
	}
	if t.b.Overlap() {
		t.fault("ERROR offset=%x: Allocated cluster has corrupted subcluster allocation bitmap", off)
	}
	if !t.l.Aligned(off) {
		t.blind = true
		what := "Data"
		if t.l.ExtendedL2 && t.b&format.BitmapAllAlloc == 0 || t.l.Type(t.e) == format.KindZeroAlloc {
			what = "Preallocated"
		}
		t.fault("ERROR offset=%x: %s cluster is not properly aligned; L2 entry corrupted.", off, what)
	}
	t.rep.AllocatedClusters += int64(t.ref.active)
	if t.next != 0 && off != t.next {
		t.rep.FragmentedClusters += int64(t.ref.active)
	}
	t.next = off + format.HostOff(t.l.ClusterSize())
	if !t.l.DataFile {
		t.reference(off, uint64(t.l.ClusterSize()), t.ref.weight)
	}
}

// checkCopied checks the COPIED flag of an entry of the active tables against the stored refcount. Clusters of an
// external data file count as referred to once.
func (t *tableWalk) checkCopied(off format.HostOff) {
	if t.ref.off == 0 {
		return // the header, which an L1 entry of nothing but flags makes look like a table
	}
	rc, ok := uint64(1), true
	if !t.l.DataFile {
		rc, ok = t.stored.get(t.l.Cluster(off))
	}
	if ok && (rc == 1) != t.e.Copied() {
		t.copied += int64(t.ref.active)
		t.corrupt(t.ref.active, t.place(off), "ERROR OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", uint64(t.e), rc)
	}
}
