package scsi_test

import (
	"context"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
	"github.com/droverproject/drover/storage"
)

// volatile is a disk that says what a crash of the process would lose.
type volatile struct {
	block.Device
	lost int
}

func (v *volatile) WriteAt(ctx context.Context, p []byte, off int64, f block.WriteFlags) error {
	v.lost++
	return v.Device.WriteAt(ctx, p, off, f)
}

func (v *volatile) WriteZeroes(ctx context.Context, off, n int64, f block.ZeroFlags) error {
	v.lost++
	return v.Device.WriteZeroes(ctx, off, n, f)
}

func (v *volatile) Discard(ctx context.Context, off, n int64) error {
	v.lost++
	return v.Device.Discard(ctx, off, n)
}

func (v *volatile) Flush(ctx context.Context) error {
	v.lost = 0
	return v.Device.Flush(ctx)
}

// TestKeep: with Keep, nothing that was acknowledged can be lost with the process; without, it can until a flush.
func TestKeep(t *testing.T) {
	for _, keep := range []bool{true, false} {
		f := storage.NewMemFile("disk.raw")
		if err := f.Truncate(mib); err != nil {
			t.Fatal(err)
		}
		raw, err := block.NewRaw(f, block.RawOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		dev := &volatile{Device: raw}
		u, err := scsi.NewUnit(dev, scsi.Options{Keep: keep})
		if err != nil {
			t.Fatal(err)
		}
		ctx := context.Background()
		u.Execute(ctx, make([]byte, 6), nil) // the unit attention
		pages := scsi.Buffer{make([]byte, 4096), make([]byte, 4096)}
		unmap := append([]byte{0, 22, 0, 16, 0, 0, 0, 0}, make([]byte, 16)...)
		unmap[19] = 8
		for name, run := range map[string]func() scsi.Reply{
			"WRITE":         func() scsi.Reply { return u.Execute(ctx, rw16(0x8A, 0, 16), pages) },
			"WRITE SAME":    func() scsi.Reply { return u.Execute(ctx, rw16(0x93, 8, 64), scsi.Buffer{make([]byte, 512)}) },
			"UNMAP":         func() scsi.Reply { return u.Execute(ctx, cdb(10, 0x42, 7, uint16(24)), scsi.Buffer{unmap}) },
			"WRITE, VERIFY": func() scsi.Reply { return u.Execute(ctx, rw16(0x8E, 0, 16), pages) },
		} {
			if r := run(); r.Status != scsi.Good {
				t.Fatalf("%s: %+v", name, r)
			}
			if keep && dev.lost > 0 {
				t.Errorf("%s was acknowledged and can be lost", name)
			}
		}
		if u.Execute(ctx, rw16(0x8A, 0, 16), pages); !keep && dev.lost == 0 {
			t.Error("without Keep a write was flushed all the same: the test shows nothing")
		}
	}
}
