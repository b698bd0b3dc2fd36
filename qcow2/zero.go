package qcow2

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// zeroChunk is a source of zeroes for what must be written out.
var zeroChunk [64 << 10]byte

// WriteZeroes makes [off, off+n) read as zeroes. Whole clusters change their mapping only (in version 3 images); parts of
// clusters are written, unless they read as zeroes already.
func (im *Image) WriteZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	if err := im.writeZeroes(ctx, off, n, flags); err != nil {
		return err
	}
	if flags&block.ZeroFUA != 0 {
		return im.Flush(ctx)
	}
	return nil
}

func (im *Image) writeZeroes(ctx context.Context, off, n int64, flags block.ZeroFlags) error {
	head, body, tail := im.splitClusters(off, n)
	unmap := flags&block.ZeroUnmap != 0
	plain := im.lay.Version < format.Version3 && (!unmap || im.backing != nil) // no mapping stands for these zeroes
	err := im.change(ctx, func() error {
		if flags&block.ZeroFast != 0 {
			if err := im.fastZero(head, body, tail); err != nil {
				return err
			}
		}
		if err := im.zeroByWriting(ctx, head); err != nil {
			return err
		}
		return im.zeroByWriting(ctx, tail)
	})
	if err != nil {
		return err
	}
	if plain {
		return im.change(ctx, func() error { return im.zeroByWriting(ctx, body) })
	}
	return im.eachMapped(ctx, body, func(e format.L2Entry, kind format.L2Kind, off int64) bool {
		return !im.zeroRead(kind, off) || unmap && kind == format.KindZeroAlloc
	}, func(e format.L2Entry) (format.L2Entry, bool) {
		return im.zeroed(e, unmap)
	})
}

// span is a range of guest bytes.
type span struct{ off, n int64 }

func (s span) end() int64 { return s.off + s.n }

// splitClusters divides a range into the whole clusters in it and the parts of clusters before and after. The last
// cluster is whole when the range reaches the end of the disk. A range that holds no whole cluster is all head.
func (im *Image) splitClusters(off, n int64) (head, body, tail span) {
	cs := im.lay.ClusterSize()
	start := (off + cs - 1) &^ (cs - 1)
	end := (off + n) &^ (cs - 1)
	if off+n == im.size {
		end = off + n
	}
	if start >= end {
		return span{off, n}, span{}, span{}
	}
	return span{off, start - off}, span{start, end - start}, span{end, off + n - end}
}

// fastZero returns block.ErrNoFastZero if zeroing these parts would write zeroes out.
func (im *Image) fastZero(head, body, tail span) error {
	if im.lay.Version < format.Version3 && body.n > 0 {
		return block.ErrNoFastZero
	}
	for _, part := range []span{head, tail} {
		if zero, err := im.partIsZero(part); err != nil || !zero {
			return orElse(err, block.ErrNoFastZero)
		}
	}
	return nil
}

func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// partIsZero reports whether a range reads as zeroes by its mapping alone.
func (im *Image) partIsZero(s span) (bool, error) {
	for s.n > 0 {
		run, in, err := im.lookup(s.off, s.n, true)
		if err != nil {
			return false, fmt.Errorf("looking up guest offset %#x: %w", s.off, err)
		}
		if !im.zeroRead(run.Kind, s.off) {
			return false, nil
		}
		n := min(s.n, run.N<<im.lay.ClusterBits-in)
		s.off, s.n = s.off+n, s.n-n
	}
	return true, nil
}

// zeroByWriting writes zeroes out, skipping what reads as zeroes already.
func (im *Image) zeroByWriting(ctx context.Context, s span) error {
	for s.n > 0 {
		run, in, err := im.lookup(s.off, s.n, true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", s.off, err)
		}
		n := min(s.n, run.N<<im.lay.ClusterBits-in)
		if !im.zeroRead(run.Kind, s.off) {
			n = min(n, int64(len(zeroChunk)))
			if err := im.write(ctx, zeroChunk[:n], s.off); err != nil {
				return err
			}
		}
		s.off, s.n = s.off+n, s.n-n
	}
	return nil
}

// zeroed returns the entry that makes a cluster read as zeroes, and whether the old host cluster is given up.
func (im *Image) zeroed(e format.L2Entry, unmap bool) (format.L2Entry, bool) {
	if im.lay.Version < format.Version3 {
		return 0, true
	}
	switch im.lay.Kind(e) {
	case format.KindNormal, format.KindZeroAlloc:
		if unmap {
			return format.L2Zero, true
		}
		return format.MakeL2ZeroAlloc(e.HostOffset(), e.Copied()), false
	}
	return format.L2Zero, true // nothing for an unallocated cluster to give up; a compressed one cannot stay
}

// Discard gives the space of whole clusters back; they read as zeroes afterwards, also where the backing file has data.
// Parts of clusters are left alone, and so is all of a version 2 image with a backing file: it has no zero clusters, so
// the backing file would show through.
func (im *Image) Discard(ctx context.Context, off, n int64) error {
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	if im.lay.Version < format.Version3 && im.backing != nil {
		return nil
	}
	_, body, _ := im.splitClusters(off, n)
	return im.eachMapped(ctx, body, func(_ format.L2Entry, kind format.L2Kind, off int64) bool {
		return !im.zeroRead(kind, off) || kind == format.KindZeroAlloc
	}, func(e format.L2Entry) (format.L2Entry, bool) {
		return im.zeroed(e, true)
	})
}

// wanted tells whether the entry of the guest cluster at off is to change; for a run of entries that are alike it gives one
// answer from the first that it says no to.
type wanted func(e format.L2Entry, kind format.L2Kind, off int64) bool

// changed returns what an entry becomes, and whether its host clusters are given up.
type changed func(e format.L2Entry) (entry format.L2Entry, giveUp bool)

// eachMapped changes the entries of the whole clusters of s for which want holds. It is many requests, not one: between
// two of them a flush may run.
func (im *Image) eachMapped(ctx context.Context, s span, want wanted, to changed) error {
	end := meta.GuestCluster((s.end() + im.lay.ClusterSize() - 1) >> im.lay.ClusterBits)
	for c := im.cluster(s.off); s.n > 0 && c < end; {
		err := im.change(ctx, func() error {
			n, err := im.changeSome(ctx, c, int64(end-c), want, to)
			c += meta.GuestCluster(n)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// changeSome skips a run that is not wanted, or changes the entries of one slice. It returns how many clusters it went over.
func (im *Image) changeSome(ctx context.Context, c meta.GuestCluster, n int64, want wanted, to changed) (int64, error) {
	off := int64(c) << im.lay.ClusterBits
	run, err := im.meta.Map.Lookup(c, n, true)
	if err != nil {
		return 0, fmt.Errorf("looking up guest offset %#x: %w", off, err)
	}
	if !want(run.Entry, run.Kind, off) {
		return run.N, nil
	}
	return im.changeEntries(ctx, c, n, want, to)
}

// changeEntries is changeSome for the clusters of one slice, at most n from c on.
func (im *Image) changeEntries(ctx context.Context, c meta.GuestCluster, n int64, want wanted, to changed) (int64, error) {
	n = min(n, im.meta.Map.SliceRest(c))
	held, err := im.meta.Ranges.Lock(ctx, uint64(c), uint64(c)+uint64(n)-1)
	if err != nil {
		return 0, err
	}
	defer im.meta.Ranges.Unlock(held)
	edit, err := im.meta.Map.Prepare(c)
	if err != nil {
		return 0, fmt.Errorf("preparing to map guest cluster %d: %w", c, err)
	}
	defer edit.Done()
	for k := range n {
		if e := edit.Entry(k); im.lay.Kind(e) == format.KindInvalid {
			return 0, &CorruptError{Reason: fmt.Sprintf("L2 entry %#x of guest cluster %d", uint64(e), c+meta.GuestCluster(k))}
		}
	}
	var old retireList
	edit.Put(0, n, func(k int64, e format.L2Entry) format.L2Entry {
		off := int64(c+meta.GuestCluster(k)) << im.lay.ClusterBits
		if !want(e, im.lay.Kind(e), off) {
			return e
		}
		entry, giveUp := to(e)
		if giveUp {
			old.add(im.lay, e, true)
		}
		return entry
	})
	old.retire(im.meta.Refs)
	im.noteZeroed()
	return n, nil
}

// noteZeroed remembers the epoch in which entries became zero. It is called while their range is still held, so whoever
// finds one of them later finds the epoch too.
func (im *Image) noteZeroed() {
	for {
		then, now := im.zeroedAt.Load(), im.meta.Epochs.Now()
		if now <= then || im.zeroedAt.CompareAndSwap(then, now) {
			return
		}
	}
}
