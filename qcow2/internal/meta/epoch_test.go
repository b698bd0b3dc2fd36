package meta

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

func TestEpochsSafeWaitsForRunningRequests(t *testing.T) {
	e := NewEpochs()
	early, err := e.Enter()
	if err != nil {
		t.Fatal(err)
	}
	tag := e.Now()
	if e.Safe(tag) {
		t.Fatal("safe while a request of that epoch runs")
	}
	late, _ := e.Enter()
	e.Exit(early)
	if !e.Safe(tag) {
		// The later request may run in the same epoch; then it must end first.
		e.Exit(late)
		if !e.Safe(tag) {
			t.Fatal("not safe though nothing runs")
		}
		return
	}
	e.Exit(late)
}

func TestEpochsSafeWhenIdle(t *testing.T) {
	e := NewEpochs()
	for range 10 {
		if tag := e.Now(); !e.Safe(tag) {
			t.Fatal("not safe though nothing runs")
		}
	}
}

// TestEpochsReclaimUnderLoad has readers hold on to an object that is replaced and reclaimed all the time: none may see
// it reclaimed.
func TestEpochsReclaimUnderLoad(t *testing.T) {
	type object struct{ dead atomic.Bool }
	e := NewEpochs()
	var current atomic.Pointer[object]
	current.Store(new(object))
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				tk, _ := e.Enter()
				o := current.Load()
				for range 3 {
					runtime.Gosched()
					if o.dead.Load() {
						t.Error("object was reclaimed while in use")
					}
				}
				e.Exit(tk)
			}
		})
	}
	reclaimed := 0
	for reclaimed < 2000 {
		old := current.Swap(new(object))
		for tag := e.Now(); !e.Safe(tag); {
			runtime.Gosched()
		}
		old.dead.Store(true)
		reclaimed++
	}
	stop.Store(true)
	wg.Wait()
}

func TestEpochsQuiesceExcludesRequests(t *testing.T) {
	e := NewEpochs()
	var inside atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 2000 {
				tk, err := e.Enter()
				if err != nil {
					t.Error(err)
					return
				}
				inside.Add(1)
				inside.Add(-1)
				e.Exit(tk)
			}
		})
	}
	for range 200 {
		if err := e.Quiesce(); err != nil {
			t.Fatal(err)
		}
		if n := inside.Load(); n != 0 {
			t.Fatalf("%d requests run while quiesced", n)
		}
		e.Resume()
	}
	wg.Wait()
	if !e.Close() {
		t.Fatal("first Close says it was not")
	}
	if e.Close() {
		t.Fatal("second Close says it was the first")
	}
	if _, err := e.Enter(); !errors.Is(err, ErrClosed) {
		t.Fatalf("Enter after Close: %v", err)
	}
	if err := e.Quiesce(); !errors.Is(err, ErrClosed) {
		t.Fatalf("Quiesce after Close: %v", err)
	}
}

// TestRangesExclude has many goroutines hold random ranges: no cell may have two holders.
func TestRangesExclude(t *testing.T) {
	var ranges Ranges
	var cells [64]atomic.Int32
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 3000 {
				first := r.Uint64N(64)
				last := first + r.Uint64N(64-first)
				held, ok := ranges.TryLock(first, last)
				if !ok {
					var err error
					if held, err = ranges.Lock(t.Context(), first, last); err != nil {
						t.Error(err)
						return
					}
				}
				for i := first; i <= last; i++ {
					if cells[i].Add(1) != 1 {
						t.Error("two holders of one range")
					}
				}
				runtime.Gosched()
				for i := first; i <= last; i++ {
					cells[i].Add(-1)
				}
				ranges.Unlock(held)
			}
		})
	}
	wg.Wait()
	if ranges.head != nil || ranges.tail != nil {
		t.Fatal("ranges left behind")
	}
}

func TestRangesCancel(t *testing.T) {
	var ranges Ranges
	a, _ := ranges.TryLock(0, 9)
	ctx, cancel := contextWithCancel(t)
	done := make(chan error, 1)
	go func() {
		_, err := ranges.Lock(ctx, 5, 6)
		done <- err
	}()
	for {
		ranges.mu.Lock()
		waiting := ranges.tail != ranges.head
		ranges.mu.Unlock()
		if waiting {
			break
		}
		runtime.Gosched()
	}
	cancel()
	if err := <-done; err == nil {
		t.Fatal("canceled Lock succeeded")
	}
	if _, ok := ranges.TryLock(10, 12); !ok {
		t.Fatal("a stranger is blocked")
	}
	ranges.Unlock(a)
	if _, ok := ranges.TryLock(0, 9); !ok {
		t.Fatal("the canceled range is still held")
	}
}
