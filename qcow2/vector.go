package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// Reads and writes whose memory comes in pieces: one look at the mapping for each run of clusters, whatever the pieces, and one
// vectored call for what lies together on the host. What has to go through a buffer anyway goes piece by piece.

var (
	_ block.VectorDevice          = (*Image)(nil)
	_ block.TryVectorDevice       = (*Image)(nil)
	_ block.OverwriteVectorDevice = (*Image)(nil)
)

// ReadVAt is ReadAt for buffers that are filled in order.
func (im *Image) ReadVAt(ctx context.Context, bufs [][]byte, off int64) error {
	if !block.WholeSectors(bufs, off) {
		if err := block.CheckRange(off, block.LenV(bufs), im.Size()); err != nil {
			return err
		}
		return block.ReadPieces(bufs, off, func(p []byte, off int64) error { return im.ReadAt(ctx, p, off) })
	}
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	if err := block.CheckRange(off, block.LenV(bufs), im.Size()); err != nil {
		return err
	}
	return im.readV(ctx, bufs, off)
}

func (im *Image) readV(ctx context.Context, bufs [][]byte, off int64) error {
	c := block.NewCursor(bufs)
	defer c.Close()
	for c.Left() > 0 {
		run, in, err := im.lookup(off, c.Left(), true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", off, err)
		}
		n := im.runBytes64(run, in, c.Left())
		if err := im.readRunV(ctx, c.Next(n), off, in, run); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// runBytes64 is runBytes for requests in pieces.
func (im *Image) runBytes64(run meta.Run, in, most int64) int64 {
	return min(most, run.N<<im.lay.ClusterBits-in)
}

// plainRun reports whether a run's bytes lie one after the other on the host.
func (im *Image) plainRun(run meta.Run) bool {
	return run.Kind == format.KindNormal && !im.lay.ExtendedL2
}

// readRunV is readRun for buffers that meet between sectors. What is not plain data is looked up again for each buffer: it costs
// more than that anyway.
func (im *Image) readRunV(ctx context.Context, bufs [][]byte, off, in int64, run meta.Run) error {
	if im.plainRun(run) {
		return im.readHostV(bufs, off, int64(run.Entry.HostOffset())+in)
	}
	if im.zeroRead(run.Kind, off) && (!im.lay.ExtendedL2 || run.N > 1) {
		storage.ClearV(bufs, 0)
		return nil
	}
	if run.Kind == format.KindUnallocated && (!im.lay.ExtendedL2 || run.N > 1) {
		return im.readBackingV(ctx, bufs, off)
	}
	for _, p := range bufs {
		if err := im.read(ctx, p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// readBackingV is readBacking, where there is a backing device, for several buffers.
func (im *Image) readBackingV(ctx context.Context, bufs [][]byte, off int64) error {
	c := block.NewCursor(bufs)
	defer c.Close()
	n := min(c.Left(), im.backing.Size()-off)
	storage.Tell(im.file, storage.EventReadBackingAIO)
	if err := block.ReadV(ctx, im.backing, c.Next(n), off); err != nil {
		return &belowError{err}
	}
	storage.ClearV(c.Next(c.Left()), 0)
	return nil
}

// readHostV is readHost for several buffers.
func (im *Image) readHostV(bufs [][]byte, off, host int64) error {
	if err := im.checkPlace(off, host); err != nil {
		return err
	}
	if im.crypt != nil && !im.crypt.readyV(bufs, host) {
		for _, p := range bufs {
			if err := im.readHost(p, off, host); err != nil {
				return err
			}
			off, host = off+int64(len(p)), host+int64(len(p))
		}
		return nil
	}
	storage.Tell(im.file, storage.EventReadAIO)
	if err := storage.ReadVFull(im.data, bufs, host); err != nil {
		return fmt.Errorf("reading guest offset %#x at host offset %#x: %w", off, host, err)
	}
	im.crypt.decryptV(bufs, off, host)
	return nil
}

// TryReadVAt is ReadVAt if mapping and data are in memory; otherwise block.ErrWouldBlock.
func (im *Image) TryReadVAt(bufs [][]byte, off int64) error {
	if !block.WholeSectors(bufs, off) {
		return block.ErrWouldBlock
	}
	t, ok := im.tryEnter()
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Epochs.Exit(t)
	c := block.NewCursor(bufs)
	defer c.Close()
	if err := block.CheckRange(off, c.Left(), im.Size()); err != nil {
		return err
	}
	if im.longCrypt(c.Left()) {
		return block.ErrWouldBlock
	}
	for c.Left() > 0 {
		how := im.tryPart(off, c.Left())
		if err := im.tryReadPartV(c.Next(how.n), off, how); err != nil {
			return wouldBlock(err)
		}
		off += how.n
	}
	return nil
}

// tryReadPartV is tryReadPart for buffers that meet between sectors.
func (im *Image) tryReadPartV(bufs [][]byte, off int64, how part) error {
	switch how.kind {
	case partData:
		return im.tryReadHostV(bufs, off, how.host)
	case partZero:
		storage.ClearV(bufs, 0)
		return nil
	case partBelow:
		return block.TryReadV(im.backing, bufs, off)
	}
	for _, p := range bufs { // each a part of one compressed cluster
		how.n = int64(len(p))
		if err := im.tryReadPart(p, off, how); err != nil {
			return err
		}
		off += how.n
	}
	return nil
}

// tryReadHostV is readHostV if it can be done without waiting for the disk.
func (im *Image) tryReadHostV(bufs [][]byte, off, host int64) error {
	if im.nowait == nil || im.checkPlace(off, host) != nil || im.crypt != nil && !im.crypt.readyV(bufs, host) {
		return block.ErrWouldBlock
	}
	n, err := storage.ReadVNowait(im.data, bufs, host)
	if int64(n) == block.LenV(bufs) {
		im.crypt.decryptV(bufs, off, host)
		return nil
	}
	if err == nil {
		err = storage.ErrWouldBlock
	}
	return err
}

// readyV is ready for several buffers.
func (e *encryption) readyV(bufs [][]byte, host int64) bool {
	return e.cipher != nil && host%storage.SectorSize == 0 && block.WholeSectors(bufs, host) && wholeSectors(host, int(block.LenV(bufs)))
}

// decryptV is decrypt for several buffers, and does nothing without encryption.
func (e *encryption) decryptV(bufs [][]byte, off, host int64) {
	if e == nil {
		return
	}
	for _, p := range bufs {
		e.decrypt(p, off, host)
		off, host = off+int64(len(p)), host+int64(len(p))
	}
}

// WriteVAt is WriteAt for buffers that follow each other.
func (im *Image) WriteVAt(ctx context.Context, bufs [][]byte, off int64, flags block.WriteFlags) error {
	if err := im.checkWrite(off, block.LenV(bufs)); err != nil {
		return err
	}
	if err := im.writeAllV(ctx, bufs, off); err != nil {
		return err
	}
	if flags&block.WriteFUA != 0 {
		return im.Flush(ctx)
	}
	return nil
}

// writeAllV is writeAll for several buffers.
func (im *Image) writeAllV(ctx context.Context, bufs [][]byte, off int64) error {
	if !block.WholeSectors(bufs, off) {
		return block.WritePieces(bufs, off, func(p []byte, off int64) error { return im.writeAll(ctx, p, off) })
	}
	c := block.NewCursor(bufs)
	defer c.Close()
	for {
		s := span{off, c.Left()}
		err := im.change(ctx, s, func() error { return im.writeV(ctx, &c, &off) })
		if !errors.Is(err, errNotMapped) {
			return err
		}
		if err := im.mapRaw(ctx, span{off, c.Left()}); err != nil {
			return err
		}
	}
}

// writeV writes what follows the cursor to *off and moves both on as far as it gets.
func (im *Image) writeV(ctx context.Context, c *block.Cursor, off *int64) error {
	for c.Left() > 0 {
		run, in, err := im.lookup(*off, c.Left(), true)
		if err != nil {
			return fmt.Errorf("looking up guest offset %#x: %w", *off, err)
		}
		n := im.inPlacePrefix(run, in, im.runBytes64(run, in, c.Left()))
		if n > 0 {
			err = im.overwriteV(c.Peek(n), n, *off, int64(run.Entry.HostOffset())+in)
		} else {
			n, err = im.allocateV(ctx, c, *off)
		}
		if err != nil {
			return err
		}
		c.Skip(n)
		*off += n
	}
	return nil
}

// overwriteV is overwrite for n bytes in several buffers.
func (im *Image) overwriteV(bufs [][]byte, n, off, host int64) error {
	if !im.lay.DataFile {
		if err := im.meta.Guard(format.HostOff(host), n); err != nil {
			return fmt.Errorf("writing guest offset %#x: %w", off, err)
		}
	}
	return im.writeHostV(bufs, off, host)
}

// TryWriteVAt is TryWriteAt for buffers that follow each other.
func (im *Image) TryWriteVAt(bufs [][]byte, off int64) error { return im.tryWriteV(bufs, off, true) }

// TryOverwriteVAt is TryOverwriteAt for buffers that follow each other.
func (im *Image) TryOverwriteVAt(bufs [][]byte, off int64) error {
	return im.tryWriteV(bufs, off, false)
}

// place is where bytes of a request lie on the host.
type place struct{ n, host int64 }

// maxTryPlaces bounds how many places a write may have that is done without waiting.
const maxTryPlaces = 32

// tryWriteV writes to one place on the host or to several, all of which are known before the first is written, or to a cluster
// that holds nothing yet.
func (im *Image) tryWriteV(bufs [][]byte, off int64, mayAllocate bool) error {
	n := block.LenV(bufs)
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	t, ok := im.tryEnter()
	if !ok {
		return block.ErrWouldBlock
	}
	defer im.meta.Epochs.Exit(t)
	if err := im.checkWrite(off, n); err != nil {
		return err
	}
	if !im.meta.GuardReady() || !block.WholeSectors(bufs, off) || im.crypt != nil && !wholeSectors(off, int(n)) || im.longCrypt(n) {
		return block.ErrWouldBlock
	}
	var room [maxTryPlaces]place
	places, err := im.placesOf(room[:0], off, n)
	if err != nil || !im.bm.ready() || im.outstanding() {
		return block.ErrWouldBlock
	}
	switch {
	case places != nil:
		im.mark(span{off, n})
		err = im.overwritePlaces(bufs, off, places)
	case mayAllocate && n > 0:
		if err = im.tryAllocateV(bufs, n, off); err == nil && im.outstanding() {
			return block.ErrWouldBlock // the full request does it again, and makes sure that it survives
		}
	default:
		return block.ErrWouldBlock
	}
	if ownCorruption(err) != nil {
		return block.ErrWouldBlock // the full request meets it, too, and sees to it
	}
	return err
}

// placesOf appends where [off, off+n) lies, if all of it can be overwritten in place; otherwise it returns nil.
func (im *Image) placesOf(places []place, off, n int64) ([]place, error) {
	for n > 0 {
		run, in, err := im.lookup(off, n, false)
		if err != nil {
			return nil, err
		}
		k := im.runBytes64(run, in, n)
		if im.inPlacePrefix(run, in, k) != k {
			return nil, nil
		}
		host := int64(run.Entry.HostOffset()) + in
		switch last := len(places) - 1; {
		case last >= 0 && places[last].host+places[last].n == host:
			places[last].n += k
		case len(places) == cap(places):
			return nil, block.ErrWouldBlock
		default:
			places = append(places, place{k, host})
		}
		off, n = off+k, n-k
	}
	return places, nil
}

func (im *Image) overwritePlaces(bufs [][]byte, off int64, places []place) error {
	c := block.NewCursor(bufs)
	defer c.Close()
	for _, at := range places {
		if err := im.overwriteV(c.Next(at.n), at.n, off, at.host); err != nil {
			return err
		}
		off += at.n
	}
	return nil
}
