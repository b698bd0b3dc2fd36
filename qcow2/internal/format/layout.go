package format

import (
	"errors"
	"fmt"
)

// ErrTooBig is returned when a disk or an offset is beyond what the geometry of an image can express.
var ErrTooBig = errors.New("too big for the image's cluster size")

// Layout is the geometry of an image: the few numbers from which the place and the shape of everything follow. It is a
// small value meant to be copied. Its methods assume the limits that ParseHeader enforces (MinClusterBits <=
// ClusterBits <= MaxClusterBits, RefcountOrder <= MaxRefcountOrder).
type Layout struct {
	ClusterBits   uint8
	RefcountOrder uint8
	Version       uint32
	ExtendedL2    bool
	DataFile      bool
}

// ClusterSize returns the length of a cluster in bytes.
func (l Layout) ClusterSize() int64 { return 1 << l.ClusterBits }

// Cluster returns the host cluster that holds off.
func (l Layout) Cluster(off HostOff) ClusterIdx { return ClusterIdx(off >> l.ClusterBits) }

// Offset returns where a host cluster begins.
func (l Layout) Offset(c ClusterIdx) HostOff { return HostOff(c) << l.ClusterBits }

// ClusterStart rounds off down to the beginning of its cluster.
func (l Layout) ClusterStart(off HostOff) HostOff { return off &^ (1<<l.ClusterBits - 1) }

// InCluster returns how far into its cluster off lies.
func (l Layout) InCluster(off HostOff) int64 { return int64(off & (1<<l.ClusterBits - 1)) }

// Aligned reports whether off is the beginning of a cluster.
func (l Layout) Aligned(off HostOff) bool { return l.InCluster(off) == 0 }

// GuestInCluster returns how far into its guest cluster off lies.
func (l Layout) GuestInCluster(off GuestOff) int64 { return int64(off & (1<<l.ClusterBits - 1)) }

// ClustersFor returns how many clusters n bytes take. n must not be negative.
func (l Layout) ClustersFor(n int64) int64 {
	q := n >> l.ClusterBits
	if n&(l.ClusterSize()-1) != 0 {
		q++
	}
	return q
}

// L2EntrySize returns the length of an L2 entry: 8 bytes, or 16 with extended L2 entries.
func (l Layout) L2EntrySize() int64 { return 1 << l.l2EntryBits() }

func (l Layout) l2EntryBits() uint8 {
	if l.ExtendedL2 {
		return 4
	}
	return 3
}

// l2Bits is the binary logarithm of the number of entries of an L2 table.
func (l Layout) l2Bits() uint8 { return l.ClusterBits - l.l2EntryBits() }

// L2Entries returns the number of entries of an L2 table.
func (l Layout) L2Entries() int64 { return 1 << l.l2Bits() }

// L2Coverage returns how many guest bytes one L2 table maps.
func (l Layout) L2Coverage() int64 { return 1 << (l.ClusterBits + l.l2Bits()) }

// L1Index returns the index of the L1 entry that covers off.
func (l Layout) L1Index(off GuestOff) int64 { return int64(off >> (l.ClusterBits + l.l2Bits())) }

// L2Index returns the index within its L2 table of the entry that covers off.
func (l Layout) L2Index(off GuestOff) int64 { return int64(off>>l.ClusterBits) & (l.L2Entries() - 1) }

// GuestOffset is the inverse of L1Index and L2Index.
func (l Layout) GuestOffset(l1, l2 int64) GuestOff {
	return (GuestOff(l1)<<l.l2Bits() | GuestOff(l2)) << l.ClusterBits
}

// L1EntriesFor returns how many L1 entries a disk of the given size needs; ErrTooBig when that is more than an L1 table
// may have.
func (l Layout) L1EntriesFor(size int64) (int64, error) {
	if size < 0 {
		return 0, fmt.Errorf("disk size %d: %w", size, ErrTooBig)
	}
	n := l.l1EntriesNeeded(uint64(size))
	if n > MaxL1Entries {
		return 0, fmt.Errorf("disk size %d needs %d L1 entries of at most %d: %w", size, n, MaxL1Entries, ErrTooBig)
	}
	return int64(n), nil
}

// l1EntriesNeeded is L1EntriesFor without the limit, and without an overflow near 1<<64.
func (l Layout) l1EntriesNeeded(size uint64) uint64 {
	n := size >> (l.ClusterBits + l.l2Bits())
	if size&(uint64(l.L2Coverage())-1) != 0 {
		n++
	}
	return n
}

// MaxDiskSize returns the largest disk an L1 table of the greatest length can map, a multiple of SectorSize.
func (l Layout) MaxDiskSize() int64 {
	const most = int64(1<<63-1) &^ (SectorSize - 1)
	if l.L2Coverage() > most/MaxL1Entries {
		return most
	}
	return l.L2Coverage() * MaxL1Entries
}

// RefcountBits returns the width of a refcount.
func (l Layout) RefcountBits() int { return 1 << l.RefcountOrder }

// RefcountMax returns the largest refcount that can be stored.
func (l Layout) RefcountMax() uint64 {
	if l.RefcountOrder >= 6 {
		return 1<<64 - 1
	}
	return 1<<l.RefcountBits() - 1
}

// refBlockBits is the binary logarithm of the number of refcounts in a block.
func (l Layout) refBlockBits() uint8 { return l.ClusterBits + 3 - l.RefcountOrder }

// RefcountsPerBlock returns how many refcounts a refcount block (one cluster) holds.
func (l Layout) RefcountsPerBlock() int64 { return 1 << l.refBlockBits() }

// RefBlockCoverage returns how many host bytes one refcount block counts.
func (l Layout) RefBlockCoverage() int64 { return 1 << (l.ClusterBits + l.refBlockBits()) }

// RefTableIndex returns the index of the refcount table entry for a cluster.
func (l Layout) RefTableIndex(c ClusterIdx) int64 { return int64(c >> l.refBlockBits()) }

// RefBlockIndex returns the index of a cluster's refcount within its block.
func (l Layout) RefBlockIndex(c ClusterIdx) int64 { return int64(c) & (l.RefcountsPerBlock() - 1) }

// MaxRefTableClusters returns the largest length of the refcount table in clusters.
func (l Layout) MaxRefTableClusters() int64 { return MaxRefTableBytes >> l.ClusterBits }

// Subclusters returns the number of subclusters of a cluster: 32 with extended L2 entries, otherwise 1.
func (l Layout) Subclusters() int {
	if l.ExtendedL2 {
		return 32
	}
	return 1
}

// SubclusterSize returns the smallest unit that can be allocated on its own.
func (l Layout) SubclusterSize() int64 {
	if l.ExtendedL2 {
		return l.ClusterSize() >> 5
	}
	return l.ClusterSize()
}
