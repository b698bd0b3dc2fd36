package fault

import (
	"context"
	"errors"
	"testing"

	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestKeySlotChangeFails fails every call of changing the key slots of an image: the first key opens it still, it is
// sound, and the next change works.
func TestKeySlotChangeFails(t *testing.T) {
	ctx := context.Background()
	cheap := luks.Cost{Iterations: 1000}
	var d *explore.Disk
	for _, s := range explore.Starts() {
		if s.Name == "4k, LUKS" {
			d = s.Make(t)
		}
	}
	if d == nil {
		t.Fatal("there is no start with LUKS")
	}
	for name, change := range map[string]func(*qcow2.Image) error{
		"add": func(im *qcow2.Image) error {
			_, err := im.AddKey(ctx, 6, []byte("second"), cheap, false)
			return err
		},
		"replace": func(im *qcow2.Image) error {
			if _, err := im.AddKey(ctx, 1, []byte("second"), cheap, false); err != nil {
				return err
			}
			return im.ChangeKey(ctx, []byte("second"), []byte("third"), cheap)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for at := 0; ; at++ {
				mem := d.Image.Clone()
				file := storage.NewFaultFile(explore.KeepOpen{File: mem})
				im, err := d.Open(file, false)
				if err != nil {
					t.Fatal(err)
				}
				file.Inject(storage.Fault{Skip: at})
				failed := change(im)
				file.Clear()
				total.Add(1)
				if failed != nil && !isFault(failed) {
					t.Fatalf("call %d: %v", at, failed)
				}
				if _, err := im.AddKey(ctx, qcow2.AnyKeySlot, []byte("next"), cheap, false); err != nil {
					t.Fatalf("call %d: the next change: %v", at, err)
				}
				op := explore.Op{Kind: explore.Write, First: 5, N: 40, Version: 9}
				if err := errors.Join(op.Run(im), im.Close()); err != nil {
					t.Fatalf("call %d: %v", at, err)
				}
				report, err := qcow2.CheckFile(ctx, mem, qcow2.CheckOptions{})
				if err != nil || !report.Clean() {
					t.Fatalf("call %d: check: %+v (%v)", at, report, err)
				}
				for _, key := range []string{explore.Secret, "next"} {
					readsWith(t, mem, key, op)
				}
				if failed == nil {
					return // beyond the last call
				}
			}
		})
	}
}

func readsWith(t *testing.T, f *storage.MemFile, key string, op explore.Op) {
	t.Helper()
	im, err := qcow2.Open(context.Background(), explore.KeepOpen{File: f}, qcow2.Options{ReadOnly: true,
		Encrypt: &qcow2.EncryptOptions{Secret: []byte(key)}})
	if err != nil {
		t.Fatalf("key %q: %v", key, err)
	}
	defer im.Close()
	got := make([]byte, op.N*explore.SectorSize)
	if err := im.ReadAt(context.Background(), got, op.First*explore.SectorSize); err != nil || string(got) != string(op.Bytes()) {
		t.Fatalf("key %q: wrong data (%v)", key, err)
	}
}
