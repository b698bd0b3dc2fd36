package qcow1_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow1"
	"github.com/droverproject/drover/storage"
)

// tool runs one of QEMU's programs, or skips the test where it is missing.
func tool(t testing.TB, name string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed: nothing makes images of this format", name)
	}
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

const secret = "passphrase"

func options() block.OpenOptions {
	return block.OpenOptions{
		Format: "qcow", ReadOnly: true, AllowProbe: true, ProbeBacking: true, Policy: block.AllowAll(),
		Secret: func(string) ([]byte, error) { return []byte(secret), nil },
	}
}

// images makes images of every kind with QEMU's tools and returns their names, each with what its disk is.
func images(t testing.TB) map[string][]byte {
	t.Helper()
	t.Chdir(t.TempDir())
	const size = 3 << 20
	want := make([]byte, size)
	var writes []string
	for i, r := range [][2]int{{0, 100 << 10}, {1<<20 - 512, 65536}, {2<<20 + 1024, 512}, {size - 4096, 4096}} {
		copy(want[r[0]:], bytes.Repeat([]byte{byte(i + 1)}, r[1]))
		writes = append(writes, "-c", "write -P "+string(rune('1'+i))+" "+itoa(r[0])+" "+itoa(r[1]))
	}
	disks := make(map[string][]byte)
	put := func(name string, disk []byte) { disks[name] = disk }
	tool(t, "qemu-img", "create", "-q", "-f", "qcow", "plain", itoa(size))
	tool(t, "qemu-io", append(append([]string{}, writes...), "-f", "qcow", "plain")...)
	put("plain", want)
	if err := os.WriteFile("raw", want, 0o600); err != nil {
		t.Fatal(err)
	}
	// It makes the image, and then fails without a word.
	_ = exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow", "-c", "raw", "compressed").Run()
	put("compressed", want)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow", "-b", "plain", "-F", "qcow", "overlay", itoa(size+1<<20))
	tool(t, "qemu-io", "-c", "write -P 9 50k 3k", "-c", "write -P 8 3M 512", "-f", "qcow", "overlay")
	over := append(bytes.Clone(want), make([]byte, 1<<20)...)
	copy(over[50<<10:], bytes.Repeat([]byte{9}, 3<<10))
	copy(over[3<<20:], bytes.Repeat([]byte{8}, 512))
	put("overlay", over)
	object := []string{"--object", "secret,id=s,data=" + secret}
	tool(t, "qemu-img", append([]string{"create", "-q"}, append(object, "-f", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=s", "aes", itoa(size))...)...)
	tool(t, "qemu-io", append(append(object, writes...), "--image-opts", "driver=qcow,encrypt.key-secret=s,file.filename=aes")...)
	put("aes", want)
	return disks
}

func itoa(n int) string {
	var b []byte
	for ; n > 0; n /= 10 {
		b = append([]byte{byte('0' + n%10)}, b...)
	}
	if b == nil {
		return "0"
	}
	return string(b)
}

func TestImagesOfQEMU(t *testing.T) {
	for name, want := range images(t) {
		t.Run(name, func(t *testing.T) {
			o := options()
			if name == "aes" {
				o.Options = map[string]string{"encrypt.key-secret": "s"}
			}
			dev, err := block.Open(t.Context(), name, o)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, dev.Size())
			if err := dev.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the disk holds something else (%v)", err)
			}
			err = dev.Extents(t.Context(), 0, dev.Size(), func(e block.Extent) bool {
				if e.Zero && !bytes.Equal(want[e.Off:e.End()], make([]byte, e.Len)) {
					t.Errorf("%d to %d is said to be zeroes", e.Off, e.End())
				}
				if e.HasHost {
					host, err := os.ReadFile(e.File)
					if err != nil || int64(len(host)) < e.Host+e.Len || !bytes.Equal(host[e.Host:e.Host+e.Len], want[e.Off:e.End()]) {
						t.Errorf("%d to %d is not at %d of %s (%v)", e.Off, e.End(), e.Host, e.File, err)
					}
				}
				return true
			})
			if err != nil {
				t.Error(err)
			}
			if err := dev.Close(); err != nil {
				t.Error(err)
			}
			if dev, err = block.Open(t.Context(), name, o); err != nil {
				t.Fatal(err)
			}
			blocktest.RunReadOnly(t, dev, want)
			if err := dev.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := block.Open(t.Context(), "aes", options()); err == nil || !strings.Contains(err.Error(), "'encrypt.key-secret' is required") {
		t.Errorf("without a key: %v", err)
	}
	o := options()
	o.NoData = true
	dev, err := block.Open(t.Context(), "aes", o)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.ReadAt(t.Context(), make([]byte, 1), 0); err == nil {
		t.Error("read without a key")
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	o.ReadOnly = false
	if _, err := block.Open(t.Context(), "plain", o); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("opened for writing: %v", err)
	}
}

// headerBytes is the header of an image of 1 MiB with clusters of 4 KiB and an L1 table behind it.
func headerBytes() []byte {
	p := make([]byte, 48)
	copy(p, "QFI\xfb\x00\x00\x00\x01")
	binary.BigEndian.PutUint64(p[24:], 1<<20)
	p[32], p[33] = 12, 9
	binary.BigEndian.PutUint64(p[40:], 48)
	return p
}

func TestHeader(t *testing.T) {
	put := func(at int, v uint64, n int) func([]byte) {
		return func(p []byte) {
			for i := range n {
				p[at+i] = byte(v >> (8 * (n - 1 - i)))
			}
		}
	}
	for name, c := range map[string]struct {
		change func([]byte)
		want   string
	}{
		"good":               {func([]byte) {}, ""},
		"magic":              {put(0, 0, 4), "Image not in qcow format"},
		"version":            {put(4, 2, 4), "qcow (v1) does not support qcow version 2\nTry the 'qcow2' driver instead."},
		"no size":            {put(24, 1, 8), "Image size is too small"},
		"size":               {put(24, math.MaxUint64, 8), "Image too large"},
		"L1 table":           {put(24, math.MaxInt64/2, 8), "Image too large"},
		"small clusters":     {put(32, 8, 1), "Cluster size must be between 512 and 64k"},
		"large clusters":     {put(32, 17, 1), "Cluster size must be between 512 and 64k"},
		"small L2 tables":    {put(33, 5, 1), "L2 table size must be between 512 and 64k"},
		"large L2 tables":    {put(33, 14, 1), "L2 table size must be between 512 and 64k"},
		"encryption":         {put(36, 2, 4), "invalid encryption method in qcow header"},
		"L1 table elsewhere": {put(40, math.MaxUint64-7, 8), "outside any file"},
		"long backing name":  {func(p []byte) { put(8, 48, 8)(p); put(16, 1024, 4)(p) }, "Backing file name too long"},
		"backing elsewhere":  {func(p []byte) { put(8, math.MaxUint64, 8)(p); put(16, 1, 4)(p) }, "outside any file"},
	} {
		p := headerBytes()
		c.change(p)
		file := storage.NewMemFile("image")
		if err := storage.WriteFull(file, p, 0); err != nil {
			t.Fatal(err)
		}
		_, err := qcow1.ReadInfo(file)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if !qcow1.Probe(headerBytes()) || qcow1.Probe([]byte("QFI\xfb\x00\x00\x00\x02")) || qcow1.Probe([]byte("QFI")) {
		t.Error("Probe is wrong")
	}
}

// FuzzImage: whatever a file holds, it is opened and read, or refused, with little memory.
func FuzzImage(f *testing.F) {
	f.Add(append(headerBytes(), make([]byte, 4096)...))
	p := append(headerBytes(), make([]byte, 8192)...)
	binary.BigEndian.PutUint64(p[48:], 100)                  // a table that is not aligned
	binary.BigEndian.PutUint64(p[100:], 4096)                // a cluster
	binary.BigEndian.PutUint64(p[108:], 1<<63|100<<51|5000)  // a compressed one
	binary.BigEndian.PutUint64(p[116:], math.MaxUint64>>1-3) // one that is nowhere
	f.Add(p)
	huge := bytes.Clone(p)
	binary.BigEndian.PutUint64(huge[24:], 1<<48)
	f.Add(huge)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, image []byte) {
		if len(image) > 1<<16 {
			return
		}
		path := filepath.Join(dir, "image")
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		o := options()
		o.Policy, o.Options = block.DenyAll(), map[string]string{"encrypt.key-secret": "s"}
		dev, err := block.Open(t.Context(), path, o)
		if err != nil {
			return
		}
		end, runs, part := int64(0), 0, min(dev.Size(), 1<<26)
		err = dev.Extents(t.Context(), 0, part, func(e block.Extent) bool {
			if e.Off != end || e.Len <= 0 {
				t.Errorf("extent from %d to %d after %d", e.Off, e.End(), end)
			}
			end, runs = e.End(), runs+1
			return runs < 10000
		})
		if err == nil && runs < 10000 && end != part {
			t.Errorf("extents end at %d of %d", end, part)
		}
		buf := make([]byte, min(dev.Size(), 1<<17))
		_ = dev.ReadAt(t.Context(), buf, 0)                          // any error will do
		_ = dev.ReadAt(t.Context(), buf, dev.Size()-int64(len(buf))) // any error will do
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
}
