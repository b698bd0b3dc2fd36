package nbd

import (
	"net"

	"golang.org/x/sys/unix"
)

// forceSendRoom goes beyond the limit for everybody (net.core.wmem_max), as an administrator's program may.
func forceSendRoom(u *net.UnixConn) (done bool) {
	rc, err := u.SyscallConn()
	if err != nil {
		return false
	}
	err = rc.Control(func(fd uintptr) {
		done = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendRoom) == nil
	})
	return done && err == nil
}
