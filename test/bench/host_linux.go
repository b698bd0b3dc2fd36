package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allocated is the host's disk space under a file, in bytes.
func allocated(name string) (int64, error) {
	st, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

// processTime is the processor time that a process has used, that of ended threads too, to the nanosecond.
func processTime(pid int) (time.Duration, error) {
	// The clock of another process is named by its number, as clock_getcpuclockid(3) of the C library makes it up.
	const wholeProcess = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|wholeProcess, &ts); err != nil {
		return 0, fmt.Errorf("processor time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// processors returns the numbers of the processors that this process may run on.
func processors() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var all []int
	for i := range 8 * int(unsafe.Sizeof(set)) {
		if set.IsSet(i) {
			all = append(all, i)
		}
	}
	return all, nil
}

// warm reads a file's data once, so that it is in the page cache. The reads are small for the reason given at rewrite4K.
func warm(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 4096)
	for end := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing but a hole is left
		}
		if err != nil {
			return err
		}
		if end, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err != nil {
			return err
		}
		// The wrapper hides WriteTo, which would copy in larger pieces.
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.NewSectionReader(f, from, end-from)}, buf); err != nil {
			return err
		}
	}
}

// chill drops a file from the page cache. What the machine below keeps of its disk is out of reach.
func chill(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil { // what is not written yet would stay
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}
