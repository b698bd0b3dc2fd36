package block_test

import (
	"bytes"
	"context"
	"errors"
	"math"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// TestRawResize makes a disk longer and shorter, and wants zeroes where something was cut off before.
func TestRawResize(t *testing.T) {
	ctx := context.Background()
	for _, offset := range []int64{0, 1536} {
		f := storage.NewMemFile("disk")
		if err := f.Truncate(offset + 4096); err != nil {
			t.Fatal(err)
		}
		r, err := block.NewRaw(f, block.RawOptions{Offset: offset})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.WriteAt(ctx, bytes.Repeat([]byte{7}, 4096), 0, 0); err != nil {
			t.Fatal(err)
		}
		for _, size := range []int64{8191, 2048, 65536} {
			if err := r.Resize(ctx, size); err != nil {
				t.Fatal(err)
			}
			whole := (size + 511) &^ 511
			if n, err := f.Size(); err != nil || n != offset+whole || r.Size() != whole {
				t.Errorf("after %d: the disk has %d bytes, the file %d (%v)", size, r.Size(), n, err)
			}
		}
		got := make([]byte, 65536)
		if err := r.ReadAt(ctx, got, 0); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 65536)
		copy(want, bytes.Repeat([]byte{7}, 2048))
		if !bytes.Equal(got, want) {
			t.Error("what was cut off came back")
		}
		if err := r.WriteAt(ctx, got[:1], 65536, 0); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("writing past the end: %v", err)
		}
		for _, bad := range []int64{-1, math.MaxInt64, math.MaxInt64 - offset} {
			if err := r.Resize(ctx, bad); !errors.Is(err, block.ErrOutOfRange) {
				t.Errorf("size %d: %v", bad, err)
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := r.Resize(ctx, 512); !errors.Is(err, block.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	}
}

// TestRawResizeRefused has disks that keep their size.
func TestRawResizeRefused(t *testing.T) {
	ctx := context.Background()
	for name, tc := range map[string]struct {
		o    block.RawOptions
		want error
	}{
		"read-only": {block.RawOptions{ReadOnly: true}, block.ErrReadOnly},
		"a part":    {block.RawOptions{Size: 512}, block.ErrFixedSize},
	} {
		f := storage.NewMemFile("disk")
		if err := f.Truncate(4096); err != nil {
			t.Fatal(err)
		}
		r, err := block.NewRaw(f, tc.o)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Resize(ctx, 8192); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}
