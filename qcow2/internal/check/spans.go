package check

import (
	"cmp"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// span is a half-open range of clusters or words.
type span struct{ lo, hi uint64 }

// sweep calls fn for the parts of a union of spans, in order, each with the number of spans that cover it. So the work
// on tables that overlap (snapshots that share one, or an image made to waste time) is done once per part.
func sweep(spans []span, fn func(lo, hi, weight uint64) error) error {
	type edge struct {
		at    uint64
		delta int
	}
	edges := make([]edge, 0, 2*len(spans))
	for _, s := range spans {
		if s.lo < s.hi {
			edges = append(edges, edge{s.lo, 1}, edge{s.hi, -1})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.at, b.at) })
	weight, from := 0, uint64(0)
	for _, e := range edges {
		if weight > 0 && e.at > from {
			if err := fn(from, e.at, uint64(weight)); err != nil {
				return err
			}
		}
		weight, from = weight+e.delta, e.at
	}
	return nil
}

// tableSpans is a set of tables that may overlap.
type tableSpans struct {
	clusters []span
	words    []span // as far as they are in the file
}

// add adds a table of n bytes. off is a multiple of 8.
func (s *tableSpans) add(c *checker, off format.HostOff, n uint64) {
	if c.inFile(off, n) {
		s.clusters = append(s.clusters, span{uint64(c.l.Cluster(off)), uint64(c.l.Cluster(off+format.HostOff(n)-1)) + 1})
	} else {
		c.reference(off, n, 1) // reports it
	}
	lo := uint64(off) / 8
	s.words = append(s.words, span{lo, lo + uint64(c.inside(off, n)+7)/8})
}

// walk counts the references to the tables' clusters, and calls fn for every word with the number of tables it is in.
func (s *tableSpans) walk(c *checker, what string, fn func(w, weight uint64)) error {
	err := sweep(s.clusters, func(lo, hi, weight uint64) error {
		for i := lo; i < hi; i++ {
			if i%pageClusters == 0 && c.ctx.Err() != nil {
				return c.ctx.Err()
			}
			c.referenceCluster(format.ClusterIdx(i), weight)
		}
		return nil
	})
	if err != nil {
		return err
	}
	in := wordReader{c: c, what: what}
	for _, w := range s.words {
		in.end = max(in.end, w.hi)
	}
	return sweep(s.words, func(lo, hi, weight uint64) error {
		for lo < hi {
			words, err := in.at(lo, hi)
			if err != nil {
				return err
			}
			for _, w := range words {
				fn(w, weight)
			}
			lo += uint64(len(words))
		}
		return nil
	})
}

// wordReader reads words of the file in ascending order, much at a time.
type wordReader struct {
	c     *checker
	what  string
	end   uint64 // no word from here on is asked for
	first uint64
	words []uint64
	buf   []byte
}

// at returns some of the words [lo, hi), at least the first.
func (r *wordReader) at(lo, hi uint64) ([]uint64, error) {
	if lo < r.first || lo >= r.first+uint64(len(r.words)) {
		if err := r.fill(lo); err != nil {
			return nil, err
		}
	}
	from := lo - r.first
	return r.words[from:min(hi-r.first, uint64(len(r.words)))], nil
}

func (r *wordReader) fill(lo uint64) error {
	if err := r.c.ctx.Err(); err != nil {
		return err
	}
	n := min(r.end-lo, readAhead/8)
	if r.buf == nil {
		r.buf, r.words = make([]byte, 8*n), make([]uint64, n)
	}
	off := format.HostOff(8 * lo)
	if err := r.c.readInto(r.buf[:8*n], off); err != nil {
		return r.c.failed(r.what, off, err)
	}
	r.first, r.words = lo, r.words[:n]
	format.DecodeTable(r.words, r.buf)
	return nil
}

// readAhead is how much is read at once where more will probably be wanted.
const readAhead = 64 << 10
