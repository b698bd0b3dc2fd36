package storage_test

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/droverproject/drover/storage"
)

func openTwo(t *testing.T) (a, b *storage.OSFile, path string) {
	t.Helper()
	path = writeTemp(t, make([]byte, 4096))
	open := func() *storage.OSFile {
		f, err := storage.OpenFile(path, storage.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	return open(), open(), path
}

// lockedBytes returns which of QEMU's lock bytes others than f hold.
func lockedBytes(t *testing.T, f *storage.OSFile) (bytes []int64) {
	t.Helper()
	fd, _ := f.RawFD()
	for _, base := range []int64{100, 200} {
		for i := range int64(5) {
			lk := unix.Flock_t{Type: unix.F_WRLCK, Start: base + i, Len: 1}
			if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk); err != nil {
				t.Fatal(err)
			}
			if lk.Type != unix.F_UNLCK {
				bytes = append(bytes, base+i)
			}
		}
	}
	return bytes
}

func wantLocked(t *testing.T, f *storage.OSFile, want ...int64) {
	t.Helper()
	got := lockedBytes(t, f)
	if len(got) != len(want) {
		t.Fatalf("locked bytes are %v, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("locked bytes are %v, want %v", got, want)
		}
	}
}

// The bytes are those that a QEMU 7.2 holds for an image open for writing, for reading, and for reading with -U.
func TestLockBytes(t *testing.T) {
	a, b, _ := openTwo(t)
	steps := []struct {
		mode storage.LockMode
		want []int64
	}{
		{storage.LockWrite, []int64{100, 101, 103, 201, 203}},
		{storage.LockRead, []int64{100, 201, 203}},
		{storage.LockForceShare, []int64{100}},
		{storage.LockWrite, []int64{100, 101, 103, 201, 203}},
		{storage.LockNone, nil},
	}
	for _, step := range steps {
		if err := a.Lock(step.mode); err != nil {
			t.Fatal(err)
		}
		wantLocked(t, b, step.want...)
	}
}

func TestLockConflicts(t *testing.T) {
	tests := []struct {
		name       string
		has, wants storage.LockMode
		want       *storage.LockError // nil: no conflict
	}{
		{"two readers", storage.LockRead, storage.LockRead, nil},
		{"write while read", storage.LockRead, storage.LockWrite, &storage.LockError{Perm: storage.PermWrite}},
		{"read while written", storage.LockWrite, storage.LockRead, &storage.LockError{Perm: storage.PermWrite, Shared: true}},
		{"two writers", storage.LockWrite, storage.LockWrite, &storage.LockError{Perm: storage.PermWrite}},
		{"force share", storage.LockWrite, storage.LockForceShare, nil},
		{"write while force share", storage.LockForceShare, storage.LockWrite, nil},
		{"nothing", storage.LockWrite, storage.LockNone, nil},
		{"resize", storage.LockRead, storage.LockMode{Hold: storage.PermResize, Share: storage.PermAll},
			&storage.LockError{Perm: storage.PermResize}},
		{"deny resize", storage.LockMode{Hold: storage.PermResize, Share: storage.PermAll},
			storage.LockMode{Share: storage.PermAll &^ storage.PermResize}, &storage.LockError{Perm: storage.PermResize, Shared: true}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a, b, path := openTwo(t)
			if err := a.Lock(test.has); err != nil {
				t.Fatal(err)
			}
			err := b.Lock(test.wants)
			if test.want == nil {
				if err != nil {
					t.Fatalf("Lock: %v", err)
				}
				return
			}
			var got *storage.LockError
			if !errors.As(err, &got) || got.Perm != test.want.Perm || got.Shared != test.want.Shared || got.Name != path {
				t.Fatalf("Lock: %#v, want %+v", err, test.want)
			}
			wantLocked(t, a) // nothing of the failed attempt is left
			if err := a.Lock(storage.LockNone); err != nil {
				t.Fatal(err)
			}
			if err := b.Lock(test.wants); err != nil {
				t.Errorf("Lock after the other has gone: %v", err)
			}
		})
	}
}

// A failed upgrade leaves what was held before.
func TestLockRestored(t *testing.T) {
	a, b, _ := openTwo(t)
	for _, f := range []*storage.OSFile{a, b} {
		if err := f.Lock(storage.LockRead); err != nil {
			t.Fatal(err)
		}
	}
	var locked *storage.LockError
	if err := a.Lock(storage.LockWrite); !errors.As(err, &locked) {
		t.Fatalf("Lock: %v, want a LockError", err)
	}
	wantLocked(t, b, 100, 201, 203)
}

func TestLockErrorText(t *testing.T) {
	for want, err := range map[string]*storage.LockError{
		"Failed to get \"write\" lock\nIs another process using the image [a b]?": {Name: "a b", Perm: storage.PermWrite},
		"Failed to get shared \"consistent read\" lock\nIs another process using the image [x]?": {
			Name: "x", Perm: storage.PermConsistentRead, Shared: true},
	} {
		if err.Error() != want {
			t.Errorf("got %q, want %q", err.Error(), want)
		}
	}
}

func TestNoLock(t *testing.T) {
	a, _, path := openTwo(t)
	if err := a.Lock(storage.LockWrite); err != nil {
		t.Fatal(err)
	}
	f, err := storage.OpenFile(path, storage.OpenOptions{NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Lock(storage.LockWrite); err != nil {
		t.Errorf("Lock with locking off: %v", err)
	}
	wantLocked(t, a)
}

// qemuIO runs a qemu-io that has the image open until the returned function is called.
func qemuIO(t *testing.T, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command("qemu-io", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() {
		in.Close()
		io.Copy(io.Discard, out)
		cmd.Wait()
	}
	t.Cleanup(stop)
	// The answer to a command means that the image is open and locked.
	io.WriteString(in, "length\n")
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("qemu-io said %q, %v", line, err)
	}
	return stop
}

func needQEMU(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"qemu-io", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
}

func qcow2Image(t *testing.T) (path string) {
	t.Helper()
	path = writeTemp(t, nil)
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", path, "1M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img create: %v\n%s", err, out)
	}
	return path
}

func TestLockAgainstQEMU(t *testing.T) {
	needQEMU(t)
	path := qcow2Image(t)
	f, err := storage.OpenFile(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	wantError := func(mode storage.LockMode, want storage.LockError) {
		t.Helper()
		want.Name = path
		var got *storage.LockError
		if err := f.Lock(mode); !errors.As(err, &got) || *got != want {
			t.Errorf("Lock(%v): %v, want %v", mode, err, &want)
		}
	}

	stop := qemuIO(t, "-f", "qcow2", path)
	wantLocked(t, f, 100, 101, 103, 201, 203)
	wantError(storage.LockWrite, storage.LockError{Perm: storage.PermWrite})
	wantError(storage.LockRead, storage.LockError{Perm: storage.PermWrite, Shared: true})
	size, _ := f.Size()
	if _, err := storage.CreateFile(path, storage.OpenOptions{}); err == nil {
		t.Errorf("CreateFile succeeded on an image that QEMU has open")
	}
	if now, _ := f.Size(); now != size || size == 0 {
		t.Errorf("CreateFile cut an image in use from %d to %d bytes", size, now)
	}
	if err := f.Lock(storage.LockForceShare); err != nil {
		t.Errorf("LockForceShare against a writer: %v", err)
	}
	if err := f.Lock(storage.LockNone); err != nil {
		t.Fatal(err)
	}
	stop()

	stop = qemuIO(t, "-r", "-f", "qcow2", path)
	wantLocked(t, f, 100, 201, 203)
	wantError(storage.LockWrite, storage.LockError{Perm: storage.PermWrite})
	if err := f.Lock(storage.LockRead); err != nil {
		t.Errorf("LockRead against a reader: %v", err)
	}
	stop()
	wantLocked(t, f)
}

func TestQEMUAgainstLock(t *testing.T) {
	needQEMU(t)
	path := qcow2Image(t)
	f, err := storage.OpenFile(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tests := []struct {
		mode storage.LockMode
		args []string
		want string // in QEMU's output; empty: it succeeds
	}{
		{storage.LockWrite, []string{"qemu-io", "-f", "qcow2", "-c", "read 0 512", path}, `Failed to get "write" lock`},
		{storage.LockWrite, []string{"qemu-img", "info", "-f", "qcow2", path}, `Failed to get shared "write" lock`},
		{storage.LockWrite, []string{"qemu-img", "info", "-U", "-f", "qcow2", path}, ""},
		{storage.LockWrite, []string{"qemu-img", "create", "-f", "qcow2", path, "64k"}, "lock"},
		{storage.LockRead, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512", path}, `Failed to get "write" lock`},
		{storage.LockRead, []string{"qemu-img", "info", "-f", "qcow2", path}, ""},
		{storage.LockNone, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512", path}, ""},
	}
	for _, test := range tests {
		if err := f.Lock(test.mode); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(test.args[0], test.args[1:]...).CombinedOutput()
		refused := strings.Contains(string(out), "Failed to get")
		if refused != (test.want != "") || !strings.Contains(string(out), test.want) {
			t.Errorf("with %v, %v: %v\n%swant %q", test.mode, test.args, err, out, test.want)
		}
	}
}
