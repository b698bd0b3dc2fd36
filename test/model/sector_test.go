package model

import (
	"bytes"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
)

// TestNoSectorInTwoPieces: zeroes that begin inside a sector and are too many for one write to the host leave every sector
// old or new, also the one where the pieces meet.
func TestNoSectorInTwoPieces(t *testing.T) {
	const size = 73728
	base := storage.NewMemFile("sector.qcow2")
	harness.OK(t, qcow2.Create(ctx, base, qcow2.CreateOptions{Size: size}))
	f := storage.NewCrashFile(base)
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	harness.OK(t, err)
	before := make([]byte, size)
	harness.Fill(before, 5)
	harness.OK(t, im.WriteAt(ctx, before, 0, 0))
	harness.OK(t, im.Flush(ctx))
	after := bytes.Clone(before)
	clear(after[24:73490])
	harness.OK(t, im.WriteZeroes(ctx, 24, 73466, block.ZeroUnmap))
	e := f.Explorer()
	harness.OK(t, e.Seek(e.Len()))
	for _, file := range e.States(storage.ExploreOptions{}) {
		left, err := qcow2.Open(ctx, file, qcow2.Options{ReadOnly: true})
		harness.OK(t, err)
		got := make([]byte, size)
		harness.OK(t, left.ReadAt(ctx, got, 0))
		for off := 0; off < size; off += sector {
			if !isOne(got[off:off+sector], [][]byte{before, after}, off) {
				t.Fatalf("the sector at %#x is neither old nor new", off)
			}
		}
		harness.OK(t, left.Close())
	}
	harness.OK(t, im.Close())
}
