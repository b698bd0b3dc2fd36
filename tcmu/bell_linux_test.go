package tcmu

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestBell waits for events that are never read: each new one ends one wait, several at once end one together, and none is
// needed to stop.
func TestBell(t *testing.T) {
	in, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	must(t, err)
	defer unix.Close(in)
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	b, err := newBell("test", in, pipe[1])
	must(t, err)
	ring := func() {
		t.Helper()
		_, err := unix.Write(in, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		must(t, err)
	}
	for range 3 {
		ring()
		must(t, b.Wait())
	}
	ring()
	ring()
	must(t, b.Wait())
	var events [1]unix.EpollEvent
	if n, err := unix.EpollWait(b.epoll, events[:], 0); n != 0 || err != nil {
		t.Errorf("two events at once end a second wait: %d, %v", n, err)
	}
	must(t, b.Ring())
	if n, err := unix.Read(pipe[0], make([]byte, 16)); n != 4 || err != nil {
		t.Errorf("the kernel is told with %d bytes, %v; it wants 4", n, err)
	}
	must(t, b.stop())
	for range 2 {
		if err := b.Wait(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Wait after stop: %v", err)
		}
	}
	must(t, b.close())
}

// TestBellReads: once in a while the events are read, and what is the matter with a device is said.
func TestBellReads(t *testing.T) {
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	defer unix.Close(pipe[0])
	b, err := newBell("test", pipe[0], -1)
	must(t, err)
	defer b.close()
	b.waits = readEvery - 2
	for range 2 { // the first is not read, the second is
		_, err := unix.Write(pipe[1], make([]byte, 4))
		must(t, err)
		must(t, b.Wait())
	}
	if n, err := unix.Read(pipe[0], make([]byte, 16)); n != 4 || err != nil {
		t.Errorf("%d bytes are left of 8, %v; want 4", n, err)
	}
	must(t, unix.Close(pipe[1]))
	b.in = -1 // what a device that is gone says to a read: an error
	if err := b.Wait(); !errors.Is(err, unix.EBADF) {
		t.Errorf("Wait for a device that is gone: %v", err)
	}
}
