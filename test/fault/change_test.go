package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestChanges fails each call of a change of a whole image. The image goes on as the old one or the new one, in memory and on
// the disk, and the change can be made again.
func TestChanges(t *testing.T) {
	for _, c := range explore.Changes() {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			s := c.Make(t)
			calls, err := changeWith(s, nil)
			if err != nil {
				t.Fatal(err)
			}
			step := *stride
			if testing.Short() {
				step *= 3
			}
			for at := 0; at < calls; at += step {
				for _, f := range faults(at) {
					total.Add(1)
					if _, err := changeWith(s, &f); err != nil {
						t.Fatalf("fault %+v: %v", f, err)
					}
				}
			}
		})
	}
}

// changeWith makes the change with one fault and returns how many calls it made.
func changeWith(s *explore.Subject, fault *storage.Fault) (calls int, err error) {
	ctx := context.Background()
	mem := s.Image.Clone()
	file := storage.NewFaultFile(explore.KeepOpen{File: mem})
	im, err := s.Open(file, false)
	if err != nil {
		return 0, err
	}
	before := file.Calls(storage.OpAny)
	if fault != nil {
		file.Inject(*fault)
	}
	changed := s.Run(ctx, im)
	calls = file.Calls(storage.OpAny) - before
	file.Clear()
	if changed != nil && !isFault(changed) {
		return 0, errors.Join(fmt.Errorf("the change returned: %w", changed), im.Close())
	}
	// An image whose metadata could not be read again after the change serves nobody any more. Its file does.
	err = sameInMemory(s, im)
	if err != nil && !isFault(err) {
		return 0, errors.Join(err, im.Close())
	}
	if changed != nil {
		closed := im.Close()
		if err == nil && closed != nil {
			return 0, closed
		}
		if im, err = s.Open(file, false); err != nil {
			return 0, err
		}
	}
	// With the storage well again the change can be made, or made once more.
	if err := s.Run(ctx, im); err != nil {
		return 0, errors.Join(fmt.Errorf("the change, again: %w", err), im.Close())
	}
	if err := im.Close(); err != nil {
		return 0, err
	}
	return calls, wellChanged(s, mem, changed != nil)
}

// sameInMemory compares what an open image reads with the old and the new disk.
func sameInMemory(s *explore.Subject, im *qcow2.Image) error {
	st := s.Before
	st.Info.VirtualSize = im.Size()
	st.Disk = make([]byte, im.Size())
	if err := im.ReadAt(context.Background(), st.Disk, 0); err != nil {
		return err
	}
	return s.Judge(st, false)
}

// wellChanged looks at the closed image. A change that failed may have left leaks where the image cannot say, as version 3
// can, that it needs a repair.
func wellChanged(s *explore.Subject, mem *storage.MemFile, failed bool) error {
	st, err := s.Look(mem)
	if err != nil {
		return err
	}
	if err := s.Judge(st, true); err != nil {
		return err
	}
	report, err := qcow2.CheckFile(context.Background(), mem, qcow2.CheckOptions{})
	if err != nil {
		return err
	}
	if report.Corruptions != 0 || report.CheckErrors != 0 {
		return fmt.Errorf("check: %+v", report)
	}
	if report.Leaks != 0 && (!failed || s.Before.Info.Version > 2) {
		return fmt.Errorf("check: %+v", report)
	}
	return nil
}
