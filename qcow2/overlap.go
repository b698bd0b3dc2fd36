package qcow2

import (
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// Structures is a set of the kinds of metadata in an image file. A write that a damaged image would send to one of them is
// refused before it does harm, if the kind is watched (Options.Overlap).
type Structures = meta.Structure

// The nine structures, and QEMU's templates of which to watch.
const (
	MainHeader      = meta.MainHeader
	ActiveL1        = meta.ActiveL1
	ActiveL2        = meta.ActiveL2
	RefcountBlock   = meta.RefcountBlock
	RefcountTable   = meta.RefcountTable
	SnapshotTable   = meta.SnapshotTable
	InactiveL1      = meta.InactiveL1
	InactiveL2      = meta.InactiveL2
	BitmapDirectory = meta.BitmapDirectory

	OverlapNone     = meta.OverlapNone
	OverlapConstant = meta.OverlapConstant
	OverlapCached   = meta.OverlapCached
	OverlapAll      = meta.OverlapAll
)

// watched returns the structures to watch: all unless the caller chose.
func (o Options) watched() Structures {
	if o.Overlap == nil {
		return OverlapAll
	}
	return *o.Overlap
}

// places adds to c where the metadata lies that only the overlap checks care for.
func (im *Image) places(c *meta.Config, o Options, snapshots []format.Snapshot, tableSize int64) {
	c.Overlap = o.watched()
	c.SnapshotsSize = tableSize
	for _, s := range snapshots {
		// A table that cannot be one is the fault of its snapshot alone, and check's business.
		if im.lay.Aligned(s.L1Offset) && s.L1Offset < format.MaxHostOffset && s.L1Size <= format.MaxL1Entries {
			c.InactiveL1 = append(c.InactiveL1, meta.TableAt{Off: s.L1Offset, Len: int64(s.L1Size)})
		}
	}
	if x := im.hdr.Crypto; x != nil && x.Offset < format.MaxHostOffset && x.Length < uint64(format.MaxHostOffset) {
		c.KeysOff, c.KeysSize = x.Offset, int64(x.Length)
	}
	if b := im.hdr.Bitmaps; b != nil {
		c.BitmapsOff, c.BitmapsSize = b.DirectoryOffset, int64(b.DirectorySize)
	}
}
