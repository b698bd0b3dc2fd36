package weakness

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

var ctx = context.Background()

func open(t testing.TB, path string, o qcow2.Options) *qcow2.Image {
	t.Helper()
	f, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: o.ReadOnly})
	harness.OK(t, err)
	im, err := qcow2.Open(ctx, f, o)
	harness.OK(t, err)
	return im
}

// sound has both checkers look at an image.
func sound(t testing.TB, path string) {
	t.Helper()
	harness.MustDrover(t, "check", "-q", "-f", "qcow2", path)
	harness.Must(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
}

func patch(t testing.TB, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	harness.OK(t, err)
	_, err = f.WriteAt(p, off)
	harness.OK(t, errors.Join(err, f.Close()))
}

func word(t testing.TB, path string, off int64) uint64 {
	t.Helper()
	f, err := os.Open(path)
	harness.OK(t, err)
	defer f.Close()
	var p [8]byte
	_, err = f.ReadAt(p[:], off)
	harness.OK(t, err)
	return binary.BigEndian.Uint64(p[:])
}

// TestOverlapCheckCost (A4): a small overwrite costs the same in a disk of 2 PiB as in one of 1 GiB. Stock looks at the
// whole L1 table before each write.
func TestOverlapCheckCost(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	const writes = 60
	took := make(map[string]time.Duration)
	for _, size := range []string{"1G", "2P"} {
		path := filepath.Join(dir, size)
		harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", path, size)
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", path)
		stock := func(n int) time.Duration {
			args := []string{"-f", "qcow2"}
			for range n {
				args = append(args, "-c", "write -q 4k 4k")
			}
			began := time.Now()
			harness.Must(t, "qemu-io", append(args, path)...)
			return time.Since(began)
		}
		took["stock "+size] = max(stock(1+writes)-stock(1), 0) / writes

		im := open(t, path, qcow2.Options{})
		p := make([]byte, 4096)
		harness.OK(t, im.WriteAt(ctx, p, 4096, 0))
		best := time.Hour
		for range 20 { // the best of many: the machine does other work too
			began := time.Now()
			for range writes {
				harness.OK(t, im.WriteAt(ctx, p, 4096, 0))
			}
			best = min(best, time.Since(began)/writes)
		}
		took["drover "+size] = best
		harness.OK(t, im.Close())
	}
	for name, d := range took {
		t.Logf("%s: %v a write", name, d)
	}
	if took["drover 2P"] > 10*took["drover 1G"]+100*time.Microsecond {
		t.Errorf("an overwrite costs %v in 2 PiB and %v in 1 GiB", took["drover 2P"], took["drover 1G"])
	}
	sound(t, filepath.Join(dir, "1G"))
}

// counted counts the bytes that are read.
type counted struct {
	storage.File
	read atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.read.Add(int64(len(p)))
	return c.File.ReadAt(p, off)
}

// TestSmallReadsOfCompressed (A5): reading a compressed image in small pieces decompresses every cluster once, not sixteen
// times.
func TestSmallReadsOfCompressed(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "image.qcow2")
	data := make([]byte, 8<<20)
	for i := 0; i < len(data); i += 32 {
		harness.Fill(data[i:i+8], uint64(i))
	}
	harness.OK(t, os.WriteFile(raw, data, 0o600))
	harness.Must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
	fi, err := os.Stat(path)
	harness.OK(t, err)
	stock := func(step int) time.Duration {
		args := []string{"-r", "-f", "qcow2"}
		for off := 0; off < len(data); off += step {
			args = append(args, "-c", fmt.Sprintf("read -q %d %d", off, step))
		}
		began := time.Now()
		harness.Must(t, "qemu-io", append(args, path)...)
		return time.Since(began)
	}
	t.Logf("stock: %v by 4 KiB, %v by 64 KiB", stock(4<<10), stock(64<<10))

	f, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	harness.OK(t, err)
	c := &counted{File: f}
	im, err := qcow2.Open(ctx, c, qcow2.Options{ReadOnly: true})
	harness.OK(t, err)
	got := make([]byte, 4096)
	for off := 0; off < len(data); off += len(got) {
		harness.OK(t, im.ReadAt(ctx, got, int64(off)))
		harness.OK(t, harness.Same(got, data[off:off+len(got)], int64(off)))
	}
	harness.OK(t, im.Close())
	t.Logf("drover: read %d KiB of a file of %d KiB", c.read.Load()>>10, fi.Size()>>10)
	if c.read.Load() > 2*fi.Size() {
		t.Errorf("drover read %d bytes of a file of %d", c.read.Load(), fi.Size())
	}
}

// TestDiscardShrinksTheFile (A6): what is discarded at the end of the file makes it shorter.
func TestDiscardShrinksTheFile(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	size := func(path string) int64 {
		fi, err := os.Stat(path)
		harness.OK(t, err)
		return fi.Size()
	}
	stock, ours := filepath.Join(dir, "stock.qcow2"), filepath.Join(dir, "ours.qcow2")
	for _, path := range []string{stock, ours} {
		harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 16M", path)
	}
	harness.Must(t, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "discard -q 1M 15M", stock)
	t.Logf("stock: %d bytes long after the discard", size(stock))
	before := size(ours)
	im := open(t, ours, qcow2.Options{})
	harness.OK(t, im.Discard(ctx, 1<<20, 15<<20))
	harness.OK(t, im.Close())
	t.Logf("drover: %d bytes long before, %d after", before, size(ours))
	if size(ours) > 3<<20 {
		t.Errorf("the file is still %d bytes long", size(ours))
	}
	sound(t, ours)
	harness.Must(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 1 0 1M", "-c", "read -q -P 0 1M 15M", ours)
}

// TestSubclusterDiscard (A7): with extended L2 entries a discard takes effect by subclusters, not by whole clusters only.
func TestSubclusterDiscard(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	stock, ours := filepath.Join(dir, "stock.qcow2"), filepath.Join(dir, "ours.qcow2")
	for _, path := range []string{stock, ours} {
		harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "1M")
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 64k", path)
	}
	read := []string{"-r", "-f", "qcow2", "-c", "read -q -P 1 0 4k", "-c", "read -q -P 0 4k 8k", "-c", "read -q -P 1 12k 52k"}
	harness.Must(t, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "discard -q 4k 8k", stock)
	t.Logf("stock: %s", harness.Run(t, "qemu-io", append(read, stock)...))
	im := open(t, ours, qcow2.Options{})
	harness.OK(t, im.Discard(ctx, 4<<10, 8<<10))
	harness.OK(t, im.Close())
	if r := harness.Run(t, "qemu-io", append(read, ours)...); r.Code != 0 || len(r.Stdout) > 0 {
		t.Errorf("%s", r)
	}
	sound(t, ours)
}

// TestBitmapOutlivesACrash (A8): a crash of stock QEMU at any time makes every bitmap useless. drover's are saved while nobody
// writes, so that a crash afterwards loses nothing.
func TestBitmapOutlivesACrash(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	image, after := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "after.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
	harness.Must(t, "qemu-img", "bitmap", "--add", "-g", "65536", image, "b")
	flags := func(path string) string {
		var o struct {
			Format struct {
				Data struct {
					Bitmaps []struct{ Flags []string }
				}
			} `json:"format-specific"`
		}
		harness.OK(t, json.Unmarshal(harness.Must(t, "qemu-img", "info", "-U", "--output=json", path), &o))
		if len(o.Format.Data.Bitmaps) != 1 {
			t.Fatalf("%d bitmaps", len(o.Format.Data.Bitmaps))
		}
		return strings.Join(o.Format.Data.Bitmaps[0].Flags, " ")
	}
	stock := filepath.Join(dir, "stock.qcow2")
	harness.CopyFile(t, image, stock)
	harness.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "-c", "flush", "-c", "sigraise 9", stock)
	t.Logf("stock: after a write and a crash the bitmap is %q", flags(stock))

	im := open(t, image, qcow2.Options{})
	harness.OK(t, im.WriteAt(ctx, []byte("x"), 3<<20, 0))
	harness.OK(t, im.Flush(ctx))
	harness.OK(t, im.SaveBitmaps(ctx))
	harness.CopyFile(t, image, after) // what the disk holds if the power fails now
	harness.OK(t, im.Close())
	if got := flags(after); strings.Contains(got, "in-use") {
		t.Fatalf("after a crash the bitmap is %q", got)
	}
	im = open(t, after, qcow2.Options{})
	var dirty []int64
	at := int64(0)
	harness.OK(t, im.BitmapExtents(ctx, "b", 0, im.Size(), func(n int64, set bool) bool {
		if set {
			dirty = append(dirty, at, n)
		}
		at += n
		return true
	}))
	harness.OK(t, im.Close())
	if len(dirty) != 2 || dirty[0] != 3<<20 || dirty[1] != 65536 {
		t.Errorf("after a crash the bitmap says %d, want the granule at 3 MiB", dirty)
	}
	sound(t, after)
}

// TestReservedBitsAreReported (A10): bits that mean nothing today do not keep anyone from reading, but check reports them.
func TestReservedBitsAreReported(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 64k", path)
	l2 := int64(word(t, path, int64(word(t, path, 40))) & 0x00fffffffffffe00)
	entry := word(t, path, l2) | 1<<58
	patch(t, path, l2, binary.BigEndian.AppendUint64(nil, entry))
	t.Logf("stock: check ends with %d", harness.Run(t, "qemu-img", "check", "-q", path).Code)
	if r := harness.Drover(t, "check", "-f", "qcow2", path); r.Code != 2 || !bytes.Contains(r.Stderr, []byte("reserved bits")) {
		t.Errorf("%s", r)
	}
	im := open(t, path, qcow2.Options{ReadOnly: true})
	p := make([]byte, 65536)
	harness.OK(t, im.ReadAt(ctx, p, 0))
	harness.OK(t, im.Close())
	harness.OK(t, harness.Same(p, bytes.Repeat([]byte{5}, len(p)), 0))
}
