package tcmu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const uioClass = "/sys/class/uio"

// uioPrefix begins the names of the kernel's TCMU devices: tcm-user/HBA/NAME/CONFIG.
const uioPrefix = "tcm-user/"

// Device is a device as the kernel describes it.
type Device struct {
	Minor  int    // of /dev/uio
	HBA    string // "3" of user_3
	Name   string
	Config string // what the administrator wrote: handler/its own string
}

// Devices lists what the kernel offers now.
func Devices() ([]Device, error) {
	list, err := os.ReadDir(uioClass)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the kernel's user I/O devices: %w", err)
	}
	var devices []Device
	for _, e := range list {
		minor, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "uio"))
		if err != nil {
			continue
		}
		d, err := deviceOf(minor)
		if err == nil {
			devices = append(devices, d)
		}
	}
	return devices, nil
}

var errNotOurs = errors.New("not a device of the TCM-User target")

// deviceOf describes /dev/uioN.
func deviceOf(minor int) (Device, error) {
	raw, err := os.ReadFile(filepath.Join(uioClass, fmt.Sprintf("uio%d", minor), "name"))
	if err != nil {
		return Device{}, err
	}
	return parseName(minor, strings.TrimSuffix(string(raw), "\n"))
}

func parseName(minor int, name string) (Device, error) {
	rest, ok := strings.CutPrefix(name, uioPrefix)
	if !ok {
		return Device{}, errNotOurs
	}
	parts := strings.SplitN(rest, "/", 3)
	if len(parts) < 3 {
		return Device{}, errNotOurs
	}
	return Device{Minor: minor, HBA: parts[0], Name: parts[1], Config: parts[2]}, nil
}

// uio is an open device: its memory and its doorbell. It is waited on by a thread, not by the runtime's poller: the kernel
// wakes that thread and nobody else, where the poller would wake a second one to look for more work, for each command.
type uio struct {
	fd   int
	name string
	end  int // an eventfd that ends Wait
	mem  []byte
}

// openUIO opens /dev/uioN, which only one process can do at a time, and maps its memory.
func openUIO(minor int) (*uio, error) {
	size, err := readUint(filepath.Join(uioClass, fmt.Sprintf("uio%d", minor), "maps/map0/size"))
	if err != nil {
		return nil, fmt.Errorf("size of the memory of uio%d: %w", minor, err)
	}
	name := fmt.Sprintf("/dev/uio%d", minor)
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", name, err)
	}
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("mapping %d bytes of %s: %w", size, name, err)
	}
	end, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making an eventfd: %w", errors.Join(err, unix.Munmap(mem), unix.Close(fd)))
	}
	return &uio{fd: fd, name: name, end: end, mem: mem}, nil
}

func readUint(path string) (uint64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(raw)), 0, 63)
}

// Wait returns when the kernel has counted another event, or the device is gone, or stop was called.
func (u *uio) Wait() error {
	fds := []unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}, {Fd: int32(u.end), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for commands: %w", err)
		}
		if fds[1].Revents != 0 {
			return fmt.Errorf("waiting for commands: %w", os.ErrClosed)
		}
		var count [4]byte
		_, err = unix.Read(u.fd, count[:])
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("waiting for commands: reading %s: %w", u.name, err)
		}
	}
}

// Ring has the kernel look at completions.
func (u *uio) Ring() error {
	var any [4]byte
	for {
		_, err := unix.Write(u.fd, any[:])
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("telling the kernel of completions: writing %s: %w", u.name, err)
		}
	}
}

// stop ends Wait, now and for ever.
func (u *uio) stop() error {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	if _, err := unix.Write(u.end, one); err != nil {
		return fmt.Errorf("stopping %s: %w", u.name, err)
	}
	return nil
}

// release closes the device and unmaps its memory. Nothing uses them any more.
func (u *uio) release() error {
	return errors.Join(unix.Munmap(u.mem), unix.Close(u.fd), unix.Close(u.end))
}
