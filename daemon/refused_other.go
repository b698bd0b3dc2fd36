//go:build !unix

package daemon

// refused cannot tell on this platform, so that no socket counts as stale.
func refused(error) bool { return false }
