package cli

import (
	"strings"
	"testing"
)

func TestCompareLikeQEMU(t *testing.T) {
	images(t)
	for _, c := range [][2]string{{"plain", "same"}, {"base", "baseraw"}, {"plain", "v2small"}} {
		format := map[string]string{"same": "qcow2", "baseraw": "raw", "v2small": "qcow2"}[c[1]]
		mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", format, c[0], c[1])
	}
	mustTool(t, "qemu-img", "resize", "-q", "-f", "raw", "baseraw", "5M")
	mustTool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "baseraw", "tail")
	mustTool(t, "qemu-io", "-f", "raw", "-c", "write -P 9 4500001 3", "tail")
	mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "base", "changed")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 3200001 100", "changed")
	mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "base", "written")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 2100001 100", "written")
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "blank", "4M")
	names := []string{"plain", "same", "base", "baseraw", "tail", "changed", "written", "blank", "overlay", "top", "compressed", "extended",
		"missing", "broken", "raw", "onraw"}
	for _, a := range names {
		for _, b := range names {
			sameAsQEMU(t, "compare", a, b)
		}
	}
	for _, args := range [][]string{
		{"-s", "base", "changed"}, {"-s", "plain", "same"}, {"-s", "plain", "v2"}, {"-s", "base", "base"},
		{"-q", "base", "changed"}, {"-q", "base", "base"}, {"-q", "base", "missing"}, {"-p", "plain", "same"},
		{"-T", "none", "base", "base"}, {"-T", "bogus", "base", "base"}, {"-f", "qcow2", "base", "base"},
		{"-f", "qcow2", "-F", "raw", "base", "baseraw"}, {"-f", "bogus", "base", "base"}, {"-F", "bogus", "base", "base"},
		{"-f", "raw", "-F", "raw", "base", "changed"}, {}, {"base"}, {"base", "base", "base"}, {"-Z", "base", "base"},
		{"-U", "base", "base"}, {"--image-opts", "-f", "raw", "base", "base"},
		{"--image-opts", "driver=qcow2,file.filename=base", "driver=qcow2,file.filename=overlay"},
	} {
		sameAsQEMU(t, append([]string{"compare"}, args...)...)
	}
}

// TestCompareStrictSaysWhere: qemu-img tells apart ranges that are alike but for being the last, and so finds the difference
// too early.
func TestCompareStrictSaysWhere(t *testing.T) {
	images(t)
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "blank", "4M")
	o := drover(t, "compare", "-s", "base", "blank")
	if o.code != 1 || o.stdout != "Strict mode: Offset 1048576 block status mismatch!\n" {
		t.Errorf("%+v", o)
	}
}

func TestCompareJSON(t *testing.T) {
	images(t)
	for args, want := range map[string]string{
		"base base":    `{ "identical": true, "same-size": true }`,
		"base overlay": `{ "identical": false, "difference": "content", "offset": 0, "same-size": true }`,
		"-s plain v2":  `{ "identical": false, "difference": "size", "same-size": false }`,
		"plain v2":     `{ "identical": true, "same-size": false }`,
	} {
		o := drover(t, append([]string{"compare", "--output=json"}, strings.Split(args, " ")...)...)
		if got := strings.Join(strings.Fields(o.stdout), " "); got != want || (o.code == 0) != strings.Contains(want, "identical\": true") {
			t.Errorf("%s: code %d, %s, want %s", args, o.code, got, want)
		}
	}
}
