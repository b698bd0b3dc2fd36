package image

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"sync"

	"github.com/droverproject/drover/block"
)

// SumAlgorithm says how a disk's content is hashed.
type SumAlgorithm string

const (
	// SumBlocks hashes blocks of 1 MiB on all processors, and the list of their hashes. What reads as zeroes costs next to
	// nothing.
	SumBlocks SumAlgorithm = "sha256-1m"
	// SumFlat is the SHA-256 of all bytes, as sha256sum has it for a raw file. It takes one processor and all of the zeroes.
	SumFlat SumAlgorithm = "sha256-flat"
)

// SumOptions control Sum.
type SumOptions struct {
	Algorithm SumAlgorithm // "" is SumBlocks
	Progress  Progress
}

// sumBlock is the length of a block of SumBlocks. It is part of what that is, and never changes.
const sumBlock = 1 << 20

// sumLabel begins what is hashed last, so that no disk's content passes for another's list of hashes.
const sumLabel = "drover sha256-1m\n"

type blockHash [sha256.Size]byte

// Sum hashes the content of a disk: what a guest reads, whatever the format, the layers and the allocation.
//
// SumBlocks is the SHA-256 of: the text "drover sha256-1m" and a newline; the disk's length in bytes, as 8 bytes, the most
// significant first; and, in order, the SHA-256 of each block of 1 MiB of the disk, the last of which is as long as there is
// left.
func Sum(ctx context.Context, dev block.Device, o SumOptions) ([]byte, error) {
	s := newSummer(dev, o)
	switch o.Algorithm {
	case SumBlocks, "":
		s.top = newSum(s.size)
	case SumFlat:
		s.flat = true
	default:
		return nil, fmt.Errorf("unknown algorithm %q: expecting %s or %s", o.Algorithm, SumBlocks, SumFlat)
	}
	if err := inOrder(ctx, workers(), s.produce, s.work, s.done); err != nil {
		return nil, err
	}
	return s.top.Sum(nil), nil
}

// newSum begins the hash of a disk's blocks.
func newSum(size int64) hash.Hash {
	h := sha256.New()
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(size))
	h.Write([]byte(sumLabel))
	h.Write(b[:])
	return h
}

// blockSums hashes the blocks of a disk; known may have the hash of a block already.
func blockSums(ctx context.Context, dev block.Device, progress Progress, known func(block int64) (blockHash, bool)) ([]blockHash, error) {
	s := newSummer(dev, SumOptions{Progress: progress})
	s.known, s.keep = known, true
	err := inOrder(ctx, workers(), s.produce, s.work, s.done)
	return s.blocks, err
}

// sumOf is what Sum makes of a disk with these blocks.
func sumOf(size int64, blocks []blockHash) []byte {
	h := newSum(size)
	for i := range blocks {
		h.Write(blocks[i][:])
	}
	return h.Sum(nil)
}

// zeroBlockHash is the hash of a whole block of zeroes. It is made when it is wanted: hashing a block would be the longest part
// of the start of a program that sums nothing.
var zeroBlockHash = sync.OnceValue(func() blockHash { return sha256.Sum256(sumZeroes[:]) })

func newSummer(dev block.Device, o SumOptions) *summer {
	return &summer{o: o, dev: dev, size: dev.Size(), cursor: newCursor(dev), top: sha256.New(), zero: zeroBlockHash()}
}

type summer struct {
	o      SumOptions
	dev    block.Device
	size   int64
	cursor *cursor
	flat   bool
	zero   blockHash // of a block of zeroes
	top    hash.Hash

	known  func(block int64) (blockHash, bool) // may be nil
	keep   bool                                // what blocks gets
	blocks []blockHash
}

// What there is to do with a piece.
const (
	sumRead  uint8 = iota // one block
	sumZero               // whole blocks of zeroes
	sumKnown              // one block, whose hash is known
)

// produce emits blocks, and runs of blocks of zeroes.
func (s *summer) produce(emit func(*piece) bool) error {
	for off := int64(0); off < s.size; {
		if s.known != nil {
			if h, ok := s.known(off / sumBlock); ok {
				n := min(sumBlock, s.size-off)
				if !emit(&piece{off: off, n: n, kind: sumKnown, hash: h}) {
					return nil
				}
				off += n
				continue
			}
		}
		e, err := s.cursor.next(context.Background(), off)
		if err != nil {
			return &StatusError{0, err}
		}
		if s.known != nil {
			e.Len = min(e.Len, sumBlock) // what follows may be known
		}
		if n := (e.End() - off) / sumBlock * sumBlock; e.Zero && n > 0 {
			if !emit(&piece{off: off, n: n, kind: sumZero}) {
				return nil
			}
			off += n
			continue
		}
		p := &piece{off: off, n: min(sumBlock, s.size-off), kind: sumRead}
		for at := off; at < off+p.n; {
			if e, err = s.cursor.next(context.Background(), at); err != nil {
				return &StatusError{0, err}
			}
			end := min(e.End(), off+p.n)
			p.addRun(at-off, end-at, e.Zero)
			at = end
		}
		if !emit(p) {
			return nil
		}
		off += p.n
	}
	return nil
}

// work reads a block and hashes it.
func (s *summer) work(ctx context.Context, p *piece) error {
	if p.kind != sumRead {
		return nil
	}
	p.buf = buffers.Get().(*[]byte)
	b := (*p.buf)[:p.n]
	for _, r := range p.runs {
		part := b[r.at : r.at+r.n]
		if r.zero {
			clear(part)
			continue
		}
		if err := s.dev.ReadAt(ctx, part, p.off+r.at); err != nil {
			buffers.Put(p.buf)
			return &ReadError{0, p.off + r.at, err}
		}
	}
	if s.flat {
		return nil // what comes before must be hashed first
	}
	p.hash = sha256.Sum256(b)
	buffers.Put(p.buf)
	return nil
}

// done takes the pieces in order.
func (s *summer) done(p *piece) error {
	switch {
	case s.keep && p.kind == sumZero:
		for n := p.n; n > 0; n -= sumBlock {
			s.blocks = append(s.blocks, s.zero)
		}
	case s.keep:
		s.blocks = append(s.blocks, p.hash)
	case s.flat && p.kind == sumZero:
		for n := p.n; n > 0; n -= sumBlock {
			s.top.Write(sumZeroes[:])
		}
	case s.flat:
		s.top.Write((*p.buf)[:p.n])
		buffers.Put(p.buf)
	case p.kind == sumZero:
		for n := p.n; n > 0; n -= sumBlock {
			s.top.Write(s.zero[:])
		}
	default:
		s.top.Write(p.hash[:])
	}
	if s.o.Progress != nil {
		s.o.Progress(p.off+p.n, s.size)
	}
	return nil
}

var sumZeroes [sumBlock]byte
