package codec

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
)

// The decoder of deflate streams (RFC 1951) for the one case that there is here: all of the input and all of the output are
// in memory, and the length of the output is known. So it has no window, no state to stop in and go on from, and copies
// matches within dst.

const (
	litBits  = 11 // of a literal or length code that the first table decodes
	distBits = 8  // the same of a distance code
	maxCode  = 15 // the longest code
	maxMatch = 258

	litTable  = 1<<litBits + 288<<(maxCode-litBits)
	distTable = 1<<distBits + 32<<(maxCode-distBits)
)

// huffEntry is what a table says of the next bits: how many belong to the code (bits 0-7), how many extra bits follow (bits
// 8-12), what it is (flags), and a literal, the base of a length or distance, or where the second table begins (bits 16-31).
// 0 means that no code begins so.
type huffEntry uint32

const (
	huffLiteral huffEntry = 1 << (13 + iota)
	huffEnd
	huffSecond // extra is the number of bits that the second table decodes
)

func (e huffEntry) extra() uint   { return uint(e>>8) & 31 }
func (e huffEntry) value() uint32 { return uint32(e >> 16) }

// The symbols of the three alphabets, without the lengths of their codes.
var (
	litSymbols  = makeLitSymbols()
	distSymbols = makeDistSymbols()
	lenSymbols  = makeLenSymbols()
)

func makeLitSymbols() (t [286]huffEntry) {
	for i := range 256 {
		t[i] = huffLiteral | huffEntry(i)<<16
	}
	t[256] = huffEnd
	base := 3
	for i := 257; i < 285; i++ {
		extra := max((i-261)/4, 0)
		t[i] = huffEntry(base)<<16 | huffEntry(extra)<<8
		base += 1 << extra
	}
	t[285] = 258 << 16
	return t
}

func makeDistSymbols() (t [30]huffEntry) {
	base := 1
	for i := range t {
		extra := max(i/2-1, 0)
		t[i] = huffEntry(base)<<16 | huffEntry(extra)<<8
		base += 1 << extra
	}
	return t
}

func makeLenSymbols() (t [19]huffEntry) {
	for i := range t {
		t[i] = huffEntry(i) << 16
	}
	return t
}

// codeLengthOrder is the order in which a dynamic block lists the lengths of the codes for code lengths.
var codeLengthOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// buildHuffman fills a table for the codes of the given lengths, the first of which decodes first bits at once. partial
// permits a code of one symbol, which leaves half of the bits without a meaning. Symbols beyond those of the alphabet have
// codes and no meaning.
func buildHuffman(table []huffEntry, first uint, lens []uint8, symbols []huffEntry, partial bool) error {
	var count, next [maxCode + 1]int
	longest := 0
	for _, l := range lens {
		count[l]++
		longest = max(longest, int(l))
	}
	clear(table[:1<<first])
	if longest == 0 {
		return nil // no symbol: whoever asks for one finds none
	}
	left, code := 1, 0
	for l := 1; l <= maxCode; l++ {
		left = left<<1 - count[l]
		if left < 0 {
			return fmt.Errorf("codes of a deflate block are over-subscribed: %w", ErrCorrupt)
		}
		if l > 1 {
			code = (code + count[l-1]) << 1
		}
		next[l] = code
	}
	if left > 0 && !(partial && longest == 1) {
		return fmt.Errorf("codes of a deflate block are incomplete: %w", ErrCorrupt)
	}
	second := uint(max(longest-int(first), 0))
	free := uint32(1) << first
	for s, l := range lens {
		if l == 0 {
			continue
		}
		rev := uint(bits.Reverse16(uint16(next[l]))) >> (16 - l)
		next[l]++
		var e huffEntry
		if s < len(symbols) {
			e = symbols[s]
		}
		if uint(l) <= first {
			if e != 0 || s < len(symbols) {
				e |= huffEntry(l)
			}
			for j := rev; j < 1<<first; j += 1 << l {
				table[j] = e
			}
			continue
		}
		at := &table[rev&(1<<first-1)]
		if *at == 0 {
			*at = huffSecond | huffEntry(first) | huffEntry(second)<<8 | huffEntry(free)<<16
			clear(table[free : free+1<<second])
			free += 1 << second
		}
		if e != 0 || s < len(symbols) {
			e |= huffEntry(uint(l) - first)
		}
		sub := table[at.value():]
		for j := rev >> first; j < 1<<second; j += 1 << (uint(l) - first) {
			sub[j] = e
		}
	}
	return nil
}

// huffTables are the tables of one block.
type huffTables struct {
	lit  [litTable]huffEntry
	dist [distTable]huffEntry
}

// fixedTables are those of the blocks that bring none.
var fixedTables = sync.OnceValue(func() *huffTables {
	t := new(huffTables)
	var lens [288]uint8
	for i := range lens {
		switch {
		case i < 144:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		case i < 280:
			lens[i] = 7
		default:
			lens[i] = 8
		}
	}
	var dists [32]uint8
	for i := range dists {
		dists[i] = 5
	}
	if buildHuffman(t.lit[:], litBits, lens[:], litSymbols[:], false) != nil ||
		buildHuffman(t.dist[:], distBits, dists[:], distSymbols[:], false) != nil {
		panic("codec: the fixed codes of deflate are not a code")
	}
	return t
})

// inflater decodes one stream. Pooled, it allocates nothing.
type inflater struct {
	src []byte
	dst []byte
	pos int    // the next byte of src that is not in bits
	out int    // how much of dst is filled
	buf uint64 // the next bits, the first one lowest
	n   int    // how many of buf count; below 0 when more was taken than there was
	own huffTables
	len [1 << 7]huffEntry
}

var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// inflate fills dst from a deflate stream. Nothing is asked of what comes after the byte that completes dst.
func inflate(dst, src []byte) error {
	f := inflaters.Get().(*inflater)
	defer inflaters.Put(f)
	f.src, f.dst, f.pos, f.out, f.buf, f.n = src, dst, 0, 0, 0, 0
	err := f.run()
	f.src, f.dst = nil, nil // the pool must not keep the caller's bytes alive
	if err != nil {
		return fmt.Errorf("deflate stream breaks after %d of %d bytes: %w", f.out, len(dst), err)
	}
	return nil
}

func (f *inflater) run() error {
	for f.out < len(f.dst) {
		last := f.take(1) == 1
		var err error
		switch f.take(2) {
		case 0:
			err = f.stored()
		case 1:
			err = f.block(fixedTables())
		case 2:
			if err = f.readTables(); err == nil {
				err = f.block(&f.own)
			}
		default:
			err = ErrCorrupt
		}
		if err != nil {
			return err
		}
		if last && f.out < len(f.dst) {
			return fmt.Errorf("it ends there: %w", ErrCorrupt)
		}
	}
	return nil
}

// refill brings buf to at least 56 bits, or all there are.
func (f *inflater) refill() {
	if f.pos+8 <= len(f.src) {
		// Bits above n that are loaded already are loaded once more, as the same.
		f.buf |= binary.LittleEndian.Uint64(f.src[f.pos:]) << f.n
		f.pos += (63 - f.n) >> 3
		f.n |= 56
		return
	}
	for f.n <= 56 && f.pos < len(f.src) {
		f.buf |= uint64(f.src[f.pos]) << f.n
		f.pos++
		f.n += 8
	}
}

// take returns the next k bits, at most 16. Behind the end of the input they are 0, and the caller finds n below 0.
func (f *inflater) take(k int) uint {
	if f.n < k {
		f.refill()
	}
	v := uint(f.buf) & (1<<k - 1)
	f.buf >>= k
	f.n -= k
	if f.n < 0 {
		f.buf, f.n = 0, -1
		return 0
	}
	return v
}

func (f *inflater) stored() error {
	if f.n < 0 {
		return ErrCorrupt
	}
	f.pos -= f.n >> 3 // whole bytes go back
	f.buf, f.n = 0, 0
	if len(f.src)-f.pos < 4 {
		return ErrCorrupt
	}
	n := int(binary.LittleEndian.Uint16(f.src[f.pos:]))
	if n^int(binary.LittleEndian.Uint16(f.src[f.pos+2:])) != 0xffff {
		return fmt.Errorf("length of a stored block: %w", ErrCorrupt)
	}
	f.pos += 4
	n = min(n, len(f.dst)-f.out)
	if len(f.src)-f.pos < n {
		return ErrCorrupt
	}
	copy(f.dst[f.out:], f.src[f.pos:f.pos+n])
	f.pos, f.out = f.pos+n, f.out+n
	return nil
}

// readTables reads the codes of a dynamic block.
func (f *inflater) readTables() error {
	lits, dists, codes := int(f.take(5))+257, int(f.take(5))+1, int(f.take(4))+4
	if lits > 286 || dists > 30 {
		return fmt.Errorf("number of codes of a deflate block: %w", ErrCorrupt)
	}
	var order [19]uint8
	for _, s := range codeLengthOrder[:codes] {
		order[s] = uint8(f.take(3))
	}
	if err := buildHuffman(f.len[:], 7, order[:], lenSymbols[:], false); err != nil {
		return err
	}
	var lens [286 + 30]uint8
	for i := 0; i < lits+dists; {
		if f.n < maxCode {
			f.refill()
		}
		e := f.len[f.buf&(1<<7-1)]
		f.take(int(e & 0xff))
		if e == 0 || f.n < 0 {
			return ErrCorrupt
		}
		s, repeat := uint8(e.value()), 1
		switch s {
		case 16:
			if i == 0 {
				return fmt.Errorf("a code length repeats nothing: %w", ErrCorrupt)
			}
			s, repeat = lens[i-1], 3+int(f.take(2))
		case 17:
			s, repeat = 0, 3+int(f.take(3))
		case 18:
			s, repeat = 0, 11+int(f.take(7))
		}
		if repeat > lits+dists-i {
			return fmt.Errorf("too many code lengths: %w", ErrCorrupt)
		}
		for range repeat {
			lens[i] = s
			i++
		}
	}
	if f.n < 0 || lens[256] == 0 {
		return ErrCorrupt
	}
	if err := buildHuffman(f.own.lit[:], litBits, lens[:lits], litSymbols[:], true); err != nil {
		return err
	}
	return buildHuffman(f.own.dist[:], distBits, lens[lits:lits+dists], distSymbols[:], true)
}

// block decodes the symbols of a block.
func (f *inflater) block(t *huffTables) (err error) {
	if f.n < 0 {
		return ErrCorrupt
	}
	f.pos, f.out, f.buf, f.n, err = t.decode(f.src, f.dst, f.pos, f.out, f.buf, f.n)
	return err
}

// decode decodes symbols until dst is full or the block ends. It is the inner loop: its state is in local variables, and
// shifts are masked where the compiler does not see that they are short.
func (t *huffTables) decode(src, dst []byte, pos, out int, buf uint64, n int) (int, int, uint64, int, error) {
	// While there is plenty of input and of room, nothing of either needs to be asked for.
	for pos+16 <= len(src) && out+maxMatch+16 <= len(dst) {
		buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
		pos += (63 - n) >> 3
		n |= 56
		// Three literals of the first table leave 23 bits, enough for the next length and its extra bits.
		e := t.lit[buf&(1<<litBits-1)]
		if e&(huffLiteral|huffSecond) == huffLiteral {
			buf >>= e & 63
			n -= int(e & 63)
			dst[out] = byte(e >> 16)
			out++
			e = t.lit[buf&(1<<litBits-1)]
			if e&(huffLiteral|huffSecond) == huffLiteral {
				buf >>= e & 63
				n -= int(e & 63)
				dst[out] = byte(e >> 16)
				out++
				e = t.lit[buf&(1<<litBits-1)]
				if e&(huffLiteral|huffSecond) == huffLiteral {
					buf >>= e & 63
					n -= int(e & 63)
					dst[out] = byte(e >> 16)
					out++
					continue
				}
			}
		}
		if e&huffSecond != 0 {
			buf >>= litBits
			n -= litBits
			e = t.lit[uint64(e.value())+buf&(1<<(e.extra()&31)-1)]
		}
		buf >>= e & 63
		n -= int(e & 63)
		if e&huffLiteral != 0 {
			dst[out] = byte(e >> 16)
			out++
			continue
		}
		if e&huffEnd != 0 {
			return pos, out, buf, n, nil
		}
		if e == 0 {
			return pos, out, buf, n, ErrCorrupt
		}
		length := int(e.value()) + int(buf&(1<<(e.extra()&31)-1))
		buf >>= e.extra() & 31
		n -= int(e.extra())
		buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
		pos += (63 - n) >> 3
		n |= 56
		e = t.dist[buf&(1<<distBits-1)]
		if e&huffSecond != 0 {
			buf >>= distBits
			n -= distBits
			e = t.dist[uint64(e.value())+buf&(1<<(e.extra()&31)-1)]
		}
		buf >>= e & 63
		dist := int(e.value()) + int(buf&(1<<(e.extra()&31)-1))
		buf >>= e.extra() & 31
		n -= int(e&63) + int(e.extra())
		if e == 0 || dist > out {
			return pos, out, buf, n, ErrCorrupt
		}
		if dist < 8 {
			out = copyMatch(dst, out, dist, length)
			continue
		}
		// What is written past the end is written again later.
		end := out + length
		for from := out - dist; out < end; from, out = from+16, out+16 {
			binary.LittleEndian.PutUint64(dst[out:], binary.LittleEndian.Uint64(dst[from:]))
			binary.LittleEndian.PutUint64(dst[out+8:], binary.LittleEndian.Uint64(dst[from+8:]))
		}
		out = end
	}
	for out < len(dst) {
		if pos+8 <= len(src) {
			buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
			pos += (63 - n) >> 3
			n |= 56
		} else {
			for n <= 56 && pos < len(src) {
				buf |= uint64(src[pos]) << (n & 63)
				pos++
				n += 8
			}
		}
		// 56 bits hold two literals and what begins a match, or a literal, where the input goes on that far.
		e := t.lit[buf&(1<<litBits-1)]
		if e&huffLiteral != 0 && e&huffSecond == 0 && n >= 56 {
			buf >>= e & 63
			n -= int(e & 0xff)
			dst[out] = byte(e >> 16)
			out++
			e = t.lit[buf&(1<<litBits-1)]
			if e&huffLiteral != 0 && e&huffSecond == 0 && out < len(dst) {
				buf >>= e & 63
				n -= int(e & 0xff)
				dst[out] = byte(e >> 16)
				out++
				e = t.lit[buf&(1<<litBits-1)]
			}
			if out == len(dst) {
				return pos, out, buf, n, nil
			}
		}
		if e&huffSecond != 0 {
			buf >>= litBits
			n -= litBits
			e = t.lit[uint64(e.value())+buf&(1<<(e.extra()&31)-1)]
		}
		buf >>= e & 63
		n -= int(e & 0xff)
		if e == 0 || n < 0 {
			return pos, out, buf, n, ErrCorrupt
		}
		if e&huffLiteral != 0 {
			dst[out] = byte(e >> 16)
			out++
			continue
		}
		if e&huffEnd != 0 {
			return pos, out, buf, n, nil
		}
		length := int(e.value()) + int(buf&(1<<(e.extra()&31)-1))
		buf >>= e.extra() & 31
		n -= int(e.extra())

		if n < 0 {
			return pos, out, buf, n, ErrCorrupt
		}
		if pos+8 <= len(src) {
			buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
			pos += (63 - n) >> 3
			n |= 56
		} else {
			for n <= 56 && pos < len(src) {
				buf |= uint64(src[pos]) << (n & 63)
				pos++
				n += 8
			}
		}
		e = t.dist[buf&(1<<distBits-1)]
		if e&huffSecond != 0 {
			buf >>= distBits
			n -= distBits
			e = t.dist[uint64(e.value())+buf&(1<<(e.extra()&31)-1)]
		}
		buf >>= e & 63
		dist := int(e.value()) + int(buf&(1<<(e.extra()&31)-1))
		buf >>= e.extra() & 31
		n -= int(e&0xff) + int(e.extra())
		if e == 0 || n < 0 || dist > out {
			return pos, out, buf, n, ErrCorrupt
		}
		out = copyMatch(dst, out, dist, min(length, len(dst)-out))
	}
	return pos, out, buf, n, nil
}

// copyMatch repeats length bytes that lie dist before out, and returns the new end. dist is at most out.
func copyMatch(dst []byte, out, dist, length int) int {
	end := out + length
	if dist >= 8 && end+8 <= len(dst) {
		// What is written past the end is written again later.
		for from := out - dist; out < end; from, out = from+8, out+8 {
			binary.LittleEndian.PutUint64(dst[out:], binary.LittleEndian.Uint64(dst[from:]))
		}
		return end
	}
	for out < end {
		k := copy(dst[out:end], dst[out-dist:out])
		out, dist = out+k, dist+k
	}
	return end
}
