package cli

import (
	"context"
	"errors"
	"os"
	"runtime"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// overTemporary returns a disk that begins as dev and takes changes without changing dev: an overlay in a temporary file,
// which is gone when the disk is closed, and with it what was written. Closing it closes dev. If it fails dev stays open.
func overTemporary(ctx context.Context, dev block.Device) (*qcow2.Image, error) {
	file, err := temporaryFile()
	if err != nil {
		return nil, errorf("Could not create temporary overlay: %s", changeReason(err))
	}
	err = qcow2.Create(ctx, file, qcow2.CreateOptions{Size: dev.Size()})
	if err != nil {
		return nil, errors.Join(errorf("Could not create temporary overlay: %s", changeReason(err)), file.Close())
	}
	im, err := qcow2.Open(ctx, file, qcow2.Options{Backing: dev})
	if err != nil {
		return nil, errors.Join(errorf("Could not open temporary overlay: %s", changeReason(err)), file.Close())
	}
	return im, nil
}

// temporaryFile makes a file that is removed when it is closed, or, where a file may be removed while it is open, at once.
func temporaryFile() (storage.File, error) {
	dir := os.Getenv("TMPDIR")
	if dir == "" && runtime.GOOS == "linux" {
		dir = "/var/tmp" // the file may become too large for a file system in memory
	}
	f, err := os.CreateTemp(dir, "drover-*.qcow2")
	if err != nil {
		return nil, err
	}
	name := f.Name()
	if err := f.Close(); err != nil {
		return nil, errors.Join(err, os.Remove(name))
	}
	file, err := storage.OpenFile(name, storage.OpenOptions{NoLock: true})
	if err != nil {
		return nil, errors.Join(err, os.Remove(name))
	}
	if os.Remove(name) == nil {
		return file, nil
	}
	return &temporary{File: file, name: name}, nil
}

// temporary is a file that is removed when it is closed.
type temporary struct {
	storage.File
	name string
}

func (t *temporary) Close() error { return errors.Join(t.File.Close(), os.Remove(t.name)) }
