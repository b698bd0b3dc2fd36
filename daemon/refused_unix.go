//go:build unix

package daemon

import (
	"errors"
	"syscall"
)

// refused reports whether a socket is there but nobody listens on it.
func refused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
