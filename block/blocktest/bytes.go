package blocktest

import (
	"context"

	"github.com/droverproject/drover/block"
)

// bytesDevice is a read-only device over bytes.
type bytesDevice struct{ b []byte }

// NewBytes returns a read-only device of the given content, to stand below others in tests.
func NewBytes(b []byte) block.Device { return bytesDevice{b} }

func (d bytesDevice) Size() int64 { return int64(len(d.b)) }
func (d bytesDevice) Info() block.Info {
	return block.Info{Format: "raw", Name: "base.raw", ReadOnly: true, MinAlign: 1}
}
func (d bytesDevice) ReadAt(_ context.Context, p []byte, off int64) error { return d.TryReadAt(p, off) }
func (d bytesDevice) TryReadAt(p []byte, off int64) error {
	if err := block.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return err
	}
	copy(p, d.b[off:])
	return nil
}
func (d bytesDevice) TryWriteAt([]byte, int64) error { return block.ErrReadOnly }
func (d bytesDevice) WriteAt(context.Context, []byte, int64, block.WriteFlags) error {
	return block.ErrReadOnly
}
func (d bytesDevice) WriteZeroes(context.Context, int64, int64, block.ZeroFlags) error {
	return block.ErrReadOnly
}
func (d bytesDevice) Discard(context.Context, int64, int64) error { return block.ErrReadOnly }
func (d bytesDevice) Flush(context.Context) error                 { return nil }
func (d bytesDevice) Close() error                                { return nil }
func (d bytesDevice) Extents(_ context.Context, off, n int64, fn func(block.Extent) bool) error {
	fn(block.Extent{Off: off, Len: n, Allocated: true, Data: true, HasHost: true, Host: off, File: "base.raw"})
	return nil
}
