package cli

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDDLikeQEMU(t *testing.T) {
	images(t)
	put(t, "three", "abc")
	for _, args := range []string{
		"", "if=base", "of=out", "if=base of=out", "-O qcow2 if=base of=out", "-O qcow2 if=overlay of=out bs=1M count=3",
		"if=base of=out bs=1000 count=3000", "if=base of=out bs=1000 skip=1048 count=3000", "if=base of=out bs=1M skip=3",
		"if=base of=out bs=1M skip=1", "-O qcow2 if=base of=out bs=100k skip=9", "if=base of=out bs=1M skip=9", "if=base of=out skip=1E",
		"if=base of=out bs=0", "if=base of=out bs=x", "if=base of=out bs=3G", "if=base of=out bs=2147483647", "if=base of=out foo=1",
		"if=base of=out count=x", "if=base of=out skip=x", "-f foo if=base of=out", "-O foo if=base of=out", "if=missing of=out",
		"if=base of=/nodir/out", "if=base of=out count=0", "if=base of=out bs=512 count=1k skip=1k", "if=raw of=out if=base", "base out",
		"if=base of=base", "-U if=base of=out", "--image-opts if=driver=qcow2,file.filename=base of=out", "-Z if=base of=out",
		"bs=1M count=", "if=base of=out bs", "if=base of=out count=1000000000000", "-f raw if=three of=out", "-f raw if=three of=out bs=2",
		"-f raw if=three of=out bs=2 skip=1", "-f raw -O qcow2 if=raw of=out bs=10 skip=77", "if=empty of=out", "if=compressed of=out",
	} {
		run := func(fn func() outcome) (outcome, string) {
			if err := os.RemoveAll("out"); err != nil {
				t.Fatal(err)
			}
			o := fn()
			if _, err := os.Stat("out"); err != nil || o.code != 0 {
				return o, ""
			}
			info := diskSize.ReplaceAllString(tool(t, "qemu-img", "info", "out").stdout, "")
			if strings.Contains(info, "format: qcow2") {
				mustTool(t, "qemu-img", "check", "-q", "out")
			}
			mustTool(t, "qemu-img", "convert", "-O", "raw", "out", "content")
			b, err := os.ReadFile("content")
			if err != nil {
				t.Fatal(err)
			}
			return o, info + string(b)
		}
		all := append([]string{"dd"}, strings.Fields(args)...)
		want, wantOut := run(func() outcome { return tool(t, "qemu-img", all...) })
		want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
		got, gotOut := run(func() outcome { return drover(t, all...) })
		compare(t, all, got, want)
		if wantOut != gotOut {
			t.Errorf("%q: the images differ:\n%s", all, cmp.Diff(wantOut[:min(300, len(wantOut))], gotOut[:min(300, len(gotOut))]))
		}
	}
}
