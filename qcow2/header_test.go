package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// strangeHeader makes an image with things in its header that no program knows: bytes behind the last field, an extension
// and a compatible feature. Its header is laid out by hand: 128 bytes, then the extensions as they were.
func strangeHeader(t testing.TB, o qcow2.CreateOptions) *storage.MemFile {
	t.Helper()
	f := storage.NewMemFile("strange.qcow2")
	if err := qcow2.Create(context.Background(), f, o); err != nil {
		t.Fatal(err)
	}
	var head [2048]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		t.Fatal(err)
	}
	if binary.BigEndian.Uint32(head[4:]) < 3 {
		t.Fatal("version 2 has no room for strange things")
	}
	rest := append([]byte(nil), head[112:1536]...)
	copy(head[112:128], "unknown fields!!")
	binary.BigEndian.PutUint32(head[100:], 128)
	binary.BigEndian.PutUint64(head[80:], binary.BigEndian.Uint64(head[80:])|1<<47)
	copy(head[128:], "\x12\x34\x56\x78\x00\x00\x00\x0bunknown ext\xff\xff\xff\xff\xff")
	copy(head[128+24:], rest)
	if off := binary.BigEndian.Uint64(head[8:]); off != 0 {
		binary.BigEndian.PutUint64(head[8:], off+16+24)
	}
	if _, err := f.WriteAt(head[:min(2048, int(o.ClusterSize))], 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// checkStrange checks that what strangeHeader made is still there.
func checkStrange(t testing.TB, f *storage.MemFile) {
	t.Helper()
	var head [2048]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		t.Fatal(err)
	}
	if n := binary.BigEndian.Uint32(head[100:]); n != 128 || string(head[112:128]) != "unknown fields!!" {
		t.Errorf("header of %d bytes, unknown fields %q", n, head[112:128])
	}
	if binary.BigEndian.Uint64(head[80:])>>47&1 == 0 {
		t.Error("the unknown compatible feature is gone")
	}
	if !bytes.Contains(head[:], []byte("\x12\x34\x56\x78\x00\x00\x00\x0bunknown ext")) {
		t.Error("the unknown extension is gone")
	}
}

func TestChangeBacking(t *testing.T) {
	ctx := context.Background()
	for _, cs := range []int64{4096, 65536} {
		f := strangeHeader(t, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs, BackingFile: "first", BackingFormat: "raw"})
		im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := im.WriteAt(ctx, []byte("data"), 77777, 0); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ name, format string }{
			{"second", "qcow2"}, {strings.Repeat("long", 250), "qcow2"}, {strings.Repeat("gone", 255), "raw"}, {"x", "raw"}, {"", ""}, {"again", "raw"},
		} {
			if err := im.ChangeBacking(ctx, c.name, c.format); err != nil {
				t.Fatal(err)
			}
			info, err := qcow2.ReadInfo(ctx, f)
			if err != nil {
				t.Fatal(err)
			}
			if info.BackingFile != c.name || info.BackingFormat != c.format || info.HasBackingFormat != (c.format != "") {
				t.Errorf("backing file %q, format %q", info.BackingFile, info.BackingFormat)
			}
			checkStrange(t, f)
		}
		for _, c := range []struct{ name, format string }{
			{strings.Repeat("n", 1024), "raw"}, {"n", strings.Repeat("f", 16)}, {"n", ""},
		} {
			if err := im.ChangeBacking(ctx, c.name, c.format); !errors.Is(err, qcow2.ErrInvalidOption) {
				t.Errorf("name of %d bytes, format %q: %v", len(c.name), c.format, err)
			}
		}
		got := make([]byte, 4)
		if err := im.ReadAt(ctx, got, 77777); err != nil || string(got) != "data" {
			t.Errorf("read %q, %v", got, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkClean(t, f)
	}
}

func TestChangeBackingNoRoom(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("small.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 512, BackingFile: "kept", BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.ChangeBacking(ctx, strings.Repeat("n", 600), "raw"); !errors.Is(err, qcow2.ErrHeaderSpace) {
		t.Errorf("got %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := qcow2.ReadInfo(ctx, f); err != nil || info.BackingFile != "kept" {
		t.Errorf("backing file %q, %v", info.BackingFile, err)
	}
	checkClean(t, f)
}

// TestHalfwayHeader: a header whose replacement was cut short is used and replaced like any other.
func TestHalfwayHeader(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("half.qcow2")
	first, second := strings.Repeat("first/", 100), strings.Repeat("second", 100)
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, BackingFile: first, BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	broken := storage.NewFaultFile(keepOpen{f})
	im, err := qcow2.Open(ctx, broken, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	// The third write would put the new extensions in place of the old.
	broken.Inject(storage.Fault{Kind: storage.OpWrite, Skip: 2, Times: -1})
	if err := im.ChangeBacking(ctx, second, "qcow2"); err == nil {
		t.Fatal("the fault did not show")
	}
	info, err := qcow2.ReadInfo(ctx, f)
	if err != nil || info.BackingFile != second || info.BackingFormat != "qcow2" {
		t.Fatalf("backing file %q, %v", info.BackingFile, err)
	}
	broken.Clear()
	if err := im.ChangeBacking(ctx, "third", "raw"); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	var head [1024]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(head[:], []byte("lazy refcounts")) || bytes.Contains(head[:], []byte("second")) {
		t.Error("the header was not put in order")
	}
	checkClean(t, f)
}

// checkClean has our check and stock's look at an image whose backing file need not exist.
func checkClean(t testing.TB, f *storage.MemFile) {
	t.Helper()
	checkFile(t, f)
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return
	}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if err := storage.ReadFull(f, b, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := qcow2.ReadInfo(context.Background(), f)
	if err != nil {
		t.Fatal(err)
	}
	args, opts := []string{"check", "--image-opts"}, "driver=qcow2,backing=,file.driver=file,file.filename=image.qcow2"
	if info.Encryption != nil {
		args, opts = append(args, "--object", "secret,id=s,data="+secret), opts+",encrypt.key-secret=s"
	}
	cmd := exec.Command("qemu-img", append(args, opts)...)
	cmd.Dir = filepath.Dir(path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}
