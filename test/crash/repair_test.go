package crash

import (
	"fmt"
	"testing"

	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestRepairs loses power during repairs of images damaged in every way. The next repair must come to the same end: nothing
// wrong, and disk and snapshot as they were.
func TestRepairs(t *testing.T) {
	for i, start := range explore.Starts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			step := 1
			if testing.Short() {
				step = 8
			}
			for _, d := range start.MakeDamaged(t, i, step) {
				if err := cutShort(t, d, uint64(i)); err != nil {
					t.Errorf("%s: %v", d.Kind, err)
				}
			}
		})
	}
}

func cutShort(t *testing.T, d *explore.Damaged, seed uint64) error {
	file := storage.NewCrashFile(d.Image.Clone())
	if rep, err := explore.Repair(file, nil); err != nil || !rep.After.Clean() {
		return fmt.Errorf("repairing: %w, %+v", err, rep)
	}
	snapshot := snapshotContent(t, d.Disk)
	o := storage.ExploreOptions{Exhaustive: 5, PerFamily: *samples / 2, Samples: *samples / 2, Seed: seed}
	return file.Explorer().Explore(o, func(s storage.CrashState) error {
		n := total.Add(1)
		if err := d.Judge(s.Image); err != nil {
			return err
		}
		if n%197 == 0 {
			if err := stockCheck(d.Disk, s.Image); err != nil {
				return err
			}
		}
		return sameSnapshots(d.Disk, s.Image, snapshot)
	})
}
