package meta

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// A RewidthError says that a count is too large for a narrower refcount width.
type RewidthError struct {
	Bits  int
	Off   format.HostOff
	Count uint64
}

func (e *RewidthError) Error() string {
	return fmt.Sprintf("Cannot decrease refcount entry width to %d bits: Cluster at offset %#x has a refcount of %d", e.Bits, e.Off, e.Count)
}

// Rewidth makes refcount structures of another width (2^order bits), which say the same as those of the image, beside them.
// It is for Exclusive. switchTo is called when they are durable and has the header name them, in one write; then the Store
// is to be reloaded, and Old freed.
type Rewidth struct {
	s        *Store
	lay      format.Layout // with the new width
	progress func(done, total int64)

	row    ClusterRun // table, blocks, and what turns out not to be needed
	table  int64      // clusters
	blocks int64
	Old    []ClusterRun // the structures that are replaced
}

// NewRewidth prepares a change of width. Nothing has happened when it fails.
func (s *Store) NewRewidth(order uint8, progress func(done, total int64)) (*Rewidth, error) {
	w := &Rewidth{s: s, lay: s.Layout, progress: progress}
	w.lay.RefcountOrder = order
	return w, w.fits()
}

// fits refuses a width that cannot hold one of the counts.
func (w *Rewidth) fits() error {
	if w.lay.RefcountOrder >= w.s.Layout.RefcountOrder {
		return nil
	}
	most := w.lay.RefcountMax()
	return w.s.Refs.eachCount(func(c format.ClusterIdx, v uint64) error {
		if v > most {
			return &RewidthError{w.lay.RefcountBits(), w.lay.Offset(c), v}
		}
		return nil
	})
}

// eachCount calls fn for every cluster that has a count, in order.
func (rc *Refcounts) eachCount(fn func(format.ClusterIdx, uint64) error) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	for b := range rc.hosts {
		if !rc.exists(b) {
			continue
		}
		if err := rc.load(b); err != nil {
			return err
		}
		data := rc.known[b].data
		for slot := range rc.lay.RefcountsPerBlock() {
			v := rc.lay.Refcount(data, slot)
			if v == 0 {
				continue
			}
			if err := fn(format.ClusterIdx(b)*rc.perBlock()+format.ClusterIdx(slot), v); err != nil {
				return err
			}
		}
		rc.dropClean()
	}
	return nil
}

// Run writes the new structures and calls switchTo with their place.
func (w *Rewidth) Run(ctx context.Context, switchTo func(off format.HostOff, clusters int64) error) error {
	refs := w.s.Refs
	if err := w.allocate(); err != nil {
		return err
	}
	giveBack := func(err error) error { return errors.Join(err, refs.Release(w.row), w.s.SettleGated()) }
	if err := w.write(ctx); err != nil {
		return giveBack(err)
	}
	if err := w.s.SyncNow(); err != nil {
		return giveBack(err)
	}
	w.Old = refs.structures()
	return switchTo(w.lay.Offset(w.row.First), w.table)
}

// allocate finds room for the new structures, and counts it in the old ones, durably: they must describe their own
// clusters, so how many there are depends on where they lie.
func (w *Rewidth) allocate() error {
	refs := w.s.Refs
	for extra := int64(0); ; extra = 2*extra + 1 {
		end, err := refs.UsedEnd()
		if err != nil {
			return err
		}
		blocks, table := w.need(end)
		// The row itself lengthens the file, if it goes to the end.
		blocks, table = w.need(end + format.ClusterIdx(blocks+table+extra))
		if table > w.lay.MaxRefTableClusters() {
			return fmt.Errorf("making refcounts of %d bits: %w", w.lay.RefcountBits(), ErrImageFull)
		}
		row, err := refs.AllocRow(blocks + table)
		if err != nil {
			return fmt.Errorf("making refcounts of %d bits: %w", w.lay.RefcountBits(), err)
		}
		if err := w.s.SettleGated(); err != nil {
			return errors.Join(err, refs.Release(row))
		}
		if end, err = refs.UsedEnd(); err != nil {
			return errors.Join(err, refs.Release(row), w.s.SettleGated())
		}
		w.blocks, w.table = w.need(end)
		surplus := row.N - w.blocks - w.table
		w.row = ClusterRun{row.First, row.N - max(surplus, 0)}
		if surplus >= 0 {
			return errors.Join(refs.Release(ClusterRun{w.row.End(), surplus}), w.s.SettleGated())
		}
		if err := errors.Join(refs.Release(row), w.s.SettleGated()); err != nil {
			return err
		}
	}
}

// need returns how many blocks count the clusters before end, and how long a table names the blocks.
func (w *Rewidth) need(end format.ClusterIdx) (blocks, table int64) {
	perBlock := format.ClusterIdx(w.lay.RefcountsPerBlock())
	blocks = int64((end + perBlock - 1) / perBlock)
	return blocks, w.lay.ClustersFor(blocks * 8)
}

// write writes the table and the blocks. All counts are settled.
func (w *Rewidth) write(ctx context.Context) error {
	cs := w.lay.ClusterSize()
	first := w.row.First + format.ClusterIdx(w.table)
	table := make([]byte, w.table*cs)
	for i := range w.blocks {
		e := format.EncodeUint64(uint64(format.MakeRefTable(w.lay.Offset(first + format.ClusterIdx(i)))))
		copy(table[i*8:], e[:])
	}
	if err := w.s.WriteNow(table, w.lay.Offset(w.row.First)); err != nil {
		return err
	}
	block, at := make([]byte, cs), int64(0)
	perBlock := w.lay.RefcountsPerBlock()
	flush := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.s.WriteNow(block, w.lay.Offset(first+format.ClusterIdx(at))); err != nil {
			return err
		}
		clear(block)
		at++
		w.progress(at, w.blocks)
		return nil
	}
	err := w.s.Refs.eachCount(func(c format.ClusterIdx, v uint64) error {
		for int64(c)/perBlock > at {
			if err := flush(); err != nil {
				return err
			}
		}
		w.lay.SetRefcount(block, int64(c)%perBlock, v)
		return nil
	})
	for err == nil && at < w.blocks {
		err = flush()
	}
	return err
}

// structures returns the clusters of the refcount table and blocks.
func (rc *Refcounts) structures() []ClusterRun {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	runs := []ClusterRun{{rc.lay.Cluster(rc.tableOff), rc.tableClusters}}
	for _, host := range rc.hosts {
		if host != 0 {
			runs = appendRun(runs, ClusterRun{rc.lay.Cluster(host), 1})
		}
	}
	return runs
}
