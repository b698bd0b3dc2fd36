//go:build unix

package cli

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// self is the file of this program, also when another one has taken its name meanwhile.
func self() string {
	if runtime.GOOS == "linux" {
		return "/proc/self/exe"
	}
	name, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return name
}

func ownSession() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// detachTerminal puts nothing in place of the standard files.
func detachTerminal(null *os.File) error {
	var err error
	for fd := range 3 {
		err = errors.Join(err, replaceFD(int(null.Fd()), fd))
	}
	return err
}

// umask is what the user masks in the modes of new files.
func umask() fs.FileMode {
	mask := unix.Umask(0o077) // there is no way to ask; what is made meanwhile is nobody else's business
	unix.Umask(mask)
	return fs.FileMode(mask)
}
