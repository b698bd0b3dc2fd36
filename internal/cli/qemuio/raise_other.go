//go:build !linux

package qemuio

import (
	"os"
	"syscall"
)

// raise sends the program a signal, as far as the system can.
func raise(n int) error {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		return err
	}
	return self.Signal(syscall.Signal(n))
}
