// Package nbd drives drover serve with the NBD clients that people use: libnbd's tools, QEMU, and fio with its own
// verification.
package nbd

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

func TestMain(m *testing.M) { harness.Main(m) }

const diskSize = 64 << 20

// disk makes a raw file of diskSize bytes with data and holes, and a qcow2 image of it.
func disk(t *testing.T) (raw, image string, model harness.Model) {
	t.Helper()
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	raw, image = filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.qcow2")
	model = harness.NewModel(diskSize, nil)
	for off, i := int64(0), uint64(0); off < diskSize; off, i = off+700_000, i+1 {
		if i%3 == 0 {
			harness.Fill(model[off:min(off+500_000, diskSize)], i)
		}
	}
	model.Save(t, raw)
	harness.Must(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
	return raw, image, model
}

func TestNbdinfo(t *testing.T) {
	peer.Need(t, "nbdinfo")
	_, image, _ := disk(t)
	srv := harness.Start(t, harness.Serve{Image: image})
	var info struct {
		Protocol string
		Exports  []struct {
			Size      int64    `json:"export-size"`
			Contexts  []string `json:"contexts"`
			ReadOnly  bool     `json:"is_read_only"`
			CanFlush  bool     `json:"can_flush"`
			CanFUA    bool     `json:"can_fua"`
			CanTrim   bool     `json:"can_trim"`
			CanZero   bool     `json:"can_zero"`
			MultiConn bool     `json:"can_multi_conn"`
		}
	}
	out := harness.Must(t, "nbdinfo", "--json", srv.URI())
	if err := json.Unmarshal(out, &info); err != nil {
		t.Fatalf("nbdinfo --json: %v\n%s", err, out)
	}
	if info.Protocol != "newstyle-fixed" || len(info.Exports) != 1 {
		t.Fatalf("nbdinfo --json: want one export over newstyle-fixed:\n%s", out)
	}
	e := info.Exports[0]
	if e.Size != diskSize || e.ReadOnly || !e.CanFlush || !e.CanFUA || !e.CanTrim || !e.CanZero || !e.MultiConn {
		t.Errorf("the export lacks what it must offer:\n%s", out)
	}
	if !strings.Contains(strings.Join(e.Contexts, " "), "base:allocation") {
		t.Errorf("the export has contexts %q, want base:allocation", e.Contexts)
	}
	if list := harness.Must(t, "nbdinfo", "--list", "--json", srv.URI()); !json.Valid(list) {
		t.Errorf("nbdinfo --list --json: %s", list)
	}
	srv.Stop()

	srv = harness.Start(t, harness.Serve{Image: image, ReadOnly: true})
	client := srv.Dial(t)
	if client.Flags&harness.HasReadOnly == 0 {
		t.Errorf("a read-only export does not say so: flags %#x", client.Flags)
	}
	if err := client.Write(make([]byte, 512), 0); err != harness.NBDError(1) {
		t.Errorf("writing a read-only export: %v, want NBD error 1 (EPERM)", err)
	}
	harness.OK(t, client.Close())
	srv.Stop()
}

// TestMapOverNBD: what block status says is zero reads as zeroes, and the map has the disk's length.
func TestMapOverNBD(t *testing.T) {
	peer.Need(t, "nbdinfo")
	_, image, model := disk(t)
	srv := harness.Start(t, harness.Serve{Image: image, ReadOnly: true})
	var spans []struct {
		Offset, Length int64
		Type           uint32
	}
	out := harness.Must(t, "nbdinfo", "--map", "--json", srv.URI())
	if err := json.Unmarshal(out, &spans); err != nil {
		t.Fatalf("nbdinfo --map: %v\n%s", err, out)
	}
	const zero = 2
	var end, zeroes int64
	for _, s := range spans {
		if s.Offset != end {
			t.Fatalf("the map has a gap at %d:\n%s", end, out)
		}
		end = s.Offset + s.Length
		if s.Type&zero == 0 {
			continue
		}
		zeroes += s.Length
		if err := harness.Same(model[s.Offset:end], make([]byte, s.Length), s.Offset); err != nil {
			t.Errorf("a range that is said to be zero is not: %v", err)
		}
	}
	if end != diskSize {
		t.Errorf("the map ends at %d, the disk at %d", end, int64(diskSize))
	}
	if zeroes < diskSize/3 {
		t.Errorf("only %d bytes are said to be zero; most of the disk's holes are missing", zeroes)
	}
	srv.Stop()
}

func TestNbdcopyBothWays(t *testing.T) {
	peer.Need(t, "nbdcopy")
	raw, _, model := disk(t)
	image := filepath.Join(t.TempDir(), "copy.qcow2")
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", image, fmt.Sprint(diskSize))
	srv := harness.Start(t, harness.Serve{Image: image})
	harness.Must(t, "nbdcopy", "--connections=4", "--flush", raw, srv.URI())
	if err := harness.Same(harness.Copy(t, srv.URI()), model, 0); err != nil {
		t.Errorf("copied there and back: %v", err)
	}
	srv.Stop()
	sound(t, image)
	harness.Must(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
}

func TestConvertBothWays(t *testing.T) {
	raw, image, model := disk(t)
	srv := harness.Start(t, harness.Serve{Image: image, ReadOnly: true})
	back := filepath.Join(t.TempDir(), "back.raw")
	harness.Must(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", srv.URI(), back)
	model.MustEqualFile(t, back, "converted from the server")
	srv.Stop()

	target := filepath.Join(t.TempDir(), "target.qcow2")
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", target, fmt.Sprint(diskSize))
	srv = harness.Start(t, harness.Serve{Image: target})
	harness.Must(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, srv.URI())
	srv.Stop()
	sound(t, target)
	harness.Must(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, target)
}

// TestQEMUIOOverNBD lets QEMU's own block layer write, zero, trim and read through the server.
func TestQEMUIOOverNBD(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	image := filepath.Join(t.TempDir(), "image.qcow2")
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", image, "16M")
	srv := harness.Start(t, harness.Serve{Image: image})
	r := harness.Run(t, "qemu-io", "-f", "raw", "-d", "unmap",
		"-c", "write -P 0x11 0 1M", "-c", "write -P 0x22 1000001 333333", "-c", "write -f -P 0x33 5M 64k",
		"-c", "write -z 65000 70001", "-c", "write -z -u 5300k 12k", "-c", "flush", "-c", "discard 512k 128k",
		"-c", "read -P 0x11 0 65000", "-c", "read -P 0 65000 70001", "-c", "read -P 0x11 135001 300000",
		"-c", "read -P 0x22 1000001 333333", "-c", "read -P 0 1333334 1M", "-c", "read -P 0x33 5M 64k",
		"-c", "read -P 0 15M 1M", srv.URI())
	if r.Code != 0 || strings.Contains(string(r.Stdout)+string(r.Stderr), "failed") {
		t.Errorf("qemu-io over NBD:\n%s", r)
	}
	srv.Stop()
	sound(t, image)
}

// TestRangesOutsideTheDisk: the protocol's errors for requests that no disk can serve, on a connection that lives on.
func TestRangesOutsideTheDisk(t *testing.T) {
	_, image, model := disk(t)
	srv := harness.Start(t, harness.Serve{Image: image})
	client := srv.Dial(t)
	const einval, enospc = harness.NBDError(22), harness.NBDError(28)
	p := make([]byte, 4096)
	if err := client.Read(p, diskSize-512); err != einval {
		t.Errorf("read past the end: %v, want %v", err, einval)
	}
	if err := client.Write(p, diskSize-512); err != enospc && err != einval {
		t.Errorf("write past the end: %v, want %v", err, enospc)
	}
	if err := client.Zero(diskSize, 512, false); err != enospc && err != einval {
		t.Errorf("zero past the end: %v, want %v", err, enospc)
	}
	if err := client.Read(p, -512); err != einval {
		t.Errorf("read at 2^64-512: %v, want %v", err, einval)
	}
	harness.OK(t, client.Read(p, 0))
	harness.OK(t, harness.Same(p, model[:len(p)], 0))
	harness.OK(t, client.Close())
	srv.Stop()
}

// TestFioVerifies lets fio write checksummed blocks of many sizes from four connections at depth 64, with trims and
// flushes in between, and read them back. FIO_SECONDS says how long (20 unless told; 4 with -short).
func TestFioVerifies(t *testing.T) {
	peer.NeedFioNBD(t)
	peer.Need(t, "qemu-img")
	seconds := "20"
	if testing.Short() {
		seconds = "4"
	}
	if s := os.Getenv("FIO_SECONDS"); s != "" {
		seconds = s
	}
	runtime, err := time.ParseDuration(seconds + "s")
	if err != nil {
		t.Fatalf("FIO_SECONDS: %v", err)
	}
	image := filepath.Join(t.TempDir(), "image.qcow2")
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", image, "512M")
	srv := harness.Start(t, harness.Serve{Image: image})
	common := []string{"--ioengine=nbd", "--uri=" + srv.URI(), "--thread", "--group_reporting", "--iodepth=64", "--time_based",
		"--runtime=" + seconds, "--randseed=7", "--numjobs=4", "--offset_increment=128m"}
	// Each verifying job has 120 MiB; the trimming jobs have the 8 MiB between, and what they free is handed out to the
	// others: a cluster that is given to two owners shows as a wrong checksum.
	verify := []string{"--name=verify", "--size=120m", "--rw=randrw", "--rwmixread=20",
		"--bssplit=512/10:4k/40:16k/20:64k/20:256k/10", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512",
		"--do_verify=1", "--fsync=200"}
	trim := []string{"--name=trim", "--new_group", "--offset=120m", "--size=8m", "--rw=randtrimwrite", "--bs=48k",
		"--verify=0", "--iodepth=8", "--fsync=500", "--rate_iops=1000"}
	r := harness.RunFor(t, runtime, "fio", append(append(common, verify...), trim...)...)
	if r.Code != 0 {
		t.Errorf("fio found wrong bytes, or failed:\n%s", r)
	}
	for _, done := range []string{"READ:", "WRITE:", "TRIM:"} {
		if !strings.Contains(string(r.Stdout), done) {
			t.Errorf("fio's summary has no %s line:\n%s", done, r)
		}
	}
	srv.Stop()
	sound(t, image)
}

// sound demands that stock QEMU finds nothing wrong, not even a leak, in an image that was closed in good order.
func sound(t *testing.T, image string) {
	t.Helper()
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", image)
}
