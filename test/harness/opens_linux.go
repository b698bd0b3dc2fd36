package harness

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// Opens knows who was opened of the files that it watches, by any process.
type Opens struct {
	fd      int
	watched map[int32]string
}

// WatchOpens watches files, and folders with the files in them. Looking at a file without opening it (stat, O_PATH) does
// not count.
func WatchOpens(t testing.TB, paths ...string) *Opens {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	OK(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	o := &Opens{fd: fd, watched: make(map[int32]string)}
	for _, path := range paths {
		wd, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN)
		OK(t, err)
		o.watched[int32(wd)] = path
	}
	return o
}

// Take returns the names of the files that have been opened since the last call. The kernel notes an opening before the
// one who opens gets his file, so nothing has to be waited for.
func (o *Opens) Take(t testing.TB) []string {
	t.Helper()
	var names []string
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(o.fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return names
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		OK(t, err)
		for events := buf[:n]; len(events) >= unix.SizeofInotifyEvent; {
			length := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
			name := o.watched[int32(binary.NativeEndian.Uint32(events))]
			if child, _, _ := bytes.Cut(events[unix.SizeofInotifyEvent:length], []byte{0}); len(child) > 0 {
				name += "/" + string(child)
			}
			names = append(names, name)
			events = events[length:]
		}
	}
}
