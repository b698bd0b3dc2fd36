package race

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/peer"
)

// No test may leave a goroutine behind.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// keptOpen lets a test use a file after the image that owned it was closed.
type keptOpen struct{ storage.File }

func (keptOpen) Close() error { return nil }

// run runs a program of the peers.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(peer.Path(name), args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// load copies a file of the host into memory.
func load(t testing.TB, path string) *storage.MemFile {
	t.Helper()
	host, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	mem := storage.NewMemFile(filepath.Base(path))
	if err := storage.CopyContent(mem, host); err != nil {
		t.Fatal(err)
	}
	return mem
}

// save writes a file where programs can find it.
func save(t testing.TB, f storage.File, path string) {
	t.Helper()
	host, err := storage.CreateFile(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if err := storage.CopyContent(host, f); err != nil {
		t.Fatal(err)
	}
}

// mustBeClean has our own check find nothing, not even a leak.
func mustBeClean(t testing.TB, f storage.File) {
	t.Helper()
	report, err := qcow2.CheckFile(t.Context(), f, qcow2.CheckOptions{MaxFindings: 10})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if !report.Clean() {
		t.Fatalf("check found %d errors, %d leaks: %+v", report.Corruptions, report.Leaks, report.Findings)
	}
}

// mustBeCleanForQEMU has stock qemu-img check find nothing. The image may name no backing file.
func mustBeCleanForQEMU(t testing.TB, f storage.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	save(t, f, path)
	run(t, "qemu-img", "check", "-f", "qcow2", path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}
