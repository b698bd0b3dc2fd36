package cli

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// tellingBuffer may be written by several goroutines.
type tellingBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
	// wrote gets a value at each write, if there is room.
	wrote chan struct{}
}

func (l *tellingBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.wrote <- struct{}{}:
	default:
	}
	return l.b.Write(p)
}

func (l *tellingBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// judgeProgress reads the lines of --progress=json.
func judgeProgress(t *testing.T, command, text string) {
	t.Helper()
	last := progressLine{}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i, line := range lines {
		var p progressLine
		if err := json.Unmarshal([]byte(line), &p); err != nil {
			t.Fatalf("%s: %v in %q", command, err, line)
		}
		if p.Command != command || p.Done < last.Done || p.Percent > 100 || p.Finished != (i == len(lines)-1) {
			t.Errorf("%s: line %d of %d is %s", command, i, len(lines), line)
		}
		last = p
	}
	if last.Done != last.Total || last.Percent != 100 || len(lines) < 2 {
		t.Errorf("%s: progress ends with %+v after %d lines", command, last, len(lines))
	}
}

func TestProgressForPrograms(t *testing.T) {
	start := chains(t)
	for _, args := range [][]string{
		{"convert", "-O", "qcow2", "top", "out"}, {"compare", "top", "top.copy"}, {"check", "base"}, {"rebase", "-b", "flat", "-F", "qcow2", "top"},
		{"commit", "mid"}, {"amend", "-o", "refcount_bits=64", "snap"}, {"resize", "--preallocation=full", "flat", "3M"}, {"dd", "if=base", "of=dd"},
	} {
		start.restore(t)
		put(t, "top.copy", start["top"])
		o := drover(t, append([]string{args[0], "--progress=json"}, args[1:]...)...)
		if o.code != 0 || strings.Contains(o.stdout, "/100%") {
			t.Errorf("%q: %+v", args, o)
		}
		judgeProgress(t, args[0], o.stderr)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		start.restore(t)
		put(t, "top.copy", start["top"])
		o = drover(t, append([]string{args[0], "--progress=json:" + fdOf(t, w)}, args[1:]...)...)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if o.code != 0 || o.stderr != "" {
			t.Errorf("%q: %+v", args, o)
		}
		judgeProgress(t, args[0], string(b))
		_ = r.Close()
	}
	if o := drover(t, "convert", "--progress=foo", "base", "out"); o.code != 1 || !strings.Contains(o.stderr, "progress is shown as") {
		t.Errorf("%+v", o)
	}
}

func TestProgressOnATerminal(t *testing.T) {
	var out bytes.Buffer
	p := &progress{style: progressTerminal, out: &out, began: time.Now().Add(-10 * time.Second), ignore: func() {}}
	p.set(1<<30, 4<<30)
	p.end()
	got := out.String()
	for _, want := range []string{" 25.0%", "1 GiB of 4 GiB", "MiB/s, 30s left\x1b[K", "\r100.0%", "\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in %q", want, got)
		}
	}
}

// TestResultsForPrograms: what a command has made is told as info tells of it.
func TestResultsForPrograms(t *testing.T) {
	start := chains(t)
	for _, c := range []struct {
		image string
		args  []string
	}{
		{"out", []string{"create", "-f", "qcow2", "out", "1M"}}, {"out", []string{"convert", "-O", "qcow2", "top", "out"}},
		{"mid", []string{"commit", "mid"}}, {"top", []string{"rebase", "-b", "flat", "-F", "qcow2", "top"}},
		{"top", []string{"rebase", "-u", "-b", "", "top"}}, {"flat", []string{"resize", "flat", "3M"}}, {"dd", []string{"dd", "if=base", "of=dd"}},
	} {
		start.restore(t)
		o := drover(t, append([]string{c.args[0], "--output=json"}, c.args[1:]...)...)
		var r workResult
		if err := json.Unmarshal([]byte(o.stdout), &r); err != nil || o.code != 0 {
			t.Errorf("%q: %v, %+v", c.args, err, o)
			continue
		}
		var want imageInfo
		if err := json.Unmarshal([]byte(mustDrover(t, "info", "--output=json", c.image)), &want); err != nil {
			t.Fatal(err)
		}
		if r.Command != c.args[0] || r.Image == nil || r.Image.VirtualSize != want.VirtualSize || r.Image.Format != want.Format ||
			r.Image.Filename != want.Filename || r.Image.Backing != want.Backing {
			t.Errorf("%q: %s, want %+v", c.args, o.stdout, want)
		}
	}
	if o := drover(t, "convert", "--output=xml", "base", "out"); o.code != 1 {
		t.Errorf("%+v", o)
	}
}
