package image

import (
	"context"

	"github.com/droverproject/drover/block"
)

// Window is a part of a disk, read-only, as a disk of its own. Closing it leaves the whole disk open.
func Window(dev block.Device, off, n int64) (block.Device, error) {
	if err := block.CheckRange(off, n, dev.Size()); err != nil {
		return nil, err
	}
	return &window{dev, off, n}, nil
}

type window struct {
	dev    block.Device
	off, n int64
}

func (w *window) Size() int64 { return w.n }

func (w *window) Info() block.Info {
	info := w.dev.Info()
	info.ReadOnly = true
	return info
}

func (w *window) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := block.CheckRange(off, int64(len(p)), w.n); err != nil {
		return err
	}
	return w.dev.ReadAt(ctx, p, w.off+off)
}

func (w *window) WriteAt(context.Context, []byte, int64, block.WriteFlags) error {
	return block.ErrReadOnly
}

func (w *window) WriteZeroes(context.Context, int64, int64, block.ZeroFlags) error {
	return block.ErrReadOnly
}

func (w *window) Discard(context.Context, int64, int64) error { return block.ErrReadOnly }

func (w *window) Flush(ctx context.Context) error { return w.dev.Flush(ctx) }

func (w *window) Extents(ctx context.Context, off, n int64, fn func(block.Extent) bool) error {
	if err := block.CheckRange(off, n, w.n); err != nil {
		return err
	}
	return w.dev.Extents(ctx, w.off+off, n, func(e block.Extent) bool {
		e.Off -= w.off
		return fn(e)
	})
}

func (w *window) Close() error { return nil }
