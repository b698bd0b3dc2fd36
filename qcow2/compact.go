package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// CompactOptions say how an image is compacted.
type CompactOptions struct {
	// DryRun changes nothing and tells what there is to be gained. It is the only way to ask an image opened read-only.
	DryRun bool
	// Step bounds how many bytes are moved while requests wait; 0 means 2 MiB. At least one cluster is.
	Step int64
	// Progress is told how many bytes have been moved, of how many. It must not call the image.
	Progress func(done, total int64)
}

// CompactReport is the outcome of Compact.
type CompactReport struct {
	// OldSize is the length of the file before, NewSize after, or what it would be.
	OldSize, NewSize int64
	// Moved is how many bytes were moved, or would be.
	Moved int64
	// Free is how many bytes of the file before its last used cluster hold nothing afterwards: what could not be filled.
	Free int64
	// Leaked is how many clusters behind the point where a compact image ends are counted and used by nobody. A repair of
	// leaks frees them.
	Leaked int64
	// Open tells that clusters of snapshots stayed where they are because snapshots are open as devices.
	Open bool
}

// DefaultCompactStep is how many bytes are moved at a time while requests wait.
const DefaultCompactStep = 2 << 20

const (
	// compactRefs bounds the references that are held in memory.
	compactRefs = 1 << 20
	// compactFlush is how much is moved before it is made durable.
	compactFlush = 64 << 20
	// sharedStep is how many bytes of what snapshots share, or metadata, moves at a time: each time costs several syncs.
	sharedStep = 16 << 20
	// compactRounds bounds how often the image is gone over: requests that come meanwhile take and leave room.
	compactRounds = 32
)

// Compact moves what stands at the end of the file into holes before it, and cuts the end off. Nothing that the disk or a
// snapshot holds changes.
//
// It may run while the image is in use. Clusters of the disk alone are moved some at a time, with requests waiting for
// that long; nothing is made durable out of turn, so a power cut leaves each cluster at the old place or the new. What
// snapshots share, tables and other metadata are moved with the image for itself, as other operations on the whole image
// do; so is finding out who refers to what, which takes as long as a check. Clusters of snapshots that are open as devices
// stay where they are. A crash leaves leaks at worst.
//
// A cluster is moved only if the references to it are known and as many as are counted. An image in which something is used
// that is counted as free is refused.
//
// When the context ends, what has been moved stays so, the end that has become free is cut off, and the report says how
// far it came.
func (im *Image) Compact(ctx context.Context, o CompactOptions) (*CompactReport, error) {
	c := compaction{im: im, o: o, step: o.Step}
	if c.step <= 0 {
		c.step = DefaultCompactStep
	}
	if c.o.Progress == nil {
		c.o.Progress = func(_, _ int64) {}
	}
	rep, err := c.run(ctx)
	if err != nil {
		err = fmt.Errorf("compacting: %w", err)
	}
	return rep, err
}

// compaction is one run of Compact.
type compaction struct {
	im   *Image
	o    CompactOptions
	step int64
	rep  CompactReport

	// Of the survey: which operations on the whole image it knows of, and what lies behind the end of a compact image.
	wholes     uint64
	structures []meta.ClusterRun
	total      int64 // bytes, as the first survey found
	unflushed  int64
	buf        []byte // a cluster, whose size never changes
}

// errSurveyOld ends a round: an operation on the whole image has run since the survey, and may have changed everything.
var errSurveyOld = errors.New("the image has changed as a whole meanwhile")

func (c *compaction) run(ctx context.Context) (*CompactReport, error) {
	im := c.im
	cs := im.ClusterSize()
	switch {
	case cs == 0:
		return nil, block.ErrClosed
	case im.readOnly && !c.o.DryRun:
		return nil, block.ErrReadOnly
	}
	c.buf = make([]byte, cs)
	if im.crypt != nil && im.crypt.byHost && im.crypt.cipher == nil && !c.o.DryRun {
		return nil, ErrNoKey // sectors are encrypted by their place
	}
	size, err := im.file.Size()
	if err != nil {
		return nil, fmt.Errorf("size of image file: %w", err)
	}
	c.rep.OldSize, c.rep.NewSize = size, size
	if c.o.DryRun {
		return c.preview(ctx)
	}
	err = c.rounds(ctx)
	if err != nil && ctx.Err() == nil {
		return &c.rep, err
	}
	return &c.rep, errors.Join(err, c.cutEnd(context.WithoutCancel(ctx)))
}

// preview tells what a run would do.
func (c *compaction) preview(ctx context.Context) (*CompactReport, error) {
	v, err := c.survey(ctx)
	if err != nil {
		return nil, err
	}
	cs := int64(len(c.buf))
	end := int64(v.Want)
	if c.rep.Leaked > 0 {
		end = int64(v.Usage.End) // where leaked clusters stand is not told apart
	}
	c.rep.NewSize = min(c.rep.OldSize, end*cs)
	c.rep.Moved = (v.Usage.Above(v.Want) - c.rep.Leaked) * cs
	return &c.rep, nil
}

// rounds goes over the image until nothing is left to be moved.
func (c *compaction) rounds(ctx context.Context) error {
	for range compactRounds {
		v, err := c.survey(ctx)
		if err != nil {
			return err
		}
		left := v.Usage.Above(v.Want)
		if c.total == 0 {
			c.total = left * int64(len(c.buf))
		}
		if left == 0 {
			return nil
		}
		before := c.rep.Moved
		err = c.round(ctx, v)
		if errors.Is(err, errSurveyOld) {
			continue
		}
		if err != nil || c.rep.Moved == before {
			return err
		}
	}
	return nil
}

// survey looks at the image as it is on the disk, with requests waiting.
func (c *compaction) survey(ctx context.Context) (v *meta.Survey, err error) {
	im := c.im
	err = im.meta.Still(func() error {
		switch {
		case im.broken != nil:
			return im.broken
		case im.meta.Corrupt() != nil:
			return im.meta.Corrupt()
		}
		c.wholes = im.wholes
		v, err = c.surveyStill(ctx)
		return err
	})
	if errors.Is(err, meta.ErrClosed) {
		err = block.ErrClosed
	}
	return v, err
}

func (c *compaction) surveyStill(ctx context.Context) (*meta.Survey, error) {
	im := c.im
	usage, err := im.meta.Usage()
	if err != nil {
		return nil, err
	}
	want := format.ClusterIdx(usage.Used)
	c.rep.Leaked = 0
	if usage.Above(want) == 0 {
		return &meta.Survey{Usage: usage, Want: want, From: want}, nil
	}
	list, tableSize, err := readSnapshots(im.file, im.hdr)
	if err != nil {
		return nil, err
	}
	var inactive []meta.TableAt
	for i := range list {
		inactive = append(inactive, meta.TableAt{Off: list[i].L1Offset, Len: int64(list[i].L1Size)})
	}
	active := meta.TableAt{Off: im.hdr.L1Offset, Len: int64(im.hdr.L1Size)}
	v, err := im.meta.NewSurvey(ctx, active, inactive, usage, want, compactRefs)
	if err != nil {
		return nil, err
	}
	if err := c.noteStructures(v, append(inactive, active), tableSize); err != nil {
		return nil, err
	}
	c.rep.Leaked = c.leaked(v)
	return v, nil
}

// noteStructures lists the metadata that no table refers to.
func (c *compaction) noteStructures(v *meta.Survey, l1s []meta.TableAt, snapshotTable int64) error {
	im := c.im
	lay := im.lay
	runs, err := im.meta.RefStructures()
	if err != nil {
		return err
	}
	runs = append(runs, meta.ClusterRun{First: 0, N: 1}, meta.ClustersOf(lay, im.hdr.SnapshotsOffset, snapshotTable))
	for _, t := range l1s {
		runs = append(runs, meta.ClustersOf(lay, t.Off, t.Len*8))
	}
	if x := im.hdr.Crypto; x != nil {
		runs = append(runs, meta.ClustersOf(lay, x.Offset, int64(x.Length)))
	}
	if b := im.hdr.Bitmaps; b != nil {
		runs = append(runs, meta.ClustersOf(lay, b.DirectoryOffset, int64(b.DirectorySize)))
	}
	for _, m := range im.bm.list {
		runs = append(runs, meta.ClustersOf(lay, m.TableOffset, int64(m.TableSize)*8))
		if err := im.loadTable(m); err != nil {
			continue // it stays where it is
		}
		for _, e := range m.table {
			if off := e.Offset(); off != 0 && lay.Cluster(off) >= v.Want {
				runs = append(runs, meta.ClusterRun{First: lay.Cluster(off), N: 1})
			}
		}
	}
	c.structures = c.structures[:0]
	for _, r := range runs {
		if r.N > 0 && r.End() > v.Want {
			c.structures = append(c.structures, r)
		}
	}
	return nil
}

// leaked counts the clusters that nobody uses, as far as the survey reaches.
func (c *compaction) leaked(v *meta.Survey) int64 {
	known := make(map[format.ClusterIdx]struct{}, len(v.Refs))
	for _, r := range v.Refs {
		first := r.Cluster
		if r.Kind == meta.ToCompressed {
			first, _ = c.im.lay.CompressedClusters(r.Entry)
		}
		for i := first; i <= r.Cluster; i++ {
			known[i] = struct{}{}
		}
	}
	for _, r := range c.structures {
		for i := r.First; i < r.End(); i++ {
			known[i] = struct{}{}
		}
	}
	var n int64
	for i := v.From; i < v.Usage.End; i++ {
		if _, ok := known[i]; !ok && v.Usage.Has(i) {
			n++
		}
	}
	return max(n-v.Odd, 0)
}

// moved notes progress.
func (c *compaction) moved(clusters int64) {
	n := clusters * int64(len(c.buf))
	c.rep.Moved += n
	c.unflushed += n
	c.o.Progress(min(c.rep.Moved, c.total), c.total)
}

// round moves what the survey found: what is easy first, then what stops the image.
func (c *compaction) round(ctx context.Context, v *meta.Survey) error {
	w := c.sort(v)
	if err := c.moveOwn(ctx, w.own, v.Want); err != nil {
		return err
	}
	if err := c.moveShared(ctx, w.shared, v.Want); err != nil {
		return err
	}
	if err := c.moveShared(ctx, w.tables, v.Want); err != nil {
		return err
	}
	if len(c.structures) == 0 {
		return nil
	}
	if err := c.moveStructures(ctx, v.Want); err != nil {
		return err
	}
	return c.moveBitmaps(ctx, v.Want)
}

// cutEnd cuts off what has become free, and tells how the image looks then.
func (c *compaction) cutEnd(ctx context.Context) error {
	im := c.im
	return im.exclusive(ctx, func() error {
		err := errors.Join(im.meta.DropIdleBlocks(), im.meta.TruncateFree())
		size, sizeErr := im.file.Size()
		usage, usageErr := im.meta.Usage()
		if sizeErr == nil && usageErr == nil {
			c.rep.NewSize = size
			c.rep.Free = (int64(usage.End) - usage.Used) << im.lay.ClusterBits
		}
		return errors.Join(err, sizeErr, usageErr)
	})
}
