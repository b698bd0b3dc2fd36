//go:build unix && !linux

package storage

import "syscall"

// openSafely keeps an open from waiting for the other end of a FIFO.
const openSafely = syscall.O_NONBLOCK | syscall.O_NOCTTY
