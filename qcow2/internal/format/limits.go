package format

// Magic is the first word of every image: "QFI\xfb".
const Magic uint32 = 0x514649fb

// The versions of the format. QEMU's names for them ("compat levels") are 0.10 and 1.1.
const (
	Version2 uint32 = 2
	Version3 uint32 = 3
)

// SectorSize is the unit of sizes, of compressed extents and of what the host writes in one piece.
const SectorSize = 512

// The limits of the format and of QEMU's implementation of it. An image beyond one of them is refused by every reader,
// so no writer may make one.
const (
	MinClusterBits = 9
	MaxClusterBits = 21
	// MinExtendedL2ClusterBits keeps a subcluster (a 32nd of a cluster) at least one sector long.
	MinExtendedL2ClusterBits = 14
	MaxRefcountOrder         = 6

	MaxL1Bytes       = 32 << 20
	MaxL1Entries     = MaxL1Bytes / 8
	MaxRefTableBytes = 8 << 20

	MaxSnapshots     = 65536
	MaxSnapshotTable = 64 << 20
	MaxSnapshotExtra = 1024

	MaxBackingName   = 1023
	MaxBackingFormat = 15

	MaxBitmaps         = 65535
	MaxBitmapDirectory = MaxBitmaps * 1024
	MaxBitmapName      = 1023
	// MaxBitmapTable is the largest number of entries of one bitmap table; MaxBitmapBytes bounds the clusters they name.
	MaxBitmapTable           = 0x8000000
	MaxBitmapBytes           = 0x20000000
	MinBitmapGranularityBits = 9
	MaxBitmapGranularityBits = 31

	// MaxHostOffset is the first host offset that no table entry can hold: bits 9 to 55 are the offset.
	MaxHostOffset HostOff = 1 << 56
)

// Incompatible features: a reader that does not know one of the bits set must refuse the image.
const (
	// IncompatDirty: refcounts and COPIED flags may be stale.
	IncompatDirty uint64 = 1 << iota
	// IncompatCorrupt: something in the image is known to be wrong; it must not be written before a repair.
	IncompatCorrupt
	// IncompatDataFile: guest clusters live in another file, at their guest offset.
	IncompatDataFile
	// IncompatCompression: the compression type is not zlib.
	IncompatCompression
	// IncompatExtL2: L2 entries are 128 bits long and describe 32 subclusters.
	IncompatExtL2

	// IncompatKnown is every incompatible feature this codec understands.
	IncompatKnown = IncompatDirty | IncompatCorrupt | IncompatDataFile | IncompatCompression | IncompatExtL2
)

// CompatLazyRefcounts allows a writer to postpone refcount updates. Unknown compatible bits are kept and ignored.
const CompatLazyRefcounts uint64 = 1

// Autoclear features: a writer that does not know a bit clears it, so a set bit means that whoever wrote last knew it.
const (
	// AutoclearBitmaps: the bitmaps extension is consistent with the image.
	AutoclearBitmaps uint64 = 1 << iota
	// AutoclearRawData: the external data file is a valid raw image by itself.
	AutoclearRawData

	// AutoclearKnown is every autoclear feature this codec understands.
	AutoclearKnown = AutoclearBitmaps | AutoclearRawData

	// AutoclearJournalShift: the upper half of the autoclear features is reserved by the format, and so cleared by every
	// other writer. While an image is used with a journal, it is a number that is in the journal, too.
	AutoclearJournalShift = 32
)

// Encryption methods (crypt_method).
const (
	CryptNone uint32 = 0
	CryptAES  uint32 = 1
	CryptLUKS uint32 = 2
)

// CompressionType tells how compressed clusters are encoded.
type CompressionType uint8

// The compression types. Zlib clusters are raw deflate streams, without zlib's header and trailer.
const (
	CompressionZlib CompressionType = 0
	CompressionZstd CompressionType = 1
)

// String returns the name that QEMU's tools use.
func (c CompressionType) String() string {
	switch c {
	case CompressionZlib:
		return "zlib"
	case CompressionZstd:
		return "zstd"
	}
	return "unknown"
}

// Offsets of the header's fields.
const (
	OffMagic         = 0
	OffVersion       = 4
	OffBackingOffset = 8
	OffBackingSize   = 16
	OffClusterBits   = 20
	OffSize          = 24
	OffCryptMethod   = 32
	OffL1            = 36 // 12 bytes, see EncodeL1Pointer
	OffRefTable      = 48 // 12 bytes, see EncodeRefTablePointer
	OffSnapshots     = 60 // 12 bytes, see EncodeSnapshotsPointer
	OffIncompat      = 72
	OffCompat        = 80
	OffAutoclear     = 88
	OffRefcountOrder = 96
	OffHeaderLength  = 100
	OffCompression   = 104
)

// Lengths of the header without extensions: what version 2 has, the least of version 3, and what is written today.
const (
	HeaderLengthV2    = 72
	MinHeaderLengthV3 = 104
	HeaderLengthV3    = 112
)
