package cli

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sameChangeAsQEMU runs both tools on copies of a file, and compares what they print, what the image says of itself
// afterwards, and the disk. What drover leaves is without errors.
func sameChangeAsQEMU(t *testing.T, file string, args ...string) {
	t.Helper()
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	run := func(fn func() outcome) (outcome, string) {
		put(t, file, string(before))
		o := fn()
		if o.code != 0 {
			return o, ""
		}
		info := tool(t, "qemu-img", "info", "-U", file)
		return o, diskSize.ReplaceAllString(info.stdout, "") + info.stderr
	}
	want, wantInfo := run(func() outcome { return tool(t, "qemu-img", args...) })
	after, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	put(t, file+".stock", string(after))
	want.stderr = strings.ReplaceAll(want.stderr, "qemu-img:", "drover:")
	want.stderr = strings.ReplaceAll(want.stderr, "Try 'qemu-img", "Try 'drover")
	got, gotInfo := run(func() outcome { return drover(t, args...) })
	compare(t, args, got, want)
	defer put(t, file, string(before))
	if want.code != 0 {
		left, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(left, before) {
			t.Errorf("%q: refused, and the image has changed", args)
		}
		return
	}
	if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
		t.Errorf("%q: the images differ (-qemu-img +drover):\n%s", args, diff)
	}
	if strings.Contains(gotInfo, "format: qcow2") {
		if o := tool(t, "qemu-img", "check", "-q", "--image-opts", "driver=qcow2,backing=,file.filename="+file); o.code != 0 {
			t.Errorf("%q: check: %s%s", args, o.stdout, o.stderr)
		}
		if strings.Contains(gotInfo, "backing file:") {
			return
		}
		mustTool(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", file, file+".stock")
	}
}

func TestResizeLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q"}, args...)...) }
	create("-f", "qcow2", "disk", "1M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "disk")
	create("-f", "qcow2", "-o", "compat=0.10", "v2", "1M")
	create("-f", "qcow2", "-o", "compat=0.10", "v2snap", "1M")
	mustTool(t, "qemu-img", "snapshot", "-c", "s", "v2snap")
	create("-f", "qcow2", "-o", "extended_l2=on", "ext", "1M")
	create("-f", "raw", "raw", "1M")
	for _, c := range []struct {
		file string
		args []string
	}{
		{"disk", []string{"disk", "2M"}}, {"disk", []string{"disk", "+1M"}}, {"disk", []string{"-f", "qcow2", "disk", "1G"}},
		{"disk", []string{"disk", "512K"}}, {"disk", []string{"--shrink", "disk", "512K"}}, {"disk", []string{"--shrink", "disk", "-64k"}},
		{"disk", []string{"disk", "-64k"}}, {"disk", []string{"disk", "1000001"}}, {"disk", []string{"disk", "+1000"}},
		{"disk", []string{"disk"}}, {"disk", []string{}}, {"disk", []string{"disk", "x"}}, {"disk", []string{"disk", "1.5x"}},
		{"disk", []string{"disk", "3P"}}, {"disk", []string{"disk", "9E"}}, {"disk", []string{"disk", "-20G"}}, {"disk", []string{"disk", "0"}},
		{"disk", []string{"--shrink", "disk", "0"}}, {"disk", []string{"--preallocation=foo", "disk", "2M"}}, {"disk", []string{"disk", "+0"}},
		{"disk", []string{"--preallocation=metadata", "disk", "2M"}}, {"disk", []string{"--preallocation=falloc", "disk", "2M"}},
		{"disk", []string{"--preallocation=full", "disk", "2M"}}, {"disk", []string{"--preallocation=off", "disk", "2M"}},
		{"disk", []string{"--shrink", "--preallocation=full", "disk", "512K"}}, {"disk", []string{"-q", "disk", "2M"}},
		{"disk", []string{"disk", "2M", "3M"}}, {"disk", []string{"missing", "2M"}}, {"disk", []string{"-f", "nosuch", "disk", "2M"}},
		{"disk", []string{"--image-opts", "driver=qcow2,file.filename=disk", "2M"}},
		{"disk", []string{"--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=disk", "2M"}},
		{"v2", []string{"v2", "2M"}}, {"v2", []string{"--shrink", "v2", "1k"}}, {"v2snap", []string{"v2snap", "2M"}},
		{"ext", []string{"ext", "2M"}}, {"ext", []string{"--shrink", "ext", "1k"}}, {"ext", []string{"--preallocation=metadata", "ext", "3M"}},
		{"raw", []string{"raw", "2M"}}, {"raw", []string{"-f", "raw", "raw", "2000001"}}, {"raw", []string{"-f", "raw", "raw", "1000"}},
		{"raw", []string{"-f", "raw", "--shrink", "raw", "1000"}}, {"raw", []string{"-f", "raw", "--preallocation=falloc", "raw", "2M"}},
		{"raw", []string{"-f", "raw", "--preallocation=full", "raw", "2M"}}, {"raw", []string{"-f", "raw", "--preallocation=metadata", "raw", "2M"}},
	} {
		sameChangeAsQEMU(t, c.file, append([]string{"resize"}, c.args...)...)
	}
}

func TestAmendLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q"}, args...)...) }
	create("-f", "qcow2", "disk", "1M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -z 64k 64k", "disk")
	create("-f", "qcow2", "-o", "compat=0.10", "v2", "1M")
	create("-f", "qcow2", "-o", "refcount_bits=8", "narrow", "1M")
	create("-f", "qcow2", "-o", "extended_l2=on", "ext", "1M")
	create("-f", "qcow2", "-o", "compression_type=zstd", "zstd", "1M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -c -P 1 0 64k", "zstd")
	create("-f", "qcow2", "-o", "compression_type=zstd", "nozstd", "1M")
	create("-f", "qcow2", "snap", "1M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "snap")
	mustTool(t, "qemu-img", "snapshot", "-c", "s", "snap")
	create("-f", "qcow2", "oldsnap", "1M")
	mustTool(t, "qemu-img", "snapshot", "-c", "s", "oldsnap")
	mustTool(t, "qemu-img", "resize", "-q", "oldsnap", "2M")
	create("-f", "qcow2", "-b", "disk", "-F", "qcow2", "overlay")
	create("-f", "raw", "raw", "1M")
	for _, c := range []struct {
		file string
		args []string
	}{
		{"disk", []string{"-f", "qcow2", "disk"}}, {"disk", []string{"-o", "compat=0.10"}}, {"disk", []string{"-o", "compat=0.10", "disk"}},
		{"disk", []string{"-o", "compat=v2", "disk"}}, {"disk", []string{"-o", "compat=v3", "disk"}}, {"disk", []string{"-o", "compat=1.2", "disk"}},
		{"disk", []string{"-p", "-o", "compat=1.1", "disk"}}, {"disk", []string{"-p", "-q", "-o", "compat=1.1", "disk"}},
		{"disk", []string{"-o", "lazy_refcounts=on", "disk"}}, {"disk", []string{"-o", "lazy_refcounts=foo", "disk"}},
		{"disk", []string{"-o", "refcount_bits=64", "disk"}}, {"disk", []string{"-o", "refcount_bits=1", "disk"}},
		{"disk", []string{"-o", "refcount_bits=3", "disk"}}, {"disk", []string{"-o", "refcount_bits=128", "disk"}},
		{"disk", []string{"-o", "refcount_bits=foo", "disk"}}, {"disk", []string{"-o", "compat=0.10,refcount_bits=8", "disk"}},
		{"disk", []string{"-o", "compat=0.10,lazy_refcounts=on", "disk"}}, {"disk", []string{"-o", "cluster_size=4096", "disk"}},
		{"disk", []string{"-o", "extended_l2=on", "disk"}}, {"disk", []string{"-o", "compression_type=zstd", "disk"}},
		{"disk", []string{"-o", "preallocation=full", "disk"}}, {"disk", []string{"-o", "encryption=on", "disk"}},
		{"disk", []string{"-o", "encrypt.format=luks", "disk"}}, {"disk", []string{"-o", "encrypt.state=active", "disk"}},
		{"disk", []string{"-o", "nosuch=1", "disk"}}, {"disk", []string{"-o", "size=2M", "disk"}}, {"disk", []string{"-o", "size=512k", "disk"}},
		{"disk", []string{"-o", "size=1000", "disk"}}, {"disk", []string{"-o", "size=foo", "disk"}}, {"disk", []string{"-o", "", "disk"}},
		{"disk", []string{"-o", ",", "disk"}}, {"disk", []string{"-o", "data_file=x", "disk"}}, {"disk", []string{"-o", "data_file_raw=on", "disk"}},
		{"disk", []string{"-o", "backing_file=x", "disk"}}, {"disk", []string{"-o", "backing_fmt=raw", "disk"}},
		{"disk", []string{"-o", "size=2M", "missing"}}, {"disk", []string{"-f", "nosuch", "-o", "size=2M", "disk"}},
		{"disk", []string{"-t", "foo", "-o", "size=2M", "disk"}}, {"disk", []string{"-o", "help", "-f", "qcow2"}},
		{"disk", []string{"-o", "help", "disk"}}, {"disk", []string{"-o", "help"}}, {"disk", []string{"-o", "help", "-f", "raw"}},
		{"disk", []string{"-o", "compat=1.1,refcount_bits=32,size=4M,lazy_refcounts=on", "disk"}},
		{"v2", []string{"-o", "compat=1.1", "v2"}}, {"v2", []string{"-o", "refcount_bits=32", "v2"}}, {"v2", []string{"-o", "lazy_refcounts=on", "v2"}},
		{"v2", []string{"-o", "compat=1.1,refcount_bits=32,lazy_refcounts=on", "v2"}},
		{"narrow", []string{"-o", "compat=0.10", "narrow"}}, {"narrow", []string{"-o", "compat=0.10,refcount_bits=16", "narrow"}},
		{"ext", []string{"-o", "compat=0.10", "ext"}}, {"zstd", []string{"-o", "compat=0.10", "zstd"}}, {"nozstd", []string{"-o", "compat=0.10", "nozstd"}},
		{"snap", []string{"-o", "compat=0.10", "snap"}}, {"snap", []string{"-o", "refcount_bits=1", "snap"}},
		{"snap", []string{"-o", "refcount_bits=2", "snap"}}, {"oldsnap", []string{"-o", "compat=0.10", "oldsnap"}},
		{"overlay", []string{"-o", "backing_file=other", "overlay"}}, {"overlay", []string{"-o", "compat=0.10", "overlay"}},
		{"raw", []string{"-f", "raw", "-o", "size=2M", "raw"}},
	} {
		sameChangeAsQEMU(t, c.file, append([]string{"amend"}, c.args...)...)
	}
}

func TestRebaseUnsafeLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q"}, args...)...) }
	create("-f", "raw", "base", "1M")
	create("-f", "qcow2", "-b", "base", "-F", "raw", "disk", "2M")
	create("-f", "qcow2", "-o", "cluster_size=512", "-b", "base", "-F", "raw", "small", "2M")
	create("-u", "-f", "qcow2", "-b", "missing", "-F", "raw", "orphan", "1M")
	create("-f", "qcow2", "flat", "1M")
	for _, c := range []struct {
		file string
		args []string
	}{
		{"disk", []string{"-u", "-b", "other", "disk"}}, {"disk", []string{"-u", "-b", "other", "-F", "raw", "disk"}},
		{"disk", []string{"-u", "-b", "", "disk"}}, {"disk", []string{"-u", "-b", "", "-F", "raw", "disk"}}, {"disk", []string{"-u", "disk"}},
		{"disk", []string{"-u", "-F", "raw", "disk"}}, {"disk", []string{"-u", "-b", "base", "-F", "nosuch", "disk"}}, {"disk", []string{"disk"}},
		{"disk", []string{"-u", "-b", strings.Repeat("a", 1024), "-F", "raw", "disk"}},
		{"disk", []string{"-u", "-b", strings.Repeat("a", 1023), "-F", "raw", "disk"}},
		{"disk", []string{"-u", "-b", "disk", "-F", "qcow2", "disk"}}, {"disk", []string{"-p", "-u", "-b", "base", "-F", "raw", "disk"}},
		{"disk", []string{"-q", "-u", "-b", "base", "-F", "raw", "disk"}}, {"disk", []string{"-u", "-b", "base", "-F", "raw"}},
		{"disk", []string{"-u", "-b", "base", "-F", "raw", "a", "b"}}, {"disk", []string{"-u", "-b", "base", "-F", "raw", "-t", "foo", "disk"}},
		{"disk", []string{"-u", "-b", "base", "-F", "raw", "missing"}}, {"disk", []string{"-u", "-b", "base", "-F", "raw", "-f", "raw", "disk"}},
		{"small", []string{"-u", "-b", strings.Repeat("a", 600), "-F", "raw", "small"}},
		{"small", []string{"-u", "-b", strings.Repeat("a", 200), "-F", "raw", "small"}},
		{"orphan", []string{"-u", "-b", "base", "-F", "raw", "orphan"}}, {"flat", []string{"-u", "-b", "base", "-F", "raw", "flat"}},
	} {
		sameChangeAsQEMU(t, c.file, append([]string{"rebase"}, c.args...)...)
	}
}
