package bitmap

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// model is a bitmap as a slice of booleans.
type model struct {
	bits []bool
	size int64
	gran int64
}

func (m *model) mark(off, n int64) {
	for g := range m.bits {
		lo, hi := int64(g)*m.gran, min(int64(g+1)*m.gran, m.size)
		m.bits[g] = m.bits[g] || lo < off+n && off < hi && n > 0
	}
}

func (m *model) bytes() []byte {
	b := make([]byte, (len(m.bits)+7)/8)
	for i, set := range m.bits {
		if set {
			b[i/8] |= 1 << (i % 8)
		}
	}
	return b
}

func serialise(b *Bitmap) []byte {
	p := make([]byte, b.Bytes())
	b.OrInto(p, 0)
	return p
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		granBits := rapid.Uint8Range(9, 12).Draw(t, "granularity")
		granules := rapid.Int64Range(1, 3*pageBits).Draw(t, "granules")
		size := granules<<granBits - 512*rapid.Int64Range(0, 1<<(granBits-9)-1).Draw(t, "short")
		b := New(size, granBits)
		m := &model{make([]bool, granules), size, 1 << granBits}
		if b.Bits() != granules {
			t.Fatalf("%d bits, want %d", b.Bits(), granules)
		}
		for range rapid.IntRange(0, 6).Draw(t, "marks") {
			off := rapid.Int64Range(0, size-1).Draw(t, "off")
			n := rapid.Int64Range(0, size-off).Draw(t, "n")
			b.Mark(off, n)
			m.mark(off, n)
		}
		check(t, b, m)

		again := New(size, granBits)
		chunk := 8 * rapid.Int64Range(1, 2*PageBytes/8).Draw(t, "chunk")
		raw := serialise(b)
		for at := int64(0); at < int64(len(raw)); at += chunk {
			part := raw[at:min(at+chunk, int64(len(raw)))]
			again.Load(part, at)
			dst := make([]byte, chunk+8) // longer than what is left, and full of rubbish there
			copy(dst[len(part):], bytes.Repeat([]byte{0xff}, len(dst)))
			if at+chunk >= int64(len(raw)) {
				if b.OrInto(dst, at); !bytes.Equal(dst[:len(part)], part) || !zero(dst[len(part):]) {
					t.Fatalf("the end of the bitmap serialises to %x", dst)
				}
			}
		}
		check(t, again, m)
	})
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// check compares a bitmap with its model in every way of looking at it.
func check(t *rapid.T, b *Bitmap, m *model) {
	t.Helper()
	if got := serialise(b); !bytes.Equal(got, m.bytes()) {
		t.Fatal("the serialised bitmap differs")
	}
	var count, at int64
	last := -1
	b.Runs(0, b.Bits(), func(first, n int64, marked bool) bool {
		if first != at || n <= 0 {
			t.Fatalf("run %d+%d after %d", first, n, at)
		}
		for g := first; g < first+n; g++ {
			if m.bits[g] != marked {
				t.Fatalf("granule %d: %v", g, marked)
			}
		}
		state := 0
		if marked {
			count, state = count+n, 1
		}
		if state == last {
			t.Fatal("two runs of one state in a row")
		}
		last, at = state, first+n
		return true
	})
	if at != b.Bits() {
		t.Fatalf("runs end at %d of %d", at, b.Bits())
	}
	if b.Count() != count || b.Empty() != (count == 0) {
		t.Fatalf("Count %d, Empty %v; %d are marked", b.Count(), b.Empty(), count)
	}
	from := rapid.Int64Range(0, b.Bytes()-1).Draw(t, "from")
	n := rapid.Int64Range(1, b.Bytes()-from).Draw(t, "len")
	some, all := b.Touched(from, n)
	wantSome, wantAll := false, true
	for g := from * 8; g < min((from+n)*8, b.Bits()); g++ {
		wantSome, wantAll = wantSome || m.bits[g], wantAll && m.bits[g]
	}
	if some != wantSome || all != wantAll {
		t.Fatalf("Touched(%d, %d) = %v, %v", from, n, some, all)
	}
	next := from
	for raw := m.bytes(); next < b.Bytes() && raw[next] == 0; next++ {
	}
	if got := b.NextTouched(from); got != next {
		t.Fatalf("NextTouched(%d) = %d, want %d", from, got, next)
	}
}

func TestMerge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := 512 * rapid.Int64Range(1, 4*pageBits).Draw(t, "sectors")
		from := New(size, rapid.Uint8Range(9, 14).Draw(t, "from"))
		to := New(size, rapid.Uint8Range(9, 14).Draw(t, "to"))
		m := &model{make([]bool, to.Bits()), size, to.Granularity()}
		off := rapid.Int64Range(0, size-1).Draw(t, "own")
		to.Mark(off, 1)
		m.mark(off, 1)
		for range rapid.IntRange(0, 4).Draw(t, "marks") {
			off := rapid.Int64Range(0, size-1).Draw(t, "off")
			n := rapid.Int64Range(1, size-off).Draw(t, "n")
			from.Mark(off, n)
			g := from.Granularity()
			m.mark(off/g*g, min((off+n+g-1)/g*g, size)-off/g*g)
		}
		to.Merge(from)
		check(t, to, m)
	})
}

// TestNothingOfAPage shows what memory is taken for.
func TestNothingOfAPage(t *testing.T) {
	const size = 1 << 40
	b := New(size, 16)
	b.Mark(5<<16, 1)
	b.Mark(1<<39, 1<<38)
	var pages int
	for i := range b.pages {
		if p := b.pages[i].Load(); p != nil && p != allOnes {
			pages++
		}
	}
	if pages != 1 {
		t.Errorf("%d pages are held, want 1", pages)
	}
	if got, want := b.Count(), int64(1+1<<22); got != want {
		t.Errorf("%d granules are marked, want %d", got, want)
	}
	if b.Clear(); !b.Empty() {
		t.Error("not empty after Clear")
	}
	if n := testing.AllocsPerRun(100, func() { b.Mark(7<<16, 4096); b.Mark(7<<16, 3<<20) }); n != 0 {
		t.Errorf("marking what has a page allocates %v times", n)
	}
}

// TestOutside marks what is not on the disk.
func TestOutside(t *testing.T) {
	b := New(1000, 9)
	b.Mark(-100, 50)
	b.Mark(1000, 10)
	b.Mark(5, 0)
	if !b.Empty() {
		t.Error("something is marked")
	}
	if b.Mark(-5, 1<<62); b.Count() != 2 {
		t.Errorf("%d granules are marked, want 2", b.Count())
	}
	e := New(0, 9)
	if e.Mark(0, 1); e.Bits() != 0 || !e.Empty() || e.Bytes() != 0 {
		t.Error("an empty disk has granules")
	}
}

// TestParallel has many mark at once, granules of the same pages and words, and whole pages meanwhile: nothing is lost.
func TestParallel(t *testing.T) {
	for round := range 20 {
		b := New(4*pageBits<<9, 9)
		m := &model{make([]bool, b.Bits()), 4 * pageBits << 9, 512}
		const workers = 8
		var wg sync.WaitGroup
		marks := make([][]int64, workers)
		for w := range workers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(round), uint64(w)))
				for range 300 {
					g := r.Int64N(b.Bits())
					b.Mark(g<<9, 512)
					marks[w] = append(marks[w], g)
				}
				if w == 0 {
					b.Mark(pageBits<<9, pageBits<<9)
				}
			})
		}
		wg.Wait()
		for _, list := range marks {
			for _, g := range list {
				m.bits[g] = true
			}
		}
		for g := pageBits; g < 2*pageBits; g++ {
			m.bits[g] = true
		}
		if !bytes.Equal(serialise(b), m.bytes()) {
			t.Fatal("marks were lost")
		}
	}
}

func BenchmarkMarkAgain(b *testing.B) {
	m := New(1<<40, 16)
	m.Mark(1<<30, 4096)
	for b.Loop() {
		m.Mark(1<<30, 4096)
	}
}
