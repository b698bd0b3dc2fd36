package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// ReadAt fills p from the disk at off.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	if err := block.CheckRange(off, int64(len(p)), im.Size()); err != nil {
		return err
	}
	return im.read(ctx, p, off)
}

// lookup returns the run at guest offset off and how far into its first cluster off lies.
func (im *Image) lookup(off, n int64, wait bool) (meta.Run, int64, error) {
	in := im.lay.GuestInCluster(format.GuestOff(off))
	limit := (in + n + im.lay.ClusterSize() - 1) >> im.lay.ClusterBits
	run, err := im.meta.Map.Lookup(im.cluster(off), limit, wait)
	return run, in, err
}

func (im *Image) cluster(off int64) meta.GuestCluster {
	return meta.GuestCluster(off >> im.lay.ClusterBits)
}

// runBytes returns how many of the next most bytes a run covers, from in bytes into its first cluster.
func (im *Image) runBytes(run meta.Run, in int64, most int) int {
	return int(im.runBytes64(run, in, int64(most)))
}

func (im *Image) read(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		run, in, err := im.lookup(off, int64(len(p)), true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", off, err)
		}
		n := im.runBytes(run, in, len(p))
		if run.Kind == format.KindCompressed {
			n, err = im.readCompressed(p, off, run.Entry)
			if err != nil {
				err = fmt.Errorf("reading guest offset %#x: %w", off, err)
			}
		} else {
			err = im.readRun(ctx, p[:n], off, in, run)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// readRun reads from one run; off is the guest offset, in the distance into the run.
func (im *Image) readRun(ctx context.Context, p []byte, off, in int64, run meta.Run) error {
	if im.lay.ExtendedL2 && run.Kind != format.KindCompressed {
		return im.readSubclusters(ctx, p, off, in, run)
	}
	switch run.Kind {
	case format.KindNormal:
		return im.readHost(p, off, int64(run.Entry.HostOffset())+in)
	case format.KindUnallocated:
		return im.readBacking(ctx, p, off)
	}
	clear(p)
	return nil
}

// readSubclusters reads from one cluster with extended L2 entries (or from a run of clusters that no table maps).
func (im *Image) readSubclusters(ctx context.Context, p []byte, off, in int64, run meta.Run) error {
	if run.N > 1 {
		return im.readBacking(ctx, p, off) // only a missing table makes runs here
	}
	for len(p) > 0 {
		kind, row := im.likeSubclusters(run, in)
		n := min(int64(len(p)), row)
		var err error
		switch kind {
		case format.SubNormal:
			err = im.readHost(p[:n], off, int64(run.Entry.HostOffset())+in)
		case format.SubUnallocated, format.SubReserved:
			err = im.readBacking(ctx, p[:n], off)
		case format.SubInvalid:
			err = &CorruptError{Reason: fmt.Sprintf("extended L2 entry of guest offset %#x", off)}
		default:
			clear(p[:n])
		}
		if err != nil {
			return err
		}
		p, off, in = p[n:], off+n, in+n
	}
	return nil
}

// likeSubclusters returns the kind of the subcluster that lies in bytes into a cluster, and how many bytes from there on are in a
// row of subclusters of that kind.
func (im *Image) likeSubclusters(run meta.Run, in int64) (format.SubclusterKind, int64) {
	size := im.lay.SubclusterSize()
	i := int(in / size)
	kind := im.lay.SubKind(run.Entry, run.Bitmap, i)
	end := i + 1
	for end < im.lay.Subclusters() && im.lay.SubKind(run.Entry, run.Bitmap, end) == kind {
		end++
	}
	return kind, int64(end)*size - in
}

// readBacking reads what no cluster of this image decides: the backing device, zeroes behind its end.
func (im *Image) readBacking(ctx context.Context, p []byte, off int64) error {
	if im.backing != nil && off < im.backing.Size() {
		n := min(int64(len(p)), im.backing.Size()-off)
		storage.Tell(im.file, storage.EventReadBackingAIO)
		if err := im.backing.ReadAt(ctx, p[:n], off); err != nil {
			return &belowError{err}
		}
		p = p[n:]
	}
	clear(p)
	return nil
}

// zeroRead reports whether the run reads as zeroes from guest offset off on, without asking the backing device.
func (im *Image) zeroRead(kind format.L2Kind, off int64) bool {
	switch kind {
	case format.KindZeroPlain, format.KindZeroAlloc:
		return true
	case format.KindUnallocated:
		return im.backing == nil || off >= im.backing.Size()
	}
	return false
}

// zeroPrefix returns how many of the n bytes at guest offset off, in bytes into a run, read as zeroes by the mapping alone.
func (im *Image) zeroPrefix(run meta.Run, off, in, n int64) int64 {
	if !im.lay.ExtendedL2 || run.N > 1 || run.Kind == format.KindCompressed {
		if im.zeroRead(run.Kind, off) {
			return n
		}
		return 0
	}
	return im.subPrefix(in, n, func(i int, at int64) bool {
		switch im.lay.SubKind(run.Entry, run.Bitmap, i) {
		case format.SubZeroPlain, format.SubZeroAlloc:
			return true
		case format.SubUnallocated, format.SubReserved:
			return im.zeroRead(format.KindUnallocated, off+at)
		}
		return false
	})
}

// inPlacePrefix returns how many of the n bytes that lie in bytes into a run can be overwritten without a change of the
// mapping.
func (im *Image) inPlacePrefix(run meta.Run, in, n int64) int64 {
	if !im.inPlace(run.Kind, run.Copied) {
		return 0
	}
	if !im.lay.ExtendedL2 {
		return n
	}
	return im.subPrefix(in, n, func(i int, _ int64) bool { return run.Bitmap.Alloc(i) })
}

// subPrefix returns how many of the n bytes that lie in bytes into a cluster belong to leading subclusters for which ok
// holds; at is how far the subcluster's first byte of interest is from the start.
func (im *Image) subPrefix(in, n int64, ok func(i int, at int64) bool) int64 {
	size := im.lay.SubclusterSize()
	for done := int64(0); done < n; {
		i := int((in + done) / size)
		if !ok(i, done) {
			return done
		}
		done = int64(i+1)*size - in
	}
	return n
}
