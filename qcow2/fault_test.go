package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// faultOp is one request of a fault workload.
type faultOp struct {
	kind          int // 0 write, 1 zeroes, 2 zeroes with unmap, 3 discard, 4 flush, 5 read
	sector, count int64
	version       uint32
}

func drawOps(r *rand.Rand, sectors, perCluster int64, n int) []faultOp {
	ops := make([]faultOp, n)
	for i := range ops {
		first := r.Int64N(sectors)
		count := 1 + r.Int64N(min(sectors-first, 1+r.Int64N(40)))
		kind := []int{0, 0, 0, 0, 1, 2, 3, 4, 5}[r.IntN(9)]
		if kind == 3 {
			first = first / perCluster * perCluster
			count = min((count+perCluster-1)/perCluster*perCluster, sectors-first)
		}
		ops[i] = faultOp{kind, first, count, uint32(i + 2)}
	}
	return ops
}

func (op faultOp) run(im *qcow2.Image) error {
	ctx := context.Background()
	off, n := op.sector*512, op.count*512
	switch op.kind {
	case 0:
		return im.WriteAt(ctx, op.bytes(), off, 0)
	case 1:
		return im.WriteZeroes(ctx, off, n, 0)
	case 2:
		return im.WriteZeroes(ctx, off, n, block.ZeroUnmap)
	case 3:
		return im.Discard(ctx, off, n)
	case 4:
		return im.Flush(ctx)
	}
	return im.ReadAt(ctx, make([]byte, n), off)
}

func (op faultOp) bytes() []byte {
	if op.kind != 0 {
		return make([]byte, op.count*512)
	}
	var p []byte
	for s := op.sector; s < op.sector+op.count; s++ {
		p = append(p, sectorContent(s, op.version)...)
	}
	return p
}

// TestFaults fails every storage call of a workload once, in turn, with EIO, with ENOSPC, and after a part of its effect.
// The request returns the error, each sector it wrote is old or new, every later request works, and the closed image has
// no corruption and no leak: memory and disk stayed one.
func TestFaults(t *testing.T) {
	for _, v := range []struct {
		name    string
		o       qcow2.CreateOptions
		backing bool
	}{
		{"tiny clusters, table growth", qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Size: 192 << 10}, false},
		{"4k, backing", qcow2.CreateOptions{ClusterSize: 4096, Size: 256 << 10}, true},
		{"4k, version 2", qcow2.CreateOptions{ClusterSize: 4096, Size: 256 << 10, Version: 2}, false},
		{"64k", qcow2.CreateOptions{Size: 1 << 20}, false},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			w := newFaultWorkload(t, v.o, v.backing)
			calls := w.run(t, nil)
			step := 1
			if testing.Short() {
				step = 5
			}
			runs := 0
			for at := 0; at < calls; at += step {
				for _, f := range []storage.Fault{
					{Skip: at},
					{Skip: at, Err: syscall.ENOSPC, Partial: 512},
					{Skip: at, Times: 3, Partial: storage.Whole},
				} {
					w.run(t, &f)
					runs++
				}
			}
			t.Logf("%d calls, %d runs", calls, runs)
		})
	}
}

type faultWorkload struct {
	o       qcow2.CreateOptions
	backing block.Device
	ops     []faultOp
	initial []byte
}

func newFaultWorkload(t *testing.T, o qcow2.CreateOptions, backing bool) *faultWorkload {
	r := rand.New(rand.NewPCG(11, uint64(o.ClusterSize)))
	w := &faultWorkload{o: o, ops: drawOps(r, o.Size/512, or64(o.ClusterSize, 65536)/512, 50), initial: make([]byte, o.Size)}
	if backing {
		var b []byte
		for s := range o.Size / 1024 {
			b = append(b, sectorContent(s, 1)...)
		}
		copy(w.initial, b)
		w.backing = newMemDevice(b)
		w.o.BackingFile, w.o.BackingFormat = "base.raw", "raw"
	}
	return w
}

// run runs the workload with one fault, and returns how many calls the requests made.
func (w *faultWorkload) run(t *testing.T, fault *storage.Fault) int {
	t.Helper()
	ctx := context.Background()
	mem := storage.NewMemFile("fault.qcow2")
	if err := qcow2.Create(ctx, mem, w.o); err != nil {
		t.Fatal(err)
	}
	file := storage.NewFaultFile(keepOpen{mem})
	im, err := qcow2.Open(ctx, file, qcow2.Options{CacheSize: 1, Backing: w.backing})
	if err != nil {
		t.Fatal(err)
	}
	before := file.Calls(storage.OpAny)
	if fault != nil {
		file.Inject(*fault)
	}
	fail := func(f string, args ...any) {
		t.Helper()
		t.Fatalf("fault %+v: %s", fault, fmt.Sprintf(f, args...))
	}
	model := bytes.Clone(w.initial)
	for i, op := range w.ops {
		err := op.run(im)
		if op.kind >= 4 {
			continue
		}
		off := op.sector * 512
		p := op.bytes()
		if err == nil {
			copy(model[off:], p)
			continue
		}
		if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) {
			fail("request %d: %v does not say what failed", i, err)
		}
		got := make([]byte, len(p))
		for tries := 0; ; tries++ {
			if err = im.ReadAt(ctx, got, off); err == nil {
				break
			}
			if tries == 3 {
				fail("reading after request %d failed: %v", i, err)
			}
		}
		for k := 0; k < len(p); k += 512 {
			s := got[k : k+512]
			if !bytes.Equal(s, p[k:k+512]) && !bytes.Equal(s, model[off+int64(k):off+int64(k)+512]) {
				fail("request %d: sector %d is neither old nor new", i, op.sector+int64(k/512))
			}
		}
		copy(model[off:], got)
	}
	calls := file.Calls(storage.OpAny) - before
	file.Clear()
	got := make([]byte, len(model))
	if err := im.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		fail("content differs before close (%v)", err)
	}
	if err := im.Close(); err != nil {
		fail("close: %v", err)
	}
	checkFile(t, mem)
	im, err = qcow2.Open(ctx, keepOpen{mem}, qcow2.Options{ReadOnly: true, Backing: w.backing})
	if err != nil {
		fail("reopening: %v", err)
	}
	if err := im.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		fail("content differs after close (%v)", err)
	}
	return calls
}
