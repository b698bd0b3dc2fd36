package crash

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/test/explore"
)

// TestCompact cuts the power while images are compacted beside clients that go on writing, flushing and discarding.
func TestCompact(t *testing.T) {
	for i, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for k := range *seeds {
				seed := *seed0 + uint64(k)
				w := newWorkload(t, d, false)
				w.runCompacted(seed, 1+2*(k%2), 36)
				judge(t, w, seed+uint64(i)<<32)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// compact compacts the image, a cluster or two at a time.
func (w *workload) compact() error {
	_, err := w.im.Compact(context.Background(), qcow2.CompactOptions{Step: 2 * w.disk.Cluster * explore.SectorSize})
	return err
}

// runCompacted has clients make requests while the image is compacted again and again, and closes it. A single client
// compacts it itself now and then.
func (w *workload) runCompacted(seed uint64, clients, steps int) {
	var wg sync.WaitGroup
	done := make(chan struct{})
	for c := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(c)))
			for range steps / clients {
				if err := w.do(r); err != nil {
					w.t.Error(err)
					return
				}
				if clients == 1 && r.IntN(7) == 0 {
					if err := w.compact(); err != nil {
						w.t.Error(err)
						return
					}
				}
			}
		})
	}
	var beside sync.WaitGroup
	if clients > 1 {
		beside.Go(func() {
			for range 6 {
				if err := w.compact(); err != nil {
					w.t.Error(err)
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	wg.Wait()
	close(done)
	beside.Wait()
	w.close()
}

// TestCompactSnapshots cuts the power while images are compacted whose snapshots come and go.
func TestCompactSnapshots(t *testing.T) {
	for i, start := range explore.SnapshotStarts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for k := range *seeds {
				seed := *seed0 + uint64(k)
				w := newWorkload(t, d, false)
				w.runCompactedSnapshots(seed, 24)
				judgeSnapshots(t, w, seed+uint64(i)<<32)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// runCompactedSnapshots makes requests of which some are about snapshots, compacts now and then, and closes the image.
func (w *workload) runCompactedSnapshots(seed uint64, steps int) {
	r := rand.New(rand.NewPCG(seed, 10))
	m := w.disk.Model()
	for range steps {
		if r.IntN(4) == 0 {
			if err := w.compact(); err != nil {
				w.t.Fatal(err)
			}
		}
		id := int(w.ids.Add(1))
		op := w.disk.DrawWithSnapshots(r, explore.Version(id+1), m)
		if !op.Changes() && !op.OnSnapshots() {
			if err := op.Run(w.im); err != nil {
				w.t.Fatal(err)
			}
			continue
		}
		w.file.Mark(markBegin{id, op})
		err := op.Run(w.im)
		switch {
		case err == nil:
			w.file.Mark(markDone{id})
			m = m.After(op)
		case errors.Is(err, qcow2.ErrRefcountOverflow) && op.OnSnapshots() && w.disk.Create.RefcountBits == 2:
			w.file.Mark(markRefused{id})
		default:
			w.t.Fatalf("%+v: %v", op, err)
		}
	}
	w.close()
}
