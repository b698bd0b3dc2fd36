//go:build (amd64 || arm64) && !purego

package luks

import (
	"encoding/binary"
	"math/bits"
)

const aesBlock = 16

// aesKey is AES with a key, by the processor's own instructions.
type aesKey struct {
	k      kernel
	rounds int
	// Round keys in the order of their use. Those of decryption are for the equivalent inverse cipher of FIPS 197.
	enc, dec [15 * aesBlock]byte
}

func newAESKey(k kernel, key []byte) *aesKey {
	a := &aesKey{k: k, rounds: len(key)/4 + 6}
	w := expandKey(key, a.rounds)
	for i, v := range w {
		binary.BigEndian.PutUint32(a.enc[4*i:], v)
		from := 4*(a.rounds-i/4) + i%4
		v = w[from]
		if i >= 4 && i < 4*a.rounds {
			v = invMixColumn(v)
		}
		binary.BigEndian.PutUint32(a.dec[4*i:], v)
	}
	return a
}

func (a *aesKey) size() int { return aesBlock }

func (a *aesKey) encrypt(dst, src []byte) {
	if len(src) > 0 {
		a.k.encrypt(a, dst[:len(src)], src)
	}
}

func (a *aesKey) decrypt(dst, src []byte) {
	if len(src) > 0 {
		a.k.decrypt(a, dst[:len(src)], src)
	}
}

// aesXTS is XTS with AES, the whole of a sector in one go. Nothing in it passes through an interface, so that its scratch
// memory is on the stack.
type aesXTS struct {
	data, tweak *aesKey
	plain32     bool
	essiv       *aesKey
}

// newAESXTS returns nil when the ciphers are not those that it can speed up.
func newAESXTS(data, tweak blocks, iv ivGen) SectorCipher {
	d, ok1 := data.(*aesKey)
	t, ok2 := tweak.(*aesKey)
	e, ok3 := iv.essiv.(*aesKey)
	if !ok1 || !ok2 || !ok3 && iv.essiv != nil {
		return nil
	}
	return &aesXTS{d, t, iv.plain32, e}
}

// tweaks fills in the first tweak of each of n sectors.
func (x *aesXTS) tweaks(buf *[batch * aesBlock]byte, n int, first uint64) {
	for i := range n {
		sector := first + uint64(i)
		if x.plain32 {
			sector &= 1<<32 - 1
		}
		binary.LittleEndian.PutUint64(buf[i*aesBlock:], sector)
		binary.LittleEndian.PutUint64(buf[i*aesBlock+8:], 0)
	}
	row := buf[:n*aesBlock]
	if x.essiv != nil {
		x.essiv.k.encrypt(x.essiv, row, row)
	}
	x.tweak.k.encrypt(x.tweak, row, row)
}

func (x *aesXTS) EncryptSectors(dst, src []byte, first uint64) {
	checkSectors(dst, src)
	var buf [batch * aesBlock]byte
	for len(src) > 0 {
		n := min(len(src)/SectorSize, batch)
		x.tweaks(&buf, n, first)
		x.data.k.encryptXTS(x.data, dst, src, &buf, n)
		first += uint64(n)
		dst, src = dst[n*SectorSize:], src[n*SectorSize:]
	}
}

func (x *aesXTS) DecryptSectors(dst, src []byte, first uint64) {
	checkSectors(dst, src)
	var buf [batch * aesBlock]byte
	for len(src) > 0 {
		n := min(len(src)/SectorSize, batch)
		x.tweaks(&buf, n, first)
		x.data.k.decryptXTS(x.data, dst, src, &buf, n)
		first += uint64(n)
		dst, src = dst[n*SectorSize:], src[n*SectorSize:]
	}
}

// expandKey is the key expansion of FIPS 197.
func expandKey(key []byte, rounds int) []uint32 {
	sbox := aesSBox()
	sub := func(w uint32) uint32 {
		return uint32(sbox[w>>24])<<24 | uint32(sbox[w>>16&0xff])<<16 | uint32(sbox[w>>8&0xff])<<8 | uint32(sbox[w&0xff])
	}
	nk := len(key) / 4
	w := make([]uint32, 4*(rounds+1))
	for i := range nk {
		w[i] = binary.BigEndian.Uint32(key[4*i:])
	}
	rcon := byte(1)
	for i := nk; i < len(w); i++ {
		t := w[i-1]
		switch {
		case i%nk == 0:
			t = sub(bits.RotateLeft32(t, 8)) ^ uint32(rcon)<<24
			rcon = double(rcon)
		case nk > 6 && i%nk == 4:
			t = sub(t)
		}
		w[i] = w[i-nk] ^ t
	}
	return w
}

// aesSBox computes the substitution box of AES: the inverse in GF(2^8), then an affine map. 3 generates the field's
// multiplicative group; q follows the inverse of p.
func aesSBox() *[256]byte {
	var s [256]byte
	p, q := byte(1), byte(1)
	for {
		p ^= double(p) // times 3
		q = divideBy3(q)
		s[p] = q ^ bits.RotateLeft8(q, 1) ^ bits.RotateLeft8(q, 2) ^ bits.RotateLeft8(q, 3) ^ bits.RotateLeft8(q, 4) ^ 0x63
		if p == 1 {
			break
		}
	}
	s[0] = 0x63
	return &s
}

// divideBy3 multiplies with 0xf6, the inverse of 3.
func divideBy3(b byte) byte { return multiply(b, 0xf6) }

// double multiplies with 2 in AES's field.
func double(b byte) byte { return b<<1 ^ byte(int8(b)>>7)&0x1b }

func multiply(a, b byte) byte {
	var p byte
	for ; b != 0; b >>= 1 {
		p ^= -(b & 1) & a
		a = double(a)
	}
	return p
}

func invMixColumn(w uint32) uint32 {
	var in, out [4]byte
	binary.BigEndian.PutUint32(in[:], w)
	for i := range out {
		out[i] = multiply(in[i], 14) ^ multiply(in[(i+1)%4], 11) ^ multiply(in[(i+2)%4], 13) ^ multiply(in[(i+3)%4], 9)
	}
	return binary.BigEndian.Uint32(out[:])
}
