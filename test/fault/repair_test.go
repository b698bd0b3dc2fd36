package fault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestRepairs fails every call that a repair makes to its image. The repair says so, and the next one comes to the end the
// first would have come to; with an undo log the image can be put back to what it was.
func TestRepairs(t *testing.T) {
	for i, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			step := 11
			if testing.Short() {
				step = 40
			}
			for _, d := range start.MakeDamaged(t, i, step) {
				if err := failEachCall(d); err != nil {
					t.Errorf("%s: %v", d.Kind, err)
				}
			}
		})
	}
}

func failEachCall(d *explore.Damaged) error {
	count := storage.NewFaultFile(d.Image.Clone())
	if _, err := explore.Repair(count, nil); err != nil {
		return err
	}
	calls := count.Calls(storage.OpAny)
	for at := 0; at < calls; at += max(*stride, calls/40) { // where there are many they are alike
		for _, f := range faults(at) {
			total.Add(1)
			if err := failOnce(d, f); err != nil {
				return fmt.Errorf("fault %+v: %w", f, err)
			}
		}
	}
	return nil
}

// failOnce repairs with a fault, with and without an undo log.
func failOnce(d *explore.Damaged, f storage.Fault) error {
	for _, log := range []*storage.MemFile{nil, storage.NewMemFile("undo")} {
		mem := d.Image.Clone()
		file := storage.NewFaultFile(mem)
		file.Inject(f)
		o := qcow2.RepairOptions{Mode: qcow2.RepairAll}
		if log != nil {
			o.Undo = log
		}
		_, err := qcow2.RepairFile(context.Background(), file, o)
		if err != nil && !isFault(err) {
			return fmt.Errorf("the error does not say what failed: %w", err)
		}
		if log != nil {
			if err := putBack(d, mem.Clone(), log); err != nil {
				return err
			}
		}
		if err := d.Judge(mem); err != nil {
			return err
		}
	}
	return nil
}

// putBack restores the image as it was before the repair.
func putBack(d *explore.Damaged, mem, log *storage.MemFile) error {
	if size, err := log.Size(); err != nil || size == 0 {
		return err // nothing was changed
	}
	if _, err := qcow2.RestoreFile(context.Background(), mem, log); err != nil {
		return fmt.Errorf("restoring: %w", err)
	}
	got, want := content(mem), content(d.Image)
	if !bytes.Equal(got, want) {
		return errors.New("the restored image is not what it was")
	}
	return nil
}

func content(f *storage.MemFile) []byte {
	n, err := f.Size()
	if err != nil {
		return nil
	}
	b := make([]byte, n)
	if err := storage.ReadFull(f, b, 0); err != nil {
		return nil
	}
	return b
}
