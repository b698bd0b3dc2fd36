package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// maxShared bounds what a file that is there already may have grown to.
const maxShared = 1 << 30

// sharedFile is a file mapped as memory, and locked while it is.
type sharedFile struct {
	fd   int
	path string
	mem  []byte
	once sync.Once
	err  error
}

// OpenShared maps a file of at least n bytes as memory that outlives this process, if its folder is on a tmpfs: the folder and
// the file are made if they are not there, the file with zeroes. Without create, a file that is not there is an error that is
// os.ErrNotExist. It is locked: opening it twice is an error. Nobody but the user of this process may be able to change it.
func OpenShared(path string, n int64, create bool) (SharedMemory, error) {
	if create {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("making a folder for shared memory: %w", err)
		}
	}
	for {
		s, again, err := openShared(path, n, create)
		if !again {
			if err != nil {
				return nil, fmt.Errorf("opening shared memory %q: %w", path, err)
			}
			return s, nil
		}
	}
}

// openShared is one try. again: the file was removed by its last user before it could be locked.
func openShared(path string, n int64, create bool) (s *sharedFile, again bool, err error) {
	flags := unix.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	if create {
		flags |= unix.O_CREAT
	}
	fd, err := unix.Open(path, flags, 0o600)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if s == nil {
			_ = unix.Close(fd)
		}
	}()
	var st unix.Stat_t
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, false, fmt.Errorf("it is in use: %w", err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, false, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, false, errors.New("it is not a regular file")
	case st.Nlink == 0:
		return nil, true, nil
	case st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0:
		return nil, false, errors.New("another user can write to it")
	case st.Size > maxShared:
		return nil, false, fmt.Errorf("it has %d bytes", st.Size)
	}
	if st.Size < n {
		// All of it is there from now on: memory that cannot be had later would end the process.
		if err := unix.Fallocate(fd, 0, 0, n); err != nil {
			return nil, false, fmt.Errorf("reserving %d bytes: %w", n, err)
		}
		st.Size = n
	}
	mem, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, false, fmt.Errorf("mapping %d bytes: %w", st.Size, err)
	}
	return &sharedFile{fd: fd, path: path, mem: mem}, false, nil
}

// Bytes returns the memory.
func (s *sharedFile) Bytes() []byte { return s.mem }

// Close implements SharedMemory. What is needed no more is removed, or at least emptied.
func (s *sharedFile) Close(done bool) error {
	s.once.Do(func() {
		s.err = unix.Munmap(s.mem)
		s.mem = nil
		if done && unix.Unlink(s.path) != nil {
			s.err = errors.Join(s.err, unix.Ftruncate(s.fd, 0))
		}
		s.err = errors.Join(s.err, unix.Close(s.fd))
	})
	return s.err
}

// BootID returns what is another at every start of the host.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
