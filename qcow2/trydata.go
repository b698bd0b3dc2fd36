package qcow2

import (
	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// maxTryCrypt is how much of an encrypted disk is read or written at once: encryption takes longer than copying, and several
// processors can share it.
const maxTryCrypt = 64 << 10

// TryReadDataAt is TryReadAt of a range whose clusters all hold data, here or below; otherwise block.ErrWouldBlock.
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

func (im *Image) tryReadDataBelow(p []byte, off int64) error {
	below, ok := im.backing.(block.DataDevice)
	if !ok || off+int64(len(p)) > im.backing.Size() {
		return block.ErrWouldBlock
	}
	return below.TryReadDataAt(p, off)
}
