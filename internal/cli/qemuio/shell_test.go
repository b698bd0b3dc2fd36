package qemuio

import (
	"bytes"
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// memory opens raw disks in memory.
type memory struct{}

func (memory) Open(_ context.Context, o Opening) (*Image, error) {
	if o.Name != "disk" {
		return nil, errors.New("can't open device " + o.Name)
	}
	file := storage.NewMemFile("disk")
	if err := file.Truncate(1 << 20); err != nil {
		return nil, err
	}
	dev, err := block.NewRaw(file, block.RawOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	return &Image{Device: dev, Opened: o}, nil
}

func (m memory) Reopen(ctx context.Context, im *Image, r Reopening) (*Image, error) {
	if err := im.Close(); err != nil {
		return nil, err
	}
	o := im.Opened
	o.ReadOnly = r.ReadOnly
	return m.Open(ctx, o)
}

var times = regexp.MustCompile(`ops; .* ops/sec\)`)

// say runs the lines and returns what the shell says, and whether a command failed.
func say(t *testing.T, lines string) (stdout, stderr string, failed bool) {
	t.Helper()
	var out, err bytes.Buffer
	s := &Shell{Program: "qemu-io", Out: &out, Err: &err, Opener: memory{}}
	if e := s.Open(t.Context(), Opening{Name: "disk"}); e != nil {
		t.Fatal(e)
	}
	s.Run(t.Context(), strings.Split(lines, "\n"))
	if e := s.Close(); e != nil {
		t.Fatal(e)
	}
	return times.ReplaceAllString(out.String(), "ops"), err.String(), s.Failed()
}

func TestCommands(t *testing.T) {
	for _, c := range []struct {
		lines, out, err string
		failed          bool
	}{
		{lines: "write -q -P 7 10 20\nread -P 7 10 20", out: "read 20/20 bytes at offset 10\n20 bytes, 1 ops\n"},
		{lines: "read -q -P 7 0 1k", out: "Pattern verification failed at offset 0, 1024 bytes\n", failed: true},
		{lines: "write -q -P 0x41 1 3\nread -v 0 5\nlength",
			out: "00000000:  00 41 41 41 00  .AAA.\nread 5/5 bytes at offset 0\n5 bytes, 1 ops\n1 MiB\n"},
		{lines: "aio_write -P 3 0 64k\naio_flush\nread -q -P 3 0 64k", out: "wrote 65536/65536 bytes at offset 0\n64 KiB, 1 ops\n"},
		{lines: "aio_write -P 3 0 64k", out: "wrote 65536/65536 bytes at offset 0\n64 KiB, 1 ops\n"},
		{lines: "aio_read 1M 1\naio_flush", out: "readv failed: Input/output error\n"},
		{lines: "write 1M 1", out: "write failed: Input/output error\n", failed: true},
		{lines: "reopen -r\nwrite 0 1\ndiscard 0 1", err: "qemu-io: Block node is read-only\nqemu-io: Block node is read-only\n", failed: true},
		{lines: "close\nlength", err: "no file open, try 'help open'\n", failed: true},
		{lines: "open disk", err: "qemu-io: file open already, try 'help close'\n", failed: true},
		{lines: "close\nopen other", err: "qemu-io: can't open device other\n", failed: true},
		{lines: "nosuch\nquit\nlength", err: "command \"nosuch\" not found\n", failed: true},
		{lines: "alloc 0 1k\nmap", out: "1024/1024 bytes allocated at offset 0 bytes\n1 MiB (0x100000) bytes     allocated at offset 0 bytes (0x0)\n"},
		{lines: "write -b 0 512\nwrite -c 0 512\nbreak a b\nwait_break b",
			out: "write failed: Operation not supported\nwrite failed: Operation not supported\n" +
				"Could not set breakpoint: Operation not supported\nCould not wait for breakpoint: Operation not supported\n", failed: true},
		{lines: "read 0", err: "bad argument count 1 to read, expected at least 2 arguments\n", failed: true},
		{lines: "truncate 1k", err: "qemu-io: Image format driver does not support resize\n", failed: true},
	} {
		out, err, failed := say(t, c.lines)
		if out != c.out || err != c.err || failed != c.failed {
			t.Errorf("%q: failed %v\n%s%s", c.lines, failed, cmp.Diff(c.out, out), cmp.Diff(c.err, err))
		}
	}
}

func TestInteract(t *testing.T) {
	var out bytes.Buffer
	s := &Shell{Program: "qemu-io", Out: &out, Err: &out, Opener: memory{}}
	s.Interact(t.Context(), strings.NewReader("open disk\n\nlength\nlength"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if want := "qemu-io> qemu-io> qemu-io> 1 MiB\nqemu-io> 1 MiB\nqemu-io> "; out.String() != want {
		t.Errorf("%q", out.String())
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0 bytes", 1: "1 bytes", 0.5: "0.500000 bytes", 1023: "1023 bytes", 1024: "1 KiB", 1536: "1.500 KiB", 1000448: "977 KiB",
		1048575: "1023.999 KiB", 1 << 20: "1 MiB", 1294467: "1.234 MiB", 5 << 30: "5 GiB", 1 << 62: "4 EiB", 1 << 63: "8 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%v) = %q, want %q", n, got, want)
		}
	}
}

func TestElapsed(t *testing.T) {
	for _, c := range []struct {
		d     time.Duration
		fixed bool
		want  string
	}{
		{0, false, "00.00 sec"}, {123 * time.Millisecond, false, "00.12 sec"}, {1500 * time.Millisecond, false, "0:00:01.50"},
		{0, true, "0:00:00.00"}, {23613420 * time.Millisecond, false, "6:33:33.42"},
	} {
		if got := elapsed(c.d, c.fixed); got != c.want {
			t.Errorf("%v: %q, want %q", c.d, got, c.want)
		}
	}
}
