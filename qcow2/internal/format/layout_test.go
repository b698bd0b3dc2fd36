package format

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// layouts returns every combination of geometry that an image can have.
func layouts() []Layout {
	var all []Layout
	for cb := uint8(MinClusterBits); cb <= MaxClusterBits; cb++ {
		for order := uint8(0); order <= MaxRefcountOrder; order++ {
			all = append(all, Layout{ClusterBits: cb, RefcountOrder: order, Version: Version3})
			if cb >= MinExtendedL2ClusterBits {
				all = append(all, Layout{ClusterBits: cb, RefcountOrder: order, Version: Version3, ExtendedL2: true})
			}
		}
	}
	return all
}

func TestCapacity(t *testing.T) {
	const (
		gib = int64(1) << 30
		tib = int64(1) << 40
		pib = int64(1) << 50
		eib = int64(1) << 60
	)
	tests := []struct {
		cb   uint8
		ext  bool
		want int64
	}{
		{9, false, 128 * gib}, {12, false, 8 * tib}, {16, false, 2 * pib}, {16, true, pib}, {21, false, 2 * eib}, {21, true, eib},
	}
	for _, tt := range tests {
		l := Layout{ClusterBits: tt.cb, Version: Version3, RefcountOrder: 4, ExtendedL2: tt.ext}
		if got := l.MaxDiskSize(); got != tt.want {
			t.Errorf("cluster bits %d ext %v: MaxDiskSize = %d, want %d", tt.cb, tt.ext, got, tt.want)
		}
		if n, err := l.L1EntriesFor(tt.want); err != nil || n != MaxL1Entries {
			t.Errorf("cluster bits %d: L1EntriesFor(max) = %d, %v", tt.cb, n, err)
		}
		if _, err := l.L1EntriesFor(tt.want + 1); !errors.Is(err, ErrTooBig) {
			t.Errorf("cluster bits %d: L1EntriesFor(max+1) = %v, want ErrTooBig", tt.cb, err)
		}
	}
	if _, err := (Layout{ClusterBits: 16}).L1EntriesFor(-1); !errors.Is(err, ErrTooBig) {
		t.Errorf("a negative size gives %v, want ErrTooBig", err)
	}
}

func TestGeometry(t *testing.T) {
	l := Layout{ClusterBits: 16, RefcountOrder: 4, Version: Version3}
	ext := Layout{ClusterBits: 16, RefcountOrder: 0, Version: Version3, ExtendedL2: true}
	small := Layout{ClusterBits: 9, RefcountOrder: 6, Version: Version3}
	tests := []struct {
		name      string
		got, want int64
	}{
		{"cluster size", l.ClusterSize(), 65536},
		{"L2 entries", l.L2Entries(), 8192},
		{"L2 coverage", l.L2Coverage(), 512 << 20},
		{"L2 entries, extended", ext.L2Entries(), 4096},
		{"L2 entry size, extended", ext.L2EntrySize(), 16},
		{"L2 coverage, extended", ext.L2Coverage(), 256 << 20},
		{"subcluster size, extended", ext.SubclusterSize(), 2048},
		{"subcluster size", l.SubclusterSize(), 65536},
		{"refcounts per block", l.RefcountsPerBlock(), 32768},
		{"refcounts per block, 1 bit", ext.RefcountsPerBlock(), 524288},
		{"refcounts per block, 64 bit", small.RefcountsPerBlock(), 64},
		{"refcount block coverage", l.RefBlockCoverage(), 2 << 30},
		{"refcount table clusters", l.MaxRefTableClusters(), 128},
		{"L1 index", l.L1Index(512<<20 + 5), 1},
		{"L2 index", l.L2Index(512<<20 + 3<<16 + 5), 3},
		{"clusters for 0", l.ClustersFor(0), 0},
		{"clusters for 1", l.ClustersFor(1), 1},
		{"clusters for 65536", l.ClustersFor(65536), 1},
		{"clusters for 65537", l.ClustersFor(65537), 2},
		{"clusters for the largest int64", l.ClustersFor(1<<63 - 1), 1 << 47},
		{"in cluster", l.InCluster(0x5fffe), 0xfffe},
		{"guest in cluster", l.GuestInCluster(0x5fffe), 0xfffe},
		{"cluster", int64(l.Cluster(0x5fffe)), 5},
		{"cluster start", int64(l.ClusterStart(0x5fffe)), 0x50000},
		{"offset", int64(l.Offset(5)), 0x50000},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s = %d, want %d", tt.name, tt.got, tt.want)
		}
	}
	maxima := map[uint8]uint64{0: 1, 1: 3, 2: 15, 3: 255, 4: 65535, 5: 1<<32 - 1, 6: 1<<64 - 1}
	for order, want := range maxima {
		if got := (Layout{ClusterBits: 16, RefcountOrder: order}).RefcountMax(); got != want {
			t.Errorf("RefcountMax of order %d = %d, want %d", order, got, want)
		}
	}
}

func TestGuestOffsetIsInverse(t *testing.T) {
	all := layouts()
	rapid.Check(t, func(t *rapid.T) {
		l := rapid.SampledFrom(all).Draw(t, "layout")
		off := GuestOff(rapid.Int64Range(0, l.MaxDiskSize()-1).Draw(t, "offset"))
		i1, i2 := l.L1Index(off), l.L2Index(off)
		if i1 < 0 || i1 >= MaxL1Entries || i2 < 0 || i2 >= l.L2Entries() {
			t.Fatalf("indexes %d, %d are out of range", i1, i2)
		}
		if got, want := l.GuestOffset(i1, i2), off-GuestOff(l.GuestInCluster(off)); got != want {
			t.Fatalf("GuestOffset = %#x, want %#x", got, want)
		}
		n, err := l.L1EntriesFor(int64(off) + 1)
		if err != nil || n != i1+1 {
			t.Fatalf("L1EntriesFor(%d) = %d, %v; want %d", off+1, n, err, i1+1)
		}
		host := HostOff(off)
		c := l.Cluster(host)
		if l.Offset(c) != l.ClusterStart(host) || l.Offset(c)+HostOff(l.InCluster(host)) != host {
			t.Fatalf("cluster %d does not hold %#x", c, host)
		}
		if got := l.RefTableIndex(c)*l.RefcountsPerBlock() + l.RefBlockIndex(c); got != int64(c) {
			t.Fatalf("refcount of cluster %d is found at number %d", c, got)
		}
	})
}

func TestRefcountPacking(t *testing.T) {
	tests := []struct {
		order uint8
		index int64
		value uint64
		at    int
		want  []byte
	}{
		{0, 0, 1, 0, []byte{0x01}}, {0, 9, 1, 1, []byte{0x02}}, {1, 1, 3, 0, []byte{0x0c}}, {1, 7, 2, 1, []byte{0x80}},
		{2, 1, 9, 0, []byte{0x90}}, {2, 2, 5, 1, []byte{0x05}}, {3, 2, 200, 2, []byte{200}},
		{4, 1, 0x1234, 2, []byte{0x12, 0x34}}, {5, 1, 0x12345678, 4, []byte{0x12, 0x34, 0x56, 0x78}},
		{6, 1, 0x123456789abcdef0, 8, []byte{0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0}},
	}
	for _, tt := range tests {
		l := Layout{ClusterBits: 9, RefcountOrder: tt.order}
		block := make([]byte, 512)
		l.SetRefcount(block, tt.index, tt.value)
		if got := string(block[tt.at : tt.at+len(tt.want)]); got != string(tt.want) {
			t.Errorf("order %d entry %d: bytes % x, want % x", tt.order, tt.index, got, tt.want)
		}
		if got := l.Refcount(block, tt.index); got != tt.value {
			t.Errorf("order %d entry %d reads as %d, want %d", tt.order, tt.index, got, tt.value)
		}
	}
}

func TestRefcountsAreIndependent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := Layout{ClusterBits: 9, RefcountOrder: uint8(rapid.IntRange(0, 6).Draw(t, "order"))}
		block := make([]byte, l.ClusterSize())
		model := map[int64]uint64{}
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			i := rapid.Int64Range(0, l.RefcountsPerBlock()-1).Draw(t, "index")
			v := rapid.Uint64Range(0, l.RefcountMax()).Draw(t, "value")
			l.SetRefcount(block, i, v)
			model[i] = v
		}
		for i := range l.RefcountsPerBlock() {
			if got := l.Refcount(block, i); got != model[i] {
				t.Fatalf("entry %d = %d, want %d", i, got, model[i])
			}
		}
	})
}

func TestTableRoundTrip(t *testing.T) {
	words := []uint64{0, 1, 0x0102030405060708, 1<<64 - 1}
	b := make([]byte, 8*len(words))
	EncodeTable(b, words)
	if b[16] != 1 || b[23] != 8 {
		t.Fatalf("the table is not big-endian: % x", b)
	}
	got := make([]uint64, len(words))
	DecodeTable(got, b)
	for i := range words {
		if got[i] != words[i] {
			t.Errorf("word %d = %#x, want %#x", i, got[i], words[i])
		}
	}
	short := []uint64{7, 7, 7}
	DecodeTable(short, b[:20]) // two whole words
	if short[0] != 0 || short[1] != 1 || short[2] != 7 {
		t.Errorf("a table that is cut off decodes to %v", short)
	}
}
