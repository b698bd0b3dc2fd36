package block

import (
	"bytes"
	"context"
)

// Wrapper is implemented by devices that stand before another one and show the same disk.
type Wrapper interface {
	Device
	// Unwrap returns the device behind.
	Unwrap() Device
}

// As returns dev, or the first device behind it, that is a T.
func As[T any](dev Device) (T, bool) {
	for dev != nil {
		if t, ok := dev.(T); ok {
			return t, true
		}
		w, ok := dev.(Wrapper)
		if !ok {
			break
		}
		dev = w.Unwrap()
	}
	var none T
	return none, false
}

// wrap gives a device the manner that its options ask for.
func (l *layer) wrap(dev Device, m manner) Device {
	if dev.Info().ReadOnly {
		return dev
	}
	if m.discard == "ignore" || m.discard == "" && l.o.IgnoreDiscard && l == l.top {
		dev = ignoreDiscard{dev}
	}
	if m.detectZeroes == "on" || m.detectZeroes == "unmap" {
		z := detectZeroes{Device: dev}
		if m.detectZeroes == "unmap" {
			z.flags = ZeroUnmap
		}
		dev = z
	}
	return dev
}

// ignoreDiscard is a device on which discards have no effect, nor does the wish to free the space of zeroes.
type ignoreDiscard struct{ Device }

// Unwrap implements Wrapper.
func (d ignoreDiscard) Unwrap() Device { return d.Device }

// Discard implements Device.
func (d ignoreDiscard) Discard(_ context.Context, off, n int64) error {
	return CheckRange(off, n, d.Size())
}

// WriteZeroes implements Device.
func (d ignoreDiscard) WriteZeroes(ctx context.Context, off, n int64, flags ZeroFlags) error {
	return d.Device.WriteZeroes(ctx, off, n, flags&^ZeroUnmap)
}

// detectZeroes is a device on which writing zeroes is zeroing.
type detectZeroes struct {
	Device
	flags ZeroFlags
}

// Unwrap implements Wrapper.
func (d detectZeroes) Unwrap() Device { return d.Device }

// WriteAt implements Device.
func (d detectZeroes) WriteAt(ctx context.Context, p []byte, off int64, flags WriteFlags) error {
	if len(p) == 0 || p[0] != 0 || !bytes.Equal(p[:len(p)-1], p[1:]) {
		return d.Device.WriteAt(ctx, p, off, flags)
	}
	zero := d.flags
	if flags&WriteFUA != 0 {
		zero |= ZeroFUA
	}
	return d.WriteZeroes(ctx, off, int64(len(p)), zero)
}
