package storage_test

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/storage/storagetest"
)

func createTemp(t *testing.T, o storage.OpenOptions) *storage.OSFile {
	t.Helper()
	f, err := storage.CreateFile(filepath.Join(t.TempDir(), "image"), o)
	if errors.Is(err, storage.ErrNotSupported) {
		t.Skipf("the host cannot do it: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestOSFileBuffered(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File { return createTemp(t, storage.OpenOptions{}) })
}

func TestOSFileDirect(t *testing.T) {
	createTemp(t, storage.OpenOptions{Direct: true}).Close() // skips the whole test where that is not supported
	storagetest.Run(t, func(t *testing.T) storage.File { return createTemp(t, storage.OpenOptions{Direct: true}) })
}

func TestOSFileWriteBehind(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File { return createTemp(t, storage.OpenOptions{WriteBehind: true}) })
}

func TestMemFile(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File { return storage.NewMemFile("mem") })
}

// A clone starts out on shared chunks: everything it does goes through copy-on-write.
func TestMemFileClone(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File {
		f := storage.NewMemFile("mem")
		if _, err := f.WriteAt(make([]byte, 3<<20), 0); err != nil {
			t.Fatal(err)
		}
		c := f.Clone()
		if err := c.Truncate(0); err != nil {
			t.Fatal(err)
		}
		return c
	})
}

func TestCrashFile(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File { return storage.NewCrashFile(storage.NewMemFile("mem")) })
}

func TestFaultFileWithoutFaults(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.File { return storage.NewFaultFile(storage.NewMemFile("mem")) })
}
