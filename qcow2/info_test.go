package qcow2_test

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

func readInfo(t testing.TB, image []byte) (*qcow2.Info, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	}()
	return qcow2.ReadInfo(t.Context(), file)
}

// imageWithEverything is an image made by qemu-img with two snapshots and two bitmaps.
func imageWithEverything(t testing.TB) []byte {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	path := filepath.Join(t.TempDir(), "image")
	for _, args := range [][]string{
		{"create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k,refcount_bits=8,compression_type=zstd",
			path, "5M"},
		{"snapshot", "-c", "one", path},
		{"snapshot", "-c", "two", path},
		{"bitmap", "--add", "--disable", path, "b0"},
		{"bitmap", "--add", "-g", "1M", path, "b1"},
		{"rebase", "-u", "-F", "raw", "-b", "base.raw", path},
	} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadInfo(t *testing.T) {
	info, err := readInfo(t, imageWithEverything(t))
	if err != nil {
		t.Fatal(err)
	}
	if info.VirtualSize != 5<<20 || info.ClusterSize != 4096 || info.Compat != "1.1" || info.CompressionType != "zstd" ||
		info.RefcountBits != 8 || !info.LazyRefcounts || info.ExtendedL2 || info.Dirty || info.Corrupt {
		t.Errorf("header: %+v", info)
	}
	if info.BackingFile != "base.raw" || info.BackingFormat != "raw" || info.HasDataFile || info.Encryption != nil {
		t.Errorf("references: %+v", info)
	}
	s := info.Snapshots
	if len(s) != 2 || s[0].ID != "1" || s[0].Name != "one" || s[1].Name != "two" || s[1].DiskSize != 5<<20 {
		t.Errorf("snapshots: %+v", s)
	}
	want := []qcow2.BitmapInfo{{Name: "b0", Granularity: 4096}, {Name: "b1", Granularity: 1 << 20, Auto: true}}
	if b := info.Bitmaps; len(b) != 2 || b[0] != want[0] || b[1] != want[1] {
		t.Errorf("bitmaps: %+v", b)
	}
}

// TestReadInfoOfHostileLUKS: an encryption header that is somewhere else, or nowhere, is an error.
func TestReadInfoOfHostileLUKS(t *testing.T) {
	image := make([]byte, 3<<16)
	be := binary.BigEndian
	be.PutUint32(image, 0x514649fb)
	be.PutUint32(image[4:], 3)
	be.PutUint32(image[20:], 16)
	be.PutUint32(image[32:], 2)
	be.PutUint64(image[48:], 1<<16)
	be.PutUint32(image[56:], 1)
	be.PutUint32(image[96:], 4)
	be.PutUint32(image[100:], 104)
	if _, err := readInfo(t, image); err == nil {
		t.Error("no crypto header extension: no error")
	}
	be.PutUint32(image[104:], 0x0537be77)
	be.PutUint32(image[108:], 16)
	for _, off := range []uint64{0, 1 << 16, 1 << 40, 1 << 63, 1<<64 - 1<<16} {
		be.PutUint64(image[112:], off)
		be.PutUint64(image[120:], 592)
		if _, err := readInfo(t, image); err == nil {
			t.Errorf("LUKS header said to be at %#x: no error", off)
		}
	}
}

func FuzzReadInfo(f *testing.F) {
	image := imageWithEverything(f)
	f.Add(uint32(0), []byte{})
	f.Add(uint32(36), []byte{0xff, 0xff})
	f.Add(uint32(60), []byte{0xff, 0xff, 0xff, 0xff})
	f.Add(uint32(112), image[112:256])
	f.Fuzz(func(t *testing.T, off uint32, patch []byte) {
		b := append([]byte(nil), image...)
		copy(b[int(off)%len(b):], patch)
		info, err := readInfo(t, b)
		if (info == nil) == (err == nil) {
			t.Errorf("info %v, error %v", info, err)
		}
	})
}
