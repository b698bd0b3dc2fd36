//go:build !linux

package daemon

import "syscall"

// control cannot set a mode before a socket has a name here: until it is set, the umask and the folder protect it.
func (a Address) control(_, _ string, _ syscall.RawConn) error { return nil }
