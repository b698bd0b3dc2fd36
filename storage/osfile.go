package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"syscall"
)

// ErrFileType is returned for a name that is neither a regular file nor (where supported) a block device. Such a file
// is refused without waiting and, unless it changes into one that very instant, without being opened.
var ErrFileType = errors.New("not a regular file or block device")

// OpenOptions say how a host file is opened.
type OpenOptions struct {
	// ReadOnly opens without the right to change anything.
	ReadOnly bool
	// Direct bypasses the page cache (O_DIRECT). Any offset, length and buffer may still be used; what is not aligned
	// to Info.Align goes through a bounce buffer. ErrNotSupported where the platform or the file system cannot.
	Direct bool
	// WriteBehind has the host begin to write to the disk what it was given while more is written, so that a Sync at the end
	// waits for little. What is durable when does not change. Hosts that cannot do that ignore it.
	WriteBehind bool
	// NoLock makes Lock do nothing (QEMU's locking=off).
	NoLock bool
	// Exclusive makes CreateFile refuse a file that is there already.
	Exclusive bool
	// Mode is the permission bits of a file that CreateFile makes, before the umask; 0 means 0644.
	Mode fs.FileMode
}

func (o OpenOptions) mode() fs.FileMode {
	if o.Mode == 0 {
		return 0o644
	}
	return o.Mode.Perm()
}

// checkRange refuses offsets and lengths that no file can have, so that no sum of them overflows below.
func checkRange(off, n int64) error {
	if off < 0 || n < 0 || off > math.MaxInt64-n {
		return syscall.EINVAL
	}
	return nil
}

// totalLen adds up the buffers of a vectored call.
func totalLen(bufs [][]byte) int64 {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// opError says what was being done where.
func opError(doing, name string, off int64, err error) error {
	return fmt.Errorf("%s %s at %d: %w", doing, name, off, err)
}

// fileError is opError for calls without an offset.
func fileError(doing, name string, err error) error {
	return fmt.Errorf("%s %s: %w", doing, name, err)
}
