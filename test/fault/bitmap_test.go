package fault

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestBitmapsEachCallOnce fails each call of a workload that writes, saves and changes bitmaps. Whatever fails, the bitmap
// that was always there has marked all that changed when the image has been closed, and no cluster is lost.
func TestBitmapsEachCallOnce(t *testing.T) {
	for _, start := range explore.BitmapStarts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			w := newWorkload(t, start, 4)
			w.disk.AddBitmaps(t)
			calls, err := w.runBitmaps(nil)
			if err != nil {
				t.Fatal(err)
			}
			step := *stride * 3
			if testing.Short() {
				step *= 7
			}
			for at := 0; at < calls; at += step {
				for _, f := range faults(at) {
					total.Add(1)
					if _, err := w.runBitmaps(&f); err != nil {
						t.Fatalf("fault %+v: %v", f, err)
					}
				}
			}
		})
	}
}

// runBitmaps is run with a change of the bitmaps after every third request.
func (w *workload) runBitmaps(fault *storage.Fault) (calls int, err error) {
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
	r := rand.New(rand.NewPCG(1, 1))
	for i, op := range w.ops[:len(w.ops)/2] {
		if err := w.step(im, op, model); err != nil {
			return 0, fmt.Errorf("request %d (%+v): %w", i, op, err)
		}
		if i%3 != 0 {
			continue
		}
		if err := explore.DrawBitmapOp(r)(im); err != nil && !isFault(err) && !explore.BitmapOpMayFail(err) {
			return 0, fmt.Errorf("change of the bitmaps after request %d: the error does not say what failed: %w", i, err)
		}
	}
	calls = file.Calls(storage.OpAny) - before
	file.Clear()
	if err := w.finish(im, files, model); err != nil {
		return 0, err
	}
	return calls, w.disk.With(files).CheckBitmaps(files[0], true)
}

// TestBitmapsBroken has every call of one kind fail from some moment on: what is left never claims too little.
func TestBitmapsBroken(t *testing.T) {
	for _, start := range explore.BitmapStarts() {
		for _, kind := range []storage.OpKind{storage.OpWrite, storage.OpSync, storage.OpRead} {
			t.Run(fmt.Sprintf("%s/%v", start.Name, kind), func(t *testing.T) {
				w := newWorkload(t, start, 5)
				w.disk.AddBitmaps(t)
				for _, skip := range []int{0, 3, 11, 30} {
					total.Add(1)
					if err := w.runBitmapsBroken(storage.Fault{Kind: kind, Skip: skip, Times: -1}); err != nil {
						t.Fatalf("every %v after %d: %v", kind, skip, err)
					}
				}
			})
		}
	}
}

func (w *workload) runBitmapsBroken(f storage.Fault) error {
	im, file, files, err := w.start()
	if err != nil {
		return err
	}
	file.Inject(f)
	r := rand.New(rand.NewPCG(1, 2))
	for i, op := range w.ops[:len(w.ops)/2] {
		errs := []error{op.Run(im), nil}
		if i%3 == 0 {
			errs[1] = explore.DrawBitmapOp(r)(im)
		}
		for _, err := range errs {
			if err != nil && !isFault(err) && !explore.BitmapOpMayFail(err) {
				return fmt.Errorf("request %d (%+v): the error does not say what failed: %w", i, op, err)
			}
		}
	}
	if err := im.Close(); err != nil && !isFault(err) {
		return fmt.Errorf("close: %w", err)
	}
	report, err := qcow2.CheckFile(context.Background(), files[0], qcow2.CheckOptions{})
	if err != nil || report.Corruptions != 0 || report.CheckErrors != 0 {
		return fmt.Errorf("check: %+v (%w)", report, err)
	}
	return w.disk.With(files).CheckBitmaps(files[0], false)
}
