package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// Peer is what the server knows of the client at the other end of a connection. Nothing in it is the client's own claim:
// addresses and credentials come from the kernel, names from a certificate that was verified.
type Peer struct {
	Network string // of the socket: "unix", "tcp", or what else the listener's connections call theirs
	Addr    string // of the client, often empty for a unix socket
	// Process made the connection to a unix socket. It is nil for other sockets and where the host does not tell.
	Process *Process
	// Encrypted is set once TLS is in use.
	Encrypted bool
	// Certificate is the client's own, nil unless it has sent one that the TLS configuration verified.
	Certificate *x509.Certificate
}

// Process is who connected to a unix socket, as it was when it did.
type Process struct {
	PID      int
	UID, GID uint32
}

// String describes the peer for a log.
func (p Peer) String() string {
	var parts []string
	if p.Addr != "" && p.Addr != "@" {
		parts = append(parts, p.Addr)
	}
	if p.Process != nil {
		parts = append(parts, fmt.Sprintf("uid %d pid %d", p.Process.UID, p.Process.PID))
	}
	if p.Certificate != nil {
		parts = append(parts, fmt.Sprintf("CN %q", p.Certificate.Subject.CommonName))
	}
	if len(parts) == 0 {
		return "client of a " + p.Network + " socket"
	}
	return strings.Join(parts, " ")
}

// key tells clients apart for limits: by user on a unix socket, by address on a network. Clients that nothing is known of
// are all the same.
func (p Peer) key() string {
	if p.Process != nil {
		return fmt.Sprintf("uid %d", p.Process.UID)
	}
	if a, err := netip.ParseAddrPort(p.Addr); err == nil {
		return a.Addr().Unmap().String()
	}
	return p.Network
}

// peerOf describes the client of a new connection.
func peerOf(nc net.Conn) Peer {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	var p Peer
	if a := nc.RemoteAddr(); a != nil {
		p.Network, p.Addr = a.Network(), a.String()
	}
	if u, ok := nc.(*net.UnixConn); ok {
		p.Process = processOf(u)
	}
	return p
}
