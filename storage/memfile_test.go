package storage_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"github.com/droverproject/drover/storage"
)

func readAll(t *testing.T, f storage.File) []byte {
	t.Helper()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

func TestMemFileFarAway(t *testing.T) {
	f := storage.NewMemFile("mem")
	const far = storage.MaxMemSize - 10
	if n, err := f.WriteAt([]byte("0123456789"), far); n != 10 || err != nil {
		t.Fatalf("WriteAt near the limit = %d, %v", n, err)
	}
	if _, err := f.WriteAt([]byte("x"), storage.MaxMemSize); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("WriteAt past the limit: %v, want EFBIG", err)
	}
	if err := f.Truncate(storage.MaxMemSize + 1); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("Truncate past the limit: %v, want EFBIG", err)
	}
	if end, data, err := f.NextExtent(0); end != far-far%4096 || data || err != nil {
		t.Errorf("NextExtent(0) = %d, %v, %v", end, data, err)
	}
	if end, data, err := f.NextExtent(far); end != storage.MaxMemSize || !data || err != nil {
		t.Errorf("NextExtent(far) = %d, %v, %v", end, data, err)
	}
	if got := f.Stat().Allocated; got != 4096 {
		t.Errorf("%d bytes allocated, want one chunk", got)
	}
	if err := f.PunchHole(0, storage.MaxMemSize); err != nil || f.Stat().Allocated != 0 {
		t.Errorf("PunchHole of everything: %v, %d bytes left", err, f.Stat().Allocated)
	}
}

func TestMemFileExtentsExact(t *testing.T) {
	f := storage.NewMemFile("mem")
	for _, chunk := range []int64{1, 2, 511, 512, 513, 2000} {
		if _, err := f.WriteAt([]byte{1}, chunk*4096+5); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.PunchHole(512*4096, 4096); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(2001*4096 - 7); err != nil {
		t.Fatal(err)
	}
	want := []struct {
		chunk int64
		data  bool
	}{{1, false}, {3, true}, {511, false}, {512, true}, {513, false}, {514, true}, {2000, false}}
	off := int64(0)
	for _, w := range want {
		end, data, err := f.NextExtent(off)
		if end != w.chunk*4096 || data != w.data || err != nil {
			t.Fatalf("NextExtent(%d) = %d, %v, %v; want %d, %v", off, end, data, err, w.chunk*4096, w.data)
		}
		off = end
	}
	if end, data, err := f.NextExtent(off); end != 2001*4096-7 || !data || err != nil {
		t.Errorf("last extent = %d, %v, %v", end, data, err)
	}
	if got := f.Stat().Allocated; got != 5*4096 {
		t.Errorf("%d bytes allocated, want 5 chunks", got)
	}
}

// Clones of clones, changed in every way, never see each other's changes.
func TestMemFileClonesAreIndependent(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	files := []*storage.MemFile{storage.NewMemFile("mem")}
	models := [][]byte{nil}
	for step := range 600 {
		i := rng.IntN(len(files))
		f, model := files[i], models[i]
		off, n := rng.IntN(5<<20), rng.IntN(1<<rng.IntN(16))
		switch rng.IntN(8) {
		case 0:
			if len(files) < 6 {
				files, models = append(files, f.Clone()), append(models, bytes.Clone(model))
			}
			continue
		case 1:
			if err := f.PunchHole(int64(off), int64(n*40)); err != nil {
				t.Fatal(err)
			}
			clear(model[min(off, len(model)):min(off+n*40, len(model))])
		case 2:
			if rng.IntN(4) > 0 {
				continue
			}
			if err := f.Truncate(int64(off)); err != nil {
				t.Fatal(err)
			}
			model = append(model[:min(off, len(model)):min(off, len(model))], make([]byte, max(off-len(model), 0))...)
		default:
			p := bytes.Repeat([]byte{byte(step) | 1}, n)
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
			if n > 0 && off+n > len(model) {
				model = append(model, make([]byte, off+n-len(model))...)
			}
			copy(model[min(off, len(model)):], p)
		}
		models[i] = model
	}
	for i, f := range files {
		if !bytes.Equal(readAll(t, f), models[i]) {
			t.Errorf("clone %d differs from its model", i)
		}
	}
}

// Cloning while others write: each clone is what the file was between two writes.
func TestMemFileCloneWhileWriting(t *testing.T) {
	f := storage.NewMemFile("mem")
	const size = 64 << 10
	if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 100 {
			f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, size), 0)
		}
	})
	for range 100 {
		c := f.Clone()
		got := readAll(t, c)
		if !bytes.Equal(got, bytes.Repeat(got[:1], size)) {
			t.Fatal("a clone has half of a write")
		}
		if _, err := c.WriteAt([]byte{0xFF}, 77); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	if !bytes.Equal(readAll(t, f), bytes.Repeat([]byte{100}, size)) {
		t.Errorf("the file has something of its clones")
	}
}

func TestMemFileReopen(t *testing.T) {
	f := storage.NewMemFile("mem")
	f.WriteAt([]byte("content"), 0)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, f.Clone()); string(got) != "content" {
		t.Errorf("the clone of a closed file reads %q", got)
	}
}

func TestCopyContent(t *testing.T) {
	src, dst := storage.NewMemFile("src"), storage.NewMemFile("dst")
	dst.WriteAt(bytes.Repeat([]byte{9}, 100000), 0)
	src.WriteAt([]byte("data"), 5<<20)
	src.Truncate(6<<20 + 1)
	if err := storage.CopyContent(dst, src); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readAll(t, dst), readAll(t, src)) || dst.Stat().Allocated != 4096 {
		t.Errorf("the copy differs, or takes %d bytes", dst.Stat().Allocated)
	}
}

func BenchmarkMemFileWrite64K(b *testing.B) {
	f := storage.NewMemFile("mem")
	p := make([]byte, 64<<10)
	b.SetBytes(int64(len(p)))
	for i := 0; b.Loop(); i++ {
		f.WriteAt(p, int64(i%1024)<<16)
	}
}
