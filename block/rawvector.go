package block

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/droverproject/drover/storage"
)

var (
	_ VectorDevice    = (*Raw)(nil)
	_ TryVectorDevice = (*Raw)(nil)
)

// ReadVAt implements VectorDevice.
func (r *Raw) ReadVAt(_ context.Context, bufs [][]byte, off int64) error {
	if err := r.enter(off, LenV(bufs)); err != nil {
		return err
	}
	defer r.gate.leave()
	storage.Tell(r.file, storage.EventReadAIO)
	n, err := r.file.ReadVAt(bufs, r.o.Offset+off)
	return r.readV(bufs, off, n, err)
}

// TryReadVAt implements TryVectorDevice.
func (r *Raw) TryReadVAt(bufs [][]byte, off int64) error {
	if err := r.enter(off, LenV(bufs)); err != nil {
		return err
	}
	defer r.gate.leave()
	n, err := storage.ReadVNowait(r.file, bufs, r.o.Offset+off)
	if errors.Is(err, storage.ErrWouldBlock) {
		return ErrWouldBlock
	}
	return r.readV(bufs, off, n, err)
}

// readV ends a read that filled n bytes of the buffers. What lies past the end of the file reads as zeroes: see read.
func (r *Raw) readV(bufs [][]byte, off int64, n int, err error) error {
	if int64(n) == LenV(bufs) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		storage.ClearV(bufs, n)
		return nil
	}
	return fmt.Errorf("reading %q at offset %d: %w", r.o.Name, off, err)
}

// WriteVAt implements VectorDevice.
func (r *Raw) WriteVAt(ctx context.Context, bufs [][]byte, off int64, flags WriteFlags) error {
	if r.guards(off) { // it looks at what is written, in one piece
		return r.writeGuarded(ctx, bufs, off, flags)
	}
	if err := r.enterChange(off, LenV(bufs)); err != nil {
		return err
	}
	defer r.gate.leave()
	if err := r.writeV(bufs, off); err != nil {
		return err
	}
	if flags&WriteFUA != 0 {
		return r.sync()
	}
	return nil
}

// guards reports whether a change at off has to be shown to GuardFormat.
func (r *Raw) guards(off int64) bool { return r.o.GuardFormat != nil && off < storage.SectorSize }

// writeGuarded writes the first sector as one, and then the rest, so that nothing is written when the guard objects.
func (r *Raw) writeGuarded(ctx context.Context, bufs [][]byte, off int64, flags WriteFlags) error {
	n := LenV(bufs)
	if err := CheckRange(off, n, r.Size()); err != nil {
		return fmt.Errorf("%q: %d bytes at offset %d of a disk of %d: %w", r.o.Name, n, off, r.Size(), err)
	}
	p := make([]byte, min(n, storage.SectorSize-off))
	c := NewCursor(bufs)
	defer c.Close()
	c.take(p)
	if int64(len(p)) == n {
		return r.WriteAt(ctx, p, off, flags)
	}
	if err := r.WriteAt(ctx, p, off, 0); err != nil {
		return err
	}
	return r.WriteVAt(ctx, c.Next(c.Left()), off+int64(len(p)), flags)
}

// TryWriteVAt implements TryVectorDevice.
func (r *Raw) TryWriteVAt(bufs [][]byte, off int64) error {
	if r.stat.Direct || r.guards(off) {
		return ErrWouldBlock
	}
	if err := r.enterChange(off, LenV(bufs)); err != nil {
		return err
	}
	defer r.gate.leave()
	return r.writeV(bufs, off)
}

func (r *Raw) writeV(bufs [][]byte, off int64) error {
	if LenV(bufs) == 0 {
		return nil
	}
	storage.Tell(r.file, storage.EventWriteAIO)
	if err := storage.WriteVFull(r.file, bufs, r.o.Offset+off); err != nil {
		return fmt.Errorf("writing %q at offset %d: %w", r.o.Name, off, err)
	}
	return nil
}
