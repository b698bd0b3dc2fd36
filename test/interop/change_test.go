package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/test/harness"
)

// changes are the arguments that resize and amend an image of a layout in ways that both tools offer, with the size of the
// disk after each.
type change struct {
	args []string
	size int64
}

func (l layout) changes(ours bool) []change {
	size := l.size()
	larger, smaller := size+3*int64(l.cluster)+1536, size/2/512*512
	v3 := l.compat == "1.1"
	var list []change
	if ours || v3 || l.backing.format == "" { // stock cannot hide a longer backing file in version 2
		list = append(list, change{[]string{"resize", fmt.Sprint(larger)}, larger})
	} else {
		larger = size
	}
	width := l.refcount
	if v3 && (ours || l.cluster <= 65536) { // where a refcount block has millions of counts, stock takes minutes
		for _, bits := range []int{64, 16} {
			list = append(list, change{[]string{"amend", "-o", fmt.Sprintf("refcount_bits=%d", bits)}, larger})
			width = bits
		}
	}
	if width == 16 && !strings.Contains(l.extra, "extended_l2") {
		list = append(list, change{[]string{"amend", "-o", "compat=0.10"}, larger}, change{[]string{"amend", "-o", "compat=1.1"}, larger})
	}
	return append(list,
		change{[]string{"amend", "-o", "compat=1.1,lazy_refcounts=on"}, larger},
		change{[]string{"resize", "--shrink", fmt.Sprint(smaller)}, smaller})
}

// apply makes a change with a tool and compares the disk with what it has to be.
func (c change) apply(t *testing.T, image string, model harness.Model, tool func(args ...string)) harness.Model {
	t.Helper()
	args := append([]string{c.args[0], "-q", "-f", "qcow2"}, c.args[1:]...)
	if c.args[0] == "resize" { // the size comes last
		args = append(args[:len(args)-1:len(args)-1], image, args[len(args)-1])
	} else {
		args = append(args, image)
	}
	tool(args...)
	if int64(len(model)) < c.size {
		model = append(model, make([]byte, c.size-int64(len(model)))...)
	}
	model = model[:c.size]
	mustHold(t, image, model)
	return model
}

// TestChangesWhatQEMUWrote resizes and amends images of QEMU's with drover.
func TestChangesWhatQEMUWrote(t *testing.T) {
	eachLayout(t, func(t *testing.T, l layout) {
		dir := t.TempDir()
		image := filepath.Join(dir, "image.qcow2")
		flags, _ := l.base(t, dir)
		harness.Must(t, "qemu-img", l.createArgs(image, flags)...)
		qemuIO(t, image, harness.Ops(l.seed(), 40, l.shape()))
		model := harness.Model(harness.Raw(t, image, "qcow2"))
		for _, c := range l.changes(true) {
			model = c.apply(t, image, model, func(args ...string) { harness.MustDrover(t, args...) })
		}
		agree(t, image)
	})
}

// TestQEMUChangesWhatDroverWrote resizes and amends images of drover's with QEMU.
func TestQEMUChangesWhatDroverWrote(t *testing.T) {
	eachLayout(t, func(t *testing.T, l layout) {
		dir := t.TempDir()
		image := filepath.Join(dir, "image.qcow2")
		flags, below := l.base(t, dir)
		harness.MustDrover(t, l.createArgs(image, flags)...)
		model := harness.NewModel(l.size(), below)
		srv := harness.Start(t, harness.Serve{Image: image})
		client := srv.Dial(t)
		for _, op := range harness.Ops(l.seed(), 40, l.shape()) {
			model.Apply(t, client, op)
		}
		harness.OK(t, client.Close())
		srv.Stop()
		for _, c := range l.changes(false) {
			model = c.apply(t, image, model, func(args ...string) { harness.Must(t, "qemu-img", args...) })
		}
		agree(t, image)
	})
}

// TestDowngradeKeepsSnapshots: stock qemu-img 7.2 writes zeroes over the data of a snapshot when it makes version 2 of an image
// in which a cluster was zeroed after the snapshot was taken. drover does not.
func TestDowngradeKeepsSnapshots(t *testing.T) {
	dir := t.TempDir()
	image, base := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "base.raw")
	harness.OK(t, os.WriteFile(base, make([]byte, 1<<20), 0o644))
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image, "1M")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 128k", image)
	harness.Must(t, "qemu-img", "snapshot", "-c", "s", image)
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -z 0 64k", image)
	harness.MustDrover(t, "amend", "-o", "compat=0.10", image)
	harness.Must(t, "qemu-img", "check", "-q", image)
	harness.Must(t, "qemu-img", "snapshot", "-a", "s", image)
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "read -q -P 5 0 128k", image)
}

// TestShrinkForgets: after stock qemu-img has made a disk smaller and larger again, old data shows in the cluster that the
// disk had ended in. After drover has done either, it does not.
func TestShrinkForgets(t *testing.T) {
	dir := t.TempDir()
	for i, tools := range [][2]string{{"drover", "drover"}, {"drover", "qemu-img"}, {"qemu-img", "drover"}} {
		image := filepath.Join(dir, fmt.Sprint(i, ".qcow2"))
		harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 1M", image)
		for k, args := range [][]string{{"resize", "-q", "-f", "qcow2", "--shrink", image, "100k"}, {"resize", "-q", "-f", "qcow2", image, "1M"}} {
			if tools[k] == "drover" {
				harness.MustDrover(t, args...)
			} else {
				harness.Must(t, tools[k], args...)
			}
		}
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "read -q -P 9 0 100k", "-c", "read -q -P 0 100k 924k", image)
		harness.Must(t, "qemu-img", "check", "-q", image)
	}
}
