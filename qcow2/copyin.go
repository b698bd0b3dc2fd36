package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

var (
	_ block.HostFiler   = (*Image)(nil)
	_ block.RangeCopier = (*Image)(nil)
)

// HostFile returns the file that guest data lies in, nil for an encrypted image: what lies there is not what the guest
// reads.
func (im *Image) HostFile() storage.File {
	if im.crypt != nil {
		return nil
	}
	return im.data
}

// CopyFrom writes n bytes of src to the disk at off, without seeing them, into clusters that get new places. It is for whole
// clusters, and leaves everything else to WriteAt, with storage.ErrNotSupported.
func (im *Image) CopyFrom(ctx context.Context, off int64, src storage.File, srcOff, n int64, clone bool) error {
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	for n > 0 {
		done := int64(0)
		err := im.change(ctx, span{off, n}, func() (err error) {
			if err := im.wholeClusters(span{off, n}); err != nil || n&(im.lay.ClusterSize()-1) != 0 || im.crypt != nil || im.lay.DataFile {
				return storage.ErrNotSupported
			}
			done, err = im.copyIn(ctx, off, src, srcOff, n, clone)
			return err
		})
		if err != nil {
			return err
		}
		off, srcOff, n = off+done, srcOff+done, n-done
	}
	return nil
}

// copyIn is allocate, for bytes that the kernel moves. It returns how many it moved.
func (im *Image) copyIn(ctx context.Context, off int64, src storage.File, srcOff, n int64, clone bool) (int64, error) {
	first, last := im.cluster(off), im.cluster(off+n-1)
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
	more, err := a.plan(min(int64(last-first)+1, edit.N), 0)
	if err != nil {
		return 0, err
	}
	if !more {
		return 0, storage.ErrNotSupported // it has a place, and is overwritten there
	}
	a.from, a.to = 0, a.n<<im.lay.ClusterBits
	if err := im.copyHost(off, int64(a.host), src, srcOff, a.to, clone); err != nil {
		return 0, a.undo(err)
	}
	a.link()
	return a.to, nil
}

// copyHost is writeHost for bytes that the kernel moves.
func (im *Image) copyHost(off, host int64, src storage.File, srcOff, n int64, clone bool) error {
	if err := im.checkPlace(off, host); err != nil {
		return err
	}
	err := storage.CopyRange(im.data, host, src, srcOff, n, clone)
	im.wroteHost(host, n)
	if err != nil {
		return fmt.Errorf("copying guest offset %#x to host offset %#x: %w", off, host, err)
	}
	return nil
}
