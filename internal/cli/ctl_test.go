//go:build linux || darwin

package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
)

// ctl runs a command against the server of the test.
func ctl(t *testing.T, args ...string) outcome {
	t.Helper()
	return drover(t, append([]string{"ctl", "--socket", "control"}, args...)...)
}

func mustCtl(t *testing.T, args ...string) string {
	t.Helper()
	o := ctl(t, args...)
	if o.code != 0 {
		t.Fatalf("ctl %v: code %d, %s", args, o.code, o.stderr)
	}
	return o.stdout
}

// refused wants one line that says why.
func refused(t *testing.T, reason string, args ...string) {
	t.Helper()
	o := ctl(t, args...)
	if o.code != 1 || !strings.Contains(o.stderr, reason) || strings.Count(o.stderr, "\n") != 1 {
		t.Errorf("ctl %q: code %d, %q, want %q", args, o.code, o.stderr, reason)
	}
}

// TestCtl manages a server by the command line alone.
func TestCtl(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, name := range []string{"disk.qcow2", "more.qcow2"} {
		mustDrover(t, "create", "-q", "-f", "qcow2", name, "1M")
	}
	s := startServe(t, "--socket", "sock", "--control", "control", "--export", "d=disk.qcow2")
	s.line(t)
	s.line(t)
	if got := mustCtl(t, "list"); !strings.Contains(got, "d     serving  read-write  1 MiB  qcow2   0        0          0        disk.qcow2\n") {
		t.Errorf("list:\n%s", got)
	}
	if got := mustCtl(t, "snapshot", "create", "d", "one"); got != "Snapshot \"one\" (ID 1) created.\n" {
		t.Errorf("snapshot create: %s", got)
	}
	refused(t, `"d" has a snapshot "one"`, "snapshot", "create", "d", "one")
	mustCtl(t, "snapshot", "rename", "d", "one", "two")
	if got := mustCtl(t, "snapshot", "list", "d"); !strings.Contains(got, "1   two ") {
		t.Errorf("snapshot list:\n%s", got)
	}
	mustCtl(t, "snapshot", "apply", "d", "two")
	mustCtl(t, "snapshot", "delete", "d", "two")
	if got := mustCtl(t, "snapshot", "list", "d"); got != "No snapshots.\n" {
		t.Errorf("snapshot list:\n%s", got)
	}
	if got := mustCtl(t, "resize", "d", "+1M"); !strings.HasPrefix(got, "Resized from 1 MiB to 2 MiB (2097152 bytes).\nNote: clients see") {
		t.Errorf("resize:\n%s", got)
	}
	refused(t, "--shrink", "resize", "d", "1M")
	mustCtl(t, "resize", "--shrink", "d", "1M")
	mustCtl(t, "bitmap", "add", "--granularity", "4k", "d", "b0")
	mustCtl(t, "bitmap", "add", "--disabled", "d", "b1")
	mustCtl(t, "bitmap", "merge", "d", "b0", "b1")
	mustCtl(t, "bitmap", "disable", "d", "b0")
	mustCtl(t, "bitmap", "enable", "d", "b1")
	mustCtl(t, "bitmap", "clear", "d", "b1")
	if got := mustCtl(t, "bitmap", "list", "d"); !strings.Contains(got, "b0      4 KiB        disabled\nb1      64 KiB       enabled\n") {
		t.Errorf("bitmap list:\n%s", got)
	}
	mustCtl(t, "bitmap", "remove", "d", "b0")
	mustCtl(t, "flush", "d")
	if got := mustCtl(t, "check", "d"); !strings.HasPrefix(got, "No errors were found on the image.\n") {
		t.Errorf("check:\n%s", got)
	}
	mustCtl(t, "export", "add", "--read-only", "m", "more.qcow2")
	refused(t, "being served already, as export \"m\"", "export", "add", "again", "more.qcow2")
	var list []daemon.DiskStatus
	if err := json.Unmarshal([]byte(mustCtl(t, "list", "--output=json")), &list); err != nil || len(list) != 2 || !list[1].ReadOnly {
		t.Errorf("list as JSON: %+v %v", list, err)
	}
	var details daemon.DiskDetails
	if err := json.Unmarshal([]byte(mustCtl(t, "show", "--output=json", "d")), &details); err != nil || len(details.Bitmaps) != 1 {
		t.Errorf("show as JSON: %+v %v", details, err)
	}
	if got := mustCtl(t, "show", "m"); !strings.Contains(got, "mode:          read-only\n") {
		t.Errorf("show:\n%s", got)
	}
	mustCtl(t, "export", "remove", "m")
	refused(t, `there is no disk "m"`, "show", "m")
	if got := mustCtl(t, "stats"); !strings.Contains(got, "1 disks, 0 clients") {
		t.Errorf("stats:\n%s", got)
	}
	mustCtl(t, "log-level", "debug")
	if got := mustCtl(t, "log-level"); got != "debug\n" {
		t.Errorf("log-level: %s", got)
	}
	if got := mustCtl(t, "reload"); got != "Nothing has changed.\n" {
		t.Errorf("reload: %s", got)
	}
	for _, args := range [][]string{
		{}, {"nonsense"}, {"snapshot"}, {"snapshot", "nonsense"}, {"list", "x"}, {"show"}, {"resize", "d"}, {"list", "--output=xml"},
		{"resize", "d", "much"}, {"export", "add", "-o", "x", "e", "f"}, {"bitmap", "add", "-g", "big", "d", "x"}, {"log-level", "a", "b"},
	} {
		if o := ctl(t, args...); o.code != 1 || o.stdout != "" {
			t.Errorf("ctl %q: code %d, %s%s", args, o.code, o.stdout, o.stderr)
		}
	}
	signalSelf(t, syscall.SIGTERM)
	if code := s.end(t); code != 0 {
		t.Errorf("exit code %d\n%s", code, &s.err)
	}
	if !strings.Contains(s.err.String(), "POST /v1/disk/snapshots") {
		t.Errorf("what was changed is not logged:\n%s", &s.err)
	}
	refused(t, "is the server running", "list")
	for _, name := range []string{"disk.qcow2", "more.qcow2"} {
		mustDrover(t, "check", "-q", name)
		mustTool(t, "qemu-img", "check", "-q", name)
	}
}

// TestServeReloads takes the log level from a file that changes.
func TestServeReloads(t *testing.T) {
	t.Chdir(t.TempDir())
	messages := notifySocket(t)
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "1M")
	put(t, "conf", "# levels\nlog-level = warn\n\nread-only = true\n")
	s := startServe(t, "--config", "conf", "--control", "control", "--socket", "sock", "disk")
	s.line(t)
	if got := s.line(t); !strings.HasSuffix(got, "read-only") {
		t.Errorf("the file does not count: %s", got)
	}
	if got := <-messages; got != "READY=1" {
		t.Errorf("notification %q", got)
	}
	if got := mustCtl(t, "log-level"); got != "warn\n" {
		t.Errorf("level %s", got)
	}
	put(t, "conf", "log-level = info\nread-only = false\n")
	signalSelf(t, syscall.SIGHUP)
	if got := <-messages; !strings.HasPrefix(got, "RELOADING=1") {
		t.Errorf("notification %q", got)
	}
	if got := <-messages; got != "READY=1" {
		t.Errorf("notification %q", got)
	}
	if got := mustCtl(t, "log-level"); got != "info\n" {
		t.Errorf("level %s", got)
	}
	if !strings.Contains(s.err.String(), "read-only has changed, which takes effect when the server is started again") {
		t.Errorf("messages:\n%s", &s.err)
	}
	if got := mustCtl(t, "reload"); got != "Nothing has changed.\n" {
		t.Errorf("reload: %s", got)
	}
	put(t, "conf", "nonsense = 1\n")
	refused(t, "conf:1: there is no flag --nonsense", "reload")
	put(t, "conf", "")
	if got := mustCtl(t, "reload"); !strings.Contains(got, "log level info") {
		t.Errorf("reload: %s", got)
	}
	signalSelf(t, syscall.SIGTERM)
	if code := s.end(t); code != 0 {
		t.Errorf("exit code %d\n%s", code, &s.err)
	}
	for _, conf := range []string{"nonsense = 1\n", "read-only\n", "read-only = perhaps\n", "log-level = loud\n"} {
		put(t, "conf", conf)
		if o := drover(t, "serve", "--config", "conf", "disk"); o.code != 1 || o.stderr == "" {
			t.Errorf("%q: code %d, %s", conf, o.code, o.stderr)
		}
	}
	if o := drover(t, "serve", "--config", "missing", "disk"); o.code != 1 || !strings.Contains(o.stderr, "no such file") {
		t.Errorf("a file that is not there: code %d, %s", o.code, o.stderr)
	}
}

// TestSecretsDir reads secrets that nobody else can read or make.
func TestSecretsDir(t *testing.T) {
	dir := t.TempDir()
	d := secretsDir(dir)
	put(t, filepath.Join(dir, "good"), "abc")
	put(t, filepath.Join(dir, "open"), "abc")
	put(t, filepath.Join(dir, "bytes"), "\xff")
	for name, mode := range map[string]os.FileMode{"good": 0o600, "open": 0o640, "bytes": 0o400} {
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if b, err := d.lookup("good"); err != nil || string(b) != "abc" {
		t.Errorf("%q %v", b, err)
	}
	for id, want := range map[string]string{
		"open": "its mode is 0640", "bytes": "not valid UTF-8", "folder": "not a regular file", "none": "No secret with id 'none'",
		"../good": "an ID consists of", "": "an ID consists of",
	} {
		if _, err := d.lookup(id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", id, err, want)
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := d.lookup("good"); err == nil || !strings.Contains(err.Error(), "others have rights") {
		t.Errorf("a folder for everybody: %v", err)
	}
	if _, err := newKeyring(&objectFlags{}, filepath.Join(dir, "good")); err == nil {
		t.Error("a file for a folder")
	}
}

// TestKeyring reads the files of objects again.
func TestKeyring(t *testing.T) {
	t.Chdir(t.TempDir())
	put(t, "file", "one")
	k, err := newKeyring(&objectFlags{texts: []string{"secret,id=s,file=file"}}, "")
	if err != nil {
		t.Fatal(err)
	}
	put(t, "file", "two")
	if changes, err := k.reload(); err != nil || len(changes) != 1 || strings.Contains(changes[0], "two") {
		t.Errorf("%q %v", changes, err)
	}
	if b, err := k.lookup("s"); err != nil || string(b) != "two" {
		t.Errorf("%q %v", b, err)
	}
	if err := os.Remove("file"); err != nil {
		t.Fatal(err)
	}
	if _, err := k.reload(); err == nil {
		t.Error("a secret that is gone was read")
	}
	if b, err := k.lookup("s"); err != nil || string(b) != "two" {
		t.Errorf("after a reload that failed: %q %v", b, err)
	}
}

// TestRepairIsTold: who opens an image for writing that was not closed cleanly hears of its repair, in one line.
func TestRepairIsTold(t *testing.T) {
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "disk", "1M")
	dev, err := block.Open(t.Context(), "disk", block.OpenOptions{Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(t.Context(), make([]byte, 300<<10), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile("disk") // as a power cut would leave it
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"snapshot", "-c", "s", "cut"}, {"amend", "-o", "refcount_bits=32", "cut"}, {"resize", "cut", "2M"}, {"bitmap", "--add", "cut", "b"},
	} {
		put(t, "cut", string(p))
		if o := drover(t, "info", "cut"); o.code != 0 || o.stderr != "" {
			t.Errorf("a reader: code %d, %s", o.code, o.stderr)
		}
		o := drover(t, args...)
		if o.code != 0 || !strings.HasPrefix(o.stderr, "drover: cut: the image was not closed cleanly and has been checked: repaired") ||
			strings.Count(o.stderr, "\n") != 1 {
			t.Errorf("%q: code %d, %q", args, o.code, o.stderr)
		}
		mustDrover(t, "check", "-q", "cut")
		mustTool(t, "qemu-img", "check", "-q", "cut")
	}
}
