//go:build !linux

package nbd

// readRaw is there for the poller of Linux only.
func (c *conn) readRaw() (done bool, err error) { return false, nil }
