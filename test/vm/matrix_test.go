package vm

import (
	"bytes"
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

// matrix is a disk of the guest with an image of each kind, and what each must hold.
type matrix struct {
	job    Job
	kinds  []kind
	source []byte
	before map[string][]byte // what each disk held
	want   map[string][]byte // what it holds after the job's writes
	after  string            // a folder with the images as the guest left them
}

// newMatrix makes the images. Each third is noise, text and zeroes, in turns of 192 KiB.
func newMatrix(t *testing.T) *matrix {
	t.Helper()
	m := &matrix{job: newJob(t, matrixScript), kinds: slices.Clone(kinds), source: make([]byte, matrixSize),
		before: make(map[string][]byte), want: make(map[string][]byte)}
	if short() {
		m.kinds = slices.DeleteFunc(m.kinds, func(k kind) bool { return !slices.Contains(shortKinds, k.name) })
	}
	r := rand.New(rand.NewPCG(5, 5))
	for i := range m.source {
		switch i / (192 << 10) % 3 {
		case 0:
			m.source[i] = byte(r.Uint32())
		case 1:
			m.source[i] = byte('a' + i/512%26)
		}
	}
	noise := make([]byte, 256<<10)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	disk := filepath.Join(m.job.Folder, "disk")
	m.write(t, filepath.Join("disk", "source.raw"), m.source)
	shell(t, disk, "qemu-img convert -f raw -O qcow2 source.raw v3base.qcow2")
	var cases strings.Builder
	for _, k := range m.kinds {
		for _, c := range k.commands {
			shell(t, disk, strings.ReplaceAll(c, "IMAGE", k.name+".qcow2"))
		}
		data, err := content(t, disk, k.name+".qcow2")
		if err != nil {
			t.Fatal(err)
		}
		m.before[k.name] = data
		fmt.Fprintf(&cases, "%s %d %x\n", k.name, len(data), md5.Sum(data))
		want := bytes.Clone(data)
		copy(want[257*4096:], noise[:4096])
		copy(want[3001*512:], noise[:3*512])
		copy(want[50*64<<10:], noise)
		clear(want[8<<20:][:1<<20])
		m.want[k.name] = want
	}
	m.job.Files = map[string]string{
		"job/cases": m.write(t, "cases", []byte(cases.String())),
		"job/noise": m.write(t, "noise", noise),
	}
	return m
}

// write makes a file in the job's folder.
func (m *matrix) write(t *testing.T, name string, data []byte) string {
	t.Helper()
	file := filepath.Join(m.job.Folder, name)
	if err := os.WriteFile(file, data, 0o666); err != nil {
		t.Fatal(err)
	}
	return file
}

func shell(t *testing.T, dir, command string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", command+" >&2")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// content returns what stock reads of an image.
func content(t *testing.T, dir, image string, options ...string) ([]byte, error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "raw")
	cmd := exec.Command("qemu-img", append(append([]string{"convert", "-f", "qcow2", "-O", "raw"}, options...), image, out)...)
	cmd.Dir = dir
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("converting %s: %w: %s", image, err, msg)
	}
	return os.ReadFile(out)
}

// log returns what the guest said.
func (m *matrix) log(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile(filepath.Join("../../out/vm", t.Name()+".log"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(log), "\r", "")
}

// sums returns the checksums of the disks as the guest read them after its writes.
func (m *matrix) sums(t *testing.T) map[string]string {
	t.Helper()
	sums := make(map[string]string)
	for _, s := range sumLine.FindAllStringSubmatch(m.log(t), -1) {
		sums[s[1]] = s[2]
	}
	return sums
}

// extract gets the images from the guest's disk.
func (m *matrix) extract(t *testing.T) {
	t.Helper()
	m.after = filepath.Join(m.job.Folder, "after")
	if err := os.Mkdir(m.after, 0o777); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(filepath.Join(m.job.Folder, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := Extract(m.job, "/"+f.Name(), filepath.Join(m.after, f.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// check returns what qemu-img check says of an image, in one line, and whether it is content.
func (m *matrix) check(name string) (string, bool) {
	cmd := exec.Command("qemu-img", "check", name+".qcow2")
	cmd.Dir = m.after
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "errors were found") || strings.Contains(line, "leaked clusters were") {
			return strings.TrimSpace(line), err == nil
		}
	}
	return strings.TrimSpace(string(out)), err == nil
}

// TestMatrix serves an image of every kind and judges content, changes and images by the host's tools.
func TestMatrix(t *testing.T) {
	vm := machine(t)
	m := newMatrix(t)
	run(t, vm, m.job)
	sums := m.sums(t)
	m.extract(t)
	for _, k := range m.kinds {
		if sums[k.name] != fmt.Sprintf("%x", md5.Sum(m.want[k.name])) {
			t.Errorf("%s: the disk read something else in the guest than was written", k.name)
		}
		if got, err := content(t, m.after, k.name+".qcow2"); err != nil || !bytes.Equal(got, m.want[k.name]) {
			t.Errorf("%s: qemu-img reads something else than was written (%v)", k.name, err)
		}
		if said, ok := m.check(k.name); !ok {
			t.Errorf("%s: qemu-img check: %s", k.name, said)
		}
	}
	if got, err := content(t, m.after, "snapshot.qcow2", "-l", "before"); err != nil || !bytes.Equal(got, m.source) {
		t.Errorf("the snapshot changed with the disk (%v)", err)
	}
}

var rowLine = regexp.MustCompile(`(?m)^ROW (\S+) (\S+) (\S+) (\S+)`)

// TestMatrixOfRunner has tcmu-runner serve the same images, and writes down what becomes of them: out/vm/matrix.md. It judges nothing but that the comparison took place, and runs with DROVER_VM=runner alone: the image with
// refcounts of 64 bits kills tcmu-runner, and what waits for it then waits long.
func TestMatrixOfRunner(t *testing.T) {
	if os.Getenv("DROVER_VM") != "runner" {
		t.Skip("looks at tcmu-runner alone: set DROVER_VM=runner")
	}
	vm := machine(t)
	m := newMatrix(t)
	m.job.withTools(t)
	m.job.Files["job/params"] = m.write(t, "params", []byte("RUNNER=yes\n"))
	run(t, vm, m.job)
	sums := m.sums(t)
	m.extract(t)
	rows := make(map[string][]string)
	for _, r := range rowLine.FindAllStringSubmatch(m.log(t), -1) {
		rows[r[1]] = r[2:]
	}
	var b strings.Builder
	b.WriteString("| image | opened | content | written | read again | image by stock | `qemu-img check` |\n|---|---|---|---|---|---|---|\n")
	judge := func(ok bool) string {
		if ok {
			return "ok"
		}
		return "**wrong**"
	}
	for _, k := range m.kinds {
		row := rows[k.name]
		if row == nil {
			t.Errorf("%s was not tried", k.name)
			continue
		}
		if row[0] != "ok" {
			fmt.Fprintf(&b, "| %s | %s | | | | | |\n", k.name, row[0])
			continue
		}
		got, err := content(t, m.after, k.name+".qcow2")
		said, _ := m.check(k.name)
		fmt.Fprintf(&b, "| %s | ok | %s | %s | %s | %s | %s |\n", k.name, row[1], row[2],
			judge(sums[k.name] == fmt.Sprintf("%x", md5.Sum(m.want[k.name]))), judge(err == nil && bytes.Equal(got, m.want[k.name])), said)
	}
	got, err := content(t, m.after, "snapshot.qcow2", "-l", "before")
	fmt.Fprintf(&b, "\nThe snapshot's content after the writes: %s.\n", judge(err == nil && bytes.Equal(got, m.source)))
	t.Log("\n" + b.String())
	if err := os.WriteFile("../../out/vm/matrix.md", []byte(b.String()), 0o666); err != nil {
		t.Fatal(err)
	}
}
