//go:build !linux

package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
)

// OSFile is a regular file of the host.
//
// Outside Linux it is plain and honest: positional reads and writes, truncation, and a sync that reaches the medium
// (F_FULLFSYNC on macOS, FlushFileBuffers on Windows). There are no holes, no direct I/O, no block devices, and no
// locks that QEMU would respect (QEMU takes none there either): Lock always succeeds and protects from nobody.
type OSFile struct {
	f        *os.File
	name     string
	readOnly bool
	closed   atomic.Bool
}

var _ File = (*OSFile)(nil)

// OpenFile opens an existing regular file.
func OpenFile(path string, o OpenOptions) (*OSFile, error) {
	if err := checkPath(path); err != nil {
		return nil, fileError("opening", path, err)
	}
	f, err := os.OpenFile(path, accessMode(o)|openSafely, 0)
	if err != nil {
		return nil, fileError("opening", path, err)
	}
	return newOSFile(f, path, o)
}

// CreateFile opens a file for writing, making it if needed, and empties it. There is no lock to take before.
func CreateFile(path string, o OpenOptions) (*OSFile, error) {
	if o.ReadOnly {
		return nil, fileError("creating", path, ErrReadOnly)
	}
	if err := checkPath(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fileError("creating", path, err)
	}
	flags := os.O_RDWR | os.O_CREATE | openSafely
	if o.Exclusive {
		flags |= os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, o.mode())
	if err != nil {
		return nil, fileError("creating", path, err)
	}
	file, err := newOSFile(f, path, o)
	if err != nil {
		return nil, err
	}
	if err := file.Truncate(0); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// OpenBeneath opens rel, a path relative to the directory root, and fails if it leads out of root, be it by "..", by an
// absolute name or by a symbolic link anywhere on the way.
func OpenBeneath(root, rel string, o OpenOptions) (*OSFile, error) {
	name := filepath.Join(root, rel)
	dir, err := os.OpenRoot(root)
	if err != nil {
		return nil, fileError("opening", name, err)
	}
	defer dir.Close()
	info, err := dir.Stat(rel)
	if err == nil {
		err = checkInfo(info)
	}
	if err != nil {
		return nil, fileError("opening", name, err)
	}
	f, err := dir.OpenFile(rel, accessMode(o)|openSafely, 0)
	if err != nil {
		return nil, fileError("opening", name, err)
	}
	return newOSFile(f, name, o)
}

func accessMode(o OpenOptions) int {
	if o.ReadOnly {
		return os.O_RDONLY
	}
	return os.O_RDWR
}

func checkPath(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return checkInfo(info)
}

func checkInfo(info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w (its mode is %v)", ErrFileType, info.Mode())
	}
	return nil
}

// newOSFile checks what was opened, and owns it from then on.
func newOSFile(f *os.File, name string, o OpenOptions) (*OSFile, error) {
	info, err := f.Stat()
	if err == nil {
		err = checkInfo(info)
	}
	if err == nil && o.Direct {
		err = fmt.Errorf("direct I/O: %w", ErrNotSupported)
	}
	if err != nil {
		return nil, errors.Join(fileError("opening", name, err), f.Close())
	}
	return &OSFile{f: f, name: name, readOnly: o.ReadOnly}, nil
}

func (f *OSFile) begin(doing string, off, n int64) error {
	if f.closed.Load() {
		return fileError(doing, f.name, fs.ErrClosed)
	}
	if err := checkRange(off, n); err != nil {
		return opError(doing, f.name, off, err)
	}
	return nil
}

func (f *OSFile) beginChange(doing string, off, n int64) error {
	if f.readOnly {
		return ErrReadOnly
	}
	return f.begin(doing, off, n)
}

// ReadAt implements io.ReaderAt.
func (f *OSFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.begin("reading", off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := f.f.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, opError("reading", f.name, off+int64(n), err)
	}
	return n, err
}

// WriteAt implements io.WriterAt.
func (f *OSFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.beginChange("writing", off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := f.f.WriteAt(p, off)
	if err != nil {
		return n, opError("writing", f.name, off+int64(n), err)
	}
	return n, nil
}

// ReadVAt reads buffer by buffer.
func (f *OSFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	return eachBuffer(f.ReadAt, bufs, off)
}

// WriteVAt writes buffer by buffer.
func (f *OSFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	if f.readOnly {
		return 0, ErrReadOnly
	}
	return eachBuffer(f.WriteAt, bufs, off)
}

func eachBuffer(move func([]byte, int64) (int, error), bufs [][]byte, off int64) (int, error) {
	if err := checkRange(off, totalLen(bufs)); err != nil {
		return 0, err
	}
	total := 0
	for _, b := range bufs {
		n, err := move(b, off+int64(total))
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// Sync makes the file durable, as far down as the host can be asked to.
func (f *OSFile) Sync() error {
	if err := f.begin("syncing", 0, 0); err != nil || f.readOnly {
		return err
	}
	if err := f.f.Sync(); err != nil {
		return fileError("syncing", f.name, err)
	}
	return nil
}

// Size returns the length of the file.
func (f *OSFile) Size() (int64, error) {
	if err := f.begin("measuring", 0, 0); err != nil {
		return 0, err
	}
	info, err := f.f.Stat()
	if err != nil {
		return 0, fileError("measuring", f.name, err)
	}
	return info.Size(), nil
}

// Truncate sets the length.
func (f *OSFile) Truncate(size int64) error {
	if err := f.beginChange("truncating", size, 0); err != nil {
		return err
	}
	if err := f.f.Truncate(size); err != nil {
		return fileError(fmt.Sprintf("truncating to %d bytes", size), f.name, err)
	}
	return nil
}

// PunchHole is not supported.
func (f *OSFile) PunchHole(off, n int64) error { return f.refuse("punching", off, n) }

// ZeroRange is not supported.
func (f *OSFile) ZeroRange(off, n int64) error { return f.refuse("zeroing", off, n) }

// Preallocate is not supported.
func (f *OSFile) Preallocate(off, n int64) error { return f.refuse("preallocating", off, n) }

func (f *OSFile) refuse(doing string, off, n int64) error {
	if err := f.beginChange(doing, off, n); err != nil {
		return err
	}
	return opError(doing, f.name, off, ErrNotSupported)
}

// NextExtent reports one run of data.
func (f *OSFile) NextExtent(off int64) (end int64, data bool, err error) {
	if err := f.begin("mapping", off, 0); err != nil {
		return 0, false, err
	}
	size, err := f.Size()
	if err != nil {
		return 0, false, err
	}
	if off >= size {
		return 0, false, io.EOF
	}
	return size, true, nil
}

// Lock does nothing; see OSFile.
func (f *OSFile) Lock(LockMode) error { return f.begin("locking", 0, 0) }

// Stat describes the file.
func (f *OSFile) Stat() Info { return Info{Name: f.name, ReadOnly: f.readOnly, Align: 1} }

// Close closes the file.
func (f *OSFile) Close() error {
	if f.closed.Swap(true) {
		return fileError("closing", f.name, fs.ErrClosed)
	}
	if err := f.f.Close(); err != nil {
		return fileError("closing", f.name, err)
	}
	return nil
}
