package cli

import (
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

var infoSignals = []os.Signal{syscall.SIGUSR1}

// isTerminal reports whether somebody looks on.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
