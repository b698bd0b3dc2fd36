//go:build !unix

package cli

import (
	"errors"
	"io/fs"
	"runtime"
)

// ownedPrivately cannot tell here.
func ownedPrivately(fs.FileInfo, fs.FileMode) error {
	return errors.New(runtime.GOOS + " has no modes that say who may read it: give secrets by --object")
}
