package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
)

// firstActivated is the first descriptor that a service manager passes on.
const firstActivated = 3

// maxActivated bounds LISTEN_FDS; no service has as many sockets.
const maxActivated = 1024

// Activated returns the listeners that a service manager opened for this process (systemd's socket activation), none
// when there are none. getenv is os.Getenv.
func Activated(getenv func(string) string) ([]net.Listener, error) {
	if getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return nil, nil // not for us
	}
	n, err := strconv.Atoi(getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > maxActivated {
		return nil, fmt.Errorf("socket activation: LISTEN_FDS=%q is not a number of sockets", getenv("LISTEN_FDS"))
	}
	var list []net.Listener
	for fd := firstActivated; fd < firstActivated+n; fd++ {
		l, err := listenerFromFD(fd)
		if err != nil {
			for _, open := range list {
				err = errors.Join(err, open.Close())
			}
			return nil, fmt.Errorf("socket activation: descriptor %d: %w", fd, err)
		}
		list = append(list, l)
	}
	return list, nil
}

func listenerFromFD(fd int) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), fmt.Sprintf("LISTEN_FD_%d", fd))
	if f == nil {
		return nil, os.ErrInvalid
	}
	l, err := net.FileListener(f) // duplicates the descriptor
	if cerr := f.Close(); err == nil && cerr != nil {
		return nil, errors.Join(cerr, l.Close())
	}
	if err != nil {
		return nil, err
	}
	if ul, ok := l.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false) // the socket is the service manager's
	}
	return l, nil
}
