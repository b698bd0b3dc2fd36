package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

func TestParseDisk(t *testing.T) {
	d, err := parseDisk("qcow2", "/images/a, b:c.qcow2;l2-cache-size=64M;read-only;snapshot=before lunch;tcmur_cmd_time_out=30")
	if err != nil || d.path != "/images/a, b:c.qcow2" || !d.readOnly || d.snapshot != "before lunch" || len(d.options) != 1 ||
		d.options["l2-cache-size"] != "64M" {
		t.Errorf("%+v %v", d, err)
	}
	for _, bad := range []string{
		"", "a.qcow2", ";read-only", "/a;", "/a;read-only=1", "/a;snapshot", "/a;snapshot=", "/a;cache-size", "/a;=1",
		"/a;cache-size=1M;cache-size=1M", "/a;file.filename=/etc/shadow", "/a;backing.driver=raw",
	} {
		if _, err := parseDisk("qcow2", bad); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for _, bad := range []string{"/a;snapshot=x", "/a;cache-size=1M"} {
		if _, err := parseDisk(block.FormatRaw, bad); err == nil {
			t.Errorf("raw disk with %q", bad)
		}
	}
	if err := CheckTCMUConfig("qcow//" + strings.Repeat("a", 250)); err == nil {
		t.Error("a configuration longer than the kernel takes")
	}
}

func testHandler(format string) *tcmuHandler {
	return &tcmuHandler{format: format, c: TCMUConfig{Policy: block.BelowImageFolder(), Log: slog.New(slog.DiscardHandler)},
		memory: block.NewCacheBudget(1 << 20)}
}

// TestTCMUHandler opens images as the kernel's notices ask for, and wants the numbers that tell an administrator why not.
func TestTCMUHandler(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	name := filepath.Join(dir, "a.qcow2")
	file, err := storage.CreateFile(name, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(qcow2.Create(ctx, file, qcow2.CreateOptions{Size: 1 << 20}), file.Close()); err != nil {
		t.Fatal(err)
	}
	made, err := block.Open(ctx, name, block.OpenOptions{Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := made.(*qcow2.Image).CreateSnapshot(ctx, "empty"); err != nil {
		t.Fatal(err)
	}
	if err := made.Close(); err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(dir, "plain")
	if err := os.WriteFile(raw, make([]byte, 65536), 0o600); err != nil {
		t.Fatal(err)
	}
	h := testHandler("qcow2")
	dev, err := h.Open(ctx, name+";l2-cache-size=64K")
	if err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string]syscall.Errno{
		name:                     syscall.EBUSY, // this very process has it
		raw:                      syscall.EINVAL,
		dir:                      0,
		filepath.Join(dir, "no"): syscall.ENOENT,
	} {
		_, err := h.Open(ctx, config)
		var errno syscall.Errno
		if !errors.As(err, &errno) || want != 0 && errno != want {
			t.Errorf("%s: %v, want number %d", config, err, want)
		}
	}
	if err := h.Resize(ctx, dev, 1<<19); !errors.Is(err, syscall.EINVAL) || dev.Size() != 1<<20 {
		t.Errorf("shrinking: %v, size %d", err, dev.Size())
	}
	if err := h.Resize(ctx, dev, 2<<20); err != nil || dev.Size() != 2<<20 {
		t.Errorf("growing: %v, size %d", err, dev.Size())
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	snap, err := h.Open(ctx, name+";snapshot=empty")
	if err != nil {
		t.Fatal(err)
	}
	if !snap.Info().ReadOnly || snap.Size() != 1<<20 {
		t.Errorf("snapshot: %+v, size %d", snap.Info(), snap.Size())
	}
	if err := h.Resize(ctx, snap, 4<<20); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("resizing a snapshot: %v", err)
	}
	blocktest.RunReadOnly(t, snap, make([]byte, 1<<20))
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Open(ctx, name+";l2-cache-size=much"); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a size that is none: %v", err)
	}
	if _, err := h.Open(ctx, name+";snapshot=none"); err == nil {
		t.Error("a snapshot that is not there")
	}
	dev, err = h.Open(ctx, name) // nothing that failed has kept a lock
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if dev, err = testHandler(block.FormatRaw).Open(ctx, raw); err != nil || dev.Size() != 65536 {
		t.Fatalf("raw: %v", err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}
