package cli

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// builtAs builds drover and returns it under another name.
func builtAs(t *testing.T, name string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("builds a program")
	}
	path := filepath.Join(t.TempDir(), name)
	if out, err := exec.Command("go", "build", "-o", path, "github.com/droverproject/drover/cmd/drover").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// TestIOSignals: what kills stock qemu-io kills drover, by the same signal, and what it had said before is said.
func TestIOSignals(t *testing.T) {
	path := builtAs(t, "qemu-io")
	all := ioImages(t)
	for _, last := range []string{"sigraise 9", "sigraise 15", "sigraise 6", "sigraise 2", "sigraise 3", "sigraise 10", "sigraise 11", "sigraise 12", "sigraise 13", "sigraise 1", "sigraise 14", "sigraise 34", "sigraise 64", "sigraise 18", "sigraise 28", "abort", "sigraise 0", "sigraise 17"} {
		run := func(name string) (string, syscall.WaitStatus) {
			dir := t.TempDir()
			fill(t, dir, all)
			cmd := exec.Command(name, "-c", "write -q -P 9 0 64k", "-c", "flush", "-c", last, "-c", "length", "disk")
			var out bytes.Buffer
			cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &out
			if err := cmd.Run(); err != nil {
				if _, ok := err.(*exec.ExitError); !ok {
					t.Fatal(err)
				}
			}
			return out.String(), cmd.ProcessState.Sys().(syscall.WaitStatus)
		}
		wantOut, want := run("qemu-io")
		gotOut, got := run(path)
		if want.Signaled() != got.Signaled() || want.Signal() != got.Signal() || want.ExitStatus() != got.ExitStatus() || wantOut != gotOut {
			t.Errorf("%s: stock ends with %v and says %q, drover with %v and %q", last, want, wantOut, got, gotOut)
		}
	}
}

// TestIOKilled: what was flushed before a crash is in the image, which opens again.
func TestIOKilled(t *testing.T) {
	path := builtAs(t, "qemu-io")
	all := ioImages(t)
	fill(t, "left", all)
	t.Chdir("left")
	cmd := exec.Command(path, "-t", "writeback", "-c", "write -P 9 0 64k", "-c", "write -P 8 512k 128k", "-c", "flush", "-c", "write -P 7 768k 64k", "-c", "sigraise 9", "disk")
	if err := cmd.Run(); err == nil || !cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
		t.Fatalf("it was not killed: %v", err)
	}
	if o := tool(t, "qemu-img", "check", "disk"); o.code != 0 && o.code != 3 {
		t.Errorf("check: %+v", o)
	}
	if o := tool(t, "qemu-io", "-c", "read -P 9 0 64k", "-c", "read -P 8 512k 128k", "disk"); o.code != 0 {
		t.Errorf("%+v", o)
	}
	if o := as(t, "", "qemu-io", "-c", "read -P 9 0 64k", "-c", "read -P 8 512k 128k", "disk"); o.code != 0 {
		t.Errorf("%+v", o)
	}
}
