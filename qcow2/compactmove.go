package qcow2

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/codec"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// compactWork is what a round has to do. References to one thing stand together.
type compactWork struct {
	own    []meta.Reference   // of the disk alone, one to each cluster or compressed cluster
	shared [][]meta.Reference // all references to one cluster, or compressed cluster
	tables [][]meta.Reference // all references to one L2 table
}

// sort divides the references of a survey, whose order has those to one thing together.
func (c *compaction) sort(v *meta.Survey) compactWork {
	var w compactWork
	for i := 0; i < len(v.Refs); {
		k := i + 1
		for k < len(v.Refs) && sameTarget(v.Refs[i], v.Refs[k]) {
			k++
		}
		one := v.Refs[i:k:k]
		switch r := one[0]; {
		case r.Kind == meta.ToTable:
			w.tables = append(w.tables, one)
		case len(one) == 1 && r.Active && r.Weight == 0:
			w.own = append(w.own, r)
		default:
			w.shared = append(w.shared, one)
		}
		i = k
	}
	// In the order of the guest, so that what belongs together goes to places that follow each other.
	slices.SortFunc(w.own, func(a, b meta.Reference) int { return cmp.Compare(a.Guest, b.Guest) })
	return w
}

func sameTarget(a, b meta.Reference) bool {
	return a.Cluster == b.Cluster && a.Kind == b.Kind && a.Entry == b.Entry
}

// moveOwn moves clusters that the disk alone refers to, a few at a time, as requests that nobody else's come between. What
// has changed since the survey is left alone.
func (c *compaction) moveOwn(ctx context.Context, list []meta.Reference, limit format.ClusterIdx) error {
	im := c.im
	most := int(max(c.step/int64(len(c.buf)), 1))
	for len(list) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := list[:min(len(list), most)]
		list = list[len(step):]
		if err := c.fetch(step); err != nil {
			return err
		}
		room, err := c.moveOwnStep(ctx, step, limit)
		if err != nil {
			return err
		}
		if c.unflushed >= compactFlush || !room || len(list) == 0 {
			c.unflushed = 0
			if err := im.Flush(ctx); err != nil {
				return err
			}
		}
		if !room {
			return nil
		}
	}
	return nil
}

// fetch reads what is about to be moved while requests still run, so that it is in the host's memory when they wait.
func (c *compaction) fetch(step []meta.Reference) error {
	im := c.im
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	for _, r := range step {
		if _, err := im.meta.Map.Lookup(r.Guest, 1, true); err != nil {
			return err
		}
		// Whoever needs it will meet the error of a read.
		_, _ = im.file.ReadAt(c.buf, int64(im.lay.Offset(r.Cluster)))
	}
	return nil
}

// moveOwnStep moves some clusters while requests wait. It reports false when there is no room before limit.
func (c *compaction) moveOwnStep(ctx context.Context, step []meta.Reference, limit format.ClusterIdx) (room bool, err error) {
	im := c.im
	done := 0
	err = im.paused(ctx, func() error {
		if im.wholes != c.wholes {
			return errSurveyOld
		}
		for room = true; room && done < len(step); done++ {
			r := step[done]
			move := c.moveOwnCluster
			if r.Kind == meta.ToCompressed {
				move = c.moveOwnCompressed
			}
			if room, err = move(r, limit); err != nil {
				return err
			}
		}
		return nil
	})
	return room, err
}

// paused runs fn as a request that no other runs beside, which changes the mapping but nothing that the guest reads. fn may be
// run again.
func (im *Image) paused(ctx context.Context, fn func() error) error {
	for {
		if err := im.meta.Pressure(ctx); err != nil {
			return fmt.Errorf("making room in the metadata cache: %w", err)
		}
		err := im.meta.Pause(func() error {
			switch {
			case im.broken != nil:
				return im.broken
			case im.meta.Corrupt() != nil:
				return im.meta.Corrupt()
			}
			return fn()
		})
		if errors.Is(err, meta.ErrNotMarked) {
			if err = im.meta.MarkDirty(); err == nil {
				continue
			}
		}
		switch {
		case errors.Is(err, meta.ErrClosed):
			return block.ErrClosed
		case err == nil:
			return im.keep(ctx)
		}
		return im.judge(err)
	}
}

// moveOwnCluster moves one cluster of data. It reports false when there is no room.
func (c *compaction) moveOwnCluster(r meta.Reference, limit format.ClusterIdx) (bool, error) {
	im := c.im
	from := im.lay.Offset(r.Cluster)
	is, err := im.leadsTo(r)
	if err != nil || !is {
		return true, err
	}
	if n, err := im.meta.Refs.Get(r.Cluster); err != nil || n != 1 {
		return true, err
	}
	edit, err := im.meta.Map.Prepare(r.Guest)
	if err != nil {
		return false, fmt.Errorf("preparing to map guest cluster %d: %w", r.Guest, err)
	}
	defer edit.Done()
	e := edit.Entry(0)
	if !e.Word.Copied() {
		return true, nil // it should be, as it is counted once: a repair's business
	}
	run, err := im.meta.Refs.AllocBelow(1, min(limit, r.Cluster), true)
	if err != nil || run.N == 0 {
		return false, err
	}
	to := im.lay.Offset(run.First)
	if im.lay.Kind(e.Word) == format.KindNormal {
		if err := c.copyCluster(r.Guest, from, to); err != nil {
			return false, errors.Join(err, im.meta.Refs.Release(run))
		}
	}
	edit.Put(0, 1, func(_ int64, e meta.Entry) meta.Entry {
		e.Word = e.Word - format.L2Entry(from) + format.L2Entry(to)
		return e
	})
	im.meta.Refs.Retire(meta.Retired{ClusterRun: meta.ClusterRun{First: r.Cluster, N: 1}, Cause: meta.CauseOther})
	c.moved(1)
	return true, nil
}

// leadsTo reports whether the mapping of the disk still has what the survey saw.
func (im *Image) leadsTo(r meta.Reference) (bool, error) {
	run, err := im.meta.Map.Lookup(r.Guest, 1, true)
	if err != nil {
		return false, fmt.Errorf("looking up guest cluster %d: %w", r.Guest, err)
	}
	switch run.Kind {
	case format.KindCompressed:
		return r.Kind == meta.ToCompressed && run.Entry == r.Entry, nil
	case format.KindNormal, format.KindZeroAlloc:
		return r.Kind == meta.ToData && im.lay.Cluster(run.Entry.HostOffset()) == r.Cluster, nil
	}
	return false, nil
}

// copyCluster copies a cluster of data as the host has it. Where sectors are encrypted by their place they are encrypted
// anew for the new one.
func (c *compaction) copyCluster(g meta.GuestCluster, from, to format.HostOff) error {
	im := c.im
	if im.crypt != nil && im.crypt.byHost {
		off := int64(g) << im.lay.ClusterBits
		if err := im.readHost(c.buf, off, int64(from)); err != nil {
			return err
		}
		return im.writeHost(c.buf, off, int64(to))
	}
	if err := storage.ReadFull(im.file, c.buf, int64(from)); err != nil {
		return fmt.Errorf("reading host offset %#x: %w", from, err)
	}
	err := storage.WriteFull(im.file, c.buf, int64(to))
	im.meta.Wrote(int64(to), int64(len(c.buf)))
	if err != nil {
		return fmt.Errorf("writing host offset %#x: %w", to, err)
	}
	return nil
}

// moveOwnCompressed moves one compressed cluster. It reports false when there is no room.
func (c *compaction) moveOwnCompressed(r meta.Reference, limit format.ClusterIdx) (bool, error) {
	im := c.im
	is, err := im.leadsTo(r)
	if err != nil || !is {
		return true, err
	}
	stream, most, err := c.stream(r.Entry)
	if err != nil || stream == nil {
		return true, err
	}
	edit, err := im.meta.Map.Prepare(r.Guest)
	if err != nil {
		return false, fmt.Errorf("preparing to map guest cluster %d: %w", r.Guest, err)
	}
	defer edit.Done()
	next, err := im.meta.PackBelow(stream, limit, most)
	if err != nil || next == 0 {
		return false, err
	}
	edit.Put(0, 1, func(_ int64, e meta.Entry) meta.Entry {
		e.Word = next
		return e
	})
	var old retireList
	old.add(im.lay, r.Entry, meta.CauseOther)
	old.retire(im.meta.Refs)
	c.rep.Moved += int64(len(stream))
	c.o.Progress(min(c.rep.Moved, c.total), c.total)
	c.unflushed += int64(len(stream))
	return true, nil
}

// stream returns a copy of a compressed cluster's bytes, and how many references its host cluster may have where it goes: as
// many as where it is, at least. It is nil if they cannot be unpacked: then they stay where they are.
func (c *compaction) stream(e format.L2Entry) (b []byte, most uint64, err error) {
	im := c.im
	host, n := im.lay.CompressedExtent(e)
	b = make([]byte, n)
	if err := storage.ReadFull(im.file, b, int64(host)); err != nil {
		return nil, 0, fmt.Errorf("reading compressed cluster at host offset %#x: %w", host, err)
	}
	size, err := codec.StreamSize(uint8(im.hdr.CompressionType), c.buf, b)
	if err != nil {
		return nil, 0, nil
	}
	counted, err := im.meta.Refs.Get(im.lay.Cluster(host))
	return b[:size], max(counted, im.meta.Refs.MostShared()), err
}

// moveShared moves what the trees of snapshots refer to, too, or L2 tables, some at a time with the image for itself.
func (c *compaction) moveShared(ctx context.Context, list [][]meta.Reference, limit format.ClusterIdx) error {
	most := int(max(sharedStep/int64(len(c.buf)), 1))
	for len(list) > 0 {
		step := list[:min(len(list), most)]
		list = list[len(step):]
		room := false
		err := c.whole(ctx, func() (err error) {
			room, err = c.moveSharedStep(step, limit)
			return err
		})
		if err != nil || !room {
			return err
		}
	}
	return nil
}

// whole runs fn with the image for itself, if the survey is still true. fn leaves leaks behind when it fails, unless it says
// otherwise.
func (c *compaction) whole(ctx context.Context, fn func() error) error {
	im := c.im
	return im.exclusive(ctx, func() error {
		if im.wholes != c.wholes+1 {
			return errSurveyOld
		}
		c.wholes = im.wholes // this is one, too
		// A crash leaves leaks at worst. The mark has the next one who opens the image for writing look for them.
		if err := im.meta.MarkDirtyGated(); err != nil {
			return err
		}
		return im.finish(fn())
	})
}

func (c *compaction) moveSharedStep(step [][]meta.Reference, limit format.ClusterIdx) (room bool, err error) {
	im := c.im
	move := im.meta.NewRelocation(limit)
	n, room := int64(0), true
	for _, refs := range step {
		if im.views.any() && inSnapshot(refs) {
			c.rep.Open = true
			continue // a view knows where its clusters are, and is not asked
		}
		var moved int64
		if moved, room, err = c.moveTarget(move, refs, limit); err != nil {
			return false, move.Undo(err)
		}
		if n += moved; !room {
			break
		}
	}
	if n == 0 {
		return room, nil
	}
	changed, err := move.Commit()
	if err != nil && changed {
		return false, halfDone(err)
	}
	if err == nil {
		c.rep.Moved += n
		c.o.Progress(min(c.rep.Moved, c.total), c.total)
	}
	return room, err
}

func inSnapshot(refs []meta.Reference) bool {
	return slices.ContainsFunc(refs, func(r meta.Reference) bool { return r.Weight > 0 })
}

// moveTarget moves what a group of references leads to. It returns how many bytes that is, and reports whether there was room.
func (c *compaction) moveTarget(move *meta.Relocation, refs []meta.Reference, limit format.ClusterIdx) (n int64, room bool, err error) {
	im := c.im
	at, weight, err := c.places(refs)
	if err != nil || weight == 0 {
		return 0, true, err
	}
	r := refs[0]
	if r.Kind == meta.ToCompressed {
		stream, most, err := c.stream(r.Entry)
		if err != nil || stream == nil {
			return 0, true, err
		}
		ok, err := move.MoveCompressed(r.Entry, at, weight, stream, most)
		if errors.Is(err, meta.ErrRefcountOverflow) {
			return 0, true, nil // it stays
		}
		return int64(len(stream)), ok, err
	}
	if counted, err := im.meta.Refs.Get(r.Cluster); err != nil || counted != weight {
		return 0, true, err // somebody refers to it that is not known
	}
	from := im.lay.Offset(r.Cluster)
	ok, err := move.Move(r.Cluster, at, weight, func(to format.HostOff) error {
		if r.Kind == meta.ToTable {
			return im.meta.CopyCluster(from, to, c.buf)
		}
		return c.copyCluster(r.Guest, from, to)
	})
	return int64(len(c.buf)), ok, err
}

// places returns where the entries lie that hold references to one thing, each once, and how many references that is.
func (c *compaction) places(refs []meta.Reference) (at []format.HostOff, weight uint64, err error) {
	im := c.im
	for _, r := range refs {
		if r.Weight > 0 {
			at, weight = append(at, r.At), weight+uint64(r.Weight)
		}
		if !r.Active {
			continue
		}
		if r.Kind == meta.ToTable {
			at, weight = append(at, im.meta.Map.L1Place(int64(r.Guest))), weight+1
			continue
		}
		// The disk may have changed since, and its table may be another.
		is, err := im.leadsTo(r)
		if err != nil {
			return nil, 0, err
		}
		if !is {
			continue
		}
		place, err := im.meta.Map.EntryPlace(r.Guest)
		if err != nil {
			return nil, 0, err
		}
		at, weight = append(at, place), weight+1
	}
	slices.Sort(at)
	return slices.Compact(at), weight, nil
}

// moveStructures moves the metadata that stands behind limit: refcounts, L1 tables, the snapshot table.
func (c *compaction) moveStructures(ctx context.Context, limit format.ClusterIdx) error {
	return c.whole(ctx, func() error {
		for _, step := range []func(format.ClusterIdx) error{c.moveRefcounts, c.moveActiveL1, c.moveSnapshotTables} {
			if err := step(limit); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *compaction) moveRefcounts(limit format.ClusterIdx) error {
	im := c.im
	for _, b := range im.meta.Refs.BlocksAbove(limit) {
		ok, err := im.meta.Refs.MoveBlock(b, limit)
		if err != nil || !ok {
			return err
		}
		if err := im.meta.SettleGated(); err != nil {
			return halfDone(err)
		}
		c.moved(1)
	}
	ok, err := im.meta.Refs.MoveTable(limit)
	if err != nil || !ok {
		return err
	}
	if err := im.meta.SettleGated(); err != nil {
		return halfDone(err)
	}
	c.moved(1)
	return nil
}

// placeBelow is placeNew for a place before limit. It returns 0 when there is none.
func (im *Image) placeBelow(undo *undoList, b []byte, limit format.ClusterIdx) (format.HostOff, error) {
	run, err := im.meta.Refs.AllocBelow(im.lay.ClustersFor(int64(len(b))), limit, true)
	if err != nil || run.N == 0 {
		return 0, err
	}
	undo.add(func() error { return im.meta.Refs.Release(run) })
	whole := make([]byte, run.N<<im.lay.ClusterBits)
	copy(whole, b)
	at := im.lay.Offset(run.First)
	return at, im.meta.WriteNow(whole, at)
}

func (c *compaction) moveActiveL1(limit format.ClusterIdx) (err error) {
	im := c.im
	if r := meta.ClustersOf(im.lay, im.hdr.L1Offset, int64(im.hdr.L1Size)*8); r.N == 0 || r.End() <= limit {
		return nil
	}
	tree, err := im.activeTree()
	if err != nil {
		return err
	}
	raw := make([]byte, len(tree.L1)*8)
	format.EncodeTable(raw, tree.L1)
	var undo undoList
	defer func() { err = undo.unless(err == nil, err) }()
	place, err := im.placeBelow(&undo, raw, limit)
	if err != nil || place == 0 {
		return err
	}
	if err := im.settleNew(); err != nil {
		return err
	}
	if err := im.switchL1(&undo, im.hdr.Size, im.hdr.L1Size, place); err != nil {
		return err
	}
	if err := im.meta.SettleGated(); err != nil {
		return halfDone(err)
	}
	c.moved(im.lay.ClustersFor(int64(len(raw))))
	return nil
}

// settleNew makes new structures, and their counts, durable.
func (im *Image) settleNew() error {
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	return im.meta.SyncNow()
}

// moveSnapshotTables moves the L1 tables of snapshots, and the table of snapshots, which is written anew if one of them moves.
func (c *compaction) moveSnapshotTables(limit format.ClusterIdx) (err error) {
	im := c.im
	list, size, err := readSnapshots(im.file, im.hdr)
	if err != nil || len(list) == 0 {
		return err
	}
	if im.views.any() {
		c.rep.Open = true
		return nil
	}
	var undo undoList
	defer func() { err = undo.unless(err == nil, err) }()
	var old []meta.ClusterRun
	for i := range list {
		run := meta.ClustersOf(im.lay, list[i].L1Offset, int64(list[i].L1Size)*8)
		if run.N == 0 || run.End() <= limit || !c.alone(run) {
			continue
		}
		tree, err := im.meta.LoadTree(list[i].L1Offset, int64(list[i].L1Size))
		if err != nil {
			return err
		}
		raw := make([]byte, len(tree.L1)*8)
		format.EncodeTable(raw, tree.L1)
		place, err := im.placeBelow(&undo, raw, limit)
		if err != nil {
			return err
		}
		if place != 0 {
			list[i].L1Offset = place
			old = append(old, run)
		}
	}
	if len(old) == 0 && meta.ClustersOf(im.lay, im.hdr.SnapshotsOffset, size).End() <= limit {
		return nil
	}
	raw, err := format.MarshalSnapshots(list)
	if err != nil {
		return err
	}
	table, err := im.placeBelow(&undo, raw, limit)
	if err != nil {
		return err
	}
	if table == 0 && len(old) > 0 {
		table, err = im.placeNew(&undo, raw) // behind, then
	}
	if err != nil || table == 0 {
		return err
	}
	if err := im.settleNew(); err != nil {
		return err
	}
	if err := im.switchSnapshots(&undo, table, len(list)); err != nil {
		return err
	}
	for _, r := range old {
		im.meta.Refs.Retire(meta.Retired{ClusterRun: r, Cause: meta.CauseOther})
		c.moved(r.N)
	}
	if err := im.meta.SettleGated(); err != nil {
		return halfDone(err)
	}
	c.moved(im.lay.ClustersFor(int64(len(raw))))
	return nil
}

// alone reports whether each cluster of a run is counted once: an L1 table that two snapshots name stays where it is.
func (c *compaction) alone(r meta.ClusterRun) bool {
	for i := r.First; i < r.End(); i++ {
		if n, err := c.im.meta.Refs.Get(i); err != nil || n != 1 {
			return false
		}
	}
	return true
}

// moveBitmaps moves the bits, the tables and the directory of dirty bitmaps.
func (c *compaction) moveBitmaps(ctx context.Context, limit format.ClusterIdx) error {
	im := c.im
	above := func(r meta.ClusterRun) bool { return r.N > 0 && r.End() > limit }
	n := int64(0)
	err := im.changeBitmaps(ctx, func(e *bitmapEdit) ([]format.Bitmap, error) {
		list := im.bitmapList()
		changed := false
		for i, m := range im.bm.list {
			var broken *bitmapError
			if err := im.loadTable(m); errors.As(err, &broken) {
				continue // it stays
			} else if err != nil {
				return nil, err
			}
			table := slices.Clone(m.table)
			bits := int64(0)
			for k, entry := range table {
				run := meta.ClusterRun{First: im.lay.Cluster(entry.Offset()), N: 1}
				if entry.Offset() == 0 || !above(run) || !c.alone(run) {
					continue
				}
				if err := im.readBits(entry, c.buf, 0); err != nil {
					return nil, err
				}
				off, err := im.placeBelow(&e.undo, c.buf, limit)
				if err != nil {
					return nil, err
				}
				if off == 0 {
					break
				}
				table[k] = format.MakeBitmapEntry(off)
				bits++
				if err := e.freeCluster(entry); err != nil {
					return nil, err
				}
			}
			at := meta.ClustersOf(im.lay, m.TableOffset, int64(m.TableSize)*8)
			if bits == 0 && !above(at) {
				continue
			}
			off, err := im.placeBelow(&e.undo, encodeBitmapTable(table), limit)
			if err == nil && off == 0 && bits > 0 {
				off, err = im.placeNew(&e.undo, encodeBitmapTable(table))
			} else if err == nil && off != 0 {
				bits += at.N
			}
			if err != nil {
				return nil, err
			}
			if off == 0 {
				continue
			}
			if err := e.freeTable(m); err != nil {
				return nil, err
			}
			list[i].TableOffset = off
			n, changed = n+bits, true
		}
		if d := im.hdr.Bitmaps; d != nil && !changed {
			at := meta.ClustersOf(im.lay, d.DirectoryOffset, int64(d.DirectorySize))
			if above(at) {
				run, err := im.meta.Refs.AllocBelow(at.N, limit, true)
				if err != nil {
					return nil, err
				}
				if run.N > 0 { // commit writes a new one, to the first place there is
					n, changed = n+at.N, true
					if err := im.meta.Refs.Release(run); err != nil {
						return nil, err
					}
				}
			}
		}
		if !changed {
			return nil, nil
		}
		return list, nil
	})
	if err == nil && n > 0 {
		c.moved(n)
	}
	return err
}
