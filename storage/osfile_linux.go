package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OSFile is a regular file or block device of the host, used by its descriptor and positional system calls only.
type OSFile struct {
	fd       int
	name     string
	readOnly bool
	device   bool
	direct   *directIO // nil for a buffered file
	locks    lockState
	behind   *writeBehind // nil: the host decides when it writes

	closed   atomic.Bool
	noNowait atomic.Bool // the kernel or the file system does not know RWF_NOWAIT
}

var (
	_ File         = (*OSFile)(nil)
	_ NowaitReader = (*OSFile)(nil)
	_ RawFile      = (*OSFile)(nil)
)

// openSafely are the flags of every open: nothing is inherited by child processes, no FIFO is waited for, no terminal
// becomes ours.
const openSafely = unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_LARGEFILE

// OpenFile opens an existing regular file or block device. It takes no lock: call Lock before trusting what is read.
func OpenFile(path string, o OpenOptions) (*OSFile, error) {
	fd, err := openChecked(path, o)
	if err != nil {
		return nil, fileError("opening", path, err)
	}
	return newOSFile(fd, path, o)
}

// CreateFile opens a file for writing, making it if needed, and empties it. The file comes back locked with LockWrite:
// the lock is taken before the content is thrown away, so that an image in use is never truncated. A block device is
// opened and locked, and keeps its content.
func CreateFile(path string, o OpenOptions) (*OSFile, error) {
	f, err := createFile(path, o)
	if err != nil {
		return nil, fileError("creating", path, err)
	}
	return f, nil
}

func createFile(path string, o OpenOptions) (*OSFile, error) {
	if o.ReadOnly {
		return nil, ErrReadOnly
	}
	flags := openSafely | unix.O_RDWR | unix.O_CREAT
	if o.Exclusive {
		flags |= unix.O_EXCL
	} else if err := checkType(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	fd, err := openRetry(path, flags, uint32(o.mode()))
	if err != nil {
		return nil, err
	}
	f, err := newOSFile(fd, path, o)
	if err != nil {
		return nil, err
	}
	if err := f.emptyLocked(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// emptyLocked takes the writer's lock and then, only then, drops the content.
func (f *OSFile) emptyLocked() error {
	if err := f.Lock(LockWrite); err != nil {
		return err
	}
	if f.device {
		return nil
	}
	return f.Truncate(0)
}

// openChecked opens path after looking at what it is: opening some devices does something by itself.
func openChecked(path string, o OpenOptions) (int, error) {
	if err := checkType(path); err != nil {
		return -1, err
	}
	return openRetry(path, openSafely|accessMode(o), 0)
}

func accessMode(o OpenOptions) int {
	if o.ReadOnly {
		return unix.O_RDONLY
	}
	return unix.O_RDWR
}

func openRetry(path string, flags int, mode uint32) (fd int, err error) {
	err = retryEINTR(func() error {
		fd, err = unix.Open(path, flags, mode)
		return err
	})
	return fd, err
}

func checkType(path string) error {
	var st unix.Stat_t
	if err := retryEINTR(func() error { return unix.Stat(path, &st) }); err != nil {
		return err
	}
	return checkMode(st.Mode)
}

func checkMode(mode uint32) error {
	kind := ""
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		kind = "a directory"
	case unix.S_IFIFO:
		kind = "a FIFO"
	case unix.S_IFCHR:
		kind = "a character device"
	case unix.S_IFSOCK:
		kind = "a socket"
	default:
		kind = fmt.Sprintf("of type %#o", mode&unix.S_IFMT)
	}
	return fmt.Errorf("%w (it is %s)", ErrFileType, kind)
}

// newOSFile makes an OSFile of a descriptor opened with openSafely, and owns the descriptor from then on.
func newOSFile(fd int, name string, o OpenOptions) (*OSFile, error) {
	f := &OSFile{fd: fd, name: name, readOnly: o.ReadOnly}
	f.locks.off = o.NoLock
	if err := f.setUp(o); err != nil {
		return nil, errors.Join(fileError("opening", name, err), unix.Close(fd))
	}
	return f, nil
}

func (f *OSFile) setUp(o OpenOptions) error {
	var st unix.Stat_t
	if err := retryEINTR(func() error { return unix.Fstat(f.fd, &st) }); err != nil {
		return err
	}
	if err := checkMode(st.Mode); err != nil {
		return err
	}
	f.device = st.Mode&unix.S_IFMT == unix.S_IFBLK
	if o.WriteBehind && !o.ReadOnly && !o.Direct {
		f.behind = new(writeBehind)
	}
	if o.Direct {
		f.direct = newDirectIO(f.fd, f.device)
		if f.direct == nil {
			return fmt.Errorf("O_DIRECT: %w", ErrNotSupported)
		}
	}
	flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	flags &^= unix.O_NONBLOCK
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(uintptr(f.fd), unix.F_SETFL, flags)
	if o.Direct && err == unix.EINVAL {
		return fmt.Errorf("O_DIRECT: %w", ErrNotSupported)
	}
	return err
}

// begin refuses calls on a closed file, whose descriptor number may be another file's by now, and ranges that no file
// has.
func (f *OSFile) begin(doing string, off, n int64) error {
	if f.closed.Load() {
		return fileError(doing, f.name, fs.ErrClosed)
	}
	if err := checkRange(off, n); err != nil {
		return opError(doing, f.name, off, err)
	}
	return nil
}

// beginChange is begin for calls that change the file.
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
	var n int
	var err error
	if f.direct == nil {
		n, err = preadFull(f.fd, p, off, 1)
	} else {
		one := [1][]byte{p}
		n, err = f.direct.read(one[:], off)
	}
	return f.readDone(n, off, err)
}

// ReadVAt reads one contiguous range into the buffers.
func (f *OSFile) ReadVAt(bufs [][]byte, off int64) (int, error) {
	if err := f.begin("reading", off, totalLen(bufs)); err != nil {
		return 0, err
	}
	var n int
	var err error
	if f.direct == nil {
		n, err = vectorFull(f.fd, unix.SYS_PREADV, bufs, off, 1)
	} else {
		n, err = f.direct.read(bufs, off)
	}
	return f.readDone(n, off, err)
}

func (f *OSFile) readDone(n int, off int64, err error) (int, error) {
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, opError("reading", f.name, off+int64(n), err)
}

// ReadAtNowait reads what the page cache holds, and nothing else.
func (f *OSFile) ReadAtNowait(p []byte, off int64) (int, error) {
	if err := f.begin("reading", off, int64(len(p))); err != nil {
		return 0, err
	}
	// A direct read asks the disk even with RWF_NOWAIT.
	if f.direct != nil || f.noNowait.Load() {
		return 0, ErrWouldBlock
	}
	for n := 0; n < len(p); {
		m, errno := preadNowait(f.fd, p[n:], off+int64(n))
		m, err := f.nowaitAnswer(m, errno, off+int64(n))
		if err != nil {
			return n, err
		}
		n += m // short: the next bytes are not cached, or the file ends; asking again tells which
	}
	return len(p), nil
}

// nowaitAnswer returns how much a read at off with RWF_NOWAIT has brought, which is nothing when it has to be asked again.
func (f *OSFile) nowaitAnswer(m int, errno unix.Errno, off int64) (int, error) {
	switch {
	case errno == unix.EINTR:
		return 0, nil
	case errno == unix.EAGAIN:
		return 0, ErrWouldBlock
	case errno == unix.EOPNOTSUPP || errno == unix.ENOSYS || errno == unix.EINVAL:
		f.noNowait.Store(true)
		return 0, ErrWouldBlock
	case errno != 0:
		return 0, opError("reading", f.name, off, errno)
	case m == 0:
		return 0, io.EOF
	}
	return m, nil
}

// WriteAt implements io.WriterAt.
func (f *OSFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.beginChange("writing", off, int64(len(p))); err != nil {
		return 0, err
	}
	var n int
	var err error
	if f.direct == nil {
		n, err = pwriteFull(f.fd, p, off, 1)
	} else {
		one := [1][]byte{p}
		n, err = f.direct.write(one[:], off)
	}
	return f.writeDone(n, off, err)
}

// WriteVAt writes the buffers to one contiguous range with as few system calls as the host allows.
func (f *OSFile) WriteVAt(bufs [][]byte, off int64) (int, error) {
	if err := f.beginChange("writing", off, totalLen(bufs)); err != nil {
		return 0, err
	}
	var n int
	var err error
	if f.direct == nil {
		n, err = vectorFull(f.fd, unix.SYS_PWRITEV, bufs, off, 1)
	} else {
		n, err = f.direct.write(bufs, off)
	}
	return f.writeDone(n, off, err)
}

func (f *OSFile) writeDone(n int, off int64, err error) (int, error) {
	if err == nil {
		f.behind.wrote(f.fd, n)
		return n, nil
	}
	return n, opError("writing", f.name, off+int64(n), err)
}

// Sync is fdatasync.
func (f *OSFile) Sync() error {
	if err := f.begin("syncing", 0, 0); err != nil {
		return err
	}
	if f.readOnly {
		return nil
	}
	if err := retryEINTR(func() error { return unix.Fdatasync(f.fd) }); err != nil {
		return fileError("syncing", f.name, err)
	}
	return nil
}

// Size returns the length of the file or device.
func (f *OSFile) Size() (int64, error) {
	if err := f.begin("measuring", 0, 0); err != nil {
		return 0, err
	}
	size, err := f.size()
	if err != nil {
		return 0, fileError("measuring", f.name, err)
	}
	return size, nil
}

func (f *OSFile) size() (int64, error) {
	if f.direct != nil {
		return f.direct.size()
	}
	return fdSize(f.fd, f.device)
}

// fdSize asks the kernel each time: another user may have resized the file.
func fdSize(fd int, device bool) (int64, error) {
	if device {
		return unix.Seek(fd, 0, unix.SEEK_END) // exact for block devices, and nobody here uses the position
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Size, nil
}

// Truncate sets the length. A device has but one.
func (f *OSFile) Truncate(size int64) error {
	if err := f.beginChange("truncating", size, 0); err != nil {
		return err
	}
	if f.device {
		return f.truncateDevice(size)
	}
	defer f.exclude(size, math.MaxInt64)()
	if err := retryEINTR(func() error { return unix.Ftruncate(f.fd, size) }); err != nil {
		return fileError(fmt.Sprintf("truncating to %d bytes", size), f.name, err)
	}
	return nil
}

func (f *OSFile) truncateDevice(size int64) error {
	now, err := f.size()
	if err != nil {
		return fileError("measuring", f.name, err)
	}
	if size != now {
		return fileError("truncating device", f.name, ErrNotSupported)
	}
	return nil
}

// exclude keeps the read-modify-write cycles of a direct file away from [start, end) until the returned function is
// called; a buffered file has none.
func (f *OSFile) exclude(start, end int64) func() {
	if f.direct == nil {
		return func() {}
	}
	return f.direct.exclude(start, end)
}

// PunchHole gives the space of the range back. On a block device this is the kernel's "zero and unmap, but never write
// zeroes out"; a plain BLKDISCARD would not promise zeroes.
func (f *OSFile) PunchHole(off, n int64) error {
	return f.fallocate("punching", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// ZeroRange zeroes the range without writing it. A file system without that operation but with holes (tmpfs) gets a
// hole that is then allocated again. For a device that has no such command the kernel writes the zeroes.
func (f *OSFile) ZeroRange(off, n int64) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE)
	if f.device {
		if err := f.beginGrow("zeroing", off, n); err != nil {
			return err
		}
		mode |= unix.FALLOC_FL_KEEP_SIZE // the only mode that a device has
	}
	err := f.fallocate("zeroing", mode, off, n)
	if !errors.Is(err, ErrNotSupported) || f.device {
		return err
	}
	if err := f.PunchHole(off, n); err != nil {
		return err
	}
	return f.Preallocate(off, n)
}

// Preallocate reserves space. A device has all it will ever have.
func (f *OSFile) Preallocate(off, n int64) error {
	if f.device {
		return f.beginGrow("preallocating", off, n)
	}
	return f.fallocate("preallocating", 0, off, n)
}

// beginGrow is beginChange for what may pass the end of a file: a device has no room there.
func (f *OSFile) beginGrow(doing string, off, n int64) error {
	if err := f.beginChange(doing, off, n); err != nil {
		return err
	}
	size, err := f.size()
	if err == nil && off+n > size {
		err = unix.ENOSPC
	}
	if err != nil {
		return opError(doing, f.name, off, err)
	}
	return nil
}

func (f *OSFile) fallocate(doing string, mode uint32, off, n int64) error {
	if err := f.beginChange(doing, off, n); err != nil || n == 0 {
		return err
	}
	defer f.exclude(off, off+n)()
	err := retryEINTR(func() error { return unix.Fallocate(f.fd, mode, off, n) })
	switch {
	case err == nil:
		return nil
	case err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.ENODEV || (f.device && err == unix.EINVAL):
		// A device also says EINVAL to what is not aligned to its sectors.
		return opError(doing, f.name, off, fmt.Errorf("%w (%w)", ErrNotSupported, err))
	default:
		return opError(doing, f.name, off, err)
	}
}

// NextExtent asks with SEEK_DATA and SEEK_HOLE.
func (f *OSFile) NextExtent(off int64) (end int64, data bool, err error) {
	if err := f.begin("mapping", off, 0); err != nil {
		return 0, false, err
	}
	size, err := f.size()
	if err != nil {
		return 0, false, fileError("measuring", f.name, err)
	}
	if off >= size {
		return 0, false, io.EOF
	}
	if f.device {
		return size, true, nil
	}
	end, data, err = seekExtent(f.fd, off, size)
	if err != nil {
		return 0, false, opError("mapping", f.name, off, err)
	}
	return end, data, nil
}

func seekExtent(fd int, off, size int64) (end int64, data bool, err error) {
	start, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		return size, false, nil // no data from off on
	case err == unix.EINVAL:
		return size, true, nil // the file system cannot tell
	case err != nil:
		return 0, false, err
	case start > off:
		return min(start, size), false, nil
	}
	end, err = unix.Seek(fd, off, unix.SEEK_HOLE)
	if err == unix.ENXIO || (err == nil && end <= off) {
		return size, true, nil // cut off or punched meanwhile; "data" is the answer that loses nothing
	}
	if err != nil {
		return 0, false, err
	}
	return min(end, size), true, nil
}

// Lock changes the locks as QEMU would; see lockState.
func (f *OSFile) Lock(mode LockMode) error {
	if err := f.begin("locking", 0, 0); err != nil {
		return err
	}
	return f.locks.change(f.fd, f.name, mode)
}

// Stat describes the file.
func (f *OSFile) Stat() Info {
	info := Info{Name: f.name, ReadOnly: f.readOnly, Device: f.device, Direct: f.direct != nil, Align: 1}
	if f.direct != nil {
		info.Align = int(f.direct.align)
	}
	var st unix.Stat_t
	if !f.device && !f.closed.Load() && unix.Fstat(f.fd, &st) == nil {
		info.Allocated = st.Blocks * 512
	}
	return info
}

// RawFD returns the descriptor of an open file.
func (f *OSFile) RawFD() (fd int, ok bool) { return f.fd, !f.closed.Load() }

// Close closes the descriptor, which drops the locks.
func (f *OSFile) Close() error {
	if f.closed.Swap(true) {
		return fileError("closing", f.name, fs.ErrClosed)
	}
	// Linux frees the descriptor even when close reports EINTR.
	if err := unix.Close(f.fd); err != nil && err != unix.EINTR {
		return fileError("closing", f.name, err)
	}
	return nil
}

// preadFull reads until p is full or the file ends. A read that stops inside a unit has met the end of the file: only
// there does a direct read return part of one, and to ask again from there would not be aligned.
func preadFull(fd int, p []byte, off int64, unit int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		n += m
		if m == 0 || (n < len(p) && int64(n)%unit != 0) {
			return n, io.EOF
		}
	}
	return n, nil
}

// pwriteFull writes all of p. After a short write it goes on from the last whole unit.
func pwriteFull(fd int, p []byte, off int64, unit int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pwrite(fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		if n+m < len(p) {
			m -= int(int64(m) % unit)
		}
		if m <= 0 {
			return n, io.ErrShortWrite
		}
		n += m
	}
	return n, nil
}

// preadNowait is preadv2 with RWF_NOWAIT for one buffer.
func preadNowait(fd int, p []byte, off int64) (int, unix.Errno) {
	iov := unix.Iovec{Base: unsafe.SliceData(p)}
	iov.SetLen(len(p))
	lo, hi := splitOffset(off)
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, lo, hi, unix.RWF_NOWAIT)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
