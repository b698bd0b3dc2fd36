//go:build (amd64 || arm64) && !purego

package luks

import (
	"bytes"
	"crypto/aes"
	"math/rand/v2"
	"testing"
)

// Every kernel does single blocks, rows of any length and whole XTS sectors as the standard library's AES does.
func TestKernelsAgreeWithStandardAES(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, k := range kernels() {
		for _, size := range []int{16, 24, 32} {
			key := random(rnd, size)
			std, err := aes.NewCipher(key)
			if err != nil {
				t.Fatal(err)
			}
			want, got := &oneByOne{std, 16}, newAESKey(k, key)
			for n := 0; n < 70; n++ {
				src := random(rnd, n*16)
				a, b := make([]byte, len(src)), make([]byte, len(src))
				want.encrypt(a, src)
				got.encrypt(b, src)
				if !bytes.Equal(a, b) {
					t.Fatalf("%v: AES-%d of %d blocks: wrong ciphertext", k, size*8, n)
				}
				got.decrypt(b, b)
				if !bytes.Equal(b, src) {
					t.Fatalf("%v: AES-%d of %d blocks: wrong plaintext", k, size*8, n)
				}
			}
		}
	}
}

func TestKernelXTSAgreesWithPlainGo(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, k := range kernels() {
		for _, size := range []int{16, 24, 32} {
			k1, k2 := random(rnd, size), random(rnd, size)
			d, err := aes.NewCipher(k1)
			if err != nil {
				t.Fatal(err)
			}
			tw, err := aes.NewCipher(k2)
			if err != nil {
				t.Fatal(err)
			}
			essiv := random(rnd, 32)
			for _, iv := range []ivGen{{}, {plain32: true}, {essiv: newAESKey(k, essiv)}} {
				want := &xts{sectors{&oneByOne{d, 16}, iv}, &oneByOne{tw, 16}}
				got := newAESXTS(newAESKey(k, k1), newAESKey(k, k2), iv)
				for _, n := range []int{0, 1, 2, 31, 32, 33, 65} {
					first := rnd.Uint64()
					src := random(rnd, n*SectorSize)
					a, b := make([]byte, len(src)), make([]byte, len(src))
					want.EncryptSectors(a, src, first)
					got.EncryptSectors(b, src, first)
					if !bytes.Equal(a, b) {
						t.Fatalf("%v: XTS-AES-%d of %d sectors from %#x: wrong ciphertext", k, size*8, n, first)
					}
					got.DecryptSectors(b, b, first)
					if !bytes.Equal(b, src) {
						t.Fatalf("%v: XTS-AES-%d of %d sectors: wrong plaintext", k, size*8, n)
					}
					got.EncryptSectors(src, src, first)
					if !bytes.Equal(a, src) {
						t.Fatalf("%v: XTS-AES-%d of %d sectors in place: wrong ciphertext", k, size*8, n)
					}
				}
			}
		}
	}
}

func TestKernelsStayInBounds(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for _, k := range kernels() {
		x := newAESXTS(newAESKey(k, random(rnd, 32)), newAESKey(k, random(rnd, 32)), ivGen{})
		for _, n := range []int{1, 7, 33} {
			buf := random(rnd, (n+2)*SectorSize)
			before := bytes.Clone(buf)
			in := buf[SectorSize+3 : SectorSize+3+n*SectorSize] // unaligned, too
			x.EncryptSectors(in, in, 1)
			x.DecryptSectors(in, in, 1)
			if !bytes.Equal(buf, before) {
				t.Errorf("%v: %d sectors: bytes around or inside changed", k, n)
			}
		}
	}
}

func TestXTSAllocatesNothing(t *testing.T) {
	for _, k := range kernels() {
		x := newAESXTS(newAESKey(k, make([]byte, 32)), newAESKey(k, make([]byte, 32)), ivGen{})
		buf := make([]byte, 64<<10)
		if n := testing.AllocsPerRun(10, func() { x.EncryptSectors(buf, buf, 1); x.DecryptSectors(buf, buf, 1) }); n != 0 {
			t.Errorf("%v: %v allocations", k, n)
		}
	}
}

func BenchmarkKernels(b *testing.B) {
	for _, k := range kernels() {
		x := newAESXTS(newAESKey(k, make([]byte, 32)), newAESKey(k, make([]byte, 32)), ivGen{})
		benchmarkCipher(b, k.String(), x)
	}
}
