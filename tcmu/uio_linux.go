package tcmu

import (
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

// uio is an open device: its memory and its doorbell.
type uio struct {
	*bell
	mem []byte
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
	b, err := newBell(name, fd, fd)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(mem), unix.Close(fd))
	}
	return &uio{bell: b, mem: mem}, nil
}

func readUint(path string) (uint64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(raw)), 0, 63)
}

// release closes the device and unmaps its memory. Nothing uses them any more.
func (u *uio) release() error {
	return errors.Join(u.close(), unix.Munmap(u.mem), unix.Close(u.in))
}
