package check

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// build makes an image without tools: a header, a refcount table of one cluster, one block, and an L1 table, with
// correct refcounts for them. The clusters after them are the caller's: size is the length of the file in clusters.
func build(t testing.TB, l format.Layout, disk uint64, clusters int) *bytesOf {
	t.Helper()
	n, err := l.L1EntriesFor(int64(disk))
	if err != nil {
		t.Fatal(err)
	}
	cs := l.ClusterSize()
	h := &format.Header{Version: l.Version, ClusterBits: uint32(l.ClusterBits), Size: disk, L1Size: uint32(n), RefTableLen: 1,
		RefTableOffset: format.HostOff(cs), L1Offset: format.HostOff(3 * cs), RefcountOrder: uint32(l.RefcountOrder)}
	if l.ExtendedL2 {
		h.Incompat |= format.IncompatExtL2
	}
	head, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, int64(clusters)*cs)
	copy(b, head)
	x := parseImage(t, b)
	x.set(x.refEntry(0), uint64(2*cs))
	for i := range 3 + l.ClustersFor(8*n) {
		x.refcount(l.Offset(format.ClusterIdx(i)), 1)
	}
	return x
}

func (x *bytesOf) check(t testing.TB, o Options) *Report {
	t.Helper()
	rep, err := Run(context.Background(), memory(t, x.b), o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

var plain = format.Layout{ClusterBits: 16, RefcountOrder: 4, Version: format.Version3}

func TestBuiltImageIsSound(t *testing.T) {
	for _, l := range []format.Layout{plain, {ClusterBits: 9, RefcountOrder: 6, Version: 3}, {ClusterBits: 21, Version: 3},
		{ClusterBits: 14, RefcountOrder: 3, Version: 3, ExtendedL2: true}, {ClusterBits: 12, RefcountOrder: 4, Version: 2}} {
		if rep := build(t, l, 1<<20, 64).check(t, Options{}); !rep.Clean() {
			t.Errorf("%+v: %s", l, texts(rep))
		}
	}
}

func TestFindings(t *testing.T) {
	x := build(t, plain, 1<<30, 100)
	for i := range 50 {
		x.refcount(format.HostOff(50+i)<<16, 1)
	}
	var seen []Finding
	rep := x.check(t, Options{MaxFindings: 7, OnFinding: func(f Finding) { seen = append(seen, f) }})
	if rep.Leaks != 50 || len(rep.Findings) != 7 || rep.FindingsDropped != 43 || len(seen) != 50 {
		t.Errorf("%d leaks, %d findings, %d dropped, %d seen", rep.Leaks, len(rep.Findings), rep.FindingsDropped, len(seen))
	}
	want := Finding{Kind: Leak, Times: 1, Host: 50 << 16, Message: "Leaked cluster 50 refcount=1 reference=0"}
	if rep.Findings[0] != want || seen[0] != want {
		t.Errorf("the first finding is %+v, want %+v", rep.Findings[0], want)
	}
	if rep.Clean() || rep.Rebuild {
		t.Errorf("clean %v, rebuild %v", rep.Clean(), rep.Rebuild)
	}
	if got := x.check(t, Options{}); len(got.Findings) != 50 {
		t.Errorf("%d findings by default", len(got.Findings))
	}
}

func TestGuestOffsetOfFinding(t *testing.T) {
	x := build(t, plain, 2<<30, 8)
	x.set(x.l1(1), 1<<63|4<<16)
	x.refcount(4<<16, 1)
	x.set(4<<16+8*3, 1<<63|5<<16|2) // a reserved bit in entry 3
	x.refcount(5<<16, 1)
	rep := x.check(t, Options{})
	if rep.Corruptions != 1 || len(rep.Findings) != 1 {
		t.Fatalf("%+v", rep)
	}
	f := rep.Findings[0]
	if !f.HasGuest || f.Guest != 512<<20+3<<16 || f.Host != 5<<16 || f.Kind != Corruption {
		t.Errorf("%+v", f)
	}
}

func TestNotAnImage(t *testing.T) {
	for name, b := range map[string][]byte{"empty": nil, "text": []byte("hello"), "raw": make([]byte, 1<<20)} {
		if rep, err := Run(context.Background(), memory(t, b), Options{}); !errors.Is(err, format.ErrNotQCOW2) || rep != nil {
			t.Errorf("%s: %v, %v", name, rep, err)
		}
	}
	x := build(t, plain, 1<<20, 8)
	x.set(format.OffIncompat, 1<<40)
	var ue *format.UnsupportedError
	if _, err := Run(context.Background(), memory(t, x.b), Options{}); !errors.As(err, &ue) {
		t.Errorf("an unknown feature: %v", err)
	}
}

// faultyFile fails reads that touch a place.
type faultyFile struct {
	storage.File
	bad   int64
	reads atomic.Int64
	stop  func(n int)
}

var errBad = errors.New("bad sector")

func (f *faultyFile) ReadAt(p []byte, off int64) (int, error) {
	n := f.reads.Add(1)
	if f.stop != nil {
		f.stop(int(n))
	}
	if off <= f.bad && f.bad < off+int64(len(p)) {
		return 0, errBad
	}
	return f.File.ReadAt(p, off)
}

// wholeImage is sound and has one of everything that is read: cluster 4 is an L2 table, 5 the L1 table of a snapshot, 6
// the snapshot table, 7 the bitmap directory, 8 a bitmap table.
func wholeImage(t testing.TB) *bytesOf {
	t.Helper()
	x := build(t, plain, 1<<20, 10)
	table, err := format.MarshalSnapshots([]format.Snapshot{{L1Offset: 5 << 16, L1Size: 1, ID: "1", Name: "s", DiskSize: 1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	h := *x.h
	h.SnapshotCount, h.SnapshotsOffset = 1, 6<<16
	h.Autoclear = format.AutoclearBitmaps
	h.Bitmaps = &format.BitmapsExt{Count: 1, DirectoryOffset: 7 << 16}
	dir, err := format.MarshalBitmapDirectory([]format.Bitmap{{TableOffset: 8 << 16, TableSize: 1, GranularityBits: 16, Name: "b"}}, &h)
	if err != nil {
		t.Fatal(err)
	}
	h.Bitmaps.DirectorySize = uint64(len(dir))
	head, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	copy(x.b, head)
	copy(x.b[6<<16:], table)
	copy(x.b[7<<16:], dir)
	x.set(x.l1(0), 4<<16)
	x.set(5<<16, 4<<16)
	for c, n := range map[format.HostOff]uint64{4: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1} {
		x.refcount(c<<16, n)
	}
	x.set(8<<16, 9<<16)
	return parseImage(t, x.b)
}

func TestReadErrors(t *testing.T) {
	x := wholeImage(t)
	if rep := x.check(t, Options{}); !rep.Clean() {
		t.Fatalf("the image is not sound:\n%s", texts(rep))
	}
	for cluster, what := range []string{"header", "refcount table", "refcount block", "active L1 table", "L2 table", "snapshot's L1 table",
		"snapshot table", "bitmap directory", "bitmap table"} {
		f := &faultyFile{File: memory(t, x.b), bad: int64(cluster) << 16}
		rep, err := Run(context.Background(), f, Options{})
		if !errors.Is(err, errBad) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
		if rep != nil && rep.CheckErrors != 1 {
			t.Errorf("%s: %d check errors, want 1", what, rep.CheckErrors)
		}
	}
	f := &faultyFile{File: memory(t, x.b), bad: 9 << 16} // data is never read
	if rep, err := Run(context.Background(), f, Options{}); err != nil || !rep.Clean() {
		t.Errorf("data that cannot be read: %v", err)
	}
}

func TestContext(t *testing.T) {
	x := wholeImage(t)
	count := &faultyFile{File: memory(t, x.b), bad: -1}
	if _, err := Run(context.Background(), count, Options{}); err != nil {
		t.Fatal(err)
	}
	for stop := 1; int64(stop) <= count.reads.Load(); stop++ { // wherever the context ends, the check ends with it
		ctx, cancel := context.WithCancel(context.Background())
		f := &faultyFile{File: memory(t, x.b), bad: -1, stop: func(n int) {
			if n == stop {
				cancel()
			}
		}}
		if _, err := Run(ctx, f, Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("context ends in read %d: %v", stop, err)
		}
		cancel()
	}
}

// TestSnapshotsShareTables has many snapshots of the same tables: each table must be read once, and each fault in it
// count once for each snapshot.
func TestSnapshotsShareTables(t *testing.T) {
	const snapshots = 1000
	x := build(t, plain, 1<<20, 16)
	x.set(x.l1(0), 4<<16)
	x.set(4<<16, 5<<16|4) // with a reserved bit
	list := make([]format.Snapshot, snapshots)
	for i := range list {
		list[i] = format.Snapshot{L1Offset: 6 << 16, L1Size: 1, Name: "s"}
	}
	x.set(6<<16, 4<<16)
	table, err := format.MarshalSnapshots(list)
	if err != nil {
		t.Fatal(err)
	}
	copy(x.b[7<<16:], table)
	pointer := format.EncodeSnapshotsPointer(snapshots, 7<<16)
	copy(x.b[format.OffSnapshots:], pointer[:])
	for i := range (len(table)-1)>>16 + 1 {
		x.refcount(format.HostOff(7+i)<<16, 1)
	}
	x.refcount(4<<16, snapshots+1)
	x.refcount(5<<16, snapshots+1)
	x.refcount(6<<16, snapshots)
	f := &faultyFile{File: memory(t, x.b), bad: -1}
	rep, err := Run(context.Background(), f, Options{})
	if err != nil || rep.Corruptions != snapshots+1 || rep.Leaks != 0 || len(rep.Findings) != 1 || rep.Findings[0].Times != snapshots+1 {
		t.Errorf("%v, %+v", err, rep)
	}
	if f.reads.Load() > 12 {
		t.Errorf("%d reads", f.reads.Load())
	}
}

func TestOverflow(t *testing.T) {
	l := plain
	l.RefcountOrder = 2 // up to 15
	x := build(t, l, 2<<30, 8)
	x.set(x.l1(0), 1<<63|4<<16)
	x.refcount(4<<16, 1)
	x.refcount(5<<16, 15)
	for i := range 20 {
		x.set(4<<16+format.HostOff(8*i), 5<<16)
	}
	rep := x.check(t, Options{})
	if rep.Corruptions != 5 || rep.Leaks != 0 {
		t.Errorf("20 references where 15 fit: %d corruptions, %d leaks\n%s", rep.Corruptions, rep.Leaks, texts(rep))
	}
}

// TestHostileImagesAreCheap checks that neither memory nor time follows what fields claim.
func TestHostileImagesAreCheap(t *testing.T) {
	const mib = 1 << 20
	tests := map[string]func(t *testing.T) *bytesOf{
		"everything far away": func(t *testing.T) *bytesOf {
			x := build(t, plain, 512<<40, 24)
			for i := range 8 {
				x.set(x.refEntry(int64(1+i)), uint64(1<<55+i<<16))
				x.set(x.l1(int64(i)), uint64(1<<55-i<<16))
			}
			return x
		},
		"tables of the greatest length": func(t *testing.T) *bytesOf {
			x := build(t, plain, mib, 8)
			x.set32(format.OffL1, format.MaxL1Entries)
			x.set32(format.OffRefTable+8, 128)
			x.set32(format.OffSnapshots, format.MaxSnapshots)
			x.set(format.OffSnapshots+4, 7<<16)
			return x
		},
		"one L2 table everywhere": func(t *testing.T) *bytesOf {
			x := build(t, plain, 256<<40, 80)
			for i := range x.h.L1Size {
				x.set(x.l1(int64(i)), uint64(70<<16))
			}
			for i := range 8192 {
				x.set(70<<16+format.HostOff(8*i), 1<<62|70<<16)
			}
			return x
		},
		"overlapping unaligned L2 tables": func(t *testing.T) *bytesOf {
			x := build(t, format.Layout{ClusterBits: 21, RefcountOrder: 4, Version: 3}, 4<<50, 6)
			for i := range x.h.L1Size {
				x.set(x.l1(int64(i)), uint64(x.h.L1Offset)+uint64(i)*512)
			}
			return x
		},
		"snapshots that overlap": func(t *testing.T) *bytesOf {
			x := build(t, format.Layout{ClusterBits: 9, RefcountOrder: 4, Version: 3}, mib, 8000)
			list := make([]format.Snapshot, 20000)
			for i := range list {
				list[i] = format.Snapshot{L1Offset: format.HostOff(i%4000) << 9, L1Size: format.MaxL1Entries / 16}
			}
			table, err := format.MarshalSnapshots(list)
			if err != nil {
				t.Fatal(err)
			}
			x.b = append(x.b, table...)
			pointer := format.EncodeSnapshotsPointer(uint32(len(list)), 8000*512)
			copy(x.b[format.OffSnapshots:], pointer[:])
			return x
		},
		"refcount block everywhere": func(t *testing.T) *bytesOf {
			x := build(t, plain, mib, 8)
			for i := range int64(8192) {
				x.set(x.refEntry(i), 2<<16)
			}
			for i := range 1 << 16 {
				x.b[2<<16+i] = 0xff
			}
			return x
		},
	}
	for name, make := range tests {
		t.Run(name, func(t *testing.T) {
			x := make(t)
			f := &faultyFile{File: memory(t, x.b), bad: -1}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			rep, err := Run(context.Background(), f, Options{})
			runtime.ReadMemStats(&after)
			if err == nil && rep.Clean() {
				t.Error("nothing was found")
			}
			if used, limit := after.TotalAlloc-before.TotalAlloc, uint64(24*mib+16*len(x.b)); used > limit {
				t.Errorf("%d bytes allocated for a file of %d, limit %d", used, len(x.b), limit)
			}
			if limit := int64(100 + len(x.b)/1000); f.reads.Load() > limit {
				t.Errorf("%d reads of a file of %d bytes, limit %d", f.reads.Load(), len(x.b), limit)
			}
		})
	}
}

func TestSweep(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var spans []span
		var want, got [64]uint64
		for range rapid.IntRange(0, 10).Draw(t, "spans") {
			lo := rapid.Uint64Range(0, 63).Draw(t, "lo")
			hi := rapid.Uint64Range(lo, 64).Draw(t, "hi")
			spans = append(spans, span{lo, hi})
			for i := lo; i < hi; i++ {
				want[i]++
			}
		}
		last := uint64(0)
		err := sweep(spans, func(lo, hi, weight uint64) error {
			if lo < last || hi <= lo || weight == 0 {
				t.Fatalf("part [%d, %d) of weight %d after %d", lo, hi, weight, last)
			}
			last = hi
			for i := lo; i < hi; i++ {
				got[i] += weight
			}
			return nil
		})
		if err != nil || got != want {
			t.Fatalf("%v: %v, want %v", err, got, want)
		}
	})
}

func TestCounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, model := newCounts(), map[format.ClusterIdx]uint64{}
		limit := rapid.SampledFrom([]uint64{1, 15, 65535, 1<<32 - 1, 1<<64 - 1}).Draw(t, "limit")
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			i := format.ClusterIdx(rapid.SampledFrom([]uint64{0, 1, 4095, 4096, 1 << 40}).Draw(t, "cluster"))
			n := rapid.SampledFrom([]uint64{1, 2, 40000, 65534, 65535, 1 << 20}).Draw(t, "n")
			lost := c.add(i, n, limit)
			room := limit - model[i]
			model[i] += min(n, room)
			if want := n - min(n, room); lost != want {
				t.Fatalf("adding %d to cluster %d loses %d, want %d", n, i, lost, want)
			}
		}
		for i, want := range model {
			if got := c.get(i); got != want {
				t.Fatalf("cluster %d has %d, want %d", i, got, want)
			}
		}
		if got := c.get(5 << 20); got != 0 {
			t.Fatalf("an untouched cluster has %d", got)
		}
		if !slices.IsSorted(c.pageNumbers()) {
			t.Fatal("pages out of order")
		}
	})
}

func TestTableRefsMerge(t *testing.T) {
	var r tableRefs
	const refs = 300000
	for i := range refs {
		r.add(tableRef{off: format.HostOff(i%100) << 16, weight: 2, active: uint64(i % 2), index: int64(i)})
		if len(r.list) > 1<<16+200 {
			t.Fatalf("%d references are kept for 100 tables", len(r.list))
		}
	}
	r.merge()
	if len(r.list) != 100 {
		t.Fatalf("%d tables, want 100", len(r.list))
	}
	for i, ref := range r.list {
		if ref.off != format.HostOff(i)<<16 || ref.weight != 2*refs/100 {
			t.Fatalf("table %d: %+v", i, ref)
		}
		if want := uint64(i % 2 * refs / 100); ref.active != want || i%2 == 1 && ref.index != int64(i) {
			t.Fatalf("table %d: %+v, want %d active", i, ref, want)
		}
	}
}

// TestRandomDamage compares with qemu-img what no list of damages thinks of: words of metadata replaced at random.
func TestRandomDamage(t *testing.T) {
	dir := t.TempDir()
	path := richImage(4096).make(t, dir)
	good := load(t, path)
	rng := rand.New(rand.NewPCG(1, 2))
	spots := metadata(good)
	for round := range 60 {
		x := parseImage(t, slices.Clone(good.b))
		for range 1 + rng.IntN(4) {
			damageWord(x, rng, spots[rng.IntN(len(spots))])
		}
		if err := os.WriteFile(path, x.b, 0o600); err != nil {
			t.Fatal(err)
		}
		rep, err := Run(context.Background(), memory(t, x.b), Options{})
		want, messages, _, ok := stock(t, path, false)
		// The differences that the package's description names: qemu-img gives up, and the check goes on.
		farAway := !ok && strings.Contains(messages, "I/O error in check_refcounts_l1")
		goesOn := err == nil && (rep.BitmapsBroken || farAway && rep.Corruptions > 0)
		if ok != (err == nil) && !goesOn || ok && numbersOf(rep) != want {
			t.Fatalf("round %d: Run says %+v, %v; qemu-img says %+v\n%.2000s", round, rep, err, want, messages)
		}
	}
}

// metadata returns where the words of tables are.
func metadata(x *bytesOf) []format.HostOff {
	var spots []format.HostOff
	add := func(off format.HostOff, n int) {
		for i := range n {
			spots = append(spots, off+format.HostOff(8*i))
		}
	}
	add(x.l1(0), int(x.h.L1Size))
	for _, guest := range []format.GuestOff{atData, atCompressed, atZero, atZeroAlloc, atShared} {
		add(x.l2(guest), 4)
	}
	add(x.block(0), 30)
	add(x.refEntry(0), 3)
	add(x.h.SnapshotsOffset, 2)
	add(format.HostOff(x.word(x.h.SnapshotsOffset)), int(x.h.L1Size))
	return spots
}

func damageWord(x *bytesOf, rng *rand.Rand, off format.HostOff) {
	switch rng.IntN(4) {
	case 0:
		x.xor(off, 1<<rng.IntN(64))
	case 1:
		x.set(off, rng.Uint64()>>rng.IntN(64))
	case 2:
		x.set(off, uint64(rng.IntN(4))<<62|uint64(rng.IntN(len(x.b)>>12+4))<<12)
	case 3:
		binary.BigEndian.PutUint16(x.b[off+format.HostOff(2*rng.IntN(4)):], uint16(rng.IntN(5)))
	}
}

func FuzzCheck(f *testing.F) {
	small := build(f, format.Layout{ClusterBits: 9, RefcountOrder: 4, Version: 3}, 64<<10, 16)
	small.set(small.l1(0), 1<<63|uint64(5*512))
	small.set(5*512, 1<<63|6*512)
	small.set(5*512+8, 1<<62|7*512)
	for _, c := range []format.HostOff{5, 6, 7} {
		small.refcount(c*512, 1)
	}
	f.Add(small.b, uint32(0), uint64(0))
	f.Add(small.b, uint32(56), uint64(1)<<32)
	f.Add(build(f, format.Layout{ClusterBits: 14, RefcountOrder: 0, Version: 3, ExtendedL2: true}, 1<<20, 5).b[:3<<14+64], uint32(96), uint64(5))
	whole := wholeImage(f)
	f.Add(whole.b[:8<<16+100], uint32(7<<16), uint64(1)<<63)
	f.Fuzz(func(t *testing.T, b []byte, off uint32, v uint64) {
		b = slices.Clone(b)
		if n := len(b) - 8; n > 0 {
			at := int(off) % n
			binary.BigEndian.PutUint64(b[at:], binary.BigEndian.Uint64(b[at:])^v)
		}
		rep, err := Run(context.Background(), memory(t, b), Options{MaxFindings: 10})
		if err != nil {
			return
		}
		if rep.CheckErrors < 0 || rep.Corruptions < 0 || rep.Leaks < 0 || len(rep.Findings) > 10 || rep.ImageEndOffset <= 0 ||
			rep.AllocatedClusters < rep.CompressedClusters || rep.AllocatedClusters < rep.FragmentedClusters {
			t.Errorf("%+v", rep)
		}
		if rep.Clean() != (len(rep.Findings) == 0) {
			t.Errorf("%d findings and clean: %v", len(rep.Findings), rep.Clean())
		}
	})
}

// BenchmarkRun checks images of 4 GiB that are allocated in full.
func BenchmarkRun(b *testing.B) {
	for name, options := range map[string]string{"64K": "preallocation=metadata", "4K": "preallocation=metadata,cluster_size=4k"} {
		b.Run(name, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "full.qcow2")
			mustRun(b, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "4G")
			file, err := os.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			defer file.Close()
			for b.Loop() {
				rep, err := Run(context.Background(), readOnly{File: nil, f: file}, Options{})
				if err != nil || !rep.Clean() {
					b.Fatalf("%+v, %v", rep, err)
				}
			}
		})
	}
}

// readOnly is a host file of which only what a check uses is there.
type readOnly struct {
	storage.File
	f *os.File
}

func (r readOnly) ReadAt(p []byte, off int64) (int, error) { return r.f.ReadAt(p, off) }

func (r readOnly) Size() (int64, error) {
	info, err := r.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
