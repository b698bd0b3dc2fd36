//go:build !linux

package nbd

import "net"

// processOf does not know how to ask this host: rules about users match nobody here.
func processOf(*net.UnixConn) *Process { return nil }
