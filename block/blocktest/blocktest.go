// Package blocktest is the conformance suite of [block.Device]: what a format or a layer has to pass to be one.
//
//	func TestDevice(t *testing.T) { blocktest.Run(t, func(t *testing.T) block.Device { return newDevice(t) }) }
//
// Every part of the suite takes a fresh device from the given function: writable, reading as zeroes throughout, of
// between 256 KiB and 256 MiB. The part closes it.
package blocktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"pgregory.net/rapid"
)

const (
	sector  = 512
	minSize = 256 << 10
	// modelSpan is how much of the device the model test uses: a few of the largest common clusters.
	modelSpan = 256 << 10
	maxSize   = 256 << 20
)

// Make returns a fresh device.
type Make func(t *testing.T) block.Device

// Run runs the whole suite.
func Run(t *testing.T, newDevice Make) {
	parts := []struct {
		name string
		run  func(*testing.T, block.Device)
	}{
		{"Info", testInfo},
		{"FreshReadsZero", testFresh},
		{"RangeErrors", testRanges},
		{"EmptyRanges", testEmpty},
		{"ReadYourWrites", testReadYourWrites},
		{"BuffersAreNotKept", testBuffers},
		{"Zeroes", testZeroes},
		{"FastZeroes", testFastZeroes},
		{"Discard", testDiscard},
		{"Extents", testExtents},
		{"Try", testTry},
		{"Vectors", testVectors},
		{"TryVectors", testTryVectors},
		{"DisjointWriters", testDisjointWriters},
		{"OverlappingWriters", testOverlappingWriters},
	}
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			dev := open(t, newDevice)
			p.run(t, dev)
			closeDevice(t, dev)
		})
	}
	t.Run("Close", func(t *testing.T) { testClose(t, open(t, newDevice)) })
	t.Run("Model", func(t *testing.T) { testModel(t, newDevice) })
}

// RunReadOnly checks that a read-only device refuses changes and still reads as want.
func RunReadOnly(t *testing.T, dev block.Device, want []byte) {
	t.Helper()
	if !dev.Info().ReadOnly {
		t.Error("Info().ReadOnly is false")
	}
	ctx := t.Context()
	for name, err := range map[string]error{
		"WriteAt":     dev.WriteAt(ctx, make([]byte, sector), 0, 0),
		"WriteZeroes": dev.WriteZeroes(ctx, 0, sector, 0),
		"Discard":     dev.Discard(ctx, 0, sector),
		"WriteV":      block.WriteV(ctx, dev, [][]byte{make([]byte, sector), make([]byte, sector)}, 0, 0),
	} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: %v, want ErrReadOnly", name, err)
		}
	}
	if try, ok := dev.(block.TryDevice); ok {
		err := try.TryWriteAt(make([]byte, sector), 0)
		if !errors.Is(err, block.ErrReadOnly) && !errors.Is(err, block.ErrWouldBlock) {
			t.Errorf("TryWriteAt: %v, want ErrReadOnly", err)
		}
	}
	if err := dev.Flush(ctx); err != nil {
		t.Errorf("Flush: %v", err)
	}
	expect(t, dev, 0, want)
	expectPieces(t, dev, want)
}

func open(t *testing.T, newDevice Make) block.Device {
	t.Helper()
	dev := newDevice(t)
	if dev == nil {
		t.Fatal("no device to test")
	}
	if s := dev.Size(); s < minSize || s > maxSize {
		t.Fatalf("the suite needs a device of %d to %d bytes, not %d", minSize, maxSize, s)
	}
	return dev
}

func closeDevice(t *testing.T, dev block.Device) {
	t.Helper()
	if err := dev.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// tester is what checks report to: a *testing.T or a *rapid.T.
type tester interface {
	Helper()
	Errorf(string, ...any)
	Fatalf(string, ...any)
}

func expect(t tester, dev block.Device, off int64, want []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0x99}, len(want)) // a read that leaves bytes alone must not look right
	if err := dev.ReadAt(context.Background(), got, off); err != nil {
		t.Fatalf("ReadAt(%d bytes, %d): %v", len(want), off, err)
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("after reading %d bytes at %d: offset %d holds %#x, want %#x", len(want), off, off+int64(i), got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

func write(t tester, dev block.Device, p []byte, off int64, flags block.WriteFlags) {
	t.Helper()
	if err := dev.WriteAt(context.Background(), p, off, flags); err != nil {
		t.Fatalf("WriteAt(%d bytes, %d): %v", len(p), off, err)
	}
}

// pattern returns n bytes none of which is zero, different for each seed.
func pattern(n int64, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 42))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(1 + rng.IntN(255))
	}
	return p
}

func testInfo(t *testing.T, dev block.Device) {
	info := dev.Info()
	if info.ReadOnly {
		t.Error("the suite needs a writable device")
	}
	if info.Format == "" {
		t.Error("no format name")
	}
	for name, n := range map[string]int{"MinAlign": info.MinAlign, "PreferAlign": info.PreferAlign} {
		if n <= 0 || n&(n-1) != 0 {
			t.Errorf("%s = %d is not a power of two", name, n)
		}
	}
	if n := info.DiscardAlign; n < 0 || n&(n-1) != 0 {
		t.Errorf("DiscardAlign = %d is not a power of two", n)
	}
	if info.MinAlign > info.PreferAlign {
		t.Errorf("MinAlign %d > PreferAlign %d", info.MinAlign, info.PreferAlign)
	}
	if dev.Size()%sector != 0 {
		t.Errorf("Size %d is not a multiple of %d", dev.Size(), sector)
	}
}

func testFresh(t *testing.T, dev block.Device) {
	const step = 1 << 20
	for off := int64(0); off < dev.Size(); off += step {
		expect(t, dev, off, make([]byte, min(step, dev.Size()-off)))
	}
}

// calls are the methods that take a range, by name.
func calls(dev block.Device) map[string]func(off, n int64) error {
	ctx := context.Background()
	buf := func(n int64) []byte { return make([]byte, min(max(n, 0), maxSize+1)) }
	return map[string]func(off, n int64) error{
		"ReadAt":      func(off, n int64) error { return dev.ReadAt(ctx, buf(n), off) },
		"WriteAt":     func(off, n int64) error { return dev.WriteAt(ctx, buf(n), off, 0) },
		"WriteZeroes": func(off, n int64) error { return dev.WriteZeroes(ctx, off, n, 0) },
		"Discard":     func(off, n int64) error { return dev.Discard(ctx, off, n) },
		"Extents": func(off, n int64) error {
			return dev.Extents(ctx, off, n, func(block.Extent) bool { return true })
		},
	}
}

func testRanges(t *testing.T, dev block.Device) {
	size := dev.Size()
	whole := [][2]int64{{0, size + 1}, {-1, 1}, {size, 1}, {size - 1, 2}, {size + 1, 0}, {size + sector, sector}}
	// A buffer cannot have such lengths; the other methods take them as numbers.
	numbers := [][2]int64{
		{math.MaxInt64, 1}, {1, math.MaxInt64}, {math.MaxInt64, math.MaxInt64}, {0, -1}, {math.MinInt64, 1},
		{sector, math.MinInt64},
	}
	for name, call := range calls(dev) {
		ranges := whole
		if name != "ReadAt" && name != "WriteAt" {
			ranges = append(append([][2]int64{}, whole...), numbers...)
		}
		for _, r := range ranges {
			if err := call(r[0], r[1]); !errors.Is(err, block.ErrOutOfRange) {
				t.Errorf("%s(off %d, n %d) of a device of %d = %v, want ErrOutOfRange", name, r[0], r[1], size, err)
			}
		}
	}
}

func testEmpty(t *testing.T, dev block.Device) {
	for name, call := range calls(dev) {
		for _, off := range []int64{0, 1, dev.Size()} {
			if err := call(off, 0); err != nil {
				t.Errorf("%s of nothing at %d: %v", name, off, err)
			}
		}
	}
}

// places are offsets where something may go wrong, each with room for n bytes.
func places(dev block.Device, n int64) []int64 {
	size := dev.Size()
	info := dev.Info()
	var list []int64
	for _, unit := range []int64{sector, int64(info.PreferAlign), int64(info.DiscardAlign), 65536} {
		for _, off := range []int64{0, 1, unit - 1, unit, unit + 1, 3*unit - n/2, size/2 - n/2, size - n - 1, size - n} {
			if off >= 0 && off+n <= size {
				list = append(list, off)
			}
		}
	}
	return list
}

func testReadYourWrites(t *testing.T, dev block.Device) {
	seed := uint64(0)
	for _, n := range []int64{1, 3, 511, 512, 513, 4096, 65536, 100001} {
		for _, off := range places(dev, n) {
			seed++
			p := pattern(n, seed)
			write(t, dev, p, off, block.WriteFlags(seed%2))
			expect(t, dev, off, p)
			if off > 0 && seed > 1 { // one byte more on the left, whatever it is, must not have become ours
				got := make([]byte, n+1)
				if err := dev.ReadAt(t.Context(), got, off-1); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got[1:], p) {
					t.Fatalf("reading %d bytes from %d differs from reading %d from %d", n+1, off-1, n, off)
				}
			}
		}
	}
	if err := dev.Flush(t.Context()); err != nil {
		t.Errorf("Flush: %v", err)
	}
}

func testBuffers(t *testing.T, dev block.Device) {
	p := pattern(8192, 1)
	want := bytes.Clone(p)
	write(t, dev, p, 100, 0)
	clear(p)
	expect(t, dev, 100, want)
}

func testZeroes(t *testing.T, dev block.Device) {
	ctx := t.Context()
	const span = 200 << 10
	for i, flags := range []block.ZeroFlags{0, block.ZeroUnmap, block.ZeroFUA, block.ZeroUnmap | block.ZeroFUA} {
		for _, r := range [][2]int64{
			{0, span}, {0, 1}, {1, 511}, {511, 2}, {4000, 100}, {4096, 4096}, {65535, 65538}, {70000, span - 70000},
		} {
			want := pattern(span, uint64(i))
			write(t, dev, want, 0, 0)
			if err := dev.WriteZeroes(ctx, r[0], r[1], flags); err != nil {
				t.Fatalf("WriteZeroes(%d, %d, %d): %v", r[0], r[1], flags, err)
			}
			clear(want[r[0]:][:r[1]])
			expect(t, dev, 0, want)
		}
	}
	// Zeroing what was never written must work as well, and be harmless up to the very end.
	if err := dev.WriteZeroes(ctx, 0, dev.Size(), block.ZeroUnmap); err != nil {
		t.Fatalf("zeroing the whole device: %v", err)
	}
	expect(t, dev, dev.Size()-span, make([]byte, span))
}

func testFastZeroes(t *testing.T, dev block.Device) {
	for _, flags := range []block.ZeroFlags{block.ZeroFast, block.ZeroFast | block.ZeroUnmap} {
		for _, r := range [][2]int64{{0, 131072}, {65536, 65536}, {1000, 5000}, {4096, 512}} {
			want := pattern(131072, 5)
			write(t, dev, want, 0, 0)
			switch err := dev.WriteZeroes(t.Context(), r[0], r[1], flags); {
			case err == nil:
				clear(want[r[0]:][:r[1]])
			case !errors.Is(err, block.ErrNoFastZero):
				t.Fatalf("WriteZeroes(%d, %d, fast): %v", r[0], r[1], err)
			case dev.Info().FastZero && whole(dev, r[0]) && whole(dev, r[1]):
				t.Errorf("WriteZeroes(%d, %d, fast) is refused though Info promises it", r[0], r[1])
			}
			expect(t, dev, 0, want)
		}
	}
}

func whole(dev block.Device, n int64) bool {
	unit := int64(dev.Info().DiscardAlign)
	return unit > 0 && n%unit == 0
}

func testDiscard(t *testing.T, dev block.Device) {
	const span = 200 << 10
	for _, r := range [][2]int64{
		{0, span}, {0, 1}, {300, 100}, {511, 2}, {512, 512}, {4096, 8192}, {65536, 65536}, {60000, 80000},
	} {
		before := pattern(span, 3)
		write(t, dev, before, 0, 0)
		if err := dev.Discard(t.Context(), r[0], r[1]); err != nil {
			t.Fatalf("Discard(%d, %d): %v", r[0], r[1], err)
		}
		after := make([]byte, span)
		if err := dev.ReadAt(t.Context(), after, 0); err != nil {
			t.Fatal(err)
		}
		checkDiscarded(t, before, after, 0, r[0], r[1])
		expect(t, dev, 0, after) // what it became it must remain
	}
	if err := dev.Discard(t.Context(), 0, dev.Size()); err != nil {
		t.Fatalf("discarding the whole device: %v", err)
	}
}

// checkDiscarded checks what [off, off+n) may have become. before and after are the content from base on.
func checkDiscarded(t tester, before, after []byte, base, off, n int64) {
	t.Helper()
	for s := 0; s < len(after); s += sector {
		end := min(s+sector, len(after))
		lo, hi := max(off-base, int64(s)), min(off+n-base, int64(end))
		zeroed := bytes.Clone(before[s:end])
		if lo < hi {
			clear(zeroed[lo-int64(s) : hi-int64(s)])
		}
		if got := after[s:end]; !bytes.Equal(got, before[s:end]) && !bytes.Equal(got, zeroed) {
			t.Fatalf("after Discard(%d, %d) the sector at %d is neither as before nor zero", off, n, base+int64(s))
		}
	}
}

func testExtents(t *testing.T, dev block.Device) {
	checkExtents(t, dev, 0, dev.Size())
	write(t, dev, pattern(65536, 1), 65536, 0)
	write(t, dev, pattern(10, 1), 3, 0)
	write(t, dev, pattern(100, 2), dev.Size()-100, 0)
	if err := dev.WriteZeroes(t.Context(), 70000, 9000, block.ZeroUnmap); err != nil {
		t.Fatal(err)
	}
	checkExtents(t, dev, 0, dev.Size())
	rng := rand.New(rand.NewPCG(9, 9))
	for range 50 {
		off := rng.Int64N(min(dev.Size(), 256<<10))
		checkExtents(t, dev, off, rng.Int64N(dev.Size()-off))
	}
	count := 0
	err := dev.Extents(t.Context(), 0, dev.Size(), func(block.Extent) bool { count++; return false })
	if err != nil || count != 1 {
		t.Errorf("a callback that returned false was called %d times, error %v", count, err)
	}
}

// checkExtents checks that the extents cover the range exactly and tell the truth about zeroes.
func checkExtents(t tester, dev block.Device, off, n int64) {
	t.Helper()
	next := off
	err := dev.Extents(context.Background(), off, n, func(e block.Extent) bool {
		if e.Off != next || e.Len <= 0 || e.End() > off+n {
			t.Fatalf("Extents(%d, %d): extent [%d, %d) where one beginning at %d was due", off, n, e.Off, e.End(), next)
		}
		next = e.End()
		if !e.Allocated && (e.Data || !e.Zero) {
			t.Fatalf("extent at %d is allocated nowhere, yet %+v", e.Off, e)
		}
		if !e.Zero && !e.Data {
			t.Fatalf("extent at %d neither has data nor reads as zeroes", e.Off)
		}
		if e.Zero {
			head := min(e.Len, 1<<20)
			expect(t, dev, e.Off, make([]byte, head))
			expect(t, dev, e.End()-head, make([]byte, head))
		}
		return true
	})
	if err != nil {
		t.Fatalf("Extents(%d, %d): %v", off, n, err)
	}
	if next != off+n {
		t.Fatalf("Extents(%d, %d) end at %d", off, n, next)
	}
}

func testTry(t *testing.T, dev block.Device) {
	try, ok := dev.(block.TryDevice)
	if !ok {
		t.Skip("the device has no Try methods")
	}
	const span = 128 << 10
	want := pattern(span, 8)
	write(t, dev, want, 0, 0)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		off := rng.Int64N(span)
		n := rng.Int64N(min(span-off, 20000)) + 1
		n = min(n, span-off)
		if i%2 == 0 {
			got := make([]byte, n)
			err := try.TryReadAt(got, off)
			if err == nil && !bytes.Equal(got, want[off:][:n]) {
				t.Fatalf("TryReadAt(%d, %d) reads something else than ReadAt", n, off)
			}
			if err != nil && !errors.Is(err, block.ErrWouldBlock) {
				t.Fatalf("TryReadAt: %v", err)
			}
			tryData(t, dev, want, off, n)
			continue
		}
		p := pattern(n, uint64(i))
		switch err := try.TryWriteAt(p, off); {
		case err == nil:
			copy(want[off:], p)
		case !errors.Is(err, block.ErrWouldBlock):
			t.Fatalf("TryWriteAt: %v", err)
		}
		expect(t, dev, 0, want)
	}
	refused := func(err error) bool {
		return errors.Is(err, block.ErrOutOfRange) || errors.Is(err, block.ErrWouldBlock)
	}
	if err := try.TryReadAt(make([]byte, 2), dev.Size()-1); !refused(err) {
		t.Errorf("TryReadAt past the end: %v", err)
	}
	if err := try.TryWriteAt(make([]byte, 2), dev.Size()-1); !refused(err) {
		t.Errorf("TryWriteAt past the end: %v", err)
	}
}

// tryData reads a range of what is wanted where the device says that it is data.
func tryData(t *testing.T, dev block.Device, want []byte, off, n int64) {
	t.Helper()
	data, ok := dev.(block.DataDevice)
	if !ok {
		return
	}
	got := make([]byte, n)
	switch err := data.TryReadDataAt(got, off); {
	case err == nil && !bytes.Equal(got, want[off:][:n]):
		t.Fatalf("TryReadDataAt(%d, %d) reads something else than ReadAt", n, off)
	case errors.Is(err, block.ErrAllZero):
		if len(bytes.Trim(want[off:][:n], "\x00")) > 0 {
			t.Fatalf("TryReadDataAt(%d, %d) finds zeroes only, where there is data", n, off)
		}
		return
	case err != nil && !errors.Is(err, block.ErrWouldBlock) && !errors.Is(err, block.ErrMixed):
		t.Fatalf("TryReadDataAt: %v", err)
	case err != nil:
		return
	}
	err := dev.Extents(context.Background(), off, n, func(e block.Extent) bool {
		if e.Zero && !e.Data {
			t.Fatalf("TryReadDataAt(%d, %d) reads a range that is zero at %d", n, off, e.Off)
		}
		return true
	})
	if err != nil {
		t.Fatalf("Extents: %v", err)
	}
}

// testDisjointWriters: writers that share clusters and even sectors, but no byte, must not disturb each other.
func testDisjointWriters(t *testing.T, dev block.Device) {
	const writers, chunk, span = 4, 1000, 240 << 10
	want := make([]byte, span)
	var wg sync.WaitGroup
	for w := range int64(writers) {
		for off := w * chunk; off+chunk <= span; off += writers * chunk {
			copy(want[off:], pattern(chunk, uint64(off)))
		}
	}
	for w := range int64(writers) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for off := w * chunk; off+chunk <= span; off += writers * chunk {
				if err := dev.WriteAt(t.Context(), want[off:][:chunk], off, 0); err != nil {
					t.Errorf("WriteAt(%d): %v", off, err)
					return
				}
				got := make([]byte, chunk)
				if err := dev.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, want[off:][:chunk]) {
					t.Errorf("own bytes at %d read back differently (%v)", off, err)
					return
				}
			}
		}()
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for range 10 {
			if err := dev.Flush(t.Context()); err != nil {
				t.Errorf("Flush: %v", err)
			}
			if err := dev.Extents(t.Context(), 0, dev.Size(), func(block.Extent) bool { return true }); err != nil {
				t.Errorf("Extents: %v", err)
			}
		}
	}()
	wg.Wait()
	whole := span / (writers * chunk) * (writers * chunk)
	expect(t, dev, 0, want[:whole])
}

// testOverlappingWriters: of requests on the same sectors each sector is left by one of them, never a mixture.
func testOverlappingWriters(t *testing.T, dev block.Device) {
	const writers, span = 4, 192 << 10
	var wg sync.WaitGroup
	for w := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for range 40 {
				off := rng.Int64N(span/sector) * sector
				n := min((1+rng.Int64N(100))*sector, span-off)
				var err error
				switch rng.IntN(6) {
				case 0:
					err = dev.WriteZeroes(t.Context(), off, n, block.ZeroUnmap)
				case 1:
					err = dev.Discard(t.Context(), off, n)
				default:
					err = dev.WriteAt(t.Context(), bytes.Repeat([]byte{byte(w + 1)}, int(n)), off, 0)
				}
				if err != nil {
					t.Errorf("change of %d bytes at %d: %v", n, off, err)
					return
				}
			}
		}()
	}
	wg.Wait()
	got := make([]byte, span)
	if err := dev.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	for s := 0; s < span; s += sector {
		if !bytes.Equal(got[s:s+sector], bytes.Repeat(got[s:s+1], sector)) || got[s] > writers {
			t.Fatalf("sector at %d is a mixture", s)
		}
	}
	checkExtents(t, dev, 0, dev.Size())
}

func testClose(t *testing.T, dev block.Device) {
	write(t, dev, pattern(5000, 1), 0, 0)
	closeDevice(t, dev)
	for name, call := range calls(dev) {
		if err := call(0, sector); !errors.Is(err, block.ErrClosed) {
			t.Errorf("%s after Close: %v, want ErrClosed", name, err)
		}
	}
	read, writeV := vectorCalls(dev)
	two := [][]byte{make([]byte, sector), make([]byte, sector)}
	if r, w := read(two, 0), writeV(two, 0, 0); !errors.Is(r, block.ErrClosed) || !errors.Is(w, block.ErrClosed) {
		t.Errorf("pieces after Close: %v, %v, want ErrClosed", r, w)
	}
	if err := dev.Flush(t.Context()); !errors.Is(err, block.ErrClosed) {
		t.Errorf("Flush after Close: %v, want ErrClosed", err)
	}
	if err := dev.Close(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("second Close: %v, want ErrClosed", err)
	}
}

// testModel runs random sequences of requests against the device and against plain memory.
func testModel(t *testing.T, newDevice Make) {
	rapid.Check(t, func(rt *rapid.T) {
		dev := open(t, newDevice)
		m := model{dev: dev, span: min(dev.Size(), modelSpan)}
		m.want = make([]byte, m.span)
		rt.Repeat(map[string]func(*rapid.T){
			"write":   m.write,
			"writeV":  m.writeV,
			"readV":   m.readV,
			"zero":    m.zero,
			"discard": m.discard,
			"read":    m.read,
			"flush":   m.flush,
			"extents": m.extents,
		})
		expect(rt, dev, 0, m.want)
		if err := dev.Close(); err != nil {
			rt.Fatalf("Close: %v", err)
		}
	})
}

type model struct {
	dev  block.Device
	span int64
	want []byte
	seed uint64
}

// pick draws a range that often begins or ends at a boundary of the device.
func (m *model) pick(rt *rapid.T) (off, n int64) {
	edge := func(label string) int64 {
		unit := rapid.SampledFrom([]int64{1, sector, 4096, int64(m.dev.Info().PreferAlign), 65536}).Draw(rt, label+" unit")
		at := rapid.Int64Range(0, m.span/unit).Draw(rt, label) * unit
		return min(max(at+rapid.Int64Range(-1, 1).Draw(rt, label+" shift"), 0), m.span)
	}
	a, b := edge("from"), edge("to")
	return min(a, b), max(a, b) - min(a, b)
}

func (m *model) write(rt *rapid.T) {
	off, n := m.pick(rt)
	m.seed++
	p := pattern(n, m.seed)
	write(rt, m.dev, p, off, block.WriteFlags(rapid.IntRange(0, 1).Draw(rt, "fua")))
	copy(m.want[off:], p)
}

func (m *model) zero(rt *rapid.T) {
	off, n := m.pick(rt)
	flags := block.ZeroFlags(rapid.IntRange(0, 7).Draw(rt, "flags"))
	err := m.dev.WriteZeroes(context.Background(), off, n, flags)
	if errors.Is(err, block.ErrNoFastZero) && flags&block.ZeroFast != 0 {
		return
	}
	if err != nil {
		rt.Fatalf("WriteZeroes(%d, %d, %d): %v", off, n, flags, err)
	}
	clear(m.want[off:][:n])
}

func (m *model) discard(rt *rapid.T) {
	off, n := m.pick(rt)
	if err := m.dev.Discard(context.Background(), off, n); err != nil {
		rt.Fatalf("Discard(%d, %d): %v", off, n, err)
	}
	after := make([]byte, m.span)
	if err := m.dev.ReadAt(context.Background(), after, 0); err != nil {
		rt.Fatalf("ReadAt: %v", err)
	}
	checkDiscarded(rt, m.want, after, 0, off, n)
	m.want = after
}

func (m *model) read(rt *rapid.T) {
	off, n := m.pick(rt)
	expect(rt, m.dev, off, m.want[off:][:n])
}

func (m *model) flush(rt *rapid.T) {
	if err := m.dev.Flush(context.Background()); err != nil {
		rt.Fatalf("Flush: %v", err)
	}
}

func (m *model) extents(rt *rapid.T) {
	off, n := m.pick(rt)
	checkExtents(rt, m.dev, off, n)
}

// Describe formats the extents of a whole device, one a line, merged as far as they continue each other: for tests that
// compare maps.
func Describe(ctx context.Context, dev block.Device) (string, error) {
	var b bytes.Buffer
	var last *block.Extent
	flush := func() {
		if last != nil {
			fmt.Fprintf(&b, "%d+%d depth=%d alloc=%v data=%v zero=%v\n",
				last.Off, last.Len, last.Depth, last.Allocated, last.Data, last.Zero)
		}
	}
	err := dev.Extents(ctx, 0, dev.Size(), func(e block.Extent) bool {
		if last != nil && last.SameState(e) {
			last.Len += e.Len
			return true
		}
		flush()
		last = &e
		return true
	})
	flush()
	return b.String(), err
}
