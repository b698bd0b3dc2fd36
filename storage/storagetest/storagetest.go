// Package storagetest checks that a storage.File keeps the contract of package storage.
//
// [Run] is called from the test of each implementation with a function that makes an empty, writable file. Operations
// that the contract makes optional may answer storage.ErrNotSupported; it is then checked that they changed nothing.
package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/storage"
)

// NewFile returns a new, empty file. Run closes it.
type NewFile func(t *testing.T) storage.File

// Run checks one implementation.
func Run(t *testing.T, newFile NewFile) {
	tests := []struct {
		name string
		run  func(t *testing.T, f storage.File)
	}{
		{"Empty", testEmpty},
		{"ReadWrite", testReadWrite},
		{"EndOfFile", testEndOfFile},
		{"Gap", testGap},
		{"Vectors", testVectors},
		{"ManyVectors", testManyVectors},
		{"Truncate", testTruncate},
		{"TruncateForgets", testTruncateForgets},
		{"PunchHole", testPunchHole},
		{"ZeroRange", testZeroRange},
		{"Preallocate", testPreallocate},
		{"Sparse", testSparse},
		{"Extents", testExtents},
		{"BadRanges", testBadRanges},
		{"Nowait", testNowait},
		{"Sync", testSync},
		{"Lock", testLock},
		{"Model", testModel},
		{"ConcurrentNeighbours", testConcurrentNeighbours},
		{"ConcurrentAppend", testConcurrentAppend},
		{"ConcurrentOverlap", testConcurrentOverlap},
		{"ConcurrentMix", testConcurrentMix},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFile(t)
			test.run(t, f)
			if err := f.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
	t.Run("Closed", func(t *testing.T) { testClosed(t, newFile(t)) })
}

// pattern returns bytes that differ from their neighbours and from those of another seed.
func pattern(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32()) | 1 // never zero
	}
	return p
}

func mustWrite(t *testing.T, f storage.File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

func mustRead(t *testing.T, f storage.File, n int, off int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xEE}, n)
	if m, err := f.ReadAt(p, off); m != n || (err != nil && err != io.EOF) {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", n, off, m, err)
	}
	return p
}

func wantSize(t *testing.T, f storage.File, want int64) {
	t.Helper()
	if size, err := f.Size(); size != want || err != nil {
		t.Fatalf("Size = %d, %v; want %d", size, err, want)
	}
}

// wantContent checks every byte and the length.
func wantContent(t *testing.T, f storage.File, want []byte) {
	t.Helper()
	wantSize(t, f, int64(len(want)))
	got := mustRead(t, f, len(want), 0)
	if !bytes.Equal(got, want) {
		i := mismatch(got, want)
		t.Fatalf("byte %d of %d is %#x, want %#x", i, len(want), got[i], want[i])
	}
}

// mismatch returns the first place where a differs from b, -1 if none does.
func mismatch(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func testEmpty(t *testing.T, f storage.File) {
	wantSize(t, f, 0)
	if n, err := f.ReadAt(make([]byte, 10), 0); n != 0 || err != io.EOF {
		t.Errorf("ReadAt of an empty file = %d, %v; want 0, EOF", n, err)
	}
	if n, err := f.ReadAt(nil, 0); n != 0 || (err != nil && err != io.EOF) {
		t.Errorf("ReadAt of no bytes = %d, %v", n, err)
	}
	if n, err := f.WriteAt(nil, 100); n != 0 || err != nil {
		t.Errorf("WriteAt of no bytes = %d, %v", n, err)
	}
	wantSize(t, f, 0)
	if _, _, err := f.NextExtent(0); err != io.EOF {
		t.Errorf("NextExtent of an empty file: %v, want EOF", err)
	}
	if info := f.Stat(); info.ReadOnly || info.Align < 1 {
		t.Errorf("Stat = %+v", info)
	}
}

func testReadWrite(t *testing.T, f storage.File) {
	model := make([]byte, 20000)
	mustWrite(t, f, model, 0)
	for i, r := range []struct{ off, n int }{{0, 20000}, {1, 1}, {511, 2}, {512, 512}, {4095, 4098}, {8192, 4096}, {19999, 1}} {
		p := pattern(uint64(i), r.n)
		mustWrite(t, f, p, int64(r.off))
		copy(model[r.off:], p)
		wantContent(t, f, model)
		if got := mustRead(t, f, r.n, int64(r.off)); !bytes.Equal(got, p) {
			t.Errorf("reading back %d bytes at %d: differs", r.n, r.off)
		}
	}
}

func testEndOfFile(t *testing.T, f storage.File) {
	want := pattern(1, 5001) // no multiple of any sector
	mustWrite(t, f, want, 0)
	wantContent(t, f, want)
	for _, r := range []struct {
		off  int64
		n    int
		want int
	}{
		{5001, 1, 0}, {5000, 2, 1}, {0, 5002, 5001}, {4096, 4096, 905}, {4999, 512, 2}, {1 << 40, 512, 0}, {5002, 10, 0},
		{5120, 512, 0}, {8192, 4096, 0},
	} {
		p := make([]byte, r.n)
		n, err := f.ReadAt(p, r.off)
		if n != r.want || err != io.EOF {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v; want %d, EOF", r.n, r.off, n, err, r.want)
		}
		if n > 0 && !bytes.Equal(p[:n], want[r.off:][:n]) {
			t.Errorf("ReadAt(%d bytes, %d): wrong bytes", r.n, r.off)
		}
	}
	if n, err := f.ReadAt(make([]byte, 5001), 0); n != 5001 || (err != nil && err != io.EOF) {
		t.Errorf("reading exactly to the end = %d, %v", n, err)
	}
	bufs := [][]byte{make([]byte, 4096), make([]byte, 4096)}
	if n, err := f.ReadVAt(bufs, 0); n != 5001 || err != io.EOF {
		t.Errorf("ReadVAt over the end = %d, %v; want 5001, EOF", n, err)
	}
	if !bytes.Equal(bufs[1][:905], want[4096:]) {
		t.Errorf("ReadVAt over the end: wrong bytes")
	}
}

func testGap(t *testing.T, f storage.File) {
	mustWrite(t, f, []byte("begin"), 0)
	mustWrite(t, f, []byte("end"), 100000)
	want := make([]byte, 100003)
	copy(want, "begin")
	copy(want[100000:], "end")
	wantContent(t, f, want)
}

func testVectors(t *testing.T, f storage.File) {
	data := pattern(3, 40000)
	bufs := [][]byte{data[:1], {}, data[1:513], nil, data[513:10000], data[10000:40000], {}}
	if n, err := f.WriteVAt(bufs, 700); n != 40000 || err != nil {
		t.Fatalf("WriteVAt = %d, %v", n, err)
	}
	wantContent(t, f, append(make([]byte, 700), data...))
	for _, cut := range []int{1, 511, 512, 4096, 39999} {
		a, b := make([]byte, cut), make([]byte, 40000-cut)
		if n, err := f.ReadVAt([][]byte{nil, a, {}, b}, 700); n != 40000 || (err != nil && err != io.EOF) {
			t.Fatalf("ReadVAt = %d, %v", n, err)
		}
		if !bytes.Equal(a, data[:cut]) || !bytes.Equal(b, data[cut:]) {
			t.Errorf("ReadVAt cut at %d: differs", cut)
		}
	}
	for _, empty := range [][][]byte{nil, {}, {nil}, {{}, {}}} {
		if n, err := f.ReadVAt(empty, 0); n != 0 || err != nil {
			t.Errorf("ReadVAt of nothing = %d, %v", n, err)
		}
		if n, err := f.WriteVAt(empty, 1<<20); n != 0 || err != nil {
			t.Errorf("WriteVAt of nothing = %d, %v", n, err)
		}
	}
	wantSize(t, f, 40700)
}

// testManyVectors passes more buffers than one system call takes.
func testManyVectors(t *testing.T, f storage.File) {
	const count, each = 2500, 512
	data := pattern(4, count*each)
	split := func(p []byte) (bufs [][]byte) {
		for i := range count {
			bufs = append(bufs, p[i*each:][:each])
		}
		return bufs
	}
	if n, err := f.WriteVAt(split(data), 4096); n != len(data) || err != nil {
		t.Fatalf("WriteVAt of %d buffers = %d, %v", count, n, err)
	}
	got := make([]byte, len(data))
	if n, err := f.ReadVAt(split(got), 4096); n != len(data) || (err != nil && err != io.EOF) {
		t.Fatalf("ReadVAt of %d buffers = %d, %v", count, n, err)
	}
	if i := mismatch(got, data); i >= 0 {
		t.Errorf("byte %d differs", i)
	}
}

func testTruncate(t *testing.T, f storage.File) {
	data := pattern(5, 10000)
	mustWrite(t, f, data, 0)
	for _, size := range []int64{10000, 9999, 8192, 4097, 12345, 1 << 33, 512, 1, 0, 5000} {
		if err := f.Truncate(size); err != nil {
			t.Fatalf("Truncate(%d): %v", size, err)
		}
		wantSize(t, f, size)
	}
	wantContent(t, f, make([]byte, 5000))
}

// testTruncateForgets checks that what was cut off does not come back when the file grows again.
func testTruncateForgets(t *testing.T, f storage.File) {
	data := pattern(6, 9000)
	for _, cut := range []int{1, 511, 512, 4095, 4096, 5000, 8192} {
		mustWrite(t, f, data, 0)
		if err := f.Truncate(int64(cut)); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, f, []byte{7}, 9500)
		want := make([]byte, 9501)
		copy(want, data[:cut])
		want[9500] = 7
		wantContent(t, f, want)
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
	}
}

// optional reports whether an optional operation was done; if it was refused, the file must be as before.
func optional(t *testing.T, f storage.File, before []byte, what string, err error) bool {
	t.Helper()
	if errors.Is(err, storage.ErrNotSupported) {
		wantContent(t, f, before)
		t.Logf("%s is not supported here", what)
		return false
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return true
}

// sparseRanges are ranges inside, at the edge of and past a file of 1 MiB.
var sparseRanges = []struct{ off, n int64 }{
	{0, 65536}, {65536, 1}, {70000, 100}, {131072, 4096}, {200000, 300000}, {511, 514}, {1<<20 - 100, 100}, {10, 0},
	{1<<20 - 100, 1000}, {1<<20 + 4096, 5000}, {0, 2 << 20},
}

func testPunchHole(t *testing.T, f storage.File) {
	want := pattern(7, 1<<20)
	mustWrite(t, f, want, 0)
	for _, r := range sparseRanges {
		if !optional(t, f, want, "PunchHole", f.PunchHole(r.off, r.n)) {
			return
		}
		size := int64(len(want))
		clear(want[min(r.off, size):min(r.off+r.n, size)])
		wantContent(t, f, want)
	}
	if info := f.Stat(); info.Allocated > 64<<10 {
		t.Errorf("%d bytes are allocated after the whole file was punched", info.Allocated)
	}
}

func testZeroRange(t *testing.T, f storage.File) {
	want := pattern(8, 1<<20)
	mustWrite(t, f, want, 0)
	for _, r := range sparseRanges {
		if !optional(t, f, want, "ZeroRange", f.ZeroRange(r.off, r.n)) {
			return
		}
		want = grown(want, r.off, r.n)
		clear(want[r.off:][:r.n])
		wantContent(t, f, want)
	}
}

func testPreallocate(t *testing.T, f storage.File) {
	want := pattern(9, 1<<20)
	mustWrite(t, f, want, 0)
	for _, r := range sparseRanges {
		if !optional(t, f, want, "Preallocate", f.Preallocate(r.off, r.n)) {
			return
		}
		want = grown(want, r.off, r.n)
		wantContent(t, f, want)
	}
}

// grown extends the model so that the range fits; a range of no bytes needs no room.
func grown(model []byte, off, n int64) []byte {
	if end := off + n; n > 0 && end > int64(len(model)) {
		return append(model, make([]byte, end-int64(len(model)))...)
	}
	return model
}

// testSparse writes far apart, in a file much larger than memory.
func testSparse(t *testing.T, f storage.File) {
	offs := []int64{0, 1 << 20, 5<<30 + 3, 1<<40 - 4096}
	for i, off := range offs {
		mustWrite(t, f, pattern(uint64(i), 5000), off)
	}
	wantSize(t, f, 1<<40-4096+5000)
	for i, off := range offs {
		if !bytes.Equal(mustRead(t, f, 5000, off), pattern(uint64(i), 5000)) {
			t.Errorf("bytes at %d differ", off)
		}
	}
	if got := mustRead(t, f, 70000, 3<<30); !bytes.Equal(got, make([]byte, 70000)) {
		t.Errorf("a gap does not read as zeroes")
	}
	if info := f.Stat(); info.Allocated > 1<<20 {
		t.Errorf("%d bytes are allocated for %d written", info.Allocated, 4*5000)
	}
	if err := f.Truncate(6000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mustRead(t, f, 1000, 5000), make([]byte, 1000)) {
		t.Errorf("a gap does not read as zeroes after Truncate")
	}
}

func testExtents(t *testing.T, f storage.File) {
	mustWrite(t, f, pattern(1, 64<<10), 1<<20)
	mustWrite(t, f, pattern(2, 100<<10), 9<<20)
	mustWrite(t, f, pattern(3, 10), 10<<20)
	if err := f.Truncate(12<<20 + 77); err != nil {
		t.Fatal(err)
	}
	extents := walkExtents(t, f, 12<<20+77)
	inData := func(off int64) bool {
		for _, e := range extents {
			if off < e.end {
				return e.data
			}
		}
		return false
	}
	for _, off := range []int64{1 << 20, 1<<20 + 65535, 9 << 20, 9<<20 + 102399, 10 << 20, 10<<20 + 9} {
		if !inData(off) {
			t.Errorf("written byte %d is said to be in a hole", off)
		}
	}
	for _, off := range []int64{12<<20 + 77, 1 << 50} {
		if _, _, err := f.NextExtent(off); err != io.EOF {
			t.Errorf("NextExtent(%d): %v, want EOF", off, err)
		}
	}
	// From the middle of a run the answer is the same run.
	start := int64(0)
	for _, e := range extents {
		mid := start + (e.end-start)/2
		if end, data, err := f.NextExtent(mid); err != nil || end != e.end || data != e.data {
			t.Errorf("NextExtent(%d) = %d, %v, %v; want %d, %v", mid, end, data, err, e.end, e.data)
		}
		start = e.end
	}
}

type extent struct {
	end  int64
	data bool
}

// walkExtents checks that the extents cover the file without gaps, and that holes read as zeroes.
func walkExtents(t *testing.T, f storage.File, size int64) (extents []extent) {
	t.Helper()
	for off := int64(0); off < size; {
		end, data, err := f.NextExtent(off)
		if err != nil || end <= off || end > size {
			t.Fatalf("NextExtent(%d) = %d, %v, %v in a file of %d bytes", off, end, data, err, size)
		}
		if !data {
			n := int(min(end-off, 1<<20))
			for _, at := range []int64{off, end - int64(n)} {
				if !bytes.Equal(mustRead(t, f, n, at), make([]byte, n)) {
					t.Errorf("the hole [%d, %d) has data", off, end)
				}
			}
		}
		extents = append(extents, extent{end, data})
		off = end
	}
	return extents
}

func testBadRanges(t *testing.T, f storage.File) {
	p := make([]byte, 16)
	mustWrite(t, f, pattern(1, 100), 0)
	calls := map[string]func(off int64) error{
		"ReadAt":      func(off int64) error { _, err := f.ReadAt(p, off); return err },
		"ReadVAt":     func(off int64) error { _, err := f.ReadVAt([][]byte{p}, off); return err },
		"WriteAt":     func(off int64) error { _, err := f.WriteAt(p, off); return err },
		"WriteVAt":    func(off int64) error { _, err := f.WriteVAt([][]byte{p, p}, off); return err },
		"PunchHole":   func(off int64) error { return f.PunchHole(off, 16) },
		"ZeroRange":   func(off int64) error { return f.ZeroRange(off, 16) },
		"Preallocate": func(off int64) error { return f.Preallocate(off, 16) },
	}
	for name, call := range calls {
		for _, off := range []int64{-1, math.MinInt64, math.MaxInt64 - 3} {
			if err := call(off); err == nil {
				t.Errorf("%s at %d succeeded", name, off)
			}
		}
	}
	if err := f.Truncate(-1); err == nil {
		t.Errorf("Truncate(-1) succeeded")
	}
	if _, _, err := f.NextExtent(-1); err == nil || err == io.EOF {
		t.Errorf("NextExtent(-1): %v", err)
	}
	wantContent(t, f, pattern(1, 100))
}

func testNowait(t *testing.T, f storage.File) {
	nowait, ok := f.(storage.NowaitReader)
	if !ok {
		t.Skip("the file does not read without waiting")
	}
	data := pattern(1, 10000)
	mustWrite(t, f, data, 0)
	p := make([]byte, 5000)
	for _, r := range []struct {
		off  int64
		want int
	}{{0, 5000}, {4096, 5000}, {9000, 1000}, {20000, 0}} {
		n, err := nowait.ReadAtNowait(p, r.off)
		if err == storage.ErrWouldBlock {
			continue // always allowed
		}
		short := r.want < len(p)
		if n != r.want || short != (err == io.EOF) || (!short && err != nil) {
			t.Errorf("ReadAtNowait(%d) = %d, %v; want %d", r.off, n, err, r.want)
			continue
		}
		if n > 0 && !bytes.Equal(p[:n], data[r.off:][:n]) {
			t.Errorf("ReadAtNowait(%d): wrong bytes", r.off)
		}
	}
	for _, off := range []int64{0, 100, 5000, 7000, 9990, 20000} {
		testNowaitVectors(t, f, data, off)
	}
}

// testNowaitVectors reads the same range with and without vectors.
func testNowaitVectors(t *testing.T, f storage.File, data []byte, off int64) {
	p := bytes.Repeat([]byte{0x99}, 3000)
	want := copy(bytes.Clone(p), data[min(off, int64(len(data))):])
	var bufs [][]byte
	for rest := p; len(rest) > 0; rest = rest[min(len(rest), 100):] {
		bufs = append(bufs, nil, rest[:1], rest[1:min(len(rest), 100)])
	}
	n, err := storage.ReadVNowait(f, bufs, off)
	if err == storage.ErrWouldBlock {
		return
	}
	if n != want || (n < len(p)) != (err == io.EOF) || n == len(p) && err != nil {
		t.Errorf("ReadVNowait(%d) = %d, %v; want %d", off, n, err, want)
	} else if n > 0 && !bytes.Equal(p[:n], data[off:][:n]) {
		t.Errorf("ReadVNowait(%d): wrong bytes", off)
	}
}

func testSync(t *testing.T, f storage.File) {
	for i := range 3 {
		mustWrite(t, f, pattern(uint64(i), 1000), int64(i)*3000)
		if err := f.Sync(); err != nil {
			t.Fatalf("Sync: %v", err)
		}
	}
	if !bytes.Equal(mustRead(t, f, 1000, 6000), pattern(2, 1000)) {
		t.Errorf("content differs after Sync")
	}
}

func testLock(t *testing.T, f storage.File) {
	modes := []storage.LockMode{
		storage.LockRead, storage.LockWrite, storage.LockRead, storage.LockForceShare, storage.LockWrite, storage.LockNone,
	}
	for _, mode := range modes {
		if err := f.Lock(mode); err != nil {
			t.Errorf("Lock(%v) of a file nobody else uses: %v", mode, err)
		}
	}
}

// testModel compares a long random history with a byte slice.
func testModel(t *testing.T, f storage.File) {
	const limit, steps = 300000, 600
	rng := rand.New(rand.NewPCG(42, 42))
	var model []byte
	for step := range steps {
		off, n := randomRange(rng, limit)
		var what string
		switch op := rng.IntN(20); {
		case op < 8:
			what = "WriteAt"
			mustWrite(t, f, pattern(uint64(step), n), int64(off))
			model = grown(model, int64(off), int64(n))
			copy(model[min(off, len(model)):], pattern(uint64(step), n))
		case op < 11:
			what = "WriteVAt"
			p := pattern(uint64(step), n)
			cut := rng.IntN(n + 1)
			if m, err := f.WriteVAt([][]byte{p[:cut], p[cut:]}, int64(off)); m != n || err != nil {
				t.Fatalf("step %d: WriteVAt(%d bytes, %d) = %d, %v", step, n, off, m, err)
			}
			model = grown(model, int64(off), int64(n))
			copy(model[min(off, len(model)):], p)
		case op < 13:
			what = "Truncate"
			if err := f.Truncate(int64(off)); err != nil {
				t.Fatalf("step %d: Truncate(%d): %v", step, off, err)
			}
			model = append(model[:min(off, len(model))], make([]byte, max(off-len(model), 0))...)
		case op < 15:
			what = "PunchHole"
			if err := f.PunchHole(int64(off), int64(n)); err == nil {
				clear(model[min(off, len(model)):min(off+n, len(model))])
			} else if !errors.Is(err, storage.ErrNotSupported) {
				t.Fatalf("step %d: PunchHole(%d, %d): %v", step, off, n, err)
			}
		case op < 17:
			what = "ZeroRange"
			if err := f.ZeroRange(int64(off), int64(n)); err == nil {
				model = grown(model, int64(off), int64(n))
				clear(model[min(off, len(model)):min(off+n, len(model))])
			} else if !errors.Is(err, storage.ErrNotSupported) {
				t.Fatalf("step %d: ZeroRange(%d, %d): %v", step, off, n, err)
			}
		case op < 18:
			what = "Preallocate"
			if err := f.Preallocate(int64(off), int64(n)); err == nil {
				model = grown(model, int64(off), int64(n))
			} else if !errors.Is(err, storage.ErrNotSupported) {
				t.Fatalf("step %d: Preallocate(%d, %d): %v", step, off, n, err)
			}
		default:
			what = "ReadAt"
			compareRead(t, f, model, off, n)
		}
		if size, err := f.Size(); size != int64(len(model)) || err != nil {
			t.Fatalf("step %d: after %s(%d, %d) Size = %d, %v; want %d", step, what, off, n, size, err, len(model))
		}
	}
	wantContent(t, f, model)
	walkExtents(t, f, int64(len(model)))
}

// randomRange prefers ranges aligned to sectors or pages, and short ones.
func randomRange(rng *rand.Rand, limit int) (off, n int) {
	off, n = rng.IntN(limit), rng.IntN(1<<rng.IntN(17))
	switch rng.IntN(3) {
	case 0:
		off, n = off&^511, n&^511
	case 1:
		off, n = off&^4095, n&^4095
	}
	return off, n
}

func compareRead(t *testing.T, f storage.File, model []byte, off, n int) {
	t.Helper()
	p := make([]byte, n)
	want := max(min(n, len(model)-off), 0)
	m, err := f.ReadAt(p, int64(off))
	if m != want || (m < n && err != io.EOF) || (m == n && err != nil && err != io.EOF) {
		t.Fatalf("ReadAt(%d bytes, %d) of %d = %d, %v; want %d", n, off, len(model), m, err, want)
	}
	if m > 0 && !bytes.Equal(p[:m], model[off:][:m]) {
		t.Fatalf("ReadAt(%d bytes, %d): wrong bytes", n, off)
	}
}

// together runs fn(0) to fn(n-1) at once and fails the test with the errors.
func together(t *testing.T, n int, fn func(worker int) error) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// testConcurrentNeighbours has each worker own every eighth piece, of a size that shares sectors and pages with the
// neighbours' pieces: no write may undo another.
func testConcurrentNeighbours(t *testing.T, f storage.File) {
	const workers, pieces = 8, 160
	for _, size := range []int{100, 512, 1000} {
		together(t, workers, func(w int) error {
			for i := w; i < pieces; i += workers {
				if _, err := f.WriteAt(pattern(uint64(i), size), int64(i*size)); err != nil {
					return err
				}
			}
			return nil
		})
		var want []byte
		for i := range pieces {
			want = append(want, pattern(uint64(i), size)...)
		}
		wantContent(t, f, want)
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
	}
}

// testConcurrentAppend grows the file from several sides at once, with aligned and unaligned ends.
func testConcurrentAppend(t *testing.T, f storage.File) {
	sizes := []int{4096, 100, 8192, 777}
	const each = 20
	stride := int64(8192)
	for round := range 3 {
		together(t, len(sizes), func(w int) error {
			for i := range each {
				off := int64(i*len(sizes)+w) * stride
				if _, err := f.WriteAt(pattern(uint64(w), sizes[w]), off); err != nil {
					return err
				}
				if size, err := f.Size(); err != nil || size < off+int64(sizes[w]) {
					return fmt.Errorf("after a write up to %d Size = %d, %v", off+int64(sizes[w]), size, err)
				}
			}
			return nil
		})
		wantSize(t, f, int64(each*len(sizes)-1)*stride+777)
		for w, size := range sizes {
			for i := range each {
				got := mustRead(t, f, size, int64(i*len(sizes)+w)*stride)
				if !bytes.Equal(got, pattern(uint64(w), size)) {
					t.Fatalf("round %d: write %d of worker %d is damaged", round, i, w)
				}
			}
		}
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
	}
}

// testConcurrentOverlap writes one range from all sides: every sector is somebody's afterwards.
func testConcurrentOverlap(t *testing.T, f storage.File) {
	const workers, size = 4, 16 << 10
	together(t, workers, func(w int) error {
		for range 10 {
			if _, err := f.WriteAt(bytes.Repeat([]byte{byte(w + 1)}, size), 0); err != nil {
				return err
			}
			if _, err := f.ReadAt(make([]byte, size), 0); err != nil && err != io.EOF {
				return err
			}
		}
		return nil
	})
	got := mustRead(t, f, size, 0)
	for s := 0; s < size; s += storage.SectorSize {
		sector := got[s:][:storage.SectorSize]
		if sector[0] < 1 || sector[0] > workers || !bytes.Equal(sector, bytes.Repeat(sector[:1], storage.SectorSize)) {
			t.Fatalf("sector %d is torn", s/storage.SectorSize)
		}
	}
}

// testConcurrentMix runs every method at once over one file; each worker checks a range of its own.
func testConcurrentMix(t *testing.T, f storage.File) {
	const workers, region = 4, 64 << 10
	if err := f.Truncate(workers * region); err != nil {
		t.Fatal(err)
	}
	together(t, workers, func(w int) error {
		rng := rand.New(rand.NewPCG(uint64(w), 9))
		base, model := int64(w*region), make([]byte, region)
		for step := range 60 {
			if err := mixStep(f, rng, model, base, uint64(step)); err != nil {
				return fmt.Errorf("worker %d, step %d: %w", w, step, err)
			}
		}
		return nil
	})
}

func mixStep(f storage.File, rng *rand.Rand, model []byte, base int64, seed uint64) error {
	off := rng.IntN(len(model))
	n := rng.IntN(min(len(model)-off, 9000)) // may be 0
	switch rng.IntN(6) {
	case 0, 1:
		p := pattern(seed, n)
		if _, err := f.WriteAt(p, base+int64(off)); err != nil {
			return err
		}
		copy(model[off:], p)
	case 2:
		if err := f.PunchHole(base+int64(off), int64(n)); err == nil {
			clear(model[off : off+n])
		} else if !errors.Is(err, storage.ErrNotSupported) {
			return err
		}
	case 3:
		if err := f.ZeroRange(base+int64(off), int64(n)); err == nil {
			clear(model[off : off+n])
		} else if !errors.Is(err, storage.ErrNotSupported) {
			return err
		}
	case 4:
		if err := f.Sync(); err != nil {
			return err
		}
		f.Stat()
		if _, _, err := f.NextExtent(base + int64(off)); err != nil {
			return err
		}
	}
	got := make([]byte, len(model))
	if _, err := f.ReadAt(got, base); err != nil && err != io.EOF {
		return err
	}
	if i := mismatch(got, model); i >= 0 {
		return fmt.Errorf("byte %d is %#x, want %#x", i, got[i], model[i])
	}
	return nil
}

// testClosed checks that a closed file refuses everything.
func testClosed(t *testing.T, f storage.File) {
	mustWrite(t, f, pattern(1, 1000), 0)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 16)
	calls := map[string]func() error{
		"ReadAt":      func() error { _, err := f.ReadAt(p, 0); return err },
		"ReadVAt":     func() error { _, err := f.ReadVAt([][]byte{p}, 0); return err },
		"WriteAt":     func() error { _, err := f.WriteAt(p, 0); return err },
		"WriteVAt":    func() error { _, err := f.WriteVAt([][]byte{p}, 0); return err },
		"Sync":        f.Sync,
		"Size":        func() error { _, err := f.Size(); return err },
		"Truncate":    func() error { return f.Truncate(0) },
		"PunchHole":   func() error { return f.PunchHole(0, 16) },
		"ZeroRange":   func() error { return f.ZeroRange(0, 16) },
		"Preallocate": func() error { return f.Preallocate(0, 16) },
		"NextExtent":  func() error { _, _, err := f.NextExtent(0); return err },
		"Lock":        func() error { return f.Lock(storage.LockRead) },
		"Close":       f.Close,
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after Close: %v, want fs.ErrClosed", name, err)
		}
	}
	f.Stat()
}
