package block

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/droverproject/drover/storage"
)

// Resizer is implemented by devices whose disk can be made longer or shorter.
type Resizer interface {
	Resize(ctx context.Context, size int64) error
}

// NewDeviceFile makes the bytes of a disk those of a file, for a format inside another one. Its length is that of the disk.
func NewDeviceFile(dev Device) storage.File { return deviceFile{dev} }

type deviceFile struct{ dev Device }

// ReadAt implements storage.File.
func (f deviceFile) ReadAt(p []byte, off int64) (int, error) {
	return NewIO(context.Background(), f.dev).ReadAt(p, off)
}

// grow makes room for what ends at end.
func (f deviceFile) grow(end int64) error {
	if end <= f.dev.Size() {
		return nil
	}
	r, ok := As[Resizer](f.dev)
	if !ok {
		return fmt.Errorf("%q cannot grow to %d bytes: %w", f.dev.Info().Name, end, storage.ErrNotSupported)
	}
	return r.Resize(context.Background(), end)
}

// WriteAt implements storage.File.
func (f deviceFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.grow(off + int64(len(p))); err != nil {
		return 0, err
	}
	return NewIO(context.Background(), f.dev).WriteAt(p, off)
}

// ReadVAt implements storage.File.
func (f deviceFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	return eachBuffer(bufs, off, f.ReadAt)
}

// WriteVAt implements storage.File.
func (f deviceFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	return eachBuffer(bufs, off, f.WriteAt)
}

// eachBuffer does with each buffer in turn what fn does with one.
func eachBuffer(bufs [][]byte, off int64, fn func([]byte, int64) (int, error)) (int, error) {
	total := 0
	for _, b := range bufs {
		n, err := fn(b, off+int64(total))
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// Sync implements storage.File.
func (f deviceFile) Sync() error { return f.dev.Flush(context.Background()) }

// Size implements storage.File.
func (f deviceFile) Size() (int64, error) { return f.dev.Size(), nil }

// Truncate implements storage.File.
func (f deviceFile) Truncate(size int64) error {
	if size == f.dev.Size() {
		return nil
	}
	r, ok := As[Resizer](f.dev)
	if !ok {
		return storage.ErrNotSupported
	}
	return r.Resize(context.Background(), size)
}

// PunchHole implements storage.File.
func (f deviceFile) PunchHole(off, n int64) error {
	if n = min(n, f.dev.Size()-off); n <= 0 {
		return nil
	}
	return f.dev.WriteZeroes(context.Background(), off, n, ZeroUnmap)
}

// ZeroRange implements storage.File.
func (f deviceFile) ZeroRange(off, n int64) error {
	if err := f.grow(off + n); err != nil {
		return err
	}
	return f.dev.WriteZeroes(context.Background(), off, n, 0)
}

// Preallocate implements storage.File.
func (f deviceFile) Preallocate(off, n int64) error {
	if err := f.grow(off + n); err != nil {
		return err
	}
	return storage.ErrNotSupported
}

// NextExtent implements storage.File.
func (f deviceFile) NextExtent(off int64) (end int64, data bool, err error) {
	end, data, _, err = f.NextStatus(off)
	return end, data, err
}

// NextStatus implements StatusFile.
func (f deviceFile) NextStatus(off int64) (end int64, data, zero bool, err error) {
	size := f.dev.Size()
	if off >= size {
		return 0, false, false, io.EOF
	}
	err = errors.New("no extents")
	xerr := f.dev.Extents(context.Background(), off, size-off, func(e Extent) bool {
		end, data, zero, err = e.End(), e.Data || !e.Zero, e.Zero, nil
		return false
	})
	return end, data, zero, errors.Join(err, xerr)
}

// Lock implements storage.File: the files below are locked already.
func (deviceFile) Lock(storage.LockMode) error { return nil }

// Stat implements storage.File.
func (f deviceFile) Stat() storage.Info {
	info := f.dev.Info()
	return storage.Info{Name: info.Name, ReadOnly: info.ReadOnly, Align: 1, Allocated: -1}
}

// Close implements storage.File.
func (f deviceFile) Close() error { return f.dev.Close() }
