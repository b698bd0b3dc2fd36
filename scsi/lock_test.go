package scsi

import "testing"

// TestTryShare: a writer has its one or two regions at once, unless somebody has one of them alone, and leaves nothing locked.
func TestTryShare(t *testing.T) {
	const mib = 1 << 20
	var l regionLocks
	for _, c := range []struct {
		off, n  int64
		regions []int // empty: too many
	}{
		{0, 4096, []int{0}},
		{mib - 4096, 4096, []int{0}},
		{mib - 4096, 8192, []int{0, 1}},
		{63 * mib, mib + 1, []int{63, 0}},
		{5*mib + 1, mib, []int{5, 6}},
		{mib - 1, mib + 2, nil},
		{mib, 0, []int{1}},
	} {
		held, ok := l.tryShare(c.off, c.n)
		if ok != (len(c.regions) > 0) {
			t.Fatalf("%d bytes at %d: %v", c.n, c.off, ok)
		}
		for i := range l {
			free := l[i].TryLock()
			if free {
				l[i].Unlock()
			}
			want := true
			for _, r := range c.regions {
				want = want && r != i
			}
			if free != want {
				t.Errorf("%d bytes at %d: region %d is free: %v", c.n, c.off, i, free)
			}
		}
		held.unlock()
		for _, r := range c.regions {
			if !l[r].TryLock() {
				t.Fatalf("%d bytes at %d: region %d stays locked", c.n, c.off, r)
			}
			if _, ok := l.tryShare(c.off, c.n); ok {
				t.Errorf("%d bytes at %d: let in beside one who has region %d alone", c.n, c.off, r)
			}
			l[r].Unlock()
		}
		if held, ok := l.tryShare(c.off, c.n); ok {
			held.unlock()
		} else if len(c.regions) > 0 {
			t.Errorf("%d bytes at %d: not let in after a try that failed", c.n, c.off)
		}
	}
}
