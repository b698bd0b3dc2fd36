package format

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
)

// Header is cluster 0 of an image, decoded: the header proper, its extensions and the backing file name.
//
// What the header says of its own layout (its length, where the backing file name is) is not kept: Marshal decides it
// anew. For every header h that Marshal accepts, ParseHeader of the result equals h.
type Header struct {
	Version         uint32
	ClusterBits     uint32
	Size            uint64 // of the disk, as stored; see DiskSize
	CryptMethod     uint32
	L1Size          uint32 // entries of the active L1 table
	L1Offset        HostOff
	RefTableOffset  HostOff
	RefTableLen     uint32 // clusters of the refcount table
	SnapshotCount   uint32
	SnapshotsOffset HostOff

	// The fields below do not exist in version 2 and are then 0, save RefcountOrder, which is 4.

	Incompat        uint64
	Compat          uint64
	Autoclear       uint64
	RefcountOrder   uint32
	CompressionType CompressionType
	UnknownFields   []byte // header bytes from 112 on, which a rewrite must keep

	// BackingFile is the name as stored, "" for none. It ends at its first NUL, as it does for QEMU.
	BackingFile      string
	BackingFormat    string
	HasBackingFormat bool // the extension is there, even if its name is empty

	DataFileName    string // as stored; the image may have a data file without naming it
	HasDataFileName bool

	Crypto       *CryptoExt
	FeatureNames []FeatureName
	Bitmaps      *BitmapsExt
	// StaleBitmaps: there is a bitmaps extension, but the last writer did not know of bitmaps, so that it means
	// nothing. It is not in Bitmaps, and Marshal drops it.
	StaleBitmaps      bool
	UnknownExtensions []Extension // kept verbatim, in the order found
}

// CryptoExt says where the LUKS header of an encrypted image is.
type CryptoExt struct {
	Offset HostOff
	Length uint64
}

// BitmapsExt says where the bitmap directory is.
type BitmapsExt struct {
	Count           uint32
	DirectorySize   uint64
	DirectoryOffset HostOff
}

// Extension is a header extension of a type this codec does not know.
type Extension struct {
	Type uint32
	Data []byte
}

// FeatureSet tells which of the three sets of feature bits a name is for.
type FeatureSet uint8

// The sets of feature bits.
const (
	FeatureIncompatible FeatureSet = 0
	FeatureCompatible   FeatureSet = 1
	FeatureAutoclear    FeatureSet = 2
)

// FeatureName is the name an image gives to a feature bit, so that a reader that does not know it can say what it lacks.
type FeatureName struct {
	Set  FeatureSet
	Bit  uint8
	Name string // at most 46 bytes
}

// DefaultFeatureNames returns the table that a new image of version 3 with clusters of more than 4096 bytes carries
// (in smaller clusters it would leave no room for a backing file name).
func DefaultFeatureNames() []FeatureName {
	return []FeatureName{
		{FeatureIncompatible, 0, "dirty bit"},
		{FeatureIncompatible, 1, "corrupt bit"},
		{FeatureIncompatible, 2, "external data file"},
		{FeatureIncompatible, 3, "compression type"},
		{FeatureIncompatible, 4, "extended L2 entries"},
		{FeatureCompatible, 0, "lazy refcounts"},
		{FeatureAutoclear, 0, "bitmaps"},
		{FeatureAutoclear, 1, "raw external data"},
	}
}

// Layout returns the geometry that the header describes.
func (h *Header) Layout() Layout {
	return Layout{
		ClusterBits:   uint8(h.ClusterBits),
		RefcountOrder: uint8(h.RefcountOrder),
		Version:       h.Version,
		ExtendedL2:    h.Incompat&IncompatExtL2 != 0,
		DataFile:      h.Incompat&IncompatDataFile != 0,
	}
}

// DiskSize returns the size of the virtual disk: the stored size without the part of a sector at its end.
func (h *Header) DiskSize() int64 { return int64(h.Size &^ (SectorSize - 1)) }

// headerFields is the part of the header that is not kept in Header.
type headerFields struct {
	backingOffset uint64
	backingSize   uint32
	length        uint32
}

// HeaderArea tells how many bytes from the beginning of the file ParseHeader wants, never more than one cluster. first
// holds the first bytes of the file, SectorSize of them if it is that long. The error is ErrNotQCOW2 or a *HeaderError
// for a version or cluster size out of range.
func HeaderArea(first []byte) (int64, error) {
	b := zeroExtend(first, SectorSize)
	if err := checkStart(b); err != nil {
		return 0, err
	}
	clusterSize := int64(1) << binary.BigEndian.Uint32(b[OffClusterBits:])
	end := clusterSize
	if off := binary.BigEndian.Uint64(b[OffBackingOffset:]); off != 0 && off < uint64(clusterSize) {
		name := min(int64(binary.BigEndian.Uint32(b[OffBackingSize:])), MaxBackingName)
		end = min(clusterSize, max(int64(off)+name, headerLength(b)))
	} else if n, ok := extensionsEnd(b); ok {
		end = n
	}
	return max(end, min(SectorSize, clusterSize)), nil
}

// headerLength returns the length of the header proper, as found.
func headerLength(b []byte) int64 {
	if binary.BigEndian.Uint32(b[OffVersion:]) == Version2 {
		return HeaderLengthV2
	}
	return int64(binary.BigEndian.Uint32(b[OffHeaderLength:]))
}

// extensionsEnd finds the end of the extension area if it lies within b.
func extensionsEnd(b []byte) (int64, bool) {
	off := headerLength(b)
	for off+8 <= int64(len(b)) {
		kind, n := binary.BigEndian.Uint32(b[off:]), int64(binary.BigEndian.Uint32(b[off+4:]))
		off += 8
		if kind == extEnd {
			return off, true
		}
		off += roundUp8(n)
	}
	return 0, false
}

// checkStart checks what everything else depends on: magic, version, cluster size.
func checkStart(b []byte) error {
	if binary.BigEndian.Uint32(b[OffMagic:]) != Magic {
		return ErrNotQCOW2
	}
	if v := binary.BigEndian.Uint32(b[OffVersion:]); v < Version2 || v > Version3 {
		return &UnsupportedError{Msg: fmt.Sprintf("Unsupported qcow2 version %d", v)}
	}
	if n := binary.BigEndian.Uint32(b[OffClusterBits:]); n < MinClusterBits || n > MaxClusterBits {
		return headerErrorf("Unsupported cluster size: 2^%d", n)
	}
	return nil
}

// ParseHeader decodes and checks a header. b is the beginning of the file, as much as HeaderArea asks for or as there
// is; what is missing counts as zeroes. It accepts and refuses what QEMU does, in QEMU's words: ErrNotQCOW2,
// *UnsupportedError or *HeaderError. Nothing in the result aliases b.
//
// What remains unchecked is whether the tables that the header points to lie within the file.
func ParseHeader(b []byte) (*Header, error) {
	h, err := ParseHeaderForCheck(b)
	if err != nil {
		return nil, err
	}
	if h.RefTableLen == 0 {
		return nil, headerErrorf("Image does not contain a reference count table")
	}
	if err := h.ValidateSnapshotPointer(); err != nil {
		return nil, err
	}
	return h, nil
}

// ParseHeaderForCheck is ParseHeader for check and repair: it lets pass a missing refcount table and a bad pointer to
// the snapshot table (see ValidateSnapshotPointer), which a repair can deal with.
func ParseHeaderForCheck(b []byte) (*Header, error) {
	b = zeroExtend(b, SectorSize)
	if err := checkStart(b); err != nil {
		return nil, err
	}
	h, f := decodeFields(b)
	clusterSize := uint64(1) << h.ClusterBits
	if f.length < MinHeaderLengthV3 && h.Version >= Version3 {
		return nil, headerErrorf("qcow2 header too short")
	}
	if uint64(f.length) > clusterSize {
		return nil, headerErrorf("qcow2 header exceeds cluster size")
	}
	ext := extensionArea{b: b[:min(uint64(len(b)), clusterSize)], off: uint64(f.length), end: clusterSize}
	if f.length > HeaderLengthV3 {
		h.UnknownFields = bytes.Clone(ext.at(HeaderLengthV3, uint64(f.length)-HeaderLengthV3))
	}
	if f.backingOffset > clusterSize {
		return nil, headerErrorf("Invalid backing file offset")
	}
	if f.backingOffset != 0 {
		ext.end = f.backingOffset
	}
	if unknown := h.Incompat &^ IncompatKnown; unknown != 0 {
		return nil, unsupportedFeatures(unknown, ext)
	}
	if err := h.validateFields(); err != nil {
		return nil, err
	}
	if err := h.parseExtensions(ext); err != nil {
		return nil, err
	}
	if h.CryptMethod == CryptLUKS && h.Crypto == nil {
		return nil, headerErrorf("Missing CRYPTO header for crypt method %d", h.CryptMethod)
	}
	if h.Autoclear&AutoclearRawData != 0 && h.Incompat&IncompatDataFile == 0 {
		return nil, headerErrorf("data-file-raw requires a data file")
	}
	return h, h.parseBackingName(ext, f)
}

// decodeFields decodes the header proper.
func decodeFields(b []byte) (*Header, headerFields) {
	u32, u64 := binary.BigEndian.Uint32, binary.BigEndian.Uint64
	h := &Header{
		Version:         u32(b[OffVersion:]),
		ClusterBits:     u32(b[OffClusterBits:]),
		Size:            u64(b[OffSize:]),
		CryptMethod:     u32(b[OffCryptMethod:]),
		L1Size:          u32(b[OffL1:]),
		L1Offset:        HostOff(u64(b[OffL1+4:])),
		RefTableOffset:  HostOff(u64(b[OffRefTable:])),
		RefTableLen:     u32(b[OffRefTable+8:]),
		SnapshotCount:   u32(b[OffSnapshots:]),
		SnapshotsOffset: HostOff(u64(b[OffSnapshots+4:])),
	}
	f := headerFields{
		backingOffset: u64(b[OffBackingOffset:]),
		backingSize:   u32(b[OffBackingSize:]),
		length:        HeaderLengthV2,
	}
	if h.Version == Version2 {
		h.RefcountOrder = 4
		return h, f
	}
	h.Incompat = u64(b[OffIncompat:])
	h.Compat = u64(b[OffCompat:])
	h.Autoclear = u64(b[OffAutoclear:])
	h.RefcountOrder = u32(b[OffRefcountOrder:])
	f.length = u32(b[OffHeaderLength:])
	if f.length > OffCompression {
		h.CompressionType = CompressionType(b[OffCompression])
	}
	return h, f
}

// validateFields checks the fields of the header proper.
func (h *Header) validateFields() error {
	if err := h.validateFeatures(); err != nil {
		return err
	}
	if h.RefcountOrder > MaxRefcountOrder {
		return headerErrorf("Reference count entry width too large; may not exceed 64 bits")
	}
	if h.CryptMethod > CryptLUKS {
		return headerErrorf("Unsupported encryption method %d", h.CryptMethod)
	}
	clusterSize := uint64(1) << h.ClusterBits
	refBytes := uint64(h.RefTableLen) * clusterSize
	if err := h.validateTable("Reference count table", h.RefTableOffset, refBytes, MaxRefTableBytes); err != nil {
		return err
	}
	if err := h.validateTable("Active L1 table", h.L1Offset, uint64(h.L1Size)*8, MaxL1Bytes); err != nil {
		return err
	}
	need := h.Layout().l1EntriesNeeded(h.Size)
	if need > math.MaxInt32 || h.Size > math.MaxInt64 {
		return headerErrorf("Image is too big")
	}
	if uint64(h.L1Size) < need {
		return headerErrorf("L1 table is too small")
	}
	return nil
}

// validateFeatures checks what the feature bits and the fields beside them say of each other.
func (h *Header) validateFeatures() error {
	flagged := h.Incompat&IncompatCompression != 0
	switch {
	case h.CompressionType > CompressionZstd:
		return &UnsupportedError{Msg: fmt.Sprintf("qcow2: unknown compression type: %d", h.CompressionType)}
	case h.CompressionType == CompressionZlib && flagged:
		return headerErrorf("qcow2: Compression type incompatible feature bit must not be set")
	case h.CompressionType != CompressionZlib && !flagged:
		return headerErrorf("qcow2: Compression type incompatible feature bit must be set")
	}
	if h.Incompat&IncompatExtL2 != 0 && h.ClusterBits < MinExtendedL2ClusterBits {
		return headerErrorf("Unsupported subcluster size: %d", h.Layout().SubclusterSize())
	}
	return nil
}

// ValidateSnapshotPointer checks where the header says the snapshot table is.
func (h *Header) ValidateSnapshotPointer() error {
	const entry = snapshotHeaderSize
	return h.validateTable("Snapshot table", h.SnapshotsOffset, uint64(h.SnapshotCount)*entry, MaxSnapshots*entry)
}

// maxFileSize is the length of the longest file that QEMU reads from.
const maxFileSize = 1<<63 - 1<<30

// validateTable checks a table's place and length. size does not overflow: it is a product of 32 and 21 bits at most.
func (h *Header) validateTable(name string, off HostOff, size, limit uint64) error {
	if size > limit {
		return headerErrorf("%s too large", name)
	}
	if uint64(off) > math.MaxInt64-size || !h.Layout().Aligned(off) || size > 0 && uint64(off) > maxFileSize-size {
		return headerErrorf("%s offset invalid", name)
	}
	return nil
}

// parseBackingName reads the backing file name, which follows the extensions.
func (h *Header) parseBackingName(a extensionArea, f headerFields) error {
	if f.backingOffset == 0 {
		return nil
	}
	room := uint64(1)<<h.ClusterBits - f.backingOffset
	if uint64(f.backingSize) > min(MaxBackingName, room) {
		return headerErrorf("Backing file name too long")
	}
	h.BackingFile = cString(a.at(f.backingOffset, uint64(f.backingSize)))
	return nil
}

// Marshal returns the bytes at the beginning of the file: header, extensions, backing file name. They never exceed one
// cluster: ErrHeaderSpace when they would. The rest of the cluster should be zeroes.
func (h *Header) Marshal() ([]byte, error) {
	clusterSize := 1 << h.ClusterBits
	b := make([]byte, h.encodedHeaderLength())
	h.encodeFields(b)
	b, err := h.appendExtensions(b)
	if err != nil {
		return nil, err
	}
	if len(h.BackingFile) > MaxBackingName {
		return nil, headerErrorf("Backing file name too long")
	}
	if h.BackingFile != "" {
		binary.BigEndian.PutUint64(b[OffBackingOffset:], uint64(len(b)))
		binary.BigEndian.PutUint32(b[OffBackingSize:], uint32(len(h.BackingFile)))
		b = append(b, h.BackingFile...)
	}
	if len(b) > clusterSize {
		return nil, ErrHeaderSpace
	}
	return b, nil
}

// encodedHeaderLength is the header_length that Marshal writes. An older header grows to today's length.
func (h *Header) encodedHeaderLength() int {
	if h.Version == Version2 {
		return HeaderLengthV2
	}
	return HeaderLengthV3 + len(h.UnknownFields)
}

// encodeFields encodes the header proper into b, which has its length.
func (h *Header) encodeFields(b []byte) {
	u32, u64 := binary.BigEndian.PutUint32, binary.BigEndian.PutUint64
	u32(b[OffMagic:], Magic)
	u32(b[OffVersion:], h.Version)
	u32(b[OffClusterBits:], h.ClusterBits)
	u64(b[OffSize:], h.Size)
	u32(b[OffCryptMethod:], h.CryptMethod)
	l1 := EncodeL1Pointer(h.L1Size, h.L1Offset)
	copy(b[OffL1:], l1[:])
	ref := EncodeRefTablePointer(h.RefTableOffset, h.RefTableLen)
	copy(b[OffRefTable:], ref[:])
	snap := EncodeSnapshotsPointer(h.SnapshotCount, h.SnapshotsOffset)
	copy(b[OffSnapshots:], snap[:])
	if h.Version == Version2 {
		return
	}
	u64(b[OffIncompat:], h.Incompat)
	u64(b[OffCompat:], h.Compat)
	u64(b[OffAutoclear:], h.Autoclear)
	u32(b[OffRefcountOrder:], h.RefcountOrder)
	u32(b[OffHeaderLength:], uint32(len(b)))
	b[OffCompression] = byte(h.CompressionType)
	copy(b[HeaderLengthV3:], h.UnknownFields)
}

// zeroExtend returns b with at least n bytes, copying it if it is shorter.
func zeroExtend(b []byte, n int) []byte {
	if len(b) >= n {
		return b
	}
	return append(bytes.Clone(b), make([]byte, n-len(b))...)
}

// cString returns the bytes before the first NUL.
func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

func roundUp8(n int64) int64 { return (n + 7) &^ 7 }
