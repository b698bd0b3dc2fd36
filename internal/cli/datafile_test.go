//go:build unix

package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func content(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDataFileCreateLikeQEMU creates with both tools what has an external data file, or says that it had, and with hints
// for the file system.
func TestDataFileCreateLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	mustTool(t, "qemu-img", "create", "-q", "-f", "raw", "raw", "1M")
	cases := [][]string{
		{"-f", "raw", "-o", "data_file=d", "new", "1M"}, {"-f", "raw", "-o", "data_file_raw=on", "new", "1M"},
		{"-f", "raw", "-o", "extent_size_hint=2M,nocow=on,preallocation=full", "new", "100k"},
		{"-f", "raw", "-o", "extent_size_hint=5G", "new", "1M"}, {"-f", "raw", "-o", "nocow=maybe", "new", "1M"},
		{"-u", "-f", "qcow2", "-o", "data_file=d,data_file_raw=on", "-b", "raw", "-F", "raw", "new", "1M"},
		{"-u", "-f", "qcow2", "-o", "data_file=d,data_file_raw=on,compat=v2", "-b", "raw", "-F", "raw", "new", "1M"},
		{"-f", "qcow2", "-o", "data_file=d", "-b", "raw", "-F", "raw", "new"},
		{"-q", "-f", "qcow2", "-o", "data_file=d,data_file_raw=on", "new", "1000"},
	}
	for _, option := range []string{
		"data_file=d", "data_file=d,data_file_raw=on", "data_file=d,data_file_raw=off", "data_file=d,data_file_raw", "data_file",
		"data_file=", "data_file=,data_file_raw=on", "data_file_raw=on", "data_file_raw=off", "data_file_raw=maybe",
		"data_file=d,compat=v2", "data_file=d,compat=0.10,compression_type=zstd", "data_file=d,compat=v2,lazy_refcounts=on",
		"data_file=d,compat=v2,refcount_bits=8", "data_file_raw=on,compat=v2", "data_file_raw=on,compat=v2,compression_type=zstd",
		"data_file=d,preallocation=metadata", "data_file=d,preallocation=falloc", "data_file=d,preallocation=full",
		"data_file=d,data_file_raw=on,preallocation=off", "data_file=d,data_file_raw=on,preallocation=full", "data_file=./d",
		"data_file=file:d", "data_file=a,,b", "data_file=foo:d", "data_file=missing/d", "data_file=/missing/d", "data_file=.",
		"data_file=d,extended_l2=on", "data_file=d,cluster_size=2M,refcount_bits=64,lazy_refcounts=on", "data_file=d,compression_type=zstd",
		"nocow=on", "nocow=off", "nocow=x", "extent_size_hint=0", "extent_size_hint=1M,nocow=on", "extent_size_hint=4G", "extent_size_hint=x",
	} {
		cases = append(cases, []string{"-f", "qcow2", "-o", option, "new", "1M"})
	}
	for _, args := range cases {
		compareCreate(t, append([]string{"create"}, args...))
	}
}

// TestDataFileWrittenByBoth: both tools make images with a data file, stock qemu-io and the server write to them, and both
// tools find the same disk and the same map in them. A raw data file is that disk.
func TestDataFileWrittenByBoth(t *testing.T) {
	for _, maker := range []string{"drover", "qemu-img"} {
		for _, options := range []string{
			"data_file=data", "data_file=data,data_file_raw=on", "data_file=data,extended_l2=on",
			"data_file=data,data_file_raw=on,extended_l2=on,cluster_size=16k", "data_file=data,preallocation=full",
		} {
			t.Run(maker+" "+options, func(t *testing.T) { dataFileRoundTrip(t, maker, options) })
		}
	}
}

func dataFileRoundTrip(t *testing.T, maker, options string) {
	t.Chdir(t.TempDir())
	put(t, "data", strings.Repeat("old", 1000))
	args := []string{"create", "-q", "-f", "qcow2", "-o", options, "disk", "1M"}
	if maker == "drover" {
		mustDrover(t, args...)
	} else {
		mustTool(t, "qemu-img", args...)
	}
	model := make([]byte, 1<<20)
	same := func(when string) {
		t.Helper()
		sameDataImage(t, when, model, strings.Contains(options, "data_file_raw=on"))
	}
	change := func(image, format string, pattern byte, off, n int) {
		t.Helper()
		write := "write -P " + strconv.Itoa(int(pattern))
		if pattern == 0 {
			write = "write -z"
		}
		mustTool(t, "qemu-io", "-f", format, "-c", write+" "+strconv.Itoa(off)+" "+strconv.Itoa(n), "-c", "flush", image)
		copy(model[off:], bytes.Repeat([]byte{pattern}, n))
	}
	same("new")
	change("disk", "qcow2", 1, 0, 64<<10)
	change("disk", "qcow2", 2, 200<<10, 5000)
	same("written by qemu-io")

	s := startServe(t, "--socket", "sock", "disk")
	uri := s.line(t)
	s.line(t)
	change(uri, "raw", 3, 32<<10, 64<<10)
	change(uri, "raw", 4, 900<<10, 512)
	change(uri, "raw", 0, 200<<10, 64<<10)
	change(uri, "raw", 5, 201<<10, 1<<10)
	signalSelf(t, syscall.SIGTERM)
	if code := s.end(t); code != 0 {
		t.Fatalf("the server's exit code is %d\n%s", code, &s.err)
	}
	same("written by the server")
	change("disk", "qcow2", 6, 300<<10, 300<<10)
	change("disk", "qcow2", 0, 0, 100<<10)
	same("written by qemu-io again")
}

// sameDataImage: "disk" and its data file hold the disk of the model, and both tools say the same of them.
func sameDataImage(t *testing.T, when string, model []byte, raw bool) {
	t.Helper()
	mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "disk", "stock.raw")
	mustDrover(t, "convert", "-f", "qcow2", "-O", "raw", "disk", "own.raw")
	if !bytes.Equal(content(t, "stock.raw"), model) {
		t.Errorf("%s: qemu-img reads another disk", when)
	}
	if !bytes.Equal(content(t, "own.raw"), model) {
		t.Errorf("%s: drover reads another disk", when)
	}
	if raw && !bytes.Equal(content(t, "data"), model) {
		t.Errorf("%s: the raw data file is not the disk", when)
	}
	for _, args := range [][]string{{"info", "disk"}, {"check", "disk"}, {"info", "--output=json", "disk"}} {
		sameAsQEMU(t, args...)
	}
	sameDataMap(t, when)
}

// sameDataMap: "disk" has data in the same places for both tools. qemu-img looks for holes in the data file too, and so may
// find zeroes where the image alone speaks of data; the other way round there is no difference.
func sameDataMap(t *testing.T, when string) {
	t.Helper()
	stock := dataMap(t, tool(t, "qemu-img", "map", "--output=json", "disk").stdout)
	own := dataMap(t, mustDrover(t, "map", "--output=json", "disk"))
	for i, s := range stock {
		if o := own[i]; s != o && (s.data || o.data && s.off != o.off) {
			t.Fatalf("%s: at offset %#x qemu-img maps %+v and drover %+v", when, i*512, s, o)
		}
	}
}

// place is where a sector of the disk is. Without data it reads as zeroes.
type place struct {
	data bool
	off  int64
}

// dataMap returns the places of the sectors of a disk of 1 MiB.
func dataMap(t *testing.T, text string) []place {
	t.Helper()
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
		Offset        *int64
	}
	if err := json.Unmarshal([]byte(text), &extents); err != nil {
		t.Fatal(err)
	}
	var places []place
	for _, e := range extents {
		for off := e.Start; off < e.Start+e.Length; off += 512 {
			p := place{data: e.Data && !e.Zero, off: -1}
			if e.Offset != nil {
				p.off = *e.Offset + off - e.Start
			}
			places = append(places, p)
		}
	}
	if len(places) != 1<<20/512 {
		t.Fatalf("the map has %d sectors", len(places))
	}
	return places
}

// TestDataFileRefused: what cannot be made harms nothing that is there, and leaves nothing behind.
func TestDataFileRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	put(t, "keep", "precious")
	mustTool(t, "qemu-img", "create", "-q", "-f", "raw", "base", "1M")
	if err := os.Link("keep", "hardlink"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("base", "link"); err != nil {
		t.Fatal(err)
	}
	base := content(t, "base")
	for _, c := range []struct {
		option, file, want string
	}{
		{"data_file=missing/d", "keep", "Could not create 'missing/d': No such file or directory"},
		{"data_file=keep", "missing/new", "Could not create 'missing/new': No such file or directory"},
		{"data_file=.", "keep", "Is a directory"},
		{"data_file=keep", "keep", `Failed to get "write" lock`},
		{"data_file=new", "new", `Failed to get "write" lock`},
		{"data_file=./keep", "hardlink", `Failed to get "write" lock`},
		{"data_file=base,backing_file=base,backing_fmt=raw", "new", "Trying to use the backing file as the data file"},
		{"data_file=link,backing_file=base,backing_fmt=raw", "keep", "Trying to use the backing file as the data file"},
		{"data_file=keep,data_file_raw=on,backing_file=base,backing_fmt=raw", "new", "cannot be used at the same time"},
		{"data_file=keep,compat=v2", "new", "External data files are only supported"},
		{"data_file=d,extent_size_hint=5G", "keep", "Extent size hint is too large"},
	} {
		o := drover(t, "create", "-q", "-f", "qcow2", "-o", c.option, c.file, "1M")
		if o.code != 1 || !strings.Contains(o.stderr, c.want) {
			t.Errorf("%s %s: code %d, %s", c.option, c.file, o.code, o.stderr)
		}
		for _, name := range []string{"new", "d"} {
			if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s %s: %s is left behind (%v)", c.option, c.file, name, err)
			}
		}
		if string(content(t, "keep")) != "precious" || !bytes.Equal(content(t, "base"), base) {
			t.Fatalf("%s %s: refused, and a file has changed", c.option, c.file)
		}
	}
}

// TestDataFileInUse: neither an image nor a data file in use is emptied.
func TestDataFileInUse(t *testing.T) {
	t.Chdir(t.TempDir())
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "disk", "1M")
	mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", "disk")
	put(t, "free", "free")
	disk, data := content(t, "disk"), content(t, "data")
	hold := exec.Command("qemu-io", "-f", "qcow2", "disk")
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
	defer func() {
		if err := errors.Join(in.Close(), hold.Wait()); err != nil {
			t.Error(err)
		}
	}()
	if _, err := out.Read(make([]byte, 8)); err != nil { // the prompt: the image is open
		t.Fatal(err)
	}
	for _, args := range [][]string{{"data_file=data", "free"}, {"data_file=free", "disk"}, {"data_file=disk", "free"}} {
		o := drover(t, "create", "-q", "-f", "qcow2", "-o", args[0], args[1], "1M")
		if o.code != 1 || !strings.Contains(o.stderr, "Is another process using the image") {
			t.Errorf("%q: code %d, %s", args, o.code, o.stderr)
		}
		if !bytes.Equal(content(t, "disk"), disk) || !bytes.Equal(content(t, "data"), data) || string(content(t, "free")) != "free" {
			t.Fatalf("%q: refused, and a file has changed", args)
		}
	}
}

// TestDataFileBesideTheImage: a relative name means a file beside the image, for create and convert and for all that opens
// the image afterwards; a file elsewhere is made at the user's word and opened at no other.
func TestDataFileBesideTheImage(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, "src", strings.Repeat("0123456789abcdef", 8192))
	mustDrover(t, "create", "-q", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on", "dir/new", "1M")
	mustDrover(t, "map", "dir/new")
	mustDrover(t, "convert", "-O", "qcow2", "-o", "data_file=data2,data_file_raw=on", "src", "dir/copy")
	for _, name := range []string{"dir/data", "dir/data2"} {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(content(t, "dir/data2"), content(t, "src")) {
		t.Error("the raw data file is not the source")
	}
	mustDrover(t, "convert", "-O", "qcow2", "-o", "data_file=../elsewhere", "src", "dir/far")
	if o := drover(t, "map", "dir/far"); o.code != 1 || !strings.Contains(o.stderr, "--allow-path") {
		t.Errorf("the file elsewhere is opened unasked: %+v", o)
	}
	mustDrover(t, "map", "--allow-path", ".", "dir/far")
	abs, err := filepath.Abs("absolute")
	if err != nil {
		t.Fatal(err)
	}
	mustDrover(t, "convert", "-O", "qcow2", "-o", "data_file="+abs, "src", "dir/abs")
	mustTool(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "src", "dir/abs")
}

// TestDataFileConvertLikeQEMU copies to images with a data file, with both tools.
func TestDataFileConvertLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	mustTool(t, "qemu-img", "create", "-q", "-f", "raw", "src", "1M")
	mustTool(t, "qemu-io", "-f", "raw", "-c", "write -P 5 0 8k", "-c", "write -P 6 512k 128k", "src")
	source := content(t, "src")
	for _, args := range [][]string{
		{"-O", "qcow2", "-o", "data_file=data", "src", "new"}, {"-O", "qcow2", "-o", "data_file=data,data_file_raw=on", "src", "new"},
		{"-O", "qcow2", "-o", "data_file=data,preallocation=full", "src", "new"}, {"-O", "qcow2", "-o", "data_file_raw=on", "src", "new"},
		{"-O", "qcow2", "-c", "-o", "data_file=data", "src", "new"}, {"-O", "qcow2", "-o", "data_file=src", "src", "new"},
		{"-O", "qcow2", "-o", "data_file=data,compat=v2", "src", "new"}, {"-O", "raw", "-o", "data_file=data", "src", "new"},
		{"-O", "qcow2", "-S", "0", "-o", "data_file=data,data_file_raw=on,extended_l2=on", "src", "new"},
	} {
		args = append([]string{"convert"}, args...)
		run := func(fn func() outcome) (outcome, string) {
			_ = os.Remove("new")
			_ = os.Remove("data")
			o := fn()
			if o.code != 0 {
				return o, ""
			}
			mustTool(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "src", "new")
			mustTool(t, "qemu-img", "check", "-q", "new")
			if strings.Contains(args[len(args)-3], "data_file_raw=on") && !bytes.Equal(content(t, "data"), source) {
				t.Errorf("%q: the raw data file is not the disk", args)
			}
			return o, diskSize.ReplaceAllString(tool(t, "qemu-img", "info", "new").stdout, "")
		}
		want, wantInfo := run(func() outcome { return tool(t, "qemu-img", args...) })
		want.stderr = strings.ReplaceAll(want.stderr, "qemu-img:", "drover:")
		got, gotInfo := run(func() outcome { return drover(t, args...) })
		compare(t, args, got, want)
		if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
			t.Errorf("%q: the images differ (-qemu-img +drover):\n%s", args, diff)
		}
		if !bytes.Equal(content(t, "src"), source) {
			t.Fatalf("%q: the source has changed", args)
		}
	}
	for _, o := range []string{"data_file=x", "data_file=x,data_file_raw=on", "data_file_raw=on", "preallocation=full,data_file=x", "nocow=on"} {
		sameAsQEMU(t, "measure", "--size", "1M", "-O", "qcow2", "-o", o)
	}
}

// TestDataFileChangeLikeQEMU resizes and amends images with a data file, with both tools, step by step.
func TestDataFileChangeLikeQEMU(t *testing.T) {
	steps := [][]string{
		{"resize", "disk", "2M"}, {"resize", "--shrink", "disk", "512k"}, {"resize", "--preallocation=full", "disk", "1M"},
		{"resize", "--preallocation=metadata", "disk", "1536k"}, {"amend", "-o", "compat=v2", "disk"}, {"amend", "-o", "data_file=other", "disk"},
		{"amend", "-o", "data_file_raw=on", "disk"}, {"amend", "-o", "data_file_raw=off", "disk"}, {"amend", "-o", "data_file_raw=on", "disk"},
		{"amend", "-o", "data_file=missing", "disk"}, {"amend", "-o", "data_file=data", "disk"},
	}
	for _, options := range []string{"data_file=data", "data_file=data,data_file_raw=on"} {
		root := t.TempDir()
		for _, dir := range []string{"stock", "own"} {
			if err := os.Mkdir(filepath.Join(root, dir), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Chdir(filepath.Join(root, dir))
			mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "disk", "1M")
			mustTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "disk")
			if err := os.Link("data", "other"); err != nil {
				t.Fatal(err)
			}
		}
		for _, args := range steps {
			t.Chdir(filepath.Join(root, "stock"))
			want := tool(t, "qemu-img", args...)
			want.stderr = strings.ReplaceAll(want.stderr, "qemu-img:", "drover:")
			wantInfo := diskSize.ReplaceAllString(tool(t, "qemu-img", "info", "disk").stdout, "")
			t.Chdir(filepath.Join(root, "own"))
			got := drover(t, args...)
			got.stderr = strings.Replace(got.stderr, "Could not open data file: ", "", 1) // qemu-img does not say what it is
			compare(t, args, got, want)
			info := diskSize.ReplaceAllString(tool(t, "qemu-img", "info", "disk").stdout, "")
			if diff := cmp.Diff(wantInfo, info); diff != "" {
				t.Errorf("%s, %q: the images differ (-qemu-img +drover):\n%s", options, args, diff)
			}
			if strings.Contains(info, "data file: missing") {
				continue
			}
			mustTool(t, "qemu-img", "check", "-q", "disk")
			mustDrover(t, "check", "disk")
			for _, dir := range []string{"stock", "own"} {
				t.Chdir(filepath.Join(root, dir))
				mustTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "disk", "disk.raw")
			}
			if !bytes.Equal(content(t, filepath.Join(root, "stock/disk.raw")), content(t, filepath.Join(root, "own/disk.raw"))) {
				t.Errorf("%s, %q: the disks differ", options, args)
			}
			if strings.Contains(info, "data file raw: true") && !bytes.Equal(content(t, "data"), content(t, "disk.raw")) {
				t.Errorf("%s, %q: the raw data file is not the disk", options, args)
			}
		}
	}
}
