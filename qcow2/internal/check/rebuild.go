package check

import (
	"errors"
	"fmt"
	"slices"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// errNoPlace: references to places outside the file leave no room for what must be written behind its end.
var errNoPlace = errors.New("there is no place that nothing refers to")

// rebuild builds the refcount structures anew, beside the old ones, and switches the header to them. Afterwards r.c has
// the counts of everything, the new structures included and the old ones not.
func (r *repairer) rebuild() error {
	fresh, err := r.walk(nil, true)
	if err != nil {
		return err
	}
	b := rebuilder{repairer: r, old: newClusterSet(r.c.refSpans()), fresh: fresh, next: r.firstFree(),
		blocks: make(map[int64]format.ClusterIdx)}
	if err := b.place(); err != nil {
		return err
	}
	if err := b.write(); err != nil {
		return err
	}
	fresh.stored, fresh.rep = r.c.stored, r.c.rep
	r.c = fresh
	r.rep.Rebuilt = true
	return nil
}

// rebuilder is the work of one rebuild.
type rebuilder struct {
	*repairer
	old    clusterSet        // the old structures, those too that the walk does not count because their entry is wrong
	fresh  *checker          // its counts leave out the old structures, and take in the new as they are placed
	next   format.ClusterIdx // where to look for free clusters
	blocks map[int64]format.ClusterIdx
	table  format.ClusterIdx
	length int64 // of the table in clusters
}

// count returns the refcount that a cluster gets.
func (b *rebuilder) count(i format.ClusterIdx) uint64 {
	found := b.fresh.refs.get(i)
	if b.blind && uint64(i) < b.c.clusters {
		if stored, ok := b.c.stored.get(i); ok {
			return max(stored, found)
		}
	}
	return found
}

// place finds room for a block wherever there is something to count, the blocks and the table among it.
func (b *rebuilder) place() error {
	for {
		if err := b.ctx.Err(); err != nil {
			return err
		}
		todo := b.missing()
		if len(todo) == 0 {
			done, err := b.placeTable()
			if done || err != nil {
				return err
			}
			continue
		}
		for _, num := range todo {
			i, err := b.take(1)
			if err != nil {
				return err
			}
			b.blocks[num] = i
		}
	}
}

// placeTable finds room for the table, which may call for another block. It reports whether everything has its place.
func (b *rebuilder) placeTable() (bool, error) {
	last := int64(0)
	for num := range b.blocks {
		last = max(last, num)
	}
	want := b.c.l.ClustersFor(8 * (last + 1))
	if want > b.c.l.MaxRefTableClusters() {
		return false, fmt.Errorf("a refcount table of %d clusters: %w", want, format.ErrTooBig)
	}
	if want <= b.length {
		return true, nil
	}
	for i := range b.length { // it was too short: its clusters serve as nothing
		b.fresh.refs.remove(b.table + format.ClusterIdx(i))
	}
	var err error
	b.length = want
	b.table, err = b.take(want)
	return false, err
}

// missing returns the numbers of the blocks that have something to count and no place yet.
func (b *rebuilder) missing() []int64 {
	need := make(map[int64]bool)
	l := b.c.l
	for _, page := range b.fresh.refs.pageNumbers() {
		for k, v := range b.fresh.refs.page(page) {
			if v != 0 {
				need[l.RefTableIndex(format.ClusterIdx(page*pageClusters)+format.ClusterIdx(k))] = true
			}
		}
	}
	if b.blind {
		for num := range b.c.stored.table {
			if block, ok := b.c.stored.block(int64(num)); ok && !isZero(block) {
				need[int64(num)] = true
			}
		}
	}
	var todo []int64
	for num := range need {
		if _, ok := b.blocks[num]; !ok {
			todo = append(todo, num)
		}
	}
	slices.Sort(todo)
	return todo
}

// take finds n clusters in a row that nothing refers to, old refcount structures included, and counts them.
func (b *rebuilder) take(n int64) (format.ClusterIdx, error) {
	first, err := b.findFree(b.next, n, func(i format.ClusterIdx) bool { return b.fresh.refs.get(i) == 0 && !b.old.has(i) })
	if err != nil {
		return 0, err
	}
	for k := range n {
		b.fresh.referenceCluster(first+format.ClusterIdx(k), 1)
	}
	if n == 1 {
		b.next = first + 1 // nothing before is free; for more than one cluster that is not known
	}
	return first, nil
}

// firstFree is where clusters that nothing refers to may begin.
func (r *repairer) firstFree() format.ClusterIdx {
	if r.blind {
		return format.ClusterIdx(r.c.clusters) // what seems free in the file may not be
	}
	return 0
}

// findFree finds n clusters in a row, from a place on, that nothing refers to and that the caller likes.
func (r *repairer) findFree(from format.ClusterIdx, n int64, likes func(format.ClusterIdx) bool) (format.ClusterIdx, error) {
	run := int64(0)
	for i := from; i < maxClusters(r.c.l); i++ {
		if r.c.far != 0 && i >= r.c.l.Cluster(r.c.far) {
			break
		}
		if r.c.refs.get(i) != 0 || !likes(i) {
			run = 0
		} else if run++; run == n {
			return i + 1 - format.ClusterIdx(n), nil
		}
		if uint64(i) >= r.c.clusters+uint64(n) && run == 0 {
			break // what is liked nowhere
		}
	}
	return 0, errNoPlace
}

// write writes blocks and table durably, and then switches to them.
func (b *rebuilder) write() error {
	l := b.c.l
	cs := l.ClusterSize()
	table := make([]uint64, b.length*cs/8)
	for _, num := range sortedKeys(b.blocks) {
		if err := b.ctx.Err(); err != nil {
			return err
		}
		off := l.Offset(b.blocks[num])
		table[num] = uint64(format.MakeRefTable(off))
		block := make([]byte, cs)
		first := format.ClusterIdx(num * l.RefcountsPerBlock())
		for k := range l.RefcountsPerBlock() {
			if n := b.count(first + format.ClusterIdx(k)); n != 0 {
				l.SetRefcount(block, k, n)
			}
		}
		if err := b.writeNew(off, block); err != nil {
			return fmt.Errorf("writing refcount block %d at host offset %#x: %w", num, off, err)
		}
	}
	buf := make([]byte, len(table)*8)
	format.EncodeTable(buf, table)
	if err := b.writeNew(l.Offset(b.table), buf); err != nil {
		return fmt.Errorf("writing the refcount table at host offset %#x: %w", l.Offset(b.table), err)
	}
	if err := b.sync(); err != nil {
		return err
	}
	pointer := format.EncodeRefTablePointer(l.Offset(b.table), uint32(b.length))
	if err := storage.WriteFull(b.file, pointer[:], format.OffRefTable); err != nil {
		return fmt.Errorf("switching to the new refcount table: %w", err)
	}
	return b.sync()
}

func (b *rebuilder) writeNew(off format.HostOff, p []byte) error {
	if err := b.begin(); err != nil {
		return err
	}
	return storage.WriteFull(b.file, p, int64(off))
}

func sortedKeys(m map[int64]format.ClusterIdx) []int64 {
	keys := make([]int64, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
