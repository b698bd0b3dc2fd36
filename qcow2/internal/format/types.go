// Package format is the codec of QCOW2: pure functions between the bytes of an image and Go values. It holds every
// offset, mask, magic and limit of the format, each written once; it does no I/O and keeps no state.
//
// The model in short: an image file is a row of host clusters of 1<<cluster_bits bytes. Cluster 0 begins with the
// [Header] and its extensions. A guest offset is found through a two-level table: the L1 table (one entry per L2 table)
// and L2 tables (one cluster each; one entry per guest cluster). Every host cluster has a refcount, found through the
// refcount table (one entry per refcount block) and refcount blocks (one cluster each). All integers are big-endian.
package format

// GuestOff is a byte offset on the virtual disk.
type GuestOff uint64

// HostOff is a byte offset in the image file (or in its external data file).
type HostOff uint64

// ClusterIdx numbers host clusters: HostOff >> cluster_bits.
type ClusterIdx uint64

// L1Entry is one word of an L1 table, in host byte order.
type L1Entry uint64

// L2Entry is the first word of an L2 entry, in host byte order.
type L2Entry uint64

// RefTableEntry is one word of the refcount table, in host byte order.
type RefTableEntry uint64
