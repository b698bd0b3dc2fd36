package daemon

import (
	"fmt"
	"io/fs"
	"os"
	"runtime"
)

// DefaultSocketMode lets only the socket's owner (and root) connect.
const DefaultSocketMode fs.FileMode = 0o600

// mode is the mode of the address's socket.
func (a Address) mode() fs.FileMode {
	if a.Mode == 0 {
		return DefaultSocketMode
	}
	return a.Mode.Perm()
}

// protect gives a new socket its mode, which the umask may have narrowed, and its owner. The owner comes first: until
// then nobody but root can use what is being handed over.
func (a Address) protect() error {
	if runtime.GOOS == "windows" {
		return nil // it has no such modes
	}
	if a.Owner != nil {
		if err := os.Lchown(a.Socket, int(a.Owner.UID), int(a.Owner.GID)); err != nil {
			return fmt.Errorf("handing it to user %d: %w", a.Owner.UID, err)
		}
	}
	return os.Chmod(a.Socket, a.mode())
}
