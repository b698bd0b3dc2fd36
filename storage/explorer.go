package storage

import (
	"fmt"
	"iter"
	"math/bits"
	"math/rand/v2"
	"strings"
)

// Explorer makes the files that a power cut could have left of a CrashFile.
//
// It stands at one point of the record. Up to there it knows the calls that are certainly on the disk, and the units of
// doubt: pieces of the other calls of which each is kept or lost by itself. Build makes the file for one choice, States
// runs through many choices, Explore through many points.
//
//	e := crash.Explorer()
//	err := e.Explore(storage.ExploreOptions{}, func(s storage.CrashState) error { return check(s.Image, s.Marks) })
//
// What is durable is kept as one file that moves along with the point, and each state is a clone of it that shares all
// it does not change, so a state costs what its doubts cost, not what the file does. An Explorer is for one goroutine
// at a time; the files that it makes are independent.
type Explorer struct {
	start []*MemFile // as each file was at first
	log   []Op

	at   int        // the point: how many events have happened
	base []*MemFile // start plus every call before the first that is in doubt
	tail []tailOp   // that first call and all later ones, in order
	n    int        // units of doubt
}

// tailOp is a call that is not part of the base.
type tailOp struct {
	op      int  // its place in the log
	durable bool // it is on the disk for certain, and merely behind one in doubt
	doomed  bool // a failed Sync leaves it in doubt for ever
	unit    int  // the first of its units of doubt, when not durable
}

// Unit is a piece of a call that a power cut keeps or loses by itself.
type Unit struct {
	Op     int   // the call's place in the log
	Off    int64 // OpWrite: the sector
	Growth bool  // OpWrite: not a sector but the new length alone
}

func newExplorer(start []*MemFile, log []Op) *Explorer {
	return &Explorer{start: start, log: log, base: cloneAll(start)}
}

func cloneAll(files []*MemFile) []*MemFile {
	clones := make([]*MemFile, len(files))
	for i, f := range files {
		clones[i] = f.Clone()
	}
	return clones
}

// Len returns the last point: the length of the record.
func (e *Explorer) Len() int { return len(e.log) }

// Points returns the points where most can be lost, which are enough for an exhaustive search: just before each Sync is
// done, and the end. What a power cut leaves at another point, one at the next of these can leave as well, and by then
// at least as much has been acknowledged.
func (e *Explorer) Points() []int {
	var points []int
	for i, op := range e.log {
		if op.Kind == OpSynced {
			points = append(points, i)
		}
	}
	return append(points, len(e.log))
}

// Marks returns the marks set before the point, in order.
func (e *Explorer) Marks() []any {
	var marks []any
	for _, op := range e.log[:e.at] {
		if op.Kind == OpMark {
			marks = append(marks, op.Mark)
		}
	}
	return marks
}

// Seek moves to a point between 0 and Len. Moving forward is cheap, moving back starts over.
func (e *Explorer) Seek(point int) error {
	if point < 0 || point > len(e.log) {
		return fmt.Errorf("point %d is not in a record of %d events", point, len(e.log))
	}
	if point < e.at {
		e.at, e.tail, e.base = 0, nil, cloneAll(e.start)
	}
	for ; e.at < point; e.at++ {
		e.step(e.at)
	}
	e.number()
	return nil
}

// step lets event i happen.
func (e *Explorer) step(i int) {
	switch op := &e.log[i]; op.Kind {
	case OpMark, OpSync:
	case OpSynced:
		for k := range e.tail {
			t := &e.tail[k]
			done := e.log[t.op].Done
			if e.log[t.op].File == op.File && t.op < op.Ref && done > 0 && done <= op.Ref && !t.doomed {
				t.durable = true
			}
		}
		e.advanceBase()
	case OpSyncFailed:
		for k := range e.tail {
			if e.log[e.tail[k].op].File == op.File {
				e.tail[k].doomed = !e.tail[k].durable
			}
		}
	default:
		e.tail = append(e.tail, tailOp{op: i})
	}
}

// advanceBase moves calls that are certain from the tail to the base, up to the first that is not: a later one must not
// be overtaken by it.
func (e *Explorer) advanceBase() {
	k := 0
	for ; k < len(e.tail) && e.tail[k].durable; k++ {
		op := &e.log[e.tail[k].op]
		applyWhole(e.base[op.File], op)
	}
	e.tail = e.tail[k:]
}

// number gives the calls in doubt their units.
func (e *Explorer) number() {
	e.n = 0
	for k := range e.tail {
		e.tail[k].unit = e.n
		if !e.tail[k].durable {
			e.n += unitCount(&e.log[e.tail[k].op])
		}
	}
}

func sectorCount(op *Op) int { return len(op.image) / SectorSize }

func unitCount(op *Op) int {
	switch op.Kind {
	case OpWrite:
		if op.after > op.before {
			return sectorCount(op) + 1
		}
		return sectorCount(op)
	case OpTruncate, OpPreallocate:
		if op.after == op.before {
			return 0
		}
		return 1
	default:
		if op.Len == 0 {
			return 0
		}
		return 1
	}
}

// UnitCount returns how many units of doubt there are at the point.
func (e *Explorer) UnitCount() int { return e.n }

// Units describes the units of doubt at the point, in the order in which Build numbers them.
func (e *Explorer) Units() []Unit {
	units := make([]Unit, 0, e.n)
	for _, t := range e.tail {
		if t.durable {
			continue
		}
		op := &e.log[t.op]
		for u := range unitCount(op) {
			unit := Unit{Op: t.op}
			if op.Kind == OpWrite {
				unit.Growth = u == sectorCount(op)
				unit.Off = op.Off&^(SectorSize-1) + int64(u)*SectorSize
			}
			units = append(units, unit)
		}
	}
	return units
}

// Build returns the file that a power cut at the point leaves when the units in keep reached the disk.
func (e *Explorer) Build(keep UnitSet) *MemFile { return e.BuildAll(keep)[0] }

// BuildAll is Build for files that lose power together.
func (e *Explorer) BuildAll(keep UnitSet) []*MemFile {
	files := cloneAll(e.base)
	for _, t := range e.tail {
		op := &e.log[t.op]
		if t.durable {
			applyWhole(files[op.File], op)
		} else {
			applyKept(files[op.File], op, keep, t.unit)
		}
	}
	return files
}

// applyWhole repeats a call. It cannot fail where the call did not: a MemFile refuses ranges, never content.
func applyWhole(f *MemFile, op *Op) {
	switch op.Kind {
	case OpWrite:
		applySectors(f, op, 0, sectorCount(op))
	case OpTruncate:
		must(f.Truncate(op.Off))
	case OpPunch:
		must(f.PunchHole(op.Off, op.Len))
	case OpZero:
		must(f.ZeroRange(op.Off, op.Len))
	case OpPreallocate:
		must(f.Preallocate(op.Off, op.Len))
	}
}

// applyKept repeats the kept units of a call; its first unit has the number first.
func applyKept(f *MemFile, op *Op, keep UnitSet, first int) {
	if op.Kind != OpWrite {
		if unitCount(op) > 0 && keep.Has(first) {
			applyWhole(f, op)
		}
		return
	}
	sectors := sectorCount(op)
	for from := 0; from < sectors; {
		if !keep.Has(first + from) {
			from++
			continue
		}
		to := from + 1
		for to < sectors && keep.Has(first+to) {
			to++
		}
		applySectors(f, op, from, to)
		from = to
	}
	if unitCount(op) > sectors && keep.Has(first+sectors) {
		must(f.Preallocate(0, op.Off+op.Len))
	}
}

// applySectors writes sectors [from, to) of a write as they read after it, as far as the file went then.
func applySectors(f *MemFile, op *Op, from, to int) {
	start := op.Off&^(SectorSize-1) + int64(from)*SectorSize
	end := min(op.Off&^(SectorSize-1)+int64(to)*SectorSize, op.after)
	_, err := f.WriteAt(op.image[from*SectorSize:][:end-start], start)
	must(err)
}

// must guards the one assumption of a replay: that what one MemFile did, another does.
func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("storage: replaying a recorded call: %v", err))
	}
}

// UnitSet is a set of units of doubt, by number.
type UnitSet []uint64

// NewUnitSet returns an empty set with room for n units.
func NewUnitSet(n int) UnitSet { return make(UnitSet, (n+63)/64) }

// Has reports whether u is in the set.
func (s UnitSet) Has(u int) bool { return u>>6 < len(s) && s[u>>6]&(1<<(u&63)) != 0 }

// Add puts u into the set.
func (s UnitSet) Add(u int) { s[u>>6] |= 1 << (u & 63) }

// Remove takes u out of the set.
func (s UnitSet) Remove(u int) { s[u>>6] &^= 1 << (u & 63) }

// Len returns how many units are in the set.
func (s UnitSet) Len() int {
	n := 0
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

// AddRange puts [from, to) into the set.
func (s UnitSet) AddRange(from, to int) {
	for u := from; u < to; u++ {
		s.Add(u)
	}
}

// RemoveRange takes [from, to) out of the set.
func (s UnitSet) RemoveRange(from, to int) {
	for u := from; u < to; u++ {
		s.Remove(u)
	}
}

// String lists the runs of the set, as "0-3,7".
func (s UnitSet) String() string {
	var b strings.Builder
	for u, end := 0, len(s)*64; u < end; u++ {
		if !s.Has(u) {
			continue
		}
		from := u
		for s.Has(u + 1) {
			u++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%d", from)
		if u > from {
			fmt.Fprintf(&b, "-%d", u)
		}
	}
	return b.String()
}

// ExploreOptions say how many states to try.
type ExploreOptions struct {
	// Exhaustive is the most units of doubt of which every subset is tried; 0 means 10 (1024 subsets). Above that, the
	// same number bounds the calls of which every subset is tried, each kept or lost whole.
	Exhaustive int
	// PerFamily bounds each kind of choice that is tried when there are more units: prefixes, single drops and single
	// keeps, of units and of whole calls. 0 means 64. Where there are more, they are taken at even distances.
	PerFamily int
	// Samples is how many random choices are tried then; 0 means 64, a negative number none.
	Samples int
	// Seed makes the random choices; the same seed makes the same.
	Seed uint64
	// AllPoints makes Explore stop after every event, not only at Points.
	AllPoints bool
}

func (o ExploreOptions) withDefaults() ExploreOptions {
	if o.Exhaustive == 0 {
		o.Exhaustive = 10
	}
	o.Exhaustive = min(o.Exhaustive, 30)
	if o.PerFamily == 0 {
		o.PerFamily = 64
	}
	if o.Samples == 0 {
		o.Samples = 64
	}
	return o
}

// CrashState is one file that a power cut could have left.
type CrashState struct {
	Point int
	Kept  UnitSet // valid until the next state
	Units int     // how many units there were to keep
	Image *MemFile
	Files []*MemFile // Image, and those that lost power with it
	Marks []any      // the marks set before the point
}

// String tells enough to make the state again with Seek and Build.
func (s CrashState) String() string {
	return fmt.Sprintf("power cut after event %d, units kept: [%v] of %d", s.Point, s.Kept, s.Units)
}

// Explore calls check for many states at many points, until it returns an error, which comes back with the state's
// description.
func (e *Explorer) Explore(o ExploreOptions, check func(CrashState) error) error {
	points := e.Points()
	if o.AllPoints {
		points = points[:0]
		for p := range len(e.log) + 1 {
			points = append(points, p)
		}
	}
	for _, p := range points {
		if err := e.Seek(p); err != nil {
			return err
		}
		marks := e.Marks()
		for kept, files := range e.AllStates(o) {
			s := CrashState{Point: p, Kept: kept, Units: e.n, Image: files[0], Files: files, Marks: marks}
			if err := check(s); err != nil {
				return fmt.Errorf("%v: %w", s, err)
			}
		}
	}
	return nil
}

// States runs through choices at the point: all of them if the units are few, otherwise those that find most mistakes
// (nothing, everything, prefixes, all but one, only one, for units and for whole calls) and a random sample. The set is
// valid until the next step. States may repeat.
func (e *Explorer) States(o ExploreOptions) iter.Seq2[UnitSet, *MemFile] {
	return func(yield func(UnitSet, *MemFile) bool) {
		for keep, files := range e.AllStates(o) {
			if !yield(keep, files[0]) {
				return
			}
		}
	}
}

// AllStates is States for files that lose power together.
func (e *Explorer) AllStates(o ExploreOptions) iter.Seq2[UnitSet, []*MemFile] {
	o = o.withDefaults()
	return func(yield func(UnitSet, []*MemFile) bool) {
		e.choices(o, func(keep UnitSet) bool { return yield(keep, e.BuildAll(keep)) })
	}
}

// choices calls try for each choice until it returns false.
func (e *Explorer) choices(o ExploreOptions, try func(UnitSet) bool) {
	keep := NewUnitSet(e.n)
	units := make([]int, e.n+1) // piece i is [units[i], units[i+1])
	for i := range units {
		units[i] = i
	}
	if e.n <= o.Exhaustive {
		allSubsets(keep, units, try)
		return
	}
	calls := e.callBounds()
	if len(calls)-1 <= o.Exhaustive {
		if !allSubsets(keep, calls, try) {
			return
		}
	} else if !families(keep, calls, o.PerFamily, try) {
		return
	}
	if families(keep, units, o.PerFamily, try) {
		e.samples(keep, calls, o, try)
	}
}

// callBounds returns the first unit of each call in doubt that has any, and then the number of units.
func (e *Explorer) callBounds() []int {
	bounds := []int{0}
	for _, t := range e.tail {
		if !t.durable && t.unit > bounds[len(bounds)-1] {
			bounds = append(bounds, t.unit)
		}
	}
	if e.n > bounds[len(bounds)-1] {
		bounds = append(bounds, e.n)
	}
	return bounds
}

// allSubsets tries every subset of the pieces.
func allSubsets(keep UnitSet, bounds []int, try func(UnitSet) bool) bool {
	pieces := len(bounds) - 1
	for m := uint64(0); m < 1<<pieces; m++ {
		clear(keep)
		for i := range pieces {
			if m&(1<<i) != 0 {
				keep.AddRange(bounds[i], bounds[i+1])
			}
		}
		if !try(keep) {
			return false
		}
	}
	return true
}

// families tries prefixes, all but one, and only one of the pieces.
func families(keep UnitSet, bounds []int, limit int, try func(UnitSet) bool) bool {
	pieces := len(bounds) - 1
	end := bounds[pieces]
	for i := range spread(pieces+1, limit) {
		clear(keep)
		keep.AddRange(0, bounds[i])
		if !try(keep) {
			return false
		}
	}
	for i := range spread(pieces, limit) {
		clear(keep)
		keep.AddRange(0, end)
		keep.RemoveRange(bounds[i], bounds[i+1])
		if !try(keep) {
			return false
		}
		clear(keep)
		keep.AddRange(bounds[i], bounds[i+1])
		if !try(keep) {
			return false
		}
	}
	return true
}

// spread yields at most limit (but at least two) numbers of [0, n) at even distances, the first and the last always.
func spread(n, limit int) iter.Seq[int] {
	return func(yield func(int) bool) {
		count := min(n, max(limit, 2))
		for i := range count {
			at := 0
			if count > 1 {
				at = int(int64(i) * int64(n-1) / int64(count-1))
			}
			if !yield(at) {
				return
			}
		}
	}
}

// samples tries random choices: half of them unit by unit, half of them call by call with one call torn, at densities
// from sparse to full.
func (e *Explorer) samples(keep UnitSet, calls []int, o ExploreOptions, try func(UnitSet) bool) {
	rng := rand.New(rand.NewPCG(o.Seed, uint64(e.at)))
	for i := range o.Samples {
		clear(keep)
		density := rng.Float64()
		if i%2 == 0 {
			addRandom(keep, 0, e.n, density, rng)
		} else {
			torn := rng.IntN(len(calls) - 1)
			for k := range len(calls) - 1 {
				if k == torn {
					addRandom(keep, calls[k], calls[k+1], 0.5, rng)
				} else if rng.Float64() < density {
					keep.AddRange(calls[k], calls[k+1])
				}
			}
		}
		if !try(keep) {
			return
		}
	}
}

func addRandom(keep UnitSet, from, to int, density float64, rng *rand.Rand) {
	for u := from; u < to; u++ {
		if rng.Float64() < density {
			keep.Add(u)
		}
	}
}
