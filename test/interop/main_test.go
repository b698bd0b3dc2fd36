// Package interop compares drover with stock QEMU over a grid of image layouts: what QEMU made drover reads, what drover
// made QEMU reads, and both describe, map, check and lock an image alike.
package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

func TestMain(m *testing.M) { harness.Main(m) }

// layout is one point of the grid.
type layout struct {
	cluster  int
	refcount int
	compat   string
	backing  backing
	extra    string // further -o options
}

// backing says what lies below the image.
type backing struct {
	format string // "" for none
	name   string
	scale  float64 // the base's size over the image's
}

var (
	noBacking    = backing{name: "alone"}
	qcow2Shorter = backing{"qcow2", "on-shorter-qcow2", 0.6}
	qcow2Longer  = backing{"qcow2", "on-longer-qcow2", 1.3}
	rawShorter   = backing{"raw", "on-shorter-raw", 0.6}
	rawLonger    = backing{"raw", "on-longer-raw", 1.3}

	backings = []backing{noBacking, qcow2Shorter, qcow2Longer, rawShorter, rawLonger}
)

func (l layout) String() string {
	s := fmt.Sprintf("cluster=%d,refcount=%d,compat=%s,%s", l.cluster, l.refcount, l.compat, l.backing.name)
	if l.extra != "" {
		s += "," + l.extra
	}
	return s
}

// seed tells the layouts' operations apart; it depends on the layout only.
func (l layout) seed() uint64 {
	var h uint64 = 14695981039346656037
	for _, b := range []byte(l.String()) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h
}

func (l layout) options() string {
	s := fmt.Sprintf("cluster_size=%d,refcount_bits=%d,compat=%s", l.cluster, l.refcount, l.compat)
	if l.extra != "" {
		s += "," + l.extra
	}
	return s
}

// size is the disk's: a few dozen clusters with a ragged end, and never so small that nothing repeats.
func (l layout) size() int64 {
	size := int64(l.cluster) * 160
	size = min(max(size, 1<<20), 24<<20)
	return size + 3*512
}

func (l layout) shape() harness.Shape {
	return harness.Shape{Size: l.size(), Cluster: l.cluster, MaxLen: 4 << 20}
}

// grid is every main cluster size with every kind of backing and a changing refcount width, and samples of the rest.
func grid() []layout {
	var all []layout
	widths := []int{16, 1, 64, 8, 2, 32, 4}
	next := 0
	for _, cluster := range []int{512, 4096, 65536, 2 << 20} {
		for _, b := range backings {
			all = append(all, layout{cluster, widths[next%len(widths)], "1.1", b, ""})
			next++
		}
		all = append(all,
			layout{cluster, 16, "0.10", noBacking, ""},
			layout{cluster, 16, "0.10", qcow2Shorter, ""},
			layout{cluster, 16, "0.10", rawLonger, ""},
			layout{cluster, 16, "1.1", noBacking, "lazy_refcounts=on"},
			layout{cluster, 16, "1.1", noBacking, "preallocation=metadata"},
		)
	}
	for _, cluster := range []int{1024, 2048, 8192, 16384, 32768, 131072, 262144, 524288, 1 << 20} {
		all = append(all, layout{cluster, widths[next%len(widths)], "1.1", backings[next%len(backings)], ""})
		next++
	}
	for i, cluster := range []int{16384, 65536, 2 << 20} {
		for _, b := range []backing{noBacking, backings[1+i], backings[1+(i+2)%4]} {
			all = append(all, layout{cluster, 16, "1.1", b, "extended_l2=on"})
		}
	}
	return all
}

// eachLayout runs a subtest for every layout of the grid (every fourth with -short).
func eachLayout(t *testing.T, f func(t *testing.T, l layout)) {
	t.Helper()
	peer.Need(t, "qemu-img", "qemu-io", "nbdcopy")
	for i, l := range grid() {
		if testing.Short() && i%4 != 0 {
			continue
		}
		t.Run(l.String(), func(t *testing.T) {
			t.Parallel()
			f(t, l)
		})
	}
}

// base makes the backing file of a layout. It returns the flags for create and what the image reads as before any write.
func (l layout) base(t *testing.T, dir string) (flags []string, content []byte) {
	t.Helper()
	if l.backing.format == "" {
		return nil, nil
	}
	size := int64(float64(l.size())*l.backing.scale) / 512 * 512
	content = make([]byte, size)
	// A third of the base is data, in runs that do not agree with the clusters above it.
	for off, i := int64(0), uint64(0); off < size; off, i = off+30_000, i+1 {
		if i%3 == 0 {
			harness.Fill(content[off:min(off+30_000, size)], l.seed()+i)
		}
	}
	raw := filepath.Join(dir, "base.raw")
	harness.OK(t, os.WriteFile(raw, content, 0o644))
	path := raw
	if l.backing.format == "qcow2" {
		path = filepath.Join(dir, "base.qcow2")
		harness.Must(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
		harness.OK(t, os.Remove(raw))
	}
	return []string{"-b", filepath.Base(path), "-F", l.backing.format}, content
}

// createArgs is the command line of create, the same for qemu-img and drover.
func (l layout) createArgs(image string, backingFlags []string) []string {
	args := []string{"create", "-q", "-f", "qcow2", "-o", l.options()}
	args = append(args, backingFlags...)
	return append(args, image, fmt.Sprint(l.size()))
}
