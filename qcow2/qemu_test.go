package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// qemu runs one of QEMU's tools in dir; the test is skipped where there is none.
func qemu(t testing.TB, dir, tool string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing", tool)
		}
		t.Skipf("%s is not installed", tool)
	}
	cmd := exec.Command(tool, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// loadFile copies a host file into memory.
func loadFile(t testing.TB, path string) *storage.MemFile {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := storage.NewMemFile(path)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

func saveFile(t testing.TB, f storage.File, path string) {
	t.Helper()
	size, _ := f.Size()
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// content makes n bytes that compress, with zero runs and noise in them.
func content(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; {
		k := min(n-i, 512*(1+r.IntN(64)))
		switch r.IntN(3) {
		case 0:
			for j := range k {
				b[i+j] = byte(r.Uint32())
			}
		case 1:
			copy(b[i:i+k], bytes.Repeat([]byte(fmt.Sprintf("line %d of text. ", r.IntN(9))), k/16+1))
		}
		i += k
	}
	return b
}

// TestWritesImagesOfQEMU opens images that qemu-img made (with compressed clusters, internal snapshots, every cluster
// size and refcount width), works on them at random, and lets both checkers and QEMU's own reader judge the result.
func TestWritesImagesOfQEMU(t *testing.T) {
	for _, c := range []struct {
		cs   int
		opts string
		zip  bool
		snap bool
	}{
		{512, "", true, false}, {512, "", false, true}, {4096, "compression_type=zstd", true, false}, {4096, "refcount_bits=8", true, true},
		{65536, "", true, true}, {65536, "compression_type=zstd,refcount_bits=64", true, true}, {65536, "compat=0.10", true, true},
		{65536, "refcount_bits=8", false, true}, {2 << 20, "", true, true}, {16384, "refcount_bits=4,lazy_refcounts=on", false, true},
	} {
		t.Run(fmt.Sprintf("cluster=%d,%s,compressed=%v,snapshot=%v", c.cs, c.opts, c.zip, c.snap), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			r := rand.New(rand.NewPCG(uint64(c.cs), uint64(len(c.opts))))
			size := max(1<<20, 5*c.cs) + 512*3
			model := content(r, size)
			if err := os.WriteFile(filepath.Join(dir, "in.raw"), model, 0o600); err != nil {
				t.Fatal(err)
			}
			args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", strings.Trim(fmt.Sprintf("cluster_size=%d,%s", c.cs, c.opts), ",")}
			if c.zip {
				args = append(args, "-c")
			}
			qemu(t, dir, "qemu-img", append(args, "in.raw", "a.qcow2")...)
			var snaps []modelSnapshot
			if c.snap {
				snaps = append(snaps, modelSnapshot{"one", bytes.Clone(model)})
				qemu(t, dir, "qemu-img", "snapshot", "-c", "one", "a.qcow2")
				qemu(t, dir, "qemu-io", "-c", "write -P 17 4k 100k", "a.qcow2")
				copy(model[4096:], bytes.Repeat([]byte{17}, 100<<10))
				qemu(t, dir, "qemu-img", "snapshot", "-c", "two", "a.qcow2")
				snaps = append(snaps, modelSnapshot{"two", bytes.Clone(model)})
			}
			h := &harness{t: t, r: r, v: variant{cache: 1, create: qcow2.CreateOptions{ClusterSize: int64(c.cs)}},
				file: loadFile(t, filepath.Join(dir, "a.qcow2")), model: bytes.Clone(model), snaps: snaps}
			h.open()
			for range 150 {
				h.step()
			}
			h.finish()
			if !c.snap {
				return
			}
			saveFile(t, h.file, filepath.Join(dir, "a.qcow2"))
			for _, s := range h.snaps {
				if err := os.WriteFile(filepath.Join(dir, "want.raw"), s.disk, 0o600); err != nil {
					t.Fatal(err)
				}
				qemu(t, dir, "qemu-img", "snapshot", "-a", s.name, "a.qcow2")
				qemu(t, dir, "qemu-img", "compare", "a.qcow2", "want.raw")
			}
			for _, s := range h.snaps {
				qemu(t, dir, "qemu-img", "snapshot", "-d", s.name, "a.qcow2")
			}
			qemu(t, dir, "qemu-img", "check", "a.qcow2")
		})
	}
}

// TestReadsExtendedL2 reads an image with subclusters that QEMU wrote in small pieces over a backing file.
func TestReadsExtendedL2(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(3, 4))
	base := content(r, 2<<20)
	if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k", "-b", "base.raw", "-F", "raw", "a.qcow2", "3M")
	model := make([]byte, 3<<20)
	copy(model, base)
	var cmds []string
	for i := range 60 {
		off, n := 512*r.IntN(6000), 512*(1+r.IntN(20))
		switch i % 3 {
		case 0:
			cmds = append(cmds, "-c", fmt.Sprintf("write -z %d %d", off, n))
			clear(model[off : off+n])
		default:
			cmds = append(cmds, "-c", fmt.Sprintf("write -P %d %d %d", i+1, off, n))
			copy(model[off:off+n], bytes.Repeat([]byte{byte(i + 1)}, n))
		}
	}
	qemu(t, dir, "qemu-io", append(cmds, "a.qcow2")...)
	f := loadFile(t, filepath.Join(dir, "a.qcow2"))
	im, err := qcow2.Open(context.Background(), keepOpen{f}, qcow2.Options{ReadOnly: true, Backing: blocktest.NewBytes(base)})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	got := make([]byte, len(model))
	if err := im.ReadAt(context.Background(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Fatal("content differs")
	}
	for range 300 {
		off := r.IntN(len(model))
		p := make([]byte, r.IntN(len(model)-off)%200000)
		if err := im.ReadAt(context.Background(), p, int64(off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, model[off:off+len(p)]) {
			t.Fatalf("read of %d bytes at %d differs", len(p), off)
		}
	}
	h := &harness{t: t, r: r, im: im, model: model, file: f}
	for range 50 {
		h.v.create.ClusterSize = 65536
		off, n := h.span()
		h.checkExtents(off, n)
	}
}

// TestReadsDataFile reads an image whose clusters lie in another file.
func TestReadsDataFile(t *testing.T) {
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", "data_file=d.raw", "a.qcow2", "4M")
	qemu(t, dir, "qemu-io", "-c", "write -P 5 0 300k", "-c", "write -z 64k 64k", "-c", "write -P 9 3M 7k", "a.qcow2")
	model := make([]byte, 4<<20)
	copy(model, bytes.Repeat([]byte{5}, 300<<10))
	clear(model[64<<10 : 128<<10])
	copy(model[3<<20:], bytes.Repeat([]byte{9}, 7<<10))
	im, err := qcow2.Open(context.Background(), loadFile(t, filepath.Join(dir, "a.qcow2")),
		qcow2.Options{ReadOnly: true, DataFile: loadFile(t, filepath.Join(dir, "d.raw"))})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	got := make([]byte, len(model))
	if err := im.ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, model) {
		t.Fatalf("content differs (%v)", err)
	}
}
