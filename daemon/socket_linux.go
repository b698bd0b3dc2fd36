package daemon

import "syscall"

// control narrows the mode of a socket before it has a name, so that there is no moment in which it could be connected
// to by anybody else.
func (a Address) control(_, _ string, rc syscall.RawConn) error {
	var err error
	cerr := rc.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), uint32(a.mode())) })
	if cerr != nil {
		return cerr
	}
	return err
}
