package storage_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/storage"
)

const sector = storage.SectorSize

func fill(b byte, sectors int) []byte { return bytes.Repeat([]byte{b}, sectors*sector) }

// newCrash returns a file of durable 'o' sectors.
func newCrash(t *testing.T, sectors int) *storage.CrashFile {
	t.Helper()
	base := storage.NewMemFile("mem")
	if _, err := base.WriteAt(fill('o', sectors), 0); err != nil {
		t.Fatal(err)
	}
	return storage.NewCrashFile(base)
}

// brief shows a file as the first byte of each sector; 0 is shown as a dot, a sector with different bytes as '?'.
func brief(t *testing.T, f storage.File) string {
	t.Helper()
	var out []byte
	for p := readAll(t, f); len(p) > 0; {
		s := p[:min(sector, len(p))]
		c := s[0]
		if !bytes.Equal(s, bytes.Repeat(s[:1], len(s))) {
			c = '?'
		} else if c == 0 {
			c = '.'
		}
		out, p = append(out, c), p[len(s):]
	}
	return string(out)
}

// statesAt returns all states at a point, as brief texts, each once.
func statesAt(t *testing.T, e *storage.Explorer, point int) map[string]bool {
	t.Helper()
	if err := e.Seek(point); err != nil {
		t.Fatal(err)
	}
	states := make(map[string]bool)
	for _, image := range e.States(storage.ExploreOptions{Exhaustive: 16}) {
		states[brief(t, image)] = true
	}
	return states
}

func wantStates(t *testing.T, got map[string]bool, want ...string) {
	t.Helper()
	for _, w := range want {
		if !got[w] {
			t.Errorf("state %q is missing", w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("states are %v, want %v", got, want)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, f storage.File, b byte, at, sectors int) {
	t.Helper()
	must(t, second(f.WriteAt(fill(b, sectors), int64(at*sector))))
}

func TestCrashTornWrite(t *testing.T) {
	c := newCrash(t, 4)
	write(t, c, 'a', 1, 2)
	must(t, c.Sync())
	write(t, c, 'b', 3, 1)
	e := c.Explorer()
	wantStates(t, statesAt(t, e, 0), "oooo")
	wantStates(t, statesAt(t, e, 1), "oooo", "oaoo", "ooao", "oaao")
	wantStates(t, statesAt(t, e, 2), "oooo", "oaoo", "ooao", "oaao") // the Sync has begun, no more
	wantStates(t, statesAt(t, e, 3), "oaao")
	wantStates(t, statesAt(t, e, 4), "oaao", "oaab")
	wantStates(t, statesAt(t, e, 1), "oooo", "oaoo", "ooao", "oaao") // going back
	if err := e.Seek(5); err == nil {
		t.Errorf("Seek past the end succeeded")
	}
	if got := e.Points(); len(got) != 2 || got[0] != 2 || got[1] != 4 {
		t.Errorf("Points = %v", got)
	}
}

// Two writes to one sector: old, first or second; never the second without what the first left in the sector.
func TestCrashSameSector(t *testing.T) {
	c := newCrash(t, 2)
	write(t, c, 'a', 0, 2)
	write(t, c, 'b', 0, 1)
	wantStates(t, statesAt(t, c.Explorer(), 2), "oo", "ao", "bo", "oa", "aa", "ba")

	c = newCrash(t, 1)
	must(t, second(c.WriteAt(bytes.Repeat([]byte{'a'}, 200), 0)))
	must(t, second(c.WriteAt(bytes.Repeat([]byte{'a'}, 312), 200)))
	wantStates(t, statesAt(t, c.Explorer(), 2), "o", "?", "a") // '?' is the first write alone
}

func TestCrashGrowth(t *testing.T) {
	c := newCrash(t, 1)
	write(t, c, 'a', 2, 2)
	// Without the data, with the new length; without both; every sector brings as much length as it needs.
	wantStates(t, statesAt(t, c.Explorer(), 1), "o", "o...", "o.a", "o.a.", "o..a", "o.aa")
	c = newCrash(t, 1)
	must(t, second(c.WriteAt([]byte("tail"), sector)))
	e := c.Explorer()
	must(t, e.Seek(1))
	for keep, image := range e.States(storage.ExploreOptions{}) {
		size, _ := image.Size()
		if want := int64(sector + 4); keep.Len() > 0 && size != want || keep.Len() == 0 && size != sector {
			t.Errorf("keeping %v leaves %d bytes", keep, size)
		}
	}
}

func TestCrashWholeCalls(t *testing.T) {
	c := newCrash(t, 4)
	must(t, c.Truncate(sector))
	wantStates(t, statesAt(t, c.Explorer(), 1), "oooo", "o")
	must(t, c.Truncate(2*sector))
	wantStates(t, statesAt(t, c.Explorer(), 2), "oooo", "o", "oo", "o.")
	must(t, c.Sync())
	wantStates(t, statesAt(t, c.Explorer(), 4), "o.")

	c = newCrash(t, 4)
	must(t, c.PunchHole(sector, 2*sector))
	must(t, c.ZeroRange(3*sector, 2*sector))
	must(t, c.Preallocate(0, 6*sector))
	must(t, c.Preallocate(0, sector)) // changes nothing: nothing to doubt
	e := c.Explorer()
	wantStates(t, statesAt(t, e, 4), "oooo", "o..o", "ooo..", "o....", "oooo..", "o..o..", "ooo...", "o.....")
	if units := e.Units(); len(units) != 3 || units[2].Op != 2 {
		t.Errorf("units of doubt are %v", units)
	}
}

// held runs call in a goroutine and returns when it is under way: recorded and not returned. finish lets it return.
func held(c *storage.CrashFile, kind storage.OpKind, call func() error) (finish func() error) {
	entered, leave, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var once sync.Once
	c.SetHook(func(k storage.OpKind) {
		if k == kind {
			once.Do(func() {
				close(entered)
				<-leave
			})
		}
	})
	go func() { done <- call() }()
	<-entered
	c.SetHook(nil)
	return func() error {
		close(leave)
		return <-done
	}
}

// A write that comes while a Sync runs is not covered by it.
func TestCrashWriteDuringSync(t *testing.T) {
	c := newCrash(t, 3)
	write(t, c, 'a', 0, 1)
	finish := held(c, storage.OpSync, c.Sync)
	write(t, c, 'b', 1, 1)
	must(t, finish())
	c.Mark("acknowledged")
	e := c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "aoo", "abo")
	must(t, c.Sync())
	e = c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "abo")
}

// A write that is still running when a Sync begins is not covered by it, even if a later write is: the later one wins
// where they overlap.
func TestCrashSyncDuringWrite(t *testing.T) {
	c := newCrash(t, 3)
	finish := held(c, storage.OpWrite, func() error { return second(c.WriteAt(fill('a', 2), 0)) })
	write(t, c, 'b', 1, 2)
	must(t, c.Sync())
	e := c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "obb", "abb")
	must(t, finish())
	e = c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "obb", "abb")
	must(t, c.Sync())
	e = c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "abb")
}

// What a failed Sync was to cover stays in doubt whatever comes later, until it is written again.
func TestCrashFailedSync(t *testing.T) {
	c := newCrash(t, 3)
	write(t, c, 'a', 0, 1)
	must(t, c.Sync())
	write(t, c, 'b', 0, 2)
	c.FailNextSync(errTest)
	if err := c.Sync(); err != errTest {
		t.Fatalf("Sync: %v", err)
	}
	write(t, c, 'c', 2, 1)
	must(t, c.Sync())
	e := c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "aoc", "boc", "abc", "bbc")
	write(t, c, 'd', 0, 2)
	must(t, c.Sync())
	e = c.Explorer()
	wantStates(t, statesAt(t, e, e.Len()), "ddc")
}

func TestCrashMarks(t *testing.T) {
	c := newCrash(t, 1)
	c.Mark("first")
	write(t, c, 'a', 0, 1)
	must(t, c.Sync())
	c.Mark("second")
	var seen []string
	must(t, c.Explorer().Explore(storage.ExploreOptions{AllPoints: true}, func(s storage.CrashState) error {
		seen = append(seen, fmt.Sprintf("%d:%v:%s", s.Point, s.Marks, brief(t, s.Image)))
		return nil
	}))
	want := []string{
		"0:[]:o", "1:[first]:o", "2:[first]:o", "2:[first]:a", "3:[first]:o", "3:[first]:a", "4:[first]:a", "5:[first second]:a",
	}
	if fmt.Sprint(seen) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", seen, want)
	}
	err := c.Explorer().Explore(storage.ExploreOptions{}, func(s storage.CrashState) error {
		if s.Point == 3 && s.Kept.Len() == 1 {
			return errTest
		}
		return nil
	})
	if !errors.Is(err, errTest) || err.Error() != "power cut after event 3, units kept: [0] of 1: injected" {
		t.Errorf("Explore returned %v", err)
	}
}

// With too many units for all subsets, the choices that matter most are among those tried, and the same seed tries the
// same.
func TestCrashFamilies(t *testing.T) {
	c := newCrash(t, 40)
	for i := range 20 {
		write(t, c, byte('a'+i), 2*i, 2)
	}
	e := c.Explorer()
	must(t, e.Seek(e.Len()))
	run := func(seed uint64) (kept []string) {
		for keep := range e.States(storage.ExploreOptions{Seed: seed}) {
			kept = append(kept, keep.String())
		}
		return kept
	}
	first := run(1)
	tried := make(map[string]bool)
	for _, k := range first {
		tried[k] = true
	}
	for _, k := range []string{"", "0-39", "0-1", "0", "0-38", "1-39", "2-39", "0-1,4-39", "39", "7", "6-7", "0-6,8-39", "0-17"} {
		if !tried[k] {
			t.Errorf("keeping [%s] is not tried", k)
		}
	}
	if fmt.Sprint(first) != fmt.Sprint(run(1)) {
		t.Errorf("the same seed tries other states")
	}
	if fmt.Sprint(first) == fmt.Sprint(run(2)) {
		t.Errorf("another seed tries the same states")
	}
	n := 0
	for range e.States(storage.ExploreOptions{PerFamily: 2, Samples: -1}) {
		n++
	}
	if want := 2 * (2 + 2*2); n != want {
		t.Errorf("%d states with families of two and no samples, want %d", n, want)
	}
	few := newCrash(t, 40)
	write(t, few, 'a', 0, 10)
	write(t, few, 'b', 20, 10)
	e = few.Explorer()
	must(t, e.Seek(2))
	tried = make(map[string]bool)
	for keep := range e.States(storage.ExploreOptions{PerFamily: 2, Samples: -1}) {
		tried[keep.String()] = true
	}
	for _, k := range []string{"", "0-9", "10-19", "0-19"} {
		if !tried[k] {
			t.Errorf("keeping whole calls [%s] is not tried", k)
		}
	}
}

// naive makes the state of a point by replaying the whole record on a byte slice, with none of the Explorer's shortcuts.
func naive(start []byte, log []storage.Op, units []storage.Unit, keep storage.UnitSet, point int) []byte {
	disk, live := bytes.Clone(start), bytes.Clone(start)
	kept := make(map[storage.Unit]bool)
	for i, u := range units {
		kept[u] = keep.Has(i)
	}
	for i, op := range log[:point] {
		whole := isDurable(log[:point], i)
		before := int64(len(live))
		live = apply(live, op)
		switch {
		case op.Kind == storage.OpWrite:
			for s := op.Off &^ (sector - 1); s < op.Off+op.Len; s += sector {
				if whole || kept[storage.Unit{Op: i, Off: s}] {
					end := min(s+sector, int64(len(live)))
					disk = grow(disk, end)
					copy(disk[s:end], live[s:end])
				}
			}
			growth := storage.Unit{Op: i, Off: (op.Off+op.Len-1)&^(sector-1) + sector, Growth: true}
			if int64(len(live)) > before && (whole || kept[growth]) {
				disk = grow(disk, op.Off+op.Len)
			}
		case whole || kept[storage.Unit{Op: i}]:
			disk = apply(disk, op)
		}
	}
	return disk
}

// isDurable reads the contract of Sync literally.
func isDurable(log []storage.Op, i int) bool {
	for q, sync := range log {
		switch {
		case sync.Kind == storage.OpSynced && i < sync.Ref && log[i].Done <= sync.Ref:
			return true
		case sync.Kind == storage.OpSyncFailed && i < q:
			return false
		}
	}
	return false
}

func grow(p []byte, n int64) []byte {
	return append(p, make([]byte, max(n-int64(len(p)), 0))...)
}

func apply(p []byte, op storage.Op) []byte {
	size := int64(len(p))
	switch op.Kind {
	case storage.OpWrite:
		p = grow(p, op.Off+op.Len)
		copy(p[op.Off:], op.Data)
	case storage.OpTruncate:
		p = grow(p[:min(size, op.Off):min(size, op.Off)], op.Off)
	case storage.OpPunch:
		clear(p[min(size, op.Off):min(size, op.Off+op.Len)])
	case storage.OpZero:
		p = grow(p, op.Off+op.Len)
		clear(p[op.Off : op.Off+op.Len])
	case storage.OpPreallocate:
		p = grow(p, op.Off+op.Len)
	}
	return p
}

// Random histories with failing syncs: what the Explorer builds step by step is what a replay from the start builds.
func TestCrashAgainstNaiveReplay(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 5))
		c := newCrash(t, 20)
		start := readAll(t, c)
		for i := range 40 {
			randomCall(t, c, rng, byte(i+1))
		}
		log := c.Log()
		e := c.Explorer()
		o := storage.ExploreOptions{Exhaustive: 3, PerFamily: 4, Samples: 6, Seed: seed, AllPoints: true}
		must(t, e.Explore(o, func(s storage.CrashState) error {
			want := naive(start, log, e.Units(), s.Kept, s.Point)
			if got := readAll(t, s.Image); !bytes.Equal(got, want) {
				return fmt.Errorf("seed %d: %d bytes differ from the replay's %d", seed, len(got), len(want))
			}
			return nil
		}))
		must(t, e.Seek(e.Len()))
		all := storage.NewUnitSet(e.UnitCount())
		all.AddRange(0, e.UnitCount())
		if !bytes.Equal(readAll(t, e.Build(all)), readAll(t, c)) {
			t.Errorf("seed %d: with everything kept, the disk is not what readers saw", seed)
		}
	}
}

func randomCall(t *testing.T, c *storage.CrashFile, rng *rand.Rand, b byte) {
	t.Helper()
	off, n := rng.Int64N(30*sector), 1+rng.Int64N(6*sector)
	if rng.IntN(2) == 0 {
		off, n = off&^(sector-1), (n+sector-1)&^(sector-1)
	}
	switch rng.IntN(12) {
	case 0:
		must(t, c.Truncate(off))
	case 1:
		must(t, c.PunchHole(off, n))
	case 2:
		must(t, c.ZeroRange(off, n))
	case 3:
		must(t, c.Preallocate(off, n))
	case 4, 5:
		must(t, c.Sync())
	case 6:
		if rng.IntN(3) == 0 {
			c.FailNextSync(errTest)
			c.Sync()
		}
	default:
		must(t, second(c.WriteVAt([][]byte{bytes.Repeat([]byte{b}, int(n))}, off)))
	}
}

// Many goroutines: the record is consistent with what they saw, and every acknowledged sync holds.
func TestCrashConcurrent(t *testing.T) {
	c := newCrash(t, 64)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 25 {
				at := int64(w*16 + i%16)
				c.WriteAt(fill(byte(i+1), 1), at*sector)
				if i%5 == 4 {
					c.Sync()
					c.Mark([2]int64{at, int64(i + 1)})
				}
			}
		})
	}
	wg.Wait()
	e := c.Explorer()
	o := storage.ExploreOptions{Exhaustive: 4, PerFamily: 4, Samples: 4}
	must(t, e.Explore(o, func(s storage.CrashState) error {
		for _, m := range s.Marks {
			mark := m.([2]int64)
			var p [1]byte
			s.Image.ReadAt(p[:], mark[0]*sector)
			if int64(p[0]) < mark[1] || p[0] == 'o' {
				return fmt.Errorf("sector %d has %d after %d was acknowledged", mark[0], p[0], mark[1])
			}
		}
		return nil
	}))
}

func BenchmarkCrashStates(b *testing.B) {
	base := storage.NewMemFile("mem")
	base.WriteAt(make([]byte, 4<<20), 0)
	c := storage.NewCrashFile(base)
	for i := range 12 {
		c.WriteAt(fill(byte(i), 1), int64(i)*300000)
	}
	e := c.Explorer()
	e.Seek(e.Len())
	keep := storage.NewUnitSet(e.UnitCount())
	keep.AddRange(0, 6)
	b.ReportAllocs()
	for b.Loop() {
		e.Build(keep)
	}
}
