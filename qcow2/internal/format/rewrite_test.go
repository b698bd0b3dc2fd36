package format

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// tornStates calls visit with what a power cut may leave at each moment of a plan: any subset of the sectors of one step
// over the steps before. Of steps with many sectors it takes the subsets that leave out or keep one sector, or a half.
func tornStates(cur []byte, plan *HeaderPlan, visit func(step int, b []byte)) {
	before := bytes.Clone(cur)
	visit(-1, before)
	for i, w := range plan.Steps {
		after := bytes.Clone(before)
		copy(after[w.Off:], w.Data)
		first, last := int(w.Off)/SectorSize, (int(w.Off)+len(w.Data)-1)/SectorSize
		n := last - first + 1
		for _, keep := range subsets(n) {
			b := bytes.Clone(before)
			for s := range n {
				if keep(s) {
					at := (first + s) * SectorSize
					copy(b[at:min(at+SectorSize, len(b))], after[at:])
				}
			}
			visit(i, b)
		}
		before = after
	}
}

func subsets(n int) []func(int) bool {
	var list []func(int) bool
	if n <= 5 {
		for mask := range 1 << n {
			list = append(list, func(s int) bool { return mask>>s&1 != 0 })
		}
		return list
	}
	for k := range n {
		list = append(list, func(s int) bool { return s == k }, func(s int) bool { return s != k },
			func(s int) bool { return s < k }, func(s int) bool { return s >= k })
	}
	return append(list, func(int) bool { return true })
}

func cluster0(t interface{ Fatal(...any) }, h *Header) []byte {
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return zeroExtend(b, 1<<h.ClusterBits)
}

// withoutNames is what must be old or new at every moment: all but the names of features.
func withoutNames(h *Header) *Header {
	c := *h
	c.FeatureNames = nil
	return &c
}

// checkPlan checks that each moment of a plan has the old or the new header, and the end the new one, byte by byte.
func checkPlan(t interface {
	Fatal(...any)
	Fatalf(string, ...any)
}, cur []byte, next *Header) *HeaderPlan {
	old, err := ParseHeader(cur)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := PlanHeader(cur, next)
	if err != nil {
		t.Fatal(err)
	}
	if !plan.Torn {
		tornStates(cur, plan, func(step int, b []byte) {
			n, err := HeaderArea(b[:SectorSize])
			if err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			h, err := ParseHeader(b[:n])
			if err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			h.StaleBitmaps, old.StaleBitmaps = false, false
			if cmp.Equal(withoutNames(h), withoutNames(old)) || cmp.Equal(withoutNames(h), withoutNames(next)) {
				return
			}
			t.Fatalf("step %d of %d: neither old nor new:\n%s", step, len(plan.Steps), cmp.Diff(withoutNames(next), withoutNames(h)))
		})
	}
	end := bytes.Clone(cur)
	for _, w := range plan.Steps {
		copy(end[w.Off:], w.Data)
	}
	if want := cluster0(t, next); !bytes.Equal(end, want) {
		t.Fatalf("the plan does not end in the new header")
	}
	return plan
}

func TestPlanHeader(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		old := drawHeader(t)
		next := drawHeader(t)
		next.ClusterBits = old.ClusterBits
		switch rapid.IntRange(0, 2).Draw(t, "change") {
		case 0: // names and extensions only
			next = new(*old)
			next.BackingFile = rapid.StringMatching(`[a-z]{0,900}`).Draw(t, "backing")
			next.DataFileName = old.DataFileName
			if old.Version == Version3 {
				next.Bitmaps, next.Autoclear = &BitmapsExt{1, 64, HostOff(9) << old.ClusterBits}, next.Autoclear|AutoclearBitmaps
			}
		case 1: // something large
			next = new(*old)
			data := rapid.SliceOfN(rapid.Byte(), 300, 1500).Draw(t, "blob")
			next.UnknownExtensions = append(append([]Extension(nil), old.UnknownExtensions...), Extension{7, data})
		}
		if rapid.Bool().Draw(t, "the other way") {
			old, next = next, old
		}
		cur, err := old.Marshal()
		if err != nil {
			t.Skip("no room")
		}
		if _, err := next.Marshal(); err != nil {
			t.Skip("no room")
		}
		for _, h := range []*Header{old, next} {
			if _, err := ParseHeader(cluster0(t, h)); err != nil {
				t.Skip("not valid at this cluster size")
			}
		}
		plan := checkPlan(t, zeroExtend(cur, 1<<old.ClusterBits), next)
		if plan.Torn && old.ClusterBits > 13 {
			t.Fatalf("torn in a cluster of 2^%d", old.ClusterBits)
		}
	})
}

// TestPlanHeaderSteps: what is changed often costs one write.
func TestPlanHeaderSteps(t *testing.T) {
	base := validHeader()
	withBitmaps := *base
	withBitmaps.Bitmaps, withBitmaps.Autoclear = &BitmapsExt{1, 64, 0x50000}, AutoclearBitmaps
	moved := withBitmaps
	moved.Bitmaps = &BitmapsExt{1, 64, 0x90000}
	off := withBitmaps
	off.Autoclear = 0
	named := *base
	named.BackingFile, named.BackingFormat, named.HasBackingFormat = strings.Repeat("n", 600), "qcow2", true
	renamed := named
	renamed.BackingFile = strings.Repeat("m", 700)
	for _, c := range []struct {
		name       string
		from, next *Header
		steps      int
	}{
		{"nothing", base, base, 0},
		{"bitmaps added", base, &withBitmaps, 2},
		{"bitmap directory moved", &withBitmaps, &moved, 1},
		{"bitmaps removed", &withBitmaps, base, 2}, // sector 0, then zeroes over the rest
		{"backing file added", base, &named, 2},
		{"backing file renamed", &named, &renamed, 5},
		{"backing file renamed, shorter", &renamed, &named, 5},
		{"backing file removed", &named, base, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan := checkPlan(t, cluster0(t, c.from), c.next)
			if len(plan.Steps) != c.steps || plan.Torn {
				t.Errorf("%d steps, torn %v; want %d", len(plan.Steps), plan.Torn, c.steps)
			}
		})
	}
	t.Run("no room to turn", func(t *testing.T) {
		small := *base
		small.ClusterBits, small.FeatureNames, small.RefTableOffset, small.L1Offset, small.L1Size = 10, nil, 0x400, 0x800, 16384
		small.BackingFile = strings.Repeat("a", 700)
		next := small
		next.BackingFile = strings.Repeat("b", 700)
		if plan := checkPlan(t, cluster0(t, &small), &next); !plan.Torn {
			t.Error("a kilobyte has no room for two names of 700 bytes")
		}
	})
	t.Run("does not fit", func(t *testing.T) {
		small := *base
		small.ClusterBits, small.FeatureNames, small.BackingFile = 9, nil, strings.Repeat("a", 700)
		if _, err := PlanHeader(make([]byte, 512), &small); err != ErrHeaderSpace {
			t.Errorf("got %v", err)
		}
	})
}

// TestStockReadsEveryStep gives each moment of a rewrite to QEMU.
func TestStockReadsEveryStep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "step.qcow2")
	file := create(t, path, "-b", "first.raw", "-F", "raw", "-u", "1G")
	old := parse(t, file)
	next := *old
	next.BackingFile, next.BackingFormat = strings.Repeat("second/", 100), "qcow2"
	next.UnknownExtensions = []Extension{{0x12345678, []byte("kept")}}
	plan := checkPlan(t, zeroExtend(file, 65536)[:65536], &next)
	seen := map[string]bool{}
	tornStates(zeroExtend(file, 65536)[:65536], plan, func(step int, b []byte) {
		copy(file, b)
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		out := mustRun(t, "qemu-img", "info", "-f", "qcow2", path)
		name := ""
		for line := range strings.Lines(out) {
			if rest, ok := strings.CutPrefix(line, "backing file: "); ok {
				name, _, _ = strings.Cut(strings.TrimSpace(rest), " (")
			}
			if rest, ok := strings.CutPrefix(line, "backing file format: "); ok {
				name += " " + strings.TrimSpace(rest)
			}
		}
		if name != "first.raw raw" && name != next.BackingFile+" qcow2" {
			t.Fatalf("step %d: backing file %q", step, name)
		}
		seen[fmt.Sprint(step, name == "first.raw raw")] = true
	})
	if !seen["0 true"] || !seen["4 false"] {
		t.Errorf("states seen: %v", seen)
	}
}
