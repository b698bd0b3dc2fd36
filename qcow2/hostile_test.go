package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// soundImage makes a small image with data, zero clusters and holes. With 4 KiB clusters its places are: header 0,
// refcount table 1, refcount block 2, L1 table 3, L2 table 4, data from 5 on.
func soundImage(t testing.TB, o qcow2.CreateOptions) *storage.MemFile {
	t.Helper()
	ctx := context.Background()
	f := storage.NewMemFile("hostile.qcow2")
	if err := qcow2.Create(ctx, f, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		im.WriteAt(ctx, bytes.Repeat([]byte("drover"), 5000), 100, 0),
		im.WriteZeroes(ctx, 8192, 8192, 0),
		im.WriteAt(ctx, []byte("end"), im.Size()-3, 0),
		im.Close(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func poke(t testing.TB, f *storage.MemFile, off int64, v uint64) {
	t.Helper()
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// TestImpossibleMetadata points tables at places that a write would destroy. The request fails and says why, and not a
// byte of the file changes.
func TestImpossibleMetadata(t *testing.T) {
	const (
		cs     = 4096
		copied = 1 << 63
		l1     = 3 * cs
		l2     = 4 * cs
	)
	for _, c := range []struct {
		name string
		at   int64
		v    uint64
	}{
		{"data at the header", l2, copied | 1},
		{"zero cluster at the header, kept", l2, copied | 1<<9},
		{"data at the L1 table", l2, copied | l1},
		{"data at the refcount table", l2, copied | cs},
		{"data off the cluster grid", l2, copied | 5*cs | 512},
		{"L2 table off the cluster grid", l1, copied | 4*cs | 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := context.Background()
			f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: cs})
			v := c.v
			if c.name == "data at the header" {
				v = copied // an entry with offset 0 and COPIED is unallocated; what must not happen is a write to 0
			}
			poke(t, f, c.at, v)
			before := fileBytes(t, f)
			im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			err = im.WriteAt(ctx, bytes.Repeat([]byte{0xee}, 1000), 50, 0)
			var bad *qcow2.CorruptError
			if c.name == "data at the header" {
				if err != nil {
					t.Fatal(err)
				}
			} else if !errors.As(err, &bad) {
				t.Fatalf("write returns %v, want a CorruptError", err)
			}
			after := fileBytes(t, f)
			after[79] &^= 2 // the corrupt bit
			for _, keep := range [][2]int64{{0, cs}, {cs, 2 * cs}, {l1, l1 + 64}} {
				if !bytes.Equal(before[keep[0]:keep[1]], after[keep[0]:keep[1]]) {
					t.Fatalf("bytes %d to %d of the file have changed", keep[0], keep[1])
				}
			}
			_ = im.Close()
		})
	}
}

func fileBytes(t testing.TB, f *storage.MemFile) []byte {
	t.Helper()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		t.Fatal(err)
	}
	return b
}

// exercise does to an image, sound or not, whatever the API offers. It must return.
func exercise(t testing.TB, f *storage.MemFile, readOnly bool) {
	ctx := context.Background()
	_, _ = qcow2.ReadInfo(ctx, f)
	_, _ = qcow2.CheckFile(ctx, f, qcow2.CheckOptions{})
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{ReadOnly: readOnly, CacheSize: 1, ClusterCacheSize: 1})
	if err != nil {
		return
	}
	size := im.Size()
	p := make([]byte, 20000)
	for _, off := range []int64{0, 100, 8000, size / 2, size - 30000, size - int64(len(p))} {
		if block.CheckRange(off, int64(len(p)), size) != nil {
			continue
		}
		_ = im.ReadAt(ctx, p, off)
		_ = im.TryReadAt(p, off)
		_ = im.TryReadDataAt(p, off)
		n := 0
		_ = im.Extents(ctx, off, size-off, func(block.Extent) bool { n++; return n < 1000 })
		if readOnly {
			continue
		}
		_ = im.WriteAt(ctx, p[:9000], off, 0)
		_ = im.WriteZeroes(ctx, off, 10000, block.ZeroUnmap)
		_ = im.Discard(ctx, off, 15000)
		_ = im.WriteAt(ctx, p[:3], off, 0)
		_ = im.Flush(ctx)
	}
	_ = im.Close()
}

// patches changes bytes of a file as a fuzz input says: two bytes of position, one of length, then the bytes.
func patches(f *storage.MemFile, in []byte, size int64) {
	for len(in) >= 4 {
		off := int64(binary.BigEndian.Uint16(in)) * 8 % max(size, 1)
		n := min(int(in[2]%16)+1, len(in)-3)
		_, _ = f.WriteAt(in[3:3+n], off)
		in = in[3+n:]
	}
}

// FuzzImage damages a sound image and does everything with it: nothing may panic, hang or eat memory.
func FuzzImage(f *testing.F) {
	var bases []*storage.MemFile
	for _, o := range []qcow2.CreateOptions{
		{Size: 256 << 10, ClusterSize: 4096},
		{Size: 64 << 10, ClusterSize: 512, RefcountBits: 1},
		{Size: 256 << 10, ClusterSize: 4096, Version: 2},
	} {
		bases = append(bases, soundImage(f, o))
	}
	f.Add(uint8(0), []byte{})
	f.Add(uint8(0), []byte{0, 3, 7, 0, 0, 0, 0, 0, 0, 0, 0})        // disk size and L1 pointer
	f.Add(uint8(1), []byte{0, 6, 7, 0xff, 0, 0, 0, 0, 0, 0, 1})     // refcount table pointer
	f.Add(uint8(2), []byte{6, 0, 7, 0x80, 0, 0, 0, 0, 0, 0x50, 0})  // an L1 entry
	f.Add(uint8(0), []byte{8, 0, 7, 0x40, 0, 0, 0, 0, 0, 0x50, 17}) // a compressed L2 entry
	f.Fuzz(func(t *testing.T, which uint8, in []byte) {
		base := bases[int(which>>1)%len(bases)]
		size, _ := base.Size()
		file := base.Clone()
		patches(file, in, size)
		exercise(t, file, which&1 == 1)
	})
}

// TestInfoOfAnything gives 64 KiB of anything to what `drover info` calls: it ends at once and needs little memory.
func TestInfoOfAnything(t *testing.T) {
	if testing.Short() {
		t.Skip("one client after another: the long form shows it")
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // so that the heap shows what was allocated
	sound := fileBytes(t, soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 512}))
	for seed := range 200 {
		b := bytes.Clone(sound)
		if len(b) < 64<<10 {
			b = append(b, make([]byte, 64<<10-len(b))...)
		}
		for i := range 24 {
			at := []int{4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104, 112, 120}[(seed+i*7)%20]
			binary.BigEndian.PutUint32(b[at:], []uint32{0, 1, 9, 21, 63, 512, 65536, 1 << 20, 1 << 31, math.MaxUint32}[(seed*3+i*i)%10])
			if i%(seed%11+1) == 0 {
				break
			}
		}
		f := storage.NewMemFile("anything")
		if _, err := f.WriteAt(b[:64<<10], 0); err != nil {
			t.Fatal(err)
		}
		for name, call := range map[string]func(){
			"info":  func() { _, _ = qcow2.ReadInfo(context.Background(), f) },
			"check": func() { _, _ = qcow2.CheckFile(context.Background(), f, qcow2.CheckOptions{}) },
			"open": func() {
				im, err := qcow2.Open(context.Background(), keepOpen{f}, qcow2.Options{ReadOnly: true})
				if err == nil {
					_ = im.Close()
				}
			},
		} {
			runtime.GC()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			call()
			took := time.Since(began)
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<20 || took > time.Second {
				t.Errorf("seed %d: %s took %v and %d MiB", seed, name, took, grown>>20)
			}
		}
	}
}

// TestHugeDisk opens and uses a disk of 2 PiB: it costs what a small one costs.
func TestHugeDisk(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("huge.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 2 << 50}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 1 << 40, 2<<50 - 9} {
		if err := im.WriteAt(ctx, []byte("far away!"), off, 0); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 9)
		if err := im.ReadAt(ctx, p, off); err != nil || string(p) != "far away!" {
			t.Fatalf("%q (%v)", p, err)
		}
	}
	n := 0
	if err := im.Extents(ctx, 0, im.Size(), func(block.Extent) bool { n++; return true }); err != nil || n > 20000 {
		t.Fatalf("%d extents (%v)", n, err)
	}
	if report, err := im.Check(ctx, qcow2.CheckOptions{}); err != nil || !report.Clean() {
		t.Fatalf("%+v (%v)", report, err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := qcow2.Open(ctx, f, qcow2.Options{}); err == nil {
		t.Fatal("a closed file opens")
	}
}
