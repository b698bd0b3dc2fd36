//go:build !linux

package daemon

// sinceBoot is nothing that a service manager of this host wants to know.
func sinceBoot() string { return "" }
