package block

import (
	"fmt"

	"github.com/droverproject/drover/storage"
	"golang.org/x/sys/unix"
)

// fileID tells whether two open files are the same one. The zero value is like no other.
type fileID struct {
	known    bool
	dev, ino uint64
}

// identify asks the open file itself: its name may lead elsewhere by now.
func identify(file storage.File) (fileID, error) {
	raw, ok := file.(storage.RawFile)
	if !ok {
		return fileID{}, nil
	}
	fd, ok := raw.RawFD()
	if !ok {
		return fileID{}, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileID{}, fmt.Errorf("asking which file it is: %w", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return fileID{known: true, dev: st.Rdev}, nil // two nodes of one device are the same disk
	}
	return fileID{known: true, dev: uint64(st.Dev), ino: st.Ino}, nil
}

func (id fileID) same(other fileID) bool { return id.known && id == other }

// name returns a file name that no other image has.
func (id fileID) name() (string, error) {
	if !id.known {
		return "", errNoIdentity
	}
	return fmt.Sprintf("%x-%x", id.dev, id.ino), nil
}
