package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// dirtyBit reports whether the dirty bit is set in the file.
func dirtyBit(t *testing.T, f storage.File) bool {
	t.Helper()
	b := make([]byte, 8)
	if _, err := f.ReadAt(b, 72); err != nil {
		t.Fatal(err)
	}
	return b[7]&1 != 0
}

// TestLazyRefcounts follows the dirty bit through the life of an image that postpones its counts.
func TestLazyRefcounts(t *testing.T) {
	ctx := context.Background()
	for _, from := range []string{"header", "option"} {
		t.Run(from, func(t *testing.T) {
			f := storage.NewMemFile("lazy.qcow2")
			if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 64 << 20, LazyRefcounts: from == "header"}); err != nil {
				t.Fatal(err)
			}
			o := qcow2.Options{LazyRefcounts: qcow2.SwitchOn}
			if from == "header" {
				o.LazyRefcounts = qcow2.SwitchDefault
			}
			im, err := qcow2.Open(ctx, keepOpen{f}, o)
			if err != nil {
				t.Fatal(err)
			}
			if dirtyBit(t, f) {
				t.Error("dirty before anything was written")
			}
			data := bytes.Repeat([]byte("lazy"), 300<<10)
			if err := im.WriteAt(ctx, data, 1<<20, 0); err != nil {
				t.Fatal(err)
			}
			if !dirtyBit(t, f) {
				t.Error("counts are postponed and the image is not marked dirty")
			}
			if err := im.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			// The machine stops here: what is in the file now is what the next open finds.
			crashed := f.Clone()
			if rep, err := qcow2.CheckFile(ctx, crashed, qcow2.CheckOptions{}); err != nil || rep.Corruptions == 0 {
				t.Errorf("the counts were written although they may be postponed: %+v %v", rep, err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if dirtyBit(t, f) {
				t.Error("dirty after a clean close")
			}
			checkFile(t, f)
			qemuCheckFile(t, f, nil)
			reopenCrashed(t, crashed, o, data)
		})
	}
}

func reopenCrashed(t *testing.T, f *storage.MemFile, o qcow2.Options, want []byte) {
	t.Helper()
	ctx := context.Background()
	ro, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, ro); !bytes.Equal(got[1<<20:][:len(want)], want) {
		t.Error("data not readable before the repair")
	}
	if err := ro.Close(); err != nil {
		t.Fatal(err)
	}
	if !dirtyBit(t, f) {
		t.Error("a reader cleared the dirty bit")
	}
	var told *qcow2.RepairReport
	o.OnRepair = func(r *qcow2.RepairReport) { told = r }
	im, err := qcow2.Open(ctx, keepOpen{f}, o)
	if err != nil {
		t.Fatal(err)
	}
	if told == nil || told.CorruptionsFixed == 0 {
		t.Errorf("repair report: %+v", told)
	}
	if dirtyBit(t, f) {
		t.Error("dirty after the repair")
	}
	if err := im.WriteAt(ctx, []byte("after the crash"), 40<<20, 0); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, im); !bytes.Equal(got[1<<20:][:len(want)], want) {
		t.Error("data lost by the repair or the write after it")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, f)
	qemuCheckFile(t, f, nil)
}

// TestStockRepairsOurs has qemu-io open what our crash left, and see all of it.
func TestStockRepairsOurs(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("qemu-io is not installed")
	}
	ctx := context.Background()
	f := storage.NewMemFile("lazy.qcow2")
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 8 << 20, LazyRefcounts: true}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(ctx, bytes.Repeat([]byte{0x11}, 1<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "crashed.qcow2")
	saveFile(t, f.Clone(), path)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("qemu-img", "info", path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "cleanly shut down: no") {
		t.Errorf("info: %v %s", err, out)
	}
	if out, err := exec.Command("qemu-io", "-c", "read -P 0x11 0 1M", "-c", "write -P 7 2M 64k", path).CombinedOutput(); err != nil ||
		strings.Contains(string(out), "failed") {
		t.Errorf("qemu-io: %v %s", err, out)
	}
	if out, err := exec.Command("qemu-img", "check", path).CombinedOutput(); err != nil {
		t.Errorf("check: %v %s", err, out)
	}
}

// TestHalfDoneStaysDirty has the header fail to switch while a snapshot is deleted: nobody may call the image clean but a
// repair.
func TestHalfDoneStaysDirty(t *testing.T) {
	ctx := context.Background()
	mem := storage.NewMemFile("half.qcow2")
	if err := qcow2.Create(ctx, mem, qcow2.CreateOptions{Size: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	fault := storage.NewFaultFile(keepOpen{mem})
	im, err := qcow2.Open(ctx, fault, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{9}, 1<<20)
	if err := im.WriteAt(ctx, data, 0, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := im.CreateSnapshot(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	fault.SetHook(func(c storage.Call) error {
		if c.Kind == storage.OpWrite && c.Off == 60 {
			return broken
		}
		return nil
	})
	if err := im.DeleteSnapshot(ctx, "s"); !errors.Is(err, broken) {
		t.Fatalf("delete: %v", err)
	}
	fault.SetHook(nil)
	if got := readAll(t, im); !bytes.Equal(got[:len(data)], data) {
		t.Error("content changed")
	}
	if err := im.WriteAt(ctx, []byte("and on"), 12345, 0); err != nil {
		t.Fatal(err)
	}
	copy(data[12345:], "and on")
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if !dirtyBit(t, mem) {
		t.Error("an operation stopped half way, and the image was closed as clean")
	}
	im, err = qcow2.Open(ctx, keepOpen{mem}, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, im); !bytes.Equal(got[:len(data)], data) {
		t.Error("content changed by the repair")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, mem)
	qemuCheckFile(t, mem, nil)
}
