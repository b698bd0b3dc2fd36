package blocktest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/block"
	"pgregory.net/rapid"
)

// vectorCalls are the vectored ways of a device, or what stands for them, by name. They take any number of pieces.
func vectorCalls(dev block.Device) (read func([][]byte, int64) error, write func([][]byte, int64, block.WriteFlags) error) {
	ctx := context.Background()
	v, ok := dev.(block.VectorDevice)
	if !ok {
		return func(bufs [][]byte, off int64) error { return block.ReadV(ctx, dev, bufs, off) },
			func(bufs [][]byte, off int64, f block.WriteFlags) error { return block.WriteV(ctx, dev, bufs, off, f) }
	}
	return func(bufs [][]byte, off int64) error { return v.ReadVAt(ctx, bufs, off) },
		func(bufs [][]byte, off int64, f block.WriteFlags) error { return v.WriteVAt(ctx, bufs, off, f) }
}

// Cut cuts p into pieces of at most most bytes, or, with whole, of so many sectors: some of them empty.
func Cut(r *rand.Rand, p []byte, most int, whole bool) [][]byte {
	var bufs [][]byte
	for len(p) > 0 {
		n := 1 + r.IntN(most)
		if whole {
			n *= sector
		}
		n = min(n, len(p))
		bufs = append(bufs, p[:n:n])
		p = p[n:]
		if r.IntN(8) == 0 {
			bufs = append(bufs, nil)
		}
	}
	return bufs
}

// testVectors reads and writes the same ranges in pieces and in one.
func testVectors(t *testing.T, dev block.Device) {
	read, writeV := vectorCalls(dev)
	r := rand.New(rand.NewPCG(3, 4))
	for i, n := range []int64{1, 512, 513, 4096, 65536, 100001, 200 << 10} {
		for k, off := range places(dev, n) {
			p := pattern(n, uint64(i*100+k))
			for _, whole := range []bool{true, false} {
				most := 40
				if !whole {
					most = int(1 + n/3)
				}
				bufs := Cut(r, p, most, whole)
				shape := lengths(bufs)
				if err := writeV(bufs, off, block.WriteFlags(k%2)); err != nil {
					t.Fatalf("writing %d bytes at %d in pieces: %v", n, off, err)
				}
				if !equal(shape, lengths(bufs)) {
					t.Fatal("the list of buffers was changed")
				}
				expect(t, dev, off, p)
				got := bytes.Repeat([]byte{0x99}, int(n))
				if err := read(Cut(r, got, most, whole), off); err != nil {
					t.Fatalf("reading %d bytes at %d in pieces: %v", n, off, err)
				}
				if at := firstDifference(got, p); at >= 0 {
					t.Fatalf("reading %d bytes at %d in pieces: offset %d differs", n, off, off+int64(at))
				}
				p = pattern(n, uint64(i*100+k)+5000)
			}
		}
	}
	testVectorRanges(t, dev)
}

func lengths(bufs [][]byte) []int {
	out := make([]int, len(bufs))
	for i, b := range bufs {
		out[i] = len(b)
	}
	return out
}

func equal(a, b []int) bool {
	for i := range a {
		if len(a) != len(b) || a[i] != b[i] {
			return false
		}
	}
	return len(a) == len(b)
}

// expectPieces reads a device from its beginning on in pieces, waiting and not.
func expectPieces(t *testing.T, dev block.Device, want []byte) {
	t.Helper()
	read, _ := vectorCalls(dev)
	r := rand.New(rand.NewPCG(7, 8))
	for name, call := range map[string]func([][]byte, int64) error{
		"read": read,
		"try":  func(bufs [][]byte, off int64) error { return block.TryReadV(dev, bufs, off) },
	} {
		got := bytes.Repeat([]byte{0x99}, len(want))
		err := call(Cut(r, got, 8, true), 0)
		if name == "try" && errors.Is(err, block.ErrWouldBlock) {
			continue
		}
		if at := firstDifference(got, want); err != nil || at >= 0 {
			t.Errorf("%s in pieces: %v; offset %d differs", name, err, at)
		}
	}
}

// testVectorRanges asks for what is not there, of which nothing may be written, and for nothing.
func testVectorRanges(t *testing.T, dev block.Device) {
	read, writeV := vectorCalls(dev)
	size := dev.Size()
	before := make([]byte, 2*sector)
	if err := dev.ReadAt(context.Background(), before, size-2*sector); err != nil {
		t.Fatal(err)
	}
	p := pattern(4*sector, 99)
	for _, bufs := range [][][]byte{{p[:sector], p[sector:]}, {p[:700], p[700:]}, {nil, p}} {
		for _, off := range []int64{-1, size, size - 2*sector, size - 1, size + sector} {
			if err := read([][]byte{bytes.Clone(bufs[0]), bytes.Clone(bufs[1])}, off); !errors.Is(err, block.ErrOutOfRange) {
				t.Errorf("reading pieces at %d of %d: %v, want ErrOutOfRange", off, size, err)
			}
			if err := writeV(bufs, off, 0); !errors.Is(err, block.ErrOutOfRange) {
				t.Errorf("writing pieces at %d of %d: %v, want ErrOutOfRange", off, size, err)
			}
		}
	}
	expect(t, dev, size-2*sector, before)
	for _, none := range [][][]byte{nil, {nil}, {{}, nil}} {
		for _, off := range []int64{0, 1, size} {
			if err := errors.Join(read(none, off), writeV(none, off, 0), writeV(none, off, block.WriteFUA)); err != nil {
				t.Errorf("no bytes in %d pieces at %d: %v", len(none), off, err)
			}
		}
		if read(none, size+1) == nil || writeV(none, size+1, 0) == nil {
			t.Error("no bytes behind the end of the device: no error")
		}
	}
}

// testTryVectors is testTry in pieces.
func testTryVectors(t *testing.T, dev block.Device) {
	const span = 192 << 10
	want := pattern(span, 8)
	write(t, dev, want, 0, 0)
	r := rand.New(rand.NewPCG(5, 6))
	for i := range 300 {
		off := r.Int64N(span/sector) * sector
		n := min(r.Int64N(40*sector)+1, span-off)
		if r.IntN(4) > 0 {
			n = min((n+sector-1)&^(sector-1), span-off)
		}
		whole := r.IntN(8) > 0
		if i%2 == 0 {
			got := bytes.Repeat([]byte{0x99}, int(n))
			err := block.TryReadV(dev, Cut(r, got, 20, whole), off)
			if err == nil && !bytes.Equal(got, want[off:][:n]) {
				t.Fatalf("TryReadV(%d, %d) reads something else than ReadAt", n, off)
			}
			if err != nil && !errors.Is(err, block.ErrWouldBlock) {
				t.Fatalf("TryReadV: %v", err)
			}
			continue
		}
		p := pattern(n, uint64(i))
		try := block.TryWriteV
		if i%4 == 1 {
			try = block.TryOverwriteV
		}
		switch err := try(dev, Cut(r, p, 20, whole), off); {
		case err == nil:
			copy(want[off:], p)
		case !errors.Is(err, block.ErrWouldBlock):
			t.Fatalf("trying to write: %v", err)
		}
		expect(t, dev, 0, want)
	}
	two := [][]byte{make([]byte, sector), make([]byte, sector)}
	for name, err := range map[string]error{
		"TryReadV":      block.TryReadV(dev, two, dev.Size()-sector),
		"TryWriteV":     block.TryWriteV(dev, two, dev.Size()-sector),
		"TryOverwriteV": block.TryOverwriteV(dev, two, dev.Size()-sector),
	} {
		if !errors.Is(err, block.ErrOutOfRange) && !errors.Is(err, block.ErrWouldBlock) {
			t.Errorf("%s past the end: %v", name, err)
		}
	}
	for _, err := range []error{block.TryReadV(dev, nil, 0), block.TryWriteV(dev, nil, 0), block.TryOverwriteV(dev, nil, 0)} {
		if err != nil && !errors.Is(err, block.ErrWouldBlock) {
			t.Errorf("trying to move nothing: %v", err)
		}
	}
}

func (m *model) writeV(rt *rapid.T) {
	off, n := m.pick(rt)
	m.seed++
	p := pattern(n, m.seed)
	_, writeV := vectorCalls(m.dev)
	r := rand.New(rand.NewPCG(m.seed, 1))
	bufs := Cut(r, p, 1+r.IntN(100), rapid.Bool().Draw(rt, "whole"))
	if !rapid.Bool().Draw(rt, "try") || block.TryWriteV(m.dev, bufs, off) != nil {
		if err := writeV(bufs, off, block.WriteFlags(m.seed%2)); err != nil {
			rt.Fatalf("writing %d bytes at %d in pieces: %v", n, off, err)
		}
	}
	copy(m.want[off:], p)
}

func (m *model) readV(rt *rapid.T) {
	off, n := m.pick(rt)
	got := bytes.Repeat([]byte{0x99}, int(n))
	read, _ := vectorCalls(m.dev)
	r := rand.New(rand.NewPCG(m.seed, 2))
	bufs := Cut(r, got, 1+r.IntN(100), rapid.Bool().Draw(rt, "whole"))
	if !rapid.Bool().Draw(rt, "try") || block.TryReadV(m.dev, bufs, off) != nil {
		if err := read(bufs, off); err != nil {
			rt.Fatalf("reading %d bytes at %d in pieces: %v", n, off, err)
		}
	}
	if at := firstDifference(got, m.want[off:][:n]); at >= 0 {
		rt.Fatalf("reading %d bytes at %d in pieces: offset %d differs", n, off, off+int64(at))
	}
}
