package cli

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var snapshotDate = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`)

// sameSnapshotAsQEMU runs both tools on copies of an image, and compares what they show and the snapshots that are left,
// but for their dates. The images that are left are without errors.
func sameSnapshotAsQEMU(t *testing.T, file string, args ...string) {
	t.Helper()
	args = append([]string{"snapshot"}, args...)
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	run := func(fn func() outcome) (outcome, string) {
		put(t, file, string(before))
		o := fn()
		o.stdout = snapshotDate.ReplaceAllString(o.stdout, "DATE")
		list := tool(t, "qemu-img", "info", "-U", file)
		return o, snapshotDate.ReplaceAllString(diskSize.ReplaceAllString(list.stdout, ""), "DATE") + list.stderr
	}
	want, wantInfo := run(func() outcome { return tool(t, "qemu-img", args...) })
	want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
	got, gotInfo := run(func() outcome { return drover(t, args...) })
	compare(t, args, got, want)
	if strings.Contains(gotInfo, "format: qcow2") && !strings.Contains(gotInfo, "backing file: missing") {
		mustTool(t, "qemu-img", "check", "-q", file)
	}
	if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
		t.Errorf("%q: the images differ (-qemu-img +drover):\n%s", args, diff)
	}
}

func TestSnapshotLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q"}, args...)...) }
	create("-f", "qcow2", "disk", "5M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 3M", "disk")
	for _, name := range []string{"one", "3", "one", "", "\xff\xfe", "zwölf Zeichen", strings.Repeat("long", 70)} {
		mustTool(t, "qemu-img", "snapshot", "-c", name, "disk")
	}
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "disk")
	mustTool(t, "qemu-img", "resize", "-f", "qcow2", "-q", "disk", "7M")
	create("-f", "qcow2", "none", "1M")
	create("-f", "qcow2", "-o", "compat=0.10", "v2", "1M")
	create("-f", "qcow2", "-o", "refcount_bits=1", "narrow", "1M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", "narrow")
	create("-f", "qcow2", "-b", "disk", "-F", "qcow2", "overlay")
	create("-f", "raw", "raw", "1M")
	create("-u", "-f", "qcow2", "-b", "missing", "-F", "raw", "orphan", "1M")
	for _, c := range []struct {
		file string
		args []string
	}{
		{"disk", []string{"-l", "disk"}}, {"disk", []string{"-q", "-l", "disk"}}, {"disk", []string{"-l", "-U", "disk"}},
		{"disk", []string{"-c", "new", "disk"}}, {"disk", []string{"-c", "one", "disk"}}, {"disk", []string{"-c", "", "disk"}},
		{"disk", []string{"-c", strings.Repeat("y", 300), "disk"}}, {"disk", []string{"-c", "new\nline", "disk"}},
		{"disk", []string{"-q", "-c", "new", "disk"}}, {"disk", []string{"-U", "-c", "new", "disk"}},
		{"disk", []string{"-a", "one", "disk"}}, {"disk", []string{"-a", "3", "disk"}}, {"disk", []string{"-a", "7", "disk"}},
		{"disk", []string{"-a", "missing", "disk"}}, {"disk", []string{"-a", "\xff\xfe", "disk"}},
		{"disk", []string{"-d", "one", "disk"}}, {"disk", []string{"-d", "3", "disk"}}, {"disk", []string{"-d", "7", "disk"}},
		{"disk", []string{"-d", "missing", "disk"}}, {"disk", []string{"-d", "", "disk"}},
		{"disk", []string{"-d", "zwölf Zeichen", "disk"}}, {"disk", []string{"-d", "x", "-U", "disk"}},
		{"disk", []string{"-l", "-c", "x", "disk"}}, {"disk", []string{"-c", "x", "-c", "x", "disk"}}, {"disk", []string{"-c"}},
		{"disk", []string{"-l", "disk", "disk"}}, {"disk", []string{"-l"}}, {"disk", []string{"-Z", "disk"}},
		{"disk", []string{"--image-opts", "-l", "driver=qcow2,file.filename=disk"}},
		{"disk", []string{"--image-opts", "-c", "x", "driver=qcow2,file.filename=disk"}},
		{"none", []string{"-l", "none"}}, {"none", []string{"-c", "x", "none"}}, {"none", []string{"-d", "x", "none"}},
		{"v2", []string{"-c", "x", "v2"}}, {"narrow", []string{"-c", "x", "narrow"}},
		{"overlay", []string{"-c", "x", "overlay"}}, {"overlay", []string{"-l", "overlay"}},
		{"raw", []string{"-l", "raw"}}, {"raw", []string{"-c", "x", "raw"}}, {"raw", []string{"-d", "x", "raw"}}, {"orphan", []string{"-l", "orphan"}}, {"orphan", []string{"-c", "x", "orphan"}},
		{"disk", []string{"-l", "missing"}}, {"disk", []string{"-c", "x", "missing"}},
	} {
		sameSnapshotAsQEMU(t, c.file, c.args...)
	}
	if o := drover(t, "snapshot", "-a", "x", "raw"); o.code != 1 || // qemu-img gives its warning of raw images twice here
		!strings.HasSuffix(o.stderr, "drover: Could not apply snapshot 'x': Block driver does not support snapshots\n") {
		t.Errorf("applying where there are no snapshots: %+v", o)
	}
	create("-f", "qcow2", "-o", "data_file=data.raw", "datafile", "1M")
	if o := drover(t, "snapshot", "-l", "datafile"); o.code != 0 || o.stdout+o.stderr != "" {
		t.Errorf("listing where data is in another file: %+v", o)
	}
}

// TestSnapshotOfLockedImage: an image in use is refused but for -U -l.
func TestSnapshotOfLockedImage(t *testing.T) {
	t.Chdir(t.TempDir())
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "disk", "1M")
	mustTool(t, "qemu-img", "snapshot", "-c", "one", "disk")
	defer holdOpen(t, "disk")()
	for _, args := range [][]string{
		{"-l", "disk"}, {"-U", "-l", "disk"}, {"-c", "x", "disk"}, {"-d", "one", "disk"}, {"-a", "one", "disk"},
	} {
		sameAsQEMU(t, append([]string{"snapshot"}, args...)...)
	}
}

// TestSnapshotWithoutModel: what qemu-img does not have.
func TestSnapshotWithoutModel(t *testing.T) {
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "1M")
	var made, listed struct {
		ID, Name string
		DiskSize int64 `json:"disk-size"`
	}
	if err := json.Unmarshal([]byte(mustDrover(t, "snapshot", "--output=json", "-c", "one", "disk")), &made); err != nil {
		t.Fatal(err)
	}
	if made.ID != "1" || made.Name != "one" || made.DiskSize != 1<<20 {
		t.Errorf("created %+v", made)
	}
	mustDrover(t, "snapshot", "-r", "one", "golden", "disk")
	list := mustDrover(t, "snapshot", "disk") // a list is what is shown by default
	if !strings.HasPrefix(list, "Snapshot list:\nID        TAG  ") || !strings.Contains(list, "\n1         golden  ") {
		t.Errorf("the list is\n%s", list)
	}
	if err := json.Unmarshal([]byte(strings.Trim(mustDrover(t, "snapshot", "--output=json", "disk"), "[]\n")), &listed); err != nil {
		t.Fatal(err)
	}
	if listed.Name != "golden" || listed.ID != "1" {
		t.Errorf("listed %+v", listed)
	}
	mustDrover(t, "snapshot", "-r", "1", "other", "-f", "qcow2", "disk")
	for args, want := range map[string]string{
		"-r golden x disk":           "Could not rename snapshot 'golden': snapshot not found",
		"-r other":                   "Expecting the new name of the snapshot",
		"-r other disk":              "Expecting one image file name",
		"-r other x -c y disk":       "Cannot mix",
		"--output=xml disk":          "--output must be used with human or json as argument.",
		"-f raw -r other x disk":     "does not support snapshots",
		"-f bogus -l disk":           "Unknown driver 'bogus'",
		"-r other " + long + " disk": "the new name is longer than 255 bytes",
	} {
		if o := drover(t, append([]string{"snapshot"}, strings.Split(args, " ")...)...); o.code != 1 || !strings.Contains(o.stderr, want) {
			t.Errorf("%s: code %d, %s", args, o.code, o.stderr)
		}
	}
	if out := mustDrover(t, "snapshot", "-d", "other", "disk"); out != "" {
		t.Errorf("deleting says %s", out)
	}
	if out := mustDrover(t, "snapshot", "--output=json", "disk"); out != "[]\n" {
		t.Errorf("an empty list is %s", out)
	}
	mustDrover(t, "check", "-q", "disk")
}

var long = strings.Repeat("n", 256)
