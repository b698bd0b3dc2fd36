package qcow2_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// stateImage makes an image in a file.
func stateImage(t *testing.T, o qcow2.CreateOptions) (string, *qcow2.Image) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.qcow2")
	file, err := storage.CreateFile(name, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Create(t.Context(), file, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), file, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return name, im
}

func TestVMState(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{Size: 1 << 20}, {Size: 1 << 20, ClusterSize: 512}, {Size: 1<<20 + 512, ClusterSize: 4096, Version: 2},
		{Size: 1 << 20, ClusterSize: 16384, ExtendedL2: true}, {Size: 0},
	} {
		name, im := stateImage(t, o)
		disk := bytes.Repeat([]byte{7}, int(im.Size()))
		state := bytes.Repeat([]byte("machine state "), 100000)
		check := func(when string) {
			t.Helper()
			p := make([]byte, len(disk))
			if err := im.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, disk) {
				t.Errorf("%+v: %s: the disk has changed (%v)", o, when, err)
			}
			p = bytes.Repeat([]byte{0xff}, len(state)+8<<20)
			if err := im.ReadVMState(t.Context(), p, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, append(bytes.Clone(state), make([]byte, 8<<20)...)) {
				t.Errorf("%+v: %s: the state reads otherwise", o, when)
			}
		}
		for _, err := range []error{
			im.WriteAt(t.Context(), disk, 0, 0),
			im.WriteVMState(t.Context(), state[1000:], 1000),
			im.WriteVMState(t.Context(), state[:1000], 0),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		check("written")
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkStateFile(t, name)
		file, err := storage.OpenFile(name, storage.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if im, err = qcow2.Open(t.Context(), file, qcow2.Options{}); err != nil {
			t.Fatal(err)
		}
		check("opened again")
		// A snapshot shares the clusters: what is written afterwards must not reach it.
		if _, err := im.CreateSnapshot(t.Context(), "s"); err != nil {
			t.Fatal(err)
		}
		if err := im.WriteVMState(t.Context(), make([]byte, len(state)), 0); err != nil {
			t.Fatal(err)
		}
		if err := im.ApplySnapshot(t.Context(), "s"); err != nil {
			t.Fatal(err)
		}
		check("snapshot applied")
		if err := im.WriteAt(t.Context(), []byte{1}, im.VMStateOffset(), 0); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("%+v: a write to the disk reaches the state: %v", o, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkStateFile(t, name)
	}
}

func checkStateFile(t *testing.T, name string) {
	t.Helper()
	file, err := storage.OpenFile(name, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	report, err := qcow2.CheckFile(t.Context(), file, qcow2.CheckOptions{})
	if err != nil || !report.Clean() {
		t.Errorf("%+v, %v", report, err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("qemu-img"); err != nil && os.Getenv("CI") != "true" {
		return
	}
	if out, err := exec.Command("qemu-img", "check", name).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v\n%s", err, out)
	}
}

// TestVMStateBitmap: the state is nothing that a dirty bitmap records, and none has room for it.
// A snapshot shares the clusters of the state. What is written then copies the rest of each, which lies behind the disk.
func TestVMStateCopiedOnWrite(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{{Size: 1 << 20}, {Size: 1<<20 + 512, ClusterSize: 4096}, {Size: 1 << 20, ExtendedL2: true}, {}} {
		name, im := stateImage(t, o)
		want := bytes.Repeat([]byte("state of a machine "), 20000)
		write := func(off, n int) {
			t.Helper()
			for i := range want[off : off+n] {
				want[off+i]++
			}
			if err := im.WriteVMState(t.Context(), want[off:off+n], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		write(0, len(want))
		for i, part := range [][2]int{{100, 1}, {65536 - 3, 7}, {200_000, 70_000}, {len(want) - 1, 1}} {
			if _, err := im.CreateSnapshot(t.Context(), string(rune('a'+i))); err != nil {
				t.Fatal(err)
			}
			write(part[0], part[1])
			got := make([]byte, len(want))
			if err := im.ReadVMState(t.Context(), got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%+v: writing %d bytes at %d changed more of the state", o, part[1], part[0])
			}
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkStateFile(t, name)
	}
}

func TestVMStateBitmap(t *testing.T) {
	_, im := stateImage(t, qcow2.CreateOptions{Size: 1 << 20})
	if err := im.AddBitmap(t.Context(), "b", qcow2.BitmapOptions{Granularity: 65536}); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteVMState(t.Context(), make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	dirty := false
	err := im.BitmapExtents(t.Context(), "b", 0, im.Size(), func(_ int64, d bool) bool {
		dirty = dirty || d
		return true
	})
	if err != nil || dirty {
		t.Errorf("dirty %v, %v", dirty, err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestVMStateRefused(t *testing.T) {
	_, im := stateImage(t, qcow2.CreateOptions{Size: 1 << 20})
	const tooFar = 1<<63 - 1
	for _, off := range []int64{-1, tooFar, 1 << 60} {
		if err := im.WriteVMState(t.Context(), []byte{1}, off); err == nil {
			t.Errorf("written at %d", off)
		}
	}
	if err := im.ReadVMState(t.Context(), []byte{1}, tooFar); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("read: %v", err)
	}
	if err := im.WriteVMState(t.Context(), []byte{1}, 0); err != nil {
		t.Errorf("the image is of no use any more: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteVMState(t.Context(), []byte{1}, 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("written to a closed image: %v", err)
	}
}
