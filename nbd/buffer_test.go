package nbd

import "testing"

func TestBufferPool(t *testing.T) {
	var p bufferPool
	for _, c := range []struct{ n, size int }{
		{0, 4096}, {1, 4096}, {4096, 4096}, {4097, 8192}, {65536, 65536}, {65537, 131072}, {32 << 20, 32 << 20},
		{32<<20 + 1, 64 << 20}, {maxMaxRequest, maxMaxRequest},
	} {
		if got := bufferSize(c.n); got != int64(c.size) {
			t.Errorf("bufferSize(%d) = %d, want %d", c.n, got, c.size)
		}
		if c.n > 1<<20 {
			continue
		}
		b := p.get(c.n)
		if len(b.b) != c.size {
			t.Errorf("get(%d) has %d bytes, want %d", c.n, len(b.b), c.size)
		}
		p.put(b)
	}
	p.put(nil) // as a request without a payload does
}

// FuzzMerger checks what block status replies promise of any runs that a context reports: at most so many, no two
// neighbours alike, and no more bytes than were asked for.
func FuzzMerger(f *testing.F) {
	f.Add([]byte{1, 0, 1, 0, 5, 1, 200, 2}, uint8(3), uint16(100))
	f.Add([]byte{0, 0, 255, 1, 255, 1, 3, 0}, uint8(1), uint16(9000))
	f.Fuzz(func(t *testing.T, runs []byte, limit uint8, length uint16) {
		type state struct {
			n int64
			s uint32
		}
		var got []state
		m := merger{limit: int(limit) + 1, left: int64(length), emit: func(p []byte, n int64, s uint32) []byte {
			got = append(got, state{n, s})
			return p
		}}
		want := make([]uint32, 0, length)
		for ; len(runs) >= 2; runs = runs[2:] {
			for range int64(int8(runs[0])) {
				want = append(want, uint32(runs[1]))
			}
			if !m.add(int64(int8(runs[0])), uint32(runs[1])) {
				break
			}
		}
		m.flush()
		at := 0
		for i, g := range got {
			if i > 0 && got[i-1].s == g.s {
				t.Fatalf("runs %v: neighbours are alike", got)
			}
			for range g.n {
				if at >= int(length) || want[at] != g.s {
					t.Fatalf("runs %v differ from what was reported at %d", got, at)
				}
				at++
			}
		}
		if len(got) > int(limit)+1 || m.count != len(got) {
			t.Fatalf("%d runs, count %d, limit %d", len(got), m.count, int(limit)+1)
		}
		if len(got) <= int(limit) && at != min(len(want), int(length)) {
			t.Fatalf("runs %v cover %d bytes, want %d", got, at, min(len(want), int(length)))
		}
	})
}
