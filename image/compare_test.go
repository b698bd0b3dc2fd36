package image

import (
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// fill makes an image of a disk of the given size whose content is drawn from a seed: data, zeroes and nothing.
func fill(t testing.TB, size int64, seed uint64, o qcow2.CreateOptions) (*storage.FaultFile, *qcow2.Image) {
	t.Helper()
	ctx := context.Background()
	f := storage.NewFaultFile(storage.NewMemFile("disk.qcow2"))
	o.Size = size
	if err := qcow2.Create(ctx, f, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = im.Close() })
	r := rand.New(rand.NewPCG(seed, 1))
	for range 40 {
		off := r.Int64N(size)
		n := 1 + r.Int64N(min(size-off, 100<<10))
		if r.IntN(4) == 0 {
			err = im.WriteZeroes(ctx, off, n, block.ZeroFlags(r.IntN(2)))
		} else {
			b := make([]byte, n)
			for i := range b {
				b[i] = byte(r.Uint32()) & 1
			}
			err = im.WriteAt(ctx, b, off, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return f, im
}

// TestCompareFindsTheFirstDifference changes single bytes of one of two equal disks.
func TestCompareFindsTheFirstDifference(t *testing.T) {
	const size = 6<<20 + 512
	ctx := t.Context()
	for seed := range uint64(4) {
		_, a := fill(t, size, seed, qcow2.CreateOptions{ClusterSize: 4096})
		_, b := fill(t, size, seed, qcow2.CreateOptions{ExtendedL2: seed%2 == 0})
		last := int64(-1)
		if got, err := Compare(ctx, a, b, CompareOptions{Progress: func(done, total int64) {
			if done < last || total != size {
				t.Errorf("progress went from %d to %d of %d", last, done, total)
			}
			last = done
		}}); err != nil || got != (Comparison{}) {
			t.Fatalf("seed %d: equal disks: %+v %v", seed, got, err)
		}
		if last != size {
			t.Errorf("progress ended at %d", last)
		}
		r := rand.New(rand.NewPCG(seed, 2))
		first := int64(size)
		for range 5 {
			off := r.Int64N(size)
			var p [1]byte
			if err := a.ReadAt(ctx, p[:], off); err != nil {
				t.Fatal(err)
			}
			p[0] ^= 0x80
			if err := b.WriteAt(ctx, p[:], off, 0); err != nil {
				t.Fatal(err)
			}
			first = min(first, off)
			want := Comparison{Verdict: ContentDiffers, Off: first &^ (sector - 1)}
			for _, pair := range [][2]block.Device{{a, b}, {b, a}} {
				if got, err := Compare(ctx, pair[0], pair[1], CompareOptions{}); err != nil || got != want {
					t.Fatalf("seed %d: %+v %v, want %+v", seed, got, err, want)
				}
			}
		}
	}
}

func TestCompareOfDifferentLength(t *testing.T) {
	ctx := t.Context()
	_, a := fill(t, 5<<20, 1, qcow2.CreateOptions{})
	_, b := fill(t, 5<<20, 1, qcow2.CreateOptions{})
	if err := b.Resize(ctx, 9<<20, qcow2.ResizeOptions{}); err != nil {
		t.Fatal(err)
	}
	check := func(want Comparison, strict bool) {
		t.Helper()
		for _, pair := range [][2]block.Device{{a, b}, {b, a}} {
			if got, err := Compare(ctx, pair[0], pair[1], CompareOptions{Strict: strict}); err != nil || got != want {
				t.Errorf("%+v %v, want %+v", got, err, want)
			}
		}
	}
	check(Comparison{Longer: true}, false)
	check(Comparison{Verdict: SizeDiffers}, true)
	if err := b.WriteAt(ctx, []byte{1}, 8<<20+5, 0); err != nil {
		t.Fatal(err)
	}
	check(Comparison{Verdict: ContentDiffers, Off: 8 << 20, Longer: true}, false)
}

// TestCompareFails: an error says which disk it was and where; what comes first wins over what fails later.
func TestCompareFails(t *testing.T) {
	ctx := t.Context()
	fa, a := fill(t, 8<<20, 3, qcow2.CreateOptions{})
	_, b := fill(t, 8<<20, 3, qcow2.CreateOptions{})
	if _, err := Compare(ctx, a, b, CompareOptions{}); err != nil { // the tables are in memory now
		t.Fatal(err)
	}
	fa.Inject(storage.Fault{Kind: storage.OpRead, Times: -1})
	for i, pair := range [][2]block.Device{{a, b}, {b, a}} {
		_, err := Compare(ctx, pair[0], pair[1], CompareOptions{})
		var read *ReadError
		if !errors.As(err, &read) || read.Dev != i || !errors.Is(err, syscall.EIO) {
			t.Errorf("reading fails: %v", err)
		}
	}
	fa.Clear()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	var status *StatusError
	if _, err := Compare(ctx, b, a, CompareOptions{}); !errors.As(err, &status) || status.Dev != 1 {
		t.Errorf("finding out what is allocated fails: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := Compare(cancelled, b, b, CompareOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
