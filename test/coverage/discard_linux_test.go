package main

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// blocks is the host space of a file, in bytes.
func blocks(t testing.TB, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	harness.OK(t, err)
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

// TestPassDiscard: why a cluster became free decides whether the host gets its space back; the three switches each by
// themselves.
func TestPassDiscard(t *testing.T) {
	peer.Need(t, "qemu-img")
	const n = 4 << 20
	noise := make([]byte, n)
	harness.Fill(noise, 7)
	for _, c := range []struct {
		name string
		set  func(*qcow2.Options, qcow2.Switch)
		free func(*qcow2.Image) error
	}{
		{"request", func(o *qcow2.Options, s qcow2.Switch) { o.PassDiscardRequest = s }, func(im *qcow2.Image) error {
			return im.Discard(ctx, 0, n)
		}},
		{"snapshot", func(o *qcow2.Options, s qcow2.Switch) { o.PassDiscardSnapshot = s }, func(im *qcow2.Image) error {
			return im.DeleteSnapshot(ctx, "one")
		}},
		{"other", func(o *qcow2.Options, s qcow2.Switch) { o.PassDiscardOther = s }, func(im *qcow2.Image) error {
			return im.WriteCompressed(ctx, bytes.Repeat([]byte("again and again "), n/16), 0)
		}},
	} {
		var space [2]int64
		for i, on := range []qcow2.Switch{qcow2.SwitchOff, qcow2.SwitchOn} {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			create(t, path, qcow2.CreateOptions{Size: 2 * n})
			o := qcow2.Options{PassDiscardRequest: qcow2.SwitchOff, PassDiscardSnapshot: qcow2.SwitchOff, PassDiscardOther: qcow2.SwitchOff}
			c.set(&o, on)
			im := open(t, path, o)
			harness.OK(t, im.WriteAt(ctx, noise, 0, 0))
			if c.name == "snapshot" {
				_, err := im.CreateSnapshot(ctx, "one")
				harness.OK(t, err)
				harness.OK(t, im.WriteAt(ctx, noise, 0, 0))
			}
			harness.OK(t, im.WriteAt(ctx, noise[:64<<10], n, 0)) // what lies behind keeps the file from being cut
			harness.OK(t, im.Flush(ctx))
			if err := c.free(im); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			harness.OK(t, im.Close())
			space[i] = blocks(t, path)
			sound(t, path)
		}
		if space[0]-space[1] < n*3/4 {
			t.Errorf("%s: %d KiB with the switch off, %d KiB with it on: the host got nothing back", c.name, space[0]>>10, space[1]>>10)
		}
	}
}
