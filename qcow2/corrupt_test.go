package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// corruptBit reports whether the header on the disk says that the image is corrupt.
func corruptBit(t testing.TB, f *storage.MemFile) bool { return fileBytes(t, f)[79]&2 != 0 }

// told counts what OnCorrupt hears.
type told struct{ errs []error }

func (l *told) options() qcow2.Options {
	return qcow2.Options{OnCorrupt: func(err error) { l.errs = append(l.errs, err) }}
}

// TestCorruptBit has changes of all kinds meet impossible metadata. The first sets the bit before it returns, one event is
// told, all changes fail from then on while reads go on, what was acknowledged before is kept, and nothing else of the
// file changes afterwards.
func TestCorruptBit(t *testing.T) {
	const cs = 4096
	ctx := context.Background()
	write := func(im *qcow2.Image) error { return im.WriteAt(ctx, make([]byte, 4096), 0, 0) }
	for _, c := range []struct {
		name    string
		version int
		damage  uint64 // what the entry of the first cluster becomes
		change  func(*qcow2.Image) error
	}{
		{"write over the L1 table", 3, 1<<63 | 3*cs, write},
		{"write to nowhere", 3, 1<<63 | 5*cs | 512, write},
		{"zero nowhere", 3, 1<<63 | 5*cs | 512, func(im *qcow2.Image) error { return im.WriteZeroes(ctx, 0, cs, 0) }},
		{"discard the L1 table", 3, 1<<63 | 3*cs, func(im *qcow2.Image) error {
			return errors.Join(im.Discard(ctx, 0, cs), im.Flush(ctx))
		}},
		{"free what is free", 3, 1<<63 | 100*cs, func(im *qcow2.Image) error {
			return errors.Join(im.Discard(ctx, 0, cs), im.Flush(ctx))
		}},
		{"version 2", 2, 1<<63 | 3*cs, write},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: cs, Version: c.version})
			poke(t, f, 4*cs, c.damage)
			var l told
			im, err := qcow2.Open(ctx, keepOpen{f}, l.options())
			if err != nil {
				t.Fatal(err)
			}
			kept := bytes.Repeat([]byte("kept"), 1000)
			if err := im.WriteAt(ctx, kept, 128<<10, 0); err != nil {
				t.Fatal(err)
			}
			var bad *qcow2.CorruptError
			// What frees meets the fault only after it was acknowledged.
			if err := c.change(im); err != nil && !errors.As(err, &bad) || err == nil && !strings.Contains(c.name, "free") && !strings.Contains(c.name, "discard") {
				t.Fatalf("the change returns %v", err)
			}
			if got := corruptBit(t, f); got != (c.version == 3) {
				t.Fatalf("the corrupt bit is %v", got)
			}
			for _, err := range []error{write(im), im.WriteZeroes(ctx, 8192, 4096, 0), im.Discard(ctx, 64<<10, 65536), im.TryWriteAt(kept, 128<<10)} {
				var marked *qcow2.MarkedCorruptError
				if !errors.As(err, &marked) || !errors.As(err, &bad) || errors.Is(err, block.ErrReadOnly) {
					t.Errorf("a later change returns %v", err)
				}
			}
			if !im.Info().ReadOnly {
				t.Error("the device does not say that it is only read now")
			}
			if err := im.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			before := fileBytes(t, f)
			if err := im.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(kept))
			if err := im.ReadAt(ctx, got, 128<<10); err != nil || !bytes.Equal(got, kept) {
				t.Errorf("reading goes on with %v", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if len(l.errs) != 1 || !errors.As(l.errs[0], &bad) {
				t.Errorf("told of %v, want one event", l.errs)
			}
			if !bytes.Equal(before, fileBytes(t, f)) {
				t.Error("a flush and a close without a change have changed the file")
			}
			if _, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{}); c.version == 3 && !isReadOnly(err) {
				t.Errorf("opening it for writing returns %v", err)
			}
			ro, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := ro.ReadAt(ctx, got, 128<<10); err != nil || !bytes.Equal(got, kept) {
				t.Errorf("what was acknowledged before reads with %v", err)
			}
			if err := ro.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func isReadOnly(err error) bool {
	var ro *qcow2.ReadOnlyError
	return errors.As(err, &ro)
}

// TestCorruptImageFreesNothing: what was given up before the fault is not freed after it, since what else is wrong is not
// known; its counts stay.
func TestCorruptImageFreesNothing(t *testing.T) {
	ctx := context.Background()
	f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
	poke(t, f, 4*4096, 1<<63|3*4096) // guest cluster 0 on the L1 table
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	counts := func() []byte { return fileBytes(t, f)[2*4096 : 3*4096] }
	before := bytes.Clone(counts())
	if err := im.Discard(ctx, 16384, 8192); err != nil { // data clusters 4 and 5
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, make([]byte, 10), 0, 0); err == nil {
		t.Fatal("a write over the L1 table succeeds")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, counts()) {
		t.Error("counts have fallen")
	}
}

// TestHostErrorsAreNoCorruption fails every kind of call below a write: the image is not marked, and works again when
// the host does.
func TestHostErrorsAreNoCorruption(t *testing.T) {
	ctx := context.Background()
	for _, kind := range []storage.OpKind{storage.OpRead, storage.OpWrite, storage.OpSync} {
		for skip := range 4 {
			f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
			faulty := storage.NewFaultFile(keepOpen{f})
			var l told
			im, err := qcow2.Open(ctx, faulty, l.options())
			if err != nil {
				t.Fatal(err)
			}
			faulty.Inject(storage.Fault{Kind: kind, Skip: skip, Times: -1})
			_ = im.WriteAt(ctx, make([]byte, 5000), 100<<10, 0)
			_ = im.Discard(ctx, 0, 8192)
			_ = im.Flush(ctx)
			faulty.Clear()
			if err := im.WriteAt(ctx, make([]byte, 5000), 100<<10, 0); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if corruptBit(t, f) || len(l.errs) > 0 {
				t.Fatalf("%v %d: marked corrupt: %v", kind, skip, l.errs)
			}
			checkFile(t, f)
		}
	}
}

// TestCorruptBitThatCannotBeWritten: the image is only read all the same, and the bit follows with the next flush.
func TestCorruptBitThatCannotBeWritten(t *testing.T) {
	ctx := context.Background()
	for _, kind := range []storage.OpKind{storage.OpWrite, storage.OpSync} {
		f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
		poke(t, f, 4*4096, 1<<63|3*4096)
		faulty := storage.NewFaultFile(keepOpen{f})
		var l told
		im, err := qcow2.Open(ctx, faulty, l.options())
		if err != nil {
			t.Fatal(err)
		}
		faulty.Inject(storage.Fault{Kind: kind, Off: 72, Len: 8})
		if err := im.WriteAt(ctx, make([]byte, 10), 0, 0); err == nil {
			t.Fatal("a write over the L1 table succeeds")
		}
		if err := im.WriteAt(ctx, make([]byte, 10), 64<<10, 0); err == nil || len(l.errs) != 1 {
			t.Errorf("a later write returns %v; told of %v", err, l.errs)
		}
		if err := im.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if !corruptBit(t, f) {
			t.Errorf("%v: the flush did not set the bit", kind)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCorruptBackingDoesNotMarkTheOverlay copies on write from an image whose metadata is impossible: the write fails, and
// the image above is as sound as before.
func TestCorruptBackingDoesNotMarkTheOverlay(t *testing.T) {
	ctx := context.Background()
	below := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
	poke(t, below, 4*4096, 1<<63|5*4096|512)
	base, err := qcow2.Open(ctx, keepOpen{below}, qcow2.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	f := storage.NewMemFile("overlay.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 256 << 10, BackingFile: "base.qcow2", BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	var l told
	o := l.options()
	o.Backing = base
	im, err := qcow2.Open(ctx, keepOpen{f}, o)
	if err != nil {
		t.Fatal(err)
	}
	var bad *qcow2.CorruptError
	if err := im.WriteAt(ctx, make([]byte, 10), 5000, 0); !errors.As(err, &bad) {
		t.Fatalf("the write returns %v", err)
	}
	if corruptBit(t, f) || len(l.errs) > 0 {
		t.Error("the overlay is marked corrupt")
	}
	if err := im.WriteAt(ctx, make([]byte, 65536), 128<<10, 0); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCorruptKeepsDirty: with postponed refcounts the dirty bit outlives the close of an image that was marked corrupt, and
// so do the counts that were raised.
func TestCorruptKeepsDirty(t *testing.T) {
	ctx := context.Background()
	f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
	poke(t, f, 4*4096, 1<<63|3*4096)
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{LazyRefcounts: qcow2.SwitchOn})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, make([]byte, 8192), 100<<10, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, make([]byte, 10), 0, 0); err == nil {
		t.Fatal("a write over the L1 table succeeds")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	hdr := fileBytes(t, f)
	if want := byte(format.IncompatDirty | format.IncompatCorrupt); hdr[79] != want {
		t.Errorf("the features are %#x, want %#x", hdr[79], want)
	}
}

// TestCorruptSnapshotOperation: an operation on the whole image that meets impossible metadata marks it, too.
func TestCorruptSnapshotOperation(t *testing.T) {
	ctx := context.Background()
	f := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
	poke(t, f, 4*4096, 1<<63|5*4096|512)
	var l told
	im, err := qcow2.Open(ctx, keepOpen{f}, l.options())
	if err != nil {
		t.Fatal(err)
	}
	var bad *qcow2.CorruptError
	if _, err := im.CreateSnapshot(ctx, "s"); !errors.As(err, &bad) {
		t.Fatalf("the snapshot returns %v", err)
	}
	if !corruptBit(t, f) || len(l.errs) != 1 {
		t.Errorf("not marked; told of %v", l.errs)
	}
	if err := im.WriteAt(ctx, make([]byte, 10), 64<<10, 0); !errors.As(err, &bad) {
		t.Errorf("a later write returns %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}
