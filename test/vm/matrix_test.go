package vm

import (
	"crypto/md5"
	_ "embed"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

//go:embed jobs/matrix.sh
var matrixScript []byte

const matrixSize = 16 << 20

type kind struct {
	name     string
	commands []string
}

// shortKinds are those that CI has time for.
var shortKinds = []string{"v3", "c512", "extl2", "zstd", "overlay", "snapshot"}

// kinds are the kinds of images, and how stock makes each from source.raw or from nothing.
var kinds = []kind{
	{"v3", []string{"qemu-img convert -f raw -O qcow2 source.raw IMAGE"}},
	{"v2", []string{"qemu-img convert -f raw -O qcow2 -o compat=0.10 source.raw IMAGE"}},
	{"c512", []string{"qemu-img convert -f raw -O qcow2 -o cluster_size=512 source.raw IMAGE"}},
	{"c4k", []string{"qemu-img convert -f raw -O qcow2 -o cluster_size=4k source.raw IMAGE"}},
	{"c2m", []string{"qemu-img convert -f raw -O qcow2 -o cluster_size=2M source.raw IMAGE"}},
	{"rc1", []string{"qemu-img convert -f raw -O qcow2 -o refcount_bits=1 source.raw IMAGE"}},
	{"rc64", []string{"qemu-img convert -f raw -O qcow2 -o refcount_bits=64 source.raw IMAGE"}},
	{"extl2", []string{"qemu-img convert -f raw -O qcow2 -o extended_l2=on,cluster_size=128k source.raw IMAGE"}},
	{"lazy", []string{"qemu-img convert -f raw -O qcow2 -o lazy_refcounts=on source.raw IMAGE"}},
	{"zlib", []string{"qemu-img convert -c -f raw -O qcow2 source.raw IMAGE"}},
	{"zstd", []string{"qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd source.raw IMAGE"}},
	{"datafile", []string{"qemu-img convert -f raw -O qcow2 -o data_file=datafile.data source.raw IMAGE"}},
	{"datafileraw", []string{"qemu-img convert -f raw -O qcow2 -o data_file=datafileraw.data,data_file_raw=on source.raw IMAGE"}},
	{"empty", []string{"qemu-img create -f qcow2 IMAGE 16M"}},
	{"zero", []string{"qemu-img convert -f raw -O qcow2 source.raw IMAGE", "qemu-io -f qcow2 -c 'write -z 1M 4M' IMAGE",
		"qemu-io -f qcow2 -c 'write -z -u 6M 4M' IMAGE"}},
	{"overraw", []string{"qemu-img create -f qcow2 -b source.raw -F raw IMAGE"}},
	{"overlay", []string{"qemu-img create -f qcow2 -b v3base.qcow2 -F qcow2 IMAGE"}},
	{"bigger", []string{"qemu-img create -f qcow2 -b v3base.qcow2 -F qcow2 IMAGE 24M"}},
	{"snapshot", []string{"qemu-img convert -f raw -O qcow2 source.raw IMAGE", "qemu-img snapshot -c before IMAGE"}},
	{"bitmap", []string{"qemu-img convert -f raw -O qcow2 source.raw IMAGE", "qemu-img bitmap --add IMAGE b"}},
}

var sumLine = regexp.MustCompile(`(?m)^SUM (\S+) ([0-9a-f]{32})`)

// TestMatrix serves an image of every kind and judges content, changes and images by the host's tools.
func TestMatrix(t *testing.T) {
	vm := machine(t)
	j := newJob(t, matrixScript)
	disk := filepath.Join(j.Folder, "disk")
	shell := func(command string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", command+" >&2")
		cmd.Dir = disk
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	// A third each of noise, text and zeroes, in turns of 192 KiB.
	r := rand.New(rand.NewPCG(5, 5))
	source := make([]byte, matrixSize)
	for i := range source {
		switch i / (192 << 10) % 3 {
		case 0:
			source[i] = byte(r.Uint32())
		case 1:
			source[i] = byte('a' + i/512%26)
		}
	}
	noise := make([]byte, 256<<10)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	write := func(name string, data []byte) string {
		t.Helper()
		if err := os.WriteFile(name, data, 0o666); err != nil {
			t.Fatal(err)
		}
		return name
	}
	write(filepath.Join(disk, "source.raw"), source)
	shell("qemu-img convert -f raw -O qcow2 source.raw v3base.qcow2")
	content := func(dir, image string) []byte {
		t.Helper()
		out := filepath.Join(t.TempDir(), "raw")
		cmd := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, out)
		cmd.Dir = dir
		if msg, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("converting %s: %v\n%s", image, err, msg)
			return nil
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	var cases strings.Builder
	before := make(map[string][]byte)
	served := slices.Clone(kinds)
	if short() {
		served = slices.DeleteFunc(served, func(k kind) bool { return !slices.Contains(shortKinds, k.name) })
	}
	for _, k := range served {
		for _, c := range k.commands {
			shell(strings.ReplaceAll(c, "IMAGE", k.name+".qcow2"))
		}
		before[k.name] = content(disk, k.name+".qcow2")
		fmt.Fprintf(&cases, "%s %d %x\n", k.name, len(before[k.name]), md5.Sum(before[k.name]))
	}
	j.Files = map[string]string{
		"job/cases": write(filepath.Join(j.Folder, "cases"), []byte(cases.String())),
		"job/noise": write(filepath.Join(j.Folder, "noise"), noise),
	}
	run(t, vm, j)
	log, err := os.ReadFile(filepath.Join("../../out/vm", t.Name()+".log"))
	if err != nil {
		t.Fatal(err)
	}
	sums := make(map[string]string)
	for _, m := range sumLine.FindAllStringSubmatch(string(log), -1) {
		sums[m[1]] = m[2]
	}
	after := filepath.Join(j.Folder, "after")
	if err := os.Mkdir(after, 0o777); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(disk)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := Extract(j, "/"+f.Name(), filepath.Join(after, f.Name())); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range served {
		want := before[k.name]
		copy(want[257*4096:], noise[:4096])
		copy(want[3001*512:], noise[:3*512])
		copy(want[50*64<<10:], noise)
		clear(want[8<<20:][:1<<20])
		if sums[k.name] != fmt.Sprintf("%x", md5.Sum(want)) {
			t.Errorf("%s: the disk read something else in the guest than was written", k.name)
		}
		if got := content(after, k.name+".qcow2"); string(got) != string(want) {
			t.Errorf("%s: qemu-img reads something else than was written", k.name)
		}
		cmd := exec.Command("qemu-img", "check", k.name+".qcow2")
		cmd.Dir = after
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: qemu-img check: %v\n%s", k.name, err, out)
		}
	}
	cmd := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "before", "snapshot.qcow2", "snapshot.raw")
	cmd.Dir = after
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(after, "snapshot.raw")); err != nil || string(got) != string(source) {
		t.Errorf("the snapshot changed with the disk (%v)", err)
	}
}
