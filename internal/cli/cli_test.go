package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// outcome is what a run of a program shows.
type outcome struct {
	stdout, stderr string
	code           int
}

func drover(t *testing.T, args ...string) outcome {
	t.Helper()
	var out, err bytes.Buffer
	code := Run(t.Context(), args, &out, &err)
	return outcome{out.String(), err.String(), code}
}

// mustDrover is drover for preparations.
func mustDrover(t *testing.T, args ...string) string {
	t.Helper()
	o := drover(t, args...)
	if o.code != 0 {
		t.Fatalf("drover %q: code %d\n%s", args, o.code, o.stderr)
	}
	return o.stdout
}

func tool(t *testing.T, name string, args ...string) outcome {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
	cmd := exec.Command(name, args...)
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	if err := cmd.Run(); err != nil {
		if _, ok := err.(*exec.ExitError); !ok {
			t.Fatalf("%s %q: %v", name, args, err)
		}
	}
	return outcome{out.String(), err.String(), cmd.ProcessState.ExitCode()}
}

func mustTool(t *testing.T, name string, args ...string) {
	t.Helper()
	if o := tool(t, name, args...); o.code != 0 {
		t.Fatalf("%s %q: code %d\n%s%s", name, args, o.code, o.stdout, o.stderr)
	}
}

// sameAsQEMU runs qemu-img and drover with the same arguments and compares what they show.
func sameAsQEMU(t *testing.T, args ...string) {
	t.Helper()
	want := tool(t, "qemu-img", args...)
	want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
	got := drover(t, args...)
	compare(t, args, got, want)
}

func compare(t *testing.T, args []string, got, want outcome) {
	t.Helper()
	// qemu-img forgets the end of the line after its last hint.
	got.stderr, want.stderr = strings.TrimRight(got.stderr, "\n"), strings.TrimRight(want.stderr, "\n")
	if strings.Contains(strings.Join(args, " "), "=json") && want.code != 1 {
		if diff := cmp.Diff(parseJSON(t, want.stdout), parseJSON(t, got.stdout)); diff != "" {
			t.Errorf("%q: JSON differs (-qemu-img +drover):\n%s", args, diff)
		}
		got.stdout, want.stdout = "", ""
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(outcome{})); diff != "" {
		t.Errorf("%q differs (-qemu-img +drover):\n%s", args, diff)
	}
}

func parseJSON(t *testing.T, text string) any {
	t.Helper()
	if text == "" {
		return nil
	}
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

// images makes a folder of images of many kinds with QEMU's tools and works in it.
func images(t *testing.T) {
	t.Helper()
	t.Chdir(t.TempDir())
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q"}, args...)...) }
	io := func(file string, commands ...string) {
		var args []string
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		mustTool(t, "qemu-io", append(args, "-f", "qcow2", file)...)
	}
	if err := os.Mkdir("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, "raw", strings.Repeat("raw disk", 1000))
	if err := os.Truncate("raw", 1000001); err != nil {
		t.Fatal(err)
	}
	put(t, "empty", "")
	put(t, "dir/raw", "x")
	create("-f", "qcow2", "plain", "1M")
	create("-f", "qcow2", "-o", "compat=0.10", "v2", "10G")
	create("-f", "qcow2", "-o", "lazy_refcounts=on,refcount_bits=8,cluster_size=4k", "odd", "10G")
	create("-f", "qcow2", "-o", "extended_l2=on,compression_type=zstd", "extended", "1M")
	create("-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on", "datafile", "1M")
	create(append(slices.Clip(secretFoo), "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s", "aes", "1M")...)
	create("-f", "qcow2", "base", "4M")
	io("base", "write 1M 64k", "write 3M 128k")
	create("-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay", "4M")
	io("overlay", "write 0 64k", "write -z 1M 128k", "write -P 3 2M 64k")
	create("-f", "qcow2", "-b", "overlay", "-F", "qcow2", "top")
	create("-f", "qcow2", "-b", "raw", "-F", "raw", "onraw")
	create("-f", "qcow2", "-b", "dir/raw", "-F", "raw", "below")
	create("-f", "qcow2", "-b", "../base", "-F", "qcow2", "dir/up")
	create("-u", "-f", "qcow2", "-b", "missing", "-F", "raw", "orphan", "1M")
	create("-u", "-f", "qcow2", "-b", "nbd://localhost/x", "-F", "raw", "remote", "1M")
	create("-u", "-f", "qcow2", "-b", "loop2", "-F", "qcow2", "loop1", "1M")
	create("-u", "-f", "qcow2", "-b", "loop1", "-F", "qcow2", "loop2", "1M")
	create("-f", "qcow2", "snap", "5M")
	mustTool(t, "qemu-img", "snapshot", "-c", "one", "snap")
	io("snap", "write 0 64k")
	mustTool(t, "qemu-img", "snapshot", "-c", "two with a quite long name", "snap")
	mustTool(t, "qemu-img", "bitmap", "--add", "--disable", "snap", "b0")
	mustTool(t, "qemu-img", "bitmap", "--add", "-g", "1M", "snap", "b1")
	mustTool(t, "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "base", "compressed")
	edit(t, "plain", "dirty", 79, 3)           // dirty and corrupt
	edit(t, "base", "leaky", 0x20000+20, 0, 1) // a refcount of 1 for a free cluster
	edit(t, "base", "broken", 0x20000+4, 0, 0) // a refcount of 0 for a cluster in use
	edit(t, "plain", "version9", 7, 9)
	edit(t, "plain", "feature", 72, 0x80)
	edit(t, "plain", "short", 103, 90)
}

var secretFoo = []string{"--object", "secret,id=s,data=foo"}

// luksImage makes an encrypted image, which takes a while.
func luksImage(t *testing.T) {
	t.Helper()
	// On a busy host qemu-img may fail to find out how fast it is.
	for range 10 {
		if tool(t, "qemu-img", append([]string{"create", "-q"}, append(slices.Clip(secretFoo), "-f", "qcow2", "-o",
			"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "luks", "1M")...)...).code == 0 {
			return
		}
	}
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// edit copies a file and changes some bytes.
func edit(t *testing.T, from, to string, off int, bytes ...byte) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[off:], bytes)
	put(t, to, string(b))
}

var allImages = []string{
	"raw", "empty", "plain", "v2", "odd", "extended", "datafile", "base", "overlay", "top", "./top", "onraw", "below", "snap",
	"compressed", "dirty", "leaky", "file:base", "version9", "feature", "short", "missing", ".", "foo:bar",
}

func TestInfoLikeQEMU(t *testing.T) {
	images(t)
	luksImage(t)
	for _, name := range append(allImages, "luks", "aes", "orphan", "remote", "dir/up", "broken") {
		for _, flags := range [][]string{nil, {"--output=json"}, {"-f", "qcow2"}} {
			sameAsQEMU(t, append(append([]string{"info"}, flags...), name)...)
		}
	}
	for _, name := range []string{"top", "below", "base", "onraw", "raw", "loop1", "orphan"} {
		sameAsQEMU(t, "info", "--backing-chain", name)
		sameAsQEMU(t, "info", "--backing-chain", "--output=json", name)
	}
	sameAsQEMU(t, "info", "--image-opts", "driver=qcow2,file.driver=file,file.filename=base")
	sameAsQEMU(t, "info", "--image-opts", "-f", "raw", "driver=qcow2,file.filename=base")
}

func TestMapLikeQEMU(t *testing.T) {
	images(t)
	for _, name := range append(allImages, "orphan") {
		if name == "./top" {
			continue // names of files below lose the "./"
		}
		for _, flags := range [][]string{nil, {"--output=json"}, {"-s", "64k"}, {"-s", "1000", "-l", "3000", "--output=json"}} {
			sameAsQEMU(t, append(append([]string{"map"}, flags...), name)...)
		}
	}
}

// TestRareFlagsLikeQEMU: what need not be tried with every image.
func TestRareFlagsLikeQEMU(t *testing.T) {
	images(t)
	for _, cmd := range []string{"info", "map", "check"} {
		for _, name := range []string{"base", "raw", "missing", "file:base", "foo:bar"} {
			for _, flags := range [][]string{{"-U"}, {"-f", "raw"}, {"-f", "bogus"}} {
				sameAsQEMU(t, append(append([]string{cmd}, flags...), name)...)
			}
		}
	}
	for _, flags := range [][]string{{"-s", "20G"}, {"-s", "20G", "--output=json"}, {"-l", "0", "--output=json"}} {
		sameAsQEMU(t, append(append([]string{"map"}, flags...), "overlay")...)
	}
}

func TestCheckLikeQEMU(t *testing.T) {
	images(t)
	for _, name := range append(allImages, "broken") {
		for _, flags := range [][]string{nil, {"--output=json"}, {"-q"}} {
			sameAsQEMU(t, append(append([]string{"check"}, flags...), name)...)
		}
	}
}

func TestWrongArgumentsLikeQEMU(t *testing.T) {
	images(t)
	for _, args := range [][]string{
		{}, {"bogus"}, {"info"}, {"info", "a", "b"}, {"info", "--bogus", "base"}, {"info", "-Z", "base"}, {"info", "--output"},
		{"info", "-f"}, {"info", "--output=xml", "base"}, {"check"}, {"check", "a", "b"}, {"check", "-r", "foo", "base"},
		{"check", "--output=xml", "base"}, {"map"}, {"map", "a", "b"}, {"map", "-s", "x", "base"}, {"map", "-s", "9E", "base"},
		{"map", "-l", "-1", "base"}, {"map", "--output=xml", "base"}, {"create"}, {"create", "-f", "qcow2", "new"},
		{"create", "-f", "qcow2", "new", "1X"}, {"create", "new", "1M", "2M"}, {"create", "new", "8E"}, {"create", "new", "-5"},
	} {
		sameAsQEMU(t, args...)
	}
}

// TestCreateLikeQEMU creates with both tools, in two folders, and lets qemu-img tell the difference.
func TestCreateLikeQEMU(t *testing.T) {
	images(t)
	cases := [][]string{
		{"new", "1M"}, {"new", "1000"}, {"-f", "raw", "-o", "preallocation=full", "new", "100k"},
		{"-f", "raw", "-o", "preallocation=falloc", "new", "100k"}, {"-f", "raw", "-o", "cluster_size=1", "new", "1M"},
		{"-f", "foo", "new", "1M"}, {"-f", "raw", "-b", "base", "new", "1M"},
		{"-f", "raw", "-F", "raw", "new", "1M"}, {"-q", "-f", "qcow2", "new", "1M"},
		{"-f", "qcow2", "-b", "base", "new"}, {"-f", "qcow2", "-b", "base", "-F", "qcow2", "new"},
		{"-f", "qcow2", "-b", "base", "-F", "raw", "new"}, {"-f", "qcow2", "-b", "base", "-F", "qcow2", "new", "512"},
		{"-f", "qcow2", "-b", "base", "-F", "qcow2", "dir/new"}, {"-f", "qcow2", "-b", "../base", "-F", "qcow2", "dir/new"},
		{"-f", "qcow2", "-b", "missing", "-F", "qcow2", "new"}, {"-f", "qcow2", "-b", "missing", "new", "1M"},
		{"-u", "-f", "qcow2", "-b", "missing", "-F", "qcow2", "new"},
		{"-u", "-f", "qcow2", "-b", "missing", "-F", "qcow2", "new", "1M"},
		{"-u", "-f", "qcow2", "-b", "missing", "new", "1M"}, {"-f", "qcow2", "-b", "new", "-F", "qcow2", "new", "1M"},
		{"-f", "qcow2", "-F", "qcow2", "new", "1M"}, {"-f", "qcow2", "-b", "base", "-F", "bogus", "new", "1M"},
		{"-f", "qcow2", "-b", "", "new", "1M"}, {"-f", "qcow2", "-b", "raw", "-F", "qcow2", "new"},
		{"-f", "qcow2", "-b", "dir", "-F", "qcow2", "new"}, {"-f", "qcow2", "-b", "base", "-b", "raw", "-F", "raw", "new"},
		{"-f", "qcow2", "."}, {"-f", "qcow2", ".", "1M"}, {"-f", "qcow2", "/missing/new", "1M"}, {"-f", "qcow2", "a:b", "1M"},
		{"-f", "qcow2", "-o", "size=1M", "new", "2M"}, {"-f", "qcow2", "-o", "size=1M", "new"},
		{"-f", "qcow2", "-o", "size=1M,size=2M", "new"}, {"-f", "qcow2", "-o", "cluster_size=4k", "-o", "compat=v2", "new", "1M"},
	}
	for _, size := range []string{"0", "1", "513", "1.5G", "1T", "3P", "7E", "0x1000", "1b", "1.7k"} {
		cases = append(cases, []string{"-f", "qcow2", "new", size})
	}
	for _, option := range []string{
		"cluster_size=1000", "cluster_size=4M", "cluster_size=512", "cluster_size=2M", "cluster_size", "refcount_bits=3",
		"refcount_bits=1", "refcount_bits=64", "refcount_bits=x", "compat=v2", "compat=v3", "compat=1.1", "compat=0.10",
		"compat=3",
		"compat=0.10,lazy_refcounts=on", "compat=0.10,refcount_bits=8", "compat=0.10,extended_l2=on",
		"compat=0.10,compression_type=zstd", "compat=0.10,cluster_size=8k,extended_l2=on", "extended_l2=on",
		"extended_l2=on,cluster_size=8k", "compression_type=lz", "compression_type=zstd", "lazy_refcounts", "lazy_refcounts=off",
		"lazy_refcounts=maybe", "size=x", "preallocation=foo", "preallocation=off", "preallocation=metadata",
		"preallocation=falloc", "preallocation=full", "foo=1", "backing_file=base,backing_fmt=qcow2",
		"backing_file=base,backing_fmt=qcow2,preallocation=metadata", "", "compat=v3,,x",
	} {
		cases = append(cases, []string{"-f", "qcow2", "-o", option, "new", "1M"})
	}
	for _, args := range cases {
		compareCreate(t, append([]string{"create"}, args...))
	}
}

var diskSize = regexp.MustCompile(`(?m)^disk size:.*\n`)

func compareCreate(t *testing.T, args []string) {
	t.Helper()
	name := "new"
	if strings.Contains(strings.Join(args, " "), "dir/new") {
		name = "dir/new"
	}
	run := func(fn func() outcome) (outcome, string) {
		if err := os.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
		o := fn()
		if _, err := os.Stat(name); err != nil || o.code != 0 {
			return o, ""
		}
		info := tool(t, "qemu-img", "info", name)
		if strings.Contains(info.stdout, "qcow2") && args[1] != "-u" {
			if c := tool(t, "qemu-img", "check", name); c.code != 0 {
				t.Errorf("%q: the image has errors:\n%s%s", args, c.stdout, c.stderr)
			}
		}
		return o, diskSize.ReplaceAllString(info.stdout, "") + info.stderr
	}
	want, wantInfo := run(func() outcome { return tool(t, "qemu-img", args...) })
	want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
	got, gotInfo := run(func() outcome { return drover(t, args...) })
	compare(t, args, got, want)
	if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
		t.Errorf("%q: the images differ (-qemu-img +drover):\n%s", args, diff)
	}
}

func TestCreateOptionsHelp(t *testing.T) {
	sameAsQEMU(t, "create", "-f", "qcow2", "-o", "help")
	got := mustDrover(t, "create", "-f", "qcow2", "-o", "help", "new")
	want := tool(t, "qemu-img", "create", "-f", "qcow2", "-o", "help", "new").stdout
	for _, line := range strings.Split(strings.TrimSpace(got), "\n")[1:] {
		if !strings.Contains(want, line+"\n") {
			t.Errorf("qemu-img does not have the line %q", line)
		}
	}
	if strings.Count(got, "\n") != len(qcow2Options)+1 {
		t.Errorf("%d lines for %d options", strings.Count(got, "\n"), len(qcow2Options))
	}
}

// holdOpen has qemu-io hold an image open for writing. It returns how to let go of it.
func holdOpen(t *testing.T, image string) (release func()) {
	t.Helper()
	hold := exec.Command("qemu-io", "-f", "qcow2", image)
	in, err := hold.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := hold.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Start(); err != nil {
		t.Skip("qemu-io is not installed")
	}
	release = func() {
		if err := in.Close(); err != nil {
			t.Error(err)
		}
		if err := hold.Wait(); err != nil {
			t.Error(err)
		}
	}
	if _, err := out.Read(make([]byte, 8)); err != nil { // the prompt: the image is open
		t.Fatal(err)
	}
	return release
}

// TestLockedImage: an image in use is refused by every command, in qemu-img's words, and survives a create.
func TestLockedImage(t *testing.T) {
	images(t)
	before, err := os.ReadFile("base")
	if err != nil {
		t.Fatal(err)
	}
	defer holdOpen(t, "base")()
	for _, args := range [][]string{
		{"info", "base"}, {"map", "base"}, {"check", "base"}, {"info", "-U", "base"}, {"map", "-U", "base"},
		{"check", "-U", "base"},
		{"create", "-f", "qcow2", "base", "1M"}, {"create", "-f", "raw", "base", "1M"},
		{"map", "overlay"},
	} {
		sameAsQEMU(t, args...)
	}
	if after, err := os.ReadFile("base"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image in use has changed (%v)", err)
	}
}

func TestPolicyFlags(t *testing.T) {
	images(t)
	for _, cmd := range [][]string{{"info", "--backing-chain"}, {"map"}} {
		o := drover(t, append(cmd, "dir/up")...)
		if o.code != 1 || !strings.Contains(o.stderr, `--allow-path "."`) {
			t.Errorf("%q: code %d, %s", cmd, o.code, o.stderr)
		}
		mustDrover(t, append(cmd, "--allow-path", ".", "dir/up")...)
		mustDrover(t, append(cmd, "--allow-any-path", "dir/up")...)
		if o := drover(t, append(cmd, "--allow-path", "dir", "dir/up")...); o.code != 1 {
			t.Errorf("%q with the wrong folder: code %d", cmd, o.code)
		}
	}
	// Names in an image are shown, not followed.
	if out := mustDrover(t, "info", "remote"); !strings.Contains(out, "backing file: nbd://localhost/x\n") {
		t.Errorf("info shows\n%s", out)
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"-h"}, {"help"}} {
		out := mustDrover(t, args...)
		for _, c := range []string{"create", "info", "check", "map", "serve", "version"} {
			if !strings.Contains(out, "\n  "+c+" ") {
				t.Errorf("%q does not list %s:\n%s", args, c, out)
			}
		}
	}
	a, b := mustDrover(t, "help", "serve"), mustDrover(t, "serve", "--help")
	if a != b || !strings.Contains(a, "--socket PATH") {
		t.Errorf("help serve:\n%s", a)
	}
	if o := drover(t, "help", "bogus"); o.code != 1 || !strings.Contains(o.stderr, "Command not found: bogus") {
		t.Errorf("help bogus: code %d, %s", o.code, o.stderr)
	}
	if a, b := mustDrover(t, "version"), mustDrover(t, "--version"); a != b || !strings.HasPrefix(a, "drover version ") {
		t.Errorf("version: %q, --version: %q", a, b)
	}
}

func TestHumanSize(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1: "1 B", 999: "999 B", 1000: "0.977 KiB", 1024: "1 KiB", 1536: "1.5 KiB", 1000448: "977 KiB",
		1 << 20: "1 MiB", 1 << 30: "1 GiB", 5 << 40: "5 TiB", 1 << 60: "1 EiB", 1<<64 - 1: "16 EiB",
	} {
		if got := humanSize(n); got != want {
			t.Errorf("humanSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestSplitOptions(t *testing.T) {
	for text, want := range map[string][]string{
		"": {""}, "a": {"a"}, "a,b": {"a", "b"}, "a,,b": {"a,b"}, "a,,,b": {"a,", "b"}, ",": {"", ""}, "a=,": {"a=", ""},
	} {
		if diff := cmp.Diff(want, splitOptions(text)); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
}

func TestCancelledContext(t *testing.T) {
	images(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, err bytes.Buffer
	if code := Run(ctx, []string{"map", "base"}, &out, &err); code != 1 || !strings.Contains(err.String(), "canceled") {
		t.Errorf("code %d, %s", code, &err)
	}
}
