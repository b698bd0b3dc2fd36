package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// stockDir is a folder in which stock tools work: they look for a data file in the folder they run in.
type stockDir struct {
	t   *testing.T
	dir string
}

func newStockDir(t *testing.T) stockDir {
	t.Helper()
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	return stockDir{t, t.TempDir()}
}

func (d stockDir) path(name string) string { return filepath.Join(d.dir, name) }

func (d stockDir) run(tool string, args ...string) {
	d.t.Helper()
	cmd := exec.Command(tool, args...)
	cmd.Dir = d.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		d.t.Fatalf("%s %q: %v\n%s", tool, args, err, out)
	}
}

// agrees has stock check the image and compare it with a model.
func (d stockDir) agrees(model []byte) {
	d.t.Helper()
	if err := os.WriteFile(d.path("model.raw"), model, 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.run("qemu-img", "check", "image.qcow2")
	d.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "model.raw")
	file := d.file("image.qcow2")
	checkFile(d.t, file)
	if err := file.Close(); err != nil {
		d.t.Fatal(err)
	}
}

func (d stockDir) file(name string) *storage.OSFile {
	d.t.Helper()
	f, err := storage.OpenFile(d.path(name), storage.OpenOptions{})
	if err != nil {
		d.t.Fatal(err)
	}
	return f
}

// open opens the image for writing through block.Open, under a policy that allows its folder.
func (d stockDir) open() block.Device {
	d.t.Helper()
	dev, err := block.Open(context.Background(), d.path("image.qcow2"), block.OpenOptions{Format: "qcow2", Policy: block.BelowImageFolder()})
	if err != nil {
		d.t.Fatal(err)
	}
	return dev
}

// change changes a disk and its model at random.
func (d stockDir) change(dev block.Device, model []byte, r *rand.Rand, cluster int64) {
	d.t.Helper()
	ctx := context.Background()
	for range 40 {
		off := r.Int64N(int64(len(model)))
		n := 1 + r.Int64N(min(int64(len(model))-off, 3*cluster))
		var err error
		switch r.IntN(5) {
		case 0:
			clear(model[off : off+n])
			err = dev.WriteZeroes(ctx, off, n, block.ZeroFlags(r.IntN(2)))
		case 1:
			off = off / cluster * cluster
			n = min(cluster, int64(len(model))-off)
			if err = dev.Discard(ctx, off, n); err == nil {
				clear(model[off : off+n])
			}
		default:
			for i := range n {
				model[off+i] = byte(r.Uint32()) | 1
			}
			err = dev.WriteAt(ctx, model[off:off+n], off, 0)
		}
		if err != nil {
			d.t.Fatal(err)
		}
	}
}

// TestDataFileBothWays has stock and us create images with an external data file, and each change what the other made.
func TestDataFileBothWays(t *testing.T) {
	if testing.Short() {
		t.Skip("one client after another: the long form shows it")
	}
	const size = 3<<20 + 1536
	for _, raw := range []bool{false, true} {
		for _, o := range []struct {
			cluster  int64
			extended bool
		}{{512, false}, {4096, false}, {65536, false}, {65536, true}, {2 << 20, false}} {
			for _, stockMakes := range []bool{true, false} {
				t.Run(fmt.Sprintf("raw=%v,cluster=%d,extended=%v,stock=%v", raw, o.cluster, o.extended, stockMakes), func(t *testing.T) {
					t.Parallel()
					d := newStockDir(t)
					onOff := map[bool]string{true: "on", false: "off"}
					if stockMakes {
						d.run("qemu-img", "create", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d,extended_l2=%s,data_file=image.data,data_file_raw=%s",
							o.cluster, onOff[o.extended], onOff[raw]), "image.qcow2", fmt.Sprint(size))
					} else {
						d.create(qcow2.CreateOptions{Size: size, ClusterSize: o.cluster, ExtendedL2: o.extended, DataFile: "image.data", DataFileRaw: raw})
					}
					model := make([]byte, size)
					r := rand.New(rand.NewPCG(uint64(o.cluster), 3))
					for round := range 2 {
						fill := func(b []byte, v byte) {
							for i := range b {
								b[i] = v
							}
						}
						d.run("qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "write -P 17 70000 200000", "-c", "write -z 100k 128k",
							"-c", "discard 1M 256k", "-c", "write -P 33 3145728 1536", "image.qcow2")
						fill(model[70000:270000], 17)
						clear(model[100<<10 : 228<<10])
						fill(model[3145728:], 33)
						d.rest(model, round)
						dev := d.open()
						d.change(dev, model, r, o.cluster)
						if err := dev.Close(); err != nil {
							t.Fatal(err)
						}
						d.agrees(model)
						if !raw {
							continue
						}
						// Stock makes the file as long as whole clusters.
						if b, err := os.ReadFile(d.path("image.data")); err != nil || len(b) < size || !bytes.Equal(b[:size], model) {
							t.Fatalf("the raw data file has %d bytes and differs from the disk (%v)", len(b), err)
						}
					}
				})
			}
		}
	}
}

// rest brings the model up to date where stock's discard does as it likes.
func (d stockDir) rest(model []byte, round int) {
	d.t.Helper()
	d.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "image.qcow2", "now.raw")
	b, err := os.ReadFile(d.path("now.raw"))
	if err != nil || len(b) != len(model) {
		d.t.Fatalf("round %d: %d bytes, want %d (%v)", round, len(b), len(model), err)
	}
	part := model[1<<20 : 1280<<10]
	for i, v := range b[1<<20 : 1280<<10] {
		if v != 0 && v != part[i] {
			d.t.Fatalf("round %d: byte %d after stock's discard is neither old nor zero", round, i)
		}
	}
	copy(part, b[1<<20:])
	if !bytes.Equal(b, model) {
		d.t.Fatalf("round %d: stock reads something else than what was written", round)
	}
}

// create makes the image by ourselves.
func (d stockDir) create(o qcow2.CreateOptions) {
	d.t.Helper()
	file, err := storage.CreateFile(d.path("image.qcow2"), storage.OpenOptions{})
	if err != nil {
		d.t.Fatal(err)
	}
	defer file.Close()
	if o.DataFile != "" {
		data, err := storage.CreateFile(d.path(o.DataFile), storage.OpenOptions{})
		if err != nil {
			d.t.Fatal(err)
		}
		defer data.Close()
		o.DataStorage = data
	}
	if err := qcow2.Create(context.Background(), file, o); err != nil {
		d.t.Fatal(err)
	}
}

// TestCompressedBothWays has stock and us write compressed clusters in turns, over all cluster sizes and both types.
func TestCompressedBothWays(t *testing.T) {
	if testing.Short() {
		t.Skip("one client after another: the long form shows it")
	}
	for _, kind := range []string{"zlib", "zstd"} {
		for _, bits := range []int{1, 16} {
			for _, shift := range []int{9, 12, 16, 21} {
				t.Run(fmt.Sprintf("%s,cluster=%d,refcount=%d", kind, 1<<shift, bits), func(t *testing.T) {
					t.Parallel()
					d := newStockDir(t)
					cluster := int64(1) << shift
					model := someText(int(7*cluster + cluster/2&^511))
					clear(model[2*cluster : 3*cluster])
					if err := os.WriteFile(d.path("in.raw"), model, 0o600); err != nil {
						t.Fatal(err)
					}
					d.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o",
						fmt.Sprintf("cluster_size=%d,compression_type=%s,refcount_bits=%d", cluster, kind, bits), "in.raw", "image.qcow2")
					dev := d.open()
					r := rand.New(rand.NewPCG(1, uint64(shift)))
					for range 15 {
						first := r.Int64N(8)
						off := first * cluster
						n := min((1+r.Int64N(8-first))*cluster, int64(len(model))-off)
						copy(model[off:off+n], someText(int(n + 512))[r.IntN(512):])
						if r.IntN(4) == 0 {
							clear(model[off : off+min(n, cluster)])
						}
						if err := dev.(block.CompressedWriter).WriteCompressed(context.Background(), model[off:off+n], off); err != nil {
							t.Fatal(err)
						}
					}
					if err := dev.Close(); err != nil {
						t.Fatal(err)
					}
					d.agrees(model)
					// Stock writes compressed only where nothing is allocated.
					d.run("qemu-io", "-f", "qcow2", "-d", "unmap", "-c", fmt.Sprintf("discard 0 %d", 2*cluster), "-c", fmt.Sprintf("write -c -P 90 0 %d", cluster), "image.qcow2")
					for i := range cluster {
						model[i], model[cluster+i] = 90, 0
					}
					dev = d.open()
					if err := dev.(block.CompressedWriter).WriteCompressed(context.Background(), model[cluster:2*cluster], cluster); err != nil {
						t.Fatal(err)
					}
					if err := dev.Close(); err != nil {
						t.Fatal(err)
					}
					d.agrees(model)
				})
			}
		}
	}
}
