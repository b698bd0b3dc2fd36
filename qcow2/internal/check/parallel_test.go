package check

import (
	"context"
	"errors"
	"reflect"
	"runtime"
	"sync"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// manyTables has L2 tables far apart, so that they are read in many pieces, with faults in each of them.
func manyTables(t testing.TB) *bytesOf {
	t.Helper()
	const tables = 60
	x := build(t, plain, tables*512<<20, 4+8*tables)
	for i := range int64(tables) {
		table := format.HostOff(4+8*i) << 16
		x.set(x.l1(i), 1<<63|uint64(table))
		x.refcount(table, 1)
		x.set(table, 1<<63|uint64(table)+1<<16)       // a refcount of 0
		x.set(table+8, 1<<63|uint64(table)+2<<16|4)   // a reserved bit
		x.set(table+16, 1<<63|1<<50+uint64(i)<<20)    // behind the end
		x.set(table+24, uint64(table)+3<<16|0x200)    // unaligned
		x.set(table+32, 1<<62|uint64(table)+4<<16+17) // compressed
		x.set(table+40, uint64(5<<16+i%3<<20))        // shared by many
		x.refcount(table+2<<16, 1)
	}
	return x
}

// countingFile counts the reads that run at once, and fails them from a moment on.
type countingFile struct {
	storage.File
	mu    sync.Mutex
	reads int
	fail  int // the number of the first read to fail, 0 for none
}

func (f *countingFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	f.reads++
	bad := f.fail > 0 && f.reads >= f.fail
	f.mu.Unlock()
	if bad {
		return 0, errBad
	}
	return f.File.ReadAt(p, off)
}

// TestWorkersAgree wants the same report and the same messages in the same order from any number of workers.
func TestWorkersAgree(t *testing.T) {
	x := manyTables(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var want *Report
	var heard []Finding
	for _, workers := range []int{1, 2, 8} {
		runtime.GOMAXPROCS(workers)
		for range 5 {
			var seen []Finding
			rep := x.check(t, Options{MaxFindings: 40, OnFinding: func(f Finding) { seen = append(seen, f) }})
			if want == nil {
				want, heard = rep, seen
			}
			if !reflect.DeepEqual(rep, want) || !reflect.DeepEqual(seen, heard) {
				t.Fatalf("%d workers: %+v, want %+v", workers, rep, want)
			}
			if silent := x.check(t, Options{MaxFindings: 40}); !reflect.DeepEqual(silent, want) {
				t.Fatalf("%d workers, nobody listening: %+v, want %+v", workers, silent, want)
			}
		}
	}
	if want.Corruptions < 200 || want.FindingsDropped == 0 || int64(len(heard)) != 40+want.FindingsDropped {
		t.Errorf("%+v, %d heard", want, len(heard))
	}
}

// TestWorkersFail has reads fail, and the context end, at every moment of a check by several workers.
func TestWorkersFail(t *testing.T) {
	x := manyTables(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	all := &countingFile{File: memory(t, x.b)}
	if _, err := Run(context.Background(), all, Options{}); err != nil {
		t.Fatal(err)
	}
	if all.reads < 60 {
		t.Fatalf("only %d reads", all.reads)
	}
	for fail := 1; fail <= all.reads; fail++ {
		f := &countingFile{File: memory(t, x.b), fail: fail}
		rep, err := Run(context.Background(), f, Options{})
		if !errors.Is(err, errBad) {
			t.Fatalf("reads fail from number %d on: %v", fail, err)
		}
		if rep != nil && rep.CheckErrors != 1 {
			t.Fatalf("reads fail from number %d on: %d check errors", fail, rep.CheckErrors)
		}
		ctx, cancel := context.WithCancel(context.Background())
		stop := &countingFile{File: cancelling{memory(t, x.b), cancel}, fail: 0}
		if _, err := Run(ctx, stop, Options{}); !errors.Is(err, context.Canceled) {
			t.Fatalf("a context that ends: %v", err)
		}
		cancel()
	}
}

// cancelling ends the context when an L2 table is read.
type cancelling struct {
	storage.File
	cancel func()
}

func (c cancelling) ReadAt(p []byte, off int64) (int, error) {
	if off >= 20<<16 {
		c.cancel()
	}
	return c.File.ReadAt(p, off)
}
