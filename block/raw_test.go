package block_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/storage"
)

// newFile makes a file with the given content, followed by a hole up to size.
func newFile(t *testing.T, content []byte, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openRaw(t *testing.T, path string, readOnly bool, o block.RawOptions) *block.Raw {
	t.Helper()
	file, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: readOnly})
	if err != nil {
		t.Fatal(err)
	}
	return wrapRaw(t, file, o)
}

func wrapRaw(t *testing.T, file storage.File, o block.RawOptions) *block.Raw {
	t.Helper()
	dev, err := block.NewRaw(file, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil && !errors.Is(err, block.ErrClosed) {
			t.Errorf("Close: %v", err)
		}
	})
	return dev
}

// plainFile hides what the host can do beside reading and writing.
type plainFile struct{ storage.File }

func (plainFile) PunchHole(int64, int64) error { return storage.ErrNotSupported }
func (plainFile) ZeroRange(int64, int64) error { return storage.ErrNotSupported }

// sectorFile refuses to zero or punch less than whole sectors, as block devices do.
type sectorFile struct{ storage.File }

func (f sectorFile) Stat() storage.Info {
	info := f.File.Stat()
	info.Device, info.Align = true, storage.SectorSize
	return info
}

func (f sectorFile) PunchHole(off, n int64) error {
	if (off|n)%storage.SectorSize != 0 {
		return errors.New("punching part of a sector")
	}
	return f.File.PunchHole(off, n)
}

func (f sectorFile) ZeroRange(off, n int64) error {
	if (off|n)%storage.SectorSize != 0 {
		return errors.New("zeroing part of a sector")
	}
	return f.File.ZeroRange(off, n)
}

func TestRawConformance(t *testing.T) {
	const size = 1 << 20
	for _, tc := range []struct {
		name string
		size int64
		o    block.RawOptions
		wrap func(storage.File) storage.File

		onDisk bool
	}{
		{name: "whole file", size: size, onDisk: true},
		{name: "file that ends in mid-sector", size: size - 300, onDisk: true},
		{name: "part of a file", size: 2 * size, o: block.RawOptions{Offset: 12345, Size: size}},
		{name: "host that cannot zero", size: size, wrap: func(f storage.File) storage.File { return plainFile{f} }},
		{name: "block device", size: size, wrap: func(f storage.File) storage.File { return sectorFile{f} }},
		{name: "guarded", size: size, o: block.RawOptions{GuardFormat: func([]byte) string { return "" }}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				if tc.onDisk {
					file, err := storage.OpenFile(newFile(t, nil, tc.size), storage.OpenOptions{})
					if err != nil {
						t.Fatal(err)
					}
					return wrapRaw(t, file, tc.o)
				}
				file := storage.NewMemFile("disk")
				if err := file.Truncate(tc.size); err != nil {
					t.Fatal(err)
				}
				if tc.wrap != nil {
					return wrapRaw(t, tc.wrap(file), tc.o)
				}
				return wrapRaw(t, file, tc.o)
			})
		})
	}
}

func TestRawReadOnly(t *testing.T) {
	content := bytes.Repeat([]byte("content "), 100)
	want := append(bytes.Clone(content), make([]byte, 224)...) // up to the next sector
	path := newFile(t, content, 800)
	for name, dev := range map[string]*block.Raw{
		"file":   openRaw(t, path, true, block.RawOptions{}),
		"device": openRaw(t, path, false, block.RawOptions{ReadOnly: true}),
	} {
		t.Run(name, func(t *testing.T) {
			if dev.Size() != 1024 {
				t.Errorf("Size = %d, want 1024", dev.Size())
			}
			blocktest.RunReadOnly(t, dev, want)
		})
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file has changed (%v)", err)
	}
}

func TestRawWindow(t *testing.T) {
	path := newFile(t, bytes.Repeat([]byte{7}, 8192), 8192)
	dev := openRaw(t, path, false, block.RawOptions{Offset: 1000, Size: 2048})
	ctx := t.Context()
	if err := dev.WriteAt(ctx, bytes.Repeat([]byte{1}, 2048), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteZeroes(ctx, 0, 100, block.ZeroUnmap); err != nil {
		t.Fatal(err)
	}
	if err := dev.Discard(ctx, 0, 2048); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:1000], bytes.Repeat([]byte{7}, 1000)) || !bytes.Equal(got[3048:], bytes.Repeat([]byte{7}, 8192-3048)) {
		t.Error("bytes outside the window have changed")
	}
	err = dev.Extents(ctx, 512, 512, func(e block.Extent) bool {
		if !e.HasHost || e.Host != 1000+e.Off {
			t.Errorf("extent at %d is said to be at host offset %d", e.Off, e.Host)
		}
		return true
	})
	if err != nil {
		t.Error(err)
	}
}

func TestRawOptions(t *testing.T) {
	path := newFile(t, nil, 4096)
	for _, tc := range []struct {
		options map[string]string
		size    int64
		wantErr string
	}{
		{options: map[string]string{}, size: 4096},
		{options: map[string]string{"offset": "512"}, size: 3584},
		{options: map[string]string{"offset": "100"}, size: 4096},
		{options: map[string]string{"offset": "4096"}, size: 0},
		{options: map[string]string{"offset": "1024", "size": "1024"}, size: 1024},
		{options: map[string]string{"offset": "4097"}, wantErr: "cannot be greater"},
		{options: map[string]string{"size": "8192"}, wantErr: "has to be smaller"},
		{options: map[string]string{"offset": "9223372036854775807", "size": "512"}, wantErr: "cannot be greater"},
		{options: map[string]string{"size": "100"}, wantErr: "not multiple"},
		{options: map[string]string{"size": "-512"}, wantErr: "expects a non-negative number"},
		{options: map[string]string{"size": "many"}, wantErr: "expects a non-negative number"},
		{options: map[string]string{"colour": "red"}, wantErr: "does not support"},
	} {
		dev, err := block.Open(t.Context(), path, block.OpenOptions{Format: "raw", ReadOnly: true, Options: tc.options})
		switch {
		case tc.wantErr != "":
			if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
				t.Errorf("%v: %v, want an error with %q", tc.options, err, tc.wantErr)
			}
		case err != nil:
			t.Errorf("%v: %v", tc.options, err)
		case dev.Size() != tc.size:
			t.Errorf("%v: size %d, want %d", tc.options, dev.Size(), tc.size)
		}
		if err == nil {
			if err := dev.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestRawFailuresAreReported(t *testing.T) {
	boom := errors.New("boom")
	file, err := storage.OpenFile(newFile(t, nil, 1<<20), storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := block.NewRaw(failingFile{file, boom}, block.RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for name, err := range map[string]error{
		"ReadAt":      dev.ReadAt(ctx, make([]byte, 10), 0),
		"WriteAt":     dev.WriteAt(ctx, make([]byte, 10), 0, 0),
		"WriteZeroes": dev.WriteZeroes(ctx, 0, 10, 0),
		"Unmap":       dev.WriteZeroes(ctx, 0, 10, block.ZeroUnmap),
		"Discard":     dev.Discard(ctx, 0, 10),
		"Flush":       dev.Flush(ctx),
		"Extents":     dev.Extents(ctx, 0, 10, func(block.Extent) bool { return true }),
		"Close":       dev.Close(),
	} {
		if !errors.Is(err, boom) {
			t.Errorf("%s: %v, want the host's error", name, err)
		}
	}
}

type failingFile struct {
	storage.File
	err error
}

func (f failingFile) ReadAt([]byte, int64) (int, error)           { return 0, f.err }
func (f failingFile) WriteAt([]byte, int64) (int, error)          { return 0, f.err }
func (f failingFile) Sync() error                                 { return f.err }
func (f failingFile) PunchHole(int64, int64) error                { return f.err }
func (f failingFile) ZeroRange(int64, int64) error                { return f.err }
func (f failingFile) NextExtent(int64) (int64, bool, error)       { return 0, false, f.err }
func (f failingFile) ReadVAt([][]byte, int64) (n int, err error)  { return 0, f.err }
func (f failingFile) WriteVAt([][]byte, int64) (n int, err error) { return 0, f.err }
