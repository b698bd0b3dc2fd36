package cli

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// holey makes an image with holes in the front and a snapshot, and its disk as a raw file.
func holey(t *testing.T) {
	t.Helper()
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "64M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 16M", "-c", "write -P 2 20M 10M", "-c", "discard 0 15M", "disk")
	mustDrover(t, "snapshot", "-c", "s", "disk")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 22M 1M", "-c", "write -z 25M 1M", "-c", "write -P 4 40M 64k", "disk")
	mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "disk", "disk.raw")
	mustTool(t, "qemu-img", "convert", "-l", "s", "-f", "qcow2", "-O", "raw", "disk", "s.raw")
}

// sameDisks compares the disk and its snapshot with what they were, by stock's word.
func sameDisks(t *testing.T) {
	t.Helper()
	mustTool(t, "qemu-img", "check", "-q", "disk")
	mustTool(t, "qemu-img", "compare", "-q", "disk", "disk.raw")
	mustTool(t, "qemu-img", "convert", "-l", "s", "-f", "qcow2", "-O", "raw", "disk", "again.raw")
	mustTool(t, "qemu-img", "compare", "-q", "again.raw", "s.raw")
}

func TestCompactCommand(t *testing.T) {
	holey(t)
	before := fileSize(t, "disk")
	o := drover(t, "compact", "-n", "disk")
	if o.code != 0 || !strings.Contains(o.stdout, "would become") || fileSize(t, "disk") != before {
		t.Fatalf("%+v", o)
	}
	var dry, done compactResult
	decode(t, mustDrover(t, "compact", "--dry-run", "--output=json", "disk"), &dry)
	decode(t, mustDrover(t, "compact", "--output=json", "disk"), &done)
	if after := fileSize(t, "disk"); !dry.DryRun || dry.NewSize != done.NewSize || done.NewSize != after || after > before-13<<20 {
		t.Fatalf("%+v, then %+v; the file has %d bytes", dry, done, after)
	}
	sameDisks(t)
	if o := drover(t, "compact", "disk"); o.code != 0 || !strings.Contains(o.stdout, "no space to be reclaimed") {
		t.Fatalf("%+v", o)
	}
	if o := drover(t, "compact", "-q", "disk"); o.code != 0 || o.stdout != "" {
		t.Fatalf("%+v", o)
	}
	if o := drover(t, "compact", "disk.raw"); o.code != 1 || !strings.Contains(o.stderr, "format raw") {
		t.Fatalf("%+v", o)
	}
	// Leaks are freed, corruptions are not touched.
	b, err := os.ReadFile("disk")
	if err != nil {
		t.Fatal(err)
	}
	leaky := append(b[:0:0], b...)
	copy(leaky[0x20000+2*(len(b)>>16-1):], []byte{0, 2}) // the last cluster is counted twice
	put(t, "leaky", string(leaky))
	if o := drover(t, "compact", "leaky"); o.code != 0 {
		t.Fatalf("%+v", o)
	}
	mustTool(t, "qemu-img", "check", "-q", "leaky")
	copy(leaky[0x20000+2*(len(b)>>16-1):], []byte{0, 0})
	put(t, "bad", string(leaky))
	if o := drover(t, "compact", "bad"); o.code != 1 || !strings.Contains(o.stderr, "repair it first") {
		t.Fatalf("%+v", o)
	}
}

func fileSize(t *testing.T, name string) int64 {
	t.Helper()
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

func decode(t *testing.T, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
}

func TestDiffCommand(t *testing.T) {
	holey(t)
	o := drover(t, "diff", "disk@s", "disk")
	want := `Offset          Length          Difference
0x1600000       0x100000        changed
0x1900000       0x100000        removed
0x2800000       0x10000         added
2.06 MiB in 3 ranges
`
	if o.code != exitDiffer || o.stdout != want {
		t.Fatalf("%+v", o)
	}
	for _, pair := range [][2]string{{"disk", "disk.raw"}, {"disk@s", "s.raw"}, {"disk@1", "disk@s"}} {
		if o := drover(t, "diff", pair[0], pair[1]); o.code != 0 || o.stdout != "No differences.\n" {
			t.Fatalf("%v: %+v", pair, o)
		}
	}
	var j struct {
		Sizes  []int64
		Ranges []struct {
			Start, Length         int64
			Change, First, Second string
		}
		Bytes int64
	}
	decode(t, drover(t, "diff", "--output=json", "disk", "disk@s").stdout, &j)
	if len(j.Ranges) != 3 || j.Ranges[2].Change != "removed" || j.Bytes != 2<<20+64<<10 {
		t.Fatalf("%+v", j)
	}
	decode(t, drover(t, "diff", "--extents", "--output=json", "disk", "disk@s").stdout, &j)
	if len(j.Ranges) != 2 || j.Ranges[0].First != "zero" || j.Ranges[0].Second != "data" || j.Ranges[1].Second != "unallocated" {
		t.Fatalf("%+v", j)
	}
	if o := drover(t, "diff", "-q", "disk", "disk@s"); o.code != exitDiffer || o.stdout != "" {
		t.Fatalf("%+v", o)
	}
	for _, args := range [][]string{{"disk", "missing"}, {"disk@none", "disk"}, {"disk.raw@s", "disk"}} {
		if o := drover(t, append([]string{"diff"}, args...)...); o.code != exitNoOpen || o.stderr == "" {
			t.Fatalf("%v: %+v", args, o)
		}
	}
	for _, args := range [][]string{{"disk"}, {"--data", "--extents", "disk", "disk"}, {"-g", "700", "disk", "disk"}, {"--output=x", "disk", "disk"}} {
		if o := drover(t, append([]string{"diff"}, args...)...); o.code != 1 || o.stderr == "" {
			t.Fatalf("%v: %+v", args, o)
		}
	}
}

func TestSumCommand(t *testing.T) {
	holey(t)
	raw, err := os.ReadFile("disk.raw")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := mustDrover(t, "sum", "--algo", "sha256-flat", "disk"), fmt.Sprintf("sha256-flat:%x  disk\n", sha256.Sum256(raw)); got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	list := mustDrover(t, "sum", "disk", "disk@s", "disk.raw", "s.raw")
	lines := strings.Split(list, "\n")
	hash := func(i int) string { h, _, _ := strings.Cut(lines[i], " "); return h }
	if hash(0) != hash(2) || hash(1) != hash(3) || hash(0) == hash(1) {
		t.Fatal(list)
	}
	put(t, "list", list)
	if o := drover(t, "sum", "--check", "list"); o.code != 0 || strings.Count(o.stdout, ": OK\n") != 4 {
		t.Fatalf("%+v", o)
	}
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 63M 1", "disk")
	if err := os.Remove("s.raw"); err != nil {
		t.Fatal(err)
	}
	o := drover(t, "sum", "-q", "--check", "list")
	if o.code != 1 || o.stdout != "disk: FAILED\ns.raw: FAILED to be read\n" || !strings.Contains(o.stderr, "2 of 4 disks") {
		t.Fatalf("%+v", o)
	}
	var results []sumResult
	decode(t, drover(t, "sum", "--check", "list", "--output=json").stdout, &results)
	if len(results) != 4 || *results[0].OK || !*results[1].OK {
		t.Fatalf("%+v", results)
	}
	decode(t, mustDrover(t, "sum", "--output=json", "disk@s"), &results)
	if len(results) != 1 || results[0].Size != 64<<20 || results[0].Algorithm+":"+results[0].Sum != hash(1) {
		t.Fatalf("%+v", results)
	}
	put(t, "nonsense", "hello\n")
	for _, args := range [][]string{{"--check", "nonsense"}, {"--check", "missing"}, {"--check", "list", "disk"}, {}, {"--algo", "crc", "disk"}} {
		if o := drover(t, append([]string{"sum"}, args...)...); o.code != 1 || o.stderr == "" {
			t.Fatalf("%v: %+v", args, o)
		}
	}
}

// TestOwnCommandsAreDrovers: under the name of qemu-img there are none but its commands.
func TestOwnCommandsAreDrovers(t *testing.T) {
	theirs := map[string]bool{}
	for _, m := range imageMakers() {
		theirs[m.name] = true
	}
	for _, m := range ownMakers() {
		if theirs[m.name] {
			t.Errorf("%s is among qemu-img's commands", m.name)
		}
	}
}

// TestMakers: what a command is found by is its name.
func TestMakers(t *testing.T) {
	for _, m := range allMakers() {
		if got := m.make(&app{name: program, out: io.Discard, err: io.Discard}).Name(); got != m.name {
			t.Errorf("the maker of %s makes %s", m.name, got)
		}
	}
	if n := len(makersFor([]string{"convert", "--help"})); n != 1 {
		t.Errorf("%d commands are made to run one", n)
	}
	for _, args := range [][]string{nil, {"help"}, {"man", "."}, {"completion", "bash"}, {"--version"}, {"nonsense"}, {"__complete", "convert", ""}} {
		if got, want := len(makersFor(args)), len(allMakers()); got != want {
			t.Errorf("%v sees %d of %d commands", args, got, want)
		}
	}
}

// TestChangesTell: what changes an image tells programs what has become of it, and stock's names have no such flag.
func TestChangesTell(t *testing.T) {
	holey(t)
	type result struct {
		Command string
		Image   struct {
			Snapshots []struct{ Name string }
			Format    struct {
				Data struct {
					Lazy    bool `json:"lazy-refcounts"`
					Bitmaps []struct{ Name string }
				}
			} `json:"format-specific"`
		}
	}
	run := func(args ...string) (r result) {
		t.Helper()
		decode(t, mustDrover(t, args...), &r)
		if r.Command != args[0] {
			t.Errorf("%v: %+v", args, r)
		}
		return r
	}
	if r := run("amend", "--output=json", "-o", "lazy_refcounts=on", "disk"); !r.Image.Format.Data.Lazy {
		t.Errorf("%+v", r)
	}
	if r := run("bitmap", "--output=json", "--add", "disk", "b"); len(r.Image.Format.Data.Bitmaps) != 1 {
		t.Errorf("%+v", r)
	}
	if r := run("snapshot", "--output=json", "-r", "s", "renamed", "disk"); len(r.Image.Snapshots) != 1 || r.Image.Snapshots[0].Name != "renamed" {
		t.Errorf("%+v", r)
	}
	if r := run("snapshot", "--output=json", "-d", "renamed", "disk"); len(r.Image.Snapshots) != 0 {
		t.Errorf("%+v", r)
	}
	if out := mustDrover(t, "amend", "--output=json", "-f", "qcow2", "-o", "help"); strings.HasPrefix(out, "{") {
		t.Error(out)
	}
	for _, args := range [][]string{{"amend", "--output=x", "-o", "size=1M", "disk"}, {"bitmap", "--output=x", "--add", "disk", "c"}} {
		if o := drover(t, args...); o.code != 1 || o.stderr == "" {
			t.Errorf("%v: %+v", args, o)
		}
	}
	for _, args := range [][]string{{"amend", "--output=json", "-o", "compat=1.1", "disk"}, {"bitmap", "--output=json", "--add", "disk", "c"}} {
		var out, errs strings.Builder
		if code := Main(t.Context(), "qemu-img", args, strings.NewReader(""), &out, &errs); code != 1 || !strings.Contains(errs.String(), "output") {
			t.Errorf("as qemu-img: %v: %d %s", args, code, errs.String())
		}
	}
}
