package crash

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestBitmaps cuts the power while clients write and bitmaps are saved, added, merged, cleared and removed. Each state has
// the bitmaps that nobody took away, and what does not say "in use" has marked whatever changed.
func TestBitmaps(t *testing.T) {
	for i, start := range explore.BitmapStarts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			d.AddBitmaps(t)
			for k := range max(*seeds-1, 1) {
				seed := *seed0 + uint64(k)
				clients := []int{1, 3}[k%2]
				w := newWorkload(t, d, k%4 == 2)
				w.also = func(d *explore.Disk, f *storage.MemFile) error { return d.CheckBitmaps(f, false) }
				w.runWithBitmaps(seed, clients, 40/clients)
				judge(t, w, seed+uint64(i)<<32)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// runWithBitmaps is run with changes of the bitmaps among the requests.
func (w *workload) runWithBitmaps(seed uint64, clients, steps int) {
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(c)))
			for range steps {
				var err error
				if r.IntN(4) == 0 {
					if err = explore.DrawBitmapOp(r)(w.im); explore.BitmapOpMayFail(err) {
						err = nil
					}
				} else {
					err = w.do(r)
				}
				if err != nil {
					w.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	w.close()
	opened := *w.disk
	if len(w.all) > 1 {
		opened.Data = w.all[1]
	}
	if err := opened.CheckBitmaps(w.file, true); err != nil {
		w.t.Errorf("after close: %v", err)
	}
}

// TestBitmapsResize cuts the power while a disk with bitmaps gets another size: they say so, or fit the disk.
func TestBitmapsResize(t *testing.T) {
	ctx := context.Background()
	for _, start := range explore.BitmapStarts() {
		if start.QEMU != nil || start.Backing || start.Fill > 0 || start.Data {
			continue
		}
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			d.AddBitmaps(t)
			w := newWorkload(t, d, false)
			old := w.im.Size()
			for _, size := range []int64{old + 100<<10, old / 2, old * 40, old} {
				if err := (explore.Op{Kind: explore.Write, First: 3, N: 5, Version: 7}).Run(w.im); err != nil {
					t.Fatal(err)
				}
				if err := w.im.Resize(ctx, size, qcow2.ResizeOptions{Shrink: true}); err != nil {
					t.Fatal(err)
				}
			}
			w.close()
			o := storage.ExploreOptions{Exhaustive: 7, PerFamily: *samples, Samples: *samples, Seed: *seed0}
			err := w.file.Explorer().Explore(o, func(s storage.CrashState) error {
				total.Add(1)
				if err := sound(s.Image); err != nil {
					return err
				}
				return readableBitmaps(s.Image)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

// readableBitmaps reads every bitmap that does not say that it is in use, and wants what was written marked.
func readableBitmaps(f storage.File) error {
	ctx := context.Background()
	info, err := qcow2.ReadInfo(ctx, f)
	if err != nil {
		return err
	}
	im, err := qcow2.Open(ctx, explore.KeepOpen{File: f}, qcow2.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer im.Close()
	for _, b := range info.Bitmaps {
		if b.InUse {
			continue
		}
		if err := im.BitmapExtents(ctx, b.Name, 0, im.Size(), func(int64, bool) bool { return true }); err != nil {
			return err
		}
	}
	return nil
}
