package qcow2

import (
	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// maxTryCrypt is how much of an encrypted disk is read or written at once: encryption takes longer than copying, and several
// processors can share it.
const maxTryCrypt = 64 << 10

// longCrypt reports whether encryption makes n bytes too much to be read or written at once.
func (im *Image) longCrypt(n int64) bool { return im.crypt != nil && n > maxTryCrypt }

// part is a range of guest bytes that are read in one way.
type part struct {
	kind partKind
	n    int64
	host int64          // where data begins
	word format.L2Entry // of a compressed cluster
}

type partKind uint8

const (
	partData   partKind = iota // at one place on the host, unless encrypted as the guest reads it
	partZero                   // by the mapping alone
	partBelow                  // what the backing device has there, all of which it has
	partPacked                 // of one compressed cluster
	partOther                  // impossible, or not known without reading metadata
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
	if err != nil {
		return part{kind: partOther, n: n}
	}
	n = im.runBytes64(run, in, n)
	kind := im.lay.SubKind(run.Entry, run.Bitmap, 0)
	if im.lay.ExtendedL2 && run.N == 1 && kind != format.SubCompressed { // only a missing table makes longer runs there
		var row int64
		kind, row = im.likeSubclusters(run, in)
		n = min(n, row)
	}
	switch kind {
	case format.SubNormal:
		return part{kind: partData, n: n, host: int64(run.Entry.HostOffset()) + in}
	case format.SubZeroPlain, format.SubZeroAlloc:
		return part{kind: partZero, n: n}
	case format.SubCompressed:
		return part{kind: partPacked, n: n, word: run.Entry}
	case format.SubUnallocated, format.SubReserved:
		if im.zeroRead(format.KindUnallocated, off) {
			return part{kind: partZero, n: n}
		}
		return part{kind: partBelow, n: min(n, im.backing.Size()-off)}
	}
	return part{kind: partOther, n: n}
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
		if below, ok := im.backing.(block.TryDevice); ok {
			return below.TryReadAt(p, off)
		}
	case partPacked:
		return im.tryReadPacked(p, off, how.word)
	}
	return block.ErrWouldBlock
}

// tryReadPacked reads from a compressed cluster that somebody has unpacked before.
func (im *Image) tryReadPacked(p []byte, off int64, e format.L2Entry) error {
	in := im.lay.GuestInCluster(format.GuestOff(off))
	if !im.clusters.peek(e, p, in) {
		return block.ErrWouldBlock
	}
	if in == 0 {
		im.readAhead(im.cluster(off))
	}
	return nil
}

// TryReadAt is ReadAt if mapping and data are in memory; otherwise block.ErrWouldBlock.
func (im *Image) TryReadAt(p []byte, off int64) error {
	t, ok := im.tryEnter()
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Epochs.Exit(t)
	if err := block.CheckRange(off, int64(len(p)), im.Size()); err != nil {
		return err
	}
	if im.longCrypt(int64(len(p))) {
		return block.ErrWouldBlock
	}
	for len(p) > 0 {
		how := im.tryPart(off, int64(len(p)))
		if err := im.tryReadPart(p[:how.n], off, how); err != nil {
			return wouldBlock(err)
		}
		p, off = p[how.n:], off+how.n
	}
	return nil
}

// wouldBlock turns every error of an attempt into "ask again, waiting": the full request will meet and report it.
func wouldBlock(error) error { return block.ErrWouldBlock }

// TryReadDataAt is TryReadAt of a range that is all data, here or below. If it is all zero it returns block.ErrAllZero, if some of
// it is block.ErrMixed.
func (im *Image) TryReadDataAt(p []byte, off int64) error {
	t, ok := im.tryEnter()
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Epochs.Exit(t)
	if im.longCrypt(int64(len(p))) {
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

// tryAllData looks at the mapping alone, so that nothing is read in vain.
func (im *Image) tryAllData(off, n int64) error {
	zero, all := false, n
	for n > 0 {
		how := im.tryPart(off, n)
		switch {
		case how.kind == partOther || how.kind == partPacked:
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
