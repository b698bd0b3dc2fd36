package image_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// sparseImage makes an image of a cluster size with random content, some of it zeroes, some not allocated.
func sparseImage(t *testing.T, r *rand.Rand, cs, size int64) (*qcow2.Image, []byte) {
	t.Helper()
	ctx := context.Background()
	f := storage.NewMemFile(fmt.Sprintf("%d-%d.qcow2", cs, r.Uint64()))
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: size, ClusterSize: cs}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = im.Close() })
	model := make([]byte, size)
	for range 12 {
		off := r.Int64N(size)
		n := min(1+r.Int64N(size/8), size-off)
		switch r.IntN(3) {
		case 0:
			if err := im.WriteZeroes(ctx, off, n, block.ZeroFlags(r.IntN(2))); err != nil {
				t.Fatal(err)
			}
			clear(model[off : off+n])
		default:
			for i := range n {
				model[off+i] = byte(r.IntN(3) * r.IntN(200))
			}
			if err := im.WriteAt(ctx, model[off:off+n], off, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	return im, model
}

// naiveDiff compares unit by unit.
func naiveDiff(a, b []byte, unit int) (list []image.DiffRange) {
	n := max(len(a), len(b))
	grown := func(p []byte) []byte { return append(bytes.Clone(p), make([]byte, n-len(p))...) }
	a, b = grown(a), grown(b)
	zero := func(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }
	for at := 0; at < n; at += unit {
		end := min(at+unit, n)
		x, y := a[at:end], b[at:end]
		if bytes.Equal(x, y) {
			continue
		}
		kind := image.DiffChanged
		if zero(x) {
			kind = image.DiffAdded
		} else if zero(y) {
			kind = image.DiffRemoved
		}
		if k := len(list) - 1; k >= 0 && list[k].Off+list[k].Len == int64(at) && list[k].Kind == kind {
			list[k].Len += int64(end - at)
			continue
		}
		list = append(list, image.DiffRange{Off: int64(at), Len: int64(end - at), Kind: kind})
	}
	return list
}

func diff(t *testing.T, a, b block.Device, o image.DiffOptions) (list []image.DiffRange) {
	t.Helper()
	if err := image.Diff(context.Background(), a, b, o, func(r image.DiffRange) error {
		list = append(list, r)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestDiff(t *testing.T) {
	for seed := range uint64(14) {
		r := rand.New(rand.NewPCG(seed, 1))
		a, x := sparseImage(t, r, 512<<r.IntN(8), 9<<20+512*int64(r.IntN(9)))
		b, y := sparseImage(t, r, 512<<r.IntN(8), 9<<20+512*int64(r.IntN(9)))
		if seed%2 == 0 { // much in common
			if err := b.WriteAt(context.Background(), x[:8<<20], 0, 0); err != nil {
				t.Fatal(err)
			}
			copy(y, x[:8<<20])
			y[5<<20]++
			if err := b.WriteAt(context.Background(), y[5<<20:5<<20+1], 5<<20, 0); err != nil {
				t.Fatal(err)
			}
		}
		unit := int64(512) << r.IntN(7)
		got, want := diff(t, a, b, image.DiffOptions{Granularity: unit}), naiveDiff(x, y, int(unit))
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("seed %d, unit %d: %v, want %v", seed, unit, got, want)
		}
		if got := diff(t, a, a, image.DiffOptions{}); len(got) != 0 {
			t.Fatalf("an image differs from itself: %v", got)
		}
	}
}

// unreadable is an image whose data cannot be read.
type unreadable struct{ block.Device }

func (unreadable) ReadAt(context.Context, []byte, int64) error { return errors.New("read") }

// TestDiffSnapshots does not read what two snapshots share.
func TestDiffSnapshots(t *testing.T) {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(3, 3))
	im, model := sparseImage(t, r, 4096, 4<<20)
	for _, name := range []string{"one", "two"} {
		if _, err := im.CreateSnapshot(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	old := bytes.Clone(model)
	for i := range model[1<<20 : 1<<20+5000] {
		model[1<<20+i] = byte(i + 7)
	}
	if err := im.WriteAt(ctx, model[1<<20:1<<20+5000], 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	one, err := im.OpenSnapshot(ctx, "one")
	if err != nil {
		t.Fatal(err)
	}
	two, err := im.OpenSnapshot(ctx, "two")
	if err != nil {
		t.Fatal(err)
	}
	if got := diff(t, unreadable{one}, unreadable{two}, image.DiffOptions{}); len(got) != 0 {
		t.Fatalf("%v", got)
	}
	if got, want := diff(t, one, im, image.DiffOptions{}), naiveDiff(old, model, 4096); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%v, want %v", got, want)
	}
	err = image.Diff(ctx, unreadable{one}, im, image.DiffOptions{}, func(image.DiffRange) error { return nil })
	var read *image.ReadError
	if !errors.As(err, &read) || read.Dev != 0 {
		t.Fatal(err)
	}
}

func TestDiffStatus(t *testing.T) {
	ctx := context.Background()
	var ims [2]*qcow2.Image
	for i := range ims {
		f := storage.NewMemFile(fmt.Sprint(i))
		if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		var err error
		if ims[i], err = qcow2.Open(ctx, f, qcow2.Options{}); err != nil {
			t.Fatal(err)
		}
		defer ims[i].Close()
	}
	p := bytes.Repeat([]byte("x"), 64<<10)
	for _, err := range []error{ims[0].WriteAt(ctx, p, 0, 0), ims[1].WriteCompressed(ctx, p, 0), ims[0].WriteAt(ctx, p, 64<<10, 0),
		ims[1].WriteAt(ctx, p[:5], 64<<10, 0), ims[1].WriteAt(ctx, p, 128<<10, 0), ims[1].WriteZeroes(ctx, 128<<10, 64<<10, 0)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	got := diff(t, ims[0], ims[1], image.DiffOptions{Status: true})
	want := []image.DiffRange{{0, 64 << 10, image.DiffStatus, [2]string{"data", "compressed"}},
		{128 << 10, 64 << 10, image.DiffStatus, [2]string{"unallocated", "zero"}}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%v", got)
	}
	if err := image.Diff(ctx, ims[0], ims[1], image.DiffOptions{Granularity: 700}, nil); err == nil {
		t.Fatal("a granularity of 700")
	}
}

// naiveSum is what Sum is documented to be.
func naiveSum(b []byte) []byte {
	top := sha256.New()
	top.Write([]byte("drover sha256-1m\n"))
	top.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
	for len(b) > 0 {
		n := min(len(b), 1<<20)
		h := sha256.Sum256(b[:n])
		top.Write(h[:])
		b = b[n:]
	}
	return top.Sum(nil)
}

func TestSum(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 2))
		size := int64(512 * (1 + r.IntN(20000)))
		im, model := sparseImage(t, r, 512<<r.IntN(9), size)
		got, err := image.Sum(ctx, im, image.SumOptions{})
		if err != nil || !bytes.Equal(got, naiveSum(model)) {
			t.Fatalf("seed %d: %x, %v", seed, got, err)
		}
		flat := sha256.Sum256(model)
		got, err = image.Sum(ctx, im, image.SumOptions{Algorithm: image.SumFlat})
		if err != nil || !bytes.Equal(got, flat[:]) {
			t.Fatalf("seed %d, flat: %x, %v", seed, got, err)
		}
	}
	im, _ := sparseImage(t, rand.New(rand.NewPCG(1, 1)), 65536, 3<<20)
	if _, err := image.Sum(ctx, im, image.SumOptions{Algorithm: "md5"}); err == nil {
		t.Fatal("an algorithm that is not there")
	}
	var read *image.ReadError
	if _, err := image.Sum(ctx, unreadable{im}, image.SumOptions{}); !errors.As(err, &read) {
		t.Fatal(err)
	}
}
