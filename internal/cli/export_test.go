package cli

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestExportCommand makes a chain of backups of a disk that goes on being written. Stock opens each link as the disk was.
func TestExportCommand(t *testing.T) {
	holey(t)
	mustDrover(t, "export", "disk", "full.qcow2")
	mustTool(t, "qemu-img", "compare", "-q", "full.qcow2", "disk.raw")
	mustDrover(t, "verify", "-q", "--against", "disk", "full.qcow2")
	mustTool(t, "qemu-img", "bitmap", "--add", "-g", "64k", "disk", "since")
	if err := os.Mkdir("backups", 0o700); err != nil {
		t.Fatal(err)
	}
	base := "../full.qcow2"
	for i := range 3 {
		mustTool(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P %d %dM 300k", i+50, 20+3*i), "-c",
			fmt.Sprintf("write -z %dM 1M", 22+i), "-c", fmt.Sprintf("write -P 9 %dk 1k", 60000+i), "disk")
		mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "disk", fmt.Sprintf("%d.raw", i))
		name := fmt.Sprintf("inc%d.qcow2", i)
		var j exportResult
		decode(t, mustDrover(t, "export", "--output=json", "--bitmap", "since", "--base", base, "disk", "backups/"+name), &j)
		if j.Exported == 0 || j.Exported > 4<<20 || j.Base != base {
			t.Errorf("%+v", j)
		}
		mustTool(t, "qemu-img", "bitmap", "--clear", "disk", "since")
		base = name
		mustTool(t, "qemu-img", "check", "-q", "backups/"+name)
		mustTool(t, "qemu-img", "compare", "-q", "backups/"+name, fmt.Sprintf("%d.raw", i))
	}
	o := drover(t, "verify", "--allow-any-path", "--against", "disk", "backups/inc2.qcow2")
	want := `backups/inc2.qcow2: OK
backups/inc1.qcow2: OK
backups/inc0.qcow2: OK
full.qcow2: OK
backups/inc2.qcow2 (the whole disk): OK
disk (the image): OK
`
	if o.code != 0 || o.stdout != want {
		t.Fatalf("%+v", o)
	}
	if sum := mustDrover(t, "sum", "2.raw"); !strings.HasPrefix(sum, jsonField(t, "backups/inc2.qcow2.json", "sum")) {
		t.Errorf("the disk is %s", sum)
	}
	// A backup that was written to is not what it was.
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 77 21M 4k", "backups/inc1.qcow2")
	o = drover(t, "verify", "-q", "--allow-any-path", "backups/inc2.qcow2")
	if o.code != exitDiffer || !strings.Contains(o.stdout, "inc1.qcow2: FAILED") || !strings.Contains(o.stdout, "offset 22020096") {
		t.Fatalf("%+v", o)
	}
	var list []verifyResult
	decode(t, drover(t, "verify", "--output=json", "--layers", "backups/inc1.qcow2").stdout, &list)
	if len(list) != 3 || list[0].OK || !list[1].OK || list[0].Check != "layer" {
		t.Fatalf("%+v", list)
	}
	// Nor is one that stands on another than it was made for.
	mustTool(t, "qemu-img", "rebase", "-u", "-b", "inc2.qcow2", "-F", "qcow2", "backups/inc0.qcow2")
	if o := drover(t, "verify", "--layers", "backups/inc0.qcow2"); o.code != exitDiffer || !strings.Contains(o.stdout, "was made for") {
		t.Fatalf("%+v", o)
	}
}

// jsonField returns a string of a JSON file.
func jsonField(t *testing.T, name, field string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{}
	decode(t, string(b), &m)
	s, _ := m[field].(string)
	if s == "" {
		t.Fatalf("%s has no %s", name, field)
	}
	return s
}

func TestExportSnapshotCommand(t *testing.T) {
	holey(t)
	mustDrover(t, "export", "-l", "s", "disk", "s.qcow2")
	mustTool(t, "qemu-img", "compare", "-q", "s.qcow2", "s.raw")
	mustDrover(t, "verify", "--against", "disk@s", "s.qcow2")
	if o := drover(t, "verify", "--against", "disk", "s.qcow2"); o.code != exitDiffer || !strings.Contains(o.stdout, "disk (the image): FAILED") {
		t.Fatalf("%+v", o)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"disk"}, "the name of the backup"},
		{[]string{"disk", "s.qcow2"}, "exists"},
		{[]string{"-l", "none", "disk", "x"}, "none"},
		{[]string{"--bitmap", "b", "disk", "x"}, "--base"},
		{[]string{"--base", "b", "disk", "x"}, "--bitmap"},
		{[]string{"--bitmap", "b", "--base", "s.qcow2", "disk", "x"}, "not found"},
		{[]string{"--bitmap", "b", "--base", "s.qcow2", "disk.raw", "x"}, "no dirty bitmaps"},
		{[]string{"--base-manifest", "missing", "disk", "x"}, "missing"},
		{[]string{"--manifest", "s.qcow2.json", "disk", "x"}, "exists"},
		{[]string{"missing", "x"}, "missing"},
	} {
		if o := drover(t, append([]string{"export"}, c.args...)...); o.code != 1 || !strings.Contains(o.stderr, c.says) {
			t.Errorf("%v: %+v", c.args, o)
		}
		if _, err := os.Stat("x"); err == nil {
			t.Fatalf("%v left its beginnings", c.args)
		}
	}
	for _, args := range [][]string{{"disk"}, {"missing"}, {"--against", "missing", "s.qcow2"}, {"--manifest", "disk", "s.qcow2"}} {
		if o := drover(t, append([]string{"verify"}, args...)...); o.code != exitNoOpen || o.stderr == "" {
			t.Errorf("%v: %+v", args, o)
		}
	}
}
