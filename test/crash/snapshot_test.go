package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// allowed is what an image may hold after a crash, in a workload whose requests come one after another.
type allowed struct {
	sectors [][]explore.Version // of the disk: for each sector, what it may hold
	other   []explore.Version   // or all of the disk is as a snapshot that was being applied has it
	states  []explore.Model     // the sets of snapshots that there may be
}

// replaySnapshots finds what a prefix of the marks allows. Operations on snapshots make everything durable before they
// return, and change the image in one moment.
func replaySnapshots(d *explore.Disk, marks []any) allowed {
	now := d.Model()
	a := allowed{sectors: make([][]explore.Version, d.Sectors)}
	settle := func() {
		a.other, a.states = nil, []explore.Model{now}
		for s, v := range now.Disk {
			a.sectors[s] = []explore.Version{v}
		}
	}
	settle()
	var running explore.Op
	for _, m := range marks {
		switch m := m.(type) {
		case markBegin:
			running = m.op
			next := now.After(m.op)
			switch {
			case m.op.Kind == explore.ApplySnapshot:
				a.other = next.Disk
			case m.op.OnSnapshots():
				a.states = append(a.states, next)
			default:
				for s := m.op.First; s < m.op.First+m.op.N; s++ {
					a.sectors[s] = append(a.sectors[s], m.op.Version)
				}
			}
		case markDone:
			now = now.After(running)
			if running.OnSnapshots() {
				settle()
			}
		case markRefused:
			settle()
		case markAcked:
			settle()
		}
	}
	return a
}

// markRefused ends an operation on snapshots that could not be done for want of refcount bits.
type markRefused struct{ id int }

// judge compares what an image holds with what it may hold.
func (a *allowed) judge(got explore.Model) error {
	if why := a.disk(got.Disk); why != nil && !(a.other != nil && slices.Equal(got.Disk, a.other)) {
		return why
	}
	var why string
	for _, m := range a.states {
		if why = got.SnapshotsDiffer(m); why == "" {
			return nil
		}
	}
	return errors.New(why)
}

func (a *allowed) disk(got []explore.Version) error {
	for s, v := range got {
		if !contains(a.sectors[s], v) {
			return fmt.Errorf("sector %d holds version %d, and may hold %v", s, v, a.sectors[s])
		}
	}
	return nil
}

func TestSnapshots(t *testing.T) {
	for i, start := range explore.SnapshotStarts() {
		t.Run(start.Name, func(t *testing.T) {
			t.Parallel()
			d := start.Make(t)
			for k := range *seeds {
				seed := *seed0 + uint64(k)
				w := newWorkload(t, d, false)
				w.runSnapshots(seed, 30)
				judgeSnapshots(t, w, seed+uint64(i)<<32)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// runSnapshots makes requests of which some are about snapshots, and closes the image.
func (w *workload) runSnapshots(seed uint64, steps int) {
	r := rand.New(rand.NewPCG(seed, 9))
	m := w.disk.Model()
	for range steps {
		id := int(w.ids.Add(1))
		op := w.disk.DrawWithSnapshots(r, explore.Version(id+1), m)
		switch {
		case op.Kind == explore.Flush:
			if err := w.flush(id, false); err != nil {
				w.t.Fatal(err)
			}
			continue
		case !op.Changes() && !op.OnSnapshots():
			if err := op.Run(w.im); err != nil {
				w.t.Fatal(err)
			}
			continue
		}
		w.file.Mark(markBegin{id, op})
		err := op.Run(w.im)
		switch {
		case err == nil:
			w.file.Mark(markDone{id})
			m = m.After(op)
		case errors.Is(err, qcow2.ErrRefcountOverflow) && op.OnSnapshots() && w.disk.Create.RefcountBits == 2:
			w.file.Mark(markRefused{id})
		default:
			w.t.Fatalf("%+v: %v", op, err)
		}
	}
	w.close()
}

// judgeSnapshots looks at every state of a finished workload.
func judgeSnapshots(t *testing.T, w *workload, seed uint64) {
	t.Helper()
	point, a := -1, allowed{}
	n := 0
	o := storage.ExploreOptions{Exhaustive: 5, PerFamily: *samples / 3, Samples: *samples / 3, Seed: seed}
	err := w.file.Explorer().Explore(o, func(s storage.CrashState) error {
		if s.Point != point {
			point, a = s.Point, replaySnapshots(w.disk, s.Marks)
		}
		n++
		total.Add(1)
		if err := holds(w.disk, s.Image, &a); err != nil {
			return err
		}
		dirty, err := mended(s.Image)
		if err != nil {
			return err
		}
		if !dirty && n%32 != 0 {
			return nil
		}
		if err := heal(w.disk, s.Image); err != nil {
			return err
		}
		if n%8 == 0 {
			if err := holds(w.disk, s.Image, &a); err != nil {
				return fmt.Errorf("after the repair: %w", err)
			}
		}
		if n%64 == 0 {
			return snapshotsGoOn(w.disk, s.Image)
		}
		if n%997 == 0 && w.disk.Create.Version != 2 {
			return stockCheck(w.disk, s.Image)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
}

// holds reads everything from an image, as it is.
func holds(d *explore.Disk, f *storage.MemFile, a *allowed) error {
	im, err := d.Open(f, true)
	if err != nil {
		return err
	}
	defer im.Close()
	got, err := d.ReadModel(im)
	if err != nil {
		return err
	}
	return a.judge(got)
}

// mended reports whether the dirty bit announces that the image has to be repaired. If it does not, nothing is wrong but
// leaks; in version 2, which has no such bit, COPIED flags may be untrue as well where that does no harm.
func mended(f *storage.MemFile) (dirty bool, err error) {
	report, err := qcow2.CheckFile(context.Background(), f, qcow2.CheckOptions{})
	if err != nil {
		return false, err
	}
	if report.Dirty {
		return true, nil
	}
	if report.CheckErrors != 0 || report.FindingsDropped != 0 {
		return false, fmt.Errorf("check: %+v", report)
	}
	if report.Corruptions == 0 {
		return false, nil
	}
	info, err := qcow2.ReadInfo(context.Background(), f)
	if err != nil {
		return false, err
	}
	for _, finding := range report.Findings {
		if finding.Kind != qcow2.CheckLeak && (info.Version != 2 || !harmless(finding, report.Findings, info.ClusterSize)) {
			return false, fmt.Errorf("check: %s", finding.Message)
		}
	}
	return false, nil
}

var (
	copiedFinding = regexp.MustCompile(`OFLAG_COPIED .*entry=([0-9a-f]+) refcount=(\d+)$`)
	leakFinding   = regexp.MustCompile(`^Leaked cluster (\d+) refcount=(\d+) reference=1$`)
)

// harmless reports whether a finding is about a COPIED flag that is clear without need, which costs a copy and no more, or
// that is set on a cluster which has one reference but is counted more often: it may be written in place all right.
func harmless(f qcow2.CheckFinding, all []qcow2.CheckFinding, cluster int64) bool {
	found := copiedFinding.FindStringSubmatch(f.Message)
	if found == nil {
		return false
	}
	entry, err := strconv.ParseUint(found[1], 16, 64)
	if err != nil {
		return false
	}
	if entry>>63 == 0 {
		return found[2] == "1"
	}
	const offset = 1<<56 - 512
	for _, other := range all {
		leak := leakFinding.FindStringSubmatch(other.Message)
		if leak != nil && leak[1] == fmt.Sprint(int64(entry&offset)/cluster) {
			return leak[2] == found[2]
		}
	}
	return false
}

// heal opens an image for writing, which repairs it if need be, and closes it again.
func heal(d *explore.Disk, f *storage.MemFile) error {
	im, err := d.Open(f, false)
	if err != nil {
		return fmt.Errorf("opening after the power cut: %w", err)
	}
	if err := im.Close(); err != nil {
		return fmt.Errorf("closing after the power cut: %w", err)
	}
	if dirty, err := mended(f); err != nil || dirty {
		return fmt.Errorf("after the repair: dirty: %v (%w)", dirty, err)
	}
	return nil
}

// snapshotsGoOn does everything once more with an image that a power cut left.
func snapshotsGoOn(d *explore.Disk, f *storage.MemFile) error {
	im, err := d.Open(f, false)
	if err != nil {
		return err
	}
	m, err := d.ReadModel(im)
	if err != nil {
		return err
	}
	write := func(v explore.Version) explore.Op {
		return explore.Op{Kind: explore.Write, First: d.Sectors / 3, N: d.Sectors / 2, Version: v}
	}
	for _, op := range []explore.Op{
		write(77), {Kind: explore.CreateSnapshot, Name: "after"}, write(78), {Kind: explore.RenameSnapshot, Name: "after", To: "late"},
		{Kind: explore.ApplySnapshot, Name: "late"}, write(79), {Kind: explore.DeleteSnapshot, Name: "late"}, write(80),
	} {
		if _, ok := m.Snapshots[op.Name]; op.OnSnapshots() && !ok && op.Kind != explore.CreateSnapshot {
			continue // it could not be created
		}
		err := op.Run(im)
		if errors.Is(err, qcow2.ErrRefcountOverflow) && op.OnSnapshots() && d.Create.RefcountBits == 2 {
			continue
		}
		if err != nil {
			return fmt.Errorf("going on after the power cut: %+v: %w", op, err)
		}
		m = m.After(op)
	}
	got, err := d.ReadModel(im)
	if err != nil {
		return err
	}
	if why := got.Differs(m); why != "" {
		return fmt.Errorf("going on after the power cut: %s", why)
	}
	if err := im.Close(); err != nil {
		return err
	}
	dirty, err := mended(f)
	if err != nil || dirty {
		return fmt.Errorf("going on after the power cut: dirty: %v (%w)", dirty, err)
	}
	return nil
}
