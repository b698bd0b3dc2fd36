package block

import (
	"context"
	"slices"
)

// ReadVAt implements VectorDevice: ReadV serves whatever device is below.
func (d *moded) ReadVAt(ctx context.Context, bufs [][]byte, off int64) error {
	return ReadV(ctx, d.Device, bufs, off)
}

// WriteVAt implements VectorDevice.
func (d *moded) WriteVAt(ctx context.Context, bufs [][]byte, off int64, flags WriteFlags) error {
	if d.detects(bufs) {
		return d.writeDetected(ctx, off, LenV(bufs), flags)
	}
	return WriteV(ctx, d.Device, bufs, off, d.flags(flags))
}

// detects reports whether a write is to become a zeroing.
func (d *moded) detects(bufs [][]byte) bool {
	if d.mode.DetectZeroes == DetectOff || LenV(bufs) == 0 {
		return false
	}
	return !slices.ContainsFunc(bufs, func(b []byte) bool { return len(b) > 0 && !isZero(b) })
}

// TryReadVAt implements TryVectorDevice.
func (d *moded) TryReadVAt(bufs [][]byte, off int64) error { return TryReadV(d.Device, bufs, off) }

// TryWriteVAt implements TryVectorDevice.
func (d *moded) TryWriteVAt(bufs [][]byte, off int64) error {
	if d.durable(false) || d.detects(bufs) {
		return ErrWouldBlock
	}
	return TryWriteV(d.Device, bufs, off)
}

// TryOverwriteAt implements OverwriteDevice, for a device below that is one or changes nothing but data.
func (d *moded) TryOverwriteAt(p []byte, off int64) error {
	one := [1][]byte{p}
	return d.TryOverwriteVAt(one[:], off)
}

// TryOverwriteVAt implements OverwriteVectorDevice.
func (d *moded) TryOverwriteVAt(bufs [][]byte, off int64) error {
	if d.durable(false) || d.detects(bufs) {
		return ErrWouldBlock
	}
	return TryOverwriteV(d.Device, bufs, off)
}
