package tcmu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// bell is the doorbell of a device. It is waited on by a thread, not by the runtime's poller: the kernel wakes that thread and
// nobody else, where the poller would wake a second one to look for more work, for each command.
//
// An event that was never read stays there to be read, so a plain poll would have to read each. The edge-triggered
// interest tells of every new one all the same: one system call for each wake-up, not two.
type bell struct {
	name  string
	in    int // readable when the kernel has added entries
	out   int // written to have it look at completions
	end   int // an eventfd that ends Wait
	epoll int
	waits uint32
	word  [4]byte // what is written; that it is written is what counts
}

// readEvery is after how many wake-ups the events are read, which are 32 bits wide: were they never, one that makes the count what
// it was at the last reading would be missed.
const readEvery = 1 << 24

// What the events of an epoll descriptor stand for.
const (
	bellIn = iota
	bellEnd
)

func newBell(name string, in, out int) (*bell, error) {
	b := &bell{name: name, in: in, out: out, end: -1, epoll: -1}
	if err := b.open(); err != nil {
		return nil, fmt.Errorf("waiting for commands of %s: %w", name, errors.Join(err, b.close()))
	}
	return b, nil
}

func (b *bell) open() (err error) {
	if b.end, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return err
	}
	if b.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	in := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: bellIn}
	end := unix.EpollEvent{Events: unix.EPOLLIN, Fd: bellEnd}
	return errors.Join(unix.EpollCtl(b.epoll, unix.EPOLL_CTL_ADD, b.in, &in), unix.EpollCtl(b.epoll, unix.EPOLL_CTL_ADD, b.end, &end))
}

// Wait returns when the kernel has counted another event since the last Wait, or the device is gone, or stop was called.
func (b *bell) Wait() error {
	var events [2]unix.EpollEvent
	for {
		n, err := unix.EpollWait(b.epoll, events[:], -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for commands: %w", err)
		}
		var got uint32
		for _, e := range events[:n] {
			if e.Fd == bellEnd {
				return fmt.Errorf("waiting for commands: %w", os.ErrClosed)
			}
			got = e.Events
		}
		b.waits++
		if got&^(unix.EPOLLIN|unix.EPOLLRDNORM) == 0 && b.waits%readEvery != 0 {
			return nil
		}
		return b.read()
	}
}

// read takes the events, or says what is the matter with the device.
func (b *bell) read() error {
	for {
		var count [4]byte
		_, err := unix.Read(b.in, count[:])
		switch {
		case err == nil, errors.Is(err, unix.EAGAIN):
			return nil
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("waiting for commands: reading %s: %w", b.name, err)
		}
	}
}

// Ring has the kernel look at completions.
func (b *bell) Ring() error {
	for {
		_, err := unix.Write(b.out, b.word[:])
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("telling the kernel of completions: writing %s: %w", b.name, err)
		}
	}
}

// stop ends Wait, now and for ever.
func (b *bell) stop() error {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	if _, err := unix.Write(b.end, one); err != nil {
		return fmt.Errorf("stopping %s: %w", b.name, err)
	}
	return nil
}

// close gives back what the bell has of its own.
func (b *bell) close() error {
	var err error
	for _, fd := range []int{b.end, b.epoll} {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
	}
	return err
}
