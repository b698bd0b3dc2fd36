// Package mutation tests the tests. It breaks the engine on purpose, one defect at a time, and demands that the suite
// notices each: a safety test that cannot fail shows nothing.
//
// A defect is a replacement in one source file, applied by the compiler's overlay: the tree is never touched. The test
// itself is behind the build tag "mutation" (make mutation).
package mutation

// Defect is one deliberate mistake.
type Defect struct {
	Name string
	// Breaks says, for docs/safety.md, what the engine no longer does.
	Breaks string
	File   string
	// Old stands exactly once in File and is replaced by New.
	Old, New string
}

const (
	store     = "qcow2/internal/meta/store.go"
	refcount  = "qcow2/internal/meta/refcount.go"
	refflush  = "qcow2/internal/meta/refflush.go"
	mapping   = "qcow2/internal/meta/mapping.go"
	epoch     = "qcow2/internal/meta/epoch.go"
	ranges    = "qcow2/internal/meta/ranges.go"
	exclusive = "qcow2/internal/meta/exclusive.go"
	dirty     = "qcow2/internal/meta/dirty.go"
	tree      = "qcow2/internal/meta/tree.go"
	snapshot  = "qcow2/snapshot.go"
	overlap   = "qcow2/internal/meta/overlap.go"
	corrupt   = "qcow2/internal/meta/corrupt.go"
	judge     = "qcow2/corrupt.go"
	writelog  = "qcow2/internal/meta/writelog.go"
	writer    = "qcow2/write.go"
	vectors   = "qcow2/vector.go"
	hostio    = "qcow2/hostio.go"
	datafile  = "qcow2/datafile.go"
	compress  = "qcow2/compress.go"
	unpacked  = "qcow2/clustercache.go"
	packer    = "qcow2/internal/meta/packer.go"
	row       = "qcow2/internal/meta/row.go"
	reader    = "qcow2/read.go"
	tryReader = "qcow2/tryread.go"
	zero      = "qcow2/zero.go"
	rewrite   = "qcow2/internal/format/rewrite.go"
	expand    = "qcow2/internal/meta/expand.go"
	rewidth   = "qcow2/internal/meta/rewidth.go"
	resize    = "qcow2/resize.go"
	amend     = "qcow2/amend.go"
	header    = "qcow2/header.go"
	crypter   = "qcow2/crypt.go"
	keySlots  = "luks/volume.go"
	layout    = "qcow2/internal/format/layout.go"
	entries   = "qcow2/internal/format/entries.go"

	compactMove = "qcow2/compactmove.go"
	relocate    = "qcow2/internal/meta/relocate.go"
	copyin      = "qcow2/copyin.go"
	commit      = "image/commit.go"
	rebase      = "image/rebase.go"
	vmState     = "qcow2/vmstate.go"
	journals    = "qcow2/internal/journal/journal.go"
	journaled   = "qcow2/journal.go"
	restore     = "qcow2/internal/meta/restore.go"

	repair     = "qcow2/internal/check/repair.go"
	rebuild    = "qcow2/internal/check/rebuild.go"
	copied     = "qcow2/internal/check/copied.go"
	mending    = "qcow2/internal/check/entries.go"
	snapTable  = "qcow2/internal/check/snapshots.go"
	checkFacts = "qcow2/internal/check/check.go"
	undoLog    = "qcow2/internal/check/undo.go"

	bitmaps      = "qcow2/bitmap.go"
	bitmapSave   = "qcow2/bitmapsave.go"
	bitmapEdit   = "qcow2/bitmapedit.go"
	bitmapMemory = "qcow2/internal/bitmap/bitmap.go"
)

// Defects are the mistakes that the suite must catch.
var Defects = []Defect{
	// The flush pipeline.
	{"skip-first-sync", "pointers are written before what they point to is durable", store,
		"	if pointers && g.ordered {\n		if err := s.sync(); err != nil {\n			return err\n		}\n", "	if pointers && g.ordered {\n"},
	{"skip-last-sync", "a flush is acknowledged before its pointers are durable", store,
		"			return err\n		}\n	}\n	return s.sync()\n}", "			return err\n		}\n	}\n	return nil\n}"},
	{"skip-middle-sync", "pointers are written before the refcount blocks that count their clusters are valid", store,
		"			if err := s.sync(); err != nil {\n				return err\n			}\n		}\n	}", "		}\n	}"},
	{"all-slices-first", "entries of reachable L2 tables are written before their data is durable", store,
		"if s.t.exposed.Load() {", "if s.t.exposed.Load() && m == nil {"},
	{"table-behind-the-end", "an L1 entry may point behind the end of the file", mapping,
		"		at += int64(len(b)) - storage.SectorSize\n", "		return nil\n"},
	{"never-exposed", "an L2 table counts as unreachable for ever", store,
		"		t.exposed.Store(true)\n", "		_ = t\n"},
	{"refcounts-frozen-first", "a flush may write an entry whose refcount it froze too early", store,
		"	s.Map.freezeL1(g)\n	s.Map.freezeSlices(g)\n	if !s.postpone() {\n		g.refs = s.Refs.freeze()\n	}\n",
		"	g.refs = s.Refs.freeze()\n	runtime.Gosched()\n	s.Map.freezeL1(g)\n	s.Map.freezeSlices(g)\n"},
	{"new-data-needs-no-sync", "entries that gained data do not order a sync", store,
		"		g.ordered = g.ordered || s.fresh\n", ""},
	{"retired-cut-last", "a reference may be given up before the entry that held it is written", store,
		"	s.cutJournal(func() { g.retired = s.Refs.takeRetired() })\n	s.Map.freezeL1(g)\n	s.Map.freezeSlices(g)\n",
		"	s.Map.freezeL1(g)\n	s.Map.freezeSlices(g)\n	runtime.Gosched()\n	s.cutJournal(func() { g.retired = s.Refs.takeRetired() })\n"},
	{"journal-cut-late", "what changes while a flush freezes is recorded in the half that the flush clears", store,
		"	s.cutJournal(func() { g.retired = s.Refs.takeRetired() })\n	s.Map.freezeL1(g)\n	s.Map.freezeSlices(g)\n",
		"	g.retired = s.Refs.takeRetired()\n	s.Map.freezeL1(g)\n	s.Map.freezeSlices(g)\n	for range 9 {\n		runtime.Gosched()\n	}\n	s.cutJournal(func() {})\n"},
	{"journal-cleared-early", "records are cleared before the flush that covers them is durable", store,
		"	err := s.write(g)\n", "	s.kept()\n	err := s.write(g)\n"},
	{"journal-trusts-failed-flush", "a flush that failed clears records", store,
		"		s.notKept()\n", "		s.kept()\n"},
	{"journal-full-is-ignored", "a change that the journal has no room for is acknowledged", journaled,
		"		return nil\n	}\n	return im.meta.Flush(ctx)\n", "		return nil\n	}\n	return ctx.Err()\n"},
	{"journal-full-in-try", "a write that allocates at once is acknowledged though the journal had no room", vectors,
		"err == nil && im.outstanding() {", "err == nil && false {"},
	{"journal-halves-swapped", "records of the younger half are brought back first", journals,
		"range []int{first, 1 - first}", "range []int{1 - first, first}"},
	{"journal-torn-record", "a record that was being written counts", journals,
		"s == 0 || s != sum(", "s == 0 && s != sum("},
	{"journal-of-before", "a journal is brought back into an image that somebody has changed since", journaled,
		"	case found.Nonce != journalNonce(hdr):\n", "	case found.Nonce != journalNonce(hdr) && false:\n"},
	{"journal-clusters-not-counted", "clusters that are brought back count as free", restore,
		"	return refs.adopt(r.taken)\n", "	return nil\n"},
	{"journal-blocks-in-the-way", "refcount blocks are put where clusters lie that are about to be brought back", restore,
		"	rc.starts[0] = (end + rc.perBlock() - 1) / rc.perBlock() * rc.perBlock()\n", ""},
	{"journal-forgets-earlier-life", "the first flush leaves out what an earlier process wrote", journaled,
		"		if err := im.meta.SyncAll(); err != nil {\n			return err\n		}\n", ""},
	{"failed-flush-forgets-slices", "a failed flush is not tried again", store,
		"			m.markDirty(f.s)\n			f.s.mu.Unlock()\n", "			f.s.mu.Unlock()\n"},
	{"failed-flush-forgets-refcounts", "refcounts of a failed flush are not written again", store,
		"	s.Refs.thaw(&g.refs)\n", ""},
	{"failed-flush-loses-room", "clusters given up in a failed flush are never freed", store,
		"	s.Refs.putBackRetired(g.retired)\n", ""},
	{"failed-flush-forgets-l1", "L1 entries of a failed flush are not written again", store,
		"		m.markL1(f.chunk, m.chunks[f.chunk].Load(), f.lo, f.hi)\n", "		_ = f\n"},
	{"failed-sync-trusted", "data written before a failed sync counts as durable", store,
		"	s.log.lost(g.wrote)\n", ""},
	{"flush-joins-nobody", "a flush that finds another running returns at once", store,
		"	case <-b.done:\n		return b.err\n", "	default:\n		return nil\n"},
	{"close-flushes-once", "the counts of clusters freed last are lost at close", exclusive,
		"	for range 2 {\n", "	for range 1 {\n"},
	{"overwrite-not-noted", "an overwrite orders no sync", hostio,
		"	im.wroteHost(host, int64(len(p))) // also", "	// also"},
	{"marks-outlive-the-cut", "a write after a flush is taken for one that the flush covered", writelog,
		"			l.seen[i].Store(0)\n", "			_ = i\n"},

	// Snapshots and the dirty bit.
	{"snapshot-before-counts", "a snapshot may exist before the counts that protect it", snapshot,
		"	undo.add(func() error { return im.unshare(tree) })\n	if err := im.meta.SettleGated(); err != nil {\n		return err\n	}\n",
		"	undo.add(func() error { return im.unshare(tree) })\n"},
	{"snapshot-keeps-copied", "data that a snapshot shares is overwritten in place", snapshot,
		"	if err := tree.ClearCopied(ctx); err != nil {\n		return err\n	}\n	if err := im.clearL1Copied(l1)", "	if err := im.clearL1Copied(l1)"},
	{"snapshot-before-flags", "a snapshot may exist while the disk still says that its data is nobody else's", snapshot,
		"	if err := im.clearL1Copied(l1); err != nil {\n		return err\n	}\n	if err := im.meta.SyncNow(); err != nil {\n		return err\n	}\n",
		"	if err := im.clearL1Copied(l1); err != nil {\n		return err\n	}\n"},
	{"snapshot-shares-nothing", "a snapshot is taken without counting what it refers to", snapshot,
		"	if err := tree.Share(ctx); err != nil {\n		return err\n	}\n	undo.add(func() error { return im.unshare(tree) })\n", ""},
	{"apply-shares-nothing", "the disk goes back to a snapshot without counting what it refers to", snapshot,
		"	if err := tree.Share(ctx); err != nil {\n		return err\n	}\n	undo.add(func() error { return tree.Drop(context.Background(), meta.CauseNever) })\n", ""},
	{"apply-before-counts", "the disk may go back to a snapshot before the counts that protect it", snapshot,
		"	undo.add(func() error { return tree.Drop(context.Background(), meta.CauseNever) })\n	if err := im.meta.SettleGated(); err != nil {\n		return err\n	}\n",
		"	undo.add(func() error { return tree.Drop(context.Background(), meta.CauseNever) })\n"},
	{"snapshot-forgets-undo", "a snapshot that could not be taken leaves counts behind", tree,
		"		err = errors.Join(err, t.s.Refs.Apply(r))\n", "		_ = r\n"},
	{"open-snapshot-deleted", "a snapshot is deleted while it is open", snapshot,
		"	if im.views.inUse(gone.ID) {\n", "	if im.views.inUse(\"\") {\n"},
	{"broken-for-good", "metadata that could not be read again once is never read again", "qcow2/exclusive.go",
		"	if im.broken == nil {\n		return nil\n	}\n	if err := im.reload()", "	if im.broken != nil {\n		return im.broken\n	}\n	if err := error(nil)"},
	{"check-beside-exclusive", "a check reads the file while an operation on the whole image changes it", exclusive,
		"	s.gate.Lock()\n	defer s.gate.Unlock()\n	if err := s.SettleGated(); err != nil {\n		return err\n	}\n	return fn()\n",
		"	if err := s.Settle(); err != nil {\n		return err\n	}\n	return fn()\n"},
	{"dirty-not-marked", "counts are postponed and the disk does not say so", dirty,
		"	if err := s.mark.write(true); err != nil {\n		return err\n	}\n", ""},
	{"lazy-never-settles", "postponed counts are never written", dirty,
		"	if !s.mark.lazy || s.settling {", "	if !s.mark.lazy {"},

	// Compaction.
	{"compact-beside-writers", "a cluster is moved while a request writes to its old place", exclusive,
		"	if err := s.Epochs.Quiesce(); err != nil {\n		return err\n	}\n	defer s.Epochs.Resume()\n	return fn()\n", "	return fn()\n"},
	{"compact-leaks", "the old place of a cluster that was moved is never freed", compactMove,
		"	im.meta.Refs.Retire(meta.Retired{ClusterRun: meta.ClusterRun{First: r.Cluster, N: 1}, Cause: meta.CauseOther})\n", ""},
	{"compact-frees-at-once", "the old place of a cluster is free before the new one is durable", compactMove,
		"	im.meta.Refs.Retire(meta.Retired{ClusterRun: meta.ClusterRun{First: r.Cluster, N: 1}, Cause: meta.CauseOther})\n",
		"	_ = im.meta.Refs.Release(meta.ClusterRun{First: r.Cluster, N: 1})\n"},
	{"compact-keeps-ciphertext", "sectors that are encrypted by their place are moved as they are", compactMove,
		"	if im.crypt != nil && im.crypt.byHost {\n		off :=", "	if im.crypt != nil && im.crypt.cipher == nil {\n		off :="},
	{"compact-keeps-shared-streams", "compressed data that was moved keeps its old reference", compactMove,
		"	old.add(im.lay, r.Entry, meta.CauseOther)\n", ""},
	{"relocate-before-counts", "entries lead to places whose counts are not durable", relocate,
		"	if err := s.SettleGated(); err != nil {\n		return false, r.undo(err)\n	}\n", ""},
	{"relocate-before-content", "entries lead to places whose content is not durable", relocate,
		"	if err := s.SettleGated(); err != nil {\n		return false, r.undo(err)\n	}\n	if err := s.SyncNow(); err != nil {\n		return false, r.undo(err)\n	}\n", ""},
	{"relocate-frees-early", "the old place is freed before every entry has durably left it", relocate,
		"	if err := s.SyncNow(); err != nil {\n		return true, err\n	}\n	for _, m := range r.moves {\n		if err := s.drop", "	for _, m := range r.moves {\n		if err := s.drop"},
	{"relocate-counts-one", "a place that several trees refer to is counted once", relocate,
		"	if err := s.raise(m.to, n-1); err != nil {\n		return false, err\n	}\n	to :=", "	to :="},
	{"compact-under-views", "the clusters of a snapshot that is open are moved", compactMove,
		"		if im.views.any() && inSnapshot(refs) {", "		if c == nil && inSnapshot(refs) {"},
	{"compact-cuts-too-much", "the end of the file is cut off with what could not be moved", row,
		"	most := int64(s.Layout.Offset(end))\n", "	most := int64(s.Layout.Offset(end - min(end, 1)))\n"},

	// Reclaim.
	{"reuse-at-once", "a cluster is free before the removal of its last reference is durable", writer,
		"		refs.Retire(r)\n", "		_ = refs.Apply(r.ClusterRun)\n"},
	{"reuse-under-readers", "a cluster is free while a request may still read it", epoch,
		"	for e.current.Load() < tag+2 &&", "	for e.current.Load() < tag &&"},
	{"advance-with-requests", "the epoch advances past running requests", epoch,
		"	if !e.drained((epoch + 1) & 1) {", "	if !e.drained((epoch+1)&1) && epoch == 0 {"},
	{"punch-after-free", "a hole is punched in a cluster that somebody else may own by then", store,
		"			if s.pass.Passes(r.Cause) {\n				// A failed", `			if s.pass.Passes(r.Cause) {
				if err := s.Refs.Apply(run); err != nil {
					return r, err
				}
				runtime.Gosched()
				_ = s.file.PunchHole(int64(s.Layout.Offset(run.First)), n<<s.Layout.ClusterBits)
				r.First, r.N = run.End(), r.N-n
				continue
			}
			if s.pass.Passes(r.Cause) {
				// A failed`},
	{"quiesce-waits-for-nobody", "a check runs beside requests", epoch,
		"	e.door.Store(doorHeld)\n	e.waitEmpty()\n", "	e.door.Store(doorHeld)\n"},

	// The allocator.
	{"count-not-raised", "a cluster is handed out and still counts as free", refcount,
		"	rc.mark(run)\n	return run,", "	rc.increased = true\n	return run,"},
	{"count-not-raised-at-once", "a cluster that is handed out without waiting still counts as free", refcount,
		"	rc.mark(run)\n	return c,", "	rc.increased = true\n	return c,"},
	{"wrong-width", "every refcount is taken for 16 bits wide when noting what to write", refcount,
		"int(slot*int64(rc.lay.RefcountBits())/8)", "int(slot*16/8)%int(rc.lay.ClusterSize())"},
	{"block-does-not-count-itself", "a new refcount block lies in a free cluster", refcount,
		"	rc.countOwn(ClusterRun{at, 1})\n", ""},
	{"old-table-kept", "the clusters of a refcount table that moved are never freed", refcount,
		"	rc.retired = append(rc.retired, Retired{ClusterRun: old, Cause: CauseOther, Kind: RefcountTable})\n", "	_ = old\n"},
	{"recycled-counts-as-virgin", "old bytes of a recycled cluster show through", refcount,
		"	rc.virgin = max(rc.virgin, c+1)\n", ""},
	{"moved-table-not-named", "the header goes on naming the refcount table that was left", refflush,
		"	if f.table != nil {\n		b := format.EncodeRefTablePointer", "	if f.table != nil && rc == nil {\n		b := format.EncodeRefTablePointer"},
	{"new-blocks-not-named", "the refcount table never gets the entries of new blocks", refflush,
		"	for _, i := range f.newBlocks {\n		at :=", "	for _, i := range f.newBlocks[len(f.newBlocks):] {\n		at :="},
	{"guard-asleep", "guest data may be written over the header and the tables", overlap,
		"	for ; i < len(segs) && segs[i].First < r.End(); i++ {", "	for ; i < len(segs) && segs[i].First < r.End() && r.N < 0; i++ {"},
	{"tables-not-looked-for", "the L2 tables of an image that is opened are not protected", overlap,
		"	if p.on&ActiveL2 != 0 {\n		if err := s.scanL1", "	if p.on&ActiveL2 == 0 {\n		if err := s.scanL1"},
	{"new-l2-table-unwatched", "a new L2 table is not protected", mapping,
		"	m.claim(ActiveL2, ClusterRun{m.lay.Cluster(t.host), 1})\n", ""},
	{"new-block-unwatched", "a new refcount block is not protected", refcount,
		"	rc.claim(RefcountBlock, ClusterRun{rc.lay.Cluster(host), 1})\n", ""},
	{"l2-table-anywhere", "an L2 table that lies on another structure is changed", mapping,
		"		if err := m.guard(ClusterRun{m.lay.Cluster(t.host), 1}, ActiveL2); err != nil {\n			return Edit{}, err\n		}\n", ""},
	{"block-anywhere", "a refcount block that lies on another structure is changed", refcount,
		"	if err := rc.guard(ClusterRun{rc.lay.Cluster(rc.hosts[b]), 1}, RefcountBlock); err != nil {\n		return err\n	}\n", ""},
	{"metadata-freed", "a guest's discard frees the image's own structures", overlap,
		"	if found := s.places.at(r, 0); found != 0 {\n		s.places.add", "	if found := s.places.at(r, 0); found != 0 && r.N < 0 {\n		s.places.add"},
	{"freed-table-watched", "the place of a table that moved is never used again", overlap,
		"		s.places.remove(was, r)\n	}\n	switch", "		_ = was\n	}\n	switch"},
	{"corrupt-not-marked", "an image with impossible metadata goes on being written", judge,
		"	if c := ownCorruption(err); c != nil {\n		im.meta.MarkCorrupt(c)\n	}\n", ""},
	{"corrupt-marked-in-memory", "the disk does not say that impossible metadata was met", corrupt,
		"	if err := s.wreck.write(); err != nil {\n		return err\n	}\n", ""},
	{"corrupt-frees", "an image that was marked corrupt still frees clusters", store,
		"	if !s.unfreed() || s.Corrupt() != nil {\n", "	if !s.unfreed() {\n"},
	{"corrupt-from-below", "a damaged backing file has the image above it marked corrupt", judge,
		"	case *belowError:\n		return nil\n", ""},
	{"corrupt-closes-clean", "the dirty bit of an image that was marked corrupt goes at close", dirty,
		" || s.Corrupt() != nil {\n		return nil", " {\n		return nil"},
	{"corrupt-told-often", "every change of a corrupt image is an event", corrupt,
		" && s.wreck.told.CompareAndSwap(false, true) {", " {"},
	{"slot-of-another", "a cluster is taken for metadata because another one has just become that", overlap,
		"s.group.Load() == group+1 {\n			for", "s.group.Load() != 0 {\n			for"},
	{"table-outgrown", "structures are forgotten when the table of their places grows", overlap,
		"			s.lanes.Store(lanes)\n			s.group", "			s.lanes.Store(lanes << laneBits)\n			s.group"},

	// The mapping.
	{"forget-copied", "an entry of a cluster with one owner does not say so", writer,
		"	e := meta.Entry{Word: format.MakeL2(host, true)}\n", "	e := meta.Entry{Word: format.MakeL2(host, false)}\n"},
	{"ignore-copied", "a cluster shared with a snapshot is overwritten in place", writer,
		"kind == format.KindNormal && (copied || im.lay.DataFile)", "kind == format.KindNormal && (copied || im != nil)"},
	{"share-l2-tables", "an L2 table shared with a snapshot is changed in place", mapping,
		"	if e.Offset() != 0 && e.Copied() {\n		return m.tableLocked", "	if e.Offset() != 0 {\n		return m.tableLocked"},
	{"old-l2-table-kept", "a shared L2 table keeps a reference after the copy", mapping,
		"		m.rc.Retire(Retired{ClusterRun: ClusterRun{m.lay.Cluster(e.Offset()), 1}, Cause: CauseOther, Kind: ActiveL2})\n", "		_ = e\n"},
	{"drop-a-waiter", "two requests map one guest cluster at the same time", ranges,
		"	for _, c := range wait {\n", "	for _, c := range wait[len(wait):] {\n"},
	{"edit-evicted-slice", "an entry is changed in a slice that is no longer the cached one", mapping,
		"	if s.dead {\n		return Edit{}, false\n	}\n", ""},
	{"packed-run-too-long", "a packed slice says that a run of data goes on over what follows it", "qcow2/internal/meta/packed.go",
		"N: min(limit, int64(r.first+r.n)-i)}", "N: limit}"},
	{"unpacked-in-place", "the entries of a run all get the same host cluster when a slice is unpacked", "qcow2/internal/meta/packed.go",
		"words[r.first+k].Store(r.word + uint64(k)*step)", "words[r.first+k].Store(r.word + uint64(k)*step*0)"},
	{"evict-dirty", "a slice is evicted with changes the disk has not", mapping,
		"	if s.pins > 0 || s.dirty || s.writing {", "	if s.pins > 0 {"},
	{"edit-not-dirty", "a changed slice is not written", mapping,
		"		e.m.markDirty(s)\n		if e.m.journal == nil {\n", "		if e.m.journal == nil {\n"},
	{"journal-dirty-late", "a change is recorded before a flush that clears the record could find it", mapping,
		"		e.m.markDirty(s)\n		if e.m.journal == nil {\n			e.store(i+k, entry)\n",
		"		defer func() {\n			for range 99 {\n				runtime.Gosched()\n			}\n			e.m.markDirty(s)\n		}()\n" +
			"		if e.m.journal == nil {\n			e.store(i+k, entry)\n"},
	{"l1-not-dirty", "a changed L1 entry is not written", mapping,
		"	m.markL1(l1/l1ChunkEntries, chunk, k, k+1)\n", ""},
	{"short-data-run", "a run of data continues over a gap on the host", mapping,
		"		next := uint64(first) + uint64(m.lay.ClusterSize())\n		for run.N < limit && words[i+run.N].Load() == next {",
		"		next := uint64(first) + uint64(m.lay.ClusterSize())\n		for run.N < limit && words[i+run.N].Load()&^(1<<20-1) == next&^(1<<20-1) {"},

	// Data.
	{"subcluster-ignored-in-place", "a subcluster without data is overwritten in place and stays without", reader,
		"	if !im.lay.ExtendedL2 {\n		return n\n	}\n", "	if !im.lay.ExtendedL2 || n > 0 {\n		return n\n	}\n"},
	{"no-copy-on-write", "what surrounds a partial write is lost", writer,
		"	if err := im.read(ctx, b[:inside], off); err != nil {", "	if err := ctx.Err(); err != nil {"},
	{"no-zeroes-around", "a partial write to a zero cluster shows old bytes around it", writer,
		"		return len(b) > 0, nil\n", "		return false, nil\n"},
	{"failed-write-keeps-clusters", "clusters of a failed write leak", writer,
		"	if !a.fresh {\n		return err\n	}\n", "	if !a.fresh || err != nil {\n		return err\n	}\n"},
	{"compressed-frees-one", "of a compressed cluster over two host clusters one leaks", writer,
		"		r.First, r.N = first, int64(last-first)+1\n", "		r.First, r.N = first, min(int64(last-first)+1, 1)\n"},
	{"discard-keeps-entry", "a discarded cluster is freed and still referred to", zero,
		"	return meta.Entry{Word: format.L2Zero}, true\n", "	return e, true\n"},
	{"reuse-zeroed-at-once", "data is written to a zeroed cluster under the eyes of an older reader", writer,
		"	reuse := im.mayReuseZeroed()\n", "	reuse := true\n"},
	{"subcluster-not-filled", "what surrounds a partial write to a subcluster is lost", writer,
		"	a.from = from / unit * unit\n", "	a.from = from\n"},
	{"subcluster-data-left-behind", "a shared cluster's other subclusters are lost when it is copied", writer,
		"	if a.leavesData(first) {\n		a.from = 0\n", "	if a.leavesData(first) && a.n == 0 {\n		a.from = 0\n"},
	{"subcluster-neighbour-claimed", "a subcluster next to the written ones counts as written", writer,
		"int((to+unit-1)/unit))\n}", "min(int((to+unit-1)/unit)+1, a.im.lay.Subclusters()))\n}"},
	{"subclusters-free-too-early", "a cluster is freed when some of its subclusters are zeroed", zero,
		"z.unmap && e.Bitmap&format.BitmapAllAlloc == 0 {", "z.unmap {"},
	{"short-backing-stale", "a read past a short backing file leaves the buffer as it was", reader,
		"		p = p[n:]\n	}\n	clear(p)\n	return nil\n}", "		p = p[n:]\n	}\n	return nil\n}"},
	{"compressed-one-sector-short", "the last sector of a compressed cluster is not read", entries,
		"	return off, (sectors+1)*SectorSize - int64(off%SectorSize)\n", "	return off, max(sectors, 1)*SectorSize - int64(off%SectorSize)\n"},
	{"l2-index-wraps-early", "half of each L2 table is used twice", layout,
		"func (l Layout) L2Entries() int64 { return 1 << l.l2Bits() }", "func (l Layout) L2Entries() int64 { return 1 << (l.l2Bits() - 1) }"},

	// Encryption.
	{"encrypted-virgin", "parts of new clusters of an encrypted image are left as the host has them, and read as noise", writer,
		"	a.virgin = virgin && im.crypt == nil", "	a.virgin = virgin"},
	{"encrypted-punched", "mapped clusters of an encrypted image are punched, and read as noise", zero,
		"im.passRequest() && im.crypt == nil", "im.passRequest()"},
	{"luks-guest-sector", "LUKS sectors are numbered by guest offset, as no other program does", crypter,
		"	if e.byHost {\n", "	if false && e.byHost {\n"},
	{"key-erased-in-use", "a power cut leaves a key slot that says active without its key", keySlots,
		"	if err := v.setState(slot, false); err != nil {\n		return err\n	}\n	return v.wipe(slot)", "	return v.wipe(slot)"},
	{"key-enabled-first", "a power cut leaves a key slot that says active before its key is there", keySlots,
		"	s.KeyOffset, s.Active = v.h.Slots[slot].KeyOffset, false\n", "	s.KeyOffset, s.Active = v.h.Slots[slot].KeyOffset, true\n"},

	// Repair.
	{"repair-clears-dirty-early", "a repair marks an image clean that it has not found to be", repair,
		"	case clean:\n		bits &^=", "	case clean || r.changed:\n		bits &^="},
	{"repair-leaks-of-dirty", "leaks of a crashed image are repaired though its refcounts mean nothing", repair,
		"	case rep.Dirty && rep.Corruptions > 0:\n		return ErrDirtyLeaks\n", ""},
	{"repair-dirty-not-set", "a power cut during a repair leaves wrong refcounts in an image that looks clean", repair,
		"	if r.dirtySet || h.Version", "	if true || r.dirtySet || h.Version"},
	{"repair-blind", "leaks are freed to which a damaged entry may refer", repair,
		"	if stored > found && r.blind ||", "	if"},
	{"repair-lowers-nothing", "refcounts that are too high stay", repair,
		"		if err := r.adjust(false); err != nil {", "		if err := r.sync(); err != nil {"},
	{"repair-pointer-first", "the header points to refcount blocks that are not durable", rebuild,
		"	if err := b.sync(); err != nil {\n		return err\n	}\n	pointer", "	pointer"},
	{"repair-rebuild-over-old", "new refcount structures overwrite what is in use", rebuild,
		"		if r.c.refs.get(i) != 0 || !likes(i) {", "		if r.c.refs.get(i) > 1 || !likes(i) {"},
	{"repair-copied-kept", "COPIED stays set on a cluster with two references", copied,
		"	case !p.set:\n		return word &^ copied\n", "	case !p.set:\n		return word\n"},
	{"repair-overlap-loses-data", "data is dropped where a subcluster says data and zeroes", mending,
		"		b &^= b << 32\n", "		b &^= b >> 32\n"},
	{"repair-overflow-exclusive", "a cluster with more references than can be counted is taken for exclusive", checkFacts,
		"	return c.refs.get(i) == n && !c.overflowed[i] && !c.tooMany\n", "	return c.refs.get(i) == n\n"},
	{"repair-snapshot-pointer-first", "the header points to a snapshot table that is not durable", snapTable,
		"	if err := r.sync(); err != nil {\n		return err\n	}\n	off := c.l", "	off := c.l"},
	{"undo-log-late", "an image is changed before its undo log is durable", undoLog,
		"	if err := u.log.Sync(); err != nil {\n		return fmt.Errorf(\"making the undo log durable: %w\", err)\n	}\n	u.pending = 0\n", "	u.pending = 0\n"},
	{"undo-any-image", "old metadata is put back into an image that was written to since", undoLog,
		"	if err := r.verify(); err != nil {\n		return 0, err\n	}\n", ""},

	// Dirty bitmaps.
	{"moved-under-a-neighbour", "a cluster is moved while another of its subclusters is overwritten in place", writer,
		"	if !reuse && im.hasNeighbours(e) {\n		return false, errZeroedLately\n	}\n", ""},
	{"bitmap-not-marked-new", "a write that allocates at once is not recorded in dirty bitmaps", writer,
		"	im.mark(span{off, n})\n	a.bound(", "	a.bound("},
	{"bitmap-not-armed-in-place", "a write in place does not wait until the disk says that bitmaps are in use", vectors,
		"	if err != nil || !im.bm.ready() || im.outstanding() {", "	if err != nil || im.outstanding() {"},
	{"bitmap-armed-too-late", "a disk changes before it is durable that its bitmaps are in use", bitmaps,
		"		if err := im.meta.Flush(ctx); err != nil {\n			return err\n		}\n		t, err := im.enter()", "		t, err := im.enter()"},
	{"bitmap-in-use-trusted", "a bitmap that a crash left in use is believed", bitmaps,
		"	if m.inUse() {\n		return nil, &BitmapInUseError{name}\n	}\n", ""},
	{"bitmap-delta-unseen", "what a session has marked does not show until it is saved", bitmaps,
		"		m.delta.OrInto(buf, at)\n", "		_ = m.delta\n"},
	{"bitmap-bits-not-durable", "a bitmap's table names clusters whose bits and counts are not durable", bitmapSave,
		"	return s.im.meta.SettleGated()\n", "	return nil\n"},
	{"bitmap-flags-with-tables", "a bitmap counts as saved before its table is durable", bitmapSave,
		"	if err := im.meta.SyncNow(); err != nil {\n		return err\n	}\n	for _, m := range b.enabled {\n		m.lo, m.hi = 0, 0",
		"	for _, m := range b.enabled {\n		m.lo, m.hi = 0, 0"},
	{"bitmap-stays-armed", "after bitmaps were saved the next change does not say again that they are in use", bitmapSave,
		"	b.armed.Store(false)\n	b.saves++\n", "	b.saves++\n"},
	{"bitmap-old-bits-lost", "saving a bitmap forgets what was marked before", bitmapSave,
		"	if err := im.readBits(entry, s.buf, 0); err != nil {\n		return err\n	}\n", "	clear(s.buf)\n"},
	{"bitmap-failed-save-leaks", "clusters of a bitmap that could not be saved leak", bitmapSave,
		"		return s.undo.unless(false, err)\n", "		return err\n"},
	{"bitmap-grows-dirty", "a part that a disk gains is marked without having been written", bitmapSave,
		"	format.TrimBitmap(buf[:valid], size, granularityBits)\n	clear(buf[valid:])\n", "	_ = valid\n"},
	{"bitmap-resized-in-silence", "bitmaps do not say that they are in use while the disk gets another size", bitmapSave,
		"	if err := im.bitmapsInUse(true); err != nil {", "	if err := im.meta.SyncNow(); err != nil {"},
	{"bitmap-directory-not-durable", "the header names a bitmap directory that is not durable", bitmapEdit,
		"	if err := im.meta.SettleGated(); err != nil {\n		return err\n	}\n	err := im.changeHeader(", "	err := im.changeHeader("},
	{"bitmap-old-kept", "what a changed bitmap no longer needs is never freed", bitmapEdit,
		"		im.meta.Refs.Retire(meta.Retired{ClusterRun: r, Cause: meta.CauseOther})\n", "		_ = r\n"},
	{"bitmap-failed-change-leaks", "clusters of a change of bitmaps that failed leak", bitmapEdit,
		"		err = e.undo.unless(err == nil, err)\n", ""},
	{"bitmap-mark-short", "the last granule of a range is not marked", bitmapMemory,
		"	b.markBits(first, last+1)\n", "	b.markBits(first, last)\n"},

	// Headers, resizing, amending.
	{"header-in-place", "extensions are overwritten while the header on the disk still needs them", rewrite,
		"		if p.cur[i] != p.want[i] && p.used.has(i) {\n", "		if p.cur[i] != p.want[i] && p.used.has(i) && i < 0 {\n"},
	{"header-sector-first", "sector 0 is switched before what it leads to is durable", rewrite,
		"		plan.add(SectorSize, p.want[SectorSize:p.end])\n		plan.add(0, p.want[:SectorSize])\n	default:",
		"		plan.add(0, p.want[:SectorSize])\n		plan.add(SectorSize, p.want[SectorSize:p.end])\n	default:"},
	{"header-detour-on-old", "the copy of the new extensions lies on the old ones", rewrite,
		"roundUp8(int64(max(p.used.end(), p.end) - start))", "roundUp8(int64(p.end - start))"},
	{"header-garbage-names", "what is left of an interrupted change is kept as names of features", header,
		"	if !slices.ContainsFunc(h.FeatureNames, nameless) {", "	if true || !slices.ContainsFunc(h.FeatureNames, nameless) {"},
	{"grow-size-first", "a disk has its new size before its new part reads as zeroes", resize,
		"	err := im.fillNew(ctx, old, size, mode, o.Progress)\n	if err == nil {\n", "	err := im.switchSize(size)\n	if err == nil {\n		err = im.fillNew(ctx, old, size, mode, o.Progress)\n	}\n	if err == nil {\n"},
	{"grow-shows-backing", "a longer backing file shows through the part that was added", resize,
		"	case im.backing == nil || im.backing.Size() <= first:\n", "	case true:\n"},
	{"grow-shows-rest", "what lay behind the end of the disk shows in the part that was added", resize,
		"	if err := im.zeroRest(ctx, span{old, first - old}, true); err != nil {", "	if err := im.zeroRest(ctx, span{old, 0}, true); err != nil {"},
	{"shrink-first", "data is cut off a disk that still has its old size", resize,
		"	if err := im.switchSize(size); err != nil {\n		return err\n	}\n	return halfDone(im.cutOff(context.WithoutCancel(ctx), old, size))\n",
		"	if err := im.cutOff(context.WithoutCancel(ctx), old, size); err != nil {\n		return halfDone(err)\n	}\n	return im.switchSize(size)\n"},
	{"shrink-frees-linked", "tables are freed that the L1 table on the disk still names", resize,
		"	zeroes := make([]byte, (last-first)*8)\n", "	zeroes := make([]byte, 0)\n"},
	{"row-in-two-pieces", "a long table is given clusters that are somebody else's", row,
		"	if err != nil || run.N == n {\n		return run, err\n	}\n", "	if err != nil || run.N <= n {\n		return ClusterRun{run.First, n}, err\n	}\n"},
	{"width-forgets-itself", "new refcounts do not count the clusters they lie in", rewidth,
		"			return errors.Join(refs.Release(ClusterRun{w.row.End(), surplus}), w.s.SettleGated())\n",
		"			return errors.Join(refs.Release(row), w.s.SettleGated())\n"},
	{"width-not-durable", "the header names refcounts that are not durable", rewidth,
		"	if err := w.s.SyncNow(); err != nil {\n		return giveBack(err)\n	}\n", ""},
	{"width-too-narrow", "a count is cut to fit a narrower width", rewidth,
		"		if v > most {\n", "		if v > most && v < 2 {\n"},
	{"expand-for-one", "a table that a snapshot shares gets clusters that only the disk is counted for", expand,
		"	for i := 1; i < owners; i++ {\n		if _, err := s.Refs.Raise(run); err != nil {", "	for i := 1; i < owners-1; i++ {\n		if _, err := s.Refs.Raise(run); err != nil {"},
	{"expand-over-snapshot", "zeroes are written over what a snapshot keeps, as stock QEMU does", expand,
		"host != 0 && e.Copied() && owners == 1 {", "host != 0 {"},
	{"downgrade-not-reloaded", "the dirty bit is cleared in a header that has no room for it", amend,
		"	err := a.im.changeHeader(fn)\n	if loadErr", "	err := a.im.changeHeader(fn)\n	if err != nil {\n		return err\n	}\n	if loadErr"},
	{"downgrade-keeps-copied", "flags of the disk are wrong after a downgrade dropped what a snapshot shared", amend,
		"	if err := im.fixActive(ctx); err != nil {\n		return halfDone(err)\n	}\n", ""},
	// External data files.
	{"data-file-not-synced", "pointers into the external data file are written before the data is durable", store,
		"	if err := s.syncData(g); err != nil {\n		return err\n	}\n", ""},
	{"data-file-sync-trusted", "data written to the data file before a failed sync counts as durable", store,
		"		s.data.log.lost(g.data)\n", ""},
	{"raw-zeroes-not-noted", "zeroes in a raw data file order no sync", datafile,
		"	err := storage.Zero(im.data, s.off, s.n, punch)\n	im.meta.ZeroedData(s.off, s.n)\n", "	err := storage.Zero(im.data, s.off, s.n, punch)\n"},
	{"raw-zeroed-by-mapping", "zeroes do not reach the raw data file", zero,
		"		if im.raw() {\n			return im.zeroRaw(ctx, span{off, n}, unmap", "		if im.raw() && n < 0 {\n			return im.zeroRaw(ctx, span{off, n}, unmap"},
	{"raw-written-before-mapped", "a crash leaves data in a raw data file that the guest does not see", datafile,
		"	if im.raw() {\n		return errNotMapped\n	}\n", ""},
	{"zeroes-in-doubt-forgotten", "zeroes of a failed sync are not made again", writelog,
		"		if err := l.rezero(f, buf, z); err != nil {\n			return err\n		}\n", "		_ = z\n"},
	{"stale-data-file-bytes", "old bytes of the data file show around a partial write", datafile,
		"			return off >= end\n", "			return off >= 0\n"},
	{"data-file-clusters-freed", "an offset in the data file is taken for a cluster of the image", writer,
		"	if lay.DataFile {\n		return // what", "	if lay.DataFile && lay.ClusterBits == 0 {\n		return // what"},

	// Compressed clusters.
	{"packed-not-counted", "a host cluster shared by compressed clusters counts too few", packer,
		"SetRefcount(rc.known[b].data, slot, count+1)", "SetRefcount(rc.known[b].data, slot, count)"},
	{"packed-count-not-ordered", "an entry is durable before the count of the cluster it shares", packer,
		"	rc.known[b].serves, rc.increased = true, true\n", "	rc.known[b].serves = true\n"},
	{"tail-outlives-its-cluster", "compressed data is appended to a cluster that is free", refcount,
		"	rc.leaveTail(c)\n", ""},
	{"width-overflows", "a narrow refcount overflows under many compressed clusters", packer,
		"count >= most", "count < 0"},
	{"second-cluster-not-counted", "the end of a compressed cluster lies in a free one", packer,
		"		rc.mark(ClusterRun{c + 1, 1})\n", ""},
	{"failed-pack-keeps-clusters", "clusters of a failed compressed write leak", packer,
		"	for _, e := range entries {\n		first", "	for _, e := range entries[len(entries):] {\n		first"},
	{"recompressed-leaks", "what a compressed cluster replaces is never freed", compress,
		"		if giveUp {\n			old.add", "		if giveUp && k < 0 {\n			old.add"},
	{"unpacked-buffer-in-use", "memory of an unpacked cluster is given to another one while somebody copies from it", unpacked,
		"!e.gone || e.users > 0 {", "!e.gone {"},
	{"unpacked-found-when-gone", "a cluster that left the cache is found by its entry, in memory that holds another one", unpacked,
		"			delete(c.byKey, old.key)\n", "			_ = old.key\n"},
	{"cuts-too-much", "the last cluster in use is cut off at close", row,
		"	most := int64(s.Layout.Offset(end))\n", "	most := int64(s.Layout.Offset(end - 1))\n"},
	{"no-unref-frees", "a cluster is freed that discard-no-unref keeps", zero,
		"unmap && !keep, punch: punch", "unmap && !(keep && body.n < 0), punch: punch"},

	// The state of a machine.
	{"state-on-the-disk", "the state of a machine lies where the disk is", vmState,
		"return (im.Size() + perTable - 1) / perTable * perTable", "return im.Size() / perTable * perTable"},
	{"state-is-marked", "a dirty bitmap records what lies behind the disk", vmState,
		"		k, err := im.write(ctx, p[done:]", "		im.mark(span{0, at.n})\n		k, err := im.write(ctx, p[done:]"},
	{"state-out-of-thin-air", "machine state that was never written reads as what happens to be there", vmState,
		"	clear(p[n:])\n", ""},

	{"state-copied-as-disk", "copying on write forgets the machine state beside what is written", writer,
		"	if off >= im.VMStateOffset() {\n		return n\n	}\n", ""},

	// Reads in place.
	{"data-from-the-cluster", "a read in place begins at the cluster's first byte", tryReader,
		"host: int64(run.Entry.HostOffset()) + in}", "host: int64(run.Entry.HostOffset()) + 0*in}"},
	{"data-unpacked", "a long read in place shows compressed clusters as zeroes", tryReader,
		"		return part{kind: partPacked, n: n, word: run.Entry}", "		return part{kind: partZero, n: n}"},
	{"data-joined", "a read in place takes for one what lies in two places on the host", tryReader,
		"p.kind == partData && next.host != p.host+p.n", "p.kind == partData && next.host < p.host"},

	// Work over whole images.
	{"hidden-not-in-data-file", "zeroes that an image is to hold itself are not in its raw data file", zero,
		"			return im.zeroRaw(ctx, span{off, n}, false, false)\n", "			return nil\n"},
	{"emptied-before-durable", "an image is emptied before its backing file holds what was committed", commit,
		"	if err := c.base.Flush(ctx); err != nil {\n", "	if err := ctx.Err(); err != nil {\n"},
	{"commit-forgets-zeroes", "zeroes of an image are not committed", commit,
		"	case commitZero:\n		err = c.base.WriteZeroes(ctx, p.off, p.n, block.ZeroUnmap)\n", ""},
	{"freed-before-unlinked", "an image that is emptied frees its clusters while its L1 table names them", resize,
		"	if err := im.meta.WriteNow(zeroes, im.hdr.L1Offset+format.HostOff(first*8)); err != nil {\n		return err\n	}\n	if err := im.meta.SyncNow(); err != nil {\n		return err\n	}\n	if err := tree.Drop(context.WithoutCancel(ctx), meta.CauseAlways); err != nil {\n		return err\n	}\n",
		"	if err := tree.Drop(context.WithoutCancel(ctx), meta.CauseAlways); err != nil {\n		return err\n	}\n	if err := im.meta.WriteNow(zeroes, im.hdr.L1Offset+format.HostOff(first*8)); err != nil {\n		return err\n	}\n"},
	{"rebase-shows-through", "a new backing file shows where the old one had ended", rebase,
		"return r.overlay.Hide(ctx, off, run.n)", "return r.overlay.WriteZeroes(ctx, off, run.n, 0)"},
	{"copied-by-host-unlinked", "clusters of a copy by the host that fails leak", copyin,
		"		return 0, a.undo(err)\n", "		return 0, err\n"},
	{"rebase-skips-zeroes", "a rebase does not look where the old backing file reads as zeroes", rebase,
		"		return rebaseOldZero, end, nil\n", "		return rebaseSkip, end, nil\n"},

	// Requests in pieces.
	{"pieces-written-again", "of a write in pieces to several places of the host each gets the first bytes", vectors,
		"im.overwriteV(c.Next(at.n), at.n, off, at.host)", "im.overwriteV(c.Peek(at.n), at.n, off, at.host)"},
	{"pieces-partly-in-place", "a write in pieces takes a cluster for written of which a part is not this image's alone", vectors,
		"		if im.inPlacePrefix(run, in, k) != k {", "		if im.inPlacePrefix(run, in, k) == 0 {"},
	{"bitmap-not-marked", "a write in place is not recorded in dirty bitmaps", vectors,
		"	case places != nil:\n		im.mark(span{off, n})\n", "	case places != nil:\n"},
	{"journal-full-in-place", "a write in place is acknowledged that builds on a change neither recorded nor durable", vectors,
		"	if err != nil || !im.bm.ready() || im.outstanding() {", "	if err != nil || !im.bm.ready() {"},
	{"pieces-unguarded", "a write in pieces does not look whether it is for the image's own metadata", vectors,
		"	if !im.lay.DataFile {\n		if err := im.meta.Guard(", "	if im.lay.DataFile {\n		if err := im.meta.Guard("},
}
