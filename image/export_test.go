package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

type keptOpen struct{ storage.File }

func (keptOpen) Close() error { return nil }

// backup is one export and its manifest.
type backup struct {
	file *storage.MemFile
	m    *image.Manifest
}

// chain opens the last of some backups with the others below it.
func chain(t *testing.T, backups []backup) *qcow2.Image {
	t.Helper()
	var below block.Device
	var im *qcow2.Image
	for _, b := range backups {
		var err error
		if im, err = qcow2.Open(context.Background(), keptOpen{b.file}, qcow2.Options{ReadOnly: true, Backing: below}); err != nil {
			t.Fatal(err)
		}
		below = im
	}
	t.Cleanup(func() { _ = im.Close() })
	return im
}

// TestExport makes a full backup and incremental ones of an image that goes on being written, and each chain is the disk as it
// was.
func TestExport(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 5))
		im, model := sparseImage(t, r, 512<<r.IntN(8), 5<<20+512*int64(r.IntN(5)))
		granularity := int64(512) << r.IntN(9)
		cluster := int64(512) << r.IntN(10)
		var backups []backup
		for n := range 5 {
			o := image.ExportOptions{ClusterSize: cluster}
			if n > 0 {
				o.Bitmap, o.Marks, o.Base, o.BaseFormat = "b", im, fmt.Sprint(n-1), "qcow2"
				if r.IntN(3) > 0 {
					o.BaseManifest = backups[n-1].m
				}
			}
			b := backup{file: storage.NewMemFile(fmt.Sprint(n))}
			var err error
			if b.m, err = image.Export(ctx, im, b.file, o); err != nil {
				t.Fatal(err)
			}
			backups = append(backups, b)
			dev := chain(t, backups)
			got := make([]byte, dev.Size())
			if err := dev.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
				t.Fatalf("seed %d, backup %d: the chain is not the disk (%v)", seed, n, err)
			}
			if err := image.VerifyDisk(ctx, dev, b.m, nil); err != nil {
				t.Fatal(err)
			}
			if n > 0 && b.m.Exported == b.m.Size && granularity < 1<<14 && cluster < 1<<14 {
				t.Errorf("seed %d: an incremental backup of everything", seed)
			}
			rep, err := qcow2.CheckFile(ctx, b.file, qcow2.CheckOptions{})
			if err != nil || !rep.Clean() {
				t.Fatalf("%+v, %v", rep, err)
			}
			if n == 0 {
				err = im.AddBitmap(ctx, "b", qcow2.BitmapOptions{Granularity: granularity})
			} else {
				err = im.ClearBitmap(ctx, "b")
			}
			if err != nil {
				t.Fatal(err)
			}
			for range 4 {
				off := r.Int64N(im.Size())
				length := min(1+r.Int64N(100<<10), im.Size()-off)
				if r.IntN(2) == 0 {
					clear(model[off : off+length])
					err = im.WriteZeroes(ctx, off, length, block.ZeroUnmap)
				} else {
					copy(model[off:off+length], bytes.Repeat([]byte{byte(n + 100)}, int(length)))
					err = im.WriteAt(ctx, model[off:off+length], off, 0)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		verifyDamage(t, backups)
	}
}

// verifyDamage changes a byte of the disk in the last backup, which both sums must notice.
func verifyDamage(t *testing.T, backups []backup) {
	t.Helper()
	ctx := context.Background()
	last := backups[len(backups)-1]
	im, err := qcow2.Open(ctx, keptOpen{last.file}, qcow2.Options{Backing: chain(t, backups[:len(backups)-1])})
	if err != nil {
		t.Fatal(err)
	}
	if err := image.VerifyDisk(ctx, im, last.m, nil); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if err := im.ReadAt(ctx, b[:], 1<<20+77); err != nil {
		t.Fatal(err)
	}
	b[0]++
	if err := im.WriteAt(ctx, b[:], 1<<20+77, 0); err != nil {
		t.Fatal(err)
	}
	var m *image.Mismatch
	if err := image.VerifyDisk(ctx, im, last.m, nil); !errors.As(err, &m) || m.Off != 1<<20 || m.Len != 1<<20 {
		t.Fatalf("a changed disk: %v", err)
	}
	if err := im.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	alone, err := qcow2.Open(ctx, keptOpen{last.file}, qcow2.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := image.VerifyLayer(ctx, alone, last.m); !errors.As(err, &m) {
		t.Fatalf("a changed backup: %v", err)
	}
	if err := image.VerifyLayer(ctx, alone, backups[0].m); !errors.As(err, &m) {
		t.Fatalf("another backup's manifest: %v", err)
	}
	if err := errors.Join(alone.Close(), im.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestExportRefused(t *testing.T) {
	ctx := context.Background()
	im, _ := sparseImage(t, rand.New(rand.NewPCG(1, 1)), 4096, 2<<20)
	other, _ := sparseImage(t, rand.New(rand.NewPCG(1, 1)), 4096, 3<<20)
	for _, o := range []image.ExportOptions{
		{Base: "x"}, {Bitmap: "b", Marks: im}, {Bitmap: "none", Marks: im, Base: "x"}, {Bitmap: "b", Marks: other, Base: "x"},
		{BaseManifest: &image.Manifest{Size: 5}},
	} {
		if _, err := image.Export(ctx, im, storage.NewMemFile("out"), o); err == nil {
			t.Errorf("%+v was exported", o)
		}
	}
}

func TestManifest(t *testing.T) {
	ctx := context.Background()
	im, _ := sparseImage(t, rand.New(rand.NewPCG(4, 1)), 4096, 3<<20)
	m, err := image.Export(ctx, im, storage.NewMemFile("out"), image.ExportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.Write(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	again, err := image.ReadManifest(strings.NewReader(text))
	if err != nil || fmt.Sprint(*again) != fmt.Sprint(*m) {
		t.Fatalf("%+v, %v", again, err)
	}
	for _, damage := range [][2]string{
		{`"drover-manifest": 1`, `"drover-manifest": 2`}, {`"virtual-size": 3145728`, `"virtual-size": 3145729`},
		{`"virtual-size": 3145728`, `"virtual-size": -1`}, {`"sum": "sha256-1m:`, `"sum": "sha256-1m:0`}, {m.Blocks[0], m.Blocks[0][1:]},
		{m.Blocks[0], strings.Repeat("z", 64)}, {m.Blocks[0], strings.Repeat("a", 64)}, {text, "{"}, {text, ""},
	} {
		if _, err := image.ReadManifest(strings.NewReader(strings.Replace(text, damage[0], damage[1], 1))); err == nil {
			t.Errorf("%.60q in place of %.60q was accepted", damage[1], damage[0])
		}
	}
	var mis *image.Mismatch
	other, _ := sparseImage(t, rand.New(rand.NewPCG(1, 1)), 4096, 2<<20)
	if err := image.VerifyDisk(ctx, other, m, nil); !errors.As(err, &mis) || mis.Len != 0 {
		t.Fatal(err)
	}
}
