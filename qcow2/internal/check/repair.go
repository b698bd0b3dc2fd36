package check

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// RepairMode says what a repair may change.
type RepairMode uint8

// The modes of a repair, by the names of qemu-img check -r.
const (
	// RepairLeaks lowers refcounts that are too high, and nothing else.
	RepairLeaks RepairMode = iota
	// RepairAll repairs everything that can be repaired without making data up.
	RepairAll
)

// String returns the mode's name.
func (m RepairMode) String() string {
	if m == RepairAll {
		return "all"
	}
	return "leaks"
}

// RepairOptions controls a repair.
type RepairOptions struct {
	Mode RepairMode
	// MaxFindings and OnFinding are as for a check. What the repair itself does comes with Finding.Repaired.
	MaxFindings int
	OnFinding   func(Finding)
	// Preview makes the report of a repair and writes nothing: the changes are made to a copy in memory.
	Preview bool
	// Undo, if not nil, is an empty file in which everything is kept that the repair overwrites, so that Restore can put it
	// back. The host space of freed clusters is then not given back.
	Undo storage.File
}

// RepairReport is the outcome of a repair.
type RepairReport struct {
	// Before is what the first pass found, After what is left. After is the result of a pass of its own, unless nothing was
	// changed.
	Before, After *Report
	// CorruptionsFixed and LeaksFixed count as qemu-img check does.
	CorruptionsFixed, LeaksFixed int64
	// Repairs holds the first of what was done, RepairsDropped is how many more there were.
	Repairs        []Finding
	RepairsDropped int64
	// Rebuilt: the refcount structures were built anew, in other clusters.
	Rebuilt bool
	// LeaksKept is how many leaks were left alone because a damaged entry may refer to those clusters.
	LeaksKept int64
	// Truncated is how many bytes the file became shorter.
	Truncated int64
	// Notes say in whole sentences what a user should know of what was or was not done.
	Notes []string
}

// Fixed reports whether anything that counts was repaired.
func (r *RepairReport) Fixed() bool { return r.CorruptionsFixed > 0 || r.LeaksFixed > 0 }

// Errors of a repair that refuses to begin. The image is unchanged.
var (
	// ErrDirtyLeaks: after a crash the refcounts mean nothing, and so neither do the leaks.
	ErrDirtyLeaks = errors.New("the image was not closed cleanly and has errors, so that its refcounts do not tell what " +
		"is leaked: repair everything, not only leaks")
	// ErrNeedRebuild: leaks cannot be mended while the refcount structures are broken.
	ErrNeedRebuild = errors.New("the refcount structures must be rebuilt: repair everything, not only leaks")
)

// Repair mends the image in file, which nobody else may use meanwhile.
//
// # What it may do
//
// Nothing that anything refers to is given up: the repair never drops a snapshot, a bitmap, or a cluster that can be
// reached. In the header it writes single fields. Where something refers to a place that cannot be followed, clusters
// without a reference may be in use all the same, and leaks are left alone. What would need data to be made up is
// left as it is, and in the report.
//
// # Crashes
//
// On version 3 the dirty bit is set (and durable) before the first change, and cleared after the last one. Whatever
// the version, changes are made in an order whose every prefix is safe:
//
//  1. refcounts are raised; where the refcount structures are broken, new ones are built beside them in clusters that
//     nothing uses, and the header's pointer is switched;
//  2. COPIED flags are cleared where the refcount is not one;
//  3. COPIED flags are set where it is, and refcounts are lowered.
//
// Each step is durable before the next one begins. So a repair that a power cut ends is finished by the next. The dirty
// and the corrupt bit are only cleared after another pass over the image has found nothing wrong.
//
// The error is that of Run, one of those above, or of a write that failed; the report is then nil or incomplete.
func Repair(ctx context.Context, file storage.File, o RepairOptions) (*RepairReport, error) {
	r := &repairer{ctx: ctx, file: file, o: o, rep: &RepairReport{}, max: o.MaxFindings}
	if err := r.cover(); err != nil {
		return nil, err
	}
	if r.max <= 0 {
		r.max = defaultMaxFindings
	}
	return r.rep, r.run()
}

// repairer is one run of a repair.
type repairer struct {
	ctx  context.Context // of the one call of Repair
	file storage.File
	o    RepairOptions
	max  int
	rep  *RepairReport

	c *checker // the last walk; its counts decide what the refcounts should be
	// blind is that of the first walk: what was mended since does not show what it once referred to.
	blind bool
	// dirtySet: this repair set the dirty bit. changed: it has written something.
	dirtySet, changed bool
	freed             []span // clusters whose refcount became 0, in order
	// beforeRebuild is the walk before the refcount structures were rebuilt, nil if they were not.
	beforeRebuild *checker
}

func (r *repairer) run() error {
	first, err := r.walk(r.o.OnFinding, false)
	if first != nil {
		r.rep.Before, r.rep.After = first.rep, first.rep
	}
	if err != nil {
		return err
	}
	r.c, r.blind = first, first.blind
	if err := r.refuse(); err != nil {
		return err
	}
	for range maxRounds {
		before := r.c.rep
		if before.Clean() {
			break
		}
		if err := r.mend(); err != nil {
			return err
		}
		if !r.changed {
			break
		}
		if err := r.verify(); err != nil {
			return err
		}
		if r.c.rep.Corruptions >= before.Corruptions {
			break
		}
	}
	return r.finish()
}

// maxRounds bounds how often the repair looks again at what it could not mend in one go: a table that was two things at
// once may have become one.
const maxRounds = 4

// cover puts between the repair and the file what the options ask for.
func (r *repairer) cover() (err error) {
	var cover storage.File
	switch {
	case r.o.Preview:
		cover, err = storage.NewOverlay(r.file)
	case r.o.Undo != nil:
		cover, err = newUndoFile(r.file, r.o.Undo)
	default:
		return nil
	}
	if err != nil {
		return fmt.Errorf("preparing the repair: %w", err)
	}
	r.file = cover
	return nil
}

// refuse returns why only leaks cannot be repaired.
func (r *repairer) refuse() error {
	if r.o.Mode == RepairAll {
		return nil
	}
	rep := r.c.rep
	switch {
	case rep.Dirty && rep.Corruptions > 0:
		return ErrDirtyLeaks
	case rep.Rebuild || r.c.brokenRefs && rep.Leaks > 0:
		return ErrNeedRebuild
	}
	return nil
}

// walk checks the file. onFinding may be nil.
func (r *repairer) walk(onFinding func(Finding), withoutRefs bool) (*checker, error) {
	c := newChecker(r.ctx, r.file, Options{MaxFindings: r.o.MaxFindings, OnFinding: onFinding})
	c.withoutRefs, c.recover = withoutRefs, r.o.Mode == RepairAll
	if err := c.open(); err != nil {
		return nil, err
	}
	return c, c.run()
}

// mend makes all changes that keep the file's length.
func (r *repairer) mend() error {
	if r.o.Mode == RepairAll {
		if err := r.mendSnapshots(); err != nil {
			return fmt.Errorf("mending the snapshot table: %w", err)
		}
		if err := r.mendEntries(); err != nil {
			return err
		}
	}
	rebuild := r.o.Mode == RepairAll && (r.c.brokenRefs || r.c.missingBlock)
	if rebuild {
		r.beforeRebuild = r.c
		err := r.rebuild()
		if errors.Is(err, errNoPlace) {
			r.beforeRebuild = nil
			r.note("The refcount structures were not rebuilt: something refers to places outside the file, where they would be.")
			return nil
		}
		if err != nil {
			return fmt.Errorf("rebuilding the refcount structures: %w", err)
		}
	} else if r.o.Mode == RepairAll {
		if err := r.adjust(true); err != nil {
			return err
		}
	}
	if err := r.mendCopied(); err != nil {
		return err
	}
	if !rebuild {
		if err := r.adjust(false); err != nil {
			return err
		}
	}
	return r.sync()
}

// target returns what the refcount of a cluster should be when the repair is done.
func (r *repairer) target(i format.ClusterIdx) uint64 {
	found := r.c.refs.get(i)
	stored, ok := r.c.stored.get(i)
	if !ok {
		return found
	}
	return r.aim(stored, found)
}

// aim is target for known counts.
func (r *repairer) aim(stored, found uint64) uint64 {
	if stored > found && r.blind || stored < found && r.o.Mode == RepairLeaks {
		return stored
	}
	return found
}

// begin is called before every change. On version 3 it has the image say that it is being changed.
func (r *repairer) begin() error {
	r.changed = true
	h := r.c.h
	if r.dirtySet || h.Version < format.Version3 || h.Incompat&format.IncompatDirty != 0 {
		return nil
	}
	if err := r.setIncompat(h.Incompat | format.IncompatDirty); err != nil {
		return fmt.Errorf("setting the dirty bit: %w", err)
	}
	r.dirtySet = true
	return nil
}

// setIncompat writes the incompatible features, durably. The header has no others than those that were read.
func (r *repairer) setIncompat(bits uint64) error {
	b := format.EncodeUint64(bits)
	if err := storage.WriteFull(r.file, b[:], format.OffIncompat); err != nil {
		return err
	}
	return r.file.Sync()
}

func (r *repairer) sync() error {
	if !r.changed {
		return nil
	}
	if err := r.file.Sync(); err != nil {
		return fmt.Errorf("making repairs durable: %w", err)
	}
	return nil
}

// writeChanged writes those sectors of a structure at off that differ from what the file has.
func (r *repairer) writeChanged(off format.HostOff, old, now []byte) error {
	const step = format.SectorSize
	for from := 0; from < len(now); from += step {
		to := min(from+step, len(now))
		if string(old[from:to]) == string(now[from:to]) {
			continue
		}
		for to < len(now) && string(old[to:min(to+step, len(now))]) != string(now[to:min(to+step, len(now))]) {
			to = min(to+step, len(now))
		}
		if err := r.begin(); err != nil {
			return err
		}
		if err := storage.WriteFull(r.file, now[from:to], int64(off)+int64(from)); err != nil {
			return err
		}
		from = to - step // to is a multiple of step, or the end
		if to == len(now) {
			break
		}
	}
	return nil
}

// adjust raises the refcounts that are too low, or lowers those that are too high, in their blocks, and makes it durable
// if it raised any.
func (r *repairer) adjust(raise bool) error {
	a := adjuster{repairer: r, num: -1, raise: raise}
	err := r.c.eachPart(func(p refPart) error {
		if p.block == nil {
			return nil
		}
		if p.num != a.num {
			if err := a.flush(); err != nil {
				return err
			}
			a.num, a.block, a.old = p.num, p.block, a.old[:0]
		}
		a.part(p)
		return nil
	})
	if err != nil {
		return err
	}
	if err := a.flush(); err != nil {
		return err
	}
	if raise && a.changes > 0 {
		return r.sync()
	}
	return nil
}

// adjuster collects the changes to one refcount block.
type adjuster struct {
	*repairer
	raise   bool
	changes int64

	num   int64
	block []byte
	old   []byte // the block as the file has it, empty if it is unchanged
}

func (a *adjuster) part(p refPart) {
	l := a.c.l
	for i := format.ClusterIdx(p.lo); i < format.ClusterIdx(p.hi); i++ {
		stored, found := a.c.both(&p, i)
		if stored == found || (found > stored) != a.raise {
			continue
		}
		if a.aim(stored, found) != found {
			if !a.raise {
				a.rep.LeaksKept++
			}
			continue
		}
		if len(a.old) == 0 {
			a.old = append(a.old, a.block...)
		}
		l.SetRefcount(a.block, l.RefBlockIndex(i), found)
		a.changes++
		kind := Corruption
		if !a.raise {
			kind = Leak
		}
		a.repaired(kind, at(l.Offset(i)), "Repairing cluster %d refcount=%d reference=%d", i, stored, found)
		if found == 0 {
			a.free(uint64(i))
		}
	}
}

func (a *adjuster) flush() error {
	if len(a.old) == 0 {
		return nil
	}
	off := a.c.stored.table[a.num].Offset()
	if err := a.ctx.Err(); err != nil {
		return err
	}
	if err := a.writeChanged(off, a.old, a.block); err != nil {
		return fmt.Errorf("writing refcount block %d at host offset %#x: %w", a.num, off, err)
	}
	return nil
}

// free notes that a cluster came free.
func (r *repairer) free(i uint64) {
	if n := len(r.freed); n > 0 && r.freed[n-1].hi == i {
		r.freed[n-1].hi++
		return
	}
	r.freed = append(r.freed, span{i, i + 1})
}

// repaired counts one fault that was mended and says so.
func (r *repairer) repaired(kind Kind, p place, message string, args ...any) {
	if kind == Leak {
		r.rep.LeaksFixed++
	} else {
		r.rep.CorruptionsFixed++
	}
	keep := len(r.rep.Repairs) < r.max
	if !keep {
		r.rep.RepairsDropped++
	}
	if !keep && r.o.OnFinding == nil {
		return
	}
	f := Finding{Kind: kind, Times: 1, Host: p.host, Guest: p.guest, HasGuest: p.hasGuest, Repaired: true,
		Message: fmt.Sprintf(message, args...)}
	if keep {
		r.rep.Repairs = append(r.rep.Repairs, f)
	}
	if r.o.OnFinding != nil {
		r.o.OnFinding(f)
	}
}

func (r *repairer) note(message string, args ...any) {
	r.rep.Notes = append(r.rep.Notes, fmt.Sprintf(message, args...))
}

// verify walks the image again.
func (r *repairer) verify() error {
	c, err := r.walk(nil, false)
	if err != nil {
		return fmt.Errorf("checking the repaired image: %w", err)
	}
	if old := r.beforeRebuild; old != nil { // what a rebuild has mended is the difference that it made
		r.rep.CorruptionsFixed += max(0, old.rep.Corruptions-old.copied-(c.rep.Corruptions-c.copied))
		r.rep.LeaksFixed += max(0, old.rep.Leaks-c.rep.Leaks)
	}
	r.c, r.rep.After, r.beforeRebuild = c, c.rep, nil
	return nil
}

// finish gives space back and lets the header say what is known now.
func (r *repairer) finish() error {
	if r.blind && r.o.Mode == RepairAll || r.rep.LeaksKept > 0 {
		r.rep.LeaksKept = r.rep.After.Leaks
	}
	if r.rep.LeaksKept > 0 {
		r.note("%d leaked clusters were kept: an entry that cannot be repaired may have referred to them.", r.rep.LeaksKept)
	}
	clean := r.rep.After.Clean()
	if clean {
		if err := r.punch(); err != nil {
			return err
		}
		if r.o.Mode == RepairAll {
			if err := r.truncate(); err != nil {
				return err
			}
		}
	}
	bits := r.c.h.Incompat
	switch {
	case clean:
		bits &^= format.IncompatDirty | format.IncompatCorrupt
	case r.dirtySet: // every change that was possible is durable
		bits &^= format.IncompatDirty
	}
	if bits == r.c.h.Incompat || r.c.h.Version < format.Version3 {
		return nil
	}
	if err := r.setIncompat(bits); err != nil {
		return fmt.Errorf("clearing the dirty and corrupt bits: %w", err)
	}
	r.rep.After.Dirty, r.rep.After.Corrupt = bits&format.IncompatDirty != 0, bits&format.IncompatCorrupt != 0
	return nil
}

// punch gives the host space of freed clusters back, where the host can.
func (r *repairer) punch() error {
	size := uint64(r.c.fileSize)
	for _, s := range r.freed {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		lo, hi := s.lo<<r.c.l.ClusterBits, min(s.hi<<r.c.l.ClusterBits, size)
		if lo >= hi {
			break
		}
		if err := r.file.PunchHole(int64(lo), int64(hi-lo)); err != nil {
			return nil // the clusters are free whether or not the host takes them back
		}
	}
	return nil
}

// truncate cuts the unused end of the file off. A power cut may keep or lose the cut alone: nothing refers to the end.
func (r *repairer) truncate() error {
	end := r.rep.After.ImageEndOffset
	if r.c.fileSize <= end || r.file.Stat().Device {
		return nil
	}
	if err := r.file.Truncate(end); err != nil {
		return fmt.Errorf("cutting the unused end off the file: %w", err)
	}
	if err := r.file.Sync(); err != nil {
		return fmt.Errorf("cutting the unused end off the file: %w", err)
	}
	r.rep.Truncated = r.c.fileSize - end
	return nil
}

// maxClusters bounds where a cluster can be.
func maxClusters(l format.Layout) format.ClusterIdx {
	return min(l.Cluster(format.MaxHostOffset), math.MaxInt64>>l.ClusterBits)
}
