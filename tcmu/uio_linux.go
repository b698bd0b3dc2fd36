package tcmu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

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

// uio is an open device: its memory and its doorbell.
type uio struct {
	f   *os.File
	mem []byte

	mu     sync.Mutex
	closed bool
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
	return &uio{f: os.NewFile(uintptr(fd), name), mem: mem}, nil
}

func readUint(path string) (uint64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(raw)), 0, 63)
}

// Wait returns when the kernel has counted another event. The runtime's poller does the waiting, and Stop ends it.
func (u *uio) Wait() error {
	var count [4]byte
	if _, err := u.f.Read(count[:]); err != nil {
		return fmt.Errorf("waiting for commands: %w", err)
	}
	return nil
}

// Ring has the kernel look at completions.
func (u *uio) Ring() error {
	var any [4]byte
	binary.NativeEndian.PutUint32(any[:], 0)
	if _, err := u.f.Write(any[:]); err != nil {
		return fmt.Errorf("telling the kernel of completions: %w", err)
	}
	return nil
}

// stop ends Wait.
func (u *uio) stop() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil
	}
	u.closed = true
	return u.f.Close()
}

// release unmaps the memory. Nothing uses it any more.
func (u *uio) release() error {
	return errors.Join(u.stop(), unix.Munmap(u.mem))
}
