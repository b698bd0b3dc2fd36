package cli

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/peer"
)

// stock runs a program with an input.
func stock(t *testing.T, input, name string, args ...string) outcome {
	t.Helper()
	peer.Need(t, name)
	cmd := exec.Command(name, args...)
	var out, err bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &err
	if err := cmd.Run(); err != nil {
		if _, ok := err.(*exec.ExitError); !ok {
			t.Fatalf("%s %q: %v", name, args, err)
		}
	}
	return outcome{out.String(), err.String(), cmd.ProcessState.ExitCode()}
}

// as runs drover under another program's name.
func as(t *testing.T, input, name string, args ...string) outcome {
	t.Helper()
	var out, err bytes.Buffer
	code := Main(t.Context(), "/usr/bin/"+name, args, strings.NewReader(input), &out, &err)
	return outcome{out.String(), err.String(), code}
}

var (
	ioTimes   = regexp.MustCompile(`ops; .* ops/sec\)`)
	ioMachine = regexp.MustCompile(`(?m)^(\d+,\d+),\d+:\d\d:\d\d\.\d\d,[\d.]+,[\d.]+$`)
)

// withoutTimes masks what differs from run to run.
func withoutTimes(o outcome) outcome {
	o.stdout = ioTimes.ReplaceAllString(o.stdout, "ops; TIME")
	o.stdout = ioMachine.ReplaceAllString(o.stdout, "$1,TIME")
	return o
}

// files returns the content of the files of a folder.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]string)
	for _, e := range list {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = string(b)
	}
	return all
}

// fill makes a folder that has nothing but these files.
func fill(t *testing.T, dir string, all map[string]string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range all {
		put(t, filepath.Join(dir, name), content)
	}
}

// ioImages makes the images that qemu-io works on and returns them by name.
func ioImages(t *testing.T) map[string]string {
	t.Helper()
	peer.Need(t, "qemu-io", "qemu-img")
	dir := t.TempDir()
	t.Chdir(dir)
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q", "-f"}, args...)...) }
	write := func(name string, commands ...string) {
		args := []string{"-f", "qcow2"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		mustTool(t, "qemu-io", append(args, name)...)
	}
	create("qcow2", "disk", "1M")
	write("disk", "write -P 0xab 0 192k", "write -z 512k 64k", "write -c -P 5 640k 64k")
	create("qcow2", "-o", "compat=0.10", "v2", "1M")
	write("v2", "write -P 0xab 0 192k")
	create("qcow2", "-o", "extended_l2=on,cluster_size=16k", "ext", "1M")
	write("ext", "write -P 0xab 512 20k", "write -z 64k 1k")
	create("qcow2", "-o", "cluster_size=512,refcount_bits=1", "small", "1000448")
	write("small", "write -P 0xab 0 1234")
	create("qcow2", "-b", "disk", "-F", "qcow2", "over", "2M")
	write("over", "write -P 0xee 64k 64k")
	create("qcow2", "-o", "lazy_refcounts=on", "lazy", "1M")
	create("qcow2", "empty", "0")
	put(t, "raw", strings.Repeat("raw disk", 100))
	if err := os.Truncate("raw", 1000001); err != nil {
		t.Fatal(err)
	}
	edit(t, "disk", "corrupt", 79, 2)
	edit(t, "disk", "dirty", 79, 1)
	put(t, "nothing", "")
	put(t, "pattern", "abcdefg")
	return files(t, dir)
}

// ioCase is a run of qemu-io. Its commands are separated by "; ".
type ioCase struct {
	args, commands, file string
	input                string // for commands that come from the standard input
}

func (c ioCase) line() []string {
	args := strings.Fields(c.args)
	if c.commands != "" {
		for _, text := range strings.Split(c.commands, "; ") {
			args = append(args, "-c", text)
		}
	}
	return append(args, strings.Fields(c.file)...)
}

func (c ioCase) String() string { return fmt.Sprintf("qemu-io %q < %q", c.line(), c.input) }

// sameIO runs both programs on equal files and compares all that is left.
func sameIO(t *testing.T, all map[string]string, c ioCase) {
	t.Helper()
	root := t.TempDir()
	run := func(name string, fn func() outcome) (outcome, string) {
		dir := filepath.Join(root, name)
		fill(t, dir, all)
		t.Chdir(dir)
		return withoutTimes(fn()), dir
	}
	want, theirs := run("stock", func() outcome { return stock(t, c.input, "qemu-io", c.line()...) })
	got, ours := run("drover", func() outcome { return as(t, c.input, "qemu-io", c.line()...) })
	// Both tell how they are used, each in its own words.
	if strings.HasPrefix(want.stdout, "Usage: ") && strings.HasPrefix(got.stdout, "Usage: ") {
		want.stdout, got.stdout = "", ""
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(outcome{})); diff != "" {
		t.Errorf("%v differs (-stock +drover):\n%s", c, diff)
		return
	}
	t.Chdir(ours)
	after := files(t, ours)
	for name, content := range files(t, theirs) {
		if content == all[name] && after[name] == all[name] {
			continue
		}
		format := "raw"
		if strings.HasPrefix(content, "QFI\xfb") {
			format = "qcow2"
			checkBoth(t, c, name)
		}
		o := tool(t, "qemu-img", "compare", "-f", format, "-F", format, name, filepath.Join(theirs, name))
		if o.code != 0 {
			t.Errorf("%v: %s: %s%s", c, name, o.stdout, o.stderr)
		}
	}
}

// checkBoth checks an image that drover has written with both checkers.
func checkBoth(t *testing.T, c any, name string) {
	t.Helper()
	if o := tool(t, "qemu-img", "check", "--image-opts", "driver=qcow2,backing=,file.filename="+name); o.code != 0 {
		t.Errorf("%v: %s: check: %s%s", c, name, o.stdout, o.stderr)
	}
	file, err := storage.OpenFile(name, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	report, err := qcow2.CheckFile(t.Context(), file, qcow2.CheckOptions{})
	if err != nil || len(report.Findings) > 0 {
		t.Errorf("%v: %s: %v %+v", c, name, err, report)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestIOCommandsLikeQEMU(t *testing.T) {
	all := ioImages(t)
	for _, c := range []ioCase{
		// read
		{commands: "read 0 512; read 0 64k; read 1000 3000; read 1M 512; read 1048575 1; read 1048575 2", file: "disk"},
		{commands: "read -v 0 64; read -v 0 50; read -v 1 31; read -v 0 0; read -v 262100 100; read -v 4294967296 1", file: "disk"},
		{commands: "read -P 0xab 0 64k; read -P 0xac 0 64k; read -P 0 196608 64k; read -P 5 640k 64k", file: "disk"},
		{commands: "read -P 1 -s 512 0 512; read -P 1 -s 500 0 512; read -P 1 -l 513 0 512; read -P 1 -l 12 0 512", file: "disk"},
		{commands: "read -P 0xab -s 10 -l 20 0 512; read -P 1 -s 10 -l 20 512 512; read -P 0xab -s 600 0 512", file: "disk"},
		{commands: "read -P 3 -s 600 -l 1 0 512; read -P 3 -s x 0 1; read -P 3 -l x 0 1; read -l 10 0 1; read -s 1 0 1", file: "disk"},
		{commands: "read -C 0 512; read -q 0 512; read -qC 0 512; read -qv 0 16; read -q -P 3 -v 0 16; read -p 0 512", file: "disk"},
		{commands: "read x 512; read 0 x; read 0; read; read 0 1 2; read -1 1; read 0 -1; read 0 3G; read -X 0 1; read -a 0 1", file: "disk"},
		{commands: "read -P; read 0 1 -P; read -P x 0 1; read -P 256 0 1; read -P -1 0 1; read -P +5 0 1; read -P 08 0 1", file: "disk"},
		{commands: "read -l 3 x y; read -l 3 0 y; read 0 1 -v; read -- 0 1; read -P 010 0 1; read -P 0XAB 0 1; read -P 0b1 0 1", file: "disk"},
		{commands: "read 8E 1; read 9E 1; read 0x7fffffffffffffff 1; read 1.5 1; read 0 1.5k; read 0 1e; read 0 0x10; read +0 1b", file: "disk"},
		{commands: "read 0 0; read 1M 0; read 0 1k;length; r 0 1k", file: "disk"},
		{commands: "read 0 512; read -v 799 12; read 1000440 8; read 1000447 1; read 1000448 1; read -P 0 900 99000", file: "raw", args: "-f raw"},
		// readv
		{commands: "readv 0 64k; readv 0 512 512 100; readv -v 0 16 16 8; readv -P 0xab 0 1k 1k; readv -P 1 0 1k 1k; readv -C 0 512", file: "disk"},
		{commands: "readv -q 0 512; readv 0; readv 0 x; readv x 1; readv 0 -1; readv 0 3G; readv 0 1G 1G; readv 1M 16; readv -b 0 512", file: "disk"},
		// write
		{commands: "write 0 64k; write -P 7 100 100; write 900k 100k; write 1M 512; write 1048575 2; write -P 0x11 640k 10", file: "disk"},
		{commands: "write -P 7 100 100; read -v 90 120; write 500k 100k; read -P 0xcd 500k 100k", file: "v2"},
		{commands: "write -P 7 100 100; write -P 9 64k 2k; write -z 0 2k; write -zu 4k 8k; map", file: "ext"},
		{commands: "write -P 7 100 100; write -P 9 64k 2k; write -z 64k 1k; write 900k 64k; write 1000440 8; map", file: "small"},
		{commands: "write -P 7 100 100; write -P 9 1000k 100k; write -z 0 10k; discard 64k 64k; map", file: "over"},
		{commands: "write -P 7 100 100; write -z 1000k 1k; flush", file: "lazy"},
		{commands: "write 0 1; write 0 0; read 0 0; length; map; alloc 0; info", file: "empty"},
		{commands: "write -C 0 512; write -q 0 512; write -qC 0 512; write -p 0 512; w 0 1k; write -f 0 1k; write -zf 0 1k", file: "disk"},
		{commands: "write -s pattern 0 20; read -v 0 32; write -s nothing 0 10; write -s nosuch 0 10; write -s . 0 10; write -s pattern 0 3", file: "disk"},
		{commands: "write -s pattern -P 3 0 10; write -s pattern -z 0 10; write -P 3 -z 0 10; write -n 0 10; write -u 0 10", file: "disk"},
		{commands: "write -z 0 64k; write -zu 64k 64k; write -zn 128k 64k; write -zn 0 512; write -z -u -n 0 64k; map", file: "disk"},
		{commands: "write -z 10 10; write -z 1000 100000; read -P 0 1000 100000; write -z 0 3G; write -zn 0 8G; write -z 1M 1", file: "disk"},
		{commands: "write -b -z 0 512; write -b -f 0 512; write -c -f 0 64k; write -b -u 0 512; write -f -b 0 512; write -b -z -f 0 1", file: "disk"},
		{commands: "write -c 256k 64k; write -c -P 9 320k 128k; write -c 100 64k; write -c 0 100; write -c 0 512; write -z -c 0 64k", file: "disk"},
		{commands: "write -c 1M 64k; write -c -q 448k 64k; read -P 0xcd 448k 64k; write -c -C 256k 64k; write -c -s pattern 320k 64k", file: "disk"},
		{commands: "write x 1; write 0 x; write; write 0; write 0 1 2; write 0 3G; write -X 0 1; write -P x 0 1; write -s", file: "disk"},
		{commands: "write -P 3 -s f x y; write -s f x y; write -b 0 100; write -b 100 512; write -c 1 1", file: "disk"},
		{commands: "write 0 100; write -P 0x11 1000000 448; write 1000000 512; write -z 100 100; write -c 0 1k; write -b 0 512; read -b 0 512", file: "raw", args: "-f raw"},
		{commands: "write -zn 0 4k; write -znu 4k 4k; write -zu 512k 64k", file: "raw", args: "-f raw"},
		{commands: "write 0 512; write -P 0 0 512; info", file: "raw"},
		// the VM state
		{commands: "read -b -v 0 512; write -b 0 512; read -b -P 0xcd 0 512; write -bq -P 3 64k 128k; read -b -P 3 128k 64k; map; info", file: "disk"},
		{commands: "write -b -s pattern 512 1k; read -bv 512 512; write -bc 0 512; write -bC 1G 512; read -b -P 0 2G 512; read -b 0 1", file: "v2"},
		{commands: "write -b -P 9 0 64k; read -b -P 9 0 64k; map; discard 0 1M; read -b -P 9 0 64k", file: "ext"},
		{commands: "write -b -P 9 0 64k; read -P 9 -b 512 512", file: "small"},
		{commands: "write -b -P 9 0 64k; read -b -P 9 0 64k; read -P 0xab 0 64k", file: "over"},
		// writev
		{commands: "writev 0 64k 32k 100; writev -P 3 1000 10 20; writev -q 0 1; writev -C 0 1; writev -f 0 512; read -v 990 50", file: "disk"},
		{commands: "writev 0; writev x 1; writev 0 x; writev 0 3G; writev 0 1G 1G; writev 1M 1; writev -z 0 1; writev 0 0; writev -P x 0 1", file: "disk"},
		// aio
		{commands: "aio_write 0 64k; aio_flush; aio_read -P 0xcd 0 64k; aio_flush; aio_read -v 0 20; aio_flush", file: "disk"},
		{commands: "aio_write -P 3 0 1k 2k; aio_flush; aio_read -P 7 0 3k; aio_flush; aio_read -C 0 10 20; aio_flush; aio_read -q 0 1", file: "disk"},
		{commands: "aio_write 256k 64k", file: "disk"},
		{commands: "aio_write -z 0 64k; aio_flush; aio_write -zu 64k 64k; aio_flush; aio_write -f 0 1; aio_flush; aio_write -C 0 1", file: "disk"},
		{commands: "aio_read 1M 512; aio_flush; aio_write 1M 512; aio_flush; aio_write -z 1M 1; aio_flush; aio_read -P 1 1M 1", file: "disk"},
		{commands: "aio_read -i 0 64k; aio_write -i 0 512; aio_read -i x; aio_read -i x y; aio_write -i; aio_write -z -i 0 1 2", file: "disk"},
		{commands: "aio_read x 1; aio_read 0 x; aio_write -u 0 1; aio_write -z 0 1 1; aio_read -P x 0 1; aio_write 0; aio_read 0 3G; aio_write 0 3G", file: "disk"},
		{commands: "aio_write -z -P 3 0 512; aio_flush; aio_flush 1; aio_read -X 0 1; aio_write -n 0 1; aio_read 0 -P 3", file: "disk"},
		// discard, alloc, map
		{commands: "discard 0 64k; discard 64k 1k; discard -q 64k 64k; discard -C 128k 64k; discard 0 0; discard 1 1; map", file: "disk"},
		{commands: "discard 0; discard x 1; discard 0 x; discard 0 3G; discard -z x y; discard 0 1 2; discard 1M 1; d 0 1", file: "disk"},
		{commands: "discard 0 64k; map", file: "v2"},
		{commands: "discard 0 64k; map", file: "over"},
		{commands: "discard 0 16k; map", file: "ext"},
		{commands: "discard 0 4k; read -P 0 0 4k", file: "raw", args: "-f raw"},
		{commands: "discard 0 64k; write -zu 64k 64k; map; write -zn 0 64k", args: "-d ignore", file: "disk"},
		{commands: "discard 0 64k; map", args: "-d off", file: "disk"},
		{commands: "discard 0 64k; map", args: "-d unmap", file: "disk"},
		{commands: "discard 0 64k; map", args: "-d on", file: "disk"},
		{commands: "alloc 0; alloc 0 1M; alloc 64k 256k; alloc 300k; alloc x; alloc 0 x; alloc 0 100; alloc 100; alloc 0 1k 3; a 0", file: "disk"},
		{commands: "alloc 6M; alloc 0 6M; alloc 1000000000 512; alloc -1; alloc 0 1M; alloc 64k 128k; alloc; map x; map", file: "over"},
		{commands: "alloc 0; alloc 0 1M; alloc 1000447; map", args: "-f raw", file: "raw"},
		{commands: "map; alloc 0; length; read 0 0", args: "-f raw", file: "nothing"},
		{commands: "map; alloc 0 1M", file: "ext"},
		{commands: "map; alloc 0 1M", file: "small"},
		// size, info, flush
		{commands: "length; length x; flush; flush x; info; info x; l; f; i", file: "disk"},
		{commands: "info", file: "v2"},
		{commands: "info", file: "ext"},
		{commands: "info", file: "small"},
		{commands: "info", file: "over"},
		{commands: "info", file: "lazy"},
		{commands: "info; length", args: "-f raw", file: "raw"},
		{commands: "truncate 2M; length; truncate 1M; length; truncate 512k; read -P 0xab 0 192k; map; t 640k", file: "disk"},
		{commands: "truncate x; truncate -m bad 3M; truncate; truncate 1000; truncate -z 1; truncate -m; truncate 512k 2; length", file: "disk"},
		{commands: "truncate -m off 2M; truncate -m metadata 3M; truncate -m full 4M; truncate -m falloc 5M; length; map", file: "disk"},
		{commands: "truncate -m full 512k; truncate -m metadata 1M; truncate -m off 512k", file: "disk"},
		{commands: "truncate 1000; length; map; read 0 1000; truncate -m full 64k; truncate 1001; length", args: "-f raw", file: "raw"},
		{commands: "truncate 0; length; map; truncate -m falloc 64k; truncate -m metadata 128k; length", args: "-f raw", file: "raw"},
		{commands: "truncate 4M; map; read -P 0 1M 3M", file: "over"},
		// breakpoints
		{commands: "break l2_load A; break nosuch A; aio_write 0 512; wait_break A; resume A; resume A; aio_flush; remove_break A", file: "blkdebug::disk"},
		{commands: "break write_aio A; aio_write 0 512; wait_break A; remove_break B; resume A; aio_flush; resume A", args: "-f qcow2", file: "blkdebug::disk"},
		{commands: "break write_aio A; break write_aio B; remove_break B; remove_break A; write 0 512", args: "-f qcow2", file: "blkdebug::disk"},
		{commands: "break read_aio A; aio_read 0 512; wait_break A; resume A; aio_flush", args: "-f qcow2", file: "blkdebug::disk"},
		{commands: "break cluster_alloc A; aio_write 256k 512; wait_break A; aio_write 300k 1k; resume A; aio_flush", args: "-f qcow2", file: "blkdebug::disk"},
		// the shell
		{commands: "nosuch; rv 0 1; s; m; h; x; ?; help; help nosuch; help a b", file: "disk"},
		{commands: "help abort; help map; help close; help ?"},
		{commands: "length; quit; length", file: "disk"},
		{commands: "nosuch; q", file: "disk"},
		{commands: "read -P 9 0 512; quit 1; length", file: "disk"},
		{commands: "close; info; read 0 1; map; close; sleep; sleep x; sleep 1; sleep 1 2; sleep -5; sleep 0x5; sleep 5x", file: "disk"},
		{commands: "sigraise 0; sigraise x; sigraise; sigraise 1 2; sigraise 100; sigraise -1; sigraise 19999999999999; abort x", file: "disk"},
		{commands: "break; break a; break a b; resume b; remove_break b; resume; remove_break; wait_break", file: "disk"},
		{commands: " read   0    1k ; read \"0\" 1k; ; ", file: "disk"},
		{commands: "length"},
		{input: "read 0 512\nwrite x\n\n# c\n  length  \nquit\nlength\n", file: "disk"},
		{input: "length\nnosuch 1\nread -P 9 0 512\nlength", file: "disk"},
		{input: "read\t0 512\n", file: "disk"},
		{input: "", file: "disk"},
		{input: "length\n"},
		{input: "length\n", commands: "length", file: "disk"},
		{input: "open disk\nlength\nclose\nopen raw\nlength\nwrite 0 1"},
	} {
		sameIO(t, all, c)
	}
}

func TestIOOpeningLikeQEMU(t *testing.T) {
	all := ioImages(t)
	for _, c := range []ioCase{
		{commands: "open disk; length; open disk; close; close; open -r disk; write 0 1; discard 0 1; truncate 1k; flush"},
		{commands: "open -o driver=qcow2 disk; length"},
		{commands: "open -o file.filename=disk; length"},
		{commands: "open -o driver=qcow2,file.filename=disk; info"},
		{commands: "open -o lazy-refcounts=on disk; write 0 64k; info"},
		{commands: "open; open -r; length; open nosuch; open disk over; open -z disk; open -o"},
		{commands: "open -t bad disk; open -d bad disk; open -i bad disk; open -o bad=1 disk; open -rs disk; write 0 512"},
		{commands: "open -s disk; write -P 9 0 512; read -P 9 0 512; read -P 0xab 512 512; length; info; map; discard 64k 64k; read -P 0 64k 1"},
		{commands: "open -n disk; read 0 512; write 100 1000; read -P 0xcd 100 1000"},
		{commands: "open -t writethrough disk; write 0 1k; close; open -t unsafe disk; write 0 1; flush; close; open -t directsync disk; write 0 3"},
		{commands: "open -d ignore disk; discard 0 64k; map"},
		{commands: "open -k disk; open -i native disk; open -i threads disk; length; close; open -nk disk; length"},
		{commands: "open -U disk; open -rU disk; length"},
		{commands: "read 0 1", args: "-f bad", file: "disk"},
		{commands: "length", args: "-f raw", file: "disk"},
		{commands: "length", args: "-f qcow2", file: "raw"},
		{commands: "length", args: "-t bad", file: "disk"},
		{commands: "length", args: "-d bad", file: "disk"},
		{commands: "length", args: "-i bad", file: "disk"},
		{commands: "length", args: "-i native", file: "disk"},
		{commands: "length", args: "-i native -n", file: "disk"},
		{commands: "length", args: "-k", file: "disk"},
		{commands: "length", args: "-nk", file: "disk"},
		{commands: "length", args: "-i threads -m", file: "disk"},
		{commands: "length", file: "disk over nosuch", args: "--nosuch"},
		{commands: "length", args: "--image-opts", file: "driver=qcow2,file.filename=disk"},
		{commands: "length", args: "--image-opts -f qcow2", file: "driver=qcow2,file.filename=disk"},
		{commands: "length", args: "--image-opts", file: "disk"},
		{commands: "length", args: "--imag", file: "file.filename=disk"},
		{args: "--cm=length", file: "disk"},
		{args: "--cmd length -- disk"},
		{args: "disk -c length -r"},
		{commands: "open disk; open file.filename=disk; length", args: "--image-opts"},
		{commands: "open -o file.filename=disk; length", args: "--image-opts"},
		{commands: "write 0 1; writev 0 1; aio_write 0 1; write; write x; write -X 1 2; discard 0 1; flush; write -b 0 512", args: "-r", file: "disk"},
		{commands: "write 0 1; map; flush", args: "-s", file: "disk"},
		{commands: "write 0 1", args: "-U", file: "disk"},
		{commands: "write 0 1; map", args: "-rU", file: "disk"},
		{commands: "read 0 1", args: "-rC", file: "over"},
		{commands: "read 0 512; map; read -P 0xee 64k 1k; readv 128k 512 512; map; write 700k 1k; map; info", args: "-C", file: "over"},
		{commands: "read 160k 10k; map; aio_read 640k 1k; aio_flush; map; length; flush", args: "-C", file: "over"},
		{commands: "read 0 64k; map; write -c 1M 64k; discard 0 64k; map", args: "-C", file: "over"},
		{commands: "read 0 512; map", args: "-sC", file: "over"},
		{commands: "read 0 1M", args: "-C", file: "disk"},
		{commands: "info; truncate 2M; write -b 0 512; write -c 0 512; length", args: "--image-opts", file: "driver=null-co,size=1M"},
		{commands: "info; length; write 0 512; truncate 1M; length", args: "-f file", file: "raw"},
		{commands: "read 0 512; length; truncate 1M; length", args: "--image-opts", file: "driver=raw,offset=512,size=64k,file.driver=file,file.filename=raw"},
		{commands: "length; read 0 1", args: "--image-opts", file: "driver=qcow2,file.driver=blkdebug,file.inject-error.0.event=read_aio,file.image.filename=disk"},
		{commands: "length; open -r corrupt; length", file: "corrupt"},
		{commands: "length; write 0 1", file: "dirty"},
		{commands: "length; map", args: "--image-opts", file: "driver=qcow2,file.filename=over,backing.driver=raw,backing.file.filename=disk"},
		{commands: "length; map", file: "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"disk\"}}"},
		{commands: "open -C over; read 0 512; map; close; open -rC over"},
		{commands: "read 0 1", args: "--object secret,id=a,data=x", file: "disk"},
		{commands: "read 0 1", args: "--object bad,id=a,data=x", file: "disk"},
		{commands: "length", file: "nosuch"},
		{commands: "reopen -r; write 0 512; reopen -w; write 0 512; reopen -rw; reopen -r -w; reopen x; reopen -z; reopen; info", file: "disk"},
		{commands: "reopen -o lazy-refcounts=on; write 0 64k; reopen -o bad=1; reopen -c none; reopen -c bad; reopen -o driver=raw; length", file: "disk"},
		{commands: "reopen -o read-only=on -r; reopen -c none -o cache.direct=on; reopen -c writethrough; write 0 1; reopen -o", file: "disk"},
	} {
		sameIO(t, all, c)
	}
}
