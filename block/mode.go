package block

import (
	"bytes"
	"context"
	"sync/atomic"
)

// Detect says what becomes of writes that hold nothing but zeroes.
type Detect uint8

const (
	// DetectOff writes them as they are.
	DetectOff Detect = iota
	// DetectOn zeroes the range instead, and keeps its space.
	DetectOn
	// DetectUnmap zeroes the range and lets the device give its space back.
	DetectUnmap
)

// Mode is how a device is used. The zero value changes nothing.
type Mode struct {
	// Writethrough makes every change durable before it returns.
	Writethrough bool
	// NoFlush keeps nothing durable until the device is closed: whoever asks for it can make the disk anew.
	NoFlush bool
	// NoDiscard ignores discards, and zeroes without giving space back.
	NoDiscard bool
	// DetectZeroes is for writes of a whole request of zeroes.
	DetectZeroes Detect
}

// WithMode returns dev, used in a certain mode. Closing it closes dev.
func WithMode(dev Device, m Mode) Device {
	if m == (Mode{}) {
		return dev
	}
	try, _ := dev.(TryDevice)
	return &moded{Device: dev, try: try, mode: m}
}

// isZero reports whether p holds nothing but zeroes, and something at all: each of its bytes is the one before, and the
// first is zero.
func isZero(p []byte) bool { return len(p) > 0 && p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]) }

// moded is a device with a mode. What it does not change goes to the device below.
type moded struct {
	Device
	try    TryDevice // nil if the device has no such methods
	mode   Mode
	closed atomic.Bool
}

// Unwrap implements Wrapper.
func (d *moded) Unwrap() Device { return d.Device }

// durable says whether a change for which the caller asked for durability, or did not, has to be durable.
func (d *moded) durable(asked bool) bool {
	return !d.mode.NoFlush && (asked || d.mode.Writethrough)
}

func (d *moded) Info() Info {
	info := d.Device.Info()
	if d.mode.Writethrough && !d.mode.NoFlush {
		info.Volatile = false
	}
	return info
}

func (d *moded) WriteAt(ctx context.Context, p []byte, off int64, flags WriteFlags) error {
	if d.mode.DetectZeroes != DetectOff && isZero(p) {
		return d.writeDetected(ctx, off, int64(len(p)), flags)
	}
	return d.Device.WriteAt(ctx, p, off, d.flags(flags))
}

// flags returns with which flags the device below writes.
func (d *moded) flags(asked WriteFlags) WriteFlags {
	if d.durable(asked&WriteFUA != 0) {
		return asked | WriteFUA
	}
	return asked &^ WriteFUA
}

// writeDetected zeroes what a write of nothing but zeroes is for.
func (d *moded) writeDetected(ctx context.Context, off, n int64, flags WriteFlags) error {
	var zero ZeroFlags
	if d.mode.DetectZeroes == DetectUnmap && !d.mode.NoDiscard {
		zero |= ZeroUnmap
	}
	if d.durable(flags&WriteFUA != 0) {
		zero |= ZeroFUA
	}
	return d.Device.WriteZeroes(ctx, off, n, zero)
}

func (d *moded) WriteZeroes(ctx context.Context, off, n int64, flags ZeroFlags) error {
	fua := d.durable(flags&ZeroFUA != 0)
	flags &^= ZeroFUA
	if fua {
		flags |= ZeroFUA
	}
	if d.mode.NoDiscard {
		flags &^= ZeroUnmap
	}
	return d.Device.WriteZeroes(ctx, off, n, flags)
}

func (d *moded) Discard(ctx context.Context, off, n int64) error {
	if !d.mode.NoDiscard {
		if err := d.Device.Discard(ctx, off, n); err != nil || !d.durable(false) {
			return err
		}
		return d.Device.Flush(ctx)
	}
	if d.closed.Load() {
		return ErrClosed
	}
	if d.Info().ReadOnly {
		return ErrReadOnly
	}
	return CheckRange(off, n, d.Size())
}

func (d *moded) Flush(ctx context.Context) error {
	if !d.mode.NoFlush {
		return d.Device.Flush(ctx)
	}
	if d.closed.Load() {
		return ErrClosed
	}
	return nil
}

func (d *moded) Close() error {
	d.closed.Store(true)
	return d.Device.Close()
}

// WriteCompressed implements CompressedWriter where the device below does.
func (d *moded) WriteCompressed(ctx context.Context, p []byte, off int64) error {
	w, ok := d.Device.(CompressedWriter)
	if !ok {
		return ErrNoCompression
	}
	if err := w.WriteCompressed(ctx, p, off); err != nil || !d.durable(false) {
		return err
	}
	return d.Device.Flush(ctx)
}

// TryReadAt implements TryDevice.
func (d *moded) TryReadAt(p []byte, off int64) error {
	if d.try == nil {
		return ErrWouldBlock
	}
	return d.try.TryReadAt(p, off)
}

// TryReadDataAt implements DataDevice.
func (d *moded) TryReadDataAt(p []byte, off int64) error {
	below, ok := d.try.(DataDevice)
	if !ok {
		return ErrWouldBlock
	}
	return below.TryReadDataAt(p, off)
}

// TryWriteAt implements TryDevice.
func (d *moded) TryWriteAt(p []byte, off int64) error {
	if d.try == nil || d.durable(false) || d.mode.DetectZeroes != DetectOff && isZero(p) {
		return ErrWouldBlock
	}
	return d.try.TryWriteAt(p, off)
}
