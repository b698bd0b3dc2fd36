package block

import "context"

// Part is the part of dev that begins at off and has n bytes, as a device of its own. Closing it closes dev.
func Part(dev Device, off, n int64) (Device, error) {
	if err := CheckRange(off, n, dev.Size()); err != nil {
		return nil, err
	}
	try, _ := dev.(TryDevice)
	return &part{dev: dev, try: try, off: off, n: n}, nil
}

type part struct {
	dev    Device
	try    TryDevice // nil if dev has no such methods
	off, n int64
}

func (d *part) Size() int64  { return d.n }
func (d *part) Info() Info   { return d.dev.Info() }
func (d *part) Close() error { return d.dev.Close() }

func (d *part) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	return d.dev.ReadAt(ctx, p, d.off+off)
}

func (d *part) WriteAt(ctx context.Context, p []byte, off int64, flags WriteFlags) error {
	if err := CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	return d.dev.WriteAt(ctx, p, d.off+off, flags)
}

func (d *part) WriteZeroes(ctx context.Context, off, n int64, flags ZeroFlags) error {
	if err := CheckRange(off, n, d.n); err != nil {
		return err
	}
	return d.dev.WriteZeroes(ctx, d.off+off, n, flags)
}

func (d *part) Discard(ctx context.Context, off, n int64) error {
	if err := CheckRange(off, n, d.n); err != nil {
		return err
	}
	return d.dev.Discard(ctx, d.off+off, n)
}

func (d *part) Flush(ctx context.Context) error { return d.dev.Flush(ctx) }

func (d *part) Extents(ctx context.Context, off, n int64, fn func(Extent) bool) error {
	if err := CheckRange(off, n, d.n); err != nil {
		return err
	}
	return d.dev.Extents(ctx, d.off+off, n, func(e Extent) bool {
		e.Off -= d.off
		return fn(e)
	})
}

func (d *part) TryReadAt(p []byte, off int64) error {
	if d.try == nil {
		return ErrWouldBlock
	}
	if err := CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	return d.try.TryReadAt(p, d.off+off)
}

func (d *part) TryReadDataAt(p []byte, off int64) error {
	below, ok := d.try.(DataDevice)
	if !ok {
		return ErrWouldBlock
	}
	if err := CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	return below.TryReadDataAt(p, d.off+off)
}

func (d *part) TryWriteAt(p []byte, off int64) error {
	if d.try == nil {
		return ErrWouldBlock
	}
	if err := CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	return d.try.TryWriteAt(p, d.off+off)
}

// ReadVAt implements VectorDevice: ReadV serves whatever device is behind.
func (d *part) ReadVAt(ctx context.Context, bufs [][]byte, off int64) error {
	if err := CheckRange(off, LenV(bufs), d.n); err != nil {
		return err
	}
	return ReadV(ctx, d.dev, bufs, d.off+off)
}

// WriteVAt implements VectorDevice.
func (d *part) WriteVAt(ctx context.Context, bufs [][]byte, off int64, flags WriteFlags) error {
	if err := CheckRange(off, LenV(bufs), d.n); err != nil {
		return err
	}
	return WriteV(ctx, d.dev, bufs, d.off+off, flags)
}

// TryReadVAt implements TryVectorDevice.
func (d *part) TryReadVAt(bufs [][]byte, off int64) error {
	if err := CheckRange(off, LenV(bufs), d.n); err != nil {
		return err
	}
	return TryReadV(d.dev, bufs, d.off+off)
}

// TryWriteVAt implements TryVectorDevice.
func (d *part) TryWriteVAt(bufs [][]byte, off int64) error {
	if err := CheckRange(off, LenV(bufs), d.n); err != nil {
		return err
	}
	return TryWriteV(d.dev, bufs, d.off+off)
}

// TryOverwriteAt implements OverwriteDevice, for a device behind that is one or changes nothing but data.
func (d *part) TryOverwriteAt(p []byte, off int64) error {
	one := [1][]byte{p}
	return d.TryOverwriteVAt(one[:], off)
}

// TryOverwriteVAt implements OverwriteVectorDevice.
func (d *part) TryOverwriteVAt(bufs [][]byte, off int64) error {
	if err := CheckRange(off, LenV(bufs), d.n); err != nil {
		return err
	}
	return TryOverwriteV(d.dev, bufs, d.off+off)
}
