package format

import "encoding/binary"

// Refcount returns entry i of a refcount block. i must be less than RefcountsPerBlock of a block of that length.
//
// Entries narrower than a byte are packed from the least significant bit up; wider ones are big-endian.
func (l Layout) Refcount(block []byte, i int64) uint64 {
	switch l.RefcountOrder {
	case 4:
		return uint64(binary.BigEndian.Uint16(block[2*i:]))
	case 0:
		return uint64(block[i/8] >> (i % 8) & 1)
	case 1:
		return uint64(block[i/4] >> (i % 4 * 2) & 3)
	case 2:
		return uint64(block[i/2] >> (i % 2 * 4) & 15)
	case 3:
		return uint64(block[i])
	case 5:
		return uint64(binary.BigEndian.Uint32(block[4*i:]))
	}
	return binary.BigEndian.Uint64(block[8*i:])
}

// SetRefcount stores entry i of a refcount block. v must not be greater than RefcountMax: what is above is cut off.
func (l Layout) SetRefcount(block []byte, i int64, v uint64) {
	switch l.RefcountOrder {
	case 4:
		binary.BigEndian.PutUint16(block[2*i:], uint16(v))
	case 0:
		setBits(&block[i/8], i%8, 1, v)
	case 1:
		setBits(&block[i/4], i%4*2, 3, v)
	case 2:
		setBits(&block[i/2], i%2*4, 15, v)
	case 3:
		block[i] = byte(v)
	case 5:
		binary.BigEndian.PutUint32(block[4*i:], uint32(v))
	default:
		binary.BigEndian.PutUint64(block[8*i:], v)
	}
}

func setBits(b *byte, shift int64, mask byte, v uint64) {
	*b = *b&^(mask<<shift) | byte(v)&mask<<shift
}
