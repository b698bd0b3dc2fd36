package storage_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/storage/storagetest"
)

// The same contract on a disk with 4 KiB sectors: nearly every request is then read-modify-write.
func TestOSFileDirectLargeSectors(t *testing.T) {
	createTemp(t, storage.OpenOptions{Direct: true}).Close()
	storagetest.Run(t, func(t *testing.T) storage.File {
		f := createTemp(t, storage.OpenOptions{Direct: true})
		storage.ForceDirectAlign(f, 4096)
		return f
	})
}

// tmpfs has holes but no FALLOC_FL_ZERO_RANGE.
func TestOSFileTmpfs(t *testing.T) {
	const tmpfsMagic = 0x01021994
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != tmpfsMagic {
		t.Skip("/dev/shm is not a tmpfs")
	}
	storagetest.Run(t, func(t *testing.T) storage.File {
		dir, err := os.MkdirTemp("/dev/shm", "storage")
		if err != nil {
			t.Skipf("no room in /dev/shm: %v", err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		f, err := storage.CreateFile(filepath.Join(dir, "image"), storage.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	})
}

func writeTemp(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpenRefusesOtherFiles(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/null", "/dev/zero"} {
		for _, o := range []storage.OpenOptions{{}, {ReadOnly: true}, {Direct: true}} {
			if f, err := storage.OpenFile(path, o); !errors.Is(err, storage.ErrFileType) {
				t.Errorf("OpenFile(%s, %+v) = %v, %v; want ErrFileType", path, o, f, err)
			}
		}
		if f, err := storage.CreateFile(path, storage.OpenOptions{}); !errors.Is(err, storage.ErrFileType) {
			t.Errorf("CreateFile(%s) = %v, %v; want ErrFileType", path, f, err)
		}
	}
	for _, rel := range []string{"fifo", "."} {
		if f, err := storage.OpenBeneath(dir, rel, storage.OpenOptions{ReadOnly: true}); !errors.Is(err, storage.ErrFileType) {
			t.Errorf("OpenBeneath(%s) = %v, %v; want ErrFileType", rel, f, err)
		}
		_, err := storage.OpenRootBeneath(dir, rel, storage.OpenOptions{ReadOnly: true})
		if !errors.Is(err, storage.ErrFileType) {
			t.Errorf("OpenBeneath(%s) without openat2: %v; want ErrFileType", rel, err)
		}
	}
	if _, err := storage.OpenFile(filepath.Join(dir, "none"), storage.OpenOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OpenFile of nothing: %v", err)
	}
}

func TestCreateFile(t *testing.T) {
	path := writeTemp(t, []byte("old content"))
	if _, err := storage.CreateFile(path, storage.OpenOptions{Exclusive: true}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("exclusive CreateFile of a file that is there: %v", err)
	}
	if _, err := storage.CreateFile(path, storage.OpenOptions{ReadOnly: true}); !errors.Is(err, storage.ErrReadOnly) {
		t.Errorf("read-only CreateFile: %v", err)
	}
	user, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Lock(storage.LockRead); err != nil {
		t.Fatal(err)
	}
	var locked *storage.LockError
	if _, err := storage.CreateFile(path, storage.OpenOptions{}); !errors.As(err, &locked) {
		t.Errorf("CreateFile of a file in use: %v, want a LockError", err)
	}
	if got, _ := os.ReadFile(path); string(got) != "old content" {
		t.Fatalf("CreateFile destroyed a file in use")
	}
	user.Close()
	f, err := storage.CreateFile(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if size, err := f.Size(); size != 0 || err != nil {
		t.Errorf("Size after CreateFile = %d, %v", size, err)
	}
	if err := openAndLock(path, storage.LockRead); !errors.As(err, &locked) {
		t.Errorf("a created file is not locked: %v", err)
	}
	made := filepath.Join(t.TempDir(), "made")
	g, err := storage.CreateFile(made, storage.OpenOptions{Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
	if info, err := os.Stat(made); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("a file created with mode 0600 has %v, %v", info.Mode(), err)
	}
}

func openAndLock(path string, mode storage.LockMode) error {
	f, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	return errors.Join(f.Lock(mode), f.Close())
}

func TestReadOnly(t *testing.T) {
	path := writeTemp(t, []byte("content"))
	f, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := []byte("x")
	calls := map[string]error{
		"Truncate":    f.Truncate(0),
		"PunchHole":   f.PunchHole(0, 1),
		"ZeroRange":   f.ZeroRange(0, 1),
		"Preallocate": f.Preallocate(0, 1),
	}
	_, calls["WriteAt"] = f.WriteAt(p, 0)
	_, calls["WriteVAt"] = f.WriteVAt([][]byte{p}, 0)
	for name, err := range calls {
		if !errors.Is(err, storage.ErrReadOnly) {
			t.Errorf("%s: %v, want ErrReadOnly", name, err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
	if !f.Stat().ReadOnly {
		t.Errorf("Stat does not say read-only")
	}
	if got, _ := os.ReadFile(path); string(got) != "content" {
		t.Errorf("content is now %q", got)
	}
}

func TestOpenBeneath(t *testing.T) {
	top := t.TempDir()
	root := filepath.Join(top, "root")
	if err := os.MkdirAll(filepath.Join(root, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"root/a": "inside", "root/sub/b": "deeper", "secret": "outside"}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(top, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	links := map[string]string{
		"up": "../secret", "abs": filepath.Join(top, "secret"), "out": "..", "self": "/proc/self/root" + filepath.Join(top, "secret"),
		"in": "sub/b", "back": "sub/../a",
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	openers := map[string]func(root, rel string, o storage.OpenOptions) (*storage.OSFile, error){
		"openat2": storage.OpenBeneath, "os.Root": storage.OpenRootBeneath,
	}
	for how, open := range openers {
		for rel, want := range map[string]string{"a": "inside", "sub/b": "deeper", "in": "deeper", "back": "inside", "sub/../a": "inside"} {
			f, err := open(root, rel, storage.OpenOptions{})
			if err != nil {
				t.Errorf("%s: %s: %v", how, rel, err)
				continue
			}
			got := make([]byte, len(want))
			if _, err := f.ReadAt(got, 0); (err != nil && err != io.EOF) || string(got) != want {
				t.Errorf("%s: %s reads %q, %v; want %q", how, rel, got, err, want)
			}
			f.Close()
		}
		for _, rel := range []string{"../secret", "up", "abs", "out/secret", "self", "sub/../../secret", filepath.Join(top, "secret")} {
			if f, err := open(root, rel, storage.OpenOptions{ReadOnly: true}); err == nil {
				t.Errorf("%s: %s leads out of the directory and was opened", how, rel)
				f.Close()
			}
		}
	}
}

// The data path of a file does not allocate.
func TestNoAllocations(t *testing.T) {
	direct := storage.OpenOptions{Direct: true}
	files := map[string]storage.File{"buffered": createTemp(t, storage.OpenOptions{}), "memory": storage.NewMemFile("mem")}
	if f, err := storage.CreateFile(filepath.Join(t.TempDir(), "direct"), direct); err == nil {
		files["direct"] = f
	}
	for name, f := range files {
		defer f.Close()
		raw := make([]byte, 64<<10)
		p := raw[-uintptr(unsafe.Pointer(&raw[0]))&4095:][:32<<10]
		bufs := [][]byte{p[:4096], p[4096:8192], p[8192:]}
		calls := map[string]func() error{
			"WriteAt":  func() error { _, err := f.WriteAt(p, 4096); return err },
			"WriteVAt": func() error { _, err := f.WriteVAt(bufs, 8192); return err },
			"ReadAt":   func() error { _, err := f.ReadAt(p, 4096); return err },
			"ReadVAt":  func() error { _, err := f.ReadVAt(bufs, 8192); return err },
			"Nowait": func() error {
				_, err := f.(storage.NowaitReader).ReadAtNowait(p, 4096)
				if err == storage.ErrWouldBlock {
					err = nil
				}
				return err
			},
			"NowaitV": func() error {
				_, err := storage.ReadVNowait(f, bufs, 8192)
				if err == storage.ErrWouldBlock {
					err = nil
				}
				return err
			},
			"Size": func() error { _, err := f.Size(); return err },
		}
		if _, err := f.WriteAt(p, 8192+32<<10); err != nil {
			t.Fatal(err)
		}
		for call, fn := range calls {
			if name == "direct" && call == "Size" {
				continue
			}
			var failed error
			allocs := testing.AllocsPerRun(50, func() {
				if err := fn(); err != nil {
					failed = err
				}
			})
			if failed != nil || allocs != 0 {
				t.Errorf("%s %s: %v allocations, %v", name, call, allocs, failed)
			}
		}
	}
}

// What is in the page cache is read without waiting; what is not is refused.
func TestReadAtNowait(t *testing.T) {
	f := createTemp(t, storage.OpenOptions{})
	defer f.Close()
	data := bytes.Repeat([]byte("drover"), 200000)
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100000)
	n, err := f.ReadAtNowait(p, 1000)
	if err == storage.ErrWouldBlock {
		t.Skip("the file system cannot read without waiting")
	}
	if n != len(p) || err != nil || !bytes.Equal(p, data[1000:][:len(p)]) {
		t.Fatalf("ReadAtNowait of cached bytes = %d, %v", n, err)
	}
	fd, ok := f.RawFD()
	if !ok {
		t.Fatal("an open file has no descriptor")
	}
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAtNowait(p, 0); err != storage.ErrWouldBlock {
		t.Errorf("ReadAtNowait of bytes on the disk = %d, %v; want ErrWouldBlock", n, err)
	}
}

// A block device: a loop device over a file, where this user may make one.
func TestBlockDevice(t *testing.T) {
	losetup, err := exec.LookPath("losetup")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs losetup and root to make a block device")
	}
	const size = 8 << 20
	backing := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(backing, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--find", "--show", backing).Output()
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	defer exec.Command(losetup, "--detach", dev).Run()
	for _, direct := range []bool{false, true} {
		f, err := storage.CreateFile(dev, storage.OpenOptions{Direct: direct})
		if err != nil {
			t.Fatal(err)
		}
		testDevice(t, f, size)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func testDevice(t *testing.T, f *storage.OSFile, size int64) {
	t.Helper()
	if got, err := f.Size(); got != size || err != nil {
		t.Fatalf("Size = %d, %v; want %d", got, err, size)
	}
	if !f.Stat().Device {
		t.Errorf("Stat does not say device")
	}
	p := bytes.Repeat([]byte{0xA5}, 1<<20+100)
	if _, err := f.WriteAt(p, 777); err != nil {
		t.Fatal(err)
	}
	if err := f.PunchHole(4096, 65536); err != nil && !errors.Is(err, storage.ErrNotSupported) {
		t.Errorf("PunchHole: %v", err)
	} else if err == nil {
		clear(p[4096-777:][:65536])
	}
	if err := f.ZeroRange(512<<10, 65536); err != nil {
		t.Errorf("ZeroRange: %v", err)
	}
	clear(p[512<<10-777:][:65536])
	got := make([]byte, len(p))
	if _, err := f.ReadAt(got, 777); err != nil || !bytes.Equal(got, p) {
		t.Errorf("content differs, %v", err)
	}
	if n, err := f.WriteAt(p, size-1000); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("writing past the end = %d, %v; want ENOSPC", n, err)
	}
	if n, err := f.ReadAt(got, size-1000); n != 1000 || err != io.EOF {
		t.Errorf("reading past the end = %d, %v", n, err)
	}
	if err := f.Truncate(size); err != nil {
		t.Errorf("Truncate to its own size: %v", err)
	}
	if err := f.Truncate(size + 512); !errors.Is(err, storage.ErrNotSupported) {
		t.Errorf("Truncate: %v", err)
	}
	if err := f.Preallocate(0, size); err != nil {
		t.Errorf("Preallocate: %v", err)
	}
	for name, grow := range map[string]func(off, n int64) error{"Preallocate": f.Preallocate, "ZeroRange": f.ZeroRange} {
		if err := grow(size-4096, 8192); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s past the end: %v, want ENOSPC", name, err)
		}
	}
	if end, data, err := f.NextExtent(5); end != size || !data || err != nil {
		t.Errorf("NextExtent = %d, %v, %v", end, data, err)
	}
	if err := f.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
}
