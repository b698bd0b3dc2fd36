package format

import "encoding/binary"

// DecodeTable turns the bytes of a table into words. It decodes as many words as fit in both.
func DecodeTable(dst []uint64, src []byte) {
	n := min(len(dst), len(src)/8)
	dst, src = dst[:n], src[:8*n]
	for i := range dst {
		dst[i] = binary.BigEndian.Uint64(src[8*i:])
	}
}

// EncodeTable turns words into the bytes of a table. It encodes as many words as fit in both.
func EncodeTable(dst []byte, src []uint64) {
	n := min(len(src), len(dst)/8)
	dst, src = dst[:8*n], src[:n]
	for i, v := range src {
		binary.BigEndian.PutUint64(dst[8*i:], v)
	}
}

// EncodeUint64 returns the bytes of a header field or table entry of 8 bytes.
func EncodeUint64(v uint64) (b [8]byte) {
	binary.BigEndian.PutUint64(b[:], v)
	return b
}

// EncodeUint32 returns the bytes of a header field of 4 bytes.
func EncodeUint32(v uint32) (b [4]byte) {
	binary.BigEndian.PutUint32(b[:], v)
	return b
}

// EncodeL1Pointer returns the 12 bytes at OffL1. One aligned sector holds all pointers of the header, so switching to
// another table is one write that a power cut cannot tear.
func EncodeL1Pointer(entries uint32, off HostOff) (b [12]byte) {
	binary.BigEndian.PutUint32(b[:], entries)
	binary.BigEndian.PutUint64(b[4:], uint64(off))
	return b
}

// EncodeSizeAndL1 returns the 24 bytes at OffSize: the disk size, the encryption method that lies between, and the L1 pointer.
func EncodeSizeAndL1(size uint64, crypt, entries uint32, off HostOff) (b [24]byte) {
	binary.BigEndian.PutUint64(b[:], size)
	binary.BigEndian.PutUint32(b[OffCryptMethod-OffSize:], crypt)
	l1 := EncodeL1Pointer(entries, off)
	copy(b[OffL1-OffSize:], l1[:])
	return b
}

// EncodeRefTablePointer returns the 12 bytes at OffRefTable.
func EncodeRefTablePointer(off HostOff, clusters uint32) (b [12]byte) {
	binary.BigEndian.PutUint64(b[:], uint64(off))
	binary.BigEndian.PutUint32(b[8:], clusters)
	return b
}

// EncodeSnapshotsPointer returns the 12 bytes at OffSnapshots.
func EncodeSnapshotsPointer(n uint32, off HostOff) (b [12]byte) {
	binary.BigEndian.PutUint32(b[:], n)
	binary.BigEndian.PutUint64(b[4:], uint64(off))
	return b
}
