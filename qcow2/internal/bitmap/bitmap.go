// Package bitmap is a set of granules of a disk, in memory: which parts of it have been written. It knows nothing of images.
//
// A [Bitmap] is marked by any number of writers at once, without a lock: a granule that is marked already costs one load.
// Memory is taken for pages of 32768 granules, and only for those of which some granules are marked and some are not. Bits
// are only ever added while others look; [Bitmap.Clear] is for when nobody does.
package bitmap

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

const (
	wordBits  = 64
	pageWords = 512
	pageBits  = pageWords * wordBits
	// PageBytes is how many bytes of the serialised bitmap one page stands for.
	PageBytes = pageBits / 8
)

type page [pageWords]atomic.Uint64

// allOnes stands for every page whose granules are all marked. Its own words are never looked at.
var allOnes = new(page)

// Bitmap is a set of granules of a disk.
type Bitmap struct {
	granularityBits uint8
	size            int64 // of the disk
	bits            int64
	pages           []atomic.Pointer[page] // nil: no granule is marked
}

// New returns an empty Bitmap for a disk of size bytes, with one bit for each 1<<granularityBits bytes.
func New(size int64, granularityBits uint8) *Bitmap {
	n := int64(0)
	if size > 0 {
		n = (size-1)>>granularityBits + 1
	}
	return &Bitmap{granularityBits, size, n, make([]atomic.Pointer[page], (n+pageBits-1)/pageBits)}
}

// Granularity returns how many bytes of the disk one bit stands for.
func (b *Bitmap) Granularity() int64 { return 1 << b.granularityBits }

// Bits returns the number of granules.
func (b *Bitmap) Bits() int64 { return b.bits }

// Bytes returns the length of the serialised bitmap.
func (b *Bitmap) Bytes() int64 { return (b.bits + 7) / 8 }

// Mark marks every granule that [off, off+n) of the disk touches.
func (b *Bitmap) Mark(off, n int64) {
	if off, n = b.clip(off, n); n <= 0 {
		return
	}
	first, last := off>>b.granularityBits, (off+n-1)>>b.granularityBits
	if first == last {
		b.setBits(first/pageBits, first%pageBits, first%pageBits+1) // the usual write
		return
	}
	b.markBits(first, last+1)
}

// clip cuts a range down to what is on the disk.
func (b *Bitmap) clip(off, n int64) (int64, int64) {
	if off < 0 {
		off, n = 0, n+off
	}
	if off >= b.size {
		return off, 0
	}
	return off, min(n, b.size-off)
}

// markBits marks the granules [lo, hi).
func (b *Bitmap) markBits(lo, hi int64) {
	for lo < hi {
		p, from := lo/pageBits, lo%pageBits
		to := min(from+hi-lo, pageBits)
		if from == 0 && (to == pageBits || p*pageBits+to == b.bits) {
			if b.pages[p].Load() != allOnes {
				b.pages[p].Store(allOnes) // who still adds to the page that was here adds nothing
			}
		} else {
			b.setBits(p, from, to)
		}
		lo += to - from
	}
}

// setBits marks granules [from, to) of a page.
func (b *Bitmap) setBits(p, from, to int64) {
	pg := b.pages[p].Load()
	if pg == allOnes {
		return
	}
	if pg == nil {
		fresh := new(page)
		if b.pages[p].CompareAndSwap(nil, fresh) {
			pg = fresh
		} else if pg = b.pages[p].Load(); pg == allOnes {
			return
		}
	}
	for from < to {
		w, at := from/wordBits, from%wordBits
		n := min(to-from, wordBits-at)
		mask := ^uint64(0) >> (wordBits - n) << at
		if pg[w].Load()&mask != mask {
			pg[w].Or(mask)
		}
		from += n
	}
}

// word returns the w-th word of the bitmap; bits behind the end are zero.
func (b *Bitmap) word(w int64) uint64 {
	pg := b.pages[w/pageWords].Load()
	switch pg {
	case nil:
		return 0
	case allOnes:
		if rest := b.bits - w*wordBits; rest < wordBits {
			return 1<<rest - 1
		}
		return ^uint64(0)
	}
	return pg[w%pageWords].Load()
}

// next returns the first granule in [at, end) that is marked (or is not), or end.
func (b *Bitmap) next(at, end int64, marked bool) int64 {
	for at < end {
		pg := b.pages[at/pageBits].Load()
		if pg == nil && marked || pg == allOnes && !marked {
			at = (at/pageBits + 1) * pageBits
			continue
		}
		w := b.word(at / wordBits)
		if !marked {
			w = ^w
		}
		if w = w >> (at % wordBits); w != 0 {
			return min(at+int64(bits.TrailingZeros64(w)), end)
		}
		at = (at/wordBits + 1) * wordBits
	}
	return end
}

// Runs calls fn for consecutive runs of granules that cover [from, to), alternately marked and not, until fn returns false.
func (b *Bitmap) Runs(from, to int64, fn func(first, n int64, marked bool) bool) {
	to = min(to, b.bits)
	for from = max(from, 0); from < to; {
		end := b.next(from, to, true)
		marked := end == from
		if marked {
			end = b.next(from, to, false)
		}
		if !fn(from, end-from, marked) {
			return
		}
		from = end
	}
}

// Count returns how many granules are marked.
func (b *Bitmap) Count() int64 {
	var n int64
	b.Runs(0, b.bits, func(_, run int64, marked bool) bool {
		if marked {
			n += run
		}
		return true
	})
	return n
}

// Empty reports whether no granule is marked.
func (b *Bitmap) Empty() bool { return b.next(0, b.bits, true) == b.bits }

// Clear forgets all marks. Nobody else uses the bitmap meanwhile.
func (b *Bitmap) Clear() {
	for i := range b.pages {
		b.pages[i].Store(nil)
	}
}

// Merge marks whatever part of the disk is marked in o, whose granularity may be another.
func (b *Bitmap) Merge(o *Bitmap) {
	o.Runs(0, o.bits, func(first, n int64, marked bool) bool {
		if marked {
			b.Mark(first<<o.granularityBits, n<<o.granularityBits)
		}
		return true
	})
}

// Touched reports whether any granule is marked among those that bytes [at, at+n) of the serialised bitmap stand for, and
// whether all of them are.
func (b *Bitmap) Touched(at, n int64) (some, all bool) {
	lo, hi := at*8, min((at+n)*8, b.bits)
	return b.next(lo, hi, true) < hi, b.next(lo, hi, false) == hi
}

// OrInto adds the marks to dst, which is a part of the serialised bitmap beginning at byte at, a multiple of 8: bit n of the
// bitmap is bit n%8 of byte n/8, counted from the least significant. Bits behind the last granule become zero.
func (b *Bitmap) OrInto(dst []byte, at int64) {
	var tail [8]byte
	for i := 0; i < len(dst); i += 8 {
		w := at/8 + int64(i/8)
		rest := b.bits - w*wordBits
		if rest <= 0 {
			clear(dst[i:])
			return
		}
		p := tail[:]
		copy(p, dst[i:])
		v := binary.LittleEndian.Uint64(p) | b.word(w)
		if rest < wordBits {
			v &= 1<<rest - 1
		}
		binary.LittleEndian.PutUint64(p, v)
		copy(dst[i:], p)
		clear(p)
	}
}

// Load marks what a part of a serialised bitmap marks; src begins at byte at of it, a multiple of 8.
func (b *Bitmap) Load(src []byte, at int64) {
	for i := 0; i < len(src); i += 8 {
		var p [8]byte
		copy(p[:], src[i:])
		v := binary.LittleEndian.Uint64(p[:])
		first := (at + int64(i)) * 8
		for v != 0 {
			lo := int64(bits.TrailingZeros64(v))
			n := int64(bits.TrailingZeros64(^(v >> lo)))
			if first+lo < b.bits {
				b.markBits(first+lo, min(first+lo+n, b.bits))
			}
			if lo+n >= wordBits {
				break
			}
			v = v >> (lo + n) << (lo + n)
		}
	}
}

// LoadOnes marks all granules that bytes [at, at+n) of the serialised bitmap stand for.
func (b *Bitmap) LoadOnes(at, n int64) {
	b.markBits(at*8, min((at+n)*8, b.bits))
}

// NextTouched returns the first byte of the serialised bitmap at or behind at that has a mark in it, rounded down to the page
// where a whole page is marked, or Bytes.
func (b *Bitmap) NextTouched(at int64) int64 {
	if at >= b.Bytes() {
		return b.Bytes()
	}
	g := b.next(at*8, b.bits, true)
	if g == b.bits {
		return b.Bytes()
	}
	return g / 8
}
