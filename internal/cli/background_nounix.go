//go:build !unix

package cli

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

func self() string {
	name, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return name
}

func ownSession() *syscall.SysProcAttr { return nil }

func detachTerminal(*os.File) error { return errors.New("going into the background needs a Unix") }

func umask() fs.FileMode { return 0 }
