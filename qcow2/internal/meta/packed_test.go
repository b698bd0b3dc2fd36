package meta

import (
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// drawSlice makes a slice of the kind that real tables have: gaps, runs of data, zeroes, compressed clusters, and words
// that nobody should have written.
func drawSlice(t *rapid.T, m *Mapping) []byte {
	raw := make([]byte, m.sliceSize)
	most := int(m.sliceSize / 8)
	for i := 0; i < most; {
		// Parts are so long that all of a slice always fits into the runs that there may be.
		n := min(rapid.IntRange(most/32, most/2).Draw(t, "n"), most-i)
		word := rapid.SampledFrom([]uint64{
			0, 0, 0, 1, 1<<63 | 5<<16, 1<<63 | 5<<16 | 1, 7 << 16, 1<<62 | 0x5000, 1 << 3, 1<<63 | 1<<9, 1<<63 | (1<<56 - 1<<16),
		}).Draw(t, "word")
		step := rapid.SampledFrom([]uint64{0, uint64(m.lay.ClusterSize()), 512}).Draw(t, "step")
		same := n // words that differ by the step
		if natural, ok := m.step(word); word != 0 && (!ok || natural != step) || word == 0 && step != 0 {
			same = 1 // each would be a run of its own
		}
		for k := range same {
			b := format.EncodeUint64(word + uint64(k)*step)
			copy(raw[(i+k)*8:], b[:])
		}
		i += n
	}
	return raw
}

// TestPackedSaysTheSame compares every answer of a packed slice with that of its words.
func TestPackedSaysTheSame(t *testing.T) {
	s, _ := newTestStore(t, 4)
	m := s.Map
	rapid.Check(t, func(t *rapid.T) {
		raw := drawSlice(t, m)
		p, ok := m.pack(raw)
		if !ok {
			t.Fatal("it is not packed")
		}
		words := make([]atomic.Uint64, len(raw)/8)
		for k := range words {
			words[k].Store(be64(raw[k*8:]))
		}
		for k := range words {
			if got, want := (*m.unpack(p))[k].Load(), words[k].Load(); got != want {
				t.Fatalf("word %d unpacks to %#x, want %#x", k, got, want)
			}
		}
		full := &slice{}
		full.words.Store(&words)
		limit := rapid.Int64Range(1, m.perSlice).Draw(t, "limit")
		for i := range m.perSlice {
			want, wantErr := m.scan(full, GuestCluster(i), i, limit)
			got, err := m.scan(&slice{packed: p}, GuestCluster(i), i, limit)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("entry %d: %v, want %v", i, err, wantErr)
			}
			// A run of the same kind may be told in pieces, of which the first must be right.
			if got.N > want.N || err == nil && got.N < 1 {
				t.Fatalf("entry %d: %+v, want %+v", i, got, want)
			}
			want.N = got.N
			if got != want {
				t.Fatalf("entry %d: %+v, want %+v", i, got, want)
			}
		}
	})
}

// TestPackedIsSmall: a slice that maps little, or much in one run, takes little memory; one that maps at random is left alone.
func TestPackedIsSmall(t *testing.T) {
	s, _ := newTestStore(t, 4)
	m := s.Map
	raw := make([]byte, m.sliceSize)
	put := func(i int, host format.HostOff) {
		b := format.EncodeUint64(uint64(format.MakeL2(host, true)))
		copy(raw[i*8:], b[:])
	}
	cs := format.HostOff(m.lay.ClusterSize())
	for i := range int(m.perSlice) {
		put(i, cs*format.HostOff(i+100))
	}
	if p, ok := m.pack(raw); !ok || len(p) != 1 {
		t.Errorf("one run is packed as %d (%v)", len(p), ok)
	}
	for i := range int(m.perSlice) {
		put(i, cs*format.HostOff(1000-i))
	}
	if p, ok := m.pack(raw); ok {
		t.Errorf("a slice without runs is packed as %d", len(p))
	}
}
