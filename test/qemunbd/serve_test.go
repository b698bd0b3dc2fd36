//go:build unix

package qemunbd

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// view is what clients and users see of a server.
type view struct {
	info    string // nbdinfo --json
	list    string // qemu-nbd --list, of stock
	ownList string // the same, of drover
	work    string // what came of a client's requests
	end     outcome
}

// work is a client's session: data, zeroes in both ways, zeroes as data, discards, something durable.
var work = []string{
	"write -P 9 64k 256k", "write -z 1M 128k", "write -z -u 3M 64k", "write -P 0 3328k 64k", "discard 4M 64k", "discard 512k 128k",
	"write -f -P 10 7M 4k", "write -P 0 1536k 64k", "flush", "read -P 9 64k 256k", "length",
}

// TestExports compares what clients see of an export and what their changes do to the image, option by option.
func TestExports(t *testing.T) {
	for _, c := range []struct {
		args     string
		export   string
		image    string // which may change
		format   string
		readOnly bool
		small    bool // the session above does not fit
	}{
		{args: "-f qcow2 disk.qcow2"},
		{args: "disk.qcow2"},
		{args: "-f qcow2 -e 0 disk.qcow2"},
		{args: "-f qcow2 -e 5 disk.qcow2"},
		{args: "-f qcow2 --export-name=disk --description disk-of-many-words disk.qcow2", export: "disk"},
		{args: "-f qcow2 -A disk.qcow2"},
		{args: "-f qcow2 -B b1 -B b2 -A disk.qcow2"},
		{args: "-f qcow2 -r disk.qcow2", readOnly: true},
		{args: "-f qcow2 -r -B b2 disk.qcow2", readOnly: true},
		{args: "-f qcow2 -s disk.qcow2"},
		{args: "-f qcow2 -s -B b1 disk.qcow2"},
		{args: "-f qcow2 -l before disk.qcow2", readOnly: true},
		{args: "-f qcow2 -l 1 -A -B b2 disk.qcow2", readOnly: true},
		{args: "-f qcow2 -l snapshot.name=before disk.qcow2", readOnly: true},
		{args: "-f qcow2 --discard=unmap disk.qcow2"},
		{args: "-f qcow2 --discard=ignore disk.qcow2"},
		{args: "-f qcow2 --detect-zeroes=on disk.qcow2"},
		{args: "-f qcow2 --discard=unmap --detect-zeroes=unmap disk.qcow2"},
		{args: "-f qcow2 --cache=none --aio=native disk.qcow2"},
		{args: "-f qcow2 -n disk.qcow2"},
		{args: "-f qcow2 --cache=writethrough --aio=threads disk.qcow2"},
		{args: "-f qcow2 --cache=directsync disk.qcow2"},
		{args: "-f qcow2 --cache=unsafe disk.qcow2"},
		{args: "-f qcow2 -o 65536 disk.qcow2"},
		{args: "-f qcow2 -A -B b1 over.qcow2", image: "over.qcow2"},
		{args: "--image-opts driver=qcow2,file.filename=disk.qcow2,discard=unmap"},
		{args: "--image-opts driver=raw,offset=1048576,size=524288,file.filename=disk.raw", image: "disk.raw", format: "raw", small: true},
		{args: "-f raw disk.raw", image: "disk.raw", format: "raw", small: true},
		{args: "-f raw -o 4096 disk.raw", image: "disk.raw", format: "raw", small: true},
		{args: "-f raw --discard=unmap disk.raw", image: "disk.raw", format: "raw", small: true},
		{args: "-f raw -r odd.raw", image: "odd.raw", format: "raw", readOnly: true},
	} {
		t.Run(strings.ReplaceAll(c.args, "/", "|"), func(t *testing.T) {
			if c.image == "" {
				c.image, c.format = "disk.qcow2", "qcow2"
			}
			if c.format == "" {
				c.format = "qcow2"
			}
			commands := work
			if c.small {
				commands = []string{"write -P 9 64k 64k", "write -z 128k 64k", "discard 192k 64k", "write -P 0 256k 4k", "flush", "read -P 9 64k 64k"}
			}
			if c.readOnly {
				commands = []string{"read 0 512", "length", "write 0 512"}
			}
			var dirs []string
			stock, mine := twice(t, func(p program, dir string) view {
				dirs = append(dirs, dir)
				return look(t, p, dir, c.export, commands, c.readOnly, strings.Fields(c.args)...)
			})
			if stock != mine {
				t.Errorf("stock %+v\nours  %+v\n%s", stock, mine, cmp.Diff(stock, mine, cmp.AllowUnexported(view{}, outcome{})))
			}
			if stock.end.code != 0 {
				t.Errorf("stock ends with %+v", stock.end)
			}
			compareImages(t, filepath.Join(dirs[0], c.image), filepath.Join(dirs[1], c.image), c.format)
		})
	}
}

// look serves an image, asks about it, works with it and stops.
func look(t *testing.T, p program, dir, export string, commands []string, readOnly bool, args ...string) view {
	t.Helper()
	s := p.serve(t, dir, append([]string{"-t"}, args...)...)
	var v view
	v.info = s.info(export)
	v.list = s.anonymous(string(harness.Must(t, "qemu-nbd", "--list", "-k", s.socket)))
	v.ownList = s.anonymous(string(harness.Must(t, ours(t), "--list", "-k", s.socket)))
	if v.list != v.ownList {
		t.Errorf("the server of %s is listed by stock as\n%sby ours as\n%s", p.name, v.list, v.ownList)
	}
	line := []string{"-f", "raw"}
	if readOnly {
		line = append(line, "-r")
	}
	for _, c := range commands {
		line = append(line, "-c", c)
	}
	r := harness.Run(t, "qemu-io", append(line, s.uri(export))...)
	v.work = timings.ReplaceAllString(string(r.Stdout)+string(r.Stderr), "TIME")
	v.end = s.stop()
	return v
}

// compareImages fails the test unless two images are sound, read the same, and hold data at the same places.
func compareImages(t *testing.T, stock, mine, format string) {
	t.Helper()
	if format == "qcow2" {
		harness.Must(t, "qemu-img", "check", "-q", "-f", format, mine)
	}
	if os.SameFile(stat(t, stock), stat(t, mine)) {
		t.Fatal("an image is compared with itself")
	}
	harness.Must(t, "qemu-img", "compare", "-q", "-f", format, "-F", format, stock, mine)
	if format != "qcow2" {
		return
	}
	want := harness.ParseMap(t, harness.Must(t, "qemu-img", "map", "-f", format, "--output=json", stock))
	got := harness.ParseMap(t, harness.Must(t, "qemu-img", "map", "-f", format, "--output=json", mine))
	if a, b := places(want), places(got); a != b {
		t.Errorf("stock leaves data at\n%sours at\n%s", a, b)
	}
}

func stat(t *testing.T, name string) os.FileInfo {
	t.Helper()
	st, err := os.Stat(name)
	harness.OK(t, err)
	return st
}

// places is a map without where on the host its data lies, and without whether zeroes are written down where there are zeroes
// anyway: drover leaves such clusters alone.
func places(spans []harness.Span) string {
	var b strings.Builder
	var last harness.Span
	end := int64(0)
	flush := func() {
		if end > 0 {
			last.Length = end - last.Start
			b.WriteString(last.String() + "\n")
		}
	}
	for _, s := range spans {
		s.Offset = nil
		s.Present = s.Present && s.Data
		if end == 0 || s.Depth != last.Depth || s.Present != last.Present || s.Data != last.Data || s.Zero != last.Zero {
			flush()
			last = s
		}
		end = s.Start + s.Length
	}
	flush()
	return b.String()
}

// TestContexts compares what each metadata context says of each byte.
func TestContexts(t *testing.T) {
	for args, contexts := range map[string][]string{
		"-A -B b1 -B b2 disk.qcow2": {"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b1", "qemu:dirty-bitmap:b2"},
		"-A -B b2 over.qcow2":       {"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b2"},
		"-A -s over.qcow2":          {"base:allocation", "qemu:allocation-depth"},
		"-A -o 1048576 disk.qcow2":  {"base:allocation", "qemu:allocation-depth"},
		"-A -l before disk.qcow2":   {"base:allocation"},
	} {
		t.Run(args, func(t *testing.T) {
			stock, mine := twice(t, func(p program, dir string) string {
				s := p.serve(t, dir, append([]string{"-t", "-r", "-f", "qcow2"}, strings.Fields(args)...)...)
				var all strings.Builder
				for _, c := range contexts {
					all.WriteString(c + "\n" + extents(t, s.uri(""), c))
				}
				s.stop()
				return all.String()
			})
			if stock != mine {
				t.Errorf("stock\n%sours\n%s", stock, mine)
			}
		})
	}
}

// extents is what nbdinfo says of a context, with neighbours in the same state as one: how finely a server cuts is its affair.
// Of the bytes that have a place in the image's file it forgets whether they are known to be zero, as harness.ParseMap does.
func extents(t *testing.T, uri, context string) string {
	t.Helper()
	var list []struct {
		Offset, Length int64
		Type           int
		Description    string
	}
	out := harness.Must(t, "nbdinfo", "--map="+context, "--json", uri)
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var b strings.Builder
	last := ""
	end := int64(0)
	for _, e := range list {
		if context == "base:allocation" && e.Type == 2 {
			e.Type, e.Description = 0, "data"
		}
		if state := fmt.Sprintf("%d %s", e.Type, e.Description); state != last {
			fmt.Fprintf(&b, "%d %s\n", e.Offset, state)
			last = state
		}
		end = e.Offset + e.Length
	}
	fmt.Fprintf(&b, "%d end\n", end)
	return b.String()
}

// TestLists compares how the two list servers of others.
func TestLists(t *testing.T) {
	both(t)
	peer.Need(t, "nbdkit")
	for name, args := range map[string][]string{
		"memory":      {"memory", "1M"},
		"read-only":   {"-r", "memory", "1M"},
		"exports":     {"--filter=exportname", "memory", "1M", "exportname=one", "exportname=two", "exportdesc=fixed:some words"},
		"block sizes": {"--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=1M"},
		"oldstyle":    {"-o", "memory", "1M"},
		"no zero":     {"--filter=nozero", "memory", "1M"},
		"empty":       {"memory", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(harness.SocketDir(t), "s")
			pid := filepath.Join(t.TempDir(), "pid")
			startNBDKit(t, socket, pid, args)
			want := harness.Run(t, "qemu-nbd", "--list", "-k", socket)
			got := harness.Run(t, ours(t), "--list", "-k", socket)
			if string(got.Stdout) != string(want.Stdout) || string(got.Stderr) != string(want.Stderr) || got.Code != want.Code {
				t.Errorf("stock %s\nours %s", want, got)
			}
		})
	}
	t.Run("drover", func(t *testing.T) {
		dir := t.TempDir()
		images(t, dir)
		s := harness.Start(t, harness.Serve{Image: filepath.Join(dir, "disk.qcow2"), Args: []string{"--bitmap=b2"}})
		want := harness.Must(t, "qemu-nbd", "--list", "-k", s.Socket)
		if got := harness.Must(t, ours(t), "--list", "-k", s.Socket); string(got) != string(want) {
			t.Errorf("stock %s\nours %s", want, got)
		}
		s.Stop()
	})
}
