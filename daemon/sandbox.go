package daemon

import (
	"errors"
	"fmt"
	"net"
	"os/user"
	"path/filepath"
	"strings"
)

// Confinement is what the process gives up before it serves anybody.
type Confinement struct {
	// Sandbox takes away every access to files by name, all privileges and, where the host can, new TCP connections. What
	// is open stays so.
	Sandbox bool
	// BestEffort goes on with what the host can do of a sandbox. Otherwise Confine fails if files cannot be locked away.
	BestEffort bool
	// User is who the process becomes; nil lets it stay who it is.
	User *User
	// Removable are folders in which files may still be removed: those of sockets that go when the server does.
	Removable []string
}

// User is a user and a group. The process has no other groups once it is theirs.
type User struct {
	UID, GID uint32
}

// ErrNoSandbox is wrapped when the host, or the way the program was built, does not allow to confine it as asked.
var ErrNoSandbox = errors.New("no sandbox")

// Confine confines the whole process for the rest of its life. After an error the process may be confined in part, and
// should end. It returns notes about what was left out, each a sentence.
func Confine(c Confinement) (notes []string, err error) {
	if !c.Sandbox && c.User == nil {
		return nil, nil
	}
	return confine(c)
}

// ParseUser reads USER[:GROUP], each a name of this host or a number. The group of a user that the host knows may be left
// out.
func ParseUser(text string) (*User, error) {
	name, group, named := strings.Cut(text, ":")
	fail := func(err error) (*User, error) { return nil, fmt.Errorf("user %q: %w", text, err) }
	uid, err := lookupID(name, userID)
	if err != nil {
		return fail(err)
	}
	if named {
		gid, err := lookupID(group, groupID)
		if err != nil {
			return fail(err)
		}
		return &User{uid, gid}, nil
	}
	u, err := user.LookupId(fmt.Sprint(uid))
	if err != nil {
		return fail(errors.New("its group is not known here; say USER:GROUP"))
	}
	gid, err := ParseID(u.Gid)
	if err != nil {
		return fail(err)
	}
	return &User{uid, gid}, nil
}

// SocketFolders are the folders of the unix sockets that the daemon removes when it ends.
func (d *Daemon) SocketFolders() []string {
	list := socketFolders(d.listeners)
	if d.control != nil {
		list = append(list, d.control.Folders()...)
	}
	return list
}

func socketFolders(listeners []net.Listener) []string {
	var list []string
	for _, l := range listeners {
		if ul, ok := l.(*unixListener); ok {
			list = append(list, filepath.Dir(ul.path))
		}
	}
	return list
}

// Close closes what Open opened. It is for a daemon that never got to Serve, which does so itself.
func (d *Daemon) Close() error { return d.release() }
