package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/droverproject/drover/block"
)

// ErrNoVMState is wrapped by WriteVMState for an image that has no place for the state of a machine.
var ErrNoVMState = errors.New("image cannot hold the state of a machine")

// errShortL1: the L1 table ends before what is to be written.
var errShortL1 = errors.New("L1 table is too short")

// VMStateOffset is where, behind the end of the disk, the part of the mapping begins that holds the state of a machine: the
// first guest offset of the first L2 table that maps nothing of the disk.
func (im *Image) VMStateOffset() int64 {
	perTable := im.lay.L2Coverage()
	return (im.Size() + perTable - 1) / perTable * perTable
}

// stateSpan is where a part of the state lies in the mapping.
func (im *Image) stateSpan(off, n int64) (span, error) {
	base := im.VMStateOffset()
	if off < 0 || n < 0 || off > math.MaxInt64-base || n > math.MaxInt64-base-off {
		return span{}, fmt.Errorf("machine state at %d, %d bytes: %w", off, n, block.ErrOutOfRange)
	}
	return span{base + off, n}, nil
}

// mapped is how many guest offsets the L1 table reaches. The caller is in a request.
func (im *Image) mapped() int64 {
	if reach := uint64(im.hdr.L1Size) * uint64(im.lay.L2Coverage()); reach < math.MaxInt64 {
		return int64(reach)
	}
	return math.MaxInt64
}

// ReadVMState fills p from the state of a machine at off. What was never written reads as zeroes.
func (im *Image) ReadVMState(ctx context.Context, p []byte, off int64) error {
	t, err := im.enter()
	if err != nil {
		return err
	}
	defer im.meta.Epochs.Exit(t)
	s, err := im.stateSpan(off, int64(len(p)))
	if err != nil {
		return err
	}
	if err := im.stateApart(); err != nil {
		return err
	}
	n := max(min(s.n, im.mapped()-s.off), 0)
	clear(p[n:])
	return im.read(ctx, p[:n], s.off)
}

// WriteVMState writes p to the state of a machine at off. It lies behind the end of the disk, is nothing that the disk's
// readers or its dirty bitmaps see, and lasts until the disk gets another size. A snapshot that is created keeps it.
func (im *Image) WriteVMState(ctx context.Context, p []byte, off int64) error {
	if im.readOnly {
		return block.ErrReadOnly
	}
	for len(p) > 0 {
		n, err := im.writeState(ctx, p, off)
		if errors.Is(err, errShortL1) {
			err = im.growForState(ctx, off+int64(len(p)))
		}
		if err != nil {
			return fmt.Errorf("writing machine state: %w", err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// writeState writes as much of p as one request does. Nothing changes the size of the disk while it runs.
func (im *Image) writeState(ctx context.Context, p []byte, off int64) (done int, err error) {
	var at span
	check := func() error {
		if err := im.checkWrite(0, 0); err != nil {
			return err
		}
		if im.lay.DataFile {
			return fmt.Errorf("%w: its data lies in another file, which ends with the disk", ErrNoVMState)
		}
		if at, err = im.stateSpan(off, int64(len(p))); err != nil {
			return err
		}
		if at.end() > im.mapped() {
			return errShortL1
		}
		return im.stateApart()
	}
	err = im.changeChecked(ctx, check, func() error {
		k, err := im.write(ctx, p[done:], at.off+int64(done))
		done += k
		return err
	})
	return done, err
}

// stateApart refuses to mistake what a longer backing file holds for the state of a machine.
func (im *Image) stateApart() error {
	if im.backing != nil && im.backing.Size() > im.VMStateOffset() {
		return fmt.Errorf("%w: the backing file reaches to where it would lie", ErrNoVMState)
	}
	return nil
}

// growForState makes the L1 table reach the end of the state.
func (im *Image) growForState(ctx context.Context, end int64) error {
	return im.exclusive(ctx, func() error {
		s, err := im.stateSpan(0, end)
		if err != nil {
			return err
		}
		if err := im.meta.MarkDirtyGated(); err != nil {
			return err
		}
		return im.finish(im.growL1(s.end()))
	})
}
