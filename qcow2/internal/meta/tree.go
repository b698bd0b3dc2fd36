package meta

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Tree is an L1 table and all that hangs from it, as operations on whole images see it: the active one or that of an
// internal snapshot. What it offers works on the file, inside Exclusive.
type Tree struct {
	s  *Store
	L1 []uint64
}

// LoadTree reads an L1 table of n entries.
func (s *Store) LoadTree(off format.HostOff, n int64) (*Tree, error) {
	if n < 0 || n > format.MaxL1Bytes/8 || !s.Layout.Aligned(off) || off > 1<<56 {
		return nil, corrupt("L1 table of %d entries at host offset %#x", n, off)
	}
	raw := make([]byte, n*8)
	if err := storage.ReadFull(s.file, raw, int64(off)); err != nil {
		return nil, fmt.Errorf("reading L1 table at host offset %#x: %w", off, err)
	}
	t := &Tree{s, make([]uint64, n)}
	format.DecodeTable(t.L1, raw)
	return t, nil
}

// Encode returns the L1 table as on disk, n entries long, without COPIED flags: that of a tree that shares everything.
func (t *Tree) Encode(n int64) []byte {
	raw := make([]byte, n*8)
	for i, e := range t.L1[:min(int64(len(t.L1)), n)] {
		b := format.EncodeUint64(uint64(format.MakeL1(format.L1Entry(e).Offset(), false)))
		copy(raw[i*8:], b[:])
	}
	return raw
}

// tables calls fn for every L2 table of the tree: its number in the L1 table, its place and its content, which fn may
// change and which is gone after fn returns. Tables are read ahead by several goroutines; fn runs in order, one at a time.
func (t *Tree) tables(ctx context.Context, fn func(i int, off format.HostOff, raw []byte) error) error {
	type job struct {
		i   int
		off format.HostOff
		raw []byte
		err error
		ok  chan struct{}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	workers := max(2, runtime.GOMAXPROCS(0))
	cs := t.s.Layout.ClusterSize()
	ahead := int(max(2, min(32, 8<<20/cs)))
	todo, order := make(chan *job), make(chan *job, ahead)
	free := make(chan []byte, ahead+workers+2)
	wg.Go(func() {
		defer close(order)
		defer close(todo)
		for i, e := range t.L1 {
			off := format.L1Entry(e).Offset()
			if off == 0 {
				continue
			}
			j := &job{i: i, off: off, ok: make(chan struct{})}
			select {
			case order <- j:
			case <-ctx.Done():
				return
			}
			select {
			case todo <- j:
			case <-ctx.Done():
				return
			}
		}
	})
	for range workers {
		wg.Go(func() {
			for j := range todo {
				select {
				case j.raw = <-free:
				default:
					j.raw = make([]byte, cs)
				}
				j.err = t.s.readTable(j.off, j.raw)
				close(j.ok)
			}
		})
	}
	for j := range order {
		select {
		case <-j.ok:
		case <-ctx.Done():
			return ctx.Err()
		}
		if j.err != nil {
			return j.err
		}
		if err := fn(j.i, j.off, j.raw); err != nil {
			return err
		}
		select {
		case free <- j.raw:
		default:
		}
	}
	return ctx.Err()
}

func (s *Store) readTable(off format.HostOff, raw []byte) error {
	if !s.Layout.Aligned(off) {
		return corrupt("L2 table at host offset %#x is not on a cluster boundary", off)
	}
	if err := storage.ReadFull(s.file, raw, int64(off)); err != nil {
		return fmt.Errorf("reading L2 table at host offset %#x: %w", off, err)
	}
	return nil
}

// refer calls fn for every run of clusters that the tree refers to, with each reference once: L2 tables, data, and the
// clusters that compressed data lies in.
func (t *Tree) refer(ctx context.Context, fn func(ClusterRun) error) error {
	lay := t.s.Layout
	step := int(lay.L2EntrySize())
	return t.tables(ctx, func(_ int, off format.HostOff, raw []byte) error {
		if err := fn(ClusterRun{lay.Cluster(off), 1}); err != nil {
			return err
		}
		var run ClusterRun
		for k := 0; k < len(raw); k += step {
			e := format.L2Entry(be64(raw[k:]))
			if e == 0 {
				continue
			}
			next, err := t.s.entryClusters(e)
			if err != nil {
				return fmt.Errorf("L2 table at host offset %#x: %w", off, err)
			}
			if next.N == 0 {
				continue
			}
			if run.N > 0 && next.First == run.End() {
				run.N += next.N
				continue
			}
			if run.N > 0 {
				if err := fn(run); err != nil {
					return err
				}
			}
			run = next
		}
		if run.N > 0 {
			return fn(run)
		}
		return nil
	})
}

// entryClusters returns the clusters that an L2 entry holds a reference to.
func (s *Store) entryClusters(e format.L2Entry) (ClusterRun, error) {
	switch s.Layout.Kind(e) {
	case format.KindNormal, format.KindZeroAlloc:
		if s.Layout.DataFile {
			return ClusterRun{}, nil
		}
		return ClusterRun{s.Layout.Cluster(e.HostOffset()), 1}, nil
	case format.KindCompressed:
		first, last := s.Layout.CompressedClusters(e)
		return ClusterRun{first, int64(last-first) + 1}, nil
	case format.KindInvalid:
		return ClusterRun{}, corrupt("L2 entry %#x", uint64(e))
	}
	return ClusterRun{}, nil
}

// Share adds a reference to everything the tree refers to, in memory. If that is not possible, because a count cannot
// grow, it changes nothing.
func (t *Tree) Share(ctx context.Context) error {
	var done []ClusterRun
	err := t.refer(ctx, func(r ClusterRun) error {
		n, err := t.s.Refs.Raise(r)
		if n > 0 {
			r.N = n
			done = appendRun(done, r)
		}
		return errors.Join(err, t.s.relieve())
	})
	if err == nil {
		return nil
	}
	for _, r := range done {
		err = errors.Join(err, t.s.Refs.Apply(r))
	}
	return err
}

func appendRun(list []ClusterRun, r ClusterRun) []ClusterRun {
	if n := len(list); n > 0 && list[n-1].End() == r.First {
		list[n-1].N += r.N
		return list
	}
	return append(list, r)
}

// Drop takes a reference from everything the tree refers to, for the given cause. On the disk nothing names the tree any more.
func (t *Tree) Drop(ctx context.Context, cause Cause) error {
	return t.refer(ctx, func(r ClusterRun) error {
		_, err := t.s.free(Retired{ClusterRun: r, Cause: cause})
		return errors.Join(err, t.s.relieve())
	})
}

// relieve writes counts when too many wait in memory. Those that rose may be on the disk early, and what fell has no
// reference there any more.
func (s *Store) relieve() error {
	s.Refs.mu.Lock()
	n := len(s.Refs.dirty)
	s.Refs.mu.Unlock()
	if n < lazyBlocks {
		return nil
	}
	return s.flushGated()
}

// ClearCopied clears the COPIED flags of the tree's L2 tables on the disk, as all they point to is shared.
func (t *Tree) ClearCopied(ctx context.Context) error {
	lay := t.s.Layout
	return t.tables(ctx, func(_ int, off format.HostOff, raw []byte) error {
		if !clearCopied(raw, lay) {
			return nil
		}
		return t.s.WriteNow(raw, off)
	})
}

// FixCopied makes the COPIED flags of the tree, which is the active one with its L1 table at l1Off, say what the counts
// say.
func (t *Tree) FixCopied(ctx context.Context, l1Off format.HostOff) error {
	changed := false
	err := t.tables(ctx, func(i int, off format.HostOff, raw []byte) error {
		alone, dirty, err := t.s.Refs.markCopied(off, raw)
		if err != nil {
			return err
		}
		if e := uint64(format.MakeL1(off, alone)); t.L1[i] != e {
			t.L1[i], changed = e, true
		}
		if !dirty {
			return nil
		}
		return t.s.WriteNow(raw, off)
	})
	if err != nil || !changed {
		return err
	}
	raw := make([]byte, len(t.L1)*8)
	format.EncodeTable(raw, t.L1)
	return t.s.WriteNow(raw, l1Off)
}

// Raise adds a reference to each cluster of a run that has one. It returns how many it did; fewer than all come with an
// error.
func (rc *Refcounts) Raise(r ClusterRun) (int64, error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	most := rc.lay.RefcountMax()
	done := int64(0)
	err := rc.eachBlock(r, func(b int, slot, n int64) error {
		blk := rc.known[b]
		for i := slot; i < slot+n; i++ {
			v := rc.lay.Refcount(blk.data, i)
			if v == 0 {
				return corrupt("cluster at host offset %#x is used and counted as free", rc.lay.Offset(r.First+format.ClusterIdx(done)))
			}
			if v >= most {
				return fmt.Errorf("cluster at host offset %#x: %w", rc.lay.Offset(r.First+format.ClusterIdx(done)), ErrRefcountOverflow)
			}
			rc.lay.SetRefcount(blk.data, i, v+1)
			if i == slot || i%refSectorStep == 0 || i == slot+n-1 {
				rc.touch(b, i)
			}
			rc.increased = true
			done++
		}
		return nil
	})
	return done, err
}

// refSectorStep is a number of counts that no sector holds more of: 64 bits are the widest.
const refSectorStep = storage.SectorSize / 8

// eachBlock calls fn for the parts of a run that different refcount blocks count, loaded, as slots [slot, slot+n). mu is
// held. Every cluster of the run must have a block.
func (rc *Refcounts) eachBlock(r ClusterRun, fn func(b int, slot, n int64) error) error {
	for r.N > 0 {
		b, slot := rc.split(r.First)
		if !rc.exists(b) {
			return corrupt("cluster at host offset %#x is used and has no refcount", rc.lay.Offset(r.First))
		}
		if err := rc.load(b); err != nil {
			return err
		}
		n := min(r.N, int64(rc.perBlock())-slot)
		if err := fn(b, slot, n); err != nil {
			return err
		}
		r = ClusterRun{r.First + format.ClusterIdx(n), r.N - n}
	}
	return nil
}

// ErrRefcountOverflow is returned when a cluster cannot get another reference because its count has no more bits.
var ErrRefcountOverflow = errors.New("the image's refcount width cannot count another reference")

// markCopied sets the COPIED flags in an L2 table at off by the counts. It reports whether the table itself is one
// owner's alone, and whether it changed any.
func (rc *Refcounts) markCopied(off format.HostOff, raw []byte) (alone, dirty bool, err error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	defer rc.dropClean()
	n, err := rc.count(rc.lay.Cluster(off))
	if err != nil {
		return false, false, err
	}
	alone = n == 1
	for k := 0; k < len(raw); k += int(rc.lay.L2EntrySize()) {
		e := format.L2Entry(be64(raw[k:]))
		if kind := rc.lay.Kind(e); kind != format.KindNormal && kind != format.KindZeroAlloc {
			continue
		}
		own := alone
		if own && !rc.lay.DataFile {
			n, err := rc.count(rc.lay.Cluster(e.HostOffset()))
			if err != nil {
				return false, false, err
			}
			own = n == 1
		}
		if own != e.Copied() {
			raw[k] ^= 0x80
			dirty = true
		}
	}
	return alone, dirty, nil
}

// count is Get with mu held.
func (rc *Refcounts) count(c format.ClusterIdx) (uint64, error) {
	b, slot := rc.split(c)
	if !rc.exists(b) {
		return 0, nil
	}
	if blk := rc.known[b]; blk == nil || blk.data == nil {
		if err := rc.load(b); err != nil {
			return 0, err
		}
	}
	return rc.lay.Refcount(rc.known[b].data, slot), nil
}
