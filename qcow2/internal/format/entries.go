package format

import (
	"fmt"
)

// Fields of table entries.
const (
	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1 << 0

	offsetMask = 0x00fffffffffffe00 // bits 9-55

	l1ReservedMask       = 0x7f000000000001ff
	l2ReservedMask       = 0x3f000000000001fe
	refTableOffsetMask   = 0xfffffffffffffe00
	refTableReservedMask = 0x00000000000001ff
)

// Parts of the words of L1 and L2 tables, for those who change one and keep the rest.
const (
	MaskL2Offset   = offsetMask
	FlagCompressed = flagCompressed
)

// MakeL1 returns the L1 entry for an L2 table at off. copied says that the table's refcount is exactly one.
func MakeL1(off HostOff, copied bool) L1Entry {
	e := L1Entry(off & offsetMask)
	if copied {
		e |= flagCopied
	}
	return e
}

// Offset returns where the L2 table is, 0 when there is none.
func (e L1Entry) Offset() HostOff { return HostOff(e & offsetMask) }

// Copied reports whether the L2 table may be changed in place. Only the active L1 table keeps it accurate.
func (e L1Entry) Copied() bool { return e&flagCopied != 0 }

// Reserved returns the reserved bits that are set. A reader ignores them, check reports them.
func (e L1Entry) Reserved() uint64 { return uint64(e) & l1ReservedMask }

// MakeRefTable returns the refcount table entry for a block at off.
func MakeRefTable(off HostOff) RefTableEntry { return RefTableEntry(off & refTableOffsetMask) }

// Offset returns where the refcount block is, 0 when there is none (every refcount in it is 0).
func (e RefTableEntry) Offset() HostOff { return HostOff(e & refTableOffsetMask) }

// Reserved returns the reserved bits that are set.
func (e RefTableEntry) Reserved() uint64 { return uint64(e) & refTableReservedMask }

// L2Kind is what an L2 entry says of its guest cluster.
type L2Kind uint8

// The kinds of L2 entries.
const (
	// KindUnallocated: the backing file decides, zeroes without one. With extended L2 entries, see L2Bitmap.
	KindUnallocated L2Kind = iota
	// KindNormal: data at HostOffset.
	KindNormal
	// KindZeroPlain: reads as zeroes, no host cluster.
	KindZeroPlain
	// KindZeroAlloc: reads as zeroes, with a host cluster reserved at HostOffset.
	KindZeroAlloc
	// KindCompressed: see Layout.CompressedExtent.
	KindCompressed
	// KindInvalid: the image is corrupt here; neither reading nor writing the cluster has a meaning.
	KindInvalid
)

// String returns a name for messages.
func (k L2Kind) String() string {
	switch k {
	case KindUnallocated:
		return "unallocated"
	case KindNormal:
		return "normal"
	case KindZeroPlain:
		return "zero"
	case KindZeroAlloc:
		return "preallocated zero"
	case KindCompressed:
		return "compressed"
	}
	return "invalid"
}

// L2Zero is the entry of a guest cluster that reads as zeroes and has no host cluster (version 3, not extended).
const L2Zero L2Entry = flagZero

// MakeL2 returns the entry for a data cluster at off. copied says that the cluster's refcount is exactly one.
//
// With an external data file copied must be true: that is what tells a cluster at offset 0 from an unallocated one.
func MakeL2(off HostOff, copied bool) L2Entry {
	e := L2Entry(off & offsetMask)
	if copied {
		e |= flagCopied
	}
	return e
}

// MakeL2ZeroAlloc returns the entry for a cluster that reads as zeroes and keeps the host cluster at off reserved.
func MakeL2ZeroAlloc(off HostOff, copied bool) L2Entry { return MakeL2(off, copied) | flagZero }

// HostOffset returns where the data of a KindNormal or KindZeroAlloc entry is.
func (e L2Entry) HostOffset() HostOff { return HostOff(e & offsetMask) }

// Copied reports whether the data cluster may be overwritten in place.
func (e L2Entry) Copied() bool { return e&flagCopied != 0 }

// Compressed reports whether the entry is a compressed cluster descriptor.
func (e L2Entry) Compressed() bool { return e&flagCompressed != 0 }

// Reserved returns the reserved bits that are set. A compressed descriptor has none.
func (e L2Entry) Reserved() uint64 {
	if e.Compressed() {
		return 0
	}
	return uint64(e) & l2ReservedMask
}

// Type returns the kind of an entry by its flags alone, as QEMU's check sees it: it never returns KindInvalid. Kind is
// what readers and writers want.
func (l Layout) Type(e L2Entry) L2Kind {
	switch {
	case e&flagCompressed != 0:
		return KindCompressed
	case e&flagZero != 0 && !l.ExtendedL2: // extended entries keep "zero" in the bitmap and ignore this bit
		if e&offsetMask != 0 {
			return KindZeroAlloc
		}
		return KindZeroPlain
	case e&offsetMask != 0:
		return KindNormal
	case l.DataFile && e.Copied(): // guest cluster 0 is at offset 0 of the data file
		return KindNormal
	}
	return KindUnallocated
}

// Kind returns what an entry says of its cluster. It is KindInvalid for what must not be used: an unaligned host offset,
// a zero flag in version 2, a compressed cluster next to an external data file.
func (l Layout) Kind(e L2Entry) L2Kind {
	k := l.Type(e)
	switch k {
	case KindCompressed:
		if l.DataFile {
			return KindInvalid
		}
	case KindZeroPlain:
		if l.Version < Version3 {
			return KindInvalid
		}
	case KindZeroAlloc:
		if l.Version < Version3 || !l.Aligned(e.HostOffset()) {
			return KindInvalid
		}
	case KindNormal:
		if !l.Aligned(e.HostOffset()) {
			return KindInvalid
		}
	}
	return k
}

// compressedShift is the number of bits of the host offset in a compressed descriptor; the sector count is above it.
func (l Layout) compressedShift() uint8 { return 70 - l.ClusterBits }

// CompressedExtent returns the bytes that hold a compressed cluster. The length is counted in whole sectors: the stream
// ends somewhere in the last one, whose rest belongs to others. It may reach past the end of the file.
func (l Layout) CompressedExtent(e L2Entry) (off HostOff, n int64) {
	shift := l.compressedShift()
	off = HostOff(e) & (1<<shift - 1)
	sectors := int64(e>>shift) & (1<<(l.ClusterBits-8) - 1)
	return off, (sectors+1)*SectorSize - int64(off%SectorSize)
}

// CompressedClusters returns the first and the last host cluster that a compressed cluster touches. It holds one
// reference on each.
func (l Layout) CompressedClusters(e L2Entry) (first, last ClusterIdx) {
	off, n := l.CompressedExtent(e)
	return l.Cluster(off), l.Cluster(off + HostOff(n) - 1)
}

// MakeCompressed returns the descriptor of a compressed cluster of length bytes at off. length must be less than a
// cluster: what does not shrink is stored as it is.
func (l Layout) MakeCompressed(off HostOff, length int64) (L2Entry, error) {
	if length <= 0 || length >= l.ClusterSize() {
		return 0, fmt.Errorf("compressed cluster of %d bytes: must be between 1 and %d", length, l.ClusterSize()-1)
	}
	if off > l.MaxCompressedOffset() {
		return 0, fmt.Errorf("compressed cluster at host offset %#x: %w", off, ErrTooBig)
	}
	sectors := (off+HostOff(length)-1)/SectorSize - off/SectorSize
	return flagCompressed | L2Entry(sectors)<<l.compressedShift() | L2Entry(off), nil
}

// MaxCompressedOffset returns the last host offset at which a compressed cluster can begin.
func (l Layout) MaxCompressedOffset() HostOff {
	return min(MaxHostOffset, 1<<l.compressedShift()) - 1
}

// L2Bitmap is the second word of an extended L2 entry, in host byte order. Bit i says that subcluster i has data in the
// host cluster, bit 32+i that it reads as zeroes; never both.
type L2Bitmap uint64

// The halves of an L2Bitmap.
const (
	BitmapAllAlloc L2Bitmap = 1<<32 - 1
	BitmapAllZero  L2Bitmap = BitmapAllAlloc << 32
)

// Alloc reports whether subcluster i has data.
func (b L2Bitmap) Alloc(i int) bool { return b>>i&1 != 0 }

// AnyAlloc reports whether some subcluster has data.
func (b L2Bitmap) AnyAlloc() bool { return uint32(b) != 0 }

// Zero reports whether subcluster i reads as zeroes.
func (b L2Bitmap) Zero(i int) bool { return b>>(32+i)&1 != 0 }

// Overlap reports whether some subcluster claims both to have data and to be zero.
func (b L2Bitmap) Overlap() bool { return b>>32&b != 0 }

// subMask has the low bits [from, to) set.
func subMask(from, to int) L2Bitmap { return (1<<(to-from) - 1) << from }

// SetAlloc returns b with subclusters [from, to) holding data.
func (b L2Bitmap) SetAlloc(from, to int) L2Bitmap {
	m := subMask(from, to)
	return b&^(m<<32) | m
}

// SetZero returns b with subclusters [from, to) reading as zeroes, without data.
func (b L2Bitmap) SetZero(from, to int) L2Bitmap {
	m := subMask(from, to)
	return b&^m | m<<32
}

// SetUnallocated returns b with subclusters [from, to) left to the backing file.
func (b L2Bitmap) SetUnallocated(from, to int) L2Bitmap {
	m := subMask(from, to)
	return b &^ (m | m<<32)
}

// ValidBitmap reports whether the two words of an extended L2 entry agree: no subcluster both data and zero, no data
// without a host cluster, nothing at all beside a compressed cluster. Without extended L2 entries b must be 0.
func (l Layout) ValidBitmap(e L2Entry, b L2Bitmap) bool {
	if !l.ExtendedL2 {
		return b == 0
	}
	switch l.Type(e) {
	case KindCompressed:
		return b == 0
	case KindUnallocated:
		return b&BitmapAllAlloc == 0
	}
	return !b.Overlap()
}

// SubclusterKind is what an L2 entry says of one subcluster.
type SubclusterKind uint8

// The kinds of subclusters.
const (
	// SubUnallocated: the backing file decides, no host cluster.
	SubUnallocated SubclusterKind = iota
	// SubReserved: the backing file decides, though the cluster has a host cluster.
	SubReserved
	// SubNormal: data in the host cluster.
	SubNormal
	// SubZeroPlain: zeroes, no host cluster.
	SubZeroPlain
	// SubZeroAlloc: zeroes, with a host cluster.
	SubZeroAlloc
	// SubCompressed: part of a compressed cluster.
	SubCompressed
	// SubInvalid: the entry is corrupt.
	SubInvalid
)

// SubKind returns the kind of subcluster i of an entry. An image without extended L2 entries has one subcluster per
// cluster (i and b are 0).
func (l Layout) SubKind(e L2Entry, b L2Bitmap, i int) SubclusterKind {
	k := l.Kind(e)
	if k == KindInvalid || !l.ValidBitmap(e, b) {
		return SubInvalid
	}
	if !l.ExtendedL2 {
		return wholeClusterKind[k]
	}
	switch {
	case k == KindCompressed:
		return SubCompressed
	case k == KindUnallocated && b.Zero(i):
		return SubZeroPlain
	case k == KindUnallocated:
		return SubUnallocated
	case b.Zero(i):
		return SubZeroAlloc
	case b.Alloc(i):
		return SubNormal
	}
	return SubReserved
}

// wholeClusterKind is SubKind for images whose clusters are not divided.
var wholeClusterKind = [...]SubclusterKind{
	KindUnallocated: SubUnallocated,
	KindNormal:      SubNormal,
	KindZeroPlain:   SubZeroPlain,
	KindZeroAlloc:   SubZeroAlloc,
	KindCompressed:  SubCompressed,
	KindInvalid:     SubInvalid,
}
