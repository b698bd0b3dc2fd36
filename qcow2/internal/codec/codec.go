// Package codec compresses and decompresses single clusters, in the two ways that QCOW2 knows.
//
// A compressed cluster is a stream of bytes that, unpacked, is exactly one cluster long. Its length on disk is known
// only to the sector, so what [Decompress] gets is usually the stream plus the beginning of whatever comes next; the
// stream alone says where it ends. The two types:
//
//   - [Zlib]: a raw deflate stream (RFC 1951, no zlib header, no checksum). [Compress] keeps its distances within
//     4 KiB, which is the window that QEMU's inflate declares.
//   - [Zstd]: zstd frames, one after the other, until the cluster is full. The last frame ends exactly there. [Compress]
//     writes one frame without a checksum: QEMU stops when its output is full and would take an unread checksum for an
//     unfinished stream.
//
// Input is untrusted. No function panics on it, output goes nowhere but into dst, and the memory in use beside dst is
// that of the pooled decoders, which do not grow with any number in the stream.
package codec

import (
	"errors"
	"fmt"
)

// The compression types, as the header of an image numbers them.
const (
	Zlib uint8 = 0
	Zstd uint8 = 1
)

var (
	// ErrCorrupt is wrapped by every error of Decompress that comes from the compressed bytes.
	ErrCorrupt = errors.New("compressed data is corrupt")
	// ErrUnknownType is wrapped when the compression type is neither Zlib nor Zstd.
	ErrUnknownType = errors.New("unknown compression type")
)

// Decompress unpacks src into dst and fills it completely. Bytes of src after the stream are ignored. After an error the
// content of dst is undefined.
func Decompress(t uint8, dst, src []byte) error {
	switch t {
	case Zlib:
		return inflate(dst, src)
	case Zstd:
		return unzstd(dst, src)
	}
	return fmt.Errorf("%w %d", ErrUnknownType, t)
}

// Compress packs the cluster src into dst and returns the length of the result. ok is false, and dst undefined, when the
// result would not be smaller than src or does not fit into dst: such a cluster is stored as it is.
func Compress(t uint8, dst, src []byte) (n int, ok bool, err error) {
	limit := min(len(dst), len(src)-1)
	if limit <= 0 {
		return 0, false, nil
	}
	switch t {
	case Zlib:
		return deflate(dst[:limit], src)
	case Zstd:
		return zstdCompress(dst[:limit], src)
	}
	return 0, false, fmt.Errorf("%w %d", ErrUnknownType, t)
}
