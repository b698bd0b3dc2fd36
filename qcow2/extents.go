package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// Extents tells where the bytes of [off, off+n) come from, see block.Device.
func (im *Image) Extents(ctx context.Context, off, n int64, fn func(block.Extent) bool) error {
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	if err := block.CheckRange(off, n, im.Size()); err != nil {
		return err
	}
	if im.crypt != nil {
		fn = withoutHost(fn)
	}
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		run, in, err := im.lookup(off, n, true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", off, err)
		}
		length := min(n, run.N<<im.lay.ClusterBits-in)
		more, err := im.runExtents(ctx, off, length, in, run, fn)
		if err != nil || !more {
			return err
		}
		off, n = off+length, n-length
	}
	return nil
}

// withoutHost takes the places on the host off what this image tells of itself: what lies there is not what the guest
// reads.
func withoutHost(fn func(block.Extent) bool) func(block.Extent) bool {
	return func(x block.Extent) bool {
		if x.Depth == 0 {
			x.HasHost, x.Host, x.File = false, 0, ""
		}
		return fn(x)
	}
}

// runExtents reports one run, in bytes into its first cluster.
func (im *Image) runExtents(ctx context.Context, off, n, in int64, run meta.Run, fn func(block.Extent) bool) (bool, error) {
	if !im.lay.ExtendedL2 || run.Kind == format.KindCompressed || run.N > 1 {
		return im.kindExtents(ctx, off, n, in, run.Entry, im.lay.SubKind(run.Entry, run.Bitmap, 0), fn)
	}
	size := im.lay.SubclusterSize()
	for n > 0 {
		i := int(in / size)
		kind := im.lay.SubKind(run.Entry, run.Bitmap, i)
		part := min(n, int64(i+1)*size-in)
		more, err := im.kindExtents(ctx, off, part, in, run.Entry, kind, fn)
		if err != nil || !more {
			return more, err
		}
		off, n, in = off+part, n-part, in+part
	}
	return true, nil
}

func (im *Image) kindExtents(ctx context.Context, off, n, in int64, e format.L2Entry, kind format.SubclusterKind,
	fn func(block.Extent) bool) (bool, error) {
	x := block.Extent{Off: off, Len: n, Allocated: true}
	switch kind {
	case format.SubReserved: // what the layers below do not decide are zeroes that have a place on the host
		rest := block.Extent{Zero: true, HasHost: true, Host: int64(e.HostOffset()) + in - off, File: im.inFile}
		return im.backingExtents(ctx, off, n, rest, fn)
	case format.SubUnallocated:
		return im.backingExtents(ctx, off, n, block.Extent{Zero: true}, fn)
	case format.SubNormal:
		x.Data, x.HasHost, x.Host, x.File = true, true, int64(e.HostOffset())+in, im.inFile
	case format.SubCompressed:
		x.Data, x.Compressed = true, true
	case format.SubZeroAlloc:
		x.Zero, x.HasHost, x.Host, x.File = true, true, int64(e.HostOffset())+in, im.inFile
	default:
		x.Zero = true
	}
	return fn(x), nil
}

// backingExtents reports what the devices below say of a range that this image does not allocate. Behind their end this
// image is the last layer: rest is how it looks there, its Host still without the guest offset.
func (im *Image) backingExtents(ctx context.Context, off, n int64, rest block.Extent, fn func(block.Extent) bool) (bool, error) {
	inside := int64(0)
	if im.backing != nil {
		inside = max(min(n, im.backing.Size()-off), 0)
	}
	if inside > 0 {
		more := true
		err := im.backing.Extents(ctx, off, inside, func(x block.Extent) bool {
			x.Depth++
			more = fn(x)
			return more
		})
		if err != nil || !more {
			return false, err
		}
	}
	if inside == n {
		return true, nil
	}
	rest.Off, rest.Len = off+inside, n-inside
	if rest.HasHost {
		rest.Host += rest.Off
	}
	return fn(rest), nil
}
