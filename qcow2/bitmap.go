package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/bitmap"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// DefaultBitmapSaveInterval is how often dirty bitmaps are saved when nobody writes.
const DefaultBitmapSaveInterval = 10 * time.Second

// maxBitmapTables bounds the bitmap tables of one image that are kept in memory, in bytes.
const maxBitmapTables = 256 << 20

// ErrNoBitmap is wrapped by the errors about a dirty bitmap that is not there.
var ErrNoBitmap = errors.New("no such dirty bitmap")

// BitmapInUseError says that a bitmap was not stored by its last user, so that nobody knows what it should hold. It can be
// removed, and nothing else.
type BitmapInUseError struct{ Name string }

func (e *BitmapInUseError) Error() string {
	return fmt.Sprintf("Bitmap '%s' is inconsistent and cannot be used", e.Name)
}

// bitmapError is an error in QEMU's words.
type bitmapError struct {
	text string
	is   error
}

func (e *bitmapError) Error() string        { return e.text }
func (e *bitmapError) Is(target error) bool { return e.is != nil && target == e.is }

func bitmapErrorf(f string, args ...any) error { return &bitmapError{text: fmt.Sprintf(f, args...)} }

func noBitmap(name string) error {
	return &bitmapError{fmt.Sprintf("Dirty bitmap '%s' not found", name), ErrNoBitmap}
}

// errNotArmed sends a request back to have the disk say that bitmaps are in use.
var errNotArmed = errors.New("dirty bitmaps are not marked in use yet")

// bitmaps is what memory knows of an image's dirty bitmaps.
//
// The bits on the disk are not read when an image is opened. What requests mark goes to a second bitmap in memory, the delta,
// that begins empty: a granule is dirty if the disk or the delta says so. So opening costs the directory and the tables
// of enabled bitmaps, and memory is taken only for what changes.
//
// Invariant: while a request may change the disk, the directory on the disk says of each enabled bitmap that it is in use
// (armed), and that was durable before the first change. It stops saying so when the delta has become part of the bits on
// the disk, durably, with no request running. A crash in between leaves a bitmap that nobody trusts, never one
// that says less than what changed.
//
// list, ext and the tables change only while no request runs; requests look at them with a ticket in hand.
type bitmaps struct {
	list []*dirtyBitmap
	ext  *format.BitmapsExt // names the directory that list was read from
	err  error              // why the directory of an image opened read-only cannot be read
	// enabled are those that requests must mark.
	enabled []*dirtyBitmap
	armed   atomic.Bool
	// inUse: the disk may say that the enabled bitmaps are in use.
	inUse bool
	saves uint64 // how often inUse was taken back

	busy atomic.Bool // a request has come since the last tick

	armMu   sync.Mutex // one request arms
	tableMu sync.Mutex // loading of tables by readers
	tables  int64      // bytes of tables loaded

	stop chan struct{} // closed to end the goroutine that saves, nil when there is none
}

// dirtyBitmap is one bitmap of the directory.
type dirtyBitmap struct {
	format.Bitmap
	at    format.HostOff // of the directory entry
	table []format.BitmapEntry
	// lo and hi bound what differs between table and the disk, or may differ; equal when nothing does.
	lo, hi int
	delta  *bitmap.Bitmap // nil unless enabled
}

func (m *dirtyBitmap) inUse() bool { return m.Flags&format.BitmapInUse != 0 }

// bytes returns the length of the serialised bitmap.
func (im *Image) bitmapBytes(m *dirtyBitmap) int64 {
	return format.BitmapDataSize(im.Size(), m.GranularityBits)
}

// ready reports whether a request may change the disk.
func (b *bitmaps) ready() bool { return len(b.enabled) == 0 || b.armed.Load() }

// mark notes in the enabled bitmaps that a range is about to change. It comes before the change: a request that fails
// leaves marks, one that was not marked leaves nothing.
func (im *Image) mark(s span) {
	if len(im.bm.enabled) == 0 {
		return
	}
	for _, m := range im.bm.enabled {
		m.delta.Mark(s.off, s.n)
	}
	if !im.bm.busy.Load() {
		im.bm.busy.Store(true)
	}
}

// loadBitmaps reads the directory. An image whose bitmaps cannot be kept true is not opened for writing.
func (im *Image) loadBitmaps() error {
	list, err := readBitmapDirectory(im.file, im.hdr)
	if err != nil && im.readOnly {
		im.bm.err = err
		return nil
	}
	if err != nil {
		return err
	}
	im.setBitmaps(list)
	for _, m := range im.bm.enabled {
		if err := im.useTable(m); err != nil {
			return err
		}
	}
	return nil
}

// setBitmaps takes list for what the directory that the header names says. No request runs.
func (im *Image) setBitmaps(list []format.Bitmap) {
	b := &im.bm
	b.list, b.enabled, b.ext, b.tables = nil, nil, im.hdr.Bitmaps, 0
	b.armed.Store(false)
	b.inUse = false
	if b.ext == nil {
		return
	}
	at := b.ext.DirectoryOffset
	for i := range list {
		m := &dirtyBitmap{Bitmap: list[i], at: at}
		at += format.HostOff(m.EntrySize())
		b.list = append(b.list, m)
		if im.readOnly || m.Flags&format.BitmapAuto == 0 || m.inUse() {
			continue
		}
		m.delta = bitmap.New(im.Size(), m.GranularityBits)
		b.enabled = append(b.enabled, m)
	}
}

// bitmapsReloaded is called when the header was read again after an operation on the whole image: another directory than
// the one in memory is read.
func (im *Image) bitmapsReloaded() error {
	now, had := im.hdr.Bitmaps, im.bm.ext
	if now == nil && had == nil || now != nil && had != nil && *now == *had {
		return nil
	}
	return im.loadBitmaps()
}

// findBitmap returns a bitmap by its name.
func (im *Image) findBitmap(name string) (*dirtyBitmap, error) {
	if im.bm.err != nil {
		return nil, im.bm.err
	}
	for _, m := range im.bm.list {
		if m.Name == name {
			return m, nil
		}
	}
	return nil, noBitmap(name)
}

// usableBitmap is findBitmap for a bitmap whose content means something.
func (im *Image) usableBitmap(name string) (*dirtyBitmap, error) {
	m, err := im.findBitmap(name)
	if err != nil {
		return nil, err
	}
	if m.inUse() {
		return nil, &BitmapInUseError{name}
	}
	return m, im.useTable(m)
}

// useTable is loadTable for a table that must be the one that a disk of this size has.
func (im *Image) useTable(m *dirtyBitmap) error {
	if n := im.lay.BitmapTableEntries(im.Size(), m.GranularityBits); int64(m.TableSize) != n {
		return bitmapErrorf("bitmap %.64q: its table has %d entries, not the %d of this disk", m.Name, m.TableSize, n)
	}
	return im.loadTable(m)
}

// loadTable reads a bitmap's table. Tables lie in the file, so they take no more memory than the file is long, and not more
// than a bound.
func (im *Image) loadTable(m *dirtyBitmap) error {
	im.bm.tableMu.Lock()
	defer im.bm.tableMu.Unlock()
	if m.table != nil {
		return nil
	}
	size, err := im.file.Size()
	if err != nil {
		return fmt.Errorf("size of image file: %w", err)
	}
	n := int64(m.TableSize) * 8
	switch {
	case m.TableOffset > 1<<62 || int64(m.TableOffset) > size-n:
		return bitmapErrorf("bitmap %.64q: its table at host offset %#x reaches past the end of the file", m.Name, m.TableOffset)
	case im.bm.tables+n > min(size, maxBitmapTables):
		return bitmapErrorf("bitmap %.64q: the tables of the bitmaps are longer than the file, or than %d bytes", m.Name,
			maxBitmapTables)
	}
	raw := make([]byte, n)
	if err := storage.ReadFull(im.file, raw, int64(m.TableOffset)); err != nil {
		return fmt.Errorf("reading bitmap table at host offset %#x: %w", m.TableOffset, err)
	}
	words := make([]uint64, m.TableSize)
	format.DecodeTable(words, raw)
	table := make([]format.BitmapEntry, len(words))
	for i, w := range words {
		table[i] = format.BitmapEntry(w)
		if !table[i].Valid(im.lay) || int64(table[i].Offset()) > size {
			return bitmapErrorf("bitmap %.64q: its table at host offset %#x has an invalid entry %#x", m.Name, m.TableOffset, w)
		}
	}
	m.table = table
	im.bm.tables += n
	return nil
}

// armBitmaps has the disk say that the enabled bitmaps are in use. It is called outside of every request.
func (im *Image) armBitmaps(ctx context.Context) error {
	b := &im.bm
	b.armMu.Lock()
	defer b.armMu.Unlock()
	for {
		saves, done, err := im.writeArmed()
		if done || err != nil {
			return err
		}
		if err := im.meta.Flush(ctx); err != nil {
			return err
		}
		t, err := im.enter()
		if err != nil {
			return err
		}
		if b.saves == saves {
			b.armed.Store(true)
		}
		im.meta.Epochs.Exit(t)
	}
}

// writeArmed writes the flags unless that is done.
func (im *Image) writeArmed() (saves uint64, done bool, err error) {
	t, err := im.enter()
	if err != nil {
		return 0, false, err
	}
	defer im.meta.Epochs.Exit(t)
	if im.bm.ready() {
		return 0, true, nil
	}
	im.bm.inUse = true
	return im.bm.saves, false, im.writeInUse(im.bm.enabled, true)
}

// writeInUse writes the flags of bitmaps, one aligned field each: a power cut leaves it old or new.
func (im *Image) writeInUse(list []*dirtyBitmap, on bool) error {
	for _, m := range list {
		flags := m.Flags
		if on {
			flags |= format.BitmapInUse
		}
		off, field := m.FlagsField(flags)
		if err := im.meta.WriteNow(field[:], m.at+format.HostOff(off)); err != nil {
			return fmt.Errorf("writing the flags of bitmap %.64q: %w", m.Name, err)
		}
	}
	return nil
}

// startSaves has a goroutine save the bitmaps whenever nobody has written for a while.
func (im *Image) startSaves(every time.Duration) {
	if every == 0 {
		every = DefaultBitmapSaveInterval
	}
	if every < 0 || len(im.bm.list) == 0 || im.readOnly {
		return
	}
	im.bm.stop = make(chan struct{})
	im.swept.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				im.saveIdleBitmaps()
			case <-im.bm.stop:
				return
			}
		}
	})
}

// saveIdleBitmaps saves the bitmaps if no request has marked anything since the last call.
func (im *Image) saveIdleBitmaps() {
	if im.bm.busy.Swap(false) || !im.bm.armed.Load() {
		return
	}
	// A failure leaves the bitmaps in use; the next try, at the latest that of Close, reports it.
	_ = im.SaveBitmaps(context.Background())
}

func (b *bitmaps) stopSaves() {
	if b.stop != nil {
		close(b.stop)
	}
}

// Bitmaps lists the persistent dirty bitmaps in the order of the directory. InUse is what it was when the image was opened:
// true for those that nobody can use any more.
func (im *Image) Bitmaps() ([]BitmapInfo, error) {
	t, err := im.enter()
	if err != nil {
		return nil, err
	}
	defer im.meta.Epochs.Exit(t)
	if im.bm.err != nil {
		return nil, im.bm.err
	}
	list := make([]format.Bitmap, len(im.bm.list))
	for i, m := range im.bm.list {
		list[i] = m.Bitmap
	}
	return bitmapInfos(list), nil
}

// bitmapPiece is how many bytes of a serialised bitmap BitmapExtents looks at in one go.
const bitmapPiece = 32 << 10

// BitmapExtents tells which parts of [off, off+n) a dirty bitmap has marked, those included that requests which have
// ended have marked in this session. It calls fn for consecutive runs, until fn returns false; neighbouring runs may be in the
// same state.
func (im *Image) BitmapExtents(ctx context.Context, name string, off, n int64, fn func(n int64, dirty bool) bool) error {
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	if err := block.CheckRange(off, n, im.Size()); err != nil {
		return err
	}
	m, err := im.usableBitmap(name)
	if err != nil {
		return err
	}
	end := off + n
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, more, err := im.pieceExtents(m, off, end, fn)
		if err != nil {
			return fmt.Errorf("reading bitmap %q: %w", name, err)
		}
		if !more {
			return nil
		}
		off = next
	}
	return nil
}

// pieceExtents reports the runs of [off, next), a part of [off, end).
func (im *Image) pieceExtents(m *dirtyBitmap, off, end int64, fn func(n int64, dirty bool) bool) (
	next int64, more bool, err error) {
	cs := im.lay.ClusterSize()
	first := off >> m.GranularityBits
	at := first / 8 &^ 7 // byte of the serialised bitmap
	i := at / cs
	last := (end - 1) >> m.GranularityBits
	to := min((i+1)*cs, last/8+1)
	entry := m.table[i]
	some := false
	if m.delta != nil {
		some, _ = m.delta.Touched(at, to-at)
	}
	if plain := entry.Offset() == 0; plain && (entry.AllOnes() || !some) {
		next = min(granuleStart(to*8, m.GranularityBits), end)
		return next, fn(next-off, entry.AllOnes()), nil
	}
	to = min(to, at+bitmapPiece)
	buf := make([]byte, to-at)
	if err := im.readBits(entry, buf, at-i*cs); err != nil {
		return 0, false, err
	}
	if some {
		m.delta.OrInto(buf, at)
	}
	next = min(granuleStart(to*8, m.GranularityBits), end)
	more = true
	bitRuns(buf, first-at*8, min(to*8, last+1)-at*8, func(lo, hi int64, dirty bool) bool {
		from := max(granuleStart(at*8+lo, m.GranularityBits), off)
		more = fn(min(granuleStart(at*8+hi, m.GranularityBits), end)-from, dirty)
		return more
	})
	return next, more, nil
}

// granuleStart returns where on the disk a granule begins, without overflow behind the largest disk.
func granuleStart(g int64, granularityBits uint8) int64 {
	if g > (1<<63-1)>>granularityBits {
		return 1<<63 - 1
	}
	return g << granularityBits
}

// readBits fills buf with the bits that a table entry stands for, from in bytes into its cluster.
func (im *Image) readBits(e format.BitmapEntry, buf []byte, in int64) error {
	switch {
	case e.Offset() != 0:
		at := int64(e.Offset()) + in
		if err := storage.ReadFull(im.file, buf, at); err != nil {
			return fmt.Errorf("reading bits at host offset %#x: %w", at, err)
		}
	case e.AllOnes():
		for i := range buf {
			buf[i] = 0xff
		}
	default:
		clear(buf)
	}
	return nil
}

// bitRuns calls fn for the runs of bits [lo, hi) of b, until fn returns false.
func bitRuns(b []byte, lo, hi int64, fn func(lo, hi int64, set bool) bool) {
	for lo < hi {
		set := b[lo/8]>>(lo%8)&1 == 1
		end := lo
		for end < hi {
			v := b[end/8]
			if !set {
				v = ^v
			}
			n := min(int64(bits.TrailingZeros8(^(v >> (end % 8)))), 8-end%8)
			end += n
			if end%8 != 0 || n == 0 {
				break
			}
		}
		end = min(end, hi)
		if !fn(lo, end, set) {
			return
		}
		lo = end
	}
}
