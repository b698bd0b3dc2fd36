//go:build unix

package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// ownedPrivately refuses what belongs to neither root nor this user, or gives others a right of those in the mask.
func ownedPrivately(st fs.FileInfo, mask fs.FileMode) error {
	if extra := st.Mode().Perm() & mask; extra != 0 {
		return fmt.Errorf("its mode is %#o: others have rights that they must not have (chmod %#o)", st.Mode().Perm(), st.Mode().Perm()&^mask)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("nobody knows whose it is")
	}
	if sys.Uid != 0 && sys.Uid != uint32(os.Geteuid()) {
		return fmt.Errorf("it belongs to user %d", sys.Uid)
	}
	return nil
}
