package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// keep is a file that stays open when the image that owns it is closed.
type keep struct{ storage.File }

func (keep) Close() error { return nil }

func readAll(t *testing.T, dev block.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if err := dev.ReadAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// empty makes a target.
func empty(t *testing.T, o qcow2.CreateOptions, backing block.Device) (*storage.MemFile, *qcow2.Image) {
	t.Helper()
	f := storage.NewMemFile("target.qcow2")
	if backing != nil {
		o.BackingFile, o.BackingFormat = "base", "qcow2"
	}
	if err := qcow2.Create(t.Context(), f, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), keep{f}, qcow2.Options{Backing: backing})
	if err != nil {
		t.Fatal(err)
	}
	return f, im
}

// TestConvert copies disks in every way, and compares content and check.
func TestConvert(t *testing.T) {
	ctx := t.Context()
	const size = 5<<20 + 1024
	for seed := range uint64(3) {
		_, a := fill(t, size, seed, qcow2.CreateOptions{ClusterSize: 4096})
		_, b := fill(t, 700<<10, seed+10, qcow2.CreateOptions{})
		for _, sources := range [][]block.Device{{a}, {b, a}, {a, b, b}} {
			var want []byte
			for _, s := range sources {
				want = append(want, readAll(t, s)...)
			}
			for _, o := range []ConvertOptions{
				{Sparse: 4096, Zero: true}, {Sparse: 512, Zero: true, Workers: 8, OutOfOrder: true}, {Zero: true}, {Sparse: 4096},
				{Sparse: 4096, Zero: true, Compress: true, Workers: 4}, {Sparse: 4096, Compress: true}, {Sparse: 16 << 20, Zero: true, Workers: 3},
				{Sparse: 4096, Rate: 1 << 40},
			} {
				for _, cluster := range []int64{4096, 65536, 2 << 20} {
					f, target := empty(t, qcow2.CreateOptions{Size: int64(len(want)), ClusterSize: cluster}, nil)
					o.ClusterSize = cluster
					last := int64(0)
					o.Progress = func(done, total int64) {
						if done <= last || total != int64(len(want)) {
							t.Errorf("progress went from %d to %d of %d", last, done, total)
						}
						last = done
					}
					name := fmt.Sprintf("seed %d, %d sources, %+v, cluster %d", seed, len(sources), o, cluster)
					if !o.Zero { // what is there must go
						if err := target.WriteAt(ctx, bytes.Repeat([]byte{7}, len(want)), 0, 0); err != nil {
							t.Fatal(err)
						}
					}
					if err := Convert(ctx, target, sources, o); err != nil {
						t.Fatalf("%s: %v", name, err)
					}
					if !bytes.Equal(readAll(t, target), want) {
						t.Fatalf("%s: the content differs", name)
					}
					if last != int64(len(want)) {
						t.Errorf("%s: progress ended at %d", name, last)
					}
					if o.Sparse == 0 {
						mustBeAllData(t, target)
					}
					if err := target.Close(); err != nil {
						t.Fatal(err)
					}
					if rep, err := qcow2.CheckFile(ctx, f, qcow2.CheckOptions{}); err != nil || !rep.Clean() {
						t.Fatalf("%s: check: %+v %v", name, rep, err)
					}
				}
			}
		}
	}
}

func mustBeAllData(t *testing.T, dev block.Device) {
	t.Helper()
	err := dev.Extents(t.Context(), 0, dev.Size(), func(e block.Extent) bool {
		if !e.Data {
			t.Errorf("no data at %d+%d", e.Off, e.Len)
		}
		return e.Data
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestConvertOverBacking: what the source does not allocate itself is not copied, and the disk is the same all the same.
func TestConvertOverBacking(t *testing.T) {
	ctx := t.Context()
	for seed := range uint64(4) {
		fb, base := fill(t, 2<<20, seed+20, qcow2.CreateOptions{})
		if err := base.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		again := func() block.Device {
			im, err := qcow2.Open(ctx, keep{fb}, qcow2.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			return im
		}
		_, src := empty(t, qcow2.CreateOptions{Size: 3 << 20, ClusterSize: 4096}, again())
		for i := range int64(30) {
			if err := src.WriteAt(ctx, bytes.Repeat([]byte{byte(i)}, 5000), i*97_000, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := src.WriteZeroes(ctx, 1<<20, 500<<10, 0); err != nil {
			t.Fatal(err)
		}
		for _, compress := range []bool{false, true} {
			f, target := empty(t, qcow2.CreateOptions{Size: 3 << 20}, again())
			o := ConvertOptions{Sparse: 4096, Backed: true, BackingSize: 2 << 20, Workers: 3, Compress: compress, ClusterSize: 65536}
			if err := Convert(ctx, target, []block.Device{src}, o); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(readAll(t, target), readAll(t, src)) {
				t.Fatal("the content differs")
			}
			kept := false
			if err := target.Extents(ctx, 0, target.Size(), func(e block.Extent) bool { kept = kept || e.Depth > 0 && e.Data; return true }); err != nil {
				t.Fatal(err)
			}
			if !kept && !compress {
				t.Error("everything was copied")
			}
			if err := target.Close(); err != nil {
				t.Fatal(err)
			}
			if rep, err := qcow2.CheckFile(ctx, f, qcow2.CheckOptions{}); err != nil || !rep.Clean() {
				t.Fatalf("check: %+v %v", rep, err)
			}
		}
		if err := src.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConvertFails(t *testing.T) {
	ctx := t.Context()
	const size = 4 << 20
	f, src := fill(t, size, 5, qcow2.CreateOptions{})
	want := readAll(t, src)
	_, target := empty(t, qcow2.CreateOptions{Size: size}, nil)
	defer target.Close()
	f.Inject(storage.Fault{Kind: storage.OpRead, Times: -1})
	var read *ReadError
	o := ConvertOptions{Sparse: 4096, Workers: 4}
	if err := Convert(ctx, target, []block.Device{src}, o); !errors.As(err, &read) || !errors.Is(err, syscall.EIO) {
		t.Errorf("reading fails: %v", err)
	}
	lost := make(chan int64, size/sector)
	o.Salvage = func(off int64, err error) { lost <- off }
	if err := Convert(ctx, target, []block.Device{src}, o); err != nil || len(lost) == 0 {
		t.Errorf("salvage: %v, %d sectors lost", err, len(lost))
	}
	if !bytes.Equal(readAll(t, target), make([]byte, size)) {
		t.Error("what cannot be read is not zero in the target")
	}
	f.Clear()
	if err := Convert(ctx, target, []block.Device{src}, o); err != nil || !bytes.Equal(readAll(t, target), want) {
		t.Errorf("with the storage mended: %v", err)
	}
	if err := Convert(ctx, target, []block.Device{src, src}, o); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("a target that is too small: %v", err)
	}
	view, err := src.CreateSnapshot(ctx, "s")
	if err != nil {
		t.Fatal(err)
	}
	dev, err := OpenSnapshot(ctx, src, SnapshotRef{Name: view.Name})
	if err != nil {
		t.Fatal(err)
	}
	var write *WriteError
	if err := Convert(ctx, dev, []block.Device{src}, o); !errors.As(err, &write) || !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a target that cannot be written: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := Convert(cancelled, target, []block.Device{src}, o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
