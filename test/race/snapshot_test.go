package race

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// keeper takes snapshots while clients work, goes back to some, and deletes some. A snapshot is judged as if it were a read
// of the whole disk that took as long as its creation: it holds what had been written before, and nothing that came after.
type keeper struct {
	*exploration
	r    *rand.Rand
	seen []*request
	kept []snapshot
}

// snapshot is what one of them was found to hold, place by place; nil where there was no time to look.
type snapshot struct {
	name string
	held [][]value
}

func (k *keeper) work() error {
	err := k.turns(6)
	if errors.Is(err, block.ErrClosed) && k.exploration.close {
		return nil
	}
	return err
}

func (k *keeper) turns(n int) error {
	ctx := context.Background()
	for i := range n {
		s := snapshot{name: fmt.Sprintf("snapshot %d", i)}
		call := k.time.now()
		if _, err := k.im.CreateSnapshot(ctx, s.name); err != nil {
			return err
		}
		ret := k.time.now()
		k.kept = append(k.kept, s)
		held, err := k.look(ctx, s.name)
		if err != nil {
			return err
		}
		k.kept[len(k.kept)-1].held = held
		k.note("snapshot", actRead, held, call, ret)
		if err := k.goOn(ctx); err != nil {
			return err
		}
	}
	return nil
}

// goOn applies, renames or deletes one of the snapshots.
func (k *keeper) goOn(ctx context.Context) error {
	at := k.r.IntN(len(k.kept))
	s := &k.kept[at]
	switch k.r.IntN(5) {
	case 0:
		call := k.time.now()
		if err := k.im.ApplySnapshot(ctx, s.name); err != nil {
			return err
		}
		k.note("go back", actSet, s.held, call, k.time.now())
	case 1:
		name := s.name + "'"
		if err := k.im.RenameSnapshot(ctx, s.name, name); err != nil {
			return err
		}
		s.name = name
	case 2, 3:
		if err := k.im.DeleteSnapshot(ctx, s.name); err != nil {
			return err
		}
		k.kept = slices.Delete(k.kept, at, at+1)
	}
	return nil
}

// note adds what a snapshot holds to the history.
func (k *keeper) note(name string, act action, held [][]value, call, ret int64) {
	for i, got := range held {
		first, n := k.place(int64(i))
		k.seen = append(k.seen, &request{client: k.clients + 1, name: name, act: act, sector: first, n: n, got: got, call: call, ret: ret})
	}
}

// look reads all places of a snapshot, while the disk changes.
func (k *keeper) look(ctx context.Context, name string) (held [][]value, err error) {
	view, err := k.im.OpenSnapshot(ctx, name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := view.Close(); !errors.Is(cerr, block.ErrClosed) { // closing the image closes it
			err = errors.Join(err, cerr)
		}
	}()
	if err := k.im.DeleteSnapshot(ctx, name); !errors.Is(err, qcow2.ErrSnapshotInUse) && !errors.Is(err, block.ErrClosed) {
		return nil, fmt.Errorf("deleting a snapshot that is open: %w", err)
	}
	return k.read(ctx, view)
}

func (k *keeper) read(ctx context.Context, dev block.Device) ([][]value, error) {
	var held [][]value
	for i := range int64(places) {
		first, n := k.place(i)
		p := make([]byte, n*sectorSize)
		if err := dev.ReadAt(ctx, p, first*sectorSize); err != nil {
			return nil, err
		}
		q := request{sector: first, n: n}
		if err := q.decode(p, false); err != nil {
			return nil, fmt.Errorf("a snapshot: %w", err)
		}
		held = append(held, q.got)
	}
	return held, nil
}

// lookAgain reads the snapshots from the closed image: nothing has touched them.
func (k *keeper) lookAgain() {
	k.t.Helper()
	im, err := qcow2.Open(k.t.Context(), keptOpen{k.base}, qcow2.Options{ReadOnly: true, Backing: k.backing()})
	must(k.t, err)
	defer im.Close()
	for _, s := range k.kept {
		view, err := im.OpenSnapshot(k.t.Context(), s.name)
		must(k.t, err)
		held, err := k.read(k.t.Context(), view)
		must(k.t, err)
		must(k.t, view.Close())
		for i := range s.held {
			if !slices.Equal(held[i], s.held[i]) {
				k.t.Fatalf("%v: %q held %v in place %d, and holds %v now", k.scenario, s.name, s.held[i], i, held[i])
			}
		}
	}
}

// backing makes the device below anew.
func (e *exploration) backing() block.Device {
	_, dev := e.image(e.t, e.gallery, nil)
	return dev
}

func exploreSnapshots(t *testing.T, s scenario, g gallery) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	mem, backing := s.image(t, g, nil)
	e := &exploration{scenario: s, t: t, gallery: g, base: mem, time: clock{time.Now()}}
	e.file = newBusyFile(e.base, s.pace, s.seed)
	var err error
	e.im, err = qcow2.Open(t.Context(), e.file, qcow2.Options{Backing: backing, CacheSize: 1, ClusterCacheSize: 1})
	must(t, err)
	k := &keeper{exploration: e, r: rand.New(rand.NewPCG(s.seed, 7))}
	var wg sync.WaitGroup
	var keeping error
	wg.Go(func() { keeping = k.work() })
	failure := e.runClients()
	wg.Wait()
	if err := e.im.Close(); err != nil && (!s.close || !errors.Is(err, block.ErrClosed)) {
		t.Errorf("%v: close: %v", s, err)
	}
	if err := errors.Join(failure, keeping); err != nil {
		t.Fatalf("%v: %v", s, err)
	}
	if n := e.file.late.Load(); n > 0 {
		t.Fatalf("%v: %d calls to the file after it was closed", s, n)
	}
	e.all = append(e.all, k.seen...)
	e.readBack(backing)
	e.judge()
	k.lookAgain()
	mustBeClean(t, e.base)
	if s.seed%4 == 0 || s.origin == fromSnapshot {
		e.askQEMU()
	}
	if err := goleak.Find(before); err != nil {
		t.Fatalf("%v: %v", s, err)
	}
}

// TestExploreSnapshots runs explorations in which somebody takes snapshots. Seeds and times are those of TestExplore,
// but of 150 seeds it takes every fourth.
func TestExploreSnapshots(t *testing.T) {
	g := gallery{}
	many := os.Getenv("DROVER_LONG") == "" && os.Getenv("DROVER_SEED") == "" && !testing.Short()
	seeds(t, func(seed uint64) {
		if many && seed%4 != 0 {
			return
		}
		s := draw(seed)
		if s.hasData() {
			s.origin = fromNothing // with an external data file there are no snapshots
		}
		s.refBits = max(s.refBits, 16) // counts must not run out, also where many compressed clusters share one
		s.onDisk, s.sweep, s.bitmap = false, false, false
		s.steps = s.steps * 2 / 3
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { exploreSnapshots(t, s, g) })
	})
}
