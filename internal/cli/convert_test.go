package cli

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/droverproject/drover/block"
)

// sameConvertAsQEMU converts with both tools to "out", and compares what they say, what qemu-img info and map say of the
// results, and their content. One that is qcow2 has no errors.
func sameConvertAsQEMU(t *testing.T, prepare func(), args ...string) {
	t.Helper()
	args = append([]string{"convert"}, args...)
	run := func(to string, fn func() outcome) (outcome, string) {
		for _, name := range []string{"out", to} {
			if err := os.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
		if prepare != nil {
			prepare()
		}
		o := fn()
		if o.code != 0 {
			return o, ""
		}
		info := tool(t, "qemu-img", "info", "out").stdout
		if strings.Contains(info, "format: qcow2") {
			mustTool(t, "qemu-img", "check", "-q", "out")
		}
		if err := os.Rename("out", to); err != nil {
			t.Fatal(err)
		}
		return o, diskSize.ReplaceAllString(info, "")
	}
	want, wantInfo := run("out.qemu", func() outcome { return tool(t, "qemu-img", args...) })
	want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
	got, gotInfo := run("out.drover", func() outcome { return drover(t, args...) })
	if want.code == 0 && !strings.Contains(strings.Join(args, " "), "help") {
		want.stdout, got.stdout = "", "" // progress comes in other steps
	}
	compare(t, args, got, want)
	if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
		t.Errorf("%q: the images differ (-qemu-img +drover):\n%s", args, diff)
	}
	if want.code != 0 || got.code != 0 || wantInfo == "" {
		return
	}
	if o := tool(t, "qemu-img", "compare", "out.qemu", "out.drover"); o.code != 0 {
		t.Errorf("%q: the content differs: %s%s", args, o.stdout, o.stderr)
	}
}

func TestConvertLikeQEMU(t *testing.T) {
	images(t)
	target := func() {
		mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "out", "5M")
		mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 77 0 5M", "out")
	}
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "small", "1M")
	for _, name := range []string{"raw", "plain", "v2", "odd", "extended", "base", "overlay", "top", "onraw", "snap", "compressed", "empty"} {
		if name == "v2" || name == "odd" {
			continue // 10 GiB
		}
		for _, flags := range []string{"", "-O qcow2", "-O qcow2 -c", "-O qcow2 -S 0", "-O raw -S 0", "-O qcow2 -W -m 16", "-O qcow2 -S 64k"} {
			sameConvertAsQEMU(t, nil, append(strings.Fields(flags), name, "out")...)
		}
	}
	for _, args := range []string{
		"-O qcow2 odd out", "-O qcow2 -o cluster_size=4k,compat=0.10 base out", "-O qcow2 -o extended_l2=on overlay out",
		"-O qcow2 -c -o compression_type=zstd base out", "-O qcow2 -o preallocation=metadata base out", "-O raw -o preallocation=full base out",
		"-O qcow2 -o preallocation=full base out",
		"-O qcow2 -l one snap out", "-O qcow2 -l 2 snap out", "-O raw -l snapshot.name=one snap out", "-O qcow2 -l nope snap out",
		"-O qcow2 -l snapshot.id=1,snapshot.name=one snap out", "-O qcow2 -l one snap snap out",
		"-O qcow2 -B base -F qcow2 overlay out", "-O qcow2 -B overlay -F qcow2 top out", "-O qcow2 -o backing_file=base,backing_fmt=qcow2 overlay out",
		"-O qcow2 -B base -F qcow2 -c overlay out", "-O qcow2 -B base overlay out", "-O raw -B base -F qcow2 overlay out",
		"-O qcow2 -B base -F qcow2 overlay overlay out", "-O qcow2 -F qcow2 overlay out",
		"base raw out", "-O qcow2 base raw snap out", "-p base out", "-q base out", "-p -q base out", "-t none -T none base out", "-t bogus base out",
		"-T bogus base out", "-f qcow2 base out", "-f raw base out", "-f bogus base out", "-O bogus base out", "-U base out", "-C base out",
		"-c base out", "-S 1000 base out", "-S x base out", "-S 17M base out", "-m 17 base out", "-m 0 base out", "-m x base out",
		"-C -S 4k base out", "-C -c -O qcow2 base out", "-C --salvage base out", "--salvage -O qcow2 base out", "--target-is-zero base out",
		"-n -o compat=v3 -O qcow2 base out", "-n -O qcow2 base missing", "-n -O qcow2 base small", "-r x base out", "-r 1G base out",
		"", "base", "missing out", "-O qcow2 base /missing/out", "-O qcow2 base dir", "-O qcow2 base base",
		"-c -O qcow2 -o preallocation=metadata base out", "-Z base out", "broken out",
	} {
		sameConvertAsQEMU(t, nil, strings.Fields(args)...)
	}
	for _, args := range []string{"-n -O qcow2 base out", "-n -O qcow2 -S 0 base out", "-n -O qcow2 -W overlay out"} {
		sameConvertAsQEMU(t, target, strings.Fields(args)...)
	}
	blank := func() { mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "out", "4M") }
	sameConvertAsQEMU(t, blank, "-n", "--target-is-zero", "-O", "qcow2", "base", "out")
	sameConvertAsQEMU(t, blank, "-n", "-c", "-O", "qcow2", "base", "out")
	target() // qemu-img cannot write compressed clusters again
	mustDrover(t, "convert", "-n", "-c", "-O", "qcow2", "base", "out")
	mustTool(t, "qemu-img", "check", "-q", "out")
}

// TestConvertIsDurable: the target has been synced after its last write when convert ends, and so has its folder.
func TestConvertIsDurable(t *testing.T) {
	images(t)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		cmd := exec.Command(strace, "-f", "-y", "-e", "trace=pwrite64,pwritev,pwritev2,write,fsync,fdatasync", "-o", "trace", self,
			"-test.run=^TestConvertForTrace$")
		cmd.Env = append(os.Environ(), "DROVER_TEST_CONVERT="+format)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Skipf("strace does not work here: %v\n%s", err, out)
		}
		b, err := os.ReadFile("trace")
		if err != nil {
			t.Fatal(err)
		}
		wrote, synced := 0, 0
		for i, line := range strings.Split(string(b), "\n") {
			if !strings.Contains(line, "/out>") {
				continue
			}
			if strings.Contains(line, "sync(") {
				synced = i
			} else {
				wrote = i
			}
		}
		if wrote == 0 || synced < wrote {
			t.Errorf("%s: last write in line %d, last sync in line %d of\n%s", format, wrote, synced, b)
		}
	}
}

// TestConvertForTrace is what TestConvertIsDurable traces.
func TestConvertForTrace(t *testing.T) {
	format := os.Getenv("DROVER_TEST_CONVERT")
	if format == "" {
		t.Skip("it is for another test")
	}
	mustDrover(t, "convert", "-f", "qcow2", "-O", format, "base", "out")
}

// TestConvertEncrypted goes from plain to encrypted and back, and compares with the key.
func TestConvertEncrypted(t *testing.T) {
	images(t)
	object := "secret,id=s,data=foo"
	mustDrover(t, "convert", "--object", object, "-O", "qcow2", "-o",
		"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "base", "out")
	opts := "driver=qcow2,file.filename=out,encrypt.key-secret=s"
	mustTool(t, "qemu-img", "convert", "--object", object, "--image-opts", "-O", "raw", opts, "plain.raw")
	mustTool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "plain.raw", "base")
	mustDrover(t, "convert", "--object", object, "--image-opts", "-O", "qcow2", opts, "back")
	mustDrover(t, "compare", "back", "base")
	if o := drover(t, "convert", "-O", "raw", "out", "x"); o.code != 1 || !strings.Contains(o.stderr, "key-secret") {
		t.Errorf("without the key: %+v", o)
	}
	if o := drover(t, "convert", "--object", object, "-c", "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s", "base",
		"x"); o.code != 1 || o.stderr != "drover: Compression and encryption not supported at the same time\n" {
		t.Errorf("compressed and encrypted: %+v", o)
	}
}

func TestConvertBitmapsLikeQEMU(t *testing.T) {
	images(t)
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "marked", "4M")
	mustTool(t, "qemu-img", "bitmap", "--add", "marked", "a")
	mustTool(t, "qemu-img", "bitmap", "--add", "-g", "128k", "marked", "b")
	mustTool(t, "qemu-img", "bitmap", "--add", "marked", "c")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "marked")
	mustTool(t, "qemu-img", "bitmap", "--disable", "marked", "b")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write 3M 64k", "marked")
	brokenBitmap(t, "marked", "inconsistent")
	blank := func() { mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "out", "4M") }
	taken := func() { blank(); mustTool(t, "qemu-img", "bitmap", "--add", "out", "b") }
	rawTarget := func() { mustTool(t, "qemu-img", "create", "-q", "-f", "raw", "out", "4M") }
	for _, args := range []string{
		"--bitmaps -O qcow2 marked out", "--bitmaps -O qcow2 -c marked out", "--bitmaps -O qcow2 -o cluster_size=4k marked out",
		"--bitmaps -O qcow2 inconsistent out", "--bitmaps --skip-broken-bitmaps -O qcow2 inconsistent out", "--skip-broken-bitmaps -O qcow2 marked out",
		"--bitmaps marked out", "--bitmaps -O qcow2 -o compat=0.10 marked out", "--bitmaps -O qcow2 marked marked out", "--bitmaps -O qcow2 raw out",
		"--bitmaps -O qcow2 plain out", "--bitmaps -O qcow2 snap out", "--bitmaps -O qcow2 -l one snap out", "--target-image-opts marked out",
		"--target-image-opts --bitmaps marked driver=qcow2,file.filename=out",
	} {
		sameConvertAsQEMU(t, nil, strings.Fields(args)...)
	}
	for _, args := range []string{
		"-n --bitmaps -O qcow2 marked out", "-n --bitmaps --target-image-opts marked driver=qcow2,file.filename=out",
		"-n --target-image-opts -O qcow2 marked driver=qcow2,file.filename=out", "-n --target-image-opts marked file.filename=out,driver=qcow2,file.driver=file",
		"-n --target-image-opts marked driver=nosuch,file.filename=out", "-n --target-image-opts marked driver=qcow2,file.filename=nosuch",
		"-n --target-image-opts marked driver=raw,file.filename=out",
	} {
		sameConvertAsQEMU(t, blank, strings.Fields(args)...)
	}
	sameConvertAsQEMU(t, taken, "-n", "--bitmaps", "-O", "qcow2", "marked", "out")
	sameConvertAsQEMU(t, rawTarget, "-n", "--bitmaps", "-O", "raw", "marked", "out")
	sameConvertAsQEMU(t, rawTarget, "-n", "--target-image-opts", "marked", "driver=raw,file.filename=out")
	for _, args := range [][]string{{"-O", "qcow2", "marked", "out"}} {
		mustDrover(t, append([]string{"convert", "--bitmaps"}, args...)...)
		for _, name := range []string{"a", "b", "c"} {
			want := dirtyMap(t, "marked", name)
			if got := dirtyMap(t, "out", name); got != want || !strings.Contains(want, `"data": false`) {
				t.Errorf("bitmap %s is %s, not %s", name, got, want)
			}
		}
	}
}

// brokenBitmap copies an image while somebody writes to it, so that the copy says that its bitmaps are in use.
func brokenBitmap(t *testing.T, from, to string) {
	t.Helper()
	dev, err := block.Open(t.Context(), from, block.OpenOptions{Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(dev.WriteAt(t.Context(), []byte("x"), 0, 0), dev.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	put(t, to, string(b))
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}

// dirtyMap returns what stock qemu-nbd and qemu-img tell of a bitmap.
func dirtyMap(t *testing.T, file, bitmap string) string {
	t.Helper()
	dir := t.TempDir()
	sock := dir + "/s"
	mustTool(t, "qemu-nbd", "--fork", "-r", "-f", "qcow2", "-B", bitmap, "-k", sock, "--pid-file", dir+"/pid", file)
	o := tool(t, "qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+sock+",x-dirty-bitmap=qemu:dirty-bitmap:"+bitmap)
	return o.stdout
}
