package luks

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"sync"
)

// SectorCipher encrypts and decrypts sectors of SectorSize bytes, each by its number. dst and src are of one length,
// whole sectors, and either the same memory or apart. It is safe for concurrent use.
type SectorCipher interface {
	EncryptSectors(dst, src []byte, first uint64)
	DecryptSectors(dst, src []byte, first uint64)
}

// Spec names the parts of a sector cipher as LUKS headers do.
type Spec struct {
	Cipher string // "aes"
	Mode   string // "xts", "cbc", "ctr", "ecb"
	IVGen  string // "plain64", "plain", "essiv"
	IVHash string // "sha256", for essiv
}

const (
	modeECB = "ecb"
	modeCBC = "cbc"
	modeCTR = "ctr"
	modeXTS = "xts"

	ivPlain   = "plain"
	ivPlain64 = "plain64"
	ivESSIV   = "essiv"
)

// NewSectorCipher returns the sector cipher for a key. XTS takes two keys in a row.
func NewSectorCipher(s Spec, key []byte) (SectorCipher, error) {
	data := key
	if s.Mode == modeXTS {
		if len(key)%2 != 0 {
			return nil, headerErrorf("XTS cipher key length should be a multiple of 2")
		}
		data = key[:len(key)/2]
	}
	b, err := newBlocks(s.Cipher, data)
	if err != nil {
		return nil, err
	}
	iv, err := newIVGen(s, key)
	if err != nil {
		return nil, err
	}
	m := sectors{c: b, iv: iv}
	switch s.Mode {
	case modeECB:
		return &ecb{b}, nil
	case modeCBC:
		return &cbc{m}, nil
	case modeCTR:
		return &ctr{m}, nil
	case modeXTS:
		return newXTS(s, m, key[len(key)/2:])
	}
	return nil, &UnavailableError{"mode", s.Mode}
}

func newXTS(s Spec, m sectors, tweakKey []byte) (SectorCipher, error) {
	if m.c.size() != 16 {
		return nil, headerErrorf("XTS: cipher %s has blocks of %d bytes, not 16", printable(s.Cipher), m.c.size())
	}
	tweak, err := newBlocks(s.Cipher, tweakKey)
	if err != nil {
		return nil, err
	}
	if fast := newAESXTS(m.c, tweak, m.iv); fast != nil {
		return fast, nil
	}
	return &xts{m, tweak}, nil
}

// NewLegacyAES returns the cipher of the encryption that QCOW2 had before LUKS: AES-128 in CBC mode, its key the first 16
// bytes of the passphrase, padded with zeroes.
func NewLegacyAES(passphrase []byte) (SectorCipher, error) {
	var key [16]byte
	copy(key[:], passphrase)
	return NewSectorCipher(Spec{Cipher: aesName, Mode: modeCBC, IVGen: ivPlain64}, key[:])
}

// blocks is a block cipher that works on rows of blocks. dst and src are of one length and the same memory or apart.
type blocks interface {
	size() int
	encrypt(dst, src []byte)
	decrypt(dst, src []byte)
}

// oneByOne makes blocks of any cipher.
type oneByOne struct {
	b cipher.Block
	n int
}

func (o *oneByOne) size() int { return o.n }

func (o *oneByOne) encrypt(dst, src []byte) {
	for ; len(src) > 0; dst, src = dst[o.n:], src[o.n:] {
		o.b.Encrypt(dst, src)
	}
}

func (o *oneByOne) decrypt(dst, src []byte) {
	for ; len(src) > 0; dst, src = dst[o.n:], src[o.n:] {
		o.b.Decrypt(dst, src)
	}
}

// ivGen turns sector numbers into initialisation vectors.
type ivGen struct {
	plain32 bool   // only the low 32 bits count
	essiv   blocks // encrypts the number; nil for the plain ones
}

// newIVGen makes the generator for a key: for XTS both of its keys.
func newIVGen(s Spec, key []byte) (ivGen, error) {
	switch s.IVGen {
	case ivPlain64:
		return ivGen{}, nil
	case ivPlain:
		return ivGen{plain32: true}, nil
	case ivESSIV:
	default:
		return ivGen{}, &UnavailableError{"IV generator", s.IVGen}
	}
	if s.IVHash == "" {
		return ivGen{}, headerErrorf("Missing IV generator hash specification")
	}
	newHash, err := lookupHash(s.IVHash)
	if err != nil {
		return ivGen{}, err
	}
	h := newHash()
	h.Write(key)
	b, err := newBlocks(s.Cipher, h.Sum(nil))
	if err != nil {
		return ivGen{}, fmt.Errorf("essiv with %s: %w", printable(s.IVHash), err)
	}
	return ivGen{essiv: b}, nil
}

// number writes the plain vector of a sector.
func (g *ivGen) number(iv []byte, sector uint64) {
	if g.plain32 {
		sector &= 1<<32 - 1
	}
	clear(iv)
	binary.LittleEndian.PutUint64(iv, sector)
}

// fill writes the vectors of consecutive sectors, of n bytes each.
func (g *ivGen) fill(ivs []byte, n int, first uint64) {
	for i := 0; i < len(ivs); i += n {
		g.number(ivs[i:i+n], first)
		first++
	}
	if g.essiv != nil {
		g.essiv.encrypt(ivs, ivs)
	}
}

// batch is how many sectors the modes work on at a time.
const batch = 32

// scratch is the memory that a mode needs for a batch. It is pooled: what goes through an interface cannot be on the stack.
type scratch struct {
	ivs [batch * 16]byte
	a   [SectorSize]byte
	b   [SectorSize]byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// put gives scratch memory back without the plaintext that may be in it.
func (s *scratch) put() {
	clear(s.a[:])
	clear(s.b[:])
	scratches.Put(s)
}

func checkSectors(dst, src []byte) {
	if len(dst) != len(src) || len(src)%SectorSize != 0 {
		panic(fmt.Sprintf("luks: %d bytes into %d are not whole sectors into as many", len(src), len(dst)))
	}
}

// sectors is what the modes with vectors have in common.
type sectors struct {
	c  blocks
	iv ivGen
}

// each calls fn for every sector with its vector.
func (m *sectors) each(dst, src []byte, first uint64, fn func(w *scratch, dst, src, iv []byte)) {
	checkSectors(dst, src)
	w := scratches.Get().(*scratch)
	defer w.put()
	n := m.c.size()
	for len(src) > 0 {
		k := min(len(src)/SectorSize, batch)
		ivs := w.ivs[:k*n]
		m.iv.fill(ivs, n, first)
		for i := range k {
			fn(w, dst[i*SectorSize:][:SectorSize], src[i*SectorSize:][:SectorSize], ivs[i*n:][:n])
		}
		first += uint64(k)
		dst, src = dst[k*SectorSize:], src[k*SectorSize:]
	}
}

type ecb struct{ c blocks }

func (e *ecb) EncryptSectors(dst, src []byte, _ uint64) {
	checkSectors(dst, src)
	e.c.encrypt(dst, src)
}

func (e *ecb) DecryptSectors(dst, src []byte, _ uint64) {
	checkSectors(dst, src)
	e.c.decrypt(dst, src)
}

type cbc struct{ sectors }

// lanes is how many sectors CBC encrypts side by side. Within a sector each block waits for the one before.
const lanes = 8

func (m *cbc) EncryptSectors(dst, src []byte, first uint64) {
	checkSectors(dst, src)
	w := scratches.Get().(*scratch)
	defer w.put()
	n := m.c.size()
	for len(src) > 0 {
		k := min(len(src)/SectorSize, lanes)
		row := w.a[:k*n] // the last block of each sector, at first its vector
		m.iv.fill(row, n, first)
		for at := 0; at < SectorSize; at += n {
			for i := range k {
				subtle.XORBytes(row[i*n:][:n], row[i*n:][:n], src[i*SectorSize+at:][:n])
			}
			m.c.encrypt(row, row)
			for i := range k {
				copy(dst[i*SectorSize+at:][:n], row[i*n:][:n])
			}
		}
		first += uint64(k)
		dst, src = dst[k*SectorSize:], src[k*SectorSize:]
	}
}

func (m *cbc) DecryptSectors(dst, src []byte, first uint64) {
	m.each(dst, src, first, func(w *scratch, dst, src, iv []byte) {
		n := len(iv)
		m.c.decrypt(w.a[:], src)
		subtle.XORBytes(w.a[:n], w.a[:n], iv)
		subtle.XORBytes(w.a[n:], w.a[n:], src[:SectorSize-n])
		copy(dst, w.a[:])
	})
}

type ctr struct{ sectors }

func (m *ctr) EncryptSectors(dst, src []byte, first uint64) {
	m.each(dst, src, first, func(w *scratch, dst, src, iv []byte) {
		n := len(iv)
		for at := 0; at < SectorSize; at += n {
			copy(w.a[at:], iv)
			increment(iv)
		}
		m.c.encrypt(w.a[:], w.a[:])
		subtle.XORBytes(dst, src, w.a[:])
	})
}

func (m *ctr) DecryptSectors(dst, src []byte, first uint64) { m.EncryptSectors(dst, src, first) }

// increment adds one to a big-endian number.
func increment(b []byte) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return
		}
	}
}

// xts is XTS for any cipher with blocks of 16 bytes.
type xts struct {
	sectors
	tweak blocks
}

func (m *xts) EncryptSectors(dst, src []byte, first uint64) {
	m.each(dst, src, first, func(w *scratch, dst, src, iv []byte) {
		m.tweaks(w.b[:], iv)
		subtle.XORBytes(w.a[:], src, w.b[:])
		m.c.encrypt(w.a[:], w.a[:])
		subtle.XORBytes(dst, w.a[:], w.b[:])
	})
}

func (m *xts) DecryptSectors(dst, src []byte, first uint64) {
	m.each(dst, src, first, func(w *scratch, dst, src, iv []byte) {
		m.tweaks(w.b[:], iv)
		subtle.XORBytes(w.a[:], src, w.b[:])
		m.c.decrypt(w.a[:], w.a[:])
		subtle.XORBytes(dst, w.a[:], w.b[:])
	})
}

// tweaks writes the tweak of every block of a sector: the encrypted vector, then each the double of the one before in
// GF(2^128).
func (m *xts) tweaks(t, iv []byte) {
	m.tweak.encrypt(t[:16], iv)
	lo, hi := binary.LittleEndian.Uint64(t), binary.LittleEndian.Uint64(t[8:])
	for at := 16; at < len(t); at += 16 {
		carry := uint64(int64(hi)>>63) & 0x87
		hi = hi<<1 | lo>>63
		lo = lo<<1 ^ carry
		binary.LittleEndian.PutUint64(t[at:], lo)
		binary.LittleEndian.PutUint64(t[at+8:], hi)
	}
}
