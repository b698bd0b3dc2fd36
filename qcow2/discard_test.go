package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// discarded makes an image of 64 clusters of data, discards the last 60 of them and closes it. It returns the file, and how
// many holes were punched.
func discarded(t *testing.T, o qcow2.Options, look func(*qcow2.Image)) (*storage.MemFile, int) {
	t.Helper()
	ctx := context.Background()
	mem := storage.NewMemFile("discard.qcow2")
	if err := qcow2.Create(ctx, mem, qcow2.CreateOptions{Size: 64 << 16}); err != nil {
		t.Fatal(err)
	}
	file := storage.NewFaultFile(keepOpen{mem})
	im, err := qcow2.Open(ctx, file, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		im.WriteAt(ctx, bytes.Repeat([]byte{7}, 64<<16), 0, 0), im.Flush(ctx), im.Discard(ctx, 4<<16, 60<<16), im.Flush(ctx),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if look != nil {
		look(im)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, mem)
	return mem, file.Calls(storage.OpPunch)
}

func TestPassDiscardRequest(t *testing.T) {
	if _, n := discarded(t, qcow2.Options{}, nil); n == 0 {
		t.Error("what the guest discards is kept on the host by default")
	}
	if _, n := discarded(t, qcow2.Options{PassDiscardRequest: qcow2.SwitchOff}, nil); n != 0 {
		t.Errorf("%d holes are punched though discards are not to be passed on", n)
	}
}

func TestDiscardNoUnref(t *testing.T) {
	ctx := context.Background()
	host := func(im *qcow2.Image, off int64) (x block.Extent) {
		err := im.Extents(ctx, off, 1<<16, func(e block.Extent) bool { x = e; return false })
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for _, pass := range []qcow2.Switch{qcow2.SwitchOn, qcow2.SwitchOff} {
		var kept block.Extent
		mem, n := discarded(t, qcow2.Options{DiscardNoUnref: true, PassDiscardRequest: pass}, func(im *qcow2.Image) {
			kept = host(im, 5<<16)
			if !kept.HasHost || !kept.Zero || kept.Data {
				t.Errorf("the discarded cluster is %+v, want zeroes with a place on the host", kept)
			}
			if err := im.WriteAt(ctx, []byte("again"), 5<<16, 0); err != nil {
				t.Fatal(err)
			}
			if x := host(im, 5<<16); x.Host != kept.Host || !x.Data {
				t.Errorf("written again the cluster is %+v, want data at %#x", x, kept.Host)
			}
		})
		if (n > 0) != (pass == qcow2.SwitchOn) {
			t.Errorf("pass-discard-request=%v: %d holes", pass, n)
		}
		if size, _ := mem.Size(); size < 64<<16 {
			t.Errorf("the file has %d bytes, and 64 clusters of data were to stay mapped", size)
		}
	}
}

func TestCloseCutsFreeEnd(t *testing.T) {
	mem, _ := discarded(t, qcow2.Options{}, nil)
	size, err := mem.Size()
	if err != nil || size > 12<<16 {
		t.Errorf("the file has %d bytes (%v) and 4 clusters of data", size, err)
	}
	im, err := qcow2.Open(context.Background(), keepOpen{mem}, qcow2.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	got := make([]byte, 64<<16)
	if err := im.ReadAt(context.Background(), got, 0); err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Repeat([]byte{7}, 4<<16), make([]byte, 60<<16)...)
	if !bytes.Equal(got, want) {
		t.Error("content differs after the file was cut")
	}
	qemuCheckFile(t, mem, nil)
}

// TestNoCompression: what cannot hold compressed data says so, and writes nothing.
func TestNoCompression(t *testing.T) {
	ctx := context.Background()
	o := qcow2.CreateOptions{Size: 1 << 20, DataFile: "x.data", DataStorage: storage.NewMemFile("x.data")}
	mem := storage.NewMemFile("x.qcow2")
	if err := qcow2.Create(ctx, mem, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, mem, qcow2.Options{DataFile: o.DataStorage})
	if err != nil {
		t.Fatal(err)
	}
	err = im.WriteCompressed(ctx, make([]byte, 1<<16), 0)
	mustBe(t, err, block.ErrNoCompression)
	mustBe(t, err, qcow2.ErrDataFile)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	plain := storage.NewMemFile("y.qcow2")
	if err := qcow2.Create(ctx, plain, qcow2.CreateOptions{Size: 1<<20 + 512}); err != nil {
		t.Fatal(err)
	}
	im, err = qcow2.Open(ctx, plain, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	mustBe(t, im.WriteCompressed(ctx, make([]byte, 1<<16), 512), qcow2.ErrNotWholeClusters)
	mustBe(t, im.WriteCompressed(ctx, make([]byte, 512), 0), qcow2.ErrNotWholeClusters)
	mustBe(t, im.WriteCompressed(ctx, make([]byte, 1024), 1<<20), block.ErrOutOfRange)
	mustBe(t, im.WriteCompressed(ctx, bytes.Repeat([]byte{1}, 512), 1<<20), nil)
}

func mustBe(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}
