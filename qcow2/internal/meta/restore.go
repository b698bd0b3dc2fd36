package meta

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/journal"
)

// RestoreError says why what a journal recorded cannot be brought back into the image. Nothing has been changed then.
type RestoreError struct{ Reason string }

func (e *RestoreError) Error() string { return "the journal does not fit the image: " + e.Reason }

func unfit(f string, a ...any) error { return &RestoreError{fmt.Sprintf(f, a...)} }

// restoration brings the mapping to where a process left it that was killed. The disk is as that process left it: it holds
// the last completed flush and perhaps a part of the next. Nobody else has changed it, which the caller knows and which is
// checked here as far as it can be seen.
//
// The clusters that records name stay where they are. Nothing on the disk refers to them but the entries in question, and
// what their counts say is nobody's business: a flush that was interrupted may have written them, or not. So each is counted
// once, before anything is allocated, then the entries are changed as a request would, and a flush makes it durable.
// Until it is, the journal stays; doing all of it again comes to the same end.
type restoration struct {
	s      *Store
	tables []recordsOf // of L2 tables
	taken  []ClusterRun
	size   int64 // of the image file
}

// recordsOf are the records about one L2 table, as they were made.
type recordsOf struct {
	first   GuestCluster // that the table maps
	records []journal.Record
}

// Restore makes what the records say true, and durable. No request runs. clusters is how many the L1 table reaches. It returns how
// many guest clusters have changed.
func (s *Store) Restore(ctx context.Context, records []journal.Record, clusters int64) (changed int64, err error) {
	size, err := s.file.Size()
	if err != nil {
		return 0, fmt.Errorf("size of image file: %w", err)
	}
	r := &restoration{s: s, size: size}
	if err := r.sort(records, uint64(clusters)); err != nil {
		return 0, err
	}
	if err := s.findTables(); err != nil {
		return 0, err
	}
	if err := r.eachEntry(func(c GuestCluster, old, entry Entry) error {
		changed++
		return r.take(c, old, entry)
	}); err != nil || changed == 0 {
		return 0, err
	}
	if err := r.checkTaken(ctx); err != nil {
		return 0, err
	}
	// The data must be there before anything points to it. The killed process wrote it, and this one knows nothing of that.
	if err := s.SyncAll(); err != nil {
		return 0, err
	}
	if err := r.adopt(ctx); err != nil {
		return 0, err
	}
	if err := r.link(ctx); err != nil {
		return 0, err
	}
	return changed, s.Settle()
}

// SyncAll makes all of both files durable, also what others wrote.
func (s *Store) SyncAll() error {
	if s.data != nil {
		if err := s.data.file.Sync(); err != nil {
			return fmt.Errorf("syncing external data file: %w", err)
		}
	}
	return s.sync()
}

// sort gathers the records by the L2 table that they are about. None is about two.
func (r *restoration) sort(records []journal.Record, clusters uint64) error {
	bits := r.s.Map.l2Bits
	byTable := make(map[uint64][]journal.Record)
	for _, rec := range records {
		n := uint64(rec.N)
		if n == 0 || rec.Cluster >= clusters || n > clusters-rec.Cluster || rec.Cluster>>bits != (rec.Cluster+n-1)>>bits {
			return unfit("a record about %d guest clusters from %d of %d on", n, rec.Cluster, clusters)
		}
		if rec.Step != 0 && int64(rec.Step) != r.s.Layout.ClusterSize() {
			return unfit("a record about guest cluster %d has a step of %d bytes", rec.Cluster, rec.Step)
		}
		byTable[rec.Cluster>>bits] = append(byTable[rec.Cluster>>bits], rec)
	}
	for t, list := range byTable {
		r.tables = append(r.tables, recordsOf{GuestCluster(t << bits), list})
	}
	slices.SortFunc(r.tables, func(a, b recordsOf) int { return cmp.Compare(a.first, b.first) })
	return nil
}

// entries returns the entry that the last record about each cluster of the table names, and calls fn for each in order.
func (t recordsOf) each(fn func(c GuestCluster, e Entry) error) error {
	lo, hi := t.records[0].Cluster, uint64(0)
	for _, rec := range t.records {
		lo, hi = min(lo, rec.Cluster), max(hi, rec.Cluster+uint64(rec.N))
	}
	last := make([]Entry, hi-lo)
	known := make([]bool, hi-lo)
	for _, rec := range t.records {
		for k := range uint64(rec.N) {
			i := rec.Cluster - lo + k
			last[i] = Entry{format.L2Entry(rec.Word + k*uint64(rec.Step)), format.L2Bitmap(rec.Bitmap)}
			known[i] = true
		}
	}
	for i := range last {
		if !known[i] {
			continue
		}
		if err := fn(GuestCluster(lo+uint64(i)), last[i]); err != nil {
			return err
		}
	}
	return nil
}

// eachEntry calls fn for every cluster whose entry is another on the disk than the journal says.
func (r *restoration) eachEntry(fn func(c GuestCluster, old, entry Entry) error) error {
	for _, t := range r.tables {
		err := t.each(func(c GuestCluster, e Entry) error {
			run, err := r.s.Map.Lookup(c, 1, true)
			if err != nil {
				return fmt.Errorf("looking up guest cluster %d: %w", c, err)
			}
			old := Entry{run.Entry, run.Bitmap}
			if old == e || r.passed(old, e) {
				return nil
			}
			return fn(c, old, e)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// passed reports whether the disk has gone on from what a record says. A cluster shared with a snapshot has been in its place
// since the snapshot was created, or applied: if it is elsewhere on the disk, a flush has written a later change there, which
// nobody had been told of yet.
func (r *restoration) passed(old, e Entry) bool {
	return r.counted(e) && !e.Word.Copied() && !(r.counted(old) && old.Word.HostOffset() == e.Word.HostOffset())
}

// counted reports whether an entry has a host cluster for itself, or shared as a whole.
func (r *restoration) counted(e Entry) bool {
	kind := r.s.Layout.Kind(e.Word)
	return (kind == format.KindNormal || kind == format.KindZeroAlloc) && !r.s.Layout.DataFile
}

// take judges an entry, and notes the host cluster that it takes, unless that is the entry's already.
func (r *restoration) take(c GuestCluster, old, e Entry) error {
	lay := r.s.Layout
	kind := lay.Kind(e.Word)
	if kind == format.KindCompressed || kind == format.KindInvalid || lay.ExtendedL2 && !lay.ValidBitmap(e.Word, e.Bitmap) ||
		!lay.ExtendedL2 && e.Bitmap != 0 {
		return unfit("guest cluster %d is to have the entry %#x %#x", c, uint64(e.Word), uint64(e.Bitmap))
	}
	if kind != format.KindNormal && kind != format.KindZeroAlloc {
		return nil
	}
	host := e.Word.HostOffset()
	if lay.DataFile {
		if host != format.HostOff(c)<<lay.ClusterBits {
			return unfit("guest cluster %d is to be at %#x of the external data file", c, host)
		}
		return nil
	}
	if r.counted(old) && old.Word.HostOffset() == host {
		if old.Word.Copied() != e.Word.Copied() {
			return unfit("guest cluster %d at host offset %#x has another owner", c, host)
		}
		return nil
	}
	if int64(host) >= r.size || host == 0 || !e.Word.Copied() {
		return unfit("guest cluster %d is to be at host offset %#x of a file of %d bytes", c, host, r.size)
	}
	first := lay.Cluster(host)
	if k := len(r.taken) - 1; k >= 0 && r.taken[k].End() == first {
		r.taken[k].N++
		return nil
	}
	r.taken = append(r.taken, ClusterRun{first, 1})
	return nil
}

// checkTaken refuses clusters that something on the disk refers to, or two records.
func (r *restoration) checkTaken(ctx context.Context) error {
	slices.SortFunc(r.taken, func(a, b ClusterRun) int { return cmp.Compare(a.First, b.First) })
	for i, t := range r.taken {
		if i > 0 && r.taken[i-1].End() > t.First {
			return unfit("two guest clusters are to be at host offset %#x", r.s.Layout.Offset(t.First))
		}
		if err := r.s.guardClusters(t, 0); err != nil {
			return unfit("%v", err)
		}
	}
	if len(r.taken) == 0 {
		return nil
	}
	seen := make(map[uint64]bool) // L2 tables, which snapshots share
	for _, at := range append([]TableAt{r.s.l1}, r.s.inactiveL1...) {
		tree, err := r.s.LoadTree(at.Off, at.Len)
		if err != nil {
			return err
		}
		for i, e := range tree.L1 {
			off := uint64(format.L1Entry(e).Offset())
			if seen[off] {
				tree.L1[i] = 0
			}
			seen[off] = true
		}
		if err := tree.refer(ctx, r.checkFree); err != nil {
			return err
		}
	}
	return nil
}

// checkFree refuses a run of clusters that something refers to if a record wants one of them.
func (r *restoration) checkFree(used ClusterRun) error {
	i, _ := slices.BinarySearchFunc(r.taken, used.First, func(t ClusterRun, c format.ClusterIdx) int {
		if t.End() <= c {
			return -1
		}
		return 1
	})
	if i < len(r.taken) && r.taken[i].overlaps(used) {
		return unfit("something else uses the cluster at host offset %#x",
			r.s.Layout.Offset(max(used.First, r.taken[i].First)))
	}
	return nil
}

// adopt counts the clusters taken. The blocks that are to count them come first: they may lie anywhere but there.
func (r *restoration) adopt(ctx context.Context) error {
	refs := r.s.Refs
	missing := refs.uncounted(r.taken)
	if len(missing) > 0 {
		end := format.ClusterIdx(r.s.Layout.ClustersFor(r.size))
		room, err := refs.reserveBehind(end, int64(len(missing)))
		if err != nil {
			return fmt.Errorf("making room for refcount blocks: %w", err)
		}
		// A block must not become valid before the one that counts its own cluster.
		if err := r.s.Flush(ctx); err != nil {
			return err
		}
		if err := refs.installBlocks(missing, room); err != nil {
			return err
		}
	}
	return refs.adopt(r.taken)
}

// link changes the entries.
func (r *restoration) link(ctx context.Context) error {
	err := r.eachEntry(func(c GuestCluster, old, entry Entry) error {
		if err := r.s.Pressure(ctx); err != nil {
			return err
		}
		edit, err := r.s.Map.Prepare(c)
		if err != nil {
			return fmt.Errorf("preparing to map guest cluster %d: %w", c, err)
		}
		defer edit.Done()
		edit.Put(0, 1, func(int64, Entry) Entry { return entry })
		return r.letGo(old, entry)
	})
	return err
}

// letGo gives up the references of an entry that are not its successor's.
func (r *restoration) letGo(old, entry Entry) error {
	lay := r.s.Layout
	if kind := lay.Kind(entry.Word); (kind == format.KindNormal || kind == format.KindZeroAlloc) &&
		lay.Kind(old.Word) != format.KindCompressed && old.Word.HostOffset() == entry.Word.HostOffset() {
		return nil
	}
	run, err := r.s.entryClusters(old.Word)
	if err == nil && run.N > 0 {
		r.s.Refs.Retire(Retired{ClusterRun: run, Cause: CauseOther})
	}
	return err
}

// uncounted returns the refcount blocks that runs of clusters need and that are not there.
func (rc *Refcounts) uncounted(runs []ClusterRun) []int {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	var missing []int
	for _, r := range runs {
		first, _ := rc.split(r.First)
		last, _ := rc.split(r.End() - 1)
		for b := first; b <= last; b++ {
			if k := len(missing); !rc.exists(b) && (k == 0 || missing[k-1] < b) {
				missing = append(missing, b)
			}
		}
	}
	return missing
}

// reserveBehind hands out n clusters, one by one, in parts of the file that no cluster before end shares a refcount block
// with.
func (rc *Refcounts) reserveBehind(end format.ClusterIdx, n int64) ([]format.ClusterIdx, error) {
	rc.mu.Lock()
	starts := rc.starts
	rc.starts[0] = (end + rc.perBlock() - 1) / rc.perBlock() * rc.perBlock()
	rc.mu.Unlock()
	var room []format.ClusterIdx
	var err error
	for ; n > 0 && err == nil; n-- {
		var run ClusterRun
		if run, _, err = rc.Alloc(1); err == nil {
			room = append(room, run.First)
		}
	}
	rc.mu.Lock()
	rc.starts = starts
	rc.mu.Unlock()
	return room, err
}

// installBlocks makes empty refcount blocks for the indices given, at clusters that are counted already.
func (rc *Refcounts) installBlocks(blocks []int, at []format.ClusterIdx) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for i, b := range blocks {
		if err := rc.guard(ClustersOf(rc.lay, rc.tableOff+format.HostOff(b*8), 8), RefcountTable); err != nil {
			return err
		}
		rc.installBlock(b, rc.lay.Offset(at[i]))
	}
	return nil
}

// adopt counts each cluster of runs once, whatever its count is: nothing on the disk refers to any of them.
func (rc *Refcounts) adopt(runs []ClusterRun) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	for _, r := range runs {
		err := rc.eachBlock(r, func(b int, slot, n int64) error {
			for i := slot; i < slot+n; i++ {
				rc.set(b, i, 1)
			}
			rc.known[b].serves = true
			return nil
		})
		if err != nil {
			return err
		}
		rc.increased = true
		rc.topUsed = max(rc.topUsed, r.End())
	}
	return nil
}
