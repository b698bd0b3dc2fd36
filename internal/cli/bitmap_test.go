package cli

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestBitmapAsQEMU gives the same commands to qemu-img and to drover, each in a folder of its own, and compares what they
// say and what qemu-img then says of the images.
func TestBitmapAsQEMU(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"qemu", "ours"} {
		if err := os.Mkdir(root+"/"+dir, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Chdir(root + "/" + dir)
		for _, args := range [][]string{
			{"create", "-q", "-f", "qcow2", "a", "1M"}, {"bitmap", "--add", "a", "b0"}, {"bitmap", "--add", "a", "b1"},
			{"create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old", "1M"}, {"create", "-q", "-f", "raw", "raw", "1M"},
			{"create", "-q", "-f", "qcow2", "b", "2M"}, {"bitmap", "--add", "b", "b0"},
			{"create", "-q", "-f", "qcow2", "huge", "64T"},
		} {
			mustTool(t, "qemu-img", args...)
		}
	}
	node := regexp.MustCompile(`(in|bitmaps to) ('[^']*'|raw)`) // qemu-img names an internal node
	for _, line := range []string{
		"--add a b0", "--add -g 1000 a x", "--add -g 256 a x", "--add -g 4G a x", "--add -g foo a x", "--add -g -5 a x",
		"--add -g 0 a x0", "--remove a nope", "--clear a nope", "--enable a nope", "--disable a nope", "--merge nope a b0",
		"--merge b0 a nope", "--merge b0 a b0", "a b0", "--add a", "--add", "--add a b1 c", "--clear -g 64k a b0",
		"--clear -b x a b0", "--clear -F qcow2 a b0", "--merge b0 -F qcow2 a b0", "--merge b0 -b x -F qcow2 a b0",
		"--image-opts -f qcow2 --add a b9", "--add -f qcow2 old b0", "--add -f raw raw b0", "--remove -f raw raw b0",
		"--merge b0 -f raw raw b0", "--add missing b", "--add -g 512 huge b0", "--add -g 64k huge b0",
		"--add --disable -g 512 a q", "--remove --add --disable a q", "--merge b0 -b b -F qcow2 a b0",
		"--merge nope -b b -F qcow2 a b0", "--merge b1 --merge b0 a q", "--merge q --clear --enable a q", "--bogus --add a z",
		"--merge", "-f bogus --add a z", "--add --image-opts driver=qcow2,file.filename=a y", "--remove a b0",
	} {
		args := append([]string{"bitmap"}, strings.Fields(line)...)
		t.Chdir(root + "/qemu")
		want := tool(t, "qemu-img", args...)
		infoWant := tool(t, "qemu-img", "info", "--output=json", "a")
		t.Chdir(root + "/ours")
		got := drover(t, args...)
		infoGot := tool(t, "qemu-img", "info", "--output=json", "a")
		for _, o := range []*outcome{&want, &got} {
			o.stderr = node.ReplaceAllString(strings.ReplaceAll(o.stderr, "qemu-img", "drover"), "$1 NODE")
			o.stderr = regexp.MustCompile(`to #block\d+`).ReplaceAllString(o.stderr, "to NODE")
		}
		compare(t, args, got, want)
		size := regexp.MustCompile(`"actual-size": \d+`)
		if a, b := size.ReplaceAllString(infoWant.stdout, ""), size.ReplaceAllString(infoGot.stdout, ""); a != b {
			t.Errorf("after %q qemu-img says\n%s\nof its own image\n%s", line, b, a)
		}
		mustTool(t, "qemu-img", "check", "-q", "-f", "qcow2", "a")
	}
}
