package codec

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
)

const (
	// maxCluster is the largest cluster of the format and so the most that a decoder is ever asked to produce.
	maxCluster = 2 << 20
	// maxWindow is what the reference decoder accepts by default. Decoding straight into dst needs no window of its own,
	// so this costs no memory.
	maxWindow = 128 << 20
)

// Numbers of the zstd frame format (RFC 8878).
const (
	zstdMagic         = 0xFD2FB528
	skippableMagic    = 0x184D2A50 // the low four bits are free
	skippableMask     = 0xFFFFFFF0
	blockHeaderSize   = 3
	blockRaw          = 0
	blockRLE          = 1
	blockCompressed   = 2
	checksumSize      = 4
	descSingleSegment = 1 << 5
	descChecksum      = 1 << 2
)

// zstdDecoder is a decoder, or the reason why the library refused our options.
type zstdDecoder struct {
	dec *zstd.Decoder
	err error
}

var zstdDecoders = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(maxCluster),
		zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecodeAllCapLimit(true))
	return &zstdDecoder{dec, err}
}}

// unzstd decodes frame after frame until dst is full.
func unzstd(dst, src []byte) error {
	_, err := unzstdFrames(dst, src)
	return err
}

// unzstdFrames is unzstd, and returns how long the frames are. It finds the end of each frame itself, since what follows the
// last one may be anything, also the frame of the next cluster.
func unzstdFrames(dst, src []byte) (int, error) {
	if len(dst) > maxCluster {
		return 0, fmt.Errorf("a cluster of %d bytes is larger than any the format has", len(dst))
	}
	d := zstdDecoders.Get().(*zstdDecoder)
	defer zstdDecoders.Put(d)
	if d.err != nil {
		return 0, fmt.Errorf("creating a zstd decoder: %w", d.err)
	}
	filled, taken := 0, 0
	for filled < len(dst) {
		size, err := frameSize(src[taken:])
		if err != nil {
			return 0, fmt.Errorf("zstd stream breaks after %d of %d bytes: %w", filled, len(dst), err)
		}
		out, err := d.dec.DecodeAll(src[taken:taken+size], dst[filled:filled:len(dst)])
		if err != nil {
			return 0, fmt.Errorf("zstd frame breaks after %d of %d bytes: %w: %w", filled, len(dst), ErrCorrupt, err)
		}
		if len(out) > len(dst)-filled {
			return 0, fmt.Errorf("%w: zstd frames hold more than a cluster of %d bytes", ErrCorrupt, len(dst))
		}
		if len(out) > 0 && &out[0] != &dst[filled] {
			copy(dst[filled:], out)
		}
		filled += len(out)
		taken += size
	}
	return taken, nil
}

func truncated(what string) error { return fmt.Errorf("%w: zstd %s is cut off", ErrCorrupt, what) }

// frameSize returns the length of the frame that src begins with, by its headers alone.
func frameSize(src []byte) (int, error) {
	if len(src) < 5 {
		return 0, truncated("frame header")
	}
	magic := binary.LittleEndian.Uint32(src)
	if magic&skippableMask == skippableMagic {
		return skippableSize(src)
	}
	if magic != zstdMagic {
		return 0, fmt.Errorf("%w: no zstd frame at this place (found 0x%08x)", ErrCorrupt, magic)
	}
	pos := frameHeaderSize(src[4])
	for {
		if len(src)-pos < blockHeaderSize {
			return 0, truncated("block header")
		}
		h := uint32(src[pos]) | uint32(src[pos+1])<<8 | uint32(src[pos+2])<<16
		size, err := blockSize(h)
		if err != nil {
			return 0, err
		}
		pos += blockHeaderSize
		if len(src)-pos < size {
			return 0, truncated("block")
		}
		pos += size
		if h&1 != 0 { // the last block
			break
		}
	}
	if src[4]&descChecksum == 0 {
		return pos, nil
	}
	if len(src)-pos < checksumSize {
		return 0, truncated("checksum")
	}
	return pos + checksumSize, nil
}

// frameHeaderSize is the length of a frame header, magic included, with the given descriptor byte.
func frameHeaderSize(desc byte) int {
	n := 4 + 1
	if desc&descSingleSegment == 0 {
		n++ // window descriptor
	}
	n += [4]int{0, 1, 2, 4}[desc&3] // dictionary ID
	switch desc >> 6 {              // frame content size
	case 0:
		if desc&descSingleSegment != 0 {
			n++
		}
	case 1:
		n += 2
	case 2:
		n += 4
	case 3:
		n += 8
	}
	return n
}

// blockSize is the number of bytes after a block header.
func blockSize(h uint32) (int, error) {
	switch h >> 1 & 3 {
	case blockRLE:
		return 1, nil
	case blockRaw, blockCompressed:
		return int(h >> 3), nil
	}
	return 0, fmt.Errorf("%w: zstd block of a reserved type", ErrCorrupt)
}

func skippableSize(src []byte) (int, error) {
	if len(src) < 8 {
		return 0, truncated("skippable frame")
	}
	size := uint64(binary.LittleEndian.Uint32(src[4:])) + 8
	if size > uint64(len(src)) {
		return 0, truncated("skippable frame")
	}
	return int(size), nil
}

// zstdEncoder is an encoder, or the reason why there is none.
type zstdEncoder struct {
	enc *zstd.Encoder
	err error
}

var zstdEncoders = sync.Pool{New: func() any {
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedDefault), // about level 3 of the reference encoder, as QEMU uses
		zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(maxCluster),
		zstd.WithAllLitEntropyCompression(true), // small clusters often have no matches and still compress
		zstd.WithLowerEncoderMem(true))
	return &zstdEncoder{enc, err}
}}

func zstdCompress(dst, src []byte) (int, bool, error) {
	e := zstdEncoders.Get().(*zstdEncoder)
	defer zstdEncoders.Put(e)
	if e.err != nil {
		return 0, false, fmt.Errorf("creating a zstd encoder: %w", e.err)
	}
	out := e.enc.EncodeAll(src, dst[:0:len(dst)])
	if len(out) > len(dst) {
		return 0, false, nil
	}
	return copy(dst, out), true, nil
}
