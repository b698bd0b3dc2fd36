package interop

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// TestServesBitmaps writes through drover and has clients read the bitmaps from it, and afterwards from qemu-nbd.
func TestServesBitmaps(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	image := filepath.Join(t.TempDir(), "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
	harness.Must(t, "qemu-img", "bitmap", "--add", image, "coarse")
	harness.Must(t, "qemu-img", "bitmap", "--add", "-g", "4k", image, "fine")
	harness.Must(t, "qemu-img", "bitmap", "--add", "--disable", image, "off")
	names := []string{"coarse", "fine", "off"}
	var flags []string
	for _, n := range names {
		flags = append(flags, "-B", n)
	}
	srv := harness.Start(t, harness.Serve{Image: image, Args: flags})
	listed := string(harness.Must(t, "nbdinfo", "--list", srv.URI()))
	harness.Must(t, "qemu-io", "-f", "raw", "-c", "write 0 64k", "-c", "write 1M 4k", "-c", "discard 2M 128k", "-c", "write -z 3M 64k", srv.URI())
	served := map[string]string{}
	for _, n := range names {
		if !strings.Contains(listed, "qemu:dirty-bitmap:"+n) {
			t.Errorf("nbdinfo --list does not show bitmap %s:\n%s", n, listed)
		}
		served[n] = string(harness.Must(t, "nbdinfo", "--map=qemu:dirty-bitmap:"+n, srv.URI()))
	}
	ofServer := func(n string) string {
		return string(harness.Must(t, "qemu-img", "map", "--output=json", "--image-opts",
			"driver=nbd,server.type=unix,server.path="+srv.Socket+",x-dirty-bitmap=qemu:dirty-bitmap:"+n))
	}
	if m := ofServer("fine"); !strings.Contains(m, `"start": 1048576, "length": 4096, "depth": 0, "present": false`) {
		t.Errorf("qemu-img map does not see the write:\n%s", m)
	}
	srv.Stop()
	harness.SameCheck(t, image)
	harness.SameInfo(t, image)
	for _, n := range names {
		stock := string(harness.Must(t, "nbdinfo", "--map=qemu:dirty-bitmap:"+n, "--", "[", peer.Path("qemu-nbd"), "-r", "-f",
			"qcow2", "-B", n, image, "]"))
		if stock != served[n] {
			t.Errorf("bitmap %s: drover served\n%s\nqemu-nbd serves\n%s", n, served[n], stock)
		}
	}

	// A server that is killed while clients write leaves bitmaps that nobody believes, and the others.
	srv = harness.Start(t, harness.Serve{Image: image})
	harness.Must(t, "qemu-io", "-f", "raw", "-c", "write 5M 64k", srv.URI())
	srv.Kill()
	harness.SameInfo(t, image)
	r := harness.Run(t, "qemu-nbd", "-r", "-f", "qcow2", "-B", "fine", "-k", filepath.Join(harness.SocketDir(t), "s"), image)
	if r.Code == 0 || !strings.Contains(string(r.Stderr), "is inconsistent and cannot be used") {
		t.Errorf("qemu-nbd takes the bitmap after the crash:\n%s", r)
	}
	if r := harness.Refused(t, harness.Serve{Image: image, Args: []string{"-B", "fine"}}); !strings.Contains(string(r.Stderr), "is inconsistent") {
		t.Errorf("%s", r)
	}
	off := string(harness.Must(t, "nbdinfo", "--map=qemu:dirty-bitmap:off", "--", "[", peer.Path("qemu-nbd"), "-r", "-f", "qcow2", "-B", "off", image, "]"))
	if off != served["off"] {
		t.Errorf("the disabled bitmap after the crash:\n%s", off)
	}
	harness.Refused(t, harness.Serve{Image: image, Args: []string{"-B", "none"}})
	for _, n := range names {
		harness.MustDrover(t, "bitmap", "--remove", image, n)
	}
	harness.MustDrover(t, "check", "-q", image)
	harness.Must(t, "qemu-img", "check", "-q", image)
}
