package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/peer"
)

// modelBitmap is a dirty bitmap as the test expects it: one bool for each sector.
type modelBitmap struct {
	name    string
	gran    int64
	enabled bool
	dirty   []bool
}

func (m *modelBitmap) mark(off, n, size int64) {
	if n <= 0 {
		return
	}
	lo, hi := off/m.gran*m.gran, min((off+n+m.gran-1)/m.gran*m.gran, (size+m.gran-1)/m.gran*m.gran)
	for s := lo / 512; s < hi/512 && s < int64(len(m.dirty)); s++ {
		m.dirty[s] = true
	}
}

// bitmapBits reads a bitmap, one bool for each sector.
func bitmapBits(t testing.TB, im *qcow2.Image, name string) []bool {
	t.Helper()
	bits := make([]bool, 0, im.Size()/512)
	err := im.BitmapExtents(context.Background(), name, 0, im.Size(), func(n int64, dirty bool) bool {
		if n <= 0 || n%512 != 0 {
			t.Fatalf("a run of %d bytes", n)
		}
		for range n / 512 {
			bits = append(bits, dirty)
		}
		return true
	})
	if err != nil {
		t.Fatalf("bitmap %q: %v", name, err)
	}
	return bits
}

// bitmapHarness has random things happen to an image with bitmaps and a model of it.
type bitmapHarness struct {
	t      testing.TB
	r      *rand.Rand
	file   *storage.MemFile
	im     *qcow2.Image
	model  []byte
	maps   []*modelBitmap
	opened qcow2.Options
	named  int
}

func (h *bitmapHarness) must(what string, err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("%s: %v", what, err)
	}
}

func (h *bitmapHarness) open() {
	o := h.opened
	o.CacheCleanInterval, o.BitmapSaveInterval = -1, -1
	im, err := qcow2.Open(context.Background(), keepOpen{h.file}, o)
	h.must("open", err)
	h.im = im
}

func (h *bitmapHarness) touch(off, n int64) {
	for _, m := range h.maps {
		if m.enabled {
			m.mark(off, n, h.im.Size())
		}
	}
}

// change makes a request.
func (h *bitmapHarness) change() {
	ctx := context.Background()
	size := h.im.Size()
	off := h.r.Int64N(size)
	n := 1 + h.r.Int64N(min(size-off, 1+h.r.Int64N(200<<10)))
	h.touch(off, n)
	switch h.r.IntN(6) {
	case 0:
		h.must("zeroes", h.im.WriteZeroes(ctx, off, n, 0))
		clear(h.model[off:][:n])
	case 1:
		h.must("zeroes, unmap", h.im.WriteZeroes(ctx, off, n, block.ZeroUnmap))
		clear(h.model[off:][:n])
	case 2:
		h.must("discard", h.im.Discard(ctx, off, n))
		h.must("read", h.im.ReadAt(ctx, h.model[off:][:n], off))
	default:
		p := content(h.r, int(n))
		copy(h.model[off:], p)
		if h.r.IntN(2) == 0 {
			if bufs := blocktest.Cut(h.r, p, 8, true); h.im.TryWriteVAt(bufs, off) != nil {
				h.must("write in pieces", h.im.WriteVAt(ctx, bufs, off, 0))
			}
		} else if h.im.TryWriteAt(p, off) != nil {
			h.must("write", h.im.WriteAt(ctx, p, off, 0))
		}
	}
}

// manage changes the bitmaps.
func (h *bitmapHarness) manage() {
	ctx := context.Background()
	k := h.r.IntN(10)
	if len(h.maps) == 0 || k < 2 && len(h.maps) < 5 {
		h.named++
		m := &modelBitmap{name: fmt.Sprintf("map %d", h.named), gran: 512 << h.r.IntN(9), enabled: h.r.IntN(4) > 0}
		m.dirty = make([]bool, h.im.Size()/512)
		h.must("add", h.im.AddBitmap(ctx, m.name, qcow2.BitmapOptions{Granularity: m.gran, Disabled: !m.enabled}))
		h.maps = append(h.maps, m)
		return
	}
	i := h.r.IntN(len(h.maps))
	m := h.maps[i]
	switch k {
	case 2:
		h.must("remove", h.im.RemoveBitmap(ctx, m.name))
		h.maps = slices.Delete(h.maps, i, i+1)
	case 3:
		h.must("clear", h.im.ClearBitmap(ctx, m.name))
		clear(m.dirty)
	case 4:
		h.must("enable", h.im.EnableBitmap(ctx, m.name))
		m.enabled = true
	case 5:
		h.must("disable", h.im.DisableBitmap(ctx, m.name))
		m.enabled = false
	case 6:
		from := h.maps[h.r.IntN(len(h.maps))]
		h.must("merge", h.im.MergeBitmap(ctx, m.name, nil, from.name))
		for s, dirty := range slices.Clone(from.dirty) {
			if dirty {
				m.mark(int64(s)*512, 512, h.im.Size())
			}
		}
	case 7:
		h.must("save", h.im.SaveBitmaps(ctx))
	case 8:
		h.resize()
	default:
		h.must("close", h.im.Close())
		h.open()
	}
}

func (h *bitmapHarness) resize() {
	old := h.im.Size()
	size := max(512, min(old+512*(h.r.Int64N(2000)-1000), 3<<20))
	h.must("resize", h.im.Resize(context.Background(), size, qcow2.ResizeOptions{Shrink: true}))
	h.model = append(h.model[:min(old, size)], make([]byte, max(size-old, 0))...)
	for _, m := range h.maps {
		dirty := make([]bool, size/512)
		copy(dirty, m.dirty)
		// What is new of a granule that the old end lay in belongs to the bit that is there.
		if size > old && old%m.gran != 0 && m.dirty[old/512-1] {
			m.dirty = dirty
			m.mark(old-1, 1, size)
			continue
		}
		m.dirty = dirty
	}
}

func (h *bitmapHarness) compare() {
	h.t.Helper()
	if got := readAll(h.t, h.im); !bytes.Equal(got, h.model) {
		h.t.Fatal("the disk differs from the model")
	}
	list, err := h.im.Bitmaps()
	h.must("list", err)
	if len(list) != len(h.maps) {
		h.t.Fatalf("%d bitmaps, want %d", len(list), len(h.maps))
	}
	for i, m := range h.maps {
		want := qcow2.BitmapInfo{Name: m.name, Granularity: m.gran, Auto: m.enabled}
		if list[i] != want {
			h.t.Fatalf("bitmap %d is %+v, want %+v", i, list[i], want)
		}
		if got := bitmapBits(h.t, h.im, m.name); !slices.Equal(got, m.dirty) {
			for s := range min(len(got), len(m.dirty)) {
				if got[s] != m.dirty[s] {
					h.t.Fatalf("bitmap %+v: sector %d is dirty: %v, want %v", want, s, got[s], m.dirty[s])
				}
			}
			h.t.Fatalf("bitmap %+v: %d sectors, want %d", want, len(got), len(m.dirty))
		}
	}
}

func TestBitmapModel(t *testing.T) {
	for i, o := range []qcow2.CreateOptions{
		{ClusterSize: 512, Size: 1 << 20},
		{ClusterSize: 4096, Size: 1<<20 + 1536},
		{ClusterSize: 4096, Size: 1 << 20, RefcountBits: 1, LazyRefcounts: true},
		{ClusterSize: 16384, Size: 1 << 20, ExtendedL2: true},
		{Size: 2 << 20, BackingFile: "base.raw", BackingFormat: "raw"},
	} {
		t.Run(fmt.Sprintf("cluster=%d,backing=%v", o.ClusterSize, o.BackingFile != ""), func(t *testing.T) {
			t.Parallel()
			for seed := range 4 {
				h := &bitmapHarness{t: t, r: rand.New(rand.NewPCG(uint64(seed), uint64(i))), file: storage.NewMemFile("disk.qcow2")}
				if err := qcow2.Create(context.Background(), h.file, o); err != nil {
					t.Fatal(err)
				}
				h.model = make([]byte, o.Size)
				if o.BackingFile != "" {
					base := content(h.r, int(o.Size)/2)
					copy(h.model, base)
					h.opened.Backing = keepDevice{blocktest.NewBytes(base)}
				}
				h.open()
				for range 120 {
					if h.r.IntN(3) == 0 {
						h.manage()
					} else {
						h.change()
					}
					if h.r.IntN(8) == 0 {
						h.compare()
					}
				}
				h.compare()
				h.must("close", h.im.Close())
				h.finish()
			}
		})
	}
}

// keepDevice is a device that outlives the image above it.
type keepDevice struct{ block.Device }

func (keepDevice) Close() error { return nil }

// finish has the checks look at the closed image, and stock QEMU read its bitmaps.
func (h *bitmapHarness) finish() {
	h.t.Helper()
	report, err := qcow2.CheckFile(context.Background(), h.file, qcow2.CheckOptions{})
	if err != nil || !report.Clean() {
		h.t.Fatalf("check: %+v (%v)", report, err)
	}
	if _, err := exec.LookPath("qemu-nbd"); err != nil || h.opened.Backing != nil {
		h.open()
		h.compare()
		h.must("close", h.im.Close())
		return
	}
	path := filepath.Join(h.t.TempDir(), "disk.qcow2")
	saveFile(h.t, h.file, path)
	qemu(h.t, filepath.Dir(path), "qemu-img", "check", "-f", "qcow2", path)
	for _, m := range h.maps {
		if got := stockBits(h.t, path, m.name); !slices.Equal(got, m.dirty) {
			h.t.Fatalf("qemu-nbd reads other bits of %q", m.name)
		}
	}
}

// stockBits reads a bitmap through qemu-nbd, one bool for each sector.
func stockBits(t testing.TB, path, name string) []bool {
	t.Helper()
	return mapBits(t, name, "--", "[", peer.Path("qemu-nbd"), "-r", "-f", "qcow2", "-B", name, path, "]")
}

// mapBits reads a bitmap with nbdinfo.
func mapBits(t testing.TB, name string, server ...string) []bool {
	t.Helper()
	out, err := exec.Command(peer.Path("nbdinfo"), append([]string{"--map=qemu:dirty-bitmap:" + name}, server...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("nbdinfo: %v\n%s", err, out)
	}
	var bits []bool
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		n, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil || len(f) < 4 {
			t.Fatalf("nbdinfo says %q", line)
		}
		for range n / 512 {
			bits = append(bits, f[2] == "1")
		}
	}
	return bits
}

// TestBitmapsOfStock has stock QEMU make and fill bitmaps, goes on with them, and gives them back.
func TestBitmapsOfStock(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	for _, args := range [][]string{
		{"cluster_size=65536"}, {"cluster_size=512"}, {"cluster_size=65536,extended_l2=on"}, {"cluster_size=4096,lazy_refcounts=on"},
	} {
		t.Run(args[0], func(t *testing.T) {
			ctx := context.Background()
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", args[0], path, "4M")
			for _, add := range [][]string{{"--add", path, "b0"}, {"--add", "-g", "4k", path, "b1"}, {"--add", "--disable", "-g", "512", path, "b2"}} {
				qemu(t, dir, "qemu-img", append([]string{"bitmap"}, add...)...)
			}
			qemu(t, dir, "qemu-io", "-c", "write 100k 5k", "-c", "discard 1M 256k", "-c", "write -z 3M 64k", path)
			want := map[string][]bool{}
			for _, name := range []string{"b0", "b1", "b2"} {
				want[name] = stockBits(t, path, name)
			}
			f := loadFile(t, path)
			im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for name, bits := range want {
				if got := bitmapBits(t, im, name); !slices.Equal(got, bits) {
					t.Fatalf("%s: other bits than qemu-nbd's", name)
				}
			}
			if err := im.WriteAt(ctx, make([]byte, 700), 2<<20, 0); err != nil {
				t.Fatal(err)
			}
			if err := im.EnableBitmap(ctx, "b2"); err != nil {
				t.Fatal(err)
			}
			if err := im.WriteAt(ctx, make([]byte, 4096), 2<<20+8192, 0); err != nil {
				t.Fatal(err)
			}
			for name := range want {
				want[name] = bitmapBits(t, im, name)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			saveFile(t, f, path)
			qemu(t, dir, "qemu-img", "check", path)
			for name, bits := range want {
				if got := stockBits(t, path, name); !slices.Equal(got, bits) {
					t.Fatalf("%s: qemu-nbd reads other bits", name)
				}
			}
			qemu(t, dir, "qemu-io", "-c", "write 3500k 4k", path)
			if !stockBits(t, path, "b2")[3500*2] {
				t.Fatal("stock does not go on recording")
			}
			for _, name := range []string{"b1", "b0", "b2"} {
				qemu(t, dir, "qemu-img", "bitmap", "--remove", path, name)
			}
			qemu(t, dir, "qemu-img", "check", path)
		})
	}
}

// bitmapImage makes an image of 1 MiB with an enabled and a disabled bitmap.
func bitmapImage(t testing.TB, o qcow2.CreateOptions) *storage.MemFile {
	t.Helper()
	ctx := context.Background()
	f := storage.NewMemFile("disk.qcow2")
	o.Size = 1 << 20
	if err := qcow2.Create(ctx, f, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(im.AddBitmap(ctx, "on", qcow2.BitmapOptions{}), im.WriteAt(ctx, []byte("before"), 900<<10, 0),
		im.AddBitmap(ctx, "off", qcow2.BitmapOptions{Disabled: true}), im.MergeBitmap(ctx, "off", nil, "on"), im.Close())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func flagsOf(t testing.TB, f storage.File) string {
	t.Helper()
	info, err := qcow2.ReadInfo(context.Background(), f)
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, b := range info.Bitmaps {
		s = append(s, fmt.Sprintf("%s:%v", b.Name, b.InUse))
	}
	return strings.Join(s, " ")
}

// TestBitmapsInUse shows when the disk says that bitmaps are in use: from before the first change until they are saved.
func TestBitmapsInUse(t *testing.T) {
	ctx := context.Background()
	f := bitmapImage(t, qcow2.CreateOptions{})
	want := func(when, flags string) {
		t.Helper()
		if got := flagsOf(t, f); got != flags {
			t.Fatalf("%s: %s, want %s", when, got, flags)
		}
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{BitmapSaveInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.ReadAt(ctx, make([]byte, 512), 0), im.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	want("opened and read", "on:false off:false")
	if err := im.TryWriteAt([]byte("x"), 900<<10); !errors.Is(err, block.ErrWouldBlock) {
		t.Fatalf("a write that must wait for the flags: %v", err)
	}
	if err := im.TryWriteVAt([][]byte{make([]byte, 512), make([]byte, 512)}, 512); !errors.Is(err, block.ErrWouldBlock) {
		t.Fatalf("a write in pieces that must wait for the flags: %v", err)
	}
	if err := im.WriteAt(ctx, []byte("x"), 900<<10, 0); err != nil {
		t.Fatal(err)
	}
	want("written", "on:true off:false")
	if err := im.TryWriteAt([]byte("x"), 900<<10); err != nil {
		t.Fatalf("a write that needs no more waiting: %v", err)
	}
	if err := im.SaveBitmaps(ctx); err != nil {
		t.Fatal(err)
	}
	want("saved", "on:false off:false")
	if err := im.WriteZeroes(ctx, 0, 65536, 0); err != nil {
		t.Fatal(err)
	}
	want("zeroed", "on:true off:false")
	crashed := f.Clone()
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	want("closed", "on:false off:false")

	f = crashed
	im, err = qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var inUse *qcow2.BitmapInUseError
	for what, err := range map[string]error{
		"clear": im.ClearBitmap(ctx, "on"), "enable": im.EnableBitmap(ctx, "on"), "merge into": im.MergeBitmap(ctx, "on", nil, "off"),
		"merge": im.MergeBitmap(ctx, "off", nil, "on"), "resize": im.Resize(ctx, 2<<20, qcow2.ResizeOptions{}),
		"read": im.BitmapExtents(ctx, "on", 0, 512, func(int64, bool) bool { return true }),
	} {
		if !errors.As(err, &inUse) {
			t.Errorf("%s of a bitmap in use: %v", what, err)
		}
	}
	if err := im.WriteAt(ctx, []byte("y"), 0, 0); err != nil {
		t.Fatal(err)
	}
	if bits := bitmapBits(t, im, "off"); !bits[900*2] || bits[0] {
		t.Error("the disabled bitmap did not live through the crash")
	}
	if err := errors.Join(im.RemoveBitmap(ctx, "on"), im.Close()); err != nil {
		t.Fatal(err)
	}
	want("removed", "off:false")
	if report, err := qcow2.CheckFile(ctx, f, qcow2.CheckOptions{}); err != nil || !report.Clean() {
		t.Errorf("check: %+v (%v)", report, err)
	}
}

// TestBitmapsSavedWhenIdle has an image save its bitmaps by itself.
func TestBitmapsSavedWhenIdle(t *testing.T) {
	ctx := context.Background()
	f := bitmapImage(t, qcow2.CreateOptions{})
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{BitmapSaveInterval: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, []byte("x"), 0, 0); err != nil {
		t.Fatal(err)
	}
	for flagsOf(t, f) != "on:false off:false" { // ends with the test's time if it never happens
		if err := im.ReadAt(ctx, make([]byte, 1), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBitmapErrors(t *testing.T) {
	ctx := context.Background()
	im, err := qcow2.Open(ctx, keepOpen{bitmapImage(t, qcow2.CreateOptions{})}, qcow2.Options{Name: "disk"})
	if err != nil {
		t.Fatal(err)
	}
	add := func(name string, gran int64) error {
		return im.AddBitmap(ctx, name, qcow2.BitmapOptions{Granularity: gran})
	}
	small := storage.NewMemFile("small")
	if err := qcow2.Create(ctx, small, qcow2.CreateOptions{Size: 512}); err != nil {
		t.Fatal(err)
	}
	other, err := qcow2.Open(ctx, small, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.AddBitmap(ctx, "s", qcow2.BitmapOptions{}); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("n", 1023)
	for _, c := range []struct {
		err  error
		want string
	}{
		{add("on", 0), "Bitmap already exists: on"},
		{add("x", 256), "Granularity must be power of 2 and at least 512"},
		{add("x", 1000), "Granularity must be power of 2 and at least 512"},
		{add("x", 1<<32), "Granularity must be power of 2 and at least 512"},
		{add("", 0), "Bitmap name cannot be empty"},
		{add(long+"n", 0), "Can't make bitmap '" + long + "n' persistent in 'disk': Name length exceeds maximum (1023 characters)"},
		{add(long, 0), "<nil>"},
		{im.RemoveBitmap(ctx, "x"), "Dirty bitmap 'x' not found"},
		{im.ClearBitmap(ctx, "x"), "Dirty bitmap 'x' not found"},
		{im.EnableBitmap(ctx, "x"), "Dirty bitmap 'x' not found"},
		{im.DisableBitmap(ctx, "x"), "Dirty bitmap 'x' not found"},
		{im.MergeBitmap(ctx, "x", nil, "on"), "Dirty bitmap 'x' not found"},
		{im.MergeBitmap(ctx, "on", nil, "x"), "Dirty bitmap 'x' not found"},
		{im.MergeBitmap(ctx, "on", other, "s"),
			"Bitmaps are of different sizes (destination size is 1048576, source size is 512) and can't be merged"},
		{im.BitmapExtents(ctx, "x", 0, 1, func(int64, bool) bool { return true }), "Dirty bitmap 'x' not found"},
	} {
		if got := fmt.Sprint(c.err); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
	if err := im.BitmapExtents(ctx, "on", 0, 2<<20, func(int64, bool) bool { return true }); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("reading behind the end: %v", err)
	}
	if err := errors.Join(im.Close(), other.Close()); err != nil {
		t.Fatal(err)
	}
	if err := add("x", 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("after close: %v", err)
	}
	for _, c := range []struct {
		o    qcow2.CreateOptions
		want string
	}{
		{qcow2.CreateOptions{Size: 1 << 20, Version: 2}, "Cannot store dirty bitmaps in qcow2 v2 files"},
		{qcow2.CreateOptions{Size: 64 << 40}, "Too much space will be occupied by the bitmap. Use larger granularity"},
	} {
		f := storage.NewMemFile("x")
		if err := qcow2.Create(ctx, f, c.o); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(ctx, f, qcow2.Options{Name: "x"})
		if err != nil {
			t.Fatal(err)
		}
		err = im.AddBitmap(ctx, "b", qcow2.BitmapOptions{Granularity: 512})
		if want := "Can't make bitmap 'b' persistent in 'x': " + c.want; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ro, err := qcow2.Open(ctx, bitmapImage(t, qcow2.CreateOptions{}), qcow2.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	for _, err := range []error{ro.AddBitmap(ctx, "x", qcow2.BitmapOptions{}), ro.ClearBitmap(ctx, "on"), ro.SaveBitmaps(ctx)} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("read-only: %v", err)
		}
	}
	if !bitmapBits(t, ro, "on")[900*2] {
		t.Error("the mark is missing")
	}
}

// TestBitmapsHostile damages directory and tables: the image does not open for writing, or does without harm, and reading a
// bitmap fails or ends.
func TestBitmapsHostile(t *testing.T) {
	ctx := context.Background()
	sound := bitmapImage(t, qcow2.CreateOptions{ClusterSize: 4096})
	raw := fileBytes(t, sound)
	ext := bytes.Index(raw[:4096], []byte{0x23, 0x85, 0x28, 0x75})
	dir := int64(binary.BigEndian.Uint64(raw[ext+8+16:]))
	table := int64(binary.BigEndian.Uint64(raw[dir:]))
	for _, c := range []struct {
		name     string
		at       int64
		v        uint64
		readable bool // for writing too
	}{
		{"table behind the file", dir, 1 << 40, false},
		{"table far behind the file", dir, 1<<63 + 4096, false},
		{"table unaligned", dir, uint64(table) + 512, false},
		{"entry with reserved bits", table, 1<<60 | 8192, false},
		{"entry unaligned", table, 8192 + 512, false},
		{"entry behind the file", table, 1 << 50, false},
		{"entry at the header", table, 1, true}, // all ones
		{"directory behind the file", int64(ext) + 8 + 16, 1 << 40, false},
		{"directory of another length", int64(ext) + 8 + 8, 32, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := sound.Clone()
			poke(t, f, c.at, c.v)
			im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
			if c.readable != (err == nil) {
				t.Fatalf("open: %v", err)
			}
			if err == nil {
				if err := errors.Join(im.WriteAt(ctx, []byte("x"), 0, 0), im.ClearBitmap(ctx, "on"), im.Close()); err != nil {
					t.Fatal(err)
				}
				return
			}
			im, err = qcow2.Open(ctx, keepOpen{f}, qcow2.Options{ReadOnly: true})
			if err != nil {
				t.Fatalf("open read-only: %v", err)
			}
			defer im.Close()
			if err := im.BitmapExtents(ctx, "on", 0, 1<<20, func(int64, bool) bool { return true }); err == nil {
				t.Error("the bitmap can be read")
			}
			if err := im.ReadAt(ctx, make([]byte, 100), 0); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBitmapParallel has many write at once while bitmaps are saved, cleared and read: everything written after the last
// clear is marked.
func TestBitmapParallel(t *testing.T) {
	ctx := context.Background()
	f := bitmapImage(t, qcow2.CreateOptions{ClusterSize: 4096})
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{BitmapSaveInterval: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.AddBitmap(ctx, "fine", qcow2.BitmapOptions{Granularity: 512}); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if err := im.ClearBitmap(ctx, "fine"); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		written := make([][]int64, 6)
		for w := range written {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 9))
				for k := range 60 {
					s := r.Int64N(im.Size() / 512)
					p := bytes.Repeat([]byte{byte(w)}, 512)
					var err error
					switch {
					case k%10 == 9:
						err = im.WriteZeroes(ctx, s*512, 512, 0)
					case im.TryWriteAt(p, s*512) != nil:
						err = im.WriteAt(ctx, p, s*512, 0)
					}
					if err != nil {
						t.Error(err)
						return
					}
					written[w] = append(written[w], s)
					if k%7 == 0 && !bitmapBits(t, im, "fine")[s] {
						t.Errorf("sector %d was written and is not marked", s)
					}
					if w == 0 && k%20 == 0 {
						if err := im.SaveBitmaps(ctx); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		want := make([]bool, im.Size()/512)
		for _, list := range written {
			for _, s := range list {
				want[s] = true
			}
		}
		if !slices.Equal(bitmapBits(t, im, "fine"), want) {
			t.Fatal("the bitmap differs from what was written")
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if report, err := qcow2.CheckFile(ctx, f, qcow2.CheckOptions{}); err != nil || !report.Clean() {
		t.Errorf("check: %+v (%v)", report, err)
	}
}
