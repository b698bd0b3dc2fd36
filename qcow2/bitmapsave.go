package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// SaveBitmaps stores the dirty bitmaps, so that a crash before the next change of the disk loses none of them. Requests that
// come meanwhile wait. An open image does it by itself when nobody writes, and Close does.
func (im *Image) SaveBitmaps(ctx context.Context) error {
	if im.readOnly {
		return block.ErrReadOnly
	}
	err := im.meta.Exclusive(ctx, im.saveBitmaps)
	if errors.Is(err, meta.ErrClosed) {
		return block.ErrClosed
	}
	return err
}

// closeBitmaps is SaveBitmaps for Close.
func (im *Image) closeBitmaps() error {
	if im.readOnly || !im.bm.inUse || im.meta.Corrupt() != nil { // an image marked corrupt is left as it is
		return nil
	}
	return im.meta.AtClose(func() error {
		err := im.saveBitmaps()
		return errors.Join(err, im.meta.SettleGated()) // counts of what a failure gave back
	})
}

// saveBitmaps makes the deltas part of the bits on the disk and takes the flags back. No request and no flush runs, and
// what the guest wrote is durable. The order: the bits, in clusters that no table names or in place (the bitmap is in use, so
// nobody believes them), and the counts; then the tables; then the flags. After an error the bitmaps are still in use, and the
// next call begins again.
func (im *Image) saveBitmaps() error {
	b := &im.bm
	if err := im.meta.Corrupt(); err != nil || !b.inUse {
		return err
	}
	s := bitmapSave{im: im, buf: make([]byte, im.lay.ClusterSize())}
	if err := s.bits(); err != nil {
		return s.undo.unless(false, err)
	}
	s.link()
	for _, m := range b.enabled {
		if err := im.writeTable(m); err != nil {
			return err
		}
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	for _, m := range b.enabled {
		m.lo, m.hi = 0, 0
	}
	// From here on the disk may not say "in use" any more: the next request arms again, even if this fails.
	b.armed.Store(false)
	b.saves++
	if err := im.writeInUse(b.enabled, false); err != nil {
		return err
	}
	if err := im.meta.SyncNow(); err != nil {
		return err
	}
	for _, m := range b.enabled {
		m.delta.Clear()
	}
	b.inUse = false
	return nil
}

// bitmapSave is one run of saveBitmaps.
type bitmapSave struct {
	im      *Image
	undo    undoList // of new clusters
	changes []bitmapChange
	buf     []byte // a cluster
}

// bitmapChange is a table entry that gets a new value.
type bitmapChange struct {
	m     *dirtyBitmap
	i     int64
	entry format.BitmapEntry
}

// bits writes the bits of every cluster that a delta adds to, and makes them durable with the counts of new clusters.
func (s *bitmapSave) bits() error {
	cs := s.im.lay.ClusterSize()
	for _, m := range s.im.bm.enabled {
		if err := s.im.useTable(m); err != nil {
			return err
		}
		n := s.im.bitmapBytes(m)
		for at := m.delta.NextTouched(0); at < n; at = m.delta.NextTouched((at/cs + 1) * cs) {
			if err := s.cluster(m, at/cs, min(cs, n-at/cs*cs)); err != nil {
				return fmt.Errorf("storing bitmap %.64q: %w", m.Name, err)
			}
		}
	}
	if len(s.undo) == 0 {
		return nil
	}
	return s.im.meta.SettleGated()
}

// cluster stores the bits of the i-th cluster of a bitmap, n bytes of which stand for something.
func (s *bitmapSave) cluster(m *dirtyBitmap, i, n int64) error {
	im, at := s.im, i<<s.im.lay.ClusterBits
	entry := m.table[i]
	if entry.AllOnes() {
		return nil
	}
	if _, all := m.delta.Touched(at, n); all && entry == format.BitmapEntryZeroes {
		s.changes = append(s.changes, bitmapChange{m, i, format.BitmapEntryOnes})
		return nil
	}
	if err := im.readBits(entry, s.buf, 0); err != nil {
		return err
	}
	m.delta.OrInto(s.buf, at)
	if entry.Offset() != 0 {
		return im.meta.WriteNow(s.buf, entry.Offset())
	}
	off, err := im.placeNew(&s.undo, s.buf)
	if err != nil {
		return err
	}
	s.changes = append(s.changes, bitmapChange{m, i, format.MakeBitmapEntry(off)})
	return nil
}

// link puts the new entries into the tables in memory. From here on the new clusters are the tables'.
func (s *bitmapSave) link() {
	for _, c := range s.changes {
		c.m.table[c.i] = c.entry
		i := int(c.i)
		if c.m.lo == c.m.hi {
			c.m.lo, c.m.hi = i, i+1
			continue
		}
		c.m.lo, c.m.hi = min(c.m.lo, i), max(c.m.hi, i+1)
	}
}

// writeTable writes the entries of a table that the disk may lack.
func (im *Image) writeTable(m *dirtyBitmap) error {
	if m.lo == m.hi {
		return nil
	}
	raw := encodeBitmapTable(m.table[m.lo:m.hi])
	if err := im.meta.WriteNow(raw, m.TableOffset+format.HostOff(m.lo*8)); err != nil {
		return fmt.Errorf("writing the table of bitmap %.64q: %w", m.Name, err)
	}
	return nil
}

func encodeBitmapTable(table []format.BitmapEntry) []byte {
	words := make([]uint64, len(table))
	for i, e := range table {
		words[i] = uint64(e)
	}
	raw := make([]byte, len(words)*8)
	format.EncodeTable(raw, words)
	return raw
}

// resizeBitmaps has apply give the disk another size (Size tells whether it did, even if it fails), and the bitmaps with it.
// New parts of the disk are clean. It is for exclusive, before SettleGated. A bitmap that is in use since a crash cannot be resized: then nothing happens. While the size changes the
// bitmaps are in use on the disk, since tables of one size are refused with a disk of another; if something fails in
// between they stay so.
func (im *Image) resizeBitmaps(size int64, apply func() error) error {
	if len(im.bm.list) == 0 {
		return apply()
	}
	for _, m := range im.bm.list {
		if _, err := im.usableBitmap(m.Name); err != nil {
			return err
		}
		if err := im.bitmapFits(size, m.GranularityBits); err != nil {
			return err
		}
	}
	if err := im.saveBitmaps(); err != nil {
		return err
	}
	if err := im.bitmapsInUse(true); err != nil {
		return errors.Join(err, im.bitmapsInUse(false))
	}
	old := im.Size()
	applied := apply()
	if im.Size() != size {
		return errors.Join(applied, im.bitmapsInUse(false))
	}
	e := &bitmapEdit{im: im, oldSize: old}
	list, err := e.resized(size)
	if err == nil {
		err = e.commit(list)
	}
	if err = e.undo.unless(err == nil, err); err != nil {
		// The disk has its new size, and the bitmaps are lost: the directory says so.
		err = errors.Join(fmt.Errorf("resizing bitmaps: %w", err), im.loadBitmaps())
	}
	return errors.Join(applied, err)
}

// bitmapsInUse has the disk say of all bitmaps that they are in use, or not, and syncs.
func (im *Image) bitmapsInUse(on bool) error {
	if err := im.writeInUse(im.bm.list, on); err != nil {
		return err
	}
	return im.meta.SyncNow()
}

// resized makes new tables for a disk of another size.
func (e *bitmapEdit) resized(size int64) ([]format.Bitmap, error) {
	im := e.im
	list := im.bitmapList()
	for i, m := range im.bm.list {
		n := im.lay.BitmapTableEntries(size, m.GranularityBits)
		table := make([]format.BitmapEntry, n)
		kept := copy(table, m.table)
		for _, gone := range m.table[kept:] {
			if err := e.freeCluster(gone); err != nil {
				return nil, err
			}
		}
		if kept > 0 {
			if err := e.trimEntry(&table[kept-1], int64(kept-1), size, m.GranularityBits); err != nil {
				return nil, err
			}
		}
		off, err := im.placeNew(&e.undo, encodeBitmapTable(table))
		if err != nil {
			return nil, err
		}
		if err := e.freeTable(m); err != nil {
			return nil, err
		}
		list[i].TableOffset, list[i].TableSize = off, uint32(n)
	}
	return list, nil
}

// trimEntry makes the bits of the last cluster that is kept zero behind the end of the smaller disk: they are behind the end
// of the new disk too, or stand for what has just come.
func (e *bitmapEdit) trimEntry(entry *format.BitmapEntry, i, size int64, granularityBits uint8) error {
	im := e.im
	if *entry == format.BitmapEntryZeroes {
		return nil
	}
	buf := make([]byte, im.lay.ClusterSize())
	if err := im.readBits(*entry, buf, 0); err != nil {
		return err
	}
	size = min(size, e.oldSize)
	valid := format.BitmapDataSize(size, granularityBits) - i<<im.lay.ClusterBits
	format.TrimBitmap(buf[:valid], size, granularityBits)
	clear(buf[valid:])
	off, err := im.placeNew(&e.undo, buf)
	if err != nil {
		return err
	}
	old := *entry
	*entry = format.MakeBitmapEntry(off)
	return e.freeCluster(old)
}

// readHeaderAgain reads the header as the file shows it now, a few times if need be: after a write that failed it
// decides which clusters are whose.
func (im *Image) readHeaderAgain() (h *format.Header, err error) {
	for range 8 {
		if h, err = readHeader(im.file); err == nil {
			return h, nil
		}
	}
	return nil, err
}
