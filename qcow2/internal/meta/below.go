package meta

import (
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// What compaction asks of the allocator: places that lie before others.

// AllocBelow hands out free clusters that lie before limit, each with a count of 1: the first n in a row with whole set, else
// the first that are free, at most n. A run of none means that there is no such place. Unlike Alloc it never makes the
// file, or what is counted of it, longer.
func (rc *Refcounts) AllocBelow(n int64, limit format.ClusterIdx, whole bool) (ClusterRun, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	return rc.allocBelow(n, limit, whole)
}

// allocBelow is AllocBelow with mu held.
func (rc *Refcounts) allocBelow(n int64, limit format.ClusterIdx, whole bool) (ClusterRun, error) {
	if rc.marked != nil && !rc.marked() {
		return ClusterRun{}, ErrNotMarked
	}
	run, err := rc.findBelow(n, limit, whole)
	if err != nil || run.N == 0 {
		return ClusterRun{}, err
	}
	if run.First == 0 {
		return ClusterRun{}, rc.headerIsFree()
	}
	if err := rc.guard(run, 0); err != nil {
		return ClusterRun{}, err
	}
	for b, _ := rc.split(run.First); format.ClusterIdx(b)*rc.perBlock() < run.End(); b++ {
		if err := rc.load(b); err != nil {
			return ClusterRun{}, err
		}
	}
	top := rc.topUsed
	rc.mark(run)
	rc.topUsed = top // nothing grows here, and no block is needed ahead
	return run, nil
}

// findBelow returns the first n free clusters in a row before limit, or with whole unset the first that are free.
func (rc *Refcounts) findBelow(n int64, limit format.ClusterIdx, whole bool) (ClusterRun, error) {
	c := rc.starts[0]
	run := ClusterRun{First: c}
	for c < limit {
		b, slot := rc.split(c)
		blk, err := rc.indexed(b)
		if err != nil {
			return ClusterRun{}, err
		}
		if blk == nil || blk.full {
			if run.N > 0 && !whole {
				return run, nil
			}
			c = format.ClusterIdx(b+1) * rc.perBlock()
			run = ClusterRun{First: c}
			continue
		}
		free, next := freeRun(blk.free, slot, int64(rc.perBlock()))
		if free == 0 {
			if run.N > 0 && !whole {
				return run, nil
			}
			c += format.ClusterIdx(next - slot)
			run = ClusterRun{First: c}
			continue
		}
		free = min(free, int64(limit-c), n-run.N)
		run.N += free
		c += format.ClusterIdx(free)
		if run.N == n {
			return run, nil
		}
	}
	if whole && run.N < n || run.First >= limit {
		return ClusterRun{}, nil
	}
	return run, nil
}

// indexed returns block b with its free bitmap known, nil if there is no such block.
func (rc *Refcounts) indexed(b int) (*refBlock, error) {
	if !rc.exists(b) {
		return nil, nil
	}
	blk := rc.block(b)
	if blk.free == nil && !blk.full {
		if len(rc.resident) > 2*rc.keep {
			rc.dropClean()
		}
		if err := rc.load(b); err != nil {
			return nil, err
		}
	}
	return blk, nil
}

// PackBelow writes one compressed cluster, as Pack does, before limit. With limits that wide a host cluster may hold as many
// as most of them. The zero entry means that there is no place.
func (s *Store) PackBelow(stream []byte, limit format.ClusterIdx, most uint64) (format.L2Entry, error) {
	s.packMu.Lock()
	defer s.packMu.Unlock()
	at, err := s.Refs.bytesBelow(int64(len(stream)), limit, most)
	if err != nil || at == 0 {
		return 0, err
	}
	run := ClustersOf(s.Layout, at, int64(len(stream)))
	e, err := s.Layout.MakeCompressed(at, int64(len(stream)))
	if err == nil {
		err = storage.WriteFull(s.file, stream, int64(at))
		s.Wrote(int64(at), int64(len(stream)))
	}
	if err != nil {
		s.Refs.closeTail()
		err = fmt.Errorf("writing compressed cluster at host offset %#x: %w", at, err)
		return 0, errors.Join(err, s.Refs.Release(run))
	}
	return e, nil
}

// bytesBelow is allocBytes before limit; it returns 0 when there is no place.
func (rc *Refcounts) bytesBelow(n int64, limit format.ClusterIdx, most uint64) (format.HostOff, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	if rc.tail != 0 && rc.lay.Cluster(rc.tail)+1 >= limit {
		rc.tail = 0 // what follows it may be behind limit, too
	}
	at, err := rc.appendBytes(n, most)
	if err != nil || at != 0 {
		return at, err
	}
	run, err := rc.allocBelow(1, limit, true)
	if err != nil || run.N == 0 {
		return 0, err
	}
	at = rc.lay.Offset(run.First)
	rc.setTail(at + format.HostOff(n))
	return at, nil
}

// MoveTable moves the refcount table before limit, if there is room. It is for Exclusive; SettleGated switches to the copy.
func (rc *Refcounts) MoveTable(limit format.ClusterIdx) (bool, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	old := ClusterRun{rc.lay.Cluster(rc.tableOff), rc.tableClusters}
	if old.End() <= limit {
		return false, nil
	}
	run, err := rc.allocBelow(rc.tableClusters, limit, true)
	if err != nil || run.N == 0 {
		return false, err
	}
	rc.tableOff = rc.lay.Offset(run.First)
	rc.tableMoved = true
	rc.claim(RefcountTable, run)
	rc.retired = append(rc.retired, Retired{ClusterRun: old, Cause: CauseOther, Kind: RefcountTable})
	return true, nil
}

// BlocksAbove lists the refcount blocks that lie at or behind limit though they count clusters before it. Those that
// count nothing before it go by themselves when what they count has gone.
func (rc *Refcounts) BlocksAbove(limit format.ClusterIdx) []int {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	var list []int
	for b, host := range rc.hosts {
		if host != 0 && rc.lay.Cluster(host) >= limit && format.ClusterIdx(b)*rc.perBlock() < limit {
			list = append(list, b)
		}
	}
	return list
}

// MoveBlock moves refcount block b before limit, if there is room. It is for Exclusive, and SettleGated must follow before
// another block is moved: the copy is what counts its own cluster, or another's.
func (rc *Refcounts) MoveBlock(b int, limit format.ClusterIdx) (bool, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	if !rc.exists(b) {
		return false, nil
	}
	run, err := rc.allocBelow(1, limit, true)
	if err != nil || run.N == 0 {
		return false, err
	}
	if err := rc.load(b); err != nil {
		return false, errors.Join(err, rc.release(run))
	}
	blk := rc.known[b]
	old := ClusterRun{rc.lay.Cluster(rc.hosts[b]), 1}
	rc.hosts[b] = rc.lay.Offset(run.First)
	rc.claim(RefcountBlock, run)
	if blk.dirtyLo == blk.dirtyHi {
		rc.dirty = append(rc.dirty, b)
	}
	blk.dirtyLo, blk.dirtyHi, blk.isNew = 0, len(blk.data), true
	rc.newBlocks = append(rc.newBlocks, b)
	rc.increased = true // the copy is durable before the table names it
	rc.retired = append(rc.retired, Retired{ClusterRun: old, Cause: CauseOther, Kind: RefcountBlock})
	return true, nil
}

// DropIdleBlocks takes refcount blocks that count nothing off the end of the table. It is for Exclusive, when the counts on
// the disk are those in memory.
func (s *Store) DropIdleBlocks() error {
	rc := s.Refs
	for {
		if err := rc.dropEmptyBlocks(s); err != nil {
			return err
		}
		gone, err := rc.dropIdleBlock(s)
		if err != nil || gone.N == 0 {
			return err
		}
		if _, err := s.free(Retired{ClusterRun: gone, Cause: CauseOther, Kind: RefcountBlock}); err != nil {
			return err
		}
		if err := s.SettleGated(); err != nil {
			return err
		}
	}
}

// dropIdleBlock takes the last block out of the table if it counts nothing and lies elsewhere, and returns its cluster.
func (rc *Refcounts) dropIdleBlock(s *Store) (ClusterRun, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	b := rc.endBlock() - 1
	if b <= 0 {
		return ClusterRun{}, nil
	}
	if own, _ := rc.split(rc.lay.Cluster(rc.hosts[b])); own == b {
		return ClusterRun{}, nil
	}
	if err := rc.load(b); err != nil {
		return ClusterRun{}, err
	}
	for slot := range rc.lay.RefcountsPerBlock() {
		if rc.lay.Refcount(rc.known[b].data, slot) != 0 {
			return ClusterRun{}, nil
		}
	}
	gone := ClusterRun{rc.lay.Cluster(rc.hosts[b]), 1}
	if err := rc.forgetBlock(s, b); err != nil {
		return ClusterRun{}, err
	}
	return gone, nil
}

// usage gathers which clusters have a count, one bit each, in a set that grows with what is counted of the file.
func (rc *Refcounts) usage() (*Usage, error) {
	u := new(Usage)
	err := rc.eachCount(func(c format.ClusterIdx, _ uint64) error {
		for int(c/64) >= len(u.bits) {
			u.bits = append(u.bits, 0)
		}
		u.bits[c/64] |= 1 << (c % 64)
		u.Used++
		u.End = c + 1
		return nil
	})
	return u, err
}

// Usage is the set of the clusters that are in use.
type Usage struct {
	Used int64             // how many
	End  format.ClusterIdx // behind the last of them
	bits []uint64
}

// Has reports whether a cluster is in use.
func (u *Usage) Has(c format.ClusterIdx) bool {
	return c < u.End && u.bits[c/64]>>(c%64)&1 != 0
}

// Above returns how many clusters from c on are in use.
func (u *Usage) Above(c format.ClusterIdx) (n int64) {
	for ; c < u.End; c++ {
		if u.Has(c) {
			n++
		}
	}
	return n
}

// Usage tells which clusters have a count. It is for Still and Exclusive; the image may be open read-only.
func (s *Store) Usage() (*Usage, error) {
	refs, err := s.anyRefs()
	if err != nil {
		return nil, err
	}
	return refs.usage()
}

// RefStructures returns the clusters of the refcount table and blocks. It is for Still and Exclusive.
func (s *Store) RefStructures() ([]ClusterRun, error) {
	refs, err := s.anyRefs()
	if err != nil {
		return nil, err
	}
	return refs.structures(), nil
}

// anyRefs returns the refcounts, also of an image that is open read-only: then they are read now.
func (s *Store) anyRefs() (*Refcounts, error) {
	if s.Refs != nil {
		return s.Refs, nil
	}
	return newRefcounts(s.file, s.Layout, s.refTable.Off, s.refTable.Len)
}

// MostShared is how many compressed clusters may touch one host cluster that new ones are written to.
func (rc *Refcounts) MostShared() uint64 { return rc.mostShared() }
