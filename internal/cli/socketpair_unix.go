//go:build unix

package cli

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// socketPair makes two sockets that are connected to each other.
func socketPair() (a, b net.Conn, err error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	a, aerr := connOf(fds[0])
	b, berr := connOf(fds[1])
	if err := errors.Join(aerr, berr); err != nil {
		for _, c := range []net.Conn{a, b} {
			if c != nil {
				err = errors.Join(err, c.Close())
			}
		}
		return nil, nil, err
	}
	return a, b, nil
}

func connOf(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socketpair")
	c, err := net.FileConn(f) // duplicates the descriptor
	if cerr := f.Close(); err == nil && cerr != nil {
		return nil, errors.Join(cerr, c.Close())
	}
	return c, err
}
