package meta

import (
	"sort"
	"sync/atomic"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// packed is what a slice of an L2 table says, as runs of entries in order; entries between them are 0. Most slices of a
// large disk map little, or map it in long runs: kept like this they take a tenth of their words, or less. It is never
// changed.
type packed []packedRun

// packedRun is n entries from the first on. Each is that before it, of the next host cluster where there are host clusters.
type packedRun struct {
	first, n uint32
	word     uint64
}

const (
	packedRunBytes = 16
	// packedBytes is about what a packed slice takes beside its runs.
	packedBytes = 128
	// packFactor is how much smaller than its words a slice must get to be packed: finding an entry takes longer then.
	packFactor = 4
)

func (p packed) size() int64 { return packedBytes + int64(len(p))*packedRunBytes }

// step is what the words of a run differ by, from one to the next; ok is false for a word that runs alone.
func (m *Mapping) step(word uint64) (step uint64, ok bool) {
	switch m.lay.Kind(format.L2Entry(word)) {
	case format.KindNormal, format.KindZeroAlloc:
		return uint64(m.lay.ClusterSize()), true
	case format.KindZeroPlain:
		return 0, true
	}
	return 0, false
}

// pack packs a slice as it is on disk. It reports false when that would not save much.
func (m *Mapping) pack(raw []byte) (packed, bool) {
	most := len(raw) / packFactor / packedRunBytes
	if m.stride == 2 || most == 0 {
		return nil, false
	}
	var runs packed
	var next uint64 // that continues the last run
	open := false   // whether anything does
	for i := uint32(0); int(i) < len(raw)/8; i++ {
		word := be64(raw[i*8:])
		if word == 0 {
			open = false
			continue
		}
		step, ok := m.step(word)
		if open && word == next {
			runs[len(runs)-1].n++
			next += step
			continue
		}
		if len(runs) == most {
			return nil, false
		}
		runs = append(runs, packedRun{i, 1, word})
		next, open = word+step, ok
	}
	return append(packed(nil), runs...), true // no longer than it must be
}

// unpack returns the words.
func (m *Mapping) unpack(p packed) *[]atomic.Uint64 {
	words := make([]atomic.Uint64, m.sliceSize/8)
	for _, r := range p {
		step, _ := m.step(r.word)
		for k := range r.n {
			words[r.first+k].Store(r.word + uint64(k)*step)
		}
	}
	return &words
}

// scanPacked is scan of a packed slice.
func (m *Mapping) scanPacked(p packed, c GuestCluster, i, limit int64) (Run, error) {
	limit = min(limit, m.perSlice-i)
	at := sort.Search(len(p), func(k int) bool { return int64(p[k].first+p[k].n) > i })
	if at == len(p) {
		return Run{Kind: format.KindUnallocated, N: limit}, nil
	}
	r := p[at]
	if int64(r.first) > i {
		return Run{Kind: format.KindUnallocated, N: min(limit, int64(r.first)-i)}, nil
	}
	step, _ := m.step(r.word)
	e := format.L2Entry(r.word + uint64(i-int64(r.first))*step)
	run := Run{Kind: m.lay.Kind(e), Copied: e.Copied(), Entry: e, N: min(limit, int64(r.first+r.n)-i)}
	if run.Kind == format.KindInvalid {
		return Run{}, corrupt("L2 entry %#x of guest cluster %d", uint64(e), c)
	}
	return run, nil
}
