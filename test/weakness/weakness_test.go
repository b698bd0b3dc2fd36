// Package weakness holds drover to what stock QEMU 7.2 does wrong. Each test does the same to two copies of an image, with
// drover and with qemu-img; what qemu-img makes of it is logged, and only drover can fail.
package weakness

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

func TestMain(m *testing.M) { harness.Main(m) }

// twice makes an image and returns it and a copy: the first is drover's, the second qemu-img's.
func twice(t *testing.T, options, size string, steps func(path string)) (ours, theirs string) {
	t.Helper()
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	ours, theirs = filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, ours, size)
	steps(ours)
	b, err := os.ReadFile(ours)
	harness.OK(t, err)
	harness.OK(t, os.WriteFile(theirs, b, 0o600))
	return ours, theirs
}

func io(t *testing.T, path string, commands ...string) harness.Result {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return harness.Run(t, "qemu-io", append(args, path)...)
}

// incompat is the low byte of the incompatible features.
func incompat(t *testing.T, path string) byte {
	t.Helper()
	b, err := os.ReadFile(path)
	harness.OK(t, err)
	return b[79]
}

// TestLeaksOfDirtyImage: repairing only the leaks of a crashed image with lazy refcounts clears the dirty bit and repairs
// nothing, so that the next write is given clusters in use.
func TestLeaksOfDirtyImage(t *testing.T) {
	ours, theirs := twice(t, "lazy_refcounts=on", "10M", func(path string) {
		io(t, path, "write -P 0x11 0 1M", "flush", "sigraise 9")
	})
	r := harness.Run(t, "qemu-img", "check", "-f", "qcow2", "-r", "leaks", theirs)
	io(t, theirs, "write -P 0x22 5M 1M")
	after := io(t, theirs, "read -P 0x11 0 1M")
	t.Logf("qemu-img: code %d, features %#x; a later write leaves %q", r.Code, incompat(t, theirs),
		strings.Split(string(after.Stdout), "\n")[0])

	r = harness.Drover(t, "check", "-f", "qcow2", "-r", "leaks", ours)
	if r.Code != 1 || incompat(t, ours)&1 == 0 || !strings.Contains(string(r.Stderr), "not closed cleanly") {
		t.Errorf("features %#x after\n%s", incompat(t, ours), r)
	}
	harness.MustDrover(t, "check", "-f", "qcow2", "-r", "all", ours)
	if incompat(t, ours) != 0 {
		t.Errorf("features %#x after the repair", incompat(t, ours))
	}
	io(t, ours, "write -P 0x22 5M 1M")
	for _, read := range []string{"read -P 0x11 0 1M", "read -P 0x22 5M 1M"} {
		if r := io(t, ours, read); r.Code != 0 || strings.Contains(string(r.Stdout), "failed") {
			t.Errorf("data is lost:\n%s", r)
		}
	}
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", ours)
}

// TestRepairKeepsSnapshots: a repair of an image with a bitmap deletes its snapshots.
func TestRepairKeepsSnapshots(t *testing.T) {
	for _, mode := range []string{"leaks", "all"} {
		ours, theirs := twice(t, "cluster_size=64k", "10M", func(path string) {
			io(t, path, "write -P 1 0 1M")
			harness.Must(t, "qemu-img", "snapshot", "-c", "keep", path)
			io(t, path, "write -P 2 0 512k")
			harness.Must(t, "qemu-img", "bitmap", "--add", path, "changes")
		})
		want := harness.RawSnapshot(t, ours, "keep")
		r := harness.Run(t, "qemu-img", "check", "-f", "qcow2", "-r", mode, theirs)
		t.Logf("qemu-img check -r %s: code %d, snapshots left: %d", mode, r.Code, snapshots(t, theirs))

		r = harness.Drover(t, "check", "-f", "qcow2", "-r", mode, ours)
		if r.Code != 0 || snapshots(t, ours) != 1 || strings.Contains(string(r.Stdout), "repaired") {
			t.Errorf("%d snapshots are left after\n%s", snapshots(t, ours), r)
		}
		if !bytes.Equal(harness.RawSnapshot(t, ours, "keep"), want) {
			t.Error("the snapshot has another content")
		}
		if info := string(harness.Must(t, "qemu-img", "info", "-f", "qcow2", ours)); !strings.Contains(info, "name: changes") {
			t.Errorf("the bitmap is gone:\n%s", info)
		}
	}
}

func snapshots(t *testing.T, path string) int {
	t.Helper()
	var info struct{ Snapshots []any }
	harness.OK(t, json.Unmarshal(harness.Must(t, "qemu-img", "info", "-f", "qcow2", "--output=json", path), &info))
	return len(info.Snapshots)
}

// TestCryptMethodWithoutHeader: one byte in the header makes info crash.
func TestCryptMethodWithoutHeader(t *testing.T) {
	ours, theirs := twice(t, "cluster_size=64k", "1M", func(path string) {
		b, err := os.ReadFile(path)
		harness.OK(t, err)
		b[35] = 2
		harness.OK(t, os.WriteFile(path, b, 0o600))
	})
	t.Logf("qemu-img info: code %d", harness.Run(t, "qemu-img", "info", "-f", "qcow2", theirs).Code)
	for _, args := range [][]string{{"info", "-f", "qcow2", ours}, {"check", "-f", "qcow2", ours}, {"check", "-f", "qcow2", "-r", "all", ours},
		{"create", "-f", "qcow2", "-b", ours, "-F", "qcow2", ours + ".top"}} {
		if r := harness.Drover(t, args...); r.Code != 1 || len(r.Stderr) == 0 || strings.Contains(string(r.Stderr), "panic") {
			t.Errorf("no clean error:\n%s", r)
		}
	}
}

// TestRepairCutsTheEndOff: what was discarded at the end of the file stays in the file for ever.
func TestRepairCutsTheEndOff(t *testing.T) {
	ours, theirs := twice(t, "cluster_size=64k", "1G", func(path string) { io(t, path, "write 0 16M", "discard 0 16M") })
	size := func(path string) int64 {
		info, err := os.Stat(path)
		harness.OK(t, err)
		return info.Size()
	}
	before := size(theirs)
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", "-r", "all", theirs)
	t.Logf("qemu-img check -r all: the file had %d bytes, and has %d", before, size(theirs))
	harness.MustDrover(t, "check", "-f", "qcow2", "-r", "all", ours)
	if got := size(ours); got > 1<<20 {
		t.Errorf("the file had %d bytes, and has %d", before, got)
	}
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", ours)
}

// TestFailedSnapshotLeaksNothing: a snapshot that the refcount width does not allow leaves a leaked cluster behind.
func TestFailedSnapshotLeaksNothing(t *testing.T) {
	ours, theirs := twice(t, "cluster_size=64k,refcount_bits=1", "10M", func(path string) { io(t, path, "write 0 1M") })
	r := harness.Run(t, "qemu-img", "snapshot", "-c", "one", theirs)
	t.Logf("qemu-img snapshot: code %d; check afterwards: code %d", r.Code, harness.Run(t, "qemu-img", "check", "-f", "qcow2", theirs).Code)
	if r := harness.Drover(t, "snapshot", "-c", "one", ours); r.Code == 0 {
		t.Errorf("a snapshot that cannot be counted was taken:\n%s", r)
	}
	harness.MustDrover(t, "check", "-f", "qcow2", ours)
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", ours)
	// An image that QEMU has left with the leak is repaired.
	harness.MustDrover(t, "check", "-f", "qcow2", "-r", "leaks", theirs)
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", theirs)
}
