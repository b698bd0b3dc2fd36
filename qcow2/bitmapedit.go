package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/bitmap"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// BitmapOptions describe a new dirty bitmap.
type BitmapOptions struct {
	// Granularity is how many bytes of the disk one bit stands for, a power of two from 512 to 2 GiB; 0 is the cluster size,
	// but at least 4 KiB and at most 64 KiB.
	Granularity int64
	Disabled    bool // writes are not recorded until it is enabled
}

// bitmapEdit is a change of the bitmap directory: new structures are written beside the old ones, then the header names
// the new directory in one step, then the old ones go. A crash leaves the old bitmaps or the new ones, and leaks.
type bitmapEdit struct {
	im      *Image
	oldSize int64
	undo    undoList          // of new clusters
	old     []meta.ClusterRun // no longer referred to afterwards
	seen    map[format.ClusterIdx]bool
}

// changeBitmaps runs fn on the saved bitmaps, which says what the directory lists afterwards; with nil nothing changes.
func (im *Image) changeBitmaps(ctx context.Context, fn func(*bitmapEdit) ([]format.Bitmap, error)) error {
	if im.readOnly {
		return block.ErrReadOnly
	}
	if err := im.meta.Corrupt(); err != nil {
		return err
	}
	err := im.meta.Exclusive(ctx, func() error {
		if err := im.mend(); err != nil {
			return err
		}
		if err := im.saveBitmaps(); err != nil {
			return err
		}
		e := &bitmapEdit{im: im, oldSize: im.Size()}
		list, err := fn(e)
		if err == nil && list != nil {
			err = e.commit(list)
		}
		err = e.undo.unless(err == nil, err)
		if c := ownCorruption(err); c != nil {
			im.meta.MarkCorruptGated(c)
		}
		return err
	})
	if errors.Is(err, meta.ErrClosed) {
		return block.ErrClosed
	}
	return err
}

// bitmapList returns a copy of what the directory lists.
func (im *Image) bitmapList() []format.Bitmap {
	list := make([]format.Bitmap, len(im.bm.list))
	for i, m := range im.bm.list {
		list[i] = m.Bitmap
	}
	return list
}

// commit makes list the directory.
func (e *bitmapEdit) commit(list []format.Bitmap) error {
	im := e.im
	var ext *format.BitmapsExt
	if len(list) > 0 {
		b, err := format.MarshalBitmapDirectory(list, im.hdr)
		if err != nil {
			return err
		}
		at, err := im.placeNew(&e.undo, b)
		if err != nil {
			return err
		}
		ext = &format.BitmapsExt{Count: uint32(len(list)), DirectorySize: uint64(len(b)), DirectoryOffset: at}
	}
	if old := im.hdr.Bitmaps; old != nil {
		if err := e.freeRun(meta.ClustersOf(im.lay, old.DirectoryOffset, int64(old.DirectorySize)), meta.BitmapDirectory); err != nil {
			return err
		}
	}
	if err := im.meta.SettleGated(); err != nil {
		return err
	}
	err := im.changeHeader(func(h *format.Header) error {
		setBitmapsExt(h, ext)
		return nil
	})
	if err != nil && !e.visible(ext) {
		return errors.Join(err, im.broken)
	}
	// With an error and the new header in the file, the change has happened and is not known to be durable. Its writes are
	// repeated like all that a failed sync has left in doubt, before anything given up here is used again.
	e.undo.forget()
	if ext != nil {
		im.meta.SetBitmapDirectory(ext.DirectoryOffset, int64(ext.DirectorySize))
	} else {
		im.meta.SetBitmapDirectory(0, 0)
	}
	for _, r := range e.old {
		im.meta.Refs.Retire(meta.Retired{ClusterRun: r, Cause: meta.CauseOther})
	}
	h := *im.hdr
	setBitmapsExt(&h, ext)
	im.hdr = &h
	im.setBitmaps(list)
	return err
}

// visible reports after an error whether the file shows the new header.
func (e *bitmapEdit) visible(ext *format.BitmapsExt) bool {
	h, err := e.im.readHeaderAgain()
	if err != nil {
		e.undo.forget() // one header or the other: what both need stays
		e.im.broken = fmt.Errorf("reading the header again: %w", err)
		return false
	}
	return sameExt(h.Bitmaps, ext)
}

func sameExt(a, b *format.BitmapsExt) bool {
	return a == nil && b == nil || a != nil && b != nil && *a == *b
}

func setBitmapsExt(h *format.Header, ext *format.BitmapsExt) {
	h.Bitmaps, h.StaleBitmaps = ext, false
	h.Autoclear &^= format.AutoclearBitmaps
	if ext != nil {
		h.Autoclear |= format.AutoclearBitmaps
	}
}

// freeRun gives clusters up when the new directory is in place: those that are counted once, and lie in none of the image's
// other structures. Others are not this bitmap's alone, whatever its table says, and stay for a repair.
func (e *bitmapEdit) freeRun(r meta.ClusterRun, but meta.Structure) error {
	if e.seen == nil {
		e.seen = make(map[format.ClusterIdx]bool)
	}
	for c := r.First; c < r.End(); c++ {
		n, err := e.im.meta.Refs.Get(c)
		if err != nil {
			return err
		}
		if n != 1 || e.seen[c] || but == 0 && e.im.meta.Guard(e.im.lay.Offset(c), 1) != nil {
			continue
		}
		e.seen[c] = true
		if k := len(e.old); k > 0 && e.old[k-1].End() == c {
			e.old[k-1].N++
			continue
		}
		e.old = append(e.old, meta.ClusterRun{First: c, N: 1})
	}
	return nil
}

func (e *bitmapEdit) freeCluster(entry format.BitmapEntry) error {
	if entry.Offset() == 0 {
		return nil
	}
	return e.freeRun(meta.ClusterRun{First: e.im.lay.Cluster(entry.Offset()), N: 1}, 0)
}

// freeTable gives up a bitmap's table, without what it names.
func (e *bitmapEdit) freeTable(m *dirtyBitmap) error {
	return e.freeRun(meta.ClustersOf(e.im.lay, m.TableOffset, int64(m.TableSize)*8), 0)
}

// freeBitmap gives up a bitmap's table and bits.
func (e *bitmapEdit) freeBitmap(m *dirtyBitmap) error {
	for _, entry := range m.table {
		if err := e.freeCluster(entry); err != nil {
			return err
		}
	}
	return e.freeTable(m)
}

// index returns where in the directory a bitmap is.
func (e *bitmapEdit) index(name string) (int, error) {
	for i, m := range e.im.bm.list {
		if m.Name == name {
			return i, nil
		}
	}
	return 0, noBitmap(name)
}

// usable is index for a bitmap that is not in use since a crash.
func (e *bitmapEdit) usable(name string) (int, *dirtyBitmap, error) {
	m, err := e.im.usableBitmap(name)
	if err != nil {
		return 0, nil, err
	}
	i, err := e.index(name)
	return i, m, err
}

// bitmapFits returns why a bitmap of a granularity cannot be stored for a disk.
func (im *Image) bitmapFits(size int64, granularityBits uint8) error {
	n := im.lay.BitmapTableEntries(size, granularityBits)
	if n > format.MaxBitmapTable || n<<im.lay.ClusterBits > format.MaxBitmapBytes {
		return bitmapErrorf("Too much space will be occupied by the bitmap. Use larger granularity")
	}
	if n == 0 {
		return bitmapErrorf("A disk of no bytes has no dirty bitmaps")
	}
	return nil
}

// AddBitmap adds a persistent dirty bitmap in which nothing is marked.
func (im *Image) AddBitmap(ctx context.Context, name string, o BitmapOptions) error {
	return im.changeBitmaps(ctx, func(e *bitmapEdit) ([]format.Bitmap, error) {
		m, err := e.newBitmap(name, o)
		if err != nil {
			return nil, err
		}
		m.TableOffset, err = im.placeNew(&e.undo, make([]byte, int64(m.TableSize)*8))
		return append(im.bitmapList(), m), err
	})
}

// newBitmap checks the options and makes a directory entry of them.
func (e *bitmapEdit) newBitmap(name string, o BitmapOptions) (format.Bitmap, error) {
	im := e.im
	granularity := o.Granularity
	if granularity == 0 {
		granularity = min(max(im.lay.ClusterSize(), 4096), 64<<10)
	}
	var none format.Bitmap
	switch {
	case granularity < 1<<format.MinBitmapGranularityBits || granularity > 1<<format.MaxBitmapGranularityBits ||
		granularity&(granularity-1) != 0:
		return none, bitmapErrorf("Granularity must be power of 2 and at least 512")
	case name == "":
		return none, bitmapErrorf("Bitmap name cannot be empty")
	}
	if _, err := e.index(name); err == nil {
		return none, bitmapErrorf("Bitmap already exists: %s", name)
	}
	m := format.Bitmap{Name: name, GranularityBits: uint8(bits.TrailingZeros64(uint64(granularity)))}
	if !o.Disabled {
		m.Flags = format.BitmapAuto
	}
	if err := e.storable(&m); err != nil {
		return none, bitmapErrorf("Can't make bitmap '%s' persistent in '%s': %s", name, im.name, err)
	}
	m.TableSize = uint32(im.lay.BitmapTableEntries(im.Size(), m.GranularityBits))
	return m, nil
}

// storable returns why an image cannot take one more bitmap.
func (e *bitmapEdit) storable(m *format.Bitmap) error {
	im := e.im
	length := m.EntrySize()
	for _, o := range im.bm.list {
		length += o.EntrySize()
	}
	switch {
	case im.lay.Version < format.Version3:
		return bitmapErrorf("Cannot store dirty bitmaps in qcow2 v2 files")
	case len(m.Name) > format.MaxBitmapName:
		return bitmapErrorf("Name length exceeds maximum (%d characters)", format.MaxBitmapName)
	case len(im.bm.list) >= format.MaxBitmaps:
		return bitmapErrorf("Maximum number of persistent bitmaps is already reached")
	case length > format.MaxBitmapDirectory:
		return bitmapErrorf("Not enough space in the bitmap directory")
	}
	return im.bitmapFits(im.Size(), m.GranularityBits)
}

// RemoveBitmap removes a dirty bitmap, whatever state it is in.
func (im *Image) RemoveBitmap(ctx context.Context, name string) error {
	return im.changeBitmaps(ctx, func(e *bitmapEdit) ([]format.Bitmap, error) {
		i, err := e.index(name)
		if err != nil {
			return nil, err
		}
		m := im.bm.list[i]
		var broken *bitmapError // of a table that makes no sense nothing is freed
		if err = im.loadTable(m); err == nil {
			err = e.freeBitmap(m)
		}
		if err != nil && !errors.As(err, &broken) {
			return nil, err
		}
		list := im.bitmapList()
		return append(list[:i], list[i+1:]...), nil
	})
}

// EnableBitmap has a dirty bitmap record what is written from now on.
func (im *Image) EnableBitmap(ctx context.Context, name string) error {
	return im.setAuto(ctx, name, format.BitmapAuto)
}

// DisableBitmap has a dirty bitmap stay as it is, whatever is written.
func (im *Image) DisableBitmap(ctx context.Context, name string) error {
	return im.setAuto(ctx, name, 0)
}

func (im *Image) setAuto(ctx context.Context, name string, auto format.BitmapFlags) error {
	return im.changeBitmaps(ctx, func(e *bitmapEdit) ([]format.Bitmap, error) {
		i, m, err := e.usable(name)
		if err != nil || m.Flags&format.BitmapAuto == auto {
			return nil, err
		}
		list := im.bitmapList()
		list[i].Flags = auto
		return list, nil
	})
}

// ClearBitmap makes nothing marked in a dirty bitmap.
func (im *Image) ClearBitmap(ctx context.Context, name string) error {
	return im.changeBitmaps(ctx, func(e *bitmapEdit) ([]format.Bitmap, error) {
		i, m, err := e.usable(name)
		if err != nil {
			return nil, err
		}
		off, err := im.placeNew(&e.undo, make([]byte, len(m.table)*8))
		if err != nil {
			return nil, err
		}
		list := im.bitmapList()
		list[i].TableOffset = off
		return list, e.freeBitmap(m)
	})
}

// MergeBitmap marks in the dirty bitmap dst what the dirty bitmap src of from has marked; from is another image with a disk
// of the same size, or nil for this one. Granularities may differ.
func (im *Image) MergeBitmap(ctx context.Context, dst string, from *Image, src string) error {
	var add *bitmap.Bitmap
	if from != nil && from != im {
		if _, _, err := im.lookBitmap(dst); err != nil {
			return err
		}
		var err error
		if add, err = from.copyBitmap(src); err != nil {
			return err
		}
		if a, b := im.Size(), from.Size(); a != b {
			return bitmapErrorf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", a, b)
		}
	}
	return im.changeBitmaps(ctx, func(e *bitmapEdit) ([]format.Bitmap, error) {
		i, m, err := e.usable(dst)
		if err != nil {
			return nil, err
		}
		if add == nil {
			own, err := im.usableBitmap(src)
			if err != nil {
				return nil, err
			}
			if add, err = im.readBitmap(own); err != nil {
				return nil, err
			}
		}
		if add.Empty() {
			return nil, nil
		}
		list := im.bitmapList()
		list[i].TableOffset, err = e.merged(m, add)
		return list, err
	})
}

// lookBitmap finds out whether a bitmap can be used.
func (im *Image) lookBitmap(name string) (*dirtyBitmap, int64, error) {
	t, err := im.enter()
	if err != nil {
		return nil, 0, err
	}
	defer im.meta.Epochs.Exit(t)
	m, err := im.usableBitmap(name)
	return m, im.Size(), err
}

// copyBitmap reads a bitmap of an image that is in use.
func (im *Image) copyBitmap(name string) (*bitmap.Bitmap, error) {
	t, err := im.enter()
	if err != nil {
		return nil, err
	}
	defer im.meta.Epochs.Exit(t)
	m, err := im.usableBitmap(name)
	if err != nil {
		return nil, err
	}
	return im.readBitmap(m)
}

// readBitmap reads all of a bitmap.
func (im *Image) readBitmap(m *dirtyBitmap) (*bitmap.Bitmap, error) {
	b := bitmap.New(im.Size(), m.GranularityBits)
	buf := make([]byte, im.lay.ClusterSize())
	for i, entry := range m.table {
		at := int64(i) << im.lay.ClusterBits
		switch {
		case entry.AllOnes():
			b.LoadOnes(at, int64(len(buf)))
		case entry.Offset() != 0:
			if err := im.readBits(entry, buf, 0); err != nil {
				return nil, fmt.Errorf("reading bitmap %.64q: %w", m.Name, err)
			}
			b.Load(buf, at)
		}
	}
	if m.delta != nil {
		b.Merge(m.delta)
	}
	return b, nil
}

// merged writes a new table for m with the marks of add: with new clusters where they add something, and the old ones
// elsewhere.
func (e *bitmapEdit) merged(m *dirtyBitmap, add *bitmap.Bitmap) (format.HostOff, error) {
	im := e.im
	delta := add
	if add.Granularity() != m.Granularity() {
		delta = bitmap.New(im.Size(), m.GranularityBits)
		delta.Merge(add)
	}
	cs, n := im.lay.ClusterSize(), im.bitmapBytes(m)
	table := append([]format.BitmapEntry(nil), m.table...)
	buf := make([]byte, cs)
	for at := delta.NextTouched(0); at < n; at = delta.NextTouched((at/cs + 1) * cs) {
		i := at / cs
		if table[i].AllOnes() {
			continue
		}
		if err := e.freeCluster(table[i]); err != nil {
			return 0, err
		}
		if _, all := delta.Touched(i*cs, min(cs, n-i*cs)); all {
			table[i] = format.BitmapEntryOnes
			continue
		}
		if err := im.readBits(table[i], buf, 0); err != nil {
			return 0, err
		}
		delta.OrInto(buf, i*cs)
		off, err := im.placeNew(&e.undo, buf)
		if err != nil {
			return 0, err
		}
		table[i] = format.MakeBitmapEntry(off)
	}
	if err := e.freeTable(m); err != nil {
		return 0, err
	}
	return im.placeNew(&e.undo, encodeBitmapTable(table))
}
