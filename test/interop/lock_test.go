package interop

import (
	"bufio"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// hold starts a qemu-io that keeps an image open until the test's cleanup.
func hold(t *testing.T, image string, flags ...string) {
	t.Helper()
	cmd := exec.Command(peer.Path("qemu-io"), append(append([]string{"-f", "qcow2"}, flags...), image)...)
	in, err := cmd.StdinPipe()
	harness.OK(t, err)
	out, err := cmd.StdoutPipe()
	harness.OK(t, err)
	harness.OK(t, cmd.Start())
	t.Cleanup(func() {
		in.Close() // the end of its input ends qemu-io
		if err := cmd.Wait(); err != nil {
			t.Errorf("the qemu-io that held the image: %v", err)
		}
	})
	// It answers a command once the image is open and locked.
	_, err = io.WriteString(in, "length\n")
	harness.OK(t, err)
	answer, err := bufio.NewReader(out).ReadString('B')
	if err != nil || !strings.Contains(answer, "MiB") {
		t.Fatalf("qemu-io did not open the image: %q, %v", answer, err)
	}
}

func lockImage(t *testing.T) string {
	t.Helper()
	peer.Need(t, "qemu-img", "qemu-io")
	image := filepath.Join(t.TempDir(), "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 0x5a 100k 300k", image)
	return image
}

func TestQEMUWriterKeepsDroverOut(t *testing.T) {
	image := lockImage(t)
	hold(t, image)
	mustMention(t, harness.Refused(t, harness.Serve{Image: image}), `"write" lock`)
	mustMention(t, harness.Refused(t, harness.Serve{Image: image, ReadOnly: true}), "lock")
	for _, command := range []string{"info", "check", "map"} {
		r := harness.Drover(t, command, "-f", "qcow2", image)
		if r.Code != 1 {
			t.Errorf("%s of an image that QEMU writes must fail with 1:\n%s", command, r)
		}
		mustMention(t, r, "lock")
		harness.MustDrover(t, command, "-f", "qcow2", "-U", image)
	}
}

func TestQEMUReaderKeepsDroverFromWriting(t *testing.T) {
	image := lockImage(t)
	hold(t, image, "-r")
	mustMention(t, harness.Refused(t, harness.Serve{Image: image}), "lock")
	srv := harness.Start(t, harness.Serve{Image: image, ReadOnly: true}) // two readers get along
	srv.Stop()
	harness.MustDrover(t, "info", "-f", "qcow2", image)
}

func TestDroverWriterKeepsQEMUOut(t *testing.T) {
	image := lockImage(t)
	srv := harness.Start(t, harness.Serve{Image: image})
	for _, flags := range [][]string{{}, {"-r"}} {
		args := append(append([]string{"-f", "qcow2"}, flags...), "-c", "read 100k 300k", image)
		r := harness.Run(t, "qemu-io", args...)
		if r.Code == 0 {
			t.Errorf("QEMU opened an image that drover writes:\n%s", r)
		}
		mustMention(t, r, "lock")
	}
	harness.Must(t, "qemu-img", "info", "-U", image)
	harness.Must(t, "qemu-io", "-f", "qcow2", "-r", "-U", "-c", "read -P 0x5a 100k 300k", image)
	mustMention(t, harness.Refused(t, harness.Serve{Image: image}), "lock")
	srv.Stop()
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 100k 300k", image)
}

func TestDroverReaderKeepsQEMUFromWriting(t *testing.T) {
	image := lockImage(t)
	srv := harness.Start(t, harness.Serve{Image: image, ReadOnly: true})
	r := harness.Run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", image)
	if r.Code == 0 {
		t.Errorf("QEMU wrote an image that drover reads:\n%s", r)
	}
	mustMention(t, r, "lock")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x5a 100k 300k", image)
	srv.Stop()
}

// TestBackingFileIsLockedForReading: what an image reads from must not change under it.
func TestBackingFileIsLockedForReading(t *testing.T) {
	base := lockImage(t)
	image := filepath.Join(filepath.Dir(base), "overlay.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(base), "-F", "qcow2", image)
	srv := harness.Start(t, harness.Serve{Image: image})
	r := harness.Run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", base)
	if r.Code == 0 {
		t.Errorf("QEMU wrote the backing file of an image that drover serves:\n%s", r)
	}
	mustMention(t, r, "lock")
	srv.Stop()
}
