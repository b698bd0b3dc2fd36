// Package fault fails storage. It runs each workload once for every call that the workload makes to its image file, and
// has that call fail: with EIO, with ENOSPC after a part of its effect, three times in a row after the whole of it. It
// asserts that
//
//   - the request whose call failed returns that error, and no other request notices;
//   - each sector the request wrote is old or new;
//   - when the storage works again everything works, and the closed image has no corruption, no leak and the content
//     that the requests' answers promised: memory and disk stayed one image;
//   - an image whose every sync or write fails closes all the same, and leaves no goroutine behind;
//   - a full disk hurts nobody who writes where there is room.
package fault

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

var (
	stride = flag.Int("stride", 1, "fail every stride-th call only")
	total  atomic.Int64
)

func TestMain(m *testing.M) {
	flag.Parse()
	before := runtime.NumGoroutine()
	code := m.Run()
	for i := 0; runtime.NumGoroutine() > before && i < 1000; i++ {
		runtime.Gosched()
	}
	if n := runtime.NumGoroutine(); n > before && code == 0 {
		buf := make([]byte, 1<<20)
		fmt.Printf("%d goroutines are left of %d:\n%s\n", n, before, buf[:runtime.Stack(buf, true)])
		code = 1
	}
	fmt.Printf("runs with a fault: %d\n", total.Load())
	os.Exit(code)
}

const steps = 60

// workload is a disk and the requests to make on it, the same in each run.
type workload struct {
	disk *explore.Disk
	ops  []explore.Op
	// onData has the faults hit the external data file.
	onData bool
	// halfDone: a storage call failed during an operation on snapshots.
	halfDone bool
}

// start opens copies of the disk's files, one of which can fail.
func (w *workload) start() (im *qcow2.Image, faulty *storage.FaultFile, files []*storage.MemFile, err error) {
	files = w.disk.Files()
	d := w.disk.With(files)
	image := storage.File(explore.KeepOpen{File: files[0]})
	if w.onData {
		faulty = storage.NewFaultFile(explore.KeepOpen{File: files[1]})
		d.Data = faulty
	} else {
		faulty = storage.NewFaultFile(image)
		image = faulty
	}
	im, err = d.Open(image, false)
	return im, faulty, files, err
}

// sides runs fn with faults of the image file and, where there is one, of the external data file.
func (w *workload) sides(fn func()) {
	fn()
	if w.disk.Data != nil {
		w.onData = true
		fn()
	}
}

func newWorkload(t *testing.T, s explore.Start, seed uint64) *workload {
	w := &workload{disk: s.Make(t)}
	r := rand.New(rand.NewPCG(seed, 5))
	for i := range steps {
		op := w.disk.Draw(r, explore.Version(i+2))
		if i%8 == 7 || i >= steps-2 { // the last two do what a close does
			op = explore.Op{Kind: explore.Flush}
		}
		w.ops = append(w.ops, op)
	}
	return w
}

// faults are the ways in which a call fails.
func faults(at int) []storage.Fault {
	return []storage.Fault{
		{Skip: at},
		{Skip: at, Err: syscall.ENOSPC, Partial: explore.SectorSize},
		{Skip: at, Times: 3, Partial: storage.Whole},
	}
}

func TestEachCallOnce(t *testing.T) {
	for _, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			w := newWorkload(t, start, 1)
			w.sides(func() { eachCallOnce(t, w) })
		})
	}
}

func eachCallOnce(t *testing.T, w *workload) {
	t.Helper()
	calls, err := w.run(nil)
	if err != nil {
		t.Fatal(err)
	}
	step := *stride
	if testing.Short() {
		step *= 7
	}
	for at := 0; at < calls; at += step {
		for _, f := range faults(at) {
			total.Add(1)
			if _, err := w.run(&f); err != nil {
				t.Fatalf("on data file: %v, fault %+v: %v", w.onData, f, err)
			}
		}
	}
}

// isFault reports whether err is one of those that the faults inject.
func isFault(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC)
}

// run runs the workload with one fault and returns how many calls its requests made.
func (w *workload) run(fault *storage.Fault) (calls int, err error) {
	im, file, files, err := w.start()
	if err != nil {
		return 0, err
	}
	model := make([]byte, w.disk.Sectors*explore.SectorSize)
	if err := im.ReadAt(context.Background(), model, 0); err != nil {
		return 0, err
	}
	before := file.Calls(storage.OpAny)
	if fault != nil {
		file.Inject(*fault)
	}
	for i, op := range w.ops {
		if err := w.step(im, op, model); err != nil {
			return 0, fmt.Errorf("request %d (%+v): %w", i, op, err)
		}
	}
	calls = file.Calls(storage.OpAny) - before
	file.Clear()
	return calls, w.finish(im, files, model)
}

// step makes one request and brings the model up to date, whatever the request's fate.
func (w *workload) step(im *qcow2.Image, op explore.Op, model []byte) error {
	err := op.Run(im)
	if err != nil && !isFault(err) {
		return fmt.Errorf("the error does not say what failed: %w", err)
	}
	if !op.Changes() {
		return nil
	}
	want := op.Bytes()
	part := model[op.First*explore.SectorSize:][:len(want)]
	if err == nil {
		copy(part, want)
		return nil
	}
	got := make([]byte, len(want))
	if err := readPatiently(im, got, op.First*explore.SectorSize); err != nil {
		return err
	}
	for k := 0; k < len(got); k += explore.SectorSize {
		s := got[k:][:explore.SectorSize]
		if !bytes.Equal(s, want[k:][:explore.SectorSize]) && !bytes.Equal(s, part[k:][:explore.SectorSize]) {
			return fmt.Errorf("after the failure sector %d is neither old nor new", op.First+int64(k/explore.SectorSize))
		}
	}
	copy(part, got)
	return nil
}

// readPatiently reads again where a fault hits the reading too; no fault lasts longer than three calls.
func readPatiently(im *qcow2.Image, p []byte, off int64) (err error) {
	for range 4 {
		if err = im.ReadAt(context.Background(), p, off); err == nil || !isFault(err) {
			return err
		}
	}
	return err
}

// finish closes the image, checks it and compares it with the model.
func (w *workload) finish(im *qcow2.Image, files []*storage.MemFile, model []byte) error {
	ctx, mem, d := context.Background(), files[0], w.disk.With(files)
	got := make([]byte, len(model))
	if err := im.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		return fmt.Errorf("content differs before close (%w)", err)
	}
	if err := im.Close(); err != nil {
		return fmt.Errorf("closing when the storage works again: %w", err)
	}
	report, err := qcow2.CheckFile(ctx, mem, qcow2.CheckOptions{})
	if err != nil || !report.Clean() {
		return fmt.Errorf("check: %+v (%w)", report, err)
	}
	if err := d.RawDiffers(model); err != nil {
		return err
	}
	again, err := d.Open(mem, true)
	if err != nil {
		return err
	}
	defer again.Close()
	if err := again.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		return fmt.Errorf("content differs after close (%w)", err)
	}
	return nil
}

// TestEveryCallOfAKind has every call of one kind fail from some moment on, also while closing.
func TestEveryCallOfAKind(t *testing.T) {
	for _, start := range explore.Starts() {
		for _, kind := range []storage.OpKind{storage.OpWrite, storage.OpSync, storage.OpRead, storage.OpPunch} {
			t.Run(fmt.Sprintf("%s/%v", start.Name, kind), func(t *testing.T) {
				w := newWorkload(t, start, 2)
				w.sides(func() {
					for _, skip := range []int{0, 1, 5, 20} {
						total.Add(1)
						if err := w.runBroken(storage.Fault{Kind: kind, Skip: skip, Times: -1}); err != nil {
							t.Fatalf("every %v after %d: %v", kind, skip, err)
						}
					}
				})
			})
		}
	}
}

// runBroken runs the workload on storage that never recovers. Requests fail, nothing hangs, the image closes, and what
// is left is as after a power cut: no corruption.
func (w *workload) runBroken(f storage.Fault) error {
	im, file, files, err := w.start()
	if err != nil {
		return err
	}
	file.Inject(f)
	for i, op := range w.ops {
		if err := op.Run(im); err != nil && !isFault(err) {
			return fmt.Errorf("request %d (%+v): the error does not say what failed: %w", i, op, err)
		}
	}
	if err := im.Close(); err != nil && !isFault(err) {
		return fmt.Errorf("close: %w", err)
	}
	report, err := qcow2.CheckFile(context.Background(), files[0], qcow2.CheckOptions{})
	if err != nil || report.Corruptions != 0 || report.CheckErrors != 0 {
		return fmt.Errorf("check: %+v (%w)", report, err)
	}
	return nil
}

// TestFullDisk lets the file grow by little, and then by enough.
func TestFullDisk(t *testing.T) {
	for _, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			w := newWorkload(t, start, 3)
			w.sides(func() {
				for _, budget := range []int64{0, 512, 4096, 8192, 20000, 65536, 100000, 300000} {
					total.Add(1)
					if err := w.runFull(budget); err != nil {
						t.Fatalf("budget %d: %v", budget, err)
					}
				}
			})
		})
	}
}

func (w *workload) runFull(budget int64) error {
	im, file, files, err := w.start()
	if err != nil {
		return err
	}
	model := make([]byte, w.disk.Sectors*explore.SectorSize)
	if err := im.ReadAt(context.Background(), model, 0); err != nil {
		return err
	}
	if err := file.SetBudget(budget); err != nil {
		return err
	}
	for i, op := range w.ops {
		if i == len(w.ops)/2 {
			if err := file.SetBudget(1 << 40); err != nil { // space returns
				return err
			}
		}
		err := w.step(im, op, model)
		if err != nil {
			return fmt.Errorf("request %d (%+v): %w", i, op, err)
		}
	}
	return w.finish(im, files, model)
}

// TestFailedFirstWrite fails the writes of one request to a disk's last sector, whatever it has prepared by then, and
// closes: nothing half-made may be left, not even a table behind the end of the file.
func TestFailedFirstWrite(t *testing.T) {
	for _, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			d := start.Make(t)
			for at := range 4 {
				total.Add(1)
				mem := d.Image.Clone()
				file := storage.NewFaultFile(explore.KeepOpen{File: mem})
				im, err := d.Open(file, false)
				if err != nil {
					t.Fatal(err)
				}
				file.Inject(storage.Fault{Kind: storage.OpWrite, Skip: at, Times: -1})
				op := explore.Op{Kind: explore.Write, First: d.Sectors - 1, N: 1, Version: 9}
				if err := op.Run(im); err != nil && !isFault(err) {
					t.Fatal(err)
				}
				file.Clear()
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				report, err := qcow2.CheckFile(context.Background(), mem, qcow2.CheckOptions{})
				if err != nil || !report.Clean() {
					t.Fatalf("after %d writes: check: %+v (%v)", at, report, err)
				}
			}
		})
	}
}

// TestOpenFails fails every call of opening an image: the error says what was being read, and nothing is left open.
func TestOpenFails(t *testing.T) {
	for _, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			d := start.Make(t)
			count := storage.NewFaultFile(explore.KeepOpen{File: d.Image.Clone()})
			im, err := d.Open(count, false)
			if err != nil {
				t.Fatal(err)
			}
			calls := count.Calls(storage.OpAny)
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			for at := range calls {
				total.Add(1)
				file := storage.NewFaultFile(explore.KeepOpen{File: d.Image.Clone()})
				file.Inject(storage.Fault{Skip: at})
				im, err := d.Open(file, false)
				if err == nil {
					t.Fatalf("opening succeeds though call %d failed", at)
				}
				if im != nil || !isFault(err) || !strings.Contains(err.Error(), " ") {
					t.Fatalf("call %d: %v", at, err)
				}
			}
		})
	}
}

// TestCreateFails fails every call of creating an image; what is left is no image or a whole one.
func TestCreateFails(t *testing.T) {
	ctx := context.Background()
	for _, o := range []qcow2.CreateOptions{
		{Size: 1 << 20},
		{Size: 300 << 10, ClusterSize: 4096, Preallocation: qcow2.PreallocMetadata},
		{Size: 128 << 10, ClusterSize: 512, RefcountBits: 64, Preallocation: qcow2.PreallocFull},
	} {
		t.Run(fmt.Sprintf("cluster=%d,prealloc=%d", o.ClusterSize, o.Preallocation), func(t *testing.T) {
			count := storage.NewFaultFile(storage.NewMemFile("new.qcow2"))
			if err := qcow2.Create(ctx, count, o); err != nil {
				t.Fatal(err)
			}
			for at := range count.Calls(storage.OpAny) {
				for _, f := range faults(at) {
					total.Add(1)
					mem := storage.NewMemFile("new.qcow2")
					file := storage.NewFaultFile(mem)
					file.Inject(f)
					created := qcow2.Create(ctx, file, o)
					if created != nil && !isFault(created) {
						t.Fatalf("fault %+v: create returns %v", f, created)
					}
					_, err := qcow2.ReadInfo(ctx, mem)
					if errors.Is(err, qcow2.ErrNotQCOW2) && created != nil {
						continue
					}
					// (Create may succeed all the same: a read that moved all its bytes before it failed does no harm.)
					if err != nil {
						t.Fatalf("fault %+v: what is left is neither an image nor none: %v", f, err)
					}
					report, err := qcow2.CheckFile(ctx, mem, qcow2.CheckOptions{})
					if err != nil || report.Corruptions != 0 {
						t.Fatalf("fault %+v: check: %+v (%v)", f, report, err)
					}
				}
			}
		})
	}
}
