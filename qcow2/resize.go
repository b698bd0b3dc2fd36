package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// ErrWouldShrink is returned by Resize for a size smaller than the disk's, without the permission to shrink it.
var ErrWouldShrink = errors.New("shrinking the disk deletes all data beyond its new end, and was not asked for")

// ResizeOptions say how a disk gets another size.
type ResizeOptions struct {
	// Shrink allows a size that cuts data off.
	Shrink bool
	// Preallocation says what becomes of the part that is added. It does not go with a smaller size.
	Preallocation Preallocation
	// Progress, if not nil, is told how many bytes of the part that is added have been preallocated. It must not call the
	// image.
	Progress func(done, total int64)
}

// Resize gives the disk another size, rounded up to whole sectors. What is added reads as zeroes, whatever the backing file
// holds there and whatever lay behind the end before. What is cut off is gone, its space given back to the host. Internal
// snapshots keep the size they were taken with; version 2 does not record one and is refused while it has snapshots.
//
// No request runs meanwhile, which preallocation can make long. A crash or an error leaves a disk with the old or the new
// size and everything before the smaller of both intact; an error may come after the disk got its new size, when space
// could not be freed.
func (im *Image) Resize(ctx context.Context, size int64, o ResizeOptions) error {
	if size < 0 || size > math.MaxInt64-format.SectorSize {
		return fmt.Errorf("resizing: %w", invalid("size %d", size))
	}
	size = (size + format.SectorSize - 1) &^ (format.SectorSize - 1)
	err := im.exclusive(ctx, func() error { return im.resize(ctx, size, o) })
	if err != nil {
		return fmt.Errorf("resizing: %w", err)
	}
	return nil
}

// resize is Resize inside exclusive.
func (im *Image) resize(ctx context.Context, size int64, o ResizeOptions) error {
	old := im.Size()
	switch {
	case size == old:
		return nil
	case size < old && !o.Shrink:
		return ErrWouldShrink
	case size < old && o.Preallocation != PreallocOff:
		return optionErrorf("Preallocation can only be used for growing images")
	case im.hdr.Version < format.Version3 && im.hdr.SnapshotCount > 0:
		return optionErrorf("Can't resize a v2 image which has snapshots")
	}
	if _, err := im.lay.L1EntriesFor(size); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidOption, err)
	}
	// A crash leaves leaks at worst, as does a failure behind the point of no return. The mark has the next one who opens the
	// image for writing look for them.
	if err := im.meta.MarkDirtyGated(); err != nil {
		return err
	}
	err := im.resizeBitmaps(size, func() error {
		if size > old {
			return im.grow(ctx, old, size, o)
		}
		return im.shrink(ctx, old, size)
	})
	return im.finish(err)
}

// grow makes everything ready behind the end of the disk, where no request reaches, and then moves the end.
func (im *Image) grow(ctx context.Context, old, size int64, o ResizeOptions) error {
	mode := o.Preallocation
	if err := im.dropBeyond(ctx, old); err != nil {
		return halfDone(err)
	}
	if err := im.growL1(size); err != nil {
		return err
	}
	if im.lay.DataFile {
		if im.hdr.Autoclear&format.AutoclearRawData != 0 {
			mode = max(mode, PreallocMetadata) // a data file that is a disk by itself is mapped from end to end
		}
		if err := im.growData(old, size, mode); err != nil {
			return err
		}
	}
	err := im.fillNew(ctx, old, size, mode, o.Progress)
	if err == nil {
		err = im.meta.SettleGated()
	}
	if err == nil {
		return im.switchSize(size)
	}
	// What was prepared is behind the end of the disk, and would stay there.
	undoErr := im.meta.SettleGated()
	if undoErr == nil {
		undoErr = im.dropBeyond(context.WithoutCancel(ctx), old)
	}
	if undoErr != nil {
		return halfDone(errors.Join(err, undoErr))
	}
	return err
}

// shrink moves the end of the disk first: from then on nothing behind it is anybody's.
func (im *Image) shrink(ctx context.Context, old, size int64) error {
	if err := im.switchSize(size); err != nil {
		return err
	}
	return halfDone(im.cutOff(context.WithoutCancel(ctx), old, size))
}

// cutOff gives back what lies behind the end of the disk.
func (im *Image) cutOff(ctx context.Context, old, size int64) error {
	if err := im.dropBeyond(ctx, size); err != nil {
		return fmt.Errorf("freeing what was cut off: %w", err)
	}
	end := min(roundUp(size, im.lay.ClusterSize()), roundUp(old, im.lay.ClusterSize()))
	if err := im.zeroRest(ctx, span{size, end - size}, false); err != nil {
		return fmt.Errorf("zeroing what was cut off: %w", err)
	}
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	if im.lay.DataFile {
		if err := im.cutData(size); err != nil {
			return err
		}
	}
	return im.meta.TruncateFree()
}

// growData makes the external data file as long as the disk is to be, with zeroes behind its end now.
func (im *Image) growData(old, size int64, mode Preallocation) error {
	have, err := im.data.Size()
	if err != nil {
		return fmt.Errorf("size of external data file: %w", err)
	}
	device := im.data.Stat().Device
	if device && have < size {
		return fmt.Errorf("external data file has %d bytes, and cannot have more: %w", have, ErrTooBig)
	}
	if !device && have > old {
		err = im.data.Truncate(old) // what lies there is not the disk's
	}
	if err == nil && !device {
		err = im.data.Truncate(size)
	}
	if err == nil && (mode == PreallocFull || device && mode != PreallocOff) {
		err = zeroDevice(im.data, old, size-old)
	}
	if err == nil && mode == PreallocFalloc {
		err = im.data.Preallocate(old, size-old)
	}
	if err == nil {
		err = im.data.Sync()
	}
	if err != nil {
		return fmt.Errorf("making external data file longer: %w", err)
	}
	return nil
}

// cutData makes the external data file as short as the disk has become.
func (im *Image) cutData(size int64) error {
	have, err := im.data.Size()
	if err == nil && have > size && !im.data.Stat().Device {
		err = im.data.Truncate(size)
	}
	if err == nil {
		err = im.data.Sync()
	}
	if err != nil {
		return fmt.Errorf("making external data file shorter: %w", err)
	}
	return nil
}

// switchSize has the header name another size of the disk, which becomes the size of this Image.
func (im *Image) switchSize(size int64) error {
	b := format.EncodeUint64(uint64(size))
	if err := im.writeField(format.OffSize, b[:]); err != nil {
		return err
	}
	return im.reload()
}

// growL1 makes the L1 table long enough for a disk of the given size: a longer copy elsewhere, which the header is then
// switched to.
func (im *Image) growL1(size int64) (err error) {
	entries, err := im.lay.L1EntriesFor(size)
	if err != nil || entries <= int64(im.hdr.L1Size) {
		return err
	}
	tree, err := im.activeTree()
	if err != nil {
		return err
	}
	raw := make([]byte, entries*8)
	format.EncodeTable(raw, tree.L1)
	var undo undoList
	defer func() { err = undo.unless(err == nil, err) }()
	storage.Tell(im.file, storage.EventL1GrowAllocTable)
	storage.Tell(im.file, storage.EventL1GrowWriteTable)
	place, err := im.placeNew(&undo, raw)
	if err != nil {
		return err
	}
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	storage.Tell(im.file, storage.EventL1GrowActivateTable)
	if err := im.switchL1(&undo, im.hdr.Size, uint32(entries), place); err != nil {
		return err
	}
	if err := im.meta.SettleGated(); err != nil {
		return halfDone(err)
	}
	return halfDone(im.reload())
}

// dropBeyond takes away whatever the mapping has for clusters that begin at or behind the given size: what is cut off, what
// an earlier change of size that was cut short left there, and machine state that a snapshot brought with it.
func (im *Image) dropBeyond(ctx context.Context, size int64) error {
	tables, err := im.lay.L1EntriesFor(size)
	if err != nil {
		return err
	}
	if err := im.dropTables(ctx, tables); err != nil {
		return err
	}
	first := im.cluster(roundUp(size, im.lay.ClusterSize()))
	end := im.cluster(int64(min(uint64(tables)*uint64(im.lay.L2Coverage()), math.MaxInt64&^(format.SectorSize-1))))
	for c := first; c < end; {
		n, err := im.unmapSome(c, int64(end-c))
		if err != nil {
			return err
		}
		c += meta.GuestCluster(n)
		if err := im.meta.PressureGated(); err != nil {
			return err
		}
	}
	return im.meta.SettleGated()
}

// dropTables takes the L2 tables from L1 entry first on out of the active tree.
func (im *Image) dropTables(ctx context.Context, first int64) error {
	tree, err := im.activeTree()
	if err != nil {
		return err
	}
	last := int64(len(tree.L1))
	for last > first && tree.L1[last-1] == 0 {
		last--
	}
	if last <= first {
		return nil
	}
	clear(tree.L1[:first])
	zeroes := make([]byte, (last-first)*8)
	storage.Tell(im.file, storage.EventL1ShrinkWriteTable)
	if err := im.meta.WriteNow(zeroes, im.hdr.L1Offset+format.HostOff(first*8)); err != nil {
		return err
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	if err := tree.Drop(context.WithoutCancel(ctx), meta.CauseAlways); err != nil {
		return err
	}
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	return im.reload()
}

// unmapSome makes up to n clusters unallocated, as many as one slice maps, and returns how many it went over.
func (im *Image) unmapSome(c meta.GuestCluster, n int64) (int64, error) {
	run, err := im.meta.Map.Lookup(c, n, true)
	if err != nil {
		return 0, fmt.Errorf("looking up guest cluster %d: %w", c, err)
	}
	if run.Kind == format.KindUnallocated && run.Bitmap == 0 {
		return run.N, nil
	}
	edit, err := im.meta.Map.Prepare(c)
	if err != nil {
		return 0, fmt.Errorf("preparing to map guest cluster %d: %w", c, err)
	}
	defer edit.Done()
	n = min(n, edit.N)
	var old retireList
	edit.Put(0, n, func(_ int64, e meta.Entry) meta.Entry {
		old.add(im.lay, e.Word, meta.CauseAlways)
		return meta.Entry{}
	})
	old.retire(im.meta.Refs)
	return n, nil
}

// zeroRest writes zeroes over a part of one cluster behind the end of the disk that does not read as zeroes. Unless through
// is set it leaves alone what is not in this image but shows through from the backing file.
func (im *Image) zeroRest(ctx context.Context, s span, through bool) error {
	buf := make([]byte, max(s.n, 0))
	for s.n > 0 {
		run, in, err := im.lookup(s.off, s.n, true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", s.off, err)
		}
		n := min(s.n, im.lay.SubclusterSize()-in%im.lay.SubclusterSize())
		if through || im.hasData(run, in) {
			if err := im.zeroPiece(ctx, buf[:n], s.off); err != nil {
				return err
			}
		}
		s.off, s.n = s.off+n, s.n-n
	}
	return nil
}

// hasData reports whether the image itself has data in bytes into a cluster.
func (im *Image) hasData(run meta.Run, in int64) bool {
	if im.lay.ExtendedL2 && run.Kind == format.KindNormal {
		return run.Bitmap.Alloc(int(in / im.lay.SubclusterSize()))
	}
	return run.Kind == format.KindNormal || run.Kind == format.KindCompressed
}

func (im *Image) zeroPiece(ctx context.Context, b []byte, off int64) error {
	if err := im.read(ctx, b, off); err != nil {
		return err
	}
	if allZero(b) {
		return nil
	}
	clear(b)
	_, err := im.write(ctx, b, off)
	return err
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func roundUp(n, unit int64) int64 { return n + (unit-n%unit)%unit }

// fillNew makes [old, size) read as zeroes, and maps it as the preallocation asks. The mapping has nothing there.
func (im *Image) fillNew(ctx context.Context, old, size int64, mode Preallocation, progress func(done, total int64)) error {
	cs := im.lay.ClusterSize()
	first := roundUp(old, cs)
	if err := im.zeroRest(ctx, span{old, first - old}, true); err != nil {
		return fmt.Errorf("zeroing the rest of the last cluster: %w", err)
	}
	switch {
	case first >= size:
		return nil
	case mode != PreallocOff:
		p := preallocation{im: im, mode: mode, relieve: im.meta.PressureGated, progress: progress}
		return p.mapRange(ctx, im.cluster(first), im.cluster(roundUp(size, cs)))
	case im.backing == nil || im.backing.Size() <= first:
		return nil
	}
	// The backing file is longer than the disk was. It must not show through.
	hidden := span{first, min(size, im.backing.Size()) - first}
	hidden.n = roundUp(hidden.n, format.SectorSize)
	if im.lay.Version < format.Version3 {
		return im.zeroPlainly(ctx, hidden)
	}
	end := im.cluster(roundUp(hidden.end(), cs))
	hidden.n = roundUp(hidden.n, cs)
	for c := im.cluster(first); c < end; {
		n, err := im.zeroSome(ctx, c, int64(end-c), zeroing{im: im, body: hidden})
		if err != nil {
			return fmt.Errorf("hiding the backing file: %w", err)
		}
		c += meta.GuestCluster(n)
		if err := im.meta.PressureGated(); err != nil {
			return err
		}
	}
	return nil
}

// zeroPlainly writes zeroes where no mapping stands for them.
func (im *Image) zeroPlainly(ctx context.Context, s span) error {
	for s.n > 0 {
		part := span{s.off, min(s.n, maxAllocation)}
		if err := im.zeroByWriting(ctx, part); err != nil {
			return fmt.Errorf("hiding the backing file: %w", err)
		}
		if err := im.meta.PressureGated(); err != nil {
			return err
		}
		s.off, s.n = s.off+part.n, s.n-part.n
	}
	return nil
}
