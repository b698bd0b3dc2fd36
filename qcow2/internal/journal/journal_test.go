package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var id = Identity{1, 2, 3}

func start(t *testing.T, records int) (*Journal, []byte) {
	t.Helper()
	mem := make([]byte, Size(records))
	j, err := Start(mem, id, 77)
	if err != nil {
		t.Fatal(err)
	}
	return j, mem
}

func record(n uint64) Record { return Record{Cluster: n, N: 1, Step: 512, Word: n << 9, Bitmap: n} }

// clusters returns what the records in mem are about, in order.
func clusters(t *testing.T, mem []byte) []uint64 {
	t.Helper()
	f, err := Read(mem, id)
	if err != nil {
		t.Fatal(err)
	}
	var list []uint64
	for _, r := range f.Records {
		if r != record(r.Cluster) {
			t.Fatalf("record %+v", r)
		}
		list = append(list, r.Cluster)
	}
	return list
}

func expect(t *testing.T, mem []byte, want ...uint64) {
	t.Helper()
	if d := cmp.Diff(want, clusters(t, mem)); d != "" {
		t.Fatal(d)
	}
}

func TestHalves(t *testing.T) {
	j, mem := start(t, 3)
	expect(t, mem)
	j.Append(record(1))
	j.Append(record(2))
	expect(t, mem, 1, 2)
	j.Cut(func() {})
	j.Append(record(3))
	expect(t, mem, 1, 2, 3)
	j.Done()
	expect(t, mem, 3)
	j.Cut(func() {})
	j.Append(record(4))
	expect(t, mem, 3, 4)
	j.Done()
	expect(t, mem, 4)
	for range 2 {
		j.Cut(func() {})
		j.Done()
	}
	expect(t, mem)
	j.Append(record(5))
	expect(t, mem, 5)
	if j.Outstanding() {
		t.Error("everything is recorded, and something is outstanding")
	}
}

// TestFailedFlush: both halves are kept until a flush succeeds, and what comes meanwhile is outstanding.
func TestFailedFlush(t *testing.T) {
	j, mem := start(t, 3)
	j.Append(record(1))
	j.Cut(func() {})
	j.Append(record(2))
	j.Failed()
	j.Append(record(3))
	if !j.Outstanding() {
		t.Error("what cannot be recorded is not outstanding")
	}
	expect(t, mem, 1, 2)
	j.Cut(func() {})
	j.Append(record(4)) // after the cut
	j.Done()
	expect(t, mem)
	if !j.Outstanding() {
		t.Error("a flush covered what came after it was cut")
	}
	j.Append(record(5))
	expect(t, mem, 5)
	j.Cut(func() {})
	j.Done()
	if j.Outstanding() {
		t.Error("something is outstanding after a flush")
	}
	expect(t, mem)
}

func TestFull(t *testing.T) {
	j, mem := start(t, 2)
	for i := range uint64(2) {
		j.Append(record(i + 1))
	}
	select {
	case <-j.Wake():
	default:
		t.Error("nobody was woken")
	}
	if j.Outstanding() {
		t.Error("outstanding before it is full")
	}
	j.Append(record(3))
	if !j.Outstanding() {
		t.Error("what does not fit is not outstanding")
	}
	expect(t, mem, 1, 2)
	j.Cut(func() {})
	j.Done()
	if j.Outstanding() {
		t.Error("outstanding after a flush")
	}
	none := None()
	none.Append(record(1))
	if !none.Outstanding() {
		t.Error("without memory nothing is outstanding")
	}
	none.Cut(func() {})
	none.Miss()
	none.Done()
	if !none.Outstanding() {
		t.Error("a flush covered what came after it was cut")
	}
}

func TestHold(t *testing.T) {
	j, mem := start(t, 4)
	j.Hold()
	j.Append(record(1))
	j.Miss()
	if j.Outstanding() {
		t.Error("outstanding while somebody else sees to it")
	}
	j.Resume(true)
	j.Append(record(2))
	expect(t, mem, 2)
	j.Resume(false)
	j.Append(record(3))
	expect(t, mem, 2)
	if !j.Outstanding() {
		t.Error("not outstanding")
	}
	j.Detach()
	j.Append(record(4))
	j.Cut(func() {})
	j.Done()
	expect(t, mem, 2)
}

// TestTorn kills the process at every byte of a record.
func TestTorn(t *testing.T) {
	j, mem := start(t, 4)
	for i := range uint64(3) {
		j.Append(record(i + 1))
	}
	for range 2 { // leaves old records behind
		j.Cut(func() {})
		j.Done()
	}
	j.Append(record(7))
	before := j.Snapshot()
	j.Append(record(8))
	at := headerSize + recordSize
	for n := range recordSize {
		torn := append([]byte(nil), before...)
		copy(torn[at+recIndex:at+recordSize], mem[at+recIndex:][:n]) // the checksum comes last, and was cleared first
		clear(torn[at : at+recIndex])
		expect(t, torn, 7)
		late := append([]byte(nil), mem...)
		late[at+n] ^= 0x40
		expect(t, late, 7)
	}
	expect(t, mem, 7, 8)
}

func TestRefuses(t *testing.T) {
	j, mem := start(t, 4)
	for i := range uint64(3) {
		j.Append(record(i + 1))
	}
	change := func(off int) []byte {
		m := append([]byte(nil), mem...)
		m[off] ^= 1
		return m
	}
	if _, err := Read(mem, Identity{9}); !errors.Is(err, ErrForeign) {
		t.Errorf("another identity: %v", err)
	}
	for _, off := range []int{offVersion, offCapacity, offNonce, offSum, offIdentity, headerSize + recordSize + recWord} {
		if _, err := Read(change(off), id); !errors.Is(err, ErrDamaged) {
			t.Errorf("bit at %d: %v", off, err)
		}
	}
	if f, err := Read(change(offMagic), id); err != nil || f.Nonce != 0 || f.Records != nil {
		t.Errorf("without the mark of a journal: %+v, %v", f, err)
	}
	large := append([]byte(nil), mem...)
	binary.NativeEndian.PutUint32(large[offCapacity:], 1<<31)
	binary.NativeEndian.PutUint32(large[offSum:], headerSum(large))
	if _, err := Read(large, id); !errors.Is(err, ErrDamaged) {
		t.Errorf("more records than memory: %v", err)
	}
	if _, err := Read(make([]byte, 100), id); err == nil {
		t.Error("100 bytes are taken for a journal")
	}
	if _, err := Start(make([]byte, 100), id, 1); err == nil {
		t.Error("a journal in 100 bytes")
	}
	Clear(mem)
	expect(t, mem)
}

// TestEveryMoment compares a journal that is used at random with a list, after every step.
func TestEveryMoment(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		j, mem := start(t, 1+r.IntN(6))
		var halves [2][]uint64 // older, younger
		cutting, stuck := false, false
		next := uint64(0)
		for step := range 60 {
			switch k := r.IntN(8); {
			case k < 4:
				next++
				full := stuck || len(halves[1]) == j.capacity
				missed := j.unrecorded.Load()
				j.Append(record(next))
				if (j.unrecorded.Load() != missed) != full {
					t.Fatalf("seed %d, step %d: recorded: %v", seed, step, !full)
				}
				if !full {
					halves[1] = append(halves[1], next)
				}
			case k < 6 && !cutting:
				j.Cut(func() {})
				cutting = true
				if !stuck {
					halves[0], halves[1] = halves[1], nil
				}
			case k == 6 && cutting:
				j.Done()
				cutting = false
				halves[0] = nil
				if stuck {
					halves[1] = nil
				}
				stuck = false
			case k == 7 && cutting && r.IntN(2) == 0:
				j.Failed()
				cutting, stuck = false, true
			}
			want := append(append([]uint64(nil), halves[0]...), halves[1]...)
			if d := cmp.Diff(want, clusters(t, mem)); d != "" {
				t.Fatalf("seed %d, step %d: %s", seed, step, d)
			}
		}
	}
}

// TestParallel has many append while flushes come and go.
func TestParallel(t *testing.T) {
	j, _ := start(t, 64)
	var wg sync.WaitGroup
	for w := range uint64(4) {
		wg.Go(func() {
			for i := range uint64(500) {
				j.Append(record(w<<32 | i))
				if i%7 == 0 {
					j.Outstanding()
				}
			}
		})
	}
	for range 100 {
		j.Cut(func() {})
		if _, err := Read(j.Snapshot(), id); err != nil {
			t.Fatal(err)
		}
		j.Done()
	}
	wg.Wait()
	j.Cut(func() {})
	j.Done()
	if j.Outstanding() {
		t.Error("outstanding after the last flush")
	}
}

func BenchmarkAppend(b *testing.B) {
	mem := make([]byte, Size(1<<14))
	j, err := Start(mem, id, 1)
	if err != nil {
		b.Fatal(err)
	}
	for i := range b.N {
		j.Append(record(uint64(i)))
		if i%(1<<14) == 0 {
			j.Cut(func() {})
			j.Done()
		}
	}
}

func FuzzRead(f *testing.F) {
	mem := make([]byte, Size(3))
	j, err := Start(mem, id, 5)
	if err != nil {
		f.Fatal(err)
	}
	j.Append(record(4))
	f.Add(mem[:offIdentity], uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, head []byte, eraA, eraB uint64) {
		m := make([]byte, len(mem))
		copy(m, mem)
		copy(m, head)
		eraOf(m, 0).Store(eraA)
		eraOf(m, 1).Store(eraB)
		found, err := Read(m, id)
		if err == nil && len(found.Records) > 6 {
			t.Fatal(fmt.Sprint(found))
		}
	})
}
