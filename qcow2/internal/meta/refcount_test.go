package meta

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

func contextWithCancel(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithCancel(t.Context())
}

// newTestRefcounts makes the refcounts of a file with a header, a table and one block.
func newTestRefcounts(t *testing.T, lay format.Layout) (*Refcounts, *storage.MemFile) {
	t.Helper()
	f := storage.NewMemFile("refcounts")
	cs := lay.ClusterSize()
	table := make([]byte, cs)
	e := format.EncodeUint64(uint64(format.MakeRefTable(lay.Offset(2))))
	copy(table, e[:])
	blk := make([]byte, cs)
	for i := range int64(3) {
		lay.SetRefcount(blk, i, 1)
	}
	for i, b := range [][]byte{make([]byte, cs), table, blk} {
		if _, err := f.WriteAt(b, int64(i)*cs); err != nil {
			t.Fatal(err)
		}
	}
	rc, err := newRefcounts(f, lay, lay.Offset(1), 1)
	if err != nil {
		t.Fatal(err)
	}
	rc.guard = func(r ClusterRun, _ Structure) error {
		if r.First == 0 {
			return corrupt("cluster 0")
		}
		return nil
	}
	return rc, f
}

// TestAllocatorNeverHandsOutTwice allocates and frees at random until the refcount table has grown several times, with
// every refcount width, against a plain map of who holds what.
func TestAllocatorNeverHandsOutTwice(t *testing.T) {
	for order := range uint8(7) {
		for _, bits := range []uint8{9, 12} {
			t.Run(fmt.Sprintf("order=%d,bits=%d", order, bits), func(t *testing.T) {
				lay := format.Layout{ClusterBits: bits, RefcountOrder: order, Version: 3}
				rc, _ := newTestRefcounts(t, lay)
				r := rand.New(rand.NewPCG(uint64(order), uint64(bits)))
				held := map[format.ClusterIdx]bool{0: true, 1: true, 2: true}
				var runs []ClusterRun
				for range 1500 {
					if len(runs) > 0 && r.IntN(3) == 0 {
						i := r.IntN(len(runs))
						run := runs[i]
						runs[i] = runs[len(runs)-1]
						runs = runs[:len(runs)-1]
						if err := rc.Release(run); err != nil {
							t.Fatal(err)
						}
						for c := run.First; c < run.End(); c++ {
							delete(held, c)
						}
						continue
					}
					want := 1 + r.Int64N(1+r.Int64N(300))
					run, _, err := rc.Alloc(want)
					if err != nil {
						t.Fatal(err)
					}
					if run.N < 1 || run.N > want {
						t.Fatalf("asked for %d clusters, got %d", want, run.N)
					}
					for c := run.First; c < run.End(); c++ {
						if held[c] {
							t.Fatalf("cluster %d handed out twice", c)
						}
						held[c] = true
					}
					runs = append(runs, run)
				}
				for i, h := range rc.hosts {
					if h != 0 && lay.Cluster(h) != 2 && held[lay.Cluster(h)] {
						t.Fatalf("refcount block %d lies in cluster %d, which was handed out", i, lay.Cluster(h))
					}
				}
				for c := range held {
					if n, err := rc.Get(c); err != nil || n != 1 {
						t.Fatalf("cluster %d counts %d (%v)", c, n, err)
					}
				}
			})
		}
	}
}

// TestAllocatorReusesHoles frees runs and wants them back before the file grows.
func TestAllocatorReusesHoles(t *testing.T) {
	lay := format.Layout{ClusterBits: 16, RefcountOrder: 4, Version: 3}
	rc, _ := newTestRefcounts(t, lay)
	all, _, err := rc.Alloc(1000)
	if err != nil || all.N != 1000 {
		t.Fatalf("got %d clusters (%v)", all.N, err)
	}
	for _, hole := range []ClusterRun{{all.First + 10, 1}, {all.First + 100, 8}, {all.First + 500, 70}} {
		if err := rc.Release(hole); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		n    int64
		want format.ClusterIdx
	}{{70, all.First + 500}, {5, all.First + 100}, {1, all.First + 10}, {2, all.First + 105}, {1, all.First + 107}, {3, all.End()}} {
		run, virgin, err := rc.Alloc(c.n)
		if err != nil || run.First != c.want || run.N != c.n {
			t.Fatalf("Alloc(%d) = %+v (%v), want start %d", c.n, run, err, c.want)
		}
		if virgin != (c.want == all.End()) {
			t.Fatalf("Alloc(%d) at %d: virgin = %v", c.n, run.First, virgin)
		}
	}
}

func TestApplyRefusesFreeClusters(t *testing.T) {
	lay := format.Layout{ClusterBits: 12, RefcountOrder: 4, Version: 3}
	rc, _ := newTestRefcounts(t, lay)
	run, _, err := rc.Alloc(3)
	if err != nil {
		t.Fatal(err)
	}
	var bad *CorruptError
	if err := rc.Apply(ClusterRun{run.First, 4}); !errors.As(err, &bad) {
		t.Fatalf("freeing a free cluster: %v", err)
	}
	if n, _ := rc.Get(run.First); n != 1 {
		t.Fatalf("a failed Apply changed a count to %d", n)
	}
}

func TestAllocatorStopsAtTheLimit(t *testing.T) {
	lay := format.Layout{ClusterBits: 9, RefcountOrder: 6, Version: 3}
	rc, _ := newTestRefcounts(t, lay)
	// Pretend that everything but the last few regions of the largest table is full.
	rc.hosts = make([]format.HostOff, format.MaxRefTableBytes/8)
	for i := range rc.hosts {
		rc.hosts[i] = 512
		rc.known[i] = &refBlock{full: true}
	}
	last := len(rc.hosts) - 1
	rc.hosts[last] = 0
	delete(rc.known, last)
	rc.tableClusters = format.MaxRefTableBytes / 512
	run, _, err := rc.Alloc(1000)
	if err != nil || run.N != rc.lay.RefcountsPerBlock()-1 {
		t.Fatalf("last region: %+v (%v)", run, err)
	}
	if _, _, err := rc.Alloc(1); !errors.Is(err, ErrImageFull) {
		t.Fatalf("behind the last region: %v", err)
	}
}

func TestGuardRefusesFixedPlaces(t *testing.T) {
	lay := format.Layout{ClusterBits: 12, RefcountOrder: 4, Version: 3}
	rc, f := newTestRefcounts(t, lay)
	blk := make([]byte, lay.ClusterSize()) // a block that calls the header's cluster free
	if _, err := f.WriteAt(blk, int64(rc.hosts[0])); err != nil {
		t.Fatal(err)
	}
	var bad *CorruptError
	if _, _, err := rc.Alloc(1); !errors.As(err, &bad) {
		t.Fatalf("allocating cluster 0: %v", err)
	}
}
