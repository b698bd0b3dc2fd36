package nbddev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Calls on a device itself (linux/nbd.h).
const (
	ioSetSocket     = 0xab00
	ioSetBlockSize  = 0xab01
	ioDo            = 0xab03
	ioClearSocket   = 0xab04
	ioClearQueue    = 0xab05
	ioSetBlockCount = 0xab07
	ioDisconnect    = 0xab08
	ioSetTimeout    = 0xab09
	ioSetFlags      = 0xab0a
)

var indexPattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^nbd([0-9]{1,6})$`) })

// IndexOf returns the index of the device that a name stands for: /dev/nbd5, or another name of that device. The device need
// not exist yet if its name tells.
func IndexOf(name string) (int, error) {
	base := filepath.Base(name)
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err == nil {
		if st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return 0, fmt.Errorf("%s is not a block device", name)
		}
		// The kernel's own name for it, in case this one is a link.
		link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
		if err == nil {
			base = filepath.Base(link)
		}
	}
	m := indexPattern().FindStringSubmatch(base)
	if m == nil {
		return 0, fmt.Errorf("%s is not an NBD device", name)
	}
	return strconv.Atoi(m[1])
}

// Old is a device that was connected by calls on itself.
type Old struct {
	file *os.File
	done chan error
}

// ConnectOld is Control.Connect for kernels without netlink in their NBD client: a call that ends with the connection. The
// device must exist.
func ConnectOld(name string, cfg Config, sockets []int) (*Old, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	o := &Old{file: f, done: make(chan error, 1)}
	if err := o.setUp(cfg, sockets); err != nil {
		return nil, errors.Join(fmt.Errorf("connecting %s: %w", name, err), o.clear(), f.Close())
	}
	go func() {
		// The kernel counts on the thread's staying what it is.
		runtime.LockOSThread()
		err := o.call(ioDo, 0)
		o.done <- errors.Join(err, o.clear(), f.Close())
	}()
	// Whoever opens the device next has the kernel look for partitions.
	if f, err := os.Open(name); err == nil {
		_ = f.Close() // nothing was done with it
	}
	return o, nil
}

func (o *Old) setUp(cfg Config, sockets []int) error {
	block := cfg.blockSize()
	calls := []struct{ request, value uintptr }{
		{ioSetBlockSize, uintptr(block)},
		{ioSetBlockCount, uintptr(cfg.Size / int64(block))},
		{ioSetFlags, uintptr(cfg.Flags)},
	}
	if cfg.Timeout > 0 {
		calls = append(calls, struct{ request, value uintptr }{ioSetTimeout, uintptr(seconds(cfg.Timeout))})
	}
	// The sockets come first: the device is whose they are.
	for _, fd := range sockets {
		if err := o.call(ioSetSocket, uintptr(fd)); err != nil {
			if errors.Is(err, unix.EBUSY) {
				err = fmt.Errorf("%w: %w", ErrBusy, err)
			}
			return err
		}
	}
	for _, c := range calls {
		if err := o.call(c.request, c.value); err != nil {
			return err
		}
	}
	return nil
}

func (o *Old) call(request, value uintptr) error {
	return ioctl(o.file, request, value)
}

func ioctl(f *os.File, request, value uintptr) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	err = rc.Control(func(fd uintptr) { _, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, request, value) })
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

func (o *Old) clear() error {
	return errors.Join(o.call(ioClearQueue, 0), o.call(ioClearSocket, 0))
}

// Done delivers how the connection ended.
func (o *Old) Done() <-chan error { return o.done }

// DisconnectFile disconnects a device by calls on itself, which all kernels have. It is no error if it was not connected.
func DisconnectFile(f *os.File) {
	for _, request := range []uintptr{ioClearQueue, ioDisconnect, ioClearSocket} {
		_ = ioctl(f, request, 0) // what cannot be disconnected is not connected
	}
}
