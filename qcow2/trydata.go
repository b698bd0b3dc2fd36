package qcow2

import (
	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// maxTryCrypt is how much of an encrypted disk is read or written at once: encryption takes longer than copying, and several
// processors can share it.
const maxTryCrypt = 64 << 10

// TryReadDataAt is TryReadAt of a range whose clusters all hold data, here or below. If all are known to be zero it returns
// block.ErrAllZero, otherwise block.ErrWouldBlock.
func (im *Image) TryReadDataAt(p []byte, off int64) error {
	t, ok := im.tryEnter()
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Epochs.Exit(t)
	if im.crypt != nil && len(p) > maxTryCrypt {
		return block.ErrWouldBlock
	}
	if err := block.CheckRange(off, int64(len(p)), im.Size()); err != nil {
		return err
	}
	if im.tryZero(off, int64(len(p))) {
		return block.ErrAllZero
	}
	for len(p) > 0 {
		run, in, err := im.lookup(off, int64(len(p)), false)
		if err != nil || im.lay.ExtendedL2 {
			return block.ErrWouldBlock
		}
		n := im.runBytes(run, in, len(p))
		switch run.Kind {
		case format.KindNormal:
			err = im.tryReadHost(p[:n], off, int64(run.Entry.HostOffset())+in)
		case format.KindUnallocated:
			err = im.tryReadDataBelow(p[:n], off)
		default:
			err = block.ErrWouldBlock
		}
		if err != nil {
			return wouldBlock(err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// tryZero reports whether a range is zero as far as the mapping tells that is in memory.
func (im *Image) tryZero(off, n int64) bool {
	for n > 0 {
		run, in, err := im.lookup(off, n, false)
		if err != nil {
			return false
		}
		part := min(n, run.N<<im.lay.ClusterBits-in)
		if im.zeroPrefix(run, off, in, part) < part {
			return false
		}
		off, n = off+part, n-part
	}
	return true
}

func (im *Image) tryReadDataBelow(p []byte, off int64) error {
	below, ok := im.backing.(block.DataDevice)
	if !ok || off+int64(len(p)) > im.backing.Size() {
		return block.ErrWouldBlock
	}
	return below.TryReadDataAt(p, off)
}
