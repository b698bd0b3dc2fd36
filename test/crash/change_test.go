package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
	"github.com/droverproject/drover/test/peer"
)

// TestChanges cuts the power while whole images are changed: resized, amended, given another backing file. What is left is
// the old image or the new one, and once the change has returned it is the new one.
func TestChanges(t *testing.T) {
	for _, c := range explore.Changes() {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			s := c.Make(t)
			file := storage.NewCrashFile(s.Image.Clone())
			im, err := s.Open(file, false)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Run(context.Background(), im); err != nil {
				t.Fatal(err)
			}
			file.Mark("changed")
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			n := 0
			o := storage.ExploreOptions{Exhaustive: 7, PerFamily: *samples, Samples: *samples, Seed: 1}
			err = file.Explorer().Explore(o, func(state storage.CrashState) error {
				n++
				total.Add(1)
				return judgeChange(s, state, n)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

func judgeChange(s *explore.Subject, state storage.CrashState, n int) error {
	info, err := qcow2.ReadInfo(context.Background(), state.Image)
	if err != nil {
		return err
	}
	// Even where the first one to open the image is told to repair it there is nothing to repair but leaks, or flags that a
	// downgrade has not set yet.
	if !info.Dirty || !strings.HasPrefix(s.Name, "downgrade") {
		if err := sound(state.Image); err != nil {
			return err
		}
	}
	st, err := s.Look(state.Image)
	if err != nil {
		return err
	}
	if err := s.Judge(st, len(state.Marks) > 0); err != nil {
		return err
	}
	if info.Dirty {
		if err := sound(state.Image); err != nil {
			return fmt.Errorf("after the repair: %w", err)
		}
	}
	if n%31 == 0 {
		if err := stockSound(state.Image); err != nil {
			return err
		}
	}
	if n%16 != 0 {
		return nil
	}
	return changeOn(s, state.Image)
}

// changeOn makes the change once more on what a crash left, and checks that it leads to the same.
func changeOn(s *explore.Subject, f *storage.MemFile) error {
	im, err := s.Open(f, false)
	if err != nil {
		return err
	}
	if err := s.Run(context.Background(), im); err != nil {
		return errors.Join(fmt.Errorf("again after the power cut: %w", err), im.Close())
	}
	if err := im.Close(); err != nil {
		return err
	}
	st, err := s.Look(f)
	if err != nil {
		return err
	}
	if err := s.Judge(st, true); err != nil {
		return fmt.Errorf("again after the power cut: %w", err)
	}
	return sound(f)
}

// stockSound has qemu-img check a file alone.
func stockSound(f *storage.MemFile) error {
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
	path := filepath.Join(dir, "disk.qcow2")
	if err := save(f, path); err != nil {
		return err
	}
	judged.Add(1)
	return qemuCheckAlone(path)
}
