package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// BenchmarkOverlapChecks times 2,000 random overwrites of 4 KiB in 64 MiB of a disk, drover's with every structure watched and
// stock's with its default, on a disk of 1 GiB and on one of 2 PiB (whose L1 table has four million entries). Opening is in
// the time. One operation is all 2,000.
func BenchmarkOverlapChecks(b *testing.B) {
	for _, size := range []string{"1G", "2P"} {
		b.Run("size="+size+"/drover", func(b *testing.B) { benchOverlap(b, size, droverWrites) })
		b.Run("size="+size+"/qemu-io", func(b *testing.B) { benchOverlap(b, size, qemuWrites) })
	}
}

const overwritten = 64 << 20

func benchOverlap(b *testing.B, size string, writes func(testing.TB, string, []int64)) {
	image := filepath.Join(b.TempDir(), "image.qcow2")
	tool(b, "qemu-img", "create", "-q", "-f", "qcow2", image, size)
	tool(b, "qemu-io", "-c", fmt.Sprintf("write -P 7 0 %d", overwritten), image)
	r := rand.New(rand.NewPCG(1, 2))
	offs := make([]int64, 2000)
	for i := range offs {
		offs[i] = r.Int64N(overwritten/4096) * 4096
	}
	for b.Loop() {
		writes(b, image, offs)
	}
}

func droverWrites(b testing.TB, image string, offs []int64) {
	ctx := context.Background()
	f, err := storage.OpenFile(image, storage.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	for _, off := range offs {
		if err := im.WriteAt(ctx, p, off, 0); err != nil {
			b.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		b.Fatal(err)
	}
}

func qemuWrites(b testing.TB, image string, offs []int64) {
	args := []string{"-t", "writeback"}
	for _, off := range offs {
		args = append(args, "-c", fmt.Sprintf("write -q %d 4096", off))
	}
	tool(b, "qemu-io", append(args, image)...)
}

func tool(b testing.TB, name string, args ...string) {
	b.Helper()
	if _, err := exec.LookPath(name); err != nil {
		b.Skipf("%s is not installed", name)
	}
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", name, err, out)
	}
}
