package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// maxAllocation bounds how many guest bytes one step of an allocating write covers, and with it how much of the disk one
// request keeps to itself and how large its buffers get.
const maxAllocation = 4 << 20

// WriteAt writes p to the disk at off.
func (im *Image) WriteAt(ctx context.Context, p []byte, off int64, flags block.WriteFlags) error {
	if err := im.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	if err := im.writeAll(ctx, p, off); err != nil {
		return err
	}
	if flags&block.WriteFUA != 0 {
		return im.Flush(ctx)
	}
	return nil
}

func (im *Image) checkWrite(off, n int64) error {
	if im.meta.Epochs.Closed() {
		return block.ErrClosed
	}
	if im.readOnly {
		return block.ErrReadOnly
	}
	if err := im.meta.Corrupt(); err != nil {
		return err
	}
	return block.CheckRange(off, n, im.Size())
}

// change runs fn as a request that may change the mapping of a range. A request of several steps enters once for each, and
// between two of them the disk may have become smaller or the image read-only. fn may be run twice.
func (im *Image) change(ctx context.Context, s span, fn func() error) error {
	return im.changeMapping(ctx, s, func() error {
		im.mark(s)
		return fn()
	})
}

// changeMapping is change for a step that marks what it changes in the dirty bitmaps itself.
func (im *Image) changeMapping(ctx context.Context, s span, fn func() error) error {
	return im.changeChecked(ctx, func() error { return im.checkWrite(s.off, s.n) }, fn)
}

// changeChecked is changeMapping for a step that has a check of its own.
func (im *Image) changeChecked(ctx context.Context, check, fn func() error) error {
	for {
		err := im.changeOnce(ctx, check, fn)
		switch {
		case errors.Is(err, meta.ErrNotMarked):
			err = im.meta.MarkDirty()
		case errors.Is(err, errNotArmed):
			err = im.armBitmaps(ctx)
		case errors.Is(err, errZeroedLately):
			err = im.awaitZeroed()
		case err == nil:
			return im.keep(ctx)
		default:
			return im.judge(err)
		}
		if err != nil {
			return err
		}
	}
}

func (im *Image) changeOnce(ctx context.Context, check, fn func() error) error {
	if err := im.meta.Pressure(ctx); err != nil {
		return fmt.Errorf("making room in the metadata cache: %w", err)
	}
	// The epoch can move on past the last zeroing only while this request is not in it; see mayReuseZeroed.
	im.mayReuseZeroed()
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	if err := check(); err != nil {
		return err
	}
	if !im.bm.ready() {
		return errNotArmed
	}
	return fn()
}

// TryWriteAt overwrites allocated clusters in place, or writes to one that holds nothing yet, if all the metadata that takes
// is in memory and nobody is in the way; otherwise block.ErrWouldBlock.
func (im *Image) TryWriteAt(p []byte, off int64) error { return im.tryWrite(p, off, true) }

// TryOverwriteAt is TryWriteAt where the mapping need not be changed.
func (im *Image) TryOverwriteAt(p []byte, off int64) error {
	return im.tryWrite(p, off, false)
}

func (im *Image) tryWrite(p []byte, off int64, mayAllocate bool) error {
	one := im.ones.Get().(*[1][]byte)
	one[0] = p
	err := im.tryWriteV(one[:], off, mayAllocate)
	one[0] = nil // the pool keeps nothing of the caller's
	im.ones.Put(one)
	return err
}

// inPlace reports whether a cluster is this image's alone and holds data, so that writing it changes no mapping.
func (im *Image) inPlace(kind format.L2Kind, copied bool) bool {
	return kind == format.KindNormal && (copied || im.lay.DataFile) // a data file's clusters are never shared
}

// write writes p and returns how much of it was written before an error.
func (im *Image) write(ctx context.Context, p []byte, off int64) (done int, err error) {
	for len(p) > 0 {
		run, in, err := im.lookup(off, int64(len(p)), true)
		if err != nil {
			return done, fmt.Errorf("looking up guest offset %#x: %w", off, err)
		}
		n := int(im.inPlacePrefix(run, in, int64(im.runBytes(run, in, len(p)))))
		if n > 0 {
			err = im.overwrite(p[:n], off, int64(run.Entry.HostOffset())+in)
		} else {
			n, err = im.allocate(ctx, p, off)
		}
		if err != nil {
			return done, err
		}
		p, off, done = p[n:], off+int64(n), done+n
	}
	return done, nil
}

// allocation is one step of a write that changes the mapping: guest clusters, or subclusters of one, get a place.
type allocation struct {
	im   *Image
	edit meta.Edit
	// clusters [first, first+n) of the guest, which share one fate
	first meta.GuestCluster
	n     int64
	host  format.HostOff // where they go
	fresh bool           // host is newly allocated and goes back on failure
	// virgin: host reads as zeroes already.
	virgin bool
	// from and to bound what is written, in bytes from the start of the first cluster: the data, and what the guest reads
	// before and after it in the units that it covers in part.
	from, to int64
}

// allocate writes the first part of p into clusters that cannot be overwritten in place: unallocated, zero, compressed or
// shared ones. It returns how much it wrote, which is nothing when another request has allocated meanwhile.
func (im *Image) allocate(ctx context.Context, p []byte, off int64) (int, error) {
	c := block.NewCursor([][]byte{p})
	defer c.Close()
	n, err := im.allocateV(ctx, &c, off)
	return int(n), err
}

// allocateV is allocate for what follows a cursor, which stays where it is.
func (im *Image) allocateV(ctx context.Context, c *block.Cursor, off int64) (int64, error) {
	first, last := im.cluster(off), im.cluster(off+c.Left()-1)
	last = min(last, first+meta.GuestCluster(max(maxAllocation>>im.lay.ClusterBits, 1)-1))
	held, err := im.meta.Ranges.Lock(ctx, uint64(first), uint64(last))
	if err != nil {
		return 0, err
	}
	defer im.meta.Ranges.Unlock(held)
	edit, err := im.meta.Map.Prepare(first)
	if err != nil {
		return 0, fmt.Errorf("preparing to map guest offset %#x: %w", off, err)
	}
	defer edit.Done()

	a := allocation{im: im, edit: edit, first: first}
	in := im.lay.GuestInCluster(format.GuestOff(off))
	if more, err := a.plan(min(int64(last-first)+1, edit.N), in); err != nil || !more {
		return 0, err
	}
	n := min(c.Left(), a.n<<im.lay.ClusterBits-in)
	a.bound(in, in+n)
	if err := a.store(ctx, c.Peek(n), n, off, in); err != nil {
		return 0, a.undo(err)
	}
	a.link()
	return n, nil
}

// tryAllocateV is allocateV for n bytes within one cluster that holds nothing, neither here nor below. It returns
// block.ErrWouldBlock, and has changed nothing, where that would take waiting or reading.
func (im *Image) tryAllocateV(bufs [][]byte, n, off int64) error {
	c := im.cluster(off)
	in := im.lay.GuestInCluster(format.GuestOff(off))
	whole := im.lay.ClusterSize() - in
	if n > whole || im.lay.ExtendedL2 || im.lay.DataFile || im.meta.Crowded() {
		return block.ErrWouldBlock
	}
	if im.backing != nil && off-in < im.backing.Size() {
		return block.ErrWouldBlock
	}
	held, ok := im.meta.Ranges.TryLock(uint64(c), uint64(c))
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Ranges.Unlock(held)
	edit, ok := im.meta.Map.TryPrepare(c)
	if !ok {
		return block.ErrWouldBlock
	}
	defer edit.Done()
	if kind := im.lay.Kind(edit.Entry(0).Word); kind != format.KindUnallocated && kind != format.KindZeroPlain {
		return block.ErrWouldBlock
	}
	host, virgin, ok := im.meta.Refs.TryAlloc()
	if !ok {
		return block.ErrWouldBlock
	}
	a := allocation{im: im, edit: edit, first: c, n: 1, host: im.lay.Offset(host), fresh: true, virgin: virgin && im.crypt == nil}
	im.mark(span{off, n})
	a.bound(in, in+n)
	if err := a.store(context.Background(), bufs, n, off, in); err != nil {
		return a.undo(err)
	}
	a.link()
	return nil
}

// plan finds how many of the next most clusters go together and where. It reports false when the first one can be
// overwritten in place by now, from in bytes into it.
func (a *allocation) plan(most, in int64) (bool, error) {
	im := a.im
	e := a.edit.Entry(0)
	kind := im.lay.Kind(e.Word)
	if kind == format.KindInvalid || im.lay.ExtendedL2 && !im.lay.ValidBitmap(e.Word, e.Bitmap) {
		return false, im.invalidEntry(e, a.first)
	}
	run := meta.Run{Kind: kind, Copied: e.Word.Copied(), Entry: e.Word, Bitmap: e.Bitmap, N: 1}
	if im.inPlacePrefix(run, in, 1) > 0 {
		return false, nil
	}
	if im.lay.DataFile {
		return true, a.placeInData(most, in)
	}
	reuse := im.mayReuseZeroed()
	if reuse && im.reusable(e) {
		a.host = e.Word.HostOffset()
		for a.n = 1; a.n < most; a.n++ {
			next := a.edit.Entry(a.n)
			if !im.reusable(next) || next.Word.HostOffset() != a.host+format.HostOff(a.n<<im.lay.ClusterBits) {
				break
			}
		}
		return true, im.meta.Guard(a.host, a.n<<im.lay.ClusterBits)
	}
	if !reuse && im.hasNeighbours(e) {
		return false, errZeroedLately
	}
	for a.n = 1; a.n < most && im.needsCluster(a.edit.Entry(a.n), reuse); a.n++ {
	}
	alloc, virgin, err := im.meta.Refs.Alloc(a.n)
	if err != nil {
		return false, fmt.Errorf("allocating %d clusters for guest cluster %d: %w", a.n, a.first, err)
	}
	a.n, a.host, a.fresh = alloc.N, im.lay.Offset(alloc.First), true
	a.virgin = virgin && im.crypt == nil // zeroes on the host are noise to the guest of an encrypted image
	return true, nil
}

func (im *Image) invalidEntry(e meta.Entry, c meta.GuestCluster) error {
	return &CorruptError{Reason: fmt.Sprintf("L2 entry %#x %#x of guest cluster %d", uint64(e.Word), uint64(e.Bitmap), c)}
}

// mayReuseZeroed reports whether no request can be running that took a cluster for data before it was zeroed with its
// host cluster kept. Such a reader would see what is written there now before the mapping shows it, and such a writer
// would write over it. Until they have ended, writes to zeroed clusters go to new ones.
func (im *Image) mayReuseZeroed() bool { return im.meta.Epochs.Safe(im.zeroedAt.Load()) }

// reusable reports whether a cluster has a host cluster of its own that data can go to with a change of the entry: a zero
// cluster, or one some of whose subclusters hold no data.
func (im *Image) reusable(e meta.Entry) bool {
	if !e.Word.Copied() {
		return false
	}
	kind := im.lay.Kind(e.Word)
	return kind == format.KindZeroAlloc || im.lay.ExtendedL2 && kind == format.KindNormal && im.lay.ValidBitmap(e.Word, e.Bitmap)
}

// needsCluster reports whether a cluster must get a new host cluster to be written.
func (im *Image) needsCluster(e meta.Entry, reuse bool) bool {
	kind := im.lay.Kind(e.Word)
	switch {
	case kind == format.KindInvalid:
		return false
	case reuse && im.reusable(e):
		return false
	case im.lay.ExtendedL2:
		return im.lay.ValidBitmap(e.Word, e.Bitmap) && !im.hasNeighbours(e)
	}
	return !im.inPlace(kind, e.Word.Copied())
}

// hasNeighbours reports whether some subclusters of a cluster hold data that is overwritten in place. Nobody may move such a
// cluster, as long as requests run: a copy of it misses what they write where it was.
func (im *Image) hasNeighbours(e meta.Entry) bool {
	return im.lay.ExtendedL2 && im.lay.Kind(e.Word) == format.KindNormal && e.Word.Copied() && e.Bitmap.AnyAlloc()
}

// bound widens the data, bytes [from, to) from the start of the first cluster, to what must be written with it. A cluster
// without subclusters is written whole. So is one that leaves data behind: a shared or a compressed one. Otherwise the
// subclusters at either end are filled up, unless they hold data already.
func (a *allocation) bound(from, to int64) {
	im := a.im
	cs, unit := im.lay.ClusterSize(), im.lay.SubclusterSize()
	first, last := a.edit.Entry(0), a.edit.Entry(a.n-1)
	a.from = from / unit * unit
	a.to = (to + unit - 1) / unit * unit
	if im.lay.DataFile { // it ends where the disk does
		a.to = max(to, min(a.to, im.Size()-int64(a.first)<<im.lay.ClusterBits))
	}
	if !im.lay.ExtendedL2 {
		return
	}
	if a.leavesData(first) {
		a.from = 0
	} else if !a.fresh && first.Bitmap.Alloc(int(from/unit)) {
		a.from = from
	}
	if a.leavesData(last) {
		a.to = a.n * cs
	} else if end := (to - 1) % cs / unit; !a.fresh && last.Bitmap.Alloc(int(end)) {
		a.to = to
	}
}

// leavesData reports whether the cluster moves and has data that must move with it.
func (a *allocation) leavesData(e meta.Entry) bool {
	kind := a.im.lay.Kind(e.Word)
	return a.fresh && (kind == format.KindNormal || kind == format.KindCompressed)
}

// store writes n bytes with what the guest reads around them between from and to, in one vectored write. Nothing points to what
// it overwrites, so a failure harms nobody.
func (a *allocation) store(ctx context.Context, bufs [][]byte, n, off, in int64) error {
	im := a.im
	end := in + n
	if a.from == in && a.to == end {
		return im.writeHostV(bufs, off, int64(a.host)+in)
	}
	buf := im.cow.Get().(*[]byte)
	defer im.cow.Put(buf)
	before, after := in-a.from, a.to-end
	head, tail := (*buf)[:before], (*buf)[before:before+after]
	needHead, err := a.copyOld(ctx, head, off-before)
	if err != nil {
		return err
	}
	needTail, err := a.copyOld(ctx, tail, off+n)
	if err != nil {
		return err
	}
	vec, at := make([][]byte, 0, len(bufs)+2), in
	if needHead {
		vec, at = append(vec, head), a.from
	}
	vec = append(vec, bufs...)
	if needTail {
		vec = append(vec, tail)
	}
	if needHead || needTail {
		storage.Tell(im.file, storage.EventCOWWrite)
	}
	return im.writeHostV(vec, off-in+at, int64(a.host)+at)
}

// copyOld fills b with what the guest reads at off now. It reports false when that need not be written: b is empty, or
// zeroes where the host has zeroes already. The disk may end within b; zeroes follow.
func (a *allocation) copyOld(ctx context.Context, b []byte, off int64) (bool, error) {
	im := a.im
	inside := im.readable(off, int64(len(b)))
	zero, err := im.partIsZero(span{off, inside})
	if err != nil || zero && a.virgin {
		return false, err
	}
	if zero {
		clear(b)
		return len(b) > 0, nil
	}
	clear(b[inside:])
	storage.Tell(im.file, storage.EventCOWRead)
	if err := im.read(ctx, b[:inside], off); err != nil {
		return false, fmt.Errorf("copying on write: %w", err)
	}
	return true, nil
}

// readable returns how many of n bytes at off the mapping decides: those before the end of the disk, or all where the state
// of a machine lies.
func (im *Image) readable(off, n int64) int64 {
	if off >= im.VMStateOffset() {
		return n
	}
	return max(min(n, im.Size()-off), 0)
}

// undo gives newly allocated clusters back after err.
func (a *allocation) undo(err error) error {
	if !a.fresh {
		return err
	}
	run := meta.ClusterRun{First: a.im.lay.Cluster(a.host), N: a.n}
	if undoErr := a.im.meta.Refs.Release(run); undoErr != nil {
		return fmt.Errorf("%w (and giving back its clusters: %w)", err, undoErr)
	}
	return err
}

// link points the mapping to what was written and lets go of what it pointed to.
func (a *allocation) link() {
	im := a.im
	var old retireList
	a.edit.Put(0, a.n, func(k int64, e meta.Entry) meta.Entry {
		if a.fresh {
			old.add(im.lay, e.Word, meta.CauseOther)
		}
		entry := im.dataEntry(a.host + format.HostOff(k<<im.lay.ClusterBits))
		if im.lay.ExtendedL2 {
			entry.Bitmap = a.bitmap(k, e)
		}
		return entry
	})
	old.retire(im.meta.Refs)
}

// dataEntry returns the entry of a cluster at host that this image has for itself, all of it data.
func (im *Image) dataEntry(host format.HostOff) meta.Entry {
	e := meta.Entry{Word: format.MakeL2(host, true)}
	if im.lay.ExtendedL2 {
		e.Bitmap = format.BitmapAllAlloc
	}
	return e
}

// bitmap returns the new bitmap of the k-th cluster: what was written is data, the rest stays what it was.
func (a *allocation) bitmap(k int64, old meta.Entry) format.L2Bitmap {
	cs, unit := a.im.lay.ClusterSize(), a.im.lay.SubclusterSize()
	from, to := max(a.from-k*cs, 0), min(a.to-k*cs, cs)
	return old.Bitmap.SetAlloc(int(from/unit), int((to+unit-1)/unit))
}

// retireList gathers the references that entries held, to be given up after the entries have changed.
type retireList []meta.Retired

func (l *retireList) add(lay format.Layout, e format.L2Entry, cause meta.Cause) {
	if lay.DataFile {
		return // what lies there is not counted
	}
	r := meta.Retired{Cause: cause}
	switch lay.Kind(e) {
	case format.KindNormal, format.KindZeroAlloc:
		r.First, r.N = lay.Cluster(e.HostOffset()), 1
	case format.KindCompressed:
		first, last := lay.CompressedClusters(e)
		r.First, r.N = first, int64(last-first)+1
	default:
		return
	}
	if n := len(*l); n > 0 && (*l)[n-1].End() == r.First && (*l)[n-1].Cause == cause {
		(*l)[n-1].N += r.N
		return
	}
	*l = append(*l, r)
}

func (l retireList) retire(refs *meta.Refcounts) {
	for _, r := range l {
		refs.Retire(r)
	}
}
