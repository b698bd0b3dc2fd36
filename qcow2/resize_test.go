package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// wholeDisk reads the whole disk.
func wholeDisk(t testing.TB, im *qcow2.Image) []byte {
	t.Helper()
	b := make([]byte, im.Size())
	if err := im.ReadAt(context.Background(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestResize grows and shrinks images of every shape with data all over them.
func TestResize(t *testing.T) {
	ctx := context.Background()
	type shape struct {
		name    string
		o       qcow2.CreateOptions
		backing int64
	}
	var shapes []shape
	for _, cs := range []int64{512, 4096, 65536} {
		for _, backing := range []int64{0, 5 << 20} {
			for _, version := range []int{2, 3} {
				o := qcow2.CreateOptions{ClusterSize: cs, Version: version, Size: 1<<20 + 1536}
				shapes = append(shapes, shape{fmt.Sprintf("cluster %d, version %d, backing %d", cs, version, backing), o, backing})
			}
			if cs == 65536 {
				o := qcow2.CreateOptions{ClusterSize: cs, ExtendedL2: true, Size: 1<<20 + 1536}
				shapes = append(shapes, shape{fmt.Sprintf("subclusters, backing %d", backing), o, backing})
			}
		}
	}
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			f := storage.NewMemFile("resize.qcow2")
			if err := qcow2.Create(ctx, f, s.o); err != nil {
				t.Fatal(err)
			}
			o := qcow2.Options{}
			base := bytes.Repeat([]byte("base"), int(s.backing/4))
			if s.backing > 0 {
				o.Backing = blocktest.NewBytes(base)
			}
			im, err := qcow2.Open(ctx, keepOpen{f}, o)
			if err != nil {
				t.Fatal(err)
			}
			model := make([]byte, im.Size())
			copy(model, base)
			for i, size := range []int64{3<<20 + 512, 2 << 20, 2<<20 - 1024, 5 << 20, 100 << 10, 512, 0, 64 << 10, 6<<20 + 2048} {
				mode := qcow2.PreallocOff
				if size > int64(len(model)) {
					mode = qcow2.Preallocation(i % 4)
				}
				if err := im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true, Preallocation: mode}); err != nil {
					t.Fatal(err)
				}
				model = append(model, make([]byte, max(0, int(size)-len(model)))...)[:size]
				if im.Size() != size {
					t.Fatalf("size %d, want %d", im.Size(), size)
				}
				if !bytes.Equal(wholeDisk(t, im), model) {
					t.Fatalf("the content differs at size %d", size)
				}
				for off := int64(0); off < size; off += 300 << 10 {
					p := bytes.Repeat([]byte{byte(i + 1)}, int(min(70<<10, size-off)))
					if err := im.WriteAt(ctx, p, off, 0); err != nil {
						t.Fatal(err)
					}
					copy(model[off:], p)
				}
				if size > 1 {
					if err := im.WriteAt(ctx, []byte{77}, size-1, 0); err != nil {
						t.Fatal(err)
					}
					model[size-1] = 77
				}
				if err := im.WriteAt(ctx, []byte{1}, size, 0); err == nil {
					t.Fatal("a write behind the end was accepted")
				}
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, f)
			o.Backing = nil
			if s.backing > 0 {
				o.Backing = blocktest.NewBytes(base)
			}
			if im, err = qcow2.Open(ctx, keepOpen{f}, o); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(wholeDisk(t, im), model) {
				t.Fatal("the content differs after opening again")
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestResizeRefused(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("resize.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		size int64
		o    qcow2.ResizeOptions
		want error
	}{
		{-1, qcow2.ResizeOptions{}, qcow2.ErrInvalidOption},
		{1<<63 - 1, qcow2.ResizeOptions{}, qcow2.ErrInvalidOption},
		{1 << 40, qcow2.ResizeOptions{}, qcow2.ErrTooBig},
		{1 << 19, qcow2.ResizeOptions{}, qcow2.ErrWouldShrink},
		{1 << 19, qcow2.ResizeOptions{Shrink: true, Preallocation: qcow2.PreallocFull}, qcow2.ErrInvalidOption},
	} {
		if err := im.Resize(ctx, c.size, c.o); !errors.Is(err, c.want) {
			t.Errorf("size %d: %v, want %v", c.size, err, c.want)
		}
		if im.Size() != 1<<20 {
			t.Errorf("size %d after a resize that failed", im.Size())
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}

// TestResizeWithSnapshots: a snapshot keeps its size and content whatever becomes of the disk.
func TestResizeWithSnapshots(t *testing.T) {
	ctx := context.Background()
	f := strangeHeader(t, qcow2.CreateOptions{Size: 1<<20 + 512, ClusterSize: 4096})
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, bytes.Repeat([]byte("old"), 100<<10), 777<<10, 0); err == nil {
		t.Fatal("a write behind the end was accepted")
	}
	if err := im.WriteAt(ctx, bytes.Repeat([]byte("old!"), 200<<8), 824<<10, 0); err != nil {
		t.Fatal(err)
	}
	old := wholeDisk(t, im)
	if _, err := im.CreateSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{900<<10 + 512, 8 << 20, 512, 3 << 20} {
		if err := im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true}); err != nil {
			t.Fatal(err)
		}
	}
	want := make([]byte, 3<<20)
	copy(want, old[:512])
	if !bytes.Equal(wholeDisk(t, im), want) {
		t.Error("the disk did not forget what was cut off")
	}
	if err := im.ApplySnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(wholeDisk(t, im), old) {
		t.Error("the snapshot has changed")
	}
	if err := im.DeleteSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkStrange(t, f)
	checkClean(t, f)
}

func TestResizeVersion2WithSnapshots(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("v2.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, Version: 2}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if _, err := im.CreateSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	if err := im.Resize(ctx, 2<<20, qcow2.ResizeOptions{}); !errors.Is(err, qcow2.ErrInvalidOption) {
		t.Errorf("got %v", err)
	}
}

// TestShrinkGivesSpaceBack: the file ends where what is left of the disk ends.
func TestShrinkGivesSpaceBack(t *testing.T) {
	ctx := context.Background()
	for _, cs := range []int64{4096, 65536} {
		f := storage.NewMemFile("shrink.qcow2")
		if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 8 << 20, ClusterSize: cs}); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := im.WriteAt(ctx, bytes.Repeat([]byte{1}, 8<<20), 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := im.Resize(ctx, 1<<20, qcow2.ResizeOptions{Shrink: true}); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		if size, _ := f.Size(); size > 2<<20 {
			t.Errorf("cluster %d: a file of %d bytes for a disk of 1 MiB", cs, size)
		}
		checkClean(t, f)
	}
}

// TestResizeLongL1: an L1 table longer than what lies between two refcount blocks.
func TestResizeLongL1(t *testing.T) {
	ctx := context.Background()
	for _, bits := range []int{1, 16, 64} {
		f := storage.NewMemFile("long.qcow2")
		if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 512, RefcountBits: bits}); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Repeat([]byte("data"), 50<<10)
		if err := im.WriteAt(ctx, data, 500<<10, 0); err != nil {
			t.Fatal(err)
		}
		for _, size := range []int64{100 << 20, 4 << 30} {
			if err := im.Resize(ctx, size, qcow2.ResizeOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := im.WriteAt(ctx, data, size-int64(len(data)), 0); err != nil {
				t.Fatal(err)
			}
		}
		got := make([]byte, len(data))
		for _, off := range []int64{500 << 10, 100<<20 - int64(len(data)), 4<<30 - int64(len(data))} {
			if err := im.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, data) {
				t.Errorf("refcounts of %d bits: the data at %d: %v", bits, off, err)
			}
		}
		if err := im.Resize(ctx, 1<<20, qcow2.ResizeOptions{Shrink: true}); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkClean(t, f)
	}
}

// TestPreallocationOverBacking: clusters that wait for data let the backing file show through.
func TestPreallocationOverBacking(t *testing.T) {
	ctx := context.Background()
	base := bytes.Repeat([]byte("base"), 1<<18)
	for _, mode := range []qcow2.Preallocation{qcow2.PreallocMetadata, qcow2.PreallocFalloc, qcow2.PreallocFull} {
		f := storage.NewMemFile("prealloc.qcow2")
		o := qcow2.CreateOptions{Size: 1 << 20, ExtendedL2: true, BackingFile: "base.raw", BackingFormat: "raw", Preallocation: mode}
		if err := qcow2.Create(ctx, f, o); err != nil {
			t.Fatal(err)
		}
		im := mustOpen(t, keepOpen{f}, qcow2.Options{Backing: blocktest.NewBytes(base)})
		size, err := f.Size()
		if err != nil || size < 1<<20 {
			t.Errorf("a file of %d bytes, %v", size, err)
		}
		want := bytes.Clone(base)
		if !bytes.Equal(wholeDisk(t, im), want) {
			t.Error("the backing file does not show")
		}
		copy(want[77777:], "data")
		if err := im.WriteAt(ctx, []byte("data"), 77777, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(wholeDisk(t, im), want) {
			t.Error("the content differs")
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		if after, _ := f.Size(); after != size {
			t.Errorf("the file grew from %d to %d bytes", size, after)
		}
		checkClean(t, f)
	}
	o := qcow2.CreateOptions{Size: 1 << 20, BackingFile: "base.raw", BackingFormat: "raw", Preallocation: qcow2.PreallocFull}
	if err := o.Validate(); !errors.Is(err, qcow2.ErrInvalidOption) {
		t.Errorf("without subclusters: %v", err)
	}
}
