package explore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/damage"
)

// Damaged is a disk whose image was damaged, for the explorers of repairs.
type Damaged struct {
	*Disk
	Kind  damage.Kind
	Image *storage.MemFile // with the damage
	want  []byte           // the disk before the damage
}

// MakeDamaged writes to the disk what package damage wants, and damages its image in all ways that fit and can be
// repaired: every step-th of them, beginning with the given one.
func (s Start) MakeDamaged(t testing.TB, first, step int) []*Damaged {
	t.Helper()
	d := s.Make(t)
	im, err := d.Open(d.Image, false)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(4) {
		op := Op{Kind: Write, First: i * d.Cluster, N: d.Cluster, Version: Version(10 + i)}
		if i == 3 {
			op.Kind, op.Version = Zeroes, 0
		}
		if err := op.Run(im); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	want, err := d.content(d.Image)
	if err != nil {
		t.Fatal(err)
	}
	good := allOf(t, d.Image)
	x, err := damage.Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	var list []*Damaged
	for i, k := range damage.Kinds() {
		if i%step != first%step || k.Stays || !k.Fits(x) {
			continue
		}
		b, err := k.Apply(good)
		if err != nil {
			t.Fatal(err)
		}
		f := storage.NewMemFile("damaged")
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		list = append(list, &Damaged{Disk: d, Kind: k, Image: f, want: want})
	}
	return list
}

func allOf(t testing.TB, f storage.File) []byte {
	t.Helper()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if err := storage.ReadFull(f, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func (d *Disk) content(f storage.File) ([]byte, error) {
	im, err := d.Open(f, true)
	if err != nil {
		return nil, err
	}
	defer im.Close()
	b := make([]byte, d.Sectors*SectorSize)
	return b, im.ReadAt(context.Background(), b, 0)
}

// Repair repairs an image.
func Repair(f, undo storage.File) (*qcow2.RepairReport, error) {
	return qcow2.RepairFile(context.Background(), f, qcow2.RepairOptions{Mode: qcow2.RepairAll, Undo: undo})
}

// Judge repairs what is left of a repair that did not come to its end, and demands that nothing is wrong afterwards and
// that the disk is what it was before the damage, or, where the damage took data away, what that repair alone leaves.
func (d *Damaged) Judge(f storage.File) error {
	rep, err := Repair(f, nil)
	if err != nil {
		return fmt.Errorf("repairing again: %w", err)
	}
	if !rep.After.Clean() || rep.After.Dirty || rep.After.Corrupt {
		return fmt.Errorf("not repaired: %+v", rep.After)
	}
	got, err := d.content(f)
	if err != nil {
		return err
	}
	want := d.want
	if d.Kind.Loses {
		whole := d.Image.Clone()
		if _, err := Repair(whole, nil); err != nil {
			return err
		}
		if want, err = d.content(whole); err != nil {
			return err
		}
	}
	if !bytes.Equal(got, want) {
		return errors.New("the disk has another content")
	}
	return nil
}
