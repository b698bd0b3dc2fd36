package tcmu

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// configfs is where the kernel's target is configured.
const configfs = "/sys/kernel/config/target/core"

func (d Device) path(parts ...string) string {
	return filepath.Join(append([]string{configfs, "user_" + d.HBA, d.Name}, parts...)...)
}

func (d Device) read(parts ...string) (string, error) {
	raw, err := os.ReadFile(d.path(parts...))
	if err != nil {
		return "", fmt.Errorf("reading %s of %s: %w", parts[len(parts)-1], d.Name, err)
	}
	return strings.TrimRight(string(raw), "\n"), nil
}

// write writes an attribute. One write call, not repeated: the kernel waits in some of them for this very process.
func (d Device) write(value string, parts ...string) error {
	f, err := os.OpenFile(d.path(parts...), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("writing %s of %s: %w", parts[len(parts)-1], d.Name, err)
	}
	return nil
}

// number reads an attribute that is one.
func (d Device) number(parts ...string) (uint64, error) {
	s, err := d.read(parts...)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(s), 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%s of %s is %q, not a number", parts[len(parts)-1], d.Name, s)
	}
	return n, nil
}

// Size returns the disk's size in bytes, as the kernel tells initiators.
func (d Device) Size() (int64, error) {
	n, err := d.number("attrib", "dev_size")
	if err == nil && n > math.MaxInt64 {
		err = fmt.Errorf("dev_size of %s is %d", d.Name, n)
	}
	return int64(n), err
}

// enabled reports whether the device has been set up. Before, whoever enables it waits for the answer to its notice, and
// nothing can be done to its ring.
func (d Device) enabled() bool {
	n, err := d.number("enable")
	return err == nil && n != 0
}

// BlockSize returns the size of logical blocks.
func (d Device) BlockSize() (int, error) {
	n, err := d.number("attrib", "hw_block_size")
	return int(n), err
}

// MaxBlocks returns the largest transfer in 512-byte sectors.
func (d Device) MaxBlocks() (uint64, error) { return d.number("attrib", "hw_max_sectors") }

// serialPrefix begins what the kernel shows as the serial number.
const serialPrefix = "T10 VPD Unit Serial Number: "

// Serial returns the serial number, which may be set after the device was enabled.
func (d Device) Serial() string {
	s, err := d.read("wwn", "vpd_unit_serial")
	if err != nil {
		return ""
	}
	return strings.TrimPrefix(s, serialPrefix)
}

// index is the device's number in netlink messages.
func (d Device) index() (uint32, error) {
	n, err := d.number("statistics", "scsi_dev", "indx")
	return uint32(n), err
}

// Block keeps new commands from reaching the ring (they are answered BUSY), or lets them again.
func (d Device) Block(on bool) error {
	v := "0"
	if on {
		v = "1"
	}
	return d.write(v, "action", "block_dev")
}

// ResetRing has the kernel answer everything in the ring with BUSY, so that initiators try again, and empty it. The device is
// blocked, and nobody uses the ring.
func (d Device) ResetRing() error { return d.write("1", "action", "reset_ring") }
