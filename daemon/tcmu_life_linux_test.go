package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/tcmu"
)

// TestTCMUEncrypted opens encrypted images by secrets that the configuration names, and never holds.
func TestTCMUEncrypted(t *testing.T) {
	ctx := t.Context()
	name := filepath.Join(t.TempDir(), "e.qcow2")
	file, err := storage.CreateFile(name, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o := qcow2.CreateOptions{Size: 1 << 20, Encrypt: &qcow2.EncryptCreateOptions{
		Secret: []byte("right"), LUKS: luks.CreateOptions{Cost: luks.Cost{Iterations: 1000}},
	}}
	if err := errors.Join(qcow2.Create(ctx, file, o), file.Close()); err != nil {
		t.Fatal(err)
	}
	h := testHandler("qcow2")
	h.c.Secret = func(id string) ([]byte, error) {
		switch id {
		case "good":
			return []byte("right"), nil
		case "bad":
			return []byte("wrong"), nil
		}
		return nil, fmt.Errorf("%w '%s'", block.ErrNoSecret, id)
	}
	dev, err := h.Open(ctx, name+";encrypt.key-secret=good")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(dev.WriteAt(ctx, []byte("hidden"), 0, 0), dev.Close()); err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string]struct {
		errno syscall.Errno
		text  string
	}{
		name:                              {syscall.EINVAL, "encrypt.key-secret"},
		name + ";encrypt.key-secret=none": {syscall.ENOKEY, "No secret with id 'none'"},
		name + ";encrypt.key-secret=bad":  {syscall.EKEYREJECTED, ""},
		name + ";encrypt.key-secret=good;encrypt.format=aes": {syscall.EINVAL, ""},
	} {
		_, err := h.Open(ctx, config)
		if !errors.Is(err, want.errno) || !strings.Contains(err.Error(), want.text) {
			t.Errorf("%s: %v, want number %d and %q", config, err, want.errno, want.text)
		}
		// What CheckConfig says to root.
		if perr := probeDisk(ctx, map[string]tcmu.Handler{"qcow2": h}, "qcow2/"+config); perr == nil || perr.Error() != err.Error() {
			t.Errorf("CheckConfig of %s: %v", config, perr)
		}
	}
	if err := probeDisk(ctx, map[string]tcmu.Handler{"qcow2": h}, "qcow2/"+name+";encrypt.key-secret=good"); err != nil {
		t.Errorf("CheckConfig: %v", err)
	}
	if _, err := testHandler("qcow2").Open(ctx, name+";encrypt.key-secret=good"); !errors.Is(err, syscall.ENOKEY) {
		t.Errorf("a server without secrets: %v", err)
	}
	sound(t, name)
}

// TestTCMURaw serves raw disks, which grow and keep what they hold.
func TestTCMURaw(t *testing.T) {
	ctx := t.Context()
	name := rawImage(t)
	h := testHandler(block.FormatRaw)
	dev, err := h.Open(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(ctx, []byte("end"), 1<<20-3, 0); err != nil {
		t.Fatal(err)
	}
	if err := h.Resize(ctx, dev, 2<<20); err != nil || dev.Size() != 2<<20 {
		t.Errorf("growing: %v, %d bytes", err, dev.Size())
	}
	if err := h.Resize(ctx, dev, 1<<20); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("shrinking: %v", err)
	}
	p := make([]byte, 6)
	if err := dev.ReadAt(ctx, p, 1<<20-3); err != nil || string(p) != "end\x00\x00\x00" {
		t.Errorf("%q %v", p, err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(name); err != nil || st.Size() != 2<<20 {
		t.Errorf("the file: %v %v", st, err)
	}
	if dev, err = h.Open(ctx, name+";read-only"); err != nil {
		t.Fatal(err)
	}
	if err := h.Resize(ctx, dev, 4<<20); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("a disk that is only read: %v", err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestServedOnce has one image wanted by every kind of server. Only the first gets it.
func TestServedOnce(t *testing.T) {
	ctx := t.Context()
	name, other := newImage(t, 1<<20), newImage(t, 1<<20)
	open := block.OpenOptions{Format: "qcow2"}
	s := manage(t, Config{Exports: []Export{{Name: "a", Image: name, Open: open}}, Template: Export{Open: open}}, ControlConfig{})
	h := testHandler("qcow2")
	if _, err := h.Open(ctx, name); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("tcmu beside serve: %v", err)
	}
	if err := probeDisk(ctx, map[string]tcmu.Handler{"qcow": h}, "qcow/"+name); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("CheckConfig of an image that is served: %v", err)
	}
	s.refuse(409, "served already", "POST", "/v1/exports", nil, ExportRequest{Name: "b", Image: name})
	if _, err := Open(ctx, Config{Exports: []Export{{Image: name, Open: open}}, Addresses: []Address{{TCP: "127.0.0.1:0"}}}); err == nil {
		t.Error("serve beside serve")
	}

	// The other way round.
	dev, err := h.Open(ctx, other)
	if err != nil {
		t.Fatal(err)
	}
	var lock *storage.LockError
	if _, err := Open(ctx, Config{Exports: []Export{{Image: other, Open: open}}, Addresses: []Address{{TCP: "127.0.0.1:0"}}}); !errors.As(err, &lock) {
		t.Errorf("serve beside tcmu: %v", err)
	}
	s.refuse(409, "lock", "POST", "/v1/exports", nil, ExportRequest{Name: "b", Image: other})
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	s.must("POST", "/v1/exports", nil, ExportRequest{Name: "b", Image: other}, nil)
}

// TestBusTellsRoot: who may read every image is told by CheckConfig why one cannot be opened.
func TestBusTellsRoot(t *testing.T) {
	address := privateBus(t)
	b, err := OpenTCMUBus(address, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	handlers := map[string]tcmu.Handler{"qcow2": testHandler("qcow2")}
	b.probe = func(config string) error { return probeDisk(context.Background(), handlers, config) }
	if err := b.Serve(); err != nil {
		t.Fatal(err)
	}
	good := newImage(t, 1<<20)
	for config, want := range map[string]string{
		"qcow2/" + good:           `boolean true string "success"`,
		"qcow2/" + good + ".gone": "no such file",
		"qcow2/" + rawImage(t):    "boolean false",
		"qcow2/" + good + ";x=1":  "there is no option",
	} {
		if got := send(t, address, handlerPath("qcow2"), busName+".CheckConfig", "string:"+config); !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %q", config, got, want)
		}
	}
	if b.privileged(":nobody.at.all") {
		t.Error("nobody at all is privileged")
	}
}

// TestTCMUDiskStatus is what the control API makes of devices.
func TestTCMUDiskStatus(t *testing.T) {
	dev, err := testHandler("qcow2").Open(t.Context(), newImage(t, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	service := &tcmuService{}
	d := service.disk(tcmu.Status{Device: tcmu.Device{HBA: "3", Name: "disk0", Config: "qcow2//a.qcow2;snapshot=s"}, Disk: dev})
	d.fill("")
	if s := d.status; s.Name != "disk0" || s.HBA != "user_3" || s.Image != "/a.qcow2" || s.Snapshot != "s" || s.State != StateServing || s.Size != 1<<20 {
		t.Errorf("%+v", s)
	}
	if want := []string{"user_3/disk0", "qcow2//a.qcow2;snapshot=s", "/a.qcow2"}; fmt.Sprint(d.others) != fmt.Sprint(want) {
		t.Errorf("other names: %q", d.others)
	}
	if err := d.apply(t.Context(), nil); statusOf(err) != 409 {
		t.Errorf("apply: %v", err)
	}
	for _, r := range []ResizeRequest{{Size: 512}, {Size: 2 << 20, Preallocation: "full"}} {
		if err := d.resize(t.Context(), r); err == nil {
			t.Errorf("resized to %+v", r)
		}
	}
	failed := service.disk(tcmu.Status{Device: tcmu.Device{Name: "bad", Config: "qcow2//b"}, Err: syscall.ENOENT})
	failed.fill("")
	if s := failed.status; s.State != StateFailed || !strings.Contains(s.Error, "no such file") {
		t.Errorf("%+v", s)
	}
	if _, err := failed.createSnapshot(t.Context(), NameRequest{"s"}); statusOf(err) != 409 || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a snapshot of a disk that is not served: %v", err)
	}
	if err := service.addExport(t.Context(), ExportRequest{}); !strings.Contains(err.Error(), "targetcli") {
		t.Errorf("export add: %v", err)
	}
	if err := service.removeExport(t.Context(), "disk0", true); !strings.Contains(err.Error(), "targetcli") {
		t.Errorf("export remove: %v", err)
	}
}
