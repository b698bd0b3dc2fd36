package storage

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// copyStep bounds one system call, which cannot be interrupted.
const copyStep = 64 << 20

func copyRange(dst int, dstOff int64, src int, srcOff, n int64) error {
	for n > 0 {
		var done int
		err := retryEINTR(func() (err error) {
			from, to := srcOff, dstOff
			done, err = unix.CopyFileRange(src, &from, dst, &to, int(min(n, copyStep)), 0)
			return err
		})
		switch {
		case cannotCopy(err), err == nil && done == 0: // the source has ended
			return ErrNotSupported
		case err != nil:
			return fmt.Errorf("copying %d bytes to offset %d: %w", n, dstOff, err)
		}
		srcOff, dstOff, n = srcOff+int64(done), dstOff+int64(done), n-int64(done)
	}
	return nil
}

func cloneRange(dst int, dstOff int64, src int, srcOff, n int64) error {
	arg := unix.FileCloneRange{Src_fd: int64(src), Src_offset: uint64(srcOff), Src_length: uint64(n), Dest_offset: uint64(dstOff)}
	err := retryEINTR(func() error { return unix.IoctlFileCloneRange(dst, &arg) })
	if cannotCopy(err) {
		return ErrNotSupported
	}
	if err != nil {
		return fmt.Errorf("cloning %d bytes to offset %d: %w", n, dstOff, err)
	}
	return nil
}

// cannotCopy reports whether an error says that the kernel or the file systems do not copy between these files so.
func cannotCopy(err error) bool {
	for _, e := range []error{unix.ENOSYS, unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.EBADF, unix.EPERM, unix.ETXTBSY, unix.EISDIR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
