package check

import (
	"cmp"
	"math"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// pageClusters is how many clusters share a page of reference counts. It is a multiple of 8, so that a page's refcounts
// fill whole bytes whatever their width.
const pageClusters = 4096

// manyRefs marks a count that does not fit in a page and is in counts.many instead.
const manyRefs = math.MaxUint16

type countPage [pageClusters]uint16

// chunkPages is how many pages are found by one look into the map.
const chunkPages = 512

type countChunk [chunkPages]*countPage

// counts holds how many references were found to each host cluster. It takes memory only for pages that were touched.
type counts struct {
	chunks map[uint64]*countChunk
	many   map[format.ClusterIdx]uint64
	// The chunk used last: references come in runs.
	last    *countChunk
	lastNum uint64
}

func newCounts() *counts {
	return &counts{chunks: make(map[uint64]*countChunk), many: make(map[format.ClusterIdx]uint64)}
}

// page returns a page by its number, nil if it was never touched.
func (c *counts) page(num uint64) *countPage {
	chunk := c.last
	if chunk == nil || c.lastNum != num/chunkPages {
		if chunk = c.chunks[num/chunkPages]; chunk == nil {
			return nil
		}
		c.last, c.lastNum = chunk, num/chunkPages
	}
	return chunk[num%chunkPages]
}

// touch returns a page, made if need be.
func (c *counts) touch(num uint64) *countPage {
	if page := c.page(num); page != nil {
		return page
	}
	chunk := c.chunks[num/chunkPages]
	if chunk == nil {
		chunk = new(countChunk)
		c.chunks[num/chunkPages] = chunk
	}
	page := new(countPage)
	chunk[num%chunkPages] = page
	return page
}

// get returns the number of references to a cluster.
func (c *counts) get(i format.ClusterIdx) uint64 {
	page := c.page(uint64(i) / pageClusters)
	if page == nil {
		return 0
	}
	return c.inPage(page, i)
}

func (c *counts) inPage(page *countPage, i format.ClusterIdx) uint64 {
	if v := page[i%pageClusters]; v != manyRefs {
		return uint64(v)
	}
	return c.many[i]
}

// add adds n references to a cluster, but stays at limit. It returns how many did not fit.
func (c *counts) add(i format.ClusterIdx, n, limit uint64) (lost uint64) {
	return c.addTo(c.touch(uint64(i)/pageClusters), i, n, limit)
}

// addTo is add for a cluster of a page that is at hand.
func (c *counts) addTo(page *countPage, i format.ClusterIdx, n, limit uint64) (lost uint64) {
	old := c.inPage(page, i)
	if room := limit - old; n > room {
		n, lost = room, n-room
	}
	if sum := old + n; sum < manyRefs {
		page[i%pageClusters] = uint16(sum)
	} else {
		page[i%pageClusters] = manyRefs
		c.many[i] = sum
	}
	return lost
}

// remove takes the only reference to a cluster away.
func (c *counts) remove(i format.ClusterIdx) {
	if page := c.page(uint64(i) / pageClusters); page != nil {
		page[i%pageClusters] = 0
	}
}

// pageNumbers returns the numbers of the touched pages in order.
func (c *counts) pageNumbers() []uint64 {
	var nums []uint64
	for num, chunk := range c.chunks {
		for k, page := range chunk {
			if page != nil {
				nums = append(nums, num*chunkPages+uint64(k))
			}
		}
	}
	slices.Sort(nums)
	return nums
}

// tableRef is what the L1 tables say of one L2 table.
type tableRef struct {
	off format.HostOff
	// weight is the number of L1 entries that point to it, active how many of those are in the active L1 table.
	weight, active uint64
	// index is the first entry of the active L1 table that does, if active is not 0.
	index int64
}

// tableRefs collects references to L2 tables in memory proportional to the number of different tables.
type tableRefs struct {
	list   []tableRef
	merged int // the length of list after the last merge
}

func (r *tableRefs) add(ref tableRef) {
	if len(r.list) >= 2*r.merged+1<<16 {
		r.merge()
	}
	r.list = append(r.list, ref)
}

// merge sorts the references by host offset and makes those to the same table one.
func (r *tableRefs) merge() {
	slices.SortFunc(r.list, func(a, b tableRef) int { return cmp.Compare(a.off, b.off) })
	out := r.list[:0]
	for _, ref := range r.list {
		n := len(out)
		if n == 0 || out[n-1].off != ref.off {
			out = append(out, ref)
			continue
		}
		last := &out[n-1]
		if ref.active > 0 && (last.active == 0 || ref.index < last.index) {
			last.index = ref.index
		}
		last.weight += ref.weight
		last.active += ref.active
	}
	r.list, r.merged = out, len(out)
}

// refRun is references to n clusters in a row.
type refRun struct {
	first    format.ClusterIdx
	n, times uint64
}

// refRuns is a list of references that are yet to be counted.
type refRuns struct{ list []refRun }

func (r *refRuns) add(first format.ClusterIdx, n, times uint64) {
	if k := len(r.list) - 1; k >= 0 {
		if last := &r.list[k]; last.times == times && last.first+format.ClusterIdx(last.n) == first {
			last.n += n
			return
		}
	}
	r.list = append(r.list, refRun{first, n, times})
}
