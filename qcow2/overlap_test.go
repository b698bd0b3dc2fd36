package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// structureCase is a structure, QEMU's name for its switch and for it in messages, and the damage that makes a guest write
// of 4 KiB at offset 0 go over it.
type structureCase struct {
	kind         qcow2.Structures
	name, inText string
	damage       func(t testing.TB, f *storage.MemFile, p structurePlaces)
}

type structurePlaces struct {
	cs, l2                                           int64
	snapshotL1, snapshotL2, snapshotTable, bitmapDir int64
}

// dataAt makes the first guest cluster lie at a host offset.
func dataAt(at func(p structurePlaces) int64) func(testing.TB, *storage.MemFile, structurePlaces) {
	return func(t testing.TB, f *storage.MemFile, p structurePlaces) { poke(t, f, p.l2, 1<<63|uint64(at(p))) }
}

func structureCases() []structureCase {
	return []structureCase{
		{qcow2.MainHeader, "main-header", "qcow2_header", func(t testing.TB, f *storage.MemFile, p structurePlaces) {
			// The header's cluster counts as free, and a write needs a cluster.
			poke(t, f, 2*p.cs, 0x0000000100010001)
			poke(t, f, p.l2, 0)
		}},
		{qcow2.ActiveL1, "active-l1", "active L1 table", dataAt(func(p structurePlaces) int64 { return 3 * p.cs })},
		{qcow2.ActiveL2, "active-l2", "active L2 table", dataAt(func(p structurePlaces) int64 { return p.l2 })},
		{qcow2.RefcountBlock, "refcount-block", "refcount block", dataAt(func(p structurePlaces) int64 { return 2 * p.cs })},
		{qcow2.RefcountTable, "refcount-table", "refcount table", dataAt(func(p structurePlaces) int64 { return p.cs })},
		{qcow2.SnapshotTable, "snapshot-table", "snapshot table", dataAt(func(p structurePlaces) int64 { return p.snapshotTable })},
		{qcow2.InactiveL1, "inactive-l1", "inactive L1 table", dataAt(func(p structurePlaces) int64 { return p.snapshotL1 })},
		{qcow2.InactiveL2, "inactive-l2", "inactive L2 table", dataAt(func(p structurePlaces) int64 { return p.snapshotL2 })},
		{qcow2.BitmapDirectory, "bitmap-directory", "bitmap directory", dataAt(func(p structurePlaces) int64 { return p.bitmapDir })},
	}
}

// structuredImage makes an image with every structure, by hand where the library does not make it.
func structuredImage(t testing.TB) (*storage.MemFile, structurePlaces) {
	t.Helper()
	const cs = 4096
	f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: cs})
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	end := (size + cs - 1) / cs * cs
	p := structurePlaces{cs: cs, l2: 4 * cs, snapshotL1: end, snapshotL2: end + cs, snapshotTable: end + 2*cs}
	table, err := format.MarshalSnapshots([]format.Snapshot{{
		L1Offset: format.HostOff(p.snapshotL1), L1Size: 1, ID: "1", Name: "s", DiskSize: 256 << 10, ExtraSize: format.NewSnapshotExtraSize,
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(table, p.snapshotTable); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(end + 3*cs); err != nil {
		t.Fatal(err)
	}
	poke(t, f, p.snapshotL1, uint64(p.snapshotL2))
	var count [4]byte
	binary.BigEndian.PutUint32(count[:], 1)
	if _, err := f.WriteAt(count[:], format.OffSnapshots); err != nil {
		t.Fatal(err)
	}
	poke(t, f, format.OffSnapshots+4, uint64(p.snapshotTable))
	for c := end / cs; c < end/cs+3; c++ { // their refcounts, 16 bits each
		if _, err := f.WriteAt([]byte{0, 1}, 2*cs+2*c); err != nil {
			t.Fatal(err)
		}
	}
	p.bitmapDir = addDirectory(t, f)
	return f, p
}

// addDirectory gives the image a bitmap, which no write has to keep true, and returns where the directory lies.
func addDirectory(t testing.TB, f *storage.MemFile) int64 {
	t.Helper()
	ctx := context.Background()
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.AddBitmap(ctx, "b", qcow2.BitmapOptions{Disabled: true}); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 4096)
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	h, err := format.ParseHeader(head)
	if err != nil || h.Bitmaps == nil {
		t.Fatalf("header: %+v %v", h, err)
	}
	return int64(h.Bitmaps.DirectoryOffset)
}

// TestOverlapSwitches damages one image for each structure and wants the write that would destroy it refused, with QEMU's
// words, by its own switch alone and by no other; and stock QEMU's switches to say the same.
func TestOverlapSwitches(t *testing.T) {
	for _, c := range structureCases() {
		t.Run(c.name, func(t *testing.T) {
			f, p := structuredImage(t)
			c.damage(t, f, p)
			text := "Preventing invalid write on metadata (overlaps with " + c.inText + ")"
			if err := writeOver(t, f.Clone(), c.kind); err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("with its switch alone the write returns %v", err)
			}
			if err := writeOver(t, f.Clone(), qcow2.OverlapAll); err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("with all switches the write returns %v", err)
			}
			err := writeOver(t, f.Clone(), qcow2.OverlapAll&^c.kind)
			if c.kind == qcow2.MainHeader {
				// Nothing is ever allocated at offset 0, whatever is watched.
				if err == nil || strings.Contains(err.Error(), "overlaps") {
					t.Errorf("without its switch the write returns %v", err)
				}
			} else if err != nil {
				t.Errorf("without its switch the write returns %v", err)
			}
			caughtByQEMU(t, f, c, true)
			caughtByQEMU(t, f, c, false)
		})
	}
}

// writeOver opens an image with some structures watched and writes to its first cluster: in one, and, with the same outcome, in
// pieces.
func writeOver(t *testing.T, f *storage.MemFile, watch qcow2.Structures) error {
	t.Helper()
	ctx := context.Background()
	p := bytes.Repeat([]byte{0xee}, 4096)
	one := writeOverBy(t, f.Clone(), watch, func(im *qcow2.Image) error { return im.WriteAt(ctx, p, 0, 0) })
	pieces := writeOverBy(t, f, watch, func(im *qcow2.Image) error {
		return im.WriteVAt(ctx, [][]byte{p[:512], p[512:]}, 0, 0)
	})
	if fmt.Sprint(one) != fmt.Sprint(pieces) {
		t.Errorf("a write in pieces returns %v, the same in one %v", pieces, one)
	}
	return one
}

// writeOverBy opens an image with some structures watched and changes it. A refused write must have changed nothing but the
// header's corrupt bit.
func writeOverBy(t *testing.T, f *storage.MemFile, watch qcow2.Structures, write func(*qcow2.Image) error) error {
	t.Helper()
	ctx := context.Background()
	before := fileBytes(t, f)
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{Overlap: &watch})
	if err != nil {
		t.Fatal(err)
	}
	err = write(im)
	var bad *qcow2.CorruptError
	if err != nil && !errors.As(err, &bad) {
		t.Errorf("the write returns %v, which is no CorruptError", err)
	}
	_ = im.Close()
	if after := fileBytes(t, f); err != nil && !bytes.Equal(before[128:], after[128:len(before)]) {
		t.Error("a write that was refused has changed the file")
	}
	return err
}

// caughtByQEMU wants stock QEMU to refuse the same write, or not, with only this switch on, or only this one off.
func caughtByQEMU(t *testing.T, f *storage.MemFile, c structureCase, alone bool) {
	t.Helper()
	if _, err := exec.LookPath("qemu-io"); err != nil {
		return
	}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	saveFile(t, f, path)
	opts := "overlap-check.template=none,overlap-check." + c.name + "=on"
	if !alone {
		opts = "overlap-check.template=all,overlap-check." + c.name + "=off"
	}
	out, _ := exec.Command("qemu-io", "-c", fmt.Sprintf("open -o %s %s", opts, path), "-c", "write 0 4k").CombinedOutput()
	if caught := bytes.Contains(out, []byte("(overlaps with "+c.inText+")")); caught != alone {
		t.Errorf("stock with %s: %s", opts, out)
	}
}

// TestTablesInWrongPlaces lays tables over one another. The first change that would write to both is refused, and the file
// stays as it is.
func TestTablesInWrongPlaces(t *testing.T) {
	for _, c := range []struct {
		name, inText string
		damage       func(f *storage.MemFile, p structurePlaces)
	}{
		{"L2 table on the L1 table", "active L1 table", func(f *storage.MemFile, p structurePlaces) { poke(t, f, 3*p.cs, 1<<63|uint64(3*p.cs)) }},
		{"L2 table on the refcount table", "refcount table", func(f *storage.MemFile, p structurePlaces) { poke(t, f, 3*p.cs, 1<<63|uint64(p.cs)) }},
		{"L2 table on a refcount block", "refcount block", func(f *storage.MemFile, p structurePlaces) { poke(t, f, 3*p.cs, 1<<63|uint64(2*p.cs)) }},
		{"L2 table on the snapshot table", "snapshot table", func(f *storage.MemFile, p structurePlaces) {
			poke(t, f, 3*p.cs, 1<<63|uint64(p.snapshotTable))
		}},
		{"L2 table of a snapshot, said to be the disk's own", "inactive L2 table", func(f *storage.MemFile, p structurePlaces) {
			poke(t, f, 3*p.cs, 1<<63|uint64(p.snapshotL2))
		}},
		{"refcount block on the L1 table", "active L1 table", func(f *storage.MemFile, p structurePlaces) { poke(t, f, p.cs, uint64(3*p.cs)) }},
		{"refcount block on an L2 table", "refcount block", func(f *storage.MemFile, p structurePlaces) { poke(t, f, p.cs, uint64(p.l2)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := context.Background()
			f, p := structuredImage(t)
			c.damage(f, p)
			before := fileBytes(t, f)
			im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			// Guest offset 64 KiB has no cluster: the write needs a new one, and an entry for it.
			err = im.WriteAt(ctx, make([]byte, 100), 64<<10, 0)
			if text := "overlaps with " + c.inText; err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("the write returns %v, want %q", err, text)
			}
			_ = im.Close()
			if after := fileBytes(t, f); !bytes.Equal(before[128:], after[128:len(before)]) {
				t.Error("the file has changed")
			}
		})
	}
}

// TestDiscardOfMetadata has the guest discard a cluster whose entry names a structure: neither is its space given back nor
// does its count fall.
func TestDiscardOfMetadata(t *testing.T) {
	for name, at := range map[string]func(structurePlaces) int64{
		"L1 table":       func(p structurePlaces) int64 { return 3 * p.cs },
		"refcount table": func(p structurePlaces) int64 { return p.cs },
		"refcount block": func(p structurePlaces) int64 { return 2 * p.cs },
		"snapshot's L2":  func(p structurePlaces) int64 { return p.snapshotL2 },
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			f, p := structuredImage(t)
			poke(t, f, p.l2, 1<<63|uint64(at(p)))
			before := fileBytes(t, f)
			im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if err := im.Discard(ctx, 0, p.cs); err != nil {
				t.Fatal(err)
			}
			_ = im.Close()
			after := fileBytes(t, f)
			if c := at(p); c != 2*p.cs && !bytes.Equal(before[c:c+p.cs], after[c:c+p.cs]) {
				t.Error("the structure has changed")
			}
			count := 2*p.cs + at(p)/p.cs*2
			if !bytes.Equal(before[count:count+2], after[count:count+2]) {
				t.Error("the structure's refcount has changed")
			}
		})
	}
}
