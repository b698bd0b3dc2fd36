package race

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
)

// TestNeighboursInACluster has several writers share the clusters of a disk, each with parts of its own: what one does to its
// parts, allocating, zeroing or overwriting, must not undo what another did to its own in the same cluster.
func TestNeighboursInACluster(t *testing.T) {
	const (
		workers = 4
		piece   = 6 << 10
		size    = 1 << 20
	)
	requests := 6000
	if testing.Short() {
		requests = 1500
	}
	for _, o := range []qcow2.CreateOptions{{}, {ExtendedL2: true}, {ExtendedL2: true, ClusterSize: 16 << 10}, {ClusterSize: 4096}} {
		t.Run(fmt.Sprintf("extended=%v,cluster=%d", o.ExtendedL2, o.ClusterSize), func(t *testing.T) {
			o.Size = size
			path := filepath.Join(t.TempDir(), "disk")
			f, err := storage.CreateFile(path, storage.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := qcow2.Create(t.Context(), f, o); err != nil {
				t.Fatal(err)
			}
			im, err := qcow2.Open(t.Context(), f, qcow2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for w := range workers {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 7))
					model := make([]byte, size)
					for range requests {
						if err := changeOwn(t.Context(), im, rng, model, w, workers, piece); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			harness.MustBeSound(t, path, true)
		})
	}
}

// changeOwn changes a part of one of the worker's pieces, and reads all of the piece.
func changeOwn(ctx context.Context, im *qcow2.Image, rng *rand.Rand, model []byte, w, workers, piece int) error {
	first := (rng.IntN(len(model)/piece/workers)*workers + w) * piece
	skip := rng.IntN(piece/512) * 512
	off, n := first+skip, 512+rng.IntN((piece-skip)/512)*512
	part := model[off : off+n]
	var err error
	switch rng.IntN(4) {
	case 0:
		clear(part)
		err = im.WriteZeroes(ctx, int64(off), int64(n), block.ZeroUnmap*block.ZeroFlags(rng.IntN(2)))
	default:
		for i := range part {
			part[i] = byte(rng.Uint32()) | 1
		}
		if rng.IntN(2) == 0 && im.TryWriteAt(part, int64(off)) == nil {
			break
		}
		err = im.WriteAt(ctx, part, int64(off), 0)
	}
	if err != nil {
		return err
	}
	got := make([]byte, piece)
	if err := im.ReadAt(ctx, got, int64(first)); err != nil {
		return err
	}
	for s := 0; s < piece; s += 512 {
		if !bytes.Equal(got[s:s+512], model[first+s:first+s+512]) {
			return fmt.Errorf("worker %d: sector at %#x holds %x..., not %x...", w, first+s, got[s:s+8], model[first+s:first+s+8])
		}
	}
	return nil
}
