// Package peer finds the programs of other projects that the tests compare with: QEMU's tools, libnbd's clients, fio.
//
// One rule decides what a missing program means. In CI (the environment variable CI is "true") it fails the test: a
// comparison that silently did not run is worth nothing. On a laptop it skips the test and says what to install.
package peer

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// packages names the Debian package that brings a program, for the message.
var packages = map[string]string{
	"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "qemu-nbd": "qemu-utils",
	"nbdkit": "nbdkit", "nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin",
	"nbdsh": "python3-libnbd", "cloud-localds": "cloud-image-utils", "genisoimage": "genisoimage", "isoinfo": "genisoimage",
	"genimage": "genimage", "fio": "fio", "mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs",
}

// sbin holds directories that Debian leaves out of an ordinary user's PATH.
var sbin = []string{"/usr/sbin", "/sbin", "/usr/local/sbin"}

// Look returns the path of a program.
func Look(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range sbin {
		if path, errSbin := exec.LookPath(filepath.Join(dir, name)); errSbin == nil {
			return path, nil
		}
	}
	if pkg, ok := packages[name]; ok {
		return "", fmt.Errorf("%s is not installed (package %s; test/peers.sh installs what is missing)", name, pkg)
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// Need skips the test unless every program is installed. In CI it fails the test instead.
func Need(t testing.TB, names ...string) {
	t.Helper()
	var missing []string
	for _, name := range names {
		if _, err := Look(name); err != nil {
			missing = append(missing, err.Error())
		}
	}
	if len(missing) > 0 {
		absent(t, strings.Join(missing, "; "))
	}
}

// NeedFioNBD is Need for a fio that was built with its NBD engine.
func NeedFioNBD(t testing.TB) {
	t.Helper()
	Need(t, "fio")
	out, err := exec.Command(Path("fio"), "--enghelp").CombinedOutput()
	if err != nil {
		t.Fatalf("asking fio for its engines: %v\n%s", err, out)
	}
	for _, engine := range strings.Fields(string(out)) {
		if engine == "nbd" {
			return
		}
	}
	absent(t, "this fio has no nbd engine")
}

// Path returns where a program is, or its bare name when it is not installed, so that running it fails by that name.
func Path(name string) string {
	if path, err := Look(name); err == nil {
		return path
	}
	return name
}

// InCI reports whether a missing peer is a failure.
func InCI() bool { return os.Getenv("CI") == "true" }

func absent(t testing.TB, why string) {
	t.Helper()
	if InCI() {
		t.Fatalf("CI must compare with its peers: %s", why)
	}
	t.Skipf("no comparison: %s", why)
}
