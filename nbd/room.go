package nbd

import "net"

// sendRoom is what a unix socket is asked to hold of replies: a long one, so that it can be left there in one piece instead
// of in five with a wait for the client after each. TCP sockets grow by themselves.
const sendRoom = 1 << 20

// makeRoom lets the socket hold a long reply, once the first is coming.
func (c *conn) makeRoom() {
	if c.roomy {
		return
	}
	c.roomy = true
	// The system grants what its limits allow, and nothing but speed depends on it, so errors mean nothing.
	if u, ok := c.sock.(*net.UnixConn); ok && !forceSendRoom(u) {
		_ = u.SetWriteBuffer(sendRoom)
	}
}
