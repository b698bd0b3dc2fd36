package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/qcow2/internal/check"
	"github.com/droverproject/drover/storage"
)

// variant is one point of the option grid that the model test draws from.
type variant struct {
	create  qcow2.CreateOptions
	backing int64 // size of the backing device, 0: none
	cache   int64
	data    bool // an external data file
}

func (v variant) String() string {
	return fmt.Sprintf("v%d encrypted=%v extended=%v cluster=%d refcount=%d size=%d backing=%d prealloc=%d cache=%d data=%v raw=%v", v.create.Version, v.create.Encrypt, v.create.ExtendedL2, v.create.ClusterSize,
		v.create.RefcountBits, v.create.Size, v.backing, v.create.Preallocation, v.cache, v.data, v.create.DataFileRaw)
}

func drawVariant(r *rand.Rand) variant {
	pick := func(s ...int64) int64 { return s[r.IntN(len(s))] }
	v := variant{cache: pick(1, 0, 65536)}
	c := &v.create
	c.Version = int(pick(2, 3, 3, 3))
	c.ClusterSize = pick(512, 1024, 4096, 4096, 16384, 65536, 65536, 262144, 2<<20)
	c.RefcountBits = 16
	if c.Version == 3 {
		c.RefcountBits = int(pick(1, 2, 4, 8, 16, 32, 64))
	}
	c.Size = (pick(1, 3, 8)*c.ClusterSize*pick(1, 7, 30) + pick(0, 512, 3*512)) & (8<<20 - 1)
	if c.Version == 3 && r.IntN(4) == 0 {
		c.ExtendedL2, c.ClusterSize = true, pick(16384, 32768, 65536, 2<<20)
		c.Size = (c.ClusterSize*pick(1, 5, 9) + pick(0, 512, 3*512)) & (8<<20 - 1)
	}
	if r.IntN(2) == 0 {
		v.backing = pick(512, c.Size/2, c.Size, c.Size*2) &^ 511
	} else if r.IntN(3) == 0 {
		c.Preallocation = qcow2.PreallocMetadata
	}
	if c.Version == 3 && r.IntN(4) == 0 {
		v.data, c.DataFile = true, "model.data"
		c.DataFileRaw = v.backing == 0 && r.IntN(2) == 0
	}
	if r.IntN(4) == 0 && !c.DataFileRaw && !(v.data && c.Preallocation != qcow2.PreallocOff) {
		c.Encrypt = encryptions[r.IntN(len(encryptions))]
	}
	return v
}

// harness drives an image and a byte slice side by side.
type harness struct {
	opened int // how often the image was opened
	t      testing.TB
	r      *rand.Rand
	v      variant
	file   *storage.MemFile
	base   []byte
	im     *qcow2.Image
	model  []byte
	state  []byte // of a machine; see stateStep
	snaps  []modelSnapshot
	data   *storage.MemFile // nil when there is none
}

func newHarness(t testing.TB, r *rand.Rand, v variant) *harness {
	h := &harness{t: t, r: r, v: v, file: storage.NewMemFile("model.qcow2")}
	if v.create.Version == 3 && r.IntN(3) == 0 {
		h.v.create.LazyRefcounts = true
	}
	if v.data {
		h.data = storage.NewMemFile("model.data")
		h.v.create.DataStorage = h.data
	}
	if v.backing > 0 {
		h.base = make([]byte, v.backing)
		for i := range h.base {
			h.base[i] = byte(r.Uint32())
		}
		h.v.create.BackingFile, h.v.create.BackingFormat = "base.raw", "raw"
	}
	if err := qcow2.Create(context.Background(), h.file, h.v.create); err != nil {
		t.Fatalf("%v: create: %v", v, err)
	}
	h.model = make([]byte, v.create.Size)
	copy(h.model, h.base)
	h.open()
	return h
}

func (h *harness) open() {
	h.t.Helper()
	o := qcow2.Options{CacheSize: h.v.cache, DiscardNoUnref: h.r.IntN(4) == 0,
		PassDiscardRequest: qcow2.Switch(h.r.IntN(3)), PassDiscardOther: qcow2.Switch(h.r.IntN(3))}
	if h.opened++; h.opened%2 == 0 {
		o.CacheEntrySize = min(512<<(h.opened/2%8), h.v.create.ClusterSize)
	}
	if h.data != nil {
		o.DataFile = keepOpen{h.data}
	}
	if h.base != nil {
		o.Backing = blocktest.NewBytes(h.base)
	}
	if e := h.v.create.Encrypt; e != nil {
		o.Encrypt = &qcow2.EncryptOptions{Secret: e.Secret}
	}
	im, err := qcow2.Open(context.Background(), keepOpen{h.file}, o)
	if err != nil {
		h.t.Fatalf("%v: open: %v", h.v, err)
	}
	h.im = im
}

// keepOpen lets a test go on using a file after the image that owns it was closed.
type keepOpen struct{ *storage.MemFile }

func (keepOpen) Close() error { return nil }

func (h *harness) must(what string, err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("%v: %s: %v", h.v, what, err)
	}
}

// span draws a range of the disk, often short, often on boundaries.
func (h *harness) span() (off, n int64) {
	size := int64(len(h.model))
	off = h.r.Int64N(size + 1)
	n = h.r.Int64N(size - off + 1)
	switch h.r.IntN(12) {
	case 0: // whatever was drawn
	case 1, 2, 3, 4:
		n = min(n, 512*(1+h.r.Int64N(8)))
	case 5, 6, 7, 8:
		n = min(n, 3*h.v.create.ClusterSize)
	default:
		off &^= h.v.create.ClusterSize - 1
		n = min(size-off, (n+h.v.create.ClusterSize-1)&^(h.v.create.ClusterSize-1), 9*h.v.create.ClusterSize)
	}
	return off, n
}

func (h *harness) step() {
	h.t.Helper()
	defer h.checkRaw()
	ctx := context.Background()
	off, n := h.span()
	m := h.model[off : off+n]
	op := h.r.IntN(100)
	switch {
	case op < 8 && h.data == nil:
		h.writeCompressed(off, n)
	case op < 40:
		p := make([]byte, n)
		seed := byte(h.r.Uint32())
		for i := range p {
			p[i] = seed + byte(i>>9)*7 + byte(i)
		}
		flags := block.WriteFlags(h.r.IntN(20) / 19)
		if h.r.IntN(2) == 0 {
			if bufs := h.cut(p); h.im.TryWriteVAt(bufs, off) != nil {
				h.must("write in pieces", h.im.WriteVAt(ctx, bufs, off, flags))
			}
		} else if h.im.TryWriteAt(p, off) != nil {
			h.must("write", h.im.WriteAt(ctx, p, off, flags))
		}
		copy(m, p)
	case op < 50:
		flags := block.ZeroFlags(h.r.IntN(4))
		err := h.im.WriteZeroes(ctx, off, n, flags)
		if errors.Is(err, block.ErrNoFastZero) && flags&block.ZeroFast != 0 {
			break
		}
		h.must("write zeroes", err)
		clear(m)
	case op < 60:
		h.must("discard", h.im.Discard(ctx, off, n))
		got := make([]byte, n)
		h.must("read after discard", h.im.ReadAt(ctx, got, off))
		for i := range got {
			if got[i] != m[i] && got[i] != 0 {
				h.t.Fatalf("%v: byte at %d is neither old nor zero after discard", h.v, off+int64(i))
			}
		}
		copy(m, got)
	case op < 85:
		got := bytes.Repeat([]byte{0x99}, int(n))
		if h.r.IntN(2) == 0 {
			if bufs := h.cut(got); h.im.TryReadVAt(bufs, off) != nil {
				h.must("read in pieces", h.im.ReadVAt(ctx, bufs, off))
			}
		} else if (op%2 == 0 || tryReadData(h.im, got, off) != nil) && h.im.TryReadAt(got, off) != nil {
			h.must("read", h.im.ReadAt(ctx, got, off))
		}
		if !bytes.Equal(got, m) {
			h.t.Fatalf("%v: read of %d bytes at %d differs", h.v, n, off)
		}
	case op < 92:
		h.must("flush", h.im.Flush(ctx))
	case op < 95:
		h.checkExtents(off, n)
	case op < 96:
		h.wholeStep()
	case op < 98:
		h.stateStep()
	default:
		h.reopen()
	}
}

// tryReadData is TryReadDataAt that fills p with zeroes where there is nothing else.
func tryReadData(im *qcow2.Image, p []byte, off int64) error {
	err := im.TryReadDataAt(p, off)
	if errors.Is(err, block.ErrAllZero) {
		clear(p)
		return nil
	}
	return err
}

// cut cuts p into pieces, of whole sectors most times.
func (h *harness) cut(p []byte) [][]byte {
	if h.r.IntN(4) == 0 {
		return blocktest.Cut(h.r, p, 1+h.r.IntN(len(p)+1), false)
	}
	return blocktest.Cut(h.r, p, 1+h.r.IntN(64), true)
}

func (h *harness) reopen() {
	h.t.Helper()
	h.must("close", h.im.Close())
	h.open()
}

// checkExtents compares what Extents says with the model.
func (h *harness) checkExtents(off, n int64) {
	h.t.Helper()
	at := off
	err := h.im.Extents(context.Background(), off, n, func(x block.Extent) bool {
		if x.Off != at || x.Len <= 0 {
			h.t.Fatalf("%v: extent at %d+%d, want one at %d", h.v, x.Off, x.Len, at)
		}
		at = x.End()
		if x.Zero && len(bytes.Trim(h.model[x.Off:x.End()], "\x00")) != 0 {
			h.t.Fatalf("%v: extent %+v is not zero", h.v, x)
		}
		if x.HasHost && x.Data && x.Depth == 0 {
			b := make([]byte, x.Len)
			f := h.file
			if h.data != nil {
				f = h.data
			}
			if k, err := f.ReadAt(b, x.Host); k < len(b) && err == nil {
				h.t.Fatalf("%v: short read at host %#x", h.v, x.Host)
			}
			if !bytes.Equal(b, h.model[x.Off:x.End()]) {
				h.t.Fatalf("%v: host bytes of extent %+v differ", h.v, x)
			}
		}
		return true
	})
	h.must("extents", err)
	if at != off+n {
		h.t.Fatalf("%v: extents end at %d, want %d", h.v, at, off+n)
	}
}

// writeCompressed writes whole clusters compressed, of contents that shrink by much, by little and not at all.
func (h *harness) writeCompressed(off, n int64) {
	h.t.Helper()
	if h.v.create.Encrypt != nil {
		err := h.im.WriteCompressed(context.Background(), h.model[off:off+n], off)
		if n > 0 && !errors.Is(err, block.ErrNoCompression) {
			h.t.Fatalf("%v: compressed write to an encrypted image: %v", h.v, err)
		}
		return
	}
	cs := h.v.create.ClusterSize
	off &^= cs - 1
	n = min((n+cs-1)&^(cs-1), int64(len(h.model))-off, max(cs, 1<<20))
	p := h.model[off : off+n]
	for len(p) > 0 {
		cluster := p[:min(int64(len(p)), cs)]
		p = p[len(cluster):]
		mix := h.r.IntN(5)
		for i := range cluster {
			switch {
			case mix == 0:
				cluster[i] = 0
			case mix == 1 || mix == 2 && i%4 == 0 || mix == 3 && i%64 == 0:
				cluster[i] = byte(h.r.Uint32())
			default:
				cluster[i] = byte(i >> 8)
			}
		}
	}
	h.must("write compressed", h.im.WriteCompressed(context.Background(), h.model[off:off+n], off))
}

// checkRaw compares a raw data file with the model.
func (h *harness) checkRaw() {
	h.t.Helper()
	if !h.v.create.DataFileRaw {
		return
	}
	size, err := h.data.Size()
	h.must("size of the data file", err)
	b := make([]byte, size)
	if n, err := h.data.ReadAt(b, 0); n < len(b) {
		h.must("reading the data file", err)
	}
	if !bytes.Equal(b, h.model) {
		h.t.Fatalf("%v: the raw data file differs from the disk", h.v)
	}
}

// finish closes the image, has both checkers look at it and compares every byte.
func (h *harness) finish() {
	h.t.Helper()
	h.must("close", h.im.Close())
	checkFile(h.t, h.file)
	h.qemuCheck()
	h.open()
	got := make([]byte, len(h.model))
	h.must("read all", h.im.ReadAt(context.Background(), got, 0))
	if !bytes.Equal(got, h.model) {
		h.t.Fatalf("%v: content differs after reopening", h.v)
	}
	h.compareSnapshots()
	h.must("close", h.im.Close())
}

// qemuCheck has stock qemu-img check the image, and compare it with the model.
func (h *harness) qemuCheck() {
	h.t.Helper()
	if h.v.create.Encrypt != nil {
		h.qemuCompareEncrypted()
		return
	}
	path := qemuCheckFile(h.t, h.file, h.base, h.data)
	if path == "" {
		return
	}
	raw := filepath.Join(filepath.Dir(path), "model.raw")
	h.must("saving", os.WriteFile(raw, h.model, 0o600))
	cmd := exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)
	cmd.Dir = filepath.Dir(path) // stock looks for the data file here
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("%v: qemu-img compare: %v: %s", h.v, err, out)
	}
}

// qemuCheckFile saves an image (and its backing file, where it has one) and has stock qemu-img check it, where there is
// one. It returns where the image is.
func qemuCheckFile(t testing.TB, f storage.File, base []byte, data ...*storage.MemFile) string {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return ""
	}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if base != nil {
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), "base.raw"), base, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range data {
		saveData(t, d, filepath.Dir(path))
	}
	cmd := exec.Command("qemu-img", "check", path)
	cmd.Dir = filepath.Dir(path)
	if out, err := cmd.CombinedOutput(); err != nil {
		keep := filepath.Join(os.TempDir(), "drover-failed.qcow2")
		_ = os.WriteFile(keep, b, 0o600)
		t.Fatalf("qemu-img check: %v (image kept as %s)\n%s", err, keep, out)
	}
	return path
}

// saveData saves an external data file, if there is one.
func saveData(t testing.TB, f *storage.MemFile, dir string) {
	t.Helper()
	if f == nil {
		return
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, f.Stat().Name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// checkFile has our own check look at an image: it may find nothing, not even a leak.
func checkFile(t testing.TB, f storage.File) {
	t.Helper()
	report, err := check.Run(context.Background(), f, check.Options{})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if !report.Clean() {
		t.Fatalf("check: %+v", report)
	}
}

// TestModel runs random operations over random options against a byte slice.
func TestModel(t *testing.T) {
	rounds, steps := 150, 700 // over 100,000 operations
	if testing.Short() {
		rounds, steps = 15, 300
	}
	for seed := range uint64(rounds) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 1))
			h := newHarness(t, r, drawVariant(r))
			for range steps {
				h.step()
			}
			h.finish()
		})
	}
}
