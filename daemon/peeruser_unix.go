//go:build linux || darwin

package daemon

import (
	"fmt"
	"net"
)

// knowsPeers: this host says who connects to a unix socket.
const knowsPeers = true

// peerUser asks the kernel which user connected, as it was when they did.
func peerUser(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("a %T is no unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var uid uint32
	var userErr error
	if err := raw.Control(func(fd uintptr) { uid, userErr = socketUser(int(fd)) }); err != nil {
		return 0, err
	}
	return uid, userErr
}
