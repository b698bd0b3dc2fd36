// Package crash cuts the power. It records every host write, hole and sync of a workload; then, for every point of the
// record and for subsets of what was not synced there, torn at 512 bytes, it rebuilds the image and asserts that
//
//   - the check finds no corruption;
//   - each sector holds what the last acknowledged flush made durable, or something written since;
//   - what an internal snapshot holds is untouched;
//   - a sample can be written on and closed, and stock qemu-img check agrees.
package crash

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
	"github.com/droverproject/drover/test/peer"
)

var (
	seeds   = flag.Int("seeds", 3, "workloads of each kind")
	samples = flag.Int("samples", 24, "states of each family at each point")
	seed0   = flag.Uint64("seed", 0, "first seed")
	minimum = flag.Int64("min-states", 0, "fail if fewer states than this were judged")
)

var total, judged atomic.Int64

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	fmt.Printf("crash states: %d, of which stock qemu-img check judged %d\n", total.Load(), judged.Load())
	if n := total.Load(); n < *minimum {
		fmt.Printf("FAIL: %d crash states were wanted\n", *minimum)
		code = 1
	}
	os.Exit(code)
}

// Marks in the record, in the order in which things happened. A write is a request that changes sectors.
type (
	markBegin struct {
		id int
		op explore.Op
	}
	markDone  struct{ id int }
	markFlush struct{ id int } // a flush is called
	markAcked struct{ id int } // and has returned
)

// history is what a prefix of the marks says about each sector.
type history struct{ may [][]explore.Version }

type write struct {
	op          explore.Op
	begin, done int // positions among the marks; done is past the end while it runs
}

// replay finds what each sector may hold. A write is covered if it was done before a flush began that was acknowledged.
// A sector may hold what any write to it wrote, except those that a covered write came strictly after; and what it held
// at first, unless some write to it is covered.
func replay(d *explore.Disk, marks []any) history {
	writes := map[int]*write{}
	var order []*write
	flushes := map[int]int{}
	covered := -1
	for i, m := range marks {
		switch m := m.(type) {
		case markBegin:
			w := &write{m.op, i, len(marks)}
			writes[m.id] = w
			order = append(order, w)
		case markDone:
			writes[m.id].done = i
		case markFlush:
			flushes[m.id] = i
		case markAcked:
			covered = max(covered, flushes[m.id])
		}
	}
	perSector := make([][]*write, d.Sectors)
	for _, w := range order {
		for s := w.op.First; s < w.op.First+w.op.N; s++ {
			perSector[s] = append(perSector[s], w)
		}
	}
	h := history{make([][]explore.Version, d.Sectors)}
	for s, ws := range perSector {
		latest := -1 // the latest beginning of a covered write
		for _, w := range ws {
			if w.done < covered {
				latest = max(latest, w.begin)
			}
		}
		if latest < 0 {
			h.may[s] = append(h.may[s], d.Initial(int64(s)))
		}
		for _, w := range ws {
			if w.done > latest {
				h.may[s] = append(h.may[s], w.op.Version)
			}
		}
	}
	return h
}

// workload is a disk in a file that loses power afterwards.
type workload struct {
	t     *testing.T
	disk  *explore.Disk
	file  *storage.CrashFile
	all   []*storage.CrashFile // file, and the external data file if there is one
	im    *qcow2.Image
	fails bool // some syncs fail
	ids   atomic.Int64
	// samples, if not 0, is how many states of each family are looked at.
	samples int
	also    func(*explore.Disk, *storage.MemFile) error // looks at each state, too
}

func newWorkload(t *testing.T, d *explore.Disk, fails bool) *workload {
	files := storage.NewCrashFiles(d.Files()...)
	w := &workload{t: t, disk: d, file: files[0], all: files, fails: fails}
	opened := *d
	if len(files) > 1 {
		opened.Data = files[1]
	}
	im, err := opened.Open(w.file, false)
	if err != nil {
		t.Fatal(err)
	}
	w.im = im
	return w
}

func (w *workload) do(r *rand.Rand) error {
	id := int(w.ids.Add(1))
	op := w.disk.Draw(r, explore.Version(id+1))
	switch {
	case op.Kind == explore.Flush:
		return w.flush(id, w.fails && r.IntN(3) == 0)
	case op.Changes():
		w.file.Mark(markBegin{id, op})
		err := op.Run(w.im)
		w.file.Mark(markDone{id})
		return err
	}
	return op.Run(w.im)
}

// flush flushes; fail has the sync fail, and then the flush must say so, or have needed none.
func (w *workload) flush(id int, fail bool) error {
	if fail {
		f := w.all[id%len(w.all)]
		f.FailNextSync(syscall.EIO)
		defer f.FailNextSync(nil)
	}
	w.file.Mark(markFlush{id})
	err := w.im.Flush(context.Background())
	if err == nil {
		w.file.Mark(markAcked{id})
	}
	if fail && errors.Is(err, syscall.EIO) {
		return nil
	}
	return err
}

// run has clients make steps requests each, and closes the image.
func (w *workload) run(seed uint64, clients, steps int) {
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(c)))
			for range steps {
				if err := w.do(r); err != nil {
					w.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	w.close()
}

// close closes the image. One that succeeded is a flush.
func (w *workload) close() {
	w.file.Mark(markFlush{-1})
	if err := w.im.Close(); err != nil {
		w.t.Fatal(err)
	}
	w.file.Mark(markAcked{-1})
}

func TestWrites(t *testing.T) {
	for i, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for k := range *seeds {
				seed := *seed0 + uint64(k)
				clients := []int{1, 1, 3}[k%3]
				w := newWorkload(t, d, k%2 == 1 && clients == 1)
				w.run(seed, clients, 60/clients)
				judge(t, w, seed+uint64(i)<<32)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// judge looks at every state of a finished workload.
func judge(t *testing.T, w *workload, seed uint64) {
	t.Helper()
	snapshots := snapshotContent(t, w.disk)
	point, h := -1, history{}
	n := 0
	most := cmp.Or(w.samples, *samples)
	o := storage.ExploreOptions{Exhaustive: 7, PerFamily: most, Samples: most, Seed: seed}
	err := w.file.Explorer().Explore(o, func(s storage.CrashState) error {
		if s.Point != point {
			point, h = s.Point, replay(w.disk, s.Marks)
		}
		n++
		total.Add(1)
		if err := sound(s.Image); err != nil {
			return err
		}
		d := w.disk.With(s.Files)
		if err := content(d, s.Image, h); err != nil {
			return err
		}
		if w.also != nil {
			if err := w.also(d, s.Image); err != nil {
				return err
			}
		}
		if n%16 == 0 {
			if err := sameSnapshots(d, s.Image, snapshots); err != nil {
				return err
			}
		}
		if n%997 == 0 {
			if err := stockCheck(d, s.Image); err != nil {
				return err
			}
		}
		if n%64 == 0 {
			return goOn(d, s.Image)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
}

// sound has our check look for corruption. Leaks are what a power cut may leave.
func sound(f storage.File) error {
	report, err := qcow2.CheckFile(context.Background(), f, qcow2.CheckOptions{})
	if err != nil {
		return err
	}
	if report.Corruptions != 0 || report.CheckErrors != 0 {
		return fmt.Errorf("check: %+v", report)
	}
	return nil
}

// content compares every sector with what it may hold.
func content(d *explore.Disk, f *storage.MemFile, h history) error {
	im, err := d.Open(f, true)
	if err != nil {
		return err
	}
	defer im.Close()
	got := make([]byte, d.Sectors*explore.SectorSize)
	if err := im.ReadAt(context.Background(), got, 0); err != nil {
		return err
	}
	for s := range d.Sectors {
		b := got[s*explore.SectorSize:][:explore.SectorSize]
		v, ok := explore.VersionOf(b, s)
		if !ok {
			return fmt.Errorf("sector %d holds %x..., which no write put there", s, b[:16])
		}
		if !contains(h.may[s], v) {
			return fmt.Errorf("sector %d holds version %d, and may hold %v", s, v, h.may[s])
		}
	}
	if err := d.RawDiffers(got); err != nil {
		return err
	}
	return nil
}

func contains(list []explore.Version, v explore.Version) bool {
	for _, w := range list {
		if v == w {
			return true
		}
	}
	return false
}

// goOn writes half the disk, flushes, closes and checks again.
func goOn(d *explore.Disk, f *storage.MemFile) error {
	im, err := d.Open(f, false)
	if err != nil {
		return err
	}
	op := explore.Op{Kind: explore.Write, First: d.Sectors / 3, N: d.Sectors / 2, Version: 77}
	if err := op.Run(im); err != nil {
		return fmt.Errorf("writing on after the power cut: %w", err)
	}
	if err := im.Close(); err != nil {
		return fmt.Errorf("closing after the power cut: %w", err)
	}
	if err := sound(f); err != nil {
		return fmt.Errorf("after writing on: %w", err)
	}
	return nil
}

// stockCheck gives a state to QEMU.
func stockCheck(d *explore.Disk, f *storage.MemFile) error {
	if _, err := peer.Look("qemu-img"); err != nil {
		if os.Getenv("CI") == "true" {
			return err
		}
		return nil
	}
	dir, err := os.MkdirTemp("", "drover-crash")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if d.Backing != nil {
		b := make([]byte, d.Backing.Size())
		if err := d.Backing.ReadAt(context.Background(), b, 0); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "base.raw"), b, 0o600); err != nil {
			return err
		}
	}
	path := filepath.Join(dir, "disk.qcow2")
	if err := save(f, path); err != nil {
		return err
	}
	if data, ok := d.Data.(*storage.MemFile); ok {
		if err := save(data, filepath.Join(dir, "disk.data")); err != nil {
			return err
		}
	}
	check := qemuCheck
	if d.Create.Encrypt != nil {
		check = qemuCheckEncrypted
	}
	if err := check(path); err != nil {
		return err
	}
	judged.Add(1)
	return nil
}

func save(f *storage.MemFile, path string) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// snapshotHeader is where the first internal snapshot's L1 table is.
type snapshotHeader struct {
	l1Size uint32
	l1Off  uint64
}

// snapshotContent reads the disk as its first internal snapshot has it, nil where there is none.
func snapshotContent(t *testing.T, d *explore.Disk) []byte {
	t.Helper()
	if !d.Snapshot {
		return nil
	}
	b, err := readSnapshot(d, d.Image)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// readSnapshot reads the first internal snapshot by putting its L1 table in the place of the active one, in a copy.
func readSnapshot(d *explore.Disk, f *storage.MemFile) ([]byte, error) {
	c := f.Clone()
	var pointer [8]byte
	if _, err := c.ReadAt(pointer[:], 64); err != nil {
		return nil, err
	}
	var entry [12]byte
	if _, err := c.ReadAt(entry[:], int64(binary.BigEndian.Uint64(pointer[:]))); err != nil {
		return nil, err
	}
	h := snapshotHeader{binary.BigEndian.Uint32(entry[8:]), binary.BigEndian.Uint64(entry[:])}
	var active [12]byte
	binary.BigEndian.PutUint32(active[:], h.l1Size)
	binary.BigEndian.PutUint64(active[4:], h.l1Off)
	if _, err := c.WriteAt(active[:], 36); err != nil {
		return nil, err
	}
	im, err := d.Open(c, true)
	if err != nil {
		return nil, err
	}
	defer im.Close()
	b := make([]byte, im.Size())
	return b, im.ReadAt(context.Background(), b, 0)
}

func sameSnapshots(d *explore.Disk, f *storage.MemFile, want []byte) error {
	if want == nil {
		return nil
	}
	got, err := readSnapshot(d, f)
	if err != nil {
		return fmt.Errorf("reading the snapshot: %w", err)
	}
	if string(got) != string(want) {
		return errors.New("the internal snapshot's content has changed")
	}
	return nil
}

// TestCreate cuts the power while images are made: what is left is no image, or a whole one; once Create has returned it
// is a whole one.
func TestCreate(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{Size: 1 << 20},
		{Size: 8 << 20, ClusterSize: 512, RefcountBits: 64},
		{Size: 300 << 10, ClusterSize: 4096, Preallocation: qcow2.PreallocMetadata},
		{Size: 128 << 10, ClusterSize: 4096, Version: 2, Preallocation: qcow2.PreallocFull},
		{Size: 1 << 20, BackingFile: "base.raw", BackingFormat: "raw"},
	} {
		t.Run(fmt.Sprintf("cluster=%d,prealloc=%d", o.ClusterSize, o.Preallocation), func(t *testing.T) {
			file := storage.NewCrashFile(storage.NewMemFile("new.qcow2"))
			if err := qcow2.Create(context.Background(), file, o); err != nil {
				t.Fatal(err)
			}
			file.Mark("created")
			err := file.Explorer().Explore(storage.ExploreOptions{Exhaustive: 8, PerFamily: 64, Samples: 64}, func(s storage.CrashState) error {
				total.Add(1)
				_, err := qcow2.ReadInfo(context.Background(), s.Image)
				if len(s.Marks) == 0 && errors.Is(err, qcow2.ErrNotQCOW2) {
					return nil
				}
				if err != nil {
					return err
				}
				return sound(s.Image)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestScenarios are short histories that a random workload seldom meets, each under every crash.
func TestScenarios(t *testing.T) {
	type step struct {
		kind     explore.Kind
		first, n int64
	}
	w := func(first, n int64) step { return step{kind: explore.Write, first: first, n: n} }
	z := func(first, n int64) step { return step{kind: explore.Zeroes, first: first, n: n} }
	d := func(first, n int64) step { return step{kind: explore.Discard, first: first, n: n} }
	flush := step{kind: explore.Flush}
	for name, steps := range map[string][]step{
		// The zeroed cluster keeps its host cluster, and with it bytes that must never show again.
		"zeroed, then written in part":      {w(0, 16), flush, z(0, 16), flush, flush, w(3, 2), flush, w(9, 1)},
		"discarded, then its cluster again": {w(0, 16), flush, d(0, 8), flush, flush, w(16, 8), flush, w(24, 3)},
		"written over its own discard":      {w(0, 8), flush, d(0, 8), w(2, 1), flush, d(0, 8), flush, flush, w(0, 8)},
		"table by table":                    {w(0, 1), w(64, 1), flush, w(128, 1), flush, d(0, 8), d(64, 8), flush, w(192, 8)},
	} {
		t.Run(name, func(t *testing.T) {
			for _, cs := range []int64{512, 4096} {
				start := explore.Start{Name: name, Create: qcow2.CreateOptions{ClusterSize: cs, Size: 128 << 10}}
				work := newWorkload(t, start.Make(t), false)
				for i, s := range steps {
					id := i + 1
					if s.kind == explore.Flush {
						if err := work.flush(id, false); err != nil {
							t.Fatal(err)
						}
						continue
					}
					op := explore.Op{Kind: s.kind, First: s.first, N: s.n}
					if s.kind == explore.Write {
						op.Version = explore.Version(id + 1)
					}
					work.file.Mark(markBegin{id, op})
					if err := op.Run(work.im); err != nil {
						t.Fatal(err)
					}
					work.file.Mark(markDone{id})
				}
				work.close()
				judge(t, work, 1)
			}
		})
	}
}
