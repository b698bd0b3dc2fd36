package daemon

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRuleset checks what is asked of kernels of each age: all that they know, and nothing else, which they would refuse.
func TestRuleset(t *testing.T) {
	for _, tc := range []struct {
		abi, errata      int
		fs, network, sco uint64
		notes            int
	}{
		{1, 0, 0x1fff, 0, 0, 2}, {2, 0, 0x3fff, 0, 0, 2}, {3, 0, 0x7fff, 0, 0, 1}, {4, 0, 0x7fff, 3, 0, 0}, {5, 0, 0xffff, 3, 0, 0},
		{6, 0, 0xffff, 3, 1, 0}, {7, 7, 0xffff, 3, 3, 0}, {7, 1, 0xffff, 3, 1, 0}, {8, 0, 0xffff, 3, 3, 0}, {99, 0, 0xffff, 3, 3, 0},
	} {
		k := landlock{abi: tc.abi, errata: tc.errata}
		want := unix.LandlockRulesetAttr{Handled_access_fs: tc.fs, Handled_access_net: tc.network, Scoped: tc.sco}
		if got := k.ruleset(); got != want {
			t.Errorf("version %d, errata %d: ruleset %+v, want %+v", tc.abi, tc.errata, got, want)
		}
		if got := k.notes(); len(got) != tc.notes {
			t.Errorf("version %d: notes %q", tc.abi, got)
		}
	}
}

func TestThreadError(t *testing.T) {
	if err := threadError("x", 0); err != nil {
		t.Error(err)
	}
	if err := threadError("x", syscall.ENOTSUP); !errors.Is(err, ErrNoSandbox) || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("%v", err)
	}
	if err := threadError("x", syscall.EPERM); !errors.Is(err, syscall.EPERM) || errors.Is(err, ErrNoSandbox) {
		t.Errorf("%v", err)
	}
}

// confined builds the program that tries things, and lays out what it tries them on, readable for everybody.
func confined(t *testing.T) (program, dir, addr string) {
	t.Helper()
	top, err := os.MkdirTemp("", "confined")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	dir = filepath.Join(top, "dir")
	for _, d := range []string{dir, filepath.Join(dir, "own")} {
		if err := os.Mkdir(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"open", "closed", "own/gone"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("old content"), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, f), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{top, dir, filepath.Join(dir, "own")} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	program = filepath.Join(top, "program")
	build := exec.Command("go", "build", "-o", program, "./testdata/confined")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no TCP here: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	return program, dir, l.Addr().String()
}

func needLandlock(t *testing.T) landlock {
	t.Helper()
	k, err := askLandlock()
	if err != nil {
		t.Skipf("the sandbox cannot be tried here: %v", err)
	}
	return k
}

// TestSandbox tries to get out of the sandbox from threads that were there before it.
func TestSandbox(t *testing.T) {
	k := needLandlock(t)
	program, dir, addr := confined(t)
	out, err := exec.Command(program, "-sandbox", "-dir", dir, "-addr", addr).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := []string{"read: denied", "list: denied", "make: denied", "remove own: done"}
	if k.abi >= abiTruncate {
		want = append(want, "truncate: denied")
	}
	if k.abi >= abiTCP {
		want = append(want, "connect: denied", "listen: denied", "notes: 0")
	}
	if os.Geteuid() == 0 {
		want = append(want, "chown: denied") // the capability is gone
	}
	for _, line := range want {
		if !strings.Contains(string(out), line+"\n") {
			t.Errorf("not %q:\n%s", line, out)
		}
	}
	if p, err := os.ReadFile(filepath.Join(dir, "open")); err != nil || string(p) != "ne" {
		t.Errorf("the open file holds %q, %v", p, err)
	}
	if p, err := os.ReadFile(filepath.Join(dir, "closed")); err != nil || string(p) != "old content" {
		t.Errorf("the closed file holds %q, %v", p, err)
	}
}

// TestDropUser becomes another user for good.
func TestDropUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become somebody else")
	}
	program, dir, addr := confined(t)
	if err := os.Chmod(filepath.Join(dir, "closed"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program, "-user", "12345:23456", "-dir", dir, "-addr", addr).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, line := range []string{
		"read: denied", "list: done", "truncate: denied", "connect: done", "listen: done", "chown: denied", "root: denied",
		"remove own: done",
	} {
		if !strings.Contains(string(out), line+"\n") {
			t.Errorf("not %q:\n%s", line, out)
		}
	}
	// Who is not root cannot become anybody.
	cmd := exec.Command(program, "-user", "54321:1", "-dir", dir, "-addr", addr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 23456}}
	out, err = cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "only root can") {
		t.Errorf("%v\n%s", err, out)
	}
}
