package qcow2

import (
	"context"
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
	if err := im.change(ctx, func() error { return im.write(ctx, p, off) }); err != nil {
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
	return block.CheckRange(off, n, im.size)
}

// change runs fn as a request that may change the mapping.
func (im *Image) change(ctx context.Context, fn func() error) error {
	if err := im.meta.Pressure(ctx); err != nil {
		return fmt.Errorf("making room in the metadata cache: %w", err)
	}
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	return fn()
}

// TryWriteAt overwrites allocated clusters in place if their mapping is in memory; otherwise block.ErrWouldBlock.
func (im *Image) TryWriteAt(p []byte, off int64) error {
	if err := im.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	t, ok := im.meta.Epochs.TryEnter()
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Epochs.Exit(t)
	run, in, err := im.lookup(off, int64(len(p)), false)
	if err != nil {
		return wouldBlock(err)
	}
	if !inPlace(run.Kind, run.Copied) || im.runBytes(run, in, len(p)) < len(p) {
		return block.ErrWouldBlock
	}
	return im.overwrite(p, off, int64(run.Entry.HostOffset())+in)
}

// inPlace reports whether a cluster is this image's alone and holds data, so that writing it changes no mapping.
func inPlace(kind format.L2Kind, copied bool) bool {
	return kind == format.KindNormal && copied
}

func (im *Image) write(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		run, in, err := im.lookup(off, int64(len(p)), true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", off, err)
		}
		var n int
		if inPlace(run.Kind, run.Copied) {
			n = im.runBytes(run, in, len(p))
			err = im.overwrite(p[:n], off, int64(run.Entry.HostOffset())+in)
		} else {
			n, err = im.allocate(ctx, p, off)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (im *Image) overwrite(p []byte, off, host int64) error {
	if err := im.meta.Guard(format.HostOff(host), int64(len(p))); err != nil {
		return fmt.Errorf("writing guest offset %#x: %w", off, err)
	}
	err := storage.WriteFull(im.data, p, host)
	im.meta.Wrote(host, int64(len(p))) // also after a failure, which may have written a part
	if err != nil {
		return fmt.Errorf("writing guest offset %#x at host offset %#x: %w", off, host, err)
	}
	return nil
}

// allocation is one step of a write that gives guest clusters their own host clusters.
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
}

// allocate writes the first part of p into clusters that cannot be overwritten in place: unallocated, zero, compressed or
// shared ones. It returns how much it wrote, which is nothing when another request has allocated meanwhile.
func (im *Image) allocate(ctx context.Context, p []byte, off int64) (int, error) {
	first, last := im.cluster(off), im.cluster(off+int64(len(p))-1)
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
	if more, err := a.plan(min(int64(last-first)+1, edit.N)); err != nil || !more {
		return 0, err
	}
	in := im.lay.GuestInCluster(format.GuestOff(off))
	n := int(min(int64(len(p)), a.n<<im.lay.ClusterBits-in))
	if err := a.store(ctx, p[:n], off, in); err != nil {
		return 0, a.undo(err)
	}
	a.link()
	return n, nil
}

// plan finds how many of the next most clusters go together and where. It reports false when the first one can be
// overwritten in place by now.
func (a *allocation) plan(most int64) (bool, error) {
	im := a.im
	e := a.edit.Entry(0)
	kind := im.lay.Kind(e)
	if kind == format.KindInvalid {
		return false, &CorruptError{Reason: fmt.Sprintf("L2 entry %#x of guest cluster %d", uint64(e), a.first)}
	}
	if inPlace(kind, e.Copied()) {
		return false, nil
	}
	reuse := im.mayReuseZeroed()
	if reuse && reusable(kind, e) {
		a.host = e.HostOffset()
		for a.n = 1; a.n < most; a.n++ {
			next := a.edit.Entry(a.n)
			if !reusable(im.lay.Kind(next), next) || next.HostOffset() != a.host+format.HostOff(a.n<<im.lay.ClusterBits) {
				break
			}
		}
		return true, im.meta.Guard(a.host, a.n<<im.lay.ClusterBits)
	}
	for a.n = 1; a.n < most; a.n++ {
		next := a.edit.Entry(a.n)
		k := im.lay.Kind(next)
		if inPlace(k, next.Copied()) || reuse && reusable(k, next) || k == format.KindInvalid {
			break
		}
	}
	run, virgin, err := im.meta.Refs.Alloc(a.n)
	if err != nil {
		return false, fmt.Errorf("allocating %d clusters for guest cluster %d: %w", a.n, a.first, err)
	}
	a.n, a.host, a.fresh, a.virgin = run.N, im.lay.Offset(run.First), true, virgin
	return true, nil
}

// mayReuseZeroed reports whether no request can be running that took a cluster for data before it was zeroed with its
// host cluster kept. Such a reader would see what is written there now before the mapping shows it, and such a writer
// would write over it. Until they have ended, writes to zeroed clusters go to new ones.
func (im *Image) mayReuseZeroed() bool { return im.meta.Epochs.Safe(im.zeroedAt.Load()) }

// reusable reports whether a zero cluster keeps a host cluster of its own that data can go to.
func reusable(kind format.L2Kind, e format.L2Entry) bool {
	return kind == format.KindZeroAlloc && e.Copied()
}

// store writes p to the new clusters with what the guest reads before and after it in the first and last of them, in one
// vectored write. Nothing points to the clusters yet, so a failure harms nobody.
func (a *allocation) store(ctx context.Context, p []byte, off, in int64) error {
	im := a.im
	after := a.n<<im.lay.ClusterBits - in - int64(len(p))
	host := int64(a.host)
	if in == 0 && after == 0 {
		return a.writeHost([][]byte{p}, host, off)
	}
	buf := im.cow.Get().(*[]byte)
	defer im.cow.Put(buf)
	head, tail := (*buf)[:in], (*buf)[in:in+after]
	needHead, err := a.copyOld(ctx, head, a.edit.Entry(0), off-in)
	if err != nil {
		return err
	}
	needTail, err := a.copyOld(ctx, tail, a.edit.Entry(a.n-1), off+int64(len(p)))
	if err != nil {
		return err
	}
	vec := make([][]byte, 0, 3)
	if needHead {
		vec = append(vec, head)
	} else {
		host += in
	}
	vec = append(vec, p)
	if needTail {
		vec = append(vec, tail)
	}
	return a.writeHost(vec, host, off)
}

// copyOld fills b with what the guest reads at off now, in a cluster with entry e. It reports false when that need not be
// written: b is empty, or zeroes where the host has zeroes already. The disk may end within b; zeroes follow.
func (a *allocation) copyOld(ctx context.Context, b []byte, e format.L2Entry, off int64) (bool, error) {
	im := a.im
	if len(b) == 0 {
		return false, nil
	}
	if im.zeroRead(im.lay.Kind(e), off) {
		clear(b)
		return !a.virgin, nil
	}
	inside := max(min(int64(len(b)), im.size-off), 0)
	clear(b[inside:])
	if err := im.read(ctx, b[:inside], off); err != nil {
		return false, fmt.Errorf("copying on write: %w", err)
	}
	return true, nil
}

func (a *allocation) writeHost(vec [][]byte, host, off int64) error {
	err := storage.WriteVFull(a.im.data, vec, host)
	a.im.meta.Wrote(int64(a.host), a.n<<a.im.lay.ClusterBits)
	if err != nil {
		return fmt.Errorf("writing guest offset %#x at host offset %#x: %w", off, host, err)
	}
	return nil
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

// link points the mapping to the new clusters and lets go of what it pointed to.
func (a *allocation) link() {
	im := a.im
	var old retireList
	a.edit.Put(0, a.n, func(k int64, e format.L2Entry) format.L2Entry {
		if a.fresh {
			old.add(im.lay, e, false)
		}
		return format.MakeL2(a.host+format.HostOff(k<<im.lay.ClusterBits), true)
	})
	old.retire(im.meta.Refs)
}

// retireList gathers the references that entries held, to be given up after the entries have changed.
type retireList []meta.Retired

func (l *retireList) add(lay format.Layout, e format.L2Entry, punch bool) {
	r := meta.Retired{Punch: punch}
	switch lay.Kind(e) {
	case format.KindNormal, format.KindZeroAlloc:
		r.First, r.N = lay.Cluster(e.HostOffset()), 1
	case format.KindCompressed:
		first, last := lay.CompressedClusters(e)
		r.First, r.N = first, int64(last-first)+1
	default:
		return
	}
	if n := len(*l); n > 0 && (*l)[n-1].End() == r.First && (*l)[n-1].Punch == punch {
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
