package cli

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// runAs runs drover with the given standard input.
func runAs(t *testing.T, in []byte, args ...string) (stdout []byte, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Main(t.Context(), program, args, struct{ *bytes.Reader }{bytes.NewReader(in)}, &out, &errs)
	return out.Bytes(), errs.String(), code
}

// TestConvertToAPipe: what goes to standard output is a whole image, by stock qemu-img's judgement too.
func TestConvertToAPipe(t *testing.T) {
	images(t)
	put(t, "noise.raw", noise(3<<20+1234))
	mustTool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "0", "noise.raw", "noise")
	for _, name := range []string{"raw", "plain", "extended", "base", "overlay", "top", "onraw", "snap", "compressed", "empty", "odd", "noise", "datafile"} {
		for _, flags := range []string{"-O qcow2", "-O qcow2 -c", "-O qcow2 -c -o compression_type=zstd", "-O qcow2 -o cluster_size=512", "-O qcow2 -c -o cluster_size=512",
			"-O qcow2 -c -o cluster_size=2M", "-O qcow2 -o compat=0.10", "-O qcow2 -c -o extended_l2=on", "-O qcow2 -o refcount_bits=64,lazy_refcounts=on", "-O raw"} {
			if name == "odd" && (strings.Contains(flags, "512") || strings.Contains(flags, "raw")) {
				continue // 10 GiB
			}
			args := append([]string{"convert"}, append(strings.Fields(flags), name, "-")...)
			out, stderr, code := runAs(t, nil, args...)
			if code != 0 || stderr != "" {
				t.Fatalf("%q: code %d: %s", args, code, stderr)
			}
			put(t, "out", string(out))
			if strings.Contains(flags, "qcow2") {
				mustTool(t, "qemu-img", "check", "-q", "-f", "qcow2", "out")
				mustDrover(t, "check", "-q", "-f", "qcow2", "out")
				mustTool(t, "qemu-img", "compare", "-q", "-F", "qcow2", name, "out")
			} else {
				mustTool(t, "qemu-img", "compare", "-q", "-F", "raw", name, "out")
			}
		}
	}
	out, _, _ := runAs(t, nil, "convert", "-O", "qcow2", "-c", "base", "-")
	mustDrover(t, "convert", "-O", "qcow2", "-c", "base", "filed")
	if st, err := os.Stat("filed"); err != nil || int64(len(out)) > st.Size()+3<<16 {
		t.Errorf("the stream has %d bytes, a file %d (%v)", len(out), st.Size(), err)
	}
	out, _, _ = runAs(t, nil, "convert", "-l", "one", "-O", "qcow2", "snap", "/dev/stdout")
	put(t, "out", string(out))
	mustDrover(t, "convert", "-l", "one", "-O", "qcow2", "snap", "out2")
	mustTool(t, "qemu-img", "compare", "-q", "out", "out2")
	for _, args := range []string{"-O qcow2 base snap -", "-O raw -c base -", "-n -O qcow2 base -", "-O qcow2 -B base -F qcow2 overlay -",
		"-O qcow2 -o preallocation=full base -", "-O qcow2 -o data_file=x base -", "-O qcow2 -o nosuch=1 base -", "--bitmaps -O qcow2 base -"} {
		if out, stderr, code := runAs(t, nil, append([]string{"convert"}, strings.Fields(args)...)...); code != 1 || stderr == "" || len(out) > 0 {
			t.Errorf("%q: code %d, %d bytes, %q", args, code, len(out), stderr)
		}
	}
}

// TestConvertToAFIFO writes to a pipe with a name.
func TestConvertToAFIFO(t *testing.T) {
	images(t)
	if err := syscall.Mkfifo("fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	read := exec.Command("sh", "-c", "cat fifo > out")
	if err := read.Start(); err != nil {
		t.Fatal(err)
	}
	mustDrover(t, "convert", "-O", "qcow2", "-c", "top", "fifo")
	if err := read.Wait(); err != nil {
		t.Fatal(err)
	}
	mustTool(t, "qemu-img", "check", "-q", "-f", "qcow2", "out")
	mustTool(t, "qemu-img", "compare", "-q", "top", "out")
}

// TestConvertFromAPipe: the length of a raw disk is known when it ends; images are spooled.
func TestConvertFromAPipe(t *testing.T) {
	images(t)
	mustTool(t, "qemu-img", "convert", "-O", "raw", "top", "top.raw")
	top, err := os.ReadFile("top.raw")
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, 512, 70000, 1 << 20, len(top), len(top) - 5000} {
		in := top[:size]
		put(t, "in", string(in))
		for _, flags := range []string{"-f raw -O qcow2", "-f raw -O qcow2 -c", "-O qcow2 -S 0", "-f raw -O raw", "-f raw -O qcow2 -o cluster_size=4k -c", "-f raw -O qcow2 -o extended_l2=on"} {
			args := append([]string{"convert"}, append(strings.Fields(flags), "-", "out")...)
			if _, stderr, code := runAs(t, in, args...); code != 0 || stderr != "" {
				t.Fatalf("%d bytes, %q: code %d: %s", size, args, code, stderr)
			}
			format := "raw"
			if strings.Contains(flags, "qcow2") {
				format = "qcow2"
				mustTool(t, "qemu-img", "check", "-q", "-f", "qcow2", "out")
			}
			mustTool(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", format, "in", "out")
			if want := (size + 511) / 512 * 512; size > 0 && !strings.Contains(mustDrover(t, "info", "--output=json", "out"), `"virtual-size": `+strconv.Itoa(want)+",") {
				t.Errorf("%d bytes, %q: %s", size, args, mustDrover(t, "info", "out"))
			}
		}
	}
	b, err := os.ReadFile("base")
	if err != nil {
		t.Fatal(err)
	}
	spool := t.TempDir()
	_, stderr, code := runAs(t, b, "convert", "-f", "qcow2", "-O", "raw", "--spool="+spool, "-", "out")
	if code != 0 || !strings.Contains(stderr, spool) {
		t.Errorf("code %d: %s", code, stderr)
	}
	mustTool(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "base", "out")
	if left, err := filepath.Glob(spool + "/*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	f, err := os.Open("base") // a file can be read in any order
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out, errs bytes.Buffer
	if code := Main(t.Context(), program, []string{"convert", "-O", "raw", "-", "out"}, f, &out, &errs); code != 0 || errs.Len() > 0 {
		t.Errorf("code %d: %s", code, errs.String())
	}
	mustTool(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "base", "out")
	if _, stderr, code := runAs(t, top, "convert", "-f", "raw", "-O", "qcow2", "-", "-"); code != 1 || stderr == "" {
		t.Errorf("from a pipe to a pipe: code %d: %s", code, stderr)
	}
	// Under the name of qemu-img "-" is a file.
	var qout, qerr bytes.Buffer
	if code := Main(t.Context(), "qemu-img", []string{"convert", "-f", "raw", "-", "out"}, bytes.NewReader(top), &qout, &qerr); code != 1 ||
		!strings.Contains(qerr.String(), "Could not open '-'") {
		t.Errorf("code %d: %s", code, qerr.String())
	}
}

// noise returns bytes that do not compress, and some that do.
func noise(n int) string {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
		if i>>17&1 == 1 {
			b[i] = byte(i >> 12)
		}
	}
	return string(b)
}
