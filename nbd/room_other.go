//go:build !linux

package nbd

import "net"

// forceSendRoom is for systems whose limits an administrator's program may exceed.
func forceSendRoom(*net.UnixConn) bool { return false }
