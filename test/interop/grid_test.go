package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/test/harness"
)

// TestReadsWhatQEMUWrote writes images with qemu-io and reads them with drover.
func TestReadsWhatQEMUWrote(t *testing.T) {
	eachLayout(t, func(t *testing.T, l layout) {
		dir := t.TempDir()
		image := filepath.Join(dir, "image.qcow2")
		flags, _ := l.base(t, dir)
		harness.Must(t, "qemu-img", l.createArgs(image, flags)...)
		qemuIO(t, image, harness.Ops(l.seed(), 60, l.shape()))
		agree(t, image)
	})
}

// TestQEMUReadsWhatDroverWrote creates images with drover, writes them through drover serve, and reads them with QEMU.
func TestQEMUReadsWhatDroverWrote(t *testing.T) {
	eachLayout(t, func(t *testing.T, l layout) {
		dir := t.TempDir()
		image := filepath.Join(dir, "image.qcow2")
		flags, below := l.base(t, dir)
		harness.MustDrover(t, l.createArgs(image, flags)...)
		model := harness.NewModel(l.size(), below)

		// Two servings: the second one begins with tables that it has not made itself.
		for round := range uint64(2) {
			srv := harness.Start(t, harness.Serve{Image: image})
			client := srv.Dial(t)
			if client.Size != l.size() {
				t.Fatalf("the export has %d bytes, the image %d", client.Size, l.size())
			}
			for _, op := range harness.Ops(l.seed()+round, 60, l.shape()) {
				model.Apply(t, client, op)
			}
			harness.OK(t, client.Flush())
			harness.OK(t, client.Close())
			srv.Stop()
			mustHold(t, image, model)
		}
		agree(t, image)
	})
}

// TestTakesTurnsWithQEMU lets drover and QEMU write one image by turns: each has to go on from what the other left.
func TestTakesTurnsWithQEMU(t *testing.T) {
	eachLayout(t, func(t *testing.T, l layout) {
		dir := t.TempDir()
		image := filepath.Join(dir, "image.qcow2")
		flags, _ := l.base(t, dir)
		harness.Must(t, "qemu-img", l.createArgs(image, flags)...)
		for turn := range uint64(3) {
			qemuIO(t, image, harness.Ops(l.seed()+2*turn, 20, l.shape()))
			model := harness.Model(harness.Raw(t, image, "qcow2"))

			srv := harness.Start(t, harness.Serve{Image: image})
			client := srv.Dial(t)
			for _, op := range harness.Ops(l.seed()+2*turn+1, 20, l.shape()) {
				model.Apply(t, client, op)
			}
			harness.OK(t, client.Close())
			srv.Stop()
			mustHold(t, image, model)
		}
	})
}

// qemuIO applies operations to an image with stock QEMU.
func qemuIO(t *testing.T, image string, ops []harness.Op) {
	t.Helper()
	args := []string{"-f", "qcow2", "-d", "unmap", image}
	for _, op := range ops {
		args = append(args, "-c", qemuCommand(op))
	}
	harness.Must(t, "qemu-io", args...)
}

func qemuCommand(op harness.Op) string {
	pattern := 1 + op.Seed%255
	switch op.Kind {
	case harness.Write:
		return fmt.Sprintf("write -q -P %d %d %d", pattern, op.Off, op.Len)
	case harness.WriteFUA:
		return fmt.Sprintf("write -q -f -P %d %d %d", pattern, op.Off, op.Len)
	case harness.Zero:
		return fmt.Sprintf("write -q -z -u %d %d", op.Off, op.Len)
	case harness.ZeroNoHole:
		return fmt.Sprintf("write -q -z %d %d", op.Off, op.Len)
	case harness.Trim:
		return fmt.Sprintf("discard -q %d %d", op.Off, op.Len)
	case harness.ReadBack:
		return fmt.Sprintf("read -q %d %d", op.Off, op.Len)
	default:
		return "flush"
	}
}

// mustHold demands of stock QEMU that the image is sound and holds the model.
func mustHold(t *testing.T, image string, model harness.Model) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "model.raw")
	model.Save(t, raw)
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", image)
	harness.Must(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
	harness.OK(t, os.Remove(raw))
}

// agree demands that drover and QEMU see the same bytes, map, check report and description of an image.
func agree(t *testing.T, image string) {
	t.Helper()
	srv := harness.Start(t, harness.Serve{Image: image, ReadOnly: true})
	got := harness.Copy(t, srv.URI())
	srv.Stop()
	if err := harness.Same(got, harness.Raw(t, image, "qcow2"), 0); err != nil {
		t.Errorf("drover reads other bytes than QEMU: %v", err)
	}
	harness.SameMap(t, image)
	harness.SameCheck(t, image)
	harness.SameInfo(t, image)
}
