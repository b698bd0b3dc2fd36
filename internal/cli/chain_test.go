package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var progressSteps = regexp.MustCompile(`( {4}\(\d+\.\d\d/100%\)\r)+`)

// folder is the content of a folder of images.
type folder map[string]string

func readFolder(t *testing.T) folder {
	t.Helper()
	names, err := filepath.Glob("*")
	if err != nil {
		t.Fatal(err)
	}
	f := folder{}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f[name] = string(b)
	}
	return f
}

func (f folder) restore(t *testing.T) {
	t.Helper()
	for name, content := range f {
		put(t, name, content)
	}
}

// sameChainAsQEMU runs both tools on a folder of images, and compares what they print, what the images say of themselves
// afterwards, and the disks of those named. What drover leaves is without errors.
func sameChainAsQEMU(t *testing.T, start folder, disks []string, args ...string) {
	t.Helper()
	look := func() (string, []string) {
		var infos, raws []string
		for _, name := range disks {
			info := tool(t, "qemu-img", "info", "-U", name)
			infos = append(infos, diskSize.ReplaceAllString(info.stdout, "")+info.stderr)
			raw := filepath.Join(t.TempDir(), "raw")
			tool(t, "qemu-img", "convert", "-U", "-O", "raw", name, raw)
			b, err := os.ReadFile(raw)
			if err != nil {
				b = []byte(err.Error())
			}
			raws = append(raws, string(b))
		}
		return strings.Join(infos, "\n"), raws
	}
	start.restore(t)
	want := tool(t, "qemu-img", args...)
	want.stderr = strings.ReplaceAll(want.stderr, "qemu-img:", "drover:")
	want.stderr = strings.ReplaceAll(want.stderr, "Try 'qemu-img", "Try 'drover")
	wantInfo, wantDisks := look()
	start.restore(t)
	got := drover(t, args...)
	gotInfo, gotDisks := look()
	for _, o := range []*outcome{&want, &got} { // progress comes in other steps
		o.stdout = progressSteps.ReplaceAllString(o.stdout, "progress")
	}
	compare(t, args, got, want)
	if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
		t.Errorf("%q: the images differ (-qemu-img +drover):\n%s", args, diff)
	}
	for i, name := range disks {
		if wantDisks[i] != gotDisks[i] {
			t.Errorf("%q: the disks of %s differ", args, name)
		}
		if strings.HasPrefix(start[name], "QFI\xfb") {
			if o := tool(t, "qemu-img", "check", "-q", "--image-opts", "driver=qcow2,backing=,file.filename="+name); o.code != 0 {
				t.Errorf("%q: check of %s: %s%s", args, name, o.stdout, o.stderr)
			}
		}
	}
}

// chains makes a folder of images that stand on one another.
func chains(t *testing.T) folder {
	t.Helper()
	t.Chdir(t.TempDir())
	create := func(args ...string) {
		mustTool(t, "qemu-img", append([]string{"create", "-q", "-f", "qcow2"}, args...)...)
	}
	io := func(file string, commands ...string) {
		var args []string
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		mustTool(t, "qemu-io", append(args, "-f", "qcow2", file)...)
	}
	put(t, "raw", strings.Repeat("raw disk", 60000))
	create("base", "2M")
	io("base", "write -P 1 0 700k", "write -P 2 1M 128k")
	create("-o", "cluster_size=4k", "-b", "base", "-F", "qcow2", "mid", "1536k")
	io("mid", "write -P 3 64k 200k", "write -z 300k 100k", "write -P 4 1100k 60k")
	create("-b", "mid", "-F", "qcow2", "top", "2M")
	io("top", "write -P 5 100k 30k", "write -z 1M 64k", "write -P 6 1900k 50k")
	create("-o", "extended_l2=on", "-b", "base", "-F", "qcow2", "ext", "3M")
	io("ext", "write -P 7 10k 3k", "write -z 128k 10k", "write -P 8 2500k 100k", "write -c -P 9 1M 64k")
	create("-b", "raw", "-F", "raw", "onraw", "1M")
	io("onraw", "write -P 10 100k 300k", "write -z 420k 200k", "write -P 11 1000k 1k")
	create("-o", "compat=0.10", "-b", "base", "-F", "qcow2", "v2", "1M")
	io("v2", "write -P 12 100k 300k", "write -c -P 12 512k 64k")
	create("-b", "base", "-F", "qcow2", "snap", "2M")
	io("snap", "write -P 13 0 500k")
	mustTool(t, "qemu-img", "snapshot", "-c", "s", "snap")
	io("snap", "write -P 14 300k 500k")
	mustTool(t, "qemu-img", "bitmap", "--add", "snap", "b")
	create("-b", "base", "-F", "qcow2", "-o", "data_file=data", "ondata", "2M")
	io("ondata", "write -P 15 0 500k")
	create("flat", "1M")
	io("flat", "write -P 16 0 500k", "write -P 17 800k 4k")
	return readFolder(t)
}

func TestCommitLikeQEMU(t *testing.T) {
	start := chains(t)
	for _, c := range []struct{ disks, args string }{
		{"mid base", "mid"}, {"top mid base", "top"}, {"top mid base", "-d top"}, {"top base", "-b base top"}, {"top mid base", "-b mid top"},
		{"ext base", "ext"}, {"ext base", "-p ext"}, {"ext base", "-q -p ext"}, {"onraw raw", "onraw"}, {"onraw raw", "-d -f qcow2 onraw"}, {"v2 base", "v2"},
		{"snap base", "snap"}, {"ondata base", "ondata"}, {"flat", "flat"}, {"raw", "-f raw raw"}, {"top", "-b nosuch top"}, {"top", "-b top top"},
		{"flat", "-b base flat"}, {"flat", "missing"}, {"flat", ""}, {"top", "top top"}, {"top", "-t foo top"}, {"top", "-r x top"}, {"top mid", "-r 1G top"},
		{"top mid", "--image-opts driver=qcow2,file.filename=top"}, {"top", "-f nosuch top"}, {"top", "-Z top"}, {"top mid", "-t none top"},
		{"top", "-b"}, {"top", "-f raw top"},
	} {
		sameChainAsQEMU(t, start, strings.Fields(c.disks), append([]string{"commit"}, strings.Fields(c.args)...)...)
	}
}

func TestRebaseLikeQEMU(t *testing.T) {
	start := chains(t)
	for _, c := range []struct{ disks, args string }{
		{"top mid", "-b base -F qcow2 top"}, {"top", "-b mid -F qcow2 top"}, {"top", "-b raw -F raw top"}, {"top", "-b flat -F qcow2 top"},
		{"top", "-p -b flat -F qcow2 top"}, {"top", "-p -q -b flat -F qcow2 top"}, {"ext", "-b flat -F qcow2 ext"}, {"ext", "-b mid -F qcow2 ext"},
		{"ext", "-b raw -F raw ext"}, {"onraw", "-b base -F qcow2 onraw"}, {"onraw", "-b top -F qcow2 onraw"}, {"v2", "-b mid -F qcow2 v2"},
		{"v2", "-b flat -F qcow2 v2"}, {"snap", "-b mid -F qcow2 snap"}, {"snap", "-b ext -F qcow2 -U snap"}, {"ondata", "-b flat -F qcow2 ondata"},
		{"flat", "-b raw -F raw flat"}, {"flat", "-b top -F qcow2 flat"}, {"mid", "-b ext -F qcow2 mid"}, {"mid", "-f qcow2 -b flat -F qcow2 mid"},
		{"raw", "-f raw -b flat -F qcow2 raw"}, {"top", "-b nosuch -F qcow2 top"}, {"top", "-b base top"}, {"top", "-b base -F nosuch top"},
		{"top", "-b flat -F qcow2 -T foo top"}, {"top", "-t foo -b flat -F qcow2 top"}, {"top", "top"},
		{"top", "-b mid"}, {"top", "-b mid a b"}, {"top", "-b top -F qcow2 top"}, {"top", "-b flat -F qcow2 -T none -t none top"},
		{"mid", "--image-opts -b flat -F qcow2 driver=qcow2,file.filename=mid"},
	} {
		sameChainAsQEMU(t, start, strings.Fields(c.disks), append([]string{"rebase"}, strings.Fields(c.args)...)...)
	}
	for _, name := range []string{"top", "mid", "ext", "onraw", "v2", "snap", "ondata", "flat"} {
		sameChainAsQEMU(t, start, []string{name}, "rebase", "-b", "", name)
	}
}

// TestRebaseOntoTheSameFileInAnotherFormat: qemu-img takes the new backing file for the one in the chain, by its name alone,
// and leaves another disk.
func TestRebaseOntoTheSameFileInAnotherFormat(t *testing.T) {
	chains(t)
	mustTool(t, "qemu-img", "convert", "-O", "raw", "top", "before")
	mustDrover(t, "rebase", "-b", "base", "-F", "raw", "top")
	mustTool(t, "qemu-img", "compare", "-F", "raw", "top", "before")
	mustTool(t, "qemu-img", "check", "-q", "top")
}

// TestRebaseCompressed copies what differs compressed, which later versions of qemu-img offer too.
func TestRebaseCompressed(t *testing.T) {
	chains(t)
	for _, name := range []string{"top", "ext", "onraw", "snap"} {
		mustTool(t, "qemu-img", "convert", "-O", "raw", name, "before")
		mustDrover(t, "rebase", "-c", "-b", "flat", "-F", "qcow2", name)
		mustTool(t, "qemu-img", "compare", "-F", "raw", name, "before")
		if o := tool(t, "qemu-img", "check", name); o.code != 0 || !strings.Contains(o.stdout, "% compressed") || strings.Contains(o.stdout, " 0.00% compressed") {
			t.Errorf("%s: %+v", name, o)
		}
	}
}
