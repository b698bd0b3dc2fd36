package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

var ctx = context.Background()

// create makes an image at path with the library.
func create(t testing.TB, path string, o qcow2.CreateOptions) {
	t.Helper()
	f, err := storage.CreateFile(path, storage.OpenOptions{})
	harness.OK(t, err)
	harness.OK(t, qcow2.Create(ctx, f, o))
	harness.OK(t, f.Close())
}

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
	f, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	harness.OK(t, err)
	defer f.Close()
	rep, err := qcow2.CheckFile(ctx, f, qcow2.CheckOptions{})
	harness.OK(t, err)
	if !rep.Clean() {
		t.Errorf("check: %d corruptions, %d leaks, %.300v", rep.Corruptions, rep.Leaks, rep.Findings)
	}
	harness.Must(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
}

// infoOf is what qemu-img says of an image.
func infoOf(t testing.TB, path string) map[string]any {
	t.Helper()
	var o map[string]any
	harness.OK(t, json.Unmarshal(harness.Must(t, "qemu-img", "info", "-f", "qcow2", "--output=json", path), &o))
	return o
}

func patch(t testing.TB, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	harness.OK(t, err)
	_, err = f.WriteAt(p, off)
	harness.OK(t, errors.Join(err, f.Close()))
}

func be(n int, v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v)[8-n:] }

// TestHeaderBytes: a new image begins with the very bytes with which stock QEMU begins one.
func TestHeaderBytes(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, options := range []string{
		"", "compat=0.10", "cluster_size=4096", "cluster_size=2M", "cluster_size=512", "refcount_bits=1", "refcount_bits=64",
		"lazy_refcounts=on", "extended_l2=on", "compression_type=zstd", "preallocation=metadata",
	} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			var heads [2][]byte
			for i, program := range []string{"qemu-img", harness.Binary(t)} {
				path := filepath.Join(dir, fmt.Sprint(i))
				args := []string{"create", "-q", "-f", "qcow2"}
				if options != "" {
					args = append(args, "-o", options)
				}
				harness.Must(t, program, append(args, path, "64M")...)
				data, err := os.ReadFile(path)
				harness.OK(t, err)
				heads[i] = data[:512]
			}
			// Where the tables lie is each writer's choice.
			for _, at := range []int{40, 48, 64} {
				for i := range heads {
					clear(heads[i][at : at+8])
				}
			}
			harness.OK(t, harness.Same(heads[1], heads[0], 0))
		})
	}
}

func TestSizesAreWholeSectors(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", path, "1000")
	if size := infoOf(t, path)["virtual-size"]; size != 1024.0 {
		t.Errorf("a disk of 1000 bytes is %v bytes long", size)
	}
}

// TestTooBig: a disk that no L1 table can map is refused as stock refuses it, with nothing left behind that looks like one.
func TestTooBig(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, size := range []string{"3P", "9223372036854775296", "8E"} {
		path := filepath.Join(t.TempDir(), "image.qcow2")
		ours, stock := harness.Drover(t, "create", "-q", "-f", "qcow2", path, size), harness.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path+".stock", size)
		if ours.Code != stock.Code || ours.Code != 1 {
			t.Errorf("a disk of %s:\n%s\n%s", size, ours, stock)
		}
	}
	err := qcow2.Create(ctx, storage.NewMemFile("big"), qcow2.CreateOptions{Size: 3 << 50})
	if !errors.Is(err, qcow2.ErrTooBig) {
		t.Errorf("3 PiB with clusters of 64 KiB: %v", err)
	}
	if err := qcow2.Create(ctx, storage.NewMemFile("big"), qcow2.CreateOptions{Size: 3 << 50, ClusterSize: 128 << 10}); err != nil {
		t.Errorf("3 PiB with clusters of 128 KiB: %v", err)
	}
}

// TestEveryClusterSize writes compressed and plain clusters of every size, and has stock read them; and the reverse.
func TestEveryClusterSize(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for bits := 9; bits <= 21; bits++ {
		cs := int64(1) << bits
		t.Run(fmt.Sprint(cs), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path, raw := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "raw")
			model := make([]byte, 9*cs)
			for i := range model {
				model[i] = byte(i>>7) ^ byte(i>>(bits-1))
			}
			clear(model[4*cs : 6*cs])
			create(t, path, qcow2.CreateOptions{Size: 9 * cs, ClusterSize: cs})
			im := open(t, path, qcow2.Options{})
			for i := range int64(4) {
				harness.OK(t, im.WriteCompressed(ctx, model[i*cs:(i+1)*cs], i*cs))
			}
			harness.OK(t, im.WriteAt(ctx, model[6*cs:], 6*cs, 0))
			harness.Fill(model[cs-100:cs+100], 1)
			harness.OK(t, im.WriteAt(ctx, model[cs-100:cs+100], cs-100, 0))
			harness.OK(t, im.Close())
			sound(t, path)
			harness.OK(t, os.WriteFile(raw, model, 0o600))
			harness.Must(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, raw)

			back := filepath.Join(dir, "back.qcow2")
			harness.Must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", fmt.Sprint("cluster_size=", cs), raw, back)
			im = open(t, back, qcow2.Options{})
			got := make([]byte, len(model))
			harness.OK(t, im.ReadAt(ctx, got, 0))
			harness.OK(t, harness.Same(got, model, 0))
			harness.Fill(model[3*cs-7:3*cs+9], 2)
			harness.OK(t, im.WriteAt(ctx, model[3*cs-7:3*cs+9], 3*cs-7, 0))
			harness.OK(t, im.Close())
			sound(t, back)
			harness.OK(t, os.WriteFile(raw, model, 0o600))
			harness.Must(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", back, raw)
		})
	}
}

// TestSmallestCache works with the smallest caches that there can be.
func TestSmallestCache(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	path, raw := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "raw")
	const size = 8 << 20
	create(t, path, qcow2.CreateOptions{Size: size, ClusterSize: 512})
	dev, err := block.Open(ctx, path, block.OpenOptions{Format: "qcow2", Options: map[string]string{"l2-cache-size": "1"}})
	harness.OK(t, err)
	model := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 600 {
		off := rng.Int64N(size - 3000)
		n := 1 + rng.Int64N(3000)
		harness.Fill(model[off:off+n], uint64(i))
		harness.OK(t, dev.WriteAt(ctx, model[off:off+n], off, 0))
	}
	got := make([]byte, size)
	harness.OK(t, dev.ReadAt(ctx, got, 0))
	harness.OK(t, harness.Same(got, model, 0))
	harness.OK(t, dev.Close())
	sound(t, path)
	harness.OK(t, os.WriteFile(raw, model, 0o600))
	harness.Must(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, raw)
}

// TestRefcountWidths takes images of stock QEMU with every width, writes them and takes a snapshot, which a width of one bit
// cannot count.
func TestRefcountWidths(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, bits := range []int{1, 2, 4, 8, 16, 32, 64} {
		t.Run(fmt.Sprint(bits), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprint("cluster_size=4k,refcount_bits=", bits), path, "4M")
			harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 300k", path)
			im := open(t, path, qcow2.Options{})
			p := bytes.Repeat([]byte{2}, 100<<10)
			harness.OK(t, im.WriteAt(ctx, p, 1<<20, 0))
			_, err := im.CreateSnapshot(ctx, "one")
			if (err != nil) != (bits == 1) {
				t.Errorf("a snapshot with refcounts of %d bits: %v", bits, err)
			}
			harness.OK(t, im.WriteAt(ctx, p, 50<<10, 0))
			harness.OK(t, im.Close())
			sound(t, path)
			harness.Must(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 1 0 50k", "-c", "read -q -P 2 50k 100k", "-c", "read -q -P 2 1M 100k", path)
			if bits > 1 {
				harness.Must(t, "qemu-img", "snapshot", "-a", "one", path)
				harness.Must(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 1 0 300k", path)
			}
		})
	}
}

// TestUnknownThingsSurvive: header fields, extensions and compatible features that nobody knows are there after every
// operation that writes the header.
func TestUnknownThingsSurvive(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", path, "4M")
	data, err := os.ReadFile(path)
	harness.OK(t, err)
	// 16 more bytes of header, an unknown extension behind it, then those that were there.
	rest := bytes.Clone(data[112:1024])
	field, blob := []byte("sixteen bytes!!!"), []byte("a blob of 21 bytes...")
	head := append(bytes.Clone(data[:112]), field...)
	copy(head[80:], be(8, 1<<40))
	copy(head[100:], be(4, 128))
	head = append(head, be(4, 0x12345678)...)
	head = append(head, be(4, uint64(len(blob)))...)
	head = append(head, blob...)
	head = append(head, make([]byte, 3)...)
	patch(t, path, 0, append(head, rest...))

	harness.OK(t, os.WriteFile(filepath.Join(filepath.Dir(path), "base.raw"), make([]byte, 1<<20), 0o600))
	yes := true
	size := int64(8 << 20)
	for _, op := range []struct {
		name string
		do   func(im *qcow2.Image) error
	}{
		{"write", func(im *qcow2.Image) error { return im.WriteAt(ctx, []byte("x"), 5, 0) }},
		{"snapshot", func(im *qcow2.Image) error { _, err := im.CreateSnapshot(ctx, "one"); return err }},
		{"resize", func(im *qcow2.Image) error { return im.Resize(ctx, size, qcow2.ResizeOptions{}) }},
		{"amend", func(im *qcow2.Image) error { return im.Amend(ctx, qcow2.AmendOptions{LazyRefcounts: &yes}) }},
		{"bitmap", func(im *qcow2.Image) error { return im.AddBitmap(ctx, "b", qcow2.BitmapOptions{}) }},
		{"bitmap removed", func(im *qcow2.Image) error { return im.RemoveBitmap(ctx, "b") }},
		{"backing file", func(im *qcow2.Image) error { return im.ChangeBacking(ctx, "base.raw", "raw") }},
		{"no backing file", func(im *qcow2.Image) error { return im.ChangeBacking(ctx, "", "") }},
		{"snapshot deleted", func(im *qcow2.Image) error { return im.DeleteSnapshot(ctx, "one") }},
		{"refcount width", func(im *qcow2.Image) error { return im.Amend(ctx, qcow2.AmendOptions{RefcountBits: 32}) }},
	} {
		im := open(t, path, qcow2.Options{})
		if err := op.do(im); err != nil {
			t.Fatalf("%s: %v", op.name, err)
		}
		harness.OK(t, im.Close())
		data, err := os.ReadFile(path)
		harness.OK(t, err)
		if binary.BigEndian.Uint64(data[80:])>>40&1 == 0 {
			t.Errorf("%s: the unknown compatible feature is gone", op.name)
		}
		if binary.BigEndian.Uint32(data[100:]) != 128 || !bytes.Equal(data[112:128], field) {
			t.Errorf("%s: the unknown header fields are gone", op.name)
		}
		ext := append(be(4, 0x12345678), be(4, uint64(len(blob)))...)
		if !bytes.Contains(data[:4096], append(ext, blob...)) {
			t.Errorf("%s: the unknown extension is gone", op.name)
		}
		sound(t, path)
	}
	// Stock reads what was written, and keeps it as well.
	harness.Must(t, "qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=off", path)
	sound(t, path)
}

// TestUnknownAutoclear: an autoclear bit of a feature that drover does not know is gone before the first write is there.
func TestUnknownAutoclear(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
	patch(t, path, 88, be(8, 1<<50))
	autoclear := func() uint64 {
		data, err := os.ReadFile(path)
		harness.OK(t, err)
		return binary.BigEndian.Uint64(data[88:])
	}
	harness.OK(t, open(t, path, qcow2.Options{ReadOnly: true}).Close())
	if autoclear() != 1<<50 {
		t.Error("reading has changed the autoclear features")
	}
	im := open(t, path, qcow2.Options{})
	if autoclear() != 0 {
		t.Error("an unknown autoclear feature is there while the image is written")
	}
	harness.OK(t, im.Close())
	sound(t, path)
}

// TestLongSnapshotName: names may be as long as the format allows, though listings cut them.
func TestLongSnapshotName(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	create(t, path, qcow2.CreateOptions{Size: 1 << 20})
	im := open(t, path, qcow2.Options{})
	name := strings.Repeat("long ", 13000)[:60000]
	harness.OK(t, im.WriteAt(ctx, []byte("kept"), 0, 0))
	_, err := im.CreateSnapshot(ctx, name)
	harness.OK(t, err)
	_, err = im.CreateSnapshot(ctx, "short")
	harness.OK(t, err)
	harness.OK(t, im.Close())
	sound(t, path)
	im = open(t, path, qcow2.Options{})
	list, err := im.Snapshots()
	harness.OK(t, err)
	if len(list) != 2 || list[0].Name != name {
		t.Errorf("%d snapshots; the long name has %d bytes", len(list), len(list[0].Name))
	}
	harness.OK(t, im.Close())
	harness.Must(t, "qemu-img", "snapshot", "-a", "1", path)
	harness.Must(t, "qemu-img", "snapshot", "-d", "short", path)
	im = open(t, path, qcow2.Options{})
	harness.OK(t, im.ApplySnapshot(ctx, name))
	harness.OK(t, im.Close())
	sound(t, path)
}

// TestVMStateIsKept: a snapshot with machine state, which lies behind the disk, keeps it through drover's work.
func TestVMStateIsKept(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	// QEMU saves machine state as guest data behind the disk. Here the disk is longer at first, and cut off afterwards in the
	// header alone, so that what was written there is where machine state is: from the first L1 entry behind the disk.
	const disk, state = 2 << 20, 6 << 20
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, fmt.Sprint(state))
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 1M", "-c", fmt.Sprintf("write -q -P 9 %d 100k", disk), path)
	patch(t, path, 24, be(8, disk))
	harness.Must(t, "qemu-img", "snapshot", "-c", "vm", path)
	data, err := os.ReadFile(path)
	harness.OK(t, err)
	table := int64(binary.BigEndian.Uint64(data[64:]))
	patch(t, path, table+24, be(8, 12345678)) // how long the machine had run
	patch(t, path, table+32, be(4, 100<<10))
	patch(t, path, table+40, be(8, 100<<10))

	im := open(t, path, qcow2.Options{})
	_, err = im.CreateSnapshot(ctx, "second")
	harness.OK(t, err)
	harness.OK(t, im.WriteAt(ctx, bytes.Repeat([]byte{2}, disk), 0, 0))
	harness.OK(t, im.ApplySnapshot(ctx, "vm"))
	harness.OK(t, im.DeleteSnapshot(ctx, "second"))
	harness.OK(t, im.RenameSnapshot(ctx, "vm", "machine"))
	list, err := im.Snapshots()
	harness.OK(t, err)
	if len(list) != 1 || list[0].VMStateSize != 100<<10 || list[0].VMClock.Nanoseconds() != 12345678 {
		t.Errorf("snapshots: %+v", list)
	}
	harness.OK(t, im.Close())
	sound(t, path)

	// What is behind the disk in the snapshot's tables is what was there: the active tables have it back after an apply.
	harness.Must(t, "qemu-img", "snapshot", "-a", "machine", path)
	patch(t, path, 24, be(8, state))
	harness.Must(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 1 0 1M", "-c", fmt.Sprintf("read -q -P 9 %d 100k", disk), path)
}

// TestSectorIntoBackedCluster: 512 bytes written into a cluster of the backing file leave the bytes around them.
func TestSectorIntoBackedCluster(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	base, path, raw := filepath.Join(dir, "base.raw"), filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "raw")
	model := make([]byte, 1<<20)
	harness.Fill(model, 3)
	harness.OK(t, os.WriteFile(base, model, 0o600))
	harness.MustDrover(t, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path)
	dev, err := block.Open(ctx, path, block.OpenOptions{Format: "qcow2", Policy: block.BelowImageFolder()})
	harness.OK(t, err)
	for i, off := range []int64{512, 65536 - 512, 3*65536 + 77, 1<<20 - 512} {
		harness.Fill(model[off:off+512], uint64(i+10))
		harness.OK(t, dev.WriteAt(ctx, model[off:off+512], off, 0))
	}
	harness.OK(t, dev.Close())
	sound(t, path)
	harness.OK(t, os.WriteFile(raw, model, 0o600))
	harness.Must(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, raw)
}
