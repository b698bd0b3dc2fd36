package kill

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/scsi"
	"github.com/droverproject/drover/storage"
)

func benchUnit(b *testing.B, mode string, size int64, fill bool) *scsi.Unit {
	b.Helper()
	dir := b.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	f, err := storage.CreateFile(path, storage.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	o := qcow2.CreateOptions{Size: size}
	if fill {
		o.Preallocation = qcow2.PreallocFalloc
	}
	if err := qcow2.Create(context.Background(), f, o); err != nil {
		b.Fatal(err)
	}
	f.Close()
	open := block.OpenOptions{Format: "qcow2"}
	switch mode {
	case "journal":
		open.Keep = &block.Keep{Dir: filepath.Join("/dev/shm", fmt.Sprintf("drover-bench-%d", rand.Int()))}
	case "keep":
		open.Keep = &block.Keep{NoJournal: true}
	}
	dev, err := block.Open(context.Background(), path, open)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { dev.Close() })
	u, err := scsi.NewUnit(dev, scsi.Options{})
	if err != nil {
		b.Fatal(err)
	}
	u.Execute(context.Background(), make([]byte, 6), nil)
	return u
}

// BenchmarkAllocating writes 4 KiB at random, 32 at a time, to a disk with nothing in it.
func BenchmarkAllocating(b *testing.B) {
	const size = 4 << 30
	for _, bench := range []struct {
		name, mode string
		full       bool
	}{{"allocated", "back", true}, {"writeback", "back", false}, {"journal", "journal", false}, {"keep", "keep", false}} {
		b.Run(bench.name, func(b *testing.B) {
			u := benchUnit(b, bench.mode, size, bench.full)
			clusters := rand.New(rand.NewPCG(1, 2)).Perm(size >> 16)
			var next atomic.Int64
			var before, after syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			start := time.Now()
			b.ResetTimer()
			var wg sync.WaitGroup
			for range 32 {
				wg.Go(func() {
					page := scsi.Buffer{make([]byte, 4096)}
					cdb := make([]byte, 16)
					cdb[0] = 0x8A
					for {
						i := next.Add(1) - 1
						if i >= int64(b.N) {
							return
						}
						lba := uint64(clusters[i%int64(len(clusters))])<<7 + uint64(i/int64(len(clusters))%16)*8
						binary.BigEndian.PutUint64(cdb[2:], lba)
						binary.BigEndian.PutUint32(cdb[10:], 8)
						if _, ok := u.TryExecute(cdb, page); ok {
							continue
						}
						if r := u.Execute(context.Background(), cdb, page); r.Status != scsi.Good {
							b.Errorf("%+v", r)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			b.ReportMetric(float64(cpu.Microseconds())/float64(b.N), "cpu-us/op")
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "ops/s")
		})
	}
}
