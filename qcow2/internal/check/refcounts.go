package check

import (
	"bytes"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// storedRefcounts is the refcounts as the file has them.
type storedRefcounts struct {
	l     format.Layout
	table []format.RefTableEntry // up to the last entry that is not 0
	// blocks holds the refcount blocks by host offset. A block that is named but not here is not in the file: zeroes.
	blocks map[format.HostOff][]byte
	// byNum holds them by the table's index.
	byNum [][]byte
}

// loadRefcountTable reads the refcount table and all blocks that are where a block can be.
func (c *checker) loadRefcountTable() (*storedRefcounts, error) {
	s := &storedRefcounts{l: c.l, blocks: make(map[format.HostOff][]byte)}
	n := uint64(c.h.RefTableLen) << c.l.ClusterBits
	err := c.words(c.h.RefTableOffset, n, func(first int64, words []uint64) error {
		for i, w := range words {
			if w == 0 {
				continue // as all is behind the end of the table
			}
			if at := int(first) + i; at > len(s.table) {
				s.table = append(s.table, make([]format.RefTableEntry, at-len(s.table))...)
			}
			s.table = append(s.table, format.RefTableEntry(w))
		}
		return nil
	})
	if err != nil {
		return nil, c.failed("the refcount table", c.h.RefTableOffset, err)
	}
	if err := c.loadBlocks(s); err != nil {
		return nil, err
	}
	s.byNum = make([][]byte, len(s.table))
	for i := range s.byNum {
		s.byNum[i] = s.blocks[s.table[i].Offset()]
	}
	return s, nil
}

// loadBlocks reads the refcount blocks, several at a time.
func (c *checker) loadBlocks(s *storedRefcounts) error {
	var list []format.HostOff
	for _, e := range s.table {
		if off := e.Offset(); off != 0 && s.blocks[off] == nil && c.l.Aligned(off) && c.inside(off, 1) > 0 {
			s.blocks[off] = []byte{} // found again below
			list = append(list, off)
		}
	}
	blocks, err := parallel(c.ctx, len(list), func(i int) ([]byte, error) {
		b, err := c.read(list[i], c.l.ClusterSize())
		return b, err
	})
	if err != nil {
		i := len(blocks) // the first that could not be read
		return c.failed("refcount block", list[min(i, len(list)-1)], err)
	}
	for i, off := range list {
		s.blocks[off] = blocks[i]
	}
	return nil
}

// block returns the refcount block of that number, nil if all its refcounts are 0. It reports false if the refcount
// table has nonsense there, so that the refcounts cannot be known. A block behind the end of the file is all zeroes.
func (s *storedRefcounts) block(num int64) ([]byte, bool) {
	if num >= int64(len(s.table)) {
		return nil, true
	}
	off := s.table[num].Offset()
	if off == 0 {
		return nil, true
	}
	return s.byNum[num], s.l.Aligned(off) && off <= maxFileOffset
}

// maxFileOffset is the end of the longest file that QEMU reads.
const maxFileOffset format.HostOff = 1<<63 - 1<<30

// get returns the stored refcount of a cluster.
func (s *storedRefcounts) get(i format.ClusterIdx) (uint64, bool) {
	num := s.l.RefTableIndex(i)
	if uint64(num) < uint64(len(s.byNum)) {
		if block := s.byNum[num]; block != nil {
			return s.l.Refcount(block, s.l.RefBlockIndex(i)), true
		}
	}
	_, ok := s.block(num)
	return 0, ok
}

// walkRefcountTable counts the references to the refcount blocks. All other references have been counted, so that a
// block that is anything else besides shows here.
func (c *checker) walkRefcountTable() error {
	for i, e := range c.stored.table {
		off := e.Offset()
		p := at(off)
		switch {
		case e.Reserved() != 0:
			c.corrupt(1, p, "ERROR refcount table entry %d has reserved bits set", i)
		case !c.l.Aligned(off):
			c.corrupt(1, p, "ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", i)
		case uint64(c.l.Cluster(off)) >= c.clusters:
			c.corrupt(1, p, "ERROR refcount block %d is outside image", i)
		case off == 0:
			continue
		default:
			c.reference(off, uint64(c.l.ClusterSize()), 1)
			n := c.refs.get(c.l.Cluster(off))
			if n == 1 {
				c.brokenRefs = c.brokenRefs || !c.counted(c.l.Cluster(off), 1)
				continue
			}
			c.corrupt(1, p, "ERROR refcount block %d refcount=%d", i, n)
		}
		c.rep.Rebuild, c.brokenRefs = true, true
	}
	c.brokenRefs = c.brokenRefs || !c.ownsRefcountTable()
	return nil
}

// ownsRefcountTable reports whether the refcount table is there and its clusters are nothing else.
func (c *checker) ownsRefcountTable() bool {
	n := uint64(c.h.RefTableLen) << c.l.ClusterBits
	if n == 0 || uint64(c.inside(c.h.RefTableOffset, n)) < n {
		return false
	}
	first := c.l.Cluster(c.h.RefTableOffset)
	for i := range format.ClusterIdx(c.h.RefTableLen) {
		if !c.counted(first+i, 1) {
			return false
		}
	}
	return true
}

// refPart is clusters [lo, hi) that share a page of counts and a refcount block.
type refPart struct {
	lo, hi  uint64
	num     int64      // of the block
	block   []byte     // nil if there is none
	known   bool       // false: there is a block, but its place is impossible
	counted *countPage // nil if nothing refers to the clusters
}

// compare compares the stored refcounts with the references found.
func (c *checker) compare() error {
	return c.eachPart(func(p refPart) error {
		switch {
		case !p.known:
			c.unknownRefcounts(p.lo, p.hi)
		case p.counted != nil || !c.allZero(p.block, p.lo, p.hi):
			c.comparePart(p)
		}
		return nil
	})
}

// eachPart calls fn for all clusters in order, but only for those whose page has references or whose refcounts have a
// block: everything else is 0 on both sides.
func (c *checker) eachPart(fn func(refPart) error) error {
	var pages []span
	for _, n := range c.refs.pageNumbers() {
		pages = append(pages, span{n, n + 1})
	}
	perBlock := uint64(c.l.RefcountsPerBlock())
	for num, e := range c.stored.table {
		lo := uint64(num) * perBlock
		if lo >= c.clusters {
			break
		}
		if e.Offset() != 0 {
			hi := min(lo+perBlock, c.clusters)
			pages = append(pages, span{lo / pageClusters, (hi-1)/pageClusters + 1})
		}
	}
	return sweep(pages, func(lo, hi, _ uint64) error {
		for page := lo; page < hi; page++ {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			if err := c.pageParts(page, fn); err != nil {
				return err
			}
		}
		return nil
	})
}

// pageParts calls fn for the clusters of a page, block by block.
func (c *checker) pageParts(page uint64, fn func(refPart) error) error {
	end := min((page+1)*pageClusters, c.clusters)
	counted := c.refs.page(page)
	for lo := page * pageClusters; lo < end; {
		num := c.l.RefTableIndex(format.ClusterIdx(lo))
		hi := min(end, uint64(num+1)*uint64(c.l.RefcountsPerBlock()))
		block, known := c.stored.block(num)
		if err := fn(refPart{lo, hi, num, block, known, counted}); err != nil {
			return err
		}
		lo = hi
	}
	return nil
}

// unknownRefcounts reports clusters whose refcounts cannot be found.
func (c *checker) unknownRefcounts(lo, hi uint64) {
	for i := format.ClusterIdx(lo); i < format.ClusterIdx(hi); i++ {
		c.found(Failure, 1, at(c.l.Offset(i)), "Can't get refcount for cluster %d: Input/output error", i)
	}
}

// comparePart compares the clusters of a part.
func (c *checker) comparePart(p refPart) {
	for i := c.skipEqual(p); i < format.ClusterIdx(p.hi); i++ {
		stored, found := c.both(&p, i)
		if stored > 0 || found > 0 {
			c.rep.ImageEndOffset = int64(i+1) << c.l.ClusterBits // pages come in ascending order
		}
		if stored != found {
			c.missingBlock = c.missingBlock || p.block == nil
			c.differ(i, stored, found)
		}
	}
}

// skipEqual returns the first cluster of a part whose refcount may be wrong: the quick way for the usual width.
func (c *checker) skipEqual(p refPart) format.ClusterIdx {
	i := format.ClusterIdx(p.lo)
	if c.l.RefcountOrder != 4 || p.block == nil || p.counted == nil {
		return i
	}
	n := int(p.hi - p.lo)
	stored := p.block[2*c.l.RefBlockIndex(i):][:2*n]
	found := p.counted[p.lo%pageClusters:][:n]
	used := -1
	for k, v := range found {
		if uint16(stored[2*k])<<8|uint16(stored[2*k+1]) != v || v == manyRefs {
			n = k
			break
		}
		if v != 0 {
			used = k
		}
	}
	if used >= 0 {
		c.rep.ImageEndOffset = int64(i+format.ClusterIdx(used)+1) << c.l.ClusterBits
	}
	return i + format.ClusterIdx(n)
}

// both returns the stored refcount of a cluster of the part and the number of references found.
func (c *checker) both(p *refPart, i format.ClusterIdx) (stored, found uint64) {
	if p.block != nil {
		stored = c.l.Refcount(p.block, c.l.RefBlockIndex(i))
	}
	if p.counted != nil {
		found = c.refs.inPage(p.counted, i)
	}
	return stored, found
}

var zeroes [4096]byte

// allZero reports, if that is easily told, whether the refcounts [lo, hi) of a block are all 0.
func (c *checker) allZero(block []byte, lo, hi uint64) bool {
	if block == nil {
		return true
	}
	bits := uint64(c.l.RefcountBits())
	first := uint64(c.l.RefBlockIndex(format.ClusterIdx(lo))) * bits
	last := first + (hi-lo)*bits
	if first%8 != 0 || last%8 != 0 {
		return false
	}
	return isZero(block[first/8 : last/8])
}

func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroes))
		if !bytes.Equal(b[:n], zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// differ reports a stored refcount that is not the number of references found.
func (c *checker) differ(i format.ClusterIdx, stored, found uint64) {
	p := at(c.l.Offset(i))
	if stored > found {
		c.found(Leak, 1, p, "Leaked cluster %d refcount=%d reference=%d", i, stored, found)
		return
	}
	c.corrupt(1, p, "ERROR cluster %d refcount=%d reference=%d", i, stored, found)
	c.rep.Rebuild = c.rep.Rebuild || stored == 0
}
