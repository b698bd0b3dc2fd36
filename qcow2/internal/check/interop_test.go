package check

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// run runs one of QEMU's tools; the test is skipped if it is not installed.
func run(t testing.TB, tool string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("%s is not installed", tool)
	}
	cmd := exec.Command(tool, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func mustRun(t testing.TB, tool string, args ...string) {
	t.Helper()
	for range 10 {
		_, stderr, code := run(t, tool, args...)
		if code == 0 {
			return
		}
		if !strings.Contains(stderr, "Unable to get accurate CPU usage") { // LUKS on a host that is too fast
			t.Fatalf("%s %s: exit code %d: %s", tool, strings.Join(args, " "), code, stderr)
		}
	}
	t.Skip("qemu-img cannot measure this host")
}

// recipe makes an image: options of create, commands of qemu-io, then whole command lines of qemu-img in which @ is the
// image.
type recipe struct {
	name   string
	create string
	io     []string
	img    []string
	after  []string // more commands of qemu-io
}

func (r recipe) make(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, strings.Map(fileChar, r.name)+".qcow2")
	args := strings.Fields("create -q -f qcow2 " + strings.ReplaceAll(r.create, "@", path))
	last := len(args) - 1
	mustRun(t, "qemu-img", append(append(args[:last:last], path), args[last])...)
	write := func(commands []string) {
		if len(commands) == 0 {
			return
		}
		args := []string{"-f", "qcow2"}
		if strings.Contains(r.create, "encrypt") {
			args = []string{"--object", "secret,id=s,data=x", "--image-opts"}
			path = "driver=qcow2,encrypt.key-secret=s,file.filename=" + path
		}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		mustRun(t, "qemu-io", append(args, path)...)
		path = path[strings.LastIndex(path, "=")+1:]
	}
	write(r.io)
	for _, line := range r.img {
		mustRun(t, "qemu-img", strings.Fields(strings.ReplaceAll(line, "@", path))...)
	}
	write(r.after)
	return path
}

func fileChar(r rune) rune {
	if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
		return r
	}
	return '-'
}

// numbers is what qemu-img check prints; what it leaves out is 0.
type numbers struct {
	CheckErrors int64 `json:"check-errors"`
	Corruptions int64 `json:"corruptions"`
	Leaks       int64 `json:"leaks"`
	End         int64 `json:"image-end-offset"`
	Total       int64 `json:"total-clusters"`
	Allocated   int64 `json:"allocated-clusters"`
	Fragmented  int64 `json:"fragmented-clusters"`
	Compressed  int64 `json:"compressed-clusters"`
}

func numbersOf(r *Report) numbers {
	return numbers{r.CheckErrors, r.Corruptions, r.Leaks, r.ImageEndOffset, r.TotalClusters, r.AllocatedClusters,
		r.FragmentedClusters, r.CompressedClusters}
}

// exitCode is qemu-img's exit code for a report.
func (n numbers) exitCode() int {
	switch {
	case n.CheckErrors > 0:
		return 1
	case n.Corruptions > 0:
		return 2
	case n.Leaks > 0:
		return 3
	}
	return 0
}

// stock returns what qemu-img check says. ok is false if it did not come to an end.
func stock(t testing.TB, path string, luks bool) (n numbers, messages string, code int, ok bool) {
	t.Helper()
	args := []string{"check", "--output=json"}
	if luks {
		args = append(args, "--object", "secret,id=s,data=x", "--image-opts",
			"driver=qcow2,encrypt.key-secret=s,file.filename="+path)
	} else {
		args = append(args, "-f", "qcow2", path)
	}
	stdout, stderr, code := run(t, "qemu-img", args...)
	if code < 0 {
		return n, stderr, code, false // it crashed
	}
	if err := json.Unmarshal([]byte(stdout), &n); err != nil {
		return n, stderr, code, false
	}
	return n, stderr, code, true
}

// memory returns a file with the given content.
func memory(t testing.TB, b []byte) storage.File {
	t.Helper()
	f := storage.NewMemFile("test image")
	if len(b) > 0 {
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// agree checks a file with both and compares the numbers. It returns our report.
func agree(t *testing.T, path string, luks bool) *Report {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := Run(context.Background(), memory(t, b), Options{})
	if err != nil {
		t.Fatal(err)
	}
	want, messages, code, ok := stock(t, path, luks)
	if !ok {
		t.Fatalf("qemu-img check ends with %d: %s", code, messages)
	}
	if got := numbersOf(rep); got != want {
		t.Errorf("Run says    %+v\nqemu-img says %+v\nours:\n%s\nqemu-img:\n%.3000s", got, want, texts(rep), messages)
	}
	if got := numbersOf(rep).exitCode(); got != code {
		t.Errorf("exit code would be %d, qemu-img's is %d", got, code)
	}
	return rep
}

func texts(r *Report) string {
	var b strings.Builder
	for i, f := range r.Findings {
		if i == 20 {
			fmt.Fprintf(&b, "... and %d more", len(r.Findings)-20)
			break
		}
		fmt.Fprintf(&b, "%s: %s\n", f.Kind, f.Message)
	}
	return b.String()
}

func soundImages() []recipe {
	some := []string{"write -P 1 0 200k", "write -P 2 1M 64k", "write -z 2M 128k", "write -P 3 3M 512k", "discard 3M 64k"}
	var list []recipe
	for cb := format.MinClusterBits; cb <= format.MaxClusterBits; cb++ {
		list = append(list, recipe{name: fmt.Sprintf("cluster bits %d", cb),
			create: fmt.Sprintf("-o cluster_size=%d 10M", 1<<cb), io: some})
	}
	for bits := 1; bits <= 64; bits *= 2 {
		r := recipe{name: fmt.Sprintf("refcount bits %d", bits), create: fmt.Sprintf("-o cluster_size=4k,refcount_bits=%d 10M", bits),
			io: some, after: []string{"write -P 9 100k 300k"}}
		if bits > 1 {
			r.img = []string{"snapshot -c one @"}
		}
		list = append(list, r)
	}
	snaps := []string{"snapshot -c one @", "snapshot -c two @", "snapshot -c three @", "snapshot -d two @", "snapshot -a one @"}
	return append(list,
		recipe{name: "empty", create: "1G"},
		recipe{name: "size 0", create: "0"},
		recipe{name: "odd size", create: "1000"},
		recipe{name: "many tables", create: "-o cluster_size=512 20M", io: []string{"write 0 20M"}},
		recipe{name: "small blocks", create: "-o cluster_size=512,refcount_bits=64 20M", io: []string{"write 0 1M", "write 10M 3M"}},
		recipe{name: "version 2", create: "-o compat=0.10 10M", io: []string{"write 0 1M", "discard 0 64k", "write 5M 1M"}, img: snaps},
		recipe{name: "snapshots", create: "10M", io: some, img: snaps, after: []string{"write -P 7 0 1M"}},
		recipe{name: "compressed", create: "10M", io: []string{"write -P 1 -c 0 64k", "write -P 2 -c 64k 64k", "write 128k 64k",
			"write -P 3 -c 1M 64k"}, img: []string{"snapshot -c one @"}},
		recipe{name: "compressed zstd", create: "-o compression_type=zstd,cluster_size=2M 10M", io: []string{"write -c 0 2M",
			"write -c 4M 2M"}},
		recipe{name: "compressed small", create: "-o cluster_size=512 1M", io: []string{"write -c 0 512", "write -c 512 512",
			"write 4k 1k"}},
		recipe{name: "extended", create: "-o extended_l2=on,cluster_size=16k 10M", io: append(some, "write 4M 512", "write -z 5M 1k",
			"write -c 6M 16k")},
		recipe{name: "extended snapshots", create: "-o extended_l2=on 10M", io: some, img: snaps, after: []string{"write 0 2k"}},
		recipe{name: "bitmaps", create: "1G", io: some, img: []string{"bitmap --add @ one", "bitmap --add -g 512 @ two"},
			after: []string{"write 0 1M"}},
		recipe{name: "luks", create: "--object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 10M",
			io: []string{"write 0 1M"}},
		recipe{name: "data file", create: "-o data_file=@.data 10M", io: []string{"write 0 1M", "write -z 2M 64k"}},
		recipe{name: "raw data file", create: "-o data_file=@.data,data_file_raw=on 10M", io: []string{"write 0 1M"}},
		recipe{name: "preallocated", create: "-o preallocation=metadata 20M"},
		recipe{name: "lazy", create: "-o lazy_refcounts=on 10M", io: some},
		recipe{name: "grown", create: "-o cluster_size=512 1M", img: []string{"resize -q @ 300M"}, after: []string{"write 200M 1M"}},
		recipe{name: "shrunk", create: "20M", io: []string{"write 0 20M"}, img: []string{"resize -q --shrink @ 1M"}},
		recipe{name: "vm state", create: "1M", after: []string{"write -b 1M 1M"}},
	)
}

func TestSoundImages(t *testing.T) {
	if testing.Short() {
		t.Skip("one client after another: the long form shows it")
	}
	dir := t.TempDir()
	for _, r := range soundImages() {
		t.Run(r.name, func(t *testing.T) {
			rep := agree(t, r.make(t, dir), strings.Contains(r.create, "luks"))
			if !rep.Clean() || len(rep.Findings) != 0 {
				t.Errorf("a sound image has faults:\n%s", texts(rep))
			}
		})
	}
}

func TestBackingFile(t *testing.T) {
	dir := t.TempDir()
	base := recipe{name: "base", create: "10M", io: []string{"write 0 3M"}}.make(t, dir)
	top := recipe{name: "top", create: "-F qcow2 -b " + base + " 10M", io: []string{"write 1M 512", "write 5M 64k"}}.make(t, dir)
	if rep := agree(t, top, false); !rep.Clean() {
		t.Errorf("an image with a backing file has faults:\n%s", texts(rep))
	}
}

func TestCrashedLazyImage(t *testing.T) {
	dir := t.TempDir()
	path := recipe{name: "crash", create: "-o lazy_refcounts=on 10M"}.make(t, dir)
	run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "flush", "-c", "sigraise 9", path)
	rep := agree(t, path, false)
	if !rep.Dirty || rep.Corruptions == 0 || !rep.Rebuild {
		t.Errorf("dirty %v, corruptions %d, rebuild %v; want a dirty image without its refcounts", rep.Dirty, rep.Corruptions, rep.Rebuild)
	}
}

// bytesOf is an image in memory with helpers to find and to damage its parts.
type bytesOf struct {
	t testing.TB
	b []byte
	h *format.Header
	l format.Layout
}

func load(t testing.TB, path string) *bytesOf {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parseImage(t, b)
}

func parseImage(t testing.TB, b []byte) *bytesOf {
	t.Helper()
	h, err := format.ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	return &bytesOf{t: t, b: b, h: h, l: h.Layout()}
}

func (x *bytesOf) word(off format.HostOff) uint64 { return binary.BigEndian.Uint64(x.b[off:]) }

func (x *bytesOf) set(off format.HostOff, v uint64) {
	for len(x.b) < int(off)+8 {
		x.b = append(x.b, 0)
	}
	binary.BigEndian.PutUint64(x.b[off:], v)
}

func (x *bytesOf) set32(off format.HostOff, v uint32) { binary.BigEndian.PutUint32(x.b[off:], v) }

// xor flips bits of a word.
func (x *bytesOf) xor(off format.HostOff, v uint64) { x.set(off, x.word(off)^v) }

// l1 returns where entry i of the active L1 table is.
func (x *bytesOf) l1(i int64) format.HostOff { return x.h.L1Offset + format.HostOff(8*i) }

// l2 returns where the entry for a guest offset is.
func (x *bytesOf) l2(off format.GuestOff) format.HostOff {
	x.t.Helper()
	table := format.L1Entry(x.word(x.l1(x.l.L1Index(off)))).Offset()
	if table == 0 {
		x.t.Fatalf("guest offset %#x has no L2 table", off)
	}
	return table + format.HostOff(x.l.L2Index(off)*x.l.L2EntrySize())
}

// refEntry returns where entry i of the refcount table is, block where the block is.
func (x *bytesOf) refEntry(i int64) format.HostOff { return x.h.RefTableOffset + format.HostOff(8*i) }

func (x *bytesOf) block(i int64) format.HostOff {
	return format.RefTableEntry(x.word(x.refEntry(i))).Offset()
}

// refcount sets the refcount of the cluster that holds off.
func (x *bytesOf) refcount(off format.HostOff, v uint64) {
	c := x.l.Cluster(off)
	block := x.b[x.block(x.l.RefTableIndex(c)):][:x.l.ClusterSize()]
	x.l.SetRefcount(block, x.l.RefBlockIndex(c), v)
}

// data returns where the data of a guest offset is.
func (x *bytesOf) data(off format.GuestOff) format.HostOff {
	return format.L2Entry(x.word(x.l2(off))).HostOffset()
}

func (x *bytesOf) end() format.HostOff {
	return format.HostOff(x.l.ClustersFor(int64(len(x.b)))) << x.l.ClusterBits
}

// The guest offsets that richImage uses.
const (
	atData       = 0       // 64 KiB of data, then one cluster apart
	atCompressed = 1 << 20 // two compressed clusters
	atZero       = 2 << 20 // a plain zero cluster
	atZeroAlloc  = 3 << 20 // a zero cluster with a host cluster
	atShared     = 5 << 20 // 64 KiB, shared with the snapshots
)

func richImage(cluster int) recipe {
	return recipe{
		name:   fmt.Sprintf("rich %d", cluster),
		create: fmt.Sprintf("-o cluster_size=%d 10M", cluster),
		io:     []string{"write -P 5 5M 128k"},
		img:    []string{"snapshot -c one @", "snapshot -c two @", "bitmap --add -g 512 @ b"},
		after: []string{"write -P 1 0 128k", fmt.Sprintf("write -P 2 -c 1M %d", cluster),
			fmt.Sprintf("write -P 3 -c %d %d", 1<<20+cluster, cluster), fmt.Sprintf("write -z 2M %d", cluster),
			fmt.Sprintf("write -P 4 3M %d", cluster), fmt.Sprintf("write -z 3M %d", cluster)},
	}
}

// damage is one way to break an image.
type damage struct {
	name  string
	do    func(x *bytesOf)
	clean bool // the damage is none for a check
	// ours is set where the check does better than qemu-img, which then gives up: the exit code of our report.
	ours int
}

// richDamages apply to richImage of any cluster size.
var richDamages = []damage{
	{name: "none", do: func(x *bytesOf) {}, clean: true},
	{name: "L1 reserved low bit", do: func(x *bytesOf) { x.xor(x.l1(0), 1) }},
	{name: "L1 reserved high bit", do: func(x *bytesOf) { x.xor(x.l1(0), 1<<56) }},
	{name: "L1 entry lost", do: func(x *bytesOf) { x.set(x.l1(0), 0) }},
	{name: "L1 without COPIED", do: func(x *bytesOf) { x.xor(x.l1(0), 1<<63) }},
	{name: "L1 entry unaligned", do: func(x *bytesOf) { x.xor(x.l1(0), 0x200) }},
	{name: "L1 entry past the end", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63|uint64(x.end()+1<<30)) }},
	{name: "L1 entry just past the end", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63|uint64(x.end())) }},
	{name: "L1 entry at the last offset", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63|(1<<56-uint64(x.l.ClusterSize()))) }},
	{name: "L1 entry with only COPIED", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63) }},
	{name: "L1 entry with only a reserved bit", do: func(x *bytesOf) { x.set(x.l1(0), 4) }},
	{name: "L1 entry points to the refcount table", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63|uint64(x.h.RefTableOffset)) }},
	{name: "L1 entry points to a refcount block", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63|uint64(x.block(0))) }},
	{name: "L1 entry points to the L1 table", do: func(x *bytesOf) { x.set(x.l1(0), 1<<63|uint64(x.h.L1Offset)) }},
	{name: "L2 reserved low bit", do: func(x *bytesOf) { x.xor(x.l2(atData), 2) }},
	{name: "L2 reserved high bit", do: func(x *bytesOf) { x.xor(x.l2(atData), 1<<61) }},
	{name: "L2 reserved bit in an empty entry", do: func(x *bytesOf) { x.set(x.l2(atZero), 1<<60) }},
	{name: "L2 without COPIED", do: func(x *bytesOf) { x.xor(x.l2(atData), 1<<63) }},
	{name: "L2 with COPIED on a shared cluster", do: func(x *bytesOf) { x.xor(x.l2(atShared), 1<<63) }},
	{name: "L2 entry lost", do: func(x *bytesOf) { x.set(x.l2(atData), 0) }},
	{name: "L2 entry unaligned", do: func(x *bytesOf) { x.xor(x.l2(atData), 0x200) }},
	{name: "L2 zero entry unaligned", do: func(x *bytesOf) { x.xor(x.l2(atZeroAlloc), 0x200) }},
	{name: "L2 entry past the end", do: func(x *bytesOf) { x.set(x.l2(atData), 1<<63|uint64(x.end()+1<<40)) }},
	{name: "L2 entry just past the end", do: func(x *bytesOf) { x.set(x.l2(atData), 1<<63|uint64(x.end())) }},
	{name: "L2 entry in an incomplete cluster at the end", do: func(x *bytesOf) {
		end := x.end()
		x.b = append(x.b, make([]byte, int(end)-len(x.b)+3)...)
		x.set(x.l2(atData), 1<<63|uint64(end))
	}},
	{name: "two L2 entries share a cluster", do: func(x *bytesOf) { x.set(x.l2(atData), x.word(x.l2(atData+64<<10))) }},
	{name: "zero entry with COPIED", do: func(x *bytesOf) { x.set(x.l2(atZero), 1<<63|1) }, clean: true},
	{name: "L2 entry points to an L2 table", do: func(x *bytesOf) { x.set(x.l2(atData), x.word(x.l1(0))) }},
	{name: "L2 entry points to a refcount block", do: func(x *bytesOf) { x.set(x.l2(atData), 1<<63|uint64(x.block(0))) }},
	{name: "compressed with COPIED", do: func(x *bytesOf) { x.xor(x.l2(atCompressed), 1<<63) }},
	{name: "compressed past the end", do: func(x *bytesOf) { x.set(x.l2(atCompressed), 1<<62|uint64(x.end()+5<<20)) }},
	{name: "compressed of the greatest length", do: func(x *bytesOf) {
		x.set(x.l2(atCompressed), x.word(x.l2(atCompressed))|(1<<(x.l.ClusterBits-8)-1)<<(70-x.l.ClusterBits))
	}},
	{name: "compressed from nowhere", do: func(x *bytesOf) { x.set(x.l2(atZero), 1<<62) }},
	{name: "compressed, all bits", do: func(x *bytesOf) { x.set(x.l2(atZero), 1<<63-1) }},
	{name: "all bits", do: func(x *bytesOf) { x.set(x.l2(atZero), 1<<64-1) }},
	{name: "an L2 table of noise", do: func(x *bytesOf) {
		table := x.b[x.l2(0):][:x.l.ClusterSize()]
		for i := range table {
			table[i] = byte(i*7 + i>>8*13)
		}
	}},
	{name: "refcount too high", do: func(x *bytesOf) { x.refcount(x.data(atData), 2) }},
	{name: "refcount much too high", do: func(x *bytesOf) { x.refcount(x.data(atData), 65535) }},
	{name: "refcount too low", do: func(x *bytesOf) { x.refcount(x.data(atShared), 2) }},
	{name: "refcount 0", do: func(x *bytesOf) { x.refcount(x.data(atData), 0) }},
	{name: "refcount of the header 0", do: func(x *bytesOf) { x.refcount(0, 0) }},
	{name: "refcount of the L1 table 2", do: func(x *bytesOf) { x.refcount(x.h.L1Offset, 2) }},
	{name: "refcount of an L2 table 2", do: func(x *bytesOf) { x.refcount(x.l2(atData), 2) }},
	{name: "refcount of a block 0", do: func(x *bytesOf) { x.refcount(x.block(0), 0) }},
	{name: "refcount of nothing", do: func(x *bytesOf) { x.refcount(x.end(), 1) }, clean: true},
	{name: "refcount far beyond the end", do: func(x *bytesOf) { x.refcount(x.end()+format.HostOff(100*x.l.ClusterSize()), 1) }, clean: true},
	{name: "a cluster without a reference", do: func(x *bytesOf) {
		x.b = append(x.b, make([]byte, 3*x.l.ClusterSize())...)
		x.refcount(format.HostOff(len(x.b)-1), 1)
	}},
	{name: "refcount block lost", do: func(x *bytesOf) { x.set(x.refEntry(0), 0) }},
	{name: "refcount block unaligned", do: func(x *bytesOf) { x.xor(x.refEntry(0), 0x200) }},
	{name: "refcount table reserved bits", do: func(x *bytesOf) { x.xor(x.refEntry(0), 1) }},
	{name: "refcount block past the end", do: func(x *bytesOf) { x.set(x.refEntry(0), uint64(x.end()+1<<30)) }},
	{name: "refcount block just past the end", do: func(x *bytesOf) { x.set(x.refEntry(3), uint64(x.end())) }},
	{name: "refcount block at the largest offset", do: func(x *bytesOf) { x.set(x.refEntry(3), -uint64(x.l.ClusterSize())) }},
	{name: "refcount block used twice", do: func(x *bytesOf) { x.set(x.refEntry(5), x.word(x.refEntry(0))) }},
	{name: "refcount block in a data cluster", do: func(x *bytesOf) { x.set(x.refEntry(5), uint64(x.data(atData))) }},
	{name: "refcount block in the header", do: func(x *bytesOf) { x.set(x.refEntry(0), 0x100) }},
	{name: "refcount table past the end", do: func(x *bytesOf) { x.set(format.OffRefTable, uint64(x.end())) }},
	{name: "refcount table longer than it is", do: func(x *bytesOf) { x.set32(format.OffRefTable+8, 2) }},
	{name: "no refcount table", do: func(x *bytesOf) { x.set32(format.OffRefTable+8, 0) }},
	{name: "L1 table past the end", do: func(x *bytesOf) { x.set(format.OffL1+4, uint64(x.end()+1<<20)) }},
	{name: "L1 table larger than needed", do: func(x *bytesOf) { x.set32(format.OffL1, x.h.L1Size+3) }, clean: true},
	{name: "L1 table in the refcount block", do: func(x *bytesOf) { x.set(format.OffL1+4, uint64(x.block(0))) }},
	{name: "snapshots forgotten", do: func(x *bytesOf) { x.set32(format.OffSnapshots, 0) }},
	{name: "one snapshot forgotten", do: func(x *bytesOf) { x.set32(format.OffSnapshots, 1) }},
	{name: "more snapshots than there are", do: func(x *bytesOf) { x.set32(format.OffSnapshots, 9) }},
	{name: "snapshot table past the end", do: func(x *bytesOf) { x.set(format.OffSnapshots+4, uint64(x.end()+1<<30)) }},
	{name: "snapshot L1 unaligned", do: func(x *bytesOf) { x.xor(x.h.SnapshotsOffset, 0x100) }},
	{name: "snapshot L1 too large", do: func(x *bytesOf) { x.set32(x.h.SnapshotsOffset+8, 0x400001) }},
	{name: "snapshot L1 larger than the file", do: func(x *bytesOf) { x.set32(x.h.SnapshotsOffset+8, 0x100000) }},
	{name: "snapshot L1 past the end", do: func(x *bytesOf) { x.set(x.h.SnapshotsOffset, uint64(x.end()+1<<30)) }},
	{name: "snapshot L1 of no entries", do: func(x *bytesOf) { x.set32(x.h.SnapshotsOffset+8, 0) }},
	{name: "snapshot uses the active L1", do: func(x *bytesOf) { x.set(x.h.SnapshotsOffset, uint64(x.h.L1Offset)) }},
	{name: "snapshot L1 reserved bits", do: func(x *bytesOf) { x.xor(format.HostOff(x.word(x.h.SnapshotsOffset)), 1<<57) }},
	{name: "snapshot without extra data", do: func(x *bytesOf) { x.set32(x.h.SnapshotsOffset+36, 8) }},
	{name: "snapshot with too much extra data", do: func(x *bytesOf) { x.set32(x.h.SnapshotsOffset+36, 1025) }},
	{name: "too many snapshots", do: func(x *bytesOf) { x.set32(format.OffSnapshots, 65537) }},
	{name: "snapshot table unaligned", do: func(x *bytesOf) { x.xor(format.OffSnapshots+4, 8) }},
	{name: "bitmaps forgotten", do: func(x *bytesOf) { x.set(format.OffAutoclear, 0) }},
	{name: "bitmap cluster lost", do: func(x *bytesOf) { x.set(bitmapTable(x), 0) }},
	{name: "bitmap cluster all ones", do: func(x *bytesOf) { x.set(bitmapTable(x), 1) }},
	{name: "bitmap cluster is data", do: func(x *bytesOf) { x.set(bitmapTable(x), uint64(x.data(atData))) }},
	{name: "bitmap cluster past the end", do: func(x *bytesOf) { inUse(x); x.set(bitmapTable(x), uint64(x.end()+1<<30)) }},
	{name: "bitmap table entry reserved", do: func(x *bytesOf) { inUse(x); x.xor(bitmapTable(x), 4) }, ours: 2},
	{name: "bitmap table is the L1 table", do: func(x *bytesOf) { inUse(x); x.set(x.h.Bitmaps.DirectoryOffset, uint64(x.h.L1Offset)) }, ours: 2},
	{name: "bitmap table past the end", do: func(x *bytesOf) { inUse(x); x.set(x.h.Bitmaps.DirectoryOffset, uint64(x.end()+1<<30)) }},
	{name: "bitmap directory broken", do: func(x *bytesOf) { x.xor(x.h.Bitmaps.DirectoryOffset, 1) }, ours: 2},
	{name: "dirty", do: func(x *bytesOf) { x.xor(format.OffIncompat, format.IncompatDirty) }, clean: true},
	{name: "corrupt", do: func(x *bytesOf) { x.xor(format.OffIncompat, format.IncompatCorrupt) }, clean: true},
	{name: "half of the file", do: func(x *bytesOf) { x.b = x.b[:len(x.b)/2] }, ours: 2},
	{name: "only the header", do: func(x *bytesOf) { x.b = x.b[:x.l.ClusterSize()] }, ours: 2},
}

// bitmapTable returns where the table of the first bitmap is.
func bitmapTable(x *bytesOf) format.HostOff {
	return format.HostOff(x.word(x.h.Bitmaps.DirectoryOffset))
}

// inUse marks the first bitmap as in use, so that opening the image does not read it.
func inUse(x *bytesOf) { x.b[x.h.Bitmaps.DirectoryOffset+15] |= 1 }

func TestDamage(t *testing.T) {
	testDamages(t, richImage(4096), richDamages)
	var few []damage // with another cluster size, a part of them
	for i := 0; i < len(richDamages); i += 4 {
		few = append(few, richDamages[i])
	}
	testDamages(t, richImage(65536), few)
	testDamages(t, recipe{name: "extended", create: "-o extended_l2=on,cluster_size=16k 10M",
		io: []string{"write 0 8k", "write 1M 16k", "write -z 2M 2k", "write -c 3M 16k"}}, []damage{
		{name: "data and zero", do: func(x *bytesOf) { x.xor(x.l2(0)+8, 1<<32) }},
		{name: "data without a cluster", do: func(x *bytesOf) { x.xor(x.l2(2<<20)+8, 1<<20) }},
		{name: "bitmap beside a compressed cluster", do: func(x *bytesOf) { x.xor(x.l2(3<<20)+8, 1) }},
		{name: "bit 0", do: func(x *bytesOf) { x.xor(x.l2(0), 1) }, clean: true},
		{name: "bit 0 of an empty entry", do: func(x *bytesOf) { x.xor(x.l2(2<<20), 1) }, clean: true},
		{name: "unaligned", do: func(x *bytesOf) { x.xor(x.l2(0), 0x200) }},
		{name: "unaligned without data", do: func(x *bytesOf) { x.xor(x.l2(0), 0x200); x.set(x.l2(0)+8, 0) }},
		{name: "unaligned, data and zero", do: func(x *bytesOf) { x.xor(x.l2(0), 0x200); x.set(x.l2(0)+8, 1<<32|1) }},
		{name: "no COPIED", do: func(x *bytesOf) { x.xor(x.l2(0), 1<<63) }},
		{name: "all ones", do: func(x *bytesOf) { x.set(x.l2(2<<20), 1<<64-1); x.set(x.l2(2<<20)+8, 1<<64-1) }},
	})
	testDamages(t, recipe{name: "data file", create: "-o data_file=@.data 10M", io: []string{"write 0 1M"}}, []damage{
		{name: "no COPIED", do: func(x *bytesOf) { x.xor(x.l2(64<<10), 1<<63) }},
		{name: "no COPIED at 0", do: func(x *bytesOf) { x.xor(x.l2(0), 1<<63) }, clean: true},
		{name: "compressed", do: func(x *bytesOf) { x.set(x.l2(0), 1<<62|0x50000) }},
		{name: "unaligned", do: func(x *bytesOf) { x.xor(x.l2(0), 0x200) }},
		{name: "another offset", do: func(x *bytesOf) { x.xor(x.l2(0), 1<<40) }, clean: true},
		{name: "snapshots", do: func(x *bytesOf) {
			x.set32(format.OffSnapshots, 2)
			x.set(format.OffSnapshots+4, uint64(x.end()))
		}},
	})
	testDamages(t, recipe{name: "version 2", create: "-o compat=0.10 10M", io: []string{"write 0 1M"}, img: []string{"snapshot -c s @"}}, []damage{
		{name: "zero cluster", do: func(x *bytesOf) { x.set(x.l2(5<<20), 1) }, clean: true},
		{name: "snapshot without extra data", do: func(x *bytesOf) { x.set32(x.h.SnapshotsOffset+36, 0) }, clean: true},
	})
	testDamages(t, recipe{name: "1 bit", create: "-o refcount_bits=1,cluster_size=512 1M", io: []string{"write 0 64k"}}, []damage{
		{name: "overflow", do: func(x *bytesOf) { x.set(x.l2(0), x.word(x.l2(512))); x.set(x.l2(1024), x.word(x.l2(512))) }},
		{name: "refcount 0", do: func(x *bytesOf) { x.refcount(x.data(0), 0) }},
	})
}

func testDamages(t *testing.T, r recipe, damages []damage) {
	dir := t.TempDir()
	path := r.make(t, dir)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range damages {
		t.Run(r.name+"/"+d.name, func(t *testing.T) {
			x := parseImage(t, bytes.Clone(good))
			d.do(x)
			if err := os.WriteFile(path, x.b, 0o600); err != nil {
				t.Fatal(err)
			}
			compareDamage(t, path, x.b, d)
		})
	}
}

func compareDamage(t *testing.T, path string, b []byte, d damage) {
	rep, err := Run(context.Background(), memory(t, b), Options{})
	want, messages, code, ok := stock(t, path, false)
	switch {
	case d.ours != 0:
		if ok || code == 0 {
			t.Errorf("qemu-img comes to an end, with %d: %+v\n%s", code, want, messages)
		}
		if err != nil || numbersOf(rep).exitCode() != d.ours {
			t.Errorf("Run: %v, %+v, want exit code %d\n%s", err, rep, d.ours, texts(rep))
		}
	case !ok:
		if err == nil {
			t.Errorf("Run says %+v; qemu-img gives up: %s\n%s", numbersOf(rep), messages, texts(rep))
		}
	case err != nil:
		t.Errorf("Run: %v; qemu-img says %+v %s", err, want, messages)
	default:
		if got := numbersOf(rep); got != want || got.exitCode() != code {
			t.Errorf("Run says      %+v\nqemu-img says %+v\nours:\n%s\nqemu-img:\n%.3000s", got, want, texts(rep), messages)
		}
		if rep.Clean() != d.clean {
			t.Errorf("clean: %v, want %v\n%s", rep.Clean(), d.clean, texts(rep))
		}
		compareMessages(t, rep, messages)
	}
}

// compareMessages checks that what both print in the same words is the same in number too.
func compareMessages(t *testing.T, rep *Report, messages string) {
	t.Helper()
	if rep.FindingsDropped > 0 {
		return
	}
	for _, words := range []string{"Leaked cluster", "OFLAG_COPIED", "reserved bits set", "exceeding the end", "not cluster aligned",
		"not properly aligned", "overflow cluster", "outside image", "copied flag must never"} {
		ours := 0
		for _, f := range rep.Findings {
			if strings.Contains(f.Message, words) {
				ours += int(f.Times)
			}
		}
		if stock := strings.Count(messages, words); ours != stock {
			t.Errorf("%q: %d times, qemu-img %d times", words, ours, stock)
		}
	}
	for _, f := range rep.Findings {
		if (f.Kind == Leak || strings.Contains(f.Message, "OFLAG")) && !strings.Contains(messages, f.Message) {
			t.Errorf("qemu-img does not say %q", f.Message)
		}
	}
}
