package client

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/droverproject/drover/nbd/internal/wire"
)

var (
	// ErrProtocol is wrapped by errors that end a connection because the server broke the protocol.
	ErrProtocol = errors.New("nbd: server broke the protocol")
	// ErrLost is wrapped by the errors of requests whose connection was lost.
	ErrLost = errors.New("nbd: connection to the server is lost")
	// ErrClosed is returned by methods of a client that has been closed.
	ErrClosed = errors.New("nbd: client is closed")
)

// ServerError is what a server answered in place of doing what it was asked.
type ServerError struct {
	Errno   syscall.Errno
	Message string // what the server says about it; may be empty
}

// Error implements error.
func (e *ServerError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("server says: %v", e.Errno)
	}
	return fmt.Sprintf("server says: %v (%s)", e.Errno, e.Message)
}

// Unwrap returns the error number.
func (e *ServerError) Unwrap() error { return e.Errno }

var errnos = map[uint32]syscall.Errno{
	wire.ErrPerm: syscall.EPERM, wire.ErrIO: syscall.EIO, wire.ErrNoMem: syscall.ENOMEM, wire.ErrInval: syscall.EINVAL,
	wire.ErrNoSpace: syscall.ENOSPC, wire.ErrOverflow: syscall.EOVERFLOW, wire.ErrNotSup: syscall.EOPNOTSUPP,
	wire.ErrShutdown: syscall.ESHUTDOWN,
}

func serverError(number uint32, message string) error {
	errno, ok := errnos[number]
	if !ok {
		errno = syscall.EINVAL // as the protocol wants unknown numbers to be taken
	}
	return &ServerError{errno, message}
}

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}
