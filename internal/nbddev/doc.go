// Package nbddev makes NBD exports block devices of this host: it hands connections to servers over to the kernel's NBD
// client, which turns them into /dev/nbd0 and so on.
//
// [Handshake] brings a connection to the point from which the kernel goes on by itself. Connections are handed over by generic
// netlink ([Open], [Control.Connect]), after which the kernel needs no process any more, or with kernels older than 4.12 by
// calls on the device itself ([ConnectOld]), which a process has to stay for.
package nbddev

import (
	"errors"
	"time"
)

// Errors that callers branch on.
var (
	// ErrUnsupported is wrapped when the kernel has no NBD client, or not this way to it.
	ErrUnsupported = errors.New("the kernel's NBD client is not there (modprobe nbd)")
	// ErrBusy is wrapped for a device that is connected already.
	ErrBusy = errors.New("the device is in use")
	// ErrNotConnected is wrapped for a device that is not.
	ErrNotConnected = errors.New("the device is not connected")
)

// AnyIndex has the kernel choose the device.
const AnyIndex = -1

// Config says how a device is to be connected.
type Config struct {
	Index     int    // of the device, or AnyIndex
	Size      int64  // in bytes
	BlockSize int    // of the device's sectors, a power of two from 512 to 4096; 0 means 512
	Flags     uint16 // transmission flags of the export
	// Timeout is how long the server may take for a request before its connection counts as dead, 0 for any time.
	Timeout time.Duration
	// DeadTimeout is how long requests wait for a new connection after the last one died, 0 for not at all.
	DeadTimeout time.Duration
	// DisconnectOnClose disconnects the device when the last of its users has closed it.
	DisconnectOnClose bool
	// Identifier is of the server's choice. The kernel takes new connections only with the same one.
	Identifier string
}

// Status is the state of a device.
type Status struct {
	Index     int
	Connected bool
}
