package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// modelSnapshot is what the model test remembers of a snapshot.
type modelSnapshot struct {
	name string
	disk []byte
}

// snapshotStep makes a random change of the snapshots, or looks at them.
func (h *harness) snapshotStep() {
	h.t.Helper()
	ctx := context.Background()
	k := -1
	if len(h.snaps) > 0 {
		k = h.r.IntN(len(h.snaps))
	}
	switch op := h.r.IntN(10); {
	case op < 4 || k < 0:
		name := fmt.Sprintf("snap-%d", h.r.Uint32())
		s, err := h.im.CreateSnapshot(ctx, name)
		if errors.Is(err, qcow2.ErrRefcountOverflow) && h.v.create.RefcountBits < 4 {
			return
		}
		h.must("create snapshot", err)
		if s.Name != name || s.DiskSize != h.im.Size() {
			h.t.Fatalf("%v: created %+v", h.v, s)
		}
		h.snaps = append(h.snaps, modelSnapshot{name, bytes.Clone(h.model)})
	case op < 6:
		err := h.im.ApplySnapshot(ctx, h.snaps[k].name)
		if errors.Is(err, qcow2.ErrRefcountOverflow) && h.v.create.RefcountBits < 4 {
			return
		}
		h.must("apply snapshot", err)
		h.model, h.state = bytes.Clone(h.snaps[k].disk), nil
	case op < 8:
		h.must("delete snapshot", h.im.DeleteSnapshot(ctx, h.snaps[k].name))
		h.snaps = append(h.snaps[:k], h.snaps[k+1:]...)
	case op < 9:
		name := fmt.Sprintf("renamed-%d", h.r.Uint32())
		h.must("rename snapshot", h.im.RenameSnapshot(ctx, h.snaps[k].name, name))
		h.snaps[k].name = name
	default:
		h.compareSnapshots()
	}
}

// compareSnapshots opens every snapshot and reads all of it.
func (h *harness) compareSnapshots() {
	h.t.Helper()
	list, err := h.im.Snapshots()
	h.must("list snapshots", err)
	if len(list) != len(h.snaps) {
		h.t.Fatalf("%v: %d snapshots, want %d", h.v, len(list), len(h.snaps))
	}
	for i, want := range h.snaps {
		if list[i].Name != want.name {
			h.t.Fatalf("%v: snapshot %d is %q, want %q", h.v, i, list[i].Name, want.name)
		}
		view, err := h.im.OpenSnapshot(context.Background(), want.name)
		h.must("open snapshot", err)
		if got := readAll(h.t, view); !bytes.Equal(got, want.disk) {
			h.t.Fatalf("%v: content of snapshot %q differs", h.v, want.name)
		}
		if err := h.im.DeleteSnapshot(context.Background(), want.name); !errors.Is(err, qcow2.ErrSnapshotInUse) {
			h.t.Fatalf("%v: deleting an open snapshot: %v", h.v, err)
		}
		h.must("close snapshot", view.Close())
	}
}

func readAll(t testing.TB, dev block.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if err := dev.ReadAt(context.Background(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSnapshotOverflow fails to create a snapshot for want of bits, which must leave nothing behind.
func TestSnapshotOverflow(t *testing.T) {
	ctx := context.Background()
	for _, v := range []struct{ bits, fits int }{{1, 0}, {2, 2}} {
		f := storage.NewMemFile("overflow.qcow2")
		if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096, RefcountBits: v.bits}); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := im.WriteAt(ctx, bytes.Repeat([]byte{7}, 300<<10), 12345, 0); err != nil {
			t.Fatal(err)
		}
		for i := range v.fits {
			if _, err := im.CreateSnapshot(ctx, fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
		size, _ := f.Size()
		if _, err := im.CreateSnapshot(ctx, "one too many"); !errors.Is(err, qcow2.ErrRefcountOverflow) {
			t.Fatalf("%d bits: %v", v.bits, err)
		}
		if list, err := im.Snapshots(); err != nil || len(list) != v.fits {
			t.Fatalf("%d bits: %v %v", v.bits, list, err)
		}
		if now, _ := f.Size(); now > size+4*4096 {
			t.Errorf("%d bits: file grew from %d to %d", v.bits, size, now)
		}
		if err := im.WriteAt(ctx, []byte("still here"), 54321, 0); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkFile(t, f)
		if out := qemuCheckFile(t, f, nil); out != "" {
			if text, err := exec.Command("qemu-img", "info", out).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
		}
	}
}

// TestManySnapshots creates, applies and deletes a thousand.
func TestManySnapshots(t *testing.T) {
	ctx := context.Background()
	f := storage.NewMemFile("many.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	n := 1000
	if testing.Short() {
		n = 100
	}
	for i := range n {
		if err := im.WriteAt(ctx, fmt.Appendf(nil, "version %4d", i), 4096, 0); err != nil {
			t.Fatal(err)
		}
		if s, err := im.CreateSnapshot(ctx, fmt.Sprintf("s%d", i)); err != nil || s.ID != fmt.Sprint(i+1) {
			t.Fatalf("%+v %v", s, err)
		}
	}
	for _, i := range []int{0, n / 2, n - 1} {
		if err := im.ApplySnapshot(ctx, fmt.Sprintf("s%d", i)); err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, im)[4096:][:12]; string(got) != fmt.Sprintf("version %4d", i) {
			t.Fatalf("snapshot %d holds %q", i, got)
		}
	}
	for i := range n {
		if err := im.DeleteSnapshot(ctx, fmt.Sprint(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, f)
	qemuCheckFile(t, f, nil)
}
