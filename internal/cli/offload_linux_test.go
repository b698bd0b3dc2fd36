package cli

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestConvertOffloadLikeQEMU has the host copy between files.
func TestConvertOffloadLikeQEMU(t *testing.T) {
	images(t)
	chainOf := []string{"raw", "plain", "extended", "base", "overlay", "top", "onraw", "snap", "compressed", "empty", "datafile"}
	for _, name := range chainOf {
		for _, flags := range []string{"-C -O raw", "-C -O qcow2", "-C -W -O qcow2", "-C -O qcow2 -o cluster_size=4k", "-C -O qcow2 -o extended_l2=on"} {
			args := append([]string{"convert"}, append(strings.Fields(flags), name, "out")...)
			mustDrover(t, args...)
			mustTool(t, "qemu-img", "compare", "-q", name, "out")
			if strings.Contains(flags, "qcow2") {
				mustTool(t, "qemu-img", "check", "-q", "out")
			}
		}
	}
	mustDrover(t, "convert", "-C", "-l", "one", "-O", "qcow2", "snap", "out")
	mustDrover(t, "convert", "-l", "one", "-O", "qcow2", "snap", "out2")
	mustTool(t, "qemu-img", "compare", "-q", "out", "out2")
	mustDrover(t, "convert", "-C", "-O", "qcow2", "base", "raw", "snap", "out")
	mustDrover(t, "convert", "-O", "qcow2", "base", "raw", "snap", "out2")
	mustTool(t, "qemu-img", "compare", "-q", "out", "out2")
	mustDrover(t, "convert", "-C", "-n", "-O", "qcow2", "base", "out") // which has data there already
	mustTool(t, "qemu-img", "check", "-q", "out")
}

// TestConvertOffloadCopiesInTheKernel: no data passes through this process.
func TestConvertOffloadCopiesInTheKernel(t *testing.T) {
	images(t)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(strace, "-f", "-y", "-e", "trace=pwrite64,pwritev,pwritev2,write,copy_file_range", "-o", "trace", self,
		"-test.run=^TestConvertForOffloadTrace$")
	cmd.Env = append(os.Environ(), "DROVER_TEST_CONVERT=raw")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("strace does not work here: %v\n%s", err, out)
	}
	b, err := os.ReadFile("trace")
	if err != nil {
		t.Fatal(err)
	}
	copied := 0
	for line := range strings.SplitSeq(string(b), "\n") {
		switch {
		case !strings.Contains(line, "/out>"):
		case strings.Contains(line, "copy_file_range("):
			copied++
		case strings.Contains(line, "write"):
			t.Errorf("data was written: %s", line)
		}
	}
	if copied == 0 {
		t.Errorf("nothing was copied by the kernel:\n%s", b)
	}
}

// TestConvertForOffloadTrace is what TestConvertOffloadCopiesInTheKernel traces.
func TestConvertForOffloadTrace(t *testing.T) {
	if os.Getenv("DROVER_TEST_CONVERT") == "" {
		t.Skip("it is for another test")
	}
	mustDrover(t, "convert", "-C", "-f", "qcow2", "-O", "raw", "base", "out")
}

// TestConvertSharesSpace converts on a file system that can share space between files, where data takes no more of it
// afterwards.
func TestConvertSharesSpace(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.xfs")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and mkfs.xfs")
	}
	dir := t.TempDir()
	fs, mnt := filepath.Join(dir, "fs"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, fs, "")
	if err := os.Truncate(fs, 320<<20); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{{mkfs, "-q", "-m", "reflink=1", fs}, {"mount", "-o", "loop", fs, mnt}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%q does not work here: %v\n%s", c, err, out)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(mnt, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	t.Chdir(mnt)
	defer t.Chdir(dir) // so that it can be unmounted
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "disk", "100M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 40M", "-c", "write -P 8 70M 20M", "disk")
	for _, c := range [][]string{{"-O", "raw", "disk", "raw"}, {"-O", "qcow2", "disk", "copy"}, {"-f", "raw", "-O", "qcow2", "raw", "back"},
		{"-f", "raw", "-O", "raw", "raw", "raw2"}, {"-C", "-O", "qcow2", "disk", "copy2"}} {
		var before, after syscall.Statfs_t
		if err := syscall.Statfs(mnt, &before); err != nil {
			t.Fatal(err)
		}
		mustDrover(t, append([]string{"convert"}, c...)...)
		if err := syscall.Statfs(mnt, &after); err != nil {
			t.Fatal(err)
		}
		if used := int64(before.Bfree-after.Bfree) * before.Bsize; used > 8<<20 {
			t.Errorf("%q took %d bytes", c, used)
		}
		target := c[len(c)-1]
		mustTool(t, "qemu-img", "compare", "-q", "disk", target)
		if !strings.HasPrefix(target, "raw") {
			mustTool(t, "qemu-img", "check", "-q", target)
		}
	}
	// Space of its own is what -S 0 asks for.
	mustDrover(t, "convert", "-S", "0", "-O", "raw", "disk", "full")
	mustTool(t, "qemu-img", "compare", "-q", "disk", "full")
}
