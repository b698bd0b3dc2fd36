package nbd

import (
	"context"
	"errors"
	"syscall"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd/internal/wire"
	"github.com/droverproject/drover/storage"
)

var (
	// ErrServerClosed is returned by Serve and ServeConn once Shutdown was called.
	ErrServerClosed = errors.New("nbd: server is shut down")
	// ErrNoExport is returned by RemoveExport for a name that is not exported.
	ErrNoExport = errors.New("nbd: no such export")
	// ErrProtocol is wrapped by the errors that end a connection because the client broke the protocol.
	ErrProtocol = errors.New("nbd: protocol violation")
	// ErrHandshake is wrapped by the errors that end a connection whose client exceeded a limit of the handshake.
	ErrHandshake = errors.New("nbd: handshake limit exceeded")
)

// How a connection ends when nothing went wrong.
var (
	errDisconnect = errors.New("client disconnected")
	errDraining   = errors.New("server drains the connection")
	errNoExport   = errors.New("client asked for an unknown export")
)

// errno is an error number of the protocol.
type errno uint32

const (
	errnoPERM     errno = wire.ErrPerm
	errnoIO       errno = wire.ErrIO
	errnoNOMEM    errno = wire.ErrNoMem
	errnoINVAL    errno = wire.ErrInval
	errnoNOSPC    errno = wire.ErrNoSpace
	errnoOVERFLOW errno = wire.ErrOverflow
	errnoNOTSUP   errno = wire.ErrNotSup
	errnoSHUTDOWN errno = wire.ErrShutdown
)

// text explains an error to a client. It never holds details of the host.
func (e errno) text() string {
	switch e {
	case errnoPERM:
		return "operation not permitted"
	case errnoNOMEM:
		return "out of memory"
	case errnoINVAL:
		return "invalid request"
	case errnoNOSPC:
		return "no space left"
	case errnoOVERFLOW:
		return "value too large"
	case errnoNOTSUP:
		return "operation not supported"
	case errnoSHUTDOWN:
		return "server is shutting down"
	}
	return "input/output error"
}

// deviceErrnos tells how the errors of a device, and those of the host below it, are called in the protocol. The first
// match counts.
var deviceErrnos = []struct {
	err error
	e   errno
}{
	{block.ErrReadOnly, errnoPERM},
	{storage.ErrReadOnly, errnoPERM},
	{block.ErrNoFastZero, errnoNOTSUP},
	{storage.ErrNotSupported, errnoNOTSUP},
	{block.ErrOutOfRange, errnoINVAL},
	{block.ErrClosed, errnoSHUTDOWN},
	{context.Canceled, errnoSHUTDOWN},
	{context.DeadlineExceeded, errnoSHUTDOWN},
	{syscall.EPERM, errnoPERM},
	{syscall.EACCES, errnoPERM},
	{syscall.EROFS, errnoPERM},
	{syscall.ENOMEM, errnoNOMEM},
	{syscall.EINVAL, errnoINVAL},
	{syscall.ENOSPC, errnoNOSPC},
	{syscall.EDQUOT, errnoNOSPC},
	{syscall.EFBIG, errnoNOSPC},
	{syscall.EOVERFLOW, errnoOVERFLOW},
	{syscall.EOPNOTSUPP, errnoNOTSUP},
	{syscall.ENOTSUP, errnoNOTSUP},
	{syscall.ESHUTDOWN, errnoSHUTDOWN},
}

// deviceErrno turns an error of a device into the protocol's number. What it does not know is an I/O error.
func deviceErrno(cmd Command, err error) errno {
	if (cmd == CmdWrite || cmd == CmdWriteZeroes) && errors.Is(err, block.ErrOutOfRange) {
		return errnoNOSPC
	}
	for _, d := range deviceErrnos {
		if errors.Is(err, d.err) {
			return d.e
		}
	}
	return errnoIO
}
