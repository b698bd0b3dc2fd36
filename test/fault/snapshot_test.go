package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// newSnapshotWorkload draws requests of which some are about snapshots.
func newSnapshotWorkload(t *testing.T, s explore.Start, seed uint64) *workload {
	w := &workload{disk: s.Make(t)}
	r := rand.New(rand.NewPCG(seed, 6))
	m := w.disk.Model()
	for i := range steps / 2 {
		op := w.disk.DrawWithSnapshots(r, explore.Version(i+2), m)
		m = m.After(op)
		w.ops = append(w.ops, op)
	}
	w.ops = append(w.ops, explore.Op{Kind: explore.Flush})
	return w
}

// TestSnapshotsEachCallOnce fails every call of workloads that create, apply, delete and rename snapshots.
func TestSnapshotsEachCallOnce(t *testing.T) {
	for _, start := range explore.SnapshotStarts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			w := newSnapshotWorkload(t, start, 4)
			calls, err := w.runSnapshots(nil)
			if err != nil {
				t.Fatal(err)
			}
			step := 3 * *stride
			if testing.Short() {
				step *= 7
			}
			for at := 0; at < calls; at += step {
				for _, f := range faults(at + at/step%step) { // the calls in between have their turn, too
					total.Add(1)
					if _, err := w.runSnapshots(&f); err != nil {
						t.Fatalf("fault %+v: %v", f, err)
					}
				}
			}
		})
	}
}

// runSnapshots is run for requests that may be about snapshots.
func (w *workload) runSnapshots(fault *storage.Fault) (calls int, err error) {
	mem := w.disk.Image.Clone()
	file := storage.NewFaultFile(explore.KeepOpen{File: mem})
	im, err := w.disk.Open(file, false)
	if err != nil {
		return 0, err
	}
	model := w.disk.Model()
	w.halfDone = false
	before := file.Calls(storage.OpAny)
	if fault != nil {
		file.Inject(*fault)
	}
	for i, op := range w.ops {
		if model, err = w.stepSnapshots(im, op, model); err != nil {
			return 0, fmt.Errorf("request %d (%+v): %w", i, op, err)
		}
	}
	calls = file.Calls(storage.OpAny) - before
	file.Clear()
	return calls, w.finishSnapshots(im, mem, model)
}

// stepSnapshots makes one request and returns what the image holds then. One that failed has done all or nothing where it
// was about snapshots, and is then made again until it succeeds or needs something that an earlier one has not left.
func (w *workload) stepSnapshots(im *qcow2.Image, op explore.Op, m explore.Model) (explore.Model, error) {
	if _, ok := m.Snapshots[op.Name]; op.OnSnapshots() && ok == (op.Kind == explore.CreateSnapshot) {
		return m, nil // an earlier one could not be created for want of refcount bits
	}
	err := op.Run(im)
	if err == nil {
		return m.After(op), nil
	}
	full := errors.Is(err, qcow2.ErrRefcountOverflow) && op.OnSnapshots() && w.disk.Create.RefcountBits == 2
	if !full && !isFault(err) {
		return m, fmt.Errorf("the error does not say what failed: %w", err)
	}
	w.halfDone = w.halfDone || op.OnSnapshots() && !full
	got, err := w.readPatiently(im)
	if err != nil {
		return m, fmt.Errorf("reading after the failure: %w", err)
	}
	next := m.After(op)
	if !op.OnSnapshots() { // each sector is old or new
		for s := range got.Disk {
			if v := got.Disk[s]; v != m.Disk[s] && v != next.Disk[s] {
				return m, fmt.Errorf("after the failure sector %d holds version %d", s, v)
			}
		}
		next.Disk = got.Disk
		if why := got.Differs(next); why != "" {
			return m, fmt.Errorf("after the failure: %s", why)
		}
		return next, nil
	}
	why := got.Differs(m)
	switch {
	case why == "" && full:
		return m, nil
	case why == "":
		return w.stepSnapshots(im, op, m)
	case got.Differs(next) == "" && !full:
		return next, nil
	}
	return m, fmt.Errorf("after the failure the image is neither as before nor as after: %s", why)
}

// readPatiently reads everything, again where a fault hits the reading too.
func (w *workload) readPatiently(im *qcow2.Image) (m explore.Model, err error) {
	for range 4 {
		if m, err = w.disk.ReadModel(im); err == nil || !isFault(err) {
			return m, err
		}
	}
	return m, err
}

// finishSnapshots closes the image, which is whole then; where an operation could not be taken back the dirty bit says so,
// and opening the image for writing mends it.
func (w *workload) finishSnapshots(im *qcow2.Image, mem *storage.MemFile, m explore.Model) error {
	if err := w.holds(im, m); err != nil {
		return fmt.Errorf("before close: %w", err)
	}
	if err := im.Close(); err != nil {
		return fmt.Errorf("closing when the storage works again: %w", err)
	}
	ctx := context.Background()
	report, err := qcow2.CheckFile(ctx, mem, qcow2.CheckOptions{})
	if err != nil {
		return err
	}
	if report.Dirty {
		again, err := w.disk.Open(mem, false)
		if err != nil {
			return err
		}
		if err := again.Close(); err != nil {
			return err
		}
		if report, err = qcow2.CheckFile(ctx, mem, qcow2.CheckOptions{}); err != nil {
			return err
		}
	}
	if w.halfDone && w.disk.Create.Version == 2 {
		report.Leaks = 0 // there is no bit there to have them mended
	}
	if report.Dirty || !report.Clean() {
		return fmt.Errorf("check: %+v", report)
	}
	again, err := w.disk.Open(mem, true)
	if err != nil {
		return err
	}
	defer again.Close()
	if err := w.holds(again, m); err != nil {
		return fmt.Errorf("after close: %w", err)
	}
	return nil
}

func (w *workload) holds(im *qcow2.Image, m explore.Model) error {
	got, err := w.disk.ReadModel(im)
	if err != nil {
		return err
	}
	if why := got.Differs(m); why != "" {
		return errors.New(why)
	}
	return nil
}

// TestSnapshotsOnBrokenStorage has every call of one kind fail from some moment on. Nothing hangs, the image closes, and
// when the storage works again, opening the image for writing mends what is left; every sector holds what was written there.
func TestSnapshotsOnBrokenStorage(t *testing.T) {
	for _, start := range explore.SnapshotStarts() {
		for _, kind := range []storage.OpKind{storage.OpWrite, storage.OpSync, storage.OpRead} {
			t.Run(fmt.Sprintf("%s/%v", start.Name, kind), func(t *testing.T) {
				w := newSnapshotWorkload(t, start, 5)
				for _, skip := range []int{0, 3, 10, 20, 40, 70} {
					total.Add(1)
					if err := w.breakSnapshots(storage.Fault{Kind: kind, Skip: skip, Times: -1}); err != nil {
						t.Fatalf("every %v after %d: %v", kind, skip, err)
					}
				}
			})
		}
	}
}

func (w *workload) breakSnapshots(f storage.Fault) error {
	mem := w.disk.Image.Clone()
	file := storage.NewFaultFile(explore.KeepOpen{File: mem})
	im, err := w.disk.Open(file, false)
	if err != nil {
		return err
	}
	file.Inject(f)
	for i, op := range w.ops {
		err := op.Run(im)
		// What an earlier request was to make may be missing.
		missing := errors.Is(err, qcow2.ErrNoSnapshot) || errors.Is(err, qcow2.ErrRefcountOverflow)
		if err != nil && !isFault(err) && !missing {
			return fmt.Errorf("request %d (%+v): the error does not say what failed: %w", i, op, err)
		}
	}
	if err := im.Close(); err != nil && !isFault(err) {
		return fmt.Errorf("close: %w", err)
	}
	again, err := w.disk.Open(mem, false)
	if err != nil {
		return fmt.Errorf("opening when the storage works again: %w", err)
	}
	if _, err := w.disk.ReadModel(again); err != nil {
		return errors.Join(err, again.Close())
	}
	if err := again.Close(); err != nil {
		return err
	}
	report, err := qcow2.CheckFile(context.Background(), mem, qcow2.CheckOptions{})
	if err != nil || report.Dirty || report.CheckErrors != 0 || report.Corruptions != 0 && w.disk.Create.Version != 2 {
		return fmt.Errorf("check: %+v (%w)", report, err)
	}
	return nil
}
