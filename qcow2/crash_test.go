package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/qcow2/internal/check"
	"github.com/droverproject/drover/storage"
)

// sectorContent is what version v of a sector looks like; version 0 is zeroes.
func sectorContent(sector int64, v uint32) []byte {
	b := make([]byte, 512)
	if v == 0 {
		return b
	}
	for i := 0; i < 512; i += 16 {
		binary.LittleEndian.PutUint64(b[i:], uint64(sector))
		binary.LittleEndian.PutUint64(b[i+8:], uint64(v)<<16|uint64(i))
	}
	return b
}

// marks that the workload leaves in the crash file's record.
type (
	markWrite   struct{ first, n, version int64 } // begun; version 0: zeroes
	markFlushed struct{ upTo int }                // a flush that began after that many writes was acknowledged
)

// possible replays marks into what each sector may hold: its value at the last acknowledged flush, or any since.
func possible(marks []any, sectors int64, initial func(int64) uint32) [][]uint32 {
	var writes []markWrite
	flushed := 0
	for _, m := range marks {
		switch m := m.(type) {
		case markWrite:
			writes = append(writes, m)
		case markFlushed:
			flushed = m.upTo
		}
	}
	may := make([][]uint32, sectors)
	for s := range may {
		may[s] = []uint32{initial(int64(s))}
	}
	for i, w := range writes {
		for s := w.first; s < w.first+w.n; s++ {
			if i < flushed {
				may[s] = may[s][:0]
			}
			may[s] = append(may[s], uint32(w.version))
		}
	}
	return may
}

// crashRun is one workload over an image in a file that loses power afterwards.
type crashRun struct {
	t       *testing.T
	r       *rand.Rand
	file    *storage.CrashFile
	im      *qcow2.Image
	sectors int64
	cs      int64
	v2      bool
	backing block.Device
	// failSyncs: some syncs fail.
	failSyncs bool
	writes    int
	version   int64
}

func (c *crashRun) step() {
	ctx := context.Background()
	first := c.r.Int64N(c.sectors)
	n := 1 + c.r.Int64N(min(c.sectors-first, 1+c.r.Int64N(24)))
	var err error
	switch op := c.r.IntN(20); {
	case op < 12:
		c.version++
		c.file.Mark(markWrite{first, n, c.version})
		p := make([]byte, 0, n*512)
		for s := first; s < first+n; s++ {
			p = append(p, sectorContent(s, uint32(c.version))...)
		}
		if c.im.TryWriteAt(p, first*512) != nil {
			err = c.im.WriteAt(ctx, p, first*512, 0)
		}
		c.writes++
	case op < 15:
		c.file.Mark(markWrite{first, n, 0})
		err = c.im.WriteZeroes(ctx, first*512, n*512, block.ZeroFlags(c.r.IntN(2)))
		c.writes++
	case op < 17:
		// Whole clusters, so that the outcome is known: zeroes in version 3 and without a backing file.
		per := max(c.cs/512, 1)
		first = first / per * per
		n = min((n+per-1)/per*per, c.sectors-first)
		if c.v2 && c.backing != nil {
			return
		}
		c.file.Mark(markWrite{first, n, 0})
		err = c.im.Discard(ctx, first*512, n*512)
		c.writes++
	default:
		writes := c.writes
		// Every third flush meets a sync that fails, and what was written before it stays in doubt for good unless it
		// is written again.
		fails := c.failSyncs && c.r.IntN(3) == 0
		if fails {
			c.file.FailNextSync(syscall.EIO)
		}
		err = c.im.Flush(ctx)
		c.file.FailNextSync(nil)
		if err == nil {
			c.file.Mark(markFlushed{writes})
		}
		if fails && errors.Is(err, syscall.EIO) {
			err = nil
		}
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// TestCrash cuts the power at every write boundary of random workloads, with subsets of what was not synced, and wants
// every state to be sound and every flushed sector to be there.
func TestCrash(t *testing.T) {
	steps, samples := 60, 8
	if testing.Short() {
		steps, samples = 25, 4
	}
	for _, v := range []struct {
		name    string
		o       qcow2.CreateOptions
		backing bool
	}{
		{"tiny clusters, table growth", qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Size: 256 << 10}, false},
		{"tiny clusters, backing", qcow2.CreateOptions{ClusterSize: 512, Size: 96 << 10}, true},
		{"4k, backing", qcow2.CreateOptions{ClusterSize: 4096, Size: 256<<10 + 1536}, true},
		{"4k, version 2", qcow2.CreateOptions{ClusterSize: 4096, Size: 256 << 10, Version: 2}, false},
		{"4k, one bit", qcow2.CreateOptions{ClusterSize: 4096, Size: 256 << 10, RefcountBits: 1}, false},
		{"64k", qcow2.CreateOptions{Size: 1 << 20}, true},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			states := 0
			for seed := range uint64(3) {
				states += crashWorkload(t, v.o, v.backing, seed, steps, samples, false)
				states += crashWorkload(t, v.o, v.backing, seed, steps, samples, true)
			}
			t.Logf("%d crash states", states)
		})
	}
}

func crashWorkload(t *testing.T, o qcow2.CreateOptions, withBacking bool, seed uint64, steps, samples int, failSyncs bool) int {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(seed, uint64(o.ClusterSize)))
	sectors := o.Size / 512
	initial := func(int64) uint32 { return 0 }
	var backing block.Device
	if withBacking {
		var b []byte
		for s := range sectors / 2 {
			b = append(b, sectorContent(s, 1)...)
		}
		backing = newMemDevice(b)
		o.BackingFile, o.BackingFormat = "base.raw", "raw"
		initial = func(s int64) uint32 {
			if s < sectors/2 {
				return 1
			}
			return 0
		}
	}
	base := storage.NewMemFile("crash.qcow2")
	if err := qcow2.Create(ctx, base, o); err != nil {
		t.Fatal(err)
	}
	file := storage.NewCrashFile(base)
	open := func(f storage.File) (*qcow2.Image, error) {
		return qcow2.Open(ctx, f, qcow2.Options{CacheSize: 1, Backing: backing})
	}
	im, err := open(keepOpenCrash{file})
	if err != nil {
		t.Fatal(err)
	}
	c := &crashRun{t: t, r: r, file: file, im: im, sectors: sectors, cs: or64(o.ClusterSize, 65536), v2: o.Version == 2,
		backing: backing, version: 1, failSyncs: failSyncs}
	for range steps {
		c.step()
	}
	writes := c.writes
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	file.Mark(markFlushed{writes})

	states := 0
	err = file.Explorer().Explore(storage.ExploreOptions{Exhaustive: 6, PerFamily: samples, Samples: samples, Seed: seed}, func(s storage.CrashState) error {
		states++
		return c.checkState(s, possible(s.Marks, sectors, initial), states%50 == 0)
	})
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	return states
}

func or64(v, def int64) int64 {
	if v == 0 {
		return def
	}
	return v
}

type keepOpenCrash struct{ *storage.CrashFile }

func (keepOpenCrash) Close() error { return nil }

// checkState opens one state: the check finds no corruption and each sector holds what it may. With more set, the image
// is also written, closed and checked again, by both checkers.
func (c *crashRun) checkState(s storage.CrashState, may [][]uint32, more bool) error {
	ctx := context.Background()
	report, err := check.Run(ctx, s.Image, check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions != 0 || report.CheckErrors != 0 {
		return fmt.Errorf("check: %+v", report)
	}
	image := keepOpen{s.Image}
	im, err := qcow2.Open(ctx, image, qcow2.Options{ReadOnly: !more, Backing: c.backing})
	if err != nil {
		return err
	}
	got := make([]byte, c.sectors*512)
	if err := im.ReadAt(ctx, got, 0); err != nil {
		return err
	}
	for i := range c.sectors {
		if err := sectorIsOneOf(got[i*512:(i+1)*512], i, may[i]); err != nil {
			return err
		}
	}
	if !more {
		return im.Close()
	}
	if err := im.WriteAt(ctx, got[:len(got)/2], int64(len(got)/2), 0); err != nil {
		return err
	}
	if err := im.Close(); err != nil {
		return err
	}
	report, err = check.Run(ctx, s.Image, check.Options{})
	if err != nil || report.Corruptions != 0 || report.CheckErrors != 0 {
		return fmt.Errorf("check after writing on: %+v (%w)", report, err)
	}
	return nil
}

func sectorIsOneOf(b []byte, sector int64, may []uint32) error {
	for _, v := range may {
		if bytes.Equal(b, sectorContent(sector, v)) {
			return nil
		}
	}
	return fmt.Errorf("sector %d holds %x..., which is none of the versions %v it may be", sector, b[:16], may)
}
