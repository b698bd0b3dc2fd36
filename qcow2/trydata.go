package qcow2

import (
	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// maxTryCrypt is how much of an encrypted disk is read or written at once: encryption takes longer than copying, and several
// processors can share it.
const maxTryCrypt = 64 << 10

// part is a range of guest bytes that are read in one way.
type part struct {
	kind partKind
	n    int64
	host int64 // where data begins
}

type partKind uint8

const (
	partData  partKind = iota // at one place on the host, unless encrypted as the guest reads it
	partZero                  // by the mapping alone
	partBelow                 // what the backing device has there, all of which it has
	partOther                 // compressed, impossible, or not known without reading metadata
)

// tryPart returns how the first of n bytes at off are read, as far as that is in memory.
func (im *Image) tryPart(off, n int64) part {
	p := im.tryPartOfRun(off, n)
	for p.n < n && (p.kind == partData || p.kind == partZero) {
		next := im.tryPartOfRun(off+p.n, n-p.n)
		if next.kind != p.kind || p.kind == partData && next.host != p.host+p.n {
			break
		}
		p.n += next.n
	}
	return p
}

// tryPartOfRun is tryPart within one run of the mapping, or a row of like subclusters.
func (im *Image) tryPartOfRun(off, n int64) part {
	run, in, err := im.lookup(off, n, false)
	if err != nil || run.Kind == format.KindCompressed {
		return part{partOther, n, 0}
	}
	n = min(n, run.N<<im.lay.ClusterBits-in)
	kind := im.lay.SubKind(run.Entry, run.Bitmap, 0)
	if im.lay.ExtendedL2 && run.N == 1 { // only a missing table makes longer runs there
		i := int(in / im.lay.SubclusterSize())
		kind = im.lay.SubKind(run.Entry, run.Bitmap, i)
		end := i + 1
		for end < im.lay.Subclusters() && im.lay.SubKind(run.Entry, run.Bitmap, end) == kind {
			end++
		}
		n = min(n, int64(end)*im.lay.SubclusterSize()-in)
	}
	switch kind {
	case format.SubNormal:
		return part{partData, n, int64(run.Entry.HostOffset()) + in}
	case format.SubZeroPlain, format.SubZeroAlloc:
		return part{partZero, n, 0}
	case format.SubUnallocated, format.SubReserved:
		if im.zeroRead(format.KindUnallocated, off) {
			return part{partZero, n, 0}
		}
		return part{partBelow, min(n, im.backing.Size()-off), 0}
	}
	return part{partOther, n, 0}
}

// tryReadPart fills p, which is all of a part, if that can be done without waiting.
func (im *Image) tryReadPart(p []byte, off int64, how part) error {
	switch how.kind {
	case partData:
		return im.tryReadHost(p, off, how.host)
	case partZero:
		clear(p)
		return nil
	case partBelow:
		return im.tryReadBacking(p, off)
	}
	return block.ErrWouldBlock
}

// TryReadDataAt is TryReadAt of a range that is all data, here or below. If it is all zero it returns block.ErrAllZero, if some of
// it is block.ErrMixed.
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
	if err := im.tryAllData(off, int64(len(p))); err != nil {
		return err
	}
	all := int64(len(p))
	for len(p) > 0 {
		how := im.tryPart(off, int64(len(p)))
		switch err := im.tryReadDataPart(p[:how.n], off, how); {
		case err == block.ErrAllZero && how.n < all:
			return block.ErrMixed
		case err != nil:
			return err
		}
		p, off = p[how.n:], off+how.n
	}
	return nil
}

// tryReadParts fills p if that can be done without waiting.
func (im *Image) tryReadParts(p []byte, off int64) error {
	for len(p) > 0 {
		how := im.tryPart(off, int64(len(p)))
		if err := im.tryReadPart(p[:how.n], off, how); err != nil {
			return err
		}
		p, off = p[how.n:], off+how.n
	}
	return nil
}

// tryAllData looks at the mapping alone, so that nothing is read in vain.
func (im *Image) tryAllData(off, n int64) error {
	zero, all := false, n
	for n > 0 {
		how := im.tryPart(off, n)
		switch {
		case how.kind == partOther:
			return block.ErrWouldBlock
		case how.kind == partZero && how.n == all:
			return block.ErrAllZero
		}
		zero = zero || how.kind == partZero
		off, n = off+how.n, n-how.n
	}
	if zero {
		return block.ErrMixed
	}
	return nil
}

func (im *Image) tryReadDataPart(p []byte, off int64, how part) error {
	if how.kind != partBelow {
		if err := im.tryReadPart(p, off, how); err != nil {
			return wouldBlock(err)
		}
		return nil
	}
	below, ok := im.backing.(block.DataDevice)
	if !ok {
		return block.ErrWouldBlock
	}
	return below.TryReadDataAt(p, off)
}
