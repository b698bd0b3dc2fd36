package interop

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// TestSnapshotsStayIntact writes images that hold internal snapshots and goes back to them with QEMU.
func TestSnapshotsStayIntact(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, l := range []layout{
		{512, 16, "1.1", noBacking, ""},
		{4096, 4, "1.1", noBacking, ""},
		{65536, 16, "1.1", noBacking, ""},
		{65536, 16, "0.10", noBacking, ""},
		{65536, 64, "1.1", qcow2Shorter, ""},
		{2 << 20, 8, "1.1", noBacking, ""},
	} {
		t.Run(l.String(), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			image := filepath.Join(dir, "image.qcow2")
			flags, _ := l.base(t, dir)
			harness.Must(t, "qemu-img", l.createArgs(image, flags)...)
			qemuIO(t, image, harness.Ops(l.seed(), 40, l.shape()))
			first := harness.Model(harness.Raw(t, image, "qcow2"))
			harness.Must(t, "qemu-img", "snapshot", "-c", "first", image)
			qemuIO(t, image, harness.Ops(l.seed()+1, 20, l.shape()))
			second := harness.Model(harness.Raw(t, image, "qcow2"))
			harness.Must(t, "qemu-img", "snapshot", "-c", "second", image)

			active := bytes.Clone(second)
			serveOps(t, image, active, harness.Ops(l.seed()+2, 60, l.shape()))
			agree(t, image)

			harness.Must(t, "qemu-img", "snapshot", "-a", "first", image)
			mustHold(t, image, first)
			serveOps(t, image, first, harness.Ops(l.seed()+3, 40, l.shape()))
			harness.Must(t, "qemu-img", "snapshot", "-a", "second", image)
			mustHold(t, image, second)
			harness.Must(t, "qemu-img", "snapshot", "-d", "first", image)
			harness.Must(t, "qemu-img", "snapshot", "-d", "second", image)
			mustHold(t, image, second)
			harness.SameCheck(t, image)
		})
	}
}

// serveOps applies operations through drover serve to an image and its model, and has QEMU verify the outcome.
func serveOps(t *testing.T, image string, model harness.Model, ops []harness.Op) {
	t.Helper()
	srv := harness.Start(t, harness.Serve{Image: image})
	client := srv.Dial(t)
	for _, op := range ops {
		model.Apply(t, client, op)
	}
	harness.OK(t, client.Close())
	srv.Stop()
	mustHold(t, image, model)
}

// TestCompressedImages reads compressed images and overwrites parts of them.
func TestCompressedImages(t *testing.T) {
	peer.Need(t, "qemu-img", "nbdcopy")
	for _, kind := range []string{"zlib", "zstd"} {
		for _, cluster := range []int{512, 4096, 65536, 2 << 20} {
			t.Run(fmt.Sprintf("%s,cluster=%d", kind, cluster), func(t *testing.T) {
				t.Parallel()
				l := layout{cluster, 16, "1.1", noBacking, "compression_type=" + kind}
				dir := t.TempDir()
				raw, image := filepath.Join(dir, "text.raw"), filepath.Join(dir, "image.qcow2")
				model := compressible(l)
				model.Save(t, raw)
				harness.Must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", l.options(), raw, image)
				agree(t, image)
				serveOps(t, image, model, harness.Ops(l.seed(), 60, l.shape()))
				agree(t, image)
			})
		}
	}
}

// compressible is a disk of text-like runs, of noise that no codec shortens, and of holes.
func compressible(l layout) harness.Model {
	m := harness.NewModel(l.size(), nil)
	step := int64(3 * l.cluster / 2)
	for off, i := int64(0), uint64(0); off < int64(len(m)); off, i = off+step, i+1 {
		span := m[off:min(off+step, int64(len(m)))]
		switch i % 4 {
		case 0:
			harness.Fill(span, l.seed()+i)
		case 1, 2:
			line := fmt.Appendf(nil, "line %d of a text that repeats itself, as logs and sources do\n", i)
			for len(span) > 0 {
				span = span[copy(span, line):]
			}
		}
	}
	return m
}

// Bits of the header's incompatible features, for the images that are spoilt on purpose.
const (
	corruptBit = 1 << 1
	// unknownBit is one that the format has not given a meaning.
	unknownBit = 1 << 6
)

// Places in a version 3 header: the last bytes of two big-endian fields.
const (
	cryptMethodByte  = 35
	incompatibleByte = 79
)

func setByte(t *testing.T, image string, at int64, value byte) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	harness.OK(t, err)
	_, err = f.WriteAt([]byte{value}, at)
	harness.OK(t, err)
	harness.OK(t, f.Close())
}

// luksImage makes an encrypted image. QEMU gauges the processor first, and gives up where the kernel's clock is too coarse
// for that, now and then: then it is asked again.
func luksImage(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image.qcow2")
	var last harness.Result
	for range 30 {
		last = harness.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=hunter2",
			"-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", image, "4M")
		if last.Code == 0 {
			return image
		}
		if !bytes.Contains(last.Stderr, []byte("accurate CPU usage")) {
			break
		}
	}
	t.Fatalf("making an encrypted image:\n%s", last)
	return ""
}

// TestRefusesWhatItMustNotWrite: an image that this engine cannot keep sound is not written, and says why.
func TestRefusesWhatItMustNotWrite(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "nbdcopy")
	create := func(t *testing.T, options string) string {
		image := filepath.Join(t.TempDir(), "image.qcow2")
		harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "4M")
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 0x5a 100k 300k", image)
		return image
	}
	t.Run("corrupt", func(t *testing.T) {
		image := create(t, "compat=1.1")
		setByte(t, image, incompatibleByte, corruptBit)
		refusedUnchanged(t, image, "corrupt")
	})
	t.Run("unknown feature", func(t *testing.T) {
		image := create(t, "compat=1.1")
		setByte(t, image, incompatibleByte, unknownBit)
		refusedUnchanged(t, image, "feature")
	})
	t.Run("data file", func(t *testing.T) {
		elsewhere := t.TempDir()
		image := create(t, "data_file="+filepath.Join(elsewhere, "data.raw"))
		refusedUnchanged(t, image, "data file")
		// Reading follows the name only where the user allows it.
		r := harness.Refused(t, harness.Serve{Image: image, ReadOnly: true})
		mustMention(t, r, "data.raw")
		readsLikeQEMU(t, image, "--allow-path", elsewhere)
	})
	t.Run("LUKS", func(t *testing.T) {
		refusedUnchanged(t, luksImage(t), "encrypt")
	})
	t.Run("legacy AES", func(t *testing.T) {
		image := create(t, "compat=1.1")
		setByte(t, image, cryptMethodByte, 1)
		refusedUnchanged(t, image, "encrypt")
	})
	t.Run("LUKS without its header", func(t *testing.T) {
		image := create(t, "compat=1.1")
		setByte(t, image, cryptMethodByte, 2)
		refusedUnchanged(t, image, "crypt")
	})
	t.Run("not qcow2", func(t *testing.T) {
		image := filepath.Join(t.TempDir(), "image.qcow2")
		harness.OK(t, os.WriteFile(image, bytes.Repeat([]byte("no image "), 8192), 0o644))
		refusedUnchanged(t, image, "qcow2")
	})
}

// refusedUnchanged demands that drover serve refuses to write the image, names the reason, and leaves every byte.
func refusedUnchanged(t *testing.T, image, reason string) {
	t.Helper()
	before, err := os.ReadFile(image)
	harness.OK(t, err)
	r := harness.Refused(t, harness.Serve{Image: image})
	mustMention(t, r, reason)
	after, err := os.ReadFile(image)
	harness.OK(t, err)
	if !bytes.Equal(before, after) {
		t.Errorf("refusing the image changed it")
	}
}

func mustMention(t *testing.T, r harness.Result, word string) {
	t.Helper()
	said := append(bytes.ToLower(r.Stdout), bytes.ToLower(r.Stderr)...)
	if !bytes.Contains(said, bytes.ToLower([]byte(word))) {
		t.Errorf("the message does not mention %q:\n%s", word, r)
	}
	if bytes.Contains(said, []byte("panic")) || bytes.Contains(said, []byte("goroutine ")) {
		t.Errorf("a refusal is one clear line, not a crash:\n%s", r)
	}
}

func readsLikeQEMU(t *testing.T, image string, flags ...string) {
	t.Helper()
	srv := harness.Start(t, harness.Serve{Image: image, ReadOnly: true, Args: flags})
	got := harness.Copy(t, srv.URI())
	srv.Stop()
	if err := harness.Same(got, harness.Raw(t, image, "qcow2"), 0); err != nil {
		t.Errorf("drover reads other bytes than QEMU: %v", err)
	}
}

// TestDirtyImage: an image that was not closed cleanly has refcounts that are too low. It is read as it is, and repaired
// before it is written.
func TestDirtyImage(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "nbdcopy")
	image := filepath.Join(t.TempDir(), "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "4M")
	// The process ends by SIGKILL with the dirty bit set and the refcounts of what it wrote not on disk.
	r := harness.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 0x5a 100k 300k", "-c", "flush",
		"-c", "sigraise 9", image)
	if r.Code != -1 {
		t.Fatalf("qemu-io was to die of a signal:\n%s", r)
	}
	readsLikeQEMU(t, image)
	if r := harness.Run(t, "qemu-img", "check", "-f", "qcow2", image); r.Code != 2 {
		t.Fatalf("a reader has changed the image, or it was sound:\n%s", r)
	}

	const size = 4 << 20
	model := harness.NewModel(size, nil)
	for i := 100 << 10; i < 400<<10; i++ {
		model[i] = 0x5a
	}
	serveOps(t, image, model, harness.Ops(7, 40, harness.Shape{Size: size, Cluster: 65536, MaxLen: 1 << 20}))
	agree(t, image)
}
