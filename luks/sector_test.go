package luks

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"
)

func random(rnd *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// naive does one sector of any mode straight from the definitions, for AES.
func naive(t *testing.T, s Spec, key, src []byte, sector uint64, decrypt bool) []byte {
	t.Helper()
	block := func(k []byte) cipher.Block {
		c, err := aes.NewCipher(k)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	data := key
	if s.Mode == "xts" {
		data = key[:len(key)/2]
	}
	iv := make([]byte, 16)
	binary.LittleEndian.PutUint64(iv, sector)
	switch s.IVGen {
	case "plain":
		clear(iv[4:])
	case "essiv":
		sum := sha256.Sum256(key)
		block(sum[:]).Encrypt(iv, iv)
	}
	c := block(data)
	out := make([]byte, len(src))
	switch s.Mode {
	case "ecb":
		for i := 0; i < len(src); i += 16 {
			if decrypt {
				c.Decrypt(out[i:], src[i:])
			} else {
				c.Encrypt(out[i:], src[i:])
			}
		}
	case "cbc":
		if decrypt {
			cipher.NewCBCDecrypter(c, iv).CryptBlocks(out, src)
		} else {
			cipher.NewCBCEncrypter(c, iv).CryptBlocks(out, src)
		}
	case "ctr":
		cipher.NewCTR(c, iv).XORKeyStream(out, src)
	case "xts":
		block(key[len(key)/2:]).Encrypt(iv, iv)
		for i := 0; i < len(src); i += 16 {
			x := xor(src[i:i+16], iv)
			if decrypt {
				c.Decrypt(x, x)
			} else {
				c.Encrypt(x, x)
			}
			copy(out[i:], xor(x, iv))
			iv = timesTwo(iv)
		}
	}
	return out
}

func xor(a, b []byte) []byte {
	out := make([]byte, len(a))
	for i := range a {
		out[i] = a[i] ^ b[i]
	}
	return out
}

// timesTwo doubles a little-endian number in GF(2^128), by way of big integers.
func timesTwo(b []byte) []byte {
	be := bytes.Clone(b)
	for i := range 8 {
		be[i], be[15-i] = be[15-i], be[i]
	}
	n := new(big.Int).SetBytes(be)
	n.Lsh(n, 1)
	if n.Bit(128) == 1 {
		n.SetBit(n, 128, 0)
		n.Xor(n, big.NewInt(0x87))
	}
	out := make([]byte, 16)
	n.FillBytes(out)
	for i := range 8 {
		out[i], out[15-i] = out[15-i], out[i]
	}
	return out
}

var aesSpecs = func() []Spec {
	var list []Spec
	for _, mode := range []string{"ecb", "cbc", "ctr", "xts"} {
		list = append(list, Spec{"aes", mode, "plain64", ""}, Spec{"aes", mode, "plain", ""}, Spec{"aes", mode, "essiv", "sha256"})
	}
	return list
}()

func TestModesAgreeWithTheirDefinitions(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, s := range aesSpecs {
		for _, size := range []int{16, 24, 32} {
			if s.Mode == "xts" {
				size *= 2
			}
			key := random(rnd, size)
			c, err := NewSectorCipher(s, key)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{1, 2, 8, 9, 33, 40} {
				first := rnd.Uint64N(1 << 40)
				src := random(rnd, n*SectorSize)
				var want []byte
				for i := range n {
					want = append(want, naive(t, s, key, src[i*SectorSize:][:SectorSize], first+uint64(i), false)...)
				}
				got := make([]byte, len(src))
				c.EncryptSectors(got, src, first)
				if !bytes.Equal(got, want) {
					t.Fatalf("%+v, key of %d bytes, %d sectors: wrong ciphertext", s, size, n)
				}
				back := make([]byte, len(src))
				c.DecryptSectors(back, got, first)
				if !bytes.Equal(back, src) {
					t.Fatalf("%+v: wrong plaintext", s)
				}
				c.DecryptSectors(got, got, first)
				if !bytes.Equal(got, src) {
					t.Fatalf("%+v: wrong plaintext in place", s)
				}
				c.EncryptSectors(src, src, first)
				if !bytes.Equal(src, want) {
					t.Fatalf("%+v: wrong ciphertext in place", s)
				}
			}
		}
	}
}

// Vectors 4, 10 and 11 of IEEE P1619, whose data units have 512 bytes. Their plaintext counts from 0 to 255, twice.
func TestXTSVectorsOfP1619(t *testing.T) {
	count := make([]byte, SectorSize)
	for i := range count {
		count[i] = byte(i)
	}
	for _, v := range []struct {
		name, key string
		unit      uint64
		head      string // first bytes of the ciphertext
	}{
		{"4", "2718281828459045235360287471352631415926535897932384626433832795", 0, "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"},
		{"10", "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592",
			0xff, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"},
		{"11", "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592",
			0xffff, "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11"},
	} {
		c, err := NewSectorCipher(Spec{"aes", "xts", "plain64", ""}, unhex(t, v.key))
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, SectorSize)
		c.EncryptSectors(got, count, v.unit)
		want := unhex(t, v.head)
		if !bytes.Equal(got[:len(want)], want) {
			t.Errorf("vector %s: ciphertext begins with %x, not %x", v.name, got[:len(want)], want)
		}
		c.DecryptSectors(got, got, v.unit)
		if !bytes.Equal(got, count) {
			t.Errorf("vector %s: wrong plaintext", v.name)
		}
	}
}

func TestLegacyAES(t *testing.T) {
	for _, passphrase := range []string{"", "short", "exactly-16-bytes", "longer than sixteen bytes"} {
		c, err := NewLegacyAES([]byte(passphrase))
		if err != nil {
			t.Fatal(err)
		}
		key := make([]byte, 16)
		copy(key, passphrase)
		src := random(rand.New(rand.NewPCG(1, 1)), SectorSize)
		got := make([]byte, SectorSize)
		c.EncryptSectors(got, src, 77)
		if want := naive(t, Spec{"aes", "cbc", "plain64", ""}, key, src, 77, false); !bytes.Equal(got, want) {
			t.Errorf("passphrase %q: wrong ciphertext", passphrase)
		}
	}
}

func TestPlainCountsIn32Bits(t *testing.T) {
	for _, mode := range []string{"xts", "cbc", "ctr"} {
		c, err := NewSectorCipher(Spec{"aes", mode, "plain", ""}, make([]byte, 32))
		if err != nil {
			t.Fatal(err)
		}
		src, a, b := make([]byte, SectorSize), make([]byte, SectorSize), make([]byte, SectorSize)
		c.EncryptSectors(a, src, 5)
		c.EncryptSectors(b, src, 5+1<<32)
		if !bytes.Equal(a, b) {
			t.Errorf("%s: the upper half of the sector number counts", mode)
		}
	}
}

func TestNewSectorCipherRefuses(t *testing.T) {
	key := make([]byte, 32)
	for _, s := range []Spec{
		{"serpent", "xts", "plain64", ""},
		{"aes", "lrw", "plain64", ""},
		{"aes", "cbc", "benbi", ""},
		{"aes", "cbc", "essiv", ""},
		{"aes", "cbc", "essiv", "sha1"}, // 20 bytes are no key
		{"aes", "cbc", "essiv", "whirlpool"},
	} {
		if c, err := NewSectorCipher(s, key); err == nil {
			t.Errorf("%+v: got %T", s, c)
		}
	}
	for _, n := range []int{0, 1, 15, 17, 33, 63, 65} {
		if c, err := NewSectorCipher(Spec{"aes", "xts", "plain64", ""}, make([]byte, n)); err == nil {
			t.Errorf("key of %d bytes: got %T", n, c)
		}
	}
}

func benchmarkCipher(b *testing.B, name string, c SectorCipher) {
	for _, n := range []int{512, 4096, 65536} {
		buf := make([]byte, n)
		b.Run(fmt.Sprintf("%s/encrypt/%d", name, n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				c.EncryptSectors(buf, buf, 1)
			}
		})
		b.Run(fmt.Sprintf("%s/decrypt/%d", name, n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				c.DecryptSectors(buf, buf, 1)
			}
		})
	}
}

func BenchmarkModes(b *testing.B) {
	for _, s := range []Spec{{"aes", "xts", "plain64", ""}, {"aes", "cbc", "essiv", "sha256"}, {"aes", "ctr", "plain64", ""}} {
		key := make([]byte, 32)
		if s.Mode == "xts" {
			key = make([]byte, 64)
		}
		c, err := NewSectorCipher(s, key)
		if err != nil {
			b.Fatal(err)
		}
		benchmarkCipher(b, s.Mode, c)
	}
}
