package vm

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var (
	//go:embed jobs/fio.sh
	fioScript []byte
	//go:embed jobs/kill.sh
	killScript []byte
	//go:embed jobs/load.sh
	loadScript []byte
	//go:embed jobs/many.sh
	manyScript []byte
	//go:embed jobs/hung.sh
	hungScript []byte
	//go:embed jobs/nbd.sh
	nbdScript []byte
	//go:embed jobs/targetcli.sh
	targetcliScript []byte
)

// short reports whether only what CI has time for is run.
func short() bool { return os.Getenv("DROVER_VM") == "short" }

// long skips a test that CI has no time for.
func long(t *testing.T) {
	t.Helper()
	if short() {
		t.Skip("make test-vm runs it")
	}
}

// withImages makes empty images on the guest's disk, each given as its name and size.
func (j *Job) withImages(t *testing.T, images ...string) {
	t.Helper()
	for i := 0; i < len(images); i += 2 {
		host(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(j.Folder, "disk", images[i]), images[i+1])
	}
}

// withTools gives the guest the disk of tools.
func (j *Job) withTools(t *testing.T) {
	t.Helper()
	cache, err := filepath.Abs("../../out/vm")
	if err != nil {
		t.Fatal(err)
	}
	if j.Tools, err = PrepareTools(cache); err != nil {
		t.Fatal(err)
	}
}

// param gives the job a file of shell variables.
func (j *Job) param(t *testing.T, text string) {
	t.Helper()
	file := filepath.Join(j.Folder, "params")
	if err := os.WriteFile(file, []byte(text), 0o666); err != nil {
		t.Fatal(err)
	}
	j.Files = map[string]string{"job/params": file}
}

func (j *Job) expect(t *testing.T, vm *VM, n int) {
	t.Helper()
	if results := run(t, vm, *j); len(results) != n {
		t.Errorf("%d results, not %d", len(results), n)
	}
}

// TestFio: what fio wrote is there, a file system lives on the disk, and the image is clean.
func TestFio(t *testing.T) {
	long(t)
	vm := machine(t)
	j := newJob(t, fioScript)
	j.withImages(t, "a.qcow2", "256M")
	j.expect(t, vm, 21)
	clean(t, j, "/a.qcow2", false)
}

// TestKill kills the server again and again while fio writes: nothing that was acknowledged is lost.
func TestKill(t *testing.T) {
	vm := machine(t)
	rounds := 20
	if short() {
		rounds = 2
	}
	j := newJob(t, killScript)
	j.withImages(t, "a.qcow2", "256M")
	j.param(t, fmt.Sprintf("ROUNDS=%d\n", rounds))
	j.expect(t, vm, 4+2*rounds)
	clean(t, j, "/a.qcow2", true)
}

// TestLoad changes a disk while fio uses it.
func TestLoad(t *testing.T) {
	long(t)
	vm := machine(t)
	j := newJob(t, loadScript)
	j.withImages(t, "a.qcow2", "256M")
	j.expect(t, vm, 27)
	clean(t, j, "/a.qcow2", false)
	pattern, raw := filepath.Join(j.Folder, "pattern"), filepath.Join(j.Folder, "before.raw")
	if err := Extract(j, "/pattern", pattern); err != nil {
		t.Fatal(err)
	}
	host(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "before", filepath.Join(j.Folder, "a.qcow2"), raw)
	want, err := os.ReadFile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) < len(want) || string(got[:len(want)]) != string(want) { // stock gives it the size that the disk has now
		t.Errorf("the snapshot holds %d bytes, and not what was on the disk when it was taken", len(got))
	}
}

// TestMany serves 64 devices at once.
func TestMany(t *testing.T) {
	long(t)
	vm := machine(t)
	j := newJob(t, manyScript)
	var images []string
	for i := range 64 {
		images = append(images, fmt.Sprintf("%d.qcow2", i), "8M")
	}
	j.withImages(t, images...)
	j.Memory = 3072 // the kernel takes 8 MiB for the ring of each
	j.expect(t, vm, 8)
	for i := range 64 {
		file := filepath.Join(j.Folder, fmt.Sprintf("%d.qcow2", i))
		if err := Extract(j, "/"+filepath.Base(file), file); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("qemu-img", "check", file).CombinedOutput(); err != nil {
			t.Errorf("qemu-img check %s: %v\n%s", file, err, out)
		}
	}
}

// TestHung: whoever waits for a server that died is answered by the next one.
func TestHung(t *testing.T) {
	long(t)
	vm := machine(t)
	j := newJob(t, hungScript)
	j.withImages(t, "a.qcow2", "32M", "b.qcow2", "32M", "c.qcow2", "32M", "d.qcow2", "32M", "e.qcow2", "32M")
	j.expect(t, vm, 20)
	for _, name := range []string{"/a.qcow2", "/b.qcow2", "/c.qcow2", "/d.qcow2", "/e.qcow2"} {
		clean(t, j, name, true)
	}
}

// TestNBD has the kernel's own NBD client use drover serve.
func TestNBD(t *testing.T) {
	vm := machine(t)
	j := newJob(t, nbdScript)
	j.withImages(t, "a.qcow2", "256M")
	n := 22
	if !short() {
		j.withTools(t)
		n = 28
	}
	j.expect(t, vm, n)
	clean(t, j, "/a.qcow2", false)
}

// TestTargetcli has Debian's targetcli make, save, restore and delete disks.
func TestTargetcli(t *testing.T) {
	long(t)
	vm := machine(t)
	j := newJob(t, targetcliScript)
	j.withImages(t, "a.qcow2", "256M", "b.qcow2", "32M", "c.qcow2", "32M")
	j.withTools(t)
	j.expect(t, vm, 30)
	clean(t, j, "/a.qcow2", false)
	clean(t, j, "/b.qcow2", false)
}
