//go:build !linux

package block

import (
	"os"

	"github.com/droverproject/drover/storage"
)

// fileID tells whether two open files are the same one. The zero value is like no other.
type fileID struct{ info os.FileInfo }

// identify goes by the file's name, the only thing at hand on this platform. A name that cannot be examined identifies
// nothing; what bounds a circle then is the length of the chain.
func identify(file storage.File) (fileID, error) {
	info, err := os.Stat(file.Stat().Name)
	if err != nil {
		return fileID{}, nil
	}
	return fileID{info}, nil
}

func (id fileID) same(other fileID) bool {
	return id.info != nil && other.info != nil && os.SameFile(id.info, other.info)
}

func (id fileID) name() (string, error) { return "", errNoIdentity }
