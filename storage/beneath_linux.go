package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// openBeneathTries bounds how often a lookup is repeated when the directories it passes are being renamed (EAGAIN).
const openBeneathTries = 64

// OpenBeneath opens rel, a path relative to the directory root, and fails if it leads out of root, be it by "..", by an
// absolute name or by a symbolic link anywhere on the way. The kernel checks the very lookup that opens the file, so
// nothing can be exchanged between a check and the open.
func OpenBeneath(root, rel string, o OpenOptions) (*OSFile, error) {
	name := filepath.Join(root, rel)
	fd, err := openat2Beneath(root, rel, o)
	if err == unix.ENOSYS || err == unix.EPERM {
		// An old kernel, or a sandbox that knows no openat2 (it answers EPERM).
		fd, err = openRootBeneath(root, rel, o)
	}
	if err == unix.EXDEV {
		err = fmt.Errorf("the name leads out of the directory: %w", err)
	}
	if err != nil {
		return nil, fileError("opening", name, err)
	}
	return newOSFile(fd, name, o)
}

func openat2Beneath(root, rel string, o OpenOptions) (int, error) {
	dir, err := openRetry(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(dir)
	// Look before opening: opening some devices does something by itself. newOSFile checks what was opened again.
	fd, err := openat2Retry(dir, rel, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	err = retryEINTR(func() error { return unix.Fstat(fd, &st) })
	if err == nil {
		err = checkMode(st.Mode)
	}
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return -1, err
	}
	return openat2Retry(dir, rel, openSafely|accessMode(o))
}

func openat2Retry(dir int, rel string, flags int) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	for try := 1; ; try++ {
		fd, err := unix.Openat2(dir, rel, &how)
		if err == unix.EINTR || (err == unix.EAGAIN && try < openBeneathTries) {
			continue
		}
		return fd, err
	}
}

// openRootBeneath does the same by walking the path one name at a time, as os.Root does.
func openRootBeneath(root, rel string, o OpenOptions) (int, error) {
	dir, err := os.OpenRoot(root)
	if err != nil {
		return -1, err
	}
	defer dir.Close()
	info, err := dir.Stat(rel)
	if err != nil {
		return -1, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		if err := checkMode(st.Mode); err != nil {
			return -1, err
		}
	}
	f, err := dir.OpenFile(rel, accessMode(o)|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return -1, err
	}
	defer f.Close()
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}
