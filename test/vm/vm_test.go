package vm

import (
	"context"
	_ "embed"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// bootTimeout bounds a boot with its job. Software emulation on a busy host is slow.
const bootTimeout = 9 * time.Minute

// machine prepares the virtual machine, or skips the test.
func machine(t *testing.T) *VM {
	t.Helper()
	if os.Getenv("DROVER_VM") == "" {
		t.Skip("boots a virtual machine: set DROVER_VM=1, or run make test-vm")
	}
	cache, err := filepath.Abs("../../out/vm")
	if err != nil {
		t.Fatal(err)
	}
	vm, err := Prepare(cache)
	if errors.Is(err, ErrMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// drover returns the program that runs in the guest, linked statically.
func drover(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("DROVER_BIN"); bin != "" {
		return bin
	}
	bin := filepath.Join(t.TempDir(), "drover")
	cmd := exec.Command("go", "build", "-o", bin, "github.com/droverproject/drover/cmd/drover")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building drover: %v\n%s", err, out)
	}
	return bin
}

func host(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// newJob makes a scratch folder with an empty disk folder.
func newJob(t *testing.T, script []byte) Job {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "disk"), 0o777); err != nil {
		t.Fatal(err)
	}
	// The console stays behind for whoever has to find out what went wrong.
	log, err := os.Create(filepath.Join("../../out/vm", t.Name()+".log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	t.Logf("the guest's console is in out/vm/%s.log", t.Name())
	return Job{Drover: drover(t), Script: script, Folder: dir, Log: log}
}

// run boots the job and fails the test for whatever failed in it.
func run(t *testing.T, vm *VM, j Job) []Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	results, err := vm.Run(ctx, j)
	for _, r := range results {
		if !r.OK {
			t.Errorf("%s: %s", r.Name, r.Text)
		}
	}
	if err != nil {
		t.Errorf("after %d results: %v", len(results), err)
	}
	return results
}

// clean has the host's qemu-img check an image of the guest's disk.
func clean(t *testing.T, j Job, name string) {
	t.Helper()
	file := filepath.Join(j.Folder, filepath.Base(name))
	if err := Extract(j, name, file); err != nil {
		t.Error(err)
		return
	}
	if out, err := exec.Command("qemu-img", "check", file).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check %s: %v\n%s", name, err, out)
	}
	if out, err := exec.Command(j.Drover, "check", file).CombinedOutput(); err != nil {
		t.Errorf("drover check %s: %v\n%s", name, err, out)
	}
}

//go:embed jobs/disk.sh
var diskScript []byte

func TestDisk(t *testing.T) {
	vm := machine(t)
	j := newJob(t, diskScript)
	for name, size := range map[string]string{"a.qcow2": "256M", "b.qcow2": "32M"} {
		host(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(j.Folder, "disk", name), size)
	}
	if results := run(t, vm, j); len(results) < 50 {
		t.Errorf("only %d results", len(results))
	}
	clean(t, j, "/a.qcow2")
	clean(t, j, "/b.qcow2")
}
