package nbd

import (
	"net"
	"syscall"
)

// processOf asks the kernel who connected. What it says was recorded when they did, so it does not change when the
// process passes the connection on.
func processOf(u *net.UnixConn) *Process {
	rc, err := u.SyscallConn()
	if err != nil {
		return nil
	}
	var cred *syscall.Ucred
	var cerr error
	err = rc.Control(func(fd uintptr) {
		cred, cerr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil || cerr != nil {
		return nil
	}
	return &Process{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}
}
