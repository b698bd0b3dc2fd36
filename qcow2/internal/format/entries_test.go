package format

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

func TestKind(t *testing.T) {
	v3 := Layout{ClusterBits: 16, RefcountOrder: 4, Version: Version3}
	v2, ext, data := v3, v3, v3
	v2.Version, ext.ExtendedL2, data.DataFile = Version2, true, true
	tests := []struct {
		name string
		l    Layout
		e    L2Entry
		want L2Kind
	}{
		{"empty", v3, 0, KindUnallocated},
		{"only COPIED", v3, 1 << 63, KindUnallocated},
		{"normal", v3, 0x8000000000050000, KindNormal},
		{"normal, shared", v3, 0x50000, KindNormal},
		{"normal with reserved bits", v3, 0x8000000000050002, KindNormal},
		{"normal, unaligned", v3, 0x8000000000050200, KindInvalid},
		{"zero", v3, 1, KindZeroPlain},
		{"zero, allocated", v3, 0x8000000000050001, KindZeroAlloc},
		{"zero, allocated, unaligned", v3, 0x8000000000050201, KindInvalid},
		{"zero in version 2", v2, 1, KindInvalid},
		{"allocated zero in version 2", v2, 0x50001, KindInvalid},
		{"normal in version 2", v2, 0x50000, KindNormal},
		{"compressed", v3, 0x4000000000050123, KindCompressed},
		{"compressed in version 2", v2, 0x4000000000050123, KindCompressed},
		{"compressed with data file", data, 0x4000000000050123, KindInvalid},
		{"guest cluster 0 of a data file", data, 1 << 63, KindNormal},
		{"unallocated with data file", data, 0, KindUnallocated},
		{"zero with data file", data, 1<<63 | 1, KindZeroPlain},
		{"extended ignores bit 0", ext, 1, KindUnallocated},
		{"extended, allocated, ignores bit 0", ext, 0x8000000000050001, KindNormal},
	}
	for _, tt := range tests {
		if got := tt.l.Kind(tt.e); got != tt.want {
			t.Errorf("%s: Kind(%#x) = %v, want %v", tt.name, tt.e, got, tt.want)
		}
	}
}

func TestEntryFields(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		off := HostOff(rapid.Uint64Range(0, 1<<47-1).Draw(t, "offset")) << 9
		copied := rapid.Bool().Draw(t, "copied")
		if e := MakeL1(off, copied); e.Offset() != off || e.Copied() != copied || e.Reserved() != 0 {
			t.Fatalf("L1 entry %#x", e)
		}
		if e := MakeL2(off, copied); e.HostOffset() != off || e.Copied() != copied || e.Reserved() != 0 || e.Compressed() {
			t.Fatalf("L2 entry %#x", e)
		}
		if e := MakeL2ZeroAlloc(off, copied); e.HostOffset() != off || e.Copied() != copied || e&L2Zero == 0 {
			t.Fatalf("zero entry %#x", e)
		}
		if e := MakeRefTable(off); e.Offset() != off || e.Reserved() != 0 {
			t.Fatalf("refcount table entry %#x", e)
		}
		if e := MakeBitmapEntry(off); e.Offset() != off || e.AllOnes() || !e.Valid(Layout{ClusterBits: 9}) {
			t.Fatalf("bitmap table entry %#x", e)
		}
	})
	for bit := range 64 {
		w := uint64(1) << bit
		if got, want := L1Entry(w).Reserved() != 0, bit <= 8 || bit >= 56 && bit <= 62; got != want {
			t.Errorf("L1 bit %d reserved: %v, want %v", bit, got, want)
		}
		if got, want := L2Entry(w).Reserved() != 0, bit >= 1 && bit <= 8 || bit >= 56 && bit <= 61; got != want {
			t.Errorf("L2 bit %d reserved: %v, want %v", bit, got, want)
		}
		if got, want := RefTableEntry(w).Reserved() != 0, bit <= 8; got != want {
			t.Errorf("refcount table bit %d reserved: %v, want %v", bit, got, want)
		}
		if got, want := !BitmapEntry(w).Valid(Layout{ClusterBits: 9}), bit >= 1 && bit <= 8 || bit >= 56; got != want {
			t.Errorf("bitmap table bit %d reserved: %v, want %v", bit, got, want)
		}
	}
}

// TestCompressedTable holds the table of the format's description: for each cluster size the split between host offset
// and sector count.
func TestCompressedTable(t *testing.T) {
	for cb := uint8(MinClusterBits); cb <= MaxClusterBits; cb++ {
		l := Layout{ClusterBits: cb, Version: Version3}
		all := L2Entry(1<<62 | (1<<62 - 1))
		off, n := l.CompressedExtent(all)
		if want := HostOff(1)<<(70-cb) - 1; off != want {
			t.Errorf("cluster bits %d: largest offset %#x, want %#x", cb, off, want)
		}
		if want := int64(1)<<(cb-8)*512 - 511; n != want {
			t.Errorf("cluster bits %d: largest length %d, want %d", cb, n, want)
		}
		limit := min(HostOff(1)<<(70-cb), 1<<56)
		if _, err := l.MakeCompressed(limit, 1); !errors.Is(err, ErrTooBig) {
			t.Errorf("cluster bits %d: offset %#x gives %v, want ErrTooBig", cb, limit, err)
		}
		if _, err := l.MakeCompressed(limit-1, 1); err != nil {
			t.Errorf("cluster bits %d: offset %#x: %v", cb, limit-1, err)
		}
		for _, bad := range []int64{0, -1, l.ClusterSize(), l.ClusterSize() + 1} {
			if _, err := l.MakeCompressed(0, bad); err == nil {
				t.Errorf("cluster bits %d: length %d is accepted", cb, bad)
			}
		}
	}
	l := Layout{ClusterBits: 16, Version: Version3}
	e, err := l.MakeCompressed(0x50000, 0x4f) // as qemu-img writes it
	if err != nil || e != 0x4000000000050000 {
		t.Errorf("MakeCompressed = %#x, %v", e, err)
	}
	e, err = l.MakeCompressed(0x501f0, 0x11) // the last byte is in the next sector
	if err != nil || e != 0x40400000000501f0 {
		t.Errorf("MakeCompressed = %#x, %v", e, err)
	}
}

func TestCompressedRoundTrip(t *testing.T) {
	all := layouts()
	rapid.Check(t, func(t *rapid.T) {
		l := rapid.SampledFrom(all).Draw(t, "layout")
		off := HostOff(rapid.Uint64Range(0, uint64(l.MaxCompressedOffset())).Draw(t, "offset"))
		n := rapid.Int64Range(1, l.ClusterSize()-1).Draw(t, "length")
		e, err := l.MakeCompressed(off, n)
		if err != nil {
			t.Fatal(err)
		}
		if l.Kind(e) != KindCompressed || e.Copied() || e.Reserved() != 0 {
			t.Fatalf("entry %#x is of kind %v", e, l.Kind(e))
		}
		gotOff, gotN := l.CompressedExtent(e)
		end, want := gotOff+HostOff(gotN), off+HostOff(n)
		if gotOff != off || end < want || end-want >= SectorSize || end%SectorSize != 0 {
			t.Fatalf("extent [%#x, %#x), want [%#x, %#x) up to a sector", gotOff, end, off, want)
		}
		first, last := l.CompressedClusters(e)
		if first != l.Cluster(off) || last != l.Cluster(end-1) {
			t.Fatalf("clusters %d to %d", first, last)
		}
	})
}

func TestSubclusters(t *testing.T) {
	l := Layout{ClusterBits: 16, RefcountOrder: 4, Version: Version3, ExtendedL2: true}
	const normal, none, compressed = L2Entry(0x8000000000050000), L2Entry(0), L2Entry(0x4000000000050000)
	tests := []struct {
		name string
		e    L2Entry
		b    L2Bitmap
		i    int
		want SubclusterKind
	}{
		{"data", normal, 1 << 1, 1, SubNormal},
		{"zero with host cluster", normal, 1 << 36, 4, SubZeroAlloc},
		{"reserved", normal, 1 << 1, 2, SubReserved},
		{"both", normal, 1<<1 | 1<<33, 1, SubInvalid},
		{"both, elsewhere in the cluster", normal, 1<<1 | 1<<33, 7, SubInvalid},
		{"zero", none, 1 << 63, 31, SubZeroPlain},
		{"nothing", none, 0, 0, SubUnallocated},
		{"data without host cluster", none, 1, 0, SubInvalid},
		{"data without host cluster, elsewhere", none, 1, 9, SubInvalid},
		{"compressed", compressed, 0, 3, SubCompressed},
		{"compressed with bitmap", compressed, 1, 3, SubInvalid},
		{"unaligned", normal | 0x200, 1, 0, SubInvalid},
		{"what qemu-io wrote: write 2K at 2K", normal, 0x0000001000000002, 1, SubNormal},
		{"what qemu-io wrote: zero 2K at 8K", normal, 0x0000001000000002, 4, SubZeroAlloc},
	}
	for _, tt := range tests {
		if got := l.SubKind(tt.e, tt.b, tt.i); got != tt.want {
			t.Errorf("%s: SubKind = %d, want %d", tt.name, got, tt.want)
		}
	}
	plain := Layout{ClusterBits: 16, RefcountOrder: 4, Version: Version3}
	whole := map[L2Entry]SubclusterKind{normal: SubNormal, none: SubUnallocated, compressed: SubCompressed,
		L2Zero: SubZeroPlain, normal | L2Zero: SubZeroAlloc, normal | 0x200: SubInvalid}
	for e, want := range whole {
		if got := plain.SubKind(e, 0, 0); got != want {
			t.Errorf("without subclusters: SubKind(%#x) = %d, want %d", e, got, want)
		}
	}
}

func TestBitmapRanges(t *testing.T) {
	l := Layout{ClusterBits: 16, RefcountOrder: 4, Version: Version3, ExtendedL2: true}
	const normal = L2Entry(0x8000000000050000)
	rapid.Check(t, func(t *rapid.T) {
		var b L2Bitmap
		var model [32]SubclusterKind
		for i := range model {
			model[i] = SubReserved
		}
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			from := rapid.IntRange(0, 32).Draw(t, "from")
			to := rapid.IntRange(from, 32).Draw(t, "to")
			kind := rapid.SampledFrom([]SubclusterKind{SubNormal, SubZeroAlloc, SubReserved}).Draw(t, "kind")
			switch kind {
			case SubNormal:
				b = b.SetAlloc(from, to)
			case SubZeroAlloc:
				b = b.SetZero(from, to)
			default:
				b = b.SetUnallocated(from, to)
			}
			for i := from; i < to; i++ {
				model[i] = kind
			}
		}
		for i, want := range model {
			if got := l.SubKind(normal, b, i); got != want {
				t.Fatalf("subcluster %d of %#x is %d, want %d", i, b, got, want)
			}
		}
	})
	if got := L2Bitmap(0).SetAlloc(0, 32); got != BitmapAllAlloc {
		t.Errorf("all allocated = %#x", got)
	}
	if got := BitmapAllAlloc.SetZero(0, 32); got != BitmapAllZero {
		t.Errorf("all zero = %#x", got)
	}
}

func FuzzL2Entry(f *testing.F) {
	f.Add(uint64(0x8000000000050000), uint64(0), byte(16), byte(0))
	f.Add(uint64(0x400000000005004f), uint64(0), byte(9), byte(1))
	f.Add(uint64(0x8000000000050000), uint64(0x0000001000000002), byte(14), byte(3))
	f.Fuzz(func(t *testing.T, w0, w1 uint64, cb, flags byte) {
		l := Layout{ClusterBits: MinClusterBits + cb%13, RefcountOrder: 4, Version: 2 + uint32(flags>>2&1), DataFile: flags&1 != 0}
		l.ExtendedL2 = flags&2 != 0 && l.ClusterBits >= MinExtendedL2ClusterBits
		e := L2Entry(w0)
		kind := l.Kind(e)
		if kind == KindNormal && L2Entry(w0&(1<<63|offsetMask)) != MakeL2(e.HostOffset(), e.Copied()) {
			t.Errorf("normal entry %#x is not made of its parts", e)
		}
		if kind == KindCompressed {
			off, n := l.CompressedExtent(e)
			if n < 1 || n > 2*l.ClusterSize() || (off+HostOff(n))%SectorSize != 0 {
				t.Errorf("entry %#x: extent %#x+%d", e, off, n)
			}
			first, last := l.CompressedClusters(e)
			if last < first || last-first > 2 {
				t.Errorf("entry %#x: clusters %d to %d", e, first, last)
			}
			if n < l.ClusterSize() && off <= l.MaxCompressedOffset() {
				if again, err := l.MakeCompressed(off, n); err != nil || again != e&^flagCopied {
					t.Errorf("entry %#x comes back as %#x, %v", e, again, err)
				}
			}
		}
		for i := range l.Subclusters() {
			if l.SubKind(e, L2Bitmap(w1), i) > SubInvalid {
				t.Errorf("entry %#x, %#x: no such kind", w0, w1)
			}
		}
	})
}
