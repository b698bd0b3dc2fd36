package interop

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/damage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// repairLayout is an image to damage.
type repairLayout struct {
	name, options string
	cluster       int
	snapshot      bool
	bitmap        bool
}

var repairLayouts = []repairLayout{
	{"4k", "cluster_size=4k", 4096, true, true},
	{"64k", "cluster_size=64k", 65536, true, false},
	{"512 bytes, wide refcounts", "cluster_size=512,refcount_bits=64", 512, true, false},
	{"version 2", "cluster_size=4k,compat=0.10", 4096, true, false},
	{"extended", "cluster_size=16k,extended_l2=on", 16384, true, true},
	{"one bit", "cluster_size=4k,refcount_bits=1", 4096, false, false},
}

// make makes the image that damage.Kinds wants.
func (l repairLayout) make(t *testing.T, dir string) string {
	path := filepath.Join(dir, "disk.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", l.options, path, "1M")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -P 2 512k 64k", path)
	if l.snapshot {
		harness.Must(t, "qemu-img", "snapshot", "-c", "before", path)
	}
	if l.bitmap {
		harness.Must(t, "qemu-img", "bitmap", "--add", "-g", "64k", path, "changes")
	}
	commands := []string{"-f", "qcow2"}
	for i := range 4 {
		commands = append(commands, "-c", fmt.Sprintf("write -P %d %d %d", 5+i, i*l.cluster, l.cluster))
	}
	commands = append(commands, "-c", fmt.Sprintf("write -z %d %d", 3*l.cluster, l.cluster), path)
	harness.Must(t, "qemu-io", commands...)
	return path
}

// TestRepairs damages images in every way of package damage. After a repair qemu-img check finds nothing (or what is said to
// stay), and disk, snapshots and bitmaps are what they were.
func TestRepairs(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, l := range repairLayouts {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			path := l.make(t, t.TempDir())
			good, err := os.ReadFile(path)
			harness.OK(t, err)
			want := contentOf(t, l, path)
			x, err := damage.Parse(good)
			harness.OK(t, err)
			for i, k := range damage.Kinds() {
				if !k.Fits(x) || testing.Short() && i%4 != 0 {
					continue
				}
				t.Run(k.Name, func(t *testing.T) {
					spoilt, err := k.Apply(good)
					harness.OK(t, err)
					repairOne(t, l, k, path, spoilt, want)
				})
			}
		})
	}
}

// imageContent is what must survive a repair.
type imageContent struct {
	disk, snapshot []byte
	bitmaps        bool
}

func contentOf(t *testing.T, l repairLayout, path string) imageContent {
	t.Helper()
	c := imageContent{disk: harness.Raw(t, path, "qcow2")}
	if l.snapshot {
		c.snapshot = harness.RawSnapshot(t, path, "before")
	}
	if l.bitmap {
		c.bitmaps = strings.Contains(string(harness.Must(t, "qemu-img", "info", "-f", "qcow2", path)), "name: changes")
	}
	return c
}

func repairOne(t *testing.T, l repairLayout, k damage.Kind, path string, spoilt []byte, want imageContent) {
	file := storage.NewMemFile("damaged")
	_, err := file.WriteAt(spoilt, 0)
	harness.OK(t, err)
	rep, err := qcow2.RepairFile(context.Background(), file, qcow2.RepairOptions{Mode: qcow2.RepairAll})
	harness.OK(t, err)
	repaired := allOf(t, file)
	harness.OK(t, os.WriteFile(path, repaired, 0o600))
	r := harness.Run(t, "qemu-img", "check", "-f", "qcow2", path)
	if k.Stays {
		if r.Code != 2 || rep.After.Corruptions == 0 {
			t.Errorf("what cannot be repaired is not reported: %+v\n%s", rep.After, r)
		}
	} else if r.Code != 0 || !rep.After.Clean() || rep.After.Dirty || rep.After.Corrupt {
		t.Errorf("not repaired: %+v\n%s", rep.After, r)
	}
	if got := len(repaired); !k.Stays && rep.After.ImageEndOffset < int64(got) {
		t.Errorf("the file is %d bytes long, its last cluster ends at %d", got, rep.After.ImageEndOffset)
	}
	got := contentOf(t, l, path)
	if !k.Loses && !bytes.Equal(got.disk, want.disk) {
		t.Error("the disk has another content")
	}
	if !bytes.Equal(got.snapshot, want.snapshot) {
		t.Error("the snapshot has another content")
	}
	if got.bitmaps != want.bitmaps {
		t.Error("the bitmap is gone")
	}
	again, err := qcow2.RepairFile(context.Background(), file, qcow2.RepairOptions{Mode: qcow2.RepairAll})
	harness.OK(t, err)
	if again.Fixed() || !bytes.Equal(allOf(t, file), repaired) {
		t.Errorf("a second repair has something to do: %+v", again)
	}
}

func allOf(t *testing.T, f storage.File) []byte {
	t.Helper()
	n, err := f.Size()
	harness.OK(t, err)
	b := make([]byte, n)
	harness.OK(t, storage.ReadFull(f, b, 0))
	return b
}
