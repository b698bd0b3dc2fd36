package race

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// layered is an image on another, whose readers must see one content whatever becomes of the layers.
type layered struct {
	t    *testing.T
	rng  *rand.Rand
	pace pace
	want []byte // what the upper image reads as

	topFile, baseFile storage.File
	top, base         *qcow2.Image
}

const layeredSize = 1 << 20

// newImage makes an image and opens it, on a file that delays its callers.
func (l *layered) newImage(o qcow2.CreateOptions, backing block.Device) (storage.File, *qcow2.Image) {
	l.t.Helper()
	mem := storage.NewMemFile("layer")
	o.Size = layeredSize
	must(l.t, qcow2.Create(l.t.Context(), mem, o))
	im, err := qcow2.Open(l.t.Context(), newBusyFile(keptOpen{mem}, l.pace, l.rng.Uint64()), qcow2.Options{Backing: backing, CacheSize: 1})
	must(l.t, err)
	return mem, im
}

// fill gives parts of an image other content: data, zeroes, nothing.
func (l *layered) fill(im *qcow2.Image, content []byte) {
	l.t.Helper()
	ctx := l.t.Context()
	for range 60 {
		off := l.rng.Int64N(layeredSize/512) * 512
		part := content[off:min(off+512*(1+l.rng.Int64N(200)), layeredSize)]
		if l.rng.IntN(4) == 0 {
			clear(part)
			must(l.t, im.WriteZeroes(ctx, off, int64(len(part)), block.ZeroUnmap*block.ZeroFlags(l.rng.IntN(2))))
			continue
		}
		for i := range part {
			part[i] = byte(l.rng.Uint32())
		}
		must(l.t, im.WriteAt(ctx, part, off, 0))
	}
}

// beside has readers look at the image until work is done.
func (l *layered) beside(work func(ctx context.Context) error) {
	l.t.Helper()
	var done atomic.Bool
	var wg sync.WaitGroup
	for range 4 {
		seed := l.rng.Uint64()
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 1))
			for reads := 0; !done.Load() || reads < 50; reads++ {
				if err := l.read(rng); err != nil {
					l.t.Error(err)
					return
				}
			}
		})
	}
	err := work(l.t.Context())
	done.Store(true)
	wg.Wait()
	must(l.t, err)
}

func (l *layered) read(rng *rand.Rand) error {
	off := rng.Int64N(layeredSize)
	p := make([]byte, 1+rng.Int64N(min(layeredSize-off, 100_000)))
	err := block.ErrWouldBlock
	switch rng.IntN(3) {
	case 0:
		err = l.top.TryReadAt(p, off)
	case 1:
		err = tryReadData(l.top, p, off)
	}
	if errors.Is(err, block.ErrWouldBlock) {
		err = l.top.ReadAt(context.Background(), p, off)
	}
	if err != nil {
		return err
	}
	if want := l.want[off:][:len(p)]; !bytes.Equal(p, want) {
		i := 0
		for p[i] == want[i] {
			i++
		}
		return fmt.Errorf("read of %d bytes at %#x: byte %d is %#x, not %#x", len(p), off, i, p[i], want[i])
	}
	return nil
}

// TestReadersDuringCommitAndRebase: committing an image into its backing file, emptying it and putting it on another
// backing file change what its clusters and the layers below hold, and never what it reads as.
func TestReadersDuringCommitAndRebase(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	for _, o := range []qcow2.CreateOptions{{}, {ClusterSize: 4096}, {ExtendedL2: true}} {
		for p := range paces {
			t.Run(fmt.Sprintf("cluster=%d,extended=%v,%v", o.ClusterSize, o.ExtendedL2, p), func(t *testing.T) {
				l := &layered{t: t, rng: rand.New(rand.NewPCG(uint64(p), 11)), pace: p, want: make([]byte, layeredSize)}
				l.baseFile, l.base = l.newImage(o, nil)
				l.fill(l.base, l.want)
				over := o
				over.BackingFile, over.BackingFormat = "base", "qcow2"
				l.topFile, l.top = l.newImage(over, l.base)
				for i := range rounds {
					l.fill(l.top, l.want)
					l.round(i, o)
				}
				must(t, l.top.Close())
				mustBeClean(t, l.topFile)
				mustBeClean(t, l.baseFile)
			})
		}
	}
}

func (l *layered) round(i int, o qcow2.CreateOptions) {
	switch i % 3 {
	case 0:
		l.beside(func(ctx context.Context) error { return image.Commit(ctx, l.top, image.CommitOptions{Keep: true}) })
		got := make([]byte, layeredSize)
		must(l.t, l.base.ReadAt(l.t.Context(), got, 0))
		if !bytes.Equal(got, l.want) {
			l.t.Fatal("the backing file does not hold what was committed")
		}
	case 1:
		l.beside(func(ctx context.Context) error { return image.Commit(ctx, l.top, image.CommitOptions{}) })
	case 2:
		otherFile, other := l.newImage(o, nil)
		l.fill(other, make([]byte, layeredSize))
		l.beside(func(ctx context.Context) error {
			return image.Rebase(ctx, l.top, image.RebaseOptions{Backing: other, Name: "base", Format: "qcow2"})
		})
		// The open image reads through the old one still; a new one stands on the other.
		must(l.t, l.top.Close())
		mustBeClean(l.t, l.baseFile)
		var err error
		l.baseFile, l.base = otherFile, other
		l.top, err = qcow2.Open(l.t.Context(), newBusyFile(keptOpen{l.topFile}, l.pace, l.rng.Uint64()), qcow2.Options{Backing: other, CacheSize: 1})
		must(l.t, err)
		l.beside(func(context.Context) error { return nil })
	}
}

// TestStateBesideRequests writes the state of a machine, which makes the L1 table grow, beside requests to the disk and
// snapshots.
func TestStateBesideRequests(t *testing.T) {
	const workers, part, parts = 3, 20 << 10, 40
	requests := 1500
	if testing.Short() {
		requests = 400
	}
	for p := range paces {
		t.Run(p.String(), func(t *testing.T) {
			mem := storage.NewMemFile("state")
			must(t, qcow2.Create(t.Context(), mem, qcow2.CreateOptions{Size: layeredSize, ClusterSize: 4096}))
			im, err := qcow2.Open(t.Context(), newBusyFile(keptOpen{mem}, p, 3), qcow2.Options{CacheSize: 1})
			must(t, err)
			states := make([][]byte, workers)
			var wg sync.WaitGroup
			for w := range workers {
				states[w] = make([]byte, parts*part)
				wg.Go(func() {
					rng, model := rand.New(rand.NewPCG(uint64(w), 5)), make([]byte, layeredSize)
					for range requests {
						if err := changeOwn(t.Context(), im, rng, model, w, workers, 6<<10); err != nil {
							t.Error(err)
							return
						}
					}
				})
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 6))
					for range requests / 4 {
						if err := changeOwnState(t.Context(), im, rng, states[w], w, workers, part); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Go(func() {
				for i := range 6 {
					name := fmt.Sprint(i)
					_, err := im.CreateSnapshot(t.Context(), name)
					if err == nil && i%2 == 0 {
						err = im.DeleteSnapshot(t.Context(), name)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
			wg.Wait()
			must(t, im.Close())
			mustBeClean(t, mem)
			im, err = qcow2.Open(t.Context(), keptOpen{mem}, qcow2.Options{})
			must(t, err)
			for w := range workers {
				for i := range parts {
					must(t, readOwnState(t.Context(), im, states[w], i, w, workers, part))
				}
			}
			must(t, im.Close())
		})
	}
}

// changeOwnState writes one of the worker's parts of the state and reads another; the parts of all workers alternate.
func changeOwnState(ctx context.Context, im *qcow2.Image, rng *rand.Rand, model []byte, w, workers, part int) error {
	parts := len(model) / part
	i := rng.IntN(parts)
	p := model[i*part:][:1+rng.IntN(part)]
	for k := range p {
		p[k] = byte(rng.Uint32())
	}
	if err := im.WriteVMState(ctx, p, int64((i*workers+w)*part)); err != nil {
		return err
	}
	return readOwnState(ctx, im, model, rng.IntN(parts), w, workers, part)
}

func readOwnState(ctx context.Context, im *qcow2.Image, model []byte, i, w, workers, part int) error {
	got := make([]byte, part)
	if err := im.ReadVMState(ctx, got, int64((i*workers+w)*part)); err != nil {
		return err
	}
	if !bytes.Equal(got, model[i*part:][:part]) {
		return fmt.Errorf("part %d of worker %d's state is not what was written", i, w)
	}
	return nil
}
